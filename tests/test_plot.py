"""Pictures of runs: any name, any log, from anywhere."""

import json

import pytest
from conftest import ROOT, launch
from matplotlib.figure import Figure

from harness import plot


def step(n, **more):
    metrics = dict(reward=0.5, solve_rate=0.5, entropy=0.1 * n, loss=0.0, fade_alpha=1.0)
    return json.dumps(dict(metrics, step=n, objective="fade", **more))


def evaluation(n):
    scores = {"eval/pass@1": 0.2, "eval/pass@8": 0.7, "eval/distinct": 1.5}
    return json.dumps(dict(scores, step=n, objective="fade"))


def make_run(folder, lines):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, drawn in full."""
    figures = []
    savefig = Figure.savefig

    def save(figure, *args, **kwargs):
        savefig(figure, *args, **kwargs)
        figures.append(figure)

    monkeypatch.setattr(Figure, "savefig", save)
    return figures


def legend(ax):
    return [text.get_text().strip() for text in ax.get_legend().get_texts()]


def test_any_name_can_be_drawn(tmp_path, drawn):
    """Between two $ matplotlib reads mathematics; what begins with _ it leaves out of a legend."""
    names = ["cost_$5_and_$6", "_mine", r"a\b$"]
    runs = [make_run(tmp_path / name, [step(1), step(2)]) for name in names]
    plot.draw(runs, tmp_path / "a.png")
    want = [name.replace("$", r"\$") + ": entropy" for name in names]
    assert legend(drawn[0].axes[1]) == want
    for text in drawn[0].axes[1].get_legend().get_texts():
        assert not text._preprocess_math(text.get_text())[1]  # shown as it is


def test_a_panel_holds_all_runs(tmp_path, drawn):
    """Its range is not the first run's."""
    low = make_run(tmp_path / "low", [step(1), step(2)])
    high = make_run(tmp_path / "high", [step(10), step(20)])
    plot.draw([low, high], tmp_path / "a.png")
    assert drawn[0].axes[1].get_ylim()[1] >= 2.0
    assert drawn[0].axes[2].get_ylim() == (0, 1)


def test_a_panel_without_its_metrics_says_so(tmp_path, drawn):
    """rank_one and head_change are logged where somebody asks for them."""
    plain = make_run(tmp_path / "plain", [step(1), step(2)])
    tracked = make_run(tmp_path / "tracked", [step(1, rank_one=0.3, head_change=0.2), step(2)])
    plot.draw([plain], tmp_path / "a.png")
    plot.draw([tracked], tmp_path / "b.png")
    assert [text.get_text() for text in drawn[0].axes[5].texts] == ["not in the log"]
    assert not drawn[1].axes[5].texts
    assert legend(drawn[1].axes[5]) == ["rank-one share of the head's", "the head's share of all"]


def test_lines_that_are_no_json_are_left_out(tmp_path):
    lines = [evaluation(0), step(1), "", step(2)[:30], step(3) + step(4), step(5), step(6)[:9]]
    train, evals = plot.read(make_run(tmp_path / "torn", lines))
    assert [x["step"] for x in train] == [1, 5]
    assert [x["step"] for x in evals] == [0]


def test_a_run_without_a_step_draws_nothing_and_says_so(tmp_path, capsys):
    empty = make_run(tmp_path / "empty", [])
    plot.main([str(empty)])
    assert "nothing to draw" in capsys.readouterr().out
    plot.report(empty)
    assert "nothing to draw" in capsys.readouterr().out
    assert not (empty / "plot.png").exists()

    # Beside one that has something it is left out
    other = make_run(tmp_path / "other", [step(1)])
    plot.main([str(empty), str(other), "--out", str(tmp_path / "a.png")])
    assert (tmp_path / "a.png").exists()


def test_report_is_of_the_first_and_the_last_evaluation(tmp_path, capsys):
    run = make_run(tmp_path / "run", [evaluation(0), step(1), evaluation(1), evaluation(2)])
    plot.report(run)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-4] == "| objective | step | pass@1 | pass@8 | distinct |"
    assert lines[-2:] == [f"| fade | {n} | 0.200 | 0.700 | 1.500 |" for n in (0, 2)]
    assert (run / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_from_anywhere(tmp_path, monkeypatch):
    make_run(tmp_path / "run", [step(1)])
    monkeypatch.setattr("conftest.ROOT", tmp_path)  # where launch() works
    said = launch(["-I", ROOT / "harness/plot.py", "run"]).stdout
    assert said == "run/plot.png\n" and (tmp_path / "run/plot.png").exists()


@pytest.mark.parametrize(
    "argv,says",
    [(["nope"], "nope: no such folder"), ([], "RUN"), (["run", "--out", "a.foo"], "'foo'")],
)
def test_bad_input_is_one_line(argv, says, tmp_path, monkeypatch, capsys):
    make_run(tmp_path / "run", [step(1)])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as leaving:
        plot.main(argv)
    said = capsys.readouterr()
    assert leaving.value.code == 2 and said.out == ""
    assert said.err.count("\n") == 1 and ": error: " in said.err and says in said.err
