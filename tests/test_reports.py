"""Ten public bug reports about other verifiers, of kinds that tests/test_answers.py does not list,
tried on this one. docs/verifiers.md says what each was."""

import sys
import threading
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import verify


@pytest.fixture(scope="module")
def pool():
    with verify.Verifier(workers=2, timeout=60) as verifier:
        yield verifier


def boxes(pool, pairs):
    """Rewards of (truth, what is in the box)."""
    return pool.score([("math", f"so $\\boxed{{{answer}}}$", truth) for truth, answer in pairs])


def check(pool, right, wrong):
    rewards = boxes(pool, right)
    assert [pair for pair, reward in zip(right, rewards, strict=True) if not reward] == []
    rewards = boxes(pool, wrong)
    assert [pair for pair, reward in zip(wrong, rewards, strict=True) if reward] == []


def code(program):
    return f"```python\n{program}\n```"


def stdin_row(given, expected):
    return {"inputs": [given], "outputs": [expected], "time_limit": 60}


def test_part_of_a_list_is_not_the_list(pool):
    """Math-Verify 47."""
    right = [
        ("1331 and 1728", r"1331 \text{ and } 1728"),
        ("1331 and 1728", "1728, 1331"),
        ("1331 and 1728", r"\{1331, 1728\}"),
        (r"\pm 2021", "2021, -2021"),
    ]
    wrong = [
        ("1331 and 1728", "1728"),
        ("1331 and 1728", "1331, 1728, 2197"),
        ("1331 and 1728", "1331, 1331"),
        ("1728", "1331, 1728"),
        (r"\pm 2021", "2021"),
    ]
    check(pool, right, wrong)


def test_which_of_two_is_the_truth_does_not_matter_for_a_ray(pool):
    """Math-Verify 71: x<3 and (-\\infty,3) are one, either way round."""
    right = [
        ("x<3", r"(-\infty, 3)"),
        (r"(-\infty, 3)", "x<3"),
        (r"[\sqrt{2}, \infty)", r"m \ge \sqrt{2}"),
        (r"m \ge \sqrt{2}", r"m \in [\sqrt{2}, +\infty)"),
    ]
    wrong = [
        ("x<3", r"(-\infty, 3]"),
        (r"(-\infty, 3)", r"x \le 3"),
        (r"(-\infty, 3)", "x>3"),
        ("(0, 12.5)", r"0 \le x < 12.5"),
    ]
    check(pool, right, wrong)


def test_equations_of_one_line_and_of_two(pool):
    """Math-Verify 26 and 60."""
    right = [
        ("2x+4y-3=0", r"y = -\frac{1}{2}x + \frac{3}{4}"),
        ("3x-y+13=0", "y = 3x+13"),
        ("3x-y+13=0", "6x-2y=-26"),
    ]
    wrong = [
        ("3x-y+13=0", "3x+4y+14=0"),
        ("3x-y+13=0", "0"),
        ("2x+4y-3=0", r"y = -\frac{1}{2}x"),
        ("y = 3x+13", "y = 3x-13"),
    ]
    check(pool, right, wrong)


def test_curves(pool):
    """Math-Verify 40: a comparison of two ellipses ended in a TypeError."""
    ellipse = r"\frac{x^2}{4}+\frac{y^2}{3}=1"
    right = [(ellipse, "3x^2+4y^2=12"), (ellipse, r"\frac{y^2}{3}+\frac{x^2}{4}=1")]
    wrong = [(ellipse, r"\frac{x^2}{16}+\frac{y^2}{12}=1"), (ellipse, "3x^2+4y^2=13")]
    check(pool, right, wrong)


def test_what_no_parser_reads_is_itself(pool):
    """lm-evaluation-harness 4030."""
    truths = [
        "(2,4)",
        "[2,5)",
        r"\begin{pmatrix}1\\2\end{pmatrix}",
        r"\text{Each of the three}",
        r"f(f(x)) \equiv g \star h",
        "12:00",
    ]
    wrong = [("(2,4)", "(4,2)"), ("[2,5)", "(2,5)"), ("12:00", "1:00")]
    wrong += [(r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}")]
    check(pool, [(truth, truth) for truth in truths], wrong)


def test_a_truth_that_cannot_be_read_is_no_reward(pool):
    """huggingface/cookbook 335 gave 1 to every response of such a row."""
    for truth in ("", None, [], r"\frac{"):
        assert boxes(pool, [(truth, "5")]) == [0.0]
        assert pool.reasons == ["truth unparsable"]


def test_a_choice_and_what_it_stands_for(pool):
    """NeMo Gym 1844."""
    right = [
        ("E", r"\text{E}"),
        ("E", "E: a polygenic score"),
        ("B", r"\textbf{(B)}\ 5"),
        ("B", r"B) \frac{1}{2}"),
    ]
    wrong = [
        ("E", "D: a polygenic score"),
        ("B", r"\textbf{(B)}\ 5 \text{ or } \textbf{(C)}\ 6"),
        ("B", "B, C"),
        ("B", "B/C"),
        ("B", "B: not B"),
    ]
    check(pool, right, wrong)


READERS = {
    "bytes": "import sys\nprint(sum(map(int, sys.stdin.buffer.read().split())))",
    "a line, then all the rest": "import sys\nn = int(input())\n"
    "print(n + sum(map(int, sys.stdin.read().split())))",
    "bytes, line by line": "import sys\nread = sys.stdin.buffer.readline\n"
    "print(int(read()) + int(read()) + int(read()))",
    "lines": "import sys\nprint(sum(int(line) for line in sys.stdin))",
    "lines of bytes": "import sys\nprint(sum(map(int, sys.stdin.buffer.readlines())))",
    "the file itself": "print(sum(map(int, open(0).read().split())))",
    "the descriptor": "import os\nprint(sum(map(int, os.read(0, 99).split())))",
    "written as bytes": "import sys\nn = sum(map(int, sys.stdin.read().split()))\n"
    "sys.stdout.buffer.write(b'%d' % n)",
    "under __main__": "def main():\n    print(sum(int(input()) for _ in range(3)))\n\n\n"
    "if __name__ == '__main__':\n    main()",
    "deep recursion": "import sys\nsys.setrecursionlimit(10**5)\n"
    "def total(n):\n    return n and int(input()) + total(n - 1)\nprint(total(3))",
}


@pytest.mark.parametrize("name", READERS)
def test_ways_to_read_and_to_write(pool, name):
    """lighteval 1255, NeMo Gym 2508 and 2824."""
    row = stdin_row("1\n2\n3\n", "6\n")
    assert pool.score([("code", code(READERS[name]), row)]) == [1.0]
    assert pool.score([("code", code(READERS[name]), stdin_row("1\n2\n3\n", "7\n"))]) == [0.0]


def test_from_any_thread():
    """trl 5281: a verifier that sets alarms works in the main thread alone."""
    rewards = []

    def score():
        with verify.Verifier(workers=1, timeout=60) as verifier:
            rewards.extend(boxes(verifier, [(r"\frac{1}{3}", r"\frac{2}{6}"), ("x", "x+1")]))
            rewards.extend(verifier.score([("code", code("print(7)"), stdin_row("", "7"))]))

    thread = threading.Thread(target=score)
    thread.start()
    thread.join()
    assert rewards == [1.0, 0.0, 1.0]


def test_what_hangs_holds_up_nothing_else():
    """AReaL 1426: items that hang took a worker each for good."""
    quick = stdin_row("", "7")
    hanging = quick | {"time_limit": 1}
    items = [("code", code("while True:\n    pass"), hanging)] * 3
    items += [("code", code("print(7)"), quick)] * 2
    with verify.Verifier(workers=1, timeout=60) as verifier:
        assert verifier.score(items) == [0.0, 0.0, 0.0, 1.0, 1.0]
        assert verifier.reasons[:3] == ["timeout"] * 3
