"""plan.py: counts against transformers' own models, bytes against what a real model, optimizer and
checkpoint hold, activations against autograd."""

import dataclasses
import re

import pytest
import torch
from conftest import ROOT, launch
from fake_ranks import config_of

import lad
from harness import checkpoint, ranks, tracking
from tools import plan

CPU = torch.device("cpu")


def meta_model(m, **changes):
    """transformers' own model of a shape, on the meta device."""
    from transformers import AutoModelForCausalLM

    config = config_of(m, **changes)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", plan.SHAPES)
def test_parameters_are_transformers(name):
    m = plan.read_shape(name)
    model = meta_model(m)
    assert plan.parameters(m) == (
        sum(p.numel() for p in model.parameters()),
        sum(p.numel() for p in model.model.layers[1].parameters()),
    )
    if m.kind == "cwm":  # which layers see everything
        n, kinds = 20_000, model.config.layer_types
        assert plan.context(m, n) == sum(
            n if kind == "full_attention" else min(n, model.config.sliding_window) for kind in kinds
        )


def test_shape_of_a_folder_and_of_tiny(random_model, tiny):
    from transformers import AutoModelForCausalLM

    for name, folder in ((str(random_model), random_model), ("tiny", tiny["model"])):
        assert plan.parameters(plan.read_shape(name))[0] == sum(
            p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).parameters()
        )


def test_published_counts():
    """The sizes that the models are named by: 32.8B, 70.6B (their model cards), 7.62B, 1.54B."""
    for name, billions in {
        "Qwen/Qwen2.5-32B": 32.8,
        "meta-llama/Meta-Llama-3-70B": 70.6,
        "Qwen/Qwen2.5-7B": 7.62,
        "Qwen/Qwen2.5-1.5B": 1.54,
        "Qwen/Qwen2.5-0.5B": 0.494,
    }.items():
        assert plan.parameters(plan.read_shape(name))[0] / 1e9 == pytest.approx(billions, rel=5e-3)


@pytest.fixture(scope="module")
def step(tmp_path_factory):
    """A real update of a small Qwen2 (proportions of the real ones) on 64 packed samples: (cfg,
    shape, model, optimizer, tokens, {checkpointing: bytes that the forward kept})."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    random_model = tmp_path_factory.mktemp("model")
    Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=96,
            hidden_size=64,
            intermediate_size=340,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            tie_word_embeddings=False,
        )
    ).save_pretrained(random_model)
    kept, samples = (
        {},
        [
            dict(prompt=[5] * 7 + [i], tokens=[6] * 24, behaviour=[0.0] * 24, adv=1.0, scale=1.0)
            for i in range(64)
        ],
    )  # no prompt is shared
    for checkpointing in (False, True):
        cfg = lad.load_config(
            [
                "--config",
                "tiny",
                "--model",
                str(random_model),
                "--checkpointing",
                str(checkpointing),
                "--micro_tokens",
                "2048",
                "--objective",
                "grpo",
            ]
        )
        model = lad.build_model(random_model, cfg, CPU)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        storages = {}

        def pack(t, storages=storages):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        batch = lad.pack(samples, CPU)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            logp, *_ = model(batch, 1.0, 4096)
        kept[checkpointing] = sum(
            size for pointer, size in storages.items() if pointer not in weights
        )
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    logp.sum().backward()
    optimizer.step()
    return cfg, plan.read_shape(str(random_model)), model, optimizer, 2048, kept


def test_bytes_of_weights_gradients_and_moments_are_exact(step):
    cfg, m, model, optimizer, _, _ = step
    r, size = (
        plan.estimate(cfg, m, 1, plan.GIB, 6, cpu=True),
        lambda tensors: sum(t.numel() * t.element_size() for t in tensors),
    )
    assert r["weights"] == size(model.parameters()) and r["gradients"] == size(
        p.grad for p in model.parameters()
    )
    assert r["moments"] == size(
        s[k] for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")
    )
    assert cfg.track_change and r["first"] == size(tracking.first_weights(model).values())
    two = plan.estimate(cfg, m, 2, plan.GIB, 6, cpu=True)
    for key in ("weights", "moments", "first"):
        assert two[key] == r[key] / 2


def test_activations_against_what_autograd_keeps(step):
    """Within 15%: the CPU's attention pads and copies, which the formula leaves out."""
    cfg, m, _, _, tokens, kept = step
    whole = plan.activations(m, tokens, 4, False)
    assert whole == pytest.approx(kept[False], rel=0.15), kept
    blocks = tokens * m.hidden * 4 * m.layers
    # With recomputation the forward keeps the blocks' inputs; one block more comes back at a time
    assert plan.activations(m, tokens, 4, True) > kept[True] > blocks
    assert kept[True] < 0.5 * kept[False]


def test_checkpoint_size(step, tmp_path):
    """Against a real checkpoint's bytes, within 2%."""
    cfg, m, model, optimizer, _, _ = step
    cfg = dataclasses.replace(
        lad.load_config(["--config", "tiny"]), out=str(tmp_path), device="cpu"
    )
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
        )
    try:
        checkpoint.save(cfg, model, optimizer, None, dict(step=1, state={}, position=0, skipped=0))
    finally:
        torch.distributed.destroy_process_group()
    written = sum(f.stat().st_size for f in (tmp_path / "checkpoints/step_1").iterdir())
    assert plan.estimate(cfg, m, 1, plan.GIB, 6, cpu=True)["checkpoint"] == pytest.approx(
        written, rel=0.02
    )


def test_flops_of_a_forward(step):
    """Against torch's own counter, on the padded twin of the packed forward."""
    from torch.utils.flop_counter import FlopCounterMode

    _, m, _, _, _, _ = step

    with torch.device("meta"):
        model = meta_model(m, pad_token_id=0)
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(4, 32, dtype=torch.long))
    cfg = lad.load_config(
        [
            "--config",
            "tiny",
            "--prompts",
            "4",
            "--minibatches",
            "1",
            "--epochs",
            "1",
            "--max_prompt_tokens",
            "8",
        ]
    )
    cfg.group = 1
    r = plan.estimate(cfg, m, 1, plan.GIB, 24, cpu=True)
    assert r["tokens"] == 4 * 32 and r["flops_rollout"] == pytest.approx(
        counter.get_total_flops(), rel=0.05
    )
    assert r["flops_train"] == 3 * r["flops_rollout"]


def test_what_the_plan_says_moves_as_it_must():
    m, base = plan.read_shape("Qwen/Qwen2.5-7B"), lad.load_config([])

    def at(gpus=8, **changes):
        return plan.estimate(dataclasses.replace(base, **changes), m, gpus, 139 * plan.GIB, 4096)

    P = plan.parameters(m)[0]
    assert at()["weights"] == P / 2 and at()["moments"] == P and at(shard_size=4)["weights"] == P
    # whole gradients are what a big model dies of
    assert at()["gradients"] == P / 2 and at(reduce_each=False)["gradients"] == 4 * P
    assert at(reduce_each=False)["update"] == at()["update"] + 3.5 * P
    assert at(checkpointing=False)["update"] > 5 * at()["update"]
    assert (
        at(tensor_parallel=2)["vllm_weights"] == P
        and at(kl_coef=0.1)["training"] == at()["training"] + P / 2
    )
    assert (
        at(vllm_memory=0.3)["rollout"] < at()["rollout"]
        and at(vllm_memory=0.3)["training"] == at()["training"]
    )
    # one copy more, but for LoRA, and where shards rest in the CPU's memory
    assert at(track_change=True)["training"] == at()["training"] + P / 2
    for other in (dict(lora_rank=16), dict(offload=True)):
        assert at(track_change=True, **other)["training"] == at(**other)["training"]
    assert at()["fits"] and not at(gpus=1)["fits"]
    flags, better = plan.advise(base, m, 1, 139 * plan.GIB, 4096)
    assert flags and better["fits"] and at(gpus=1, **flags)["fits"]
    llama = "meta-llama/Meta-Llama-3-70B"  # vLLM's copy alone is 131 GiB
    assert (
        plan.advise(
            lad.load_config(["--model", llama]), plan.read_shape(llama), 1, 139 * plan.GIB, 4096
        )[0]
        is None
    )


def test_commands(forks):
    said = launch(["lad.py", "--config", "fade-code-32b", "--plan", "--gpus", 32]).stdout
    assert (
        "32,581,097,472 parameters" in said
        and "It fits" in said
        and "checkpoint: 390.973 GB" in said
    )
    said = forks.run(
        "tools/plan.py", "--config", "lad-math-7b", "--gpus", 1, "--gpu_memory", 80, code=1
    )
    assert "It does not fit 80 GiB" in said
    for flags, says in (
        (["--gpus", 3], "does not divide by 3"),
        (["--gpus", "many"], "want numbers"),
        (["--promts", 8], "did you mean 'prompts'"),
        (["--length", 10**6], "up to max_tokens"),
    ):
        said = forks.run("tools/plan.py", *flags, code=2)
        assert says in said and said.count("\n") == 1, said


KNOB = '    my_knob: int = knob(1, "of a fork", 1)\n\n    # data\n'
ROW = 'OBJECTIVES["mine"] = Objective(grpo, needs=("ref",))\n\n\ndef advantages('


@pytest.mark.slow
def test_a_copy_of_lad_plans_with_its_own_knobs_and_objectives(tmp_path):
    """mine.py, with a knob and a row of its own: the row's reference is counted."""
    source = (ROOT / "lad.py").read_text()
    mine = source.replace("    # data\n", KNOB, 1).replace("def advantages(", ROW, 1)
    assert "my_knob" in mine and '"mine"' in mine
    (tmp_path / "mine.py").write_text(mine)
    for name in ("harness", "tools", "baselines.py", "verify.py", "configs.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    flags = ["--plan", "--model", "Qwen/Qwen2.5-0.5B", "--objective", "mine", "--my_knob", 3]
    said = launch([tmp_path / "mine.py", *flags]).stdout
    assert "frozen reference, sharded" in said and "It fits" in said, said
    said = launch(["lad.py", *flags], check=False).stdout
    assert said.startswith("plan.py: error:") and said.count("\n") == 1, said


@pytest.mark.parametrize(
    "name,text,says",
    [
        ("none.py", None, "no such Python file"),
        ("broken.py", "def f(:", "SyntaxError"),
        ("other.py", "x = 1", "has no load_config"),
    ],
)
def test_a_script_that_is_no_copy_of_lad_gets_one_line(name, text, says, tmp_path, capsys):
    if text:
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit) as leaving:
        plan.main(["--script", str(tmp_path / name)])
    said = capsys.readouterr()
    assert leaving.value.code == 2 and said.out == ""
    assert says in said.err and said.err.count("\n") == 1


def test_own_flags_are_taken_out_of_the_command_line():
    own, rest = plan.read_own_flags(
        ["--gpus=4", "--prompts", "8", "--plan", "--length", "9", "--steps=3"]
    )
    assert (own.gpus, own.length, own.gpu_memory) == ("4", "9", "")
    assert rest == ["--prompts", "8", "--steps=3"]


def test_table_in_the_docs_is_what_plan_prints():
    page = (ROOT / "docs/planning.md").read_text()
    if (
        torch.cuda.is_available()
        and torch.cuda.get_device_properties(0).total_memory // plan.GIB != 139
    ):
        pytest.skip("the table is for GPUs of 139 GiB")
    printed = launch(["tools/plan.py", "--table", "--gpu_memory", 139]).stdout
    assert printed in page


def test_the_page_compares_what_the_plan_says_now():
    """Its counted bytes are tests/fake_ranks.py's; beside them stands this plan, within 5%."""
    page = (ROOT / "docs/planning.md").read_text()
    row = r"^\| (\S+) \| (\d+) \| (none|`.*`) \| (\S+) GiB \| (\S+) GiB \| \S+ \|$"
    rows = re.findall(row, page, re.M)
    assert len(rows) == 15  # 70B on one GPU does not fit
    names = {model.split("/")[1]: model for model in plan.TABLE}
    for name, gpus, flags, planned, counted in rows:
        words = [] if flags == "none" else flags.strip("`").split()
        cfg = lad.load_config(["--model", names[name], *words])
        shape = plan.read_shape(names[name])
        r = plan.estimate(cfg, shape, int(gpus), 139 * plan.GIB, cfg.max_tokens / 2)
        says = (r["training"] - plan.ASSUMPTIONS["overhead"]) / plan.GIB
        assert f"{says:.2f}" == planned
        assert says == pytest.approx(float(counted), rel=0.05)


@pytest.mark.gpu
def test_one_gpu_against_measured_memory(tmp_path):
    """The training phase of a 0.5B shape (random weights) on one GPU: the allocator's peak within
    20% of the plan, less what is not the allocator's."""
    from transformers import AutoConfig, AutoModelForCausalLM

    m = plan.read_shape("Qwen/Qwen2.5-0.5B")
    config = AutoConfig.for_model(
        m.kind,
        hidden_size=m.hidden,
        num_hidden_layers=m.layers,
        num_attention_heads=m.heads,
        num_key_value_heads=m.kv,
        intermediate_size=m.inter,
        vocab_size=m.vocab,
        tie_word_embeddings=m.tied,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    cfg = dataclasses.replace(
        lad.load_config(
            [
                "--prompts",
                "8",
                "--max_tokens",
                "1024",
                "--micro_tokens",
                "8192",
                "--objective",
                "grpo",
            ]
        ),
        model=str(tmp_path),
    )
    device = ranks.join(cfg)
    model = lad.build_model(tmp_path, cfg, device)
    lad.turn_on_compile(cfg, device, model)  # the head's eager path needs twice the memory
    optimizer = torch.optim.AdamW(model.parameters(), 1e-6, fused=True)
    samples = [
        dict(prompt=[5] * 256, tokens=[6] * 768, behaviour=[0.0] * 768, adv=1.0, scale=1.0)
        for _ in range(64)
    ]
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        lad.accumulate_gradient(model, [dict(s) for s in samples], cfg, device)
        lad.optimizer_step(model, optimizer, cfg)
    r = plan.estimate(cfg, m, 1, plan.GIB, 768)
    torch.distributed.destroy_process_group()
    assert torch.cuda.max_memory_allocated() == pytest.approx(
        r["training"] - plan.ASSUMPTIONS["overhead"], rel=0.2
    )
