"""harness/signs.py: each sign by lines that show it and lines that nearly do; runs that learn,
which show none; and docs/when-it-does-not-learn.md, command by command."""

import json
import re
import shlex

import pytest
from conftest import ROOT, metrics

import lad
from harness import signs
from harness.plot import read_log

PAGE = (ROOT / "docs/when-it-does-not-learn.md").read_text()

# A line of a run that learns
FINE = dict(
    loss=0.1,
    solve_rate=0.3,
    zero_variance=0.4,
    truncated=0.02,
    unanswered=0.1,
    entropy_old=0.4,
    samples=512.0,
)
NEVER = dict(solve_rate=0, zero_variance=1)
FAILING = dict(FINE, **NEVER)  # a first line without a right response


def shown(first=FINE, **changes):
    """The signs of five lines of this kind, and of these with one that is fine: none."""
    line = FINE | changes
    found = signs.signs(first, [line] * 5)
    for place in range(5):
        nearly = [line] * 5
        nearly[place] = FINE
        assert not signs.signs(first, nearly), place
    return list(found)


# ==== 1. Single lines ===========================================================================


def test_a_run_that_learns_shows_none():
    assert not signs.signs(FINE, [FINE] * 5)
    assert not signs.signs(FINE, [FINE | {"solve_rate": 1, "zero_variance": 0.9}] * 5)


def test_cut():
    assert shown(truncated=0.9) == shown(truncated=1) == ["cut"]
    assert shown(truncated=0.89) == []
    # it explains why nothing is right
    assert shown(FAILING, **NEVER, truncated=1, unanswered=1) == ["cut"]


def test_nothing_right():
    assert shown(FAILING, **NEVER) == ["unsolved"]
    assert shown(FAILING, **NEVER, unanswered=0.49) == ["unsolved"]
    assert shown(FAILING, **NEVER, unanswered=0.5) == ["unanswered"]
    # one in a million, or rewards of one's own that differ below a half
    assert shown(FAILING, solve_rate=1e-6, zero_variance=0.999) == []
    assert shown(FAILING, solve_rate=0, zero_variance=0.9) == []


def test_all_right_or_all_equal():
    assert shown(solve_rate=1, zero_variance=1) == ["solved"]
    assert shown(solve_rate=0.3, zero_variance=1) == ["equal"]
    assert shown(solve_rate=0.3, zero_variance=0.999) == []
    # all right in some batches, none in others: what a group holds is equal all the same
    lines = [FINE | dict(solve_rate=rate, zero_variance=1) for rate in (0, 1, 0, 1, 1)]
    assert list(signs.signs(FINE, lines)) == ["equal"]


def test_collapsed():
    assert shown(entropy_old=0.039) == ["collapsed"]
    assert shown(entropy_old=0.041) == []
    assert shown(entropy_old=0.001, solve_rate=0.95) == []  # one right answer, found
    low = FINE | dict(entropy_old=0.01)
    assert not signs.signs(low, [low] * 5)  # it began so
    # equal responses have equal verdicts: one sign, the cause
    assert shown(entropy_old=0.001, zero_variance=1) == ["collapsed"]


def test_lost():
    assert shown(**NEVER) == ["lost"]
    assert shown(**NEVER, entropy_old=0.001, truncated=1) == ["lost"]


def test_what_is_not_known_is_no_sign():
    """Batches of which nothing could be scored, or no log-prob was finite."""
    nan = float("nan")
    assert shown(solve_rate=nan, zero_variance=1, unanswered=nan) == []
    assert shown(entropy_old=nan) == []
    assert not signs.signs(FINE | dict(entropy_old=nan), [FINE | dict(entropy_old=0.001)] * 5)


def test_rewards_that_are_only_measured_are_no_sign():
    """distill learns from the teacher, whatever the verifier says."""
    line = FINE | NEVER
    assert not signs.signs(line, [line] * 5, rewarded=False)
    assert signs.signs(line, [FINE | dict(truncated=1)] * 5, rewarded=False)
    assert not signs.begin(lad.Config(objective="distill"))["rewarded"]
    assert signs.begin(lad.Config(objective="grpo"))["rewarded"]


# ==== 2. A run ==================================================================================


def steps_of(lines, watch=None):
    """[(line, sign)] as a run meets them."""
    watch = watch or signs.begin(lad.Config())
    return [(i, name) for i, line in enumerate(lines) for name in signs.look(watch, line)]


def test_a_sign_is_said_once_and_when_it_is_whole():
    lines = [FAILING] * 9 + [FINE] * 5 + [FAILING] * 9 + [FAILING | dict(truncated=1)] * 6
    assert steps_of(lines) == [(4, "unsolved"), (27, "cut")]


def test_a_resumed_run_says_what_the_whole_one_would():
    """Whatever line it goes on from: nothing twice, nothing left out."""
    lines = [FINE] * 3 + [FINE | NEVER] * 6 + [FINE | dict(solve_rate=1, zero_variance=1)] * 6
    whole = steps_of(lines)
    assert whole == [(7, "lost"), (9, "equal"), (13, "solved")]
    evaluation = {"step": 2, "eval/pass@1": 0.5}
    for kept in range(len(lines) + 1):
        watch = signs.begin(lad.Config(), [evaluation, *lines[:kept], evaluation])
        later = [(i + kept, name) for i, name in steps_of(lines[kept:], watch)]
        assert later == [said for said in whole if said[0] >= kept], kept


def test_runs_that_learn_show_no_sign():
    """LAD and GRPO on tiny, 60 batches each; tests/learning.jsonl has what their logs say."""
    runs = {}
    for line in read_log(ROOT / "tests/learning.jsonl"):
        runs.setdefault(line["objective"], []).append(line)
    assert sorted(runs) == ["grpo", "lad"]
    for lines in runs.values():
        assert [line["step"] for line in lines] == list(range(1, 61))
        assert lines[-1]["solve_rate"] > 2 * lines[0]["solve_rate"]
        assert steps_of(lines) == []
    # the same runs, had their rewards been equal from some batch on
    stuck = [line | dict(solve_rate=1, zero_variance=1) for line in runs["lad"][40:]]
    assert steps_of(runs["lad"][:40] + stuck) == [(44, "solved")]


def test_reasons_are_counted():
    def sample(correct, reason=""):
        return dict(correct=correct, reason=reason)

    drawn = [[sample(1.0), sample(0.0)], [sample(0.0), sample(0.0, "no answer found")]]
    assert signs.reasons(drawn) == "the last batch: 2 x wrong, 1 x right, 1 x no answer found"


# ==== 3. The page ===============================================================================


def sections():
    """[(sign, command, the line that it printed)] of the page."""
    pattern = r"^## (\w+)\n\n```sh\n(.+?)\n```\n\n```\n(.+?)\n```$"
    return re.findall(pattern, PAGE, re.M)


def said_by(text):
    return [line for line in text.splitlines() if line.startswith("sign ")]


def without_numbers(line):
    return re.sub(r"\d+(\.\d+)?(e-\d+)?", "#", line)


def test_the_page_has_every_sign():
    assert sorted(name for name, *_ in sections()) == sorted(signs.CHANGES)


def commands():
    """pytest's parameters (sign, command, line): one is quick, the others are slow tests."""
    for section in sections():
        marks = () if section[0] == "unanswered" else pytest.mark.slow
        yield pytest.param(*section, id=section[0], marks=marks)


@pytest.mark.parametrize(("name", "command", "line"), commands())
def test_each_command_of_the_page_shows_its_sign(name, command, line, forks, tmp_path):
    """With the words of the page; its numbers are one machine's."""
    argv = shlex.split(command)[2:]
    printed = forks.run("lad.py", *argv, "--out", tmp_path / "run")
    said = said_by(printed)
    lines = [x for x in metrics(tmp_path / "run") if "loss" in x]
    assert [x.partition("#")[2] for x in said] == [sign for _, sign in steps_of(lines)]
    if name == "collapsed":
        # How soon, and whether evenly, depends on the model; that it learns this does not
        assert sum(x["reward"] for x in lines[-5:]) > 5 * 1.5 * lines[0]["reward"]
        said = [x for x in said if x.endswith("#collapsed")] or [line]
    assert len(said) == 1, printed
    assert said[0].endswith(f"#{name}") and line.endswith(f"#{name}")
    words = without_numbers(said[0]).partition(" (the last batch")
    assert words[0] == without_numbers(line).partition(" (the last batch")[0]
    assert said[0].partition("; people")[2] == line.partition("; people")[2]


def last_lines():
    """[(command, {metric: value})] of the page's symptoms without a sign."""
    yet = PAGE.partition("## No sign, and yet")[2]
    commands = re.findall(r"^```sh\n(.+?)\n```$", yet, re.M)
    values = [json.loads("{" + text + "}") for text in re.findall(r"^`(\".+)`\.$", yet, re.M)]
    return list(zip(commands, values, strict=True))


@pytest.mark.slow
def test_symptoms_without_a_sign(forks, tmp_path):
    """A loss of 0 with a gradient; steps too small to move anything. No sign is said."""
    (zero, zero_values), (still, still_values) = last_lines()
    seen = []
    for name, command in (("zero", zero), ("still", still)):
        argv = shlex.split(command)[2:]
        assert not said_by(forks.run("lad.py", *argv, "--out", tmp_path / name))
        seen.append(metrics(tmp_path / name)[-1])
    for line in (seen[0], zero_values):
        assert abs(line["loss"]) < 1e-5 and line["grad_norm"] > 0.1
    for line in (seen[1], still_values):
        assert abs(line["ratio_max"] - 1) < 1e-3 and line["clipped"] == 0


def test_a_run_says_it_once_on_any_number_of_ranks_and_after_resuming(forks, tmp_path):
    """Stopped before the sign is whole and resumed, it comes at the same batch; resumed after it,
    never again."""
    out = tmp_path / "run"
    flags = ["--config", "tiny", "--prompts", "4", "--group", "4", "--minibatches", "1"]
    flags += ["--eval_data", "", "--kind", "math", "--out", out]
    assert not said_by(forks.run("lad.py", *flags, "--steps", "3"))
    said = said_by(forks.run("lad.py", "--resume", out, "--steps", "6", ranks=2))
    assert len(said) == 1 and said[0].startswith("sign      step 5: none of the 80 responses")
    assert "rank 0's last batch: 8 x no answer found" in said[0]
    assert not said_by(forks.run("lad.py", "--resume", out, "--steps", "8"))
