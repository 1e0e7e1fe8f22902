"""Which models the trainer computes as transformers does, and which it refuses; what stops a run
whose trainer and vLLM compute different models."""

import dataclasses
import math

import pytest

import lad

# ==== 1. The guard ==============================================================================


@pytest.mark.parametrize("kl", [0.11, 12.0, math.nan, math.inf])
def test_distance_over_the_bound_stops_in_one_line(kl, capsys):
    with pytest.raises(SystemExit) as stop:
        lad.check_agreement(lad.Config(), 1, kl)
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.count("\n") == 1
    assert "step 1: vLLM and the trainer are" in said
    assert "nothing was trained" in said


@pytest.mark.parametrize("bound, kl", [(0.1, 0.1), (0.1, 1e-13), (0.0, 5.0), (0.0, math.nan)])
def test_agreement_or_a_bound_of_zero_goes_on(bound, kl):
    lad.check_agreement(dataclasses.replace(lad.Config(), max_rollout_kl=bound), 1, kl)


def test_a_run_with_other_weights_in_vllm_stops_before_its_first_step(forks, tiny, tmp_path):
    """vLLM is given weights that are not the trainer's: the run ends with exit code 2, without a
    line of a training step and without an optimizer step."""
    patch = """
named_weights = lad.named_weights
def wrong(model, dtype):
    for name, p in named_weights(model, dtype):
        yield name, p * 3 if "down_proj" in name else p
def step(*args):
    print("STEPPED", flush=True)
lad.named_weights = wrong
lad.optimizer_step = step"""
    out = tmp_path / "run"
    flags = [
        "--config",
        "tiny",
        "--steps",
        1,
        "--eval_data",
        "",
        "--prompts",
        4,
        "--minibatches",
        1,
    ]
    said = forks.run("lad.py", *flags, "--out", out, patch=[patch], code=2)
    assert said.count("error: step 1: vLLM and the trainer are") == 1, said[-3000:]
    assert "STEPPED" not in said
    assert not (out / "checkpoints").exists()
