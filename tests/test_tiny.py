"""The offline default: right answers only, disjoint splits, the same bytes twice, and a model that
is neither too good nor too bad."""

import collections
import json
import random
from pathlib import Path

import pytest
import torch

import lad
import verify
from harness import tiny as maker
from harness.metrics import pass_at_k


def files(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(Path(folder).rglob("*"))
        if p.is_file()
    }


def test_every_answer_is_right_and_none_is_missing():
    answers = maker.puzzles()
    for (numbers, target), texts in random.Random(0).sample(sorted(answers.items()), 200):
        assert all(
            verify.countdown_reward(text, {"numbers": list(numbers), "target": target}) == 1.0
            for text in texts
        )
    # 2 3 8 = 14: 2*3 + 8 in every order, and nothing else (by hand)
    assert answers[(2, 3, 8), 14] == sorted(["2*3+8", "3*2+8", "8+2*3", "8+3*2"])
    assert answers[(1, 2, 3), 9] == sorted(
        a for pair in ("1+2", "2+1") for a in (f"({pair})*3", f"3*({pair})")
    )


def test_same_bytes_twice_and_nothing_disturbed(tmp_path, monkeypatch):
    monkeypatch.setattr(maker, "STEPS", 4)
    torch.manual_seed(5), random.seed(5)
    before, threads = (torch.get_rng_state(), random.getstate()), torch.get_num_threads()
    a, b = maker.make(root=tmp_path / "a"), maker.make(root=tmp_path / "b")
    assert (
        torch.equal(torch.get_rng_state(), before[0])
        and random.getstate() == before[1]
        and torch.get_num_threads() == threads
    )
    first, second = files(Path(a["model"]).parent), files(Path(b["model"]).parent)
    assert first == second and any(name.endswith("safetensors") for name in first)
    monkeypatch.setenv("LAD_TINY_SEED", "7")
    monkeypatch.setattr(maker, "build", lambda folder, seed, **_: (folder / f"seed {seed}").touch())
    other = Path(maker.make(root=tmp_path / "a")["model"]).parent
    assert (
        other != Path(a["model"]).parent and (other / "seed 7").exists()
    )  # another seed, by the environment, is another folder


@pytest.mark.parametrize("task", maker.TASKS)
def test_splits(task, tmp_path, monkeypatch):
    """Each task has the puzzles that it says, with as many answers, and none twice."""
    monkeypatch.setattr(maker, "STEPS", 1)
    count, several, train = maker.TASKS[task].values()
    paths = maker.make(task, root=tmp_path)
    keys = {}
    for name in ("train", "test"):
        rows = [json.loads(line) for line in open(paths[name])]
        keys[name] = {(tuple(r["answer"]["numbers"]), r["answer"]["target"]) for r in rows}
        assert all(r["prompt"].count(" ") == count - 1 for r in rows)
    assert len(keys["train"]) == train
    assert len(keys["test"]) == maker.TEST
    assert not keys["train"] & keys["test"]

    answers = maker.puzzles(count)
    assert all(len(answers[key]) >= several for part in keys.values() for key in part)


def test_answers_of_four_numbers():
    """All right by the verifier, none of more tokens than the preset allows, the end included."""
    answers = maker.puzzles(4)
    some = random.Random(0).sample(sorted(answers.items()), 50)
    for (numbers, target), texts in some:
        truth = {"numbers": list(numbers), "target": target}
        assert all(verify.countdown_reward(text, truth) == 1.0 for text in texts)
    longest = max(len(text) for texts in answers.values() for text in texts)
    assert longest + 1 == lad.load_config(["--config", "tiny-hard"]).max_tokens


def test_tokenizer_is_one_token_a_character(tiny):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny["model"])
    text = "1 2 3 = 4 : (5+6)*7-8 90"
    assert (
        len(tokenizer.encode(text)) == len(text)
        and tokenizer.decode(tokenizer.encode(text)) == text
    )
    assert tokenizer.eos_token_id != tokenizer.pad_token_id and len(tokenizer) % 8 == 0


def pass_at(task, *ks):
    """The pass@k of a task's model on its held-out puzzles, of 32 answers each, by transformers'
    own generate."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    paths = maker.make(task)
    tokenizer = AutoTokenizer.from_pretrained(paths["model"])
    model = AutoModelForCausalLM.from_pretrained(paths["model"])
    assert 500_000 <= model.num_parameters() <= 1_000_000
    by_length = collections.defaultdict(list)  # no padding needed
    for line in open(paths["test"]):
        row = json.loads(line)
        by_length[len(row["prompt"])].append(row)

    torch.manual_seed(0)
    right = []
    for rows in by_length.values():
        ids = torch.tensor([tokenizer.encode(row["prompt"]) for row in rows])
        out = model.generate(ids, num_return_sequences=32, max_new_tokens=12)[:, ids.shape[1] :]
        texts = tokenizer.batch_decode(out, skip_special_tokens=True)
        for i, row in enumerate(rows):
            mine = texts[32 * i : 32 * (i + 1)]
            right.append(sum(verify.countdown_reward(text, row["answer"]) for text in mine))
    return [sum(pass_at_k(32, int(c), k) for c in right) / len(right) for k in ks]


def test_model_solves_some_but_far_from_all():
    one, most = pass_at("tiny", 1, 32)
    assert 0.1 <= one <= 0.5
    assert most > 0.8


@pytest.mark.slow  # its warm-up takes three minutes
def test_the_harder_task_leaves_room_for_exploration():
    """pass@1 under 0.1, pass@32 between 0.5 and 0.85: what it was chosen by."""
    one, most = pass_at("tiny-hard", 1, 32)
    assert 0.02 <= one <= 0.1
    assert 0.5 <= most <= 0.85
