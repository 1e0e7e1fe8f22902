"""What a run of lad.py needs, said before it is started: memory of each GPU, FLOPs and seconds of a step, size of a checkpoint.

    python lad.py --config fade-code-32b --plan --gpus 32           # any flags of lad.py; no GPU, no weights, no network needed
    python tools/plan.py --table                                          # the README's: 1.5B, 7B, 32B, 70B on 1, 8, 16, 64 GPUs

Flags beside lad.py's own: --gpus N (8), --gpu_memory GiB (this machine's GPU's, else 139: an H200), --length N (mean tokens
of a response; half of max_tokens). Bytes follow from shapes and are counted; seconds are estimates from the ASSUMPTIONS below.
The model of memory: a GPU holds its shard of fp32 weights and Adam's two moments at all times. While it trains vLLM sleeps, and
gradients, gathered bf16 weights, activations and the head's logits come on top. While it generates these are gone and vLLM fills
vllm_memory of the whole GPU with its own bf16 weights, then KV cache. What is needed is the larger of the two (on a CPU vLLM cannot
sleep: their sum). Not covered: mixture-of-experts models, how much slower offload is, the allocator's fragments, verifying, evaluation.
P parameters, W GPUs, N tokens in a forward, C = head_chunk, c bytes of a compute number (2: bf16; 4 on a CPU); sizes in GiB = 2^30.
"""
import dataclasses, math, os, sys
from pathlib import Path
from types import SimpleNamespace

import torch
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from harness.settings import die, one_line
from lad import OBJECTIVES, load_config

GIB = 2**30
ASSUMPTIONS = dict(   # of an H200 in nodes of 8. Measure your own and edit
    flops=989e12, mfu=0.4, bandwidth=4.8e12, read=0.6,   # dense bf16 peak and the share of it that training reaches; HBM, bytes a second, and decoding's share
    inside=300e9, across=40e9, disk=2e9,                 # bytes a second that a GPU takes in a gather: within a node, between nodes; of the shared disk
    overhead=3 * GIB, hop=15e-6)                         # CUDA context, NCCL, what a sleeping vLLM keeps (its CUDA graphs); seconds of an all-reduce in vLLM

SHAPES = {   # published config.json: hidden, layers, heads, KV heads, intermediate, vocabulary, head_dim, tied embeddings, kind
    "Qwen/Qwen2.5-0.5B": (896, 24, 14, 2, 4864, 151936, 64, True, "qwen2"),
    "Qwen/Qwen2.5-1.5B": (1536, 28, 12, 2, 8960, 151936, 128, True, "qwen2"),
    "nvidia/OpenMath-Nemotron-1.5B": (1536, 28, 12, 2, 8960, 151936, 128, True, "qwen2"),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": (1536, 28, 12, 2, 8960, 151936, 128, False, "qwen2"),
    "Vinnnf/Thinkless-1.5B-RL-DeepScaleR": (1536, 28, 12, 2, 8960, 151936, 128, False, "qwen2"),
    "Qwen/Qwen2.5-7B": (3584, 28, 28, 4, 18944, 152064, 128, False, "qwen2"),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": (3584, 28, 28, 4, 18944, 152064, 128, False, "qwen2"),
    "Qwen/Qwen2.5-32B": (5120, 64, 40, 8, 27648, 152064, 128, False, "qwen2"),
    "Qwen/Qwen2.5-72B": (8192, 80, 64, 8, 29568, 152064, 128, False, "qwen2"),
    "facebook/cwm-sft": (6144, 64, 48, 8, 21504, 128256, 128, False, "cwm"),
    "meta-llama/Meta-Llama-3-70B": (8192, 80, 64, 8, 28672, 128256, 128, False, "llama")}
KINDS = ("qwen2", "llama", "cwm", "mistral", "qwen3")

def read_shape(model):
    """The model's shape: a folder's config.json, the table above, or the hub's config.json; SystemExit 2 where none can be had."""
    names = ("hidden", "layers", "heads", "kv", "inter", "vocab", "head", "tied", "kind")
    known = SHAPES.get(model.removesuffix("-Instruct"))
    if known and not Path(model).is_dir():
        return SimpleNamespace(**dict(zip(names, known)), window=8192 if known[8] == "cwm" else 0)
    if model == "tiny":   # without its warm-up
        from harness import tiny
        with torch.device("meta"):
            config = tiny.make_model(tiny.make_tokenizer()).config
    else:
        from transformers import AutoConfig
        try:
            config = AutoConfig.from_pretrained(model)
        except Exception as error:
            die(f"model = {model!r}: no such folder, not in plan.py's table, and the hub says: {one_line(error)}")
    if config.model_type not in KINDS:
        die(f"model = {model!r} is of kind {config.model_type!r}; plan.py knows {', '.join(KINDS)}")
    head, c = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads, config
    values = (c.hidden_size, c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads, c.intermediate_size, c.vocab_size, head, c.tie_word_embeddings, c.model_type)
    return SimpleNamespace(**dict(zip(names, values)), window=getattr(c, "sliding_window", None) or 0)

def parameters(m):
    """(all, of one block), exactly."""
    q, kv = m.heads * m.head, m.kv * m.head
    block = 2 * m.hidden * (q + kv) + 3 * m.hidden * m.inter + 2 * m.hidden
    block += {"qwen2": q + 2 * kv, "qwen3": 2 * m.head}.get(m.kind, 0)   # biases of q, k and v; norms of q and k
    return (2 - m.tied) * m.vocab * m.hidden + m.layers * block + m.hidden, block

def context(m, n):
    """Tokens whose keys a sequence of n keeps, summed over the layers. CWM: layers 0, 4, 8, .. see all, the others their window."""
    full = math.ceil(m.layers / 4) if m.kind == "cwm" else m.layers
    return full * n + (m.layers - full) * min(n, m.window or n)

def activations(m, N, c, checkpointing):
    """Bytes that a forward keeps for its backward. A block, a token: two norms (input in fp32, normed, scaled), q, k, v and the output
    of attention, and four of the MLP's width."""
    block = N * (2 * m.hidden * (4 + 2 * c) + 2 * c * (m.heads + m.kv) * m.head + 4 * c * m.inter)
    return (m.layers * N * m.hidden * c + block if checkpointing else m.layers * block) + N * m.hidden * (4 + 3 * c)   # the last norm, the head's input

def estimate(cfg, m, gpus, memory, length, cpu=False):
    """Everything that is printed, as {name: bytes, FLOPs, seconds or counts}, for one GPU where bytes are meant."""
    (P, block), frozen, on = parameters(m), bool(cfg.kl_coef or "ref" in OBJECTIVES[cfg.objective].needs), not cfg.offload   # offload: shards live in the CPU's memory
    A, S, c, W, passes = SimpleNamespace(**ASSUMPTIONS), cfg.shard_size or gpus, 4 if cpu else 2, gpus, cfg.epochs
    sharded, prompt, longest = not cpu or W > 1, min(cfg.max_prompt_tokens, 256), cfg.max_prompt_tokens + cfg.max_tokens
    tokens = (samples := cfg.prompts * cfg.group) * (prompt + length)
    micro = math.ceil(tokens / W / cfg.minibatches / cfg.micro_tokens)   # micro-batches of a rank in an optimizer step
    C = min(cfg.head_chunk or 4096, N := max(min(cfg.micro_tokens, math.ceil(tokens / W / cfg.minibatches)), longest))
    whole_gradients = sharded and not cfg.reduce_each and micro > 1      # FSDP2 keeps them unsharded, in fp32, until the last micro-batch
    r = dict(parameters=P, weights=4 * P / S * on, moments=8 * P / S * on, reference=4 * P / S * frozen * on,
             gradients=4 * P if whole_gradients else 4 * P / S * on, gathered=c * (P - m.layers * block + 2 * block) + 4 * block if sharded else 0,
             activations=activations(m, N, c, cfg.checkpointing), head=(16 if cpu else 10) * C * m.vocab + (4 + c) * m.vocab * m.hidden + 2 * c * N * m.hidden,
             vllm_weights=c * P / cfg.tensor_parallel, kv_token=2 * c * m.kv * m.head / min(cfg.tensor_parallel, m.kv))
    vllm = r["vllm_weights"] + cfg.vllm_memory * GIB if cpu else cfg.vllm_memory * memory
    r["kv_cache"] = max(vllm - r["vllm_weights"] - (not cpu) * 2 * GIB, 0)   # vLLM's own activations and graphs: 2 GiB
    resident, on_top = r["weights"] + r["moments"] + r["reference"] + (0 if cpu else A.overhead), r["gradients"] + r["gathered"] + r["activations"] + r["head"]
    r |= dict(resident=resident, training=resident + on_top + vllm * cpu, rollout=resident + vllm + 2 * c * m.vocab * m.hidden + on_top * cpu)
    # A step's FLOPs: 2 per weight and token forward, 4 backward, 2 to recompute; attention on top. Looking embeddings up costs none
    matrices, attention = P - (not m.tied) * m.vocab * m.hidden, 2 * 2 * m.heads * m.head * context(m, (prompt + length) / 2)
    forward = tokens * (2 * matrices + attention)
    extra = (cfg.minibatches * passes > 1) + frozen                      # the old log-probs, the reference's
    r |= dict(tokens=tokens, micro=micro, flops_rollout=forward, flops_train=forward * (passes * (4 if cfg.checkpointing else 3) + extra))
    network, own = A.inside if W <= 8 else A.across, math.ceil(samples / max(W // cfg.tensor_parallel, 1))   # responses of an engine
    kv = r["kv_token"] * context(m, prompt + length)                     # of one sequence at its end; on average it has half
    at_once = max(min(cfg.vllm_seqs, own, int(r["kv_cache"] / kv)), 1)
    step = lambda n: max((r["vllm_weights"] + n * kv / 2) / (A.bandwidth * A.read), n * forward / tokens / cfg.tensor_parallel / (A.flops * A.mfu)) + 2 * m.layers * A.hop * (cfg.tensor_parallel > 1)
    decode = own * length / at_once
    gathers = (2 * (micro * cfg.minibatches * passes) + extra * micro * cfg.minibatches) * 2 * P + (micro if cfg.reduce_each else 1) * cfg.minibatches * passes * 4 * P
    r |= dict(at_once=at_once, seconds_rollout=decode * step(at_once) + max(cfg.max_tokens - decode, 0) * step(1),   # the longest response ends alone
              seconds_compute=r["flops_train"] / W / (A.flops * A.mfu), seconds_network=gathers / network * (S > 1), seconds_sync=2 * P / network * (W > 1) + 2 * P / A.bandwidth)
    r["seconds_train"] = max(r["seconds_compute"], r["seconds_network"])  # the one overlaps the other
    r |= dict(seconds=r["seconds_rollout"] + r["seconds_train"] + r["seconds_sync"], checkpoint=(saved := (12 + 4 * (frozen and cfg.ref_every > 0)) * P), export=(4 if cpu else 2) * P, seconds_checkpoint=saved / A.disk, longest=longest, N=N, C=C)
    r["fits"] = max(r["training"], r["rollout"]) <= memory and r["kv_cache"] >= r["kv_token"] * context(m, longest)
    return r

def advise(cfg, m, gpus, memory, length):
    """(flags that make it fit, or None; the estimate with them). Changes are tried from the cheapest on; those that do not help are left out."""
    at = lambda flags: estimate(dataclasses.replace(cfg, **flags), m, gpus, memory, length)
    over = lambda r: max(r["training"] - memory, 0) + max(r["rollout"] - memory, 0) + 1e12 * (r["kv_cache"] < r["kv_token"] * context(m, r["longest"]))
    longest, flags, best = cfg.max_prompt_tokens + cfg.max_tokens, {}, at({})
    shares = [dict(tensor_parallel=t) for t in (2, 4, 8) if t > cfg.tensor_parallel and gpus % t == 0 == m.heads % t]
    for trial in [dict(checkpointing=True), dict(reduce_each=True), dict(shard_size=0), *shares, *[dict(micro_tokens=longest)] * (longest < cfg.micro_tokens),
                  dict(head_chunk=1024), *(dict(vllm_memory=x) for x in (0.7, 0.8, 0.5, 0.4, 0.3, 0.2)), dict(offload=True), dict(reduce_each=True)]:
        if not best["fits"] and over(r := at({**flags, **trial})) < over(best):
            flags, best = {**flags, **trial}, r
    for key in [*flags] if best["fits"] else ():   # what a later flag made needless
        if (r := at(fewer := {k: v for k, v in flags.items() if k != key}))["fits"] and r["seconds"] < 1.1 * best["seconds"]:
            flags, best = fewer, r
    for trial in shares if best["fits"] else ():   # more room for the KV cache, where it pays
        if (r := at({**flags, **trial}))["fits"] and r["seconds"] < 0.8 * best["seconds"]:
            flags, best = {**flags, **trial}, r
    return flags if best["fits"] else None, best

size = lambda x: f"{x / GIB:10,.2f} GiB" if x >= GIB / 10 else f"{x / 2**20:10,.2f} MiB"
time = lambda x: f"{x:,.0f} s" if x < 6000 else f"{x / 3600:,.1f} h"
spell = lambda flags, quote="": " ".join(f"{quote}--{k} {str(v).lower()}{quote}" for k, v in flags.items())

def show(cfg, m, gpus, memory, length, cpu):
    """Print the estimate; returns it."""
    r, A, P = estimate(cfg, m, gpus, memory, length, cpu), ASSUMPTIONS, parameters(m)[0]
    print(f"{cfg.model}: {P:,} parameters, {m.layers} layers of width {m.hidden}; {gpus} x {memory / GIB:.0f} GiB, shards of {cfg.shard_size or gpus}, vLLM over {cfg.tensor_parallel}\n\n"
          f"bytes of each {'rank, fp32 throughout' if cpu else 'GPU'}")
    whole = r["gradients"] > 4 * P / (cfg.shard_size or gpus)
    for text, value in [("fp32 weights, sharded", r["weights"]), ("Adam's two moments, sharded", r["moments"]), ("frozen reference, sharded", r["reference"]),
                        ("CUDA, NCCL, a sleeping vLLM (assumed)", 0 if cpu else A["overhead"]), ("held at all times", r["resident"]),
                        (f"+ gradients, fp32, {'whole until the last micro-batch' if whole else 'sharded'}", r["gradients"]),
                        ("+ gathered weights: two blocks, embeddings and head", r["gathered"]),
                        (f"+ activations of {r['N']:,} tokens, {'recomputed' if cfg.checkpointing else 'kept'}", r["activations"]),
                        (f"+ head: logits of {r['C']:,} tokens, its fp32 gradient", r["head"]), ("training needs", r["training"]),
                        ("+ vLLM's weights", r["vllm_weights"]), (f"+ KV cache: {r['at_once']} sequences at once", r["kv_cache"]), ("generating needs", r["rollout"])]:
        print(f"  {text:58}{size(value)}" if value else "", end="\n" * bool(value))
    need = max(r["training"], r["rollout"])
    flags, better = (None, r) if r["fits"] or cpu else advise(cfg, m, gpus, memory, length)
    print(f"It fits: {need / memory:.0%} of {memory / GIB:.0f} GiB." if r["fits"] else f"It does not fit {memory / GIB:.0f} GiB. " + (
          f"It would with {spell(flags)}: {max(better['training'], better['rollout']) / GIB:.0f} GiB." if flags else
          f"No flag helps: more GPUs (--gpus {2 * gpus}), a shorter max_tokens = {cfg.max_tokens} or a smaller model."))
    print(f"\na step: {cfg.prompts} x {cfg.group} responses of {length:,.0f} tokens on average (assumed), {r['tokens']:,.0f} tokens with their prompts\n"
          f"  generating {r['flops_rollout']:.2e} FLOPs, training {r['flops_train']:.2e}, in {cfg.minibatches * cfg.epochs} optimizer steps of {r['micro']} micro-batches on each rank")
    if not cpu:
        print(f"  {time(r['seconds'])} = generating {time(r['seconds_rollout'])} + training {time(r['seconds_train'])} (computing {time(r['seconds_compute'])}, the network {time(r['seconds_network'])}, "
              f"overlapped) + weights to vLLM {time(r['seconds_sync'])}; verifying not counted\n  if training reaches {A['mfu']:.0%} of {A['flops'] / 1e12:.0f} TFLOP/s, decoding {A['read']:.0%} of {A['bandwidth'] / 1e12:.1f} TB/s, "
              f"a gather {A['inside'] / 1e9:.0f} GB/s in a node of 8 and {A['across'] / 1e9:.0f} GB/s between\nrun: {cfg.steps} steps, {time(cfg.steps * r['seconds'])}")
    print(f"checkpoint: {r['checkpoint'] / 1e9:.3f} GB ({time(r['seconds_checkpoint'])} at {A['disk'] / 1e9:.0f} GB/s), {cfg.checkpoint_keep + 1} of them while one is written; export {r['export'] / 1e9:.3f} GB")
    return r

def table(memory):
    """The README's: lad.py's defaults but for the model, with the flags that make it fit."""
    print("| model | GPUs | training | generating | flags it needs | a step | of it generating | checkpoint |\n|---|---|---|---|---|---|---|---|")
    for model in ("Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-32B", "meta-llama/Meta-Llama-3-70B"):
        for gpus in (1, 8, 16, 64):
            flags, r = advise(cfg := load_config(["--model", model]), read_shape(model), gpus, memory, cfg.max_tokens / 2)
            asked = "**does not fit**" if flags is None else spell(flags, "`") or "none"
            seconds = f"{r['seconds']:,.0f} s | {r['seconds_rollout'] / r['seconds']:.0%}" if flags is not None else "| "
            print(f"| {model.split('/')[1]} | {gpus} | {r['training'] / GIB:,.0f} GiB | {r['rollout'] / GIB:,.0f} GiB | {asked} | {seconds} | {r['checkpoint'] / 1e9:,.0f} GB |")

def main(argv):
    """Print the plan of the run that lad.py would do with these flags, and leave: exit code 0, 1 if it does not fit, 2 for bad input."""
    argv, wanted, own = [a for a in argv if a not in ("--plan", "--table")], "--table" in argv, dict(gpus="", gpu_memory="", length="")
    for key in own:
        if f"--{key}" in argv[:-1]:
            i = argv.index(f"--{key}")
            own[key], argv[i: i + 2] = argv[i + 1], []
    cfg, cuda = load_config(argv), torch.cuda.is_available()
    cpu = cfg.device == "cpu" or cfg.device == "auto" and not cuda
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if cpu else torch.cuda.get_device_properties(0).total_memory if cuda else 139 * GIB
    try:
        gpus, memory, length = int(own["gpus"] or (1 if cpu else 8)), float(own["gpu_memory"] or 0) * GIB or there, float(own["length"] or cfg.max_tokens / 2)
    except ValueError:
        die(f"--gpus, --gpu_memory and --length want numbers, not {own}")
    if wanted:
        return table(memory)
    if not (gpus >= 1 and 0 < length <= cfg.max_tokens and memory > 0):
        die(f"--gpus {gpus}, --gpu_memory {memory / GIB:g}, --length {length:g}: positive numbers, and a length up to max_tokens = {cfg.max_tokens}")
    for text, value, divisor in ((f"prompts = {cfg.prompts}", cfg.prompts, gpus * cfg.minibatches), (f"--gpus {gpus}", gpus, cfg.tensor_parallel), (f"--gpus {gpus}", gpus, cfg.shard_size or 1)):
        if value % divisor:
            die(f"{text} does not divide by {divisor}: by GPUs x minibatches = {gpus} x {cfg.minibatches}, tensor_parallel = {cfg.tensor_parallel} or shard_size = {cfg.shard_size}")
    raise SystemExit(0 if show(cfg, read_shape(cfg.model), gpus, memory, length, cpu)["fits"] else 1)

if __name__ == "__main__":
    main(sys.argv[1:])
