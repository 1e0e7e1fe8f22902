"""tools/study.py: what it would run, and what its tables say of rows made up here."""

import json
import math

import pytest

from examples import words
from tools import study


def line(label, seed, one, most=0.9, distinct=2.0, task="tiny", part="main", lr=1e-4):
    """A line of the CSV at the last step, as read_rows() gives it."""
    values = {"task": task, "part": part, "label": label, "lr": lr, "seed": str(seed)}
    schedule = {"fade_alpha": 1.0, "fade_delta": 1.0}
    values |= {"step": study.TASKS[task].steps, "pass@1": one, "pass@32": most}
    return values | {"distinct": distinct, "entropy": 0.2, "tokens": 6.0} | schedule


def sweep(label, scores):
    """Lines of a sweep: {rate: pass@1}."""
    return [line(label, 100, one, part="sweep", lr=rate) for rate, one in scores.items()]


ASKED = [("tiny", "sweep"), ("tiny", "main")]


def rates_of(rows):
    jobs = study.missing_jobs(rows, ASKED, ["grpo"])
    return [job[3] for job in jobs if job[1] == "sweep"]


def test_a_grid_grows_where_its_end_was_best_and_then_gives_the_rate():
    assert rates_of([]) == [5e-5, 1e-4, 2e-4]
    inside = sweep("grpo", {5e-5: 0.1, 1e-4: 0.3, 2e-4: 0.2})
    assert rates_of(inside) == []
    assert study.best_rates(inside, "tiny") == {"grpo": 1e-4}

    low = sweep("grpo", {5e-5: 0.3, 1e-4: 0.2, 2e-4: 0.1})
    assert rates_of(low) == [2.5e-5]
    assert study.best_rates(low, "tiny") == {}  # nothing is reported at an end of the grid
    lower = low + sweep("grpo", {2.5e-5: 0.25})
    assert rates_of(lower) == []
    assert study.best_rates(lower, "tiny") == {"grpo": 5e-5}

    high = sweep("grpo", {5e-5: 0.1, 1e-4: 0.2, 2e-4: 0.3})
    assert rates_of(high) == [4e-4]
    assert rates_of(high + sweep("grpo", {4e-4: 0.4})) == [8e-4]
    ever = high + sweep("grpo", {4e-4: 0.4, 8e-4: 0.5})
    assert rates_of(ever) == []  # it grows GROWN times


def test_what_is_run_is_not_run_again_and_seeds_are_shared_with_no_sweep():
    rows = sweep("grpo", {5e-5: 0.1, 1e-4: 0.3, 2e-4: 0.2})
    jobs = study.missing_jobs(rows, ASKED, ["grpo"])
    assert [job[:5] for job in jobs] == [("tiny", "main", "grpo", 1e-4, s) for s in study.SEEDS]
    assert study.SWEEP_SEED not in {*study.SEEDS, *study.FRESH_SEEDS}
    rows.append(line("grpo", 0, 0.5))
    assert [job[4] for job in study.missing_jobs(rows, ASKED, ["grpo"])] == [1, 2, 3, 4]
    half = line("grpo", 1, 0.5) | {"step": 15}  # a run that was killed has no last line
    assert len(study.missing_jobs([*rows, half], ASKED, ["grpo"])) == 4


def test_what_is_asked_again_has_seeds_of_its_own():
    rows = sweep("grpo", {5e-5: 0.1, 1e-4: 0.3, 2e-4: 0.2})
    jobs = study.missing_jobs(rows, [("tiny", "fresh")], ["grpo"])
    assert {job[4] for job in jobs} == set(study.FRESH_SEEDS)
    assert not set(study.FRESH_SEEDS) & set(study.SEEDS)
    rows += [line("grpo", seed, 0.5) for seed in study.SEEDS]
    rows += [line("grpo", seed, 0.7, part="fresh") for seed in study.FRESH_SEEDS]
    assert {r["pass@1"] for r in study.reported(rows, "tiny")["grpo"].values()} == {0.5}
    fresh = study.reported(rows, "tiny", study.FRESH_SEEDS)["grpo"]
    assert {r["pass@1"] for r in fresh.values()} == {0.7}


def test_every_label_is_of_a_method_and_its_flags_are_lads():
    import lad

    for name, task in study.TASKS.items():
        labels = set()
        for part in study.points(task).values():
            for label, flags in part.items():
                method = study.objective_of(label)
                assert method in study.METHODS
                argv = ["--config", name, "--objective", method, *flags]
                cfg = lad.load_config(argv)
                assert cfg.objective == method
                labels.add(label)
        assert {label for front in study.FRONTS.values() for label in front} <= labels


@pytest.mark.parametrize("task", ("tiny", "smol"))
def test_the_sweep_never_sees_the_reported_prompts(task, tmp_path, tiny):
    flags = study.split_for_sweep(task, tmp_path)
    parts = dict(zip(flags[::2], flags[1::2], strict=True))
    rows = {key: [json.loads(text) for text in open(path)] for key, path in parts.items()}
    if task == "tiny":
        train, rows["reported"] = (
            [json.loads(x) for x in open(tiny[k])] for k in ("train", "test")
        )
    else:
        train, rows["reported"] = words.train(), words.test()
    assert rows["--data"] + rows["--eval_data"] == train
    assert len(rows["--eval_data"]) == study.TASKS[task].validation
    everything = [json.dumps(row) for part in rows.values() for row in part]
    assert len(set(everything)) == len(everything)


def test_a_front_is_read_between_its_points_and_nowhere_else():
    front = [{"0": line("a", 0, 0.6, distinct=1.0)}, {"0": line("b", 0, 0.4, distinct=3.0)}]
    front.append({"0": line("c", 0, 0.5, distinct=2.5)})
    at = {x: study.on_front(front, "0", x, "distinct") for x in (0.4, 0.45, 0.55, 0.6)}
    assert at == pytest.approx({0.4: 3.0, 0.45: 2.75, 0.55: 1.75, 0.6: 1.0})
    assert study.on_front(front, "0", 0.61, "distinct") is None
    assert study.on_front(front, "0", 0.39, "distinct") is None
    assert study.on_front(front, "1", 0.5, "distinct") is None


def test_intervals_and_differences_are_paired_by_seed():
    mean, half = study.interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)  # standard deviation 1
    mine = {str(s): line("lad", s, 0.1 * s + 0.02) for s in (0, 1, 2)}
    others = {str(s): line("grpo", s, 0.1 * s) for s in (0, 1, 2, 3)}
    assert study.differences(mine, others)[0] == "+0.020 ± 0.000"
    assert study.differences(mine, mine) == ["", "", ""]


def test_tables_and_pictures_of_rows(tmp_path, monkeypatch, capsys):
    rows = []
    for label, at in (("grpo", 0.6), ("grpo kl_coef 0.1", 0.5), ("grpo kl_coef 0.3", 0.4)):
        rows += [line(label, s, at + s / 100, 0.9, 10 * (0.8 - at)) for s in range(3)]
    rows += [line("lad_anchor", s, 0.5 + s / 100, 0.95, 3.5) for s in range(3)]
    rows += [r | {"step": 0, "pass@1": 0.2} for r in rows]
    for method in ("grpo", "lad_anchor"):
        rows += sweep(method, {5e-5: 0.1, 1e-4: 0.3, 2e-4: 0.2})
    study.print_table(rows, "tiny", "main")
    study.print_against_kl(rows, "tiny")
    study.print_sweep(rows, "tiny")
    said = capsys.readouterr().out
    assert "| lad_anchor | 0.0001 | 3 | 0.510 ± 0.025 | 0.950 ± 0.000 | 3.50 ± 0.00 |" in said
    assert "-0.100 ± 0.000" in said
    # At its pass@1 the front has 3.0 less what the seed's own shift costs: 3.5 - 3.0
    assert "| lad_anchor | 3 | +0.050 ± 0.000 | +0.50 ± 0.00 |" in said
    assert "**0.300**" in said
    study.draw(rows, "tiny", tmp_path / "front.png")
    assert (tmp_path / "front.png").stat().st_size > 10_000
