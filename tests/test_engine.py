"""What vLLM is asked for on a GPU, as far as a CPU can show it: seeds of requests, the size of the
KV cache; and weights that rest in the CPU's memory."""

import dataclasses

import pytest

import lad
from harness import families

CFG = dataclasses.replace(lad.Config(), seed=3)


# ==== 1. Seeds ==================================================================================


def all_seeds(monkeypatch, world, tensor_parallel, step=1, use=0, rows=12):
    """{place of a row: its seed}, put together from all engines of so many ranks."""
    monkeypatch.setattr(lad, "world", lambda: world)
    cfg = dataclasses.replace(CFG, tensor_parallel=tensor_parallel)
    found = {}
    for first in range(0, world, tensor_parallel):
        # the order in which rollout() hands its rows over
        places = [p for r in range(first, first + tensor_parallel) for p in range(r, rows, world)]
        seeds = lad.row_seeds(cfg, rows, first, step, use)
        found.update(zip(places, seeds, strict=True))
    return found


def test_a_rows_seed_depends_on_its_place_alone(monkeypatch):
    alone = all_seeds(monkeypatch, 1, 1)
    assert sorted(alone) == list(range(12)) and len(set(alone.values())) == 12
    assert alone == all_seeds(monkeypatch, 4, 1) == all_seeds(monkeypatch, 4, 2)
    others = [all_seeds(monkeypatch, 1, 1, step=2), all_seeds(monkeypatch, 1, 1, use="eval")]
    assert not set(alone.values()) & {seed for seeds in others for seed in seeds.values()}
    # vLLM gives the i-th response seed + i, in a signed 64-bit number
    ordered = sorted(alone.values())
    assert all(b - a > 1000 for a, b in zip(ordered, ordered[1:], strict=False))
    assert 0 <= ordered[0] and ordered[-1] < 2**62


def test_with_seeds_the_order_of_requests_changes_nothing(forks, random_model):
    """Two prompts alone and in the other order among others: the same tokens. (Without them, the
    process's generator is drawn from in the order in which requests are scheduled.)"""
    forks.run("tests/worker.py", "seeds", random_model, "-")


# ==== 2. Memory =================================================================================


def test_the_kv_cache_is_what_the_share_leaves(random_model, capsys):
    """vllm_memory of the card, less the bf16 weights, less 2 GiB; and not less than nothing."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(random_model)
    weights = sum(p.numel() for p in model.parameters())
    assert families.elements_in(random_model) == weights
    cache = lad.kv_cache_bytes(dataclasses.replace(CFG, vllm_memory=0.5), random_model, 80 * 2**30)
    assert cache == 40 * 2**30 - 2 * weights - 2 * 2**30
    with pytest.raises(SystemExit):
        lad.kv_cache_bytes(dataclasses.replace(CFG, vllm_memory=0.02), random_model, 80 * 2**30)
    assert "leaves no KV cache" in capsys.readouterr().err


def test_offloaded_weights_are_streamed_and_exported_as_they_are(forks, random_model, tmp_path):
    """The worker compares each with transformers'. On CUDA they go over the GPU; here the mesh is
    the CPU."""
    patch = """
import dataclasses
build = lad.build_model
def offloaded(folder, cfg, device):
    return build(folder, dataclasses.replace(cfg, offload=True), device)
lad.build_model = offloaded"""
    forks.run("tests/worker.py", "load", random_model, tmp_path, ranks=2, patch=[patch])
