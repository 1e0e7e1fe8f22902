"""
What the project promises of itself: the pages name commands, flags, files, functions, tests and
places that exist, and every preset's architecture can be built.
"""

import contextlib
import functools
import io
import os
import re
import runpy
import shlex
import sys
import tomllib

import pytest
import torch
from conftest import ROOT

import lad
from harness import tiny

PAGES = {}  # name -> text
for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]:
    PAGES[str(path.relative_to(ROOT))] = path.read_text()
README = PAGES["README.md"]

PROGRAMS = [
    "lad.py",
    "eval.py",
    "verify.py",
    "bandit.py",
    "tools/bench.py",
    "tools/study.py",
    "tools/plan.py",
    "tools/first_hour.py",
    "tools/gpu_checks.py",
    "harness/plot.py",
]
# Flags of torchrun, pytest and the like, which pages mention in passing
FOREIGN_FLAGS = {"--nproc_per_node", "--shutdown-timeout", "--standalone"}
FOREIGN_FLAGS |= {"--rdzv_id", "--local-addr", "--max-restarts"}
# Files that stand for a reader's own, or are a run's
PLACEHOLDERS = {"my_rewards.py", "items.jsonl", "mine.py", "mine.toml", "FILE.py", "config.toml"}


# ==== 1. What is written in a page ==============================================================


def blocks(text, languages):
    """The code blocks of a page whose language is one of these."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)
    return [code for language, code in found if language in languages]


def prose(text):
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def commands(text):
    """The lines of a page's shell blocks that run something of ours, without their comments."""
    found = []
    for code in blocks(text, ("sh", "bash")):
        for line in code.replace("\\\n", " ").splitlines():
            line = re.sub(r"\s+#.*", "", line).strip()
            if re.search(r"\w\.(py|sh)\b|pytest|ruff|\.ci/run", line):
                found.append(line)
    return found


def inline(text):
    """What stands between single backticks in a page's prose."""
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(text))


def anchors(text):
    """The anchors that GitHub makes of a page's headings."""
    found = set()
    for title in re.findall(r"^#+ (.*)$", prose(text), re.M):
        kept = re.sub(r"[^\w -]", "", title.lower())
        found.add(kept.strip().replace(" ", "-"))
    return found


ALL_COMMANDS = [(page, line) for page, text in PAGES.items() for line in commands(text)]


# ==== 2. Links ==================================================================================


@pytest.mark.parametrize("page", PAGES)
def test_page_is_finished(page):
    assert not re.search(r"\bTODO\b|\bFIXME\b|^TABLE$", PAGES[page], re.M)


@pytest.mark.parametrize("page", PAGES)
def test_links_and_anchors_resolve(page):
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(PAGES[page])):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        path = (folder / name).resolve() if name else ROOT / page
        assert path.exists(), f"{page} links to {target}, which is not there"
        if anchor:
            other = PAGES[str(path.relative_to(ROOT))]
            assert anchor in anchors(other), f"{page} links to {target}: no such heading"


@pytest.mark.parametrize("page", [page for page in PAGES if page != "README.md"])
def test_readme_leads_to_every_page(page):
    assert f"]({page})" in README


# ==== 3. Commands ===============================================================================


def test_readme_has_the_two_commands_and_ci_runs_the_second():
    found = commands(README)
    assert found[0] == "bash setup.sh && .venv/bin/python lad.py --config tiny --objective lad"
    assert found[1] == "bash setup.sh && .venv/bin/python -m pytest"
    assert found[1] in (ROOT / ".ci/run").read_text()


@functools.cache
def known_flags(program):
    """The flags that a program's --help, or its own text, names. Run here and not in a process of
    its own, which would import torch anew."""
    printed = io.StringIO()
    argv, environment, path = sys.argv, dict(os.environ), list(sys.path)
    sys.argv = [str(ROOT / program), "--help"]
    try:
        with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as stop:
            runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        sys.argv = argv
        sys.path[:] = path
        os.environ.clear()
        os.environ.update(environment)
    assert stop.value.code in (0, None), f"{program} --help left with {stop.value.code}"
    return set(re.findall(r"--\w+", printed.getvalue() + (ROOT / program).read_text()))


def files_in(words):
    """The words of a command that are files of this project."""
    return [word for word in words if re.fullmatch(r"[\w./-]+\.(py|sh)", word)]


@pytest.mark.parametrize(("page", "command"), ALL_COMMANDS)
def test_commands_name_files_and_flags_that_exist(page, command):
    for part in re.split(r"&&|;|\|", command):
        words = shlex.split(part)
        for file in files_in(words):
            assert file in PLACEHOLDERS or (ROOT / file).exists(), f"{page}: no file {file}"
        for program in PROGRAMS:
            if program in words and words[0] != "cp":
                argv = words[words.index(program) + 1 :]
                flags = {word.partition("=")[0] for word in argv if word.startswith("--")}
                assert flags <= known_flags(program), f"{page}: {command}"


def runs_of_lad():
    """The arguments of every command that starts lad.py, but for those that need a run or a GPU."""
    found = []
    for _, command in ALL_COMMANDS:
        words = shlex.split(command)
        if "lad.py" in words and words[0] != "cp":
            argv = words[words.index("lad.py") + 1 :]
            if not {"--help", "--resume", "--plan"} & set(argv):
                found.append(argv)
    return found


@pytest.mark.parametrize("argv", runs_of_lad(), ids=" ".join)
def test_settings_of_commands_parse(argv):
    lad.load_config(argv)


# ==== 4. Names ==================================================================================


@pytest.mark.parametrize("page", PAGES)
def test_files_named_in_prose_exist(page):
    for word in inline(PAGES[page]):
        for file in re.findall(r"(?<![\w./*-])[\w./-]+\.(?:py|sh|toml|csv|png)\b", word):
            is_of_a_run = page == "docs/metrics.md" or file.startswith("runs/")
            if file not in PLACEHOLDERS and not is_of_a_run and file != "plot.png":
                assert (ROOT / file).exists(), f"{page}: no file {file}"


@pytest.mark.parametrize("page", PAGES)
def test_flags_named_in_prose_exist(page):
    known = set.union(FOREIGN_FLAGS, *map(known_flags, PROGRAMS))
    for word in inline(PAGES[page]):
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", word):
            assert flag in known, f"{page}: no program has {flag}"


@pytest.mark.parametrize("page", PAGES)
def test_functions_named_in_prose_exist(page):
    sources = [*ROOT.glob("*.py"), *ROOT.glob("harness/*.py"), *ROOT.glob("tools/*.py")]
    defined = set(re.findall(r"^ *def (\w+)", "".join(p.read_text() for p in sources), re.M))
    named = {word[:-2] for word in inline(PAGES[page]) if re.fullmatch(r"\w+\(\)", word)}
    assert named <= defined, f"{page}: {named - defined}"


@pytest.mark.parametrize("page", PAGES)
def test_tests_named_in_pages_exist(page):
    files = list((ROOT / "tests").glob("test_*.py"))
    defined = set(re.findall(r"^def (test_\w+)", "".join(p.read_text() for p in files), re.M))
    # not a file, and not a quoted key as in {"test_list": ...}
    named = set(re.findall(r"(?<![\w/\"])(test_\w+)\b(?!\.py)", PAGES[page]))
    assert named <= defined, f"{page}: {named - defined}"


def test_table_of_sections_is_that_of_lad():
    """Numbers and titles of the banners, in order, are the first column of the README's table."""
    banners = re.findall(r"^# ==== (\d+\. .+?) =+$", (ROOT / "lad.py").read_text(), re.M)
    table = re.findall(r"^\| (\d+\. [^|]+?) \|", README, re.M)
    assert table == banners and len(banners) > 5


def test_table_of_objectives_is_that_of_lad():
    table = README.partition("| `--objective` |")[2].partition("\n\n")[0]
    cells = re.findall(r"^\| (`[^|]+) \|", table, re.M)  # a row may hold several
    names = [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(names) == sorted(lad.OBJECTIVES)


def test_readme_names_every_preset():
    assert set(PRESETS) <= set(inline(README))


def test_glossary_has_every_metric():
    """docs/metrics.md against what test_run.py finds in the log of a run."""
    from test_run import KEYS

    table = PAGES["docs/metrics.md"].partition("## Lines of training")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (`[^|]+) \|", table, re.M)
    keys = [key for cell in cells for key in re.findall(r"`(\w+)`", cell)]
    assert sorted(keys) == sorted(KEYS)


# ==== 5. Presets ================================================================================

# From config.json of the hub models, as published; width, depth and vocabulary are cut down below
# fmt: off
SHAPES = {  # attention heads, KV heads, intermediate size, tied embeddings
    "Qwen/Qwen2.5-0.5B":                       (14, 2, 4864, True),
    "Qwen/Qwen2.5-0.5B-Instruct":              (14, 2, 4864, True),
    "Qwen/Qwen2.5-7B":                         (28, 4, 18944, False),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": (28, 4, 18944, False),
    "nvidia/OpenMath-Nemotron-1.5B":           (12, 2, 8960, True),
    "Vinnnf/Thinkless-1.5B-RL-DeepScaleR":     (12, 2, 8960, False),
    "facebook/cwm-sft":                        (48, 8, 21504, False),
    "HuggingFaceTB/SmolLM2-135M-Instruct":     (9, 3, 1536, True),
}
# fmt: on
OTHERS = {  # what is no Qwen2
    "facebook/cwm-sft": dict(model_type="cwm", sliding_window=5),
    "HuggingFaceTB/SmolLM2-135M-Instruct": dict(model_type="llama"),
}
PRESETS = {}  # name -> model
for name, table in tomllib.loads((ROOT / "configs.toml").read_text()).items():
    if name != "bench":
        PRESETS[name] = lad.Config(**table).model


def small_config(model):
    """A stand-in of the same architecture and proportions: two KV heads of 16, five layers deep."""
    from transformers import AutoConfig

    heads, kv_heads, intermediate, tied = SHAPES[model]
    more = dict(OTHERS.get(model, {}))
    ratio = heads // kv_heads
    return AutoConfig.for_model(
        more.pop("model_type", "qwen2"),
        hidden_size=16 * 2 * ratio,
        num_attention_heads=2 * ratio,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=intermediate // 64,
        tie_word_embeddings=tied,
        num_hidden_layers=5,
        vocab_size=64,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **more,
    )


PUBLISHED = [name for name, model in PRESETS.items() if model not in tiny.TASKS]


@pytest.mark.parametrize("preset", PUBLISHED)
def test_every_presets_architecture_builds_and_trains(preset, tmp_path):
    """Saved and read through build_model, it agrees with transformers' own forward and takes a
    gradient."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    reference = AutoModelForCausalLM.from_config(
        small_config(PRESETS[preset]), dtype=torch.float32, attn_implementation="eager"
    )
    reference.save_pretrained(tmp_path)
    model = lad.build_model(tmp_path, lad.Config(checkpointing=False), torch.device("cpu"))

    samples = [
        dict(prompt=[3, 4, 5], tokens=list(range(6, 20))),
        dict(prompt=[9], tokens=[8, 7]),
    ]
    logp, *_ = model(lad.pack(samples, torch.device("cpu")), 1.0, 4096)  # [R]

    want = []
    for s in samples:
        n = len(s["tokens"])
        logits = reference(torch.tensor([s["prompt"] + s["tokens"]])).logits[0, -n - 1 : -1]
        targets = torch.tensor(s["tokens"])
        want.append(logits.log_softmax(-1)[torch.arange(n), targets])
    torch.testing.assert_close(logp, torch.cat(want), rtol=1e-4, atol=1e-4)

    logp.sum().backward()
    for p in model.parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all()
