"""
Every objective under every combination of the knobs that decide what is trained on and how it is
weighed, and what is true in expectation.

    python tests/test_crossing.py    # a table: combinations tried, largest error of a gradient

The policy is a table: three words (0 ends a response), at most two of them, so seven responses; its
logits, one row for each beginning, are float64. What is tested is the real path of lad.py from
verified samples to a gradient (set_advantages, is_trained_on, accumulate_gradient with its packing,
denominators and losses); what it is tested against is written plainly from the definitions, one
sample at a time.
"""

import dataclasses
import itertools
import math
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also where this is a program

import pytest
import torch
from test_objectives import SHARE, plain_advantages, plain_loss

import lad

CPU = torch.device("cpu")
STARTS = [(), (1,), (2,)]  # beginnings of a response, a row of the table each
RESPONSES = [(0,), (1, 0), (2, 0), (1, 1), (1, 2), (2, 1), (2, 2)]  # the last four are cut
RIGHT = {(1, 0): 1.0, (2, 1): 1.0, (2, 0): 0.0}  # the others are wrong too
TOLERANCE = 1e-6  # advantages and weights go to the device in fp32


class Table(torch.nn.Module):
    """The policy, called as lad.py's models are: packed rows in, (logp, entropy, log_z) of the
    response tokens out."""

    def __init__(self, seed, log_z=False):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.logits = torch.nn.Parameter(
            torch.randn(len(STARTS), 3, generator=generator, dtype=torch.float64)
        )
        self.z = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64)) if log_z else None

    def of(self, tokens):
        """(log-probs, entropies) [T] of the tokens of a response."""
        starts = [STARTS.index(tuple(tokens[:t])) for t in range(len(tokens))]
        rows = self.logits[starts].log_softmax(-1)  # [T,3]
        logp = rows.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        return logp, -(rows.exp() * rows).sum(-1)

    def forward(self, batch, temperature, chunk, gradient=None):
        responses = batch["targets"].split(batch["lengths"])
        parts = [self.of(tokens.tolist()) for tokens in responses if len(tokens)]
        logp = torch.cat([logp for logp, _ in parts])  # [R]
        entropy = torch.cat([entropy for _, entropy in parts])
        log_z = None if self.z is None else self.z.expand(len(logp))
        return logp, entropy, log_z


def configure(name, **changes):
    """Config of a batch of four groups of four of at most two tokens: an objective's defaults, what
    its few tokens need, and changes."""
    small = dict(
        objective=name,
        max_tokens=2,
        overlong_buffer=2,
        prompts=4,
        group=4,
        pass_k=2,
        micro_tokens=7,
        kl_coef=0.1,
        alpha=2.5,
    )
    one_step = dict(minibatches=1, epochs=1)
    defaults = lad.OBJECTIVES[name].defaults | small | one_step | SHARE.get(name, {})
    return dataclasses.replace(lad.Config(), **defaults | changes)


# ==== 1. Every combination, against the definitions =============================================

STATE = {"p": 0.4, "H": 0.6, "H*": 1.0}
ANSWERS = [  # of four groups: mixed, all right, all wrong, mixed
    [(1, 0), (2, 1), (0,), (2, 2)],
    [(1, 0), (2, 1), (1, 0), (2, 1)],
    [(0,), (2, 0), (1, 1), (2, 2)],
    [(1, 2), (2, 1), (0,), (1, 1)],
]
FAULTS = ("none", "unscorable", "lost", "empty", "masked tokens", "all of them")
PLACES = {  # (group, sample) that has the fault
    (0, 1): "unscorable",
    (3, 2): "unscorable",
    (2, 0): "unscorable",
    (0, 3): "lost",
    (1, 0): "lost",
    (3, 1): "empty",
    (2, 2): "empty",
    (0, 0): "masked tokens",
}


def make_sample(tokens, **more):
    """A response after the verifier saw it."""
    return dict(
        tokens=list(tokens),
        correct=RIGHT.get(tokens, 0.0),
        truncated=tokens[-1] != 0,
        lost=False,
        failed="",
        **more,
    )


def damage(s, fault):
    if fault == "unscorable":
        s.update(failed="timeout: worker replaced", correct=0.0)
    if fault == "lost":
        s.update(lost=True, behaviour=[0.0] * len(s["tokens"]))
    if fault == "empty":
        s.update(tokens=[], behaviour=[], old=s["old"][:0], ref=s["ref"][:0], truncated=False)
    if fault == "masked tokens":
        s["mask"] = [0] * (len(s["tokens"]) - 1) + [1]


def make_groups(cfg, fault):
    """The groups of ANSWERS, verified, and with log-probs under four policies."""
    old, ref = Table(1), Table(2)
    groups = []
    for number, texts in enumerate(ANSWERS):
        group = []
        for place, tokens in enumerate(texts):
            s = make_sample(tokens, prompt=[7, number])
            with torch.no_grad():
                s["old"] = old.of(tokens)[0]
                s["ref"] = ref.of(tokens)[0]
            s["behaviour"] = []
            for t, x in enumerate(s["old"].tolist()):
                # tokens of equal covariance are alike in everything
                noise = random.Random(str(tokens[: t + 1])).gauss(0, 0.1)
                s["behaviour"].append(x + noise)
            here = PLACES.get((number, place))
            if fault in (here, "all of them"):
                damage(s, here)
            s["reward"] = lad.shaped_reward(s, cfg)
            group.append(s)
        groups.append(group)
    return groups


def make_model(cfg):
    return Table(3, log_z="log_z" in lad.OBJECTIVES[cfg.objective].needs)


def gradient_in(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def real(cfg, groups):
    """The gradient that lad.py accumulates."""
    if cfg.zero_variance == "drop":
        groups = [group for group in groups if lad.has_signal(group)]
    lad.set_advantages(groups, cfg, STATE)
    model = make_model(cfg)
    samples = [s for group in groups for s in group if lad.is_trained_on(s, cfg)]
    lad.accumulate_gradient(model, samples, cfg, CPU)
    return gradient_in(model)


def plain_trained(cfg, groups):
    """[(sample, its advantage)] of what the definitions train on."""
    alpha = min(max(1.5 * 0.6 / 0.4, 1), 3)  # FADE's, in STATE
    delta = 1 + 0.6 - 1.0
    trained = []
    for group in groups:
        known = [s for s in group if not s["failed"]]
        correct = [s["correct"] for s in known]
        if cfg.zero_variance == "drop" and len(set(correct)) < 2:
            continue
        if len(known) < 2:
            continue
        rewards = list(correct)
        if cfg.overlong == "shape":  # the buffer is all of the two tokens
            rewards = [s["correct"] - 0.5 * len(s["tokens"]) / 2 for s in known]
        drift = [plain_drift(s) for s in known]
        advantages = plain_advantages(cfg.objective, rewards, cfg, alpha, delta, drift, correct)
        for s, a in zip(known, advantages, strict=True):
            is_cut = s["truncated"] and cfg.overlong == "mask"
            if s["tokens"] and not s["lost"] and not is_cut:
                trained.append((s, a))
    return trained


def pad(rows):
    """[B,2] of a list of tensors of one or two elements."""
    return torch.stack([torch.cat([x, x.new_zeros(2 - len(x))]) for x in rows])


def plain_weights(cfg, mask):
    """What a token of each sequence weighs in the loss [B,1]."""
    if cfg.aggregation == "token":
        return torch.ones(len(mask), 1) / mask.sum()
    if cfg.aggregation == "sequence":
        return 1 / (mask.sum(-1, keepdim=True) * len(mask))
    return torch.ones(len(mask), 1) / (cfg.max_tokens * cfg.prompts * cfg.group)


def plain_tis(mismatch, mask, cfg):
    """The weight of each token [B,2] for log pi_old - log pi_vLLM."""
    if cfg.tis_cap == 0:
        return torch.ones_like(mismatch)
    ratio = mismatch.exp()
    if cfg.tis_mode in ("sequence_truncate", "sequence_mask"):
        ratio = (ratio**mask).prod(-1, keepdim=True).expand_as(mismatch)
    if cfg.tis_mode in ("token_truncate", "sequence_truncate"):
        return ratio.clamp(max=cfg.tis_cap)
    kept = (ratio >= cfg.tis_floor) & (ratio <= cfg.tis_cap)
    return ratio * kept


def plain_drift(s):
    """log pi_old - log pi_ref of a response, without its masked tokens."""
    gaps = (s["old"] - s["ref"]).tolist()
    mask = s.get("mask", [1] * len(gaps))
    return sum(gap for gap, m in zip(gaps, mask, strict=True) if m)


def plain(cfg, groups):
    """The gradient of the loss written plainly, from the definitions."""
    model = make_model(cfg)
    trained = plain_trained(cfg, groups)
    if not trained:
        return torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.float64)

    samples = [s for s, _ in trained]
    adv = [a for _, a in trained]
    mask = pad([torch.tensor(s.get("mask", [1] * len(s["tokens"]))) for s in samples])  # [B,2]
    logp = pad([model.of(s["tokens"])[0] for s in samples])
    entropy = pad([model.of(s["tokens"])[1] for s in samples]).detach()
    old = pad([s["old"] for s in samples])
    ref = pad([s["ref"] for s in samples])
    behaviour = pad([torch.tensor(s["behaviour"], dtype=torch.float64) for s in samples])
    log_z = None if model.z is None else model.z.expand(len(samples), 2)

    loss = plain_loss(cfg.objective, logp, old, adv, mask, cfg, entropy, ref, log_z)
    tis = plain_tis(old - behaviour, mask, cfg)
    kl = (ref - logp).exp() - 1 - (ref - logp)
    ((loss * tis + cfg.kl_coef * kl) * mask * plain_weights(cfg, mask)).sum().backward()
    return gradient_in(model)


def combinations(name):
    """(changes to the configuration, fault of the data), all that mean something."""
    objective = lad.OBJECTIVES[name]
    ratios = [  # and aggregations
        ("token", "token"),
        ("token", "sequence"),
        ("token", "constant"),
        ("sequence", "sequence"),
        ("mean", "sequence"),
    ]
    if objective.of_sequences:
        ratios = [("token", "sequence"), ("sequence", "sequence")]
    if objective.ratios:
        ratios = [pair for pair in ratios if pair[0] in objective.ratios]
    divergences = ("js",)
    if name == "lad":
        divergences = lad.KNOBS["divergence"].metadata["choices"]
    dual_clips = (0.0,)
    if name in ("grpo", "fade", "entadv", "clip_cov"):  # PPO's
        dual_clips = (0.0, 1.5)
    zero_variances = ("keep", "drop")
    overlongs = ("keep", "mask", "shape")
    choices = (ratios, zero_variances, overlongs, FAULTS, divergences, dual_clips)
    for ratio, zero, overlong, fault, divergence, dual in itertools.product(*choices):
        changes = dict(
            ratio=ratio[0],
            aggregation=ratio[1],
            zero_variance=zero,
            overlong=overlong,
            divergence=divergence,
            dual_clip=dual,
        )
        yield changes, fault


def compare(name, crossed):
    """(how many combinations, how many of them have a gradient, the largest relative error).
    crossed: [(changes to the configuration, fault of the data)]."""
    micro_tokens = 7
    if name in ("clip_cov", "kl_cov"):  # covariances look at a micro-batch
        micro_tokens = 10**6
    tried = moved = 0
    worst = 0.0
    for changes, fault in crossed:
        cfg = configure(name, micro_tokens=micro_tokens, **changes)
        torch.manual_seed(0)
        want = plain(cfg, make_groups(cfg, fault))
        got = real(cfg, make_groups(cfg, fault))
        error = ((got - want).norm() / want.norm().clamp_min(1e-3)).item()
        assert error < TOLERANCE, (name, changes, fault, error)
        tried += 1
        moved += bool(want.norm() > 1e-6)
        worst = max(worst, error)
    return tried, moved, worst


@pytest.mark.parametrize("name", lad.OBJECTIVES)
def test_combinations_are_what_the_definitions_say(name):
    """With no fault of the data, and with all of them."""
    crossed = [one for one in combinations(name) if one[1] in ("none", "all of them")]
    tried, moved, _ = compare(name, crossed)
    assert tried >= 12 and moved > 0.9 * tried


@pytest.mark.slow
@pytest.mark.parametrize("name", lad.OBJECTIVES)
def test_every_combination_is_what_the_definitions_say(name):
    tried, moved, _ = compare(name, combinations(name))
    assert tried >= 36 and moved > 0.9 * tried


def weights_of_the_mismatch(name):
    """[(changes, fault)]: each way to weigh what lies between vLLM and the trainer, with its bounds
    where some of the samples here are cut and others not, and with two faults of the data."""
    ratio = lad.OBJECTIVES[name].ratios[:1] or ("token",)
    same = dict(ratio=ratio[0], aggregation="sequence")
    for mode in lad.KNOBS["tis_mode"].metadata["choices"]:
        floors = (0.0, 0.95) if mode.endswith("mask") else (0.0,)
        for floor, fault in itertools.product(floors, ("masked tokens", "all of them")):
            yield dict(same, tis_mode=mode, tis_cap=1.05, tis_floor=floor), fault
    yield dict(same, tis_mode="sequence_mask", tis_cap=0.0), "none"


@pytest.mark.parametrize("name", ["grpo", "lad", "gspo", "oapl"])
def test_weights_of_the_rollouts_mismatch(name):
    """tis_mode: TIS, IcePop and MIS."""
    tried, moved, _ = compare(name, weights_of_the_mismatch(name))
    assert tried == moved == 13


# ==== 2. In expectation =========================================================================


def expected_gradient(cfg, prepare, old=None, G=2):
    """Of one update, over every group of G responses of the policy `old` (the policy itself: None),
    each with its probability. prepare(samples) sets advantages."""
    model = Table(4)
    behaviour = old or model
    with torch.no_grad():
        logp = {y: behaviour.of(y)[0] for y in RESPONSES}
    total = torch.zeros_like(model.logits)
    for group in itertools.product(RESPONSES, repeat=G):
        samples = []
        for y in group:
            s = make_sample(y, prompt=[7], behaviour=logp[y].tolist())
            s["reward"] = s["correct"]
            if old is not None:
                s["old"] = logp[y]
            samples.append(s)
        prepare(samples)
        model.zero_grad()
        samples = [s for s in samples if lad.is_trained_on(s, cfg)]
        lad.accumulate_gradient(model, samples, cfg, CPU)
        probability = math.exp(sum(logp[y].sum().item() for y in group))
        total += probability * model.logits.grad
    return total


def gradient_of_mean_reward():
    """Of -sum_y pi(y) r(y)."""
    model = Table(4)
    mean = sum(model.of(y)[0].sum().exp() * RIGHT.get(y, 0.0) for y in RESPONSES)
    (-mean).backward()
    return model.logits.grad


def plainly(name, **changes):
    """Without what would disturb an expectation."""
    few = dict(prompts=1, group=2, micro_tokens=10**6)
    return configure(name, kl_coef=0.0, tis_cap=0.0, **few, **changes)


@pytest.mark.parametrize(
    "ratio, aggregation, scale", [("token", "constant", 1 / 2), ("sequence", "sequence", 1.0)]
)
def test_policy_gradients_are_unbiased(ratio, aggregation, scale):
    """reinforce and rloo have the gradient of the mean reward, dr_grpo (G - 1)/G of it: where each
    sequence counts once, over max_tokens where the denominator is constant."""
    for name, share in (("reinforce", 1.0), ("rloo", 1.0), ("dr_grpo", 0.5)):
        cfg = plainly(name, ratio=ratio, aggregation=aggregation)

        def prepare(samples, cfg=cfg):
            lad.set_advantages([samples], cfg, dict(STATE))

        got = expected_gradient(cfg, prepare)
        want = share * scale * gradient_of_mean_reward()
        assert (got - want).norm() < 2e-6 * max(want.norm().item(), 0.1), (name, got, want)


def test_unscorable_samples_only_shrink_the_gradient():
    """Each sample's verifier fails with probability 1/3, whatever it says: dr_grpo's gradient keeps
    its direction. Taken for wrong ones, the failed would turn it."""
    cfg = plainly("dr_grpo")
    total = 0
    for fails in itertools.product((0, 1), repeat=3):

        def prepare(samples, fails=fails):
            for s, fail in zip(samples, fails, strict=True):
                s["failed"] = "timeout: worker replaced" if fail else ""
            lad.set_advantages([samples], cfg, dict(STATE))

        probability = (1 / 3) ** sum(fails) * (2 / 3) ** (3 - sum(fails))
        total = total + probability * expected_gradient(cfg, prepare, G=3)
    want = gradient_of_mean_reward()
    cosine = (total * want).sum() / total.norm() / want.norm()
    assert cosine > 1 - 1e-9 and 0 < total.norm() < want.norm()


@pytest.mark.parametrize("divergence", lad.KNOBS["divergence"].metadata["choices"])
def test_nothing_to_learn_moves_nothing(divergence):
    """A = 0 everywhere, at pi = pi_old: no drift in length. (Per token with the mean over tokens kl
    and rkl have one of the order of 1/(B G): their constant is weighed by a denominator that
    varies. tv has a corner there.)"""

    def prepare(samples):
        for s in samples:
            s["adv"] = 0.0

    for ratio, aggregation in (
        ("token", "constant"),
        ("token", "sequence"),
        ("sequence", "sequence"),
        ("mean", "sequence"),
        ("token", "token"),
    ):
        if divergence in ("kl", "rkl") and aggregation == "token":
            continue
        cfg = plainly("lad", ratio=ratio, aggregation=aggregation, divergence=divergence)
        got = expected_gradient(cfg, prepare)
        assert got.norm() < 1e-6, (ratio, aggregation, got.norm())


def table_of(mass):
    """The policy whose responses have these probabilities, {response: mass}, up to a factor."""

    def of_beginning(start):
        return sum(m for y, m in mass.items() if y[: len(start)] == start)

    table = Table(4)
    with torch.no_grad():
        for row, start in enumerate(STARTS):
            for word in range(3):
                share = of_beginning((*start, word)) / of_beginning(start)
                table.logits[row, word] = math.log(share)
    return table


def rests_at(cfg, adv, policy, old):
    """Is the expected gradient at `policy` 0, of samples of `old` with advantages {response: A}?
    And is it not, with other advantages?"""

    def prepare(samples, factor=1):
        for s in samples:
            s["adv"] = factor * adv[tuple(s["tokens"])]

    def prepare_doubled(samples):
        prepare(samples, 2)

    at_rest = expected_gradient(cfg, prepare, old).norm() < 1e-5
    return at_rest and expected_gradient(cfg, prepare_doubled, old).norm() > 1e-3


@pytest.mark.parametrize("divergence", ["kl", "rkl", "jf", "js", "hd", "kl_c", "rkl_c"])
def test_lad_of_sequences_rests_at_its_target(divergence):
    """With pi_old fixed and each response's A its own, the expected gradient is 0 at pi = pi_old
    e^(A/eta)/Z, lengths or not."""
    cfg = plainly("lad", ratio="sequence", aggregation="sequence", divergence=divergence, eta=0.7)
    adv = {y: 0.3 * i - 0.8 for i, y in enumerate(RESPONSES)}
    policy = Table(4)
    mass = {}  # pi_old(y) = pi(y) e^(-A/eta) Z
    for y in RESPONSES:
        mass[y] = policy.of(y)[0].sum().exp().item() * math.exp(-adv[y] / cfg.eta)
    assert rests_at(cfg, adv, policy, table_of(mass))


def test_oapl_rests_where_lad_does():
    """At pi = pi_old e^(A/beta), where its A sums that to 1."""
    cfg = plainly("oapl", oapl_beta=0.7)
    adv = {y: 0.3 * i - 0.8 for i, y in enumerate(RESPONSES)}
    policy = Table(4)
    mass = {}
    for y in RESPONSES:
        mass[y] = policy.of(y)[0].sum().exp().item() * math.exp(-adv[y] / cfg.oapl_beta)
    total = sum(mass.values())
    for y in RESPONSES:  # pi_old e^((A + shift)/beta) = pi
        adv[y] += cfg.oapl_beta * math.log(total)
    assert rests_at(cfg, adv, policy, table_of(mass))


@pytest.mark.parametrize("name", ["gflowrl", "distill"])
def test_what_is_tied_to_the_reference_rests_at_it(name):
    """gflowrl at pi = pi_old = pi_ref e^(beta r)/Z, distill at pi = pi_ref; not elsewhere."""
    cfg = plainly(name, gflow_beta=1.5, clip_low=9.0 if name == "gflowrl" else 0.2, clip_high=9.0)
    policy = Table(4)

    def prepare(samples, shift=0.0):
        for s in samples:
            y = tuple(s["tokens"])
            logp = policy.of(y)[0].detach()
            s["old"] = logp
            s["ref"] = logp.clone() + shift * logp
            if name == "gflowrl":  # pi_ref is pi e^(-beta r), up to a factor
                s["ref"][0] -= cfg.gflow_beta * RIGHT.get(y, 0.0) + 0.4
        lad.set_advantages([samples], cfg, dict(STATE))

    def prepare_shifted(samples):
        prepare(samples, 0.3)

    assert expected_gradient(cfg, prepare).norm() < 1e-5
    assert expected_gradient(cfg, prepare_shifted).norm() > 1e-3


# ==== 3. Corners ================================================================================


def test_constant_denominator_does_not_see_what_is_left_out():
    """Dr. GRPO's: with every second sample masked a sample weighs what it did."""
    cfg = configure("dr_grpo", overlong="mask", prompts=1, group=4)
    assert lad.token_scale(cfg, 2, 3, 2) == lad.token_scale(cfg, 2, 8, 4) == 1 / (2 * 4)
    more = dataclasses.replace(cfg, minibatches=4, prompts=8)
    assert lad.token_scale(more, 2, 3, 2) == 1 / (2 * 8)


def test_powers_below_one_are_finite_when_all_are_right():
    """alpha < 1 is 0^negative there; A is 0."""
    right = torch.ones(1, 4, dtype=torch.float64)
    for alpha in (0.0, 0.5):
        adv = lad.advantages("power", right, configure("power", alpha=alpha), {})
        assert adv.tolist() == [[0.0] * 4]


def test_pull_of_a_long_sequence_is_kept_beyond_the_bound():
    """8,192 tokens of 0.0035 nats: the value is bounded, the gradient is not cut."""
    logp = torch.full((8192,), 0.0035, dtype=torch.float64, requires_grad=True)
    old = torch.zeros_like(logp)
    ones = torch.ones_like(logp)
    seq = torch.zeros(8192, dtype=torch.long)
    cfg = configure("lad", ratio="sequence", aggregation="sequence", divergence="rkl")
    loss, _ = lad.policy_loss("lad", logp, old, ones, ones, cfg, seq)
    assert loss.isfinite().all()
    assert torch.autograd.grad(loss.mean(), logp)[0].abs().min() > 0


if __name__ == "__main__":
    print("| objective | combinations | with a gradient | largest relative error |")
    print("|---|---|---|---|")
    for objective in lad.OBJECTIVES:
        combos, gradients, largest = compare(objective, combinations(objective))
        print(f"| {objective} | {combos} | {gradients} | {largest:.1e} |")
