"""
The objectives that LAD and FADE are compared with, each with its paper; read when needed.

Nothing of lad.py is imported here: add_rows is given its parts, so that a copy of it (mine.py) is
compared with its own clip. An advantage takes rewards r [B,G], a loss what lad.py's losses take:
(log_ratio, A, cfg, t) -> (loss of each token, whether it is clipped).
"""

import math
from dataclasses import dataclass
from functools import partial

import torch

from harness.ranks import set_whole
from harness.settings import knob


# fmt: off
@dataclass
class Knobs:
    """The settings of these objectives, part of lad.py's Config."""

    success_weight: float = knob(0.1, "w_reinforce: weight of a success; a failure weighs -1", 0)
    pass_k: int = knob(4, "passk: the k of pass@k; 1 would be reinforce", 2)
    ent_coef: float = knob(0.4, "entadv: weight of a token's entropy in its advantage", 0)
    ent_kappa: float = knob(2.0, "entadv: abs(A) over this is all that entropy may add", 1e-3)
    cov_share: float = knob(2e-4, "clip_cov, kl_cov: share of a micro-batch's tokens", 0, 1)
    cov_low: float = knob(1.0, "clip_cov: the tokens clipped have a covariance above this")
    cov_high: float = knob(5.0, "clip_cov: and below this")
    cov_kl: float = knob(1.0, "kl_cov: weight of abs(log pi_theta - log pi_old)", 0)
    flow_beta: float = knob(15.0, "flowrl: beta, the inverse temperature of the target", 0)
    gflow_beta: float = knob(8.0, "gflowrl: beta, the same of a whole response's reward", 0)
    gflow_cap: float = knob(1.2, "gflowrl: ceiling of the weight rho of a response", 1)
    oapl_beta: float = knob(1.0, "oapl: beta, the temperature of the target e^(r/beta)", 1e-3)
    focal_gamma: float = knob(1.0, "f_grpo: gamma of the focus (1 - solve rate)^gamma", 0)
    dppo_delta: float = knob(0.15, "dppo_tv, dppo_kl: divergence at which a token is masked", 0)
    sapo_up: float = knob(1.0, "sapo: temperature of the gate where A > 0", 1e-3)
    sapo_down: float = knob(1.05, "sapo: and elsewhere: higher, gone sooner", 1e-3)
# fmt: on


# ==== 1. Advantages =============================================================================


def is_right(r, state):
    """1 for a success and 0 for a failure, [B,G], by what the verifier said: shaped rewards r may
    punish a right answer for its length."""
    return (state.get("correct", r) > 0.5).to(r)


def reinforce(r, cfg, state):
    return r


def w_reinforce(r, cfg, state):
    """success_weight for a success, -1 for a failure. arXiv 2506.01347."""
    return (1 + cfg.success_weight) * is_right(r, state) - 1


def rloo(r, cfg, state):
    """r less the mean of the others. arXiv 2402.14740."""
    n = r.shape[-1]
    return (r - r.mean(-1, keepdim=True)) * n / (n - 1)


def dr_grpo(r, cfg, state):
    """r - rbar; with a constant denominator, see add_rows. arXiv 2503.20783."""
    return r - r.mean(-1, keepdim=True)


def maxrl(r, cfg, state):
    """(r - rbar)/rbar of 0/1 rewards, 0 where rbar = 0: the gradient of log p. arXiv 2602.02710."""
    right = is_right(r, state)
    rbar = right.mean(-1, keepdim=True)
    return (right - rbar) / (rbar + 1e-6)


def passk(r, cfg, state):
    """k C(n-c, k-1)/C(n-1, k-1) for each of c right among n, 0 for a wrong one: the unbiased
    gradient of pass@k with the leave-one-out baseline of arXiv 2505.15201, times n since ours is a
    mean over samples."""
    n = r.shape[-1]
    k = cfg.pass_k
    right = is_right(r, state)
    if n < k:  # some of the group could not be scored: of so few there is no estimate
        return torch.zeros_like(right)
    wrong = n - right.sum(-1, keepdim=True)  # [B,1]
    chance = 1.0  # that k - 1 of the others hold no right one
    for i in range(k - 1):
        chance = chance * ((wrong - i) / (n - 1 - i)).clamp_min(0)
    return right * k * chance


def f_grpo(grpo, r, cfg, state):
    """(1 - mu)^gamma (r - rbar)/sd, mu the share of the group that is right. F-GRPO, arXiv
    2602.06717, five months before FADE: Power(1 + gamma) on advantages divided by sd."""
    solved = is_right(r, state).mean(-1, keepdim=True)
    return (1 - solved) ** cfg.focal_gamma * grpo(r, cfg, state)


def oapl_advantage(r, cfg, state):
    """r - V, V = beta log mean e^(r/beta): with it pi_old e^((r - V)/beta) sums to 1, but for the
    group's sampling. OAPL, arXiv 2602.19362."""
    scaled = r / cfg.oapl_beta
    value = torch.logsumexp(scaled, -1, keepdim=True) - math.log(r.shape[-1])
    return r - cfg.oapl_beta * value


def gflow_gap(r, cfg, state):
    """beta r - drift less its mean, drift = log pi_old(y)/pi_ref(y): minus the flow gap, with log Z
    as the group's mean. 0 where pi_old = pi_ref e^(beta r)/Z. GFlowRL, arXiv 2607.13394, eq. 4 and
    6."""
    flow = cfg.gflow_beta * r - state["drift"]
    return flow - flow.mean(-1, keepdim=True)


def no_advantage(r, cfg, state):
    """Rewards are measured, and not learned from."""
    return torch.zeros_like(r)


# ==== 2. Losses =================================================================================


def cispo(log_ratio, adv, cfg, t):
    """-sg[clip(rho, 1 - clip_low, 1 + clip_high)] A log pi: where PPO drops a token's gradient,
    here its weight is clipped. CISPO, arXiv 2506.13585, eq. 4 and 5."""
    ratio = log_ratio.detach().exp()
    weight = ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
    return -weight * adv * t["logp"], weight != ratio


def sapo(log_ratio, adv, cfg, t):
    """-f(rho) A, f(rho) = 4/tau sigmoid(tau (rho - 1)), tau = sapo_up where A > 0, else sapo_down:
    a gate, of slope 1 at rho = 1, that closes softly where PPO's clip has a corner. SAPO, arXiv
    2511.20347."""
    tau = torch.full_like(adv, cfg.sapo_down).masked_fill(adv > 0, cfg.sapo_up)
    gate = torch.sigmoid(tau * (log_ratio.exp() - 1)) * 4 / tau
    return -gate * adv, torch.zeros_like(adv, dtype=torch.bool)


def dppo(divergence, log_ratio, adv, cfg, t):
    """-M rho A, M = 0 where D(pi_old || pi_theta) > dppo_delta and the step would lead further
    away: rho > 1 where A > 0, rho < 1 where A < 0. D is of two outcomes, the sampled token and any
    other. DPPO, arXiv 2602.04879, eq. 12."""
    logp, old = t["logp"].detach(), t["old"]
    leads_away = torch.sign(adv) * (logp - old) > 0
    masked = leads_away & (divergence(old, logp) > cfg.dppo_delta)
    return -log_ratio.exp() * adv * ~masked, masked


def binary_tv(log_q, log_p):
    """|q - p|."""
    return (log_q.exp() - log_p.exp()).abs()


def binary_kl(log_q, log_p):
    """q log(q/p) + (1 - q) log((1 - q)/(1 - p))."""
    rest_q = -torch.expm1(log_q)  # 1 - q, exact where q is nearly 1
    rest_p = -torch.expm1(log_p)
    of_rest = rest_q * (rest_q.clamp_min(1e-12).log() - rest_p.clamp_min(1e-12).log())
    return log_q.exp() * (log_q - log_p) + of_rest


def distill(ppo_clip, log_ratio, adv, cfg, t):
    """PPO on A_t = log pi_ref(y_t) - log pi_theta(y_t), without gradient: at sampled tokens, given
    their beginning, that is the gradient of KL(pi_theta || pi_ref). The reference is the teacher.
    https://thinkingmachines.ai/blog/on-policy-distillation/"""
    return ppo_clip(log_ratio, t["ref"] - t["logp"].detach(), cfg, t)


def entadv(ppo_clip, log_ratio, adv, cfg, t):
    """PPO on A + min(a H_t, abs(A)/kappa), H_t the entropy of the policy being trained at that
    token. arXiv 2506.14758."""
    bonus = torch.minimum(cfg.ent_coef * t["entropy"], adv.abs() / cfg.ent_kappa)
    return ppo_clip(log_ratio, adv + bonus, cfg, t)


def covariance(adv, t):
    """(log pi - its mean) (A - its mean) of each token, means over the micro-batch's tokens.
    arXiv 2505.22617."""
    mask = t["mask"]
    tokens = mask.sum().clamp_min(1)
    logp = t["logp"].detach()
    logp = logp - (logp * mask).sum() / tokens
    adv = adv - (adv * mask).sum() / tokens
    return logp * adv


def highest(x, share, mask):
    """True at the `share` of the unmasked elements of x that are highest, at least at one. Without
    waiting for the device: how many these are stays a tensor."""
    n = (share * mask.sum()).floor().clamp_min(1)
    ranks = x.flatten().argsort(descending=True).argsort().view_as(x)
    return ranks < n


def clip_cov(ppo_clip, log_ratio, adv, cfg, t):
    """PPO without the loss of a random few of the tokens whose covariance lies in [cov_low,
    cov_high]. Clip-Cov, arXiv 2505.22617."""
    loss, clipped = ppo_clip(log_ratio, adv, cfg, t)
    cov = covariance(adv, t)
    candidates = (cov > cfg.cov_low) & (cov < cfg.cov_high) & ~clipped & (t["mask"] > 0)
    lots = torch.rand_like(cov).masked_fill(~candidates, -1)
    chosen = highest(lots, cfg.cov_share, t["mask"]) & candidates
    return loss * ~chosen, clipped | chosen


def kl_cov(log_ratio, adv, cfg, t):
    """-rho A, unclipped, and cov_kl abs(log pi - log pi_old) on the tokens of the highest
    covariance. KL-Cov, arXiv 2505.22617."""
    cov = covariance(adv, t).masked_fill(t["mask"] == 0, -math.inf)
    chosen = highest(cov, cfg.cov_share, t["mask"])
    penalty = cfg.cov_kl * chosen * (t["logp"] - t["old"]).abs()
    return -log_ratio.exp() * adv + penalty, torch.zeros_like(chosen)


def flowrl(sum_in_sequence, log_ratio, adv, cfg, t):
    """w (log Z(x) + (log pi - log pi_ref)/T - beta A)^2 of whole sequences of T tokens,
    w = min(rho, 10) without gradient. FlowRL, arXiv 2509.15207."""

    def total(x):
        return sum_in_sequence(x * t["mask"], t["seq"])

    log_rho = total(t["logp"] - t["old"]).detach()
    w = log_rho.clamp(-20, math.log(10)).exp()
    length = total(torch.ones_like(adv)).clamp_min(1)
    gap = t["log_z"] + total(t["logp"] - t["ref"]) / length - cfg.flow_beta * adv
    return w * gap**2, torch.zeros_like(adv, dtype=torch.bool)


def gflowrl(sum_in_sequence, log_ratio, adv, cfg, t):
    """w (log pi/pi_old - clip(A, -clip_high, clip_low))^2 of whole sequences, w = min(rho,
    gflow_cap) without gradient, A as gflow_gap has it. The paper clips the gap, -A, into
    [-clip_low, clip_high]. GFlowRL, arXiv 2607.13394, eq. 7 and 8."""
    log_rho = sum_in_sequence((t["logp"] - t["old"]) * t["mask"], t["seq"])
    w = log_rho.detach().clamp(-20, math.log(cfg.gflow_cap)).exp()
    goal = adv.clamp(-cfg.clip_high, cfg.clip_low)
    return w * (log_rho - goal) ** 2, goal != adv


def oapl(sum_in_sequence, log_ratio, adv, cfg, t):
    """(beta log pi/pi_old - A)^2 of whole sequences, A = r - V: LAD's fixed point pi_old e^(r/beta)
    by least squares in the logarithm. OAPL, arXiv 2602.19362, eq. 3."""
    log_rho = sum_in_sequence((t["logp"] - t["old"]) * t["mask"], t["seq"])
    return (cfg.oapl_beta * log_rho - adv) ** 2, torch.zeros_like(adv, dtype=torch.bool)


# ==== 3. FlowRL's head ==========================================================================


def log_z_head(width):
    """Three layers from a prompt's mean hidden state [.., H] to log Z [.., 1]."""
    from torch.nn import GELU, LayerNorm, Linear, Sequential

    return Sequential(
        Linear(width, width),
        GELU(),
        LayerNorm(width),
        Linear(width, width),
        GELU(),
        LayerNorm(width),
        Linear(width, 1),
    )


def initialise_log_z(head, width, seed, device):
    """Weights that are alike on every rank, moved to its shards. It is small: made whole first."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        initial = log_z_head(width).state_dict()
    for name, p in head.named_parameters():
        set_whole(p, initial[name], device)


def log_z_of_prompts(head, hidden, prompt_spans):
    """log Z [S] of each sample's prompt: the head on the mean of hidden [N,H] over the prompt's
    span (start, end) in the row. In fp32: bf16 cannot count beyond 256."""
    means = {}  # samples of one prompt share its span
    for start, end in prompt_spans:
        if (start, end) not in means:
            means[start, end] = hidden[start:end].float().mean(0)
    pooled = torch.stack([means[span] for span in prompt_spans])  # [S,H]
    return head(pooled.to(hidden.dtype))[:, 0].float()


# ==== 4. The rows ===============================================================================


def add_rows(objectives, Objective, grpo, ppo_clip, sum_in_sequence):
    """Add a row for each of these to `objectives`, {name: Objective}.

    An objective may bring defaults of Config that make it that method; presets and flags go first.
    """

    def row(name, advantage=grpo, loss=ppo_clip, **more):
        objectives[name] = Objective(advantage, loss, **more)

    # Advantages, under PPO's loss
    row("reinforce", reinforce, learns_from_equal=True)
    row("w_reinforce", w_reinforce, learns_from_equal=True)
    row("rloo", rloo)
    row("dr_grpo", dr_grpo, defaults=dict(aggregation="constant"))
    row("maxrl", maxrl)
    row("passk", passk)
    row("f_grpo", partial(f_grpo, grpo))

    # GRPO's advantage under PPO's loss, with settings of their own. DAPO, arXiv 2503.14476
    row(
        "dapo",
        defaults=dict(
            aggregation="token",
            clip_low=0.2,
            clip_high=0.28,
            zero_variance="refill",
            overlong="shape",
        ),
    )
    # GSPO, arXiv 2507.18071, eq. 5 and 7
    row(
        "gspo",
        local=False,
        ratios=("mean",),
        defaults=dict(
            ratio="mean",
            aggregation="sequence",
            clip_low=3e-4,
            clip_high=4e-4,
        ),
    )

    # GRPO's advantage, under other losses of the tokens' ratios. CISPO has no lower bound; for the
    # upper one its paper names no number
    row(
        "cispo",
        loss=cispo,
        ratios=("token",),
        defaults=dict(clip_low=1.0, clip_high=4.0),
    )
    row(
        "sapo",
        loss=sapo,
        ratios=("token",),
        defaults=dict(aggregation="sequence"),
    )
    row(
        "dppo_tv",
        loss=partial(dppo, binary_tv),
        ratios=("token",),
        defaults=dict(dppo_delta=0.15),
    )
    row(
        "dppo_kl",
        loss=partial(dppo, binary_kl),
        ratios=("token",),
        defaults=dict(dppo_delta=0.05),
    )
    row("entadv", loss=partial(entadv, ppo_clip))

    # local = False: the covariance is over a micro-batch's tokens
    row(
        "clip_cov",
        loss=partial(clip_cov, ppo_clip),
        local=False,
        defaults=dict(clip_low=1.0, clip_high=1.0),
    )
    # in a single update it would be grpo
    row(
        "kl_cov",
        loss=kl_cov,
        local=False,
        defaults=dict(cov_share=2e-3, minibatches=8),
    )

    # Least squares of whole responses
    row(
        "flowrl",
        loss=partial(flowrl, sum_in_sequence),
        needs=("ref", "log_z"),
        local=False,
        of_sequences=True,
        learns_from_equal=True,
        defaults=dict(aggregation="sequence"),
    )
    row(
        "gflowrl",
        gflow_gap,
        partial(gflowrl, sum_in_sequence),
        needs=("ref", "drift"),
        local=False,
        of_sequences=True,
        learns_from_equal=True,
        defaults=dict(aggregation="sequence"),
    )
    # without importance weights, which its paper does away with
    row(
        "oapl",
        oapl_advantage,
        partial(oapl, sum_in_sequence),
        local=False,
        of_sequences=True,
        learns_from_equal=True,
        defaults=dict(aggregation="sequence", tis_cap=0.0),
    )

    # A teacher instead of rewards
    row(
        "distill",
        no_advantage,
        partial(distill, ppo_clip),
        needs=("ref",),
        learns_from_equal=True,
        ratios=("token",),
    )
