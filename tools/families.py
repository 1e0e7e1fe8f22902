r"""
families.py: which families of models lad.py computes as transformers and vLLM do, and which ones it
refuses.

    python tools/families.py                           # the table, as markdown; some minutes
    python tools/families.py --out docs/families.md    # the page in the docs
    python tools/families.py --only qwen3,cwm          # some rows

For each row a folder of a small model with random weights is made by transformers' own config
class. lad.py refuses it, or its log-probs and gradients are compared with those of transformers'
own forward, one sequence at a time; vLLM's log-probs with lad.py's after weight syncs; and the
exported folder is loaded again. All in fp32, on the CPU.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
if __name__ == "__main__":  # as in lad.py: read when torch, OpenMP and vLLM are imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch

import lad
from harness import checkpoint, families, ranks, tiny

CPU = torch.device("cpu")

# ==== 1. The families ===========================================================================


@dataclass
class Family:
    """A row of the table: what it stands for, transformers' config class, what differs from SMALL;
    and, where lad.py refuses it, or vLLM as it starts, a part of the line that says so."""

    models: str
    config: str
    options: dict = field(default_factory=dict)
    refused: str = ""
    refused_by_vllm: str = ""


SMALL = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    max_position_embeddings=256,
)

SLIDING = dict(sliding_window=6, layer_types=["sliding_attention", "full_attention"] * 2)


def rope(kind, **options):
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=10000.0, **options))


LLAMA3 = rope(
    "llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
YARN = rope("yarn", factor=8.0, original_max_position_embeddings=32)
LONGROPE = rope(
    "longrope",
    short_factor=[1.0] * 16,
    long_factor=[2.0] * 16,
    original_max_position_embeddings=32,
    factor=8.0,
)
GRANITE = dict(
    logits_scaling=8.0,
    embedding_multiplier=6.0,
    residual_multiplier=0.4,
    attention_multiplier=0.1,
)
DROPOUT = dict(attention_dropout=0.5, residual_dropout=0.5)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
SINKS = dict(num_local_experts=4, num_experts_per_tok=2, **SLIDING)

# fmt: off
FAMILIES = {
    "qwen2": Family("Qwen2, Qwen2.5, R1-Distill-Qwen, OpenMath-Nemotron", "Qwen2"),
    "qwen2-tied": Family("Qwen2.5 0.5B to 3B", "Qwen2", dict(tie_word_embeddings=True)),
    "qwen2-yarn": Family("Qwen2.5 with YaRN", "Qwen2", YARN),
    "qwen2-window": Family("Qwen2 with use_sliding_window", "Qwen2",
                           dict(use_sliding_window=True, sliding_window=6, max_window_layers=2),
                           refused_by_vllm="Sliding window for some but all layers"),
    "qwen3": Family("Qwen3 (dense)", "Qwen3"),
    "llama": Family("Llama 1 and 2, SmolLM2, R1-Distill-Llama", "Llama"),
    "llama3": Family("Llama 3.1, 3.2, 3.3", "Llama", LLAMA3),
    "mistral": Family("Mistral 7B", "Mistral", dict(sliding_window=6)),
    "olmo2": Family("OLMo 2", "Olmo2"),
    "olmo3": Family("OLMo 3", "Olmo3", SLIDING),
    "phi3": Family("Phi-3 and 3.5 mini 4k, Phi-4", "Phi3"),
    "granite": Family("Granite 3", "Granite", GRANITE),
    "gemma": Family("Gemma 1", "Gemma"),
    "gemma3": Family("Gemma 3 1B and 270M (text)", "Gemma3Text", SLIDING),
    "cwm": Family("CWM 32B", "Cwm", SLIDING | LLAMA3),
    "smollm3": Family("SmolLM3", "SmolLM3"),
    "seed-oss": Family("Seed-OSS 36B", "SeedOss", DROPOUT),
    "starcoder2": Family("StarCoder2", "Starcoder2", dict(sliding_window=6, residual_dropout=0.5)),
    "cohere": Family("Command R", "Cohere", dict(tie_word_embeddings=True)),
    "glm4": Family("GLM-4 0414", "Glm4"),
    "exaone4": Family("EXAONE 4", "Exaone4", SLIDING),
    "arcee": Family("AFM 4.5B", "Arcee"),
    "hunyuan": Family("Hunyuan (dense)", "HunYuanDenseV1"),
    "gemma2": Family("Gemma 2", "Gemma2", SLIDING, refused="a softcap, mostly"),
    "phi": Family("Phi-1 to 2", "Phi", refused="no plain lm_head"),
    "phi3-longrope": Family("Phi-3 mini 128k, Phi-4-mini", "Phi3", LONGROPE,
                            refused="of type 'longrope'"),
    "dynamic": Family("any with dynamic RoPE", "Llama", rope("dynamic", factor=4.0),
                      refused="of type 'dynamic'"),
    "qwen3-moe": Family("Qwen3-MoE, Qwen3-Next, all mixtures of experts", "Qwen3Moe", EXPERTS,
                        refused="a mixture of experts"),
    "gpt-oss": Family("GPT-OSS", "GptOss", SINKS, refused="a mixture of experts"),
    "granite-swa": Family("Granite with sliding windows", "GraniteSWA", dict(sliding_window=6),
                          refused="s_aux"),
    "lfm2": Family("LFM2", "Lfm2", dict(layer_types=["conv", "full_attention"] * 2),
                   refused="a convolution"),
    "llama4": Family("Llama 4", "Llama4Text", dict(num_local_experts=4),
                     refused="a mixture of experts"),
    "stablelm": Family("StableLM", "StableLm", refused="does not hand the layout"),
}
# fmt: on


def make_folder(family, folder):
    """A save_pretrained folder of a family with random weights, and tiny's tokenizer."""
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny.make()["model"])
    options = dict(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    config = getattr(transformers, family.config + "Config")(**SMALL | options | family.options)
    torch.manual_seed(0)
    with families.without_vllm(config):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # Weights under which attention has something to look at, and norms that are not all alike
    for p in model.parameters():
        if p.dim() > 1:
            p.data.normal_(std=1.5 * p.shape[-1] ** -0.5)
        else:
            p.data.add_(torch.randn_like(p), alpha=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ==== 2. The trainer against transformers =======================================================


def make_samples(vocabulary):
    """4 prompts with 3 responses each, of many lengths, longer than the windows."""
    rng = random.Random(0)

    def word(least, most):
        return [rng.randrange(vocabulary) for _ in range(rng.randint(least, most))]

    samples = []
    for _ in range(4):
        prompt = word(2, 16)
        for _ in range(3):
            samples.append(dict(prompt=prompt, tokens=word(1, 24)))
    return samples


def transformers_logprobs(model, samples, temperature=1.0):
    """[R] of transformers' own forward, a sequence at a time."""
    logps = []
    for s in samples:
        n = len(s["tokens"])
        logits = model(torch.tensor([s["prompt"] + s["tokens"]])).logits[0, -n - 1 : -1]  # [n,V]
        logp = (logits / temperature).log_softmax(-1)
        logps.append(logp[torch.arange(n), torch.tensor(s["tokens"])])
    return torch.cat(logps)


def distances_from_transformers(folder):
    """{layout: (largest difference of a log-prob, relative difference of the gradient)}: each
    sample alone; all in one row, with shared prompts; that row with CUDA's attention emulated."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    with families.without_vllm(config):
        reference = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
    samples = make_samples(config.vocab_size)
    want = transformers_logprobs(reference, samples)
    weight = torch.linspace(-1, 1, len(want))
    (want * weight).sum().backward()
    gradient = {name: p.grad for name, p in reference.named_parameters()}

    found = {}
    model = lad.build_model(folder, lad.Config(), CPU)
    alone = [[s] for s in samples]
    for layout, rows in (("alone", alone), ("packed", [samples]), ("varlen", [samples])):
        with varlen_on_cpu() if layout == "varlen" else contextlib.nullcontext():
            logp = torch.cat([model(lad.pack(row, CPU), 1.0, 16)[0] for row in rows])
            (logp * weight).sum().backward()
        apart = (logp - want).abs().max().item()
        found[layout] = (apart, gradient_distance(model, gradient))
        model.zero_grad()
    return found


def gradient_distance(model, want):
    """||g - want|| / ||want||, over all parameters."""
    apart, size = 0.0, 0.0
    for name, p in model.named_parameters():
        apart += (p.grad - want[name]).double().square().sum().item()
        size += want[name].double().square().sum().item()
    return (apart / size) ** 0.5


@contextlib.contextmanager
def varlen_on_cpu():
    """lad.py takes the way that it takes on CUDA, through torch's varlen_attn, of which this is a
    loop with the same arguments: a CPU has no such kernel."""
    from torch.nn.attention import varlen

    kept = lad.padded_attention, varlen.varlen_attn
    lad.padded_attention, varlen.varlen_attn = lad.varlen_attention, looped_varlen_attn
    try:
        yield
    finally:
        lad.padded_attention, varlen.varlen_attn = kept


def looped_varlen_attn(q, k, v, begins, ends, longest_q, longest_k, *, scale, window_size, **more):
    """[M,heads,D] of q, k, v in [M,heads,D], a sequence and a head at a time. A token sees
    window_size[0] tokens before its own (-1: all) and window_size[1] after it."""
    assert torch.equal(begins, ends) and more == dict(enable_gqa=True) and window_size[1] == 0
    assert longest_q == longest_k == int(begins.diff().max())
    shared = q.shape[1] // k.shape[1]  # query heads to a head of keys
    parts = []
    for begin, end in zip(begins[:-1].tolist(), begins[1:].tolist(), strict=True):
        place = torch.arange(end - begin)
        back = place[:, None] - place[None, :]  # [n,n]
        seen = (back >= 0) & ((window_size[0] < 0) | (back <= window_size[0]))
        heads = []
        for h in range(q.shape[1]):
            scores = scale * q[begin:end, h] @ k[begin:end, h // shared].t()
            heads.append(
                scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v[begin:end, h // shared]
            )
        parts.append(torch.stack(heads, 1))
    out = torch.cat(parts)
    return out


# ==== 3. vLLM and the exported folder ===========================================================


def distances_from_vllm(folder, out):
    """{"vllm": the largest difference of a log-prob after any of three weight syncs, between which
    the weights move, "export": of the folder written to out/hf, loaded by transformers}. To be
    called in a process of its own: vLLM comes once to a process."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cfg = dataclasses.replace(
        lad.Config(),
        device="cpu",
        model=str(folder),
        out=str(out),
        objective="grpo",
        kind="countdown",
        prompts=4,
        max_prompt_tokens=40,
        max_tokens=24,
        vllm_memory=0.1,
        temperature=0.8,
        micro_tokens=100,
    )
    device = ranks.join(cfg)
    prompts = [s["prompt"] for s in make_samples(16)[::3]]
    llm = lad.start_vllm(cfg, str(folder), device)
    model = lad.build_model(folder, cfg, device)
    optimizer = torch.optim.AdamW(model.parameters(), 0.005)
    apart = 0.0
    for _sync in range(3):
        with lad.awake(llm, model, device):
            groups = lad.generate(llm, cfg, prompts, 3, 7)
        samples = []
        for prompt, group in zip(prompts, groups, strict=True):
            for i, s in enumerate(group):
                samples.append(dict(s, prompt=prompt, adv=float(i - 1), scale=1.0))
        lad.score_samples(model, "old", samples, cfg, device)
        for s in samples:
            apart = max(apart, (s["old"] - torch.tensor(s["behaviour"])).abs().max().item())
        lad.accumulate_gradient(model, samples, cfg, device)
        lad.optimizer_step(model, optimizer, cfg)

    # The folder that a run leaves behind, as anybody loads it
    lad.score_samples(model, "old", samples, cfg, device)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    weights = lad.named_weights(model, torch.float32)
    checkpoint.export(cfg, weights, model.config, tokenizer, folder)
    with families.without_vllm(model.config):
        again = AutoModelForCausalLM.from_pretrained(out / "hf", dtype=torch.float32)
    again.eval()
    with torch.no_grad():
        logp = transformers_logprobs(again, samples, cfg.temperature)
    exported = (logp - torch.cat([s["old"] for s in samples])).abs().max().item()
    return dict(vllm=apart, export=exported)


# ==== 4. The table ==============================================================================


def measure(name, work):
    """What is known of a family: {refused: a line}, or {alone, packed, varlen, vllm, export}."""
    folder = work / name
    make_folder(FAMILIES[name], folder)
    fault = families.fault_of(folder)
    if fault:
        return dict(refused=fault)
    found = distances_from_transformers(folder)
    command = [sys.executable, __file__, "--vllm", folder, "--json", work / f"{name}.json"]
    done = subprocess.run(list(map(str, command)), stderr=subprocess.PIPE, text=True)
    if done.returncode:
        return dict(found, error=done.stderr.strip().splitlines()[-1])
    return dict(found, **json.loads((work / f"{name}.json").read_text()))


def to_row(name, found):
    """A line of the markdown table."""
    family = FAMILIES[name]
    start = f"| {family.models} | `{family.config}` | "
    if "refused" in found:
        return start + f"refused: {found['refused']} | | | | |"
    logps = max(found[layout][0] for layout in ("alone", "packed"))
    gradient = max(found[layout][1] for layout in ("alone", "packed"))
    cells = [f"{x:.0e}" for x in (logps, gradient, found["varlen"][0])]
    if family.refused_by_vllm and family.refused_by_vllm in found.get("error", ""):
        cells += [f"refused by vLLM: {family.refused_by_vllm} ..", ""]
    elif "error" in found:
        cells += [f"**fails**: {found['error'][:200]}", ""]
    else:
        cells += [f"{found['vllm']:.0e}", f"{found['export']:.0e}"]
    return start + " | ".join(cells) + " |"


HEAD = """\
| models | class | log-probs | gradient | CUDA's packing | vLLM | export |
|---|---|---|---|---|---|---|"""

MARK = "<!-- the table: python tools/families.py --out docs/families.md -->\n"


def put_table(path, measured):
    """Put rows {name: line} between the two marks of a page; rows that were not measured now stay
    as they are there."""
    before, table, after = path.read_text().split(MARK)
    lines = [HEAD]
    for name, family in FAMILIES.items():
        start = f"| {family.models} | "
        kept = [line for line in table.splitlines() if line.startswith(start)]
        lines += [measured[name]] if name in measured else kept
    path.write_text(before + MARK + "\n".join(lines) + "\n" + MARK + after)


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", default=",".join(FAMILIES), help="names of rows, with commas")
    parser.add_argument("--out", type=Path, help="put the table between the marks of that page")
    parser.add_argument("--vllm", type=Path, help="compare one folder with vLLM, and write --json")
    parser.add_argument("--json", type=Path, help="where --vllm writes")
    args = parser.parse_args(argv)
    ranks.be_quiet()
    if args.vllm:
        found = distances_from_vllm(args.vllm, args.json.with_suffix(".out"))
        args.json.write_text(json.dumps(found))
        return

    measured = {}
    with tempfile.TemporaryDirectory() as work:
        for name in args.only.split(","):
            measured[name] = to_row(name, measure(name, Path(work)))
            print(measured[name], flush=True)
            if args.out:
                put_table(args.out, measured)


if __name__ == "__main__":
    main(sys.argv[1:])
