"""
Strict settings: `--key value` flags over a preset of configs.toml over the defaults of a dataclass,
each checked against its knob. Whatever is wrong with them raises a ValueError of one line that says
where, which key, which value, and what was expected.
"""

import dataclasses
import difflib
import json
import os
import sys
import tomllib
import traceback
from pathlib import Path

PRESETS = Path(__file__).resolve().parent.parent / "configs.toml"

# ==== 1. One line of errors, whole files ========================================================


def program():
    """The name of the program that a person started, for what it says of errors."""
    return os.path.basename(sys.argv[0]) or "lad.py"


def die(message):
    """Say in one line what to change, and leave with exit code 2. LAD_DEBUG=1 in the environment:
    after the traceback of the error that is being handled, if there is one."""
    if os.environ.get("LAD_DEBUG") == "1" and sys.exc_info()[1]:
        traceback.print_exc()
    print(f"{program()}: error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def one_line(error):
    return " ".join((str(error) or repr(error)).split())[:400]


def replace(path, text):
    """Write a whole file; who is killed meanwhile leaves the old one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.rename(path)


def to_toml(values):
    """{key: string, number or boolean} as TOML. A JSON string is a TOML string, but for characters
    beyond 16 bits, which JSON writes as two halves, and DEL, which TOML wants escaped."""
    lines = []
    for key, value in values.items():
        text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        lines.append(f"{key} = {text}\n")
    return "".join(lines)


# ==== 2. Knobs ==================================================================================


def knob(default, help, low=None, high=None, of=""):
    """A setting: its default, its help (units included), its closed range, or the names it may
    take, separated by spaces."""
    metadata = dict(help=help, low=low, high=high, choices=tuple(of.split()))
    return dataclasses.field(default=default, metadata=metadata)


def did_you_mean(word, words):
    close = difflib.get_close_matches(word, list(words), 1)
    if close:
        return f"; did you mean {close[0]!r}?"
    if len(words) < 30:
        return f"; one of: {', '.join(words)}"
    return "; --help lists them"


def check_value(key, value, where, knobs, objectives=()):
    """`value` as the type and in the range that its knob asks for, else ValueError.

    knobs: {name: dataclass field}; objectives: the names that may be trained.
    """
    if key not in knobs:
        raise ValueError(f"{where}: unknown key {key!r}{did_you_mean(key, knobs)}")
    kind = knobs[key].type
    if isinstance(value, str) and kind is not str:
        value = parsed(value, kind)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        also = ", true or false" if kind is bool else ""
        raise ValueError(f"{where}: {key} = {value!r}: expected {kind.__name__}{also}")

    choices = objectives if key == "objective" else knobs[key].metadata["choices"]
    if choices and value not in choices:
        raise ValueError(f"{where}: {key} = {value!r}{did_you_mean(value, choices)}")
    if kind in (int, float):
        check_range(key, value, where, knobs[key].metadata["low"], knobs[key].metadata["high"])
    return value


def checked(values, where, knobs):
    """{key: value}, each checked; one line and exit code 2 at the first that is wrong."""
    try:
        return {key: check_value(key, value, where, knobs) for key, value in values.items()}
    except ValueError as error:
        die(error)


def parsed(text, kind):
    """What the text of a flag says of a bool, an int or a float; the text where it says none."""
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        return kind(text)
    except (ValueError, KeyError):
        return text


def check_range(key, value, where, low, high):
    fits = abs(value) < 1e15  # inf and nan do not
    fits = fits and (low is None or value >= low) and (high is None or value <= high)
    if not fits:
        bounds = ["a number"]
        if low is not None:
            bounds.append(f"at least {low}")
        if high is not None:
            bounds.append(f"at most {high}")
        raise ValueError(f"{where}: {key} = {value!r}: expected {', '.join(bounds)}")


# ==== 3. Presets and flags ======================================================================


def read_preset(name, knobs, objectives):
    """{key: value} of a table of configs.toml, or of the .toml file that `name` is the path of."""
    path = Path(name) if name.endswith(".toml") else PRESETS
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a mark
        table = tomllib.loads(text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path}: {error}") from None
    if path == PRESETS:
        table.pop("bench", None)  # eval.py's benchmarks, which nobody trains on
        if name not in table:
            raise ValueError(f"{path}: no preset {name!r}{did_you_mean(name, table)}")
        table = table[name]

    values = {}
    for key, value in table.items():
        where = f"{path}, line {line_of(key, name, text)}"
        values[key] = check_value(key, value, where, knobs, objectives)
    return values


def line_of(key, table, text):
    """The number of the line that sets a key: tomllib keeps none, and a person needs it."""
    lines = [line.split("=")[0].split("#")[0].strip() for line in text.splitlines()]
    start = lines.index(f"[{table}]") if f"[{table}]" in lines else 0
    return lines.index(key, start) + 1 if key in lines[start:] else start + 1


HELP = """
flags:
  --config NAME     preset in configs.toml, or a .toml file (default: the values below)
  --resume [DIR]    go on from the newest checkpoint of that run (default: of --out); with another
                    --out, into that folder, with the log so far, and DIR stays as it is
  --plan            say what the run will need of memory and time, and stop: no GPU and no weights
                    are touched (with it: --gpus N, 8 unless told, --gpu_memory GiB, --length mean
                    tokens of a response)
  --objective NAME  {}

knobs (--key value):"""


def show_help(knobs, objectives, text):
    print(text, HELP.format(", ".join(objectives)))
    for name, field in knobs.items():
        choices = "|".join(field.metadata["choices"])
        choices = f" [{choices}]" if choices else ""
        print(f"  --{name} {field.type.__name__} = {field.default!r}{choices}")
        print(f"        {field.metadata['help']}")
    raise SystemExit(0)


def read_flags(argv):
    """{flag: text} of a command line without its program's name; --resume may stand alone."""
    argv = list(argv)
    flags = {}
    while argv:
        flag, equals, value = argv.pop(0).partition("=")
        if not flag.startswith("--"):
            raise ValueError(f"expected --key value, not {flag!r}")
        alone = flag == "--resume" and (not argv or argv[0].startswith("--"))
        if not equals and not alone:
            if not argv:
                raise ValueError(f"{flag} needs a value")
            value = argv.pop(0)
        flags[flag[2:].replace("-", "_")] = value
    return flags


def read_settings(argv, knobs, objectives, help):
    """(name of the run's preset, {key: value}, the folder of --resume: "" for --out, None without
    that flag) of a command line."""
    if "--help" in argv or "-h" in argv:
        show_help(knobs, objectives, help)
    flags = read_flags(argv)
    name = flags.pop("config", "default")
    resume = flags.pop("resume", None)
    if resume == "" and name == "default" and "out" not in flags:
        raise ValueError(
            "--resume needs the folder of the run, or the flags that it was started with"
        )
    if resume:
        flags.setdefault("out", resume)
        name = str(Path(resume) / "config.toml")

    values = {}
    if name != "default":
        values = read_preset(name, knobs, objectives)
    for key, value in flags.items():
        values[key] = check_value(key, value, "command line", knobs, objectives)
    return preset_name(name), values, resume


def preset_name(name):
    """What a run is named after: a preset; a file without its ending; for a run's config.toml, the
    run."""
    path = Path(name)
    if path.suffix != ".toml":
        return name
    if path.name == "config.toml":
        return path.resolve().parent.name
    return path.stem
