r"""
bandit.py: what each objective of lad.py converges to on a problem whose answer is known, and which
samples it works on. No GPU, no vLLM.

    python bandit.py                              # every objective on 50 arms: tables, bandit.png
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

    A      rows with a loss of their own (lad, entadv, clip_cov, kl_cov, flowrl), grpo, and what
           needs a reference: A(a) itself, as in LAD's paper, not standardised anew over each group,
           which would move the target.
    0/1    transforms of verifiable rewards: r ~ Bernoulli(r(a)) in groups of G = 8. The exact
           expectation is over the arm, its reward, and the successes c ~ Binomial(G - 1, p) among
           the other seven, p = E_pi_old[r].

The reference policy is the uniform one. flowrl has beta = 1/eta, which makes its own target,
ref e^(beta A), softmax(A/eta) too; its log Z is a learned scalar. fade's p and H are those of
pi_old. Covariances (clip_cov, kl_cov) are over a run's 50 arms or 64 samples; one of these is
chosen, a larger share than the paper's 2e-4.

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
SAMPLES = 64  # a step, in the sampled regimes
GROUP = 8
REFRESH = 100  # steps between refreshes of pi_old in "every k"

MODES = ((8, 1.0), (24, 0.92), (40, 0.84))  # arm and height of each Gaussian, 2.5 arms wide
NEAR = 5  # a mode's mass is that of the arms this near

BEHAVIOURS = ("fixed", "every k", "every step")
REGIMES = [(behaviour, sampled) for sampled in (False, True) for behaviour in BEHAVIOURS]
EXACT = len(BEHAVIOURS)  # regimes before this one take the exact expectation

NAMED = ("alpha", "delta", "success_weight", "pass_k", "ent_coef", "ent_kappa")
ALSO = ", ".join(f"{key} {getattr(lad.Config, key):g}" for key in NAMED)

# binary: sees 0/1; stateful: its advantage may read p and H
Row = namedtuple("Row", "label name cfg binary stateful")
# Of all runs at one step, each [rows, regimes, ..]
Batch = namedtuple("Batch", "old pi arms weight entropy log_z solved")


# ==== 1. The problem ============================================================================


def landscape():
    """r [ARMS] in [0, 1], float64 like all that follows."""
    arms = torch.arange(ARMS).double()
    total = 0
    for centre, height in MODES:
        total = total + height * torch.exp(-0.5 * ((arms - centre) / 2.5) ** 2)
    return total.clamp_max(1)


def target(eta):
    """softmax(A/eta) [ARMS]."""
    adv = lad.advantages("grpo", landscape()[None], lad.Config(), {})[0]
    return torch.softmax(adv / eta, 0)


def mode_masses(pi):
    """[..., ARMS] -> [..., modes]"""
    near = [pi[..., centre - NEAR : centre + NEAR + 1].sum(-1) for centre, _ in MODES]
    return torch.stack(near, -1)


def entropy(pi):
    """In nats: [..., ARMS] -> [...]"""
    return -torch.special.xlogy(pi, pi).sum(-1)


# ==== 2. Rows ===================================================================================


def is_binary(objective):
    """Is it a transform of verifiable rewards, under PPO's loss?"""
    own_advantage = objective.advantage is not lad.OBJECTIVES["grpo"].advantage
    return objective.loss is lad.ppo_clip and own_advantage and not objective.needs


def make_row(label, name, eta, **changes):
    objective = lad.OBJECTIVES[name]
    settings = dict(eta=eta, flow_beta=1 / eta, ratio="token", aggregation="token")
    cfg = lad.Config(**objective.defaults | settings | changes)
    stateful = name == "fade" or ":" in name  # the user's, FILE.py:NAME, may be
    return Row(label, name, cfg, is_binary(objective), stateful)


def make_rows(eta, names=None):
    """A Row for each of `names` (default: all of lad.OBJECTIVES, those with one loss together); lad
    once for each generator, grpo clipped and not."""
    rows = []
    for name in names or sorted(lad.OBJECTIVES, key=place):
        if name == "lad":
            for divergence in lad.KNOBS["divergence"].metadata["choices"]:
                rows.append(make_row(f"lad {divergence}", name, eta, divergence=divergence))
            continue
        if name == "grpo":
            rows.append(make_row("grpo unclipped", name, eta, clip_low=1.0, clip_high=1e9))
        rows.append(make_row(name.rpartition(":")[2], name, eta))
    return rows


def place(name):
    """Where a row stands in the tables: lad, what sees A, what sees 0/1."""
    return name != "lad", name not in ("grpo", "lad_anchor"), is_binary(lad.OBJECTIVES[name])


def token_loss(row, logp, old, adv, entropy, log_z):
    """lad.policy_loss of tokens that are a response each, like logp; what else there is broadcasts
    to it."""

    def each(x):
        return x.expand(logp.shape)[..., None]  # sequences of one token

    mask = torch.ones_like(logp)[..., None]
    ref = torch.full_like(logp, -math.log(ARMS))[..., None]
    known = dict(entropy=each(entropy), ref=ref, log_z=each(log_z))
    loss, _ = lad.policy_loss(row.name, each(logp), each(old), each(adv), mask, row.cfg, **known)
    return loss[..., 0]


# ==== 3. Groups of 0/1 rewards, enumerated ======================================================


def every_group(G):
    """[2G, G]: groups whose last is a failure beside c = 0..G-1 successes, then those whose first
    is a success beside c others."""
    c = torch.arange(G)[:, None]
    return torch.cat([torch.arange(G) < c, torch.arange(G) <= c]).double()


def outcomes(adv):
    """Of the advantages [..., 2G, G] of every_group, those of that failure and of that success:
    [..., 2, G]."""
    G = adv.shape[-1]
    return torch.stack([adv[..., :G, -1], adv[..., G:, 0]], -2)


def binomial(n, p):
    """P(c successes of n), c = 0..n, at p [...]: [..., n + 1]."""
    c = torch.arange(n + 1)
    ways = torch.tensor([float(math.comb(n, k)) for k in range(n + 1)], dtype=torch.float64)
    return ways * p[..., None] ** c * (1 - p[..., None]) ** (n - c)


def masses(row, state, p, G=GROUP):
    """(m_S, m_F), each like p [N]; the policy uniform and its own reference, an entropy of 1 nat
    (entadv), log Z = 0 (flowrl)."""
    known = dict(state, drift=torch.zeros(2 * G, G))
    adv = outcomes(lad.advantages(row.name, every_group(G), row.cfg, known))
    logp = torch.full_like(adv, -math.log(ARMS)).requires_grad_()
    one, zero = torch.ones_like(adv), torch.zeros_like(adv)
    loss = token_loss(row, logp, logp.detach(), adv, one, zero).sum()
    weight = -torch.autograd.grad(loss, logp)[0]
    failure, success = (binomial(G - 1, p) @ weight.T).unbind(-1)
    return p * success, -(1 - p) * failure


# ==== 4. Training ===============================================================================
# All rows in all regimes at once: one tensor of logits, one Adam.


def advantage(row, rewards, states):
    """Advantages of rewards [regimes, ..., G], with each regime's own state if the row may read
    it."""

    def flat(r, state):
        groups = r.reshape(-1, r.shape[-1])
        return lad.advantages(row.name, groups, row.cfg, state).view(r.shape)

    if row.stateful:
        return torch.stack([flat(r, s) for r, s in zip(rewards, states, strict=False)])
    return flat(rewards, states[0])


def loss_of_A(row, logp, b, adv):
    """Summed over the runs of rows with one loss that see A: logp, adv [rows, regimes, ARMS]."""
    objective = lad.OBJECTIVES[row.name]
    arguments = (logp, b.old, adv, b.entropy, b.log_z)
    # Token by token: samples only change the weights of the arms
    if objective.local or "log_z" in objective.needs:
        return (b.weight * token_loss(row, *arguments)).sum()

    # Over a batch's tokens: run by run
    run_by_run = torch.vmap(partial(token_loss, row), randomness="different")

    def each(x):
        return run_by_run(*(y.flatten(0, 1) for y in x))

    exact = each(x[:, :EXACT] for x in arguments)
    drawn = [x[:, EXACT:].gather(-1, b.arms) for x in arguments[:3]]
    drawn += [x[:, EXACT:] for x in arguments[3:]]
    return (b.weight[:, :EXACT].flatten(0, 1) * exact).sum() + each(drawn).sum() / SAMPLES


def loss_of_rewards(row, logp, b, table, given):
    """The same of rows that see 0/1: table [rows, EXACT, 2, G] is outcomes(), given [rows,
    regimes - EXACT, SAMPLES] the samples' advantages."""

    def wide(x):
        return x[
            :, :EXACT, :, None, None
        ]  # [rows, EXACT, ARMS, failure or success, c of the others]

    # Exact: over the arm, its reward, and the successes of the others
    reward = torch.stack([1 - landscape(), landscape()], -1)[..., None]
    others = binomial(GROUP - 1, b.solved[:, :EXACT])[:, :, None, None]
    chance = wide(b.pi) * reward * others
    wide_logp = wide(logp).expand(chance.shape)
    arguments = (wide(b.old), table[:, :, None], wide(b.entropy), wide(b.log_z))
    exact = (chance * token_loss(row, wide_logp, *arguments)).sum()

    # Sampled
    drawn = [x[:, EXACT:].gather(-1, b.arms) for x in (logp, b.old)]
    sampled = token_loss(row, *drawn, given, b.entropy[:, EXACT:], b.log_z[:, EXACT:])
    return exact + sampled.sum() / SAMPLES


def spans_of_one_loss(rows):
    """Slices of neighbouring rows that lad.policy_loss can take at once."""

    def key(i):
        row = rows[i]
        return lad.OBJECTIVES[row.name].loss, row.binary, dataclasses.astuple(row.cfg)

    spans = []
    for _, group in itertools.groupby(range(len(rows)), key):
        members = list(group)
        spans.append(slice(members[0], members[-1] + 1))
    return spans


def train(rows, seed, refresh, steps):
    """The learned distributions [rows, REGIMES, ARMS]."""
    torch.manual_seed(seed)
    R, C = len(rows), len(REGIMES)
    reward, groups = landscape(), every_group(GROUP)
    zeros = partial(torch.zeros, R, C, dtype=torch.float64)
    logits = zeros(ARMS).requires_grad_()
    log_z = zeros(1).requires_grad_()
    optimizer = torch.optim.Adam([logits, log_z], RATE)
    old = zeros(ARMS) - math.log(ARMS)
    every = {"fixed": steps, "every k": refresh, "every step": 1}
    period = torch.tensor([every[behaviour] for behaviour, _ in REGIMES])[:, None]

    # Advantages: of rows that see A; of 0/1 rewards, exact and sampled
    adv = zeros(ARMS)
    table = zeros(2, GROUP)[:, :EXACT]
    given = zeros(SAMPLES)[:, EXACT:]
    states = []
    for row in rows:
        if row.stateful:
            states.append([lad.new_state() for _ in REGIMES])
        else:
            states.append([{}] * C)  # one for all: what needs a reference finds the drift in it

    spans = spans_of_one_loss(rows)
    for step in tqdm(range(steps), f"bandit    {R} x {C} runs", leave=False, disable=None):
        # pi_old, what it draws, and how often that is right
        logp = logits.log_softmax(-1)
        old = torch.where(step % period == 0, logp.detach(), old)
        pi = old.exp()
        lots = torch.rand(given.shape, dtype=torch.float64)
        arms = torch.searchsorted(pi[:, EXACT:].cumsum(-1), lots).clamp_max(ARMS - 1)
        share = torch.full_like(given, 1 / SAMPLES)
        drawn = torch.zeros_like(pi[:, EXACT:]).scatter_add_(-1, arms, share)
        weight = torch.cat([pi[:, :EXACT], drawn], 1)
        success = torch.bernoulli(reward[arms])
        solved = torch.cat([pi[:, :EXACT] @ reward, success.mean(-1)], 1)
        surprise = -(logp.exp() * logp).detach().sum(-1, keepdim=True)
        batch = Batch(old, pi, arms, weight, surprise, log_z, solved)

        # Advantages, where they may have moved
        for i, row in enumerate(rows):
            needs_ref = "ref" in lad.OBJECTIVES[row.name].needs
            moves = step == 0 or row.stateful or needs_ref
            if row.stateful:
                for j, state in enumerate(states[i]):
                    seen = -(weight[i, j] * old[i, j]).sum().item()
                    lad.update_state(state, solved[i, j].item(), seen, row.cfg)
                    state["drift"] = old[i, j : j + 1] + math.log(ARMS)
            if row.binary:
                if moves:
                    every_one = groups.expand(EXACT, -1, -1)
                    table[i] = outcomes(advantage(row, every_one, states[i]))
                of_samples = success[i].view(C - EXACT, -1, GROUP)
                given[i] = advantage(row, of_samples, states[i][EXACT:]).view(-1, SAMPLES)
            elif moves:
                if not row.stateful:
                    states[i][0]["drift"] = old[i] + math.log(ARMS)
                adv[i] = advantage(row, reward.expand(C, 1, -1), states[i])[:, 0]

        # One step of all runs
        loss = 0.0
        for span in spans:
            row = rows[span.start]
            b = Batch(*(x[span] for x in batch))
            if row.binary:
                loss = loss + loss_of_rewards(row, logp[span], b, table[span], given[span])
            else:
                loss = loss + loss_of_A(row, logp[span], b, adv[span])
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


def verdict(pi, goal):
    """'=': each mode of pi [ARMS] is within 10% of its mass in the target. '!': entropy under
    log 2, fewer than two arms' worth."""
    off = (mode_masses(pi) / mode_masses(goal) - 1).abs()
    if (off < 0.1).all():
        return "="
    return "!" if entropy(pi) < math.log(2) else " "


def cell(pi, goal):
    distance = 0.5 * (pi - goal).abs().sum()
    shares = "/".join(f"{100 * m:.0f}" for m in mode_masses(pi))
    return f"{distance:.3f} {entropy(pi):.2f} {shares:>8} {verdict(pi, goal)}"


def print_line(label, sees, cells):
    text = f"{label:<16}{sees:<4}" + "".join(f"  {c:<23}" for c in cells)
    print(text.rstrip())


def show_bandit(rows, learned, eta, refresh):
    goal = target(eta)
    uniform = torch.full_like(goal, 1 / ARMS)
    print(
        f"{ARMS} arms, Adam {RATE:g}, {STEPS} steps, eta {eta:g}, k {refresh}. Cell: total "
        "variation to softmax(A/eta), entropy (nats), % of mass\n"
        f"at each mode; '=' is the target, '!' collapsed. The target: {cell(goal, goal)}; uniform: "
        f"{cell(uniform, goal)}"
    )
    columns = ["pi_old fixed", "refreshed every k steps", "refreshed every step"]
    for first, title in ((0, "exact"), (EXACT, f"{SAMPLES} samples")):
        print_line(f"\n{title:<16}", "sees", columns)
        for row, runs in zip(rows, learned, strict=True):
            cells = [cell(pi, goal) for pi in runs[first : first + EXACT]]
            print_line(row.label, "0/1" if row.binary else "A", cells)
    print(LEARNED if len(rows) > 1 else "")
    if len(rows) == 1:
        show_regimes(learned[0], goal)


def show_regimes(learned, goal):
    """What became of one row, in words."""
    for (behaviour, sampled), pi in zip(REGIMES, learned, strict=True):
        regime = f"{behaviour}, {'sampled' if sampled else 'exact'}:"
        words = VERDICTS[verdict(pi, goal)][1]
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
    print(f"{'p':<28}" + "".join(f"{p:^18.2f}" for p in at.tolist()))
    for title, row, state in table:
        pairs = torch.stack(masses(row, state, at), 1).add(0.0).tolist()  # -0 becomes 0
        print(f"{title:<28}" + "".join(f"{s:8.3f} /{f:7.3f} " for s, f in pairs))


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


def draw_bandit(ax, goal, refresh, runs):
    """The three behaviours of pi_old one above the other, each with target, learned (exact) and
    learned (sampled)."""
    from matplotlib.patches import Patch

    arm = torch.arange(ARMS)
    lifts = [-1.1 * j for j in range(EXACT)]
    for base, pi, sampled in zip(lifts, runs[:EXACT], runs[EXACT:], strict=True):
        colour = VERDICTS[verdict(pi, goal)][0]
        ax.fill_between(arm, base, base + goal.sqrt(), step="mid", color="0.75", lw=0)
        ax.fill_between(arm, base, base + pi.sqrt(), step="mid", color=colour, alpha=0.35, lw=0)
        ax.plot(arm, base + pi.sqrt(), drawstyle="steps-mid", color=colour, lw=1.1)
        label = f"learned from {SAMPLES} samples a step"
        dots = ax.plot(arm, base + sampled.sqrt(), ".", color="black", ms=1.8, label=label)
    ax.set(xlim=(-1, ARMS), ylim=(lifts[-1] - 0.02, 1.04), xticks=[centre for centre, _ in MODES])
    names = ["π_old\nfixed", f"every\n{refresh}", "every\nstep"]
    ax.set(yticks=[base + 0.3 for base in lifts], yticklabels=names)

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
    if not Path(file).is_file():
        die(f"--check {spec}: {f'there is no file {file}' if file else 'expected FILE.py:NAME'}")
    source = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)
    known = vars(module) | vars(module).get("OBJECTIVES", {})
    if name not in known:
        die(f"{file} has no {name!r}{did_you_mean(name, [n for n in known if n[0] != '_'])}")
    lad.Config = getattr(module, "Config", lad.Config)
    lad.OBJECTIVES[spec] = as_objective(known[name], module)

    # Does it work, on rewards from all 0 to all 1?
    r = every_group(GROUP)
    state = {"p": 0.5, "H": 1.0, "H*": 0.5, "drift": torch.zeros_like(r)}
    adv = lad.advantages(spec, r, lad.Config(), state)
    if not isinstance(adv, torch.Tensor) or adv.shape != r.shape or not adv.isfinite().all():
        shape = list(getattr(adv, "shape", []))
        die(
            f"{spec}: expected finite advantages like the rewards {list(r.shape)}, got "
            f"{type(adv).__name__} {shape}"
        )
    return [spec]


def as_objective(found, module):
    """A row of lad.OBJECTIVES of what a file calls one: an advantage, or an Objective of its own
    copy of lad.py, whose ppo_clip and grpo are ours."""
    if not hasattr(found, "advantage"):
        return lad.Objective(advantage=found)
    ours = {id(getattr(module, name, None)): getattr(lad, name) for name in ("grpo", "ppo_clip")}
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
    add("--eta", type=float, default=0.5, help="temperature of the target (0.5)")
    every = f"steps between refreshes of pi_old in 'every k' ({REFRESH})"
    add("--refresh", type=int, default=REFRESH, metavar="K", help=every)
    add("--seed", type=int, default=0, help="of the samples (0)")
    where = "where the pictures go (runs/bandit)"
    add("--out", type=Path, default=Path("runs/bandit"), metavar="DIR", help=where)
    args = parser.parse_args(argv)
    if not 0.05 <= args.eta <= 100 or args.refresh < 1:
        die(f"--eta {args.eta:g} --refresh {args.refresh}: expected 0.05 to 100, and at least 1")
    return args


def run(args):
    args.out.mkdir(parents=True, exist_ok=True)
    names = load_objective(args.check) if args.check else None
    prefix = "check-" if names else ""
    if not args.masses:
        rows = make_rows(args.eta, names)
        learned = train(rows, args.seed, args.refresh, STEPS)
        if not learned.isfinite().all():
            die(f"{args.check}: the policy is no longer finite after {STEPS} steps")
        show_bandit(rows, learned, args.eta, args.refresh)
        note = (
            f"arm; height: √probability; η = {args.eta:g}; π_old fixed, refreshed every "
            f"{args.refresh} steps, refreshed every step"
        )
        goal = target(args.eta)
        labels = [row.label for row in rows]
        panels = [
            (label, goal, args.refresh, runs) for label, runs in zip(labels, learned, strict=True)
        ]
        picture(args.out / f"{prefix}bandit.png", draw_bandit, panels, 1.9, True, note)
    if args.masses or names:
        table = mass_rows(args.eta, names)
        show_masses(table, args.eta)
        note = f"solve rate p; each panel to its own scale; G {GROUP}, eta {args.eta:g}, {ALSO}"
        picture(args.out / f"{prefix}masses.png", draw_masses, table, 1.55, False, note)


def main(argv):
    args = parse(argv)
    torch.set_num_threads(1)
    try:
        run(args)
    except Exception as error:  # the user's code may raise anything; our own is to be seen
        if not args.check and not isinstance(error, OSError):
            raise
        die(f"{args.check or args.out}: {type(error).__name__}: {one_line(error)}")


if __name__ == "__main__":
    command.run(main)
