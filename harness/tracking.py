"""
What a run leaves behind for people: its folder, its logs, its progress lines, and how it ends.

A run's folder holds config.toml (resolved), source/ (the files as run), metrics.jsonl (an object
for each step and each evaluation), samples.jsonl (prompts, responses, rewards), plot.png,
checkpoints/ and hf/. Lines are appended and flushed at each step; a disk too full for a line ends
the run.
"""

import dataclasses
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F

from harness import checkpoint, plot, trackers
from harness.ranks import all_reduce, hold, print0, rank, shard_of, world
from harness.settings import die, one_line, replace, to_toml

LOGS = ("metrics.jsonl", "samples.jsonl")

# ==== 1. The folder =============================================================================


def begin(cfg, script, found=None):
    """Make the folder ready. An older run of the same name is moved aside, never overwritten. A run
    that goes on from another folder's checkpoint `found` gets that one, and the log up to it; the
    other folder stays as it is."""
    if rank() != 0:
        return
    out = Path(cfg.out)
    is_fork = checkpoint.is_fork(cfg)
    if is_used(out) and (is_fork or not cfg.resume):
        aside = move_aside(out.resolve())
        print(f"run       {out} was there: moved to {aside} (--resume {out} goes on instead)")
    (out / "source").mkdir(parents=True, exist_ok=True)
    replace(out / "config.toml", to_toml(dataclasses.asdict(cfg)))
    copy_source(Path(script).resolve(), out / "source")
    if cfg.reward:
        copy_reward(Path(cfg.reward.rpartition(":")[0]), out / "source" / "reward")
    if is_fork:
        take_over(cfg, *found)


def take_over(cfg, path, saved):
    """The log of another run, and then its checkpoint, into this one's folder."""
    try:
        for name in LOGS:
            if (Path(cfg.resume) / name).exists():
                shutil.copyfile(Path(cfg.resume) / name, Path(cfg.out) / name)
        checkpoint.adopt(path, cfg.out)
    except OSError as error:  # no room, or its run is at work and has removed it
        die(f"{path} cannot be taken over into {cfg.out}: {one_line(error)}")
    print(f"run       {cfg.out} goes on from step {saved['step']} of {cfg.resume}, which stays")


# What a run writes into its folder. Anything else in there is somebody's own
WRITTEN = """config.toml source metrics.jsonl samples.jsonl plot.png checkpoints hf adapter lock
track.log tensorboard wandb wandb.json trackio.json""".split()


def is_used(out):
    """Whether a folder holds a run: its log, or a checkpoint of any age."""
    return (out / "metrics.jsonl").exists() or any((out / "checkpoints").glob("step_*"))


def is_shared(out):
    """Whether a run's folder holds files that no run writes."""
    checkpoints = out / "checkpoints"
    if checkpoints.exists():
        for path in checkpoints.iterdir():
            if path.name != "tmp" and not path.name.startswith("step_"):
                return True
    return any(path.name not in WRITTEN for path in out.iterdir())


def move_aside(out):
    """Make way for a new run: rename the folder, and hold the new one of its name. Where it holds
    what no run has written, that stays, and the run's own files go."""
    aside = out.with_name(f"{out.name}.{time.strftime('%Y%m%d-%H%M%S')}")
    try:
        if is_shared(out):
            move_own_files(out, aside)
        else:
            out.rename(aside)  # its lock goes along
            (aside / "lock").unlink()
            hold(out)
    except OSError as error:
        die(
            f"{out} holds a run that cannot be moved aside: {one_line(error)}; --resume it, or "
            "give another --out"
        )
    return aside


def move_own_files(out, aside):
    """A run's files, one by one; the lock stays where it is held. A kill in between leaves a run in
    two folders, and nothing lost."""
    (aside / "checkpoints").mkdir(parents=True)
    for path in (out / "checkpoints").glob("step_*"):
        path.rename(aside / "checkpoints" / path.name)
    for name in WRITTEN:
        if name not in ("checkpoints", "lock") and (out / name).exists():
            (out / name).rename(aside / name)


def copy_source(script, folder):
    """The files that the run is made of: the script, what it imports from beside it, the
    presets."""
    here = script.parent
    files = {script, here / "configs.toml"}
    for module in list(sys.modules.values()):
        path = Path(getattr(module, "__file__", None) or "/")
        if here in path.parents and ".venv" not in path.parts:
            files.add(path)
    for path in files:
        target = folder / path.relative_to(here)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)


def copy_reward(path, folder):
    """The file of a reward of one's own; a resumed run may have been given its own copy."""
    folder.mkdir(exist_ok=True)
    if path != folder.resolve() / path.name:
        shutil.copy(path, folder)


def rewind(cfg, step):
    """Forget the log lines after the checkpoint of `step`, a torn last one included; all of them if
    there is no checkpoint."""
    if rank() != 0:
        return
    for name in LOGS:
        path = Path(cfg.out) / name
        if not path.exists():
            continue
        kept = [json.dumps(x) + "\n" for x in plot.read_log(path) if step and x["step"] <= step]
        replace(path, "".join(kept))


def logged(cfg):
    """The lines of the run's metrics.jsonl so far, on its first rank."""
    path = Path(cfg.out) / "metrics.jsonl"
    if rank() != 0 or not path.exists():
        return []
    return plot.read_log(path)


def append(cfg, name, **fields):
    """One line of metrics.jsonl or samples.jsonl, flushed; rank 0 only."""
    if rank() != 0:
        return
    line = json.dumps(fields, default=str) + "\n"  # a row may hold dates
    try:
        with open(Path(cfg.out) / name, "a") as file:
            file.write(line)
    except OSError as error:
        steps = [checkpoint.number_of(path) for path in checkpoint.listed(cfg.out)]
        die(
            f"{error}: {len(line):,} bytes of {name} needed, {shutil.disk_usage(cfg.out).free:,} "
            f"free; the run stops, whole up to step {max(steps, default=0)}: make room, then "
            f"--resume {cfg.out}"
        )


# ==== 2. Time and signals =======================================================================


def stopwatch():
    """(lap, clock): lap(name) adds the seconds since the lap before to clock["seconds_" + name]."""
    clock = {"began": time.time()}
    for name in ("rollout", "reward", "train", "sync"):
        clock[f"seconds_{name}"] = 0.0
    last = [clock["began"]]

    def lap(name):
        now = time.time()
        clock[f"seconds_{name}"] += now - last[0]
        last[0] = now

    return lap, clock


def listen_for_signals():
    """SIGTERM and Ctrl-C: finish the step, save, leave. Again: leave at once (a batch system's
    SIGTERM comes twice, from it and from torchrun, hence the 3 s).

    Returns a function, for all ranks to call: the number of the first signal that came to any of
    them, 0 if none did.
    """
    came = []  # (number, when)

    def on_signal(number, frame):
        soon = 0.2 if number == signal.SIGINT else 3
        if came and time.time() - came[0][1] > soon:
            os._exit(128 + number)
        came.append((number, time.time()))
        if len(came) == 1:
            print0("run       finishing this step, then saving; once more leaves at once")

    def stopped():
        return int(all_reduce([came[0][0] if came else 0], "max")[0])

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    return stopped


def leave_at_signal(cfg, number, step, kept):
    """Exit with 128 + the signal's number, and say how to go on. kept: the last step saved."""
    saved = f", saved up to step {kept}" if kept < step else ""
    print0(
        f"run       stopped by a signal after step {step}{saved}; go on with: "
        f"python {sys.argv[0]} --resume {cfg.out}"
    )
    raise SystemExit(128 + number)


# ==== 3. Logs ===================================================================================


def announce(cfg, model, device, step):
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    share = "" if trained == parameters else f", {trained:,} of them trained"
    print0(
        f"run       {cfg.out}: {cfg.objective}, {parameters:,} parameters{share}, {world()} x "
        f"{device.type}, {step} of {cfg.steps} steps done"
    )


def log_step(cfg, step, metrics, updates, clock, device):
    """A line of metrics.jsonl, which is returned, and a line on the screen. updates: the stats of
    each optimizer step."""
    bad = [u for u in updates if not math.isfinite(u["grad_norm"])]
    if bad:
        print0(
            f"warning   step {step}: {len(bad)} of {len(updates)} optimizer steps skipped, their "
            f"gradient was not finite ({metrics['skipped']} so far)"
        )
    seconds = time.time() - clock.pop("began")
    metrics = dict(
        step=step,
        objective=cfg.objective,
        **metrics,
        **summary(updates),
        seconds=seconds,
        **clock,
        tokens_per_second=metrics["tokens"] / seconds,
        memory_gb=memory_gb(device),
    )
    append(cfg, "metrics.jsonl", **metrics)
    print0(PROGRESS.format(**metrics, steps=cfg.steps, left=(cfg.steps - step) * seconds / 60))
    return metrics


PROGRESS = (
    "step {step:5d}/{steps}  reward {reward:6.3f}  entropy {entropy:5.3f}  |g| {grad_norm:7.3f}  "
    "length {response_tokens:6.1f}  vllm-kl {rollout_kl:.1e}  {seconds:6.2f} s "
    "(gen {seconds_rollout:.2f}, train {seconds_train:.2f})  {tokens_per_second:7,.0f} tok/s  "
    "eta {left:.1f} min"
)


def summary(updates):
    """Means over the optimizer steps of a batch, and the largest ratio; 0 if there was none. Left
    out are steps without a token (all of their groups were dropped) and those that were skipped
    since their gradient was not finite: their NaN would be the log's."""
    counted = [u for u in updates if u["tokens"] and math.isfinite(u["grad_norm"])]
    found = {}
    for key in ("loss", "entropy", "clipped", "tis_mean", "rollout_kl", "kl", "grad_norm"):
        found[key] = sum(u[key] for u in counted) / max(len(counted), 1)
    found["ratio_max"] = max((u["ratio_max"] for u in counted), default=0.0)
    return found


def memory_gb(device):
    """The most that this process has held: on a CPU of the machine's memory; on a GPU since vLLM
    fell asleep, without the weights and the cache that it dropped then, which torch goes on
    counting."""
    if device.type == "cuda":
        from vllm.device_allocator.cumem import CuMemAllocator

        asleep = CuMemAllocator.get_instance().get_current_usage()
        return (torch.cuda.max_memory_allocated() - asleep) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def shown(drawn):
    """Two samples for people: the first of each of the first two groups."""
    return [group[0] for group in drawn[:2]]


def log_samples(cfg, step, drawn):
    for s in shown(drawn):
        append(
            cfg,
            "samples.jsonl",
            step=step,
            prompt=s["row"]["prompt"],
            response=s["text"],
            truth=s["row"]["truth"],
            reward=s["reward"],
            reason=s["reason"],
        )


def log_evaluation(cfg, step, scores, drawn=()):
    append(cfg, "metrics.jsonl", step=step, objective=cfg.objective, **scores)
    parts = [f"{key.removeprefix('eval/')} {value:.3f}" for key, value in scores.items()]
    print0(f"eval {step:5d}/{cfg.steps}  " + "  ".join(parts))
    for s in shown(drawn):
        prompt = s["row"]["prompt"][-60:]
        print0(f"  trained on  {prompt!r} -> {s['text'][:80]!r}  reward {s['reward']:g}")


def refuse_batch(cfg, step, share, drawn):
    """Better no step than one on rewards that mean nothing. Exits with code 2."""
    reasons = Counter()
    for s in (s for group in drawn for s in group):
        if s["lost"]:
            reasons["log-prob not finite"] += 1
        elif s["failed"]:
            reasons[s["failed"]] += 1
    why = ", ".join(f"{n} x {reason}" for reason, n in reasons.most_common(3))
    die(
        f"step {step}: {share:.0%} of its samples could not be scored (max_failed = "
        f"{cfg.max_failed}): {why}; step {step - 1} is saved and nothing was trained on them: mend "
        f"the verifier or the data, then --resume {cfg.out}"
    )


def refuse_gradients(cfg, step, batches):
    """A run that takes no step learns nothing. Exits with code 2."""
    die(
        f"step {step}: not one optimizer step of the last {batches} batches was taken, their "
        f"gradients are not finite; the weights are those of step {step - batches}, and saved: "
        f"look at ratio_max and rollout_kl in metrics.jsonl, or take a smaller lr = {cfg.lr}"
    )


def report(cfg):
    """At the end of a run: its picture, and a table of the first and the last evaluation."""
    if rank() == 0:
        plot.report(Path(cfg.out))
        trackers.finish()


# ==== 4. Signs of collapse ======================================================================


def first_weights(model):
    """{name: a copy of this rank's part} of the weights of a model that is not trained yet: W_0. A
    head of log Z is no part of the policy."""
    copies = {}
    for name, p in model.named_parameters():
        if not name.startswith("log_z."):
            copies[name] = shard_of(p).clone()
    return copies


@torch.no_grad()
def change_of_weights(model, first):
    """What FADE (arXiv 2607.01490) watches for collapse, of the change D = W_t - W_0 of weights:

        rank_one       sigma_1^2 / ||D||^2 of the output head's D [V,H], sigma_1 its largest
                       singular value: the share that one direction holds
        head_change    ||D||^2 of the output head over that of all weights together

    first: first_weights(). A head that is tied is the embedding, and D that one matrix's change.
    Both are 0 as long as nothing has changed. All ranks must come here.
    """
    # Squared norms of this rank's parts
    squares = {}
    head = None
    for name, p in model.named_parameters():
        if name not in first:
            continue
        change = shard_of(p) - first[name]
        squares[name] = torch.linalg.vector_norm(change).double().square()
        if p is model.lm_head.weight:
            head = change  # [V/ranks,H]
            of_head = squares[name]
    of_all = torch.stack(list(squares.values())).sum()

    # Of all ranks. Groups of ranks that hold a copy each (shard_size) count each part as often as
    # there are groups: shares stay what they are
    of_head, of_all = all_reduce([of_head.item(), of_all.item()])
    return dict(
        rank_one=leading_share(head, of_head),
        head_change=of_head / of_all if of_all else 0.0,
    )


MOST_ITERATIONS = 200
LEAST_GROWTH = 1e-6  # relative, of the share in an iteration


def leading_share(rows, square):
    """sigma_1^2 / ||D||^2 of a matrix D [V,H] of which this rank has some rows, or none; square is
    ||D||^2, of all ranks. By power iteration on D^T D from a fixed start, hence a lower bound. No
    rank sees the whole matrix: an iteration sums H + 1 numbers over the ranks."""
    if square == 0:
        return 0.0
    rows = rows / math.sqrt(square)  # as ||D|| = 1: what follows cannot underflow
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows.shape[1], generator=generator).to(rows)  # [H]
    x = F.normalize(x, dim=0)
    share = 0.0
    for _ in range(MOST_ITERATIONS):
        y = rows @ x  # [V/ranks]
        product = rows.t() @ y  # [H]
        *product, found = all_reduce([*product.tolist(), y.square().sum().item()])
        if found <= share * (1 + LEAST_GROWTH):
            break
        share = found
        x = F.normalize(torch.tensor(product).to(rows), dim=0)
    return share
