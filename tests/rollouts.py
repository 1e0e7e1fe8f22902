"""
What vLLM writes on the CPU, in a process of its own; test_rollouts.py starts it with forks.py.

    rollouts.py caching MODEL OUT    engines that share prompts, as lad.py and as eval.py start
                                     them, beside one that does not
    rollouts.py stops MODEL OUT      how responses end
"""

import dataclasses
import random
import sys

import torch
import torch.distributed as dist

import lad
from harness import ranks

BLOCK = 32  # tokens of the key-value cache that are shared as one
BLOCKS = 48  # of the cache: too few for all, so that requests are put off and begun anew
LENGTHS = [1, 2, 30, 31, 32, 33, 34, 50, 63, 64, 65, 66, 95, 96, 97, 100]  # of prompts
CUT = 64  # tokens computed at once, so that long prompts are computed in parts
LONGEST = 24  # tokens of a response
SYNCS = 3


def make_prompts(vocabulary):
    """Two of each length: the beginning of one long text, and a text of its own."""
    words = random.Random(0)
    text = [words.randrange(vocabulary) for _ in range(max(LENGTHS))]
    prompts = [text[:length] for length in LENGTHS]
    prompts += [[words.randrange(vocabulary) for _ in range(length)] for length in LENGTHS]
    return prompts


def count_preemptions(llm):
    """A list that grows by one whenever the engine's scheduler puts off a running request."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    preempt = scheduler._preempt_request
    found = []

    def counted(request, *args, **more):
        found.append(request.request_id)
        return preempt(request, *args, **more)

    scheduler._preempt_request = counted
    return found


def respond(llm, prompts, seeded):
    """Four responses to each prompt: samples as the trainer takes them, and how many tokens of the
    prompts came from the cache. Each request has a generator of its own, or all share one."""
    from transformers import set_seed
    from vllm import SamplingParams

    set_seed(0)
    params = []
    for number in range(len(prompts)):
        seed = number if seeded else None
        more = dict(logprobs=0, flat_logprobs=True, detokenize=False, ignore_eos=True, seed=seed)
        params.append(SamplingParams(n=4, max_tokens=LONGEST, **more))
    samples = []
    cached = 0
    for output in llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False):
        cached += output.num_cached_tokens
        for o in output.outputs:
            behaviour = list(o.logprobs.logprobs)
            sample = dict(prompt=output.prompt_token_ids, tokens=list(o.token_ids))
            samples.append(dict(sample, behaviour=behaviour))
    return samples, cached


def read(llm, samples):
    """The log-probs of the same responses as an engine reads them in one prompt, in vLLM's words
    the prompt's own."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    whole = [{"prompt_token_ids": s["prompt"] + s["tokens"]} for s in samples]
    found = []
    for s, output in zip(samples, llm.generate(whole, params, use_tqdm=False), strict=True):
        of_tokens = output.prompt_logprobs[len(s["prompt"]) :]
        pairs = zip(s["tokens"], of_tokens, strict=True)
        found.append([choices[token].logprob for token, choices in pairs])
    return found


def distance(samples, others):
    """The largest difference of a token's log-prob."""
    largest = 0.0
    for s, other in zip(samples, others, strict=True):
        difference = torch.tensor(s["behaviour"]) - torch.as_tensor(other)
        largest = max(largest, difference.abs().max().item())
    return largest


def caching(folder, out, cfg, device):
    few = dict(num_gpu_blocks_override=BLOCKS, max_num_seqs=CUT)
    trains = lad.start_vllm(cfg, folder, device, max_num_batched_tokens=CUT, **few)
    evaluates = lad.start_vllm(cfg, folder, device, enable_chunked_prefill=False, **few)
    options = dict(enable_prefix_caching=False, block_size=128)
    longest = max(LENGTHS) + LONGEST + 1  # it reads whole responses, and must write one token
    plain = lad.start_vllm(cfg, folder, device, max_model_len=longest, **options)
    model = lad.build_model(folder, cfg, device)
    prompts = make_prompts(model.config.vocab_size)
    preempted = {id(llm): count_preemptions(llm) for llm in (trains, evaluates)}

    report = []
    for sync in range(SYNCS):
        # Other weights than before, so that what the cache kept of those is wrong
        for p in model.parameters():
            p.data.mul_(1 + 0.1 * sync)
        for llm, seeded in ((trains, False), (evaluates, True)):
            with lad.awake(llm, model, device):
                samples, cached = respond(llm, prompts, seeded)
            with lad.awake(llm, model, device):
                again, _ = respond(llm, prompts, seeded)
            # In reverse, so that what is left in the cache is what is asked for first
            with lad.awake(llm, model, device):
                reverse, _ = respond(llm, prompts[::-1], seeded)
            both = samples + reverse
            with lad.awake(plain, model, device):
                in_plain = read(plain, both)
            lad.score_samples(model, "old", both, cfg, device)
            report.append(
                dict(
                    seeded=seeded,
                    plain=distance(both, in_plain),
                    trainer=distance(both, [s["old"] for s in both]),
                    cached=cached,
                    repeats=[s["tokens"] for s in samples] == [s["tokens"] for s in again],
                    preempted=len(preempted[id(llm)]),
                )
            )
    torch.save(report, out)


def stops(folder, out, cfg, device):
    llm = lad.start_vllm(cfg, folder, device)
    prompts = make_prompts(24)[: len(LENGTHS)]
    groups = lad.generate(llm, cfg, prompts, 8, 0)
    torch.save([s for group in groups for s in group], out)


def main(argv):
    what, folder, out = argv
    cfg = dataclasses.replace(
        lad.Config(),
        device="cpu",
        kind="countdown",
        max_prompt_tokens=max(LENGTHS),
        max_tokens=LONGEST,
        vllm_memory=0.1,
        objective="grpo",
        checkpointing=False,
        model=folder,
    )
    device = ranks.join(cfg)
    dict(caching=caching, stops=stops)[what](folder, out, cfg, device)
    if dist.is_initialized():  # vLLM takes the group down as it leaves
        dist.barrier()


if __name__ == "__main__":
    main(sys.argv[1:])
