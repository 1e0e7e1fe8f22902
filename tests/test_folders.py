"""Which folders are checkpoints of a run, what rotation removes, and --resume from one folder into
another: on checkpoints that a real run wrote."""

import json
import os
import shutil

import pytest
from conftest import ROOT, metrics
from test_faults import FLAGS
from test_run import deterministic

import lad
from harness import checkpoint, ranks, tracking


@pytest.fixture(scope="module")
def run(forks, tmp_path_factory):
    """A run of four steps that keeps its last two checkpoints."""
    out = tmp_path_factory.mktemp("folders") / "run"
    forks.run("lad.py", *FLAGS, "--out", out)
    return out


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "copy")


def names(out):
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def files(out):
    """{name: content} of all that a folder holds, but for the lock, which a fork leaves."""
    found = {path.relative_to(out): path for path in out.rglob("*") if path.is_file()}
    return {str(name): path.read_bytes() for name, path in found.items() if path.name != "lock"}


def test_only_whole_checkpoints_count(copy):
    folder = copy / "checkpoints"
    whole = folder / "step_4"
    weights = next(whole.glob("*.safetensors")).name

    shutil.copytree(copy / "hf", folder / "step_2-hf")
    (folder / "step_9").mkdir()
    (folder / "step_x").mkdir()
    (folder / "step_7").write_text("a file")
    shutil.copytree(whole, folder / "step_5")  # its state.json says 4
    state = json.loads((whole / "state.json").read_text())
    for number, spoil in ((6, "unlink"), (8, "cut"), (10, "no state")):
        torn = shutil.copytree(whole, folder / f"step_{number}")
        (torn / "state.json").write_text(json.dumps(state | {"step": number}))
        if spoil == "unlink":
            (torn / weights).unlink()
        elif spoil == "cut":
            (torn / weights).write_bytes((torn / weights).read_bytes()[:-1])
        else:
            (torn / "state.json").write_text("{")
    assert [path.name for path in checkpoint.listed(copy)] == ["step_3", "step_4"]


def test_a_checkpoint_of_an_older_version_counts(copy):
    """It does not say how long its files are."""
    path = copy / "checkpoints/step_4/state.json"
    state = json.loads(path.read_text())
    del state["files"]
    path.write_text(json.dumps(state))
    assert names(copy) == [path.name for path in checkpoint.listed(copy)]


def test_what_is_no_checkpoint_stays_and_does_not_count(forks, run, copy):
    """Resumed beside a step_2-hf and an empty step_9; a rotation that was killed is finished."""
    folder = copy / "checkpoints"
    (folder / "step_2-hf").mkdir()
    (folder / "step_9").mkdir()
    shutil.rmtree(folder / "step_4")
    shutil.copytree(folder / "step_3", folder / "tmp")  # half removed
    for number in (1, 2):  # not removed yet
        shutil.copytree(folder / "step_3", folder / f"step_{number}")
        state = json.loads((folder / f"step_{number}/state.json").read_text())
        (folder / f"step_{number}/state.json").write_text(json.dumps(state | {"step": number}))
    forks.run("lad.py", "--resume", copy)
    assert names(copy) == ["step_2-hf", "step_3", "step_4", "step_9"]
    assert deterministic(metrics(copy)) == deterministic(metrics(run))


@pytest.mark.slow
def test_a_rotation_that_was_killed_is_finished_by_a_resume(forks, run, copy):
    """After the last step, where no other save comes."""
    folder = copy / "checkpoints"
    shutil.copytree(folder / "step_3", folder / "step_2")
    state = json.loads((folder / "step_2/state.json").read_text())
    (folder / "step_2/state.json").write_text(json.dumps(state | {"step": 2}))
    forks.run("lad.py", "--resume", copy)
    assert names(copy) == ["step_3", "step_4"]


def test_a_fresh_run_moves_older_checkpoints_aside(forks, copy, tmp_path):
    """Without a log they are an older run's all the same."""
    (copy / "metrics.jsonl").unlink()
    (copy / "checkpoints/step_4").rename(copy / "checkpoints/step_50")
    printed = forks.run("lad.py", *FLAGS, "--steps", 1, "--eval_data", "", "--out", copy)
    assert "moved to" in printed and names(copy) == ["step_1"]
    [aside] = [path for path in tmp_path.iterdir() if path.name.startswith("copy.")]
    assert names(aside) == ["step_3", "step_50"]


def test_what_no_run_has_written_stays_where_it_is(forks, copy, tmp_path):
    """A user's data in a run's folder, and a file of theirs among its checkpoints."""
    (copy / "mine.txt").write_text("data")
    (copy / "checkpoints/llama.pt").write_text("weights")
    log = (copy / "metrics.jsonl").read_text()
    flags = ["--steps", 1, "--eval_data", "", "--checkpoint_every", 1]
    printed = forks.run("lad.py", *FLAGS, *flags, "--out", copy)
    assert "moved to" in printed
    assert (copy / "mine.txt").read_text() == "data"
    assert (copy / "checkpoints/llama.pt").read_text() == "weights"
    assert names(copy) == ["llama.pt", "step_1"]
    [aside] = [path for path in tmp_path.iterdir() if path.name.startswith("copy.")]
    assert names(aside) == ["step_3", "step_4"]
    assert (aside / "metrics.jsonl").read_text() == log
    assert [line["step"] for line in metrics(copy)] == [1]


def test_a_folder_of_somebodys_checkpoints_holds_no_run(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/llama.pt").write_text("weights")
    assert not tracking.is_used(tmp_path)


@pytest.mark.parametrize(
    "out", [".git", "harness", "tests/mine", "HOME", "REPOSITORY", "LOOP", "LONG"]
)
def test_what_is_somebodys_is_no_runs_folder(out, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "repository/.git").mkdir(parents=True)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    own = dict(HOME="home", REPOSITORY="repository", LOOP="loop", LONG="a" * 300)
    place = tmp_path / own[out] if out in own else ROOT / out
    cfg = lad.Config(out=str(place))
    with pytest.raises(SystemExit) as stop:
        ranks.claim(cfg, ROOT)
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.count("\n") == 1 and f"out = {str(place)!r}" in said and "give a" in said
    assert not os.path.exists(place / "lock")


@pytest.mark.slow
def test_resume_into_another_folder(forks, run, copy, tmp_path):
    """The other run goes on as the first one did, with the log so far; the first stays."""
    shutil.rmtree(copy / "checkpoints/step_4")
    before = files(copy)
    printed = forks.run("lad.py", "--resume", copy, "--out", tmp_path / "fork")
    assert f"goes on from step 3 of {copy}" in printed
    assert files(copy) == before
    assert deterministic(metrics(tmp_path / "fork")) == deterministic(metrics(run))
    weights = "hf/model.safetensors"
    assert (tmp_path / "fork" / weights).read_bytes() == (run / weights).read_bytes()
    assert names(tmp_path / "fork") == ["step_3", "step_4"]

    # What was in the other folder is moved aside; the fork stands alone
    printed = forks.run("lad.py", "--resume", copy, "--out", tmp_path / "fork", "--steps", 3)
    assert "moved to" in printed and metrics(tmp_path / "fork")[-1]["step"] == 3
    shutil.rmtree(copy)
    forks.run("lad.py", "--resume", tmp_path / "fork", "--steps", 4)
    assert deterministic(metrics(tmp_path / "fork")) == deterministic(metrics(run))


def test_resume_without_logs(forks, run, copy):
    """The log starts where the checkpoint is."""
    shutil.rmtree(copy / "checkpoints/step_4")
    (copy / "metrics.jsonl").unlink()
    (copy / "samples.jsonl").unlink()
    forks.run("lad.py", "--resume", copy)
    late = [line for line in metrics(run) if line["step"] == 4]
    assert deterministic(metrics(copy)) == deterministic(late)


def test_what_cannot_be_resumed_is_refused_in_one_line(forks, copy, tmp_path):
    before = files(copy)
    for flags, says in [
        (["--steps", 2], "4 steps are done and steps = 2: nothing is left to do"),
        (["--out", tmp_path / "fork", "--seed", 1], "was trained with seed = 0"),
        (["--out", tmp_path / "fork", "--steps", 2], "nothing is left to do"),
    ]:
        printed = forks.run("lad.py", "--resume", copy, *flags, code=2)
        assert says in printed and printed.count("\n") == 1, printed
    assert files(copy) == before and not files(tmp_path / "fork")

    shutil.rmtree(copy / "checkpoints")
    printed = forks.run("lad.py", "--resume", copy, "--out", tmp_path / "fork", code=2)
    assert "holds no whole checkpoint" in printed and printed.count("\n") == 1, printed
