r"""
bandit.py: what each objective of lad.py converges to on a problem whose answer is known, and which
samples it works on. No GPU, no vLLM.

    python bandit.py                              # every objective on 50 arms: tables, bandit.png
    python bandit.py --objectives grpo,lad        # the same of some
    python bandit.py --landscape author           # the same on the toy of LAD's first author
    python bandit.py --masses                     # gradient mass of successes and failures against
                                                  # solve rate: masses.png
    python bandit.py --check mine.py:objective    # both, for one of your own, in seconds
    python bandit.py --help                       # the rest

The bandit. A response is one token, one of 50 arms; r(a), in [0, 1], is a sum of three Gaussians,
and A(a) is GRPO's advantage of the group that holds each arm once: r standardised over the arms.
The policy is a softmax of 50 logits, uniform at first; Adam, lr 5e-3, 4,000 steps. The target is
softmax(A/eta), LAD's fixed point (arXiv 2602.20132) where the behaviour policy pi_old is the
uniform one. Six regimes: pi_old fixed, refreshed every k steps, or every step; the exact
expectation under pi_old, or 64 samples a step. What an objective sees of r:

    A      rows with a loss of their own (lad, entadv, clip_cov, kl_cov, cispo, sapo, dppo_tv,
           dppo_kl, flowrl, and gflowrl and oapl, which make their A of r(a) themselves), rows with
           GRPO's advantage, and what needs a reference: A(a) itself, as in LAD's paper, not
           standardised anew over each group, which would move the target.
    0/1    transforms of verifiable rewards: r ~ Bernoulli(r(a)) in groups of G = 8. The exact
           expectation is over the arm, its reward, and the successes c ~ Binomial(G - 1, p) among
           the other seven, p = E_pi_old[r].

The reference policy is the uniform one, and so is distill's teacher. flowrl has beta = 1/eta, which
makes its own target, ref e^(beta A), softmax(A/eta) too, and so have gflowrl and oapl, whose beta
goes with r as it is; flowrl's log Z is a learned scalar. fade's p and H are those of pi_old.
Covariances (clip_cov, kl_cov) are over a run's 50 arms or its samples; one of these is chosen, a
larger share than the paper's 2e-4.

The author's landscape is that of a later repository of LAD's first author (WindyLee0822/SEAL,
toy_example.py): broad overlapping peaks, r min-max normalised, 32 samples a step, eta 1. The rest
is as above and not as there: that file starts from two peaks of its own and samples at temperature
2, takes lr 2e-3 and 2,000 steps, turns r into softmax(r) and only centres it.

The masses. At solve rate p (q = 1 - p), 0/1 rewards, groups of G: m_S = p E[W | success],
m_F = -q E[W | failure], W = -d loss/d log pi at rho = 1: A for a policy gradient,
-f'(e^(-A/eta)) for LAD. Exact: enumerated over c ~ Binomial(G - 1, p).
"""

import dataclasses
import importlib.util
import itertools
import math
from collections import namedtuple
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import lad
from harness import command
from harness.settings import did_you_mean, die, one_line

ARMS = 50
STEPS = 4000
RATE = 5e-3
GROUP = 8
REFRESH = 100  # steps between refreshes of pi_old in "every k"

BEHAVIOURS = ("fixed", "every k", "every step")
REGIMES = [(behaviour, sampled) for sampled in (False, True) for behaviour in BEHAVIOURS]
EXACT = len(BEHAVIOURS)  # regimes before this one take the exact expectation


@dataclasses.dataclass(frozen=True)
class Landscape:
    """The reward of each arm, and what goes with it."""

    peaks: tuple  # arm and height of each Gaussian
    width: float  # their standard deviation, in arms
    near: int  # a mode's mass is that of the arms this near to its peak
    min_max: bool  # are rewards stretched to 0..1? Otherwise they are cut at 1
    samples: int  # a step, in the sampled regimes
    eta: float  # temperature of the target


LANDSCAPES = {
    "ours": Landscape(
        peaks=((8, 1.0), (24, 0.92), (40, 0.84)),
        width=2.5,
        near=5,
        min_max=False,
        samples=64,
        eta=0.5,
    ),
    "author": Landscape(
        peaks=((10, 4.0), (25, 5.0), (40, 4.0)),
        width=5.0,
        near=7,
        min_max=True,
        samples=32,
        eta=1.0,
    ),
}
OURS = LANDSCAPES["ours"]

NAMED = ("alpha", "delta", "focal_gamma", "success_weight", "pass_k", "ent_coef", "ent_kappa")
ALSO = ", ".join(f"{key} {getattr(lad.Config, key):g}" for key in NAMED)

# binary: sees 0/1; stateful: its advantage may read p and H
Row = namedtuple("Row", "label name cfg binary stateful")
# Of all runs at one step, each [rows, regimes, ..]: log pi_old and pi_old of the arms, the arms
# drawn, the weight of each arm in the loss, the policy's entropy, log Z, pi_old's solve rate
Batch = namedtuple("Batch", "old pi arms weight entropy log_z solved")
# Of all runs: of each arm where A is seen; where 0/1 is, by outcome (exact) and by sample (sampled)
Advantages = namedtuple("Advantages", "of_arms of_outcomes of_samples")


# ==== 1. The problem ============================================================================


def rewards(landscape=OURS):
    """r [ARMS] in [0, 1], float64 like all that follows."""
    arms = torch.arange(ARMS).double()
    total = 0
    for centre, height in landscape.peaks:
        distance = (arms - centre) / landscape.width
        total = total + height * torch.exp(-0.5 * distance**2)
    if landscape.min_max:
        return (total - total.min()) / (total.max() - total.min())
    return total.clamp_max(1)


def target(eta, landscape=OURS):
    """softmax(A/eta) [ARMS]."""
    r = rewards(landscape)
    adv = lad.advantages("grpo", r[None], lad.Config(), {})[0]
    return torch.softmax(adv / eta, 0)


def mode_masses(pi, landscape=OURS):
    """[..., ARMS] -> [..., modes]"""
    shares = []
    for centre, _ in landscape.peaks:
        first = centre - landscape.near
        last = centre + landscape.near
        shares.append(pi[..., first : last + 1].sum(-1))
    return torch.stack(shares, -1)


def entropy(pi):
    """In nats: [..., ARMS] -> [...]"""
    return -torch.special.xlogy(pi, pi).sum(-1)


# ==== 2. Rows ===================================================================================


def is_binary(objective):
    """Is it a transform of verifiable rewards, under PPO's loss?"""
    own_advantage = objective.advantage is not lad.OBJECTIVES["grpo"].advantage
    return objective.loss is lad.ppo_clip and own_advantage and not objective.needs


def make_row(label, name, eta, landscape=OURS, **changes):
    """A Row whose objective, where it has a target of its own, has softmax(A/eta)."""
    objective = lad.OBJECTIVES[name]
    temperature = eta * rewards(landscape).std().item()  # of r, which is not standardised
    settings = dict(objective.defaults)
    settings.update(
        eta=eta,
        flow_beta=1 / eta,
        gflow_beta=1 / temperature,
        oapl_beta=temperature,
        ratio="token",
        aggregation="token",
    )
    settings.update(changes)
    cfg = lad.Config(**settings)
    stateful = name == "fade" or ":" in name  # the user's, FILE.py:NAME, may be
    return Row(label, name, cfg, is_binary(objective), stateful)


def make_rows(eta, names=None, landscape=OURS):
    """A Row for each of `names` (default: all of lad.OBJECTIVES, those with one loss together); lad
    once for each generator, grpo clipped and not."""
    rows = []
    for name in names or sorted(lad.OBJECTIVES, key=place):
        if name == "lad":
            for divergence in lad.KNOBS["divergence"].metadata["choices"]:
                rows.append(
                    make_row(f"lad {divergence}", name, eta, landscape, divergence=divergence)
                )
            continue
        if name == "grpo":
            rows.append(
                make_row("grpo unclipped", name, eta, landscape, clip_low=1.0, clip_high=1e9)
            )
        rows.append(make_row(name.rpartition(":")[2], name, eta, landscape))
    return rows


def place(name):
    """Where a row stands in the tables: lad, what sees A, what sees 0/1."""
    return name != "lad", name not in ("grpo", "lad_anchor"), is_binary(lad.OBJECTIVES[name])


def token_loss(row, logp, old, adv, entropy, log_z):
    """lad.policy_loss of tokens that are a response each, like logp; what else there is broadcasts
    to it."""

    def each(x):
        return x.expand(logp.shape)[..., None]  # sequences of one token

    loss, _ = lad.policy_loss(
        row.name,
        each(logp),
        each(old),
        each(adv),
        torch.ones_like(logp)[..., None],
        row.cfg,
        entropy=each(entropy),
        ref=torch.full_like(logp, -math.log(ARMS))[..., None],
        log_z=each(log_z),
    )
    return loss[..., 0]


# ==== 3. Groups of 0/1 rewards, enumerated ======================================================


def every_group(G):
    """[2G, G]: groups whose last is a failure beside c = 0..G-1 successes, then those whose first
    is a success beside c others."""
    c = torch.arange(G)[:, None]
    last_fails = torch.arange(G) < c
    first_succeeds = torch.arange(G) <= c
    return torch.cat([last_fails, first_succeeds]).double()


def outcomes(adv):
    """Of the advantages [..., 2G, G] of every_group, those of that failure and of that success:
    [..., 2, G]."""
    G = adv.shape[-1]
    return torch.stack([adv[..., :G, -1], adv[..., G:, 0]], -2)


def binomial(n, p):
    """P(c successes of n), c = 0..n, at p [...]: [..., n + 1]."""
    c = torch.arange(n + 1)
    ways = [float(math.comb(n, k)) for k in range(n + 1)]
    ways = torch.tensor(ways, dtype=torch.float64)
    p = p[..., None]
    return ways * p**c * (1 - p) ** (n - c)


def masses(row, state, p, G=GROUP):
    """(m_S, m_F), each like p [N]; the policy uniform and its own reference, an entropy of 1 nat
    (entadv), log Z = 0 (flowrl)."""
    known = dict(state, drift=torch.zeros(2 * G, G))
    adv = lad.advantages(row.name, every_group(G), row.cfg, known)
    adv = outcomes(adv)  # [2,G]

    # The weight W of that failure and of that success
    logp = torch.full_like(adv, -math.log(ARMS)).requires_grad_()
    one_nat = torch.ones_like(adv)
    log_z = torch.zeros_like(adv)
    loss = token_loss(row, logp, logp.detach(), adv, one_nat, log_z)
    weight = -torch.autograd.grad(loss.sum(), logp)[0]  # [2,G]

    # Its mean over the others
    mean = binomial(G - 1, p) @ weight.T  # [N,2]
    failure, success = mean.unbind(-1)
    return p * success, -(1 - p) * failure


# ==== 4. Training ===============================================================================
# All rows in all regimes at once: one tensor of logits, one Adam.


def advantage(row, rewards, states):
    """Advantages of rewards [regimes, ..., G], with each regime's own state if the row may read
    it."""

    def flat(r, state):
        groups = r.reshape(-1, r.shape[-1])
        return lad.advantages(row.name, groups, row.cfg, state).view(r.shape)

    if not row.stateful:
        return flat(rewards, states[0])
    of_regimes = [flat(r, s) for r, s in zip(rewards, states, strict=False)]
    return torch.stack(of_regimes)


def loss_of_A(row, logp, b, adv):
    """Summed over the runs of rows with one loss that see A: logp, adv [rows, regimes, ARMS]."""
    # Token by token: samples only change the weights of the arms
    objective = lad.OBJECTIVES[row.name]
    arguments = (logp, b.old, adv, b.entropy, b.log_z)
    if objective.local or objective.of_sequences:
        loss = token_loss(row, *arguments)
        return (b.weight * loss).sum()

    # Over a batch's tokens: run by run, the exact ones first
    of_run = torch.vmap(partial(token_loss, row), randomness="different")
    runs = [x[:, :EXACT].flatten(0, 1) for x in arguments]
    exact = of_run(*runs)
    weight = b.weight[:, :EXACT].flatten(0, 1)

    # The sampled ones
    drawn = [x[:, EXACT:].gather(-1, b.arms) for x in arguments[:3]]
    drawn += [x[:, EXACT:] for x in arguments[3:]]
    runs = [x.flatten(0, 1) for x in drawn]
    sampled = of_run(*runs)
    return (weight * exact).sum() + sampled.sum() / b.arms.shape[-1]


def loss_of_rewards(row, logp, b, of_outcomes, of_samples, r):
    """The same of rows that see 0/1, with their Advantages and the rewards r [ARMS]."""

    def wide(x):  # [rows, EXACT, ARMS, failure or success, c of the others]
        return x[:, :EXACT, :, None, None]

    # Exact: over the arm, its reward, and the successes of the others
    own = torch.stack([1 - r, r], -1)[..., None]
    others = binomial(GROUP - 1, b.solved[:, :EXACT])
    chance = wide(b.pi) * own * others[:, :, None, None]
    logp_each = wide(logp).expand(chance.shape)
    adv = of_outcomes[:, :, None]
    loss = token_loss(row, logp_each, wide(b.old), adv, wide(b.entropy), wide(b.log_z))
    exact = (chance * loss).sum()

    # Sampled
    logp = logp[:, EXACT:].gather(-1, b.arms)
    old = b.old[:, EXACT:].gather(-1, b.arms)
    entropy = b.entropy[:, EXACT:]
    log_z = b.log_z[:, EXACT:]
    sampled = token_loss(row, logp, old, of_samples, entropy, log_z)
    return exact + sampled.sum() / b.arms.shape[-1]


def spans_of_one_loss(rows):
    """Slices of neighbouring rows that lad.policy_loss can take at once."""

    def key(i):
        row = rows[i]
        loss = lad.OBJECTIVES[row.name].loss
        return loss, row.binary, dataclasses.astuple(row.cfg)

    spans = []
    for _, group in itertools.groupby(range(len(rows)), key):
        members = list(group)
        spans.append(slice(members[0], members[-1] + 1))
    return spans


def draw(old, logp, log_z, r, samples):
    """(Batch, the 0/1 rewards [rows, sampled regimes, samples] of what was drawn) of one step."""
    pi = old.exp()
    exact = pi[:, :EXACT]

    # Arms of the sampled regimes, and whether they were right
    edges = pi[:, EXACT:].cumsum(-1)
    lots = torch.rand(*edges.shape[:2], samples, dtype=torch.float64)
    arms = torch.searchsorted(edges, lots).clamp_max(ARMS - 1)
    success = torch.bernoulli(r[arms])

    # The weight of each arm: its probability, or its share of the samples
    share = torch.full_like(lots, 1 / samples)
    drawn = torch.zeros_like(edges).scatter_add_(-1, arms, share)
    weight = torch.cat([exact, drawn], 1)
    solved = torch.cat([exact @ r, success.mean(-1)], 1)
    surprise = -(logp.exp() * logp).detach().sum(-1, keepdim=True)
    return Batch(old, pi, arms, weight, surprise, log_z, solved), success


def move_states(rows, states, b):
    """What the advantages of a run may read of it: p and H, and the drift from the reference."""
    drift = b.old + math.log(ARMS)
    for i, row in enumerate(rows):
        if row.stateful:
            for j, state in enumerate(states[i]):
                seen = -(b.weight[i, j] * b.old[i, j]).sum().item()
                lad.update_state(state, b.solved[i, j].item(), seen, row.cfg)
                state["drift"] = drift[i, j : j + 1]
        elif not row.binary:
            states[i][0]["drift"] = drift[i]


def move_advantages(rows, states, found, success, r, is_first):
    """Write into `found`, the Advantages of all runs, what this step changes of them."""
    groups = every_group(GROUP).expand(EXACT, -1, -1)
    arms = r.expand(len(REGIMES), 1, -1)
    for i, row in enumerate(rows):
        needs_ref = "ref" in lad.OBJECTIVES[row.name].needs
        moves = is_first or row.stateful or needs_ref
        if moves and row.binary:
            found.of_outcomes[i] = outcomes(advantage(row, groups, states[i]))
        if row.binary:
            drawn = success[i].unflatten(-1, (-1, GROUP))
            found.of_samples[i] = advantage(row, drawn, states[i][EXACT:]).flatten(-2)
        if moves and not row.binary:
            found.of_arms[i] = advantage(row, arms, states[i])[:, 0]


def train(rows, seed, refresh, steps, landscape=OURS):
    """The learned distributions [rows, REGIMES, ARMS]."""
    torch.manual_seed(seed)
    r = rewards(landscape)
    R = len(rows)
    C = len(REGIMES)
    zeros = partial(torch.zeros, R, dtype=torch.float64)

    # The policies and their log Z; pi_old, and how many steps it stays
    logits = zeros(C, ARMS).requires_grad_()
    log_z = zeros(C, 1).requires_grad_()
    optimizer = torch.optim.Adam([logits, log_z], RATE)
    old = zeros(C, ARMS) - math.log(ARMS)
    every = {"fixed": steps, "every k": refresh, "every step": 1}
    period = torch.tensor([every[behaviour] for behaviour, _ in REGIMES])[:, None]

    # Advantages, and what they may read: one state for all regimes where that is the drift alone
    found = Advantages(
        of_arms=zeros(C, ARMS),
        of_outcomes=zeros(EXACT, 2, GROUP),
        of_samples=zeros(C - EXACT, landscape.samples),
    )
    states = []
    for row in rows:
        if row.stateful:
            states.append([lad.new_state() for _ in REGIMES])
        else:
            states.append([{}] * C)

    spans = spans_of_one_loss(rows)
    for step in tqdm(range(steps), f"bandit    {R} x {C} runs", leave=False, disable=None):
        logp = logits.log_softmax(-1)
        old = torch.where(step % period == 0, logp.detach(), old)
        batch, success = draw(old, logp, log_z, r, landscape.samples)
        move_states(rows, states, batch)
        move_advantages(rows, states, found, success, r, step == 0)

        # One step of all runs
        loss = 0.0
        for span in spans:
            row = rows[span.start]
            b = Batch(*(x[span] for x in batch))
            of_arms, of_outcomes, of_samples = (x[span] for x in found)
            if row.binary:
                part = loss_of_rewards(row, logp[span], b, of_outcomes, of_samples, r)
            else:
                part = loss_of_A(row, logp[span], b, of_arms)
            loss = loss + part
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return logits.detach().softmax(-1)


# ==== 5. What is printed ========================================================================

LEARNED = (
    "\n"
    "LAD's distribution is kept by the anchor, not by the loss: while pi_old stays, every "
    "smooth generator ends at softmax(A/eta), three modes and all.\n"
    "Refresh pi_old and e^(A/eta) compounds until LAD has collapsed onto the best arm, as "
    "GRPO does; clipped GRPO stands still only because pi_old does.\n"
    "What is tied to a policy that never moves (lad_anchor and flowrl, to the reference) "
    "keeps the distribution while pi_old is refreshed at every step."
)

# Mark -> colour, words
VERDICTS = {
    "=": ("#0072b2", "is the target"),
    "!": ("#d55e00", "collapsed"),
    " ": ("#e69f00", "neither"),
}


def verdict(pi, goal, landscape=OURS):
    """'=': each mode of pi [ARMS] is within 10% of its mass in the target. '!': entropy under
    log 2, fewer than two arms' worth."""
    ratios = mode_masses(pi, landscape) / mode_masses(goal, landscape)
    off = (ratios - 1).abs()
    if (off < 0.1).all():
        return "="
    return "!" if entropy(pi) < math.log(2) else " "


def cell(pi, goal, landscape):
    distance = 0.5 * (pi - goal).abs().sum()
    percent = [f"{100 * m:.0f}" for m in mode_masses(pi, landscape)]
    shares = "/".join(percent)
    mark = verdict(pi, goal, landscape)
    return f"{distance:.3f} {entropy(pi):.2f} {shares:>8} {mark}"


def print_line(label, sees, cells):
    text = f"{label:<16}{sees:<4}" + "".join(f"  {c:<23}" for c in cells)
    print(text.rstrip())


def show_bandit(rows, learned, eta, refresh, landscape=OURS):
    goal = target(eta, landscape)
    uniform = torch.full_like(goal, 1 / ARMS)
    print(
        f"{ARMS} arms, Adam {RATE:g}, {STEPS} steps, eta {eta:g}, k {refresh}. Cell: total "
        "variation to softmax(A/eta), entropy (nats), % of mass\n"
        "at each mode; '=' is the target, '!' collapsed. "
        f"The target: {cell(goal, goal, landscape)}; uniform: {cell(uniform, goal, landscape)}"
    )
    columns = ["pi_old fixed", "refreshed every k steps", "refreshed every step"]
    for first, title in ((0, "exact"), (EXACT, f"{landscape.samples} samples")):
        print_line(f"\n{title:<16}", "sees", columns)
        for row, runs in zip(rows, learned, strict=True):
            sees = "0/1" if row.binary else "A"
            shown = runs[first : first + EXACT]
            print_line(row.label, sees, [cell(pi, goal, landscape) for pi in shown])
    if len(rows) > 1:
        print(LEARNED)
    else:
        print()
        show_regimes(learned[0], goal, landscape)


def show_regimes(learned, goal, landscape):
    """What became of one row, in words."""
    for (behaviour, sampled), pi in zip(REGIMES, learned, strict=True):
        way = "sampled" if sampled else "exact"
        regime = f"{behaviour}, {way}:"
        _, words = VERDICTS[verdict(pi, goal, landscape)]
        print(
            f"pi_old {regime:<21}{words:<15}{entropy(pi).exp():5.1f} arms' worth, arm "
            f"{pi.argmax()} has {pi.max():.3f}"
        )


# What reads p and H, at two stages of training
STAGES = {
    ", p̄ 0.2, H = H*": {"p": 0.2, "H": 1.0, "H*": 1.0},
    ", p̄ 0.8, H = H* - 0.5": {"p": 0.8, "H": 0.5, "H*": 1.0},
}


def mass_rows(eta, names=None):
    """[(title, Row, state)]: each row once (clipping does nothing at rho = 1), what reads p and H
    at two stages of training."""
    cases = []
    for row in make_rows(eta, names or list(lad.OBJECTIVES)):
        if row.label == "grpo unclipped":
            continue
        stages = STAGES if row.stateful else {"": {}}
        cases += [(row.label + stage, row, state) for stage, state in stages.items()]
    return cases


def show_masses(table, eta):
    at = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64)
    print(
        f"\nm_S / m_F at solve rate p: 0/1 rewards, G {GROUP}, eta {eta:g}, {ALSO};\n"
        "rho = 1, an entropy of 1 nat (entadv), log Z = 0 (flowrl)"
    )
    heads = [f"{p:^18.2f}" for p in at.tolist()]
    print(f"{'p':<28}" + "".join(heads))
    for title, row, state in table:
        pairs = torch.stack(masses(row, state, at), 1)
        pairs = pairs.add(0.0)  # -0 becomes 0
        cells = [f"{s:8.3f} /{f:7.3f} " for s, f in pairs.tolist()]
        print(f"{title:<28}" + "".join(cells))


# ==== 6. What is drawn ==========================================================================


def picture(path, draw, panels, height, share_y, note):
    """Small panels, five in a row, each `height` inches high: draw(ax, *panel) returns the legend's
    handles. panels: [(title, ...)]."""
    from matplotlib.figure import Figure

    wide = min(len(panels), 5)
    high = math.ceil(len(panels) / 5)
    size = (max(2.6 * wide, 8), height * high + 1)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(high, wide, sharex=True, sharey=share_y, squeeze=False).flat
    for ax, (title, *panel) in zip(axes, panels, strict=False):  # the last row may be shorter
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=7)
        ax.set_title(title, fontsize=9, pad=2, fontweight="bold")
        handles = draw(ax, *panel)
    figure.legend(handles=handles, loc="outside upper center", ncols=5, fontsize=9, frameon=False)
    figure.supxlabel(note, fontsize=8)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    print(f"wrote     {path}")


def draw_bandit(ax, goal, refresh, landscape, runs):
    """The three behaviours of pi_old one above the other, each with target, learned (exact) and
    learned (sampled)."""
    from matplotlib.patches import Patch

    arm = torch.arange(ARMS)
    lifts = [-1.1 * j for j in range(EXACT)]
    for base, pi, sampled in zip(lifts, runs[:EXACT], runs[EXACT:], strict=True):
        colour, _ = VERDICTS[verdict(pi, goal, landscape)]
        top = base + pi.sqrt()
        ax.fill_between(arm, base, base + goal.sqrt(), step="mid", color="0.75", lw=0)
        ax.fill_between(arm, base, top, step="mid", color=colour, alpha=0.35, lw=0)
        ax.plot(arm, top, drawstyle="steps-mid", color=colour, lw=1.1)
        label = f"learned from {landscape.samples} samples a step"
        dots = ax.plot(arm, base + sampled.sqrt(), ".", color="black", ms=1.8, label=label)
    ax.set(
        xlim=(-1, ARMS),
        ylim=(lifts[-1] - 0.02, 1.04),
        xticks=[centre for centre, _ in landscape.peaks],
    )
    ax.set(
        yticks=[base + 0.3 for base in lifts],
        yticklabels=["π_old\nfixed", f"every\n{refresh}", "every\nstep"],
    )

    handles = [Patch(color="0.75", label="target softmax(A/η)")]
    for colour, text in VERDICTS.values():
        handles.append(Patch(color=colour, alpha=0.6, label=f"learned: {text}"))
    return handles + dots


def draw_masses(ax, row, state):
    """m_S and m_F against p, to the panel's own scale; behind them p q, mean-only GRPO at large G,
    as high as the panel."""
    p = torch.linspace(0.005, 0.995, 199, dtype=torch.float64)
    success, failure = masses(row, state, p)
    hill = 4 * p * (1 - p) * torch.cat([success, failure]).max()
    behind = ax.fill_between(p, hill, color="0.9", lw=0, label="p q (mean-only GRPO), scaled")
    up = ax.plot(p, success, color="#0072b2", lw=1.8, label="m_S: pushes successes up")
    down = ax.plot(p, failure, "--", color="#d55e00", lw=1.8, label="m_F: pushes failures down")
    ax.axhline(0, color="0.4", lw=0.6)
    ax.set(xlim=(0, 1), xticks=(0, 0.5, 1))
    ax.locator_params(axis="y", nbins=3)
    return [behind, *up, *down]


# ==== 7. An objective of your own ===============================================================


def load_objective(spec):
    """Enter FILE.py:NAME, a row of a copy of lad.py (with that file's knobs) or any name in it,
    into lad.OBJECTIVES once it works on every group of 0/1 rewards."""
    file, _, name = spec.rpartition(":")
    if not file:
        die(f"--check {spec}: expected FILE.py:NAME")
    if not Path(file).is_file():
        die(f"--check {spec}: there is no file {file}")
    module = import_file(file)

    # The name: a row of its table, or a function
    known = vars(module) | vars(module).get("OBJECTIVES", {})
    if name not in known:
        public = [word for word in known if not word.startswith("_")]
        die(f"{file} has no {name!r}{did_you_mean(name, public)}")
    lad.Config = getattr(module, "Config", lad.Config)
    lad.OBJECTIVES[spec] = as_objective(known[name], module)

    # Does it work, on rewards from all 0 to all 1?
    r = every_group(GROUP)
    state = {
        "p": 0.5,
        "H": 1.0,
        "H*": 0.5,
        "drift": torch.zeros_like(r),
    }
    adv = lad.advantages(spec, r, lad.Config(), state)
    fits = isinstance(adv, torch.Tensor) and adv.shape == r.shape
    if not fits or not adv.isfinite().all():
        shape = list(getattr(adv, "shape", []))
        die(
            f"{spec}: expected finite advantages like the rewards {list(r.shape)}, got "
            f"{type(adv).__name__} {shape}"
        )


def import_file(file):
    """A user's Python file as a module of its own."""
    source = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)
    return module


def as_objective(found, module):
    """A row of lad.OBJECTIVES of what a file calls one: an advantage, or an Objective of its own
    copy of lad.py, whose ppo_clip and grpo are ours."""
    if not hasattr(found, "advantage"):
        return lad.Objective(advantage=found)
    ours = {}
    for name in ("grpo", "ppo_clip"):
        ours[id(getattr(module, name, None))] = getattr(lad, name)
    fields = {}
    for field in dataclasses.fields(found):
        value = getattr(found, field.name)
        fields[field.name] = ours.get(id(value), value)
    return lad.Objective(**fields)


# ==== 8. main ===================================================================================


def parse(argv):
    parser = command.parser(__doc__)
    add = parser.add_argument
    add("--masses", action="store_true", help="gradient masses against solve rate")
    own = "an advantage function (r [B,G], cfg, state) -> A [B,G], or a lad.Objective"
    add("--check", metavar="FILE.py:NAME", help=own)
    add("--objectives", metavar="NAME,..", help="of lad.OBJECTIVES (all)")
    add("--landscape", choices=tuple(LANDSCAPES), default="ours", help="the rewards (ours)")
    add("--eta", type=float, help="temperature of the target (0.5; 1 on the author's landscape)")
    every = f"steps between refreshes of pi_old in 'every k' ({REFRESH})"
    add("--refresh", type=int, default=REFRESH, metavar="K", help=every)
    add("--seed", type=int, default=0, help="of the samples (0)")
    where = "where the pictures go (runs/bandit)"
    add("--out", type=Path, default=Path("runs/bandit"), metavar="DIR", help=where)
    args = parser.parse_args(argv)

    # What argparse cannot check
    if args.eta is None:
        args.eta = LANDSCAPES[args.landscape].eta
    if not 0.05 <= args.eta <= 100 or args.refresh < 1:
        die(f"--eta {args.eta:g} --refresh {args.refresh}: expected 0.05 to 100, and at least 1")
    if args.check and args.objectives:
        die("--check names an objective already: leave --objectives out")
    if args.masses and args.landscape != "ours":
        die(f"--masses --landscape {args.landscape}: the masses are of any rewards; leave one out")
    return args


def names_of(args):
    """The objectives that are asked for; None: all."""
    if args.check:
        load_objective(args.check)
        return [args.check]
    if not args.objectives:
        return None
    names = args.objectives.split(",")
    for name in names:
        if name not in lad.OBJECTIVES:
            die(f"--objectives: no objective {name!r}{did_you_mean(name, lad.OBJECTIVES)}")
    return names


def picture_path(args, name):
    if args.check:
        name = f"check-{name}"
    if args.landscape != "ours":
        name = f"{name}-{args.landscape}"
    return args.out / f"{name}.png"


def run_bandit(args, names):
    """The six regimes: tables and a picture."""
    landscape = LANDSCAPES[args.landscape]
    rows = make_rows(args.eta, names, landscape)
    learned = train(rows, args.seed, args.refresh, STEPS, landscape)
    if not learned.isfinite().all():
        die(f"{args.check}: the policy is no longer finite after {STEPS} steps")
    show_bandit(rows, learned, args.eta, args.refresh, landscape)

    goal = target(args.eta, landscape)
    panels = []
    for row, runs in zip(rows, learned, strict=True):
        panels.append((row.label, goal, args.refresh, landscape, runs))
    note = (
        f"arm; height: √probability; η = {args.eta:g}; π_old fixed, refreshed every "
        f"{args.refresh} steps, refreshed every step"
    )
    picture(picture_path(args, "bandit"), draw_bandit, panels, 1.9, True, note)


def run_masses(args, names):
    """m_S and m_F: a table and a picture."""
    table = mass_rows(args.eta, names)
    show_masses(table, args.eta)
    note = f"solve rate p; each panel to its own scale; G {GROUP}, eta {args.eta:g}, {ALSO}"
    picture(picture_path(args, "masses"), draw_masses, table, 1.55, False, note)


def main(argv):
    args = parse(argv)
    torch.set_num_threads(1)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        names = names_of(args)
        if not args.masses:
            run_bandit(args, names)
        if args.masses or args.check:
            run_masses(args, names)
    except Exception as error:  # the user's code may raise anything; our own is to be seen
        if not args.check and not isinstance(error, OSError):
            raise
        die(f"{args.check or args.out}: {type(error).__name__}: {one_line(error)}")


if __name__ == "__main__":
    command.run(main)
