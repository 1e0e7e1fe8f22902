"""bench.py: its FLOP counts, its memory figures, its frozen rollouts, and that every table prints
what it says."""

import hashlib
import json
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tools import bench

CPU = torch.device("cpu")


def head(N, H, V, chunk):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, H, generator=generator).requires_grad_() for n in (N, V))
    targets, up = torch.randint(V, (N,), generator=generator), torch.randn(N, generator=generator)
    return hidden, weight, targets, up, bench.head_paths(hidden, weight, targets, up, chunk)


@pytest.mark.parametrize("N,H,V,chunk", [(24, 16, 96, 5), (7, 8, 40, 64)])
def test_flops_are_exactly_those_of_the_formula(N, H, V, chunk):
    """2 NHV for a forward, 6 where both gradients are formed in it, 8 where the backward forms the
    logits again; ragged chunks included."""
    paths = head(N, H, V, chunk)[-1]
    for name, factor in {
        "forward only: fused": 2,
        "fused, gradient formed in the forward": 6,
        "fused, logits formed again": 8,
        "fused, with entropy gradient": 8,
        "materialised (naive_logprob)": 6,
        "bare products, 2 NHV": 2,
        "bare products, 6 NHV": 6,
        "bare products, 8 NHV": 8,
    }.items():
        with FlopCounterMode(display=False) as counter:
            paths[name]()
        assert counter.get_total_flops() == factor * N * H * V, name


def test_paths_differentiate_what_they_say(monkeypatch):
    """The gradients that are timed are those of sum(up logp) (+ sum(up entropy)), by float64
    autograd of the definition."""
    hidden, weight, targets, up, paths = head(12, 8, 30, 5)
    seen, grad = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args: seen.append(grad(*args)) or seen[-1])
    for name in (
        "fused, gradient formed in the forward",
        "fused, logits formed again",
        "fused, with entropy gradient",
        "materialised (naive_logprob)",
        "materialised, with entropy gradient",
        *["F.linear_cross_entropy", "F.linear_cross_entropy, chunked"]
        * hasattr(torch.nn.functional, "linear_cross_entropy"),
    ):
        paths[name]()
        h, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
        logp = (h @ w.t()).log_softmax(-1)
        loss = (up * logp.gather(1, targets[:, None])[:, 0]).sum() - ("with entropy" in name) * (
            up * (logp.exp() * logp).sum(-1)
        ).sum()
        for got, want in zip(seen[-1], grad(loss, (h, w)), strict=False):
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


def test_peak_memory_is_what_was_allocated():
    mega = 2**20
    with bench.peak_memory(CPU) as memory:
        a = torch.empty(8 * mega, dtype=torch.uint8)
        del a
        b = torch.empty(5 * mega, dtype=torch.uint8)
        torch.empty(6 * mega, dtype=torch.uint8)
    assert memory["bytes"] == 11 * mega  # 8 were given back before 5 + 6 were taken
    del b


def test_fused_memory_does_not_grow_with_tokens_times_vocabulary():
    """Four times the tokens at one chunk: the materialised path takes 4 times the memory, the fused
    ones 4 NH more (their d hidden) and a few numbers a token."""
    H, V, chunk, small, large = 8, 4096, 64, 128, 512
    peak = {}
    for N in (small, large):
        for name in (
            "fused, gradient formed in the forward",
            "fused, logits formed again",
            "fused, with entropy gradient",
            "materialised (naive_logprob)",
        ):
            run = head(N, H, V, chunk)[-1][name]
            run()
            with bench.peak_memory(CPU) as memory:
                run()
            peak[name, N] = memory["bytes"]
    for (name, N), size in peak.items():
        if "fused" in name:
            assert (
                abs(peak[name, large] - peak[name, small])
                < 4 * (large - small) * (2 * H + 32)
                < 4 * (large - small) * V / 50
            )
            assert size < 4 * chunk * V * 8
        else:
            assert size > 4 * N * V * 2 and 3.5 < peak[name, large] / peak[name, small] < 4.5


def test_rollouts_are_frozen(tmp_path):
    """The same bytes from the same arguments, on every machine: the hash is written down here."""
    size = dict(vocabulary=512, prompts=4, group=8, median=48, longest=256)
    lines, digest = bench.write_rollouts(tmp_path / "a.jsonl", **size)
    assert (
        digest
        == bench.write_rollouts(tmp_path / "b.jsonl", **size)[1]
        == hashlib.sha256((tmp_path / "a.jsonl").read_bytes()).hexdigest()
    )
    assert digest.startswith("758aa6410053")
    assert digest != bench.write_rollouts(tmp_path / "c.jsonl", **size, seed=1)[1]
    assert [json.loads(line) for line in open(tmp_path / "a.jsonl")] == lines
    assert (
        len(lines) == 32
        and len({tuple(s["prompt"]) for s in lines}) == 4
        and all(len(s["tokens"]) == len(s["behaviour"]) for s in lines)
    )
    lengths = sorted(
        len(s["tokens"]) for s in bench.write_rollouts(tmp_path / "d.jsonl", 10, 200, 8, 20, 400)[0]
    )
    assert (
        abs(lengths[800] - 20) < 3
        and abs(sum(lengths) / 1600 - 30) < 3
        and abs(lengths[1584] - 162) < 40
    )  # 20, 20 e^(0.81/2), 20 e^(0.9 x 2.326)
    assert (
        max(
            len(s["tokens"])
            for s in bench.write_rollouts(tmp_path / "e.jsonl", 10, 20, 8, 20, 30)[0]
        )
        == 30
    )  # cut


def test_update_flops_are_those_of_the_model():
    """update_flops against FlopCounterMode over transformers' own forward and backward, whose
    attention and head are whole: the causal half and the prompt's logits are what is left out."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        **dict(zip(bench.FIELDS, bench.MODELS["mini"], strict=False)), attn_implementation="eager"
    )
    model, T = Qwen2ForCausalLM(config), 24
    with FlopCounterMode(display=False) as counter:
        model.model(torch.arange(T)[None], use_cache=False).last_hidden_state.sum().backward()
    sample = dict(prompt=[0] * T, tokens=[])
    half = 6 * config.num_hidden_layers * config.hidden_size * T**2
    assert counter.get_total_flops() == bench.update_flops(config, [sample], T) + half
    assert (
        bench.update_flops(config, [dict(prompt=[0], tokens=[1] * 5)], 0)
        - bench.update_flops(config, [dict(prompt=[0] * 6, tokens=[])], 0)
        == 6 * 64 * 512 * 5
    )


def test_race_takes_turns_and_ratio_is_within_them():
    order = []
    times = bench.race(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3, CPU, warm_up=1
    )
    assert order == list("abababab") and [len(t) for t in times.values()] == [3, 3]
    assert bench.ratio([2.0, 20.0, 6.0], [1.0, 10.0, 2.0]) == 2.0  # a slow turn is slow for both


@pytest.fixture
def run(forks):
    """Output of bench.py in its own process."""
    return partial(forks.run, "tools/bench.py", env=dict(OMP_NUM_THREADS="1"))


def check(text, tables):
    """Every table of the JSON is in the output, as markdown: a line of the same number of cells for
    each row."""
    for t in tables:
        body = text[text.index(f"**{t['title']}** ({t['date']}, ") :]
        assert (
            t["torch"] == torch.__version__
            and t["commit"]
            and f"`{t['command']}`" in body.split("\n")[0]
        )
        lines = [line for line in body.split("\n\n")[1].splitlines()]
        assert len(lines) == 2 + len(t["rows"]) and {
            line.replace("\\|", "").count("|") for line in lines
        } == {len(t["columns"]) + 1}
        assert all(
            line.startswith(f"| {row[0]}") for line, row in zip(lines[2:], t["rows"], strict=False)
        )
    return {t["table"]: t for t in tables}


@pytest.mark.slow
def test_tables_without_vllm(run, tmp_path):
    text = run(
        "head",
        "trainer",
        "verify",
        "--shape",
        "mini",
        "--tokens",
        "32",
        "--repeats",
        "2",
        "--items",
        "40",
        "--workers",
        "1",
        "--out",
        tmp_path / "out.json",
    )
    found = check(text, json.loads((tmp_path / "out.json").read_text()))
    assert set(found) == {"head", "trainer", "verify"}
    rows = {row[0]: row[1:] for row in found["head"]["rows"]}
    assert (
        rows["fused, gradient formed in the forward"][0] == 6
        and rows["fused, logits formed again"][0] == 8
    )
    assert all(
        0 < row[-1] < 1e-4 for name, row in rows.items() if "fused" in name and "Liger" not in name
    )
    rows = {row[0]: row[1:] for row in found["trainer"]["rows"]}
    shared, alone = rows["lad.py"], rows["lad.py, prompts not shared"]
    assert (
        shared[-1] == alone[-1] == 0 and shared[-2] < alone[-2] == 3408 and shared[2] == 1
    )  # pads, tokens computed, the ratio to itself
    assert rows["lad.py, recompute"][4] < shared[4]  # memory
    assert all(row[2] > 0 for row in found["verify"]["rows"])


@pytest.mark.slow
def test_tables_of_vllm(run, tmp_path):
    """rollout and sync share an engine; both call counts write the same tokens from the same
    seed."""
    text = run("rollout", "sync", "--repeats", "1", "--out", tmp_path / "out.json")
    found = check(text, json.loads((tmp_path / "out.json").read_text()))
    rows = {row[0]: row[1:] for row in found["rollout"]["rows"]}
    assert rows["LLM.generate"][1] == rows["lad.generate"][1] > 512
    rows = {row[0]: row[1:] for row in found["sync"]["rows"]}
    assert rows["copy of the same bytes"][2] == 1 and all(row[0] > 0 for row in rows.values())


@pytest.mark.slow
def test_prefill_of_a_preset(run, tmp_path):
    """Its batches are sums of what is measured, and each is compared with its own kind."""
    flags = ["--config", "tiny", "--repeats", "1", "--out", tmp_path / "out.json"]
    text = run("prefill", *flags)
    found = check(text, json.loads((tmp_path / "out.json").read_text()))
    rows = {row[0]: row[1:] for row in found["prefill"]["rows"]}
    alone, shared = (f"a prompt for each {what}" for what in ("response", "group"))
    for what in ("generation", "batch"):
        assert rows[f"{what}, {alone}"][1] == 1
        ratio = rows[f"{what}, {shared}"][0] / rows[f"{what}, {alone}"][0]
        assert rows[f"{what}, {shared}"][1] == pytest.approx(ratio)
    saved = rows[f"generation, {alone}"][0] - rows[f"generation, {shared}"][0]
    assert rows[f"batch, {alone}"][0] - rows[f"batch, {shared}"][0] == pytest.approx(saved)


@pytest.mark.slow
def test_step_splits_a_run(run, tmp_path):
    text = run(
        "step", "--steps", "3", "--out", tmp_path / "out.json", "--picture", tmp_path / "split.png"
    )
    tables = json.loads((tmp_path / "out.json").read_text())
    check(text, tables)
    shares = {row[0]: row[2] for row in tables[1]["rows"]}
    assert (
        list(shares) == ["rollout", "reward", "train", "sync", "other"]
        and abs(sum(shares.values()) - 100) < 1e-6
        and all(x > 0 for x in shares.values())
    )
    assert "aten::mm" in [row[0] for row in tables[0]["rows"]]
    assert (tmp_path / "split.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    "argv,said",
    [
        ("head --shape 0.5B", "did you mean '0.5b'"),
        ("trainer --device gpu", "--device gpu"),
        ("heads", "invalid choice"),
        ("step --steps 2", "at least 3 steps"),
    ],
)
def test_bad_input_is_one_line(argv, said, capsys):
    with pytest.raises(SystemExit) as leaving:
        bench.main(argv.split())
    assert leaving.value.code == 2 and said in capsys.readouterr().err.splitlines()[-1]
