"""Models and data sets by their hub name: the real huggingface_hub and datasets, against a hub on
loopback."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ENV, ROOT, launch, metrics
from hub import Hub

# What lad.py does before anything heavy, for each list of flags: the folder of the model; with
# --data the rows of both data sets
START = """
import json, sys, lad
from harness import ranks
from harness.data import find_model, load_data
ranks.join(lad.load_config(["--config", "tiny"]))
for flags in json.loads(sys.argv[1]):
    try:
        cfg = lad.load_config(["--config", "tiny", "--model", "org/model", *flags])
        folder = find_model(cfg)
        print("folder", folder)
        if "--data" in flags:
            from transformers import AutoTokenizer
            tokenizer = AutoTokenizer.from_pretrained(folder)
            training = load_data(cfg, tokenizer)
            held_out = load_data(cfg, tokenizer, evaluation=True)
            print("rows", len(training), len(held_out))
    except SystemExit as stop:
        print("exit code", stop.code)
"""


@pytest.fixture
def hub(tiny, tmp_path):
    """A hub with org/model (the offline default), and the same puzzles as org/puzzles in parquet
    files."""
    import pyarrow
    import pyarrow.parquet

    for part in ("train", "test"):
        rows = [json.loads(line) for line in open(tiny[part])]
        (tmp_path / "puzzles/data").mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(rows),
            tmp_path / f"puzzles/data/{part}-00000-of-00001.parquet",
        )
    shutil.copytree(tiny["model"], tmp_path / "model")
    (tmp_path / "model/consolidated.safetensors").write_bytes(b"the same weights in another format")
    (tmp_path / "model/original").mkdir()
    (tmp_path / "model/original/params.json").write_text("{}")
    with Hub() as hub:
        hub.add("models", "org/model", tmp_path / "model")
        hub.add("datasets", "org/puzzles", tmp_path / "puzzles")
        yield hub


def start(env, *runs):
    """What is printed for each of the lists of flags, in one process."""
    done = subprocess.run(
        [sys.executable, "-c", START, json.dumps(runs)],
        cwd=ROOT,
        env=ENV | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0 and "Traceback" not in done.stdout, done.stdout
    return done.stdout


def one_line_error(printed):
    """The only one, with which a run left with exit code 2."""
    [line] = [line for line in printed.splitlines() if line.startswith("-c: error: ")]
    assert "exit code 2" in printed
    return line


PUZZLES = ["--data", "org/puzzles", "--eval_data", "org/puzzles"]


def test_downloaded_once_then_found_again(hub, tmp_path):
    env = hub.env(tmp_path / "home")
    printed = start(env, PUZZLES)
    assert f"folder {tmp_path}/home/hub/" in printed and "rows 256 128" in printed
    files = {path.rpartition("/")[2] for path in hub.downloads() if "/org/model/" in path}
    assert "config.json" in files and not files & {
        "README.md",
        ".gitattributes",
        "params.json",
        "consolidated.safetensors",
    }
    assert sum("/storage/" in path for path in hub.downloads()) == 1  # the weights

    hub.forget()
    assert "rows 256 128" in start(env, PUZZLES)
    assert hub.requests and not hub.downloads()


@pytest.mark.slow
def test_found_again_offline_and_without_a_hub(hub, tmp_path):
    env = hub.env(tmp_path / "home")
    start(env, PUZZLES)
    hub.forget()
    assert "rows 256 128" in start(env | {"HF_HUB_OFFLINE": "1"}, PUZZLES)
    assert not hub.requests

    # Nobody listens at this port
    gone = env | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    assert f"folder {tmp_path}/home/hub/" in start(gone, [])


@pytest.mark.slow
def test_revision(hub, tmp_path):
    """org/model@v1 is what v1 was when main has moved on, by its tag or its commit; so for data."""
    repository, puzzles = (
        hub.repositories["models", "org/model"],
        hub.repositories["datasets", "org/puzzles"],
    )
    first = repository.revisions["v1"] = repository.revisions["main"]
    puzzles.revisions["v1"] = puzzles.revisions["main"]
    (tmp_path / "model/generation_config.json").write_text('{"temperature": 0.123}')
    repository.revisions["main"] = repository.commit()
    shutil.copy(
        tmp_path / "puzzles/data/test-00000-of-00001.parquet",
        tmp_path / "puzzles/data/train-00000-of-00001.parquet",
    )
    puzzles.revisions["main"] = puzzles.commit()
    printed = start(
        hub.env(tmp_path / "home"),
        ["--model", "org/model@v1", "--data", "org/puzzles@v1"],
        ["--data", "org/puzzles"],
        ["--model", f"org/model@{first}"],
        ["--model", "org/model@nope"],
    )
    folders = [line.split()[1] for line in printed.splitlines() if line.startswith("folder ")]
    assert [
        "0.123" in (Path(folder) / "generation_config.json").read_text() for folder in folders
    ] == [False, True, False]
    assert "rows 256 128" in printed and "rows 128 128" in printed
    assert "'org/model@nope'" in one_line_error(printed)


@pytest.mark.slow
def test_gated_and_unknown(hub, tmp_path):
    hub.repositories["models", "org/model"].gated = True
    assert "restricted" in one_line_error(start(hub.env(tmp_path / "home"), []))
    assert "'org/nothing'" in one_line_error(
        start(hub.env(tmp_path / "home"), ["--model", "org/nothing"])
    )
    assert "folder " in start(hub.env(tmp_path / "home", HF_TOKEN="hf_letMeIn"), [])


@pytest.mark.slow
def test_broken_download_goes_on_where_it_broke(hub, tmp_path):
    """Once: the client goes on by itself. Again and again: the start fails in one line, and the
    next one downloads what is missing (of a file that was not finished, huggingface_hub keeps
    nothing from one process to the next)."""
    # The client keeps whole pieces of 10 MiB
    (tmp_path / "model/model.safetensors").write_bytes(random.Random(0).randbytes(25 << 20))
    repository = hub.add("models", "org/model", tmp_path / "model")

    def starts_at():
        """In MiB, of each download of a large file."""
        stored = [path for path in hub.downloads() if "/storage/" in path]
        return [int(path.partition(" from ")[2]) >> 20 for path in stored]

    repository.breaks_at = [12 << 20, 21 << 20]
    [folder] = [
        line.split()[1]
        for line in start(hub.env(tmp_path / "home"), []).splitlines()
        if line.startswith("folder ")
    ]
    assert starts_at() == [0, 10, 20]
    assert (Path(folder) / "model.safetensors").read_bytes() == (
        tmp_path / "model/model.safetensors"
    ).read_bytes()

    hub.forget()
    repository.breaks_at = [12 << 20] * 50
    one_line_error(start(hub.env(tmp_path / "other"), []))
    assert set(starts_at()) == {0, 10}
    hub.forget()
    repository.breaks_at = []
    assert "folder " in start(hub.env(tmp_path / "other"), [])
    assert starts_at() == [0] and len(hub.downloads()) == 1


@pytest.mark.slow
def test_a_whole_run_on_two_ranks_then_eval(hub, tmp_path):
    """The commands as users give them: weights and data by name, one download for both ranks."""
    env = hub.env(tmp_path / "home")
    flags = [
        "--config",
        "tiny",
        "--model",
        "org/model",
        *PUZZLES,
        "--steps",
        1,
        "--prompts",
        4,
        "--group",
        4,
        "--minibatches",
        2,
        "--epochs",
        1,
    ]
    launch(
        ["lad.py", *flags, "--eval_prompts", 4, "--eval_samples", 2, "--out", tmp_path / "run"],
        ranks=2,
        env=env,
    )
    assert [x["step"] for x in metrics(tmp_path / "run")] == [0, 1, 1]
    assert sum("/storage/" in path for path in hub.downloads()) == 1
    printed = launch(
        [
            "eval.py",
            "org/model",
            "--bench",
            "tiny",
            "--n",
            2,
            "--limit",
            4,
            "--out",
            tmp_path / "evals",
        ],
        env=env,
    ).stdout
    assert "| org/model |" in printed
