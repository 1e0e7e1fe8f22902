"""Rewards of one's own: what they may return, what they may do, and whole runs with one."""

import json
import re
import runpy
import shutil
import time
from pathlib import Path

import pytest
import torch
from conftest import GRACE, ROOT, launch, metrics
from test_config import refused
from test_run import SHORT

import lad
import verify
from harness import rewards

# Of a response, the name of a case, what its function does or returns
CASES = """
import ctypes, decimal, fractions, os, subprocess, sys, time
import numpy as np

def returned(response, row):
    return VALUES[response]

VALUES = {
    "one": 1, "share": 0.3, "minus": -1.0, "two": 2, "true": True, "false": False,
    "float32": np.float32(0.5), "int64": np.int64(3), "bool_": np.bool_(True),
    "fraction": fractions.Fraction(1, 4), "pair": (0.25, "nearly"), "empty reason": (1, ""),
    "colon": (0, "wrong:  at\\nthe end"), "numpy pair": (np.float64(0.5), "half"),
    "none": None, "nan": float("nan"), "inf": float("inf"), "text": "1.0", "list": [1.0],
    "array": np.ones(2), "triple": (1, "a", "b"), "nan pair": (float("nan"), "why"),
    "reason that is none": (1, 2), "huge": 10**400, "complex": 1j,
    "decimal": decimal.Decimal("0.5"),
}

def does(response, row):
    if response == "hang":
        time.sleep(1000)
    if response == "spin":
        while True:
            pass
    if response == "leave":
        sys.exit(0)
    if response == "end":
        os._exit(0)
    if response == "segfault":
        ctypes.string_at(0)
    if response == "raise":
        return row["no such field"]
    if response == "recurse":
        return does(response, row)
    if response == "memory":
        return len(bytearray(8 << 30))
    if response == "print":
        print('[1.0, ""]\\n' * 100_000, flush=True)
        os.write(1, b'[1.0, ""]\\n')
        print("to stderr", file=sys.stderr, flush=True)
    if response == "read":
        input()
    if response == "child":
        child = subprocess.Popen(["sleep", "1000"])
        open(row["file"], "w").write(str(child.pid))
        time.sleep(1000)
    if response == "later":
        return later
    return 0.5

async def later(response, row):
    return 1.0
"""


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    path = tmp_path_factory.mktemp("cases") / "cases.py"
    path.write_text(CASES)
    return path


def judged(name, items, timeout=10.0, workers=1):
    """[(reward, reason)] of (response, row), by FILE.py:function."""
    kind = rewards.PREFIX + rewards.find(str(name))
    with verify.Verifier(workers, timeout) as verifier:
        scores = verifier.score([(kind, response, row) for response, row in items])
        return list(zip(scores, verifier.reasons, strict=True))


# ==== 1. What it returns ========================================================================

NUMBERS = {
    "one": 1.0,
    "share": 0.3,
    "minus": -1.0,
    "two": 2.0,
    "true": 1.0,
    "false": 0.0,
    "float32": 0.5,
    "int64": 3.0,
    "bool_": 1.0,
    "fraction": 0.25,
}
PAIRS = {
    "pair": (0.25, "nearly"),
    "empty reason": (1.0, ""),
    "colon": (0.0, "wrong; at the end"),  # no failure of the reward, hence no colon
    "numpy pair": (0.5, "half"),
}
NONSENSE = {
    "none": "None",
    "nan": "nan",
    "inf": "inf",
    "text": "'1.0'",
    "list": "[1.0]",
    "array": "array([1., 1.])",
    "triple": "(1, 'a', 'b')",
    "nan pair": "(nan, 'why')",
    "reason that is none": "(1, 2)",
    "huge": "1000",
    "complex": "1j",
    "decimal": "Decimal('0.5')",
}


def test_what_a_reward_may_return(cases):
    names = [*NUMBERS, *PAIRS, *NONSENSE]
    found = dict(zip(names, judged(f"{cases}:returned", [(n, {}) for n in names]), strict=True))
    for name, value in NUMBERS.items():
        assert found[name] == (value, ""), name
    for name, pair in PAIRS.items():
        assert found[name] == pair, name
    for name, shown in NONSENSE.items():
        score, reason = found[name]
        assert score == 0 and reason.startswith(f"crashed: returned {shown}"), (name, reason)
        assert reason.endswith("expected a finite number")


UNPRINTABLE = """
TEXT = "half \\ud800, red \\x1b[31m, " + "long " * 200_000
class Silent(Exception):
    def __str__(self):
        raise type("Long" * 200_000, (Exception,), {})
def own(response, row):
    if response == "pair":
        return 0, TEXT
    if response == "raises":
        raise ValueError(TEXT)
    if response == "long name":
        raise type("Long" * 200_000, (Exception,), {})
    raise Silent
"""


def test_reasons_are_short_and_can_be_printed(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(UNPRINTABLE)
    names = ("pair", "raises", "long name", "silent")
    reasons = [reason for _, reason in judged(f"{path}:own", [(name, {}) for name in names])]
    for reason in reasons:
        assert reason.isprintable() and len(reason) <= 200, reason[:300]
    assert reasons[0].startswith(r"half \ud800, red \x1b[31m, long")
    assert reasons[1].startswith(r"crashed: ValueError half \ud800, red \x1b[31m, long")
    assert "(own.py, line 10)" in reasons[1] and "(own.py, line 12)" in reasons[2]


def test_a_row_arrives_as_it_is(tmp_path):
    path = tmp_path / "own.py"
    path.write_text("def own(response, row):\n    return row['n'], repr((response, row))\n")
    row = {"n": 7, "texts": ["é", "\n"], "nested": {"none": None, "true": True}, "x": 0.1}
    response = 'a "quoted"\nline \ud800'
    [(score, reason)] = judged(f"{path}:own", [(response, row)])
    wanted = " ".join(repr((response, row)).replace(":", ";").split())[:200]
    assert (score, reason) == (7.0, wanted)


# ==== 2. What it does ===========================================================================

DONE = {
    "hang": "timeout: worker replaced",
    "spin": "timeout: worker replaced",
    "leave": "crashed: worker replaced",
    "end": "crashed: worker replaced",
    "segfault": "crashed: worker replaced",
    "raise": "crashed: KeyError 'no such field' (cases.py, line ",
    "recurse": "crashed: RecursionError ",
    "memory": "crashed: MemoryError (cases.py, line ",
    "read": "crashed: EOFError ",
    "later": "crashed: returned <function later",
}


def test_what_a_reward_may_do(cases):
    """Each of these, and behind each of them an item that is scored as if nothing had been."""
    names = [*DONE, "print"]
    items = [item for name in names for item in ((name, {}), ("well", {}))]
    began = time.monotonic()
    found = judged(f"{cases}:does", items, timeout=1.0)
    assert time.monotonic() - began < GRACE + 10
    for name, (score, reason) in zip(names, found[::2], strict=True):
        if name == "print":
            assert (score, reason) == (0.5, "")
        else:
            assert score == 0 and reason.startswith(DONE[name]), (name, reason)
    assert found[1::2] == [(0.5, "")] * len(names)


def test_what_a_reward_has_started_ends_with_it(cases, tmp_path):
    file = tmp_path / "pid"
    [(_, reason)] = judged(f"{cases}:does", [("child", {"file": str(file)})], timeout=2.0)
    assert reason == "timeout: worker replaced"
    stat = Path(f"/proc/{file.read_text()}/stat")
    end = time.monotonic() + GRACE
    while stat.exists() and ") Z" not in stat.read_text():  # a zombie is dead
        assert time.monotonic() < end, "the child still runs"
        time.sleep(0.01)


@pytest.mark.slow
def test_slow_imports_and_torch_do_not_count(tmp_path, monkeypatch):
    """An item has a second; importing took longer. GPUs are the trainer's, cores are shared."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    path = tmp_path / "slow.py"
    path.write_text(
        "import os, time\nimport torch\ntime.sleep(2)\n"
        "def own(response, row):\n"
        "    assert os.environ['CUDA_VISIBLE_DEVICES'] == ''\n"
        "    return torch.tensor(row['x']).sigmoid(), str(torch.get_num_threads())\n"
    )
    [(score, reason)] = judged(f"{path}:own", [("", {"x": 0.0})], timeout=GRACE)
    assert (score, reason) == (0.5, "1")
    path.write_text("import time\ntime.sleep(2)\ndef own(response, row):\n    return 1\n")
    assert judged(f"{path}:own", [("", {})], timeout=1.0) == [(1.0, "")]


def test_a_file_may_import_what_is_beside_it_and_what_is_here(tmp_path):
    (tmp_path / "beside.py").write_text("def length(text):\n    return len(text)\n")
    path = tmp_path / "own.py"
    path.write_text(
        "from dataclasses import dataclass\nimport beside, verify\n"
        "@dataclass\nclass Weight:\n    value: float = 0.5\n"
        "def own(response, row):\n"
        "    right, why = verify.judge('math', response, row['answer'])\n"
        "    return right + Weight().value * beside.length(response)\n"
    )
    assert judged(f"{path}:own", [("\\boxed{7}", {"answer": "7"})]) == [(5.5, "")]


# ==== 3. Its file ===============================================================================


def why_not(name):
    with pytest.raises(ValueError) as error:
        rewards.find(str(name))
    return str(error.value)


def test_what_is_no_reward_is_refused(tmp_path, capsys):
    path = tmp_path / "own.py"
    path.write_text("def own(response, row):\n    return 1\n")
    assert "expected FILE.py:function" in why_not(path)
    assert "expected FILE.py:function" in why_not(f"{path}:not a name")
    assert "No such file" in why_not(tmp_path / "other.py:own")
    path.write_text("def own(response, row):\n    return (1\n")
    assert f"{path}, line 2: '(' was never closed" in why_not(f"{path}:own")
    assert "line 2: '(' was never closed" in refused(capsys, "--reward", f"{path}:own")
    for begin in (b"\xef\xbb\xbf", b"# coding: latin-1\n# \xff\n"):  # as Python reads them
        path.write_bytes(begin + b"def own(response, row):\n    return 1\n")
        assert rewards.find(f"{path}:own") == f"{path}:own"
        assert judged(f"{path}:own", [("", {})]) == [(1.0, "")]
    path.write_bytes(b"\xff\x00")
    assert "reward: " in why_not(f"{path}:own")
    assert "kind = text says only how" in refused(capsys, "--kind", "text")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("def owm(response, row):\n    return 1\n", "no function 'own'; did you mean 'owm'?"),
        ("own = 3\n", "no function 'own'"),
        ("import no_such_package\n", "failed: ModuleNotFoundError No module named"),
        (
            "def f():\n    return 1 / 0\nf()\n",
            "ZeroDivisionError division by zero (own.py, line 2)",
        ),
        ("import sys\nsys.exit(3)\n", "failed: SystemExit 3 (own.py, line 2)"),
        ("import os\nos._exit(0)\n", "importing it ended the process"),
    ],
)
def test_a_file_that_cannot_be_used(source, says, tmp_path):
    path = tmp_path / "own.py"
    path.write_text(source)
    with pytest.raises(RuntimeError) as error:
        judged(f"{path}:own", [("", {})])
    assert says in str(error.value)


def test_a_file_that_is_edited_or_moved_stays_as_it_was(tmp_path):
    """For as long as a verifier lives, its workers that are replaced included."""
    path = tmp_path / "own.py"
    path.write_text(
        "import os\ndef own(response, row):\n    if response == 'end':\n        os._exit(0)\n"
        "    return 1\n"
    )
    kind = rewards.PREFIX + rewards.find(f"{path}:own")
    with verify.Verifier(1, 10.0) as verifier:
        assert verifier.score([(kind, "", {})]) == [1.0]
        path.write_text("def own(response, row):\n    return 2\n")
        assert verifier.score([(kind, "end", {}), (kind, "", {})]) == [0.0, 1.0]
        path.unlink()
        assert verifier.score([(kind, "end", {}), (kind, "", {})]) == [0.0, 1.0]


# ==== 4. Rewards that are not 0 or 1 ============================================================


@pytest.mark.parametrize("objective", lad.OBJECTIVES)
@pytest.mark.parametrize("values", [[0.3, 0.1, 0.0, 0.3], [-1, -1, 2, 2], [-2, -1, -1, -3]])
def test_advantages_of_any_rewards(objective, values):
    """Finite; and where a rule speaks of a solve rate, that of what is over 0.5 or of what is
    clipped to [0, 1]."""
    cfg = lad.Config(objective=objective, group=4, pass_k=2)
    group = []
    for value in values:
        sample = dict(reward=float(value), correct=float(value), failed="", tokens=[1], truncated=0)
        sample |= dict(old=torch.zeros(1), ref=torch.zeros(1))
        group.append(sample)
    lad.set_advantages([group], cfg, dict(lad.new_state(), p=0.2))
    got = torch.tensor([s["adv"] for s in group])
    assert torch.isfinite(got).all()
    r = torch.tensor([values], dtype=torch.float64)
    clipped = r.clamp(0, 1)
    want = lad.advantages(
        objective,
        r,
        cfg,
        dict(lad.new_state(), p=0.2, correct=clipped, drift=torch.zeros_like(r)),
    )
    torch.testing.assert_close(got.double(), want[0], rtol=1e-6, atol=1e-9)
    if objective == "power":
        focus = 1 - clipped.mean()
        torch.testing.assert_close(want, focus * (r - r.mean()))


def test_any_two_rewards_are_a_signal():
    group = [dict(correct=x, failed="") for x in (0.1, 0.3)]
    assert lad.has_signal(group) and not lad.has_signal([group[0], group[0]])


# ==== 5. Programs ===============================================================================

MAKE24 = "examples/make24.py:reward"


def test_the_command(tmp_path):
    items = tmp_path / "items.jsonl"
    lines = [
        {"response": "I get <answer>2*3*4</answer>", "numbers": [2, 3, 4], "want": 1},
        {"response": "4+3+2", "numbers": [2, 3, 4]},
        {"response": "6*4", "numbers": [2, 3, 4], "want": 0.3},
        {"response": "none", "numbers": [2, 3, 4]},
    ]
    items.write_text("\n".join(map(json.dumps, lines)))
    done = launch(["verify.py", "--reward", MAKE24, items], check=False)
    assert done.returncode == 1, done.stdout
    printed = re.findall(r"\d reward +(\S+) (.*)", done.stdout)
    assert [score for score, _ in printed] == ["1", "0.3", "0.1", "0"]
    assert printed[1][1] == "the numbers, but not 24" and "<- wanted 0.3" in printed[2][1]
    assert "1 right" in done.stdout and "mean reward 0.35, right is over 0.5" in done.stdout

    items.write_text('{"truth": 3}\n')
    done = launch(["verify.py", "--reward", MAKE24, items], check=False)
    assert done.returncode == 2 and 'line 1: an item is {"response": ...}' in done.stdout


def test_the_example_makes_its_data():
    done = launch(["examples/make24.py", 3])
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {"prompt": "2 3 4=24:", "numbers": [2, 3, 4]} in rows
    assert all(len(row["numbers"]) == 3 for row in rows)
    assert not any(row["numbers"] == [1, 1, 1] for row in rows)


@pytest.mark.parametrize(
    ("response", "said"),
    [
        ("My horse eats apples.", 1.0),
        (" A horse, it ran!\n", 1.0),
        ("The horse eats the apples.", (0.0, "too long or too short")),
        ("A horse ran.", (0.0, "too long or too short")),
        ("My horses eat apples.", (0.0, "without the word")),
        ("The horse, the end.", (0.0, "a word twice")),
        ("my horse eats apples.", (0.0, "no sentence")),
        ("My horse eats apples", (0.0, "no sentence")),
        ("My horse eats 4.", (0.0, "no sentence")),
        ("My horse eats. Apples.", (0.0, "no sentence")),
        ("", (0.0, "no sentence")),
    ],
)
def test_sentences_of_four_words(response, said):
    words = runpy.run_path(str(ROOT / "examples/words.py"))
    assert words["reward"](response, {"word": "horse"}) == said


def test_nouns_to_train_on_are_not_those_held_out():
    words = runpy.run_path(str(ROOT / "examples/words.py"))
    train = {row["word"] for row in words["train"]()}
    held_out = {row["word"] for row in words["test"]()}
    assert (len(train), len(held_out)) == (144, 48)
    assert not train & held_out and not words["SHOWN"].keys() & (train | held_out)
    for row in words["train"]():  # the examples are right, and the word is asked for last
        *_, last = row["messages"]
        assert last == {"role": "user", "content": row["word"]}
    for noun, sentence in words["SHOWN"].items():
        assert words["reward"](sentence, {"word": noun}) == 1.0


@pytest.fixture(scope="module")
def make24(tmp_path_factory):
    folder = tmp_path_factory.mktemp("make24")
    shutil.copy(ROOT / "examples/make24.py", folder / "mine.py")
    rows = "".join(
        json.dumps({"prompt": f"{a} {b} {c}=24:", "numbers": [a, b, c]}) + "\n"
        for a, b, c in [(2, 3, 4), (1, 3, 8), (1, 4, 6), (3, 3, 5), (2, 2, 6), (3, 4, 6)]
    )
    (folder / "rows.jsonl").write_text(rows)
    return folder


def test_a_run(forks, make24, tmp_path):
    """Its rows have no truth; what it logs is the function's; its file is kept, and can be resumed
    from once the first is gone."""
    own = tmp_path / "mine.py"
    own.write_text(
        f"import sys\nsys.path.insert(1, {str(ROOT)!r})\n" + (make24 / "mine.py").read_text()
    )
    out = tmp_path / "run"
    flags = [*SHORT, "--data", make24 / "rows.jsonl", "--eval_data", make24 / "rows.jsonl"]
    printed = forks.run("lad.py", *flags, "--steps", 2, "--reward", f"{own}:reward", "--out", out)
    assert f"reward    {own}:reward; over 0.5 it counts as solved" in printed

    sys_rewards = {0.0, 0.1, 0.3, 1.0}
    samples = [json.loads(line) for line in open(out / "samples.jsonl")]
    assert samples and {s["reward"] for s in samples} <= sys_rewards
    for s in samples:
        assert s["truth"]["prompt"] == s["prompt"]
        assert bool(s["reason"]) == (s["reward"] < 1)
    train = [x for x in metrics(out) if "loss" in x]
    evals = [x for x in metrics(out) if "eval/pass@1" in x]
    assert all(x["solve_rate"] <= x["reward"] <= 1 for x in train)
    assert any(x["solve_rate"] < x["reward"] for x in train)
    assert all(x["eval/pass@1"] <= x["eval/reward"] <= 1 for x in evals)
    assert (out / "source/reward/mine.py").read_text() == own.read_text()

    own.unlink()
    printed = forks.run("lad.py", "--resume", out, "--steps", 3, code=2)
    assert printed.count("\n") == 1 and "a run keeps a copy of its own" in printed
    kept = f"{out}/source/reward/mine.py:reward"
    forks.run("lad.py", "--resume", out, "--steps", 3, "--reward", kept)
    assert [x["step"] for x in metrics(out) if "loss" in x] == [1, 2, 3]


def test_a_reward_that_fails_on_its_first_row_ends_the_run_before_the_model(forks, make24):
    path = make24 / "wrong.py"
    path.write_text("def own(response, row):\n    return row['answer'] == response\n")
    flags = [*SHORT, "--data", make24 / "rows.jsonl", "--eval_data", ""]
    out = make24 / "never"
    printed = forks.run("lad.py", *flags, "--reward", f"{path}:own", "--out", out, code=2)
    [error] = [line for line in printed.splitlines() if ": error: " in line]
    assert "crashed: KeyError 'answer' (wrong.py, line 2)" in error
    assert not (out / "config.toml").exists()  # no run has begun


def test_an_evaluation(forks, make24, tmp_path):
    """Its lines are known by what the function's file says, and its own reward is averaged."""
    path = tmp_path / "own.py"
    path.write_text("def own(response, row):\n    return len(row['answer']['numbers']) - 1, 'x'\n")
    flags = ["tiny", "--bench", "tiny", "--n", 2, "--limit", 4, "--out", tmp_path / "evals"]
    said = forks.run("eval.py", *flags, "--reward", f"{path}:own")
    assert "own.py:own" in said and "mean 2.000" in said
    [file] = (tmp_path / "evals").glob("*.jsonl")
    found = [json.loads(line) for line in open(file)]
    assert [record["rewards"] for record in found] == [[2.0, 2.0]] * 4
    assert "| tiny | 100.0 [100.0, 100.0] |" in said  # over 0.5 is solved

    path.write_text("def own(response, row):\n    return 0.4\n")
    said = forks.run("eval.py", *flags, "--reward", f"{path}:own")
    assert "4 problems x 2 to do" in said  # another function: other lines
    said = forks.run("eval.py", *flags, "--kind", "text", code=2)
    assert "tiny: kind = text says only how solutions are told apart" in said
