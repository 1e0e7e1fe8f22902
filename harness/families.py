"""
Families of models: what the trainer must know of an architecture, and which ones it refuses.

The trainer runs transformers' own classes on one packed row of tokens, on which only attention may
look from one token at another, and does the head's product itself. Most decoder-only models are
computed rightly so; fault_of() finds out whether a given one is, from its config and the headers of
its files, before a weight is read. docs/families.md has a table of what was tried.
"""

import contextlib
import copy
import json
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

from harness.ranks import leave_together, rank
from harness.settings import one_line

# ==== 1. Building and preparing a model =========================================================


def empty_model(config, **options):
    """The causal LM of a config, on the meta device: no memory, no weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"), without_vllm(config):
        return AutoModelForCausalLM.from_config(config, **options)


def without_vllm(config):
    """A context in which the classes of a config can be built although vLLM has changed them.

    Some architectures (CWM, OLMo, ..) vLLM serves by transformers' own class, to which it then adds
    a base of its own that asks for vLLM's settings: they get settings that compile nothing.
    """
    from transformers import AutoModel

    try:
        bases = AutoModel._model_mapping[type(config)].__mro__
    except (KeyError, AttributeError):  # an architecture that transformers does not know
        bases = ()
    if not any(base.__module__.startswith("vllm.") for base in bases):
        return contextlib.nullcontext()
    from vllm.config import CompilationConfig, VllmConfig, set_current_vllm_config

    settings = VllmConfig(compilation_config=CompilationConfig(mode=0))
    settings.model_config = SimpleNamespace(hf_config=config)  # all that is asked of it
    return set_current_vllm_config(settings)


def remake_buffers(model, device):
    """Put what a model computes and does not store (rotary frequencies, Gemma's scale of the
    embedding) onto a device: meta has lost the values, transformers' own initialization knows them.
    Returns the names of the buffers that stay unknown, those that are stored among them."""
    for p in model.parameters():  # which that initialization leaves alone, once they say so
        p._is_hf_initialized = True

    unknown = []
    for prefix, module in model.named_modules():
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = torch.full_like(buffer, missing(buffer), device=device)
        if module._buffers:
            model._init_weights(module)
        for key, buffer in module._buffers.items():
            is_stored = key not in module._non_persistent_buffers_set
            if buffer is not None and (is_stored or has_missing(buffer)):
                unknown.append(f"{prefix}.{key}")
    return unknown


def missing(buffer):
    """A value that nobody computes."""
    return torch.nan if buffer.is_floating_point() else 1


def has_missing(buffer):
    """Whether a buffer still holds it; of whole numbers, which lack such a value, nobody knows."""
    return not buffer.is_floating_point() or bool(buffer.isnan().any())


def switch_off_noise(model, trainable):
    """Evaluation mode, so that a log-prob is the same twice: no dropout, no noise in a router. Only
    the blocks themselves, and nothing in them, are told that they train: what recomputes
    activations asks for it."""
    model.eval()
    for block in model.base_model.layers:
        block.training = trainable
        for key, value in vars(block).items():  # a block's own dropout, applied as a function
            if "drop" in key and isinstance(value, float):
                setattr(block, key, 0.0)


def logits_divisor(config):
    """What a family divides its logits by before the softmax: Granite by logits_scaling; Cohere
    multiplies by logit_scale."""
    if getattr(config, "logit_scale", None):
        return 1 / config.logit_scale
    return getattr(config, "logits_scaling", None) or 1.0


# ==== 2. Which models are refused ===============================================================


def check(folder):
    """Leave with exit code 2 and one line if the model of a folder cannot be trained. All ranks
    must come here."""
    message = ""
    if rank() == 0:
        fault = fault_of(folder)
        if fault:
            message = f"{folder}: {fault}"
    leave_together(message)


def fault_of(folder):
    """Why the model of a folder would be computed wrongly, in one line; "" if nothing is wrong."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder)
        fault = fault_of_config(config)
        if fault:
            return fault
        calls = register_probe()
        model = empty_model(probe_config(config), attn_implementation="probe")
    except Exception as error:
        return f"transformers cannot build it: {one_line(error)}"
    looks = (
        fault_of_structure,
        fault_of_head,
        partial(fault_of_files, folder=folder),
        partial(fault_of_attention, calls=calls),
        fault_of_buffers,
    )
    for look in looks:
        fault = look(model)
        if fault:
            return f"{type(model).__name__} {fault}"
    return ""


# Rotary embeddings whose frequencies depend on nothing but the config. The others, dynamic and
# longrope, depend on the length of a sequence, and a packed row has many lengths
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "proportional")


def fault_of_config(config):
    if getattr(config, "quantization_config", None):
        return "its weights are quantized; take the folder of the model in bf16 or fp32"
    if getattr(config, "vision_config", None) or getattr(config, "audio_config", None):
        return "it is made for more than text; take the folder of its language model alone"
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        if (getattr(config, key, None) or 0) > 1:
            return (
                f"it is a mixture of experts ({key} = {getattr(config, key)}), whose files hold "
                "each expert and whose class in transformers holds them merged: nobody has "
                "written here how such weights are read, handed to vLLM and exported"
            )
    rope = getattr(config, "rope_parameters", None) or {}
    per_layer_type = [value for value in rope.values() if isinstance(value, dict)]
    for parameters in [rope, *per_layer_type]:
        kind = parameters.get("rope_type", "default")
        if kind not in ROPE_TYPES:
            return (
                f"its rotary embedding is of type {kind!r}, whose frequencies depend on the length "
                "of a sequence: a packed row has many; take a model without it"
            )
    return ""


def fault_of_structure(model):
    head = getattr(model, "lm_head", None)
    if not isinstance(head, torch.nn.Linear) or head.bias is not None:
        return "has no plain lm_head; a decoder-only model with a linear head is needed"
    if not isinstance(getattr(model.base_model, "layers", None), torch.nn.ModuleList):
        return "has no list of blocks `layers`; a decoder-only model is needed"
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.modules.conv._ConvNd):
            return f"has a convolution ({name}): it would mix the sequences of a packed row"
    return ""


def fault_of_head(model):
    """Whether logits are the head's product, divided by what logits_divisor() says. Tried with
    numbers: the body is left out, the head is a small one."""
    from transformers.modeling_outputs import MoeModelOutputWithPast

    hidden = torch.linspace(-3, 3, 4 * model.lm_head.in_features).view(1, 4, -1)
    head = torch.nn.Linear(model.lm_head.in_features, 7, bias=False)
    torch.nn.init.constant_(head.weight[:3], 1.0)
    whole = model.lm_head, model.base_model.forward
    model.lm_head = head
    model.base_model.forward = lambda *args, **more: MoeModelOutputWithPast(hidden)
    try:
        with torch.no_grad():
            got = model(input_ids=torch.zeros(1, 4, dtype=torch.long), use_cache=False).logits
            want = head(hidden) / logits_divisor(model.config)
    except Exception as error:
        return f"cannot be given a head of its own: {one_line(error)}"
    finally:
        model.lm_head, model.base_model.forward = whole
    if not torch.allclose(got, want, rtol=1e-5):
        return "changes its logits after the head (a softcap, mostly), which the fused head cannot"
    return ""


# ---- Attention, seen through a forward on the meta device ----

PROBE_TOKENS = 8
PROBE_WINDOW = 3  # in place of the config's own, so that few tokens show whether it is kept to

# What transformers hands to an attention function, and packed_attention can do without: it never
# drops, is always causal, and positions are in query and key already
UNIMPORTANT = {"dropout", "position_ids", "is_causal", "output_attentions", "use_cache"}
UNDERSTOOD = {"scaling", "sliding_window"}


def probe_config(config):
    """A copy of a config with short windows."""
    config = copy.deepcopy(config)
    for key in ("sliding_window", "attention_chunk_size"):
        if getattr(config, key, None):
            setattr(config, key, PROBE_WINDOW)
    return config


def register_probe():
    """Register an attention, "probe", that computes nothing; the list in which it will keep what
    each layer asks of it: (mask [1,1,N,N] or None, other arguments)."""
    from transformers import AttentionInterface, AttentionMaskInterface

    calls = []

    def attention(module, query, key, value, attention_mask=None, **more):
        calls.append((attention_mask, more))
        _, heads, tokens, _ = query.shape
        return query.new_zeros(1, tokens, heads, value.shape[3]), None  # [1,N,heads,D]

    AttentionInterface.register("probe", attention)
    AttentionMaskInterface.register("probe", probe_mask)
    return calls


def probe_mask(batch_size, q_length, kv_length, mask_function, **more):
    """The mask [1,1,N,N] that a layer should see: which token may look at which."""
    query = torch.arange(q_length)[:, None]
    key = torch.arange(kv_length)[None, :]
    allowed = torch.as_tensor(mask_function(0, 0, query, key))
    return allowed.expand(1, 1, q_length, kv_length)


def fault_of_attention(model, calls):
    """Whether every layer asks of attention what lad.packed_attention gives: causality, a sliding
    window that it is told of, a scale; nothing else. `calls`: register_probe's."""
    calls.clear()
    ids = torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device="meta")
    inputs = dict(input_ids=ids, position_ids=ids, attention_mask=torch.ones_like(ids))
    try:
        with torch.no_grad():
            model.base_model(**inputs, use_cache=False, probe_layout=True)
    except Exception as error:
        return f"cannot be run on a packed row: {one_line(error)}"

    layers = len(model.base_model.layers)
    if len(calls) != layers:
        return (
            f"has {layers} layers, of which {len(calls)} call transformers' attention: what the "
            "others do would mix the sequences of a packed row"
        )
    for number, (mask, more) in enumerate(calls):
        if not more.pop("probe_layout", False):
            return f"does not hand the layout of a packed row to the attention of layer {number}"
        for key, value in more.items():
            if key not in UNIMPORTANT | UNDERSTOOD and value is not None:
                return f"asks attention for {key} (layer {number}), which ours does not do"
        if more.get("is_causal") is False:
            return f"is not causal (layer {number})"
        if mask is not None and not torch.equal(mask[0, 0], packed_mask(more)):
            return (
                f"has another attention in layer {number} than plain or sliding-window causal "
                "attention, or does not say the window where it calls it"
            )
    return ""


def packed_mask(more):
    """Which token looks at which [N,N] in lad.packed_attention, given these arguments."""
    square = torch.ones(PROBE_TOKENS, PROBE_TOKENS, dtype=torch.bool).tril()
    window = more.get("sliding_window")
    return square.triu(1 - window) if window else square


def fault_of_buffers(model):
    unknown = remake_buffers(model, torch.device("cpu"))
    if unknown:
        return f"has buffers that nobody here knows how to fill: {', '.join(unknown[:3])}"
    return ""


# ---- Weights, by the headers of their files ----


def fault_of_files(model, folder):
    """Whether the folder's files hold every parameter under its own name and in its own shape."""
    found = shapes_in(folder)
    if not found:
        return "finds no *.safetensors file"
    parameters = dict(model.named_parameters())  # a tied weight comes once
    lacking = [name for name in parameters if name not in found]
    if lacking:
        return (
            f"finds {len(lacking)} of its {len(parameters)} weights in none of the files (the "
            f"first: {lacking[0]}): either files are missing, or transformers renames or merges "
            "weights as it reads them, which is not done here"
        )
    for name, p in parameters.items():
        if found[name] != list(p.shape):
            return (
                f"finds weights that do not fit its config: {name} is {found[name]} in the files "
                f"and {list(p.shape)} by config.json"
            )
    return ""


def elements_in(folder):
    """How many numbers a folder's weights are."""
    return sum(math.prod(shape) for shape in shapes_in(folder).values())


def shapes_in(folder):
    """{name: shape} of all tensors in a folder's safetensors files, whose first bytes say so: the
    length of a JSON text, and the text."""
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                found[name] = entry["shape"]
    return found
