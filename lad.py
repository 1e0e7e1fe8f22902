r"""
lad.py: reinforcement learning with verifiable rewards for language models, in one file.

vLLM writes G responses to each prompt, verify.py scores them, a row of OBJECTIVES turns the scores into
a gradient, FSDP2 shards the update over the GPUs that torchrun was given. The reference implementation of

    LAD   Learning Advantage Distributions, arXiv 2602.20132.  Match the ratio rho = pi_theta/pi_old to
          e^u, u = A/eta, under an f-divergence:  L = E_{y ~ pi_old} [ e^u f(z) ],  z = rho e^(-u).
    FADE  Focal Advantage with Dynamic Entropy, arXiv 2607.01490.
          A_i = (1 - rbar)^(alpha-1) (r_i - rbar) [/ delta if r_i < rbar], alpha and delta scheduled from
          the running solve rate p and the running token entropy H.

and of the policy gradients they are compared with. Where this file departs from the papers:

  1. LAD's ratio is per token by default, as PPO code takes it; the derivation has whole sequences, and
     `--ratio sequence` takes them. The fixed point of the former is e^u per token.
  2. LAD's generators keep the factor 1/2 of the textbook definitions (the authors' code is said to omit it).
  3. FADE's averaging constant 0.02 is read as new = 0.98 old + 0.02 batch; rbar is the prompt's own solve
     rate, p the whole batch's. Both are judgement calls: we read an account of the paper, not its code.
  4. FADE's H is the mean of -log pi(y_t) over the sampled tokens: unbiased for their mean entropy, and free.
  5. Group standard deviations are torch.std (G - 1 in the denominator), as in TRL and verl.
  6. Truncated importance sampling between vLLM and the trainer is on for every objective, token by token (`--tis_cap 0`: off).

Run it:
    python lad.py --config tiny --objective fade                    # no GPU, no downloads, some minutes
    torchrun --nproc_per_node=2 lad.py --config tiny                # the same, sharded over two CPU ranks
    torchrun --nproc_per_node=8 lad.py --objective fade             # Qwen2.5-7B on DAPO-Math-17k, one node
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \
        lad.py --config fade-code-32b --tensor_parallel 2
    python lad.py --help                                            # every knob

Conventions: B prompts, G responses to each, T tokens, N packed tokens, H hidden, V vocabulary; a "sample" is one response, a row
one prompt with its verifiable truth. Log-probabilities are in nats, at the sampling temperature; those of the policy that wrote
the responses are "old" if the trainer scored them and "behaviour" if vLLM did.
"""
import contextlib, dataclasses, datetime, json, logging, math, os, resource, shutil, signal, sys, time, warnings, zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path

if __name__ == "__main__":   # read by OpenMP and by vLLM when they are imported, hence up here
    quiet = dict(OMP_WAIT_POLICY="passive", VLLM_LOGGING_LEVEL="ERROR", TORCH_CPP_LOG_LEVEL="ERROR")   # threads that spin make a busy machine 25 times slower
    os.environ.update({"OMP_NUM_THREADS": str(min(16, len(os.sched_getaffinity(0))))} | quiet | os.environ)
    warnings.filterwarnings("ignore", category=FutureWarning)

import torch
import torch.distributed as dist
import torch.nn.functional as F

import verify
from data import draw, field, load_data, read_rows
from settings import die, one_line, read as read_settings, replace
from watch import hold, patiently, watch

HERE = Path(__file__).resolve().parent

# ==== 1. Config: this dataclass is the only home of a knob. Presets in configs.toml hold what differs from it. =========

def knob(default, help, low=None, high=None, choices=None):
    """One setting: its default, its help (units included) and the closed range or the names it may take."""
    return dataclasses.field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices))

@dataclass
class Config:
    # run
    objective: str = knob("lad", "row of the OBJECTIVES table")
    model: str = knob("Qwen/Qwen2.5-7B", "hub name (org/name or org/name@revision) or folder of a causal LM; 'tiny': made on the spot")
    out: str = knob("", "run directory; empty: runs/<config>-<objective>-s<seed>")
    seed: int = knob(0, "of data order and sampling", 0, 2**32 - 1)
    steps: int = knob(400, "rollout batches", 0)
    device: str = knob("cuda", "auto: cuda where there is one", choices=("cuda", "cpu", "auto"))
    # data
    data: str = knob("BytedTsinghua-SIA/DAPO-Math-17k", "training rows: hub name (org/name or org/name@revision), or a .json, .jsonl or .parquet file")
    data_name: str = knob("", "hub configuration (subset) of data")
    data_split: str = knob("train", "hub split of data")
    eval_data: str = knob("HuggingFaceH4/MATH-500", "held-out rows; empty: no evaluation")
    eval_name: str = knob("", "hub configuration of eval_data")
    eval_split: str = knob("test", "hub split of eval_data")
    prompt: str = knob("{prompt}", "template over a row's fields, in Python's format syntax; a field that is a list of chat messages stands for the last of them, alone for all of them")
    truth: str = knob("reward_model.ground_truth", "field of the verifiable truth, dotted; 'a=x,b=y': a dict made of fields x and y")
    truth_after: str = knob("", "keep what follows the last such mark in the truth (GSM8K: '####')")
    eval_prompt: str = knob("Solve the following math problem step by step. The last line of your response should be of the form Answer: $Answer (without quotes) "
                            "where $Answer is the answer to the problem.\n\n{problem}\n\nRemember to put your answer on its own line after \"Answer:\".", "prompt, for eval_data; empty: the same")
    eval_truth: str = knob("answer", "truth, for eval_data; empty: the same")
    kind: str = knob("math:answer", "verifier, see verify.py; math looks for the answer in \\boxed{}, after 'Answer:' or at the last number", choices=("math", "math:answer", "math:number", "code", "countdown"))
    chat: bool = knob(True, "wrap the prompt in the tokenizer's chat template")
    system: str = knob("", "system message of the chat template")
    max_prompt_tokens: int = knob(1024, "longer prompts are dropped, and counted", 1)
    # rollouts
    prompts: int = knob(128, "B, prompts in a rollout batch, over all ranks", 1)
    group: int = knob(8, "G, responses to a prompt", 2)
    max_tokens: int = knob(8192, "of a response", 1)
    temperature: float = knob(1.0, "of sampling, and of every log-prob", 1e-3, 10)
    top_p: float = knob(1.0, "nucleus sampling; below 1, vLLM's log-probs are of the truncated distribution", 1e-3, 1)
    tensor_parallel: int = knob(1, "ranks that share one vLLM engine", 1)
    vllm_memory: float = knob(0.6, "share of each GPU that vLLM may fill while it generates; on a CPU, GiB of KV cache", 0.01)
    vllm_seqs: int = knob(256, "sequences that vLLM decodes at once", 1)
    vllm_eager: bool = knob(False, "no CUDA graphs in vLLM: quick start, slow decoding")
    # objective
    ratio: str = knob("token", "the likelihood ratio: of each token, or of the whole sequence", choices=("token", "sequence"))
    clip_low: float = knob(0.2, "PPO clips the ratio below 1 - this", 0, 1)
    clip_high: float = knob(0.28, "and above 1 + this (clip-higher, DAPO)", 0)
    eta: float = knob(0.25, "LAD: temperature of the target e^(A/eta)", 1e-3)
    divergence: str = knob("js", "LAD: generator f; kl_c and rkl_c are kl and rkl less f'(1)(z - 1)", choices=("kl", "rkl", "jf", "js", "hd", "tv", "kl_c", "rkl_c"))
    alpha: float = knob(2.0, "power: focus on hard prompts, (1 - rbar)^(alpha - 1)", 0)
    delta: float = knob(0.5, "asym: divides the weight of failures", 1e-3)
    success_weight: float = knob(0.1, "w_reinforce: lambda, the weight of a success; a failure weighs -1", 0)
    pass_k: int = knob(4, "passk: the k of pass@k; 1 would be reinforce", 2)
    ent_coef: float = knob(0.4, "entadv: weight of a token's entropy in its advantage", 0)
    ent_kappa: float = knob(2.0, "entadv: abs(A) over this is all that entropy may add", 1e-3)
    cov_share: float = knob(2e-4, "clip_cov, kl_cov: share of a micro-batch's tokens, at least one", 0, 1)
    cov_low: float = knob(1.0, "clip_cov: the tokens clipped are drawn from those whose covariance is above this")
    cov_high: float = knob(5.0, "clip_cov: and below this")
    cov_kl: float = knob(1.0, "kl_cov: weight of abs(log pi_theta - log pi_old)", 0)
    flow_beta: float = knob(15.0, "flowrl: beta, the inverse temperature of the target", 0)
    fade_alpha_max: float = knob(3.0, "FADE: ceiling of alpha", 1)
    fade_delta_min: float = knob(0.3, "FADE: floor of delta", 1e-3, 1)
    fade_rate: float = knob(0.02, "FADE: share of the new batch in the running p and H", 0, 1)
    fade_entropy: float = knob(0.0, "FADE: H*, target entropy in nats; 0: half of the first batch's", 0)
    kl_coef: float = knob(0.0, "weight of the k3 estimate of KL to the reference, the initial model; where nothing needs it, none is kept", 0)
    ref_every: int = knob(0, "rollout batches after which the reference becomes the policy as it is; 0: never", 0)
    tis_cap: float = knob(2.0, "cap of the trainer/vLLM importance weight; 0: no such weight", 0)
    aggregation: str = knob("token", "mean over tokens (DAPO), over sequence means, or a sum over B G max_tokens (Dr. GRPO)", choices=("token", "sequence", "constant"))
    zero_variance: str = knob("keep", "groups with equal rewards: keep, drop from the loss and its denominator, or refill with new prompts", choices=("keep", "drop", "refill"))
    refill_rounds: int = knob(3, "rounds of generation at most for one batch, with refill", 1)
    overlong: str = knob("keep", "truncated responses: keep, mask out of the loss, or shape (DAPO's soft penalty)", choices=("keep", "mask", "shape"))
    overlong_buffer: int = knob(2048, "shape: tokens before max_tokens over which the penalty grows to 1", 1)
    # optimization
    minibatches: int = knob(1, "optimizer steps in one pass over a rollout batch", 1)
    epochs: int = knob(1, "passes over a rollout batch", 1)
    lr: float = knob(1e-6, "AdamW's, after warm-up", 0)
    warmup: int = knob(10, "rollout batches of linear warm-up", 0)
    weight_decay: float = knob(0.0, "AdamW's", 0)
    beta2: float = knob(0.95, "AdamW's; beta1 is 0.9", 0, 1)
    grad_clip: float = knob(1.0, "ceiling of the global gradient norm", 1e-6)
    # speed and memory
    micro_tokens: int = knob(16384, "tokens packed into one forward, about; a longer sample gets a row of its own", 1)
    head_chunk: int = knob(0, "tokens whose logits exist at once; 0: as many as fit into a quarter of the free memory, 4096 at most", 0)
    checkpointing: bool = knob(True, "recompute activations in the backward pass")
    compile: str = knob("auto", "torch.compile the head's element-wise parts (auto: on CUDA), or the decoder's blocks too", choices=("auto", "on", "blocks", "off"))
    shard_size: int = knob(0, "GPUs that share one copy of the weights (hybrid sharding); 0: all", 0)
    reduce_each: bool = knob(False, "reduce gradients after every micro-batch: less memory, more traffic")
    offload: bool = knob(False, "weights, gradients and Adam's moments live in the CPU's memory between uses: much less GPU memory, slower")
    # verifier
    verify_workers: int = knob(4, "processes, for each rank", 1)
    verify_timeout: float = knob(10.0, "seconds for one item", 0.1)
    max_failed: float = knob(0.5, "the run stops when a larger share of a batch's samples could not be scored, or has log-probs from vLLM that are not finite", 0, 1)
    # evaluation, checkpoints, logging
    eval_every: int = knob(20, "steps; 0: only before and after", 0)
    eval_samples: int = knob(8, "K, responses to each held-out prompt", 1)
    eval_prompts: int = knob(0, "held-out prompts used, the first of them; 0: all", 0)
    checkpoint_every: int = knob(20, "steps; 0: only at the end", 0)
    checkpoint_keep: int = knob(2, "checkpoints kept, the newest", 1)

KNOBS = {f.name: f for f in dataclasses.fields(Config)}

def load_config(argv):
    """Config from `--key value` flags (argv has no program name), over a preset, over the defaults. Bad input prints one line with
    file, line, key, value and what was expected, and exits with code 2. `config` (the preset) and `resume` become attributes."""
    if "--plan" in argv:   # memory, FLOPs and seconds instead of a run
        import plan
        plan.main(argv)
    try:
        name, values, resume = read_settings(argv, KNOBS, OBJECTIVES, __doc__)
    except ValueError as error:
        die(error)
    cfg = Config(**OBJECTIVES[values.get("objective", Config.objective)].defaults | values)
    path = Path(name)   # of a preset in a file the file's name, of a run's config.toml the run's
    cfg.config = name if path.suffix != ".toml" else path.resolve().parent.name if path.name == "config.toml" else path.stem
    cfg.resume = resume is not None
    cfg.out = cfg.out or f"runs/{cfg.config}-{cfg.objective}-s{cfg.seed}"
    if cfg.prompts % cfg.minibatches:
        die(f"prompts = {cfg.prompts} does not divide into minibatches = {cfg.minibatches}")
    if cfg.objective == "passk" and cfg.pass_k > cfg.group:
        die(f"pass_k = {cfg.pass_k} is more than the group = {cfg.group} responses that pass@k is estimated from")
    return cfg

# Ranks. Everything below runs on all of them; these are where they meet.

rank = lambda: dist.get_rank() if dist.is_initialized() else 0
world = lambda: dist.get_world_size() if dist.is_initialized() else 1
print0 = lambda *args: print(*args, flush=True) if rank() == 0 else None

def all_reduce(values, op="sum"):
    """Sum or max of a list of numbers over all ranks, exact to fp64."""
    values = torch.tensor(values, dtype=torch.float64)
    if world() > 1:
        dist.all_reduce(values, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op])
    return values.tolist()

# ==== 2. Data and prompts: data.py makes rows {prompt_ids, prompt, truth} of files and hub sets; draw() takes the next of them =====

# ==== 3. Rollouts (vLLM, in this process, on the GPUs that also train) =================================================

def start_vllm(cfg, folder, device, **options):
    """An engine on this rank (or shared by `tensor_parallel` neighbouring ranks). On a GPU it goes to sleep until
    it is needed, handing its memory to the trainer."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if device.type == "cpu":
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        torch._dynamo.config.disable = cfg.compile in ("auto", "off")   # else vLLM compiles one line of its sampler, for 20 seconds
    from vllm import LLM
    memory = (dict(kv_cache_memory_bytes=int(cfg.vllm_memory * 2**30)) if device.type == "cpu"
              else dict(gpu_memory_utilization=cfg.vllm_memory, enable_sleep_mode=True))
    try:
        llm = LLM(folder, dtype="float32" if device.type == "cpu" else "bfloat16", tensor_parallel_size=cfg.tensor_parallel,
                  distributed_executor_backend="external_launcher",   # torchrun's ranks are vLLM's workers
                  max_model_len=cfg.max_prompt_tokens + cfg.max_tokens, max_num_seqs=cfg.vllm_seqs,
                  enforce_eager=cfg.vllm_eager or device.type == "cpu", enable_prefix_caching=device.type != "cpu",
                  logprobs_mode="processed_logprobs",   # of the distribution that was sampled: temperature, top-p
                  disable_log_stats=True, use_tqdm_on_load=False, seed=cfg.seed, **memory, **options)
    except Exception as error:
        die(f"vLLM did not start: {one_line(error)}; try a smaller vllm_memory = {cfg.vllm_memory}, "
            f"max_tokens = {cfg.max_tokens} or a larger tensor_parallel = {cfg.tensor_parallel}")
    if device.type == "cuda":
        llm.sleep(level=2)
    return llm

def named_weights(model, dtype):
    """(HF name, whole tensor), one at a time, the same order on all ranks. Tied weights come once, the head of log Z not at all."""
    for name, p in ((name, p) for name, p in model.named_parameters() if not name.startswith("log_z.")):
        p = p.detach().to(dtype)   # before it is gathered: half the traffic
        yield name, p.full_tensor() if hasattr(p, "full_tensor") else p

@contextlib.contextmanager
def awake(llm, model, device):
    """vLLM with the trainer's weights, for the length of the block."""
    if device.type == "cuda":   # the trainer's weights are on the GPU now too: the KV cache comes only after they went over
        torch.cuda.empty_cache()
        llm.wake_up(["weights"])
    weights = named_weights(model, torch.float32 if device.type == "cpu" else torch.bfloat16)
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
    if device.type == "cpu" and model.config.tie_word_embeddings:   # vLLM's CPU build packs a copy of a tied head, and reload_weights leaves it stale
        llm.apply_model(lambda m: m.lm_head.quant_method.process_weights_after_loading(m.lm_head))
    if device.type == "cuda":
        llm.wake_up(["kv_cache"])
    llm.reset_prefix_cache()    # what is cached was computed with the weights before
    yield
    if device.type == "cuda":
        llm.sleep(level=2)      # weights and cache are dropped: the next block pushes anew

def generate(llm, cfg, prompt_ids, n, seed, logprobs=True, progress=False):
    """n responses to each prompt: [[{tokens, behaviour (log-probs), truncated}] * n] * len(prompt_ids). What vLLM samples from lives in
    this process: a seed makes each call reproducible, and a resumed run needs no saved state. Ranks that share an engine share it."""
    from transformers import set_seed
    from vllm import SamplingParams
    set_seed(seed)
    params = SamplingParams(n=n, temperature=cfg.temperature, top_p=cfg.top_p, max_tokens=cfg.max_tokens,
                            logprobs=0 if logprobs else None, flat_logprobs=logprobs, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompt_ids], params, use_tqdm=progress)
    return [[dict(tokens=list(o.token_ids),   # the stop token is the last of them, and is trained
                  behaviour=list(o.logprobs.logprobs) if logprobs and o.token_ids else [],
                  truncated=o.finish_reason == "length") for o in out.outputs] for out in outputs]

# ==== 4. Rewards, a batch of scored groups, evaluation =================================================================

BACKGROUND = ThreadPoolExecutor(1)   # verification's thread; its work is done by the verifier's processes
def score(verifier, cfg, tokenizer, rows, groups):
    """Fill in each sample's text and start to verify; the function that is returned waits for it and fills in `correct` (the verifier's score, in
    [0, 1]) and `reward` (what is trained on: that, less DAPO's soft overlong penalty, arXiv 2503.14476, eq. 13, with overlong = "shape"). `failed`
    says why a sample could not be scored (reward 0), `lost` that its log-probs are not finite: it is not trained on."""
    for row, samples in zip(rows, groups):
        texts = tokenizer.batch_decode([s["tokens"] for s in samples], skip_special_tokens=True)
        for s, text in zip(samples, texts):
            s.update(text=text, row=row, prompt=row["prompt_ids"])
    flat = [s for samples in groups for s in samples]
    thinking = lambda s: "<think>" * s["row"]["prompt"].rstrip().endswith("<think>")   # opened by the prompt: the verifier must know
    verifying = BACKGROUND.submit(verifier.score, [(cfg.kind, thinking(s) + s["text"], s["row"]["truth"]) for s in flat])
    def finish():
        for s, correct in zip(flat, verifying.result()):
            over = (len(s["tokens"]) - cfg.max_tokens + cfg.overlong_buffer) / cfg.overlong_buffer
            s.update(correct=correct, reward=correct - (min(1.0, max(0.0, over)) if cfg.overlong == "shape" else 0.0))
        for s, reason in zip(flat, verifier.reasons):   # a wrong answer is none of these; a lost worker, its error and a truth that cannot be read are
            s["lost"] = not all(map(math.isfinite, s["behaviour"]))
            s["behaviour"] = [0.0] * len(s["tokens"]) if s["lost"] else s["behaviour"]
            s["failed"] = "log-prob not finite" if s["lost"] else reason if ":" in reason or reason == "truth unparsable" else ""
    return finish

def rollout(llm, cfg, rows, n, step, use, logprobs=True):
    """This rank's share of `rows` and n samples for each. Rank r of W owns rows r, r + W, ..: the ranks' n-th shares together
    are the same rows for every W. Ranks that share an engine hand it all their rows, with one seed."""
    first, me = rank() - rank() % cfg.tensor_parallel, rank() % cfg.tensor_parallel
    shares = [rows[r::world()] for r in range(first, first + cfg.tensor_parallel)]
    seed = zlib.crc32(f"{cfg.seed} {step} {use} {first}".encode())
    groups = generate(llm, cfg, [row["prompt_ids"] for part in shares for row in part], n, seed, logprobs, progress=rank() == 0 and cfg.device == "cuda")
    start = sum(map(len, shares[:me]))
    return shares[me], groups[start: start + len(shares[me])]

def collect(llm, cfg, tokenizer, verifier, rows, position, step, lap):
    """Groups for one batch: (those to train on, all that were drawn, new data position, score()'s function). With zero_variance "drop" or
    "refill", groups whose rewards are all equal are left out; "refill" draws until every rank has its share, refill_rounds times at most."""
    groups, drawn, share = [], [], cfg.prompts // world()
    for attempt in range(cfg.refill_rounds if cfg.zero_variance == "refill" else 1):
        mine, new = rollout(llm, cfg, draw(rows, position, cfg.prompts, cfg.seed), cfg.group, step, attempt)
        lap("rollout")
        finish = score(verifier, cfg, tokenizer, mine, new)
        finish = finish if cfg.zero_variance == "keep" else finish() or (lambda: None)   # with keep it goes on while log-probs are computed
        lap("reward")
        position += cfg.prompts
        drawn += new
        groups += [g for g in new if cfg.zero_variance == "keep" or len({s["reward"] for s in g}) > 1]
        if all_reduce([-len(groups)], "max")[0] <= -share:
            break
    return groups[:share], drawn, position, finish

def evaluate(llm, cfg, tokenizer, verifier, rows, step):
    """pass@1, pass@K and the mean number of distinct right answers to a prompt, from K samples each."""
    K = cfg.eval_samples
    mine, groups = rollout(llm, cfg, rows, K, step, "eval", logprobs=False)
    score(verifier, cfg, tokenizer, mine, groups)()
    right, ks = [["".join(s["text"].split()) for s in g if s["correct"] > 0.5] for g in groups], sorted({1, K})
    sums = all_reduce([len(right), *(sum(pass_at_k(K, len(r), k) for r in right) for k in ks), sum(len(set(r)) for r in right)])
    return dict(zip([f"eval/pass@{k}" for k in ks] + ["eval/distinct"], (x / sums[0] for x in sums[1:])))

# ==== 5. Advantages and objectives: pure tensors in, pure tensors out ==================================================

def power_asym(r, alpha, delta):
    """A = (1 - rbar)^(alpha-1) (r - rbar), divided by delta where r < rbar. arXiv 2607.01490."""
    rbar = r.mean(-1, keepdim=True)
    a = (1 - rbar).clamp_min(0) ** (alpha - 1) * (r - rbar)
    return torch.where(r >= rbar, a, a / delta)

def fade_schedule(state, cfg):
    """(alpha, delta) of FADE: alpha = clip(3(1-p)/(2p), 1, alpha_max), delta = clip(1 + H - H*, delta_min, 1)."""
    alpha = min(max(1.5 * (1 - state["p"]) / max(state["p"], 1e-9), 1.0), cfg.fade_alpha_max)
    delta = min(max(1 + state["H"] - state["H*"], cfg.fade_delta_min), 1.0)
    return alpha, delta

new_state = lambda: {"p": 0.5, "H": None, "H*": None}   # running statistics over all ranks: solve rate; token entropy in nats; its target

def update_state(state, p, entropy, cfg):
    """Fold in a batch's solve rate and mean token entropy. H starts at the first batch's entropy, p at 0.5."""
    if state["H"] is None:
        state["H"], state["H*"] = entropy, cfg.fade_entropy or entropy / 2
    state["p"] += cfg.fade_rate * (p - state["p"])
    state["H"] += cfg.fade_rate * (entropy - state["H"])

def pass_at_k_advantage(r, k):
    """k C(n-c, k-1)/C(n-1, k-1) for each of c right among n, 0 for a wrong one: the unbiased gradient of pass@k with the leave-one-out
    baseline of arXiv 2505.15201, times n since ours is a mean over samples."""
    n, right = r.shape[-1], r > 0.5
    wrong = n - right.sum(-1, keepdim=True).to(r)
    return right * k * reduce(torch.mul, [((wrong - i) / (n - 1 - i)).clamp_min(0) for i in range(k - 1)])

# Losses: (log_ratio, A, cfg, t) -> (loss of each token, is it clipped). log_ratio = log pi_theta - log pi_old, of each token or (broadcast
# to its tokens) of the sequence; t: logp, old, mask, seq, and as far as known entropy (no gradient), ref, log_z, each of the same shape.

def ppo_clip(log_ratio, adv, cfg, t):
    """-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A). arXiv 1707.06347; clip-higher, arXiv 2503.14476."""
    ratio = log_ratio.exp()
    free, clipped = ratio * adv, ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high) * adv
    return -torch.minimum(free, clipped), clipped < free

def entadv(log_ratio, adv, cfg, t):
    """PPO on A + min(a H_t, abs(A)/kappa), H_t the entropy of the policy being trained at that token. arXiv 2506.14758."""
    return ppo_clip(log_ratio, adv + torch.minimum(cfg.ent_coef * t["entropy"], adv.abs() / cfg.ent_kappa), cfg, t)

def covariance(adv, t):
    """(log pi - its mean) (A - its mean) of each token, means over the micro-batch's tokens. arXiv 2505.22617."""
    centred = lambda x: x - (x * t["mask"]).sum() / t["mask"].sum().clamp_min(1)
    return centred(t["logp"].detach()) * centred(adv)

def highest(x, share):
    """True at the `share` of a tensor's elements that are highest, at least at one."""
    few = x.flatten().topk(min(max(int(share * x.numel()), 1), x.numel())).indices
    return torch.zeros_like(x, dtype=torch.bool).flatten().index_fill(0, few, True).view_as(x)

def clip_cov(log_ratio, adv, cfg, t):
    """PPO without the loss of a random few of the tokens whose covariance lies in [cov_low, cov_high]. arXiv 2505.22617 (Clip-Cov)."""
    (loss, clipped), cov = ppo_clip(log_ratio, adv, cfg, t), covariance(adv, t)
    may = (cov > cfg.cov_low) & (cov < cfg.cov_high) & ~clipped & (t["mask"] > 0)
    chosen = highest(torch.rand_like(cov).masked_fill(~may, -1), cfg.cov_share) & may
    return loss * ~chosen, clipped | chosen

def kl_cov(log_ratio, adv, cfg, t):
    """-rho A, unclipped, and cov_kl abs(log pi - log pi_old) on the tokens of the highest covariance. arXiv 2505.22617 (KL-Cov)."""
    chosen = highest(covariance(adv, t).masked_fill(t["mask"] == 0, -math.inf), cfg.cov_share)
    return -log_ratio.exp() * adv + cfg.cov_kl * chosen * (t["logp"] - t["old"]).abs(), torch.zeros_like(chosen)

def flowrl(log_ratio, adv, cfg, t):
    """w (log Z(x) + (log pi - log pi_ref)/T - beta A)^2 of whole sequences of T tokens, w = min(rho, 10) detached (the authors' code). FlowRL, arXiv 2509.15207."""
    total = lambda x: sum_in_sequence(x * t["mask"], t["seq"])
    w = total(t["logp"] - t["old"]).detach().clamp(-20, math.log(10)).exp()
    gap = t["log_z"] + total(t["logp"] - t["ref"]) / total(torch.ones_like(adv)).clamp_min(1) - cfg.flow_beta * adv
    return w * gap**2, torch.zeros_like(adv, dtype=torch.bool)

log_mean = lambda log_z: F.softplus(log_z) - math.log(2)   # log((z + 1)/2)

GENERATORS = {   # e^u f(z) of l = log z, x = log rho, u = x - l. Never z itself, which overflows long before rho and e^u do
    "kl":    lambda l, x, u: x.exp() * l,                                                     # f = z log z
    "rkl":   lambda l, x, u: -u.exp() * l,                                                    # f = -log z
    "jf":    lambda l, x, u: (x.exp() - u.exp()) * l,                                         # f = (z - 1) log z
    "js":    lambda l, x, u: 0.5 * (x.exp() * (l - log_mean(l)) - u.exp() * log_mean(l)),     # f = (z log z - (z + 1) log((z + 1)/2))/2
    "hd":    lambda l, x, u: 0.5 * ((0.5 * x).exp() - (0.5 * u).exp()) ** 2,                  # f = (sqrt z - 1)^2 / 2
    "tv":    lambda l, x, u: 0.5 * (x.exp() - u.exp()).abs(),                                 # f = abs(z - 1)/2
    "kl_c":  lambda l, x, u: x.exp() * (l - 1) + u.exp(),                                     # f = z log z - (z - 1): less variance, as f'(1) = 0
    "rkl_c": lambda l, x, u: x.exp() - u.exp() * (l + 1),                                     # f = -log z + (z - 1)
}

def f_divergence(name, log_z, log_ratio, u):
    """e^u f(z), z = rho e^(-u), of a generator f of LAD (arXiv 2602.20132): tensors of one shape in and out.
    Its gradient with respect to log rho is rho f'(z)."""
    return GENERATORS[name](log_z, log_ratio, u)

def lad(log_ratio, adv, cfg, t):
    """e^u f(rho e^(-u)), u = A/eta: pulls the ratio to e^u instead of pushing it up or down without end."""
    u = (adv / cfg.eta).clamp(-60, 60)   # fp32 ends at e^88, and e^60 already is all of any group's mass
    return f_divergence(cfg.divergence, log_ratio - u, log_ratio, u), torch.zeros_like(u, dtype=torch.bool)

@dataclass(frozen=True)
class Objective:
    advantage: callable         # (rewards r [B,G], cfg, state) -> A [B,G]
    loss: callable = ppo_clip
    needs: tuple = ()           # "ref": log-probs of a frozen reference, and state["drift"] [B,G], log pi_old(y|x) - log pi_ref(y|x); "log_z": a learned head
    local: bool = True          # a token's loss depends on no other token (its gradient can be had inside the head's forward)
    defaults: dict = dataclasses.field(default_factory=dict)   # config values that belong to the method; presets and flags go first

centre = lambda r: r - r.mean(-1, keepdim=True)   # r - rbar, rbar the mean of the prompt's group
grpo = lambda r, cfg, state: centre(r) / (r.std(-1, keepdim=True) + 1e-6)

OBJECTIVES = {
    "reinforce":   Objective(lambda r, cfg, state: r),
    "w_reinforce": Objective(lambda r, cfg, state: (1 + cfg.success_weight) * (r > 0.5).to(r) - 1),   # arXiv 2506.01347
    "rloo":        Objective(lambda r, cfg, state: centre(r) * r.shape[-1] / (r.shape[-1] - 1)),            # arXiv 2402.14740: less the others' mean
    "dr_grpo":     Objective(lambda r, cfg, state: centre(r), defaults=dict(aggregation="constant")),      # arXiv 2503.20783
    "grpo":        Objective(grpo),                                                                        # arXiv 2402.03300
    "maxrl":       Objective(lambda r, cfg, state: centre(c := (r > 0.5).to(r)) / (c.mean(-1, keepdim=True) + 1e-6)),   # arXiv 2602.02710: the gradient of log p
    "passk":       Objective(lambda r, cfg, state: pass_at_k_advantage(r, cfg.pass_k)),                    # arXiv 2505.15201
    "power":       Objective(lambda r, cfg, state: power_asym(r, cfg.alpha, 1.0)),                         # arXiv 2607.01490
    "asym":        Objective(lambda r, cfg, state: power_asym(r, 1.0, cfg.delta)),                         # arXiv 2607.01490
    "power_asym":  Objective(lambda r, cfg, state: power_asym(r, cfg.alpha, cfg.delta)),                   # arXiv 2607.01490
    "fade":        Objective(lambda r, cfg, state: power_asym(r, *fade_schedule(state, cfg))),             # arXiv 2607.01490
    "lad":         Objective(grpo, lad),                                                                   # arXiv 2602.20132
    # LAD against the reference instead of pi_old, which moves and lets e^u compound: W = -f'(z), z = (pi_theta/pi_ref) e^(-u) of whole sequences
    "lad_anchor":  Objective(lambda r, cfg, state: centre(policy_weights("lad", grpo(r, cfg, state) - cfg.eta * state["drift"], cfg)), needs=("ref",)),
    "entadv":      Objective(grpo, entadv),                                                                # arXiv 2506.14758
    "clip_cov":    Objective(grpo, clip_cov, local=False, defaults=dict(clip_low=1.0, clip_high=1.0)),     # arXiv 2505.22617
    "kl_cov":      Objective(grpo, kl_cov, local=False, defaults=dict(cov_share=2e-3, minibatches=8)),     # arXiv 2505.22617; in one update it is grpo
    "flowrl":      Objective(grpo, flowrl, ("ref", "log_z"), local=False, defaults=dict(aggregation="sequence")),   # arXiv 2509.15207
}

def advantages(name, rewards, cfg, state):
    """Advantages [B,G] of the rewards [B,G] of B groups. `state` is new_state()'s, kept by update_state(), with drift where needed."""
    return OBJECTIVES[name].advantage(rewards, cfg, state)

def sum_in_sequence(x, seq):
    """Sum over each sequence, at each of its tokens: x is packed [N], seq [N] naming the sequence, or padded [B,T] (seq None)."""
    return x.sum(-1, keepdim=True).expand_as(x) if seq is None else torch.zeros_like(x).index_add(0, seq, x).index_select(0, seq)

def policy_loss(name, logp, old_logp, adv, mask, cfg, seq=None, **more):
    """Loss of each token, not yet summed (token_scale() holds the denominators), and what is to be logged.

    logp, old_logp, mask: packed [N] with `seq` [N] naming each token's sequence, or padded [B,T]. adv: the same
    shape, or [B] for the latter. `more`: entropy, ref, log_z, where the objective needs them. Masked tokens get 0. With ratio = "sequence" every token of a sequence carries the
    sequence's loss, so that aggregation "sequence" is the mean of E_y [loss(y)]."""
    if adv.dim() < logp.dim():
        adv = adv.unsqueeze(-1)
    mask = mask.to(logp)
    log_ratio = (logp - old_logp) * mask
    log_ratio = sum_in_sequence(log_ratio, seq) if cfg.ratio == "sequence" else log_ratio
    log_ratio = log_ratio.clamp(-20, 20)   # a ratio of e^20 is a broken run already; inf would hide which
    loss, clipped = OBJECTIVES[name].loss(log_ratio, adv.expand_as(logp), cfg, dict(more, logp=logp, old=old_logp, mask=mask, seq=seq))
    return loss * mask, {"ratio": (log_ratio.exp() * mask).detach(), "clipped": clipped * mask}

def policy_weights(name, adv, cfg):
    """W = -d loss / d log pi at rho = 1, the weight of each sample's score function in the first update: A for a policy gradient,
    -f'(e^(-A/eta)) for LAD, 2 beta A for FlowRL (a response of one token, at pi = pi_ref, log Z = 0), so that all have a gradient mass."""
    x = torch.zeros_like(adv).unsqueeze(-1).requires_grad_()
    none = torch.zeros_like(adv).unsqueeze(-1)
    loss, _ = policy_loss(name, x, none, adv.unsqueeze(-1), torch.ones_like(x), cfg, entropy=none, ref=none, log_z=none)
    return -torch.autograd.grad(loss.sum(), x)[0].squeeze(-1)

def k3(logp, ref_logp):
    """Schulman's estimate of KL(pi_theta || pi_ref) at sampled tokens: e^d - 1 - d, d = log pi_ref - log pi_theta."""
    d = (ref_logp - logp).clamp(-20, 20)
    return d.expm1() - d

def token_scale(cfg, lengths, total_tokens, total_sequences):
    """The weight of a token's loss in the step's loss, for samples of these lengths. Totals are over all ranks
    and micro-batches of the optimizer step: the gradient does not depend on how the batch is split (but for clip_cov and kl_cov)."""
    each = {"token": lambda n: 1 / max(total_tokens, 1),                          # DAPO
            "sequence": lambda n: 1 / (max(n, 1) * total_sequences),                      # GRPO
            "constant": lambda n: 1 / (cfg.max_tokens * total_sequences)}[cfg.aggregation]   # Dr. GRPO
    return [each(n) for n in lengths]

def pass_at_k(n, c, k):
    """Unbiased pass@k = 1 - C(n-c, k)/C(n, k) of c right among n (arXiv 2107.03374). ValueError if k > n."""
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass_at_k(n={n}, c={c}, k={k}) needs 0 <= c <= n and 1 <= k <= n")
    return 1.0 - math.prod((n - c - i) / (n - i) for i in range(k))

# ==== 6. Fused log-prob: the [tokens, vocab] logits exist for one chunk at a time, in either pass ======================

def matmul_fp32(a, b):
    """a @ b, accumulated and returned in fp32 (fp64 for fp64), whatever the inputs are."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    kind = torch.promote_types(a.dtype, torch.float32)
    return a.to(kind) @ b.to(kind)

def logits_to_logp(logits, targets, temperature):
    """(log-prob of the target, entropy, logsumexp), each [C], of logits [C,V]."""
    logits = logits / temperature
    lse = torch.logsumexp(logits, -1)
    entropy = lse - (torch.exp(logits - lse[:, None]) * logits).sum(-1)
    return logits.gather(-1, targets[:, None])[:, 0] - lse, entropy, lse

def logp_to_dlogits(logits, targets, temperature, lse, entropy, dlogp, dentropy):
    """d logits [C,V]: dlogp (onehot - p) - dentropy p (log p + entropy), over the temperature."""
    logp = logits / temperature - lse[:, None]
    p = logp.exp()
    d = -p * dlogp[:, None]
    if dentropy is not None:
        d = d - dentropy[:, None] * p * (logp + entropy[:, None])
    d = d.scatter_add(-1, targets[:, None], dlogp[:, None])
    return d / temperature

class FusedLogprob(torch.autograd.Function):
    """2 NHV flops for the logits and 4 NHV for the two gradients. Where `gradient` can tell a token's d loss / d logp as soon as its logp
    is there, both gradients are formed at once: 6 NHV. Else the backward forms the logits once more: 8 NHV."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, chunk, gradient):
        ctx.set_materialize_grads(False)   # no entropy gradient, no work for it
        ctx.temperature, ctx.chunk, ctx.early, out = temperature, chunk, bool(gradient), []
        grads = gradient and FusedLogprob.empty(hidden, weight)
        for part in (slice(i, i + chunk) for i in range(0, len(hidden), chunk)):
            logits = matmul_fp32(hidden[part], weight.t())
            out.append(logits_to_logp(logits, targets[part], temperature))
            if gradient:
                logp, entropy, lse = out[-1]
                FusedLogprob.add(grads, part, logits, hidden, weight, targets, temperature, lse, entropy, gradient(part, logp, entropy), None)
        logp, entropy, lse = (torch.cat(x) for x in zip(*out))
        ctx.save_for_backward(*(grads or (hidden, weight, targets, lse, entropy)))
        return logp, entropy

    @staticmethod
    def backward(ctx, dlogp, dentropy):
        if ctx.early:
            grads = ctx.saved_tensors
        else:
            hidden, weight, targets, lse, entropy = ctx.saved_tensors
            grads, dlogp = FusedLogprob.empty(hidden, weight), torch.zeros_like(lse) if dlogp is None else dlogp
            for part in (slice(i, i + ctx.chunk) for i in range(0, len(hidden), ctx.chunk)):
                FusedLogprob.add(grads, part, matmul_fp32(hidden[part], weight.t()), hidden, weight, targets, ctx.temperature, lse[part],
                                 entropy[part], dlogp[part], None if dentropy is None else dentropy[part])
        return grads[0], grads[1].to(grads[0].dtype), None, None, None, None

    def empty(hidden, weight):
        """(d hidden, d weight), the latter summed over chunks in fp32."""
        return torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))

    def add(grads, part, logits, hidden, weight, targets, temperature, lse, entropy, dlogp, dentropy):
        dlogits = logp_to_dlogits(logits, targets[part], temperature, lse, entropy, dlogp, dentropy).to(hidden.dtype)
        grads[0][part] = dlogits @ weight
        grads[1].add_(matmul_fp32(dlogits.t(), hidden[part]))

def fused_logprob(hidden, weight, targets, temperature=1.0, chunk=4096, gradient=None):
    """(log-prob [N], entropy [N]) in fp32 of targets [N] under softmax(hidden [N,H] @ weight [V,H]^T / temperature).
    Memory beyond inputs and gradients: chunk x V fp32 logits, and one fp32 copy of the weight's gradient.
    gradient(part, logp [C], entropy [C]) -> d loss / d logp [C] of the tokens in the slice `part`: must be what the loss's own
    backward will send here, which is then not looked at; no gradient flows through the entropy."""
    return FusedLogprob.apply(hidden, weight, targets, temperature, chunk, gradient)

def naive_logprob(hidden, weight, targets, temperature=1.0):
    """The twin that fused_logprob is tested against: the same from whole logits."""
    kind = torch.promote_types(hidden.dtype, torch.float32)
    logp = torch.log_softmax(hidden.to(kind) @ weight.to(kind).t() / temperature, -1)
    return logp.gather(-1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)

def turn_on_compile(cfg, device, model=None):
    """Compile the two element-wise functions of the head and, with compile = blocks, the decoder's blocks; dynamic, since rows have any length."""
    if cfg.compile == "off" or (cfg.compile == "auto" and device.type != "cuda"):
        return
    if device.type == "cpu" and not any(shutil.which(c) for c in (os.environ.get("CXX", "g++"), "clang++")):
        return print0("compile   no C++ compiler on this machine: running eagerly")
    for name in ("logits_to_logp", "logp_to_dlogits"):
        globals()[name] = torch.compile(globals()[name], dynamic=True)
    for block in model.base_model.layers if cfg.compile == "blocks" else ():
        block.compile(dynamic=True)

# ==== 7. Model, sharding, packed micro-batches, the update =============================================================

def packed_attention(module, query, key, value, attention_mask=None, scaling=None, dropout=0.0, sliding_window=None,
                     cu_seqlens=None, max_seqlen=None, full=None, kept=None, **kwargs):
    """Causal attention inside each sequence of one packed row: q, k, v [1, heads, N, D] -> [1, N, heads, D]. A prompt is in the row
    once, whatever the number of its responses: `full` lays it before each of them, `kept` takes back one result a token.
    CUDA: torch's own varlen flash attention, no pad token anywhere. CPU: its twin, one sdpa over [sequences, heads, max_seqlen, D];
    the padding behind a sequence is never seen, causality hides it."""
    take = lambda x, index: x if index is None else x.index_select(0, index)
    q, k, v = (take(x[0].transpose(0, 1), full) for x in (query, key, value))   # [tokens of whole sequences, heads, D]
    if q.is_cuda:
        from torch.nn.attention.varlen import varlen_attn
        window = (sliding_window - 1 if sliding_window else -1, 0)   # (left, 0): causal
        out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scaling, window_size=window, enable_gqa=True)
    else:
        q, k, v = (x.view(-1, max_seqlen, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        mask = torch.ones(max_seqlen, max_seqlen, dtype=torch.bool).tril().triu(1 - sliding_window) if sliding_window else None
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True)
        out = out.transpose(1, 2).flatten(0, 1)
    return take(out, kept)[None], None

def logprob_forward(model, batch, temperature, chunk, gradient=None):
    """The model's forward, whole: packed ids in, (logp, entropy, log_z) [N] of the response tokens out; log_z is None without such a
    head. The heads are in here because FSDP gathers a module's weights only inside that module's own forward."""
    hidden = model.base_model(input_ids=batch["ids"], position_ids=batch["positions"], use_cache=False,
                              **{key: batch[key] for key in ("cu_seqlens", "max_seqlen", "full", "kept")}).last_hidden_state[0]
    if not chunk:   # logits in fp32, their gradient in fp32 and in the model's type: 10 bytes at most for each
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated() if hidden.is_cuda else 2**32
        chunk = min(max(free // 4 // (10 * model.lm_head.weight.shape[0]) // 256 * 256, 256), 4096)
    logp, entropy = fused_logprob(hidden.index_select(0, batch["predict"]), model.lm_head.weight, batch["targets"], temperature, chunk, gradient)
    log_z = None
    if hasattr(model, "log_z"):   # of the mean hidden state of each prompt
        inside = batch["in_prompt"][:, None]
        add = lambda x: x.new_zeros(len(batch["lengths"]), x.shape[1]).index_add(0, batch["sample"], x)   # in fp32: bf16 cannot count beyond 256
        mean = add(hidden.float() * inside) / add(inside.float()).clamp_min(1)
        log_z = model.log_z(mean.index_select(0, batch["first"]).to(hidden.dtype))[:, 0].float().index_select(0, batch["seq"])
    return logp, entropy, log_z

def log_z_head(width):
    """FlowRL's three layers from a prompt's mean hidden state to log Z (arXiv 2509.15207)."""
    from torch.nn import GELU, LayerNorm, Linear, Sequential
    return Sequential(Linear(width, width), GELU(), LayerNorm(width), Linear(width, width), GELU(), LayerNorm(width), Linear(width, 1))

def build_model(folder, cfg, device, trainable=True):
    """A causal LM from a Hugging Face folder: fp32 weights, sharded, each rank reading only what it keeps.
    On CUDA compute is in bf16. model(batch, temperature, chunk) is logprob_forward."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
    from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
    AttentionInterface.register("packed", packed_attention)
    config = AutoConfig.from_pretrained(folder)
    for key in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(config, key, None) not in (None, 1, 1.0):
            die(f"{folder}: {key} = {getattr(config, key)} scales the logits, which the fused head does not do")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="packed")
    if not hasattr(model, "lm_head") or model.lm_head.bias is not None:
        die(f"{folder}: {type(model).__name__} has no plain lm_head; a decoder-only model with a linear head is needed")
    if trainable and "log_z" in OBJECTIVES[cfg.objective].needs:
        with torch.random.fork_rng(devices=[]):   # small: made whole and alike on every rank, moved to its shards below
            torch.manual_seed(cfg.seed)
            initial, model.log_z = log_z_head(config.hidden_size).state_dict(), log_z_head(config.hidden_size).to("meta")
    if world() > 1 or device.type == "cuda":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if device.type == "cuda" else MixedPrecisionPolicy()
        size = cfg.shard_size or world()
        shape, names = ((world(),), ("shard",)) if size == world() else ((world() // size, size), ("replicate", "shard"))
        mesh = dist.init_device_mesh(device.type, shape, mesh_dim_names=names)
        where = CPUOffloadPolicy(pin_memory=device.type == "cuda") if cfg.offload else OffloadPolicy()
        for module in (*model.base_model.layers, model):
            fully_shard(module, mesh=mesh, mp_policy=policy, offload_policy=where)
    model.to_empty(device="cpu" if cfg.offload else device)
    if lost := [name for name, _ in model.named_buffers() if "inv_freq" not in name]:
        die(f"{folder}: buffers {lost} are computed, not stored, and build_model does not know how")
    for module in model.modules():   # rotary frequencies are computed too: the meta device has lost them
        if hasattr(module, "inv_freq"):
            module._buffers.update(type(module)(config).to(device)._buffers)
    model.tie_weights()
    weights = {name: p for name, p in model.named_parameters() if not name.startswith("log_z.")}   # tied weights appear once, as in the files
    try:
        dcp.load(weights, storage_reader=HuggingFaceStorageReader(str(folder)))
    except (Exception, dcp.api.CheckpointException) as error:
        die(f"{folder}: its weights do not fit its config: {one_line(error)[-400:]}")
    for name, p in model.log_z.named_parameters() if hasattr(model, "log_z") else ():
        p.data.copy_(dist.tensor.distribute_tensor(initial[name].to(device), p.device_mesh, p.placements) if hasattr(p, "full_tensor") else initial[name])
    model.requires_grad_(trainable).train(trainable)
    for module in model.modules():   # a log-prob is to be the same twice
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if cfg.checkpointing and trainable:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.forward = partial(logprob_forward, model)
    return model

def pack(samples, device):
    """One packed row of tokens, and everything about its response tokens, as tensors on the device. Samples with the same prompt share it.
    A sample: prompt [ids], tokens [ids], behaviour [log-probs], adv, scale, and old/ref [log-probs] once known."""
    prompt, length = (torch.tensor([len(s[key]) for s in samples]) for key in ("prompt", "tokens"))
    seen, S = {}, torch.arange(len(samples))
    first = torch.tensor([seen.setdefault(tuple(s["prompt"]), i) for i, s in enumerate(samples)])   # the sample whose prompt is in the row
    owns, total = first == S, prompt + length
    starts = (prompt * owns + length).cumsum(0) - (prompt * owns + length)   # in the row
    after = starts + prompt * owns                                            # where the response starts
    max_seqlen, shared, padded = int(total.max()), not bool(owns.all()), device.type != "cuda"
    sample = torch.repeat_interleave(S, max_seqlen if padded else total)      # of whole sequences: each with its prompt
    t = torch.arange(len(sample)) - torch.repeat_interleave((S if padded else total.cumsum(0) - total) * (max_seqlen if padded else 1), max_seqlen if padded else total)
    in_prompt, inside = t < prompt[sample], t < total[sample]
    full = torch.where(in_prompt, starts[first[sample]] + t, after[sample] + t - prompt[sample]) * inside
    kept = (inside & (owns[sample] | ~in_prompt)).nonzero()[:, 0]
    seq = torch.repeat_interleave(S, length)
    which = torch.arange(len(seq)) - torch.repeat_interleave(length.cumsum(0) - length, length)   # 0, 1, .. within each response
    batch = dict(
        ids=torch.tensor([[t for s, own in zip(samples, owns.tolist()) for t in (*(s["prompt"] if own else ()), *s["tokens"])]]), positions=t[kept][None],
        cu_seqlens=F.pad(total.cumsum(0), (1, 0)).to(torch.int32), full=full, kept=kept, sample=sample[kept], in_prompt=in_prompt[kept], first=first,
        targets=torch.tensor([t for s in samples for t in s["tokens"]]), seq=seq,
        predict=torch.where(which > 0, after[seq] + which - 1, (starts + prompt - 1)[first[seq]]),   # the position whose hidden state predicts the token
        behaviour=torch.tensor([x for s in samples for x in s["behaviour"]], dtype=torch.float32),
        adv=torch.tensor([s["adv"] for s in samples], dtype=torch.float32)[seq],
        scale=torch.tensor([s["scale"] for s in samples], dtype=torch.float32)[seq])
    if not padded:
        batch = {k: v.pin_memory().to(device, non_blocking=True) for k, v in batch.items() if shared or k not in ("full", "kept")}
    for key in ("old", "ref"):
        if samples[0].get(key) is not None:
            batch[key] = torch.cat([s[key] for s in samples])
    return {"full": None, "kept": None} | batch | dict(max_seqlen=max_seqlen, lengths=length.tolist())

def micro_batches(samples, cfg):
    """Lists of samples of about micro_tokens each, the same number on every rank (each makes a sharded forward). Neighbours with one prompt
    stay together, so as to share it, in units of up to a quarter of micro_tokens."""
    units = []   # [tokens, samples]
    for s in samples:
        if units and units[-1][1][0]["prompt"] == s["prompt"] and units[-1][0] + len(s["tokens"]) <= cfg.micro_tokens // 4:
            units[-1] = [units[-1][0] + len(s["tokens"]), units[-1][1] + [s]]
        else:
            units.append([len(s["prompt"]) + len(s["tokens"]), [s]])
    n = int(all_reduce([max(math.ceil(sum(size for size, _ in units) / cfg.micro_tokens), 1)], "max")[0])
    bins, load = [[] for _ in range(n)], [0] * n
    for size, part in sorted(units, key=lambda unit: -unit[0]):   # the largest first, each into the emptiest bin
        i = load.index(min(load))
        bins[i] += part
        load[i] += size
    ghost = dict(prompt=[0], tokens=[0], behaviour=[0.0], adv=0.0, scale=0.0)   # keeps an idle rank in step
    return [b or [dict(ghost)] for b in bins]

@torch.no_grad()
def score_samples(model, key, samples, cfg, device):
    """samples[i][key] = [T] log-probs of its tokens under `model`, left on the device."""
    for bin_ in micro_batches(samples, cfg):
        batch = pack([dict(s, old=None, ref=None, adv=0.0, scale=0.0) for s in bin_], device)
        logp = model(batch, cfg.temperature, cfg.head_chunk)[0]
        for s, x in zip(bin_, logp.split(batch["lengths"])):
            s[key] = x
    if hasattr(model, "reshard"):
        model.reshard()   # a forward without a backward leaves the root's weights gathered

STATS = ("loss", "entropy", "clipped", "tis_mean", "rollout_kl", "kl", "ratio_max")   # sums over tokens; the last a max

def scaled_loss(cfg, batch, logp, entropy, log_z=None, part=slice(None)):
    """The step's loss, summed over the response tokens `part` of a micro-batch, and their STATS after the first."""
    at = lambda key: batch[key][part]
    old = at("old") if "old" in batch else logp.detach()   # one update per batch: the old policy is this one
    ref = at("ref") if "ref" in batch else logp.detach()
    mask, drift = (at("scale") > 0).float(), old - at("behaviour")   # trainer against vLLM, same weights, same tokens
    loss, info = policy_loss(cfg.objective, logp, old, at("adv"), mask, cfg, at("seq"), entropy=entropy.detach(), ref=ref, log_z=log_z)
    tis, kl = drift.exp().clamp(max=cfg.tis_cap) if cfg.tis_cap else torch.ones_like(drift), k3(logp, ref)
    stats = [(x * mask).sum() for x in (entropy, info["clipped"], tis, k3(at("behaviour"), old), kl)] + [info["ratio"].max()]
    return ((loss * tis + cfg.kl_coef * kl) * at("scale")).sum(), stats

def accumulate_gradient(model, samples, cfg, device):
    """Backward over one minibatch (this rank's share of it). Gradients end up summed over micro-batches and ranks.
    Returns {stat: its mean over the tokens}."""
    tokens, sequences = all_reduce([sum(len(s["tokens"]) for s in samples), len(samples)])
    for s, scale in zip(samples, token_scale(cfg, [len(s["tokens"]) for s in samples], tokens, sequences)):
        s["scale"] = scale
    sharded, bins, stats = hasattr(model, "set_requires_gradient_sync"), micro_batches(samples, cfg), []
    for i, bin_ in enumerate(bins):
        if sharded:
            model.set_requires_gradient_sync(cfg.reduce_each or cfg.offload or i == len(bins) - 1)
        batch = pack(bin_, device)
        def gradient(part, logp, entropy):   # of scaled_loss, known as soon as logp is
            with torch.enable_grad():
                logp = logp.detach().requires_grad_()
                return torch.autograd.grad(world() * scaled_loss(cfg, batch, logp, entropy, part=part)[0], logp)[0]
        local = OBJECTIVES[cfg.objective].local and cfg.ratio == "token"
        logp, entropy, log_z = model(batch, cfg.temperature, cfg.head_chunk, gradient if local else None)
        loss, rest = scaled_loss(cfg, batch, logp, entropy, log_z)
        (loss * world()).backward()              # FSDP averages over ranks; the scale holds the global denominator
        stats.append(torch.stack([loss, *rest]).detach())
    stats = torch.stack(stats)
    summed, top = all_reduce(stats[:, :-1].sum(0).tolist()), all_reduce([stats[:, -1].max().item()], "max")
    return dict(zip(STATS, summed[:1] + [x / max(tokens, 1) for x in summed[1:]] + top))

def optimizer_step(model, optimizer, cfg):
    """Clip and step; a gradient that is not finite, or zero (nothing to learn from), steps nowhere. Returns the norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    if 0 < norm < math.inf:
        optimizer.step()
    optimizer.zero_grad()
    return norm

@torch.no_grad()
def rank_one_share(weight, optimizer):
    """Share of the squared norm of Adam's last update of the head that its leading singular direction holds: FADE's second sign of
    collapse (arXiv 2607.01490). Eight power iterations, a lower bound. Tied weights: the embedding's update is in it."""
    if not (moments := optimizer.state.get(weight)):
        return 0.0
    mean, square = (moments[key].to_local() if hasattr(moments[key], "to_local") else moments[key] for key in ("exp_avg", "exp_avg_sq"))
    update = mean / (square.sqrt() + 1e-8)                    # [V/ranks, H]
    x = torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(0)).to(update)
    for _ in range(8):
        x = F.normalize(x.new_tensor(all_reduce((update.t() @ (update @ x)).tolist())), dim=0)
    first, whole = all_reduce([(update @ x).square().sum().item(), update.square().sum().item()])
    return first / max(whole, 1e-30)

# ==== 8. Logging and checkpoints =======================================================================================

def append(cfg, name, **fields):
    """One line of the run's metrics.jsonl or samples.jsonl, flushed; rank 0 only."""
    if rank() == 0:
        try:
            with open(Path(cfg.out) / name, "a") as f:
                f.write(json.dumps(fields) + "\n")
        except OSError as error:
            last = max([int(c.name[5:]) for c in checkpoints(cfg)], default=0)
            die(f"{error}: {len(json.dumps(fields)):,} bytes of {name} needed, {shutil.disk_usage(cfg.out).free:,} free; the run stops, whole up to step {last}: make room, then --resume {cfg.out}")

def rewind(cfg, step):
    """Forget the log lines after the checkpoint of `step`, a torn last one included."""
    for path in (Path(cfg.out) / name for name in ("metrics.jsonl", "samples.jsonl")):
        if rank() == 0 and path.exists():
            lines = [line for line in path.read_text().splitlines(True) if line.endswith("\n") and json.loads(line)["step"] <= step]
            replace(path, "".join(lines))

@patiently
def save_checkpoint(cfg, model, optimizer, anchor, progress):
    """checkpoints/step_N, sharded: weights and Adam's moments as safetensors (no pickle), the rest as JSON. It is written
    under a temporary name and renamed, so that a folder of the final name is whole. False, and a warning, if that failed."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    final = Path(cfg.out) / "checkpoints" / f"step_{progress['step']}"
    temporary = final.with_name("tmp")
    if rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
    dist.barrier()
    tensors, updates, error = checkpoint_tensors(model, optimizer, anchor), next((int(s["step"]) for s in optimizer.state.values()), 0), None
    try:
        dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(temporary), save_distributed=True))
        if rank() == 0:
            (temporary / "state.json").write_text(json.dumps(dict(progress, updates=updates, model=cfg.model, objective=cfg.objective, data=cfg.data, seed=cfg.seed, ref_every=cfg.ref_every)))
    except (Exception, dcp.api.CheckpointException) as failure:   # a full disk, most likely
        error = next(iter(getattr(failure, "failures", {0: (failure,)}).values()))[0]   # dcp's holds a traceback of each rank
    if all_reduce([error is not None], "max")[0]:
        shutil.rmtree(temporary, ignore_errors=True)
        print0(f"warning   checkpoint of step {progress['step']} not written: {sum(p.numel() * p.element_size() for p in tensors.values()) / 1e6:,.1f} MB needed, "
               f"{shutil.disk_usage(cfg.out).free / 1e6:,.1f} MB free; {[c.name for c in checkpoints(cfg)] or 'none'} kept, the run continues: make room before the next one ({one_line(error)[-150:]})")
        return False
    if rank() == 0:
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        for old in checkpoints(cfg)[: -cfg.checkpoint_keep]:
            shutil.rmtree(old)
    dist.barrier()
    return True

def checkpoint_tensors(model, optimizer, anchor):
    """{name: weight}, {moment.name: Adam's} and {anchor.name: a moving reference's}, the very tensors: saved from, and loaded into."""
    tensors = dict(model.named_parameters())
    moved = {f"anchor.{name}": p for name, p in anchor.named_parameters()} if anchor is not None else {}
    return tensors | moved | {f"{moment}.{name}": optimizer.state[p][moment] for name, p in tensors.items() for moment in ("exp_avg", "exp_avg_sq") if optimizer.state.get(p)}

def checkpoints(cfg):
    """The whole checkpoints of the run, oldest first."""
    return sorted((Path(cfg.out) / "checkpoints").glob("step_*"), key=lambda p: int(p.name[5:]))

def find_checkpoint(cfg):
    """(path, state.json's content) of the newest checkpoint of a run to be resumed; (None, {}) if there is none."""
    if not cfg.resume or not checkpoints(cfg):
        return None, {}
    path = checkpoints(cfg)[-1]
    saved = json.loads((path / "state.json").read_text())
    for key in ("model", "objective", "data", "seed", "ref_every"):
        if saved.get(key, 0) != getattr(cfg, key):
            die(f"{path} was trained with {key} = {saved.get(key, 0)!r}, this run has {getattr(cfg, key)!r}: give another --out")
    return path, saved

def load_checkpoint(path, saved, model, optimizer, anchor):
    """Fill model and optimizer in place, for any number of ranks."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    for p in model.parameters() if saved["updates"] else ():
        optimizer.state[p] = dict(step=torch.tensor(float(saved["updates"]), device=p.device), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
    dcp.load(checkpoint_tensors(model, optimizer, anchor), storage_reader=HuggingFaceStorageReader(str(path)))

@patiently
def export(cfg, model, tokenizer, folder):
    """out/hf: a save_pretrained folder that transformers, vLLM and eval.py load."""
    dtype = torch.float32 if next(model.parameters()).device.type == "cpu" else torch.bfloat16
    weights = {name: w.cpu() if rank() == 0 else None for name, w in named_weights(model, dtype)}
    if rank() == 0:
        from transformers import AutoModelForCausalLM, GenerationConfig
        with torch.device("meta"):
            shell = AutoModelForCausalLM.from_config(model.config, dtype=dtype)
        with contextlib.suppress(OSError):   # not every model has one
            shell.generation_config = GenerationConfig.from_pretrained(folder)
        try:
            shell.save_pretrained(Path(cfg.out) / "hf", state_dict=weights)
            tokenizer.save_pretrained(Path(cfg.out) / "hf")
        except Exception as error:
            die(f"{cfg.out}/hf not written: {one_line(error)}; {sum(w.numel() * w.element_size() for w in weights.values()) / 1e6:,.1f} MB needed, {shutil.disk_usage(cfg.out).free / 1e6:,.1f} MB free; "
                f"the checkpoints are whole: make room, then --resume {cfg.out}")
    dist.barrier()

# ==== 9. main: set-up, then the loop ===================================================================================

def set_up(cfg):
    """Join the process group (of one, if torchrun did not start us) and return this rank's device."""
    cuda = torch.cuda.is_available() and cfg.device != "cpu"
    if cfg.device == "cuda" and not cuda:
        die(f"preset {cfg.config!r} ({cfg.model}) needs CUDA GPUs and this machine has none; without one, try --config tiny")
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)   # opens no port; gloo does, on loopback (below)
    os.environ.update(dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", GLOO_SOCKET_IFNAME="lo") if alone else {})
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=datetime.timedelta(hours=6), **alone)   # a download takes long
    if cfg.prompts % (world() * cfg.minibatches):
        die(f"prompts = {cfg.prompts} does not divide by {world()} ranks x {cfg.minibatches} minibatches")
    if world() % cfg.tensor_parallel or world() % (cfg.shard_size or 1):
        die(f"{world()} ranks do not divide by tensor_parallel = {cfg.tensor_parallel} or by shard_size = {cfg.shard_size}")
    from transformers.utils import logging as hf_logging
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)   # says that a CPU has no Triton
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")

def leave_together(message):
    """All ranks leave with exit code 2 if one has a message, which it prints: nobody waits for it in a collective."""
    if message:
        print(f"lad.py: error: {message}", file=sys.stderr, flush=True)
    if all_reduce([bool(message)], "max")[0]:
        raise SystemExit(2)

def claim(cfg):
    """This run's folder is its own from here on: a second run that would write there leaves in one line."""
    message, out = "", Path(cfg.out).resolve()   # of a symbolic link, where it points
    if rank() == 0:
        if out in {place for here in (HERE, Path.cwd()) for place in (here, *here.parents)}:
            message = f"out = {cfg.out!r} holds the program, or the folder that you are in: give a run a folder of its own, as runs/{out.name or 'mine'}"
        else:
            try:
                hold(out)
            except BlockingIOError as error:
                message = f"{error}; wait for it, or give another --out or --seed"
            except OSError as error:
                message = f"out = {cfg.out!r}: {one_line(error)}; give a folder that can be written"
    leave_together(message)

def prepare(cfg):
    """Folder of the starting model. The offline default is made here, by the first rank of the machine."""
    if "tiny" in (cfg.model, cfg.data, cfg.eval_data):
        import tiny   # whose lock lets the first rank of a machine make it
        for key, name in (("model", "model"), ("data", "train"), ("eval_data", "test")):
            if getattr(cfg, key) == "tiny":
                setattr(cfg, key, str(tiny.make()[name]))
    if Path(cfg.model).is_dir():
        return cfg.model
    from huggingface_hub import snapshot_download
    name, _, revision = cfg.model.partition("@")   # org/name@revision, as the hub's own paths have it
    # One list of files for whoever downloads and whoever looks what is there: the hub's client counts a file that nobody asked for as missing
    wanted = dict(revision=revision or None, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"],
                  ignore_patterns=["consolidated*", "original/*", "*/*.safetensors"])   # second copies of the weights, in other formats
    error = None
    try:
        if int(os.environ["LOCAL_RANK"]) == 0:   # the first rank of each machine
            snapshot_download(name, **wanted)
    except Exception as failure:
        error = failure
    leave_together(error and f"model = {cfg.model!r}: no such folder, and the hub says: {one_line(error)}")
    return snapshot_download(name, local_files_only=True, **wanted)

def set_advantages(groups, drawn, cfg, state):
    """Fold the batch into the running statistics and give each sample its advantage. Returns what is to be logged of the batch."""
    flat = [s for g in drawn for s in g]
    sums = dict(samples=len(flat), reward=sum(s["reward"] for s in flat), solve_rate=sum(s["correct"] > 0.5 for s in flat), truncated=sum(s["truncated"] for s in flat),
                response_tokens=sum(len(s["tokens"]) for s in flat), prompt_tokens=sum(len(s["prompt"]) for s in flat),
                surprise=-sum(sum(s["behaviour"]) for s in flat), failed=sum(bool(s["failed"]) for s in flat), zero_variance=sum(len(g) for g in drawn if len({s["reward"] for s in g}) == 1))
    sums = dict(zip(sums, all_reduce(list(sums.values()))))
    update_state(state, sums["solve_rate"] / sums["samples"], sums.pop("surprise") / max(sums["response_tokens"], 1), cfg)
    tokens = int(sums["response_tokens"] + sums.pop("prompt_tokens"))
    batch = {key: value / sums["samples"] for key, value in sums.items() if key != "samples"}
    rewards = torch.tensor([[s["reward"] for s in g] for g in groups], dtype=torch.float64).reshape(-1, cfg.group)
    drift = torch.zeros_like(rewards)
    if groups and "ref" in OBJECTIVES[cfg.objective].needs:
        drift = torch.tensor([[(s["old"] - s["ref"]).sum() if s["tokens"] else 0.0 for s in g] for g in groups], dtype=torch.float64)
    adv = advantages(cfg.objective, rewards, cfg, dict(state, drift=drift))
    for s, a in zip((s for g in groups for s in g), adv.flatten().tolist()):
        s.update(adv=a, scale=1.0)
    weight, success = policy_weights(cfg.objective, adv, cfg).abs(), torch.tensor([[s["correct"] > 0.5 for s in g] for g in groups], dtype=torch.bool).reshape(adv.shape)
    masses = [mass / sums["samples"] for mass in all_reduce([weight[success].sum().item(), weight[~success].sum().item()])]
    alpha, delta = fade_schedule(state, cfg)
    return dict(batch, mass_success=masses[0], mass_failure=masses[1], fade_alpha=alpha, fade_delta=delta, fade_p=state["p"], fade_h=state["H"], tokens=tokens)

def stopwatch():
    """(lap, clock): lap(name) adds the seconds since the lap before to clock["seconds_" + name]."""
    clock, last = {f"seconds_{name}": 0.0 for name in ("rollout", "reward", "train", "sync")}, [time.time()]
    def lap(name):
        last.append(time.time())
        clock[f"seconds_{name}"] += last[-1] - last.pop(0)
    return lap, clock

def main(argv):
    cfg = load_config(argv)
    device = set_up(cfg)
    claim(cfg)
    out, folder = Path(cfg.out), prepare(cfg)
    checkpoint, saved = find_checkpoint(cfg)
    if all_reduce([saved.get("step", 0)], "max") != [saved.get("step", 0)]:
        die(f"rank {rank()} does not see the newest checkpoint of {out}: it must be on a disk that all nodes share")
    from transformers import AutoConfig, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if len(tokenizer) > (size := AutoConfig.from_pretrained(folder).vocab_size):
        die(f"{folder}: its tokenizer has {len(tokenizer)} tokens, its model {size}")
    rows = load_data(cfg, tokenizer)
    held_out = load_data(cfg, tokenizer, evaluation=True) if cfg.eval_data else []
    verifier = verify.Verifier(cfg.verify_workers, cfg.verify_timeout)
    try:
        verifier.score([(cfg.kind, "\\boxed{x} Answer: x\n```python\n0\n```", rows[0]["truth"])])
    except RuntimeError as error:   # better here than after the first hour
        die(f"the verifier cannot work here: {one_line(error)}")
    if rank() == 0:
        if (out / "metrics.jsonl").exists() and not cfg.resume:
            old = out.resolve()
            try:
                aside = old.rename(old.with_name(f"{old.name}.{time.strftime('%Y%m%d-%H%M%S')}"))   # its lock goes along
                (aside / "lock").unlink()
                hold(old)
            except OSError as error:
                die(f"{out} holds a run that cannot be moved aside: {one_line(error)}; --resume it, or give another --out")
            print(f"run       {out} was there: moved to {aside} (--resume goes on instead)")
        (out / "source").mkdir(parents=True, exist_ok=True)
        replace(out / "config.toml", "".join(f"{k} = {json.dumps(v)}\n" for k, v in dataclasses.asdict(cfg).items()))
        for module in list(sys.modules.values()):   # the files as run: this one, and what it imports from beside it
            if Path(getattr(module, "__file__", None) or "/").parent == HERE:
                shutil.copy(module.__file__, out / "source")
    llm = start_vllm(cfg, folder, device)
    model = build_model(folder, cfg, device)
    reference = build_model(folder, cfg, device, trainable=False) if "ref" in (needs := OBJECTIVES[cfg.objective].needs) or cfg.kl_coef else None
    turn_on_compile(cfg, device, model)
    optimizer = torch.optim.AdamW(model.parameters(), cfg.lr, (0.9, cfg.beta2), weight_decay=cfg.weight_decay, fused=True)
    anchor = reference if cfg.ref_every else None   # one that moves is part of the checkpoint
    if checkpoint:
        load_checkpoint(checkpoint, saved, model, optimizer, anchor)
    done, position, state, skipped = saved.get("step", 0), saved.get("position", 0), saved.get("state", new_state()), saved.get("skipped", 0)
    rewind(cfg, done if done else -1)
    print0(f"run       {out}: {cfg.objective}, {sum(p.numel() for p in model.parameters()):,} parameters, {world()} x {device.type}, {done} of {cfg.steps} steps done")

    stop = []   # SIGTERM or Ctrl-C: finish the step, save, leave. Again: leave at once (a batch system's SIGTERM comes twice, from it and from torchrun, hence the 3 s)
    def on_signal(number, frame):
        if stop and time.time() - stop[0][1] > (0.2 if number == signal.SIGINT else 3):
            os._exit(128 + number)
        stop.append((number, time.time()))
        print0("run       finishing this step, then saving; once more leaves at once") if len(stop) == 1 else None
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)

    over = watch(rank(), world()) if world() > 1 else None   # a rank that dies or hangs is named by the others, within a minute
    dist.group.WORLD.set_timeout(datetime.timedelta(hours=1))   # nothing is downloaded any more
    kept = done   # the last step that a checkpoint holds
    for step in range(done, cfg.steps + 1):
        began, before = time.time(), dict(step=step - 1, state=dict(state), position=position, skipped=skipped)
        if step > done:
            # Rollouts and their rewards, by the policy as it is
            lap, clock = stopwatch()
            with awake(llm, model, device):
                lap("sync")
                groups, drawn, position, rewarded = collect(llm, cfg, tokenizer, verifier, rows, position, step, lap)

            # Log-probs under the policies that stay as they are: the reference, and pi_old where it is needed beside pi_theta
            samples, needs_old = [s for g in groups for s in g if s["tokens"]], cfg.minibatches * cfg.epochs > 1 or "ref" in needs
            for key, policy in (("old", model if needs_old else None), ("ref", reference)):
                if policy is not None:
                    score_samples(policy, key, samples, cfg, device)

            # Advantages, from the rewards (verified meanwhile) and the running statistics
            lap("train")
            rewarded()
            lap("reward")
            metrics = set_advantages(groups, drawn, cfg, state)
            if metrics["failed"] > cfg.max_failed:   # better no step than one on rewards that mean nothing
                if step - 1 > kept:
                    save_checkpoint(cfg, model, optimizer, anchor, before)
                why = Counter(s["failed"] for g in drawn for s in g if s["failed"]).most_common(3)
                die(f"step {step}: {metrics['failed']:.0%} of its samples could not be scored (max_failed = {cfg.max_failed}): " + ", ".join(f"{n} x {reason}" for reason, n in why)
                    + f"; step {step - 1} is saved and nothing was trained on them: mend the verifier or the data, then --resume {out}")

            # Updates: `epochs` passes of `minibatches` optimizer steps
            samples = [s for s in samples if not (s["truncated"] and cfg.overlong == "mask" or s["lost"])]
            lr = optimizer.param_groups[0]["lr"] = cfg.lr * min(1.0, step / max(cfg.warmup, 1))
            stats, norms, M = [], [], cfg.minibatches
            for i in [*range(M)] * cfg.epochs:
                stats.append(accumulate_gradient(model, samples[i * len(samples) // M: (i + 1) * len(samples) // M], cfg, device))
                norms.append(optimizer_step(model, optimizer, cfg))
            for new, p in zip(model.parameters(), anchor.parameters()) if anchor is not None and step % cfg.ref_every == 0 else ():
                p.data.copy_(new.data)
            lap("train")

            # The rest is diagnostics
            finite = [x for x in norms if math.isfinite(x)]
            seconds, skipped = time.time() - began, skipped + len(norms) - len(finite)
            if len(finite) < len(norms):
                print0(f"warning   step {step}: {len(norms) - len(finite)} of {len(norms)} optimizer steps skipped, their gradient was not finite ({skipped} so far)")
            stats = [s for s, x in zip(stats, norms) if math.isfinite(x)] or [dict.fromkeys(STATS, 0.0)]   # else their NaN would be the log's
            metrics = dict(step=step, objective=cfg.objective, lr=lr, **metrics, **{k: sum(s[k] for s in stats) / len(stats) for k in STATS if k != "ratio_max"},
                           ratio_max=max(s["ratio_max"] for s in stats), grad_norm=sum(finite) / max(len(finite), 1), skipped=skipped,
                           rank_one=rank_one_share(model.lm_head.weight, optimizer), seconds=seconds, **clock,
                           tokens_per_second=metrics["tokens"] / seconds,
                           memory_gb=torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
            append(cfg, "metrics.jsonl", **metrics)
            shown = [g[0] for g in drawn[:2]]
            for s in shown:
                append(cfg, "samples.jsonl", step=step, prompt=s["row"]["prompt"], response=s["text"], truth=s["row"]["truth"], reward=s["reward"])
            print0("step {step:5d}/{steps}  reward {reward:6.3f}  entropy {entropy:5.3f}  |g| {grad_norm:7.3f}  length {response_tokens:6.1f}  vllm-kl {rollout_kl:.1e}  "
                   "{seconds:6.2f} s (gen {seconds_rollout:.2f}, train {seconds_train:.2f})  {tokens_per_second:7,.0f} tok/s  eta {left:.1f} min"
                   .format(**metrics, steps=cfg.steps, left=(cfg.steps - step) * seconds / 60))

        if held_out and (step == 0 or step > done and (step == cfg.steps or cfg.eval_every and step % cfg.eval_every == 0)):
            with awake(llm, model, device):
                scores = evaluate(llm, cfg, tokenizer, verifier, held_out, step)
            append(cfg, "metrics.jsonl", step=step, objective=cfg.objective, **scores)
            print0(f"eval {step:5d}/{cfg.steps}  " + "  ".join(f"{k[5:]} {v:.3f}" for k, v in scores.items()))
            for s in shown if step else ():
                print0(f"  trained on  {s['row']['prompt'][-60:]!r} -> {s['text'][:80]!r}  reward {s['reward']:g}")
        stopping = int(all_reduce([stop[0][0] if stop else 0], "max")[0])
        if step > done and (stopping or step == cfg.steps or (cfg.checkpoint_every and step % cfg.checkpoint_every == 0)):
            kept = step if save_checkpoint(cfg, model, optimizer, anchor, dict(step=step, state=state, position=position, skipped=skipped)) else kept
        if stopping and step < cfg.steps:
            print0(f"run       stopped by a signal after step {step}{f', saved up to step {kept}' * (kept < step)}; go on with: python {sys.argv[0]} --resume {out}")
            raise SystemExit(128 + stopping)

    export(cfg, model, tokenizer, folder)
    if rank() == 0:
        import plot
        plot.report(out)
    verifier.close()
    dist.barrier()
    over and over.set()
    dist.barrier()   # vLLM takes the process group down as it leaves

if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:   # while starting up; later, on_signal takes it
        sys.exit("lad.py: stopped while starting; nothing was trained")
