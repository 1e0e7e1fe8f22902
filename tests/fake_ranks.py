"""
One optimizer step of lad.py on the first of many fake GPUs (fake_cuda.py): what it holds, what it
sends, where it waits. All that runs is lad.py's own; only the weights are not read.

    python tests/fake_ranks.py table      # memory: what tools/plan.py says, and what is counted
    python tests/fake_ranks.py '[{"model": "Qwen/Qwen2.5-7B", "gpus": 8}]'

The second prints a line of JSON for each case. Its keys: model, of plan.py's table; gpus; flags, of
lad.py; layers, where not all of the model's blocks are wanted (they are alike); micro, the
micro-batches of a minibatch (2); again, to count once more with torch's FSDPMemTracker. Or, in
place of a step: head, the N, H, V and C of fused_logprob; engine, to push weights to a vLLM that
only says what it is asked for.
"""

import contextlib
import dataclasses
import gc
import json
import os
import sys
import tempfile
import weakref
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import fake_cuda

if __name__ == "__main__":
    fake_cuda.install()

import torch
from torch._guards import active_fake_mode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lad
from harness import checkpoint, families, lora, tracking, vllm_options
from tools import plan

DEVICE = torch.device("cuda", 0)
PROMPT = 256  # tokens; plan.py assumes as many
SAMPLES = 4  # of a micro-batch, which they fill
GROUP = 2  # samples of a prompt

# ==== 1. What is seen of a step =================================================================


SENT = {  # FSDP's collectives, and DTensor's
    "_allgather_base_": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "allreduce_": "all-reduce",
    "all_reduce": "all-reduce",
}


class Watch(TorchDispatchMode):
    """Sees each operator: where Python waits for the device, what is sent, how many rows of logits
    exist in one tensor, how many bytes the GPU holds."""

    def __init__(self, vocabulary, width):
        super().__init__()
        self.vocabulary = vocabulary
        self.width = width
        self.sizes = {}  # {a storage on the GPU: its bytes}
        self.held = 0  # bytes of all of them
        self.start()

    def start(self):
        """A new phase: forget what was seen, but for what is held."""
        self.peak = self.held
        self.waits = Counter()  # {function of this project: how often it waited}
        self.calls = Counter()  # {collective: how many}
        self.bytes = Counter()  # {collective: bytes of the whole tensors}
        self.logit_rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # it comes again, as what this rank does with its shard
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__

        # A number of a tensor. Fake ones have none: any will do
        if name == "_local_scalar_dense":
            if args[0].device.type == "cuda":
                self.waits[place()] += 1
            return False if args[0].dtype == torch.bool else 1.0

        if name in ("_to_copy", "copy_"):
            self.see_copy(name, args, kwargs)
        out = function(*args, **kwargs)
        if name in SENT:
            tensors = [x for x in tree_leaves((args, out)) if isinstance(x, torch.Tensor)]
            self.calls[SENT[name]] += 1
            self.bytes[SENT[name]] += max(x.nbytes for x in tensors)
        if active_fake_mode() is self.mode:  # and not DTensor's own, with which it finds out shapes
            for x in tree_leaves(out):
                if isinstance(x, torch.Tensor) and x.device.type == "cuda":
                    self.see_memory(x)
                    self.see_logits(x)
        return out

    def __enter__(self):
        self.mode = active_fake_mode()
        self.resize = torch.UntypedStorage.resize_  # FSDP frees and fills its buffers so
        watch = self

        def resize(storage, size):
            watch.resize(storage, size)
            if id(storage) in watch.sizes:
                watch.hold(id(storage), size)

        torch.UntypedStorage.resize_ = resize
        return super().__enter__()

    def __exit__(self, *error):
        torch.UntypedStorage.resize_ = self.resize
        return super().__exit__(*error)

    def see_memory(self, x):
        storage = x.untyped_storage()
        if id(storage) not in self.sizes:
            weakref.finalize(storage, self.hold, id(storage), None)
            self.hold(id(storage), storage.size())

    def hold(self, key, size):
        """A storage has so many bytes from now on; None: it is gone."""
        self.held -= self.sizes.pop(key, 0)
        if size is not None:
            self.sizes[key] = -(-size // 512) * 512  # the allocator's smallest piece
            self.held += self.sizes[key]
        self.peak = max(self.peak, self.held)

    def see_copy(self, name, args, kwargs):
        """A copy between host and device for which Python waits."""
        if name == "copy_":
            there, here = args[0].device, args[1].device
            blocks = not (kwargs.get("non_blocking") or args[2:] == (True,))
        else:
            here = args[0].device
            there = torch.device(kwargs.get("device") or here)
            blocks = not kwargs.get("non_blocking")
        if blocks and here.type != there.type:
            self.waits[place()] += 1

    def see_logits(self, x):
        weight = {self.vocabulary, self.width}
        if x.dim() == 2 and self.vocabulary in x.shape and set(x.shape) != weight:
            self.logit_rows = max(self.logit_rows, x.numel() // self.vocabulary)


def place():
    """The innermost function of this project that is running, these tests left out."""
    frame = sys._getframe(1)
    while frame:
        path = Path(frame.f_code.co_filename)
        ours = path.name in ("lad.py", "baselines.py") or path.parent.name == "harness"
        if ours:
            return frame.f_code.co_name
        frame = frame.f_back
    return "nobody"


# ==== 2. A step =================================================================================


def run(case):
    """The report of a case, a dictionary of plain numbers."""
    if "head" in case:
        return run_head(*case["head"])
    if "engine" in case:
        return run_engine(case)
    shape, cfg = settings_of(case)
    with tempfile.TemporaryDirectory() as folder, fake_cuda.world(case["gpus"]):
        config_of(shape).save_pretrained(folder)
        report = step(cfg, shape, folder, case.get("micro", 2), case.get("again"))
    gc.collect()
    return report


def settings_of(case):
    """(the model's Shape, Config) of a case."""
    shape = plan.read_shape(case["model"])
    if "layers" in case:
        shape = dataclasses.replace(shape, layers=case["layers"])
    return shape, lad.load_config(["--model", case["model"], *case.get("flags", [])])


def config_of(m, **changes):
    """transformers' config of a shape of plan.py's, but for what changes."""
    from transformers import AutoConfig

    values = dict(
        hidden_size=m.hidden,
        num_hidden_layers=m.layers,
        num_attention_heads=m.heads,
        num_key_value_heads=m.kv,
        intermediate_size=m.inter,
        vocab_size=m.vocab,
        head_dim=m.head,
        tie_word_embeddings=m.tied,
    )
    return AutoConfig.for_model(m.kind, **values | changes)


def run_engine(case):
    """What vLLM is asked for, in order, and which weights it is given."""
    asked = []

    class Engine:
        def __init__(self, folder, **settings):
            self.settings = settings
            self.given = []

        def sleep(self, level):
            asked.append(f"sleep {level}")

        def wake_up(self, parts):
            asked.append(f"wake {parts[0]}")

        def collective_rpc(self, method, kwargs):
            asked.append(method)
            self.given = [(x.dtype, x.device.type) for _, x in kwargs["weights_iterator"]]

        def reset_prefix_cache(self):
            asked.append("reset prefix cache")

    shape, cfg = settings_of(case)
    patches = [
        mock.patch.dict(sys.modules, vllm=SimpleNamespace(LLM=Engine)),
        mock.patch.object(vllm_options, "known", lambda given: {}),  # it asks vLLM itself
        mock.patch.object(families, "elements_in", lambda folder: plan.parameters(shape)[0]),
        mock.patch("torch.cuda.reset_peak_memory_stats", lambda: asked.append("reset peak")),
    ]
    watch = Watch(shape.vocab, shape.hidden)
    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        for context in (*patches, fake_cuda.world(case["gpus"]), watch):
            stack.enter_context(context)
        config_of(shape).save_pretrained(folder)
        engine = lad.start_vllm(cfg, folder, DEVICE)
        model = lad.build_model(folder, cfg, DEVICE)
        watch.start()
        with lad.awake(engine, model, DEVICE):
            asked.append("generate")
    settings = {key: str(value) for key, value in engine.settings.items()}
    given = sorted({f"{dtype} {device}".removeprefix("torch.") for dtype, device in engine.given})
    return dict(asked=asked, settings=settings, given=given, bytes=dict(watch.bytes))


def run_head(N, H, V, C):
    """Forward and backward of fused_logprob: the bytes of its peak, beside its inputs."""
    with fake_cuda.world(1), Watch(V, H) as watch:
        hidden = torch.empty(N, H, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(V, H, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        targets = torch.zeros(N, device=DEVICE, dtype=torch.long)
        inputs = watch.held

        def gradient(part, logp, entropy):
            return torch.ones_like(logp)

        logp, _ = lad.fused_logprob(hidden, weight, targets, 0.9, C, gradient)
        logp.sum().backward()
    return dict(peak=watch.peak - inputs)


def step(cfg, shape, folder, micro, again):
    """What main() does between one rollout and the next."""
    report = dict(peaks={}, waits={}, calls={}, bytes={})
    watch = Watch(shape.vocab, shape.hidden)
    with watch:
        model = lad.build_model(folder, cfg, DEVICE)
        reference = None
        if plan.has_reference(cfg):
            reference = model
            if not cfg.lora_rank:
                reference = lad.build_model(folder, cfg, DEVICE, trainable=False)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, cfg.lr, (0.9, cfg.beta2), fused=True)
        first = None
        if cfg.track_change:
            first = tracking.first_weights(model)
        checkpoint.start_moments(optimizer, 1)  # there is no first step, whose memory would be less

        groups = make_groups(cfg, micro)
        for name, phase in phases(model, reference, first, optimizer, groups, cfg):
            watch.start()
            phase()
            report["peaks"][name] = watch.peak
            report["waits"][name] = dict(watch.waits)
            report["calls"][name] = dict(watch.calls)
            report["bytes"][name] = dict(watch.bytes)
            if name == "gradient":
                report["logit_rows"] = watch.logit_rows
                report["gradients"] = types(p.grad for p in trained)
        if again:
            report["by_torch"] = count_by_torch(model, optimizer, groups, cfg)

    states = optimizer.state.values()
    report["moments"] = types(state[key] for state in states for key in ("exp_avg", "exp_avg_sq"))
    report["weights"] = types(model.parameters())
    report["trained"] = types(trained)
    return report


def count_by_torch(model, optimizer, groups, cfg):
    """The peak of one micro-batch's gradient by torch's own tracker; of several, and of LoRA, it
    keeps what nobody else does."""
    samples = [s for group in groups for s in group]
    with FSDPMemTracker(model, optimizer) as tracker:
        lad.accumulate_gradient(model, samples, cfg, DEVICE)
        return tracker.get_tracker_snapshot("peak")[DEVICE]["Total"]


def phases(model, reference, first, optimizer, groups, cfg):
    """(name, function) of what happens to a batch, in order."""
    samples = [s for group in groups for s in group]

    def score():
        if lad.needs_old_logprobs(cfg):
            lad.score_samples(model, "old", samples, cfg, DEVICE)
        if reference is not None:
            with lora.switched_off(reference):
                lad.score_samples(reference, "ref", samples, cfg, DEVICE)

    def weigh():
        state = lad.new_state()
        lad.update_state(state, 0.5, 0.5, cfg)
        lad.set_advantages(groups, cfg, state)

    def log():
        if first is not None:
            tracking.change_of_weights(model, first)

    return [
        ("score", score),
        ("weigh", weigh),
        ("gradient", lambda: lad.accumulate_gradient(model, samples, cfg, DEVICE)),
        ("optimizer", lambda: lad.optimizer_step(model, optimizer, cfg)),
        ("log", log),
    ]


def make_groups(cfg, micro):
    """Samples of one length that fill `micro` micro-batches, in groups."""
    length = cfg.micro_tokens // SAMPLES - PROMPT
    groups = []
    for i in range(micro * SAMPLES // GROUP):
        prompt = [i + 1] * PROMPT
        verdict = dict(correct=1.0, reward=1.0, failed="", lost=False, truncated=False)
        sample = dict(prompt=prompt, tokens=[7] * length, behaviour=[-1.0] * length, **verdict)
        groups.append([dict(sample) for _ in range(GROUP)])
    return groups


def types(tensors):
    """The types of tensors, in words."""
    return sorted({str(x.dtype).removeprefix("torch.") for x in tensors})


def stand_in():
    """What is not tried: reading weights, and a sum over ranks, of which all have what this one
    has."""

    def all_reduce(values, op="sum"):
        return [x * lad.world() if op == "sum" else x for x in values]

    lad.all_reduce = all_reduce
    tracking.all_reduce = all_reduce
    checkpoint.load_model = lambda model, folder: None


# ==== 3. main ===================================================================================


def print_table():
    """A markdown table of the runs in docs/planning.md's: the bytes of a GPU while it trains."""
    print("| model | GPUs | flags | planned | counted | planned over counted |")
    print("|---|---|---|---|---|---|")
    for model in plan.TABLE:
        for gpus in (1, 8, 16, 64):
            cfg = lad.load_config(["--model", model])
            shape = plan.read_shape(model)
            length = cfg.max_tokens / 2
            flags, planned = plan.advise(cfg, shape, gpus, 139 * plan.GIB, length)
            if flags is None:
                continue  # it does not fit
            words = [word for k, v in flags.items() for word in (f"--{k}", str(v).lower())]
            report = run(dict(model=model, gpus=gpus, flags=words))
            print(row_of_table(model, gpus, words, planned, report), flush=True)


def row_of_table(model, gpus, words, planned, report):
    """What lies outside of torch's allocator, and is assumed, is in neither."""
    says = (planned["training"] - plan.ASSUMPTIONS["overhead"]) / plan.GIB
    holds = max(report["peaks"].values()) / plan.GIB
    flags = f"`{' '.join(words)}`" if words else "none"
    name = model.split("/")[1]
    return f"| {name} | {gpus} | {flags} | {says:.2f} GiB | {holds:.2f} GiB | {says / holds:.3f} |"


def main(argv):
    stand_in()
    if argv == ["table"]:
        print_table()
    else:
        for case in json.loads(argv[0]):
            print(json.dumps(dict(case, **run(case))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
