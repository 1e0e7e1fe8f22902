"""--reference: another model than the starting one to measure KL from, or to learn from."""

import dataclasses
import json
import shutil

import pytest
import torch
from conftest import metrics
from test_crossing import Table, expected_gradient, plainly
from test_run import SHORT

import lad
from harness.data import find_reference, load_tokenizer


def test_the_reference_is_the_starting_model_unless_named(tiny, random_model):
    tokenizer = load_tokenizer(tiny["model"])
    cfg = lad.Config(model=str(tiny["model"]))
    assert find_reference(cfg, "folder", tokenizer) == "folder"
    cfg = dataclasses.replace(cfg, reference=str(random_model))
    assert find_reference(cfg, "folder", tokenizer) == str(random_model)


def test_a_reference_with_other_tokens_is_refused(tiny, random_model, tmp_path, capsys):
    folder = shutil.copytree(random_model, tmp_path / "other")
    path = folder / "tokenizer.json"
    words = json.loads(path.read_text())
    vocabulary = words["model"]["vocab"]
    a, b = "1", "2"
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    path.write_text(json.dumps(words))
    cfg = lad.Config(model=str(tiny["model"]), reference=str(folder))
    with pytest.raises(SystemExit) as leaving:
        find_reference(cfg, "folder", load_tokenizer(tiny["model"]))
    said = capsys.readouterr().err
    assert leaving.value.code == 2 and said.count("\n") == 1
    assert f"reference = {folder}: its tokenizer is not that of" in said


def test_distillation_from_a_model_of_another_shape(forks, random_model, tmp_path):
    """Through vLLM, with weights of whole responses; the teacher is half as wide, and untied."""
    out = tmp_path / "run"
    flags = ["--objective", "distill", "--reference", random_model, "--tis_mode", "sequence_mask"]
    forks.run("lad.py", *SHORT, "--steps", 2, "--eval_data", "", "--out", out, *flags)
    train = metrics(out)
    assert [x["step"] for x in train] == [1, 2]
    for x in train:
        assert x["grad_norm"] > 0 and x["mass_success"] == x["mass_failure"] == 0
        assert x["kl"] > 0.1 and x["tis_mean"] == pytest.approx(1, abs=0.01)


def test_distillation_has_the_gradient_of_the_reverse_kl():
    """Its expectation is that of KL(pi_theta || pi_ref) of the next token, summed over the
    beginnings of responses, each with the probability that the policy gets there."""
    cfg = plainly("distill", ratio="token", aggregation="constant")
    teacher = Table(5)

    def prepare(samples):
        for s in samples:
            s["ref"] = teacher.of(s["tokens"])[0].detach()
            s["adv"] = 0.0

    got = expected_gradient(cfg, prepare, G=1)

    student = Table(4)
    rows = student.logits.log_softmax(-1)  # of the beginnings (), (1,) and (2,)
    kl = (rows.exp() * (rows - teacher.logits.detach().log_softmax(-1))).sum(-1)  # [3]
    reached = torch.ones(3, dtype=torch.float64)
    reached[1:] = rows[0, 1:].exp().detach()
    (kl @ reached).backward()
    denominator = cfg.max_tokens * cfg.prompts * cfg.group
    torch.testing.assert_close(got, student.logits.grad / denominator, rtol=1e-6, atol=1e-9)
