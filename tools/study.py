"""
The study behind the README's tables: every objective on `tiny`, the same budget, learning rates picked by the same sweep, several seeds.

    python tools/study.py run                  # everything that assets/study.csv lacks: hours on two cores, stop and start it as you like
    python tools/study.py run --only sweep,main --workers 2 --dry   # which runs are missing
    python tools/study.py table                # the README's tables, and assets/study.png, from assets/study.csv

A run is `python lad.py --config tiny --objective NAME --seed S --steps 30 ...` with one thread; here several at a time, each a fork of a process
that has imported torch and vLLM already (half of a short run is imports). One line of the CSV is one evaluation of one run, with
the commit that made it. The test split, 128 puzzles, and K = 32 samples to each are the same for all.

Learning rates: SWEEP's seed is not among the SEEDS of the main table. The rate with the highest held-out pass@1 + pass@32 at the end is taken.
"""
import argparse, csv, json, math, os, shutil, statistics, subprocess, sys, tempfile, time
from pathlib import Path

os.environ.update({"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "VLLM_LOGGING_LEVEL": "ERROR", "TORCH_CPP_LOG_LEVEL": "ERROR"} | os.environ)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lad

HERE = Path(__file__).resolve().parent.parent
CSV = HERE / "assets" / "study.csv"
FIELDS = ["part", "label", "lr", "seed", "step", "pass@1", "pass@32", "distinct", "entropy", "reward", "rank_one", "seconds", "commit"]
STEPS, RATES, SWEEP_SEEDS, SEEDS = 30, (2.5e-5, 5e-5, 1e-4, 2e-4), (100,), (0, 1, 2, 3, 4)
BASE = ["--config", "tiny", "--steps", str(STEPS), "--eval_every", "10", "--checkpoint_every", "0", "--verify_workers", "1"]

QUESTIONS = {   # label: flags; seeds 0..4, the rate that the sweep gave the objective in the first word
    **{f"lad eta {eta}": ["--eta", str(eta)] for eta in (0.0625, 0.125, 0.5, 1.0, 4.0)},
    **{f"lad {name}": ["--divergence", name] for name in ("kl", "kl_c", "rkl", "rkl_c", "jf", "hd", "tv")},
    **{f"{name} {m}x{e} updates": ["--minibatches", str(m), "--epochs", str(e)] for name in ("lad", "grpo") for m, e in ((1, 1), (4, 1), (4, 4))},
    "lad per sequence": ["--ratio", "sequence", "--aggregation", "sequence"],
    "fade without alpha": ["--fade_alpha_max", "1.0"],
    "fade without delta": ["--fade_delta_min", "1.0"],
    **{f"fade H* {share} of the initial": ["--fade_entropy", str(round(share * 0.49, 4))] for share in (0.25, 1.0)},   # 0.5 is the default; 0.49 nats at the start
    **{f"lad_anchor {what}": flags for what, flags in {"eta 0.125": ["--eta", "0.125"], "eta 0.5": ["--eta", "0.5"], "moving every 10": ["--ref_every", "10"]}.items()},
}


def rows():
    return [dict(row, **{k: float(row[k]) for k in FIELDS[2:-1] if k != "seed"}) for row in csv.DictReader(open(CSV))] if CSV.exists() else []


def finished(done):
    """{(part, label, lr, seed)} of the runs that reached their last step."""
    return {(r["part"], r["label"], r["lr"], int(r["seed"])) for r in done if r["step"] == STEPS}


def best_rates(done):
    """{objective: the sweep's rate}, of the objectives whose sweep is whole."""
    score, best = {}, {}
    for r in done:
        if r["part"] == "sweep" and r["step"] == STEPS:
            score.setdefault(r["label"], {}).setdefault(r["lr"], []).append(r["pass@1"] + r["pass@32"])
    for label, rates in score.items():
        if set(rates) >= set(RATES) and all(len(v) == len(SWEEP_SEEDS) for v in rates.values()):
            best[label] = max(RATES, key=lambda rate: statistics.mean(rates[rate]))
    return best


def jobs(done, only):
    """(part, label, lr, seed, flags) still to be run, as far as the sweep's results allow."""
    best, missing = best_rates(done), []
    for seed in SWEEP_SEEDS:
        missing += [("sweep", name, rate, seed, ["--objective", name]) for name in lad.OBJECTIVES for rate in RATES]
    for seed in SEEDS:   # seed by seed: what is there at any time is balanced
        missing += [("main", name, best[name], seed, ["--objective", name]) for name in lad.OBJECTIVES if name in best]
    for seed in SEEDS:
        missing += [("question", label, best[label.split()[0]], seed, ["--objective", label.split()[0], *flags])
                    for label, flags in QUESTIONS.items() if label.split()[0] in best]
    return [job for job in missing if job[:4] not in finished(done) and job[0] in only]


def run(job, folder, commit):
    """In a forked child: one run of lad.py, its evaluations appended to the CSV in one write."""
    part, label, rate, seed, flags = job
    out = Path(folder) / "-".join([part, label.replace(" ", "_").replace("*", ""), str(rate), str(seed)])
    sys.stdout.flush()
    os.dup2(os.open(f"{out}.log", os.O_CREAT | os.O_WRONLY), 1)
    os.dup2(1, 2)
    sys.argv = ["lad.py"]
    began = time.time()
    lad.main([*BASE, "--seed", str(seed), "--lr", repr(rate), "--out", str(out), *flags])
    lines = [json.loads(line) for line in open(out / "metrics.jsonl")]
    train = {x["step"]: x for x in lines if "loss" in x}
    assert all(math.isfinite(x[k]) for x in train.values() for k in ("loss", "entropy", "grad_norm")) and not train[STEPS]["skipped"], "a number is not finite"
    text = ""
    for x in (x for x in lines if "eval/pass@1" in x):
        now = train.get(x["step"], train[1])   # before training: the entropy and reward of the first batch
        values = [part, label, rate, seed, x["step"], *(round(x[f"eval/{k}"], 5) for k in ("pass@1", "pass@32", "distinct")),
                  *(round(now[k], 5) for k in ("entropy", "reward", "rank_one")), round(time.time() - began, 1), commit]
        text += ",".join(map(str, values)) + "\n"
    with open(CSV, "a") as f:
        f.write(text)
    shutil.rmtree(out)


def run_all(only, workers, dry):
    missing = jobs(rows(), only)
    print(f"{len(missing)} runs to go" + " (and what the sweep will allow)" * (not best_rates(rows())))
    if dry:
        return print(*(f"  {part:8} {label:28} lr {rate:g}  seed {seed}" for part, label, rate, seed, _ in missing), sep="\n")
    commit = subprocess.run(["git", "-C", HERE, "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    CSV.parent.mkdir(exist_ok=True)
    if not CSV.exists():
        CSV.write_text(",".join(FIELDS) + "\n")
    from harness import tiny
    tiny.make()
    import gc, transformers, vllm, vllm.v1.worker.cpu_worker   # noqa: imported once, for all the children
    gc.collect(), gc.freeze()
    folder, running, failed, began, count = tempfile.mkdtemp(prefix="study-"), {}, set(), time.time(), 0
    while True:
        todo = [job for job in jobs(rows(), only) if job[:4] not in failed and job not in running.values()]
        while todo and len(running) < workers:
            job = todo.pop(0)
            if (child := os.fork()) == 0:
                try:
                    run(job, folder, commit)
                except BaseException:
                    import traceback
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
            running[child] = job
        if not running:
            break
        child, status = os.wait()
        job, count = running.pop(child, None), count + 1
        if job is None:
            continue
        if status:
            failed.add(job[:4])
        left = len([j for j in jobs(rows(), only) if j[:4] not in failed])
        print(f"{'FAILED' if status else 'done':6} {' '.join(map(str, job[:4])):44} {count} done, {left} known to be left, {(time.time() - began) / count:.1f} s a run", flush=True)
    if failed:
        sys.exit(f"study.py: {len(failed)} runs failed; their logs are in {folder}")


def interval(values):
    """(mean, half-width of the 95% t interval) over seeds."""
    t = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}[len(values)] if len(values) > 1 else math.nan
    return statistics.mean(values), t * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def distinct_at(mine, level=0.5):
    """Distinct answers where each seed's pass@1 first reached `level`, interpolated between evaluations: methods of any speed side by side.
    0.5 lies between the second and third evaluation of nearly all; lower, the long chord from the start would wrong the fast ones."""
    found = []
    for seed in {r["seed"] for r in mine}:
        points = sorted(((r["step"], r["pass@1"], r["distinct"]) for r in mine if r["seed"] == seed))
        found += [u + (v - u) * (level - a) / (b - a) for (_, a, u), (_, b, v) in zip(points, points[1:]) if a < level <= b][:1]
    return found


def table(done, part, labels):
    """A markdown table: mean ± 95% interval over seeds at the last step; the batch of the highest pass@1 of the evaluations."""
    print(f"\n| {part} | lr | seeds | pass@1 | pass@32 | distinct | distinct when pass@1 was 0.50 | entropy | batch of peak pass@1 | rank one |\n" + "|---" * 10 + "|")
    for label in labels:
        mine = [r for r in done if r["part"] == part and r["label"] == label and r["lr"] == best_rates(done).get(label.split()[0])]
        last = [r for r in mine if r["step"] == STEPS]
        if not last:
            continue
        peaks = [max((r for r in mine if r["seed"] == one["seed"]), key=lambda r: r["pass@1"])["step"] for one in last]
        cell = lambda values, digits: ("{0:.{2}f} ± {1:.{2}f}" if len(values) > 2 else "{0:.{2}f}").format(*interval(values), digits)   # of two seeds: a mean, no interval
        level = distinct_at(mine)
        print(f"| {label} | {last[0]['lr']:g} | {len(last)} | " + " | ".join(cell([r[k] for r in last], d) for k, d in (("pass@1", 3), ("pass@32", 3), ("distinct", 2)))
              + f" | {cell(level, 2) if level else 'not reached'} | {cell([r['entropy'] for r in last], 3)} | {statistics.mean(peaks):.0f} | {statistics.mean([r['rank_one'] for r in last]):.2f} |")


def against_grpo(done):
    """Differences to GRPO, seed by seed: mean ± 95% interval. One that holds 0 separates nothing."""
    last = {(r["label"], r["seed"]): r for r in done if r["part"] == "main" and r["step"] == STEPS and r["lr"] == best_rates(done).get(r["label"])}
    print("\n| less grpo | pass@1 | pass@32 | distinct |\n|---|---|---|---|")
    for name in lad.OBJECTIVES:
        pairs = [(r, last["grpo", seed]) for (label, seed), r in last.items() if label == name != "grpo" and ("grpo", seed) in last]
        if pairs:
            cells = ("{:+.3f} ± {:.3f}".format(*interval([a[key] - b[key] for a, b in pairs])) for key in ("pass@1", "pass@32", "distinct"))
            print(f"| {name} | " + " | ".join(cells) + " |")


def sweep(done):
    """pass@1 + pass@32 after the sweep's runs; the chosen rate in bold."""
    print("\n| pass@1 + pass@32 at lr | " + " | ".join(f"{rate:g}" for rate in RATES) + " |\n" + "|---" * (len(RATES) + 1) + "|")
    for name in lad.OBJECTIVES:
        score = {r["lr"]: r["pass@1"] + r["pass@32"] for r in done if r["part"] == "sweep" and r["label"] == name and r["step"] == STEPS}
        best = best_rates(done).get(name)
        print(f"| {name} | " + " | ".join((f"**{score[rate]:.3f}**" if rate == best else f"{score[rate]:.3f}") if rate in score else "" for rate in RATES) + " |")


def picture(done, path):
    """Held-out pass@32 against pass@1 and distinct answers against pass@1, one line a method, its evaluations as points, mean over seeds."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    main = [r for r in done if r["part"] == "main" and r["lr"] == best_rates(done).get(r["label"])]
    fig, axes = plt.subplots(1, 2, figsize=(13, 6))
    for number, name in enumerate(dict.fromkeys(r["label"] for r in main)):
        mine = [r for r in main if r["label"] == name]
        mean = lambda key: [statistics.mean(r[key] for r in mine if r["step"] == step) for step in sorted({r["step"] for r in mine})]
        ours = name in ("lad", "fade", "lad_anchor", "grpo")
        for ax, key in zip(axes, ("pass@32", "distinct")):
            x, y = mean("pass@1"), mean(key)
            line, = ax.plot(x, y, "o-" if ours else ".-", lw=2.5 if ours else 0.8, ms=4, color=f"C{('lad', 'fade', 'lad_anchor', 'grpo').index(name)}" if ours else plt.cm.tab20b(number), label=name, zorder=3 if ours else 2)
            ax.annotate(name, (x[-1], y[-1]), fontsize=7, color=line.get_color(), xytext=(3, 0), textcoords="offset points")
            ax.set(xlabel="held-out pass@1", ylabel=f"held-out {key}" if key != "distinct" else "distinct right answers to a puzzle (of 32)")
            ax.grid(alpha=0.3)
    seeds = min(len({r["seed"] for r in main if r["label"] == label}) for label in {r["label"] for r in main})
    fig.suptitle(f"tiny: every objective from the same start (left) to batch {STEPS}, mean of {seeds} seeds; up and right is better")
    fig.tight_layout()
    fig.savefig(path, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--only", default="sweep,main,question", help="parts, with commas")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--dry", action="store_true", help="list the missing runs")
    args = parser.parse_args()
    if args.what == "run":
        run_all(args.only.split(","), args.workers, args.dry)
    else:
        done = rows()
        table(done, "main", lad.OBJECTIVES)
        against_grpo(done)
        table(done, "question", QUESTIONS)
        sweep(done)
        print("\ncommits:", *sorted({r["commit"] for r in done}))
        picture(done, CSV.parent / "study.png")
