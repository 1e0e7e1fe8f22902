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
    assert aggregation_of("--ratio", "mean") == "sequence"
    for name in ("flowrl", "gflowrl", "oapl", "gspo", "sapo"):
        assert aggregation_of("--objective", name) == "sequence"
    assert aggregation_of("--objective", "dr_grpo") == "constant"
    assert aggregation_of("--objective", "dr_grpo", "--ratio", "sequence") == "sequence"
    preset = tmp_path / "preset.toml"
    preset.write_text('ratio = "sequence"\n')
    assert aggregation_of("--config", str(preset)) == "sequence"


@pytest.mark.parametrize("aggregation", ["token", "constant"])
@pytest.mark.parametrize(
    "flags",
    [
        ["--ratio", "sequence"],
        ["--ratio", "mean"],
        ["--objective", "flowrl"],
        ["--objective", "gspo"],
        ["--objective", "oapl"],
    ],
)
def test_a_loss_of_sequences_is_not_counted_once_a_token(capsys, flags, aggregation):
    line = refused(capsys, *flags, "--aggregation", aggregation)
    assert f"aggregation = {aggregation} would count a loss of whole sequences" in line
    assert "say aggregation = sequence" in line
    assert aggregation_of(*flags, "--aggregation", "sequence") == "sequence"


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--objective gspo --ratio token", "ratio = token: gspo is defined with ratio = mean"),
        ("--objective cispo --ratio mean", "ratio = mean: cispo is defined with ratio = token"),
        ("--objective sapo --ratio sequence", "sapo is defined with ratio = token"),
        ("--objective dppo_tv --ratio mean", "dppo_tv is defined with ratio = token"),
        ("--objective dppo_kl --ratio sequence", "dppo_kl is defined with ratio = token"),
        ("--objective distill --reference x --ratio mean", "distill is defined with ratio = token"),
        ("--objective distill", "name the teacher with --reference"),
        ("--objective grpo --reference x", "grpo reads no reference unless kl_coef > 0"),
        ("--objective distill --reference x --ref_every 5", "ref_every = 5 would overwrite"),
        ("--tis_floor 0.5", "tis_floor = 0.5 is read by a mask alone"),
        ("--tis_floor 0.5 --tis_mode sequence_truncate", "tis_floor = 0.5 is read by a mask alone"),
        ("--tis_floor 2 --tis_mode token_mask", "tis_floor = 2.0 leaves nothing below tis_cap = 2"),
        ("--tis_floor 0.5 --tis_mode token_mask --tis_cap 0", "leaves nothing below tis_cap = 0"),
        ("--overlong shape --overlong_buffer 99 --max_tokens 50", "overlong_buffer = 99 is more"),
    ],
)
def test_an_objective_without_what_makes_it_is_refused(capsys, flags, says):
    assert says in refused(capsys, *flags.split())


def test_objectives_bring_what_makes_them():
    gspo = lad.load_config(["--objective", "gspo"])
    assert (gspo.ratio, gspo.clip_low, gspo.clip_high) == ("mean", 3e-4, 4e-4)
    dapo = lad.load_config(["--objective", "dapo", "--config", "tiny"])
    assert (dapo.zero_variance, dapo.overlong, dapo.aggregation) == ("refill", "shape", "token")
    assert (dapo.clip_low, dapo.clip_high, dapo.kl_coef) == (0.2, 0.28, 0.0)
    assert lad.load_config(["--objective", "oapl"]).tis_cap == 0
    assert lad.load_config(["--objective", "dppo_kl"]).dppo_delta == 0.05
    with_kl = lad.load_config(["--objective", "grpo", "--kl_coef", "0.1", "--reference", "x"])
    assert with_kl.reference == "x"


def test_the_overlong_buffer_is_a_fifth_unless_told_otherwise():
    cfg = lad.Config(max_tokens=100)
    assert [lad.overlong_penalty(n, cfg) for n in (80, 90, 100)] == pytest.approx([0, 0.25, 0.5])
    cfg = lad.Config(max_tokens=100, overlong_buffer=50)
    assert [lad.overlong_penalty(n, cfg) for n in (50, 75, 100)] == pytest.approx([0, 0.25, 0.5])


LEARN_FROM_EQUAL = {"lad", "lad_anchor", "reinforce", "w_reinforce", "flowrl"}
LEARN_FROM_EQUAL |= {"gflowrl", "oapl", "distill"}


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
    if objective == "distill":
        argv += ["--reference", "teacher"]
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
    "when",
    [
        pytest.param("n % 2", id="one in a batch"),
        pytest.param("n not in (5, 6)", id="two batches, twice", marks=pytest.mark.slow),
    ],
)
def test_a_run_with_a_step_now_and_then_goes_on(forks, tmp_path, when):
    """No three batches in a row without a step: one gradient of each batch is finite, or the third
    batch's."""
    out = tmp_path / "run"
    forks.run("lad.py", *SMALL, "--out", out, patch=[SPOIL.format(when=when)])
    skipped = {"n % 2": [1, 2, 3, 4, 5], "n not in (5, 6)": [2, 4, 4, 6, 8]}[when]
    assert [line["skipped"] for line in trained(out)] == skipped
