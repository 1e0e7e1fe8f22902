r"""
A reward of one's own, and its data: make 24, each number used once, with + - * / and brackets.

    python examples/make24.py 3 > make24.jsonl      # 4: puzzles of four numbers
    python lad.py --config tiny --data make24.jsonl --eval_data make24.jsonl \
        --reward examples/make24.py:reward

A prompt has many right answers, and a wrong one that uses the right numbers is worth something.
"""

import itertools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness.countdown import answer_of, expression, solve  # noqa: E402


def reward(response, row):
    """1 for 24, 0.3 for another value of the right numbers, 0.1 for any other expression."""
    used = []
    value = solve(expression(answer_of(response)), used)  # never eval() what a model wrote
    if value is None:
        return 0.0, "no expression"
    if sorted(used) != sorted(row["numbers"]):
        return 0.1, "other numbers"
    if value != 24:
        return 0.3, "the numbers, but not 24"
    return 1.0


# ==== Its data ==================================================================================


def values(numbers):
    """Every value that an expression over all of the numbers can have."""
    if len(numbers) == 1:
        return set(numbers)
    found = set()
    for size in range(1, len(numbers)):
        for left in itertools.combinations(numbers, size):
            right = list(numbers)
            for number in left:
                right.remove(number)
            for a, b in itertools.product(values(left), values(right)):
                found |= {a + b, a - b, a * b}
                if b:
                    found.add(a / b)
    return found


def main(size):
    """A row for each handful of numbers from 1 to 9 that can make 24."""
    for numbers in itertools.combinations_with_replacement(range(1, 10), size):
        if any(abs(value - 24) < 1e-9 for value in values(numbers)):
            asked = " ".join(map(str, numbers))
            print(json.dumps({"prompt": f"{asked}=24:", "numbers": numbers}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
