"""
Pictures of runs, from their metrics.jsonl.

    python harness/plot.py runs/tiny-lad-s0     # its plot.png, as at the end of a run of lad.py
    python harness/plot.py runs/tiny-grpo-s0 runs/tiny-lad-s0 --out a.png     # several in one
"""

import contextlib
import json
import sys
from pathlib import Path

# Title, {metric: label}, in reading order. The metrics are those of lad.py's log
HELD_OUT = "held-out prompts"
PANELS = [
    ("training", {"reward": "reward", "solve_rate": "solve rate"}),
    ("token entropy (nats)", {"entropy": "entropy", "fade_h": "running mean H"}),
    (HELD_OUT, {}),  # pass@1 and pass@K: K is the run's
    ("gradient mass", {"mass_success": "success, m_S", "mass_failure": "failure, m_F"}),
    (
        "FADE's schedule (tracked for every objective)",
        {"fade_alpha": "alpha", "fade_delta": "delta", "fade_p": "running solve rate p"},
    ),
    (
        "change of the weights since the start",
        {"rank_one": "rank-one share of the head's", "head_change": "the head's share of all"},
    ),
]
DISTINCT = "distinct right answers to a prompt (right axis)"
STYLES = ("-", "--", ":")  # of the metrics in a panel, where the colour is the run's


# ==== 1. Reading ================================================================================


def read_log(path):
    """The objects of a .jsonl file; lines that are blank, or torn by a kill, are left out."""
    found = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
    return [x for x in found if isinstance(x, dict) and "step" in x]


def read(out):
    """(training lines, evaluation lines) of a run's log; none where it has none yet."""
    path = Path(out) / "metrics.jsonl"
    lines = read_log(path) if path.exists() else []
    train = [x for x in lines if "loss" in x]
    evals = [x for x in lines if "eval/pass@1" in x]
    return train, evals


def series_of(title, series, train, evals):
    """({metric: label}, the lines that hold them) of a run's panel."""
    if title == HELD_OUT:
        names = [key for key in (evals[0] if evals else {}) if key.startswith("eval/pass@")]
        return {key: key.removeprefix("eval/") for key in names}, evals
    if "reward" in series and all(x.get("reward") == x.get("solve_rate") for x in train):
        return {"reward": "reward (= solve rate)"}, train
    return series, train


def shown_name(run):
    """A run's name as matplotlib shows it: between two $ it would read mathematics, and it leaves
    what begins with _ out of a legend."""
    name = Path(run).resolve().name.replace("$", r"\$")
    if name.startswith("_"):
        return " " + name
    return name


# ==== 2. Drawing ================================================================================


def draw(runs, path):
    """One figure of six panels. In a picture of one run the colour tells metrics apart; of several,
    runs, and the line's style the metric."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 7))
    axes = figure.subplots(2, 3, sharex=True)
    twin = axes[0, 2].twinx()
    for number, run in enumerate(runs):
        train, evals = read(run)
        name = shown_name(run) if len(runs) > 1 else ""
        for ax, (title, series) in zip(axes.flat, PANELS, strict=True):
            series, lines = series_of(title, series, train, evals)
            draw_lines(ax, series, lines, number, name)
        draw_distinct(twin, evals, f"C{number}" if name else "C2")

    # The right axis has no legend of its own: an empty line in the left one's stands for it
    axes[0, 2].plot([], [], "s:", color="grey" if len(runs) > 1 else "C2", label=DISTINCT)
    axes[0, 2].set_ylim(0, 1)
    twin.set_ylim(bottom=0)
    for ax, (title, _) in zip(axes.flat, PANELS, strict=True):
        ax.set_title(title)
        ax.grid(alpha=0.3)
        if ax.lines:
            ax.legend(fontsize=7)
        else:
            ax.text(0.5, 0.5, "not in the log", transform=ax.transAxes, ha="center", color="grey")
        ax.xaxis.get_major_locator().set_params(integer=True)
    figure.supxlabel("rollout batch", fontsize=10)
    names = ", ".join(shown_name(run) for run in runs)
    figure.suptitle(names if len(runs) < 4 else f"{len(runs)} runs")

    # Margins by hand: tight_layout would draw everything once more to find them
    figure.subplots_adjust(0.05, 0.097, 0.965, 0.902, wspace=0.17, hspace=0.174)
    figure.savefig(path, dpi=110)


def draw_lines(ax, series, lines, number, name):
    """The metrics of run `number` in a panel; `name`: the run's, where there are several."""
    for i, (key, label) in enumerate(series.items()):
        steps = [x["step"] for x in lines if key in x]
        values = [x[key] for x in lines if key in x]
        if not steps:
            continue
        if name:
            color = f"C{number}"
            style = STYLES[i % len(STYLES)]
            label = f"{name}: {label}"
        else:
            color = f"C{i}"
            style = "-"
        # Points, where there are too few for a line to show
        is_sparse = key.startswith("eval/") or len(steps) == 1
        marker = "o" if is_sparse else None
        ax.plot(steps, values, style, color=color, marker=marker, ms=3, label=label)


def draw_distinct(ax, evals, color):
    steps = [x["step"] for x in evals]
    values = [x["eval/distinct"] for x in evals]
    if steps:
        ax.plot(steps, values, "s:", color=color, ms=3)


# ==== 3. The end of a run, and main =============================================================


def report(out):
    """At the end of a run: draw plot.png, say where it is, and print a markdown table of the
    evaluations before and after training."""
    train, evals = read(out)
    if train or evals:
        draw([out], out / "plot.png")
        print(f"\nrun       {out}/plot.png drawn, weights in {out}/hf\n")
    else:
        print(f"\nrun       no step and no evaluation: nothing to draw; weights in {out}/hf\n")
    if not evals:
        return

    # The first evaluation and the last
    keys = [key for key in evals[0] if key.startswith("eval/")]
    titles = [key.removeprefix("eval/") for key in keys]
    print("| objective | step | " + " | ".join(titles) + " |")
    print("|" + "---|" * (len(keys) + 2))
    for x in evals[:1] + evals[-1:]:
        cells = [f"{x[key]:.3f}" for key in keys]
        print(f"| {x['objective']} | {x['step']} | " + " | ".join(cells) + " |", flush=True)


def main(argv):
    from harness import command
    from harness.settings import die

    parser = command.parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="picture to write (the run's plot.png; of several runs compare.png, here)",
    )
    args = parser.parse_args(argv)

    # The runs that have something to show
    runs = []
    for run in args.runs:
        if not run.is_dir():
            die(f"{run}: no such folder; give the folder of a run of lad.py")
        if any(read(run)):
            runs.append(run)
        else:
            print(f"{run}: no step and no evaluation in its metrics.jsonl: nothing to draw")
    if not runs:
        return

    path = args.out
    if path is None:
        path = runs[0] / "plot.png" if len(args.runs) == 1 else Path("compare.png")
    try:
        draw(runs, path)
    except (OSError, ValueError) as error:  # ValueError: an ending that is no picture's
        die(f"--out {path}: {error}")
    print(path)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from harness import command

    command.run(main)
