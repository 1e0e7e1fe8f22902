"""Section 5 of lad.py against the formulas written plainly, in float64, and against literal
values."""

import dataclasses
import itertools
import math

import pytest
import torch

import lad
from harness.metrics import pass_at_k

CFG = lad.Config()
GROUPS = [[1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 1]]  # rewards
DRIFT = [  # log pi_old - log pi_ref of each response
    [0.5, -1.0, 0.0, 2.0],
    [1.0, 1.0, -0.3, 0.2],
    [0.0, 0.0, 0.0, 0.0],
    [0.1, 0.2, 0.3, 0.4],
    [-2.0, 0.7, 0.0, 0.0],
]
GENERATORS = ["kl", "rkl", "jf", "js", "hd", "tv", "kl_c", "rkl_c"]
SHARE = {  # knobs with which the few tokens of a test are enough to see something
    "clip_cov": dict(cov_share=1.0, cov_low=0.05, cov_high=0.8),
    "kl_cov": dict(cov_share=0.3),
    "flowrl": dict(flow_beta=2.0),
    "gflowrl": dict(gflow_beta=2.0, clip_low=0.6, clip_high=0.9),
    "cispo": dict(clip_low=1.0, clip_high=0.2),
    "dppo_tv": dict(dppo_delta=0.03),
    "dppo_kl": dict(dppo_delta=0.003),
    "gspo": dict(clip_low=0.05, clip_high=0.08),
}


def cfg(**changes):
    return dataclasses.replace(CFG, **changes)


def doubles(values):
    return torch.tensor(values, dtype=torch.float64)


def softplus(x):
    """log(1 + e^x)"""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


# ==== 1. The formulas, written plainly ==========================================================


def plain_f(name, z):
    """LAD's generator f(z), of a float64 tensor."""
    if name == "kl":
        return z * z.log()
    if name == "rkl":
        return -z.log()
    if name == "jf":
        return (z - 1) * z.log()
    if name == "js":
        return 0.5 * (z * z.log() - (z + 1) * ((z + 1) / 2).log())
    if name == "hd":
        return (z.sqrt() - 1) ** 2
    if name == "tv":
        return (z - 1).abs()
    if name == "kl_c":
        return z * z.log() - z + 1
    if name == "rkl_c":
        return -z.log() + z - 1
    raise KeyError(name)


def plain_df(name, z):
    """f'(z), of a Python float."""
    if name == "kl":
        return math.log(z) + 1
    if name == "rkl":
        return -1 / z
    if name == "jf":
        return math.log(z) + 1 - 1 / z
    if name == "js":
        return 0.5 * math.log(2 * z / (z + 1))
    if name == "hd":
        return 1 - 1 / math.sqrt(z)
    if name == "tv":
        return math.copysign(1, z - 1)
    if name == "kl_c":
        return math.log(z)
    if name == "rkl_c":
        return 1 - 1 / z
    raise KeyError(name)


def plain_passk(right, i, k):
    """What the i-th adds to pass@k of a subset, times k: the share of the subsets of k - 1 others
    that hold no right one."""
    others = right[:i] + right[i + 1 :]
    subsets = list(itertools.combinations(others, k - 1))
    if not subsets:
        return 0.0
    barren = [one for one in subsets if not any(one)]
    return k * right[i] * len(barren) / len(subsets)


STANDARDISED = ("grpo", "lad", "entadv", "clip_cov", "kl_cov", "flowrl")
STANDARDISED += ("dapo", "gspo", "cispo", "sapo", "dppo_tv", "dppo_kl")


def plain_advantages(name, r, c, alpha=None, delta=None, drift=None, correct=None):
    """Each objective's formula with Python floats, one group at a time. r: rewards; correct: what
    the verifier said, where rewards are shaped; alpha, delta: FADE's; drift: lad_anchor's and
    gflowrl's."""
    G = len(r)
    mean = sum(r) / G
    sd = math.sqrt(sum((x - mean) ** 2 for x in r) / (G - 1))
    if correct is None:
        correct = r
    right = [float(x > 0.5) for x in correct]
    solved = sum(correct) / G

    def focus(power):
        """(1 - rbar)^(power - 1); where all are right A is 0, whatever the factor."""
        return (1 - solved) ** (power - 1) if solved < 1 else 0.0

    def asymmetric(a, divisor):
        return a if a >= 0 else a / divisor

    def anchor(i):
        """-f'(z), z = (pi_old/pi_ref) e^(-A/eta), js"""
        z = math.exp(drift[i] - (r[i] - mean) / (sd + 1e-6) / c.eta)
        return -plain_df("js", z)

    def advantage(i):
        a = r[i] - mean
        if name in STANDARDISED:
            return a / (sd + 1e-6)
        if name == "f_grpo":
            return (1 - sum(right) / G) ** c.focal_gamma * a / (sd + 1e-6)
        if name == "oapl":  # r less the logarithm of the mean of e^(r/beta), times beta
            mean_of_e = sum(math.exp(x / c.oapl_beta) for x in r) / G
            return r[i] - c.oapl_beta * math.log(mean_of_e)
        if name == "gflowrl":  # minus the flow gap: log Z is the group's mean of beta r - drift
            log_z = sum(c.gflow_beta * r[j] - drift[j] for j in range(G)) / G
            return c.gflow_beta * r[i] - drift[i] - log_z
        if name == "distill":
            return 0.0
        if name == "power":
            return focus(c.alpha) * a
        if name == "asym":
            return asymmetric(a, c.delta)
        if name == "power_asym":
            return focus(c.alpha) * asymmetric(a, c.delta)
        if name == "fade":
            return focus(alpha) * asymmetric(a, delta)
        if name == "lad_anchor":
            return anchor(i) - sum(anchor(j) for j in range(G)) / G
        if name == "reinforce":
            return r[i]
        if name == "w_reinforce":
            return c.success_weight if right[i] else -1.0
        if name == "rloo":
            return r[i] - (sum(r) - r[i]) / (G - 1)
        if name == "dr_grpo":
            return a
        if name == "maxrl":
            return (right[i] - sum(right) / G) / (sum(right) / G + 1e-6)
        if name == "passk":
            return plain_passk(right, i, c.pass_k)
        raise KeyError(name)

    return [advantage(i) for i in range(G)]


def plain_ppo(rho, a, c):
    """(-min(rho A, clip(rho) A), whether it is the clipped one)."""
    if c.dual_clip and a < 0 and rho.item() > c.dual_clip:
        rho = doubles(c.dual_clip)
    clipped = min(max(rho.item(), 1 - c.clip_low), 1 + c.clip_high)
    if (rho * a).item() <= clipped * a:
        return -rho * a, False
    return -doubles(clipped * a), True


def plain_lad(rho, a, c):
    """e^u f(z), z = rho e^(-u), u = A/eta; kl and rkl centred where the weight of a token depends
    on its response"""
    u = a / c.eta
    name = c.divergence
    if name in ("kl", "rkl"):
        by_length = (c.ratio, c.aggregation) == ("token", "sequence") or c.ratio == "mean"
        if by_length or c.overlong == "mask" or c.zero_variance in ("drop", "refill"):
            name = name + "_c"
    return math.exp(u) * plain_f(name, rho * math.exp(-u))


def plain_flowrl(logp, old, ref, log_z, a, c):
    """w (log Z + (log pi - log pi_ref)/T - beta A)^2 of one sequence [T]."""
    w = min(math.exp((logp - old).sum().item()), 10.0)
    return w * (log_z + (logp - ref).sum() / len(logp) - c.flow_beta * a) ** 2


def plain_gflowrl(logp, old, a, c):
    """w (log rho + clipped gap)^2 of one sequence [T], gap = -A."""
    log_rho = (logp - old).sum()
    w = min(math.exp(log_rho.item()), c.gflow_cap)
    gap = min(max(-a, -c.clip_low), c.clip_high)
    return w * (log_rho + gap) ** 2


def plain_divergence(name, q, p):
    """Of two outcomes of probabilities q and 1 - q, p and 1 - p."""
    if name == "dppo_tv":
        return 0.5 * (abs(q - p) + abs((1 - q) - (1 - p)))
    return q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))


def plain_dppo(name, logp, old, a, c):
    """-rho A of a token; 0 where it has diverged and would go on."""
    rho = (logp - old).exp()
    diverged = plain_divergence(name, math.exp(old.item()), math.exp(logp.item())) > c.dppo_delta
    goes_on = (a > 0 and rho.item() > 1) or (a < 0 and rho.item() < 1)
    if diverged and goes_on:
        return doubles(0.0)
    return -rho * a


def plain_sapo(rho, a, c):
    tau = c.sapo_up if a > 0 else c.sapo_down
    return -4 / tau / (1 + (-tau * (rho - 1)).exp()) * a


def plain_cispo(logp, rho, a, c):
    weight = min(max(rho.item(), 1 - c.clip_low), 1 + c.clip_high)
    return -weight * a * logp


def plain_covariance(logp, adv, where):
    """{(b, t): (log pi - its mean) (A - its mean)} of the tokens `where`."""
    mean_logp = sum(logp[b, t].item() for b, t in where) / len(where)
    mean_adv = sum(adv[b] for b, _ in where) / len(where)
    return {(b, t): (logp[b, t].item() - mean_logp) * (adv[b] - mean_adv) for b, t in where}


def plain_loss(name, logp, old, adv, mask, c, entropy, ref, log_z):
    """Loss of each token of padded [B,T] float64 tensors, straight from the formulas, one scalar at
    a time."""
    B, T = logp.shape
    where = [(b, t) for b in range(B) for t in range(T) if mask[b, t]]
    cov = plain_covariance(logp, adv, where)
    top = sorted(where, key=cov.get)[-max(int(c.cov_share * len(where)), 1) :]
    loss = torch.zeros_like(logp)
    for b, t in where:
        a = adv[b]
        row = [s for s in range(T) if mask[b, s]]
        log_ratio = logp[b, t] - old[b, t]
        rho = log_ratio.exp()
        if c.ratio != "token":
            rho = sum(logp[b, s] - old[b, s] for s in row).exp()
        if c.ratio == "mean":
            rho = rho ** (1 / len(row))

        if name == "lad":
            loss[b, t] = plain_lad(rho, a, c)
        elif name == "flowrl":
            loss[b, t] = plain_flowrl(logp[b, row], old[b, row], ref[b, row], log_z[b, 0], a, c)
        elif name == "gflowrl":
            loss[b, t] = plain_gflowrl(logp[b, row], old[b, row], a, c)
        elif name == "oapl":
            loss[b, t] = (c.oapl_beta * (logp[b, row] - old[b, row]).sum() - a) ** 2
        elif name == "cispo":
            loss[b, t] = plain_cispo(logp[b, t], rho, a, c)
        elif name == "sapo":
            loss[b, t] = plain_sapo(rho, a, c)
        elif name in ("dppo_tv", "dppo_kl"):
            loss[b, t] = plain_dppo(name, logp[b, t], old[b, t], a, c)
        elif name == "distill":
            loss[b, t] = plain_ppo(rho, (ref[b, t] - logp[b, t]).item(), c)[0]
        elif name == "kl_cov":
            loss[b, t] = -rho * a
            if (b, t) in top:
                loss[b, t] = -rho * a + c.cov_kl * log_ratio.abs()
        elif name == "clip_cov":
            value, is_clipped = plain_ppo(rho, a, c)
            is_drawn = c.cov_low < cov[b, t] < c.cov_high  # with a share of 1, all of these
            if is_clipped or not is_drawn:
                loss[b, t] = value
        elif name == "entadv":
            bonus = min(c.ent_coef * entropy[b, t].item(), abs(a) / c.ent_kappa)
            loss[b, t] = plain_ppo(rho, a + bonus, c)[0]
        else:
            loss[b, t] = plain_ppo(rho, a, c)[0]
    return loss


# ==== 2. Advantages =============================================================================


@pytest.mark.parametrize("name", lad.OBJECTIVES)
def test_advantages_match_the_formulas(name):
    c = cfg(alpha=2.5, delta=0.4, pass_k=3, eta=0.8)
    state = {"p": 0.4, "H": 0.6, "H*": 1.0, "drift": doubles(DRIFT)}
    alpha, delta = 3 * 0.6 / 0.8, 0.6
    got = lad.advantages(name, doubles(GROUPS), c, state)
    want = []
    for group, drift in zip(GROUPS, DRIFT, strict=True):
        rewards = [float(x) for x in group]
        want.append(plain_advantages(name, rewards, c, alpha, delta, drift))
    torch.testing.assert_close(got, doubles(want), rtol=1e-9, atol=1e-9)


def test_advantages_of_one_group_by_hand():
    def check(name, want, **changes):
        state = {"p": 0.5, "H": 1.0, "H*": 1.0}
        got = lad.advantages(name, doubles([[1, 0, 0, 0]]), cfg(**changes), state)
        torch.testing.assert_close(got[0], doubles(want), rtol=1e-5, atol=1e-5)

    check("grpo", [1.5, -0.5, -0.5, -0.5])  # sd = 1/2
    check("rloo", [1.0, -1 / 3, -1 / 3, -1 / 3])
    check("power", [0.5625, -0.1875, -0.1875, -0.1875], alpha=2.0)  # 0.75 * 0.75
    check("asym", [0.75, -0.5, -0.5, -0.5], delta=0.5)
    focus = 0.75**0.5  # p = 1/2: alpha = 3/2; H = H*: delta = 1
    check("fade", [0.75 * focus, -0.25 * focus, -0.25 * focus, -0.25 * focus])


def test_fade_schedule_on_hand_computed_batches():
    """Three batches with averaging constant 1/2: p 0.5 -> 0.3 -> 0.2 -> 0.5; H 2 -> 2 -> 1.5 ->
    0.75, H* = 1."""
    c = cfg(fade_rate=0.5)
    state = lad.new_state()
    seen = []
    for p, h in ((0.1, 2.0), (0.1, 1.0), (0.8, 0.0)):
        lad.update_state(state, p, h, c)
        seen.append((state["p"], state["H"], *lad.fade_schedule(state, c)))
    want = [
        (0.3, 2.0, 3.0, 1.0),  # 3 * 0.7 / 0.6 = 3.5 -> alpha_max; 1 + 2 - 1 -> 1
        (0.2, 1.5, 3.0, 1.0),
        (0.5, 0.75, 1.5, 0.75),  # 3 * 0.5 / 1; 1 + 0.75 - 1
    ]
    torch.testing.assert_close(torch.tensor(seen), torch.tensor(want))
    state.update(p=0.9, H=0.1)
    assert lad.fade_schedule(state, c) == (1.0, 0.3)  # both at their floors
    state.update(p=0.0)
    assert lad.fade_schedule(state, c)[0] == 3.0
    fresh = lad.new_state()
    lad.update_state(fresh, 1.0, 0.8, cfg())
    assert fresh["p"] == pytest.approx(0.98 * 0.5 + 0.02) and fresh["H*"] == 0.4
    fixed = lad.new_state()
    lad.update_state(fixed, 1.0, 0.8, cfg(fade_entropy=0.3))
    assert fixed["H*"] == 0.3


def test_maxrl_is_of_successes_whatever_the_penalties():
    """Overlong penalties move no advantage: a mean near 0 must not blow it up, nor a negative one
    turn it, and a right answer of full length is right."""
    plain = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]])
    shaped = torch.tensor([[0.5, -0.5, 0, 0], [0, 0, 0, -0.5]])
    got = lad.advantages("maxrl", shaped, CFG, {"correct": plain})
    torch.testing.assert_close(got, lad.advantages("maxrl", plain, CFG, {}))
    assert got[0].tolist() == pytest.approx([3, -1, -1, -1], rel=1e-4) and not got[1].any()


def test_pass_at_k_advantage_is_unbiased():
    """Its score-function gradient, averaged over every possible group, is the derivative of pass@k
    = 1 - (1-p)^k, for p = sigmoid(theta)."""
    p, n = 0.3, 5
    for k in (2, 3, 5):
        gradient = 0.0
        for group in itertools.product((0.0, 1.0), repeat=n):
            probability = math.prod(p if x else 1 - p for x in group)
            adv = lad.advantages("passk", doubles([group]), cfg(pass_k=k), {})[0].tolist()
            # d log P(x) / d theta = x - p
            score = sum(a * (x - p) for a, x in zip(adv, group, strict=True))
            gradient += probability * score / n
        assert gradient == pytest.approx(k * (1 - p) ** (k - 1) * p * (1 - p), rel=1e-9)


# ==== 3. Losses =================================================================================


def divergence_and_derivative(name, x, u, dtype):
    """(e^u f(z), its derivative in log rho = x), z = e^(x - u), as lad.py has them; [1] each."""
    log_ratio = torch.tensor([x], dtype=dtype, requires_grad=True)
    u = torch.tensor([u], dtype=dtype)
    value = lad.f_divergence(name, log_ratio - u, log_ratio, u)
    return value, torch.autograd.grad(value.sum(), log_ratio)[0]


@pytest.mark.parametrize("name", GENERATORS)
def test_generator_values_and_derivatives(name):
    """e^u f(z) and its derivative in log rho, which is rho f'(z)."""
    for u in (-8.0, -1.0, 0.0, 0.7, 6.0):
        for x in (-4.0, -0.3, 0.2, 3.0):
            value, slope = divergence_and_derivative(name, x, u, torch.float64)
            z = math.exp(x - u)
            want = math.exp(u) * plain_f(name, doubles(z)).item()
            assert value.item() == pytest.approx(want, rel=1e-9, abs=1e-9)
            want = math.exp(x) * plain_df(name, z)
            assert slope.item() == pytest.approx(want, rel=1e-8, abs=1e-9)


@pytest.mark.parametrize("name", GENERATORS)
def test_generators_stay_finite_in_float32_at_extreme_advantages(name):
    for u in (-60.0, 60.0):
        for x in (-20.0, 0.0, 20.0):
            value, slope = divergence_and_derivative(name, x, u, torch.float32)
            assert torch.isfinite(value).all() and torch.isfinite(slope).all(), (u, x)
            if name == "js":  # the derivative does not drown in e^u
                want = math.exp(x) * 0.5 * (math.log(2) - softplus(u - x))  # log 2z/(z + 1)
                assert slope.item() == pytest.approx(want, rel=2e-3, abs=1e-5), (u, x)


OTHERS = [
    pytest.param(name, marks=pytest.mark.slow) for name in ("rkl", "jf", "hd", "kl_c", "rkl_c")
]


@pytest.mark.parametrize("name", ["js", "kl", *OTHERS])
def test_lad_fixed_point_is_the_advantage_distribution(name):
    """With pi_old fixed and the expectation exact, E[e^u f(rho e^-u)] is minimal at pi = pi_old e^u
    / Z."""
    torch.manual_seed(0)
    c = cfg(eta=0.5, divergence=name)
    old = torch.softmax(torch.randn(6, dtype=torch.float64), 0)
    adv = doubles([1.2, -0.7, 0.3, 0.9, -1.5, 0.0])
    target = old * torch.exp(adv / c.eta)
    target = target / target.sum()
    old_logp, adv, mask = old.log()[:, None], adv[:, None], torch.ones(6, 1)
    logits = old.log().clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], 0.02)
    for _ in range(3000):
        logp = logits.log_softmax(0)[:, None]
        loss, _ = lad.policy_loss("lad", logp, old_logp, adv, mask, c)
        optimizer.zero_grad()
        (old * loss[:, 0]).sum().backward()
        optimizer.step()
    assert 0.5 * (logits.softmax(0) - target).abs().sum() < 1e-3


def cases():
    """Every objective with both ratios, LAD with every generator too."""
    for name in lad.OBJECTIVES:
        objective = lad.OBJECTIVES[name]
        if objective.of_sequences:  # knows no ratio of tokens
            yield name, {}
            continue
        for ratio in objective.ratios or ("token", "sequence", "mean"):
            if name != "lad":
                yield name, dict(ratio=ratio)
                continue
            for divergence in GENERATORS:
                yield name, dict(ratio=ratio, divergence=divergence)


CASES = list(cases())
NAMES_OF_CASES = ["-".join([name, *changes.values()]) for name, changes in CASES]


def take(logits, targets):
    """Log-probs [B,T] of the targets [B,T] under the logits [B,T,V]."""
    return logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]


@pytest.mark.parametrize("name,changes", CASES, ids=NAMES_OF_CASES)
def test_gradient_of_every_objective_against_the_plain_formula(name, changes):
    """Through a softmax policy to its logits: relative error of the whole gradient under 1e-6, for
    the packed and the padded form."""
    torch.manual_seed(1)
    c = cfg(**changes, **SHARE.get(name, {}))
    B, T, V = 5, 4, 7
    lengths = torch.tensor([4, 1, 3, 2, 4])
    mask = torch.arange(T)[None] < lengths[:, None]  # [B,T]
    targets = torch.randint(V, (B, T))
    old = take(0.8 * torch.randn(B, T, V, dtype=torch.float64), targets)
    entropy = torch.rand(B, T, dtype=torch.float64)
    ref = old + 0.3 * torch.randn(B, T, dtype=torch.float64)
    log_z = torch.randn(B, 1, dtype=torch.float64).expand(B, T)
    drift = ((old - ref) * mask).sum(-1)[None]
    state = {"p": 0.4, "H": 0.6, "H*": 1.0, "drift": drift}
    adv = lad.advantages(name, doubles([[1, 0, 0, 1, 0]]), c, state)[0]  # [B]
    generator = torch.Generator().manual_seed(2)
    start = 0.5 * torch.randn(B, T, V, generator=generator, dtype=torch.float64)

    def gradient(loss_of):
        logits = start.clone().requires_grad_()
        loss_of(take(logits, targets)).sum().backward()
        return logits.grad

    def plain(logp):
        return plain_loss(name, logp, old, adv.tolist(), mask, c, entropy, ref, log_z)

    def padded(logp):
        known = dict(entropy=entropy, ref=ref, log_z=log_z)
        return lad.policy_loss(name, logp, old, adv, mask, c, **known)[0]

    def packed(logp):
        seq = torch.arange(B).repeat_interleave(lengths)
        known = dict(entropy=entropy[mask], ref=ref[mask], log_z=log_z[mask])
        ones = torch.ones(len(seq))
        return lad.policy_loss(name, logp[mask], old[mask], adv[seq], ones, c, seq, **known)[0]

    want = gradient(plain)
    assert want.norm() > 1e-3
    for form in (packed, padded):
        assert (gradient(form) - want).norm() / want.norm() < 1e-6


def test_clipped_tokens_are_counted_and_carry_no_gradient():
    logp = torch.tensor([[0.5], [-0.5], [0.5], [-0.5]], requires_grad=True)  # ratios 1.65 and 0.61
    adv = torch.tensor([1.0, -1.0, -1.0, 1.0])
    loss, info = lad.policy_loss("grpo", logp, torch.zeros(4, 1), adv, torch.ones(4, 1), CFG)
    loss.sum().backward()
    assert info["clipped"][:, 0].tolist() == [True, True, False, False]
    assert logp.grad[:2].abs().max() == 0 and logp.grad[2:].abs().min() > 0.5
    assert loss[:2, 0].tolist() == pytest.approx([-1.28, 0.8])


def test_clip_cov_takes_a_random_few_and_kl_cov_the_top():
    """At the default share of 2e-4 one token of a small batch: drawn from those in the band, a
    different one at another call."""
    torch.manual_seed(0)
    logp = torch.linspace(-4, 0, 50).view(50, 1)
    adv = torch.linspace(-2, 2, 50)
    mask = torch.ones(50, 1)
    cov = (logp[:, 0] - logp.mean()) * (adv - adv.mean())
    gone = set()
    for _ in range(20):
        loss, info = lad.policy_loss("clip_cov", logp, logp, adv, mask, CFG)
        drawn = int(info["clipped"][:, 0].nonzero())
        gone.add(drawn)
        assert loss[drawn, 0] == 0
    assert len(gone) > 3 and all(1 < cov[i] < 5 for i in gone)
    base, _ = lad.policy_loss("kl_cov", logp, logp - 0.1, adv, mask, cfg(cov_kl=0.0))
    loss, _ = lad.policy_loss("kl_cov", logp, logp - 0.1, adv, mask, CFG)
    more = loss - base
    assert more.nonzero().tolist() == [[int(cov.argmax()), 0]]
    assert more.max().item() == pytest.approx(0.1, rel=1e-4)


def test_policy_weights_are_the_advantage_and_lads_curve():
    adv = doubles([[2.0, -1.0, 0.0]])
    torch.testing.assert_close(lad.policy_weights("grpo", adv, CFG), adv)
    got = lad.policy_weights("lad", adv, cfg(eta=1.0))
    want = [[0.5 * (softplus(u) - math.log(2)) for u in (2.0, -1.0, 0.0)]]
    torch.testing.assert_close(got, doubles(want))


def test_k3():
    d = doubles([0.0, 0.5, -1.0])
    want = [0, math.exp(0.5) - 1.5, math.exp(-1)]
    assert lad.k3(-d, torch.zeros_like(d)).tolist() == pytest.approx(want)
    # unbiased: E_pi[k3] = KL(pi || ref)
    logp = torch.randn(9, dtype=torch.float64).log_softmax(0)
    ref = torch.randn(9, dtype=torch.float64).log_softmax(0)
    kl = (logp.exp() * (logp - ref)).sum().item()
    assert (logp.exp() * lad.k3(logp, ref)).sum().item() == pytest.approx(kl)


def test_token_scale_by_hand():
    """Of responses of 2 and of 3 tokens, in a minibatch of 10 tokens and 4 sequences."""
    constant = dict(aggregation="constant", max_tokens=20, prompts=4, group=2, minibatches=2)
    for changes, want in (
        (dict(aggregation="token"), [1 / 10, 1 / 10]),
        (dict(aggregation="sequence"), [1 / 8, 1 / 12]),
        (constant, [1 / 80, 1 / 80]),
    ):
        got = [lad.token_scale(cfg(**changes), length, 10, 4) for length in (2, 3)]
        assert got == pytest.approx(want)


def test_pass_at_k_against_enumeration():
    for n, c, k in ((5, 2, 1), (5, 2, 3), (6, 0, 4), (6, 6, 2), (7, 3, 5)):
        draws = list(itertools.combinations(range(n), k))
        lucky = [draw for draw in draws if any(i < c for i in draw)]
        assert pass_at_k(n, c, k) == pytest.approx(len(lucky) / len(draws))
    for bad in ((4, 0, 5), (4, 5, 1), (4, 1, 0)):
        with pytest.raises(ValueError):
            pass_at_k(*bad)
