r"""
bench.py: every speed and memory figure that the docs quote, and the command that prints it.

    python tools/bench.py head       # the fused log-prob against its bare matrix products, the
                                     # materialised path and other libraries
    python tools/bench.py trainer    # an update on a frozen rollout file: tokens/s, MFU, peak
                                     # memory, pad tokens; TRL's on the same file
    python tools/bench.py rollout    # lad.generate against vLLM's LLM.generate, same parameters
    python tools/bench.py prefill    # a batch of the preset smol, its group's prompt computed once,
                                     # and once for each response
    python tools/bench.py sync       # the weight push against a copy of the same bytes
    python tools/bench.py step       # where the seconds of a tiny run's steps go, and the operators
                                     # of one of its minibatches
    python tools/bench.py verify     # answers and programs verified in a second
    python tools/bench.py all --out bench.json    # each in a process of its own; says of each that
                                                  # cannot run here why not

Ratios, not times: what is compared runs in turn (A, B, A, B, ..) in one process, after a warm-up; a
time is the median of its repeats, a ratio the median of the ratios within each turn, so that a
machine that slows down for a while slows both sides. On CUDA a time is between two events of the
stream, caches flushed before. Tables are markdown under a line with date, machine, torch, commit
and command.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median, stdev

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if __name__ == "__main__":  # as in lad.py: read when torch, OpenMP and vLLM are imported
    os.environ.setdefault("OMP_NUM_THREADS", str(min(16, len(os.sched_getaffinity(0)))))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")
    warnings.filterwarnings("ignore", category=FutureWarning)

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity
from torch.utils.flop_counter import FlopCounterMode

import lad
import verify
from harness import command, tiny
from harness.data import find_model, load_data, load_tokenizer
from harness.ranks import join
from harness.settings import did_you_mean, die, one_line

# Qwen2.5 as in the published config.json files: nothing is downloaded. small is for a CPU, mini for
# the tests
FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
)
MODELS = {
    "0.5b": (896, 4864, 24, 14, 2, 151936, True),
    "1.5b": (1536, 8960, 28, 12, 2, 151936, True),
    "7b": (3584, 18944, 28, 28, 4, 152064, False),
    "small": (256, 768, 4, 4, 2, 8192, True),
    "mini": (64, 96, 2, 2, 1, 512, False),
}
PEAK = 989e12  # FLOP/s, dense bf16, of an H100 or H200 SXM, by its data sheet
MIB = 2**20

# ==== 1. Measuring ==============================================================================


def timed(run, device):
    """Seconds that run() takes; on CUDA between two events, the L2 cache overwritten before the
    first."""
    if device.type == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    torch.empty(2**28, dtype=torch.int8, device=device).zero_()  # 256 MB; an H200's L2 holds 50
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def race(runs, repeats, device, warm_up=2):
    """{name: [seconds of each repeat]} of {name: function}, taken in turn; so is the warm-up, which
    is dropped."""
    times = {name: [] for name in runs}
    for turn in range(warm_up + repeats):
        for name, run in runs.items():
            seconds = timed(run, device)
            if turn >= warm_up:
                times[name].append(seconds)
    return times


def ratio(a, b):
    """Of a's time over b's: the median over turns."""
    return median(x / y for x, y in zip(a, b, strict=True))


@contextlib.contextmanager
def peak_memory(device):
    """{"bytes": most that was allocated in the block beyond what was there before}.

    CUDA: the statistics of torch's allocator. CPU: the running sum of the allocations and frees
    that torch's allocator reports to the profiler: every tensor, also inside operators, but not
    MKL's and oneDNN's scratch space.
    """
    found = {}
    if device.type == "cuda":  # counted as the host asks for it: no need to wait for the device
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield found
        found["bytes"] = torch.cuda.max_memory_allocated() - before
        return
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profile:
        yield found
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    found["bytes"] = max(itertools.accumulate([e.nbytes() for e in events], initial=0))


def peak_of(device, run):
    """The peak of one call."""
    with peak_memory(device) as memory:
        run()
    return memory["bytes"]


# ==== 2. Printing ===============================================================================


def about(argv, device):
    """What no figure can be read without: date, machine, torch, commit, command."""
    if device.type == "cuda":
        machine = torch.cuda.get_device_name()
    else:
        with open("/proc/cpuinfo") as f:
            names = [line.split(":")[1].strip() for line in f if line.startswith("model name")]
        cores = len(os.sched_getaffinity(0))
        threads = os.environ.get("OMP_NUM_THREADS")
        load = os.getloadavg()[0]
        name = names[0] if names else "unknown CPU"
        machine = f"{name}, {cores} cores, OMP_NUM_THREADS={threads}, load {load:.1f}"
    commit = git("rev-parse", "--short", "HEAD") or "unknown"
    if git("status", "--porcelain", "-uno"):
        commit += " with changes"
    return dict(
        date=time.strftime("%Y-%m-%d"),
        machine=machine,
        torch=torch.__version__,
        commit=commit,
        command=re.sub(r" --out[ =]\S+", "", " ".join(["python tools/bench.py", *argv])),
    )


def git(*words):
    ran = subprocess.run(["git", "-C", str(lad.HERE), *words], capture_output=True, text=True)
    return ran.stdout.strip()


def cell(x):
    """A value as a table has it: three digits, thousands with commas."""
    if isinstance(x, int):
        return f"{x:,}"
    if isinstance(x, float):
        return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"
    return str(x)


def show(where, title, columns, rows, note):
    """Print a table as markdown. A row shorter than `columns` ends with the reason why it has no
    figures."""
    machine = f"{where['date']}, {where['machine']}, torch {where['torch']}"
    print(f"\n**{title}** ({machine}, commit {where['commit']}: `{where['command']}`)\n")
    for row in [columns, ["---"] * len(columns), *rows]:
        cells = [cell(x) for x in row] + [""] * (len(columns) - len(row))
        print("| " + " | ".join(cells) + " |")
    print("\n" + note if note else "", flush=True)


# ==== 3. head: the fused log-prob ===============================================================


def head_paths(hidden, weight, targets, up, chunk):
    """{path: function() -> logp [N], nothing for bare products}. up [N]: d loss / d logp, and
    d entropy where that is asked for."""
    bare = bare_products(hidden.detach(), weight.detach())

    def run(path, outputs):
        """Forward, and backward through that many of its outputs."""
        with torch.set_grad_enabled(outputs > 0):
            found = path(hidden, weight, targets)[: max(outputs, 1)]
        if outputs:
            torch.autograd.grad(found, (hidden, weight), [up.to(x.dtype) for x in found])
        return found[0].detach()

    fused = partial(lad.fused_logprob, chunk=chunk)
    early = partial(fused, gradient=lambda part, *_: up[part])
    naive = lad.naive_logprob
    chunked = partial(torch_head, chunked=True)
    return {
        "bare products, 2 NHV": partial(bare, "logits"),
        "bare products, 6 NHV": partial(bare, "logits", "hidden", "weight"),
        "bare products, 8 NHV": partial(bare, "logits", "logits", "hidden", "weight"),
        "forward only: fused": partial(run, fused, 0),
        "forward only: materialised": partial(run, naive, 0),
        "fused, gradient formed in the forward": partial(run, early, 1),
        "fused, logits formed again": partial(run, fused, 1),
        "fused, with entropy gradient": partial(run, fused, 2),
        "materialised (naive_logprob)": partial(run, naive, 1),
        "materialised, with entropy gradient": partial(run, naive, 2),
        "F.linear_cross_entropy": partial(run, torch_head, 1),
        "F.linear_cross_entropy, chunked": partial(run, chunked, 1),
        "Liger fused linear cross-entropy": partial(run, liger_head, 1),
        "TRL chunked log-prob": partial(run, trl_head, 1),
    }


def bare_products(hidden, weight):
    """bare(*which): matrix products of 2 NHV each, into buffers that are there."""
    logits = hidden.new_empty(len(hidden), len(weight))
    dhidden = torch.empty_like(hidden)
    dweight = torch.empty_like(weight)

    def bare(*which):
        for product in which:
            if product == "logits":
                torch.mm(hidden, weight.t(), out=logits)
            elif product == "hidden":
                torch.mm(logits, weight, out=dhidden)
            else:
                torch.mm(logits.t(), hidden, out=dweight)

    return bare


def torch_head(hidden, weight, targets, chunked=False):
    """torch's own, in the inputs' dtype."""
    options = torch.nn.LinearCrossEntropyOptions() if chunked else None
    settings = dict(reduction="none", options=options)
    return (-F.linear_cross_entropy(hidden, weight, targets, **settings),)


def liger_head(hidden, weight, targets):
    liger = import_module("liger_kernel.transformers.functional")
    return (-liger.liger_fused_linear_cross_entropy(hidden, weight, targets, reduction="none"),)


def trl_head(hidden, weight, targets):
    """As TRL's GRPOTrainer calls it."""
    apply = import_module("trl.kernels").ChunkedLogProbFunction.apply
    return apply(hidden, weight, None, targets, 1.0, 32768, None, 1.0, ("log_probs", "entropy"))


def try_path(run, exact, device):
    """[FLOPs of its matrix products, peak extra MiB, max error of logp], or the reason why there
    are none: not installed, out of memory, .."""
    try:
        # The counter sees eager operators only
        eager = torch.compiler.set_stance("force_eager")
        with eager, FlopCounterMode(display=False) as counter:
            logp = run()
        run()  # compiles
        extra = peak_of(device, run)
    except Exception as error:
        return one_line(error)[:150]
    if logp is None:
        return counter.get_total_flops(), "", ""
    worst = (logp.double() - exact).abs().max().item()
    return counter.get_total_flops(), extra / MIB, worst


def head_table(N, H, V, chunk, repeats, device):
    # Inputs, and the log-probs in float64
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    hidden = torch.randn(N, H, generator=generator).to(device, dtype).requires_grad_()
    weight = torch.randn(V, H, generator=generator).mul(H**-0.5)
    weight = weight.to(device, dtype).requires_grad_()
    targets = torch.randint(V, (N,), generator=generator).to(device)
    up = torch.randn(N, generator=generator).to(device)
    exact = exact_logprob(hidden.detach(), weight.detach(), targets)

    # What each path costs, then those that run here against each other
    paths = head_paths(hidden, weight, targets, up, chunk)
    found = {name: try_path(run, exact, device) for name, run in paths.items()}
    able = {name: run for name, run in paths.items() if not isinstance(found[name], str)}
    times = race(able, repeats, device)

    rows = []
    for name in paths:
        if name not in times:
            rows.append([name, found[name]])
            continue
        flops, extra, error = found[name]
        seconds = median(times[name])
        factor = flops / N / H / V
        bare = times.get(f"bare products, {factor:g} NHV")
        against = ratio(times[name], bare) if bare else ""
        speed = flops / seconds / 1e12 if bare else ""
        rows.append([name, factor, seconds * 1e3, against, speed, extra, error])

    title = f"head, N={N:,} H={H:,} V={V:,}, {str(dtype)[6:]}, chunk {chunk:,}, {repeats} repeats"
    columns = ["path", "NHV counted", "ms", "x bare, same FLOPs", "TFLOP/s", "peak extra MiB"]
    columns.append("max error of logp")
    gradients = (hidden.nbytes + weight.nbytes) / MIB
    note = (
        f"Forward and backward unless it says otherwise. NHV ({N * H * V / 1e9:.4g} GFLOP here): "
        "the matrix products that FlopCounterMode sees; it cannot look into a library's own "
        "operators, and misses addmm_. Bare products: input dtype in and out, whole, into buffers "
        "that are there. Peak extra: beyond the inputs, the gradients of hidden and weight "
        f"({gradients:.4g} MiB) included. Error: nats, against float64 of the same inputs."
    )
    return title, columns, rows, note


def exact_logprob(hidden, weight, targets):
    """[N] in float64, 1,024 tokens at a time."""
    weight = weight.double()
    parts = []
    for h, t in zip(hidden.split(1024), targets.split(1024), strict=True):
        parts.append(lad.naive_logprob(h.double(), weight, t)[0])
    return torch.cat(parts)


def head(args, device):
    lad.turn_on_compile(lad.Config(), device, None)
    default = "1024" if device.type == "cpu" else "4096,16384"
    tokens = [int(N) for N in (args.tokens or default).split(",")]
    for name, N in itertools.product(shapes(args, device, "small", "0.5b,1.5b,7b"), tokens):
        H, V = MODELS[name][0], MODELS[name][5]
        chunk = args.chunk or min(4096, math.ceil(N / 4))
        yield head_table(N, H, V, chunk, args.repeats or 10, device)


# ==== 4. trainer: one update on a frozen rollout file ===========================================


def write_rollouts(path, vocabulary, prompts, group, median, longest, seed=0):
    """A rollout batch as JSON lines {prompt, tokens, behaviour, adv}, prompts x group of them, the
    same bytes for the same arguments. Returns (them, the file's SHA-256).

    Lengths of responses are log-normal (sigma 0.9: the mean is 1.5 medians) and cut at `longest`,
    prompts a tenth to a quarter of it; tokens are uniform, log-probs about -log V as random weights
    give them, advantages GRPO's of Bernoulli rewards.
    """
    rng = random.Random(seed)
    words = range(vocabulary)
    lines = []
    for _ in range(prompts):
        prompt = rng.choices(words, k=rng.randint(longest // 10 + 1, longest // 4 + 1))
        rate = rng.random()
        rewards = [float(rng.random() < rate) for _ in range(group)]
        for reward in rewards:
            n = round(rng.lognormvariate(math.log(median), 0.9))
            n = max(1, min(longest, n))
            tokens = rng.choices(words, k=n)
            adv = (reward - fmean(rewards)) / (stdev(rewards) + 1e-6)
            logp = [round(-math.log(vocabulary) + rng.gauss(0, 0.01), 4) for _ in range(n)]
            lines.append(dict(prompt=prompt, tokens=tokens, adv=adv, behaviour=logp))
    text = "".join(json.dumps(line) + "\n" for line in lines)
    Path(path).write_text(text)
    return lines, hashlib.sha256(text.encode()).hexdigest()


def random_model(name, folder, device):
    """`folder`, now of a model of that shape with random weights, fp32 on a CPU and bf16 on
    CUDA."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    shape = dict(zip(FIELDS, MODELS[name], strict=True))
    shape.update(max_position_embeddings=32768, bos_token_id=None, eos_token_id=0, pad_token_id=1)
    with device:
        model = Qwen2ForCausalLM(Qwen2Config(**shape))
    model.to(torch.bfloat16 if device.type == "cuda" else torch.float32)
    model.save_pretrained(folder)
    return folder


def start(argv, device):
    """A Config, in the process group (of one) that lad.py runs in."""
    cfg = lad.load_config([*argv, "--device", device.type])
    if not torch.distributed.is_initialized():
        join(cfg)
        lad.turn_on_compile(cfg, device, None)
    return cfg


def updates(cfg, folder, device):
    """(model, update): update(samples, **knobs) makes one optimizer step of lad.py on them."""
    model = lad.build_model(folder, cfg, device)
    options = dict(weight_decay=cfg.weight_decay, fused=True)
    optimizer = torch.optim.AdamW(model.parameters(), cfg.lr, (0.9, cfg.beta2), **options)

    def update(samples, **knobs):
        mine = dataclasses.replace(cfg, **knobs)
        if mine.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            model.gradient_checkpointing_disable()
        lad.accumulate_gradient(model, samples, mine, device)
        lad.optimizer_step(model, optimizer, mine)

    return model, update


def update_flops(config, samples, computed):
    """FLOPs of a forward and backward without recompute: 6 for each weight of the blocks' matrices
    and each of `computed` tokens, 6 HV for each response token, and 6 L heads head_dim T^2 for the
    attention of each sequence of T tokens (causal: half of the square)."""
    H = config.hidden_size
    L = config.num_hidden_layers
    heads = config.num_attention_heads
    D = getattr(config, "head_dim", None) or H // heads
    kv_heads = config.num_key_value_heads
    block = 2 * H * D * (heads + kv_heads) + 3 * H * config.intermediate_size
    squares = sum((len(s["prompt"]) + len(s["tokens"])) ** 2 for s in samples)
    responses = sum(len(s["tokens"]) for s in samples)
    head = H * config.vocab_size * responses
    return 6 * (L * block * computed + head + L * heads * D * squares)


def padded(samples, key, side, device):
    """(ids, mask), each [samples, longest], padded on one side."""
    ids = [torch.tensor(s[key]) for s in samples]
    ones = [torch.ones(len(s[key]), dtype=torch.long) for s in samples]
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True, padding_side=side)
    return pad(ids).to(device), pad(ones).to(device)


def trl_updates(folder, samples, cfg, device, repeats, our_turn):
    """The same update by TRL's GRPOTrainer: its loop, loss, fused head and optimizer, on what its
    rollouts would have been, padded as it pads. our_turn() is called before each of its steps.
    Returns (seconds of each step, bytes at its peak, pad tokens)."""
    import datasets
    import transformers
    import trl

    # What its rollouts would have been
    batch = {}
    batch["prompt_ids"], batch["prompt_mask"] = padded(samples, "prompt", "left", device)
    batch["completion_ids"], batch["completion_mask"] = padded(samples, "tokens", "right", device)
    batch["advantages"] = torch.tensor([s["adv"] for s in samples], device=device)
    batch["num_items_in_batch"] = batch["completion_mask"].sum()
    width = batch["prompt_ids"].shape[1] + batch["completion_ids"].shape[1]
    real = int(batch["prompt_mask"].sum() + batch["completion_mask"].sum())

    # As many rows in a forward as micro_tokens allow
    rows = 1
    for n in range(2, len(samples) + 1):
        if len(samples) % n == 0 and n * width <= cfg.micro_tokens:
            rows = n

    began, ended, memories = [], [], []
    watch = contextlib.ExitStack()

    def rollouts(inputs):
        """Asked for at the start of each step: the first warms up, the last is watched."""
        if device.type == "cuda":
            torch.cuda.synchronize()
        ended.append(time.perf_counter())  # of the step before
        if 1 < len(ended) <= repeats + 1:
            our_turn()
        if len(ended) == repeats + 2:
            memories.append(watch.enter_context(peak_memory(device)))
        began.append(time.perf_counter())  # of this one
        return dict(batch)

    config = trl.GRPOConfig(
        folder,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=len(samples) // rows,
        num_generations=cfg.group,
        max_steps=repeats + 2,
        learning_rate=cfg.lr,
        beta=0.0,
        bf16=device.type == "cuda",
        use_cpu=device.type == "cpu",
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    kind = dict(dtype=torch.float32, attn_implementation="sdpa")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **kind).to(device)
    trainer = trl.GRPOTrainer(
        model,
        lambda **kwargs: 0.0,
        config,
        datasets.Dataset.from_list([{"prompt": "x"}] * len(samples)),
        processing_class=tiny.make_tokenizer(),
    )
    trainer._generate_and_score_completions = rollouts
    with watch:
        trainer.train()
    seconds = [end - start for start, end in zip(began[1:-1], ended[2:], strict=True)]
    return seconds, memories[0]["bytes"], len(samples) * width - real


def trainer_table(name, repeats, device, folder):
    # The frozen rollouts; once more with no two prompts alike, so that there is nothing to share
    cuda = device.type == "cuda"
    size = dict(prompts=4, group=8, median=48, longest=256)
    if cuda:
        size = dict(prompts=16, group=8, median=700, longest=4096)
    samples, digest = write_rollouts(f"{folder}/rollouts.jsonl", MODELS[name][5], **size)
    alone = [dict(s, prompt=[i, *s["prompt"][1:]]) for i, s in enumerate(samples)]

    # Our updates on them, and a large matrix product as the machine's best
    argv = ["--objective", "grpo", "--group", str(size["group"]), "--checkpointing", "false"]
    cfg = start([*argv, "--micro_tokens", "16384" if cuda else "2048"], device)
    model, update = updates(cfg, random_model(name, folder, device), device)
    side = 8192 if cuda else 1024
    dtype = torch.bfloat16 if cuda else torch.float32
    square = torch.randn(side, side, device=device, dtype=dtype)
    data = {"lad.py": samples, "lad.py, recompute": samples, "lad.py, prompts not shared": alone}
    runs = {}
    for label, part in data.items():
        runs[label] = partial(update, part, checkpointing="recompute" in label)
    runs["matmul"] = lambda: square @ square
    race(runs, 0, device)

    # What each computes
    computed, pads, memory = {}, {}, {}
    for label, part in data.items():
        micros = lad.micro_batches(part, cfg)
        computed[label] = sum(len(s["tokens"]) for s in part)
        for micro in micros:
            computed[label] += sum(len(prompt) for prompt in {tuple(s["prompt"]) for s in micro})
        packed = sum(lad.pack(micro, torch.device("cpu"))["ids"].numel() for micro in micros)
        pads[label] = packed - computed[label]
        memory[label] = peak_of(device, runs[label])

    # In turn with TRL's, where it is installed
    times = {label: [] for label in runs}

    def our_turn():
        for label, run in runs.items():
            times[label].append(timed(run, device))

    missing = []
    try:
        theirs = trl_updates(folder, samples, cfg, device, repeats, our_turn)
        times["TRL"], memory["TRL"], pads["TRL"] = theirs
    except ImportError as error:
        missing = [["TRL", one_line(error)[:150]]]
        for _ in range(repeats):
            our_turn()

    # Rows
    tokens = sum(len(s["prompt"]) + len(s["tokens"]) for s in samples)
    responses = sum(len(s["tokens"]) for s in samples)
    computed["TRL"] = tokens
    reached = 2 * side**3 / min(times.pop("matmul"))
    best = PEAK if cuda else reached
    rows = []
    for label, t in times.items():
        seconds = median(t)
        mfu = update_flops(model.config, samples, computed[label]) / seconds / best
        speed = ratio(times["lad.py"], t)
        row = [label, seconds, tokens / seconds, speed, mfu, memory[label] / MIB]
        rows.append([*row, computed[label], pads[label]])

    million = sum(p.numel() for p in model.parameters()) / 1e6
    title = f"trainer, Qwen2 of shape {name}, {million:,.1f}M random weights, {repeats} repeats"
    columns = ["update", "s", "tokens/s", "speed / lad.py's", "MFU", "peak extra MiB"]
    columns += ["tokens computed", "pad tokens"]
    note = (
        f"Frozen rollouts: {len(samples)} samples of {size['prompts']} prompts, {tokens:,} tokens, "
        f"{responses:,} of them in responses, SHA-256 {digest[:12]}; tokens/s is of all these. One "
        f"optimizer step of {len(micros)} micro-batches. MFU: update_flops of the tokens computed, "
        f"no pads, no recompute, over {'989 TFLOP/s' if cuda else 'the matmul'}; a {side:,} matmul "
        f"reached {reached / 1e12:.3g} TFLOP/s. Peak extra: beyond weights and Adam's moments."
    )
    if not cuda:
        note += " On a CPU lad.py pads inside attention, which is not counted."
    return title, columns, rows + missing, note


def trainer(args, device):
    for name in shapes(args, device, "small", "0.5b,1.5b"):
        with tempfile.TemporaryDirectory() as folder:
            yield trainer_table(name, args.repeats or 5, device, folder)


# ==== 5. rollout and sync: vLLM =================================================================


@functools.cache
def engine(name, device):
    """(cfg, vLLM, the trainer's model) of a shape; one for the process."""
    cfg = start(["--config", "tiny"], device)
    with tempfile.TemporaryDirectory() as folder:
        if name == "tiny":
            folder = str(find_model(cfg))
        else:
            random_model(name, folder, device)
        llm = lad.start_vllm(cfg, folder, device, skip_tokenizer_init=name != "tiny")
        return cfg, llm, lad.build_model(folder, cfg, device)


def rollout(args, device):
    import transformers
    import vllm

    cfg, llm, model = engine("tiny", device)
    tokenizer = tiny.make_tokenizer()
    with open(tiny.make()["train"]) as f:
        prompts = [tokenizer.encode(json.loads(line)["prompt"]) for line in f][: cfg.prompts]

    def theirs(**options):
        """Tokens that LLM.generate writes."""
        transformers.set_seed(0)
        sampling = dict(n=cfg.group, temperature=cfg.temperature, top_p=cfg.top_p)
        sampling.update(max_tokens=cfg.max_tokens, detokenize=False, **options)
        params = vllm.SamplingParams(**sampling)
        asked = [{"prompt_token_ids": ids} for ids in prompts]
        written = llm.generate(asked, params, use_tqdm=False)
        return sum(len(o.token_ids) for out in written for o in out.outputs)

    def ours():
        groups = lad.generate(llm, cfg, prompts, cfg.group, seed=0)
        return sum(len(s["tokens"]) for group in groups for s in group)

    calls = {
        "LLM.generate": partial(theirs, logprobs=0, flat_logprobs=True),
        "LLM.generate, no log-probs": theirs,
        "lad.generate": ours,
    }
    repeats = args.repeats or 10
    with lad.awake(llm, model, device):
        written = {name: call() for name, call in calls.items()}
        times = race(calls, repeats, device)
    rows = []
    for name, t in times.items():
        seconds = median(t)
        against = ratio(t, times["LLM.generate"])
        rows.append([name, seconds, written[name], written[name] / seconds, against])
    title = f"rollout, tiny, {len(prompts)} prompts x {cfg.group} responses, {repeats} repeats"
    columns = ["call", "s", "tokens", "tokens/s", "time / LLM.generate's"]
    note = "One engine; the same sampling parameters and the same seed before each call."
    yield title, columns, rows, note


def prefill(args, device):
    """A batch of a preset, with its own model and prompts: what sharing a group's prompt saves."""
    import transformers
    import vllm

    # The preset's model and its first prompts
    argv = ["--config", args.config, "--checkpoint_every", "0"]
    if args.model:
        argv += ["--model", args.model]
    cfg = start(argv, device)
    folder = str(find_model(cfg))
    rows = load_data(cfg, load_tokenizer(folder))
    prompts = [row["prompt_ids"] for row in rows[: cfg.prompts]]
    llm = lad.start_vllm(cfg, folder, device)
    model, update = updates(cfg, folder, device)

    def generate(**options):
        """LLM.generate with the cache of prompts empty; its outputs."""
        llm.reset_prefix_cache()
        transformers.set_seed(0)
        sampling = dict(n=cfg.group, temperature=cfg.temperature, max_tokens=cfg.max_tokens)
        sampling.update(logprobs=0, flat_logprobs=True, detokenize=False, **options)
        asked = [{"prompt_token_ids": ids} for ids in prompts]
        return llm.generate(asked, vllm.SamplingParams(**sampling), use_tqdm=False)

    block = contextlib.ExitStack()

    def push():
        block.enter_context(lad.awake(llm, model, device))

    # What the updates train on
    push()
    samples = []
    for ids, group in zip(prompts, lad.generate(llm, cfg, prompts, cfg.group, seed=0), strict=True):
        samples += [dict(s, prompt=ids, adv=1.0) for s in group]
    block.close()

    # A step of the run, with both ways of generation
    runs = {
        "weights pushed": push,
        "generation, a prompt for each response": partial(generate, skip_reading_prefix_cache=True),
        "generation, a prompt for each group": generate,
        "leaving awake": block.close,
        "update": partial(update, samples),
    }
    times = race(runs, args.repeats or 5, device)
    alone, shared = (times[name] for name in runs if name.startswith("generation"))
    rest = [times[name] for name in ("weights pushed", "leaving awake", "update")]
    batch = [sum(parts) for parts in zip(alone, *rest, strict=True)]
    batch_shared = [sum(parts) for parts in zip(shared, *rest, strict=True)]

    rows = [[name, median(times[name]), ""] for name in ("weights pushed", "update")]
    rows.append(["generation, a prompt for each response", median(alone), 1.0])
    rows.append(["generation, a prompt for each group", median(shared), ratio(shared, alone)])
    rows.append(["batch, a prompt for each response", median(batch), 1.0])
    rows.append(
        ["batch, a prompt for each group", median(batch_shared), ratio(batch_shared, batch)]
    )
    lengths = [len(ids) for ids in prompts]
    title = f"prefill, {args.config}, {len(prompts)} prompts x {cfg.group} responses, "
    title += f"prompts of {min(lengths)} to {max(lengths)} tokens, {len(batch)} repeats"
    columns = ["what", "s", "time / with a prompt for each response"]
    note = "One engine; vLLM is asked not to read its cache of prompts, or may."
    yield title, columns, rows, note


def sync(args, device):
    name = args.shape or ("tiny" if device.type == "cpu" else "1.5b")
    if name != "tiny":
        [name] = shapes(args, device, name, name)
    cfg, llm, model = engine(name, device)

    # The weights as they go over, and buffers of their sizes
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    source = [w for _, w in lad.named_weights(model, dtype)]
    target = [torch.empty_like(w) for w in source]
    size = sum(w.nbytes for w in source)

    block = contextlib.ExitStack()

    def wake():
        block.enter_context(lad.awake(llm, model, device))

    def gather():
        for _ in lad.named_weights(model, dtype):
            pass

    def copy():
        for t, s in zip(target, source, strict=True):
            t.copy_(s)

    runs = {
        "awake: weights pushed, engine ready": wake,
        "leaving awake": block.close,
        "gather and cast alone (named_weights)": gather,
        "copy of the same bytes": copy,
    }
    repeats = args.repeats or 20
    times = race(runs, repeats, device)
    rows = []
    for label, t in times.items():
        seconds = median(t)
        speed = "" if label == "leaving awake" else size / seconds / 1e9
        rows.append([label, seconds, speed, ratio(t, times["copy of the same bytes"])])
    title = f"sync, {name}, {size / MIB:.4g} MiB in {len(source)} tensors, {repeats} repeats"
    columns = ["what", "s", "GB/s", "time / copy's"]
    yield title, columns, rows, "Copy: tensor by tensor, into buffers that are there, same device."


# ==== 6. step: a tiny run, and one of its minibatches under the profiler ========================

# lad.py with the time before each line that it prints
STAMPED = """
import sys, time, lad
from harness import tracking
say = tracking.print0
tracking.print0 = lambda *a: say(time.time(), *a)
lad.main(sys.argv[1:])
"""


def step(args, device):
    yield profile_minibatch(device)

    # A run, and when each of its lines was printed; the first two steps warm up
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--config", "tiny", "--device", device.type, "--steps", str(args.steps)]
        flags += ["--out", f"{folder}/run", "--eval_data", "", "--checkpoint_every", "0"]
        # not of this process's group
        hidden = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        env = {key: value for key, value in os.environ.items() if key not in hidden}
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        program = [sys.executable, "-c", STAMPED, *flags]
        run = subprocess.run(program, cwd=lad.HERE, env=env, **pipes)
        if run.returncode:
            raise RuntimeError(f"lad.py says: {one_line(run.stdout.splitlines()[-1])}")
        with open(f"{folder}/run/metrics.jsonl") as f:
            steps = [x for x in map(json.loads, f) if "seconds" in x][2:]
    printed = [line.split() for line in run.stdout.splitlines()]
    stamps = [float(words[0]) for words in printed if words[1:2] == ["step"]][1:]

    # What the parts of a step took, and what is left of it
    split = {}
    for part in ("rollout", "reward", "train", "sync"):
        split[part] = [x[f"seconds_{part}"] for x in steps]
    whole = [b - a for a, b in pairwise(stamps)]
    known = [sum(parts) for parts in zip(*split.values(), strict=True)]
    split["other"] = [a - b for a, b in zip(whole, known, strict=True)]
    if args.picture:
        draw_split(args.picture, split)

    total = stamps[-1] - stamps[0]
    rows = []
    for name, s in split.items():
        rows.append([name, fmean(s), sum(s) / total * 100, f"{min(s):.2g} to {max(s):.2g}"])
    columns = ["part", "s, mean", "% of the step", "range"]
    note = (
        "By lad.py's own clock: reward is the verifier and the advantages; train packing, old "
        f"log-probs and all optimizer steps. A step, {total / len(steps):.3g} s, is from one "
        "printed line to the next; other is what the four leave of it: metrics, samples, printing."
    )
    yield f"step, tiny, {len(steps)} of {args.steps} steps", columns, rows, note


def draw_split(path, split):
    """A stacked bar for each step."""
    import matplotlib.figure

    ax = matplotlib.figure.Figure(figsize=(8, 3.6), layout="tight").subplots()
    total = sum(sum(seconds) for seconds in split.values())
    bottom = [0.0] * len(split["other"])
    for name, seconds in split.items():
        label = f"{name}, {sum(seconds) / total:.1%}"
        ax.bar(range(3, len(seconds) + 3), seconds, bottom=bottom, label=label)
        bottom = [a + b for a, b in zip(bottom, seconds, strict=True)]
    ax.set(xlabel="step", ylabel="seconds", title="Where the time of a step goes (tiny preset)")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, reverse=True)
    ax.figure.savefig(path, dpi=120)


def profile_minibatch(device, top=10):
    """The operators of one optimizer step of the tiny preset (forward, backward, AdamW), by their
    own time."""
    # Samples of the preset's size, vocabulary and about its lengths
    cfg = start(["--config", "tiny"], device)
    prompts = cfg.prompts // cfg.minibatches
    samples, _ = write_rollouts(os.devnull, 24, prompts, cfg.group, 7, cfg.max_tokens)
    _, update = updates(cfg, find_model(cfg), device)
    run = partial(update, samples)
    alone = median(race({"update": run}, 5, device)["update"])

    kinds = [ProfilerActivity.CPU]
    clock = "self_cpu_time_total"  # in microseconds
    if device.type == "cuda":
        kinds.append(ProfilerActivity.CUDA)
        clock = "self_device_time_total"
    with torch.profiler.profile(activities=kinds) as profile:
        run()
    events = [(getattr(e, clock) / 1e3, e) for e in profile.key_averages()]
    events.sort(key=lambda pair: pair[0], reverse=True)
    total = sum(ms for ms, _ in events)

    rows = [[e.key[:60], e.count, ms, ms / total * 100] for ms, e in events[:top]]
    title = f"step, operators of one training minibatch of tiny ({len(samples)} samples)"
    note = (
        f"torch.profiler, {device.type} time, {total:.1f} ms in all ({len(events)} operators), its "
        "own cost included: shares, not speeds. The same update without it: "
        f"{alone * 1e3:.1f} ms, Python included."
    )
    return title, ["operator", "calls", "ms, its own", "%"], rows, note


# ==== 7. verify =================================================================================


def verified(args, device):
    items = right_answers(args.items)
    with verify.Verifier(workers=args.workers) as verifier:
        every = [item for batch in items.values() for item in batch]
        right = sum(verifier.score(every))
        if right != len(every):
            raise RuntimeError(
                f"only {right:g} of {len(every)} right answers were accepted: the verifier does "
                "not work here"
            )
        runs = {name: partial(verifier.score, batch) for name, batch in items.items()}
        repeats = args.repeats or 5
        times = race(runs, repeats, torch.device("cpu"))
    rows = []
    for name, t in times.items():
        n = len(items[name])
        seconds = median(t)
        rows.append([name, n, n / seconds, seconds / n * 1e3 * args.workers])
    title = f"verify, {args.workers} workers, {repeats} repeats"
    columns = ["what", "items", "a second", "ms of a worker for each"]
    yield title, columns, rows, "Plain numbers stand behind 8,500 characters of text."


def right_answers(n):
    """{kind of answer: [(kind, response, truth)]}, n plain numbers and a share of that of the
    rest."""
    reasoning = "Long reasoning. " * 530
    numbers = [("math", f"{reasoning}\\boxed{{{i}}}", str(i)) for i in range(n)]
    expressions = [("math", f"\\boxed{{x+{i}}}", f"{i}+x") for i in range(math.ceil(n / 20))]
    prints = ("code", "```python\nprint(7)\n```", {"inputs": ["3 4"], "outputs": ["7"]})
    calls = {"inputs": ["3\n4"], "outputs": ["7"], "fn_name": "add"}
    adds = ("code", "```python\ndef add(a, b): return a + b\n```", calls)
    return {
        "plain numbers": numbers,
        "expressions": expressions,
        "programs on stdin": [prints] * math.ceil(n / 40),
        "programs called by tests": [adds] * math.ceil(n / 40),
    }


# ==== 8. main ===================================================================================

TABLES = dict(head=head, trainer=trainer, rollout=rollout, prefill=prefill)
TABLES |= dict(sync=sync, step=step, verify=verified)


def shapes(args, device, cpu, cuda):
    """Names of MODELS: those asked for, else what suits the device."""
    default = cpu if device.type == "cpu" else cuda
    names = (args.shape or default).split(",")
    for name in names:
        if name not in MODELS:
            die(f"--shape {name!r}{did_you_mean(name, MODELS)}")
    return names


def parse(argv):
    parser = command.parser(__doc__)
    parser.add_argument("tables", nargs="+", choices=[*TABLES, "all"], metavar="TABLE")
    several = f"of {', '.join(MODELS)}: for head and trainer several with commas, for sync one"
    for name, default, text in (
        ("device", "auto", "auto, cpu or cuda"),
        ("shape", "", f"{several}, or tiny"),
        ("tokens", "", "head: N, several with commas; 1024, on CUDA 4096,16384"),
        ("chunk", 0, "head: tokens whose logits exist at once; 0: N/4, at most 4096"),
        ("repeats", 0, "turns of each comparison; 0: as suits it"),
        ("steps", 12, "step: rollout batches of the run"),
        ("items", 2000, "verify: plain numbers in a turn"),
        ("workers", 2, "verify: processes"),
        ("config", "smol", "prefill: the preset"),
        ("model", "", "prefill: another model than the preset's, a folder or a hub name"),
        ("out", "", "the tables as JSON too, in this file"),
        ("picture", "", "step: a PNG of the split"),
    ):
        parser.add_argument(f"--{name}", type=type(default), default=default, help=text)
    args = parser.parse_args(argv)
    if args.device not in ("auto", "cpu", "cuda"):
        parser.error(f"--device {args.device}: expected auto, cpu or cuda")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    if args.steps < 3:
        parser.error(f"--steps {args.steps}: expected at least 3 steps, two to warm up")
    return args


def run_each(argv):
    """Every table in a process of its own: (the tables, [name, "yes" or why it did not run])."""
    found, became = [], []
    for name in TABLES:
        words = [name if word == "all" else word for word in argv]
        with tempfile.NamedTemporaryFile(suffix=".json") as out:
            program = [sys.executable, __file__, *words, "--out", out.name]
            ran = subprocess.run(program, stderr=subprocess.PIPE, text=True)
            found += json.loads(Path(out.name).read_text() or "[]")
        reason = "yes"
        if ran.returncode:  # the last line of an error is the reason
            reason = one_line(ran.stderr.strip().splitlines()[-1])
        became.append([name, reason])
    return found, became


def main(argv):
    args = parse(argv)
    device = torch.device("cpu")
    if torch.cuda.is_available() and args.device != "cpu":
        device = torch.device("cuda", 0)
    where = about(argv, device)
    found = []
    failed = ""
    if "all" in args.tables:
        found, became = run_each(argv)
        show(where, "all", ["table", "ran, or why not"], became, "")
    else:
        for name in args.tables:
            try:
                for title, columns, rows, note in TABLES[name](args, device):
                    show(where, title, columns, rows, note)
                    table = dict(title=title, columns=columns, rows=rows, note=note)
                    found.append(dict(table=name, **where, **table))
            except (ImportError, RuntimeError) as error:  # a package that is not there, memory, ..
                failed = f"{name}: {one_line(error)}"
    if args.out:
        Path(args.out).write_text(json.dumps(found, indent=1))
    if failed:
        die(failed)


if __name__ == "__main__":
    command.run(main)
