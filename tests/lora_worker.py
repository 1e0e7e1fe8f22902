"""
What of LoRA must be the same on one rank and on two; test_lora.py starts it with forks.py.

    lora_worker.py gradient MODEL OUT    gradients of one optimizer step, log-probs on and off
    lora_worker.py parity MODEL OUT      vLLM against the trainer after several syncs of the weights
    lora_worker.py bf16 MODEL OUT        a frozen bf16 base under fp32 adapters, as on a GPU
"""

import dataclasses
import itertools
import os
import sys
from functools import partial

os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch
import torch.distributed as dist
import worker
from worker import full, make_groups

import lad
from harness import lora
from harness.ranks import set_whole, whole

RANK = 4
# (objective, rank): on two ranks a matrix A of rank 1 leaves one of them without a row
GRADIENTS = [("grpo", RANK), ("flowrl", RANK), ("lad", 1)]
# How a minibatch is split: (micro_tokens, recomputed activations)
SPLITS = [(10**6, False), (40, True)]


def trained_by_now(model, device):
    """Adapters as after some training: B is no longer zero. The same on all ranks."""
    generator = torch.Generator().manual_seed(1)
    for layer in lora.layers(model).values():
        b = 0.02 * torch.randn(layer.lora_B.shape, generator=generator)
        set_whole(layer.lora_B, b, device)


def my_samples(model):
    """This rank's share of worker.py's samples."""
    groups = make_groups(model.config.vocab_size)[dist.get_rank() :: dist.get_world_size()]
    samples = [s for group in groups for s in group]
    for s in samples:
        s["old"] = torch.tensor(s["behaviour"]) + torch.tensor(s["drift"])
        s["ref"] = torch.tensor(s["behaviour"]) + torch.tensor(s["lift"])
    return samples


def gradient(folder, out, cfg, device):
    results = {}
    for (objective, rank), (micro, recomputed) in itertools.product(GRADIENTS, SPLITS):
        defaults = lad.OBJECTIVES[objective].defaults
        changes = dict(objective=objective, lora_rank=rank, micro_tokens=micro)
        changes["checkpointing"] = recomputed
        now = dataclasses.replace(cfg, **defaults | changes)
        model = lad.build_model(folder, now, device)
        trained_by_now(model, device)
        samples = my_samples(model)
        lad.accumulate_gradient(model, samples, now, device)
        trained = {}
        for name, p in model.named_parameters():
            if p.requires_grad:
                trained[name] = (whole(p.detach()).clone(), full(p.grad))
            else:
                assert p.grad is None, name
        results[objective, micro] = trained
    if dist.get_rank() == 0:
        torch.save(results, out)


def bf16(folder, out, cfg, device):
    """As on a GPU, but for the GPU: the base rests in bf16, FSDP computes in it and reduces in
    fp32."""
    from torch.distributed import fsdp

    lora.base_type = lambda cfg, device: torch.bfloat16
    halves = dict(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fsdp.MixedPrecisionPolicy = partial(fsdp.MixedPrecisionPolicy, **halves)
    cfg = dataclasses.replace(cfg, objective="flowrl", aggregation="sequence")
    model = lad.build_model(folder, cfg, device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)

    types = {}  # what rests in which type
    for name, p in model.named_parameters():
        types.setdefault(p.dtype, set()).add(name)
    before = {name: full(p) for name, p in model.named_parameters()}
    samples = my_samples(model)
    with lora.switched_off(model):
        lad.score_samples(model, "off", samples, cfg, device)
    lad.score_samples(model, "on", samples, cfg, device)
    equal = all(torch.equal(s["off"], s["on"]) for s in samples)
    norms = []
    for _ in range(2):
        lad.accumulate_gradient(model, samples, cfg, device)
        norms.append(lad.optimizer_step(model, optimizer, cfg))
    moved = [name for name, p in model.named_parameters() if not torch.equal(full(p), before[name])]
    merged = dict(lad.named_weights(model, torch.bfloat16))
    if dist.get_rank() == 0:
        report = dict(types=types, equal=equal, norms=norms, moved=moved, merged=merged)
        torch.save(dict(report, before=before), out)


TASKS = dict(gradient=gradient, parity=worker.parity, bf16=bf16)


def main(argv):
    worker.main(argv, TASKS, lora_rank=RANK)


if __name__ == "__main__":
    main(sys.argv[1:])
