r"""
lad.py: reinforcement learning with verifiable rewards for language models, in one file.

vLLM writes G responses to each prompt, verify.py scores them, a row of OBJECTIVES turns the scores
into a gradient, FSDP2 shards the update over the GPUs that torchrun was given. The reference
implementation of

    LAD   Learning Advantage Distributions, arXiv 2602.20132, ACL 2026; its authors' code:
          https://github.com/WindyLee0822/LAD. Match the ratio rho = pi_theta/pi_old to e^u,
          u = A/eta, under an f-divergence:
              L = E_{y ~ pi_old} [ e^u f(z) ],   z = rho e^(-u)
    FADE  Focal Advantage with Dynamic Entropy, arXiv 2607.01490.
              A_i = (1 - rbar)^(alpha - 1) (r_i - rbar)   [/ delta if r_i < rbar]
          with alpha and delta scheduled from the running solve rate p and token entropy H

and of the policy gradients that their papers compare them with (baselines.py). Where this file
departs from the papers:

  1. LAD's ratio is per token by default, as PPO code takes it; the derivation has whole sequences,
     and `--ratio sequence` takes them, `--ratio mean` their geometric mean. The fixed point of the
     first is e^u per token.
  2. LAD's generators have the constants of the authors' code (as accounts of it go): js keeps the
     factor 1/2 of the textbook, hd and tv do not.
  3. FADE's averaging constant 0.02 is read as new = 0.98 old + 0.02 batch; rbar is the prompt's own
     solve rate, p the whole batch's. Judgement calls: we know an account of the paper, not its
     code.
  4. FADE's H is the mean of -log pi(y_t) over sampled tokens, as vLLM gives them: unbiased for
     their entropy, and free.
  5. Group standard deviations are torch.std (G - 1 in the denominator), as in TRL and verl.
  6. Truncated importance sampling between vLLM and the trainer is on for every objective but oapl,
     token by token (`--tis_cap 0`: off; `--tis_mode`: masks, or weights of whole responses).

Run it:
    python lad.py --config tiny --objective fade           # no GPU, no downloads, some minutes
    torchrun --nproc_per_node=2 lad.py --config tiny       # the same, sharded over two CPU ranks
    torchrun --nproc_per_node=8 lad.py --objective fade    # Qwen2.5-7B on DAPO-Math-17k, one node
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \
        lad.py --config fade-code-32b --tensor_parallel 2
    python lad.py --help                                   # every knob

One batch, as main() goes through it:

    vLLM wakes with the policy's weights, writes G responses to each of B prompts, and sleeps;
        their verification has begun, in processes of its own       collect, start_verification
    log-probs under pi_old and the reference, where needed          score_samples
    the verdicts come in: rewards, statistics, FADE's p and H       finish_verification, ..
    advantages, group by group                                      set_advantages
    for each pass (epochs) and each optimizer step (minibatches):
        micro-batches, forward, loss, backward                      accumulate_gradient
        clip and step                                               optimizer_step
    a log line; now and then an evaluation and a checkpoint         tracking, evaluate, checkpoint

Conventions. B prompts, G responses to each; N tokens of a packed line (the one long sequence that a
forward computes), R of them response tokens; H hidden, V vocabulary; S responses in the line. A
"row" of the data is a prompt with its verifiable truth, a "sample" one response, a dictionary that
grows:

    tokens, behaviour, truncated    the rollout's: token ids, vLLM's log-probs, cut at max_tokens?
    row, prompt, text               its row of the data, the row's prompt as token ids, and the
                                    response as the verifier reads it
    lost                            are some of vLLM's log-probs not finite?
    correct                         what the verifier said; over 0.5 it counts as solved
    reason                          what it said beside that: why it is 0, or ""
    failed                          why it could not say, or "": neither a success nor a failure
    reward                          what is trained on: correct, shaped
    old, ref                        the trainer's log-probs under pi_old and the reference; old only
                                    where it differs from pi_theta (needs_old_logprobs)
    adv, scale                      its advantage (None: it has none), and the weight of its tokens
    mask                            only if you set it: a list of 0 and 1, which tokens are trained

What becomes of a sample that is not whole:

                                verified   in its group's mean and sd   trained on
    failed (no verdict)            -                  no                   no
    lost (no log-probs)           yes                 yes                  no
    empty (no token)              yes                 yes                  no
    truncated, overlong = mask    yes                 yes                  no
    truncated, else               yes                 yes                  yes

Log-probabilities are in nats, at the sampling temperature.
"""

import contextlib
import dataclasses
import hashlib
import math
import os
import shutil
import sys
import warnings
import zlib
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from operator import itemgetter
from pathlib import Path

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:  # python -I and PYTHONSAFEPATH leave out a script's own folder
    sys.path.insert(0, str(HERE))

if __name__ == "__main__":  # OpenMP and vLLM read these when they are imported, hence up here
    os.environ.setdefault("OMP_NUM_THREADS", str(min(16, len(os.sched_getaffinity(0)))))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning makes a busy machine 25x slower
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    warnings.filterwarnings("ignore", category=FutureWarning)

import torch
import torch.distributed as dist
import torch.nn.functional as F

import baselines
import verify
from harness import (
    checkpoint,
    command,
    families,
    lora,
    rewards,
    signs,
    trackers,
    tracking,
    vllm_options,
)
from harness.data import draw, find_model, find_reference, load_data, load_tokenizer
from harness.metrics import pass_at_k
from harness.ranks import (
    all_reduce,
    claim,
    join,
    leave,
    leave_together,
    print0,
    rank,
    take_threads,
    uses_cuda,
    watch,
    world,
)
from harness.responses import count_distinct, response_texts
from harness.settings import die, knob, one_line, read_settings

# ==== 1. Config =================================================================================
# This dataclass and baselines.Knobs, which it inherits, are the only home of a setting. Presets in
# configs.toml hold what differs from it, and flags (--key value) go first.

MATH_PROMPT = """Solve the following math problem step by step. The last line of your response \
should be of the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.

{problem}

Remember to put your answer on its own line after "Answer:"."""


# fmt: off
@dataclass
class Config(baselines.Knobs):
    """Every setting: its default, its help with the unit, then the least and the largest value."""

    # run
    objective: str = knob("lad", "row of the OBJECTIVES table")
    model: str = knob("Qwen/Qwen2.5-7B", "folder, hub name (org/name[@revision]), tiny, tiny-hard")
    out: str = knob("", "run directory; empty: runs/<config>-<objective>-s<seed>")
    seed: int = knob(0, "of data order and sampling", 0, 2**32 - 1)
    steps: int = knob(400, "rollout batches", 0)
    device: str = knob("cuda", "auto: cuda where there is one", of="cuda cpu auto")

    # data
    data: str = knob("BytedTsinghua-SIA/DAPO-Math-17k", "rows: .json, .jsonl, .parquet, hub name "
                     "or FILE.py:function, which returns them")
    data_name: str = knob("", "hub configuration (subset) of data")
    data_split: str = knob("train", "hub split of data")
    eval_data: str = knob("HuggingFaceH4/MATH-500", "held-out rows; empty: no evaluation")
    eval_name: str = knob("", "hub configuration of eval_data")
    eval_split: str = knob("test", "hub split of eval_data")
    prompt: str = knob("{prompt}", "template over a row's fields; {messages}, alone: a whole chat")
    truth: str = knob("reward_model.ground_truth", "field of the truth; 'a=x,b=y': dict of fields")
    truth_after: str = knob("", "keep what follows the last such mark in the truth (GSM8K: '####')")
    eval_prompt: str = knob(MATH_PROMPT, "prompt, for eval_data; empty: the same")
    eval_truth: str = knob("answer", "truth, for eval_data; empty: the same")
    kind: str = knob("math:answer", "of verifier, see verify.py; text: none, with --reward",
                     of="math math:answer math:number code countdown text")
    reward: str = knob("", "FILE.py:function, a reward of your own: docs/rewards.md")
    chat: bool = knob(True, "wrap the prompt in the tokenizer's chat template")
    system: str = knob("", "system message of the chat template")
    chat_options: str = knob("", "its variables, as JSON: '{\"enable_thinking\": false}'")
    max_prompt_tokens: int = knob(1024, "longer prompts are dropped, and counted", 1)

    # rollouts
    prompts: int = knob(128, "B, prompts in a rollout batch, over all ranks", 1)
    group: int = knob(8, "G, responses to a prompt", 2)
    max_tokens: int = knob(8192, "of a response", 1)
    temperature: float = knob(1.0, "of sampling, and of every log-prob", 1e-3, 10)
    top_p: float = knob(1.0, "nucleus sampling: training needs 1, eval.py takes any", 1e-3, 1)
    tensor_parallel: int = knob(1, "ranks that share one vLLM engine", 1)
    vllm_memory: float = knob(0.6, "share of a GPU that vLLM may fill; on a CPU GiB of cache", 0.01)
    vllm_seqs: int = knob(256, "sequences that vLLM decodes at once", 1)
    vllm_eager: bool = knob(False, "no CUDA graphs in vLLM: quick start, slow decoding")
    vllm: str = knob("", "more of vLLM's own options, as JSON: docs/gpu.md")
    max_rollout_kl: float = knob(0.1, "nats a token between vLLM and trainer in the first batch: "
                                 "above it we stop; 0: never", 0)

    # objective
    ratio: str = knob("token", "pi_theta/pi_old of a token, of its sequence, or the geometric mean "
                      "of that over its tokens", of="token sequence mean")
    clip_low: float = knob(0.2, "PPO clips the ratio below 1 - this", 0, 1)
    clip_high: float = knob(0.28, "and above 1 + this (clip-higher, DAPO)", 0)
    dual_clip: float = knob(0.0, "PPO: cap over 1 of the ratio where A < 0 (verl: 3); 0: none", 0)
    eta: float = knob(0.25, "LAD: temperature of the target e^(A/eta); its authors' code has kappa "
                      "= 1/eta, 4 in the main runs", 1e-3)
    divergence: str = knob("js", "LAD: generator f; kl and rkl are centred (kl_c, rkl_c) where a "
                          "token's weight depends on its response",
                          of="kl rkl jf js hd tv kl_c rkl_c")
    alpha: float = knob(2.0, "power: focus on hard prompts, (1 - solve rate)^(alpha - 1)", 0)
    delta: float = knob(0.5, "asym: divides the weight of failures", 1e-3)
    fade_alpha_max: float = knob(3.0, "FADE: ceiling of alpha", 1)
    fade_delta_min: float = knob(0.3, "FADE: floor of delta", 1e-3, 1)
    fade_rate: float = knob(0.02, "FADE: share of the new batch in the running p and H", 0, 1)
    fade_entropy: float = knob(0.0, "FADE: H*, in nats; 0: half of the first batch's entropy", 0)
    kl_coef: float = knob(0.0, "weight of the k3 estimate of KL to the reference model", 0)
    reference: str = knob("", "reference model, as for model; empty: the model as it starts")
    ref_every: int = knob(0, "batches after which the reference becomes the policy; 0: never", 0)
    tis_cap: float = knob(2.0, "cap of the trainer/vLLM importance weight; 0: no such weight", 0)
    tis_floor: float = knob(0.0, "and its least value, below which a mask makes it 0", 0)
    tis_mode: str = knob("token_truncate", "that weight is a token's or its response's; beyond the "
                         "cap it is cut (TIS), or 0 (token: IcePop, sequence: MIS)",
                         of="token_truncate token_mask sequence_truncate sequence_mask")
    aggregation: str = knob("token", "mean over tokens, over sequence means, or sum/constant",
                            of="token sequence constant")
    zero_variance: str = knob("keep", "groups with equal verdicts: keep, drop, or refill the batch",
                              of="keep drop refill")
    refill_rounds: int = knob(3, "rounds of generation at most for one batch, with refill", 1)
    overlong: str = knob("keep", "truncated responses: keep, mask, or shape (DAPO's soft penalty)",
                         of="keep mask shape")
    overlong_buffer: int = knob(0, "shape: last tokens, over which the penalty grows to 1/2; 0: a "
                                "fifth of max_tokens", 0)

    # optimization
    minibatches: int = knob(1, "optimizer steps in one pass over a rollout batch", 1)
    epochs: int = knob(1, "passes over a rollout batch", 1)
    lr: float = knob(1e-6, "AdamW's, after warm-up; LoRA wants some ten times as much", 0)
    warmup: int = knob(10, "rollout batches of linear warm-up", 0)
    weight_decay: float = knob(0.0, "AdamW's", 0)
    beta2: float = knob(0.95, "AdamW's; beta1 is 0.9", 0, 1)
    grad_clip: float = knob(1.0, "ceiling of the global gradient norm", 1e-6)

    # LoRA, see docs/lora.md
    lora_rank: int = knob(0, "train adapters of this rank, not the weights; 0: the weights", 0)
    lora_alpha: float = knob(32.0, "an adapter's B A counts alpha / rank times", 1e-3)
    lora_targets: str = knob("all", "linear layers of a block, as q_proj,v_proj; all: each one")

    # speed and memory
    micro_tokens: int = knob(16384, "packed into one forward, about; longer samples go alone", 1)
    head_chunk: int = knob(0, "tokens whose logits exist at once; 0: what free memory allows", 0)
    checkpointing: bool = knob(True, "recompute activations in the backward pass")
    compile: str = knob("auto", "the head's element-wise parts (auto: on CUDA), or blocks too",
                        of="auto on blocks off")
    shard_size: int = knob(0, "GPUs that share one copy of the weights; 0: all", 0)
    reduce_each: bool = knob(True, "reduce gradients after each micro-batch; false: after the "
                             "last, which sends less and holds a whole fp32 gradient")
    offload: bool = knob(False, "weights, gradients and moments rest in the CPU's memory: slower")

    # verifier
    verify_workers: int = knob(4, "processes, for each rank", 1)
    verify_timeout: float = knob(10.0, "seconds for one item", 0.1)
    max_failed: float = knob(0.5, "share of samples unscorable or lost: above it we stop", 0, 1)

    # evaluation, checkpoints, logging
    eval_every: int = knob(20, "steps; 0: only before and after", 0)
    eval_samples: int = knob(8, "K, responses to each held-out prompt", 1)
    eval_prompts: int = knob(0, "held-out prompts used, the first of them; 0: all", 0)
    checkpoint_every: int = knob(20, "steps; 0: only at the end", 0)
    checkpoint_keep: int = knob(2, "checkpoints kept, the newest", 1)
    track: str = knob("off", "who else shows the run: docs/metrics.md",
                      of="off wandb trackio tensorboard")
    track_change: bool = knob(False, "log rank_one and head_change, of the weights' change since "
                              "the start: keeps one more copy of them, sharded")
# fmt: on


KNOBS = {field.name: field for field in dataclasses.fields(Config)}


def load_config(argv):
    """Config from `--key value` flags (argv has no program name), over a preset, over the defaults.

    Bad input prints one line with file, line, key, value and what was expected, and exits with
    code 2. `config` (the preset's name) and `resume` (the folder to go on from, or "") become
    attributes.
    """
    try:
        name, values, resume = read_settings(argv, KNOBS, OBJECTIVES, __doc__)
    except ValueError as error:
        die(error)
    # An objective may bring defaults of its own, below what a preset or a flag says; a ratio of
    # sequences brings their aggregation
    objective = OBJECTIVES[values.get("objective", Config.objective)]
    defaults = dict(objective.defaults)
    if values.get("ratio", "token") != "token":
        defaults["aggregation"] = "sequence"
    if values.get("lora_rank"):
        defaults.update(lora.DEFAULTS)
    cfg = Config(**defaults | values)
    cfg.config = name
    if not cfg.out:
        cfg.out = f"runs/{cfg.config}-{cfg.objective}-s{cfg.seed}"
    cfg.resume = ""
    if resume is not None:
        cfg.resume = resume or cfg.out

    # A reward of one's own: the file as every rank and every worker finds it. Solutions are told
    # apart by their whole texts, unless a kind says how
    if cfg.reward:
        try:
            cfg.reward = rewards.find(cfg.reward)
        except ValueError as error:
            die(error)
        if "kind" not in values:
            cfg.kind = "text"
    elif cfg.kind == "text":
        die("kind = text says only how solutions are told apart: it needs a --reward")

    # What no knob's range can say
    if objective.of_sequences or cfg.ratio != "token":
        if cfg.aggregation != "sequence":
            die(
                f"aggregation = {cfg.aggregation} would count a loss of whole sequences once for "
                f"each of their tokens ({cfg.objective}, ratio = {cfg.ratio}): say aggregation = "
                "sequence"
            )
    if cfg.top_p < 1:
        die(
            f"top_p = {cfg.top_p}: vLLM's log-probs would be of the tokens that it keeps, the "
            "trainer's of all, and every importance weight off by their share: train with top_p = "
            "1 (eval.py takes any)"
        )
    if 0 < cfg.dual_clip <= 1:
        die(f"dual_clip = {cfg.dual_clip} would stop what failures teach: take more than 1, or 0")
    if cfg.prompts % cfg.minibatches:
        die(f"prompts = {cfg.prompts} does not divide into minibatches = {cfg.minibatches}")
    if cfg.objective == "passk" and cfg.pass_k > cfg.group:
        die(f"pass_k = {cfg.pass_k} is more than the {cfg.group} responses of a group")
    refuse_combinations(cfg, objective)
    vllm_options.read(cfg.vllm)
    if cfg.lora_rank:
        lora.refuse(cfg)
    return cfg


def refuse_combinations(cfg, objective):
    """Leave with one line where an objective is asked for without what makes it that objective, or
    where one of the settings that change its meaning would be read by nothing."""
    # The ratio that the objective is defined with
    if objective.ratios and cfg.ratio not in objective.ratios:
        die(
            f"ratio = {cfg.ratio}: {cfg.objective} is defined with ratio = "
            f"{' or '.join(objective.ratios)}; leave --ratio out"
        )

    # The reference
    if cfg.objective == "distill" and not cfg.reference:
        die("distill learns from another model: name the teacher with --reference")
    if cfg.reference and "ref" not in objective.needs and not cfg.kl_coef:
        die(f"reference = {cfg.reference}: {cfg.objective} reads no reference unless kl_coef > 0")
    if cfg.reference and cfg.ref_every:
        die(f"ref_every = {cfg.ref_every} would overwrite reference = {cfg.reference}: give one")

    # The weights for what lies between vLLM and the trainer
    if cfg.tis_floor and not cfg.tis_mode.endswith("mask"):
        die(
            f"tis_floor = {cfg.tis_floor} is read by a mask alone, not by tis_mode = {cfg.tis_mode}"
        )
    if cfg.tis_floor and cfg.tis_floor >= cfg.tis_cap:
        die(f"tis_floor = {cfg.tis_floor} leaves nothing below tis_cap = {cfg.tis_cap}")

    # LoRA's, without LoRA
    for key in ("lora_alpha", "lora_targets"):
        value = getattr(cfg, key)
        if value != KNOBS[key].default and not cfg.lora_rank:
            die(f"{key} = {value} is read with LoRA alone: give a lora_rank, as 16")

    # DAPO's penalty
    if cfg.overlong == "shape" and cfg.overlong_buffer > cfg.max_tokens:
        die(
            f"overlong_buffer = {cfg.overlong_buffer} is more than max_tokens = {cfg.max_tokens}: "
            "every response would be punished; 0 is a fifth of max_tokens"
        )


# ==== 2. Rollouts ===============================================================================
# vLLM runs in this process, on the GPUs that also train: asleep while they do, and given the
# trainer's weights each time it wakes.


def start_vllm(cfg, folder, device, **options):
    """An engine on this rank, or one shared by `tensor_parallel` neighbouring ranks. On a GPU it
    goes to sleep until it is needed, handing its memory to the trainer."""
    # What vLLM reads before it is imported
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if device.type == "cpu":
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        # or vLLM compiles one line of its sampler, for 20 seconds
        torch._dynamo.config.disable = cfg.compile in ("auto", "off")
    from vllm import LLM

    # Alike on every device
    settings = dict(
        tensor_parallel_size=cfg.tensor_parallel,
        distributed_executor_backend="external_launcher",  # torchrun's ranks are vLLM's workers
        max_model_len=cfg.max_prompt_tokens + cfg.max_tokens,
        max_num_seqs=cfg.vllm_seqs,
        logprobs_mode="processed_logprobs",  # of what was sampled from: temperature, top-p
        disable_log_stats=True,
        use_tqdm_on_load=False,
        seed=cfg.seed,
    )
    # Memory, and how the model is run
    if device.type == "cpu":
        # A prompt is computed once for its group: whole blocks of it are shared, and 32 tokens is
        # the smallest block of the CPU's attention
        settings.update(
            dtype="float32",
            enforce_eager=True,
            enable_prefix_caching=True,
            block_size=32,
            kv_cache_memory_bytes=int(cfg.vllm_memory * 2**30),
        )
    else:
        settings.update(
            dtype="bfloat16",
            hf_overrides={"head_dtype": "float32"},  # logits as the trainer's, or ratios are noisy
            enforce_eager=cfg.vllm_eager,
            enable_prefix_caching=True,
            gpu_memory_utilization=cfg.vllm_memory,
            enable_sleep_mode=True,
        )
        if "kv_cache_memory_bytes" not in options:
            memory = torch.cuda.get_device_properties(device).total_memory
            settings["kv_cache_memory_bytes"] = kv_cache_bytes(cfg, folder, memory)
    settings |= vllm_options.known(cfg.vllm)
    try:
        llm = LLM(folder, **settings | options)
    except Exception as error:
        vllm_options.refuse_start(cfg, error)
    if device.type == "cuda":
        put_to_sleep(llm)
    return llm


VLLM_OWN = 2 * 2**30  # bytes for its activations and CUDA graphs, about; not measured


def kv_cache_bytes(cfg, folder, memory):
    """The KV cache on a GPU of `memory` bytes: vLLM's share of it, less its weights and what it
    needs for itself. Left alone, vLLM measures: another size in each version and run, which may be
    more than can be woken beside the trainer."""
    weights = 2 * families.elements_in(folder) / cfg.tensor_parallel  # bf16
    cache = int(cfg.vllm_memory * memory - weights - VLLM_OWN)
    if cache <= 0:
        die(
            f"vllm_memory = {cfg.vllm_memory} of {memory / 2**30:.0f} GiB leaves no KV cache "
            f"beside {weights / 2**30:.1f} GiB of weights: take more, or a larger "
            f"tensor_parallel = {cfg.tensor_parallel}"
        )
    return cache


def put_to_sleep(llm):
    """Weights and cache are dropped: who wakes it must push weights."""
    llm.sleep(level=2)
    torch.cuda.reset_peak_memory_stats()  # from here on it is the trainer's peak


def named_weights(model, dtype):
    """(Hugging Face name, whole tensor), one at a time, the same order on all ranks. Tied weights
    come once, adapters inside the weights that they adapt, the head of log Z not at all."""
    adapted = lora.layers(model)
    for name, p in model.named_parameters():
        if name.startswith("log_z.") or lora.is_adapter(name):
            continue
        p = p.detach()
        if hasattr(p, "full_tensor"):
            # Shards that rest in the CPU's memory (offload) are cast and gathered on the GPU; cast
            # before they are gathered: half the traffic. What LoRA adds is added before the cast
            p = p.to(p.device_mesh.device_type)
            if name not in adapted:
                p = p.to(dtype)
            p = p.full_tensor()
        if name in adapted:
            p = lora.merge(p, adapted[name])
        yield name, p.to(dtype)


def repack_head(model):
    """Of a model of vLLM's with tied weights: its head is the embedding, under one name or both."""
    head = model.lm_head if hasattr(model, "lm_head") else model.model.embed_tokens
    head.quant_method.process_weights_after_loading(head)


@contextlib.contextmanager
def awake(llm, model, device):
    """vLLM with the trainer's weights, for the length of the block."""
    # DO NOT TOUCH the order: the KV cache comes only after the weights went over, for until then
    # the trainer's are gathered on the GPU too
    if device.type == "cuda":
        torch.cuda.empty_cache()
        llm.wake_up(["weights"])

    # All weights, streamed: each is gathered, handed over and let go before the next
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    weights = named_weights(model, dtype)
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
    if device.type == "cpu" and model.config.tie_word_embeddings:
        # vLLM's CPU build packs a copy of a tied head, and reload_weights leaves it stale
        llm.apply_model(repack_head)

    if device.type == "cuda":
        llm.wake_up(["kv_cache"])
    llm.reset_prefix_cache()  # what is cached was computed with the weights before
    yield
    if device.type == "cuda":
        put_to_sleep(llm)


def generate(llm, cfg, prompt_ids, n, seed, logprobs=True, progress=False, seeds=None):
    """n responses to each prompt: lists of n samples {tokens, behaviour (log-probs), truncated}.

    vLLM draws from this process's random numbers: with a seed each call is reproducible, and a
    resumed run needs no saved state. Ranks that share an engine give the same seed. seeds, one for
    each prompt, are needed on a GPU, where the order of drawing is that of vLLM's schedule.
    """
    from transformers import set_seed
    from vllm import SamplingParams

    # What is asked for
    set_seed(seed)
    params = SamplingParams(
        n=n,
        temperature=cfg.temperature,
        top_p=cfg.top_p,
        max_tokens=cfg.max_tokens,
        logprobs=0 if logprobs else None,  # 0: the sampled token's alone
        flat_logprobs=logprobs,
        detokenize=False,
    )
    if seeds is not None:
        # of a prompt's first response; vLLM gives its i-th seed + i
        params = [with_seed(params, seed) for seed in seeds]
    prompts = [{"prompt_token_ids": ids} for ids in prompt_ids]

    # What comes back, in the same order
    groups = []
    for output in llm.generate(prompts, params, use_tqdm=progress):
        group = []
        for o in output.outputs:
            sample = dict(
                tokens=list(o.token_ids),  # the stop token is the last of them, and is trained
                behaviour=[],
                truncated=o.finish_reason == "length",
            )
            if logprobs and o.token_ids:
                sample["behaviour"] = list(o.logprobs.logprobs)
            group.append(sample)
        groups.append(group)
    return groups


def with_seed(params, seed):
    """A copy of vLLM's sampling parameters, with a seed."""
    params = params.clone()
    params.seed = seed
    return params


def rollout(llm, cfg, rows, n, step, salt, logprobs=True):
    """This rank's share of `rows`, and n samples for each of them. salt: what the seed is made of
    beside the step, a different one for each call in a step.

    Rank r of world() owns rows r, r + world(), ..: so the i-th minibatches of all ranks together
    have the same prompts, however many ranks there are. Ranks that share an engine hand it all
    their rows, with one seed.
    """
    # The rows of all ranks that share this engine
    first = rank() - rank() % cfg.tensor_parallel
    shares = [rows[r :: world()] for r in range(first, first + cfg.tensor_parallel)]
    prompt_ids = [row["prompt_ids"] for share in shares for row in share]
    seed = zlib.crc32(f"{cfg.seed} {step} {salt} {first}".encode())
    options = dict(logprobs=logprobs)
    if uses_cuda(cfg):
        options.update(seeds=row_seeds(cfg, len(rows), first, step, salt), progress=rank() == 0)
    groups = generate(llm, cfg, prompt_ids, n, seed, **options)

    # Of what it wrote, this rank's part
    mine = rank() - first
    start = sum(len(share) for share in shares[:mine])
    end = start + len(shares[mine])
    return shares[mine], groups[start:end]


def row_seeds(cfg, n_rows, first, step, salt):
    """The seed of each row that an engine is given, in the order of rollout(): by its place among
    the rows of all ranks, so that neither ranks nor vLLM's schedule change it."""
    seeds = []
    for r in range(first, first + cfg.tensor_parallel):
        for place in range(r, n_rows, world()):
            text = f"{cfg.seed} {step} {salt} row {place}"
            seeds.append(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7]))
    return seeds


def check_agreement(cfg, step, kl):
    """Leave with exit code 2 where vLLM and the trainer, given the same weights, are `kl` nats a
    token apart: one of them computes another model, and what is learned would be garbage. All ranks
    must come here, with the same kl."""
    if cfg.max_rollout_kl == 0 or kl <= cfg.max_rollout_kl:  # nan is no agreement
        return
    message = ""
    if rank() == 0:
        message = (
            f"step {step}: vLLM and the trainer are {kl:.2g} nats a token apart on the same "
            f"weights (max_rollout_kl = {cfg.max_rollout_kl}); nothing was trained on that. Either "
            f"one of them computes {cfg.model} wrongly or the weights did not reach vLLM: try "
            "vllm_eager = true, then the environment VLLM_USE_V2_MODEL_RUNNER=0, then another model"
        )
    leave_together(message)


# ==== 3. Rewards ================================================================================
# verify.py says whether a response is right, in processes of its own: they work while this one goes
# on. Only where groups are chosen by their verdicts (drop, refill) must we wait here.


def describe(rows, groups, tokenizer):
    """Add to fresh samples what the steps after this one ask for: row, prompt, text, lost. HACK
    HERE for a `mask` that is known from the tokens."""
    for row, group in zip(rows, groups, strict=True):
        texts = response_texts(tokenizer, row["prompt"], [s["tokens"] for s in group])
        for s, text in zip(group, texts, strict=True):
            s["row"] = row
            s["prompt"] = row["prompt_ids"]
            s["text"] = text
            # vLLM's log-probs can overflow. Such a sample is verified, but never trained on
            s["lost"] = not all(math.isfinite(x) for x in s["behaviour"])
            if s["lost"]:
                s["behaviour"] = [0.0] * len(s["tokens"])


def start_verification(verifier, samples, cfg):
    """A future of [(correct, reason)]: the verifier's processes work while this one goes on."""
    kind = scored_by(cfg)
    return verifier.submit([(kind, s["text"], s["row"]["truth"]) for s in samples])


def scored_by(cfg):
    """The verifier's kind, or the name by which it knows a reward of one's own."""
    return rewards.PREFIX + cfg.reward if cfg.reward else cfg.kind


def finish_verification(samples, verdicts: Future, cfg):
    """Wait for the verdicts and set each sample's correct, reason, failed and reward."""
    for s, (correct, reason) in zip(samples, verdicts.result(), strict=True):
        s["correct"] = correct
        s["reason"] = reason
        # A wrong answer is a 0 like any other. A worker that died, or its error, or a truth that
        # cannot be read, is the verifier's failure: those reasons have a colon, or this name
        is_failure = ":" in reason or reason == "truth unparsable"
        s["failed"] = reason if is_failure else ""
        s["reward"] = shaped_reward(s, cfg)


def shaped_reward(sample, cfg):
    """What is trained on: the verifier's score, and whatever else you add. HACK HERE. (Groups are
    still dropped and refilled by the verifier's score alone, see has_signal.)"""
    reward = sample["correct"]
    if cfg.overlong == "shape":
        reward -= overlong_penalty(len(sample["tokens"]), cfg)
    return reward


def overlong_penalty(length, cfg):
    """Rises from 0 to 1/2 over the last overlong_buffer tokens. DAPO, arXiv 2503.14476, eq. 13, has
    1 where a right and a wrong answer are 2 apart; here they are 1 apart. Its buffer is 4,096 of
    20,480 tokens."""
    buffer = cfg.overlong_buffer or cfg.max_tokens / 5
    over = length - (cfg.max_tokens - buffer)
    return 0.5 * min(max(over / buffer, 0.0), 1.0)


def scorable(group):
    """The samples of which the verifier could say whether they are right."""
    return [s for s in group if not s["failed"]]


def has_signal(group):
    """Whether some of a group are right and others wrong; if not, most advantages are 0. What the
    verifier said counts: a penalty for length alone makes no signal."""
    return len({s["correct"] for s in scorable(group)}) > 1


def collect(llm, cfg, tokenizer, verifier, rows, position, step, lap):
    """Groups for one batch: (this rank's to train on, all that it drew, new position in the data,
    pending).

    zero_variance = keep: one round; pending is its (samples, verdicts), verified while the caller
    computes log-probs. drop and refill choose groups by their verdicts, so there these are in
    already and pending is None. refill draws until the ranks together have cfg.prompts groups,
    refill_rounds times at most.
    """
    rounds = cfg.refill_rounds if cfg.zero_variance == "refill" else 1  # of asking, at most
    groups, drawn = [], []
    for attempt in range(rounds):
        # Responses to the next prompts of the data
        asked = draw(rows, position, cfg.prompts, cfg.seed)
        position += cfg.prompts
        mine, fresh = rollout(llm, cfg, asked, cfg.group, step, attempt)
        describe(mine, fresh, tokenizer)
        drawn += fresh
        lap("rollout")

        samples = [s for group in fresh for s in group]
        verdicts = start_verification(verifier, samples, cfg)
        if cfg.zero_variance == "keep":
            lap("reward")
            return drawn, drawn, position, (samples, verdicts)

        # Which of their groups are trained on
        finish_verification(samples, verdicts, cfg)
        groups += [group for group in fresh if has_signal(group)]
        lap("reward")
        if all_reduce([len(groups)])[0] >= cfg.prompts:  # the ranks together have enough
            break
    return groups[: even_share(len(groups), cfg.prompts)], drawn, position, None


def even_share(mine, wanted):
    """How many of its groups this rank keeps, so that all keep `wanted` together, or all that there
    are, as evenly as they can."""
    # How many each rank has
    counts = [0] * world()
    counts[rank()] = mine
    counts = all_reduce(counts)

    # Handed out in turn, one to each rank that has one left
    kept = [0] * world()
    while sum(kept) < min(wanted, sum(counts)):
        for r in range(world()):
            if kept[r] < counts[r] and sum(kept) < wanted:
                kept[r] += 1
    return kept[rank()]


def evaluate(llm, cfg, tokenizer, verifier, rows, step):
    """From K samples to a prompt, mean over prompts: pass@1, pass@K, and how many of the right ones
    differ in their answer, expression or program (distinct) and in their text (distinct_texts). And
    the mean of a reward of one's own."""
    # Responses to this rank's share of the prompts, verified
    K = cfg.eval_samples
    mine, groups = rollout(llm, cfg, rows, K, step, "eval", logprobs=False)
    describe(mine, groups, tokenizer)
    samples = [s for group in groups for s in group]
    finish_verification(samples, start_verification(verifier, samples, cfg), cfg)

    # Sums over this rank's prompts, then over all ranks
    ks = sorted({1, K})
    passes = [f"eval/pass@{k}" for k in ks]
    sums = dict.fromkeys(["prompts", *passes, "eval/distinct", "eval/distinct_texts"], 0.0)
    if cfg.reward:
        sums["eval/reward"] = 0.0
    for group in groups:
        right = [s for s in group if s["correct"] > 0.5]
        sums["prompts"] += 1
        if cfg.reward:
            sums["eval/reward"] += sum(s["correct"] for s in group) / K
        for k in ks:
            sums[f"eval/pass@{k}"] += pass_at_k(K, len(right), k)
        solutions, texts = count_distinct(cfg.kind, [s["text"] for s in right])
        sums["eval/distinct"] += solutions
        sums["eval/distinct_texts"] += texts
    prompts, *totals = all_reduce(list(sums.values()))
    return {key: total / prompts for key, total in zip(list(sums)[1:], totals, strict=True)}


# ==== 4. Advantages and objectives ==============================================================
# The heart of the file: pure tensors in, pure tensors out. A row of OBJECTIVES is an advantage,
# from the rewards of a prompt's G responses, and a loss of the likelihood ratio. HACK HERE: write
# either, or both, and add a row.


def centred(r):
    """r - rbar: rewards [B,G] less the mean of their group."""
    return r - r.mean(-1, keepdim=True)


def grpo(r, cfg, state):
    """A = (r - rbar) / sd. GRPO, arXiv 2402.03300."""
    return centred(r) / (r.std(-1, keepdim=True) + 1e-6)


# FADE: Focal Advantage with Dynamic Entropy, arXiv 2607.01490


def focal(r, correct, alpha, delta):
    """A = (1 - solved)^(alpha - 1) (r - rbar), divided by delta where negative. solved is the mean
    of what the verifier said of the prompt's responses: rbar, unless rewards are shaped."""
    unsolved = (1 - correct.mean(-1, keepdim=True)).clamp_min(0)
    focus = unsolved ** (alpha - 1)  # rare successes weigh more
    focus = torch.where(focus.isinf(), 1.0, focus)  # alpha < 1, all solved: 0 to a negative power
    a = focus * centred(r)
    return torch.where(a < 0, a / delta, a)


def fade(r, cfg, state):
    """focal() with alpha and delta from the running solve rate and entropy."""
    alpha, delta = fade_schedule(state, cfg)
    return focal(r, state.get("correct", r), alpha, delta)


def power(r, cfg, state):
    """FADE's first half: Power(alpha). Of rewards 0 and 1, divided by sd, it is F-GRPO (f_grpo),
    which was first."""
    return focal(r, state.get("correct", r), cfg.alpha, 1.0)


def asym(r, cfg, state):
    """FADE's second half: AsymGRPO(delta); arXiv 2604.04894 has another method of that name."""
    return focal(r, state.get("correct", r), 1.0, cfg.delta)


def power_asym(r, cfg, state):
    """Both, with alpha and delta that stay."""
    return focal(r, state.get("correct", r), cfg.alpha, cfg.delta)


def fade_schedule(state, cfg):
    """alpha = clip(3 (1 - p) / (2 p), 1, alpha_max): focus on hard prompts while few are solved.
    delta = clip(1 + H - H*, delta_min, 1): failures weigh more once the entropy H is under H*."""
    alpha = 1.5 * (1 - state["p"]) / max(state["p"], 1e-9)
    alpha = min(max(alpha, 1.0), cfg.fade_alpha_max)
    delta = 1.0
    if state["H"] is not None:  # else no batch has told it yet
        delta = 1 + state["H"] - state["H*"]
        delta = min(max(delta, cfg.fade_delta_min), 1.0)
    return alpha, delta


def fade_metrics(state, cfg):
    """What is logged of FADE, for every objective."""
    alpha, delta = fade_schedule(state, cfg)
    return {
        "fade_alpha": alpha,
        "fade_delta": delta,
        "fade_p": state["p"],
        "fade_h": state["H"],
    }


def new_state():
    """FADE's running statistics over all ranks: p, the solve rate; H, the token entropy in nats,
    and H*, its target, both set by the first batch. They are part of each checkpoint."""
    return {"p": 0.5, "H": None, "H*": None}


def update_state(state, solve_rate, entropy, cfg):
    """Fold in a batch's solve rate and mean token entropy; NaN: of this batch it is not known."""
    if math.isfinite(solve_rate):
        state["p"] += cfg.fade_rate * (solve_rate - state["p"])
    if math.isfinite(entropy):
        # The first batch says where H starts, and what it should not fall below
        if state["H"] is None:
            state["H"] = entropy
            state["H*"] = cfg.fade_entropy or entropy / 2
        state["H"] += cfg.fade_rate * (entropy - state["H"])


# Losses: (log_ratio, A, cfg, t) -> (loss of each token, whether it is clipped), each of one shape.
# log_ratio = log pi_theta - log pi_old, of each token, or of the whole sequence (its sum or its
# mean) at each of its tokens. t: logp, old, mask, seq; entropy (without gradient), ref, log_z where
# they are known.


def ppo_clip(log_ratio, adv, cfg, t):
    """-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A). PPO, arXiv 1707.06347; clip_high
    beyond clip_low is DAPO's clip-higher, arXiv 2503.14476."""
    ratio = log_ratio.exp()
    capped = torch.zeros_like(ratio, dtype=torch.bool)
    if cfg.dual_clip:  # else rho A has no end where A < 0. arXiv 1912.09729; TRL calls it delta
        capped = (adv < 0) & (ratio > cfg.dual_clip)
        ratio = torch.where(capped, cfg.dual_clip, ratio)
    free = ratio * adv
    clipped = ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high) * adv
    return -torch.minimum(free, clipped), (clipped < free) | capped


# LAD: Learning Advantage Distributions, arXiv 2602.20132


def lad(log_ratio, adv, cfg, t):
    """e^u f(z), z = rho e^(-u), u = A/eta: pulls the ratio to e^u, where a policy gradient would
    push it on and on, and PPO as far as its clip. Its gradient with respect to log rho is
    rho f'(z)."""
    u = (adv / cfg.eta).clamp(-60, 60)  # fp32 ends at e^88; e^60 is all of any group's mass
    loss = f_divergence(generator(cfg), log_ratio - u, log_ratio, u)
    return loss, torch.zeros_like(u, dtype=torch.bool)  # nothing is clipped


def generator(cfg):
    """The name of f. kl and rkl carry f'(1) (z - 1), whose gradient has mean 0 only where a token's
    weight does not depend on the response that it is of. Where it does they are taken centred, as
    kl_c and rkl_c, or that term would be a drift, in length for example, as large as a gradient.
    (A `mask` of your own that depends on the response is such a case: ask for kl_c or rkl_c.)"""
    by_length = cfg.ratio == "mean" or (cfg.ratio == "token" and cfg.aggregation == "sequence")
    chosen = cfg.overlong == "mask" or cfg.zero_variance != "keep"
    if cfg.divergence in ("kl", "rkl") and (by_length or chosen):
        return f"{cfg.divergence}_c"
    return cfg.divergence


def f_divergence(name, log_z, log_ratio, u):
    """e^u f(z) of a generator f, from log z = log rho - u: tensors of one shape in and out. z is
    never formed: it overflows long before rho and e^u do."""
    rho = log_ratio.exp()
    e_u = u.exp()  # e^u z = rho
    if name == "kl":  # f(z) = z log z
        return rho * log_z
    if name == "rkl":  # f(z) = -log z
        return -e_u * log_z
    if name == "jf":  # f(z) = (z - 1) log z
        return (rho - e_u) * log_z
    if name == "js":  # f(z) = 1/2 [z log z - (z + 1) log((z + 1)/2)]
        return 0.5 * (rho * (log_z - log_mean(log_z)) - e_u * log_mean(log_z))
    if name == "hd":  # f(z) = (sqrt z - 1)^2
        return ((0.5 * log_ratio).exp() - (0.5 * u).exp()) ** 2
    if name == "tv":  # f(z) = |z - 1|
        return (rho - e_u).abs()
    # The gradient of f'(1) (z - 1) is 0 in expectation under pi_old. Without that term f'(1) = 0:
    # less variance
    if name == "kl_c":  # f(z) = z log z - (z - 1)
        return rho * (log_z - 1) + e_u
    if name == "rkl_c":  # f(z) = -log z + (z - 1)
        return rho - e_u * (log_z + 1)
    raise ValueError(f"no generator {name!r}")


def log_mean(log_z):
    """log((z + 1)/2)."""
    return F.softplus(log_z) - math.log(2)


def lad_weight(adv, cfg):
    """W(A) = -f'(e^(-A/eta)): at rho = 1 LAD is a policy gradient with this in place of A. Where A
    does not come from rewards but is computed here; policy_weights() is the same for any row."""
    log_ratio = torch.zeros_like(adv, requires_grad=True)
    loss, _ = lad(log_ratio, adv, cfg, {})
    return -torch.autograd.grad(loss.sum(), log_ratio)[0]


def lad_anchor(r, cfg, state):
    """LAD against the reference instead of pi_old, which moves and lets e^u compound: the weight
    W = -f'(z), z = (pi_old/pi_ref) e^(-u) of whole sequences, centred, under PPO's ratio. Ours."""
    return centred(lad_weight(grpo(r, cfg, state) - cfg.eta * state["drift"], cfg))


def sum_in_sequence(x, seq):
    """The sum over each sequence, at each of its tokens: of x packed [R] with seq [R] naming the
    sequence, or padded [S,T] (seq None)."""
    if seq is None:
        return x.sum(-1, keepdim=True).expand_as(x)
    return torch.zeros_like(x).index_add(0, seq, x).index_select(0, seq)


@dataclass(frozen=True)
class Objective:
    """A row of OBJECTIVES."""

    # (rewards [B,G], cfg, state) -> A [B,G]
    advantage: callable
    # (log_ratio, A, cfg, t) -> (loss of each token, whether it is clipped), as described above
    loss: callable = ppo_clip
    # "ref": log-probs of the reference. "drift", beside it: in state["drift"] [B,G] the
    # log pi_old(y|x) - log pi_ref(y|x) of whole responses. "log_z": a learned head
    needs: tuple = ()
    # does a token's loss depend on no other token's? Then its gradient is known with its log-prob
    local: bool = True
    # is the loss of a token its whole sequence's?
    of_sequences: bool = False
    # the settings of ratio that it is defined with; empty: all
    ratios: tuple = ()
    # does a group of equal rewards move the policy?
    learns_from_equal: bool = False
    # settings that belong to the method, below what a preset or a flag says: {knob: value}
    defaults: dict = dataclasses.field(default_factory=dict)


OBJECTIVES = {
    "grpo": Objective(grpo),
    # LAD pulls the ratio to e^u even where A = 0: back to 1, once an update has moved it
    "lad": Objective(grpo, lad, learns_from_equal=True),
    "lad_anchor": Objective(lad_anchor, needs=("ref", "drift"), learns_from_equal=True),
    "fade": Objective(fade),
    "power": Objective(power),
    "asym": Objective(asym),
    "power_asym": Objective(power_asym),
}
# And the rows of baselines.py, which is given this file's parts: it could not import them in a
# circle, and a copy of this file (mine.py) is so compared with its own clip
baselines.add_rows(OBJECTIVES, Objective, grpo, ppo_clip, sum_in_sequence)


def advantages(name, rewards, cfg, state):
    """Advantages [B,G] of the rewards [B,G] of B groups (or [B,n], where the verifier failed on
    other responses). `state` is new_state()'s p, H and H*, with correct [B,G], what the verifier
    said (without it: the rewards), and drift [B,G] where the objective needs it."""
    return OBJECTIVES[name].advantage(rewards, cfg, state)


def policy_loss(name, logp, old_logp, adv, mask, cfg, seq=None, **more):
    """(loss of each token, info to be logged); token_scale() has the denominators.

    logp, old_logp and mask are packed [R] with `seq` [R] naming each token's sequence, or padded
    [S,T]; adv has the same shape, or [S] for the latter. `more`: entropy, ref, log_z, where the
    objective needs them. Masked tokens get 0. With ratio = "sequence" or "mean" every token of a
    sequence carries the sequence's loss, so that aggregation "sequence" is the mean of
    E_y [loss(y)].
    """
    # One advantage a sequence, or one a token
    if adv.dim() < logp.dim():
        adv = adv.unsqueeze(-1)

    # The likelihood ratio
    mask = mask.to(logp)
    log_ratio = (logp - old_logp) * mask
    bounded = log_ratio.clamp(-20, 20)  # e^20 is a broken run already; inf would spoil its log
    if cfg.ratio != "token":
        log_ratio = sum_in_sequence(log_ratio, seq)
        if cfg.ratio == "mean":  # of the logarithms: (pi_theta/pi_old)^(1/T), as GSPO takes it
            log_ratio = log_ratio / sum_in_sequence(mask, seq).clamp_min(1)
        # 8,192 tokens get there at 0.0024 nats each: bound the value, and keep its gradient
        bounded = log_ratio + (log_ratio.clamp(-20, 20) - log_ratio).detach()

    # The objective's own loss
    t = dict(more, logp=logp, old=old_logp, mask=mask, seq=seq)
    loss, clipped = OBJECTIVES[name].loss(bounded, adv.expand_as(logp), cfg, t)
    info = {"ratio": (bounded.exp() * mask).detach(), "clipped": clipped * mask}
    return loss * mask, info


def token_scale(cfg, length, total_tokens, total_sequences):
    """The weight of a token's loss in the step's loss, for a sample with `length` trained tokens.
    The totals are of what is trained, over all ranks and micro-batches of the optimizer step, which
    is why the gradient does not depend on how the batch is split (but for clip_cov and kl_cov,
    which look at a micro-batch)."""
    if cfg.aggregation == "token":  # DAPO, arXiv 2503.14476
        return 1 / max(total_tokens, 1)
    if cfg.aggregation == "sequence":  # GRPO, arXiv 2402.03300
        return 1 / (max(length, 1) * total_sequences)
    # "constant": Dr. GRPO, arXiv 2503.20783: the same whatever is masked, dropped or cut
    samples = cfg.prompts * cfg.group / cfg.minibatches
    return 1 / (cfg.max_tokens * samples)


def k3(logp, ref_logp):
    """Schulman's estimate of KL(pi_theta || pi_ref) at sampled tokens: e^d - 1 - d, d = log pi_ref
    - log pi_theta. Its value is unbiased. As a loss at pi_theta = pi_old, here and in TRL and verl
    (without an importance weight), its gradient is, for each token given what is before it, that of
    the other direction, KL(pi_ref || pi_theta)."""
    d = (ref_logp - logp).clamp(-20, 20)
    return d.expm1() - d


def policy_weights(name, adv, cfg):
    """W = -d loss / d log pi at rho = 1, the weight that the first update gives a sample: A for a
    policy gradient, -f'(e^(-A/eta)) for LAD, 2 beta A for FlowRL (a response of one token, at
    pi = pi_ref and log Z = 0). What gradient masses are made of; adv and W [..]."""
    adv = adv.unsqueeze(-1)  # [..,1]: responses of one token
    zeros = torch.zeros_like(adv)
    logp = torch.zeros_like(adv, requires_grad=True)
    known = dict(entropy=zeros, ref=zeros, log_z=zeros)
    loss, _ = policy_loss(name, logp, zeros, adv, torch.ones_like(adv), cfg, **known)
    return -torch.autograd.grad(loss.sum(), logp)[0].squeeze(-1)


# ==== 5. Fused log-prob =========================================================================
# The logits of R tokens over V words are the largest tensor there is. Here they exist for one chunk
# of C tokens at a time, in the forward and in the backward.


def matmul_fp32(a, b):
    """a @ b, accumulated and returned in fp32 (fp64 for fp64), whatever the inputs are."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    dtype = torch.promote_types(a.dtype, torch.float32)
    return a.to(dtype) @ b.to(dtype)


def add_matmul_fp32(total, a, b):
    """total += a @ b in fp32. On CUDA the product is summed where it belongs: [V,H] in fp32 is
    too much to hold a second time."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.add_(matmul_fp32(a, b))


# What follows works in place where it can: on a CPU a new [C,V] costs more than what is done to it


def logits_to_logp(logits, targets, temperature):
    """Of logits [C,V] and targets [C]: (log-prob, entropy, logsumexp), each [C]."""
    logits = logits / temperature
    lse = torch.logsumexp(logits, -1)
    logp = logits.gather(-1, targets[:, None])[:, 0] - lse
    # -sum p log p = lse - sum p logits
    p = (logits - lse[:, None]).exp_()
    entropy = lse - p.mul_(logits).sum(-1)
    return logp, entropy, lse


def logp_to_dlogits(logits, targets, temperature, lse, entropy, dlogp, dentropy=None):
    """d logits [C,V] = (dlogp (onehot - p) - dentropy p (log p + entropy)) / temperature. No loss
    here has a gradient through the entropy; yours may."""
    logp = (logits / temperature).sub_(lse[:, None])
    if dentropy is None:
        d = logp.exp_().mul_(-dlogp[:, None])
    else:
        p = logp.exp()
        d = p * -dlogp[:, None] - dentropy[:, None] * p * (logp + entropy[:, None])
    d.scatter_add_(-1, targets[:, None], dlogp[:, None])
    return d.div_(temperature)


class FusedLogprob(torch.autograd.Function):
    """2 RHV flops for the logits and 4 RHV for the two gradients.

    Where `gradient` can tell a token's d loss / d logp as soon as its logp is there, both gradients
    are formed at once, in the forward: 6 RHV. Else the backward forms the logits again: 8 RHV.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, chunk, gradient):
        ctx.set_materialize_grads(False)  # no entropy gradient, no work for it
        ctx.temperature, ctx.chunk, ctx.early = temperature, chunk, gradient is not None
        if ctx.early:
            grads = empty_gradients(hidden, weight)

        # Chunk by chunk: logits, what is wanted of them, and perhaps their gradients already
        logps, entropies, lses = [], [], []
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            logits = matmul_fp32(hidden[part], weight.t())  # [C,V]
            logp, entropy, lse = logits_to_logp(logits, targets[part], temperature)
            logps.append(logp)
            entropies.append(entropy)
            lses.append(lse)
            if ctx.early:
                dlogp = gradient(part, logp, entropy)  # [C]
                d = logp_to_dlogits(logits, targets[part], temperature, lse, entropy, dlogp)
                add_gradients(grads, part, d, hidden, weight)
                del d  # [C,V]: not to stand beside the next chunk's logits
        logp, entropy, lse = torch.cat(logps), torch.cat(entropies), torch.cat(lses)  # [R]

        # For the backward: the gradients themselves, or what they can be made of
        if ctx.early:
            ctx.save_for_backward(*grads)
        else:
            ctx.save_for_backward(hidden, weight, targets, lse, entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx, dlogp, dentropy):
        # Formed in the forward already; autograd casts d weight to the weight's type
        if ctx.early:
            return *ctx.saved_tensors, None, None, None, None

        # Or from the logits, chunk by chunk once more
        hidden, weight, targets, lse, entropy = ctx.saved_tensors
        if dlogp is None:
            dlogp = torch.zeros_like(lse)
        grads = empty_gradients(hidden, weight)
        for start in range(0, len(hidden), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            logits = matmul_fp32(hidden[part], weight.t())  # [C,V], as in the forward
            known = (targets[part], ctx.temperature, lse[part], entropy[part])  # [C] each
            dentropy_part = None if dentropy is None else dentropy[part]
            d = logp_to_dlogits(logits, *known, dlogp[part], dentropy_part)
            add_gradients(grads, part, d, hidden, weight)
            del d
        return *grads, None, None, None, None


def empty_gradients(hidden, weight):
    """(d hidden, d weight), the latter to be summed over chunks in fp32; None of a frozen head."""
    dweight = None
    if weight.requires_grad:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        dweight = torch.zeros_like(weight, dtype=dtype)
    return torch.empty_like(hidden), dweight


def add_gradients(grads, part, dlogits, hidden, weight):
    """What the logits of one chunk add to both gradients: dlogits [C,V]."""
    dhidden, dweight = grads
    dlogits = dlogits.to(hidden.dtype)
    dhidden[part] = dlogits @ weight
    if dweight is not None:
        add_matmul_fp32(dweight, dlogits.t(), hidden[part])


def fused_logprob(hidden, weight, targets, temperature=1.0, chunk=4096, gradient=None):
    """(log-prob [R], entropy [R]) in fp32 of targets [R] under
    softmax(hidden [R,H] @ weight [V,H]^T / temperature).

    Memory beyond inputs and gradients: chunk x V logits in fp32, and one copy of the weight's
    gradient in fp32. gradient(part, logp [C], entropy [C]) -> d loss / d logp [C] of the tokens in
    the slice `part`: it must be what the loss's own backward will send here, which is then not
    looked at; no gradient flows through the entropy.
    """
    return FusedLogprob.apply(hidden, weight, targets, temperature, chunk, gradient)


def naive_logprob(hidden, weight, targets, temperature=1.0):
    """The twin that fused_logprob is tested against: the same from whole logits [R,V]."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logits = hidden.to(dtype) @ weight.to(dtype).t() / temperature
    logp = torch.log_softmax(logits, -1)
    entropy = -(logp.exp() * logp).sum(-1)
    return logp.gather(-1, targets[:, None])[:, 0], entropy


def compile_for_chunks(function, **options):
    """A function of logits [C,V], compiled once for any C. V is the model's: a constant."""
    compiled = torch.compile(function, dynamic=True, **options)

    def run(logits, *more):
        torch._dynamo.mark_static(logits, 1)
        return compiled(logits, *more)

    return run


def turn_on_compile(cfg, device, model):
    """Compile the two element-wise functions of the head and, with compile = blocks, the decoder's
    blocks too. dynamic, since lines have any length: one compilation serves them all."""
    if cfg.compile == "off" or (cfg.compile == "auto" and device.type != "cuda"):
        return
    compilers = (os.environ.get("CXX", "g++"), "clang++")
    if device.type == "cpu" and not any(shutil.which(name) for name in compilers):
        print0("compile   no C++ compiler on this machine: running eagerly")
        return
    global logits_to_logp, logp_to_dlogits
    logits_to_logp = compile_for_chunks(logits_to_logp)
    logp_to_dlogits = compile_for_chunks(logp_to_dlogits)
    if cfg.compile == "blocks":
        for block in model.base_model.layers:
            block.compile(dynamic=True)


# ==== 6. The model ==============================================================================
# One forward takes one packed line of tokens, on any device, and gives log-probs of the response
# tokens. Sharding and its details stay inside build_model.


def pack(samples, device):
    """One line of tokens for the model: each distinct prompt once, then the responses to it.

    Three layouts of the same tokens; here prompt p, sample 0 = p + a, sample 1 = p + b:

        line        p p p a a b b           [N]  what the model computes on
        sequences   p p p a a  p p p b b    [M]  what attention sees, a prompt before each response
        responses   a a b b                 [R]  what the loss sees

    line_to_seqs [M] and seqs_to_line [N] are the places to take from, on the way from one layout to
    the other and back. predict [R] is the place in the line whose hidden state predicts a response
    token, seq [R] the sample that the token is of.
    """
    ids, positions = [], []
    line_to_seqs, seqs_to_line, seq_ends = [], [], [0]
    targets, predict, seq, prompt_spans = [], [], [], []
    prompt_start = {}  # prompt -> where it stands in the line
    for i, s in enumerate(samples):
        P = len(s["prompt"])
        T = len(s["tokens"])

        # The line: the prompt, unless an earlier sample brought it, then the response
        key = tuple(s["prompt"])
        is_new = key not in prompt_start
        if is_new:
            prompt_start[key] = len(ids)
            ids += s["prompt"]
            positions += range(P)
        prompt_at = prompt_start[key]
        response_at = len(ids)
        ids += s["tokens"]
        positions += range(P, P + T)

        # The sequence: prompt and response, wherever in the line they are. The way back takes a
        # shared prompt from the sample that brought it; causality makes all its copies equal
        begin = seq_ends[-1]
        line_to_seqs += range(prompt_at, prompt_at + P)
        line_to_seqs += range(response_at, response_at + T)
        seqs_to_line += range(begin if is_new else begin + P, begin + P + T)
        seq_ends.append(begin + P + T)

        # The response: the end of the prompt predicts its first token, each token the next one
        if T > 0:
            predict.append(prompt_at + P - 1)
            predict += range(response_at, response_at + T - 1)
        targets += s["tokens"]
        seq += [i] * T
        prompt_spans.append((prompt_at, prompt_at + P))

    index = partial(torch.tensor, dtype=torch.long)  # an empty list has no type of its own
    batch = {
        "ids": index([ids]),  # [1,N]
        "positions": index([positions]),  # [1,N]
        "cu_seqlens": torch.tensor(seq_ends, dtype=torch.int32),  # [S + 1]
        "targets": index(targets),  # [R]
        "predict": index(predict),  # [R]
        "seq": index(seq),  # [R]
    }
    # Where no prompt is shared the line is the sequences, and attention need not copy
    if len(prompt_start) < len(samples):
        batch["line_to_seqs"] = index(line_to_seqs)  # [M]
        batch["seqs_to_line"] = index(seqs_to_line)  # [N]
    batch = to_device(batch, device)
    batch["max_seqlen"] = max(end - begin for begin, end in pairwise(seq_ends))
    batch["lengths"] = [len(s["tokens"]) for s in samples]  # [S], of the responses
    batch["prompt_spans"] = prompt_spans  # [S] pairs of places in the line
    return batch


def to_device(tensors, device):
    """A dictionary's tensors, copied without waiting for the copies."""
    if device.type == "cpu":
        return tensors
    moved = {}
    for key, x in tensors.items():
        moved[key] = x.pin_memory().to(device, non_blocking=True)
    return moved


def packed_attention(module, query, key, value, attention_mask=None, scaling=None, **more):
    """Causal attention inside each sequence of a line: [1,heads,N,D] -> [1,N,heads,D]. On CUDA it
    is torch's own flash attention over sequences of any length, without padding. `more` has the
    layout of the line from pack() and, where the model has one, a sliding_window."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [N,heads,D]
    if "line_to_seqs" in more:
        q, k, v = (x.index_select(0, more["line_to_seqs"]) for x in (q, k, v))  # [M,heads,D]

    ends, longest = more["cu_seqlens"], more["max_seqlen"]
    window = more.get("sliding_window")
    attend = varlen_attention if q.is_cuda else padded_attention
    out = attend(q, k, v, ends, longest, scaling, window)  # [M,heads,D]

    if "seqs_to_line" in more:
        out = out.index_select(0, more["seqs_to_line"])  # [N,heads,D]
    return out[None], None


def varlen_attention(q, k, v, cu_seqlens, max_seqlen, scaling, sliding_window):
    from torch.nn.attention.varlen import varlen_attn

    # to the left, -1: without limit; to the right
    span = (sliding_window - 1 if sliding_window else -1, 0)
    options = dict(scale=scaling, window_size=span, enable_gqa=True)
    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **options)


def padded_attention(q, k, v, cu_seqlens, max_seqlen, scaling, sliding_window):
    """varlen_attn's twin on the CPU: sequences padded on the right, where causality never looks."""
    lengths = cu_seqlens.diff()  # [S]
    inside = torch.arange(max_seqlen) < lengths[:, None]  # [S,L]
    place = inside.flatten().nonzero()[:, 0]  # [M], in the padded layout

    def pad(x):
        padded = x.new_zeros(inside.numel(), *x.shape[1:]).index_copy(0, place, x)
        return padded.view(*inside.shape, *x.shape[1:]).transpose(1, 2)  # [S,heads,L,D]

    options = dict(is_causal=True)
    if sliding_window:
        square = torch.ones(max_seqlen, max_seqlen, dtype=torch.bool)
        options = dict(attn_mask=square.tril().triu(1 - sliding_window))
    options.update(scale=scaling, enable_gqa=True)
    out = F.scaled_dot_product_attention(pad(q), pad(k), pad(v), **options)  # [S,heads,L,D]
    return out.transpose(1, 2).flatten(0, 1).index_select(0, place)  # [M,heads,D]


LAYOUT = ("cu_seqlens", "max_seqlen", "line_to_seqs", "seqs_to_line")  # what attention is told


def logprob_forward(model, batch, temperature, chunk, gradient=None):
    """The model's whole forward: packed ids in, (logp, entropy, log_z) [R] of the response tokens
    out; log_z is None without such a head. The heads are in here because FSDP gathers a module's
    weights only inside that module's own forward."""
    # The body: every token of the line
    layout = {key: batch[key] for key in LAYOUT if key in batch}
    inputs = dict(input_ids=batch["ids"], position_ids=batch["positions"], use_cache=False)
    hidden = model.base_model(**inputs, **layout).last_hidden_state[0]  # [N,H]

    # The head: only what predicts a response token. index_select and not hidden[..]: a prompt's end
    # predicts many first tokens, and on a CPU the backward of [..] adds up their gradients in
    # whatever order the threads come
    predicting = hidden.index_select(0, batch["predict"])  # [R,H]
    weight = model.lm_head.weight
    chunk = chunk or largest_chunk(hidden, len(weight))
    targets = batch["targets"]
    temperature = temperature * families.logits_divisor(model.config)
    logp, entropy = fused_logprob(predicting, weight, targets, temperature, chunk, gradient)

    # FlowRL's own head: one number for each prompt
    log_z = None
    if hasattr(model, "log_z"):
        log_z = baselines.log_z_of_prompts(model.log_z, hidden, batch["prompt_spans"])  # [S]
        log_z = log_z.index_select(0, batch["seq"])  # [R]
    return logp, entropy, log_z


LOGIT_BYTES = 12  # of the head for a logit of a chunk: three times fp32, at most


def largest_chunk(hidden, vocabulary):
    """Tokens whose logits may exist at once: as many as fit into a quarter of the free memory."""
    free = 2**32
    # what the driver has left, and what torch holds without using it
    if hidden.is_cuda:
        free = torch.cuda.mem_get_info()[0]
        free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    chunk = free // 4 // (LOGIT_BYTES * vocabulary) // 256 * 256
    return min(max(chunk, 256), 4096)


def build_model(folder, cfg, device, trainable=True):
    """A causal LM from a Hugging Face folder: fp32 weights, sharded, each rank reading only what it
    keeps. On CUDA it computes in bf16. model(batch, temperature, chunk) is logprob_forward. With
    LoRA the weights are frozen, and rest in what is computed in; adapters beside them are fp32."""
    from transformers import AttentionInterface, AutoConfig

    # The architecture, with our attention; nothing is allocated yet
    AttentionInterface.register("packed", packed_attention)
    config = AutoConfig.from_pretrained(folder)
    dtype = lora.base_type(cfg, device) if trainable else torch.float32
    options = dict(dtype=dtype, attn_implementation="packed")
    model = families.empty_model(config, **options)
    needs_adapters = trainable and cfg.lora_rank > 0
    if needs_adapters:
        lora.add_adapters(model, cfg)
    needs_log_z = trainable and "log_z" in OBJECTIVES[cfg.objective].needs
    if needs_log_z:
        with torch.device("meta"):
            model.log_z = baselines.log_z_head(config.hidden_size)

    # Its weights: sharded, allocated, read
    if world() > 1 or device.type == "cuda":
        shard(model, cfg, device)
    model.to_empty(device="cpu" if cfg.offload else device)
    families.remake_buffers(model, device)
    model.tie_weights()
    checkpoint.load_model(model, folder)
    if needs_log_z:
        baselines.initialise_log_z(model.log_z, config.hidden_size, cfg.seed, device)

    # How it is run
    model.requires_grad_(trainable)
    if needs_adapters:
        lora.initialise(model, cfg, device)
        lora.freeze(model)
    families.switch_off_noise(model, trainable)
    if cfg.checkpointing and trainable:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.forward = partial(logprob_forward, model)
    return model


def shard(model, cfg, device):
    """FSDP2, block by block: over all ranks, or in groups of shard_size that hold a copy each."""
    from torch.distributed import fsdp

    # Who holds which part
    size = cfg.shard_size or world()
    shape, names = (size,), ("shard",)
    if size < world():
        shape, names = (world() // size, size), ("replicate", "shard")
    mesh = dist.init_device_mesh(device.type, shape, mesh_dim_names=names)
    # In which type it computes and gradients are summed over ranks, and where the shards rest
    precision = fsdp.MixedPrecisionPolicy()
    if device.type == "cuda":
        compute = dict(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        precision = fsdp.MixedPrecisionPolicy(**compute)
    offload = fsdp.OffloadPolicy()
    if cfg.offload:
        offload = fsdp.CPUOffloadPolicy(pin_memory=device.type == "cuda")
    # A block gathers its weights when it runs; the root keeps embeddings, last norm and head
    for module in (*model.base_model.layers, model):
        fsdp.fully_shard(module, mesh=mesh, mp_policy=precision, offload_policy=offload)


# ==== 7. The update =============================================================================


def micro_batches(samples, cfg):
    """Lists of samples of about micro_tokens each, the same number on every rank, since each makes
    a sharded forward."""
    # Neighbours with one prompt stay together, to share it: in units of up to a quarter of a list
    units = []  # [tokens, samples]
    for s in samples:
        P = len(s["prompt"])
        T = len(s["tokens"])
        shares = units and units[-1][1][0]["prompt"] == s["prompt"]
        if shares and units[-1][0] + T <= cfg.micro_tokens // 4:
            units[-1][0] += T
            units[-1][1].append(s)
        else:
            units.append([P + T, [s]])

    # As many lists as the busiest rank needs
    tokens = sum(size for size, _ in units)
    n = max(math.ceil(tokens / cfg.micro_tokens), 1)
    n = int(all_reduce([n], "max")[0])
    bins = [[] for _ in range(n)]
    load = [0] * n
    # The largest unit first, each into the list that is emptiest
    for size, part in sorted(units, key=itemgetter(0), reverse=True):
        i = load.index(min(load))
        bins[i] += part
        load[i] += size

    # A token that weighs nothing keeps an idle rank in step
    for part in bins:
        if not part:
            part.append(dict(prompt=[0], tokens=[0], mask=[0], behaviour=[0.0], adv=0.0, scale=0.0))
    return bins


def needs_old_logprobs(cfg):
    """Whether a forward has to find pi_old's log-probs before the update. With one update a batch
    pi_old is pi_theta as that update finds it, and scaled_loss takes it from there; but the drift
    from the reference is asked for before."""
    return cfg.minibatches * cfg.epochs > 1 or "drift" in OBJECTIVES[cfg.objective].needs


@torch.no_grad()
def score_samples(model, key, samples, cfg, device):
    """samples[i][key] = log-probs [T] of its tokens under `model`, left on the device."""
    for micro in micro_batches(samples, cfg):
        batch = pack(micro, device)
        logp, *_ = model(batch, cfg.temperature, cfg.head_chunk)
        for s, x in zip(micro, logp.split(batch["lengths"]), strict=True):
            s[key] = x
    if hasattr(model, "reshard"):
        model.reshard()  # a forward without a backward leaves the root's weights gathered


def batch_statistics(drawn):
    """Means over the samples of all ranks, dropped groups included. entropy_old is that of a token,
    in nats: the mean of -log pi(y_t) over tokens that are trained, as vLLM gave it, unbiased for
    the entropy and there already."""
    # Sums of this rank, then of all
    samples = [s for group in drawn for s in group]
    scored = scorable(samples)
    whole = [s for s in samples if not s["lost"]]
    sums = {
        "samples": len(samples),
        "scored": len(scored),
        "reward": sum(s["reward"] for s in scored),
        "solve_rate": sum(s["correct"] > 0.5 for s in scored),
        "unanswered": sum(s["reason"] == "no answer found" for s in scored),
        "truncated": sum(s["truncated"] for s in samples),
        "response_tokens": sum(len(s["tokens"]) for s in samples),
        "prompt_tokens": sum(len(s["prompt"]) for s in samples),
        "nll": -sum(masked_sum(s, s["behaviour"]) for s in whole),
        "nll_tokens": sum(trained_tokens(s) for s in whole),
        "failed": sum(bool(s["failed"] or s["lost"]) for s in samples),
        "zero_variance": sum(len(group) for group in drawn if not has_signal(group)),
    }
    total = dict(zip(sums, all_reduce(list(sums.values())), strict=True))

    # Means: of what could be scored, which may be nothing, and of everything
    summary = {"samples": total["samples"]}
    for key in ("reward", "solve_rate", "unanswered"):
        summary[key] = total[key] / total["scored"] if total["scored"] else math.nan
    for key in ("truncated", "response_tokens", "failed", "zero_variance"):
        summary[key] = total[key] / total["samples"]
    summary["entropy_old"] = math.nan
    if total["nll_tokens"]:
        summary["entropy_old"] = total["nll"] / total["nll_tokens"]
    summary["tokens"] = int(total["response_tokens"] + total["prompt_tokens"])
    return summary


def set_advantages(groups, cfg, state):
    """Give each sample its advantage; `state` is FADE's, with this batch in it. HACK HERE for what
    is not a function of a group's rewards; for what is, add a row to OBJECTIVES.

    A sample that could not be scored has none, and is in no mean and no deviation of its group's:
    so groups are taken together that have as many scorable samples, n of G. One alone has none.
    """
    # Groups by their number of scorable samples
    by_size = {}
    for group in groups:
        for s in group:
            s["adv"] = None
        if len(scorable(group)) > 1:
            by_size.setdefault(len(scorable(group)), []).append(scorable(group))

    # The objective's advantages, of all groups of a size at once
    for alike in by_size.values():
        rewards = tensor_of("reward", alike)  # [B,n]
        # in [0, 1], as a solve rate is; a reward of one's own may be anything
        known = dict(state, correct=tensor_of("correct", alike).clamp(0, 1))
        if "drift" in OBJECTIVES[cfg.objective].needs:
            known["drift"] = reference_drift(alike)
        adv = advantages(cfg.objective, rewards, cfg, known)  # [B,n]
        for group, values in zip(alike, adv.tolist(), strict=True):
            for s, a in zip(group, values, strict=True):
                s["adv"] = a


def tensor_of(key, groups):
    return torch.tensor([[s[key] for s in group] for group in groups], dtype=torch.float64)


def reference_drift(groups):
    """log pi_old(y|x) - log pi_ref(y|x) of whole responses [B,n], of their trained tokens; 0 of an
    empty one."""
    drift = torch.zeros(len(groups), len(groups[0]), dtype=torch.float64)
    for i, group in enumerate(groups):
        for j, s in enumerate(group):
            if s["tokens"]:
                drift[i, j] = masked_sum(s, s["old"] - s["ref"])
    return drift


def gradient_mass(groups, cfg, n_drawn):
    """FADE's instrument, of any objective: |W| summed over the successes, and over the failures,
    that are trained on, divided by the number of samples drawn; W is the weight in the first
    update. All ranks must come here."""
    trained = [s for group in groups for s in group if is_trained_on(s, cfg)]
    adv = torch.tensor([s["adv"] for s in trained], dtype=torch.float64)
    right = torch.tensor([s["correct"] > 0.5 for s in trained], dtype=torch.bool)
    weight = policy_weights(cfg.objective, adv, cfg).abs()
    success, failure = all_reduce([weight[right].sum().item(), weight[~right].sum().item()])
    return {"mass_success": success / n_drawn, "mass_failure": failure / n_drawn}


def is_trained_on(sample, cfg):
    """Whether a sample is part of the update: it has an advantage, log-probs, and tokens."""
    if sample["adv"] is None or sample["lost"] or not trained_tokens(sample):
        return False
    return not (sample["truncated"] and cfg.overlong == "mask")


def trained_tokens(sample):
    """How many of a response's tokens are trained on: all, unless the sample has a `mask` [T] of 0
    and 1. HACK HERE, or rather where the mask can be known: in describe() from the tokens, or in
    main() after score_samples from log-probs. Tokens that are masked are in no ratio, no KL, no
    drift and not in FADE's H either: it is for what the policy did not write, such as a tool's
    output. To train on fewer of its own tokens, weight the loss of a row of OBJECTIVES instead."""
    return sum(sample["mask"]) if "mask" in sample else len(sample["tokens"])


def masked_sum(sample, values):
    """The sum of values [T], a list or a tensor, over the sample's trained tokens."""
    if "mask" in sample:
        return sum(x for x, trained in zip(values, sample["mask"], strict=True) if trained)
    return sum(values) if isinstance(values, list) else values.sum()


def loss_inputs(samples, seq, device):
    """What the loss wants to know of each response token [R]: adv, scale, mask, behaviour, seq, and
    old and ref where they were computed."""
    # One number a sample, spread over its tokens on the device
    adv = torch.tensor([s["adv"] for s in samples], dtype=torch.float32)  # [S]
    scale = torch.tensor([s["scale"] for s in samples], dtype=torch.float32)  # [S]
    behaviour = [x for s in samples for x in s["behaviour"]]
    behaviour = torch.tensor(behaviour, dtype=torch.float32)  # [R]
    masks = [s.get("mask", [1] * len(s["tokens"])) for s in samples]
    mask = torch.tensor([x for mask in masks for x in mask], dtype=torch.float32)  # [R]
    t = to_device({"adv": adv, "scale": scale, "behaviour": behaviour, "mask": mask}, device)
    t["adv"] = t["adv"].index_select(0, seq)
    t["scale"] = t["scale"].index_select(0, seq)
    t["seq"] = seq
    for key in ("old", "ref"):  # on the device already; what keeps an idle rank in step has none
        if key in samples[0]:
            t[key] = torch.cat([s[key] for s in samples])
    return t


# Sums over tokens, the last a maximum
STATS = ("loss", "entropy", "clipped", "tis_mean", "rollout_kl", "kl", "ratio_max")


def scaled_loss(cfg, inputs, logp, entropy, log_z=None, part=slice(None)):
    """(the step's loss, summed over the response tokens `part`; their STATS after the first).
    inputs is loss_inputs' of the whole row; logp, entropy and log_z are of the part."""
    t = {key: x[part] for key, x in inputs.items()}
    mask = t["mask"]  # 1: trained
    old = t.get("old", logp.detach())  # one update a batch: the old policy is this one
    ref = t.get("ref", logp.detach())  # no reference: no KL to it, and no gradient of one
    known = dict(entropy=entropy.detach(), ref=ref, log_z=log_z)
    loss, info = policy_loss(cfg.objective, logp, old, t["adv"], mask, cfg, t["seq"], **known)

    # vLLM sampled from nearly, but not quite, the trainer's pi_old
    tis = rollout_weight(old - t["behaviour"], mask, t["seq"], cfg)

    # The step's loss: the objective's, so corrected, and the KL to the reference
    kl = k3(logp, ref)
    total = ((loss * tis + cfg.kl_coef * kl) * t["scale"] * mask).sum()

    stats = [
        (entropy * mask).sum(),
        (info["clipped"] * mask).sum(),
        (tis * mask).sum(),
        (k3(t["behaviour"], old) * mask).sum(),
        (kl * mask).sum(),
        info["ratio"].max(),
    ]
    return total, stats


def rollout_weight(mismatch, mask, seq, cfg):
    """The importance weight of each token [R] for mismatch = log pi_old - log pi_vLLM, through
    which no gradient flows: the token's own, or that of its response's trained tokens together.

    truncate: cut at tis_cap. TIS, https://fengyao.notion.site/off-policy-rl
    mask: 0 outside of tis_floor .. tis_cap. Of tokens IcePop, arXiv 2510.18855, with 0.5 and 5; of
    sequences MIS, https://richardli.xyz/rl-collapse
    """
    if not cfg.tis_cap:
        return torch.ones_like(mismatch)
    if cfg.tis_mode.startswith("sequence"):
        mismatch = sum_in_sequence(mismatch * mask, seq)
    weight = mismatch.exp()
    if cfg.tis_mode.endswith("truncate"):
        return weight.clamp(max=cfg.tis_cap)
    inside = (weight >= cfg.tis_floor) & (weight <= cfg.tis_cap)
    return torch.where(inside, weight, 0.0)


def accumulate_gradient(model, samples, cfg, device):
    """Backward over this rank's share of one minibatch. Gradients end up summed over micro-batches
    and ranks. Returns {stat: its mean over the tokens of all ranks}."""
    # The denominators, over all ranks
    lengths = [trained_tokens(s) for s in samples]
    tokens, sequences = all_reduce([sum(lengths), len(lengths)])
    for s, length in zip(samples, lengths, strict=True):
        s["scale"] = token_scale(cfg, length, tokens, sequences)

    # Forward and backward of each micro-batch
    sharded = hasattr(model, "set_requires_gradient_sync")
    micros = micro_batches(samples, cfg)
    stats = []
    for i, micro in enumerate(micros):
        is_last = i == len(micros) - 1
        if sharded:  # reduced after each micro-batch, unless told otherwise; between groups at last
            model.set_requires_gradient_sync(cfg.reduce_each or cfg.offload or is_last)
            model.set_requires_all_reduce(cfg.offload or is_last)
        batch = pack(micro, device)
        inputs = loss_inputs(micro, batch["seq"], device)

        # Where a token's loss depends on no other token's, its gradient is known with its log-prob
        gradient = None
        if is_local(cfg):
            gradient = partial(early_gradient, cfg, inputs)
        logp, entropy, log_z = model(batch, cfg.temperature, cfg.head_chunk, gradient)  # [R] each
        # Where the head made its gradient already, this is for the log, and for autograd to go on
        loss, rest = scaled_loss(cfg, inputs, logp, entropy, log_z)

        # FSDP takes the mean over ranks, and the scale holds the denominator of their sum
        (loss * world()).backward()
        stats.append(torch.stack([loss, *rest]).detach())

    # For the log: one wait for the device a minibatch
    stats = torch.stack(stats)  # [micro-batches, STATS]
    sums = all_reduce(stats[:, :-1].sum(0).tolist())
    largest = all_reduce([stats[:, -1].max().item()], "max")
    means = [x / max(tokens, 1) for x in sums[1:]]
    return dict(zip(STATS, [sums[0], *means, *largest], strict=True), tokens=tokens)


def is_local(cfg):
    """Whether a token's loss, with its weights, depends on no other token's."""
    weights_are_of_sequences = cfg.tis_cap and cfg.tis_mode.startswith("sequence")
    if cfg.ratio != "token" or weights_are_of_sequences:
        return False
    return OBJECTIVES[cfg.objective].local


def early_gradient(cfg, inputs, part, logp, entropy):
    """d loss / d logp [C] of the tokens in a slice, inside the head's forward: what the backward of
    accumulate_gradient's loss will send there."""
    with torch.enable_grad():
        logp = logp.detach().requires_grad_()
        loss, _ = scaled_loss(cfg, inputs, logp, entropy, part=part)
        return torch.autograd.grad(loss * world(), logp)[0]


def optimizer_step(model, optimizer, cfg):
    """Clip and step. A gradient that is not finite, or zero (there was nothing to learn from),
    steps nowhere. Returns the norm before clipping."""
    # FSDP's norm is a sharded tensor: made whole, it is the norm over all ranks
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
    if hasattr(norm, "full_tensor"):
        norm = norm.full_tensor()
    norm = float(norm)
    if 0 < norm < math.inf:
        optimizer.step()
    optimizer.zero_grad()
    return norm


def copy_weights(model, reference):
    for new, p in zip(model.parameters(), reference.parameters(), strict=True):
        p.data.copy_(new.data)


# ==== 8. main ===================================================================================


MOST_BARREN = 3  # batches in a row without a finite gradient: as many are no accident


def start_verifier(cfg, rows):
    """The verifier, shown to work on this machine and on these rows: better here than after the
    first hour."""
    verifier = verify.Verifier(cfg.verify_workers, cfg.verify_timeout)
    probe = "\\boxed{x} Answer: x\n```python\n0\n```"
    try:
        verifier.score([(scored_by(cfg), probe, row["truth"]) for row in rows])
    except RuntimeError as error:
        die(f"the verifier cannot work here: {one_line(error)}")
    # A reward of one's own takes any text
    failed = [reason for reason in verifier.reasons if ":" in reason]
    if cfg.reward and failed:
        die(f"reward = {cfg.reward}, given the response {probe!r}: {failed[0]}")
    return verifier


def main(argv):
    # Settings, and everything that is cheap to refuse
    if "--plan" in argv:  # memory, FLOPs and seconds instead of a run
        plan = [str(HERE / "tools/plan.py"), "--script", __file__]
        os.execv(sys.executable, [sys.executable, *plan, *argv])
    cfg = load_config(argv)
    trackers.check(cfg.track)
    device = join(cfg)
    vllm_options.check_environment(device)
    claim(cfg, HERE)
    if cfg.zero_variance != "keep" and OBJECTIVES[cfg.objective].learns_from_equal:
        print0(
            f"note      {cfg.objective} learns from groups of equal rewards too, which "
            f"zero_variance = {cfg.zero_variance} leaves out"
        )
    tracks_change = cfg.track_change and not cfg.lora_rank
    if cfg.track_change and cfg.lora_rank:
        print0(
            "note      track_change logs nothing with LoRA, which leaves the output head as it is"
        )
    folder = find_model(cfg)
    families.check(folder)
    found = checkpoint.find(cfg)
    tokenizer = load_tokenizer(folder)
    reference_folder = find_reference(cfg, folder, tokenizer)
    rows = load_data(cfg, tokenizer)
    held_out = load_data(cfg, tokenizer, evaluation=True) if cfg.eval_data else []
    verifier = start_verifier(cfg, rows[:1] + held_out[:1])
    if cfg.reward:
        print0(
            f"reward    {cfg.reward}; over 0.5 it counts as solved: in solve_rate and FADE's p, "
            "in pass@k and the masses, for f_grpo, maxrl, passk and w_reinforce"
        )
    tracking.begin(cfg, __file__, found)

    # vLLM first, on a GPU that nobody else fills yet; then the model, its optimizer and, where
    # something needs it, the reference: a frozen copy of the model as it is now, or another
    llm = start_vllm(cfg, folder, device)
    model = build_model(folder, cfg, device)
    reference = None
    if "ref" in OBJECTIVES[cfg.objective].needs or cfg.kl_coef:
        if cfg.lora_rank and not cfg.reference:
            reference = model  # its adapters will be switched off
        else:
            reference = build_model(reference_folder, cfg, device, trainable=False)
    # W_0, also where a checkpoint will be loaded over it: the model is still as its folder has it
    first = tracking.first_weights(model) if tracks_change else None
    turn_on_compile(cfg, device, model)
    if cfg.offload and device.type == "cuda":
        take_threads()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, cfg.lr, (0.9, cfg.beta2), weight_decay=cfg.weight_decay, fused=True
    )

    # All that a run is, beside its weights. A checkpoint holds both
    progress = dict(step=0, position=0, state=new_state(), skipped=0)
    moving = reference if cfg.ref_every else None  # a reference that moves is in checkpoints too
    if found:
        progress.update(checkpoint.load(cfg, found, model, optimizer, moving))
    state = progress["state"]
    save = partial(checkpoint.save, cfg, model, optimizer, moving)
    kept = progress["step"]  # the last step that a checkpoint holds
    tracking.rewind(cfg, progress["step"])
    tracking.announce(cfg, model, device, progress["step"])
    signs_seen = signs.begin(cfg, tracking.logged(cfg))
    if rank() == 0:
        trackers.follow(cfg.track, cfg.out)
    stopped = tracking.listen_for_signals()
    over = watch()  # ranks watch each other: who dies or hangs is named by the others

    # How good the model is before it learns anything
    if held_out and progress["step"] == 0:
        with awake(llm, model, device):
            scores = evaluate(llm, cfg, tokenizer, verifier, held_out, 0)
        tracking.log_evaluation(cfg, 0, scores)
    signal = stopped()
    if signal:
        tracking.leave_at_signal(cfg, signal, progress["step"], kept)

    barren = 0  # batches in a row of which no gradient was finite
    agreed = False  # did vLLM and the trainer agree on the first tokens?
    for step in range(progress["step"] + 1, cfg.steps + 1):
        lap, clock = tracking.stopwatch()

        # Rollouts, by the policy as it is. Their verification starts here and goes on below
        with awake(llm, model, device):
            lap("sync")
            groups, drawn, position, pending = collect(
                llm, cfg, tokenizer, verifier, rows, progress["position"], step, lap
            )

        # Log-probs of these tokens under the policies that are frozen during the update: pi_old,
        # and the reference
        samples = [s for group in groups for s in group if s["tokens"]]
        if needs_old_logprobs(cfg):
            score_samples(model, "old", samples, cfg, device)
        if reference is not None:
            with lora.switched_off(reference):
                score_samples(reference, "ref", samples, cfg, device)
        lap("train")

        # Rewards, then FADE's running statistics (this batch counts already), then advantages
        if pending:
            finish_verification(*pending, cfg)
        lap("reward")
        summary = batch_statistics(drawn)
        if summary["failed"] > cfg.max_failed:
            if progress["step"] > kept:
                save(progress)
            tracking.refuse_batch(cfg, step, summary["failed"], drawn)
        update_state(state, summary["solve_rate"], summary["entropy_old"], cfg)
        set_advantages(groups, cfg, state)
        mass = gradient_mass(groups, cfg, summary["samples"])

        # The update: `epochs` passes over the batch, `minibatches` optimizer steps in each, on
        # slices that stay the same in every pass, so that a prompt stays with its responses
        samples = [s for s in samples if is_trained_on(s, cfg)]
        lr = cfg.lr * min(1.0, step / max(cfg.warmup, 1))
        optimizer.param_groups[0]["lr"] = lr
        updates = []
        for _ in range(cfg.epochs):
            for i in range(cfg.minibatches):
                start = i * len(samples) // cfg.minibatches
                end = (i + 1) * len(samples) // cfg.minibatches
                stats = accumulate_gradient(model, samples[start:end], cfg, device)
                if stats["tokens"] and not agreed:  # before the first optimizer step
                    check_agreement(cfg, step, stats["rollout_kl"])
                    agreed = True
                stats["grad_norm"] = optimizer_step(model, optimizer, cfg)
                updates.append(stats)
        if cfg.ref_every and reference is not None and step % cfg.ref_every == 0:
            copy_weights(model, reference)
        lap("train")

        # The rest is diagnostics, evaluation and checkpoints
        progress["step"] = step
        progress["position"] = position
        skipped = sum(not math.isfinite(u["grad_norm"]) for u in updates)
        progress["skipped"] += skipped
        barren = barren + 1 if skipped == len(updates) else 0
        metrics = dict(
            summary, lr=lr, skipped=progress["skipped"], **mass, **fade_metrics(state, cfg)
        )
        # what became of the batch: the share that was trained on, and where the weights have gone
        metrics["trained"] = all_reduce([len(samples)])[0] / summary["samples"]
        if tracks_change:
            metrics.update(tracking.change_of_weights(model, first))
        line = tracking.log_step(cfg, step, metrics, updates, clock, device)
        tracking.log_samples(cfg, step, drawn)
        signs.tell(signs_seen, cfg, line, drawn)

        if held_out and is_due(step, cfg.eval_every, cfg.steps):
            with awake(llm, model, device):
                scores = evaluate(llm, cfg, tokenizer, verifier, held_out, step)
            tracking.log_evaluation(cfg, step, scores, drawn)
        # Stop, or go on: on gradients that are none, on a signal, at the end
        if barren and barren == min(MOST_BARREN, cfg.steps):
            save(progress)
            tracking.refuse_gradients(cfg, step, barren)
        signal = stopped()
        if signal or is_due(step, cfg.checkpoint_every, cfg.steps):
            if save(progress):
                kept = step
        if signal and step < cfg.steps:
            tracking.leave_at_signal(cfg, signal, step, kept)

    # A folder that others load, a picture, and a quiet end: no rank leaves before the others
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    checkpoint.export(cfg, named_weights(model, dtype), model.config, tokenizer, folder)
    if cfg.lora_rank:
        lora.export(cfg, model)
    tracking.report(cfg)
    verifier.close()
    leave(over)


def is_due(step, every, last):
    return step == last or (every and step % every == 0)


if __name__ == "__main__":
    # Ctrl-C while starting up; later, tracking.listen_for_signals has it
    command.run(main, stopped="stopped while starting; nothing was trained")
