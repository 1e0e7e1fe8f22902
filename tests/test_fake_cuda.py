"""A training step on fake GPUs (fake_ranks.py): no hidden wait, the right types, no tensor of
tokens x vocabulary, no more sent than FSDP must send."""

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

QWEN_7B, QWEN_32B = "Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-32B"

# Two blocks of a model: its others are like them
QUICK = {
    "lad, the defaults": dict(model=QWEN_7B, gpus=8, layers=2, steps=2, flags=[]),
    "fade, groups of 8 ranks": dict(
        model=QWEN_32B,
        gpus=64,
        layers=2,
        flags="--objective fade --shard_size 8 --checkpointing false --reduce_each true".split(),
    ),
    "flowrl, prompts that are shared": dict(
        model=QWEN_7B, gpus=64, layers=2, micro=1, flags="--objective flowrl".split()
    ),
    "LoRA and offload": dict(
        model=QWEN_7B,
        gpus=8,
        layers=2,
        flags="--objective grpo --kl_coef 0.1 --lora_rank 16 --offload true".split(),
    ),
}


def run(cases):
    """{name: report} of {name: case}, all in one process."""
    command = [sys.executable, "tests/fake_ranks.py", json.dumps(list(cases.values()))]
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-4000:]
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    return dict(zip(cases, reports, strict=True))


@pytest.fixture(scope="module")
def quick():
    return run(QUICK)


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


def test_no_more_is_sent_than_fsdp_must(quick):
    """Weights once for each forward and once for each backward, the root's only for the former;
    gradients once."""
    case = QUICK["lad, the defaults"]
    report = quick["lad, the defaults"]
    _, shape = config_and_shape(case)
    P, block = plan.parameters(shape)
    blocks, micro = shape.layers, 2
    calls, sent = report["calls"]["gradient"], report["bytes"]["gradient"]
    assert calls == {"all-gather": micro * (2 * blocks + 1), "reduce-scatter": blocks + 1}
    # to the byte, but for what fills the last rank's shard
    assert sent["all-gather"] == pytest.approx(micro * 2 * (P + blocks * block), rel=1e-3)
    assert sent["reduce-scatter"] == pytest.approx(4 * P, rel=1e-3)
    assert report["calls"]["optimizer"] == {"all-reduce": 1}  # the norm
