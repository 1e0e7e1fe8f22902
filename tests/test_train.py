"""Sections 3, 6, 7 of lad.py: one optimizer step is the same however it is split; vLLM and the
trainer agree; packing."""

import dataclasses
import math
import shutil

import pytest
import torch
from worker import GRADIENTS, SPLITS

import lad
from harness.tracking import leading_share

CFG = dataclasses.replace(lad.Config(), checkpointing=False, objective="grpo")


@pytest.fixture(scope="module")
def gradients(forks, random_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("gradients")
    for ranks in (1, 2):
        forks.run("tests/worker.py", "gradient", random_model, out / f"{ranks}.pt", ranks=ranks)
    return {ranks: torch.load(out / f"{ranks}.pt") for ranks in (1, 2)}


def distance(a, b):
    def flat(g):
        return torch.cat(
            [x.double().flatten() for name, x in g.items() if name in a and name in b]
        )  # flowrl has a head more

    return (flat(a) - flat(b)).norm() / flat(b).norm()


def test_gradient_does_not_depend_on_the_split(gradients):
    """Any micro-batch size, with and without recomputed activations, 1 or 2 ranks, every
    aggregation: under 1e-5."""
    seen = 0
    for key, result in gradients[1].items():
        whole = next(
            r
            for k, r in gradients[1].items()
            if dict(k) | dict(micro_tokens=0, checkpointing=0)
            == dict(key) | dict(micro_tokens=0, checkpointing=0)
        )
        for other in (result, gradients[2][key]):
            assert distance(other["grad"], whole["grad"]) < 1e-5, key
            assert other["stats"] == pytest.approx(whole["stats"], rel=1e-4, abs=1e-6), key
            seen += 1
    assert seen == 2 * len(GRADIENTS) * len(SPLITS)
    by_objective = {}  # the comparison is not between zeros, nor between equal things
    for key, result in gradients[1].items():
        by_objective.setdefault((dict(key)["objective"], dict(key)["aggregation"]), result["grad"])
    values = list(by_objective.values())
    assert all(distance(a, b) > 1e-2 for i, a in enumerate(values) for b in values[:i])


def test_gradient_is_that_of_the_loss_written_plainly(gradients, random_model):
    """The whole path (packing, attention, fused head, clip, importance weights, denominators)
    against one padded-free loop over samples with transformers' own forward, in float64."""
    from transformers import AutoModelForCausalLM
    from worker import make_groups

    model = AutoModelForCausalLM.from_pretrained(
        random_model, dtype=torch.float64, attn_implementation="eager"
    )
    samples = [s for g in make_groups(model.config.vocab_size) for s in g]
    tokens = sum(len(s["tokens"]) for s in samples)
    for objective, aggregation, kl in (
        ("grpo", "token", 0.0),
        ("grpo", "sequence", 0.1),
        ("fade", "constant", 0.0),
    ):
        model.zero_grad()
        for s in samples:
            n = len(s["tokens"])
            logits = model(torch.tensor([s["prompt"] + s["tokens"]])).logits[0, -n - 1 : -1] / 0.8
            logp = logits.log_softmax(-1)[torch.arange(n), torch.tensor(s["tokens"])]
            behaviour = torch.tensor(s["behaviour"]).double()
            old = behaviour + torch.tensor(s["drift"]).double()
            ratio = (logp - old).exp()
            loss = -torch.minimum(ratio * s["adv"], ratio.clamp(0.8, 1.28) * s["adv"]) * (
                old - behaviour
            ).exp().clamp(max=2)
            d = behaviour + torch.tensor(s["lift"]).double() - logp
            loss = loss + kl * (d.exp() - 1 - d)
            scale = {
                "token": 1 / tokens,
                "sequence": 1 / (n * len(samples)),
                "constant": 1 / (len(samples) * 24),
            }[aggregation]
            (loss * scale).sum().backward()
        want = {n: p.grad for n, p in model.named_parameters()}
        got = next(
            r["grad"]
            for k, r in gradients[1].items()
            if dict(k)["objective"] == objective and dict(k)["aggregation"] == aggregation
        )
        assert distance(got, want) < 1e-5, objective


def test_gradients_of_groups_of_ranks(forks, random_model):
    """shard_size, and reduce_each with it: the worker compares."""
    forks.run("tests/worker.py", "groups", random_model, "-", ranks=2)


@pytest.mark.parametrize(
    "ranks,tied",
    [
        pytest.param(1, False, id="1-untied"),
        pytest.param(2, True, id="2-tied"),
        pytest.param(1, True, id="1-tied", marks=pytest.mark.slow),
        pytest.param(2, False, id="2-untied", marks=pytest.mark.slow),
    ],
)
def test_vllm_and_trainer_agree_after_every_sync(forks, random_model, tiny, tmp_path, ranks, tied):
    """Same tokens, same weights, temperature 0.8, fp32: log-probs within 1e-3 after each of three
    syncs. (vLLM's CPU build keeps a packed copy of a tied head, which its reload_weights forgets:
    the tied case failed without awake()'s remedy.)"""
    forks.run(
        "tests/worker.py",
        "parity",
        tiny["model"] if tied else random_model,
        tmp_path / "report.pt",
        ranks=ranks,
    )
    report = torch.load(tmp_path / "report.pt")
    assert len(report) == 3 and all(difference < 1e-3 for difference, _, _ in report), report
    assert (
        abs(report[0][1] - report[1][1]) > 1 and report[0][2] != report[2][2]
    )  # the weights did move between them


@pytest.mark.parametrize("ranks", [1, 2])
def test_sharded_load_stream_and_export(forks, random_model, tmp_path, ranks):
    forks.run("tests/worker.py", "load", random_model, tmp_path, ranks=ranks)


def test_sharded_load_of_tied_weights(forks, tiny, tmp_path):
    forks.run("tests/worker.py", "load", tiny["model"], tmp_path, ranks=2)


def packed_inputs(D, dtype):
    """q, k, v of a packed row of three sequences of 5, 1 and 7 tokens, the last of which has the
    first two tokens of the first: rows 0..1 are shared."""
    torch.manual_seed(0)
    batch = lad.pack(
        [sample([3, 4], [5, 6, 7]), sample([8], []), sample([3, 4], [1, 2, 3, 4, 5])],
        torch.device("cpu"),
    )
    heads, kv, N = 4, 2, batch["ids"].shape[1]
    assert N == 11 and batch["cu_seqlens"].tolist() == [0, 5, 6, 13] and batch["max_seqlen"] == 7
    members = [[0, 1, 2, 3, 4], [5], [0, 1, 6, 7, 8, 9, 10]]
    return [torch.randn(1, h, N, D, dtype=dtype) for h in (heads, kv, kv)], batch, members


@pytest.mark.parametrize("window", [None, 3])
def test_packed_attention_is_causal_inside_each_sequence(window):
    (q, k, v), batch, members = packed_inputs(8, torch.float64)
    got, _ = lad.packed_attention(
        None,
        q,
        k,
        v,
        scaling=0.3,
        sliding_window=window,
        **{key: batch[key] for key in lad.LAYOUT if key in batch},
    )
    want = torch.zeros(1, 11, 4, 8, dtype=torch.float64)
    for tokens in members:
        for place, i in enumerate(tokens):
            seen = tokens[max(0, place - window + 1) if window else 0 : place + 1]
            for h in range(4):
                want[0, i, h] = (
                    torch.softmax(0.3 * k[0, h // 2, seen] @ q[0, h, i], 0) @ v[0, h // 2, seen]
                )
    torch.testing.assert_close(got, want)


def sample(prompt, tokens, **more):
    return dict(
        prompt=prompt, tokens=tokens, behaviour=[-1.0] * len(tokens), adv=1.0, scale=1.0, **more
    )


def test_pack_by_hand():
    batch = lad.pack(
        [sample([5, 6], [7, 8, 9]), sample([4], [3]), sample([5, 6], [1, 2])], torch.device("cpu")
    )
    assert batch["ids"].tolist() == [[5, 6, 7, 8, 9, 4, 3, 1, 2]] and batch[
        "positions"
    ].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3]]
    assert (
        batch["targets"].tolist() == [7, 8, 9, 3, 1, 2]
        and batch["predict"].tolist() == [1, 2, 3, 5, 1, 7]
        and batch["seq"].tolist() == [0, 0, 0, 1, 2, 2]
    )
    assert (
        batch["cu_seqlens"].tolist() == [0, 5, 7, 11]
        and batch["max_seqlen"] == 5
        and batch["lengths"] == [3, 1, 2]
    )
    assert batch["line_to_seqs"].tolist() == [
        0,
        1,
        2,
        3,
        4,
        5,
        6,
        0,
        1,
        7,
        8,
    ]  # the third sequence begins with tokens 0, 1
    assert batch["seqs_to_line"].tolist() == [0, 1, 2, 3, 4, 5, 6, 9, 10] and batch[
        "prompt_spans"
    ] == [(0, 2), (5, 6), (0, 2)]
    alone = lad.pack(
        [sample([5, 6], [7, 8, 9]), sample([4], [])], torch.device("cpu")
    )  # nothing is shared: the row is the sequences
    assert (
        not {"line_to_seqs", "seqs_to_line"} & set(alone)
        and alone["predict"].tolist() == [1, 2, 3]
        and alone["ids"].tolist() == [[5, 6, 7, 8, 9, 4]]
    )


def test_a_shared_prompt_changes_nothing(random_model):
    """Log-probs and gradients with the prompt once in the row, and with it before every
    response."""
    device, tokens = torch.device("cpu"), [[5, 6, 7], [8], [9, 10, 11, 12], [4, 4]]
    model = lad.build_model(random_model, CFG, device)

    def run(batches):
        out = torch.cat([model(lad.pack(b, device), 0.7, 4)[0] for b in batches])
        (out * torch.arange(1.0, 11.0)).sum().backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters()}
        model.zero_grad()
        return out, grads

    samples = [sample([3, 1, 2], t) for t in tokens]
    (together, g), (apart, h) = run([samples]), run([[s] for s in samples])
    assert lad.pack(samples, device)["ids"].shape[1] == 3 + 10
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)
    assert distance(g, h) < 1e-5


@pytest.mark.parametrize("name", [name for name, o in lad.OBJECTIVES.items() if o.local])
def test_gradient_formed_early_is_the_late_one(name, random_model, monkeypatch):
    """accumulate_gradient of every local objective, with its gradient formed inside the head's
    forward (6 NHV) and after it (8 NHV)."""
    from worker import make_groups

    changes = dict(objective=name, kl_coef=0.1, tis_cap=1.5, micro_tokens=90, head_chunk=7)
    from torch.utils.flop_counter import FlopCounterMode

    cfg, grads, flops = dataclasses.replace(CFG, **lad.OBJECTIVES[name].defaults | changes), [], []
    for local in (True, False):
        monkeypatch.setitem(
            lad.OBJECTIVES, name, dataclasses.replace(lad.OBJECTIVES[name], local=local)
        )
        model = lad.build_model(random_model, cfg, torch.device("cpu"))
        samples = [s for g in make_groups(model.config.vocab_size) for s in g]
        for s in samples:
            s.update(
                old=torch.tensor(s["behaviour"]) + torch.tensor(s["drift"]),
                ref=torch.tensor(s["behaviour"]) + torch.tensor(s["lift"]),
            )
        with FlopCounterMode(display=False) as counter:
            lad.accumulate_gradient(model, samples, cfg, torch.device("cpu"))
        flops.append(counter.get_total_flops())
        grads.append({n: p.grad for n, p in model.named_parameters()})
    tokens = sum(len(s["tokens"]) for s in samples)
    assert (
        flops[1] - flops[0] == 2 * tokens * model.config.hidden_size * model.config.vocab_size
    )  # the logits are formed once less
    assert distance(*grads) < 1e-6 and all(g.abs().max() > 0 for g in grads[0].values())


def test_log_z_is_of_the_prompts_mean_hidden_state(random_model):
    from transformers import AutoModelForCausalLM

    cfg = dataclasses.replace(CFG, objective="flowrl", kl_coef=0.0)
    model, plain = (
        lad.build_model(random_model, cfg, torch.device("cpu")),
        AutoModelForCausalLM.from_pretrained(random_model, dtype=torch.float32),
    )
    samples = [sample([3, 4, 5], [6, 7]), sample([9], [8]), sample([3, 4, 5], [1, 2, 3])]
    log_z = model(lad.pack(samples, torch.device("cpu")), 1.0, 4)[2]
    want = [
        model.log_z(
            plain.base_model(torch.tensor([s["prompt"]])).last_hidden_state[0].mean(0)
        ).item()
        for s in samples
        for _ in s["tokens"]
    ]
    assert log_z.tolist() == pytest.approx(want, rel=1e-4) and abs(want[0] - want[2]) > 1e-3
    again = lad.build_model(random_model, cfg, torch.device("cpu"))
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.log_z.parameters(), again.log_z.parameters(), strict=False)
    )
    names = [name for name, _ in lad.named_weights(model, torch.float32)]
    assert names == [
        name for name, _ in plain.named_parameters()
    ]  # nothing of it reaches vLLM or the export


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on a CPU needs a C++ compiler")
def test_compiled_blocks_change_nothing(random_model, monkeypatch):
    for name in ("logits_to_logp", "logp_to_dlogits"):
        monkeypatch.setattr(lad, name, getattr(lad, name))  # restored afterwards
    device, model = torch.device("cpu"), lad.build_model(random_model, CFG, torch.device("cpu"))
    samples = [sample([3, 4, 5], [6, 7]), sample([9], [8]), sample([3, 4, 5], [1, 2, 3])]
    want = model(lad.pack(samples, device), 1.0, 4)[0]
    lad.turn_on_compile(dataclasses.replace(CFG, compile="blocks"), device, model)
    got = model(lad.pack(samples, device), 1.0, 4)[0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    got.sum().backward()


@pytest.mark.parametrize("ranks,kind", [(1, "untied"), (2, "untied"), (2, "tied"), (3, "few")])
def test_change_of_weights(forks, random_model, tiny, tmp_path, ranks, kind):
    """Against all singular values of the whole change in float64: on one rank, two, and three of
    which one has no row of the head; where the head is the embedding; 0 before anything moves."""
    folder = random_model
    if kind == "tied":
        folder = tiny["model"]
    if kind == "few":
        folder = tmp_path / "few"
        save_model_of_few_words(folder)
    forks.run("tests/worker.py", "change", folder, tmp_path / "change.pt", ranks=ranks)
    found = torch.load(tmp_path / "change.pt")
    assert found["unmoved"] == dict(rank_one=0.0, head_change=0.0)
    assert found["shares"] == pytest.approx(found["want"], rel=1e-4)
    assert all(0.1 < share < 0.9 for share in found["want"].values())
    assert (found["fewest_rows"] == 0) == (kind == "few")


def save_model_of_few_words(folder):
    """Four words: three ranks get two of them, two, and none."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=4,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)


def test_leading_share_of_any_size():
    """Of one row, of zeros, and of a change so small that normalizing would take it for none."""
    torch.manual_seed(0)
    rows = torch.randn(30, 8)
    values = torch.linalg.svdvals(rows.double()).square()
    want = (values[0] / values.sum()).item()
    for size in (1.0, 1e-15):
        small = rows * size
        square = small.double().square().sum().item()
        assert leading_share(small, square) == pytest.approx(want, rel=1e-4)
    assert leading_share(rows[:1], rows[:1].square().sum().item()) == pytest.approx(1.0)
    assert leading_share(torch.zeros(30, 8), 0.0) == 0.0


def test_micro_batches_are_balanced_and_lose_nothing():
    samples = [
        sample([i], [2] * n) for i, n in enumerate((50, 3, 9, 27, 1, 14, 30, 8))
    ]  # prompts of their own
    bins = lad.micro_batches(samples, dataclasses.replace(CFG, micro_tokens=60))
    loads = [sum(1 + len(s["tokens"]) for s in b) for b in bins]
    assert len(bins) == math.ceil(150 / 60) and sum(loads) == 150 and max(loads) <= 60
    assert sorted(id(s) for b in bins for s in b) == sorted(map(id, samples))


def test_micro_batches_keep_a_group_together():
    """Eight prompts of 40 tokens, 8 responses of 10 each: 8 x 40 prompt tokens in all when groups
    stay whole, 64 x 40 when none does."""
    samples = [sample([g] * 40, [2] * 10) for g in range(8) for _ in range(8)]
    whole = lad.micro_batches(samples, dataclasses.replace(CFG, micro_tokens=480))
    assert (
        len(whole) == 2
        and sum(lad.pack(b, torch.device("cpu"))["ids"].shape[1] for b in whole) == 8 * 40 + 640
    )
    halves = lad.micro_batches(
        samples, dataclasses.replace(CFG, micro_tokens=320)
    )  # a unit holds a prompt and four responses
    assert (
        sum(lad.pack(b, torch.device("cpu"))["ids"].shape[1] for b in halves) <= 16 * 40 + 640
        and len(halves) == 4
    )
    assert sorted(id(s) for b in halves for s in b) == sorted(map(id, samples))


def test_a_rank_without_samples_keeps_step(random_model):
    """Its ghost row contributes nothing: gradients are zero, not NaN."""
    device = torch.device("cpu")
    model = lad.build_model(random_model, CFG, device)
    stats = lad.accumulate_gradient(model, [], CFG, device)
    assert all(p.grad.abs().max() == 0 for p in model.parameters()) and stats["entropy"] == 0


def test_a_non_finite_gradient_steps_nowhere():
    model = torch.nn.Linear(2, 1)
    optimizer, before = torch.optim.AdamW(model.parameters(), 0.1), model.weight.detach().clone()
    model(torch.tensor([[1.0, float("inf")]])).sum().backward()
    assert (
        not math.isfinite(lad.optimizer_step(model, optimizer, CFG))
        and torch.equal(model.weight, before)
        and model.weight.grad is None
    )
    model(torch.ones(1, 2)).sum().backward()
    assert lad.optimizer_step(model, optimizer, CFG) == pytest.approx(
        math.sqrt(3)
    ) and not torch.equal(model.weight, before)


def test_weights_that_do_not_fit_are_refused(random_model, tmp_path, capsys):
    import json
    import shutil

    shutil.copytree(random_model, tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps(config | {"hidden_size": 128}))
    with pytest.raises(SystemExit):
        lad.build_model(tmp_path / "m", CFG, torch.device("cpu"))
    assert "do not fit its config" in capsys.readouterr().err


@pytest.mark.gpu
def test_packed_attention_on_the_gpu_equals_its_cpu_twin():
    (q, k, v), batch, _ = packed_inputs(64, torch.float32)
    gpu = lad.pack(
        [sample([3, 4], [5, 6, 7]), sample([8], []), sample([3, 4], [1, 2, 3, 4, 5])],
        torch.device("cuda"),
    )
    for window in (None, 3):
        want, _ = lad.packed_attention(
            None,
            q,
            k,
            v,
            scaling=0.2,
            sliding_window=window,
            **{key: batch[key] for key in lad.LAYOUT if key in batch},
        )
        got, _ = lad.packed_attention(
            None,
            *(x.cuda().bfloat16() for x in (q, k, v)),
            scaling=0.2,
            sliding_window=window,
            **{key: gpu[key] for key in lad.LAYOUT if key in gpu},
        )
        torch.testing.assert_close(got.float().cpu(), want, rtol=2e-2, atol=2e-2)
