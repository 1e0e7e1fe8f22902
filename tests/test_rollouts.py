"""Rollouts on the CPU: prompts that are computed once for their group, and how responses end."""

import json
import shutil

import pytest
import torch

import lad


@pytest.mark.slow
def test_shared_prompts_give_the_log_probs_of_prompts_computed_for_each(
    forks, random_model, tmp_path
):
    """Prompts of all lengths around multiples of a block, some of them beginnings of others, with
    too little memory for all of them, after other weights: as lad.py asks, without seeds and with
    prompts computed in parts, and as eval.py asks, with seeds."""
    forks.run("tests/rollouts.py", "caching", random_model, tmp_path / "report.pt")
    report = torch.load(tmp_path / "report.pt")
    assert [sync["seeded"] for sync in report] == [False, True] * 3
    for sync in report:
        assert sync["plain"] < 1e-3, report
        assert sync["trainer"] < 1e-3, report
        assert sync["repeats"], report
        # else the test would show nothing
        assert sync["cached"] > 0, report
        assert sync["preempted"] > 0, report


def test_every_stop_token_of_generation_config_ends_a_response_and_is_trained(
    forks, random_model, tmp_path
):
    folder = tmp_path / "model"
    shutil.copytree(random_model, folder)
    own = json.loads((folder / "config.json").read_text())["eos_token_id"]
    ends = {own, 7, 11}
    written = json.dumps({"eos_token_id": sorted(ends)})
    (folder / "generation_config.json").write_text(written)
    forks.run("tests/rollouts.py", "stops", folder, tmp_path / "samples.pt")
    samples = torch.load(tmp_path / "samples.pt")

    seen = set()
    for s in samples:
        # No response goes on behind a stop token, and one that was not cut ends with one
        assert not ends & set(s["tokens"][:-1]), s
        assert s["truncated"] or s["tokens"][-1] in ends, s
        seen |= ends & set(s["tokens"][-1:])
        # Its last token is trained like any other
        assert len(s["behaviour"]) == len(s["tokens"]) == lad.trained_tokens(s)
        batch = lad.pack([dict(s, prompt=[1, 2])], torch.device("cpu"))
        assert batch["targets"].tolist() == s["tokens"]
    # 128 responses of up to 24 tokens out of 24: else the test would show nothing
    assert seen == ends
