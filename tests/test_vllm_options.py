"""harness/vllm_options.py: what --vllm may hold, what it may not and why, and that weights still
arrive in an engine that was given some."""

import json
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, metrics

import lad
from harness import vllm_options

FLAGS = "--config tiny --objective grpo --steps 1 --prompts 4 --group 4 --minibatches 1".split()
FLAGS += "--epochs 1 --max_tokens 8 --eval_every 0 --eval_samples 2 --eval_prompts 4".split()


def refused(capsys, text):
    """The one line with which lad.py leaves before it loads anything."""
    with pytest.raises(SystemExit) as stop:
        lad.load_config(["--config", "tiny", "--vllm", text])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and ": error: vllm" in said
    return said


# ==== 1. Refused at once ========================================================================


def test_what_is_no_object_is_refused(capsys):
    for text in ("x", "[1]", "3", '{"a": }', "quantization=fp8"):
        assert "expected a JSON object of vLLM's options" in refused(capsys, text)


def test_what_a_knob_sets_names_the_knob(capsys):
    for name, knob in vllm_options.KNOBS.items():
        said = refused(capsys, json.dumps({name: 1}))
        assert f"{name} = 1: that is set by the knob {knob}" in said
        assert knob.split()[0].strip(":") in lad.KNOBS  # and there is such a knob


def test_what_a_run_relies_on_says_why(capsys):
    for name, why in vllm_options.FIXED.items():
        assert why in refused(capsys, json.dumps({name: True}))
    said = refused(capsys, '{"logprobs_mode": "raw_logprobs"}')
    assert "of what was sampled from" in said


def test_all_that_start_vllm_sets_may_not_be_set_twice():
    """Every option that lad.py gives vLLM, on a CPU and on a GPU, but for those of its logs and
    those that only a CPU needs."""
    source = (ROOT / "lad.py").read_text()
    body = source[source.index("def start_vllm") : source.index("\nVLLM_OWN")]
    given = set(re.findall(r"^\s+(\w+)=[^=]", body, re.M))
    free = {"disable_log_stats", "use_tqdm_on_load", "enable_prefix_caching"}
    free |= {"block_size", "enable_chunked_prefill"}
    assert {"seed", "dtype", "logprobs_mode"} < given
    assert given - free <= set(vllm_options.KNOBS) | set(vllm_options.FIXED)


@pytest.mark.parametrize("value", ["awq", "gptq", "compressed-tensors", "torchao", 8, None])
def test_quantized_weights_that_no_sync_brings_are_refused(value, capsys):
    said = refused(capsys, json.dumps({"quantization": value}))
    assert "a sync brings" in said and "fp8_per_tensor" in said


def test_fp8_names_its_successor(capsys):
    assert "take fp8_per_tensor" in refused(capsys, '{"quantization": "fp8"}')


def test_loaders_and_drafts(capsys):
    for value in ("dummy", "sharded_state", "tensorizer", "pt", 1):
        said = refused(capsys, json.dumps({"load_format": value}))
        assert "does not read the weights" in said
    for value in ({"method": "eagle", "model": "x"}, {"model": "x"}, "ngram"):
        said = refused(capsys, json.dumps({"speculative_config": value}))
        assert "do not outlive a sleep" in said
    assert "speculative_config" in refused(capsys, '{"spec_model": "x"}')


def test_what_may_be_given_is_passed_on():
    for given in (
        {"quantization": "fp8_per_tensor"},
        {"load_format": "safetensors"},
        {"max_num_batched_tokens": 8192, "kv_cache_dtype": "fp8"},
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
    ):
        assert vllm_options.read(json.dumps(given)) == given
    assert vllm_options.read("") == {}


def test_our_lists_are_of_options_that_vllm_has():
    """A name that vLLM dropped would refuse nothing, and one that it renamed would pass."""
    from dataclasses import fields

    from vllm.config.quantization import ONLINE_QUANT_SHORTHAND_NAMES
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER

    names = {field.name for field in fields(EngineArgs)}
    assert set(vllm_options.KNOBS) | set(vllm_options.FIXED) <= names
    # Experts alone are what the others are for, and models with experts are refused
    assert set(ONLINE_QUANT_SHORTHAND_NAMES) - set(vllm_options.ONLINE) == {
        "int8_per_channel_weight_only",
        "nvfp4_per_token",
    }
    assert set(vllm_options.ONLINE) <= set(ONLINE_QUANT_SHORTHAND_NAMES)
    assert set(vllm_options.LOADERS) <= set(_LOAD_FORMAT_TO_MODEL_LOADER)


def test_batch_invariance_is_refused_where_it_cannot_work(monkeypatch, capsys):
    """On a CPU always; on capability 8 where there is a gradient to lose."""

    def said(device, capability=(9, 0), trains=True):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        try:
            vllm_options.check_environment(torch.device(device), trains)
        except SystemExit as stop:
            assert stop.code == 2
        return capsys.readouterr().err

    assert not said("cpu")
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert "is for GPUs" in said("cpu") and "is for GPUs" in said("cpu", trains=False)
    assert "capability 8.6" in said("cuda", (8, 6))
    assert not said("cuda", (8, 0), trains=False)
    assert not said("cuda", (9, 0)) and not said("cuda", (10, 0))


def test_a_linear_layer_that_a_library_replaces_has_no_gradient():
    """What stands behind that refusal. In a process of its own: torch is not itself afterwards."""
    code = """
import torch
library = torch.library.Library("aten", "IMPL")
library.impl("aten::linear", lambda x, w, b=None: x @ w.t(), "CPU")
w = torch.ones(3, 4, requires_grad=True)
torch.nn.functional.linear(torch.ones(2, 4), w).sum().backward()"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "aten::linear_backward" in done.stderr


# ==== 2. Refused by vLLM ========================================================================


def run(forks, out, given, code=0):
    """A run with these options; what it printed."""
    return forks.run("lad.py", *FLAGS, "--out", out, "--vllm", json.dumps(given), code=code)


def last_line(text):
    return text.strip().splitlines()[-1]


def test_vllm_checks_names_and_values_before_it_loads(forks, tmp_path):
    """One line, exit code 2: an unknown name, a wrong type, a value out of range, one that does not
    go with another, and a name inside a table, which vLLM itself would drop without a word."""
    wanted = {
        '{"max_num_batched_token": 8}': "did you mean 'max_num_batched_tokens'?",
        '{"max_num_batched_tokens": "many"}': "max_num_batched_tokens = 'many': Input should be",
        '{"kv_cache_dtype": "fp9"}': "cache_dtype = 'fp9': Input should be 'auto'",
        '{"max_num_batched_tokens": 8}': "max_num_batched_tokens (8) ",
        '{"compilation_config": {"modes": 1}}': "did you mean 'mode'?",
    }
    for given, why in wanted.items():
        said = run(forks, tmp_path / "run", json.loads(given), code=2)
        line = last_line(said)
        assert line.startswith("lad.py: error: ") and why in line, said
        assert "Traceback" not in said and "step " not in said


# ==== 3. Given to vLLM ==========================================================================


def test_options_reach_vllm_and_a_resumed_run(forks, tmp_path):
    """Drafts of n-grams: the log-probs are still of what was sampled from."""
    given = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}
    patch = """
generate = lad.generate
def told(llm, *args, **more):
    config = llm.llm_engine.vllm_config.speculative_config
    print("drafts of", config.num_speculative_tokens, flush=True)
    return generate(llm, *args, **more)
lad.generate = told"""
    flags = [*FLAGS, "--out", tmp_path / "run", "--vllm", json.dumps(given)]
    assert "drafts of 2" in forks.run("lad.py", *flags, patch=[patch])
    again = forks.run("lad.py", "--resume", tmp_path / "run", "--steps", "2", patch=[patch])
    assert "drafts of 2" in again
    steps = [line for line in metrics(tmp_path / "run") if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2]
    assert all(line["rollout_kl"] < 1e-6 for line in steps)


@pytest.mark.slow
def test_weights_arrive_in_an_engine_that_quantizes(forks, random_model, tmp_path):
    """Pushed by a sync they are what the engine makes of them when it starts with them. Needs a CPU
    for which vLLM's build has such a layer."""
    forks.start("tests/worker.py", ["quantized", random_model, tmp_path])
    codes, said, _ = forks.wait()
    if codes == [2] and "vLLM did not start" in said:
        pytest.skip(last_line(said))
    assert codes == [0], said[-4000:]


@pytest.mark.slow
def test_eval_takes_them_and_its_lines_say_so(forks, tmp_path):
    given = '{"max_num_batched_tokens": 4096}'
    flags = ["tiny", "--bench", "tiny", "--n", "1", "--limit", "2", "--max_tokens", "8"]
    forks.run("eval.py", *flags, "--max_prompt_tokens", "40", "--out", tmp_path, "--vllm", given)
    lines = [json.loads(line) for path in tmp_path.glob("*.jsonl") for line in open(path)]
    assert lines and all(line["settings"]["vllm"] == given for line in lines)
    said = forks.run("eval.py", *flags, "--out", tmp_path, "--vllm", '{"seed": 1}', code=2)
    assert "that is set by the knob seed" in last_line(said)
