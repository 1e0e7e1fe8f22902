"""
A reward of one's own: a Python function that says what a response is worth.

    --reward my_rewards.py:function

    def function(response: str, row: dict) -> float:
        return float(row["answer"] in response)

What it may return and what becomes of it stands in docs/rewards.md. It runs in verify.py's workers:
processes that are killed when they are late. This file is what both sides need: the name of a
reward (find), its function (load), and one call of it (score).
"""

import ast
import math
import numbers
import os
import resource
import sys
import tokenize
import types
from pathlib import Path

from harness.settings import did_you_mean, one_line

PREFIX = "reward:"  # of an item's kind, before FILE.py:function
LOADING = 300  # seconds that importing the file may take
REASON = 200  # characters of a reason
MEMORY = 4 << 30  # bytes of addresses that its calls may add to what importing it took

# ==== 1. Its name ===============================================================================


def find(name):
    """FILE.py:function with the file's whole path, so that every process means the same file.
    ValueError where there is no such file or it is no Python."""
    path, colon, function = name.rpartition(":")
    if not colon or not path or not function.isidentifier():
        raise ValueError(f"reward = {name!r}: expected FILE.py:function")
    path = Path(path).expanduser().resolve()
    read(path)
    return f"{path}:{function}"


def split(name):
    """(path of the file, name of the function) of a reward."""
    path, _, function = name.rpartition(":")
    return Path(path), function


def read(path):
    """The text of the file. ValueError where it cannot be read or is no Python."""
    try:
        with tokenize.open(path) as file:  # in the encoding that Python would read it in
            source = file.read()
    except (OSError, UnicodeDecodeError, SyntaxError) as error:
        raise ValueError(
            f"reward: {one_line(error)}; name a file that is there (a run keeps a copy of its "
            "own, in source/reward)"
        ) from None
    try:
        ast.parse(source)
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None) or 1
        said = getattr(error, "msg", None) or one_line(error)
        raise ValueError(f"reward: {path}, line {line}: {said}") from None
    return source


# ==== 2. In a worker ============================================================================


def load(name, source):
    """The function, from the text of its file, which is imported as a module of its own. The memory
    of this process is limited from then on. ValueError with a line for people."""
    path, function = split(name)
    module = types.ModuleType(f"reward_{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    sys.path.insert(1, str(path.parent))  # what it imports from beside it
    try:
        exec(compile(source, str(path), "exec"), vars(module))
    except (Exception, SystemExit) as error:
        raise ValueError(f"importing {path} failed: {said_of(error, path)}") from None
    found = getattr(module, function, None)
    if not callable(found):
        has = [key for key, value in vars(module).items() if isinstance(value, types.FunctionType)]
        raise ValueError(f"{path} has no function {function!r}{did_you_mean(function, has)}")
    limit_memory()
    return found


def limit_memory():
    """A few GB beyond what is mapped by now: torch maps more than that as it is imported."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if hard >= 0:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def score(name, function, response, row):
    """(reward, reason) of one call. Where the function raises, or returns no number, the reason has
    a colon: there is no reward then, which is not the same as a reward of 0."""
    path, _ = split(name)
    try:
        returned = function(response, row)
    except Exception as error:
        return 0.0, f"crashed: {said_of(error, path)}"
    reason = ""
    value = returned
    if isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], str):
        value, reason = returned
    try:
        # a colon is what tells a failure of the reward from a response that is wrong
        return as_number(value), shown(reason.replace(":", ";"))
    except (TypeError, ValueError, OverflowError):
        what = shown(repr(returned))[:60]
        return 0.0, f"crashed: returned {what}, expected a finite number"


def shown(text):
    """The beginning of a text on one line; what is not printable is escaped: the half of a
    surrogate pair, which cannot be written, or what would steer a terminal."""
    line = " ".join(text.split())[:REASON]
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)[:REASON]


def as_number(value):
    """A float of a number, a truth value, or a scalar of numpy or torch. TypeError or ValueError
    for anything else: a string, None, nan, an array."""
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if not isinstance(value, numbers.Real):
        raise TypeError
    if not math.isfinite(value):
        raise ValueError
    return float(value)


def said_of(error, path):
    """What an exception says, and the last line of the user's file that it went through."""
    where = ""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            where = f" ({path.name}, line {trace.tb_lineno})"
        trace = trace.tb_next
    name = type(error).__name__[:60]
    said = shown(str(error))[:100]
    return shown(f"{name} {said}".strip() + where)
