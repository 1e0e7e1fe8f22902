"""
What must be the same on one rank and on two; the tests start it with forks.py.

    worker.py gradient MODEL OUT     gradients of one optimizer step, for every aggregation and size
                                     of a micro-batch
    worker.py parity MODEL OUT       vLLM's log-probs against the trainer's after several syncs
    worker.py load MODEL OUT         a sharded load, the streamed weights, an export: against
                                     transformers
    worker.py change MODEL OUT       what is logged of W_t - W_0, against whole matrices in float64
"""

import dataclasses
import itertools
import os
import random
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch
import torch.distributed as dist

import lad
from harness import checkpoint, ranks, tracking


def full(p):
    return (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()


def make_groups(vocab):
    """6 prompts x 4 responses of different lengths; everything a minibatch needs, the same on every
    rank."""
    random.seed(0)

    def word(n):
        return [random.randrange(vocab) for _ in range(n)]

    return [
        [
            dict(
                prompt=word(random.randint(2, 9)),
                tokens=(t := word(random.randint(1, 17))),
                adv=random.gauss(0, 1),
                scale=1.0,
                behaviour=[random.uniform(-4, -1) for _ in t],
                drift=[random.gauss(0, 0.3) for _ in t],
                lift=[random.gauss(0, 0.3) for _ in t],
            )
            for _ in range(4)
        ]
        for _ in range(6)
    ]


# (objective, ratio, aggregation, kl_coef), and how a minibatch is split: (micro_tokens, recomputed
# activations)
GRADIENTS = [
    ("grpo", "token", "token", 0.0),
    ("grpo", "token", "sequence", 0.1),
    ("fade", "token", "constant", 0.0),
    ("lad", "token", "token", 0.0),
    ("lad", "sequence", "sequence", 0.0),
    ("entadv", "token", "token", 0.0),
    ("flowrl", "token", "sequence", 0.0),
]
SPLITS = [(10**6, False), (100, False), (40, True), (12, False)]


def gradient(folder, out, cfg, device):
    results, models = {}, {}
    for (o, r, a, k), (m, c) in itertools.product(GRADIENTS, SPLITS):
        changes = dict(
            objective=o, ratio=r, aggregation=a, micro_tokens=m, kl_coef=k, checkpointing=c
        )
        now = dataclasses.replace(cfg, **changes)
        key = (
            o == "flowrl",
            c,
        )  # one with a log Z head is another model, and so is one that recomputes activations
        if key not in models:
            models[key] = lad.build_model(folder, now, device)
        model = models[key]
        groups = make_groups(model.config.vocab_size)[dist.get_rank() :: dist.get_world_size()]
        samples = [s for g in groups for s in g]
        for s in samples:
            s.update(
                old=torch.tensor(s["behaviour"]) + torch.tensor(s["drift"]),
                ref=torch.tensor(s["behaviour"]) + torch.tensor(s["lift"]),
            )
        stats = lad.accumulate_gradient(model, samples, now, device)
        results[tuple(changes.items())] = {
            "stats": stats,
            "grad": {n: full(p.grad) for n, p in model.named_parameters()},
        }
        for p in model.parameters():
            p.grad = None
    if dist.get_rank() == 0:
        torch.save(results, out)


def parity(folder, out, cfg, device):
    """Three syncs, an optimizer step of a large rate before each but the first. The largest
    difference, and how far the weights went."""
    llm, model = lad.start_vllm(cfg, folder, device), lad.build_model(folder, cfg, device)
    optimizer = torch.optim.AdamW(model.parameters(), 0.02)
    prompts, report = [g[0]["prompt"] for g in make_groups(model.config.vocab_size)], []
    for _sync in range(3):
        with lad.awake(llm, model, device):
            groups = lad.generate(llm, cfg, prompts, 4, 7)
        samples = [
            dict(s, prompt=p, adv=1.0, scale=1.0)
            for p, g in zip(prompts, groups, strict=False)
            for s in g
        ]
        lad.score_samples(model, "old", samples, cfg, device)
        difference = max(
            (s["old"] - torch.tensor(s["behaviour"])).abs().max().item() for s in samples
        )
        report.append(
            lad.all_reduce([difference], "max")
            + [sum(sum(s["behaviour"]) for s in samples), samples[0]["tokens"]]
        )
        lad.accumulate_gradient(model, samples, cfg, device)
        lad.optimizer_step(model, optimizer, cfg)
    if dist.get_rank() == 0:
        torch.save(report, out)


def load(folder, out, cfg, device):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = lad.build_model(folder, cfg, device)
    lad.score_samples(
        model,
        "old",
        [
            s
            for g in make_groups(model.config.vocab_size)[dist.get_rank() :: dist.get_world_size()]
            for s in g
        ],
        cfg,
        device,
    )
    weights = dict(
        lad.named_weights(model, torch.float32)
    )  # right after a forward that leaves the root gathered
    want = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, p in want.named_parameters():
        assert torch.equal(weights.pop(name), p), name
    assert not weights
    checkpoint.export(
        dataclasses.replace(cfg, out=out),
        lad.named_weights(model, torch.float32),
        model.config,
        AutoTokenizer.from_pretrained(folder),
        folder,
    )
    again = AutoModelForCausalLM.from_pretrained(out + "/hf", dtype=torch.float32)
    assert all(
        torch.equal(a, b) for a, b in zip(want.parameters(), again.parameters(), strict=True)
    )


def seeds(folder, out, cfg, device):
    """With seeds of their own, requests give the same tokens in any order and company."""
    llm = lad.start_vllm(cfg, folder, device)
    llm.reset_prefix_cache()
    prompts = [g[0]["prompt"] for g in make_groups(20)]
    given = dict(enumerate(range(100, 700, 100)))

    def tokens(order, seed):
        asked = [prompts[i] for i in order]
        groups = lad.generate(llm, cfg, asked, 4, seed, seeds=[given[i] for i in order])
        return {i: [s["tokens"] for s in g] for i, g in zip(order, groups, strict=True)}

    whole = tokens([0, 1, 2, 3, 4, 5], 1)
    part = tokens([4, 1], 2)
    assert all(part[i] == whole[i] for i in part)
    assert whole[0] != whole[1] and whole[0][0] != whole[0][1]


def quantized(folder, out, cfg, device):
    """An engine that quantizes, given other weights by a sync, computes what it computes of them
    when it is started with them; and something else than an engine that does not quantize."""
    from transformers import AutoTokenizer

    own = dataclasses.replace(cfg, vllm='{"quantization": "fp8_per_channel"}')
    prompts = [g[0]["prompt"] for g in make_groups(20)]

    # Weights that are far from those of the folder, and a folder with them
    model = lad.build_model(folder, cfg, device)
    torch.manual_seed(1)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    weights = lad.named_weights(model, torch.float32)
    there = dataclasses.replace(cfg, out=out)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    checkpoint.export(there, weights, model.config, tokenizer, folder)

    # Pushed; loaded; and loaded without being quantized. vLLM's quantized layers need bf16
    pushed = lad.start_vllm(own, folder, device, dtype="bfloat16")
    before = lad.generate(pushed, cfg, prompts, 4, 7)
    with lad.awake(pushed, model, device):
        after = lad.generate(pushed, cfg, prompts, 4, 7)
    loaded = lad.start_vllm(own, out + "/hf", device, dtype="bfloat16")
    plain = lad.start_vllm(cfg, out + "/hf", device, dtype="bfloat16")
    assert after == lad.generate(loaded, cfg, prompts, 4, 7)
    assert after != lad.generate(plain, cfg, prompts, 4, 7)
    assert after != before


def groups(folder, out, cfg, device):
    """In groups of one rank, each with all of the weights, gradients are those of one group of all,
    whenever they meet."""
    whole = {}
    for size, each in itertools.product((0, 1), (False, True)):
        now = dataclasses.replace(cfg, shard_size=size, reduce_each=each, micro_tokens=40)
        model = lad.build_model(folder, now, device)
        drawn = make_groups(model.config.vocab_size)[dist.get_rank() :: dist.get_world_size()]
        samples = [s for g in drawn for s in g]
        assert len(lad.micro_batches(samples, now)) > 2
        lad.accumulate_gradient(model, samples, now, device)
        for name, p in model.named_parameters():
            want = whole.setdefault(name, full(p.grad))
            assert (full(p.grad) - want).norm() < 1e-5 * want.norm(), (name, size, each)


def change(folder, out, cfg, device):
    """The log's numbers of a known change of all weights, and those of the same change written
    plainly: whole tensors, float64, every singular value."""
    from transformers import AutoModelForCausalLM

    # FlowRL's own head, which is in the model and no part of the policy, moves most
    now = dataclasses.replace(cfg, objective="flowrl")
    model = lad.build_model(folder, now, device)
    first = tracking.first_weights(model)
    unmoved = tracking.change_of_weights(model, first)

    # The same change on any number of ranks. Two directions of nearly one size are the hard case
    generator = torch.Generator().manual_seed(3)
    for name, p in model.named_parameters():
        moved = ranks.whole(p.detach()) + 1e-5 * torch.randn(p.shape, generator=generator)
        if p is model.lm_head.weight:
            columns = torch.randn(2, p.shape[1], generator=generator)
            moved[0] += 3e-4 * columns[0]
            moved[-1] += 2.9e-4 * columns[1]
        if name.startswith("log_z."):
            moved += 1.0
        ranks.set_whole(p, moved, device)
    shares = tracking.change_of_weights(model, first)

    before = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = dict(before.named_parameters())
    is_tied = model.config.tie_word_embeddings
    head = "model.embed_tokens.weight" if is_tied else "lm_head.weight"
    squares = {}
    for name, weight in lad.named_weights(model, torch.float32):
        difference = weight.double() - before[name].double()
        squares[name] = difference.square().sum().item()
        if name == head:
            of_head = squares[name]
            largest = torch.linalg.svdvals(difference)[0].item()
    want = dict(rank_one=largest**2 / of_head, head_change=of_head / sum(squares.values()))
    [fewest] = lad.all_reduce([len(ranks.shard_of(model.lm_head.weight))], "min")
    if dist.get_rank() == 0:
        torch.save(dict(unmoved=unmoved, shares=shares, want=want, fewest_rows=fewest), out)


TASKS = dict(
    change=change,
    gradient=gradient,
    parity=parity,
    load=load,
    seeds=seeds,
    quantized=quantized,
    groups=groups,
)


def main(argv, tasks=TASKS, **changes):
    what, folder, out = argv
    cfg = dataclasses.replace(
        lad.Config(),
        device="cpu",
        kind="countdown",
        max_prompt_tokens=40,
        max_tokens=24,
        vllm_memory=0.1,
        prompts=6,
        group=4,
        objective="grpo",
        checkpointing=False,
        model=folder,
        temperature=0.8,
        **changes,
    )
    device = ranks.join(cfg)
    tasks[what](folder, out, cfg, device)
    if dist.is_initialized():  # vLLM takes the group down as it leaves
        dist.barrier()


if __name__ == "__main__":
    main(sys.argv[1:])
    if dist.is_initialized():
        dist.destroy_process_group()
