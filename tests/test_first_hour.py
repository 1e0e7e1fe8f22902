"""tools/first_hour.py: it goes on after whatever happens, says of each step what became of it, and
never shows a number for what was not run. Steps here are processes of a line; the slow tests run
the real ones."""

import ast
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ENV, GRACE, ROOT, launch

from tools import first_hour, gpu_checks
from tools.first_hour import Figure, Job, Step

WHERE = dict(date="2026-01-02", commit="abc", gpu="A card", driver="580.1")
WHERE.update(torch="2.13", vllm="0.32", transformers="5.19")


def step(program, limit=GRACE, figures=(), **more):
    """A step that runs a line of Python, in its folder's name as sys.argv[1]."""

    def argv(job):
        return ["-c", program, job.folder]

    return Step("a line", limit, argv, first_hour.read_own, figures, **more)


def writes(**figures):
    return f"import sys; open(sys.argv[1] + '/figures.json', 'w').write({json.dumps(figures)!r})"


MACHINE = writes(GPUs=1)
NO_GPU = writes(glibc=2.36)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(steps, *names, minutes=..): (finished, the record, the page) after a call."""
    monkeypatch.setattr(first_hour, "where_we_are", lambda commit: dict(WHERE))

    def call(steps, *names, minutes=0, rehearse=False):
        monkeypatch.setattr(first_hour, "STEPS", steps)
        args = SimpleNamespace(
            steps=list(names), minutes=minutes, rehearse=rehearse, commit="", model=""
        )
        chosen = first_hour.choose(args, first_hour.read_record(tmp_path))
        finished = first_hour.run_steps(chosen, args, tmp_path)
        record = json.loads((tmp_path / "record.json").read_text())
        return finished, record, (tmp_path / "page.md").read_text()

    call.out = tmp_path
    return call


def results(record):
    return {name: entry["result"] for name, entry in record.items()}


# ==== 1. Going on ===============================================================================


def test_goes_on_after_a_failure_and_keeps_what_was_printed(run):
    steps = {
        "machine": step(MACHINE),
        "bad": step("print('one'); raise SystemExit('the reason')"),
        "good": step(writes(speed=3.0), figures=(Figure("speed", "x", least=2),)),
    }
    finished, record, page = run(steps)
    assert finished and results(record) == dict(machine="passed", bad="failed", good="passed")
    assert record["bad"]["why"] == "exit code 1" and record["bad"]["last"] == ["one", "the reason"]
    assert "one\nthe reason\n" in page
    stamps = [line.split()[0] for line in (run.out / "bad/log").read_text().splitlines()]
    assert all(0 <= float(stamp) < GRACE for stamp in stamps) and len(stamps) == 2
    line = "| good | speed | 3 x | at least 2 | met | abc | 2026-01-02 | A card | 580.1, 2.13,"
    assert line in page


def test_a_step_ends_at_its_limit_with_all_that_it_started(run):
    sleeper = "import subprocess, sys, time; "
    sleeper += "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
    sleeper += writes(speed=1.0).replace("import sys; ", "") + "; "
    sleeper += "print(p.pid, flush=True); time.sleep(600)"
    steps = {"machine": step(MACHINE), "slow": step(sleeper, limit=3)}
    _, record, _ = run(steps)
    entry = record["slow"]
    assert entry["result"] == "failed" and entry["why"] == "stopped at its limit of 3 s"
    assert entry["figures"] == dict(speed=1.0)  # it had come to that
    assert is_gone(int(entry["last"][0]))


def is_gone(pid):
    """Whether a process has ended: it may wait for its parent, as a zombie, to hear of it."""
    end = time.monotonic() + GRACE
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


def test_goes_on_where_it_was(run):
    count = "import sys; open(sys.argv[1] + '/../count', 'a').write('x'); "
    steps = {
        "machine": step(MACHINE),
        "long": step(count + writes(a=1), limit=100),
        "longer": step(count + writes(b=2), limit=540),
        "last": step(count + writes(c=3)),
    }
    # One minute is less than any limit: the first step runs, for as long as there is
    finished, record, _ = run(steps, "machine", minutes=1)
    assert finished and results(record) == dict(machine="passed")
    finished, record, _ = run(steps, minutes=3)
    assert not finished and results(record) == dict(machine="passed", long="passed")
    finished, record, _ = run(steps)
    assert finished and set(results(record).values()) == {"passed"}
    assert (run.out / "count").read_text() == "xxx"
    # Nothing is left to do; by its name a step is run once more
    run(steps)
    run(steps, "last")
    assert (run.out / "count").read_text() == "xxxx"


def test_failed_steps_are_run_again_when_asked_for(run):
    steps = {"machine": step(MACHINE), "a": step("1/0"), "b": step(writes(x=1))}
    assert results(run(steps)[1]) == dict(machine="passed", a="failed", b="passed")
    steps["a"] = step(writes(x=1))
    assert results(run(steps)[1])["a"] == "failed"  # it is done, if badly
    assert results(run(steps, "failed")[1])["a"] == "passed"


def test_a_call_that_is_killed_leaves_its_step_failed(run):
    steps = {"machine": step(MACHINE), "a": step(writes(x=1)), "b": step(writes(x=1))}
    run(steps, "machine")
    record = json.loads((run.out / "record.json").read_text())
    record["a"] = dict(record["machine"], result="at work")
    (run.out / "record.json").write_text(json.dumps(record))
    _, record, _ = run(steps)
    assert results(record) == dict(machine="passed", a="failed", b="passed")
    assert record["a"]["why"] == "the call was killed while it ran"


def test_a_step_without_its_figures_has_failed(run):
    steps = {"machine": step(MACHINE), "a": step("pass")}
    _, record, _ = run(steps)
    assert record["a"]["result"] == "failed" and "figures.json" in record["a"]["why"]


def test_the_call_itself_is_stopped(tmp_path):
    """SIGTERM, as `timeout` sends it: the step at work ends too."""
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from tools import first_hour
first_hour.STEPS = dict(machine=first_hour.Step(
    "a line", 600, lambda job: ["-c", "import os, time; print(os.getpid()); time.sleep(600)"],
    first_hour.read_own, ()))
first_hour.main(["--out", {str(tmp_path)!r}])
"""
    process = subprocess.Popen([sys.executable, "-c", program], env=ENV)
    log = tmp_path / "machine/log"
    end = time.monotonic() + GRACE
    while not (log.exists() and log.read_text()):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(GRACE) == 143
    assert is_gone(int(log.read_text().split()[1]))
    assert first_hour.read_record(tmp_path)["machine"]["result"] == "failed"


# ==== 2. Without a GPU ==========================================================================


def test_without_a_gpu_no_step_is_run_and_no_number_shown(run, monkeypatch):
    where = dict(WHERE, gpu="none", driver="none")
    monkeypatch.setattr(first_hour, "where_we_are", lambda commit: where)
    steps = dict(first_hour.STEPS, machine=step(NO_GPU))
    finished, record, page = run(steps)
    assert finished and results(record) == dict.fromkeys(steps, "not run") | {"machine": "passed"}
    assert {record[name]["why"] for name in steps if name != "machine"} == {"needs a GPU"}
    assert page.splitlines()[2].startswith("**Nothing here was measured on a GPU**")
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 9 and cells[0] in steps and cells[1] != "figure":
            assert cells[2] == "not run" and cells[4:] == [""] * 5, line


def test_a_machine_that_is_not_fit_stops_the_rest_with_its_reason(run):
    steps = {
        "machine": step("print('machine: driver 550.1: too old'); raise SystemExit(1)"),
        "a": step(writes(x=1)),
    }
    _, record, _ = run(steps)
    assert results(record) == dict(machine="failed", a="not run")
    assert record["a"]["why"] == "the step machine failed: machine: driver 550.1: too old"


def test_a_rehearsal_judges_nothing(run):
    """Though the machine may have a GPU."""
    figures = (Figure("speed", most=1), Figure("asleep", "GiB"))
    steps = {
        "machine": step(NO_GPU),
        "a": step(writes(speed=99), figures=figures),
        "b": step(writes(x=1), rehearsed=False),
    }
    _, record, page = run(steps, rehearse=True)
    assert results(record) == dict(machine="passed", a="passed", b="not run")
    assert page.splitlines()[2].startswith("**A rehearsal on a CPU")
    assert "| a | speed | 99 |  |  |" in page and "| a | asleep | not measured |" in page


def test_a_record_of_another_machine_is_not_gone_on_with(run, monkeypatch, capsys):
    steps = {"machine": step(MACHINE), "a": step(writes(x=1))}
    run(steps, "machine")
    monkeypatch.setattr(first_hour, "where_we_are", lambda commit: dict(WHERE, gpu="none"))
    with pytest.raises(SystemExit):
        run(steps, "a")
    assert "the step machine comes first" in capsys.readouterr().err


def test_steps_that_need_another_and_the_one_that_replaces_one(run):
    steps = {
        "machine": step(MACHINE),
        "model": step("1/0"),
        "eager": step(writes(x=1), needs=("model",)),
        "runner1": step(writes(x=1), instead_of="eager"),
    }
    _, record, _ = run(steps)
    assert record["eager"]["why"] == "the step model has not passed"
    assert record["runner1"]["why"] == "eager did not fail"

    # What is run after it goes on as it did
    steps["model"], steps["eager"] = step(writes(x=1)), step("1/0", needs=("model",))
    runner = "import os, sys; open(sys.argv[1] + '/figures.json', 'w').write('{\"v\": \"' + "
    runner += "os.environ.get('VLLM_USE_V2_MODEL_RUNNER', 'unset') + '\"}')"
    steps["after"] = step(runner)
    _, record, _ = run(steps, "model", "eager", "runner1", "after")
    assert results(record)["runner1"] == "passed" and record["after"]["figures"] == dict(v="0")


# ==== 3. Figures ================================================================================


@pytest.mark.parametrize(
    "figure,value,target,met",
    [
        (Figure("a", most=1.15), 1.1, "at most 1.15", True),
        (Figure("a", most=1.15), 1.2, "at most 1.15", False),
        (Figure("a", least=40), 40.0, "at least 40", True),
        (Figure("a", least=143, most=143), 0, "143", False),
        (Figure("a", least=0, most=0), 0, "0", True),
        (Figure("a"), 7, "", None),
        (Figure("a", most=1), "No module named 'liger_kernel'", "at most 1", None),
        (Figure("a", most=1), float("nan"), "at most 1", False),
    ],
)
def test_targets(figure, value, target, met):
    assert figure.target == target and figure.met(value) is met


@pytest.fixture
def job(tmp_path):
    (tmp_path / "thirty/run").mkdir(parents=True)
    return Job("thirty", tmp_path / "thirty", {}, False, "")


def test_what_a_run_leaves_is_read(job):
    """30 batches: vllm-kl doubles at the end, a tenth of the time is in no part, and each sleep
    leaves 0.25 GiB more in use from the fourth on."""
    lines = [dict(step=0, objective="lad")]
    for i in range(1, 31):
        parts = dict(seconds_rollout=1.0, seconds_reward=0.25, seconds_train=0.55)
        kl = 1e-3 if i <= 25 else 2e-3
        numbers = dict(rollout_kl=kl, reward=i / 30, seconds=2.0, tokens=100, memory_gb=i)
        lines.append(dict(step=i, **parts, **numbers))
    (job.folder / "run/metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    # Of the log: vLLM's words as it has them, ours as lad.py prints them
    said = ["INFO Sleep mode freed 30.50 GiB memory, 1.75 GiB memory is still in use."]
    said.append("run       runs/x: lad, 494,032,768 parameters, 1 x cuda, 0 of 30 steps done")
    for i in range(1, 31):
        use = 9 + 0.25 * max(i - 2, 0)
        said.append(f"INFO Sleep mode freed 30.50 GiB memory, {use:.2f} GiB memory is still in use")
        said += ["Recompiling function f in lad.py:1"] * (i in (1, 2, 9))
        said.append(f"step {i:5d}/30  reward")
    log = "".join(f"{second:.1f} {line}\n" for second, line in enumerate(said))
    (job.folder / "log").write_text(log)

    found = first_hour.read_run(job)
    assert found["batches"] == 30 and found["memory_gb"] == 30 and found["start"] == 1
    assert found["vllm-kl, first batch"] == 1e-3 and found["vllm-kl, largest"] == 2e-3
    assert found["vllm-kl, last 5 over first 5 batches"] == pytest.approx(2)
    assert found["time outside generating, verifying, training"] == pytest.approx(10)
    assert found["tokens a second"] == pytest.approx(50)
    assert found["freed by the first sleep"] == 30.5 and found["in use after it"] == 1.75
    assert found["growth of what is in use, asleep"] == pytest.approx(0.25 * 28)
    assert found["recompilations after the second batch"] == 1
    assert found["reward, first and last 5 batches"] == "0.1 to 0.933"
    assert {figure.name for figure in first_hour.STEPS["thirty"].figures} <= set(found)


def test_vllm_still_says_so_when_it_falls_asleep():
    folder = Path(importlib.util.find_spec("vllm").origin).parent
    words = '"Sleep mode freed %s GiB memory, %s GiB memory is still in use."'
    assert words in (folder / "v1/worker/gpu_worker.py").read_text()
    assert first_hour.SLEEP.search(words.replace("%s", "1.5"))


HEAD = ("path", "NHV counted", "ms", "x bare, same FLOPs", "TFLOP/s", "peak extra MiB")
HEAD += ("max error of logp",)


def test_the_heads_table_is_read(job):
    """The title is bench.py's own, of the CPU's default; rows of what is not there end with why."""
    rows = [
        ["bare products, 6 NHV", 6.0, 10.0, 1.0, 5.0, "", ""],
        ["fused, gradient formed in the forward", 6.0, 11.0, 1.1, 4.5, 49.0, 1e-6],
        ["materialised (naive_logprob)", 6.0, 22.0, 2.2, 2.0, 96.0, 1e-6],
        ["F.linear_cross_entropy, chunked", 6.0, 10.0, 1.0, 5.0, 96.0, 1e-3],
        ["Liger fused linear cross-entropy", "No module named 'liger_kernel'"],
        ["TRL chunked log-prob", "No module named 'trl'"],
    ]
    title = "head, N=1,024 H=256 V=8,192, float32, chunk 256, 10 repeats"
    table = dict(title=title, columns=HEAD, rows=rows)
    (job.folder / "tables.json").write_text(json.dumps([table]))
    found = first_hour.read_head(job)
    assert found["time over bare products"] == 1.1
    assert found["time over that of materialised (naive_logprob)"] == 0.5
    assert found["time over that of F.linear_cross_entropy, chunked"] == 1.1
    assert "trl" in found["time over that of TRL chunked log-prob"]
    beyond = 49 * 2**20 - 2 * 1024 * 256 - 4 * 8192 * 256
    assert found["bytes a logit"] == pytest.approx(beyond / (256 * 8192))
    assert {figure.name for figure in first_hour.STEPS["head"].figures} == set(found)


def test_no_step_takes_more_than_nine_minutes():
    assert max(step.limit for step in first_hour.STEPS.values()) <= 9 * 60


def test_bad_input_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        first_hour.main(["haed"])
    assert stop.value.code == 2 and "did you mean 'head'" in capsys.readouterr().err


# ==== 4. The machine ============================================================================


def test_what_a_machine_lacks_is_said():
    figures = {"driver": 550, "glibc": 2.28, "C compiler": "none", "Python.h": "none"}
    figures["CUDA of torch"] = "13.0"
    gpu = dict(name="A card", driver="550.54.15")
    said = "\n".join(gpu_checks.missing(figures, gpu))
    for words in ("driver 550.54.15", "580 or newer", "sees no GPU", "gcc", "python3-dev", "2.31"):
        assert words in said
    assert gpu_checks.missing(figures, dict(name="", driver="")) == []  # no GPU, no need
    figures.update({"GPUs": 1, "compute capability": "7.5", "driver": 580, "glibc": 2.31})
    figures.update({"C compiler": "gcc", "Python.h": "Python.h"})
    [said] = gpu_checks.missing(figures, gpu)
    assert "7.5" in said
    assert gpu_checks.missing(figures | {"compute capability": "10.0"}, gpu) == []


def test_nvidia_smi_is_read(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_checks.find_gpu() == dict(name="", driver="")  # there is none
    program = tmp_path / "nvidia-smi"
    for said, found in (
        ("NVIDIA H100 80GB HBM3, 580.65.06\nNVIDIA H100 80GB HBM3, 580.65.06\n", "580.65.06"),
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n", ""),
    ):
        program.write_text(f"#!/bin/sh\nprintf '%s' \"{said}\"\n")
        program.chmod(0o755)
        assert gpu_checks.find_gpu()["driver"] == found


# ==== 5. What the page says of it ===============================================================

PAGE = (ROOT / "docs/gpu.md").read_text()


def test_the_page_lists_the_tests_of_a_gpu():
    """Those that `pytest -m gpu` runs: a new one is named in docs/gpu.md, with what it shows."""
    marked = set()
    for path in (ROOT / "tests").glob("test_*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef):
                marks = [ast.unparse(mark) for mark in node.decorator_list]
                if "pytest.mark.gpu" in marks:
                    marked.add(node.name)
    table = PAGE.partition("## Tests of a GPU")[2].partition("\n## ")[0]
    listed = {line.split("`")[1] for line in table.splitlines() if line.startswith("| `test_")}
    assert listed == marked and marked


def test_the_page_explains_every_step():
    table = PAGE.partition("| step | figure |")[2].partition("\n\n")[0]
    for name in first_hour.STEPS:
        assert f"`{name}`" in table or name == "model", name
    assert "nothing" in PAGE.splitlines()[0] or "runs/first_hour" in PAGE.splitlines()[0]


# ==== 6. Several nodes ==========================================================================

SLURM = {
    "scontrol": "echo localhost; echo localhost",
    # A task a node: both here, at the same time
    "srun": 'shift; "$@" & first=$!; "$@" & wait $first && wait $!',
}


@pytest.mark.slow
def test_the_batch_file_starts_a_run_on_two_nodes(tiny, tmp_path):
    """tools/lad.sbatch as Slurm runs it, with both nodes on this machine: two torchruns that meet,
    each with a first rank of its own."""
    from forks import free_port

    for name, body in SLURM.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = dict(PATH=f"{tmp_path}:{os.environ['PATH']}", LAD_INTERFACE="lo")
    env.update(SLURM_SUBMIT_DIR=str(ROOT), SLURM_JOB_NODELIST="node[0-1]", SLURM_NNODES="2")
    env.update(SLURM_GPUS_ON_NODE="1", SLURM_JOB_ID="7", SLURM_CPUS_PER_TASK="1")
    env.update(LAD_PORT=str(free_port()), OMP_NUM_THREADS="")
    flags = ["--config", "tiny", "--steps", "1", "--prompts", "4", "--group", "4"]
    flags += ["--minibatches", "1", "--epochs", "1", "--eval_data", "", "--out", tmp_path / "run"]
    command = ["bash", ROOT / "tools/lad.sbatch", *map(str, flags)]
    options = dict(capture_output=True, text=True, timeout=600, cwd=tmp_path)
    done = subprocess.run(command, env=ENV | env, **options)
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "step     1/1" in said and " 2 x cpu" in said, said[-5000:]


@pytest.mark.slow
def test_a_rehearsal_of_everything(tmp_path):
    """Every step that has something for a CPU, for real. Its figures are read from what the tools
    write today; what only a GPU has is not there."""
    command = ["tools/first_hour.py", "--rehearse", "--out", tmp_path]
    done = launch(command, timeout=1500, check=False)
    record = json.loads((tmp_path / "record.json").read_text())
    rehearsed = {name for name, s in first_hour.STEPS.items() if s.rehearsed}
    outcome = results(record)
    assert {name for name in outcome if outcome[name] == "passed"} == rehearsed, done.stdout
    assert done.returncode == 0
    for name in rehearsed - {"machine"}:
        missing = {figure.name for figure in first_hour.STEPS[name].figures}
        missing -= set(record[name]["figures"])
        assert not [x for x in missing if "sleep" not in x and "in use" not in x], missing
    assert record["agreement"]["figures"]["largest difference, 3 pushes"] < 1e-3  # fp32
    assert record["stop"]["figures"]["exit code after SIGTERM"] == 143
    page = (tmp_path / "page.md").read_text()
    assert "| met |" not in page and "missed" not in page
