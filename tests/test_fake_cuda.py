"""A training step on fake GPUs (fake_ranks.py): no hidden wait, the right types, no tensor of
tokens x vocabulary, no more sent than FSDP must send, and memory as tools/plan.py says."""

import dataclasses
import json
import subprocess
import sys

import fake_cuda
import pytest
from conftest import ENV, ROOT

import lad
from tools import plan

pytestmark = pytest.mark.skipif(not fake_cuda.compiler(), reason="needs a C++ compiler, g++")

GIB = plan.GIB
QWEN_7B, QWEN_32B = "Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-32B"

# Two blocks of a model: its others are like them
QUICK = {
    "lad, the defaults": dict(model=QWEN_7B, gpus=8, layers=2, flags=[]),
    "fade, groups of 8 ranks": dict(
        model=QWEN_32B,
        gpus=64,
        layers=2,
        flags="--objective fade --shard_size 8 --checkpointing false --track_change true".split(),
    ),
    "flowrl, prompts that are shared": dict(
        model=QWEN_7B, gpus=64, layers=2, micro=1, flags="--objective flowrl".split()
    ),
    "LoRA": dict(
        model=QWEN_7B,
        gpus=8,
        layers=2,
        flags="--objective grpo --kl_coef 0.1 --lora_rank 16".split(),
    ),
    "offload, small chunks": dict(
        model=QWEN_32B,
        gpus=8,
        layers=3,  # only then is one gathered while another's gradients are on their way
        flags="--objective grpo --offload true --head_chunk 1024".split(),
    ),
    "gradients that meet once": dict(
        model=QWEN_7B, gpus=8, layers=2, flags="--objective asym --reduce_each false".split()
    ),
}


def run(cases):
    """{name: report} of {name: case}, all in one process."""
    command = [sys.executable, "tests/fake_ranks.py", json.dumps(list(cases.values()))]
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-4000:]
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    return dict(zip(cases, reports, strict=True))


ENGINES = {
    "engine": dict(engine=True, model=QWEN_7B, gpus=8, layers=2, flags=[]),
    "engine, offload": dict(
        engine=True, model=QWEN_7B, gpus=8, layers=2, flags=["--offload", "true"]
    ),
}
HEADS = {chunk: dict(head=[8192, 1024, 50_000, chunk]) for chunk in (512, 1024)}


@pytest.fixture(scope="module")
def quick():
    return run(QUICK | ENGINES | HEADS)


def config_and_shape(case):
    cfg = lad.load_config(["--model", case["model"], *case["flags"]])
    shape = plan.read_shape(case["model"])
    return cfg, dataclasses.replace(shape, layers=case.get("layers", shape.layers))


def check_step(case, report):
    """What is true of a step with any objective and any settings."""
    cfg, shape = config_and_shape(case)

    # Python waits for the device when a minibatch is over, and nowhere in a micro-batch, whose
    # number is 2 here. The log's means are 6 numbers and the largest ratio is one
    waits = report["waits"]
    assert waits["score"] == {}
    if cfg.offload:  # where FSDP itself waits for a gradient, to add it to another
        assert set(waits["gradient"]) == {"accumulate_gradient"}
        assert waits["optimizer"] == {}
    else:
        assert waits["gradient"] == {"accumulate_gradient": len(lad.STATS)}
        assert waits["optimizer"] == {"optimizer_step": 1}

    # Masters, gradients and moments in fp32. Weights that are frozen, in what is computed with
    assert report["trained"] == report["gradients"] == report["moments"] == ["float32"]
    frozen = ["bfloat16"] if cfg.lora_rank else []
    assert report["weights"] == frozen + ["float32"]

    # Logits of a chunk, at most
    assert 0 < report["logit_rows"] <= 4096 < cfg.micro_tokens


@pytest.mark.parametrize("name", QUICK)
def test_a_step(quick, name):
    check_step(QUICK[name], quick[name])


@pytest.mark.slow
@pytest.mark.parametrize("model,gpus", [(QWEN_7B, 8), (QWEN_32B, 64)])
def test_a_step_of_every_objective(model, gpus):
    cases = {}
    for objective in lad.OBJECTIVES:
        flags = ["--objective", objective]
        if objective == "distill":
            flags += ["--reference", model]
        cases[objective] = dict(model=model, gpus=gpus, layers=2, flags=flags)
    for name, report in run(cases).items():
        check_step(cases[name], report)


@pytest.mark.parametrize("name", QUICK)
def test_no_more_is_sent_than_fsdp_must(quick, name):
    """Weights once for each forward and once for each backward, the root's only for the former.
    Gradients once for each micro-batch, or once; with their twins in other groups once."""
    case, report = QUICK[name], quick[name]
    cfg, shape = config_and_shape(case)
    P, block = plan.parameters(shape)
    blocks, micro = shape.layers, case.get("micro", 2)
    calls, sent = report["calls"]["gradient"], report["bytes"]["gradient"]
    if "log_z" in lad.OBJECTIVES[cfg.objective].needs:
        P += 2 * shape.hidden**2
    if cfg.lora_rank:
        P += plan.adapters(cfg, shape)
        block += plan.adapters(cfg, shape) / blocks

    # To the byte, but for what fills the last rank's shard
    assert calls["all-gather"] == micro * (2 * blocks + 1)
    assert sent["all-gather"] == pytest.approx(micro * 2 * (P + blocks * block), rel=1e-3)

    times = micro if cfg.reduce_each or cfg.offload else 1
    units, trained = blocks + 1, P
    if cfg.lora_rank:
        units, trained = blocks, plan.adapters(cfg, shape)
    assert calls["reduce-scatter"] == times * units
    assert sent["reduce-scatter"] == pytest.approx(times * 4 * trained, rel=1e-3)
    groups = case["gpus"] // (cfg.shard_size or case["gpus"])
    assert calls.get("all-reduce", 0) == (units if groups > 1 else 0)

    assert report["calls"]["optimizer"] == {"all-reduce": 1}  # the norm


@pytest.mark.parametrize("name", ENGINES)
def test_what_vllm_is_asked_for(quick, name):
    report = quick[name]
    _, shape = config_and_shape(ENGINES[name])
    P, _ = plan.parameters(shape)

    # The trainer's peak begins when vLLM sleeps; its cache comes when the weights are over
    asleep = ["sleep 2", "reset peak"]
    pushed = ["wake weights", "reload_weights", "wake kv_cache", "reset prefix cache", "generate"]
    assert report["asked"] == asleep + pushed + asleep

    # Logits in fp32; a KV cache of a size that we know
    assert report["settings"]["hf_overrides"] == "{'head_dtype': 'float32'}"
    cache = int(0.6 * 80 * GIB - 2 * P - lad.VLLM_OWN)
    assert report["settings"]["kv_cache_memory_bytes"] == str(cache)

    # Cast before they are gathered, on the GPU wherever they rest
    assert report["given"] == ["bfloat16 cuda"]
    assert report["bytes"]["all-gather"] == pytest.approx(2 * P, rel=1e-3)


def test_bytes_of_the_head(quick):
    """Of a logit as largest_chunk() and the plan assume; beside them both gradients, and not the
    weight's twice."""
    _, H, V, _ = HEADS[512]["head"]
    small, large = (quick[chunk]["peak"] for chunk in HEADS)
    assert (large - small) / (512 * V) == pytest.approx(lad.LOGIT_BYTES, rel=1e-3)
    assert lad.LOGIT_BYTES == plan.LOGIT_BYTES
    gradients = 2 * 8192 * H + 4 * V * H
    assert small - lad.LOGIT_BYTES * 512 * V == pytest.approx(gradients, rel=0.01)


def check_memory(case, report):
    """The plan, less what is assumed to lie outside of torch's allocator, within 5%."""
    cfg, shape = config_and_shape(case)
    chunk = min(cfg.head_chunk or 4096, cfg.micro_tokens)
    batch = dict(micro=case.get("micro", 2), N=cfg.micro_tokens, C=chunk)
    r = plan.training_bytes(cfg, shape, case["gpus"], batch, cpu=False)
    planned = r["resident"] - plan.ASSUMPTIONS["overhead"] + r["update"]
    assert planned == pytest.approx(max(report["peaks"].values()), rel=0.05)


@pytest.mark.parametrize("name", QUICK)
def test_memory_is_as_planned(quick, name):
    check_memory(QUICK[name], quick[name])


def test_7b_on_8_gpus_of_80_gib():
    """With the defaults, and what is assumed beside torch's allocator: half of a GPU."""
    model = "Qwen/Qwen2.5-7B"
    r = plan.estimate(
        lad.load_config(["--model", model]), plan.read_shape(model), 8, 80 * GIB, 4096
    )
    assert r["fits"] and r["training"] < 40 * GIB


@pytest.mark.slow
def test_memory_of_whole_models_is_as_planned():
    """And the count is torch's own, where that can count."""
    defaults = dict(model=QWEN_7B, gpus=8, flags=[])
    cases = {
        "7B": defaults,
        "once": dict(defaults, micro=1, layers=4, again=True),
        "70B": dict(model="meta-llama/Meta-Llama-3-70B", gpus=64, flags=[]),
        "CWM": dict(model="facebook/cwm-sft", gpus=32, layers=4, flags=["--objective", "fade"]),
    }
    reports = run(cases)
    for name, report in reports.items():
        check_step(cases[name], report)
        check_memory(cases[name], report)
    assert max(reports["7B"]["peaks"].values()) < 37 * GIB
    assert reports["once"]["by_torch"] == reports["once"]["peaks"]["gradient"]
