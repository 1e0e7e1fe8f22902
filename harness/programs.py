"""
Judging of programs: whether the program of a response (harness/fences.py) passes the tests of a row
(harness/code_tests.py). What runs it is harness/sandbox.py.
"""

import re
import time
from fractions import Fraction

from harness.code_tests import read_tests
from harness.fences import LONGEST, last_program
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


# ==== 2. Judging ================================================================================


def code_judge(text, truth, sandbox, timeout):
    """(1.0, "") where the last Python block of the text passes every test; stops at the first that
    fails. Else 0.0 and why: truth unparsable, no answer found, too long, timeout, crashed, or ""
    for a wrong answer. Raises nothing."""
    deadline = time.monotonic() + timeout
    # The tests and the program
    tests = attempt(read_tests, truth)
    if tests is None:
        return 0.0, "truth unparsable"
    program = last_program(text)
    if not program:
        return 0.0, "no answer found"
    if len(program) > LONGEST:
        return 0.0, "too long"
    try:
        # Calls and code, else stdin after stdin
        if tests.job:
            reason = sandbox.call(program, tests.job, tests.limits, deadline)
            return float(reason == ""), reason.replace("wrong", "")
        for stdin, want in tests.pairs:
            cap = 4 * len(want) + 65536
            reason, output = sandbox.run(program, stdin, cap, tests.limits, deadline)
            if reason or not same_output(output.decode(errors="replace"), want):
                return 0.0, reason
        return 1.0, ""
    except (OSError, ValueError):  # a box was lost
        sandbox.lost()
        return 0.0, "crashed"
