"""
Models and rows, from local files or the Hugging Face hub: to the folder of a model, and to token
ids with a verifiable truth. Whatever is wrong with a file or a row ends the run in one line (exit
code 2) that says which row and what it has.
"""

import json
import runpy
import time
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from harness import tiny
from harness.nodes import fetch_once
from harness.ranks import print0, rank
from harness.settings import die, one_line

# ==== 1. The model's folder =====================================================================


def find_model(cfg):
    """Folder of the starting model. Of a hub name the first rank of each machine downloads it; the
    tasks of harness/tiny.py, 'tiny' and 'tiny-hard', are made here, models and rows."""
    parts = dict(model="model", reference="model", data="train", eval_data="test")
    for key, part in parts.items():
        if getattr(cfg, key) in tiny.TASKS:
            setattr(cfg, key, str(make_tiny(getattr(cfg, key))[part]))
    if Path(cfg.model).is_dir():
        return cfg.model
    return download(cfg.model)


def make_tiny(task):
    """Paths {model, train, test} of a task made on the spot. Its lock lets the first rank of a
    machine make it."""
    try:
        return tiny.make(task)
    except OSError as error:
        die(f"{task!r} is made in ~/.cache/lad: {one_line(error)}; set HOME to a writable folder")


def find_reference(cfg, folder, tokenizer):
    """Folder of the reference model: the starting model's, or that of cfg.reference, which must
    read the starting model's tokens as it does."""
    if not cfg.reference:
        return folder
    other = cfg.reference
    if not Path(other).is_dir():
        other = download(other, "reference")
    words = load_tokenizer(other).get_vocab()
    for word, i in tokenizer.get_vocab().items():
        if words.get(word) != i:
            die(
                f"reference = {cfg.reference}: its tokenizer is not that of {cfg.model}: {word!r} "
                f"is {words.get(word)} there and {i} here, and log-probs are of tokens"
            )
    return other


def download(model, key="model"):
    """Folder of a model of the hub, org/name or org/name@revision: in the cache, or fetched now.
    key: the setting that names it."""
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

    def fetch_or_die():
        look_for_hub()
        try:
            fetch()
        except Exception as error:  # of a dozen types, all with a message worth passing on
            die(f"{key} = {model!r}: no such folder, and the hub says: {one_line(error)}")

    fetch_once(fetch_or_die, model)
    return fetch(local_files_only=True)


HUB_TRIES = 3
HUB_SECONDS = 10  # for each of them


def look_for_hub():
    """If the hub does not answer, say so and go on without it, with what its cache holds.

    Its clients ask again and again, for each of many addresses: minutes of silence in all.
    """
    import datasets
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return
    for attempt in range(1, HUB_TRIES + 1):
        try:
            get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
            return
        except Exception as error:  # of a dozen types
            print0(
                f"hub       {constants.ENDPOINT} does not answer, try {attempt} of {HUB_TRIES}: "
                f"{one_line(error)}"
            )
            time.sleep(1)
    constants.HF_HUB_OFFLINE = True
    datasets.config.HF_HUB_OFFLINE = True
    print0("hub       is left alone from here on: what is in its cache has to do")


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
    """Dicts, in order, from a .json (a list), .jsonl or .parquet file, from a function
    (FILE.py:function), or from the hub (org/name or org/name@revision)."""
    try:
        if is_function(source):
            return made_rows(source)
        if source.endswith(".json"):
            return json.loads(Path(source).read_text(encoding="utf-8-sig"))
        if source.endswith(".jsonl"):
            return read_lines(Path(source).read_text(encoding="utf-8-sig"))
        import datasets

        if source.endswith(".parquet"):
            return datasets.load_dataset("parquet", data_files=source, split="train")
        repository, _, revision = source.partition("@")
        if not Path(source).exists():
            look_for_hub()
        # rows are read as they are asked for
        return datasets.load_dataset(
            repository, name or None, split=split, revision=revision or None
        )
    except Exception as error:
        die(
            f"cannot read {source!r}: {one_line(error)}; give the path of a .json, .jsonl or "
            ".parquet file, FILE.py:function, or a hub name that can be reached"
        )


def is_function(source):
    """Whether a source of rows is FILE.py:function."""
    return ".py:" in source


def made_rows(source):
    """The rows that FILE.py:function returns, called without arguments: code of the user's own."""
    path, _, name = source.rpartition(":")
    made = runpy.run_path(path)
    if not callable(made.get(name)):
        raise ValueError(f"{path} has no function {name!r}")
    return list(made[name]())


def read_lines(text):
    """The values of a .jsonl file, blank lines left out; an error names its line."""
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            found.append(json.loads(line))
        except ValueError as error:
            if isinstance(error, json.JSONDecodeError):
                raise ValueError(f"{error.msg}: line {number} column {error.colno}") from None
            raise ValueError(f"{error}: line {number}") from None
    return found


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
    """Rows {prompt_ids, prompt, truth} of the training or the held-out data; for a reward of one's
    own the truth is the whole row. Duplicate and over-long prompts are dropped and counted; a row
    that lacks a field ends the run with its number."""
    source, name, split = cfg.data, cfg.data_name, cfg.data_split
    template, truth_path = cfg.prompt, cfg.truth
    if evaluation:
        source, name, split = cfg.eval_data, cfg.eval_name, cfg.eval_split
        template = cfg.eval_prompt or template
        truth_path = cfg.eval_truth or truth_path
    raw = None
    is_here = source.endswith((".json", ".jsonl")) or is_function(source)
    if not is_here:  # else there is nothing to fetch, or to convert
        raw = fetch_once(partial(read_rows, source, name, split), source)
    if raw is None:
        raw = read_rows(source, name, split)
    if cfg.chat and not tokenizer.chat_template:
        die(f"{cfg.model}: its tokenizer has no chat template; say chat = false")
    options = chat_options(cfg)

    rows = []
    seen = set()
    counts = Counter()  # of what was left out
    silent = rank() > 0 or len(raw) < 50_000
    for number, row in enumerate(tqdm(raw, "reading", disable=silent), 1):
        where = f"{source}, row {number}"
        if not isinstance(row, dict):
            die(f"{where}: expected an object with named fields, not {type(row).__name__}")
        text, messages = fill_template(row, template, where, counts)
        if cfg.chat:
            messages = with_system(messages, cfg.system, counts)
            text = render(messages, tokenizer, options, where)
        if text in seen:
            counts["duplicates"] += 1
            continue
        seen.add(text)
        truth = row if cfg.reward else truth_of(row, truth_path, cfg, where)
        # a chat template writes its own <bos>
        ids = tokenizer(text, add_special_tokens=not cfg.chat)["input_ids"]
        if len(ids) > cfg.max_prompt_tokens:
            counts["too long"] += 1
        else:
            rows.append(dict(prompt_ids=ids, prompt=text, truth=truth))

    few = ""
    if len(rows) < cfg.prompts and not evaluation:
        few = f"; fewer than prompts = {cfg.prompts}: rows repeat in a batch"
    print0(
        f"{'held-out' if evaluation else 'training':9} {source}: {len(rows)} rows "
        f"({counts['duplicates']} duplicates and {counts['too long']} prompts over "
        f"{cfg.max_prompt_tokens} tokens dropped){few}"
    )
    if counts["answers"]:
        print0(
            f"note      {source}: {counts['answers']} rows end with an answer, which is left out"
        )
    if counts["systems"]:
        print0(
            f"note      {source}: {counts['systems']} rows have a system message, for which "
            "--system is ignored"
        )
    if not rows:
        die(f"{source}: no row is left; raise max_prompt_tokens = {cfg.max_prompt_tokens}")
    if evaluation and cfg.eval_prompts:
        rows = rows[: cfg.eval_prompts]
    return rows


# ==== 3. Prompts ================================================================================

# Who speaks in ShareGPT's files, by the names that chat templates know
SPEAKERS = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}


def is_chat(value):
    """Whether a field is a list of chat messages, {role, content} or ShareGPT's {from, value}."""
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return False
    return bool({"role", "content"} & set(value[0])) or {"from", "value"} <= set(value[0])


def read_chat(value, where):
    """The messages of a field as {role, content: text}, other fields of theirs as they are."""
    messages = []
    for number, given in enumerate(value, 1):
        here = f"{where}, message {number}"
        if not isinstance(given, dict):
            die(f"{here}: expected an object with role and content, not {type(given).__name__}")
        message = dict(given)
        if "from" in message and "role" not in message:
            speaker = message.pop("from")
            message["role"] = SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else None
            message["content"] = message.pop("value", None)
        if not message.get("role") or not isinstance(message["role"], str):
            die(f"{here}: it has no role; it has {', '.join(given)}")
        message["content"] = as_text(message.get("content"), here)
        messages.append(message)
    return messages


def as_text(content, where):
    """The content of a message: text, or a list of parts that are all text."""
    if isinstance(content, str):
        return content
    if content is None:
        die(f"{where}: its content is null or missing; leave such rows out")
    if not isinstance(content, list):
        die(f"{where}: its content is {type(content).__name__}, not text")
    texts = []
    for part in content:
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            die(f"{where}: its content has a part that is not text: {str(part)[:60]}")
    return "".join(texts)


def without_answer(messages, where):
    """The messages up to the last one that the model is to answer."""
    end = len(messages)
    while end and messages[end - 1]["role"] == "assistant":
        end -= 1
    if not any(message["role"] != "system" for message in messages[:end]):
        die(f"{where}: its messages hold no question, only {messages[0]['role']} messages")
    return messages[:end]


def fill_template(row, template, where, counts):
    """(the prompt as text, as chat messages). A field of messages stands for the last of them, and
    alone in the template for all of them, but for an answer at the end, which is counted."""
    chats = {}
    last = {}
    for key, value in row.items():
        if is_chat(value) and f"{{{key}}}" in template:
            whole = read_chat(value, where)
            chats[key] = without_answer(whole, where)
            last[key] = chats[key][-1]["content"]
            counts["answers"] += len(chats[key]) < len(whole)
    try:
        text = template.format(**row | last)
        text.encode()  # half a surrogate pair, which JSON can hold, is no text
    except (LookupError, ValueError, AttributeError, TypeError) as error:
        die(
            f"{where}: the prompt template {template[:60]!r} does not fit: {type(error).__name__} "
            f"{error}; the row has {', '.join(row)} (write a brace that is not a field twice: "
            "{{ }})"
        )
    is_null = any(row[key] is None and f"{{{key}}}" in template for key in row)
    has_no_message = row.get(template[1:-1]) == []
    if not text.strip() or is_null or has_no_message:
        die(
            f"{where}: its prompt is empty or a field in it is null: {text[:60]!r}; leave such "
            "rows out"
        )
    return text, chats.get(template[1:-1]) or [{"role": "user", "content": text}]


def with_system(messages, system, counts):
    """The messages with a system message first, if there is one to add; a row's own stays."""
    if not system:
        return messages
    if any(message["role"] == "system" for message in messages):
        counts["systems"] += 1
        return messages
    return [{"role": "system", "content": system}, *messages]


def chat_options(cfg):
    """What cfg.chat_options gives a chat template beside the messages: variables of its own, such
    as Qwen3's enable_thinking."""
    if not cfg.chat_options:
        return {}
    try:
        options = json.loads(cfg.chat_options)
    except ValueError as error:
        die(f"chat_options = {cfg.chat_options!r}: {one_line(error)}; expected a JSON object")
    if not isinstance(options, dict):
        die(f"chat_options = {cfg.chat_options!r}: expected a JSON object")
    return options


def render(messages, tokenizer, options, where):
    """The text of a chat, up to where the model begins to answer."""
    try:
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False, **options
        )
    except Exception as error:  # whatever a template raises: it is a program
        roles = ", ".join(message["role"] for message in messages)
        die(
            f"{where}: the chat template refuses its messages ({roles}): {one_line(error)}; mend "
            "the row, leave out --system if it is that, or say chat = false"
        )


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
