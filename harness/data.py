"""
Models and rows, from local files or the Hugging Face hub: to the folder of a model, and to token
ids with a verifiable truth. Whatever is wrong with a file or a row ends the run in one line (exit
code 2) that says which row and what it has.
"""

import json
import os
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from harness.ranks import leave_together, print0, rank
from harness.settings import die, one_line

# ==== 1. The model's folder =====================================================================


def find_model(cfg):
    """Folder of the starting model. Of a hub name the first rank of each machine downloads it; the
    offline default, 'tiny', is made here, and so are its rows."""
    if "tiny" in (cfg.model, cfg.data, cfg.eval_data):
        from harness import tiny  # whose lock lets the first rank of a machine make it

        for key, part in (("model", "model"), ("data", "train"), ("eval_data", "test")):
            if getattr(cfg, key) == "tiny":
                setattr(cfg, key, str(tiny.make()[part]))
    if Path(cfg.model).is_dir():
        return cfg.model
    return download(cfg.model)


def download(model):
    """Folder of a model of the hub, org/name or org/name@revision: in the cache, or fetched now."""
    from huggingface_hub import snapshot_download

    name, _, revision = model.partition("@")
    # One list of files for who downloads and for who looks up what is there: the hub's client
    # counts a file that nobody asked for as missing
    fetch = partial(
        snapshot_download,
        name,
        revision=revision or None,
        allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"],
        # second copies of the weights, in other formats
        ignore_patterns=["consolidated*", "original/*", "*/*.safetensors"],
    )
    message = ""
    if int(os.environ["LOCAL_RANK"]) == 0:
        try:
            fetch()
        except Exception as error:  # of a dozen types, all with a message worth passing on
            message = f"model = {model!r}: no such folder, and the hub says: {one_line(error)}"
    leave_together(message)
    return fetch(local_files_only=True)


def load_tokenizer(folder):
    """Its tokenizer, which has no more tokens than the model."""
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    size = AutoConfig.from_pretrained(folder).vocab_size
    if len(tokenizer) > size:
        die(f"{folder}: its tokenizer has {len(tokenizer)} tokens, its model {size}")
    return tokenizer


# ==== 2. Rows ===================================================================================


def read_rows(source, name, split):
    """Dicts, in order, from a .json (a list), .jsonl or .parquet file, or from the hub (org/name or
    org/name@revision)."""
    try:
        if source.endswith(".json"):
            return json.loads(Path(source).read_text())
        if source.endswith(".jsonl"):  # lines become one list, so that an error names its line
            lines = Path(source).read_text().strip().replace("\n", ",\n")
            return json.loads(f"[{lines}]")
        import datasets

        if source.endswith(".parquet"):
            return datasets.load_dataset("parquet", data_files=source, split="train")
        repository, _, revision = source.partition("@")
        # rows are read as they are asked for
        return datasets.load_dataset(
            repository, name or None, split=split, revision=revision or None
        )
    except Exception as error:
        die(
            f"cannot read {source!r}: {one_line(error)}; give the path of a .json, .jsonl or "
            ".parquet file, or a hub name that can be reached"
        )


def field(row, path, where):
    """The value at a dotted path of a row."""
    value = row
    for key in path.split("."):
        try:
            value = value[key]
        except (KeyError, TypeError, IndexError):
            die(
                f"{where}: no field {path!r}, which truth or eval_truth names; it has "
                f"{', '.join(row)}"
            )
    return value


def load_data(cfg, tokenizer, evaluation=False):
    """Rows {prompt_ids, prompt, truth} of the training or the held-out data. Duplicate and
    over-long prompts are dropped and counted; a row that lacks a field ends the run with its
    number."""
    source, name, split = cfg.data, cfg.data_name, cfg.data_split
    template, truth_path = cfg.prompt, cfg.truth
    if evaluation:
        source, name, split = cfg.eval_data, cfg.eval_name, cfg.eval_split
        template = cfg.eval_prompt or template
        truth_path = cfg.eval_truth or truth_path
    raw = read_rows(source, name, split)
    if cfg.chat and not tokenizer.chat_template:
        die(f"{cfg.model}: its tokenizer has no chat template; say chat = false")

    rows = []
    seen = set()
    too_long = 0
    silent = rank() > 0 or len(raw) < 50_000
    for number, row in enumerate(tqdm(raw, "reading", disable=silent), 1):
        where = f"{source}, row {number}"
        if not isinstance(row, dict):
            die(f"{where}: expected an object with named fields, not {type(row).__name__}")
        text, messages = fill_template(row, template, cfg.system, where)
        if text in seen:
            continue
        seen.add(text)
        truth = truth_of(row, truth_path, cfg, where)
        if cfg.chat:
            text = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
        # a chat template writes its own <bos>
        ids = tokenizer(text, add_special_tokens=not cfg.chat)["input_ids"]
        if len(ids) > cfg.max_prompt_tokens:
            too_long += 1
        else:
            rows.append(dict(prompt_ids=ids, prompt=text, truth=truth))

    few = ""
    if len(rows) < cfg.prompts and not evaluation:
        few = f"; fewer than prompts = {cfg.prompts}: rows repeat in a batch"
    print0(
        f"{'held-out' if evaluation else 'training':9} {source}: {len(rows)} rows "
        f"({len(raw) - len(seen)} duplicates and {too_long} prompts over {cfg.max_prompt_tokens} "
        f"tokens dropped){few}"
    )
    if not rows:
        die(f"{source}: no row is left; raise max_prompt_tokens = {cfg.max_prompt_tokens}")
    if evaluation and cfg.eval_prompts:
        rows = rows[: cfg.eval_prompts]
    return rows


def is_chat(value):
    """Whether a field is a list of chat messages."""
    return (
        isinstance(value, list) and value and isinstance(value[0], dict) and "content" in value[0]
    )


def fill_template(row, template, system, where):
    """(the prompt as text, as chat messages). A field of messages stands for the last of them, and
    alone in the template for all of them."""
    chats = {key: value for key, value in row.items() if is_chat(value)}
    try:
        text = template.format(**row | {key: chat[-1]["content"] for key, chat in chats.items()})
        text.encode()  # half a surrogate pair, which JSON can hold, is no text
    except (LookupError, ValueError, AttributeError, TypeError) as error:
        die(
            f"{where}: the prompt template {template[:60]!r} does not fit: {type(error).__name__} "
            f"{error}; the row has {', '.join(row)} (write a brace that is not a field twice: "
            "{{ }})"
        )
    is_null = any(row[key] is None and f"{{{key}}}" in template for key in row)
    if not text.strip() or is_null:
        die(
            f"{where}: its prompt is empty or a field in it is null: {text[:60]!r}; leave such "
            "rows out"
        )

    messages = chats.get(template[1:-1])
    if not messages:
        messages = [{"role": "user", "content": text}]
        if system:
            messages = [{"role": "system", "content": system}, *messages]
    return text, messages


def truth_of(row, path, cfg, where):
    """What a row's response is verified against: a field, or a dictionary of some ("a=x,b=y")."""
    if "=" in path:
        truth = {}
        for pair in path.split(","):
            key, value = pair.split("=")
            truth[key.strip()] = field(row, value.strip(), where)
    else:
        truth = field(row, path, where)
    if cfg.truth_after:
        truth = str(truth).rpartition(cfg.truth_after)[2].strip()

    is_puzzle = isinstance(truth, dict) and {"numbers", "target"} <= set(truth)
    if truth in (None, "") or cfg.kind == "countdown" and not is_puzzle:
        needs = " (needs numbers and target)" if cfg.kind == "countdown" else ""
        die(f"{where}: {path} = {str(truth)[:60]!r} is no truth for kind = {cfg.kind}{needs}")
    return truth


def draw(rows, position, n, seed):
    """n rows from `position` on, in an order shuffled anew for every pass: a resumed run draws what
    it would have drawn."""
    drawn = []
    order, shuffled = None, None  # the pass, and its order
    for p in range(position, position + n):
        epoch, place = divmod(p, len(rows))
        if epoch != shuffled:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            order = torch.randperm(len(rows), generator=generator).tolist()
            shuffled = epoch
        drawn.append(rows[order[place]])
    return drawn
