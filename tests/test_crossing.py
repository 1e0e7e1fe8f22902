"""
Every objective under every combination of the knobs that decide what is trained on and how it is
weighed, and what is true in expectation.

    python tests/test_crossing.py         # the table: combinations tried, and the largest relative
    error of a gradient

The policy is a table: three words (0 ends a response), at most two of them, so seven responses; its
logits, one row for each beginning, are float64. What is tested is the real path of lad.py from
verified samples to a gradient (set_advantages, is_trained_on, accumulate_gradient with its packing,
denominators and losses); what it is tested against is written plainly from the definitions, one
sample at a time.
"""

import dataclasses, itertools, math, random, sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import pytest
import torch

import lad
from test_objectives import SHARE, plain_advantages, plain_loss

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
        """(log-probs, entropies) of the tokens of a response."""
        rows = torch.stack(
            [
                self.logits[STARTS.index(tuple(tokens[:t]))].log_softmax(-1)
                for t in range(len(tokens))
            ]
        )
        return rows.gather(-1, torch.tensor(tokens)[:, None])[:, 0], -(rows.exp() * rows).sum(-1)

    def forward(self, batch, temperature, chunk, gradient=None):
        ends = list(itertools.accumulate(batch["lengths"]))
        parts = [
            self.of(batch["targets"][end - n : end].tolist())
            for end, n in zip(ends, batch["lengths"])
            if n
        ]
        logp, entropy = (torch.cat(x) for x in zip(*parts))
        return logp, entropy, self.z.expand(len(logp)) if self.z is not None else None


def configure(name, **changes):
    return dataclasses.replace(
        lad.Config(),
        **lad.OBJECTIVES[name].defaults
        | dict(
            objective=name,
            max_tokens=2,
            overlong_buffer=2,
            prompts=4,
            group=4,
            minibatches=1,
            epochs=1,
            pass_k=2,
            micro_tokens=7,
            kl_coef=0.1,
            alpha=2.5,
        )
        | SHARE.get(name, {})
        | changes,
    )


# ==== Every combination, against the definitions
# =======================================================================

FAULTS = ("none", "unscorable", "lost", "empty", "masked tokens", "all of them")
STATE = {"p": 0.4, "H": 0.6, "H*": 1.0}


def make_groups(cfg, fault):
    """Four groups of four: mixed, all right, all wrong, mixed; verified, and with log-probs under
    four policies."""
    answers = [
        [(1, 0), (2, 1), (0,), (2, 2)],
        [(1, 0), (2, 1), (1, 0), (2, 1)],
        [(0,), (2, 0), (1, 1), (2, 2)],
        [(1, 2), (2, 1), (0,), (1, 1)],
    ]
    old, ref = Table(1), Table(2)
    groups = []
    for number, texts in enumerate(answers):
        group = []
        for place, tokens in enumerate(texts):
            s = dict(
                prompt=[7, number],
                tokens=list(tokens),
                correct=RIGHT.get(tokens, 0.0),
                truncated=len(tokens) == 2 and tokens[-1] != 0,
                lost=False,
                failed="",
            )
            with torch.no_grad():
                s["old"], s["ref"] = old.of(tokens)[0], ref.of(tokens)[0]
            noise = [
                random.Random(str(tokens[: t + 1])).gauss(0, 0.1) for t in range(len(tokens))
            ]  # tokens of equal covariance are alike in everything
            s["behaviour"] = [x + e for x, e in zip(s["old"].tolist(), noise)]
            here = {
                (0, 1): "unscorable",
                (3, 2): "unscorable",
                (2, 0): "unscorable",
                (0, 3): "lost",
                (1, 0): "lost",
                (3, 1): "empty",
                (2, 2): "empty",
                (0, 0): "masked tokens",
            }.get((number, place))
            if here and fault in (here, "all of them"):
                if here == "unscorable":
                    s.update(failed="timeout: worker replaced", correct=0.0)
                if here == "lost":
                    s.update(lost=True, behaviour=[0.0] * len(tokens))
                if here == "empty":
                    s.update(
                        tokens=[], behaviour=[], old=s["old"][:0], ref=s["ref"][:0], truncated=False
                    )
                if here == "masked tokens":
                    s["mask"] = [0] * (len(tokens) - 1) + [1]
            s["reward"] = lad.shaped_reward(s, cfg)
            group.append(s)
        groups.append(group)
    return groups


def real(cfg, groups):
    """The gradient that lad.py accumulates."""
    if cfg.zero_variance == "drop":
        groups = [group for group in groups if lad.has_signal(group)]
    lad.set_advantages(groups, cfg, STATE)
    model = Table(3, log_z="log_z" in lad.OBJECTIVES[cfg.objective].needs)
    samples = [s for group in groups for s in group if lad.is_trained_on(s, cfg)]
    lad.accumulate_gradient(model, samples, cfg, CPU)
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def plain(cfg, groups):
    """The gradient of the loss written plainly, from the definitions."""
    model = Table(3, log_z="log_z" in lad.OBJECTIVES[cfg.objective].needs)
    trained = []
    for group in groups:
        known = [s for s in group if not s["failed"]]
        if cfg.zero_variance == "drop" and len({s["correct"] for s in known}) < 2:
            continue
        if len(known) > 1:
            rewards = [
                s["correct"]
                - (0.5 * max(len(s["tokens"]) - 0, 0) / 2 if cfg.overlong == "shape" else 0.0)
                for s in known
            ]  # a buffer of two of two tokens
            drift = []  # of whole responses, without masked tokens
            for s in known:
                gaps = (s["old"] - s["ref"]).tolist()
                mask = s.get("mask", [1] * len(gaps))
                drift.append(sum(gap for gap, m in zip(gaps, mask, strict=True) if m))
            alpha, delta = min(max(1.5 * 0.6 / 0.4, 1), 3), 1 + 0.6 - 1.0
            advantages = plain_advantages(
                cfg.objective,
                rewards,
                cfg,
                alpha,
                delta,
                drift,
                correct=[s["correct"] for s in known],
            )
            for s, a in zip(known, advantages):
                cut = s["truncated"] and cfg.overlong == "mask"
                if s["tokens"] and not s["lost"] and not cut:
                    trained.append((s, a))
    if not trained:
        return torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.float64)

    B, T = len(trained), 2
    pad = lambda x: torch.cat([x, x.new_zeros(T - len(x))])
    mask = torch.tensor([(s.get("mask", [1] * len(s["tokens"])) + [0, 0])[:T] for s, _ in trained])
    parts = [model.of(s["tokens"]) for s, _ in trained]
    logp, entropy = torch.stack([pad(p) for p, _ in parts]), torch.stack([pad(e) for _, e in parts])
    old, ref = (torch.stack([pad(s[key]) for s, _ in trained]) for key in ("old", "ref"))
    behaviour = torch.stack(
        [pad(torch.tensor(s["behaviour"], dtype=torch.float64)) for s, _ in trained]
    )
    log_z = model.z.expand(B, T) if model.z is not None else None
    loss = plain_loss(
        cfg.objective, logp, old, [a for _, a in trained], mask, cfg, entropy.detach(), ref, log_z
    )
    loss = loss * (old - behaviour).exp().clamp(max=cfg.tis_cap) + cfg.kl_coef * (
        (ref - logp).exp() - 1 - (ref - logp)
    )
    weight = {
        "token": lambda n: 1 / mask.sum(),
        "sequence": lambda n: 1 / (n * B),
        "constant": lambda n: 1 / (2 * 4 * 4),
    }[cfg.aggregation]
    (loss * mask * torch.stack([weight(n) * torch.ones(T) for n in mask.sum(-1)])).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def combinations(name):
    ratios = [("token", aggregation) for aggregation in ("token", "sequence", "constant")] + [
        ("sequence", "sequence")
    ]
    if lad.OBJECTIVES[name].of_sequences:
        ratios = [("token", "sequence"), ("sequence", "sequence")]
    divergences = lad.KNOBS["divergence"].metadata["choices"] if name == "lad" else ("js",)
    for (ratio, aggregation), zero, overlong, fault, divergence, dual in itertools.product(
        ratios, ("keep", "drop"), ("keep", "mask", "shape"), FAULTS, divergences, (0.0, 1.5)
    ):
        if dual == 0.0 or name in ("grpo", "fade", "entadv", "clip_cov"):  # PPO's
            yield (
                dict(
                    ratio=ratio,
                    aggregation=aggregation,
                    zero_variance=zero,
                    overlong=overlong,
                    divergence=divergence,
                    dual_clip=dual,
                ),
                fault,
            )


def compare(name):
    """(how many combinations, how many of them have a gradient, the largest relative error)."""
    tried = moved = 0
    worst = 0.0
    for changes, fault in combinations(name):
        micro = 10**6 if not lad.OBJECTIVES[name].local else 7  # covariances look at a micro-batch
        cfg = configure(name, micro_tokens=micro, **changes)
        torch.manual_seed(0)
        want = plain(cfg, make_groups(cfg, fault))
        got = real(cfg, make_groups(cfg, fault))
        error = (got - want).norm() / want.norm().clamp_min(1e-3)
        assert error < TOLERANCE, (name, changes, fault, error.item())
        tried, moved, worst = tried + 1, moved + bool(want.norm() > 1e-6), max(worst, error.item())
    return tried, moved, worst


@pytest.mark.parametrize("name", lad.OBJECTIVES)
def test_every_combination_is_what_the_definitions_say(name):
    tried, moved, worst = compare(name)
    assert tried >= 72 and moved > 0.9 * tried


# ==== In expectation
# ===================================================================================================


def expected_gradient(cfg, prepare, old=None, G=2):
    """Of one update, over every group of G responses of the policy `old` (the policy itself: None),
    each with its probability. prepare(groups) sets rewards or advantages."""
    model = Table(4)
    behaviour = old or model
    with torch.no_grad():
        logp = {y: behaviour.of(y)[0] for y in RESPONSES}
    total = torch.zeros_like(model.logits)
    for group in itertools.product(RESPONSES, repeat=G):
        samples = [
            dict(
                prompt=[7],
                tokens=list(y),
                correct=RIGHT.get(y, 0.0),
                truncated=y[-1] != 0,
                lost=False,
                failed="",
                behaviour=logp[y].tolist(),
            )
            for y in group
        ]
        for s in samples:
            s["reward"] = s["correct"]
            if old is not None:
                s["old"] = logp[tuple(s["tokens"])]
        prepare(samples)
        model.zero_grad()
        lad.accumulate_gradient(model, [s for s in samples if lad.is_trained_on(s, cfg)], cfg, CPU)
        total += math.exp(sum(logp[y].sum().item() for y in group)) * model.logits.grad
    return total


def gradient_of(objective):
    """Of -sum_y pi(y) objective(y)."""
    model = Table(4)
    (-sum(model.of(y)[0].sum().exp() * objective(y) for y in RESPONSES)).backward()
    return model.logits.grad


def settle(cfg):
    return lambda samples: lad.set_advantages([samples], cfg, dict(STATE))


def close(got, want, tolerance=2e-6):
    assert (got - want).norm() < tolerance * max(want.norm().item(), 0.1), (got, want)


def plainly(name, **changes):
    return configure(
        name, prompts=1, group=2, kl_coef=0.0, tis_cap=0.0, micro_tokens=10**6, **changes
    )


@pytest.mark.parametrize(
    "ratio, aggregation, scale", [("token", "constant", 1 / 2), ("sequence", "sequence", 1.0)]
)
def test_policy_gradients_are_unbiased(ratio, aggregation, scale):
    """reinforce and rloo have the gradient of the mean reward, dr_grpo (G - 1)/G of it: where each
    sequence counts once, over max_tokens where the denominator is constant."""
    want = gradient_of(lambda y: RIGHT.get(y, 0.0))
    for name, share in (("reinforce", 1.0), ("rloo", 1.0), ("dr_grpo", 0.5)):
        cfg = plainly(name, ratio=ratio, aggregation=aggregation)
        close(expected_gradient(cfg, settle(cfg)), share * scale * want)


def test_unscorable_samples_only_shrink_the_gradient():
    """Each sample's verifier fails with probability 1/3, whatever it says: dr_grpo's gradient keeps
    its direction. Taken for wrong ones, the failed would turn it."""
    cfg = plainly("dr_grpo")
    total = 0
    for fails in itertools.product((0, 1), repeat=3):

        def prepare(samples, fails=fails):
            for s, fail in zip(samples, fails):
                s["failed"] = "timeout: worker replaced" * fail
            lad.set_advantages([samples], cfg, dict(STATE))

        total = total + (1 / 3) ** sum(fails) * (2 / 3) ** (3 - sum(fails)) * expected_gradient(
            cfg, prepare, G=3
        )
    want = gradient_of(lambda y: RIGHT.get(y, 0.0))
    cosine = (total * want).sum() / total.norm() / want.norm()
    assert cosine > 1 - 1e-9 and 0 < total.norm() < want.norm()


@pytest.mark.parametrize("divergence", lad.KNOBS["divergence"].metadata["choices"])
def test_nothing_to_learn_moves_nothing(divergence):
    """A = 0 everywhere, at pi = pi_old: no drift in length. (Per token with the mean over tokens kl
    and rkl have one of the order of 1/(B G): their constant is weighed by a denominator that
    varies. tv has a corner there.)"""
    for ratio, aggregation in (
        ("token", "constant"),
        ("token", "sequence"),
        ("sequence", "sequence"),
        ("token", "token"),
    ):
        cfg = plainly("lad", ratio=ratio, aggregation=aggregation, divergence=divergence)
        got = expected_gradient(cfg, lambda samples: [s.update(adv=0.0) for s in samples])
        if divergence in ("kl", "rkl") and aggregation == "token":
            continue
        assert got.norm() < 1e-6, (ratio, aggregation, got.norm())


@pytest.mark.parametrize("divergence", ["kl", "rkl", "jf", "js", "hd", "kl_c", "rkl_c"])
def test_lad_of_sequences_rests_at_its_target(divergence):
    """With pi_old fixed and each response's A its own, the expected gradient is 0 at pi = pi_old
    e^(A/eta)/Z, lengths or not."""
    cfg = plainly("lad", ratio="sequence", aggregation="sequence", divergence=divergence, eta=0.7)
    policy = Table(4)
    adv = {y: 0.3 * i - 0.8 for i, y in enumerate(RESPONSES)}
    # pi_old(y) = pi(y) e^(-A/eta) Z, as a table of conditional probabilities
    with torch.no_grad():
        mass = {
            y: policy.of(y)[0].sum().exp().item() * math.exp(-adv[y] / cfg.eta) for y in RESPONSES
        }
        old = Table(4)
        begins = lambda start: sum(m for y, m in mass.items() if y[: len(start)] == start)
        for row, start in enumerate(STARTS):
            for word in range(3):
                old.logits[row, word] = math.log(begins((*start, word)) / begins(start))
    got = expected_gradient(
        cfg, lambda samples: [s.update(adv=adv[tuple(s["tokens"])]) for s in samples], old=old
    )
    assert got.norm() < 1e-5
    off = expected_gradient(
        cfg, lambda samples: [s.update(adv=2 * adv[tuple(s["tokens"])]) for s in samples], old=old
    )
    assert off.norm() > 1e-3  # not everywhere


def test_constant_denominator_does_not_see_what_is_left_out():
    """Dr. GRPO's: with every second sample masked a sample weighs what it did."""
    cfg = configure("dr_grpo", overlong="mask", prompts=1, group=4)
    assert lad.token_scale(cfg, 2, 3, 2) == lad.token_scale(cfg, 2, 8, 4) == 1 / (2 * 4)
    assert lad.token_scale(dataclasses.replace(cfg, minibatches=4, prompts=8), 2, 3, 2) == 1 / (
        2 * 8
    )


def test_powers_below_one_are_finite_when_all_are_right():
    """alpha < 1 is 0^negative there; A is 0."""
    for alpha in (0.0, 0.5):
        adv = lad.advantages(
            "power", torch.ones(1, 4, dtype=torch.float64), configure("power", alpha=alpha), {}
        )
        assert adv.tolist() == [[0.0] * 4]


def test_pull_of_a_long_sequence_is_kept_beyond_the_bound():
    """8,192 tokens of 0.0035 nats: the value is bounded, the gradient is not cut."""
    logp = torch.full((8192,), 0.0035, dtype=torch.float64, requires_grad=True)
    cfg = configure("lad", ratio="sequence", aggregation="sequence", divergence="rkl")
    loss, _ = lad.policy_loss(
        "lad",
        logp,
        torch.zeros_like(logp),
        torch.ones_like(logp),
        torch.ones_like(logp),
        cfg,
        torch.zeros(8192, dtype=torch.long),
    )
    assert loss.isfinite().all() and torch.autograd.grad(loss.mean(), logp)[0].abs().min() > 0


if __name__ == "__main__":
    print(
        f"| objective | combinations | with a gradient | largest relative error |\n|---|---|---|---|"
    )
    for objective in lad.OBJECTIVES:
        combos, gradients, largest = compare(objective)
        print(f"| {objective} | {combos} | {gradients} | {largest:.1e} |")
