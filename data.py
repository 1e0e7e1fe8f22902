"""
Rows to train on and to evaluate on: from a local file or the Hugging Face hub to token ids and a verifiable truth. Whatever is wrong
with a file or a row ends the run in one line (exit code 2) that says which row and what it has.
"""
import json
from functools import reduce
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from settings import die, one_line


def read_rows(source, name, split):
    """Dicts, in order, from a .json (a list), .jsonl or .parquet file, or from the Hugging Face hub."""
    try:
        if source.endswith((".json", ".jsonl")):   # lines become one list, so that an error names its line
            text = Path(source).read_text()
            return json.loads(text if source.endswith(".json") else "[" + text.strip().replace("\n", ",\n") + "]")
        import datasets
        if source.endswith(".parquet"):
            return datasets.load_dataset("parquet", data_files=source, split="train")
        repository, _, revision = source.partition("@")   # org/name@revision, as the hub's own paths have it
        return datasets.load_dataset(repository, name or None, split=split, revision=revision or None)   # rows are read as they are asked for
    except Exception as error:   # hub errors come in a dozen types, all with a message worth passing on
        die(f"cannot read {source!r}: {one_line(error)}; give the path of a .json, .jsonl or .parquet file, or a hub name that can be reached")


def field(row, path, where):
    try:
        return reduce(lambda value, key: value[key], path.split("."), row)
    except (KeyError, TypeError, IndexError):
        die(f"{where}: no field {path!r}, which truth or eval_truth names; it has {', '.join(row)}")


def load_data(cfg, tokenizer, evaluation=False):
    """Rows {prompt_ids, prompt, truth} of the training or the held-out data. Duplicate and over-long prompts are
    dropped and counted; a row that lacks a field ends the run with its number."""
    source, quiet = cfg.eval_data if evaluation else cfg.data, dist.is_initialized() and dist.get_rank() > 0
    raw = read_rows(source, *((cfg.eval_name, cfg.eval_split) if evaluation else (cfg.data_name, cfg.data_split)))
    template, truth_path = (evaluation and cfg.eval_prompt) or cfg.prompt, (evaluation and cfg.eval_truth) or cfg.truth
    if cfg.chat and not tokenizer.chat_template:
        die(f"{cfg.model}: its tokenizer has no chat template; say chat = false")
    rows, seen, long = [], set(), 0
    for number, row in enumerate(tqdm(raw, "reading", disable=quiet or len(raw) < 50_000), 1):
        where = f"{source}, row {number}"
        if not isinstance(row, dict):
            die(f"{where}: expected an object with named fields, not {type(row).__name__}")
        chats = {k: v for k, v in row.items() if isinstance(v, list) and v and isinstance(v[0], dict) and "content" in v[0]}
        try:
            text = template.format(**row | {k: v[-1]["content"] for k, v in chats.items()})
            text.encode()   # half a surrogate pair, which JSON can hold, is no text
        except (LookupError, ValueError, AttributeError, TypeError) as error:
            die(f"{where}: the prompt template {template[:60]!r} does not fit: {type(error).__name__} {error}; the row has {', '.join(row)} (write a brace that is not a field twice: {{{{ }}}})")
        if not text.strip() or any(row[key] is None and f"{{{key}}}" in template for key in row):
            die(f"{where}: its prompt is empty or a field in it is null: {text[:60]!r}; leave such rows out")
        messages = chats.get(template[1:-1]) or [{"role": "system", "content": cfg.system}] * bool(cfg.system) + [{"role": "user", "content": text}]
        if text in seen:
            continue
        seen.add(text)
        pairs = [pair.split("=") for pair in truth_path.split(",")]
        truth = {k.strip(): field(row, v.strip(), where) for k, v in pairs} if "=" in truth_path else field(row, truth_path, where)
        truth = str(truth).rpartition(cfg.truth_after)[2].strip() if cfg.truth_after else truth
        if truth in (None, "") or cfg.kind == "countdown" and not (isinstance(truth, dict) and {"numbers", "target"} <= set(truth)):
            die(f"{where}: {truth_path} = {str(truth)[:60]!r} is no truth for kind = {cfg.kind}" + " (needs numbers and target)" * (cfg.kind == "countdown"))
        if cfg.chat:
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=not cfg.chat)["input_ids"]   # a chat template writes its own <bos>
        long += len(ids) > cfg.max_prompt_tokens
        rows += [dict(prompt_ids=ids, prompt=text, truth=truth)] * (len(ids) <= cfg.max_prompt_tokens)
    quiet or print(f"{'held-out' if evaluation else 'training':9} {source}: {len(rows)} rows ({len(raw) - len(seen)} duplicates and {long} prompts over {cfg.max_prompt_tokens} tokens dropped)"
           + f"; fewer than prompts = {cfg.prompts}: rows repeat in a batch" * (len(rows) < cfg.prompts and not evaluation))
    if not rows:
        die(f"{source}: no row is left; raise max_prompt_tokens = {cfg.max_prompt_tokens}")
    return rows[: cfg.eval_prompts or None] if evaluation else rows


def draw(rows, position, n, seed):
    """n rows from `position` on, in an order shuffled anew for every pass: a resumed run draws what it would have."""
    shuffled = lambda epoch: torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()
    orders = {epoch: shuffled(epoch) for epoch in range(position // len(rows), (position + n) // len(rows) + 1)}
    return [rows[orders[p // len(rows)][p % len(rows)]] for p in range(position, position + n)]
