"""
The offline default: a 0.6M-parameter Qwen2 that has seen just enough Countdown to be worth training with RL.

    python tiny.py            # make it (under a minute on two cores, then cached) and show a few of its answers

A puzzle is three numbers and a target; an answer uses each number exactly once, with + - * and brackets:

    2 3 8=14:     ->     3*2+8    8+2*3    2*3+8    8+3*2    ...

RL trains and tests on puzzles with at least SEVERAL answers. The warm-up shows the model every answer of every other puzzle, equally
often, and stops early: it starts out solving some puzzles, in many ways. Whether RL keeps those ways or gives them up
for pass@1 is what the objectives in lad.py differ in.
"""
import collections, fcntl, hashlib, itertools, json, math, os, random, shutil
from pathlib import Path

NAMED = ["<pad>", "<eos>", "<unk>"]   # pad is not eos: the end of an answer must be trained
CHARACTERS = "0123456789 =:+-*()"
UNUSED = ["<unused0>", "<unused1>", "<unused2>"]   # makes 24, a multiple of 8
LARGEST, TARGETS, SEVERAL = 9, 99, 6   # numbers 1..9, targets 1..99, at least six answers
STEPS, BATCH, RATE = 400, 128, 3e-3    # steps, not seconds: a slow machine makes the same bytes


def expressions(numbers):
    """{(value, text, precedence)} of every expression over the numbers in this order, without needless brackets."""
    if len(numbers) == 1:
        return {(numbers[0], str(numbers[0]), 3)}
    found = set()
    for i in range(1, len(numbers)):
        for (a, left, p), (b, right, q) in itertools.product(expressions(numbers[:i]), expressions(numbers[i:])):
            for op, value, level in (("+", a + b, 1), ("-", a - b, 1), ("*", a * b, 2)):
                close = q > level or (q == level and op != "-")   # a-(b+c) needs its brackets
                found.add((value, (left if p >= level else f"({left})") + op + (right if close else f"({right})"), level))
    return found


def puzzles():
    """{(numbers, target): its answers, sorted}, in a fixed order."""
    answers = collections.defaultdict(set)
    for numbers in itertools.combinations_with_replacement(range(1, LARGEST + 1), 3):
        for order in sorted(set(itertools.permutations(numbers))):
            for value, text, _ in expressions(order):
                if 1 <= value <= TARGETS:
                    answers[numbers, value].add(text)
    return {puzzle: sorted(answers[puzzle]) for puzzle in sorted(answers)}


def prompt(puzzle):
    return " ".join(map(str, puzzle[0])) + f"={puzzle[1]}:"


def make_tokenizer():
    """One token a character. It is Qwen2's own tokenizer class (AutoTokenizer loads no other for a Qwen2 model), whose byte-level
    alphabet writes a space as Ġ, with no merges. encode adds nothing; decode(encode(x)) is x."""
    from transformers import Qwen2Tokenizer
    vocabulary = {token: i for i, token in enumerate([*NAMED, *CHARACTERS.replace(" ", "Ġ"), *UNUSED])}
    return Qwen2Tokenizer(vocab=vocabulary, merges=[], pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=128)


def make_model(tokenizer):
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM
    ends = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=4, head_dim=64,   # a head that flash attention takes
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True, max_position_embeddings=128,
        initializer_range=0.05, rope_parameters={"rope_type": "default", "rope_theta": 30.0}, bos_token_id=None, **ends))
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **ends)
    return model


def warm_up(model, tokenizer, pairs, seed):
    """Supervised steps on (prompt, answer) pairs of text; the loss is on the answer and its <eos>."""
    import torch
    from tqdm import tqdm
    ids = [(tokenizer.encode(question), tokenizer.encode(answer) + [tokenizer.eos_token_id]) for question, answer in pairs]
    width = max(len(q) + len(a) for q, a in ids)
    fill = lambda row, value: row + [value] * (width - len(row))
    tokens = torch.tensor([fill(q + a, tokenizer.pad_token_id) for q, a in ids])   # [pairs, width]
    labels = torch.tensor([fill([-100] * len(q) + a, -100) for q, a in ids])
    optimizer = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.98), weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    for step in (bar := tqdm(range(STEPS), desc="warm-up", unit="step", mininterval=0.5)):
        batch = torch.randint(len(pairs), (BATCH,), generator=generator)
        # padded on the right under a causal mask: no token sees a pad
        logits = model(input_ids=tokens[batch, :-1], use_cache=False).logits   # [BATCH, width - 1, vocabulary]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[batch, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = RATE * min((step + 1) / 20, 0.5 + 0.5 * math.cos(math.pi * step / STEPS))
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)


def build(folder, seed, train, test):
    import torch
    answers = puzzles()
    several = [puzzle for puzzle in answers if len(answers[puzzle]) >= SEVERAL]
    if train + test > len(several):
        raise ValueError(f"train + test = {train + test}: only {len(several)} puzzles have {SEVERAL} answers or more")
    chosen = random.Random(seed).sample(several, train + test)
    for name, part in (("test", chosen[:test]), ("train", chosen[test:])):
        rows = [dict(prompt=prompt(puzzle), answer=dict(numbers=puzzle[0], target=puzzle[1])) for puzzle in part]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept = set(answers) - set(chosen)   # the warm-up sees neither split: both are equally new to the model
    pairs = [(prompt(puzzle), answer) for puzzle in answers if puzzle in kept for answer in answers[puzzle]]
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):   # the caller's random state stays as it was
        try:
            torch.set_num_threads(2)   # sums are split by thread: the same number, the same bytes
            torch.manual_seed(seed)
            tokenizer = make_tokenizer()
            model = make_model(tokenizer)
            warm_up(model, tokenizer, pairs, seed)
        finally:
            torch.set_num_threads(threads)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


def make(root="~/.cache/lad/tiny", seed=None, train=256, test=128):
    """Paths {model, train, test} of the model folder and the two puzzle files, made if they are not there. The same arguments
    give the same bytes on the same machine; the folder's name is a hash of them, of this file and of torch's version.
    The seed is that of the puzzles' split and of the warm-up: None takes it from the environment, LAD_TINY_SEED, 0 unless set."""
    import torch
    seed = int(os.environ.get("LAD_TINY_SEED") or 0) if seed is None else seed
    key = hashlib.sha256(Path(__file__).read_bytes() + repr((torch.__version__, seed, train, test)).encode()).hexdigest()[:12]
    root = Path(root).expanduser()
    folder, partial = root / key, root / f"{key}.partial"
    root.mkdir(parents=True, exist_ok=True)
    with open(root / f"{key}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)   # another process waits here, then finds the folder; a kill lets the lock go
        if not folder.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            build(partial, seed, train, test)
            partial.rename(folder)
    return dict(model=folder / "model", train=folder / "train.jsonl", test=folder / "test.jsonl")


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    paths = make()
    tokenizer, model = AutoTokenizer.from_pretrained(paths["model"]), AutoModelForCausalLM.from_pretrained(paths["model"])
    print(*(f"{name}: {path}" for name, path in paths.items()), sep="\n")
    torch.manual_seed(0)
    for row in [json.loads(line) for line in open(paths["test"])][:4]:
        out = model.generate(torch.tensor([tokenizer.encode(row["prompt"])]), num_return_sequences=8, max_new_tokens=12)
        print(row["prompt"], *tokenizer.batch_decode(out[:, len(row["prompt"]):], skip_special_tokens=True), sep="   ")
