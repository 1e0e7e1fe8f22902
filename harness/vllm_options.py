"""
vLLM's own engine options, given as a JSON object (--vllm): which of them a run may set, and one
line for each that it may not.

    --vllm '{"max_num_batched_tokens": 16384}'          # throughput: longer prefills at once
    --vllm '{"quantization": "fp8_per_tensor"}'         # rollouts in fp8, quantized at each sync

Names, types and ranges are vLLM's to check, as it starts and before it reads any weights. Refused
at once is what a knob of ours sets, and what would break what a run relies on: that weights arrive
in vLLM each time it wakes, and that its log-probs are of what it sampled from. docs/gpu.md.
"""

import dataclasses
import json
import os

import torch

from harness.settings import did_you_mean, die, one_line

# ==== 1. What may be given ======================================================================

# Options that a knob sets
KNOBS = {
    "model": "model",
    "model_weights": "model",
    "tokenizer": "model",
    "revision": "model (org/name@revision)",
    "tokenizer_revision": "model (org/name@revision)",
    "hf_config_path": "model",
    "seed": "seed",
    "tensor_parallel_size": "tensor_parallel",
    "max_model_len": "max_prompt_tokens and max_tokens",
    "max_num_seqs": "vllm_seqs",
    "gpu_memory_utilization": "vllm_memory",
    "kv_cache_memory_bytes": "vllm_memory",
    "enforce_eager": "vllm_eager",
    "enable_lora": "lora_rank: vLLM is given weights with the adapters inside",
}

RANKS = "ranks are torchrun's, and share engines by tensor_parallel alone"
OTHER_MODEL = "vLLM would compute another model than the trainer"
OTHER_LOGPROBS = "the log-probs that train must be of what was sampled from, and of nothing else"
OFFLOADED = "vLLM cannot take new weights while it keeps some in the CPU's memory"

# Options that a run relies on, and why they stay as they are
FIXED = {
    "distributed_executor_backend": RANKS,
    "pipeline_parallel_size": RANKS,
    "data_parallel_size": RANKS,
    "nnodes": RANKS,
    "logprobs_mode": OTHER_LOGPROBS,
    "logits_processors": OTHER_LOGPROBS,
    "dtype": "weights go to vLLM in bf16, on a CPU in fp32",
    "hf_overrides": OTHER_MODEL,
    "model_class_overrides": OTHER_MODEL,
    "runner": "rollouts are generated text",
    "convert": "rollouts are generated text",
    "trust_remote_code": "code of a model's folder is never run (docs/security.md)",
    "enable_sleep_mode": "vLLM sleeps on a GPU while the trainer needs its memory",
    "cpu_offload_gb": OFFLOADED,
    "cpu_offload_params": OFFLOADED,
    "offload_backend": OFFLOADED,
    "offload_group_size": OFFLOADED,
    "offload_params": OFFLOADED,
}

# What makes quantized weights of those that a sync brings; vllm/config/quantization.py has them.
# All others read weights that were quantized before
ONLINE = ("fp8_per_tensor", "fp8_per_channel", "fp8_per_block", "mxfp8", "mxfp4", "online")

# Loaders of the weights that lie in a model's folder
LOADERS = ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "runai_streamer")

# Drafts made without weights of their own: a draft model's are dropped when vLLM sleeps, and no
# sync brings them back
DRAFTS = ("ngram", "ngram_gpu", "suffix")


def read(text):
    """{option: value} of what --vllm says. One line and exit code 2 where that is no JSON object,
    or has an option that may not be given."""
    if not text:
        return {}
    try:
        given = json.loads(text)
    except ValueError as error:
        die(f"vllm = {text!r}: {one_line(error)}; expected a JSON object of vLLM's options")
    if not isinstance(given, dict):
        die(f"vllm = {text!r}: expected a JSON object of vLLM's options")
    for name, value in given.items():
        why = fault(name, value)
        if why:
            die(f"vllm: {name} = {json.dumps(value)}: {why}")
    return given


def fault(name, value):
    """Why an option may not be given, or ""."""
    if name in KNOBS:
        return f"that is set by the knob {KNOBS[name]}"
    if name in FIXED:
        return f"it must stay as it is: {FIXED[name]}"
    if name == "quantization" and value == "fp8":
        return "that reads weights saved in fp8, and a sync brings bf16: take fp8_per_tensor"
    if name == "quantization" and value not in ONLINE:
        return f"it cannot make weights out of those that a sync brings: one of {', '.join(ONLINE)}"
    if name == "load_format" and value not in LOADERS:
        return f"it does not read the weights of a model's folder: one of {', '.join(LOADERS)}"
    if name in ("spec_method", "spec_model", "spec_tokens"):
        return "say it as speculative_config"
    if name == "speculative_config":
        return fault_of_drafts(value)
    return ""


def fault_of_drafts(value):
    """Why a speculative_config may not be given, or ""."""
    method = value.get("method") if isinstance(value, dict) else None
    if method in DRAFTS:
        return ""
    return f"a draft model's weights do not outlive a sleep: a method of {', '.join(DRAFTS)}"


def check_environment(device, trains=True):
    """Leave in one line where VLLM_BATCH_INVARIANT=1 cannot work: its kernels, written in triton,
    take the place of torch's in the whole process, the trainer's as well."""
    if os.environ.get("VLLM_BATCH_INVARIANT", "0") == "0":
        return
    if device.type == "cpu":
        die("VLLM_BATCH_INVARIANT is for GPUs: unset it (on a CPU seeded responses are alike)")
    major, minor = torch.cuda.get_device_capability(device)
    if major == 8 and trains:  # enable_batch_invariant_mode() of vLLM 0.32
        die(
            f"VLLM_BATCH_INVARIANT: on a GPU of capability {major}.{minor} vLLM replaces torch's "
            "linear layers by one without a gradient: unset it, or take capability 9.0 or more"
        )


# ==== 2. What vLLM says to it ===================================================================


def known(text):
    """read(text), each known to vLLM by name; those inside a table too, of which vLLM drops some
    without a word."""
    from vllm.config import (
        AttentionConfig,
        CompilationConfig,
        ProfilerConfig,
        StructuredOutputsConfig,
    )
    from vllm.engine.arg_utils import EngineArgs

    tables = dict(
        attention_config=AttentionConfig,
        compilation_config=CompilationConfig,
        profiler_config=ProfilerConfig,
        structured_outputs_config=StructuredOutputsConfig,
    )
    given = read(text)
    check_names("vllm", given, EngineArgs)
    for name, table in tables.items():
        if isinstance(given.get(name), dict):
            check_names(f"vllm: {name}", given[name], table)
    return given


def check_names(where, given, table):
    """Leave in one line at the first key that is no field of a dataclass."""
    names = [field.name for field in dataclasses.fields(table)]
    for name in given:
        if name not in names:
            die(f"{where}: unknown option {name!r}{did_you_mean(name, names)}")


def refuse_start(cfg, error):
    """One line on why vLLM did not start, and exit code 2."""
    own = f" with {cfg.vllm}" if cfg.vllm else ""
    advice = (
        f"try a smaller vllm_memory = {cfg.vllm_memory}, a smaller max_tokens = {cfg.max_tokens} "
        f"or a larger tensor_parallel = {cfg.tensor_parallel}"
    )
    if cfg.vllm:
        advice = f"change vllm, or {advice}"
    die(f"vLLM did not start{own}: {said(error)}; {advice}")


def said(error):
    """What an error of vLLM's says, in one line; of pydantic's the first one."""
    try:
        first = error.errors()[0]
    except (AttributeError, IndexError):
        return one_line(error)
    message = first["msg"].removeprefix("Value error, ")
    if first["loc"]:  # else it is about several, and the input is all of them
        place = ".".join(map(str, first["loc"]))
        message = f"{place} = {first['input']!r}: {message}"
    return one_line(message)
