"""bandit.py against closed forms and brute force: where the objectives end, and their gradient
masses."""

import itertools
import math

import pytest
import torch
from conftest import launch

import bandit
import lad

ETA, K = 0.5, 1000
SMOOTH = ["js", "hd", "kl", "rkl", "jf", "kl_c", "rkl_c"]
QUICK = ["lad js", "lad kl", "grpo", "grpo unclipped", "dr_grpo", "lad_anchor", "flowrl"]
FIXED, EVERY_K, EVERY_STEP = range(3)  # exact; + bandit.EXACT: sampled


def tv(a, b):
    return 0.5 * (a - b).abs().sum().item()


def learn(is_wanted):
    """{label: [REGIMES, ARMS]} of the rows that are wanted, after the whole 4,000 steps, pi_old
    refreshed every 1,000 in "every k": four times over."""
    torch.set_num_threads(1)
    names = ["lad", "grpo", "lad_anchor", "dr_grpo", "flowrl", "gflowrl", "oapl", "cispo"]
    rows = [row for row in bandit.make_rows(ETA, names) if is_wanted(row.label)]
    found = bandit.train(rows, 0, K, bandit.STEPS)
    return {row.label: pi for row, pi in zip(rows, found, strict=True)}


@pytest.fixture(scope="module")
def learned():
    return learn(QUICK.__contains__)


@pytest.fixture(scope="module")
def learned_slowly():
    return learn(lambda label: label not in QUICK)


def softmax_of_A(eta, landscape=bandit.OURS):
    """The target by hand: r standardised over the arms, with G - 1 in the deviation."""
    r = bandit.rewards(landscape).tolist()
    mean = sum(r) / len(r)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in r) / (len(r) - 1))
    weights = [math.exp((x - mean) / deviation / eta) for x in r]
    return torch.tensor([w / sum(weights) for w in weights], dtype=torch.float64)


def peaks(r):
    return [i for i in range(1, 49) if r[i] > r[i - 1] and r[i] > r[i + 1]]


def test_the_problem():
    r = bandit.rewards()
    assert r.shape == (50,) and 0 <= r.min() and r.max() <= 1
    assert peaks(r) == [8, 24, 40]
    torch.testing.assert_close(bandit.target(ETA), softmax_of_A(ETA), rtol=1e-4, atol=0)
    shares = bandit.mode_masses(bandit.target(ETA))
    assert shares.sum() > 0.95 and (shares > 0.15).all()  # three modes to lose


def test_the_authors_landscape():
    """Gaussians of sigma 5 and heights 4, 5, 4 at arms 10, 25 and 40, min-max normalised."""
    author = bandit.LANDSCAPES["author"]
    r = bandit.rewards(author)
    heights = []
    for arm in range(50):
        near = [(4, 10), (5, 25), (4, 40)]
        heights.append(sum(h * math.exp(-0.5 * ((arm - c) / 5) ** 2) for h, c in near))
    low, high = min(heights), max(heights)
    want = torch.tensor([(x - low) / (high - low) for x in heights], dtype=torch.float64)
    torch.testing.assert_close(r, want, rtol=1e-12, atol=1e-12)
    assert peaks(r) == [10, 25, 40] and (author.samples, author.eta) == (32, 1.0)
    goal = softmax_of_A(1.0, author)
    torch.testing.assert_close(bandit.target(1.0, author), goal, rtol=1e-4, atol=0)


@pytest.mark.slow
def test_lad_ends_at_the_authors_target_too():
    """Exact and from 32 samples a step while pi_old stays; not where it is refreshed."""
    author = bandit.LANDSCAPES["author"]
    rows = bandit.make_rows(author.eta, ["lad"], author)
    rows = [row for row in rows if row.label == "lad js"]
    learned = bandit.train(rows, 0, 100, 1500, author)[0]
    goal = softmax_of_A(author.eta, author)
    assert tv(learned[FIXED], goal) < 0.02
    assert tv(learned[FIXED + bandit.EXACT], goal) < 0.08
    assert bandit.entropy(learned[EVERY_STEP]) < bandit.entropy(goal) - 1


def generators():
    """pytest's parameters (name, the fixture that has learned it)."""
    for name in SMOOTH:
        if f"lad {name}" in QUICK:
            yield pytest.param(name, "learned", id=name)
        else:
            yield pytest.param(name, "learned_slowly", id=name, marks=pytest.mark.slow)


@pytest.mark.parametrize("name,fixture", generators())
def test_lad_with_a_fixed_behaviour_policy_ends_at_the_target(name, fixture, request):
    learned = request.getfixturevalue(fixture)
    goal = softmax_of_A(ETA)
    exact, sampled = learned[f"lad {name}"][FIXED], learned[f"lad {name}"][FIXED + bandit.EXACT]
    assert tv(exact, goal) < 0.02 and tv(sampled, goal) < 0.05
    for pi in (exact, sampled):
        assert ((bandit.mode_masses(pi) / bandit.mode_masses(goal) - 1).abs() < 0.1).all()


@pytest.mark.parametrize("name,fixture", generators())
def test_lad_compounds_when_the_behaviour_policy_is_refreshed(name, fixture, request):
    """Four refreshes, each used until converged, end at softmax(4 A/eta); a refresh at every step
    ends on one arm."""
    learned = request.getfixturevalue(fixture)
    assert tv(learned[f"lad {name}"][EVERY_K], softmax_of_A(ETA / 4)) < 0.02
    for regime in (EVERY_STEP, EVERY_STEP + bandit.EXACT):
        assert bandit.entropy(learned[f"lad {name}"][regime]) < 0.2


def test_grpo_collapses_unless_the_clip_of_a_fixed_policy_holds_it(learned):
    for regime in (FIXED, FIXED + bandit.EXACT):
        ratio = learned["grpo"][regime] * bandit.ARMS
        assert 0.7 < ratio.min() and ratio.max() < 1.4  # about the clip boundary, 0.8 to 1.28
        assert learned["grpo unclipped"][regime].max() > 0.8
    for label in ("grpo", "grpo unclipped", "dr_grpo"):
        for regime in (EVERY_STEP, EVERY_STEP + bandit.EXACT):
            assert (
                bandit.entropy(learned[label][regime]) < 0.2
                and learned[label][regime].argmax() == 8
            )
    assert tv(learned["dr_grpo"][FIXED], learned["dr_grpo"][FIXED + bandit.EXACT]) < 0.05


def test_what_is_tied_to_the_reference_keeps_the_target(learned):
    goal = softmax_of_A(ETA)
    for regime, bound in ((EVERY_STEP, 0.02), (EVERY_STEP + bandit.EXACT, 0.05)):
        assert tv(learned["lad_anchor"][regime], goal) < bound
        assert (
            bandit.verdict(learned["lad js"][regime], goal)
            == bandit.verdict(learned["grpo"][regime], goal)
            == "!"
        )
    for pi in learned["flowrl"]:
        assert tv(pi, goal) < 0.05
    assert (
        bandit.verdict(learned["lad_anchor"][EVERY_STEP], goal) == "="
        and bandit.verdict(learned["grpo"][FIXED], goal) == " "
    )


@pytest.mark.slow
def test_oapl_is_lads_fixed_point_and_compounds_too(learned_slowly):
    goal = softmax_of_A(ETA)
    assert tv(learned_slowly["oapl"][FIXED], goal) < 0.02
    assert tv(learned_slowly["oapl"][FIXED + bandit.EXACT], goal) < 0.05
    assert bandit.entropy(learned_slowly["oapl"][EVERY_STEP]) < 0.2


@pytest.mark.slow
def test_gflowrl_keeps_the_target_without_a_head(learned_slowly):
    """Where pi_old is refreshed its clipped gap is walked off step by step."""
    goal = softmax_of_A(ETA)
    assert tv(learned_slowly["gflowrl"][EVERY_STEP], goal) < 0.02
    assert bandit.verdict(learned_slowly["gflowrl"][EVERY_STEP + bandit.EXACT], goal) == "="


@pytest.mark.slow
def test_cispo_goes_on_where_grpo_stands_still(learned_slowly):
    """Its weight is cut, not its gradient: while pi_old stays it leaves GRPO's clip behind, and
    refreshed it collapses."""
    ratio = learned_slowly["cispo"][FIXED] * bandit.ARMS
    assert ratio.max() > 5 and bandit.entropy(learned_slowly["cispo"][FIXED]) > 1
    assert bandit.entropy(learned_slowly["cispo"][EVERY_STEP]) < 0.2


# Groups of 0/1 rewards


def all_groups(G):
    return torch.tensor(list(itertools.product((0.0, 1.0), repeat=G)), dtype=torch.float64)


SLOPE = {  # f' of DESIGN 3.2, of tensors
    "kl": lambda z: z.log() + 1,
    "rkl": lambda z: -1 / z,
    "jf": lambda z: z.log() + 1 - 1 / z,
    "js": lambda z: 0.5 * (2 * z / (z + 1)).log(),
    "hd": lambda z: 1 - z**-0.5,
    "tv": lambda z: (z - 1).sign(),
    "kl_c": lambda z: z.log(),
    "rkl_c": lambda z: 1 - 1 / z,
}
WEIGHT = {  # W of A, where it is not A
    "lad": lambda a, cfg: -SLOPE[cfg.divergence]((-a / cfg.eta).exp()),
    "entadv": lambda a, cfg: a + torch.minimum(torch.full_like(a, 0.4), a.abs() / 2),
    "flowrl": lambda a, cfg: 2 * a / cfg.eta,
    "gflowrl": lambda a, cfg: 2 * a.clamp(-cfg.clip_high, cfg.clip_low),
    "oapl": lambda a, cfg: 2 * cfg.oapl_beta * a,
}


@pytest.mark.parametrize("case", bandit.mass_rows(ETA), ids=lambda case: case[0])
def test_masses_against_all_groups(case):
    """E[W of the successes, per sample] over all 2^5 groups, for every objective."""
    _, row, state = case
    G, p = 5, torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
    r = all_groups(G)
    adv = lad.advantages(row.name, r, row.cfg, dict(state, drift=torch.zeros_like(r)))
    weight = WEIGHT.get(row.name, lambda a, cfg: a)(adv, row.cfg)
    chance = p[:, None] ** r.sum(-1) * (1 - p[:, None]) ** (G - r.sum(-1))
    success, failure = bandit.masses(row, state, p, G)
    torch.testing.assert_close(success, chance @ (weight * r).mean(-1), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        failure, -chance @ (weight * (1 - r)).mean(-1), rtol=1e-9, atol=1e-12
    )


def test_masses_have_a_panel_for_every_objective():
    assert (
        {row.name for _, row, _ in bandit.mass_rows(ETA)}
        == {row.name for row in bandit.make_rows(ETA)}
        == set(lad.OBJECTIVES)
    )
    assert {row.cfg.divergence for _, row, _ in bandit.mass_rows(ETA) if row.name == "lad"} == set(
        SLOPE
    )


P = torch.tensor([0.05, 0.3, 0.5, 0.9], dtype=torch.float64)
Q = 1 - P


@pytest.mark.parametrize(
    "name,G,success,failure",
    [
        ("reinforce", 8, P, 0 * P),
        ("w_reinforce", 8, 0.1 * P, Q),
        ("rloo", 8, P * Q, P * Q),
        ("dr_grpo", 8, 7 / 8 * P * Q, 7 / 8 * P * Q),
        ("asym", 8, 7 / 8 * P * Q, 7 / 8 * P * Q / 0.5),
        ("maxrl", 8, Q - Q**8, Q - Q**8),
        ("passk", 8, 4 * P * Q**3, 0 * P),  # P times d pass@4 / dp
        ("dr_grpo", 512, P * Q, P * Q),
        ("power", 512, P * Q**2, P * Q**2),
        ("power_asym", 512, P * Q**2, P * Q**2 / 0.5),
        (
            "fade",
            512,
            P * Q**3,
            P * Q**3,
        ),  # p 0.2, H = H*: alpha 3 (3 * 0.8/0.4 = 6, capped), delta 1
    ],
    ids=lambda x: str(x) if isinstance(x, (str, int)) else "",
)
def test_masses_against_closed_forms(name, G, success, failure):
    _, row, state = next(case for case in bandit.mass_rows(ETA) if case[1].name == name)
    got = torch.stack(bandit.masses(row, state, P, G))
    torch.testing.assert_close(
        got,
        torch.stack([success, failure]),
        rtol=1e-4 if G == 8 else 0.03,
        atol=1e-4 if G == 8 else 2e-3,
    )


@pytest.mark.parametrize("name", ["power_asym", "passk"])
def test_exact_expectation_over_rewards_against_all_groups(name):
    """Of the clipped loss over the arm, its reward and the other seven, one group at a time."""
    torch.manual_seed(0)
    row, r, G = bandit.make_rows(ETA, [name])[0], bandit.rewards(), bandit.GROUP
    old, logp = (
        torch.randn(1, len(bandit.REGIMES), bandit.ARMS, dtype=torch.float64)
        .mul(0.3)
        .log_softmax(-1)
        for _ in range(2)
    )
    pi, none = old.exp(), torch.zeros(1, len(bandit.REGIMES), 1, dtype=torch.float64)
    table = bandit.outcomes(lad.advantages(name, bandit.every_group(G), row.cfg, {})).expand(
        1, bandit.EXACT, 2, G
    )
    arms = torch.zeros(
        1, len(bandit.REGIMES) - bandit.EXACT, bandit.OURS.samples, dtype=torch.int64
    )  # sampled runs: A = 0, so no loss
    batch = bandit.Batch(old, pi, arms, None, none, none, pi @ r)
    got = bandit.loss_of_rewards(
        row, logp, batch, table, torch.zeros(arms.shape, dtype=torch.float64), r
    )
    groups = all_groups(G)
    adv = lad.advantages(name, groups, row.cfg, {})[:, 0]
    want = 0.0
    for j in range(bandit.EXACT):
        p = (pi[0, j] @ r).item()
        others = (groups[:, 1:] * p + (1 - groups[:, 1:]) * (1 - p)).prod(-1)
        for a in range(bandit.ARMS):
            rho = math.exp(logp[0, j, a] - old[0, j, a])
            clipped = min(max(rho, 0.8), 1.28)
            own = groups[:, 0] * r[a] + (1 - groups[:, 0]) * (1 - r[a])
            want += (pi[0, j, a] * own * others * -torch.minimum(rho * adv, clipped * adv)).sum()
    torch.testing.assert_close(got, want, rtol=1e-9, atol=0)


def test_a_state_for_each_run():
    """FADE held at alpha = delta = 1 is dr_grpo, in all regimes, though its advantages are formed
    run by run."""
    import dataclasses

    fade, plain = bandit.make_rows(ETA, ["fade"])[0], bandit.make_rows(ETA, ["dr_grpo"])[0]
    fade = fade._replace(cfg=dataclasses.replace(fade.cfg, fade_alpha_max=1.0, fade_delta_min=1.0))
    assert fade.stateful and not plain.stateful
    torch.testing.assert_close(
        bandit.train([fade], 3, 5, 30), bandit.train([plain], 3, 5, 30), rtol=1e-6, atol=1e-9
    )  # 1e-8: its clamp of 1 - rbar


# Command line

MINE = """
import lad, torch
def mean_only(r, cfg, state):
    return r - r.mean(-1, keepdim=True)
flow = lad.OBJECTIVES["flowrl"]
def infinite(r, cfg, state):
    return r / r.mean(-1, keepdim=True)
def number(r, cfg, state):
    return 1.0
def raises(r, cfg, state):
    return state["missing"]
constant = 3
"""


def test_check_prints_what_the_built_in_twin_does(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bandit, "STEPS", 40)
    monkeypatch.setattr(lad, "OBJECTIVES", dict(lad.OBJECTIVES))
    (tmp_path / "mine.py").write_text(MINE)
    tables = {}
    for name, twin in (("mean_only", "dr_grpo"), ("flow", "flowrl")):
        bandit.main(
            ["--check", f"{tmp_path}/mine.py:{name}", "--out", str(tmp_path), "--seed", "1"]
        )
        tables[name] = capsys.readouterr().out
        rows = bandit.make_rows(ETA, [twin])
        bandit.show_bandit(
            [rows[0]._replace(label=name)],
            bandit.train(rows, 1, bandit.REFRESH, 40),
            ETA,
            bandit.REFRESH,
        )
        bandit.show_masses(
            [
                (title.replace(twin, name), row, state)
                for title, row, state in bandit.mass_rows(ETA, [twin])
            ],
            ETA,
        )
        lines = capsys.readouterr().out.splitlines()
        assert lines and set(lines[:-1]) <= set(tables[name].splitlines())
        assert lines[-1].split()[1:] in [
            line.split()[-15:] for line in tables[name].splitlines()
        ]  # the masses
    assert (
        (tmp_path / "check-bandit.png").stat().st_size
        > 5000
        < (tmp_path / "check-masses.png").stat().st_size
    )


@pytest.mark.parametrize(
    "argv,says",
    [
        (["--check", "mine.py"], "expected FILE.py:NAME"),
        (["--check", "none.py:f"], "no file none.py"),
        (["--check", "mine.py:mean_onyl"], "did you mean 'mean_only'"),
        (["--check", "mine.py:infinite"], "finite"),
        (["--check", "mine.py:number"], "like the rewards"),
        (["--check", "mine.py:raises"], "KeyError: 'missing'"),
        (["--check", "mine.py:constant"], "not callable"),
        (["--check", "broken.py:f"], "SyntaxError"),
        (["--eta", "0"], "--eta 0"),
        (["--refresh", "0"], "--refresh 0"),
        (["--landscape", "moon"], "author"),
        (["--masses", "--landscape", "author"], "leave one out"),
        (["--objectives", "grpo,lda"], "did you mean 'lad'"),
        (["--objectives", "grpo", "--check", "mine.py:flow"], "leave --objectives out"),
        (["--eta", "x"], "--help"),
        (["--nope"], "--nope"),
        (["--out", "mine.py/x"], "mine.py"),
    ],
)
def test_bad_input_gets_one_line(argv, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lad, "OBJECTIVES", dict(lad.OBJECTIVES))
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "broken.py").write_text("def f(:\n")
    with pytest.raises(SystemExit) as left:
        bandit.main(argv)
    out = capsys.readouterr()
    assert (
        left.value.code == 2
        and out.out == ""
        and out.err.count("\n") == 1
        and ": error: " in out.err
        and says in out.err
    )


def test_both_pictures_and_tables_hold_every_objective(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bandit, "STEPS", 2)
    for argv, lines in ([], 2), (["--masses"], 1):
        bandit.main([*argv, "--out", str(tmp_path)])
        words = [
            line.split()[0].rstrip(",")
            for line in capsys.readouterr().out.splitlines()
            if line.strip()
        ]
        for name in set(lad.OBJECTIVES) - {"lad", "grpo", "fade"}:
            assert words.count(name) == lines, name
        assert [words.count(name) for name in ("lad", "grpo", "fade")] == (
            [8, 1, 2] if argv else [16, 4, 2]
        )
    assert {p.name for p in tmp_path.iterdir()} == {"bandit.png", "masses.png"}


def test_some_objectives_of_all(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bandit, "STEPS", 2)
    for landscape, samples in (("ours", 64), ("author", 32)):
        argv = ["--objectives", "fade,oapl", "--landscape", landscape, "--out", str(tmp_path)]
        bandit.main(argv)
        printed = capsys.readouterr().out
        found = [line.split()[0] for line in printed.splitlines() if line.strip()]
        assert found.count("oapl") == 2 and found.count("fade") == 2 and "grpo" not in found
        assert f"{samples} samples" in printed
    assert {p.name for p in tmp_path.iterdir()} == {"bandit.png", "bandit-author.png"}


@pytest.mark.slow
def test_needs_neither_vllm_nor_a_gpu(tmp_path):
    code = (
        f"import sys, bandit; bandit.main(['--masses', '--out', {str(tmp_path)!r}]); "
        "print(sorted({'vllm', 'transformers'} & set(sys.modules)))"
    )
    assert launch(["-c", code], env={"CUDA_VISIBLE_DEVICES": ""}).stdout.splitlines()[-1] == "[]"
