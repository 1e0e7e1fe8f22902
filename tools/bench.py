r"""
bench.py: every speed and memory figure that the README quotes, and the command that prints it.

    python tools/bench.py head       # the fused log-prob against its bare matrix products, the materialised path and other libraries
    python tools/bench.py trainer    # an update on a frozen rollout file: tokens/s, MFU, peak memory, pad tokens; TRL's on the same file
    python tools/bench.py rollout    # lad.generate against vLLM's LLM.generate with the same parameters
    python tools/bench.py sync       # the weight push against a copy of the same bytes
    python tools/bench.py step       # where the seconds of a tiny run's steps go, and the operators of one of its minibatches
    python tools/bench.py verify     # answers and programs verified in a second
    python tools/bench.py all --out bench.json   # each in a process of its own; says of each that cannot run here why not

Ratios, not times: what is compared runs in turn (A, B, A, B, ..) in one process, after a warm-up; a time is the median of its repeats, a ratio
the median of the ratios within each turn, so that a machine that slows down for a while slows both sides. On CUDA a time is between two events
of the stream, caches flushed before. Tables are markdown under a line with date, machine, torch, commit and command.
"""
import argparse, contextlib, dataclasses, functools, hashlib, itertools, json, math, os, random, re, subprocess, sys, tempfile, time, warnings
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import fmean, median, stdev

if __name__ == "__main__":   # as in lad.py: read when torch, OpenMP and vLLM are imported
    quiet = dict(OMP_WAIT_POLICY="passive", VLLM_LOGGING_LEVEL="ERROR", TORCH_CPP_LOG_LEVEL="ERROR", KINETO_LOG_LEVEL="9")
    os.environ.update({"OMP_NUM_THREADS": str(min(16, len(os.sched_getaffinity(0))))} | quiet | os.environ)
    warnings.filterwarnings("ignore", category=FutureWarning)

import torch
from torch.utils.flop_counter import FlopCounterMode
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lad, verify
from harness import settings, tiny
from harness.data import find_model
from harness.ranks import join
from harness.settings import one_line

# Qwen2.5 as in the published config.json files: nothing is downloaded. small is for a CPU, mini for the tests.
FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size", "tie_word_embeddings")
MODELS = {"0.5b": (896, 4864, 24, 14, 2, 151936, True), "1.5b": (1536, 8960, 28, 12, 2, 151936, True),
          "7b": (3584, 18944, 28, 28, 4, 152064, False), "small": (256, 768, 4, 4, 2, 8192, True), "mini": (64, 96, 2, 2, 1, 512, False)}
PEAK = 989e12   # FLOP/s, dense bf16, of an H100 or H200 SXM, by its data sheet

# ==== Measuring and printing ===========================================================================================
def timed(run, device):
    """Seconds that run() takes; on CUDA between two events, the L2 cache overwritten before the first."""
    if device.type == "cuda":
        torch.empty(2**28, dtype=torch.int8, device=device).zero_()   # 256 MB; an H200's L2 holds 50
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(), run(), end.record(), torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    start = time.perf_counter()
    run()
    return time.perf_counter() - start

def race(runs, repeats, device, warm_up=2):
    """{name: [seconds of each repeat]} of {name: function}, taken in turn; so is the warm-up, which is dropped."""
    turns = [{name: timed(run, device) for name, run in runs.items()} for _ in range(warm_up + repeats)]
    return {name: [turn[name] for turn in turns[warm_up:]] for name in runs}
ratio = lambda a, b: median(x / y for x, y in zip(a, b))   # over turns, of a's time over b's

@contextlib.contextmanager
def peak_memory(device):
    """{"bytes": most that was allocated in the block beyond what was there before}. CUDA: the statistics of torch's allocator. CPU: the running sum of the allocations
    and frees that torch's allocator reports to the profiler: every tensor, also inside operators, but not MKL's and oneDNN's scratch space."""
    found = {}
    if device.type == "cuda":   # counted as the host asks for it: no need to wait for the device
        before = torch.cuda.reset_peak_memory_stats() or torch.cuda.memory_allocated()
        yield found
        found["bytes"] = torch.cuda.max_memory_allocated() - before
    else:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            yield found
        events = sorted((e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
        found["bytes"] = max(itertools.accumulate([e.nbytes() for e in events], initial=0))

def about(argv, device):
    """What no figure can be read without."""
    git = lambda *words: subprocess.run(["git", "-C", str(lad.HERE), *words], capture_output=True, text=True).stdout.strip()
    names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")] + ["unknown CPU"]
    cpu = f"{names[0]}, {len(os.sched_getaffinity(0))} cores, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS')}, load {os.getloadavg()[0]:.1f}"
    return dict(date=time.strftime("%Y-%m-%d"), machine=torch.cuda.get_device_name() if device.type == "cuda" else cpu, torch=torch.__version__,
                commit=(git("rev-parse", "--short", "HEAD") or "unknown") + " with changes" * bool(git("status", "--porcelain", "-uno")),
                command=re.sub(r" --out[ =]\S+", "", " ".join(["python tools/bench.py", *argv])))

def cell(x):
    return str(x) if not isinstance(x, (int, float)) else f"{x:,}" if isinstance(x, int) else f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"

def show(where, title, columns, rows, note):
    """Print a table as markdown. A row shorter than `columns` ends with the reason why it has no figures."""
    print(f"\n**{title}** ({where['date']}, {where['machine']}, torch {where['torch']}, commit {where['commit']}: `{where['command']}`)\n")
    for row in [columns, ["---"] * len(columns), *rows]:
        print("| " + " | ".join([*map(cell, row), *[""] * (len(columns) - len(row))]) + " |")
    print("\n" + note if note else "", flush=True)

# ==== head: the fused log-prob =========================================================================================
def head_paths(hidden, weight, targets, up, chunk):
    """{path: function() -> logp [N], nothing for bare products}. `up` [N]: d loss / d logp, and d entropy where that is asked for."""
    h, w, fused, naive = hidden.detach(), weight.detach(), partial(lad.fused_logprob, chunk=chunk), lad.naive_logprob
    logits, dh, dw = h.new_empty(len(h), len(w)), torch.empty_like(h), torch.empty_like(w)
    products = [lambda: torch.mm(h, w.t(), out=logits), lambda: torch.mm(logits, w, out=dh), lambda: torch.mm(logits.t(), h, out=dw)]
    bare = lambda *which: [products[i]() for i in which] and None
    def run(path, outputs=1):
        with torch.set_grad_enabled(outputs > 0):
            found = path(hidden, weight, targets)[: max(outputs, 1)]
        torch.autograd.grad(found, (hidden, weight), [up.to(x.dtype) for x in found]) if outputs else None
        return found[0].detach()
    torch_head = lambda options, h, w, t: (-torch.nn.functional.linear_cross_entropy(h, w, t, reduction="none", options=options()),)   # in the inputs' dtype
    liger = lambda h, w, t: (-import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy(h, w, t, reduction="none"),)
    trl = lambda h, w, t: import_module("trl.kernels").ChunkedLogProbFunction.apply(h, w, None, t, 1.0, 32768, None, 1.0, ("log_probs", "entropy"))   # as GRPOTrainer does
    return {
        "bare products, 2 NHV": partial(bare, 0), "bare products, 6 NHV": partial(bare, 0, 1, 2), "bare products, 8 NHV": partial(bare, 0, 0, 1, 2),
        "forward only: fused": partial(run, fused, 0), "forward only: materialised": partial(run, naive, 0),
        "fused, gradient formed in the forward": partial(run, partial(fused, gradient=lambda part, *_: up[part])),
        "fused, logits formed again": partial(run, fused), "fused, with entropy gradient": partial(run, fused, 2),
        "materialised (naive_logprob)": partial(run, naive), "materialised, with entropy gradient": partial(run, naive, 2),
        "F.linear_cross_entropy": partial(run, partial(torch_head, lambda: None)),
        "F.linear_cross_entropy, chunked": partial(run, partial(torch_head, lambda: torch.nn.LinearCrossEntropyOptions())),
        "Liger fused linear cross-entropy": partial(run, liger), "TRL chunked log-prob": partial(run, trl)}

def try_path(run, exact, device):
    """[FLOPs of its matrix products, peak extra MiB, max error of logp], or the reason why there are none: not installed, out of memory, .."""
    try:
        with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:   # the counter sees eager operators only
            logp = run()
        run()   # compiles
        with peak_memory(device) as memory:
            run()
    except Exception as error:
        return one_line(error)[:150]
    return counter.get_total_flops(), *(("", "") if logp is None else (memory["bytes"] / 2**20, (logp.double() - exact).abs().max().item()))

def head_table(N, H, V, chunk, repeats, device):
    generator, dtype = torch.Generator().manual_seed(0), torch.bfloat16 if device.type == "cuda" else torch.float32
    hidden, weight = (torch.randn(n, H, generator=generator).mul(scale).to(device, dtype).requires_grad_() for n, scale in ((N, 1.0), (V, H**-0.5)))
    targets, up = torch.randint(V, (N,), generator=generator).to(device), torch.randn(N, generator=generator).to(device)
    exact = torch.cat([lad.naive_logprob(h.double(), weight.detach().double(), t)[0] for h, t in zip(hidden.detach().split(1024), targets.split(1024))])   # in float64
    paths = head_paths(hidden, weight, targets, up, chunk)
    found = {name: try_path(run, exact, device) for name, run in paths.items()}
    times = race({name: run for name, run in paths.items() if not isinstance(found[name], str)}, repeats, device)
    def row(name, flops, extra, error):
        s, bare = median(times[name]), times.get(f"bare products, {flops / N / H / V:g} NHV")
        return [name, flops / N / H / V, s * 1e3, ratio(times[name], bare) if bare else "", flops / s / 1e12 if bare else "", extra, error]
    rows = [row(name, *found[name]) if name in times else [name, found[name]] for name in paths]
    return (f"head, N={N:,} H={H:,} V={V:,}, {str(dtype)[6:]}, chunk {chunk:,}, {repeats} repeats",
            ["path", "NHV counted", "ms", "x bare, same FLOPs", "TFLOP/s", "peak extra MiB", "max error of logp"], rows,
            f"Forward and backward unless it says otherwise. NHV ({N * H * V / 1e9:.4g} GFLOP here): the matrix products that FlopCounterMode sees; it cannot look into a library's own "
            "operators, and misses addmm_. Bare products: input dtype in and out, whole, into buffers that are there. Peak extra: beyond the inputs, "
            f"the gradients of hidden and weight ({(hidden.nbytes + weight.nbytes) / 2**20:.4g} MiB) included. Error: nats, against float64 of the same inputs.")

def head(args, device):
    lad.turn_on_compile(lad.Config(), device, None)
    rows = map(int, (args.tokens or ("1024" if device.type == "cpu" else "4096,16384")).split(","))
    for name, N in itertools.product(shapes(args, device, "small", "0.5b,1.5b,7b"), rows):
        yield head_table(N, MODELS[name][0], MODELS[name][5], args.chunk or min(4096, -(-N // 4)), args.repeats or 10, device)

# ==== trainer: one update on a frozen rollout file =====================================================================
def write_rollouts(path, vocabulary, prompts, group, median, longest, seed=0):
    """A rollout batch as JSON lines {prompt, tokens, behaviour, adv}, prompts x group of them, the same bytes for the same arguments. Lengths of responses are log-normal
    (sigma 0.9: the mean is 1.5 medians) and cut at `longest`, prompts a tenth to a quarter of it; tokens are uniform, log-probs about -log V as random
    weights give them, advantages GRPO's of Bernoulli rewards. Returns (them, the file's SHA-256)."""
    rng, lines = random.Random(seed), []
    for _ in range(prompts):
        prompt, rate = rng.choices(range(vocabulary), k=rng.randint(longest // 10 + 1, longest // 4 + 1)), rng.random()
        rewards = [float(rng.random() < rate) for _ in range(group)]
        for reward in rewards:
            n = max(1, min(longest, round(rng.lognormvariate(math.log(median), 0.9))))
            lines.append(dict(prompt=prompt, tokens=rng.choices(range(vocabulary), k=n), adv=(reward - fmean(rewards)) / (stdev(rewards) + 1e-6),
                              behaviour=[round(-math.log(vocabulary) + rng.gauss(0, 0.01), 4) for _ in range(n)]))
    Path(path).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines, hashlib.sha256(Path(path).read_bytes()).hexdigest()

def random_model(name, folder, device):
    """`folder`, now of a model of that shape with random weights, fp32 on a CPU and bf16 on CUDA."""
    from transformers import Qwen2Config, Qwen2ForCausalLM
    torch.manual_seed(0)
    with device:
        model = Qwen2ForCausalLM(Qwen2Config(**dict(zip(FIELDS, MODELS[name])), max_position_embeddings=32768, bos_token_id=None, eos_token_id=0, pad_token_id=1))
    model.to(torch.bfloat16 if device.type == "cuda" else torch.float32).save_pretrained(folder)
    return folder

def start(argv, device):
    """A Config, in the process group (of one) that lad.py runs in."""
    cfg = lad.load_config([*argv, "--device", device.type])
    return cfg if torch.distributed.is_initialized() else [cfg, join(cfg), lad.turn_on_compile(cfg, device, None)][0]

def updates(cfg, folder, device):
    """(model, update): update(samples, **knobs) makes one optimizer step of lad.py on them."""
    model = lad.build_model(folder, cfg, device)
    optimizer = torch.optim.AdamW(model.parameters(), cfg.lr, (0.9, cfg.beta2), weight_decay=cfg.weight_decay, fused=True)
    def update(samples, **knobs):
        mine = dataclasses.replace(cfg, **knobs)
        model.gradient_checkpointing_enable({"use_reentrant": False}) if mine.checkpointing else model.gradient_checkpointing_disable()
        lad.accumulate_gradient(model, samples, mine, device)
        lad.optimizer_step(model, optimizer, mine)
    return model, update

def update_flops(config, samples, computed):
    """FLOPs of a forward and backward without recompute: 6 for each weight of the blocks' matrices and each of `computed` tokens, 6 HV for each
    response token, and 6 L heads head_dim T^2 for the attention of each sequence of T tokens (causal: half of the square)."""
    H, L, heads, D = config.hidden_size, config.num_hidden_layers, config.num_attention_heads, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    block, squares = 2 * H * D * (heads + config.num_key_value_heads) + 3 * H * config.intermediate_size, sum((len(s["prompt"]) + len(s["tokens"])) ** 2 for s in samples)
    return 6 * (L * block * computed + H * config.vocab_size * sum(len(s["tokens"]) for s in samples) + L * heads * D * squares)

def trl_updates(folder, samples, cfg, device, repeats, our_turn):
    """The same update by TRL's GRPOTrainer: its loop, loss, fused head and optimizer, on what its rollouts would have been, padded as it pads.
    our_turn() is called before each of its steps. Returns (seconds of each step, peak_memory's, pad tokens)."""
    import datasets, transformers, trl
    def pad(key, side):   # ids and mask, [samples, longest]
        ids, ones = [torch.tensor(s[key]) for s in samples], [torch.ones(len(s[key]), dtype=torch.long) for s in samples]
        return [torch.nn.utils.rnn.pad_sequence(x, batch_first=True, padding_side=side).to(device) for x in (ids, ones)]
    batch = dict(zip(("prompt_ids", "prompt_mask", "completion_ids", "completion_mask"), pad("prompt", "left") + pad("tokens", "right")))
    batch |= dict(advantages=torch.tensor([s["adv"] for s in samples], device=device), num_items_in_batch=batch["completion_mask"].sum())
    width = batch["prompt_ids"].shape[1] + batch["completion_ids"].shape[1]
    rows = max(n for n in range(1, len(samples) + 1) if len(samples) % n == 0 and (n == 1 or n * width <= cfg.micro_tokens))   # of a forward
    stamps, watch = [], contextlib.ExitStack()
    def rollouts(inputs):   # asked for at the start of each step, the first to warm up, the last to be watched
        torch.cuda.synchronize() if device.type == "cuda" else None
        stamps.append((time.perf_counter(), our_turn() if 0 < len(stamps) <= repeats else None,
                       watch.enter_context(peak_memory(device)) if len(stamps) == repeats + 1 else None, time.perf_counter()))   # the step before ended, this one began
        return dict(batch)
    config = trl.GRPOConfig(folder, per_device_train_batch_size=rows, gradient_accumulation_steps=len(samples) // rows, num_generations=cfg.group, max_steps=repeats + 2,
                            learning_rate=cfg.lr, beta=0.0, bf16=device.type == "cuda", use_cpu=device.type == "cpu", gradient_checkpointing=False,
                            report_to="none", save_strategy="no", disable_tqdm=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").to(device)
    trainer = trl.GRPOTrainer(model, lambda **kwargs: 0.0, config, datasets.Dataset.from_list([{"prompt": "x"}] * len(samples)), processing_class=tiny.make_tokenizer())
    trainer._generate_and_score_completions = rollouts
    with watch:
        trainer.train()
    return [b[0] - a[3] for a, b in zip(stamps[1:], stamps[2:])], stamps[-1][2], len(samples) * width - int(batch["prompt_mask"].sum() + batch["completion_mask"].sum())

def trainer_table(name, repeats, device, folder):
    cuda = device.type == "cuda"
    size = dict(prompts=16, group=8, median=700, longest=4096) if cuda else dict(prompts=4, group=8, median=48, longest=256)
    samples, digest = write_rollouts(f"{folder}/rollouts.jsonl", MODELS[name][5], **size)
    alone = [dict(s, prompt=[i, *s["prompt"][1:]]) for i, s in enumerate(samples)]   # no two prompts alike: nothing to share
    cfg = start(["--objective", "grpo", "--group", str(size["group"]), "--checkpointing", "false", "--micro_tokens", "16384" if cuda else "2048"], device)
    model, update = updates(cfg, random_model(name, folder, device), device)
    square = torch.randn(*[8192 if cuda else 1024] * 2, device=device, dtype=torch.bfloat16 if cuda else torch.float32)
    data = {"lad.py": samples, "lad.py, recompute": samples, "lad.py, prompts not shared": alone}
    runs = {label: partial(update, part, checkpointing="recompute" in label) for label, part in data.items()} | {"matmul": lambda: square @ square}
    race(runs, 0, device)
    times, memory, computed, pads, missing = {label: [] for label in runs}, {}, {}, {}, []
    for label, part in data.items():
        bins = lad.micro_batches(part, cfg)
        computed[label] = sum(len(s["tokens"]) for s in part) + sum(len(prompt) for b in bins for prompt in {tuple(s["prompt"]) for s in b})
        pads[label] = sum(lad.pack(b, torch.device("cpu"))["ids"].numel() for b in bins) - computed[label]
        with peak_memory(device) as memory[label]:
            runs[label]()
    our_turn = lambda: [times[label].append(timed(run, device)) for label, run in runs.items()]
    try:
        times["TRL"], memory["TRL"], pads["TRL"] = trl_updates(folder, samples, cfg, device, repeats, our_turn)
    except ImportError as error:
        missing = [["TRL", one_line(error)[:150]]]
        [our_turn() for _ in range(repeats)]
    tokens, peak = sum(len(s["prompt"]) + len(s["tokens"]) for s in samples), 2 * len(square) ** 3 / min(times.pop("matmul"))
    computed["TRL"], best = tokens, PEAK if cuda else peak
    rows = [[label, s := median(t), tokens / s, ratio(times["lad.py"], t), update_flops(model.config, samples, computed[label]) / s / best, memory[label]["bytes"] / 2**20,
             computed[label], pads[label]] for label, t in times.items()]
    return (f"trainer, Qwen2 of shape {name}, {sum(p.numel() for p in model.parameters()) / 1e6:,.1f}M random weights, {repeats} repeats",
            ["update", "s", "tokens/s", "speed / lad.py's", "MFU", "peak extra MiB", "tokens computed", "pad tokens"], rows + missing,
            f"Frozen rollouts: {len(samples)} samples of {size['prompts']} prompts, {tokens:,} tokens, {sum(len(s['tokens']) for s in samples):,} of them in responses, "
            f"SHA-256 {digest[:12]}; tokens/s is of all these. One optimizer step of {len(bins)} micro-batches. MFU: update_flops of the tokens computed, no pads, no recompute, "
            f"over {'989 TFLOP/s' if cuda else 'the matmul'}; a {len(square):,} matmul reached {peak / 1e12:.3g} TFLOP/s. Peak extra: beyond weights and Adam's moments."
            + " On a CPU lad.py pads inside attention, which is not counted." * (not cuda))

def trainer(args, device):
    for name in shapes(args, device, "small", "0.5b,1.5b"):
        with tempfile.TemporaryDirectory() as folder:
            yield trainer_table(name, args.repeats or 5, device, folder)

# ==== rollout and sync: vLLM ===========================================================================================
@functools.cache
def engine(name, device):
    """(cfg, vLLM, the trainer's model) of a shape; one for the process."""
    cfg = start(["--config", "tiny"], device)
    with tempfile.TemporaryDirectory() as folder:
        folder = str(find_model(cfg)) if name == "tiny" else random_model(name, folder, device)
        return cfg, lad.start_vllm(cfg, folder, device, skip_tokenizer_init=name != "tiny"), lad.build_model(folder, cfg, device)

def rollout(args, device):
    cfg, llm, model = engine("tiny", device)
    import transformers, vllm
    prompts = [tiny.make_tokenizer().encode(json.loads(line)["prompt"]) for line in open(tiny.make()["train"])][: cfg.prompts]
    tokens = lambda groups: sum(len(tokens) for group in groups for tokens in group)
    def plain(**options):
        transformers.set_seed(0)
        params = vllm.SamplingParams(n=cfg.group, temperature=cfg.temperature, top_p=cfg.top_p, max_tokens=cfg.max_tokens, detokenize=False, **options)
        return tokens([o.token_ids for o in out.outputs] for out in llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False))
    calls = {"LLM.generate": partial(plain, logprobs=0, flat_logprobs=True), "LLM.generate, no log-probs": plain,
             "lad.generate": lambda: tokens([s["tokens"] for s in group] for group in lad.generate(llm, cfg, prompts, cfg.group, seed=0))}
    with lad.awake(llm, model, device):
        written, times = {name: call() for name, call in calls.items()}, race(calls, args.repeats or 10, device)
    yield (f"rollout, tiny, {len(prompts)} prompts x {cfg.group} responses, {len(times['lad.generate'])} repeats", ["call", "s", "tokens", "tokens/s", "time / LLM.generate's"],
           [[name, s := median(t), written[name], written[name] / s, ratio(t, times["LLM.generate"])] for name, t in times.items()],
           "One engine; the same sampling parameters and the same seed before each call.")

def sync(args, device):
    name = args.shape or ("tiny" if device.type == "cpu" else "1.5b")
    cfg, llm, model = engine(name if name == "tiny" else shapes(args, device, "", "")[0], device)
    dtype, block = torch.float32 if device.type == "cpu" else torch.bfloat16, contextlib.ExitStack()
    source = [w for _, w in lad.named_weights(model, dtype)]
    target, size = list(map(torch.empty_like, source)), sum(w.nbytes for w in source)
    times = race({"awake: weights pushed, engine ready": lambda: block.enter_context(lad.awake(llm, model, device)), "leaving awake": block.close,
                  "gather and cast alone (named_weights)": lambda: [None for _ in lad.named_weights(model, dtype)],
                  "copy of the same bytes": lambda: [t.copy_(s) for t, s in zip(target, source)]}, args.repeats or 20, device)
    yield (f"sync, {name}, {size / 2**20:.4g} MiB in {len(source)} tensors, {args.repeats or 20} repeats", ["what", "s", "GB/s", "time / copy's"],
           [[label, s := median(t), "" if "leaving" in label else size / s / 1e9, ratio(t, times["copy of the same bytes"])] for label, t in times.items()],
           "Copy: tensor by tensor, into buffers that are there, on the same device.")

# ==== step: the steps of a tiny run, and one of its minibatches under the profiler =====================================
def step(args, device):
    yield profile_minibatch(device)
    with tempfile.TemporaryDirectory() as folder:
        stamped = "import sys, time, lad; from harness import tracking; say = tracking.print0; tracking.print0 = lambda *a: say(time.time(), *a); lad.main(sys.argv[1:])"   # each line after its time
        command = [sys.executable, "-c", stamped, *f"--config tiny --device {device.type} --steps {args.steps} --out {folder}/run --eval_data= --checkpoint_every 0".split()]
        env = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}   # lad.set_up's, of this process
        run = subprocess.run(command, cwd=lad.HERE, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if run.returncode:
            raise RuntimeError(f"lad.py says: {one_line(run.stdout.splitlines()[-1])}")
        steps = [x for x in map(json.loads, open(f"{folder}/run/metrics.jsonl")) if "seconds" in x][2:]   # the first two warm up
    stamps = [float(line.split()[0]) for line in run.stdout.splitlines() if line.split()[1:2] == ["step"]][1:]
    split = {part: [x[f"seconds_{part}"] for x in steps] for part in ("rollout", "reward", "train", "sync")}
    split["other"] = [b - a - sum(known) for a, b, *known in zip(stamps, stamps[1:], *split.values())]
    draw_split(args.picture, split) if args.picture else None
    yield (f"step, tiny, {len(steps)} of {args.steps} steps", ["part", "s, mean", "% of the step", "range"],
           [[name, fmean(s), sum(s) / (stamps[-1] - stamps[0]) * 100, f"{min(s):.2g} to {max(s):.2g}"] for name, s in split.items()],
           "By lad.py's own clock: reward is the verifier and the advantages; train packing, old log-probs and all optimizer steps. A step, "
           f"{(stamps[-1] - stamps[0]) / len(steps):.3g} s, is from one printed line to the next; other is what the four leave of it: metrics, samples, printing.")

def draw_split(path, split):
    """A stacked bar for each step."""
    import matplotlib.figure
    ax = matplotlib.figure.Figure(figsize=(8, 3.6), layout="tight").subplots()
    for i, (name, seconds) in enumerate(split.items()):
        ax.bar(range(3, len(seconds) + 3), seconds, bottom=[sum(parts[:i]) for parts in zip(*split.values())], label=f"{name}, {sum(seconds) / sum(map(sum, split.values())):.1%}")
    ax.set(xlabel="step", ylabel="seconds", title="Where the time of a step goes (tiny preset)")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, reverse=True)
    ax.figure.savefig(path, dpi=120)

def profile_minibatch(device, top=10):
    """The operators of one optimizer step of the tiny preset (forward, backward, AdamW), by their own time."""
    cfg = start(["--config", "tiny"], device)
    samples, _ = write_rollouts(os.devnull, 24, cfg.prompts // cfg.minibatches, cfg.group, 7, cfg.max_tokens)   # of the preset's size, vocabulary and about its lengths
    update = partial(updates(cfg, find_model(cfg), device)[1], samples)
    alone, kinds = median(race({"": update}, 5, device)[""]), torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU] + [kinds.CUDA] * (device.type == "cuda")) as profile:
        update()
    own = lambda e: (e.self_device_time_total if device.type == "cuda" else e.self_cpu_time_total) / 1e3
    events, total = sorted(profile.key_averages(), key=own, reverse=True), sum(map(own, profile.key_averages()))
    return (f"step, operators of one training minibatch of tiny ({len(samples)} samples)", ["operator", "calls", "ms, its own", "%"],
            [[e.key[:60], e.count, own(e), own(e) / total * 100] for e in events[:top]], f"torch.profiler, {device.type} time, {total:.1f} ms in all ({len(events)} operators), "
            f"its own cost included: shares, not speeds. The same update without it: {alone * 1e3:.1f} ms, Python included.")

# ==== verify, and main =================================================================================================
def verified(args, device):
    boxed, program = "\\boxed{{{}}}".format, "```python\n{}\n```".format
    items = {"plain numbers": [("math", "Long reasoning. " * 530 + boxed(i), str(i)) for i in range(args.items)],
             "expressions": [("math", boxed(f"x+{i}"), f"{i}+x") for i in range(-(-args.items // 20))],
             "programs on stdin": [("code", program("print(7)"), {"inputs": ["3 4"], "outputs": ["7"]})] * -(-args.items // 40),
             "programs called by tests": [("code", program("def add(a, b): return a + b"), {"inputs": ["3\n4"], "outputs": ["7"], "fn_name": "add"})] * -(-args.items // 40)}
    with verify.Verifier(workers=args.workers) as verifier:
        if (right := sum(verifier.score(sum(items.values(), [])))) != sum(map(len, items.values())):
            raise RuntimeError(f"only {right:g} of these right answers were accepted: the verifier does not work here")
        times = race({name: partial(verifier.score, batch) for name, batch in items.items()}, args.repeats or 5, torch.device("cpu"))
    yield (f"verify, {args.workers} workers, {len(times['expressions'])} repeats", ["what", "items", "a second", "ms of a worker for each"],
           [[name, n := len(items[name]), n / (s := median(t)), s / n * 1e3 * args.workers] for name, t in times.items()], "Plain numbers stand behind 8,500 characters of text.")

TABLES = dict(head=head, trainer=trainer, rollout=rollout, sync=sync, step=step, verify=verified)

def shapes(args, device, cpu, cuda):
    names = (args.shape or (cpu if device.type == "cpu" else cuda)).split(",")
    return [name if name in MODELS else settings.die(f"bench.py --shape {name!r}{settings.did_you_mean(name, MODELS)}") for name in names]

def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="+", choices=[*TABLES, "all"], metavar="TABLE")
    for name, default, text in (
            ("device", "auto", "auto, cpu or cuda"), ("shape", "", f"of {', '.join(MODELS)}: for head and trainer several with commas, for sync one, or tiny"),
            ("tokens", "", "head: N, several with commas; 1024, on CUDA 4096,16384"), ("chunk", 0, "head: tokens whose logits exist at once; 0: N/4, at most 4096"),
            ("repeats", 0, "turns of each comparison; 0: as suits it"), ("steps", 12, "step: rollout batches of the run"), ("items", 2000, "verify: plain numbers in a turn"),
            ("workers", 2, "verify: processes"), ("out", "", "the tables as JSON too, in this file"), ("picture", "", "step: a PNG of the split")):
        parser.add_argument(f"--{name}", type=type(default), default=default, help=text)
    args, found, became, failed = parser.parse_args(argv), [], [], ""
    if args.device not in ("auto", "cpu", "cuda") or args.device == "cuda" and not torch.cuda.is_available() or args.steps < 3:
        parser.error(f"--device {args.device} --steps {args.steps}: expected auto, cpu, or cuda where torch sees a GPU; at least 3 steps")
    device = torch.device("cuda", 0) if torch.cuda.is_available() and args.device != "cpu" else torch.device("cpu")
    where = about(argv, device)
    for name in TABLES if "all" in args.tables else ():   # in a process of its own; the last line of an error is the reason
        with tempfile.NamedTemporaryFile(suffix=".json") as out:
            ran = subprocess.run([sys.executable, __file__, *[name if word == "all" else word for word in argv], "--out", out.name], stderr=subprocess.PIPE, text=True)
            found += json.loads(Path(out.name).read_text() or "[]")
            became.append([name, one_line(ran.stderr.strip().splitlines()[-1]) if ran.returncode else "yes"])
    show(where, "all", ["table", "ran, or why not"], became, "") if became else None
    for name in args.tables if "all" not in args.tables else ():
        try:
            for title, columns, rows, note in TABLES[name](args, device):
                show(where, title, columns, rows, note)
                found.append(dict(table=name, **where, title=title, columns=columns, rows=rows, note=note))
        except (ImportError, RuntimeError) as error:   # a package that is not installed, memory, ..
            failed = f"{name}: {one_line(error)}"
    Path(args.out).write_text(json.dumps(found, indent=1)) if args.out else None
    parser.error(failed) if failed else None

if __name__ == "__main__":
    main(sys.argv[1:])
