"""What lad.py refuses, notes, brings along and shares out: settings that contradict each other,
groups over ranks, a run whose gradients are none."""

import pytest
import torch
from conftest import metrics
from test_config import refused

import lad
from harness import checkpoint

# ==== Settings that belong together =============================================================


def aggregation_of(*argv):
    return lad.load_config(argv).aggregation


def test_a_loss_of_sequences_brings_its_aggregation(tmp_path):
    assert aggregation_of() == "token"
    assert aggregation_of("--ratio", "sequence") == "sequence"
    assert aggregation_of("--objective", "flowrl") == "sequence"
    assert aggregation_of("--objective", "dr_grpo") == "constant"
    assert aggregation_of("--objective", "dr_grpo", "--ratio", "sequence") == "sequence"
    preset = tmp_path / "preset.toml"
    preset.write_text('ratio = "sequence"\n')
    assert aggregation_of("--config", str(preset)) == "sequence"


@pytest.mark.parametrize("aggregation", ["token", "constant"])
@pytest.mark.parametrize("flags", [["--ratio", "sequence"], ["--objective", "flowrl"]])
def test_a_loss_of_sequences_is_not_counted_once_a_token(capsys, flags, aggregation):
    line = refused(capsys, *flags, "--aggregation", aggregation)
    assert f"aggregation = {aggregation} would count a loss of whole sequences" in line
    assert "say aggregation = sequence" in line
    assert aggregation_of(*flags, "--aggregation", "sequence") == "sequence"


LEARN_FROM_EQUAL = {"lad", "lad_anchor", "reinforce", "w_reinforce", "flowrl"}


@pytest.mark.parametrize("zero_variance", ["keep", "drop", "refill"])
@pytest.mark.parametrize("objective", lad.OBJECTIVES)
def test_note_on_groups_of_equal_rewards(objective, zero_variance, monkeypatch, capsys):
    """main, up to where it looks for the model."""

    class Enough(Exception):
        pass

    def stop(cfg):
        raise Enough

    def do_nothing(*args):
        pass

    monkeypatch.setattr(lad, "join", do_nothing)
    monkeypatch.setattr(lad, "claim", do_nothing)
    monkeypatch.setattr(lad, "find_model", stop)
    argv = ["--config", "tiny", "--objective", objective, "--zero_variance", zero_variance]
    with pytest.raises(Enough):
        lad.main(argv)
    want = ""
    if objective in LEARN_FROM_EQUAL and zero_variance != "keep":
        want = (
            f"note      {objective} learns from groups of equal rewards too, which zero_variance = "
            f"{zero_variance} leaves out\n"
        )
    assert capsys.readouterr().out == want


# ==== Groups over ranks =========================================================================


def shares(counts, wanted, monkeypatch):
    """What each rank keeps, where rank r has counts[r] groups."""
    kept = []
    for r in range(len(counts)):

        def all_reduce(values, r=r):
            assert values == [n if i == r else 0 for i, n in enumerate(counts)]
            return [float(n) for n in counts]

        monkeypatch.setattr(lad, "world", lambda: len(counts))
        monkeypatch.setattr(lad, "rank", lambda r=r: r)
        monkeypatch.setattr(lad, "all_reduce", all_reduce)
        kept.append(lad.even_share(counts[r], wanted))
    return kept


@pytest.mark.parametrize("wanted", [1, 4, 7, 8, 100])
@pytest.mark.parametrize(
    "counts", [[5], [4, 4], [0, 9], [9, 0], [7, 1, 2], [0, 0, 0], [2, 9, 9, 1], [3, 3, 3, 3]]
)
def test_ranks_keep_as_many_groups_as_are_wanted_as_evenly_as_they_can(counts, wanted, monkeypatch):
    kept = shares(counts, wanted, monkeypatch)
    assert sum(kept) == min(wanted, sum(counts))
    for mine, have in zip(kept, counts, strict=True):
        assert 0 <= mine <= have
        if max(kept) > mine + 1:  # who keeps less than the others has no more
            assert mine == have


# ==== Gradients that are none ===================================================================

SMALL = ["--config", "tiny", "--steps", 5, "--prompts", 4, "--group", 4, "--max_tokens", 8]
SMALL += ["--minibatches", 2, "--epochs", 1, "--eval_every", 0, "--eval_prompts", 4]
SMALL += ["--eval_samples", 2, "--checkpoint_every", 0]
# From here on the nth gradient of the run, n = 1, 2, .., is not finite where {when}
SPOIL = """
from itertools import count
accumulate, numbers = lad.accumulate_gradient, count(1)

def spoilt(model, *rest):
    stats = accumulate(model, *rest)
    n = next(numbers)
    if {when}:
        for p in model.parameters():
            p.grad.mul_(float("nan"))
    return stats

lad.accumulate_gradient = spoilt
"""


def trained(out):
    return [line for line in metrics(out) if "loss" in line]


def test_a_run_without_a_step_stops_and_can_be_resumed(forks, tiny, tmp_path):
    """Three batches of two gradients each, none of them finite."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    out = tmp_path / "barren"
    patch = [SPOIL.format(when=True)]
    printed = forks.run("lad.py", *SMALL, "--out", out, patch=patch, code=2)
    errors = [line for line in printed.splitlines() if ": error: " in line]
    assert len(errors) == 1 and "Traceback" not in printed, printed
    assert "step 3: not one optimizer step of the last 3 batches was taken" in errors[0]
    assert [line["skipped"] for line in trained(out)] == [2, 4, 6]

    # It is saved, with the weights that it had
    [last] = checkpoint.listed(out)
    assert last.name == "step_3"
    saved = load_file(next(last.glob("*.safetensors")))
    start = AutoModelForCausalLM.from_pretrained(tiny["model"])
    for name, p in start.named_parameters():
        assert torch.equal(p, saved[name])

    # And goes on from there, with gradients
    forks.run("lad.py", "--resume", out)
    assert [line["step"] for line in trained(out)] == [1, 2, 3, 4, 5]
    assert [line["skipped"] for line in trained(out)][3:] == [6, 6]
    exported = load_file(out / "hf/model.safetensors")
    assert any(not torch.equal(exported[name], saved[name]) for name in exported)


@pytest.mark.parametrize(
    "when", ["n % 2", "n not in (5, 6)"], ids=["one in a batch", "two batches, twice"]
)
def test_a_run_with_a_step_now_and_then_goes_on(forks, tmp_path, when):
    """No three batches in a row without a step: one gradient of each batch is finite, or the third
    batch's."""
    out = tmp_path / "run"
    forks.run("lad.py", *SMALL, "--out", out, patch=[SPOIL.format(when=when)])
    skipped = {"n % 2": [1, 2, 3, 4, 5], "n not in (5, 6)": [2, 4, 4, 6, 8]}[when]
    assert [line["skipped"] for line in trained(out)] == skipped
