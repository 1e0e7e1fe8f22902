"""
What questions and models are known by: short digests, which any change changes.

A model's weights are read whole: a training step at a small rate leaves most numbers of a bf16
file as they were, and rows of an embedding that no prompt uses, so that no sample of a file is
sure to show it. What that costs is bounded in another way: files are read side by side, and the
digest of a large one is remembered in ~/.cache/lad/weights.json for as long as the file stays
untouched.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
from pathlib import Path

from harness.ranks import print0
from harness.settings import replace

MEMORY = Path("~/.cache/lad/weights.json").expanduser()
LARGE = 256 << 20  # bytes from which a file's digest is remembered
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.index.json")
CONFIGS = (
    "config.json",
    "generation_config.json",
)  # the latter names the tokens that end a response


def digest(*parts):
    """12 hexadecimal digits of texts or bytes."""
    found = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode(errors="surrogatepass")
        found.update(b"%d:" % len(data))  # ab, c is not a, bc
        found.update(data)
    return found.hexdigest()[:12]


def of_truth(truth):
    """Of what a response is verified against."""
    return digest(json.dumps(truth, sort_keys=True, default=str))


def of_question(prompt_ids, truth):
    """Of what a model was asked: the rendered prompt as its token ids, and the digest of the
    truth."""
    return digest(json.dumps(list(prompt_ids)), truth)


def of_tokenizer(tokenizer):
    """Of how it turns text into tokens and back; its chat template is not in it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return digest(backend.to_str())
    return digest(json.dumps(sorted(tokenizer.get_vocab().items())))


def of_weights(folder):
    """Of a Hugging Face folder's configs and of every byte of its weights."""
    paths = [Path(folder, name) for name in CONFIGS if Path(folder, name).exists()]
    for pattern in WEIGHTS:
        paths += sorted(Path(folder).glob(pattern))

    # Those that have been written since they were last read
    remembered = recall()
    new = [path for path in paths if remembered.get(place(path), {}).get("stamp") != stamp(path)]
    size = sum(path.stat().st_size for path in new)
    if size > 16 * LARGE:
        print0(
            f"eval      reading {size / 1e9:.1f} GB of weights in {folder}, to know them by (once)"
        )

    # Read them, side by side
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for path, found in zip(new, pool.map(of_file, new), strict=True):
            remembered[place(path)] = dict(stamp=stamp(path), sha256=found)
    if any(path.stat().st_size >= LARGE for path in new):
        remember(remembered)
    return digest(*(f"{path.name} {remembered[place(path)]['sha256']}" for path in paths))


def of_file(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def place(path):
    """Of a link, where it points."""
    return os.path.realpath(path)


def stamp(path):
    """What changes when a file is written, whoever sets its time of modification back."""
    found = os.stat(path)
    return [found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def recall():
    """{path: {stamp, sha256}} of earlier runs; {} where there is nothing to be read."""
    try:
        found = json.loads(MEMORY.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def remember(found):
    """Of the large files; small ones are read again in no time. A home that cannot be written
    forgets."""
    kept = {path: entry for path, entry in found.items() if entry["stamp"][1] >= LARGE}
    with contextlib.suppress(OSError):
        MEMORY.parent.mkdir(parents=True, exist_ok=True)
        replace(MEMORY, json.dumps(kept))
