"""Checkpoints of many files: read as they were written, and little of the host's memory."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import lad
from harness import checkpoint

MIB = 2**20


@pytest.fixture
def alone():
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def make_model(seed, width):
    """A model of 8 layers and its optimizer, with moments."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(*[torch.nn.Linear(width, width) for _ in range(8)])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    return model, optimizer


def save(out, model, optimizer):
    cfg = dataclasses.replace(lad.Config(), out=str(out), device="cpu")
    (out / "checkpoints").mkdir(parents=True, exist_ok=True)
    progress = dict(step=1, state={}, position=0, skipped=0)
    assert checkpoint.save(cfg, model, optimizer, None, progress)
    return cfg, out / "checkpoints" / "step_1"


def test_pieces_are_read_as_they_were_written(tmp_path, alone, monkeypatch):
    monkeypatch.setattr(checkpoint, "PIECE", 2000)  # bytes; a weight has 1,024, a bias 64
    model, optimizer = make_model(0, 16)
    cfg, path = save(tmp_path, model, optimizer)
    assert len(list(path.glob("*.safetensors"))) == 14  # 26,112 bytes

    other, its_optimizer = make_model(1, 16)
    found = (path, checkpoint.read_state(path))
    checkpoint.load(cfg, found, other, its_optimizer, None)
    want = checkpoint.tensors_of(model, optimizer, None)
    got = checkpoint.tensors_of(other, its_optimizer, None)
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_a_tensor_larger_than_a_piece_leaves_no_number_out(monkeypatch):
    monkeypatch.setattr(checkpoint, "PIECE", 100)
    sizes = dict(a=10, b=100, c=1, d=1)  # of 4 bytes each
    tensors = {name: torch.zeros(size) for name, size in sizes.items()}
    assert checkpoint.pieces(tensors) == dict(a=1, b=1, c=2, d=2)


def highest_memory():
    """The most that this process has had resident, in bytes, since reset_memory()."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def reset_memory():
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("the kernel does not let the highest memory be reset")


def test_memory_of_the_host(tmp_path, alone, monkeypatch):
    """What is saved, here in the host's memory itself, and at most a fifth beside it."""
    monkeypatch.setattr(checkpoint, "PIECE", 8 * MIB)
    model, optimizer = make_model(0, 1024)  # 96 MiB with its moments
    save(tmp_path, model, optimizer)  # whatever is imported
    reset_memory()
    before = highest_memory()
    _, path = save(tmp_path, model, optimizer)
    written = sum(file.stat().st_size for file in path.iterdir())
    assert written > 96 * MIB
    assert highest_memory() - before < 0.2 * written + 8 * MIB  # the allocator's own
