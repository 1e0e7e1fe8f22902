"""
The study behind docs/study.md: every objective on `tiny`, the same budget, learning rates picked by
the same sweep, several seeds.

    python tools/study.py run      # everything that docs/study.csv lacks: hours on two cores
    python tools/study.py run --only sweep,main --workers 2 --dry     # which runs are missing
    python tools/study.py table    # the tables, and docs/study.png, from docs/study.csv

`run` may be stopped and started as you like. A run is `python lad.py --config tiny --objective NAME
--seed S --steps 30 ...` with one thread; here several at a time, each a fork of a process that has
imported torch and vLLM already (half of a short run is imports). A line of the CSV is one
evaluation of one run, with the commit that made it. The test split, 128 puzzles, and K = 32 samples
to each are the same for all.

Learning rates: SWEEP_SEEDS and SEEDS share none. The rate with the highest held-out pass@1 +
pass@32 at the end is taken.
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
from harness import command

CSV = HERE / "docs" / "study.csv"
RUN = ["part", "label", "lr", "seed", "step"]  # which run, and where in it
NUMBERS = ["pass@1", "pass@32", "distinct", "entropy", "reward", "rank_one", "seconds"]
FIELDS = [*RUN, *NUMBERS, "commit"]

STEPS = 30
RATES = (2.5e-5, 5e-5, 1e-4, 2e-4)
SWEEP_SEEDS = (100,)
SEEDS = (0, 1, 2, 3, 4)
BASE = ["--config", "tiny", "--steps", str(STEPS), "--eval_every", "10"]
BASE += ["--checkpoint_every", "0", "--verify_workers", "1"]
START_ENTROPY = 0.49  # of tiny's tokens, in nats, before training


def questions():
    """{label: flags}. The label's first word is the objective, whose rate the sweep gave."""
    asked = {}
    for eta in (0.0625, 0.125, 0.5, 1.0, 4.0):
        asked[f"lad eta {eta}"] = ["--eta", str(eta)]
    for divergence in ("kl", "kl_c", "rkl", "rkl_c", "jf", "hd", "tv"):
        asked[f"lad {divergence}"] = ["--divergence", divergence]
    for name in ("lad", "grpo"):
        for m, e in ((1, 1), (4, 1), (4, 4)):
            flags = ["--minibatches", str(m), "--epochs", str(e)]
            asked[f"{name} {m}x{e} updates"] = flags
    asked["lad per sequence"] = ["--ratio", "sequence", "--aggregation", "sequence"]
    asked["fade without alpha"] = ["--fade_alpha_max", "1.0"]
    asked["fade without delta"] = ["--fade_delta_min", "1.0"]
    for share in (0.25, 1.0):  # 0.5 is the default
        target = round(share * START_ENTROPY, 4)
        asked[f"fade H* {share} of the initial"] = ["--fade_entropy", str(target)]
    asked["lad_anchor eta 0.125"] = ["--eta", "0.125"]
    asked["lad_anchor eta 0.5"] = ["--eta", "0.5"]
    asked["lad_anchor moving every 10"] = ["--ref_every", "10"]
    return asked


QUESTIONS = questions()


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


def finished(rows):
    """{(part, label, lr, seed)} of the runs that reached their last step."""
    last = [r for r in rows if r["step"] == STEPS]
    return {(r["part"], r["label"], r["lr"], int(r["seed"])) for r in last}


def best_rates(rows):
    """{objective: the sweep's rate}, of the objectives whose sweep is whole."""
    scores = {}  # objective -> rate -> [pass@1 + pass@32 of each seed]
    for r in rows:
        if r["part"] == "sweep" and r["step"] == STEPS:
            of_rate = scores.setdefault(r["label"], {})
            of_rate.setdefault(r["lr"], []).append(r["pass@1"] + r["pass@32"])
    best = {}
    for label, of_rate in scores.items():
        is_whole = set(of_rate) >= set(RATES)
        if is_whole and all(len(values) == len(SWEEP_SEEDS) for values in of_rate.values()):
            best[label] = max(RATES, key=lambda rate: statistics.mean(of_rate[rate]))
    return best


def missing_jobs(rows, parts):
    """(part, label, lr, seed, flags) still to be run, as far as the sweep's results allow."""
    best = best_rates(rows)
    jobs = []
    for seed in SWEEP_SEEDS:
        for name in lad.OBJECTIVES:
            jobs += [("sweep", name, rate, seed, ["--objective", name]) for rate in RATES]
    # Seed by seed, so that what is there at any time is balanced
    for seed in SEEDS:
        for name in lad.OBJECTIVES:
            if name in best:
                jobs.append(("main", name, best[name], seed, ["--objective", name]))
    for seed in SEEDS:
        for label, flags in QUESTIONS.items():
            name = objective_of(label)
            if name in best:
                flags = ["--objective", name, *flags]
                jobs.append(("question", label, best[name], seed, flags))
    done = finished(rows)
    return [job for job in jobs if job[:4] not in done and job[0] in parts]


# ==== 2. Running ================================================================================


def run(job, folder, commit):
    """In a forked child: one run of lad.py, its evaluations appended to the CSV in one write."""
    part, label, rate, seed, flags = job
    name = "-".join([part, label.replace(" ", "_").replace("*", ""), str(rate), str(seed)])
    out = Path(folder) / name
    send_output_to(f"{out}.log")
    sys.argv = ["lad.py"]
    began = time.time()
    lad.main([*BASE, "--seed", str(seed), "--lr", repr(rate), "--out", str(out), *flags])
    seconds = time.time() - began

    # What it left
    with open(out / "metrics.jsonl") as f:
        lines = [json.loads(line) for line in f]
    train = {x["step"]: x for x in lines if "loss" in x}
    refuse_numbers_that_are_none(train)

    text = ""
    for x in lines:
        if "eval/pass@1" not in x:
            continue
        now = train.get(x["step"], train[1])  # before training: of the first batch
        values = [part, label, rate, seed, x["step"]]
        values += [round(x[f"eval/{key}"], 5) for key in ("pass@1", "pass@32", "distinct")]
        values += [round(now[key], 5) for key in ("entropy", "reward", "rank_one")]
        values += [round(seconds, 1), commit]
        text += ",".join(map(str, values)) + "\n"
    with open(CSV, "a") as f:
        f.write(text)
    shutil.rmtree(out)


def send_output_to(path):
    sys.stdout.flush()
    os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY), 1)
    os.dup2(1, 2)


def refuse_numbers_that_are_none(train):
    """A run with a number that is not finite is no result."""
    for x in train.values():
        for key in ("loss", "entropy", "grad_norm"):
            if not math.isfinite(x[key]):
                raise ValueError(f"step {x['step']}: {key} = {x[key]}")
    if train[STEPS]["skipped"]:
        raise ValueError(f"{train[STEPS]['skipped']} optimizer steps were skipped")


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


def run_all(parts, workers, dry):
    """Run what is missing, `workers` at a time; exits with code 1 if a run failed."""
    rows = read_rows()
    missing = missing_jobs(rows, parts)
    later = (
        " (and what the sweep will allow)" if set(best_rates(rows)) < set(lad.OBJECTIVES) else ""
    )
    print(f"{len(missing)} runs to go{later}")
    if dry:
        for part, label, rate, seed, _ in missing:
            print(f"  {part:8} {label:28} lr {rate:g}  seed {seed}")
        return

    describe = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    if not CSV.exists():
        CSV.write_text(",".join(FIELDS) + "\n")
    import_once()

    folder = tempfile.mkdtemp(prefix="study-")
    running = {}  # process id -> job
    failed = set()
    began = time.time()
    count = 0
    while True:
        # As many as there may be
        waiting = [job for job in missing_jobs(read_rows(), parts) if job[:4] not in failed]
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
            failed.add(job[:4])
        left = [job for job in missing_jobs(read_rows(), parts) if job[:4] not in failed]
        word = "FAILED" if status else "done"
        pace = (time.time() - began) / count
        what = " ".join(map(str, job[:4]))
        print(f"{word:6} {what:44} {count} done, {len(left)} known to be left, {pace:.1f} s a run")
        sys.stdout.flush()
    if failed:
        sys.exit(f"study.py: {len(failed)} runs failed; their logs are in {folder}")


def import_once():
    """What every child would import, and the model that they all start from."""
    import transformers  # noqa: F401
    import vllm
    import vllm.v1.worker.cpu_worker  # noqa: F401

    from harness import tiny

    tiny.make()
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


def interval(values):
    """(mean, half-width of the 95% t interval) over seeds."""
    mean = statistics.mean(values)
    n = len(values)
    if n < 2:
        return mean, math.nan
    return mean, STUDENT[n] * statistics.stdev(values) / math.sqrt(n)


def cell(values, digits):
    """mean ± interval; of two seeds a mean alone."""
    mean, half = interval(values)
    if len(values) > 2:
        return f"{mean:.{digits}f} ± {half:.{digits}f}"
    return f"{mean:.{digits}f}"


def distinct_at(rows, level=0.5):
    """Distinct answers where each seed's pass@1 first reached `level`, interpolated between
    evaluations: methods of any speed side by side. 0.5 lies between the second and third evaluation
    of nearly all; lower, the long chord from the start would wrong the fast ones."""
    found = []
    for seed in {r["seed"] for r in rows}:
        mine = [r for r in rows if r["seed"] == seed]
        points = sorted((r["step"], r["pass@1"], r["distinct"]) for r in mine)
        for (_, a, u), (_, b, v) in pairwise(points):
            if a < level <= b:
                found.append(u + (v - u) * (level - a) / (b - a))
                break
    return found


def print_table(rows, part, labels):
    """A markdown table: mean ± 95% interval over seeds at the last step, and the batch of the
    highest pass@1 of the evaluations."""
    columns = [part, "lr", "seeds", "pass@1", "pass@32", "distinct"]
    columns += ["distinct when pass@1 was 0.50", "entropy", "batch of peak pass@1", "rank one"]
    print_header(columns)
    best = best_rates(rows)
    for label in labels:
        mine = [r for r in rows if r["part"] == part and r["label"] == label]
        mine = [r for r in mine if r["lr"] == best.get(objective_of(label))]
        last = [r for r in mine if r["step"] == STEPS]
        if not last:
            continue
        level = distinct_at(mine)
        cells = [label, f"{last[0]['lr']:g}", str(len(last))]
        for key, digits in (("pass@1", 3), ("pass@32", 3), ("distinct", 2)):
            cells.append(cell([r[key] for r in last], digits))
        cells.append(cell(level, 2) if level else "not reached")
        cells.append(cell([r["entropy"] for r in last], 3))
        cells.append(f"{statistics.mean(peak_step(mine, r['seed']) for r in last):.0f}")
        cells.append(f"{statistics.mean(r['rank_one'] for r in last):.2f}")
        print_line(cells)


def peak_step(rows, seed):
    """The step of a seed's evaluation with the highest pass@1."""
    mine = [r for r in rows if r["seed"] == seed]
    return max(mine, key=lambda r: r["pass@1"])["step"]


def print_differences(rows):
    """Less GRPO, seed by seed: mean ± 95% interval. One that holds 0 separates nothing."""
    best = best_rates(rows)
    last = {}  # (objective, seed) -> its last line
    for r in rows:
        if r["part"] == "main" and r["step"] == STEPS and r["lr"] == best.get(r["label"]):
            last[r["label"], r["seed"]] = r
    keys = ("pass@1", "pass@32", "distinct")
    print_header(["less grpo", *keys])
    for name in lad.OBJECTIVES:
        pairs = []
        for (label, seed), r in last.items():
            if label == name != "grpo" and ("grpo", seed) in last:
                pairs.append((r, last["grpo", seed]))
        if not pairs:
            continue
        cells = [name]
        for key in keys:
            mean, half = interval([a[key] - b[key] for a, b in pairs])
            cells.append(f"{mean:+.3f} ± {half:.3f}")
        print_line(cells)


def print_sweep(rows):
    """pass@1 + pass@32 after the sweep's runs; the chosen rate in bold."""
    print_header(["pass@1 + pass@32 at lr", *(f"{rate:g}" for rate in RATES)])
    best = best_rates(rows)
    ends = [r for r in rows if r["part"] == "sweep" and r["step"] == STEPS]
    for name in lad.OBJECTIVES:
        score = {r["lr"]: r["pass@1"] + r["pass@32"] for r in ends if r["label"] == name}
        cells = [name]
        for rate in RATES:
            text = f"{score[rate]:.3f}" if rate in score else ""
            cells.append(f"**{text}**" if rate == best.get(name) else text)
        print_line(cells)


def print_header(columns):
    print()
    print_line(columns)
    print("|---" * len(columns) + "|")


def print_line(cells):
    print("| " + " | ".join(cells) + " |")


# ==== 4. The picture ============================================================================

HIGHLIGHTED = ("lad", "fade", "lad_anchor", "grpo")


def draw(rows, path):
    """pass@32 against pass@1, and distinct answers against pass@1: a line a method, its evaluations
    as points, mean over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    best = best_rates(rows)
    main = [r for r in rows if r["part"] == "main" and r["lr"] == best.get(r["label"])]
    labels = list(dict.fromkeys(r["label"] for r in main))
    fig, axes = plt.subplots(1, 2, figsize=(13, 6))
    for number, name in enumerate(labels):
        mine = [r for r in main if r["label"] == name]
        style = dict(lw=0.8, ms=4, color=plt.cm.tab20b(number), label=name, zorder=2)
        marker = ".-"
        if name in HIGHLIGHTED:
            style.update(lw=2.5, color=f"C{HIGHLIGHTED.index(name)}", zorder=3)
            marker = "o-"
        for ax, key in zip(axes, ("pass@32", "distinct"), strict=True):
            x = means(mine, "pass@1")
            y = means(mine, key)
            ax.plot(x, y, marker, **style)
            where = dict(xytext=(3, 0), textcoords="offset points")
            ax.annotate(name, (x[-1], y[-1]), fontsize=7, color=style["color"], **where)

    axes[0].set_ylabel("held-out pass@32")
    axes[1].set_ylabel("distinct right answers to a puzzle (of 32)")
    for ax in axes:
        ax.set_xlabel("held-out pass@1")
        ax.grid(alpha=0.3)
    seeds = min(len({r["seed"] for r in main if r["label"] == label}) for label in labels)
    fig.suptitle(
        f"tiny: every objective from the same start (left) to batch {STEPS}, mean of {seeds} "
        "seeds; up and right is better"
    )
    fig.tight_layout()
    fig.savefig(path, dpi=110)


def means(rows, key):
    """The mean over seeds at each step, in order."""
    steps = sorted({r["step"] for r in rows})
    return [statistics.mean(r[key] for r in rows if r["step"] == step) for step in steps]


def main(argv):
    parser = command.parser(__doc__)
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--only", default="sweep,main,question", help="parts, with commas")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--dry", action="store_true", help="list the missing runs")
    args = parser.parse_args(argv)
    if args.what == "run":
        run_all(args.only.split(","), args.workers, args.dry)
        return
    rows = read_rows()
    print_table(rows, "main", lad.OBJECTIVES)
    print_differences(rows)
    print_table(rows, "question", QUESTIONS)
    print_sweep(rows)
    print("\ncommits:", *sorted({r["commit"] for r in rows}))
    draw(rows, CSV.parent / "study.png")


if __name__ == "__main__":
    command.run(main)
