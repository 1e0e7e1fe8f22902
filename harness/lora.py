"""
LoRA, arXiv 2106.09685: the model's weights stay as they are, and beside each linear layer W
[out,in] of a block two small matrices are trained,

    y = W x + (alpha / rank) B A x,      A [rank,in], B [out,rank]

A starts at random, B at zero: until the first update the model is the one that it was. Switched
off, the adapters leave that model at any time, which is why a reference needs no second one. vLLM
and the export get W + (alpha / rank) B A. Embeddings, norms, biases and the head are not adapted,
so a tied head stays tied.
"""

import contextlib
import json
import math
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from harness.ranks import patiently, rank, set_whole, whole
from harness.settings import did_you_mean, die, one_line

# Settings that LoRA brings, below what a preset or a flag says: ten times the rate of full training
DEFAULTS = {"lr": 1e-5}


def refuse(cfg):
    """Leave where the settings ask for what an adapter cannot do."""
    if cfg.ref_every:
        die(
            f"ref_every = {cfg.ref_every} moves the reference, which with lora_rank = "
            f"{cfg.lora_rank} is the model without its adapters and stays: say ref_every = 0"
        )


def refuse_rank(cfg, width):
    """Leave where the adapters would be larger than a model of that width."""
    if cfg.lora_rank > width:
        die(
            f"lora_rank = {cfg.lora_rank} is more than the model's width, {width}: an adapter is "
            "of a smaller rank, such as 16"
        )


# ==== 1. The layer ==============================================================================


class LoraLinear(torch.nn.Linear):
    """A linear layer and its adapter; its own weight and bias keep their names."""

    def __init__(self, linear, cfg):
        out, width = linear.weight.shape
        like = dict(device=linear.weight.device, dtype=linear.weight.dtype)
        super().__init__(width, out, bias=linear.bias is not None, **like)
        like["dtype"] = torch.float32  # bf16 would lose small updates
        self.lora_A = torch.nn.Parameter(torch.empty(cfg.lora_rank, width, **like))
        self.lora_B = torch.nn.Parameter(torch.empty(out, cfg.lora_rank, **like))
        self.scale = cfg.lora_alpha / cfg.lora_rank
        self.is_on = True

    def forward(self, x):
        y = super().forward(x)  # [..,out]
        if self.is_on:
            small = F.linear(x, self.lora_A)  # [..,rank]
            y = y + F.linear(self.scale * small, self.lora_B)
        return y


def is_adapter(name):
    """Whether a parameter of that name is one of the small matrices."""
    return name.endswith((".lora_A", ".lora_B"))


def layers(model):
    """{name of the weight: LoraLinear} of a model; {} of one without adapters."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            found[f"{name}.weight"] = module
    return found


# ==== 2. A model with adapters ==================================================================


def base_type(cfg, device):
    """The type that the weights rest in: fp32 where they are trained; where they are frozen, what
    is computed with."""
    is_frozen = cfg.lora_rank > 0
    return torch.bfloat16 if is_frozen and device.type == "cuda" else torch.float32


def add_adapters(model, cfg):
    """Put a LoraLinear in the place of each linear layer of the blocks that cfg.lora_targets names.
    The model is on the meta device: nothing is allocated yet, and nothing is lost."""
    refuse_rank(cfg, model.config.hidden_size)
    # The linear layers of the blocks: {last part of the name: [whole names]}
    places = {}
    for name, module in model.base_model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            places.setdefault(name.split(".")[-1], []).append(name)

    # Those that are asked for
    targets = list(places)
    if cfg.lora_targets != "all":
        targets = [target.strip() for target in cfg.lora_targets.split(",")]
    for target in targets:
        if target not in places:
            die(
                f"lora_targets = {cfg.lora_targets!r}: no linear layer of a block is called "
                f"{target!r}{did_you_mean(target, places)}; it wants names with commas between "
                "them, or all"
            )
        for name in places[target]:
            linear = model.base_model.layers.get_submodule(name)
            model.base_model.layers.set_submodule(name, LoraLinear(linear, cfg))


def initialise(model, cfg, device):
    """A as torch initialises the weights of a linear layer, and as PEFT does; B zero. The same for
    any number of ranks."""
    generator = torch.Generator().manual_seed(cfg.seed)
    for layer in layers(model).values():
        bound = 1 / math.sqrt(layer.in_features)
        a = torch.empty(layer.lora_A.shape).uniform_(-bound, bound, generator=generator)
        set_whole(layer.lora_A, a, device)
        set_whole(layer.lora_B, torch.zeros(layer.lora_B.shape), device)


def freeze(model):
    """Train the adapters, and FlowRL's own head where there is one, and nothing else."""
    for name, p in model.named_parameters():
        p.requires_grad_(is_adapter(name) or name.startswith("log_z."))


@contextlib.contextmanager
def switched_off(model):
    """The model without its adapters, for the length of the block. One that has none stays as it
    is."""
    adapted = layers(model).values()
    for layer in adapted:
        layer.is_on = False
    try:
        yield
    finally:
        for layer in adapted:
            layer.is_on = True


def merge(weight, layer):
    """W + (alpha / rank) B A of a layer's whole weight W [out,in], summed in fp32, in W's type. All
    ranks must come here."""
    change = whole(layer.lora_B.detach()) @ whole(layer.lora_A.detach())  # [out,in]
    return (weight.float() + layer.scale * change).to(weight.dtype)


# ==== 3. The adapter as a folder ================================================================


@patiently
def export(cfg, model):
    """Write out/adapter, a folder that PEFT (and what reads its format, vLLM for one) loads beside
    the starting model. fp32, as trained."""
    tensors = {}
    for name, p in model.named_parameters():  # gathered on all ranks, kept on the first
        if is_adapter(name):
            value = whole(p.detach())
            if rank() == 0:
                tensors[f"base_model.model.{name}.weight"] = value.cpu().contiguous()
    if rank() == 0:
        folder = Path(cfg.out) / "adapter"
        try:
            save_adapter(folder, tensors, adapter_config(cfg, model))
        except Exception as error:
            die(
                f"{folder} not written: {one_line(error)}; the checkpoints are whole: make room, "
                f"then --resume {cfg.out}"
            )
    dist.barrier()


def save_adapter(folder, tensors, config):
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def adapter_config(cfg, model):
    """What PEFT's LoraConfig reads."""
    base, revision = cfg.model, None
    if not Path(base).is_dir():  # a hub name, with or without a revision
        base, _, revision = base.partition("@")
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision or None,
        "r": cfg.lora_rank,
        "lora_alpha": cfg.lora_alpha,
        "target_modules": sorted({name.split(".")[-2] for name in layers(model)}),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
