"""
Strict settings: `--key value` flags over a preset of configs.toml over the defaults of lad.py's Config, each checked against its knob.
Whatever is wrong with them raises a ValueError of one line that says where, which key, which value, and what was expected.
"""
import difflib, sys, tomllib
from pathlib import Path

PRESETS = Path(__file__).resolve().parent / "configs.toml"


def die(message):
    """Say in one line what to change, and leave with exit code 2."""
    print(f"lad.py: error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def one_line(error):
    return " ".join((str(error) or repr(error)).split())[:400]


def replace(path, text):
    """Write a whole file; who is killed meanwhile leaves the old one."""
    path.with_suffix(".tmp").write_text(text)
    path.with_suffix(".tmp").rename(path)


def did_you_mean(word, words):
    close = difflib.get_close_matches(word, list(words), 1)
    return f"; did you mean {close[0]!r}?" if close else f"; one of: {', '.join(words)}" if len(words) < 30 else "; --help lists them"


def check_value(key, value, where, knobs, objectives=()):
    """`value` as the type and in the range that its knob asks for. knobs: {name: dataclass field}; objectives: the names that may be trained."""
    if key not in knobs:
        raise ValueError(f"{where}: unknown key {key!r}{did_you_mean(key, knobs)}")
    kind, low, high, choices = knobs[key].type, *(knobs[key].metadata[k] for k in ("low", "high", "choices"))
    if isinstance(value, str) and kind is not str:   # from the command line
        try:
            value = {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
        except (ValueError, KeyError):
            pass
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ValueError(f"{where}: {key} = {value!r}: expected {kind.__name__}" + ", true or false" * (kind is bool))
    choices = objectives if key == "objective" else choices
    if choices and value not in choices:
        raise ValueError(f"{where}: {key} = {value!r}{did_you_mean(value, choices)}")
    if kind in (int, float) and not (abs(value) < 1e15 and (low is None or value >= low) and (high is None or value <= high)):   # inf and nan are refused, too
        bounds = ["a number"] + [f"at least {low}"] * (low is not None) + [f"at most {high}"] * (high is not None)
        raise ValueError(f"{where}: {key} = {value!r}: expected {', '.join(bounds)}")
    return value


def checked(values, where, knobs, die):
    """{key: value}, each checked; die(message) at the first that is wrong."""
    try:
        return {key: check_value(key, value, where, knobs) for key, value in values.items()}
    except ValueError as error:
        die(error)


def read_preset(name, knobs, objectives):
    """{key: value} of a table of configs.toml, or of the .toml file that `name` is the path of."""
    path = Path(name) if name.endswith(".toml") else PRESETS
    try:
        text = path.read_text()
        table = tomllib.loads(text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path}: {error}") from None
    if path == PRESETS:
        if name not in table:
            raise ValueError(f"{path}: no preset {name!r}{did_you_mean(name, table)}")
        table = table[name]
    lines = [line.split("=")[0].split("#")[0].strip() for line in text.splitlines()]   # tomllib keeps no line numbers; a person needs them
    start = lines.index(f"[{name}]") if f"[{name}]" in lines else 0
    number = lambda key: lines.index(key, start) + 1 if key in lines[start:] else start + 1
    return {key: check_value(key, value, f"{path}, line {number(key)}", knobs, objectives) for key, value in table.items()}


def show_help(knobs, objectives, text):
    print(text, "\nflags:\n  --config NAME     preset in configs.toml, or a .toml file (default: the values below)\n"
          "  --resume [DIR]    go on from the newest checkpoint of that run (default: of --out)\n"
          "  --plan            say what the run will need of memory and time, and stop: no GPU and no weights are touched (with it: --gpus N, 8 unless told, --gpu_memory GiB, --length mean tokens of a response)\n"
          f"  --objective NAME  {', '.join(objectives)}\n\nknobs (--key value):")
    for name, f in knobs.items():
        choices = f" [{'|'.join(f.metadata['choices'])}]" if f.metadata["choices"] else ""
        print(f"  --{name} {f.type.__name__} = {f.default!r}{choices}\n        {f.metadata['help']}")
    raise SystemExit(0)


def read(argv, knobs, objectives, help):
    """(name of the preset, {key: value}, the --resume flag: None, "" or a folder) of a command line without its program's name."""
    argv, flags = list(argv), {}
    while argv:
        flag, equals, value = argv.pop(0).partition("=")
        if flag in ("--help", "-h"):
            show_help(knobs, objectives, help)
        if not flag.startswith("--"):
            raise ValueError(f"expected --key value, not {flag!r}")
        if not equals and not (flag == "--resume" and (not argv or argv[0].startswith("--"))):
            if not argv:
                raise ValueError(f"{flag} needs a value")
            value = argv.pop(0)
        flags[flag[2:].replace("-", "_")] = value
    name, resume = flags.pop("config", "default"), flags.pop("resume", None)
    if resume == "" and name == "default" and "out" not in flags:
        raise ValueError("--resume needs the folder of the run, or the flags that it was started with")
    if resume:
        flags.setdefault("out", resume)
        name = str(Path(resume) / "config.toml")
    values = {} if name == "default" else read_preset(name, knobs, objectives)
    return name, values | {key: check_value(key, value, "command line", knobs, objectives) for key, value in flags.items()}, resume
