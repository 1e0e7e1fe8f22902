"""Rules of what is trained on and how it is weighed that the crossing (test_crossing.py) does not
reach: solved groups under a penalty for length, lone samples, masks, batches that say nothing."""

import math

import pytest
import torch
from test_crossing import CPU, STATE, Table, configure, expected_gradient

import lad


def sample(tokens, correct=0.0, **more):
    """A verified sample with log-probs under pi_old and the reference."""
    s = dict(prompt=[7], tokens=list(tokens), correct=correct, reward=correct, truncated=False)
    s |= dict(lost=False, failed="", reason="", behaviour=[-1.0] * len(tokens))
    s["old"] = torch.full((len(tokens),), -1.0, dtype=torch.float64)
    s["ref"] = torch.full((len(tokens),), -1.5, dtype=torch.float64)
    return s | more


# ==== Difficulty ================================================================================


@pytest.mark.parametrize("name", ["power", "power_asym", "fade"])
def test_a_solved_prompt_teaches_nothing_whatever_its_penalties(name):
    """(1 - 1)^(alpha - 1) is 0 for alpha > 1: rewards that differ by length alone move nothing."""
    r = torch.tensor([[1.0, 1.0, 0.5, 1.0]], dtype=torch.float64)
    known = dict(STATE, correct=torch.ones(1, 4, dtype=torch.float64))
    assert lad.advantages(name, r, configure(name, alpha=2.5), known).abs().max() == 0


def test_without_a_focus_penalties_of_a_solved_prompt_count():
    r = torch.tensor([[1.0, 1.0, 0.5, 1.0]], dtype=torch.float64)
    known = dict(STATE, correct=torch.ones(1, 4, dtype=torch.float64))
    for name, alpha in (("power", 1.0), ("power", 0.5), ("asym", 1.0)):
        adv = lad.advantages(name, r, configure(name, alpha=alpha, delta=0.5), known)
        worst = -0.375 / (0.5 if name == "asym" else 1.0)
        assert adv[0].tolist() == pytest.approx([0.125, 0.125, worst, 0.125]), (name, alpha)


# ==== kl and rkl where samples are chosen by what they are ======================================


@pytest.mark.parametrize("divergence", ["kl", "rkl", "js"])
@pytest.mark.parametrize("ratio, aggregation", [("token", "constant"), ("sequence", "sequence")])
def test_nothing_to_learn_moves_nothing_where_truncated_ones_are_left_out(
    ratio, aggregation, divergence
):
    """A = 0 at pi = pi_old. With f'(1) (z - 1) in it the gradient would be 0.04 to 0.16."""
    more = dict(overlong="mask", prompts=1, group=2, kl_coef=0.0, tis_cap=0.0, micro_tokens=10**6)
    cfg = configure("lad", ratio=ratio, aggregation=aggregation, divergence=divergence, **more)
    got = expected_gradient(cfg, lambda samples: [s.update(adv=0.0) for s in samples])
    assert got.norm() < 1e-6


def test_generators_are_the_named_ones_where_nothing_is_chosen():
    for divergence in lad.KNOBS["divergence"].metadata["choices"]:
        for changes in (
            dict(ratio="token", aggregation="token"),
            dict(ratio="token", aggregation="constant"),
            dict(ratio="sequence", aggregation="sequence"),
        ):
            assert lad.generator(configure("lad", divergence=divergence, **changes)) == divergence
        centred = divergence + "_c" if divergence in ("kl", "rkl") else divergence
        for ratio in ("token", "mean"):
            by_length = dict(ratio=ratio, aggregation="sequence")
            assert lad.generator(configure("lad", divergence=divergence, **by_length)) == centred


# ==== Who is trained on =========================================================================


@pytest.mark.parametrize("name", lad.OBJECTIVES)
def test_a_lone_scorable_sample_is_not_trained_on(name):
    """A group of which one sample could be scored has no mean to be compared with."""
    cfg = configure(name)
    group = [sample([1, 2], 1.0)] + [sample([1, 2], failed="timeout: worker") for _ in range(3)]
    lad.set_advantages([group], cfg, dict(STATE))
    assert not any(lad.is_trained_on(s, cfg) for s in group)
    assert lad.gradient_mass([group], cfg, 4) == {"mass_success": 0.0, "mass_failure": 0.0}


@pytest.mark.parametrize("name", lad.OBJECTIVES)
def test_a_sample_without_trained_tokens_is_as_if_it_were_not_there(name):
    """Masked whole, it is in no denominator; its verdict still counts in its group."""
    ratio = (lad.OBJECTIVES[name].ratios or ("token",))[0]
    cfg = configure(name, aggregation="sequence", ratio=ratio, micro_tokens=10**6)
    gradients = []
    for last in (dict(mask=[0, 0]), dict(lost=True)):  # lost: the other way not to be trained on
        group = [sample([1, 0], 1.0), sample([0]), sample([2, 2], **last)]
        lad.set_advantages([group], cfg, dict(STATE, p=0.3))
        model = Table(3, log_z="log_z" in lad.OBJECTIVES[name].needs)
        if last.get("lost"):
            group[2]["adv"] = group[2]["adv"] or 0.0
        lad.accumulate_gradient(model, [s for s in group if lad.is_trained_on(s, cfg)], cfg, CPU)
        gradients.append((model.logits.grad, [s["adv"] for s in group[:2]]))
    if name in ("lad_anchor", "gflowrl"):
        return  # the drift of the two is not the same, see below
    torch.testing.assert_close(gradients[0][0], gradients[1][0])


@pytest.mark.parametrize("name", ["lad_anchor", "gflowrl"])
def test_drift_is_of_trained_tokens(name):
    """Where a masked token's log-probs are, moves no advantage."""
    cfg = configure(name)
    seen = []
    for old in (-1.0, 49.0):
        group = [sample([1, 0], 1.0), sample([2, 1], 0.0, mask=[1, 0]), sample([0])]
        group[1]["old"][1] = old
        lad.set_advantages([group], cfg, dict(STATE))
        seen.append([s["adv"] for s in group])
    assert seen[0] == seen[1]


# ==== What a batch says =========================================================================


def test_entropy_is_of_trained_tokens_of_whole_samples():
    """Tool output, masked and with log-prob 0, is none of the policy's surprise; nor is a lost
    sample."""
    group = [
        sample([1, 2, 3, 4], behaviour=[-1.0, 0.0, 0.0, -2.0], mask=[1, 0, 0, 1]),
        sample([1, 2], behaviour=[0.0, 0.0], lost=True),
        sample([5], behaviour=[-3.0]),
    ]
    assert lad.batch_statistics([group])["entropy_old"] == pytest.approx((1 + 2 + 3) / 3)


def test_a_batch_of_which_nothing_is_known_leaves_the_schedule_alone():
    cfg = configure("fade", fade_rate=0.5)
    unscorable = [sample([1, 2], failed="timeout: worker") for _ in range(4)]
    lost = [sample([1, 2], 1.0, lost=True) for _ in range(4)]

    state = dict(p=0.8, H=1.0) | {"H*": 0.5}
    known = lad.batch_statistics([unscorable])
    lad.update_state(state, known["solve_rate"], known["entropy_old"], cfg)
    assert state["p"] == 0.8 and state["H"] == 1.0  # their tokens say the entropy, 1 nat

    fresh = lad.new_state()
    known = lad.batch_statistics([lost])
    lad.update_state(fresh, known["solve_rate"], known["entropy_old"], cfg)
    assert fresh["H"] is None and fresh["H*"] is None and fresh["p"] == 0.75
    assert lad.fade_schedule(fresh, cfg)[1] == 1.0


# ==== dual_clip =================================================================================


def test_dual_clip_caps_failures_and_counts_what_it_cuts():
    cfg = configure("grpo", dual_clip=3.0)
    log_ratio = torch.tensor([2.0, 1.0, 2.0, -2.0], dtype=torch.float64, requires_grad=True)
    adv = torch.tensor([-1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    loss, clipped = lad.ppo_clip(log_ratio, adv, cfg, {})
    gradient = torch.autograd.grad(loss.sum(), log_ratio)[0]
    assert loss.tolist() == pytest.approx([3.0, math.e, -1.28, 0.8])
    assert clipped.tolist() == [True, False, True, True]
    assert (gradient == 0).tolist() == clipped.tolist()


@pytest.mark.parametrize("value", ["0.3", "1"])
def test_dual_clip_of_one_or_less_is_refused(value, capsys):
    with pytest.raises(SystemExit) as leaving:
        lad.load_config(["--dual_clip", value])
    said = capsys.readouterr().err
    assert leaving.value.code == 2 and "dual_clip" in said and said.count("\n") == 1


# ==== Settings that bring others, and groups shared out =========================================


def test_a_ratio_of_sequences_brings_its_aggregation(capsys):
    assert lad.load_config(["--ratio", "sequence"]).aggregation == "sequence"
    dr_grpo = ["--objective", "dr_grpo"]
    assert lad.load_config([*dr_grpo, "--ratio", "sequence"]).aggregation == "sequence"
    assert lad.load_config(dr_grpo).aggregation == "constant"
    assert lad.load_config(["--objective", "flowrl"]).aggregation == "sequence"
    for flags in (["--ratio", "sequence"], ["--objective", "flowrl"]):
        with pytest.raises(SystemExit) as leaving:
            lad.load_config([*flags, "--aggregation", "token"])
        said = capsys.readouterr().err
        assert leaving.value.code == 2 and "aggregation" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "counts, wanted", [([5, 5], 8), ([0, 9, 3], 8), ([2, 0, 1], 8), ([7], 4), ([1, 1, 1, 9], 6)]
)
def test_groups_are_kept_evenly_over_the_ranks(counts, wanted, monkeypatch):
    monkeypatch.setattr(lad, "world", lambda: len(counts))
    monkeypatch.setattr(lad, "all_reduce", lambda mine: list(counts))
    kept = []
    for number, mine in enumerate(counts):
        monkeypatch.setattr(lad, "rank", lambda number=number: number)
        kept.append(lad.even_share(mine, wanted))
    assert sum(kept) == min(wanted, sum(counts))
    for k, mine in zip(kept, counts, strict=True):
        assert k <= mine and (k == mine or k >= max(kept) - 1)  # less than others only if out
