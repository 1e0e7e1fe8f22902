"""Which models the trainer computes as transformers does, and which it refuses; what stops a run
whose trainer and vLLM compute different models."""

import dataclasses
import json
import math
import shutil

import pytest
import torch
from conftest import metrics
from safetensors.torch import load_file, save_file

import lad
from harness import families
from tools import families as table

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


# ==== 2. The families ===========================================================================

# Those of the presets and of the papers, and one of each peculiarity; the others are slow tests
QUICK = {"qwen2-tied", "qwen3", "llama3", "mistral", "olmo2", "phi3", "granite", "gemma3", "cwm"}
QUICK |= {"olmo3", "seed-oss"}
TRAINED = [name for name, family in table.FAMILIES.items() if not family.refused]
REFUSED = [name for name, family in table.FAMILIES.items() if family.refused]


def slow_unless(quick, names):
    """pytest's parameters: those not among the quick ones are slow."""
    marks = {True: (), False: (pytest.mark.slow,)}
    return [pytest.param(name, marks=marks[name in quick]) for name in names]


@pytest.fixture
def folder(tmp_path):
    """folder(name) makes the small model of a family."""

    def make(name):
        table.make_folder(table.FAMILIES[name], tmp_path / name)
        return tmp_path / name

    return make


@pytest.mark.parametrize("name", slow_unless(QUICK, TRAINED))
def test_log_probs_and_gradients_are_those_of_transformers(folder, name):
    """Each sample alone, all packed with shared prompts, and packed as on CUDA; while training,
    with recomputed activations, whatever dropout the config asks for."""
    path = folder(name)
    assert families.fault_of(path) == ""
    for layout, (apart, gradient) in table.distances_from_transformers(path).items():
        assert apart < 5e-5 and gradient < 5e-5, (layout, apart, gradient)


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_computed_wrongly_is_refused_in_one_line(folder, name):
    fault = families.fault_of(folder(name))
    assert table.FAMILIES[name].refused in fault and "\n" not in fault


def test_a_refusal_comes_before_anything_heavy(forks, tiny, folder, tmp_path):
    patch = "lad.load_data = lad.start_vllm = lad.build_model = None"
    flags = ["--config", "tiny", "--model", folder("qwen3-moe"), "--out", tmp_path / "run"]
    said = forks.run("lad.py", *flags, patch=[patch], code=2)
    assert said.count("error: ") == 1 and "it is a mixture of experts (num_experts = 4)" in said


def edited(folder, **changes):
    """The folder, with other values in its config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def test_what_a_folder_lacks_or_has_in_another_shape_is_named(random_model, tmp_path):
    path = shutil.copytree(random_model, tmp_path / "m")
    assert families.fault_of(path) == ""
    weights = load_file(path / "model.safetensors")
    lost = weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, path / "model.safetensors")
    fault = families.fault_of(path)
    assert "finds 1 of its 27 weights in none of the files" in fault and "layers.1.mlp.up" in fault

    save_file(
        weights | {"model.layers.1.mlp.up_proj.weight": lost[:-1]}, path / "model.safetensors"
    )
    assert "is [95, 64] in the files and [96, 64] by config.json" in families.fault_of(path)
    (path / "model.safetensors").unlink()
    assert "no *.safetensors file" in families.fault_of(path)


def test_configs_that_are_refused(random_model, tmp_path):
    def fault(**changes):
        shutil.rmtree(tmp_path / "m", ignore_errors=True)
        return families.fault_of(edited(shutil.copytree(random_model, tmp_path / "m"), **changes))

    assert "quantized" in fault(quantization_config=dict(quant_method="fp8"))
    assert "cannot build it" in fault(model_type="none such")
    assert "more than text" in fault(vision_config=dict(hidden_size=1))


@pytest.mark.parametrize("asked", ["softcap", "s_aux"])
def test_an_argument_that_our_attention_does_not_know_is_refused(random_model, asked):
    """A layer that asks for more than causality, a window and a scale."""
    from transformers import AutoConfig

    calls = families.register_probe()
    config = AutoConfig.from_pretrained(random_model)
    model = families.empty_model(config, attn_implementation="probe")
    assert families.fault_of_attention(model, calls) == ""
    attention = model.base_model.layers[1].self_attn
    forward = attention.forward
    attention.forward = lambda *args, **more: forward(*args, **more, **{asked: 30.0})
    assert f"asks attention for {asked} (layer 1)" in families.fault_of_attention(model, calls)


def test_a_window_that_the_layer_does_not_tell_of_is_refused(folder):
    """The mask says sliding window, the call of attention does not: it would be full attention."""
    from transformers import AutoConfig

    calls = families.register_probe()
    config = families.probe_config(AutoConfig.from_pretrained(folder("mistral")))
    model = families.empty_model(config, attn_implementation="probe")
    assert families.fault_of_attention(model, calls) == ""
    model.base_model.layers[2].self_attn.config = copy_without_window(config)
    assert "another attention in layer 2" in families.fault_of_attention(model, calls)


def copy_without_window(config):
    config = families.probe_config(config)
    config.sliding_window = None
    return config


def test_windows_and_scales_matter_in_these_models(folder):
    """The tolerance above would see them gone."""
    path = folder("cwm")
    samples = table.make_samples(16)
    cpu = torch.device("cpu")
    logps = []
    for window in (6, 7):
        model = lad.build_model(edited(path, sliding_window=window), lad.Config(), cpu)
        logps.append(model(lad.pack(samples, cpu), 1.0, 16)[0])
    assert (logps[0] - logps[1]).abs().max() > 0.01


# ==== 3. vLLM, and the folder that is left ======================================================


@pytest.mark.slow
def test_cwm_trains_and_is_exported_beside_vllms_own_copy_of_its_class(forks, folder, tmp_path):
    """vLLM serves it by transformers' class, which it patches in this process: the trainer's model
    and the exported one are built of the same class. fade-code-32b's architecture."""
    from transformers import AutoModelForCausalLM

    out = tmp_path / "run"
    flags = "--config tiny --objective fade --steps 2 --eval_data= --prompts 4 --minibatches 1"
    forks.run("lad.py", *flags.split(), "--model", folder("cwm"), "--out", out)
    steps = [line for line in metrics(out) if "loss" in line]
    assert len(steps) == 2 and all(line["rollout_kl"] < 1e-6 for line in steps)
    model = AutoModelForCausalLM.from_pretrained(out / "hf")
    assert type(model).__name__ == "CwmForCausalLM"


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in TRAINED if not table.FAMILIES[n].refused_by_vllm])
def test_vllm_agrees_after_every_sync_and_the_export_loads(forks, folder, tmp_path, name):
    path = folder(name)
    forks.run("tools/families.py", "--vllm", path, "--json", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["vllm"] < 1e-3 and found["export"] < 1e-3, found


def test_the_page_has_a_line_for_every_family():
    page = (table.ROOT / "docs/families.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ") and "`" in line]
    assert [row.split("|")[1].strip() for row in rows] == [
        f.models for f in table.FAMILIES.values()
    ]
