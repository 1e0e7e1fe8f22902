"""
What a run of lad.py needs, said before it is started: memory of each GPU, FLOPs and seconds of a
step, size of a checkpoint.

    python lad.py --config fade-code-32b --plan --gpus 32    # any flags of lad.py
    python mine.py --plan                                    # of a copy of lad.py, beside it
    python tools/plan.py --table        # 1.5B, 7B, 32B and 70B on 1, 8, 16 and 64 GPUs

Flags beside lad.py's own:
    --gpus N          8 unless told; 1 on a CPU
    --gpu_memory GiB  this machine's GPU's; without one 139, an H200's
    --length N        mean tokens of a response; half of max_tokens
    --script FILE     the copy of lad.py whose Config and OBJECTIVES count

No GPU is touched and no weights are read. Bytes follow from shapes; tests/fake_ranks.py counts the
same on fake GPUs. Seconds are estimates from the ASSUMPTIONS below. The model of memory: a GPU
holds its shard of fp32 weights and Adam's two moments at all times. While it trains vLLM sleeps,
and on top come gradients and what one of four moments wants, the largest of which counts (MOMENTS).
While it generates these are gone and vLLM fills vllm_memory of the whole GPU with its own bf16
weights, then KV cache. What is needed is the larger of the two (on a CPU vLLM cannot sleep: their
sum). Not covered: mixture-of-experts models, how much slower offload is, the allocator's fragments,
what kernels take for themselves, verifying, evaluation.

Conventions. P parameters; N tokens in a forward, C in a chunk of the head; c bytes of the numbers
that are computed with (2: bf16; 4 on a CPU: fp32). GiB = 2^30 bytes.
"""

import argparse
import dataclasses
import importlib.util
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness import command, lora, tiny
from harness.settings import did_you_mean, die, one_line

LAD = Path(__file__).resolve().parent.parent / "lad.py"
GIB = 2**30
LOGIT_BYTES = 12  # of the head for a logit of a chunk, as lad.py's
LATE_LOGIT_BYTES = 10  # where the head's gradient is formed in the backward alone

# Of an H200 in nodes of 8. Measure your own and edit
ASSUMPTIONS = dict(
    flops=989e12,  # dense bf16 peak of a GPU, FLOP/s
    mfu=0.4,  # the share of it that training reaches
    bandwidth=4.8e12,  # of its memory, bytes/s
    read=0.6,  # the share of it that decoding reaches
    inside=300e9,  # bytes/s that a GPU takes in a gather within a node
    across=40e9,  # and between nodes
    disk=2e9,  # bytes/s of the shared disk
    overhead=3 * GIB,  # CUDA context, NCCL, what a sleeping vLLM keeps (its CUDA graphs)
    hop=15e-6,  # seconds of an all-reduce in vLLM
)


# ==== 1. Shapes =================================================================================


@dataclass(frozen=True)
class Shape:
    """What of a model's config.json decides its size."""

    hidden: int
    layers: int
    heads: int
    kv: int  # heads of keys and values
    inter: int  # width of the MLP
    vocab: int
    head: int  # width of a head
    tied: bool  # the output head is the embedding
    kind: str  # model_type
    window: int = 0  # of sliding attention; 0: none


# Published config.json: hidden, layers, heads, KV heads, intermediate, vocabulary, head, tied, kind
# fmt: off
SHAPES = {
    "Qwen/Qwen2.5-0.5B": Shape(896, 24, 14, 2, 4864, 151936, 64, True, "qwen2"),
    "Qwen/Qwen2.5-1.5B": Shape(1536, 28, 12, 2, 8960, 151936, 128, True, "qwen2"),
    "nvidia/OpenMath-Nemotron-1.5B": Shape(1536, 28, 12, 2, 8960, 151936, 128, True, "qwen2"),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B":
        Shape(1536, 28, 12, 2, 8960, 151936, 128, False, "qwen2"),
    "Vinnnf/Thinkless-1.5B-RL-DeepScaleR":
        Shape(1536, 28, 12, 2, 8960, 151936, 128, False, "qwen2"),
    "Qwen/Qwen2.5-7B": Shape(3584, 28, 28, 4, 18944, 152064, 128, False, "qwen2"),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B":
        Shape(3584, 28, 28, 4, 18944, 152064, 128, False, "qwen2"),
    "Qwen/Qwen2.5-32B": Shape(5120, 64, 40, 8, 27648, 152064, 128, False, "qwen2"),
    "Qwen/Qwen2.5-72B": Shape(8192, 80, 64, 8, 29568, 152064, 128, False, "qwen2"),
    "facebook/cwm-sft": Shape(6144, 64, 48, 8, 21504, 128256, 128, False, "cwm", 8192),
    "meta-llama/Meta-Llama-3-70B": Shape(8192, 80, 64, 8, 28672, 128256, 128, False, "llama"),
}
# fmt: on
TABLE = (
    "Qwen/Qwen2.5-1.5B",
    "Qwen/Qwen2.5-7B",
    "Qwen/Qwen2.5-32B",
    "meta-llama/Meta-Llama-3-70B",
)
KINDS = ("qwen2", "llama", "cwm", "mistral", "qwen3")


def read_shape(model):
    """The model's Shape: from a folder's config.json, from the table above, or from the hub's
    config.json. Exit code 2 and one line where none can be had."""
    known = SHAPES.get(model.removesuffix("-Instruct"))
    if known and not Path(model).is_dir():
        return known

    # Not in the table
    config = tiny_config() if model in tiny.TASKS else read_config(model)
    if config.model_type not in KINDS:
        die(f"model = {model!r} is of kind {config.model_type!r}; plan.py knows {', '.join(KINDS)}")

    head = getattr(config, "head_dim", None)  # most do not say
    return Shape(
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv=config.num_key_value_heads,
        inter=config.intermediate_size,
        vocab=config.vocab_size,
        head=head or config.hidden_size // config.num_attention_heads,
        tied=config.tie_word_embeddings,
        kind=config.model_type,
        window=getattr(config, "sliding_window", None) or 0,
    )


def tiny_config():
    """That of both tasks of harness/tiny.py, without the warm-up."""
    with torch.device("meta"):
        return tiny.make_model(tiny.make_tokenizer()).config


def read_config(model):
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model)
    except Exception as error:
        die(
            f"model = {model!r}: no such folder, not in plan.py's table, and the hub says: "
            f"{one_line(error)}"
        )


def parameters(m):
    """(all, of one block), exactly."""
    q = m.heads * m.head
    kv = m.kv * m.head
    block = 2 * m.hidden * (q + kv) + 3 * m.hidden * m.inter + 2 * m.hidden
    if m.kind == "qwen2":
        block += q + 2 * kv  # biases of q, k and v
    if m.kind == "qwen3":
        block += 2 * m.head  # norms of q and k
    embeddings = (2 - m.tied) * m.vocab * m.hidden
    return embeddings + m.layers * block + m.hidden, block


def adapters(cfg, m):
    """Parameters of LoRA's matrices A and B, exactly; 0 without LoRA."""
    if cfg.lora_rank:
        lora.refuse_rank(cfg, m.hidden)
    q = m.heads * m.head
    kv = m.kv * m.head
    sides = {  # out + in of the linear layers of a block
        "q_proj": q + m.hidden,
        "k_proj": kv + m.hidden,
        "v_proj": kv + m.hidden,
        "o_proj": q + m.hidden,
        "gate_proj": m.inter + m.hidden,
        "up_proj": m.inter + m.hidden,
        "down_proj": m.inter + m.hidden,
    }
    targets = list(sides)
    if cfg.lora_targets != "all":
        targets = [name.strip() for name in cfg.lora_targets.split(",")]
    unknown = [name for name in targets if name not in sides]
    if unknown:
        die(f"lora_targets: no layer {unknown[0]!r}{did_you_mean(unknown[0], sides)}")
    return m.layers * cfg.lora_rank * sum(sides[name] for name in targets)


def context(m, n):
    """Tokens whose keys a sequence of n keeps, summed over the layers. CWM: layers 0, 4, 8, .. see
    all of them, the others their window."""
    full = math.ceil(m.layers / 4) if m.kind == "cwm" else m.layers
    return full * n + (m.layers - full) * min(n, m.window or n)


def block_bytes(m, N, c):
    """Bytes that the forward of one block on N tokens keeps for its backward."""
    # Two norms: their input in fp32, normed, scaled; query, key, value and the output of attention;
    # three of the MLP's width: the gate before and after its silu, and what it gates. (The fourth,
    # their product, is freed before the others are needed)
    norms = 2 * m.hidden * (4 + 2 * c)
    attention = 2 * c * (m.heads + m.kv) * m.head
    mlp = 3 * c * m.inter
    return N * (norms + attention + mlp)


def kept_bytes(m, N, c, checkpointing):
    """Bytes that the forward of all blocks keeps: with recomputation their inputs alone."""
    if checkpointing:
        return m.layers * N * m.hidden * c
    return m.layers * (block_bytes(m, N, c) + N * m.inter * c)


def activations(m, N, c, checkpointing):
    """Bytes of activations when the first block to do its backward begins with it, the last norm
    and the head's input and gradient included."""
    again = block_bytes(m, N, c) + N * m.inter * c if checkpointing else 0
    return kept_bytes(m, N, c, checkpointing) + again + norm_bytes(m, N, c)


def norm_bytes(m, N, c):
    """The last norm's input in fp32, normed, scaled; the head's input and its gradient."""
    return N * m.hidden * (4 + 4 * c)


# ==== 2. The estimate ===========================================================================


def has_reference(cfg):
    """Whether a frozen copy of the model is kept, by the OBJECTIVES of the file that cfg is of."""
    objectives = sys.modules[type(cfg).__module__].OBJECTIVES
    return bool(cfg.kl_coef or "ref" in objectives[cfg.objective].needs)


def is_local(cfg):
    """Whether the head's gradient is formed with its log-probs, by the file that cfg is of."""
    return sys.modules[type(cfg).__module__].is_local(cfg)


def estimate(cfg, m, gpus, memory, length, cpu=False):
    """Everything that is printed, {name: bytes, FLOPs, seconds or counts}. Bytes are of one GPU.

    m: the model's Shape; memory: bytes of a GPU; length: mean tokens of a response.
    """
    r = batch_size(cfg, gpus, length)
    r |= training_bytes(cfg, m, gpus, r, cpu)
    r |= generating_bytes(cfg, m, memory, cpu)

    # Both at once on a CPU, where vLLM cannot sleep
    on_top = r["update"]
    c = 4 if cpu else 2
    r["training"] = r["resident"] + on_top
    r["rollout"] = r["resident"] + r["vllm"] + 2 * c * m.vocab * m.hidden
    if cpu:
        r["training"] += r["vllm"]
        r["rollout"] += on_top
    longest_kv = r["kv_token"] * context(m, r["longest"])
    r["fits"] = max(r["training"], r["rollout"]) <= memory and r["kv_cache"] >= longest_kv

    r |= step_flops(cfg, m, length, r)
    r |= step_seconds(cfg, m, gpus, length, r)
    r |= disk_bytes(cfg, r, cpu)
    return r


def batch_size(cfg, gpus, length):
    """Tokens of a batch, micro-batches of a rank in an optimizer step, tokens of a forward."""
    prompt = min(cfg.max_prompt_tokens, 256)  # assumed: few prompts are as long as they may be
    tokens = cfg.prompts * cfg.group * (prompt + length)
    share = tokens / gpus / cfg.minibatches  # of a rank in an optimizer step
    longest = cfg.max_prompt_tokens + cfg.max_tokens
    N = max(min(cfg.micro_tokens, math.ceil(share)), longest)
    return dict(
        prompt=prompt,
        tokens=tokens,
        micro=math.ceil(share / cfg.micro_tokens),
        longest=longest,
        N=N,
        C=min(cfg.head_chunk or 4096, N),
    )


def training_bytes(cfg, m, gpus, batch, cpu):
    """What a GPU holds at all times ("resident" is the sum), the gradients, and what comes on top
    in an update: the largest of the MOMENTS."""
    P, _ = parameters(m)
    c = 4 if cpu else 2
    share = 1 / (cfg.shard_size or gpus)
    at_rest = 0 if cfg.offload else share  # offload: shards live in the CPU's memory
    # LoRA: the weights are frozen, in the type that is computed in; its reference is no copy
    frozen = P if cfg.lora_rank else 0
    trained = adapters(cfg, m) if cfg.lora_rank else P

    # Held at all times
    r = dict(parameters=P, trained=trained)
    r["weights"] = (c * frozen + 4 * trained) * at_rest
    r["moments"] = 8 * trained * at_rest
    r["reference"] = 4 * P * at_rest if has_reference(cfg) and not frozen else 0
    r["first"] = 4 * P * at_rest if cfg.track_change and not frozen else 0
    r["resident"] = r["weights"] + r["moments"] + r["reference"] + r["first"]
    if not cpu:
        r["resident"] += ASSUMPTIONS["overhead"]

    # Gradients are kept as shards; whole, in fp32, between micro-batches if nothing is reduced yet
    is_sharded = not cpu or gpus > 1
    reduces_each = cfg.reduce_each or cfg.offload or batch["micro"] == 1
    r["gradients"] = 4 * trained * at_rest
    if is_sharded and not reduces_each:
        r["gradients"] = 4 * trained
    moments = moment_bytes(cfg, m, share, batch["N"], batch["C"], c, is_sharded)
    for key in MOMENTS:  # of a single micro-batch there are none before the backward
        if key in ("backward", "end") or batch["micro"] > 1:
            moments[key] += r["gradients"]
    r["moment"] = max(moments, key=moments.get)
    r["update"] = moments[r["moment"]]
    return r


# Moments of an update in which most may be held, beside what is held at all times
MOMENTS = {
    "gather": "as a forward begins: the root's weights, twice",
    "head": "in the head: logits, its gradient, activations, gathered weights",
    "backward": "in a block's backward: activations, gathered weights, gradients",
    "end": "as the root's gradients are reduced: embeddings and head",
}


def moment_bytes(cfg, m, share, N, C, c, is_sharded):
    """{moment: bytes}. share: of the weights that a rank holds; N: tokens of a forward, C: of a
    chunk of the head; c: bytes of the numbers that are computed with."""
    P, block = parameters(m)
    root = P - m.layers * block  # embeddings, head, last norm: FSDP keeps them gathered
    is_trained = not cfg.lora_rank
    hidden = N * m.hidden * c
    kept = kept_bytes(m, N, c, cfg.checkpointing)

    # FSDP gathers into one buffer and copies each weight out of it. Where there is something to
    # gather a block more is on its way while one is used, and stays there until it is replaced
    coming = block if share < 1 else 0
    gathered = c * (root + coming) * is_sharded
    gather = 2 * gathered

    # Head: the gradient of its weights is summed in fp32; without that, of its input alone
    logit = LOGIT_BYTES if is_local(cfg) else LATE_LOGIT_BYTES
    head = gathered + kept + norm_bytes(m, N, c) + logit * C * m.vocab
    head += 4 * m.vocab * m.hidden * is_trained

    # Backward of a block: what it kept or makes again, the gradients of the MLP's three tensors and
    # of the block's output, the head's gradient in the model's type; then of its own weights, and
    # of the block before, on their way to the other ranks in fp32
    again = block_bytes(m, N, c) if cfg.checkpointing else 0
    backward = gathered + c * block * is_sharded + kept + again + 3 * N * m.inter * c + hidden
    if is_trained:
        backward += c * m.vocab * m.hidden + c * m.inter * m.hidden
        backward += 4 * block * is_sharded

    # End: the root's gradients, and the same in fp32 on their way; when the shard comes back, of
    # the former only the embedding's are left
    end = 0
    if is_trained:
        end = max(c * root, (c * m.vocab * m.hidden + 4 * share * root))
        end += 4 * root * is_sharded
    return dict(gather=gather, head=head, backward=backward, end=end)


def generating_bytes(cfg, m, memory, cpu):
    """What vLLM takes, in all and for what."""
    P, _ = parameters(m)
    c = 4 if cpu else 2
    weights = c * P / cfg.tensor_parallel
    # On a CPU vllm_memory is GiB of cache, on a GPU a share of the whole
    if cpu:
        vllm = weights + cfg.vllm_memory * GIB
        own = 0
    else:
        vllm = cfg.vllm_memory * memory
        own = 2 * GIB  # its activations and graphs
    return dict(
        vllm=vllm,
        vllm_weights=weights,
        kv_token=2 * c * m.kv * m.head / min(cfg.tensor_parallel, m.kv),  # of one layer
        kv_cache=max(vllm - weights - own, 0),
    )


def step_flops(cfg, m, length, r):
    """2 per weight and token in a forward, 4 in a backward (2 where weights are frozen; the
    adapters' own, some 1%, are left out), 2 to recompute; attention on top. Looking embeddings up
    costs none."""
    P = r["parameters"]
    matrices = P - (not m.tied) * m.vocab * m.hidden
    attention = 2 * 2 * m.heads * m.head * context(m, (r["prompt"] + length) / 2)
    forward = r["tokens"] * (2 * matrices + attention)
    backward = 1 if cfg.lora_rank else 2
    forwards = cfg.epochs * (1 + backward + cfg.checkpointing)
    return dict(flops_rollout=forward, flops_train=forward * (forwards + frozen_forwards(cfg)))


def frozen_forwards(cfg):
    """Forwards of a whole batch without a backward: the old log-probs, the reference's."""
    return (cfg.minibatches * cfg.epochs > 1) + has_reference(cfg)


def step_seconds(cfg, m, gpus, length, r):
    P = r["parameters"]
    A = ASSUMPTIONS
    network = A["inside"] if gpus <= 8 else A["across"]
    speed = A["flops"] * A["mfu"]

    # Generating: an engine decodes its responses `at_once` at a time; the longest one ends alone
    kv = r["kv_token"] * context(m, r["prompt"] + length)  # of one sequence at its end
    own = math.ceil(cfg.prompts * cfg.group / max(gpus // cfg.tensor_parallel, 1))
    at_once = max(min(cfg.vllm_seqs, own, int(r["kv_cache"] / kv)), 1)
    token_flops = r["flops_rollout"] / r["tokens"] / cfg.tensor_parallel
    hops = 2 * m.layers * A["hop"] * (cfg.tensor_parallel > 1)

    def decoding(n):
        """Seconds of one token of each of n sequences, which on average have half of their KV."""
        reading = (r["vllm_weights"] + n * kv / 2) / (A["bandwidth"] * A["read"])
        return max(reading, n * token_flops / speed) + hops

    steps = own * length / at_once
    alone = max(cfg.max_tokens - steps, 0)
    rollout = steps * decoding(at_once) + alone * decoding(1)

    # Training: computing and the network overlap. Weights are gathered in bf16 for each forward
    # and backward, gradients reduced in fp32
    updates = cfg.minibatches * cfg.epochs
    passes = 2 * (r["micro"] * updates) + frozen_forwards(cfg) * r["micro"] * cfg.minibatches
    reductions = (r["micro"] if cfg.reduce_each else 1) * updates
    gathers = passes * 2 * P + reductions * 4 * r["trained"]
    is_sharded = (cfg.shard_size or gpus) > 1
    seconds_compute = r["flops_train"] / gpus / speed
    seconds_network = gathers / network * is_sharded
    train = max(seconds_compute, seconds_network)
    sync = 2 * P / network * (gpus > 1) + 2 * P / A["bandwidth"]
    return dict(
        at_once=at_once,
        seconds_rollout=rollout,
        seconds_compute=seconds_compute,
        seconds_network=seconds_network,
        seconds_train=train,
        seconds_sync=sync,
        seconds=rollout + train + sync,
    )


def disk_bytes(cfg, r, cpu):
    """What is trained and its moments in fp32, a reference that moves; the export."""
    P = r["parameters"]
    checkpoint = 12 * r["trained"]
    if has_reference(cfg) and cfg.ref_every > 0:
        checkpoint += 4 * P
    return dict(
        checkpoint=checkpoint,
        seconds_checkpoint=checkpoint / ASSUMPTIONS["disk"],
        export=(4 if cpu else 2) * P,
    )


# ==== 3. Advice =================================================================================


def advise(cfg, m, gpus, memory, length):
    """(flags that make it fit, or None; the estimate with them)."""

    def plan(flags):
        return estimate(dataclasses.replace(cfg, **flags), m, gpus, memory, length)

    # From the cheapest change on; those that do not help are left out
    flags = {}
    best = plan(flags)
    for trial in cheapest_first(cfg, m, gpus):
        if not best["fits"]:
            r = plan(flags | trial)
            if excess(r, m, memory) < excess(best, m, memory):
                flags, best = flags | trial, r
    if not best["fits"]:
        return None, best

    # What a later flag made needless
    for key in list(flags):
        fewer = {k: v for k, v in flags.items() if k != key}
        r = plan(fewer)
        if r["fits"] and r["seconds"] < 1.1 * best["seconds"]:
            flags, best = fewer, r

    # More room for the KV cache, where it pays
    for trial in shared_engines(cfg, m, gpus):
        r = plan(flags | trial)
        if r["fits"] and r["seconds"] < 0.8 * best["seconds"]:
            flags, best = flags | trial, r
    return flags, best


def shared_engines(cfg, m, gpus):
    """More ranks to an engine, as far as they and the heads divide."""
    sizes = [t for t in (2, 4, 8) if t > cfg.tensor_parallel]
    return [dict(tensor_parallel=t) for t in sizes if gpus % t == 0 and m.heads % t == 0]


def cheapest_first(cfg, m, gpus):
    """Changes that may make a run fit."""
    # What costs seconds, then what costs generating, then the CPU's memory in place of the GPU's
    trials = [dict(checkpointing=True), dict(reduce_each=True), dict(shard_size=0)]
    trials += shared_engines(cfg, m, gpus)
    longest = cfg.max_prompt_tokens + cfg.max_tokens
    if longest < cfg.micro_tokens:
        trials.append(dict(micro_tokens=longest))
    trials.append(dict(head_chunk=1024))
    trials += [dict(vllm_memory=share) for share in (0.7, 0.8, 0.5, 0.4, 0.3, 0.2)]
    trials += [dict(offload=True), dict(reduce_each=True)]
    return trials


def excess(r, m, memory):
    """Bytes that a plan lacks; a KV cache too small for one sequence counts as more than any."""
    lacking = max(r["training"] - memory, 0) + max(r["rollout"] - memory, 0)
    if r["kv_cache"] < r["kv_token"] * context(m, r["longest"]):
        lacking += 1e12
    return lacking


# ==== 4. Printing ===============================================================================


def size(x):
    if x >= GIB / 10:
        return f"{x / GIB:10,.2f} GiB"
    return f"{x / 2**20:10,.2f} MiB"


def duration(seconds):
    if seconds < 6000:
        return f"{seconds:,.0f} s"
    return f"{seconds / 3600:,.1f} h"


def spell(flags, quote=""):
    return " ".join(f"{quote}--{k} {str(v).lower()}{quote}" for k, v in flags.items())


def show(cfg, m, gpus, memory, length, cpu):
    """Print the estimate; returns it."""
    r = estimate(cfg, m, gpus, memory, length, cpu)
    trained = f" ({r['trained']:,} of adapters are trained)" if cfg.lora_rank else ""
    print(
        f"{cfg.model}: {r['parameters']:,} parameters{trained}, {m.layers} layers of width "
        f"{m.hidden}; "
        f"{gpus} x {memory / GIB:.0f} GiB, shards of {cfg.shard_size or gpus}, "
        f"vLLM over {cfg.tensor_parallel}\n"
    )
    show_bytes(cfg, r, gpus, cpu)
    show_verdict(cfg, m, r, gpus, memory, length, cpu)
    show_step(cfg, r, length, cpu)
    print(
        f"checkpoint: {r['checkpoint'] / 1e9:.3f} GB ({duration(r['seconds_checkpoint'])} at "
        f"{ASSUMPTIONS['disk'] / 1e9:.0f} GB/s), {cfg.checkpoint_keep + 1} of them while one is "
        f"written; export {r['export'] / 1e9:.3f} GB"
    )
    return r


def show_bytes(cfg, r, gpus, cpu):
    is_whole = r["gradients"] > 4 * r["trained"] / (cfg.shard_size or gpus)
    gradients = "whole until the last micro-batch" if is_whole else "sharded"
    overhead = 0 if cpu else ASSUMPTIONS["overhead"]
    print("bytes of each rank, fp32 throughout" if cpu else "bytes of each GPU")
    lines = [
        (f"{'frozen weights' if cfg.lora_rank else 'fp32 weights'}, sharded", r["weights"]),
        ("Adam's two moments, sharded", r["moments"]),
        ("frozen reference, sharded", r["reference"]),
        ("the first weights, for track_change, sharded", r["first"]),
        ("CUDA, NCCL, a sleeping vLLM (assumed)", overhead),
        ("held at all times", r["resident"]),
        (f"+ {MOMENTS[r['moment']]}", r["update"]),
        (f"  of it fp32 gradients, {gradients}, at most", r["gradients"]),
        ("training needs", r["training"]),
        ("+ vLLM's weights", r["vllm_weights"]),
        (f"+ KV cache: {r['at_once']} sequences at once", r["kv_cache"]),
        ("generating needs", r["rollout"]),
    ]
    for text, value in lines:
        if value:
            print(f"  {text:70}{size(value)}")


def show_verdict(cfg, m, r, gpus, memory, length, cpu):
    need = max(r["training"], r["rollout"])
    if r["fits"]:
        print(f"It fits: {need / memory:.0%} of {memory / GIB:.0f} GiB.")
        return
    flags = None
    if not cpu:
        flags, better = advise(cfg, m, gpus, memory, length)
    said = f"It does not fit {memory / GIB:.0f} GiB."
    if flags:
        need = max(better["training"], better["rollout"])
        print(f"{said} It would with {spell(flags)}: {need / GIB:.0f} GiB.")
    else:
        print(
            f"{said} No flag helps: more GPUs (--gpus {2 * gpus}), a shorter max_tokens = "
            f"{cfg.max_tokens} or a smaller model."
        )


def show_step(cfg, r, length, cpu):
    A = ASSUMPTIONS
    print(
        f"\na step: {cfg.prompts} x {cfg.group} responses of {length:,.0f} tokens on average "
        f"(assumed), {r['tokens']:,.0f} tokens with their prompts\n"
        f"  generating {r['flops_rollout']:.2e} FLOPs, training {r['flops_train']:.2e}, in "
        f"{cfg.minibatches * cfg.epochs} optimizer steps of {r['micro']} micro-batches on each rank"
    )
    if cpu:
        return
    print(
        f"  {duration(r['seconds'])} = generating {duration(r['seconds_rollout'])} + training "
        f"{duration(r['seconds_train'])} (computing {duration(r['seconds_compute'])}, the network "
        f"{duration(r['seconds_network'])}, overlapped) + weights to vLLM "
        f"{duration(r['seconds_sync'])}; verifying not counted\n"
        f"  if training reaches {A['mfu']:.0%} of {A['flops'] / 1e12:.0f} TFLOP/s, decoding "
        f"{A['read']:.0%} of {A['bandwidth'] / 1e12:.1f} TB/s, a gather {A['inside'] / 1e9:.0f} "
        f"GB/s in a node of 8 and {A['across'] / 1e9:.0f} GB/s between\n"
        f"run: {cfg.steps} steps, {duration(cfg.steps * r['seconds'])}"
    )


def table(load_config, memory, flags_given):
    """A markdown table of lad.py's defaults but for the model and the flags that were given, with
    the flags that make it fit."""
    print(
        "| model | GPUs | training | generating | flags it needs | a step | of it generating "
        "| checkpoint |\n|---|---|---|---|---|---|---|---|"
    )
    # Of each model, the defaults on more and more GPUs
    for model in TABLE:
        name = model.split("/")[1]
        cfg = load_config([*flags_given, "--model", model])
        for gpus in (1, 8, 16, 64):
            flags, r = advise(cfg, read_shape(model), gpus, memory, cfg.max_tokens / 2)
            if flags is None:
                asked = "**does not fit**"
                seconds = "| "
            else:
                asked = spell(flags, "`") or "none"
                share = r["seconds_rollout"] / r["seconds"]
                seconds = f"{r['seconds']:,.0f} s | {share:.0%}"
            print(
                f"| {name} | {gpus} | {r['training'] / GIB:,.0f} GiB | "
                f"{r['rollout'] / GIB:,.0f} GiB | {asked} | {seconds} | "
                f"{r['checkpoint'] / 1e9:,.0f} GB |"
            )


# ==== 5. main ===================================================================================


def load_program(path):
    """lad.py, or a copy of it, as a module."""
    path = Path(path).resolve()
    if path == LAD:
        import lad

        return lad
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or not path.is_file():
        die(f"--script {path}: no such Python file; give lad.py or a copy of it")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        die(f"--script {path}: {type(error).__name__}: {one_line(error)}")
    for name in ("load_config", "Config", "OBJECTIVES"):
        if not hasattr(module, name):
            die(f"--script {path} has no {name}: give lad.py or a copy of it")
    return module


def memory_there(cpu):
    """Bytes of this machine's memory, or of its GPU's; of an H200's where it has none."""
    if cpu:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return 139 * GIB


def read_own_flags(argv):
    """(those of plan.py, the rest of the command line, which is lad.py's)."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = command.refuse
    parser.add_argument("--plan", action="store_true")  # as lad.py was started with
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--script", default=LAD)
    for name in ("gpus", "gpu_memory", "length"):
        parser.add_argument(f"--{name}", default="")
    return parser.parse_known_args(argv)


def read_numbers(own, cfg, cpu):
    """(GPUs, bytes of each, mean length of a response)."""
    numbers = dict(gpus=own.gpus, gpu_memory=own.gpu_memory, length=own.length)
    try:
        gpus = int(own.gpus or (1 if cpu else 8))
        memory = float(own.gpu_memory or 0) * GIB or memory_there(cpu)
        length = float(own.length or cfg.max_tokens / 2)
    except ValueError:
        die(f"--gpus, --gpu_memory and --length want numbers, not {numbers}")
    return gpus, memory, length


def check_numbers(cfg, gpus, memory, length):
    """Exit code 2 and one line where no run could be started so."""
    if not (gpus >= 1 and 0 < length <= cfg.max_tokens and memory > 0):
        die(
            f"--gpus {gpus}, --gpu_memory {memory / GIB:g}, --length {length:g}: positive numbers, "
            f"and a length up to max_tokens = {cfg.max_tokens}"
        )
    # As join() of harness/ranks.py would refuse them
    divisions = (
        (f"prompts = {cfg.prompts}", cfg.prompts, gpus * cfg.minibatches),
        (f"--gpus {gpus}", gpus, cfg.tensor_parallel),
        (f"--gpus {gpus}", gpus, cfg.shard_size or 1),
    )
    for text, value, divisor in divisions:
        if value % divisor:
            die(
                f"{text} does not divide by {divisor}: by GPUs x minibatches = {gpus} x "
                f"{cfg.minibatches}, tensor_parallel = {cfg.tensor_parallel} or shard_size = "
                f"{cfg.shard_size}"
            )


def main(argv):
    """Print the plan of the run that lad.py would do with these flags, and leave: exit code 0, 1 if
    it does not fit, 2 for bad input."""
    own, rest = read_own_flags(argv)
    program = load_program(own.script)
    cfg = program.load_config(rest)

    # Where it is to run
    cpu = cfg.device == "cpu" or (cfg.device == "auto" and not torch.cuda.is_available())
    gpus, memory, length = read_numbers(own, cfg, cpu)
    if own.table:
        table(program.load_config, memory, rest)
        return
    check_numbers(cfg, gpus, memory, length)
    r = show(cfg, read_shape(cfg.model), gpus, memory, length, cpu)
    raise SystemExit(0 if r["fits"] else 1)


if __name__ == "__main__":
    command.run(main)
