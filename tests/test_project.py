"""What the project promises of itself: the README's commands, presets that can be built."""
import re, shlex, tomllib

import pytest
import torch

import lad
from conftest import ROOT

README = (ROOT / "README.md").read_text()


def commands():
    """Every shell line of the README's code blocks that runs something of ours."""
    lines = "\n".join(re.findall(r"```(?:sh|bash)\n(.*?)```", README, re.S)).replace("\\\n", " ").splitlines()
    return [line.split("#")[0].strip() for line in lines if re.search(r"\b(lad|tiny|verify|bandit|bench|study|plan|plot|eval|setup)\.(py|sh)\b|pytest", line)]


def test_readme_is_finished():
    assert not re.search(r"^TABLE$|@@\w|TODO", README, re.M)
    anchors = {"#" + re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)$", README, re.M)}
    assert all(path.startswith("http") or path in anchors or (ROOT / path).exists() for path in re.findall(r"\]\(([^)]+)\)", README))


def test_readme_has_the_two_commands_and_ci_runs_the_second():
    found = commands()
    assert found[0].startswith("bash setup.sh && .venv/bin/python lad.py --config tiny")
    assert found[1] == "bash setup.sh && .venv/bin/python -m pytest"
    assert found[1] in (ROOT / ".ci/run").read_text()


@pytest.mark.parametrize("command", commands())
def test_readme_commands_name_what_exists(command):
    """Files exist, flags parse and presets are there. (That they run is the README's tables' business.)"""
    for part in re.split(r"&&|;|\||\bdo\b|\bdone\b", command):
        words = shlex.split(part)
        for word in words:
            if word.endswith((".py", ".sh")) and not word.startswith("-") and word != "mine.py":
                assert (ROOT / word).exists(), word
        if "lad.py" in words and "cp" not in words:
            argv = [w.replace("$objective", "fade").replace("$seed", "0") for w in words[words.index("lad.py") + 1:]]
            if not {"--help", "--resume", "--plan"} & set(argv):
                lad.load_config([w for w in argv if w not in (">", "tail", "-1")])


SHAPES = {   # config.json of the hub models, as published (sources in shared notes); the vocabulary and depth cut down
    "Qwen/Qwen2.5-0.5B": dict(hidden_size=896, num_attention_heads=14, num_key_value_heads=2, intermediate_size=4864, tie_word_embeddings=True),
    "Qwen/Qwen2.5-0.5B-Instruct": dict(hidden_size=896, num_attention_heads=14, num_key_value_heads=2, intermediate_size=4864, tie_word_embeddings=True),
    "Qwen/Qwen2.5-7B": dict(hidden_size=3584, num_attention_heads=28, num_key_value_heads=4, intermediate_size=18944, tie_word_embeddings=False),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": dict(hidden_size=3584, num_attention_heads=28, num_key_value_heads=4, intermediate_size=18944, tie_word_embeddings=False),
    "nvidia/OpenMath-Nemotron-1.5B": dict(hidden_size=1536, num_attention_heads=12, num_key_value_heads=2, intermediate_size=8960, tie_word_embeddings=True),
    "Vinnnf/Thinkless-1.5B-RL-DeepScaleR": dict(hidden_size=1536, num_attention_heads=12, num_key_value_heads=2, intermediate_size=8960, tie_word_embeddings=False),
    "facebook/cwm-sft": dict(model_type="cwm", hidden_size=6144, num_attention_heads=48, num_key_value_heads=8, intermediate_size=21504, head_dim=128, sliding_window=5),
}
PRESETS = {name: lad.Config(**table).model for name, table in tomllib.loads((ROOT / "configs.toml").read_text()).items() if name != "bench"}


@pytest.mark.parametrize("name", [n for n, m in PRESETS.items() if m != "tiny"])
def test_every_presets_architecture_builds_and_trains(name, tmp_path):
    """A stand-in of the same architecture and proportions, 1/16 wide and five layers deep, saved and read through build_model, agrees
    with transformers' own forward and takes a gradient."""
    from transformers import AutoConfig, AutoModelForCausalLM
    shape = dict(SHAPES[PRESETS[name]])
    kind = shape.pop("model_type", "qwen2")
    heads, kv = shape.pop("num_attention_heads"), shape.pop("num_key_value_heads")
    ratio = heads // kv
    small = dict(shape, hidden_size=16 * 2 * ratio, num_attention_heads=2 * ratio, num_key_value_heads=2, intermediate_size=shape["intermediate_size"] // 64,
                 num_hidden_layers=5, vocab_size=64, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    small["head_dim"] = 16
    config = AutoConfig.for_model(kind, **small)
    torch.manual_seed(0)
    reference = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    reference.save_pretrained(tmp_path)
    cfg = lad.Config(checkpointing=False)
    model = lad.build_model(tmp_path, cfg, torch.device("cpu"))
    samples = [dict(prompt=[3, 4, 5], tokens=list(range(6, 20)), behaviour=[0.0] * 14, adv=1.0, scale=1.0),
               dict(prompt=[9], tokens=[8, 7], behaviour=[0.0] * 2, adv=1.0, scale=1.0)]
    logp, *_ = model(lad.pack(samples, torch.device("cpu")), 1.0, 4096)
    want = []
    for s in samples:
        n = len(s["tokens"])
        logits = reference(torch.tensor([s["prompt"] + s["tokens"]])).logits[0, -n - 1: -1]
        want.append(logits.log_softmax(-1)[torch.arange(n), torch.tensor(s["tokens"])])
    torch.testing.assert_close(logp, torch.cat(want), rtol=1e-4, atol=1e-4)
    logp.sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_readme_names_tests_that_exist():
    defined = set(re.findall(r"^def (test_\w+)", "".join(p.read_text() for p in (ROOT / "tests").glob("test_*.py")), re.M))
    assert set(re.findall(r"`(test_\w+)`", README)) - {p.stem for p in (ROOT / "tests").glob("test_*.py")} <= defined
