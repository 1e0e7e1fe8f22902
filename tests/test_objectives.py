"""Section 5 of lad.py against the formulas written plainly, in float64, and against literal values."""
import dataclasses, math

import pytest
import torch

import lad
from harness.metrics import pass_at_k

CFG = lad.Config()
GENERATORS = {   # f and f', as in shared/DESIGN.md 3.2, of plain floats
    "kl": (lambda z: z * math.log(z), lambda z: math.log(z) + 1),
    "rkl": (lambda z: -math.log(z), lambda z: -1 / z),
    "jf": (lambda z: (z - 1) * math.log(z), lambda z: math.log(z) + 1 - 1 / z),
    "js": (lambda z: 0.5 * (z * math.log(z) - (z + 1) * math.log((z + 1) / 2)), lambda z: 0.5 * math.log(2 * z / (z + 1))),
    "hd": (lambda z: 0.5 * (math.sqrt(z) - 1) ** 2, lambda z: 0.5 * (1 - 1 / math.sqrt(z))),
    "tv": (lambda z: 0.5 * abs(z - 1), lambda z: 0.5 * math.copysign(1, z - 1)),
    "kl_c": (lambda z: z * math.log(z) - z + 1, lambda z: math.log(z)),
    "rkl_c": (lambda z: -math.log(z) + z - 1, lambda z: 1 - 1 / z),
}
DRIFT = [[0.5, -1.0, 0.0, 2.0], [1.0, 1.0, -0.3, 0.2], [0.0] * 4, [0.1, 0.2, 0.3, 0.4], [-2.0, 0.7, 0.0, 0.0]]   # log pi_old - log pi_ref of each response


def cfg(**changes):
    return dataclasses.replace(CFG, **changes)


def plain_advantages(name, r, c, alpha=None, delta=None, drift=None, correct=None):
    """Each objective's formula with Python floats, one group at a time. r: rewards; correct: what the verifier said, where rewards are shaped."""
    from itertools import combinations
    G, mean = len(r), sum(r) / len(r)
    right = [float(x > 0.5) for x in correct or r]
    solved = sum(correct or r) / G
    missed = lambda power: (1 - solved) ** power if solved < 1 else 0.0
    sd = math.sqrt(sum((x - mean) ** 2 for x in r) / (G - 1))
    def passk(i):   # k times the share of the subsets of k - 1 others that hold no right one: what the i-th adds to pass@k of a subset
        others = [right[j] for j in range(G) if j != i]
        subsets = list(combinations(others, c.pass_k - 1))
        return c.pass_k * right[i] * sum(not any(one) for one in subsets) / len(subsets) if subsets else 0.0
    def anchored(i):   # -f'(z), z = (pi_old/pi_ref) e^(-A/eta), js
        z = math.exp(drift[i] - (r[i] - mean) / (sd + 1e-6) / c.eta)
        return -GENERATORS["js"][1](z)
    return [{
        "passk": lambda: passk(i),
        "maxrl": lambda: (right[i] - sum(right) / G) / (sum(right) / G + 1e-6),   # of successes
        "lad_anchor": lambda: anchored(i) - sum(map(anchored, range(G))) / G,
        "power_asym": lambda: missed(c.alpha - 1) * (x - mean) / (1 if x >= mean else c.delta),
        **dict.fromkeys(("entadv", "clip_cov", "kl_cov", "flowrl"), lambda: (x - mean) / (sd + 1e-6)),
        "reinforce": lambda: x,
        "rloo": lambda: x - (sum(r) - x) / (G - 1),
        "dr_grpo": lambda: x - mean,
        "grpo": lambda: (x - mean) / (sd + 1e-6),
        "lad": lambda: (x - mean) / (sd + 1e-6),
        "w_reinforce": lambda: c.success_weight if right[i] else -1.0,
        "power": lambda: missed(c.alpha - 1) * (x - mean),
        "asym": lambda: (x - mean) if x >= mean else (x - mean) / c.delta,
        "fade": lambda: missed(alpha - 1) * (x - mean) / (1 if x >= mean else delta),
    }[name]() for i, x in enumerate(r)]


GROUPS = [[1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 1]]


@pytest.mark.parametrize("name", lad.OBJECTIVES)
def test_advantages_match_the_formulas(name):
    c, state = cfg(alpha=2.5, delta=0.4, pass_k=3, eta=0.8), {"p": 0.4, "H": 0.6, "H*": 1.0, "drift": torch.tensor(DRIFT, dtype=torch.float64)}
    alpha, delta = 3 * 0.6 / 0.8, 0.6
    got = lad.advantages(name, torch.tensor(GROUPS, dtype=torch.float64), c, state)
    want = [plain_advantages(name, [float(x) for x in g], c, alpha, delta, drift) for g, drift in zip(GROUPS, DRIFT)]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_advantages_of_one_group_by_hand():
    r = torch.tensor([[1.0, 0, 0, 0]], dtype=torch.float64)
    close = lambda name, want, **kw: torch.testing.assert_close(lad.advantages(name, r, cfg(**kw), {"p": 0.5, "H": 1.0, "H*": 1.0})[0], torch.tensor(want, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    close("grpo", [1.5, -0.5, -0.5, -0.5])                       # sd = 1/2
    close("rloo", [1.0, -1 / 3, -1 / 3, -1 / 3])
    close("power", [0.5625, -0.1875, -0.1875, -0.1875], alpha=2.0)   # 0.75 * 0.75
    close("asym", [0.75, -0.5, -0.5, -0.5], delta=0.5)
    close("fade", [0.75 * 0.75 ** 0.5, *[-0.25 * 0.75 ** 0.5] * 3])  # p = 1/2: alpha = 3/2; H = H*: delta = 1


def test_fade_schedule_on_hand_computed_batches():
    """Three batches with averaging constant 1/2: p 0.5 -> 0.3 -> 0.2 -> 0.5; H 2 -> 2 -> 1.5 -> 0.75, H* = 1."""
    c, state, seen = cfg(fade_rate=0.5), lad.new_state(), []
    for p, h in ((0.1, 2.0), (0.1, 1.0), (0.8, 0.0)):
        lad.update_state(state, p, h, c)
        seen.append((state["p"], state["H"], *lad.fade_schedule(state, c)))
    want = [(0.3, 2.0, 3.0, 1.0),      # 3 * 0.7 / 0.6 = 3.5 -> alpha_max; 1 + 2 - 1 -> 1
            (0.2, 1.5, 3.0, 1.0),
            (0.5, 0.75, 1.5, 0.75)]    # 3 * 0.5 / 1; 1 + 0.75 - 1
    torch.testing.assert_close(torch.tensor(seen), torch.tensor(want))
    state.update(p=0.9, H=0.1)
    assert lad.fade_schedule(state, c) == (1.0, 0.3)             # both at their floors
    state.update(p=0.0)
    assert lad.fade_schedule(state, c)[0] == 3.0
    fresh = lad.new_state()
    lad.update_state(fresh, 1.0, 0.8, cfg())
    assert fresh["p"] == pytest.approx(0.98 * 0.5 + 0.02) and fresh["H*"] == 0.4
    lad.update_state(fixed := lad.new_state(), 1.0, 0.8, cfg(fade_entropy=0.3))
    assert fixed["H*"] == 0.3


@pytest.mark.parametrize("name", GENERATORS)
def test_generator_values_and_derivatives(name):
    """e^u f(z) and its derivative in log rho, which is rho f'(z), against plain floats."""
    f, df = GENERATORS[name]
    for u in (-8.0, -1.0, 0.0, 0.7, 6.0):
        for x in (-4.0, -0.3, 0.2, 3.0):
            log_ratio = torch.tensor([x], dtype=torch.float64, requires_grad=True)
            ut = torch.tensor([u], dtype=torch.float64)
            value = lad.f_divergence(name, log_ratio - ut, log_ratio, ut)
            z = math.exp(x - u)
            assert value.item() == pytest.approx(math.exp(u) * f(z), rel=1e-9, abs=1e-9)
            assert torch.autograd.grad(value.sum(), log_ratio)[0].item() == pytest.approx(math.exp(x) * df(z), rel=1e-8, abs=1e-9)


@pytest.mark.parametrize("name", GENERATORS)
def test_generators_stay_finite_in_float32_at_extreme_advantages(name):
    for u in (-60.0, 60.0):
        for x in (-20.0, 0.0, 20.0):
            log_ratio, ut = torch.tensor([x], requires_grad=True), torch.tensor([u])
            value = lad.f_divergence(name, log_ratio - ut, log_ratio, ut)
            grad = torch.autograd.grad(value.sum(), log_ratio)[0]
            assert torch.isfinite(value).all() and torch.isfinite(grad).all(), (u, x)
            if name == "js":   # the derivative does not drown in e^u
                z = x - u
                want = math.exp(x) * 0.5 * (math.log(2) - (math.log1p(math.exp(-z)) if z > 0 else -z + math.log1p(math.exp(z))))
                assert grad.item() == pytest.approx(want, rel=2e-3, abs=1e-5), (u, x)


def test_maxrl_is_of_successes_whatever_the_penalties():
    """Overlong penalties move no advantage: a mean near 0 must not blow it up, nor a negative one turn it, and a right answer of full length is right."""
    plain, shaped = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]]), torch.tensor([[0.5, -0.5, 0, 0], [0, 0, 0, -0.5]])
    got = lad.advantages("maxrl", shaped, CFG, {"correct": plain})
    torch.testing.assert_close(got, lad.advantages("maxrl", plain, CFG, {}))
    assert got[0].tolist() == pytest.approx([3, -1, -1, -1], rel=1e-4) and not got[1].any()


def test_pass_at_k_advantage_is_unbiased():
    """Its score-function gradient, averaged over every possible group, is the derivative of pass@k = 1 - (1-p)^k, for p = sigmoid(theta)."""
    from itertools import product
    p, n = 0.3, 5
    for k in (2, 3, 5):
        gradient = 0.0
        for group in product((0.0, 1.0), repeat=n):
            probability = math.prod(p if x else 1 - p for x in group)
            adv = lad.advantages("passk", torch.tensor([group], dtype=torch.float64), cfg(pass_k=k), {})[0].tolist()
            gradient += probability * sum(a * (x - p) for a, x in zip(adv, group)) / n   # d log P(x) / d theta = x - p
        assert gradient == pytest.approx(k * (1 - p) ** (k - 1) * p * (1 - p), rel=1e-9)


@pytest.mark.parametrize("name", ["kl", "rkl", "jf", "js", "hd", "kl_c", "rkl_c"])
def test_lad_fixed_point_is_the_advantage_distribution(name):
    """With pi_old fixed and the expectation exact, E[e^u f(rho e^-u)] is minimal at pi = pi_old e^u / Z."""
    torch.manual_seed(0)
    old = torch.softmax(torch.randn(6, dtype=torch.float64), 0)
    adv = torch.tensor([1.2, -0.7, 0.3, 0.9, -1.5, 0.0], dtype=torch.float64)
    target = old * torch.exp(adv / 0.5)
    target = target / target.sum()
    logits = old.log().clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], 0.02)
    for _ in range(3000):
        logp = logits.log_softmax(0)
        loss, _ = lad.policy_loss("lad", logp[:, None], old.log()[:, None], adv[:, None], torch.ones(6, 1), cfg(eta=0.5, divergence=name))
        optimizer.zero_grad()
        (old * loss[:, 0]).sum().backward()
        optimizer.step()
    assert 0.5 * (logits.softmax(0) - target).abs().sum() < 1e-3


def plain_loss(name, logp, old, adv, mask, c, entropy, ref, log_z):
    """Loss of each token of padded [B,T] float64 tensors, straight from the formulas, one scalar at a time."""
    out = torch.zeros_like(logp)
    where = [(b, t) for b in range(logp.shape[0]) for t in range(logp.shape[1]) if mask[b, t]]
    mean_logp, mean_adv = (sum(f(b, t) for b, t in where) / len(where) for f in (lambda b, t: logp[b, t].item(), lambda b, t: adv[b]))
    cov = {(b, t): (logp[b, t].item() - mean_logp) * (adv[b] - mean_adv) for b, t in where}
    top = sorted(where, key=cov.get)[-int(c.cov_share * len(where)):]
    for b in range(logp.shape[0]):
        for t in range(logp.shape[1]):
            if not mask[b, t]:
                continue
            d = logp[b, t] - old[b, t]
            if c.ratio == "sequence":
                d = sum(logp[b, s] - old[b, s] for s in range(logp.shape[1]) if mask[b, s])
            rho = torch.exp(d)
            if name == "flowrl":
                row = [s for s in range(logp.shape[1]) if mask[b, s]]
                length = len(row)
                w = min(math.exp(sum((logp[b, s] - old[b, s]).item() for s in row)), 10.0)
                out[b, t] = w * (log_z[b, 0] + sum(logp[b, s] - ref[b, s] for s in row) / length - c.flow_beta * adv[b]) ** 2
            elif name == "kl_cov":
                out[b, t] = -rho * adv[b] + ((b, t) in top) * c.cov_kl * (logp[b, t] - old[b, t]).abs()
            elif name == "lad":
                z, e_u = rho * math.exp(-adv[b] / c.eta), math.exp(adv[b] / c.eta)
                f = {"kl": lambda: z * z.log(), "rkl": lambda: -z.log(), "jf": lambda: (z - 1) * z.log(),
                     "js": lambda: 0.5 * (z * z.log() - (z + 1) * ((z + 1) / 2).log()),
                     "hd": lambda: 0.5 * (z.sqrt() - 1) ** 2, "tv": lambda: 0.5 * (z - 1).abs(),
                     "kl_c": lambda: z * z.log() - z + 1, "rkl_c": lambda: -z.log() + z - 1}[lad.generator(c)]
                out[b, t] = e_u * f()
            else:
                low, high = 1 - c.clip_low, 1 + c.clip_high
                a = adv[b] + min(c.ent_coef * entropy[b, t].item(), abs(adv[b]) / c.ent_kappa) * (name == "entadv")
                if c.dual_clip and a < 0 and rho.item() > c.dual_clip:
                    rho = torch.tensor(c.dual_clip, dtype=torch.float64)
                clipped = min(max(rho.item(), low), high)
                free = rho * a
                out[b, t] = -free if free.item() <= clipped * a else -torch.tensor(clipped, dtype=torch.float64) * a
                if name == "clip_cov" and c.cov_low < cov[b, t] < c.cov_high and free.item() <= clipped * a:
                    out[b, t] = 0   # with a share of 1 every such token is drawn
    return out


CASES = [(name, dict(ratio=ratio)) for name in lad.OBJECTIVES if name not in ("lad", "flowrl") for ratio in ("token", "sequence")]
CASES += [("lad", dict(ratio=ratio, divergence=g)) for g in GENERATORS for ratio in ("token", "sequence")] + [("flowrl", {})]
SHARE = {"clip_cov": dict(cov_share=1.0, cov_low=0.05, cov_high=0.8), "kl_cov": dict(cov_share=0.3), "flowrl": dict(flow_beta=2.0)}


@pytest.mark.parametrize("name,changes", CASES, ids=lambda x: x if isinstance(x, str) else "-".join(x.values()))
def test_gradient_of_every_objective_against_the_plain_formula(name, changes):
    """Through a softmax policy to its logits: relative error of the whole gradient under 1e-6, for the packed and the padded form."""
    torch.manual_seed(1)
    B, T, V, c = 5, 4, 7, cfg(**changes, **SHARE.get(name, {}))
    lengths = torch.tensor([4, 1, 3, 2, 4])
    mask = torch.arange(T)[None] < lengths[:, None]
    targets = torch.randint(V, (B, T))
    old = (0.8 * torch.randn(B, T, V, dtype=torch.float64)).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0, 0.0]], dtype=torch.float64)
    entropy, ref, log_z = torch.rand(B, T, dtype=torch.float64), old + 0.3 * torch.randn(B, T, dtype=torch.float64), torch.randn(B, 1, dtype=torch.float64).expand(B, T)
    adv = lad.advantages(name, rewards, c, {"p": 0.4, "H": 0.6, "H*": 1.0, "drift": ((old - ref) * mask).sum(-1)[None]})[0]

    def gradient(loss_of):
        logits = (0.5 * torch.randn(B, T, V, generator=torch.Generator().manual_seed(2), dtype=torch.float64)).requires_grad_()
        loss_of(logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]).sum().backward()
        return logits.grad

    want = gradient(lambda logp: plain_loss(name, logp, old, adv.tolist(), mask, c, entropy, ref, log_z))
    padded = gradient(lambda logp: lad.policy_loss(name, logp, old, adv, mask, c, entropy=entropy, ref=ref, log_z=log_z)[0])
    seq = torch.arange(B).repeat_interleave(lengths)
    packed = gradient(lambda logp: lad.policy_loss(name, logp[mask], old[mask], adv[seq], torch.ones(len(seq)), c, seq,
                                                       entropy=entropy[mask], ref=ref[mask], log_z=log_z[mask])[0])
    assert want.norm() > 1e-3
    for got in (packed, padded):
        assert (got - want).norm() / want.norm() < 1e-6


def test_clipped_tokens_are_counted_and_carry_no_gradient():
    logp = torch.tensor([[0.5], [-0.5], [0.5], [-0.5]], requires_grad=True)   # ratios 1.65 and 0.61
    adv = torch.tensor([1.0, -1.0, -1.0, 1.0])
    loss, info = lad.policy_loss("grpo", logp, torch.zeros(4, 1), adv, torch.ones(4, 1), CFG)
    loss.sum().backward()
    assert info["clipped"][:, 0].tolist() == [True, True, False, False]
    assert logp.grad[:2].abs().max() == 0 and logp.grad[2:].abs().min() > 0.5
    assert loss[:2, 0].tolist() == pytest.approx([-1.28, 0.8])


def test_clip_cov_takes_a_random_few_and_kl_cov_the_top():
    """At the default share of 2e-4 one token of a small batch: drawn from those in the band, a different one at another call."""
    torch.manual_seed(0)
    logp, adv = torch.linspace(-4, 0, 50).view(50, 1), torch.linspace(-2, 2, 50)
    gone = set()
    for _ in range(20):
        loss, info = lad.policy_loss("clip_cov", logp, logp, adv, torch.ones(50, 1), CFG)
        gone.add(int(info["clipped"][:, 0].nonzero()))
        assert loss[int(info["clipped"][:, 0].nonzero()), 0] == 0
    cov = (logp[:, 0] - logp.mean()) * (adv - adv.mean())
    assert len(gone) > 3 and all(1 < cov[i] < 5 for i in gone)
    base = lad.policy_loss("kl_cov", logp, logp - 0.1, adv, torch.ones(50, 1), cfg(cov_kl=0.0))[0]
    more = lad.policy_loss("kl_cov", logp, logp - 0.1, adv, torch.ones(50, 1), CFG)[0] - base
    assert more.nonzero().tolist() == [[int(cov.argmax()), 0]] and more.max().item() == pytest.approx(0.1, rel=1e-4)


def test_policy_weights_are_the_advantage_and_lads_curve():
    adv = torch.tensor([[2.0, -1.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(lad.policy_weights("grpo", adv, CFG), adv)
    got = lad.policy_weights("lad", adv, cfg(eta=1.0))
    want = [[0.5 * (math.log1p(math.exp(u)) - math.log(2)) for u in (2.0, -1.0, 0.0)]]   # (softplus(u) - log 2)/2
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64))


def test_k3():
    d = torch.tensor([0.0, 0.5, -1.0], dtype=torch.float64)
    assert lad.k3(-d, torch.zeros(3, dtype=torch.float64)).tolist() == pytest.approx([0, math.exp(0.5) - 1.5, math.exp(-1)])
    logp = torch.randn(9, dtype=torch.float64).log_softmax(0)   # unbiased: E_pi[k3] = KL(pi || ref)
    ref = torch.randn(9, dtype=torch.float64).log_softmax(0)
    assert (logp.exp() * lad.k3(logp, ref)).sum().item() == pytest.approx((logp.exp() * (logp - ref)).sum().item())


def test_token_scale_by_hand():
    for changes, want in ((dict(aggregation="token"), [0.1, 0.1]), (dict(aggregation="sequence"), [1 / 8, 1 / 12]),
                          (dict(aggregation="constant", max_tokens=20, prompts=4, group=2, minibatches=2), [1 / 80, 1 / 80])):
        assert [lad.token_scale(cfg(**changes), length, 10, 4) for length in (2, 3)] == pytest.approx(want)


def test_pass_at_k_against_enumeration():
    from itertools import combinations
    for n, c, k in ((5, 2, 1), (5, 2, 3), (6, 0, 4), (6, 6, 2), (7, 3, 5)):
        draws = list(combinations(range(n), k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(any(i < c for i in d) for d in draws) / len(draws))
    for bad in ((4, 0, 5), (4, 5, 1), (4, 1, 0)):
        with pytest.raises(ValueError):
            pass_at_k(*bad)
