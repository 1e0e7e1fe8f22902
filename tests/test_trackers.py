"""
harness/trackers.py: what wandb, trackio and tensorboard have been given, read back from their own
files, and what of their failures reaches a run.

The packages are not part of the set-up: where one is missing its tests skip. For all of them:
`pip install wandb trackio tensorboard`.
"""

import importlib.util
import json
import os
import signal
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ENV, GRACE, ROOT, launch, metrics
from test_config import refused
from test_guards import SMALL

from harness import settings, trackers

NEEDS = {}
for name in trackers.NAMES:
    missing = importlib.util.find_spec(name) is None
    NEEDS[name] = pytest.mark.skipif(missing, reason=f"{name} is not installed")
CONFIG = {"objective": "lad", "lr": 1e-4, "steps": 3, "prompt": "{a}|{b}"}
LINES = [
    {"step": 0, "objective": "lad", "eval/pass@1": 0.25, "eval/distinct": 2.0},
    {"step": 1, "objective": "lad", "loss": 0.5, "reward": 0.125, "fade_h": None},
    {"step": 2, "objective": "lad", "loss": 0.25, "reward": float("nan"), "samples": 16},
    {"step": 2, "objective": "lad", "eval/pass@1": 0.5, "eval/distinct": 1.0},
    {"step": 3, "objective": "lad", "loss": 1e-9, "reward": -1.0},
]
SAMPLES = [
    {"step": 1, "prompt": "p|q", "response": "a\nb", "truth": {"target": 6}, "reward": 1.0},
    {"step": 2, "prompt": "é", "response": "", "truth": "7", "reward": 0.0, "reason": "too long"},
]


def numbers():
    """[(step, {key: value})] of what can be drawn."""
    return [(line["step"], trackers.numbers_of(line)) for line in LINES]


@pytest.fixture
def folder(tmp_path):
    """A run's folder."""
    from matplotlib.figure import Figure

    out = tmp_path / "run"
    out.mkdir()
    (out / "config.toml").write_text(settings.to_toml(CONFIG))
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    (out / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in SAMPLES) + '{"to')
    figure = Figure(figsize=(2, 1))
    figure.savefig(out / "plot.png", dpi=50)
    return out


def show(name, out, **env):
    """A run that is over, handed to a tracker."""
    return launch(["harness/trackers.py", name, out], env=env)


# ==== 1. What each has been given ===============================================================


@NEEDS["tensorboard"]
def test_tensorboard(folder):
    """Twice: the event files are those of one run all the same."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for _ in range(2):
        done = show("tensorboard", folder)
        assert f"tensorboard --logdir {folder}/tensorboard" in done.stdout
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    found = []
    for key in events.Tags()["scalars"]:
        found += [(event.step, key, event.value) for event in events.Scalars(key)]
    want = [(step, key, value) for step, line in numbers() for key, value in line.items()]
    assert sorted(found) == [(s, k, pytest.approx(v, rel=1e-6)) for s, k, v in sorted(want)]

    texts = {}
    for key in events.Tags()["tensors"]:
        texts[key] = events.Tensors(key)[0].tensor_proto.string_val[0].decode()
    assert "| lr | 0.0001 |" in texts["config/text_summary"]
    assert "| 1 | p\\|q | a b |" in texts["samples/text_summary"]
    assert "| 2 | é |  | 7 | 0.0 | too long |" in texts["samples/text_summary"]
    [image] = events.Images("plot")
    assert (image.width, image.height) == (100, 50)


def wandb_records(path):
    """The records of a .wandb file: blocks of 32 kB in the format of LevelDB's log."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    place = 7  # after the file's own header
    whole = b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:  # no header fits into what is left of a block
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(whole)
            whole = b""


@NEEDS["wandb"]
def test_wandb(folder):
    done = show("wandb", folder, WANDB_MODE="offline")
    assert "track     wandb: offline" in done.stdout
    [path] = folder.glob("wandb/offline-run-*/*.wandb")
    history = {}
    config = {}
    for record in wandb_records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            assert record.run.display_name == "run" and record.run.project == "lad"
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        if kind == "history":
            items = {
                item.key or ".".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            history.setdefault(items["_step"], {}).update(items)
    assert {key: config[key] for key in CONFIG} == CONFIG
    for step, line in numbers():
        assert line.items() <= history[step].items()
    last = history[max(history)]
    table = json.loads((path.parent / "files" / last["samples.path"]).read_text())
    assert table["data"][0][:4] == ["1", "p|q", "a\nb", '{"target": 6}']
    assert (path.parent / "files" / last["plot.path"]).exists()


@NEEDS["trackio"]
def test_trackio(folder, tmp_path):
    done = show("trackio", folder, TRACKIO_DIR=str(tmp_path / "trackio"))
    assert "trackio show --project lad" in done.stdout
    [path] = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(path) as database:
        rows = database.execute("select step, metrics from metrics order by id").fetchall()
        [(config,)] = database.execute("select config from configs").fetchall()
    assert CONFIG.items() <= json.loads(config).items()
    found = [(step, json.loads(text)) for step, text in rows]
    assert found[: len(LINES)] == numbers()
    more = {key: value for _, line in found[len(LINES) :] for key, value in line.items()}
    assert more["samples"]["_value"][1]["reason"] == "too long"
    assert (tmp_path / "trackio/media" / more["plot"]["file_path"]).exists()


# ==== 2. Following ==============================================================================


def test_lines_are_followed_as_they_are_written(tmp_path, monkeypatch):
    """Half a line is not handed on before its other half; the last line is, after the end."""
    monkeypatch.setattr(trackers, "PAUSE", 0.001)
    over = threading.Event()
    found = []

    def follow():
        found.extend(trackers.lines_of(tmp_path, over))

    thread = threading.Thread(target=follow)
    thread.start()
    with open(tmp_path / "metrics.jsonl", "w") as file:
        for part in ['{"step": 0}\n{"st', 'ep": 1}\n', '{"step": 2}\n', "torn\n", '{"step": 3']:
            file.write(part)
            file.flush()
            time.sleep(0.02)
    over.set()
    thread.join(GRACE)
    assert found == [{"step": 0}, {"step": 1}, {"step": 2}]


def test_steps_that_are_trained_again_are_handed_on_once(tmp_path):
    """A run that is resumed, from the checkpoint of step 2."""
    memory = tmp_path / "memory.json"
    first = list(trackers.new_lines(LINES, memory))
    assert first == LINES
    again = [line for line in LINES if line["step"] == 3] + [{"step": 4, "loss": 0.0}]
    assert list(trackers.new_lines(again, memory)) == [{"step": 4, "loss": 0.0}]


def test_a_missing_package_and_a_wrong_folder_are_refused_in_one_line(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from harness import trackers"
    code += "; trackers.NAMES = ('no_such',); trackers.check('off'); trackers.check('no_such')"
    done = launch(["-c", code], check=False)
    assert done.returncode == 2 and done.stdout.count("\n") == 1
    assert done.stdout.strip().endswith("-m pip install no_such")
    done = launch(["harness/trackers.py", "wandb", tmp_path], check=False)
    assert done.returncode == 2 and done.stdout.count("\n") == 1


def test_a_package_is_looked_for_before_anything_heavy(capsys):
    assert "did you mean 'wandb'" in refused(capsys, "--track", "wandbb")
    source = (ROOT / "lad.py").read_text()
    main = source[source.index("def main(") :]
    assert main.index("trackers.check") < main.index("join(cfg)") < main.index("find_model(cfg)")


# ==== 3. Failures ===============================================================================

# A package of the name wandb that does what SAY says, and writes down what it was given
FAKE = """
import json, os, time

class Settings:
    def __init__(self, **more):
        pass

class Run:
    url = "a place"

    def log(self, line, step=None):
        with open(os.environ["GIVEN"], "a") as file:
            file.write(json.dumps([step, sorted(line)]) + "\\n")

    def finish(self):
        if os.environ["SAY"] == "hang at finish":
            time.sleep(1000)

def init(**more):
    if os.environ["SAY"] == "raise":
        raise RuntimeError("no network, says the fake")
    if os.environ["SAY"] == "hang":
        time.sleep(1000)
    if os.environ["SAY"] == "end":
        os._exit(3)
    return Run()

def Table(**more):
    return None

def Image(path):
    return None
"""


@pytest.fixture
def fake(tmp_path):
    """(folder of the package, environment that finds it)."""
    place = tmp_path / "packages"
    place.mkdir()
    (place / "wandb.py").write_text(FAKE)
    return dict(PYTHONPATH=f"{place}{os.pathsep}{ROOT}", GIVEN=str(tmp_path / "given"))


SAYS = {
    "raise": "track     wandb: failed: no network, says the fake; the run goes on",
    "hang": "track     wandb was not done 1 s after the run and was ended",
    "end": "",
    "hang at finish": "track     wandb was not done 1 s after the run and was ended",
}


@pytest.mark.slow
def test_a_failing_tracker_changes_nothing_of_a_run(forks, fake, tmp_path):
    """Nor its metrics, nor its exit code; who hangs at the end is ended."""
    place = fake["PYTHONPATH"].split(os.pathsep)[0]
    flags = [*SMALL, "--steps", 2]
    forks.run("lad.py", *flags, "--out", tmp_path / "alone")
    for say in ("raise", "hang at finish"):
        out = tmp_path / say.replace(" ", "-")
        patch = [f"import sys; sys.path.insert(0, {place!r})"]
        patch.append("from harness import trackers; trackers.LIMIT = 1")
        env = dict(fake, SAY=say)
        printed = forks.run(
            "lad.py", *flags, "--track", "wandb", "--out", out, env=env, patch=patch
        )
        assert SAYS[say] in printed, printed
        assert [x["step"] for x in metrics(out)] == [x["step"] for x in metrics(tmp_path / "alone")]
        for mine, other in zip(metrics(out), metrics(tmp_path / "alone"), strict=True):
            assert mine.get("loss") == other.get("loss")
    given = [json.loads(line) for line in open(fake["GIVEN"])]
    assert [step for step, _ in given[:4]] == [0, 1, 2, 2]  # of the one that hung at its end
    assert "RuntimeError" in (tmp_path / "raise/track.log").read_text()


@pytest.mark.parametrize("say", ["hang", "end"])
def test_a_tracker_that_hangs_or_dies_at_once(say, fake, folder, monkeypatch, capfd):
    for key, value in dict(fake, SAY=say).items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(trackers, "LIMIT", 1)
    trackers.follow("wandb", folder)
    [(process, *_)] = trackers.FOLLOWERS
    began = time.monotonic()
    trackers.finish()
    assert time.monotonic() - began < GRACE and process.poll() is not None
    assert SAYS[say] in capfd.readouterr().out
    assert not trackers.FOLLOWERS


def test_a_tracker_ends_with_a_run_that_is_killed(fake, folder):
    """SIGKILL closes the pipe: what is there is handed on, and the tracker leaves."""
    code = (
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); from harness import trackers; "
        f"trackers.follow('wandb', {str(folder)!r}); print(trackers.FOLLOWERS[0][0].pid, "
        "flush=True); time.sleep(1000)"
    )
    env = ENV | fake | {"SAY": "well"}
    run = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True)
    pid = int(run.stdout.readline())
    run.send_signal(signal.SIGKILL)
    run.wait()
    stat = Path(f"/proc/{pid}/stat")
    end = time.monotonic() + GRACE
    while stat.exists() and ") Z" not in stat.read_text():
        assert time.monotonic() < end
        time.sleep(0.01)
    run.stdout.close()
    given = [json.loads(line)[0] for line in open(fake["GIVEN"])]
    assert given[:5] == [0, 1, 2, 2, 3]
