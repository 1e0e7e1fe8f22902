"""
The offline default: a 0.6M-parameter Qwen2 that has seen just enough Countdown to be worth training
with RL.

    python harness/tiny.py    # make it (a minute on two cores, then cached) and show some answers
    python harness/tiny.py tiny-hard    # the harder task: three minutes

A puzzle is three numbers and a target; an answer uses each number exactly once, with + - * and
brackets:

    2 3 8=14:     ->     3*2+8    8+2*3    2*3+8    8+3*2    ...

RL trains and tests on puzzles with several answers. The warm-up shows the model every
answer of every other puzzle, equally often, and stops early: it starts out solving some puzzles, in
many ways. Whether RL keeps those ways or gives them up for pass@1 is what the objectives in lad.py
differ in.

`tiny-hard` is the same with four numbers. `tiny` starts out solving nearly every puzzle once in 32
samples; `tiny-hard` three of four, so that exploring better can show in pass@32.
"""

import collections
import fcntl
import hashlib
import itertools
import json
import math
import os
import random
import shutil
import sys
from pathlib import Path

# One token a character
NAMED = ["<pad>", "<eos>", "<unk>"]  # pad is not eos: the end of an answer must be trained
CHARACTERS = "0123456789 =:+-*()"
UNUSED = ["<unused0>", "<unused1>", "<unused2>"]  # makes 24, a multiple of 8

# Puzzles
LARGEST = 9  # numbers are 1 to this
TARGETS = 99  # and so are targets

# Of each task: how many numbers, the answers that a puzzle of RL has at least, puzzles to train on
TASKS = {
    "tiny": dict(count=3, several=6, train=256),
    "tiny-hard": dict(count=4, several=12, train=2048),
}
TEST = 128  # puzzles held out

# The warm-up. Steps, not seconds: a slow machine makes the same bytes
STEPS = 400
BATCH = 128
RATE = 3e-3


# ==== 1. Puzzles ================================================================================


def expressions(numbers):
    """{(value, text, precedence)} of every expression over the numbers in this order, without
    needless brackets. Precedence: 1 of + and -, 2 of *, 3 of a number alone."""
    if len(numbers) == 1:
        return {(numbers[0], str(numbers[0]), 3)}
    found = set()
    for i in range(1, len(numbers)):
        for left in expressions(numbers[:i]):
            for right in expressions(numbers[i:]):
                found.add((left[0] + right[0], f"{bracketed(left, 1)}+{bracketed(right, 1)}", 1))
                # a-(b+c) needs its brackets
                found.add((left[0] - right[0], f"{bracketed(left, 1)}-{bracketed(right, 2)}", 1))
                found.add((left[0] * right[0], f"{bracketed(left, 2)}*{bracketed(right, 2)}", 2))
    return found


def bracketed(expression, level):
    """The text of an expression where only what binds at least as tightly as `level` may stand."""
    _, text, precedence = expression
    if precedence < level:
        return f"({text})"
    return text


def puzzles(count=3):
    """{(numbers, target): its answers, sorted}, in a fixed order, of `count` numbers each."""
    # A set of texts: (1+2)+3 and 1+(2+3) are both 1+2+3
    answers = collections.defaultdict(set)
    for numbers in itertools.combinations_with_replacement(range(1, LARGEST + 1), count):
        for order in set(itertools.permutations(numbers)):
            for value, text, _ in expressions(order):
                if 1 <= value <= TARGETS:
                    answers[numbers, value].add(text)
    return {puzzle: sorted(answers[puzzle]) for puzzle in sorted(answers)}


def prompt(puzzle):
    numbers, target = puzzle
    return " ".join(map(str, numbers)) + f"={target}:"


# ==== 2. The model ==============================================================================


def make_tokenizer():
    """One token a character: encode adds nothing, decode(encode(x)) is x.

    It is Qwen2's own tokenizer class, since AutoTokenizer loads no other for a Qwen2 model. Its
    byte-level alphabet writes a space as Ġ; there are no merges.
    """
    from transformers import Qwen2Tokenizer

    tokens = [*NAMED, *CHARACTERS.replace(" ", "Ġ"), *UNUSED]
    return Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[],
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=128,
    )


def make_model(tokenizer):
    """A Qwen2 with random weights, from torch's random state."""
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    ends = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        head_dim=64,  # one that flash attention takes
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        max_position_embeddings=128,
        initializer_range=0.05,
        rope_parameters={"rope_type": "default", "rope_theta": 30.0},
        bos_token_id=None,
        **ends,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **ends
    )
    return model


def padded_rows(tokenizer, pairs):
    """(tokens, labels) [pairs, width] of (question, answer) texts. The labels are the answer and
    its <eos>; elsewhere -100, which the loss leaves out."""
    import torch

    tokens = []
    labels = []
    for question, answer in pairs:
        asked = tokenizer.encode(question)
        said = tokenizer.encode(answer) + [tokenizer.eos_token_id]
        tokens.append(asked + said)
        labels.append([-100] * len(asked) + said)

    # Padded on the right, to the longest
    width = max(map(len, tokens))
    for row, marks in zip(tokens, labels, strict=True):
        missing = width - len(row)
        row += [tokenizer.pad_token_id] * missing
        marks += [-100] * missing
    return torch.tensor(tokens), torch.tensor(labels)


def warm_up(model, tokenizer, pairs, seed):
    """Supervised steps on (question, answer) pairs of text."""
    import torch
    from tqdm import tqdm

    tokens, labels = padded_rows(tokenizer, pairs)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.98), weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    bar = tqdm(range(STEPS), desc="warm-up", unit="step", mininterval=0.5)
    for step in bar:
        batch = torch.randint(len(pairs), (BATCH,), generator=generator)

        # Pads stand on the right, under a causal mask: no token sees one
        outputs = model(input_ids=tokens[batch, :-1], use_cache=False)
        logits = outputs.logits.flatten(0, 1)  # [BATCH * (width - 1), vocabulary]
        loss = torch.nn.functional.cross_entropy(logits, labels[batch, 1:].flatten())
        loss.backward()

        # Twenty steps of linear warm-up, then the cosine down to 0
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / STEPS)
        optimizer.param_groups[0]["lr"] = RATE * min((step + 1) / 20, cosine)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)


# ==== 3. Files ==================================================================================


def build(folder, seed, count, several, train):
    """Write model/, train.jsonl and test.jsonl into an empty folder."""
    answers = puzzles(count)

    # The puzzles of RL: TEST of them held out, the rest to train on
    usable = [puzzle for puzzle in answers if len(answers[puzzle]) >= several]
    chosen = random.Random(seed).sample(usable, TEST + train)
    write_puzzles(folder / "test.jsonl", chosen[:TEST])
    write_puzzles(folder / "train.jsonl", chosen[TEST:])

    # The warm-up sees neither of them: both are equally new to the model
    kept_back = set(chosen)
    pairs = []
    for puzzle in answers:
        if puzzle not in kept_back:
            pairs += [(prompt(puzzle), answer) for answer in answers[puzzle]]
    tokenizer, model = train_model(pairs, seed)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


def write_puzzles(path, puzzles):
    with open(path, "w") as file:
        for puzzle in puzzles:
            numbers, target = puzzle
            row = dict(prompt=prompt(puzzle), answer=dict(numbers=numbers, target=target))
            file.write(json.dumps(row) + "\n")


def train_model(pairs, seed):
    """(tokenizer, model), warmed up. The caller's random state and threads stay as they were."""
    import torch

    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        try:
            torch.set_num_threads(2)  # sums are split by thread: the same number, the same bytes
            torch.manual_seed(seed)
            tokenizer = make_tokenizer()
            model = make_model(tokenizer)
            warm_up(model, tokenizer, pairs, seed)
        finally:
            torch.set_num_threads(threads)
    return tokenizer, model


def make(task="tiny", root="~/.cache/lad/tiny", seed=None):
    """Paths {model, train, test}: a task's model folder and its two puzzle files, made if need be.

    The same arguments give the same bytes on the same machine; the folder's name is a hash of them,
    of this file and of torch's version. The seed is that of the puzzles' split and of the warm-up:
    None takes it from the environment, LAD_TINY_SEED, 0 unless set.
    """
    import torch

    if seed is None:
        seed = int(os.environ.get("LAD_TINY_SEED") or 0)
    # What the bytes depend on names their folder
    made_of = repr((torch.__version__, seed, task)).encode()
    key = hashlib.sha256(Path(__file__).read_bytes() + made_of).hexdigest()[:12]

    root = Path(root).expanduser()
    root.mkdir(parents=True, exist_ok=True)
    folder = root / key
    unfinished = root / f"{key}.partial"
    # Another process waits at the lock, then finds the folder. A kill lets the lock go
    with open(root / f"{key}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            build(unfinished, seed, **TASKS[task])
            unfinished.rename(folder)
    return dict(
        model=folder / "model",
        train=folder / "train.jsonl",
        test=folder / "test.jsonl",
    )


# ==== 4. main ===================================================================================


def main(argv):
    """Make a task, say where it is, and show eight answers to each of four puzzles."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from harness import command

    parser = command.parser(__doc__)
    parser.add_argument("task", nargs="?", choices=TASKS, default="tiny")
    paths = make(parser.parse_args(argv).task)
    for name, path in paths.items():
        print(f"{name}: {path}")
    tokenizer = AutoTokenizer.from_pretrained(paths["model"])
    model = AutoModelForCausalLM.from_pretrained(paths["model"])
    torch.manual_seed(0)
    for line in paths["test"].read_text().splitlines()[:4]:
        question = json.loads(line)["prompt"]
        ids = torch.tensor([tokenizer.encode(question)])
        out = model.generate(ids, num_return_sequences=8, max_new_tokens=12)
        answers = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
        print(question, *answers, sep="   ")


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from harness import command

    command.run(main)
