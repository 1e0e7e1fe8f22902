"""
Pictures of runs, from their metrics.jsonl.

    python harness/plot.py runs/tiny-lad-s0                              # its plot.png, as lad.py draws it at the end of a run
    python harness/plot.py runs/tiny-grpo-s0 runs/tiny-lad-s0 --out a.png   # several runs on the same panels
"""
import argparse, json
from pathlib import Path

PANELS = [   # title, {metric: label}; the metrics of lad.py's log, see the README
    ("training", {"reward": "reward", "solve_rate": "solve rate"}),
    ("token entropy (nats)", {"entropy": "entropy", "fade_h": "running mean H"}),
    ("held-out prompts", {}),   # pass@1 and pass@K, filled in by draw()
    ("gradient mass", {"mass_success": "success, m_S", "mass_failure": "failure, m_F"}),
    ("FADE's schedule (tracked for every objective)", {"fade_alpha": "alpha", "fade_delta": "delta", "fade_p": "running solve rate p"}),
    ("rank-one share of the head's update", {"rank_one": "leading singular direction"}),
]


def read(out):
    """(training lines, evaluation lines) of a run; a torn last line is left out."""
    path = Path(out) / "metrics.jsonl"
    lines = [json.loads(line) for line in open(path) if line.endswith("\n")] if path.exists() else []   # no step and no evaluation: no file
    return [x for x in lines if "loss" in x], [x for x in lines if "eval/pass@1" in x]


def draw(runs, path):
    """One figure of six panels. Colour tells metrics of a single run apart, else runs (and the line's style the metric)."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(2, 3, figsize=(14, 7), sharex=True)
    twin = axes[0, 2].twinx()
    for number, run in enumerate(map(Path, runs)):
        train, evals = read(run)
        for ax, (title, series) in zip(axes.flat, PANELS):
            data = evals if title == "held-out prompts" else train
            series = series or {k: k[5:] for k in (evals[0] if evals else ()) if k.startswith("eval/pass@")}
            if "reward" in series and all(x["reward"] == x["solve_rate"] for x in train):
                series = {"reward": "reward (= solve rate)"}
            for i, (key, label) in enumerate(series.items()):
                points = [(x["step"], x[key]) for x in data if key in x]
                color, style = (f"C{i}", "-") if len(runs) == 1 else (f"C{number}", ("-", "--", ":")[i])
                name = label if len(runs) == 1 else f"{run.name}: {label}"
                ax.plot(*zip(*points), style, color=color, marker="o" if data is evals or len(points) == 1 else None, ms=3, label=name) if points else None
            ax.set(title=title, ylim=(0, 1) if data is evals else None)
        if evals:
            color = "C2" if len(runs) == 1 else f"C{number}"
            twin.plot([x["step"] for x in evals], [x["eval/distinct"] for x in evals], "s:", color=color, ms=3)
    axes[0, 2].plot([], [], "s:", color="C2" if len(runs) == 1 else "grey", label="distinct right answers to a prompt (right axis)")
    twin.set_ylim(bottom=0)
    for ax in axes.flat:
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7)
        ax.xaxis.get_major_locator().set_params(integer=True)
    fig.supxlabel("rollout batch", fontsize=10)
    fig.suptitle(", ".join(Path(run).name for run in runs) if len(runs) < 4 else f"{len(runs)} runs")
    fig.tight_layout()
    fig.savefig(path, dpi=110)
    plt.close(fig)


def report(out):
    """At the end of a run: draw plot.png, print where it is and a markdown table of the evaluations before and after training."""
    train, evals = read(out)
    if train or evals:
        draw([out], out / "plot.png")
        print(f"\nrun       {out}/plot.png drawn, weights in {out}/hf\n")
    else:
        print(f"\nrun       no step and no evaluation: nothing to draw; weights in {out}/hf\n")
    if evals:
        keys = [k for k in evals[0] if k.startswith("eval/")]
        print("| objective | step | " + " | ".join(k[5:] for k in keys) + " |\n|" + "---|" * (len(keys) + 2))
        for x in evals[:1] + evals[-1:]:
            print(f"| {x['objective']} | {x['step']} | " + " | ".join(f"{x[k]:.3f}" for k in keys) + " |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run directories")
    parser.add_argument("--out", help="picture to write (default: the run's plot.png; of several runs compare.png, here)")
    args = parser.parse_args()
    for run in args.runs:
        if not (Path(run) / "metrics.jsonl").exists():
            parser.error(f"{run} has no metrics.jsonl: not a run directory of lad.py")
    path = args.out or (Path(args.runs[0]) / "plot.png" if len(args.runs) == 1 else Path("compare.png"))
    draw(args.runs, path)
    print(path)
