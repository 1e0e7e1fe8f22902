r"""
bandit.py: what each objective of lad.py converges to on a problem whose answer is known, and which samples it works on. No GPU, no vLLM.

    python bandit.py                              # every objective on the 50-arm bandit: tables, bandit.png
    python bandit.py --masses                     # gradient mass of successes and failures against solve rate: masses.png
    python bandit.py --check mine.py:objective    # both, for one of your own, in seconds. --help for the rest

The bandit. A response is one token, one of 50 arms; r(a), in [0, 1], is a sum of three Gaussians, and A(a) is GRPO's advantage of the group
that holds each arm once: r standardised over the arms. The policy is a softmax of 50 logits, uniform at first; Adam, lr 5e-3, 4,000 steps.
The target is softmax(A/eta), LAD's fixed point (arXiv 2602.20132) where the behaviour policy pi_old is the uniform one. Six regimes: pi_old
fixed, refreshed every k steps, or every step; the exact expectation under pi_old, or 64 samples a step. What an objective sees of r:
    A      rows with a loss of their own (lad, entadv, clip_cov, kl_cov, flowrl), grpo, and what needs a reference: A(a) itself, as in
           LAD's paper, not standardised anew over each group, which would move the target.
    0/1    transforms of verifiable rewards: r ~ Bernoulli(r(a)) in groups of G = 8. The exact expectation is over the arm, its reward,
           and the successes c ~ Binomial(G - 1, p) among the other seven, p = E_pi_old[r].
The reference policy is the uniform one. flowrl has beta = 1/eta, which makes its own target, ref e^(beta A), softmax(A/eta) too; its log Z is a
learned scalar. fade's p and H are those of pi_old. Covariances (clip_cov, kl_cov) are over a run's 50 arms or 64 samples; one of these is
chosen, a larger share than the paper's 2e-4.

The masses. At solve rate p (q = 1 - p), 0/1 rewards, groups of G: m_S = p E[W | success], m_F = -q E[W | failure], W = -d loss/d log pi at
rho = 1: A for a policy gradient, -f'(e^(-A/eta)) for LAD. Exact: enumerated over c ~ Binomial(G - 1, p).
"""
import argparse, dataclasses, importlib.util, itertools, math, sys
from collections import namedtuple
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import lad
from harness.settings import did_you_mean, die, one_line

ARMS, STEPS, RATE, SAMPLES, GROUP, REFRESH = 50, 4000, 5e-3, 64, 8, 100
MODES, NEAR = ((8, 1.0), (24, 0.92), (40, 0.84)), 5   # arm and height of each Gaussian, 2.5 arms wide; a mode's mass is that of the arms this near
REGIMES = [(behaviour, sampled) for sampled in (False, True) for behaviour in ("fixed", "every k", "every step")]
EXACT = len(REGIMES) // 2   # regimes before this one take the exact expectation
ALSO = ", ".join(f"{key} {getattr(lad.Config, key):g}" for key in ("alpha", "delta", "success_weight", "pass_k", "ent_coef", "ent_kappa"))
Row = namedtuple("Row", "label name cfg binary stateful")               # binary: sees 0/1; stateful: its advantage may read p and H
Batch = namedtuple("Batch", "old pi arms weight entropy log_z solved")   # of all runs at one step, each [rows, regimes, ..]

# ==== The problem, the rows, and groups of 0/1 rewards enumerated ======================================================

def landscape():
    """r [ARMS] in [0, 1], float64 like all that follows."""
    return sum(height * torch.exp(-0.5 * ((torch.arange(ARMS).double() - centre) / 2.5) ** 2) for centre, height in MODES).clamp_max(1)

def target(eta):
    """softmax(A/eta) [ARMS]."""
    return torch.softmax(lad.advantages("grpo", landscape()[None], lad.Config(), {})[0] / eta, 0)

mode_masses = lambda pi: torch.stack([pi[..., centre - NEAR: centre + NEAR + 1].sum(-1) for centre, _ in MODES], -1)   # [..., ARMS] -> [..., modes]
entropy = lambda pi: -torch.special.xlogy(pi, pi).sum(-1)
is_binary = lambda o: o.loss is lad.ppo_clip and o.advantage is not lad.OBJECTIVES["grpo"].advantage and not o.needs

def make_rows(eta, names=None):
    """A Row for each of `names` (default: all of lad.OBJECTIVES, those with one loss together); lad once for each generator, grpo clipped and not."""
    rows = []
    def add(label, name, **changes):
        cfg = lad.Config(**lad.OBJECTIVES[name].defaults | dict(eta=eta, flow_beta=1 / eta, ratio="token", aggregation="token") | changes)
        rows.append(Row(label, name, cfg, is_binary(lad.OBJECTIVES[name]), name == "fade" or ":" in name))   # the user's, FILE.py:NAME, may
    for name in names or sorted(lad.OBJECTIVES, key=lambda n: (n != "lad", n not in ("grpo", "lad_anchor"), is_binary(lad.OBJECTIVES[n]))):
        if name == "lad":
            for divergence in lad.KNOBS["divergence"].metadata["choices"]:
                add(f"lad {divergence}", name, divergence=divergence)
        else:
            add("grpo unclipped", name, clip_low=1.0, clip_high=1e9) if name == "grpo" else None
            add(name.rpartition(":")[2], name)
    return rows

def token_loss(row, logp, old, adv, entropy, log_z):
    """lad.policy_loss of tokens that are a response each, like logp; what else there is broadcasts to it."""
    each = lambda x: x.expand(logp.shape)[..., None]   # sequences of one token
    return lad.policy_loss(row.name, each(logp), each(old), each(adv), torch.ones_like(logp)[..., None], row.cfg, entropy=each(entropy),
                           ref=torch.full_like(logp, -math.log(ARMS))[..., None], log_z=each(log_z))[0][..., 0]

def every_group(G):
    """[2G, G]: groups whose last is a failure beside c = 0..G-1 successes, then those whose first is a success beside c others."""
    c = torch.arange(G)[:, None]
    return torch.cat([torch.arange(G) < c, torch.arange(G) <= c]).double()

def outcomes(adv):
    """Of the advantages [..., 2G, G] of every_group, those of that failure and of that success: [..., 2, G]."""
    G = adv.shape[-1]
    return torch.stack([adv[..., :G, -1], adv[..., G:, 0]], -2)

def binomial(n, p):
    """P(c successes of n), c = 0..n, at p [...]: [..., n + 1]."""
    c, ways = torch.arange(n + 1), torch.tensor([float(math.comb(n, k)) for k in range(n + 1)], dtype=torch.float64)
    return ways * p[..., None] ** c * (1 - p[..., None]) ** (n - c)

def masses(row, state, p, G=GROUP):
    """(m_S, m_F), each like p [N]; the policy uniform and its own reference, an entropy of 1 nat (entadv), log Z = 0 (flowrl)."""
    adv = outcomes(lad.advantages(row.name, every_group(G), row.cfg, dict(state, drift=torch.zeros(2 * G, G))))
    logp = torch.full_like(adv, -math.log(ARMS)).requires_grad_()
    weight = -torch.autograd.grad(token_loss(row, logp, logp.detach(), adv, torch.ones_like(adv), torch.zeros_like(adv)).sum(), logp)[0]
    failure, success = (binomial(G - 1, p) @ weight.T).unbind(-1)
    return p * success, -(1 - p) * failure

# ==== Training: all rows in all regimes at once, one tensor of logits, one Adam ========================================

def advantage(row, rewards, states):
    """Advantages of rewards [regimes, ..., G], with each regime's own state if the row may read it."""
    flat = lambda r, state: lad.advantages(row.name, r.reshape(-1, r.shape[-1]), row.cfg, state).view(r.shape)
    return torch.stack([flat(r, s) for r, s in zip(rewards, states)]) if row.stateful else flat(rewards, states[0])

def loss_of_A(row, logp, b, adv):
    """Summed over the runs of rows with one loss that see A: logp, adv [rows, regimes, ARMS]."""
    objective, arguments = lad.OBJECTIVES[row.name], (logp, b.old, adv, b.entropy, b.log_z)
    if objective.local or "log_z" in objective.needs:   # token by token: samples only change the weights of the arms
        return (b.weight * token_loss(row, *arguments)).sum()
    each = lambda x: torch.vmap(partial(token_loss, row), randomness="different")(*(y.flatten(0, 1) for y in x))   # over a batch's tokens: run by run
    drawn = [x[:, EXACT:].gather(-1, b.arms) for x in arguments[:3]] + [x[:, EXACT:] for x in arguments[3:]]
    return (b.weight[:, :EXACT].flatten(0, 1) * each(x[:, :EXACT] for x in arguments)).sum() + each(drawn).sum() / SAMPLES

def loss_of_rewards(row, logp, b, table, given):
    """The same of rows that see 0/1: table [rows, EXACT, 2, G] is outcomes(), given [rows, regimes - EXACT, SAMPLES] the samples' advantages."""
    wide = lambda x: x[:, :EXACT, :, None, None]   # [rows, EXACT, ARMS, failure or success, c of the others]
    chance = wide(b.pi) * torch.stack([1 - landscape(), landscape()], -1)[..., None] * binomial(GROUP - 1, b.solved[:, :EXACT])[:, :, None, None]
    exact = token_loss(row, wide(logp).expand(chance.shape), wide(b.old), table[:, :, None], wide(b.entropy), wide(b.log_z))
    drawn = [x[:, EXACT:].gather(-1, b.arms) for x in (logp, b.old)]
    return (chance * exact).sum() + token_loss(row, *drawn, given, b.entropy[:, EXACT:], b.log_z[:, EXACT:]).sum() / SAMPLES

def train(rows, seed, refresh, steps):
    """The learned distributions [rows, REGIMES, ARMS]."""
    torch.manual_seed(seed)
    R, C, reward, groups = len(rows), len(REGIMES), landscape(), every_group(GROUP)
    zeros = partial(torch.zeros, R, C, dtype=torch.float64)
    logits, log_z = zeros(ARMS).requires_grad_(), zeros(1).requires_grad_()
    optimizer, old = torch.optim.Adam([logits, log_z], RATE), zeros(ARMS) - math.log(ARMS)
    adv, table, given = zeros(ARMS), zeros(2, GROUP)[:, :EXACT], zeros(SAMPLES)[:, EXACT:]   # of A; of 0/1 rewards, exact and sampled
    states = [[lad.new_state() for _ in REGIMES] if row.stateful else [{}] * C for row in rows]
    period = torch.tensor([{"fixed": steps, "every k": refresh, "every step": 1}[behaviour] for behaviour, _ in REGIMES])[:, None]
    key = lambda i: (lad.OBJECTIVES[rows[i].name].loss, rows[i].binary, dataclasses.astuple(rows[i].cfg))
    parts = [slice(g[0], g[-1] + 1) for g in (list(g) for _, g in itertools.groupby(range(R), key))]   # rows that lad.policy_loss can take at once
    for step in tqdm(range(steps), f"bandit    {R} x {C} runs", leave=False, disable=None):
        logp = logits.log_softmax(-1)
        old = torch.where(step % period == 0, logp.detach(), old)
        pi = old.exp()
        arms = torch.searchsorted(pi[:, EXACT:].cumsum(-1), torch.rand(given.shape, dtype=torch.float64)).clamp_max(ARMS - 1)
        weight = torch.cat([pi[:, :EXACT], torch.zeros_like(pi[:, EXACT:]).scatter_add_(-1, arms, torch.full_like(given, 1 / SAMPLES))], 1)
        solved = torch.cat([pi[:, :EXACT] @ reward, (success := torch.bernoulli(reward[arms])).mean(-1)], 1)
        batch = Batch(old, pi, arms, weight, -(logp.exp() * logp).detach().sum(-1, keepdim=True), log_z, solved)
        for i, row in enumerate(rows):
            moves = step == 0 or row.stateful or "ref" in lad.OBJECTIVES[row.name].needs
            for j, state in enumerate(states[i] * row.stateful):
                lad.update_state(state, solved[i, j].item(), -(weight[i, j] * old[i, j]).sum().item(), row.cfg)
                state["drift"] = old[i, j: j + 1] + math.log(ARMS)
            if row.binary:
                table[i] = outcomes(advantage(row, groups.expand(EXACT, -1, -1), states[i])) if moves else table[i]
                given[i] = advantage(row, success[i].view(C - EXACT, -1, GROUP), states[i][EXACT:]).view(-1, SAMPLES)
            elif moves:
                states[i][0].update({} if row.stateful else dict(drift=old[i] + math.log(ARMS)))
                adv[i] = advantage(row, reward.expand(C, 1, -1), states[i])[:, 0]
        loss = 0.0
        for p, x in zip(parts, logp.split([p.stop - p.start for p in parts])):
            row, b = rows[p.start], Batch(*(y[p] for y in batch))
            loss = loss + (loss_of_rewards(row, x, b, table[p], given[p]) if row.binary else loss_of_A(row, x, b, adv[p]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return logits.detach().softmax(-1)

# ==== What is printed and drawn ========================================================================================

LEARNED = """
LAD's distribution is kept by the anchor, not by the loss: while pi_old stays, every smooth generator ends at softmax(A/eta), three modes and all.
Refresh pi_old and e^(A/eta) compounds until LAD has collapsed onto the best arm, as GRPO does; clipped GRPO stands still only because pi_old does.
What is tied to a policy that never moves (lad_anchor and flowrl, to the reference) keeps the distribution while pi_old is refreshed at every step."""
VERDICTS = {"=": ("#0072b2", "is the target"), "!": ("#d55e00", "collapsed"), " ": ("#e69f00", "neither")}

def verdict(pi, goal):
    """'=': each mode of pi [ARMS] is within 10% of its mass in the target. '!': entropy under log 2, fewer than two arms' worth."""
    return "=" if ((mode_masses(pi) / mode_masses(goal) - 1).abs() < 0.1).all() else "!" if entropy(pi) < math.log(2) else " "

def show_bandit(rows, learned, eta, refresh):
    goal = target(eta)
    shares = lambda pi: "/".join(f"{100 * m:.0f}" for m in mode_masses(pi))
    cell = lambda pi: f"{0.5 * (pi - goal).abs().sum():.3f} {entropy(pi):.2f} {shares(pi):>8} {verdict(pi, goal)}"
    line = lambda label, sees, cells: print(f"{label:<16}{sees:<4}" + "".join(f"  {c:<23}" for c in cells).rstrip())
    print(f"{ARMS} arms, Adam {RATE:g}, {STEPS} steps, eta {eta:g}, k {refresh}. Cell: total variation to softmax(A/eta), entropy (nats), % of mass\n"
          f"at each mode; '=' is the target, '!' collapsed. The target: {cell(goal)}; uniform: {cell(torch.full_like(goal, 1 / ARMS))}")
    for first, title in ((0, "exact"), (EXACT, f"{SAMPLES} samples")):
        line(f"\n{title:<16}", "sees", ["pi_old fixed", "refreshed every k steps", "refreshed every step"])
        for row, runs in zip(rows, learned):
            line(row.label, "0/1" if row.binary else "A", map(cell, runs[first: first + EXACT]))
    print(LEARNED if len(rows) > 1 else "")
    for (behaviour, sampled), pi in zip(REGIMES, learned[0] if len(rows) == 1 else ()):
        print(f"pi_old {behaviour + ', ' + ('sampled' if sampled else 'exact') + ':':<21}{VERDICTS[verdict(pi, goal)][1]:<15}"
              f"{entropy(pi).exp():5.1f} arms' worth, arm {pi.argmax()} has {pi.max():.3f}")

def mass_rows(eta, names=None):
    """[(title, Row, state)]: each row once (clipping does nothing at rho = 1), what reads p and H at two stages of training."""
    stages = {", p̄ 0.2, H = H*": {"p": 0.2, "H": 1.0, "H*": 1.0}, ", p̄ 0.8, H = H* - 0.5": {"p": 0.8, "H": 0.5, "H*": 1.0}}
    return [(row.label + stage, row, state) for row in make_rows(eta, names or list(lad.OBJECTIVES)) if row.label != "grpo unclipped"
            for stage, state in (stages if row.stateful else {"": {}}).items()]

def show_masses(table, eta):
    at = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64)
    print(f"\nm_S / m_F at solve rate p: 0/1 rewards, G {GROUP}, eta {eta:g}, {ALSO};\nrho = 1, an entropy of 1 nat (entadv), log Z = 0 (flowrl)\n"
          f"{'p':<28}" + "".join(f"{p:^18.2f}" for p in at.tolist()))
    for title, row, state in table:
        print(f"{title:<28}" + "".join(f"{s:8.3f} /{f:7.3f} " for s, f in torch.stack(masses(row, state, at), 1).add(0.0).tolist()))

def picture(path, draw, panels, height, share_y, note):
    """Small panels, five in a row, each `height` inches high: draw(ax, *panel) returns the legend's handles. panels: [(title, ...)]."""
    from matplotlib.figure import Figure
    wide, high = min(len(panels), 5), -(-len(panels) // 5)
    figure = Figure(figsize=(max(2.6 * wide, 8), height * high + 1), layout="constrained")
    for ax, (title, *panel) in zip(figure.subplots(high, wide, sharex=True, sharey=share_y, squeeze=False).flat, panels):
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=7)
        ax.set_title(title, fontsize=9, pad=2, fontweight="bold")
        handles = draw(ax, *panel)
    figure.legend(handles=handles, loc="outside upper center", ncols=5, fontsize=9, frameon=False)
    figure.supxlabel(note, fontsize=8)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    print(f"wrote     {path}")

def draw_bandit(ax, goal, refresh, runs):
    """The three behaviours of pi_old one above the other, each with target, learned (exact) and learned (sampled)."""
    from matplotlib.patches import Patch
    arm, lifts = torch.arange(ARMS), [-1.1 * j for j in range(EXACT)]
    for base, pi, sampled in zip(lifts, runs, runs[EXACT:]):
        colour = VERDICTS[verdict(pi, goal)][0]
        ax.fill_between(arm, base, base + goal.sqrt(), step="mid", color="0.75", lw=0)
        ax.fill_between(arm, base, base + pi.sqrt(), step="mid", color=colour, alpha=0.35, lw=0)
        ax.plot(arm, base + pi.sqrt(), drawstyle="steps-mid", color=colour, lw=1.1)
        dots = ax.plot(arm, base + sampled.sqrt(), ".", color="black", ms=1.8, label=f"learned from {SAMPLES} samples a step")
    ax.set(xlim=(-1, ARMS), ylim=(lifts[-1] - 0.02, 1.04), xticks=[centre for centre, _ in MODES],
           yticks=[base + 0.3 for base in lifts], yticklabels=["π_old\nfixed", f"every\n{refresh}", "every\nstep"])
    learned = [Patch(color=c, alpha=0.6, label=f"learned: {text}") for c, text in VERDICTS.values()]
    return [Patch(color="0.75", label="target softmax(A/η)"), *learned, *dots]

def draw_masses(ax, row, state):
    """m_S and m_F against p, to the panel's own scale; behind them p q, mean-only GRPO at large G, as high as the panel."""
    success, failure = masses(row, state, p := torch.linspace(0.005, 0.995, 199, dtype=torch.float64))
    behind = ax.fill_between(p, 4 * p * (1 - p) * torch.cat([success, failure]).max(), color="0.9", lw=0, label="p q (mean-only GRPO), scaled")
    up = ax.plot(p, success, color="#0072b2", lw=1.8, label="m_S: pushes successes up")
    down = ax.plot(p, failure, "--", color="#d55e00", lw=1.8, label="m_F: pushes failures down")
    ax.axhline(0, color="0.4", lw=0.6)
    ax.set(xlim=(0, 1), xticks=(0, 0.5, 1))
    ax.locator_params(axis="y", nbins=3)
    return [behind, *up, *down]

# ==== main =============================================================================================================

def load_objective(spec):
    """Enter FILE.py:NAME, a row of a copy of lad.py (with that file's knobs) or any name in it, into lad.OBJECTIVES once it works on every group of 0/1 rewards."""
    file, _, name = spec.rpartition(":")
    Path(file).is_file() or die(f"--check {spec}: " + (f"there is no file {file}" if file else "expected FILE.py:NAME"))
    source = importlib.util.spec_from_file_location(Path(file).stem, file)
    source.loader.exec_module(module := importlib.util.module_from_spec(source))
    known, r = vars(module) | vars(module).get("OBJECTIVES", {}), every_group(GROUP)   # rewards from all 0 to all 1
    if name not in known:
        die(f"{file} has no {name!r}{did_you_mean(name, [n for n in known if not n.startswith('_')])}")
    lad.Config, row, ours = getattr(module, "Config", lad.Config), known[name], {id(getattr(module, n, None)): getattr(lad, n) for n in ("grpo", "ppo_clip")}
    fields = {f.name: getattr(row, f.name) for f in dataclasses.fields(row)} if hasattr(row, "advantage") else dict(advantage=row)
    lad.OBJECTIVES[spec] = lad.Objective(**{key: ours.get(id(value), value) for key, value in fields.items()})   # a copy's ppo_clip is ours
    adv = lad.advantages(spec, r, lad.Config(), {"p": 0.5, "H": 1.0, "H*": 0.5, "drift": torch.zeros_like(r)})
    if not isinstance(adv, torch.Tensor) or adv.shape != r.shape or not adv.isfinite().all():
        die(f"{spec}: expected finite advantages like the rewards {list(r.shape)}, got {type(adv).__name__} {list(getattr(adv, 'shape', []))}")
    return [spec]

def main(argv):
    parser = argparse.ArgumentParser(prog="bandit.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: die(message + "; see python bandit.py --help")
    parser.add_argument("--masses", action="store_true", help="gradient masses against solve rate")
    parser.add_argument("--check", metavar="FILE.py:NAME", help="an advantage function (r [B,G], cfg, state) -> A [B,G], or a lad.Objective")
    parser.add_argument("--eta", type=float, default=0.5, help="temperature of the target (0.5)")
    parser.add_argument("--refresh", type=int, default=REFRESH, metavar="K", help=f"steps between refreshes of pi_old in 'every k' ({REFRESH})")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (0)")
    parser.add_argument("--out", type=Path, default=Path("runs/bandit"), metavar="DIR", help="where the pictures go (runs/bandit)")
    args = parser.parse_args(argv)
    if not 0.05 <= args.eta <= 100 or args.refresh < 1:
        die(f"--eta {args.eta:g} --refresh {args.refresh}: expected 0.05 to 100, and at least 1")
    torch.set_num_threads(1)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        names = load_objective(args.check) if args.check else None
        draw = lambda name, *how: picture(args.out / f"{'check-' * bool(names)}{name}.png", *how)
        if not args.masses:
            learned = train(rows := make_rows(args.eta, names), args.seed, args.refresh, STEPS)
            learned.isfinite().all() or die(f"{args.check}: the policy is no longer finite after {STEPS} steps")
            show_bandit(rows, learned, args.eta, args.refresh)
            draw("bandit", draw_bandit, [(row.label, target(args.eta), args.refresh, runs) for row, runs in zip(rows, learned)], 1.9, True,
                 f"arm; height: √probability; η = {args.eta:g}; π_old fixed, refreshed every {args.refresh} steps, refreshed every step")
        if args.masses or names:
            show_masses(table := mass_rows(args.eta, names), args.eta)
            draw("masses", draw_masses, table, 1.55, False, f"solve rate p; each panel to its own scale; G {GROUP}, eta {args.eta:g}, {ALSO}")
    except Exception as error:   # the user's code may raise anything; our own is to be seen
        if not args.check and not isinstance(error, OSError):
            raise
        die(f"{args.check or args.out}: {type(error).__name__}: {one_line(error)}")

if __name__ == "__main__":
    main(sys.argv[1:])
