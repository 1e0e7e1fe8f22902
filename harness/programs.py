"""
Judging of programs: which part of a response is the program, what the tests of a row are, whether
an output is right. What runs the program is harness/sandbox.py.
"""

import json
import re
import time
from fractions import Fraction

from harness.sandbox import attempt

# ==== 1. Outputs ================================================================================

NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?")


def same_output(got, want):
    """Lines stripped, token by token, numbers as numbers: exactly, or to 1e-6 where the truth has a
    decimal point."""
    got_lines = [line.split() for line in got.strip().splitlines()]
    want_lines = [line.split() for line in want.strip().splitlines()]
    if len(got_lines) != len(want_lines):
        return False
    for got_line, want_line in zip(got_lines, want_lines, strict=True):
        if len(got_line) != len(want_line) or not all(map(same_token, got_line, want_line)):
            return False
    return True


def same_token(got, want):
    """One word, or one number."""
    if got == want:
        return True
    if len(got + want) > 400 or not (NUMBER.fullmatch(got) and NUMBER.fullmatch(want)):
        return False
    difference = abs(Fraction(got) - Fraction(want))
    if "." not in want:
        return difference == 0
    return difference * 10**6 <= max(1, abs(Fraction(want)))


# ==== 2. The tests of a row =====================================================================


def read_tests(tests):
    """(stdin-stdout pairs or None, job of the tests' box or None, limits) from the forms of the
    datasets."""
    if isinstance(tests, str):
        tests = json.loads(tests)
    if isinstance(tests, list):
        tests = from_list(tests)
    name = tests.get("fn_name") or tests.get("func_name") or tests.get("entry_point") or ""
    name = name.rpartition(".")[2]  # also "Solution().name"
    limits = {
        "memory": int(tests.get("memory_mb", 1024)) << 20,
        "seconds": float(tests.get("time_limit", 6)),
    }
    job = {
        "prelude": tests.get("prompt", ""),
        "test": tests.get("functional") or tests.get("test") or "",
        "entry": name,
        "cases": [],
        "atol": tests.get("atol", 0),
    }
    if "plus_input" in tests:
        job["test"] = ""
        job["prelude"] = tests["prompt"] + tests["canonical_solution"]
        job["cases"] = [[args] for args in tests["base_input"] + tests["plus_input"]]
        return None, job, limits
    if job["test"]:
        return None, job, limits

    pairs = list(zip(tests["inputs"], tests["outputs"], strict=True))
    if not name:
        return [[as_text(side) for side in pair] for pair in pairs] or None, None, limits
    for given, expected in pairs:
        if isinstance(expected, str):
            expected = as_values(expected)[0]
        job["cases"].append([as_values(given), expected])
    return None, job, limits


def from_list(tests):
    """The tests of Codeforces and LiveCodeBench, one object each, as lists of inputs and
    outputs."""
    name = None
    for test in tests:
        if test.get("testtype") == "functional" and name is None:
            name = test["metadata"]["func_name"]
    return {
        "inputs": [test["input"] for test in tests],
        "outputs": [test["output"] for test in tests],
        "fn_name": name,
    }


def as_text(side):
    """stdin or stdout; a list holds its lines."""
    return "\n".join(side) if isinstance(side, list) else side


def as_values(side):
    """Arguments of a call; a string holds one in JSON on each line."""
    if not isinstance(side, str):
        return side
    return [json.loads(line) for line in side.splitlines() if line.strip()]


# ==== 3. Judging ================================================================================

BLOCK = re.compile(r"^[ \t]*```[ \t]*(?:python3?|py|Python)?[ \t]*\n(.*?)^[ \t]*```", re.S | re.M)


def code_judge(text, tests, sandbox, timeout):
    """(1.0, "") where the last Python block of the text passes every test; stops at the first that
    fails. Else 0.0 and why: truth unparsable, no answer found, too long, timeout, crashed, or ""
    for a wrong answer. Raises nothing."""
    deadline = time.monotonic() + timeout
    pairs, job, limits = attempt(read_tests, tests) or (None, None, None)
    if not pairs and not job:
        return 0.0, "truth unparsable"
    blocks = BLOCK.findall(text)
    if not blocks:
        return 0.0, "no answer found"
    program = blocks[-1]
    if len(program) > 200_000:
        return 0.0, "too long"
    try:
        if job:
            reason = sandbox.call(program, job, limits, deadline)
            return float(reason == ""), reason.replace("wrong", "")
        for stdin, want in pairs:
            cap = 4 * len(want) + 65536
            reason, output = sandbox.run(program, stdin, cap, limits, deadline)
            if reason or not same_output(output.decode(errors="replace"), want):
                return 0.0, reason
        return 1.0, ""
    except (OSError, ValueError):  # a box was lost
        sandbox.lost()
        return 0.0, "crashed"
