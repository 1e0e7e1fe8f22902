"""harness/lora.py: the base at step 0, gradients against a float64 oracle, on two ranks, merged
weights in vLLM, runs that are killed, and a folder that PEFT reads."""

import dataclasses
import json
import shutil

import pytest
import torch
from conftest import metrics
from lora_worker import GRADIENTS, RANK, SPLITS, trained_by_now
from test_config import refused
from worker import make_groups

import lad
from harness import checkpoint, lora
from tools import plan

CPU = torch.device("cpu")
CFG = dataclasses.replace(lad.Config(), checkpointing=False, objective="grpo", lora_rank=RANK)
PLAIN = dataclasses.replace(CFG, lora_rank=0)


def some_samples(model):
    return [s for group in make_groups(model.config.vocab_size) for s in group]


def logps(model, samples, key="old"):
    """Log-probs [R] of the tokens of all samples."""
    lad.score_samples(model, key, samples, CFG, CPU)
    return torch.cat([s[key] for s in samples])


@pytest.fixture
def adapted(random_model):
    """A model with adapters that have been trained, as far as anyone can tell."""
    model = lad.build_model(random_model, CFG, CPU)
    trained_by_now(model, CPU)
    return model


# ==== 1. One model ==============================================================================


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_before_the_first_update_it_is_the_base_exactly(random_model, tiny, tied):
    folder = tiny["model"] if tied else random_model
    plain = lad.build_model(folder, PLAIN, CPU)
    model = lad.build_model(folder, CFG, CPU)
    samples = some_samples(model)
    assert torch.equal(logps(model, samples), logps(plain, samples))

    # And vLLM gets the very same weights, in the same order
    want = list(lad.named_weights(plain, torch.float32))
    got = list(lad.named_weights(model, torch.float32))
    assert [name for name, _ in got] == [name for name, _ in want]
    for (name, a), (_, b) in zip(got, want, strict=True):
        assert torch.equal(a, b), name
    is_tied = model.lm_head.weight is model.base_model.embed_tokens.weight
    assert is_tied == tied


def test_only_the_adapters_are_trained(random_model):
    model = lad.build_model(random_model, CFG, CPU)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if lora.is_adapter(name)}
    assert len(trained) == 2 * 7 * 2  # A and B, of 7 layers in each of 2 blocks
    assert not any("lm_head" in name or "embed" in name for name in trained)


def test_targets(random_model, capsys):
    cfg = dataclasses.replace(CFG, lora_targets="q_proj, v_proj")
    names = {name.split(".")[-2] for name in lora.layers(lad.build_model(random_model, cfg, CPU))}
    assert names == {"q_proj", "v_proj"}
    for wrong in ("q_porj", "lm_head", "", "q_proj v_proj"):
        with pytest.raises(SystemExit) as stop:
            lad.build_model(random_model, dataclasses.replace(CFG, lora_targets=wrong), CPU)
        said = capsys.readouterr().err
        assert stop.value.code == 2 and "no linear layer of a block is called" in said


def test_switched_off_it_is_the_base_exactly(adapted, random_model):
    samples = some_samples(adapted)
    base = logps(lad.build_model(random_model, PLAIN, CPU), samples)
    on = logps(adapted, samples)
    assert (on - base).abs().max() > 0.1
    with lora.switched_off(adapted):
        assert torch.equal(logps(adapted, samples), base)
    with pytest.raises(KeyError), lora.switched_off(adapted):
        raise KeyError
    assert torch.equal(logps(adapted, samples), on)


def test_merged_weights_are_the_adapters(adapted, random_model):
    """In fp32, log-probs within 1e-4 of each other after a change of more than 0.1."""
    plain = lad.build_model(random_model, PLAIN, CPU)
    samples = some_samples(adapted)
    merged = dict(lad.named_weights(adapted, torch.float32))
    for name, p in plain.named_parameters():
        p.data.copy_(merged[name])
    torch.testing.assert_close(logps(plain, samples), logps(adapted, samples), rtol=0, atol=1e-4)


def test_bf16_merges_round_once(adapted):
    """The sum is made in fp32: a merged weight is the nearest bf16 number, 2^-8 of it away at
    most."""
    for layer in lora.layers(adapted).values():
        weight = layer.weight.detach().bfloat16()
        change = layer.lora_B.detach().double() @ layer.lora_A.detach().double()
        exact = weight.double() + CFG.lora_alpha / RANK * change
        error = (lora.merge(weight, layer).double() - exact).abs()
        assert (error <= 2**-8 * exact.abs() + 1e-7).all()


@pytest.mark.parametrize("is_early", [False, True], ids=["late", "early"])
def test_a_frozen_head_costs_no_gradient(is_early):
    """The same d hidden, no d weight, and 2 NHV FLOPs less."""
    from torch.utils.flop_counter import FlopCounterMode

    torch.manual_seed(0)
    N, H, V = 30, 16, 50
    targets = torch.randint(V, (N,))
    start = torch.randn(N, H)
    head = torch.randn(V, H)

    def gradient(part, logp, entropy):
        return torch.ones_like(logp)

    found = {}
    for frozen in (False, True):
        hidden = start.clone().requires_grad_()
        weight = head.clone().requires_grad_(not frozen)
        with FlopCounterMode(display=False) as counter:
            early = gradient if is_early else None
            logp, _ = lad.fused_logprob(hidden, weight, targets, 0.7, 7, early)
            logp.sum().backward()
        found[frozen] = (hidden.grad, weight.grad, counter.get_total_flops())
    assert torch.equal(found[True][0], found[False][0])
    assert found[True][1] is None and found[False][1] is not None
    assert found[False][2] - found[True][2] == 2 * N * H * V


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on a CPU needs a C++ compiler")
def test_compiled_blocks_can_be_switched_off_and_on(adapted, random_model, monkeypatch):
    for name in ("logits_to_logp", "logp_to_dlogits"):
        monkeypatch.setattr(lad, name, getattr(lad, name))  # restored afterwards
    samples = some_samples(adapted)
    on = logps(adapted, samples)
    base = logps(lad.build_model(random_model, PLAIN, CPU), samples)
    lad.turn_on_compile(dataclasses.replace(CFG, compile="blocks"), CPU, adapted)
    for _ in range(2):
        torch.testing.assert_close(logps(adapted, samples), on, rtol=1e-4, atol=1e-4)
        with lora.switched_off(adapted):
            torch.testing.assert_close(logps(adapted, samples), base, rtol=1e-4, atol=1e-4)
    lad.accumulate_gradient(adapted, samples, CFG, CPU)
    for layer in lora.layers(adapted).values():
        assert layer.lora_A.grad.abs().max() > 0 and layer.weight.grad is None


# ==== 2. Gradients ==============================================================================


@pytest.fixture(scope="module")
def gradients(forks, random_model, tmp_path_factory):
    """{ranks: {(objective, micro_tokens): {name: (weight, gradient)}}}."""
    out = tmp_path_factory.mktemp("lora")
    found = {}
    for ranks in (1, 2):
        file = out / f"{ranks}.pt"
        forks.run("tests/lora_worker.py", "gradient", random_model, file, ranks=ranks)
        found[ranks] = torch.load(file)
    return found


def distance(a, b):
    """Relative, between {name: gradient} and another."""
    assert set(a) == set(b)
    a = torch.cat([a[name].double().flatten() for name in sorted(a)])
    b = torch.cat([b[name].double().flatten() for name in sorted(b)])
    return (a - b).norm() / b.norm()


def gradients_of(trained):
    return {name: gradient for name, (_, gradient) in trained.items()}


def test_gradient_does_not_depend_on_the_split_or_on_the_ranks(gradients):
    for objective, _ in GRADIENTS:
        want = gradients_of(gradients[1][objective, SPLITS[0][0]])
        for ranks in (1, 2):
            for micro, _ in SPLITS:
                got = gradients_of(gradients[ranks][objective, micro])
                assert distance(got, want) < 1e-5, (objective, ranks, micro)
        has_head = any(name.startswith("log_z.") for name in want)
        assert has_head == (objective == "flowrl")
        assert all(g.abs().max() > 0 for g in want.values())


def test_adapters_start_the_same_on_any_number_of_ranks(gradients):
    for key, trained in gradients[1].items():
        for name, (weight, _) in trained.items():
            assert torch.equal(weight, gradients[2][key][name][0]), name


def test_gradient_is_that_of_the_definition_in_float64(gradients, random_model):
    """transformers' own forward with W + (alpha / rank) B A in the place of each W, and GRPO's loss
    over samples, one at a time."""
    from torch.func import functional_call
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        random_model, dtype=torch.float64, attn_implementation="eager"
    ).requires_grad_(False)
    trained = gradients[1]["grpo", SPLITS[0][0]]
    leaves = {name: weight.double().requires_grad_() for name, (weight, _) in trained.items()}
    samples = some_samples(model)
    tokens = sum(len(s["tokens"]) for s in samples)
    for s in samples:
        # The model that the definition says
        weights = dict(model.named_parameters())
        for name in leaves:
            if name.endswith(".lora_A"):
                layer = name.removesuffix(".lora_A")
                change = leaves[f"{layer}.lora_B"] @ leaves[f"{layer}.lora_A"]
                weights[f"{layer}.weight"] = weights[f"{layer}.weight"] + 32 / RANK * change
        # Its loss
        n = len(s["tokens"])
        ids = torch.tensor([s["prompt"] + s["tokens"]])
        logits = functional_call(model, weights, (ids,)).logits[0, -n - 1 : -1] / 0.8
        logp = logits.log_softmax(-1)[torch.arange(n), torch.tensor(s["tokens"])]
        behaviour = torch.tensor(s["behaviour"]).double()
        old = behaviour + torch.tensor(s["drift"]).double()
        ratio = (logp - old).exp()
        clipped = ratio.clamp(0.8, 1.28)
        loss = -torch.minimum(ratio * s["adv"], clipped * s["adv"])
        weight = (old - behaviour).exp().clamp(max=2)
        (loss * weight / tokens).sum().backward()
    want = {name: leaf.grad for name, leaf in leaves.items()}
    assert distance(gradients_of(trained), want) < 1e-5


def test_a_bf16_base_under_fp32_adapters_on_two_ranks(forks, random_model, tmp_path):
    """The types of a GPU on two CPU ranks: what rests in which, what moves, what vLLM would get."""
    forks.run("tests/lora_worker.py", "bf16", random_model, tmp_path / "report.pt", ranks=2)
    report = torch.load(tmp_path / "report.pt")
    trained = set(report["moved"])
    assert report["types"][torch.float32] == trained
    assert any(name.startswith("log_z.") for name in trained)
    assert sum(lora.is_adapter(name) for name in trained) == 28
    assert report["equal"] and all(0 < norm < float("inf") for norm in report["norms"])
    changed = 0
    for name, weight in report["merged"].items():
        assert weight.dtype == torch.bfloat16
        changed += not torch.equal(weight, report["before"][name])
    assert changed == 14  # what is not adapted goes over as it was


# ==== 3. Runs ===================================================================================


@pytest.mark.parametrize("ranks, tied", [(1, False), (2, False), (1, True)])
def test_vllm_has_the_adapters_after_every_sync(forks, random_model, tiny, tmp_path, ranks, tied):
    """fp32: log-probs within 1e-3 after each of three syncs, the adapters moved between them."""
    folder = tiny["model"] if tied else random_model
    file = tmp_path / "report.pt"
    forks.run("tests/lora_worker.py", "parity", folder, file, ranks=ranks)
    report = torch.load(file)
    assert len(report) == 3
    for difference, _, _ in report:
        assert difference < 1e-3, report
    assert abs(report[0][1] - report[1][1]) > 1 and report[0][2] != report[2][2]


SMALL = ["--config", "tiny", "--steps", 4, "--prompts", 4, "--group", 4]
SMALL += ["--minibatches", 1, "--epochs", 1, "--eval_every", 0, "--eval_prompts", 4]
SMALL += ["--eval_samples", 2, "--checkpoint_every", 1, "--objective", "grpo"]
SMALL += ["--kl_coef", 0.1, "--lr", 2e-3, "--lora_rank", 1]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def run(forks, tmp_path_factory):
    out = tmp_path_factory.mktemp("lora") / "whole"
    printed = forks.run("lad.py", *SMALL, "--out", out, env=ONE_THREAD)
    return out, printed


def tensors(path):
    from safetensors.torch import load_file

    found = {}
    for file in sorted(path.glob("*.safetensors")):
        found |= load_file(file)
    return found


def without_clock(out):
    kept = []
    for line in metrics(out):
        timed = ("seconds", "tokens_per", "memory")
        kept.append({key: x for key, x in line.items() if not key.startswith(timed)})
    return kept


def test_a_run_saves_the_adapter_alone(run, tiny):
    out, printed = run
    saved = tensors(out / "checkpoints/step_4")
    # Weight and two moments, of A and B, of 7 layers in each of 4 blocks
    assert len(saved) == 3 * 2 * 7 * 4
    assert all(lora.is_adapter(name) for name in saved)
    trained = sum(saved[name].numel() for name in saved if not name.startswith("exp_avg"))
    assert f"{trained:,} of them trained" in printed
    lines = [x for x in metrics(out) if "loss" in x]
    assert all(x["rollout_kl"] < 1e-6 for x in lines)
    # The head stays as it is: nothing of its change is logged, and the run says so
    assert "track_change logs nothing with LoRA" in printed
    assert not any({"rank_one", "head_change"} & set(x) for x in lines)
    # The reference is the adapter switched off: at first the policy itself, then no more
    assert lines[0]["kl"] == 0 and all(x["kl"] > 1e-6 for x in lines[1:])


def test_the_merged_model_is_the_base_and_the_adapter(run, tiny):
    """hf/ is what adapter/, read by its own words, makes of the starting model."""
    out, _ = run
    config = json.loads((out / "adapter/adapter_config.json").read_text())
    adapter = tensors(out / "adapter")
    assert config["base_model_name_or_path"] == str(tiny["model"])
    assert all(x.dtype == torch.float32 for x in adapter.values())
    scale = config["lora_alpha"] / config["r"]
    exported = tensors(out / "hf")
    changed = 0
    for name, weight in tensors(tiny["model"]).items():
        key = "base_model.model." + name.removesuffix(".weight")
        if f"{key}.lora_A.weight" in adapter:
            a = adapter[f"{key}.lora_A.weight"]
            b = adapter[f"{key}.lora_B.weight"]
            assert b.abs().max() > 0
            weight = weight + scale * b @ a
            changed += 1
        torch.testing.assert_close(exported[name], weight, rtol=1e-6, atol=1e-7)
    assert changed == len(adapter) / 2 == 28
    names = {name.split(".")[-3] for name in adapter}
    assert names == set(config["target_modules"])


def test_killed_and_resumed_equals_never_killed(forks, run, tmp_path):
    """In the third batch's update, after two checkpoints."""
    out = tmp_path / "killed"
    forks.start("lad.py", [*SMALL, "--out", out], [("backward", 3, None)], env=ONE_THREAD)
    codes, printed, _ = forks.wait()
    assert codes == [-9], printed
    assert checkpoint.listed(out)[-1].name == "step_2"
    forks.run("lad.py", "--resume", out, env=ONE_THREAD)
    assert without_clock(out) == without_clock(run[0])
    for folder in ("hf", "adapter", "checkpoints/step_4"):
        want = tensors(run[0] / folder)
        got = tensors(out / folder)
        assert set(got) == set(want)
        for name, x in want.items():
            assert torch.equal(got[name], x), (folder, name)


@pytest.mark.slow
def test_two_ranks_train_and_one_goes_on(forks, tmp_path):
    """Rank 1: of a matrix A one process holds the only row, and its checkpoint is read by one."""
    out = tmp_path / "two"
    forks.run("lad.py", *SMALL, "--steps", 2, "--out", out, ranks=2)
    first = tensors(out / "adapter")
    assert any(x.abs().max() > 0 for name, x in first.items() if "lora_B" in name)
    forks.run("lad.py", "--resume", out, "--steps", 3)
    assert [x["step"] for x in metrics(out) if "loss" in x] == [1, 2, 3]
    assert any(not torch.equal(x, first[name]) for name, x in tensors(out / "adapter").items())


@pytest.mark.parametrize(
    "flags", [["--lora_rank", 2], ["--lora_rank", 0], ["--lora_alpha", 16], ["--lora_targets", "q"]]
)
def test_another_adapter_is_not_resumed(forks, run, flags):
    said = forks.run("lad.py", "--resume", run[0], *flags, "--steps", 5, code=2)
    [line] = [line for line in said.splitlines() if ": error: " in line]
    assert f"was trained with {flags[0][2:]} = " in line


@pytest.mark.slow
def test_flowrl_keeps_its_head_beside_the_adapter(forks, tmp_path):
    out = tmp_path / "flowrl"
    forks.run("lad.py", *SMALL, "--objective", "flowrl", "--steps", 1, "--out", out)
    saved = tensors(out / "checkpoints/step_1")
    assert any(name.startswith("log_z.") for name in saved)
    assert all(lora.is_adapter(name) or "log_z." in name for name in saved)
    assert not any("log_z" in name for name in tensors(out / "adapter") | tensors(out / "hf"))


def test_peft_loads_the_adapter(run, tiny):
    """PEFT's model of the adapter has the logits of the merged export."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install peft")
    from transformers import AutoModelForCausalLM

    out, _ = run
    ids = torch.tensor([[5, 7, 9, 4, 11, 8]])
    base = AutoModelForCausalLM.from_pretrained(tiny["model"])
    before = base(ids).logits
    want = AutoModelForCausalLM.from_pretrained(out / "hf")(ids).logits
    model = peft.PeftModel.from_pretrained(base, out / "adapter")
    got = model(ids).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert (got - before).abs().max() > 0.01


# ==== 4. Settings ===============================================================================


def test_what_an_adapter_cannot_do_is_refused(capsys):
    flags = ["--lora_rank", "8", "--objective", "lad_anchor"]
    assert "say ref_every = 0" in refused(capsys, *flags, "--ref_every", "5")
    assert "at least 0" in refused(capsys, "--lora_rank", "-1")
    for key, value in (("--lora_targets", "q_proj"), ("--lora_alpha", "16")):
        assert "give a lora_rank" in refused(capsys, key, value)
    assert lad.load_config(flags).lora_rank == 8


def test_lora_brings_its_rate_below_what_is_said(tmp_path):
    assert lad.load_config([]).lr == 1e-6
    assert lad.load_config(["--lora_rank", "16"]).lr == 1e-5
    assert lad.load_config(["--lora_rank", "16", "--lr", "3e-5"]).lr == 3e-5
    assert lad.load_config(["--config", "tiny", "--lora_rank", "16"]).lr == 1e-4


# ==== 5. The plan ===============================================================================


def planned(folder, *flags):
    """(cfg, shape, the real model, what tools/plan.py says of it on one CPU)."""
    flags = ["--config", "tiny", "--model", str(folder), "--checkpointing", "false", *flags]
    cfg = lad.load_config([*flags, "--objective", "grpo", "--kl_coef", "0.1"])
    m = plan.read_shape(str(folder))
    return cfg, m, lad.build_model(folder, cfg, CPU), plan.estimate(cfg, m, 1, plan.GIB, 6, True)


@pytest.mark.parametrize("targets", ["all", "q_proj,down_proj"])
def test_plan_counts_what_is_trained(random_model, targets):
    flags = ["--lora_rank", "3", "--lora_targets", targets]
    _, _, model, r = planned(random_model, *flags)
    trained = 0
    bytes_of_all = 0
    for p in model.parameters():
        trained += p.numel() if p.requires_grad else 0
        bytes_of_all += p.numel() * p.element_size()
    assert r["trained"] == trained
    assert r["weights"] == bytes_of_all
    assert r["moments"] == 8 * trained and r["gradients"] == 4 * trained
    assert r["reference"] == 0  # the adapter switched off


def test_plan_knows_the_size_of_a_checkpoint(run):
    cfg = lad.load_config([str(x) for x in SMALL])
    r = plan.estimate(cfg, plan.read_shape("tiny"), 1, plan.GIB, 6, True)
    saved = tensors(run[0] / "checkpoints/step_4")
    assert r["checkpoint"] == sum(4 * x.numel() for x in saved.values())


def test_plan_knows_what_a_backward_costs(random_model):
    """FLOPs by torch's counter: a backward is one forward where the weights are frozen, not two;
    within 15%, since the first block's input needs no gradient and this model has two blocks."""
    from torch.utils.flop_counter import FlopCounterMode

    cfg, _, model, r = planned(random_model, "--lora_rank", "1", "--minibatches", "1")
    samples = some_samples(model)
    with FlopCounterMode(display=False) as forward:
        logp, *_ = model(lad.pack(samples, CPU), 1.0, 4096)
    with FlopCounterMode(display=False) as backward:
        logp.sum().backward()
    # The head's logits are formed once more, which is in neither count of the plan
    again = 2 * len(logp) * model.config.hidden_size * model.config.vocab_size
    ratio = (backward.get_total_flops() - again) / forward.get_total_flops()
    assert ratio == pytest.approx(1, rel=0.15)
    old_and_reference = 2
    assert r["flops_train"] == r["flops_rollout"] * (cfg.epochs * 2 + old_and_reference)


def test_plan_halves_what_a_gpu_holds():
    """Of 7B on one GPU: 2 bytes a weight instead of 16, and an adapter's."""
    m = plan.read_shape("Qwen/Qwen2.5-7B")
    cfg = lad.load_config(["--lora_rank", "16", "--objective", "grpo"])
    r = plan.estimate(cfg, m, 1, 80 * plan.GIB, 4096)
    overhead = plan.ASSUMPTIONS["overhead"]
    assert r["resident"] == 2 * r["parameters"] + 12 * r["trained"] + overhead
    assert r["fits"] and r["trained"] == 40_370_176
    whole = plan.estimate(dataclasses.replace(cfg, lora_rank=0), m, 1, 80 * plan.GIB, 4096)
    assert not whole["fits"]


def test_plan_refuses_layers_that_there_are_not(capsys):
    cfg = lad.load_config(["--lora_rank", "16", "--lora_targets", "q_porj"])
    with pytest.raises(SystemExit):
        plan.adapters(cfg, plan.read_shape("Qwen/Qwen2.5-7B"))
    assert "no layer 'q_porj'; did you mean 'q_proj'" in capsys.readouterr().err


def test_a_rank_above_the_models_width_is_refused(random_model, capsys):
    """By the model and by the plan."""
    cfg = lad.load_config(["--lora_rank", "3585"])
    with pytest.raises(SystemExit):
        plan.adapters(cfg, plan.read_shape("Qwen/Qwen2.5-7B"))
    assert "more than the model's width, 3584" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        lad.build_model(random_model, cfg, CPU)
    assert "more than the model's width, 64" in capsys.readouterr().err
