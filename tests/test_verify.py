"""
verify.py: labelled answers, the data sets' own golds and solutions, the pool under poison, the
command. Answers as models write them stand in test_answers.py, the forms of tests in
test_code_tests.py, fences in test_fences.py.
"""

import ast
import gzip
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from conftest import GRACE  # noqa: E402

import verify  # noqa: E402
from harness import programs, sandbox  # noqa: E402

DATA = Path(os.environ.get("LAD_DATA", ROOT.parent / "shared" / "data"))


def load(name):
    """The rows of one data file; skips where it is absent."""
    if not (DATA / name).exists():
        pytest.skip(f"{DATA / name} is absent")
    if name.endswith(".parquet"):
        return pytest.importorskip("pandas").read_parquet(DATA / name).to_dict("records")
    with gzip.open(DATA / name, "rt") if name.endswith(".gz") else open(DATA / name) as f:
        return [json.loads(line) for line in f] if "jsonl" in name else json.load(f)


@pytest.fixture(scope="module")
def pool():
    with verify.Verifier(workers=2, timeout=20) as v:
        yield v


def boxed(answer):
    return f"Adding up, the answer is $\\boxed{{{answer}}}$. Done."


def code(program):
    return f"Here it is:\n```python\n{program}\n```\nIt works."


# ==== 1. Math: labelled answers =================================================================

RIGHT = [  # (truth, answer)
    (r"\log_2 8", "3"),
    ("3", r"\log_2 8"),
    (r"2\sqrt{3}", r"\sqrt{12}"),
    (r"\tan^{-1}(1)", r"\frac{\pi}{4}"),
    ("a(b+c)", "ab+ac"),
    (r"\cot x", r"\frac{1}{\tan x}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    ("142.0", "142"),
    (142.0, "142"),
    (7, "7"),
    ("007", "7"),
    ("0.5", r"\frac12"),
    ("0.5", ".5"),
    (r"\frac{1}{2}", "1/2"),
    ("-0.875", r"-\frac{7}{8}"),
    (r"1\frac{4}{5}", "9/5"),
    (r"137 \frac{1}{2}", "137.5"),
    ("58,500", "58500"),
    (r"10,\!080", "10080"),
    ("11111111100", r"11,\! 111,\! 111,\! 100"),
    ("1000", "1 000"),
    (r"\$32,\!348", "32348"),
    (r"\$18.90", "18.9"),
    ("4.5e33", r"4.5 \times 10^{33}"),
    (["1 \\times 10^{-3}\n", "10^{-3}\n"], "0.001"),
    ("1000.99", "1000,99"),
    (r"\frac{1}{3}", "0.333333"),
    (r"\sqrt{2}", "1.41421356"),
    ("1.8", "9/5"),
    ("42", "42."),
    ("-5", "−5"),
    (r"336^\circ", "336"),
    (r"336^\\circ".replace("\\\\", "\\"), "336^{\\circ}"),
    ("90", r"90^\circ"),
    (r"30^\circ", "30 degrees"),
    (r"\frac{270}7\text{ degrees}", r"\frac{270}{7}"),
    (r"5.4 \text{ cents}", "5.4"),
    (r"864 \mbox{ inches}^2", "864"),
    (r"864 \mbox{ inches}^2", r"864\text{ square inches}"),
    ("5", r"5 \text{ cm}"),
    ("125 miles", r"125\textnormal{ miles}"),
    (r"28\%", "28"),
    ("28%", "28%"),
    (r"28\%", "28 percent"),
    (r"28\%", "0.28"),
    ("0.28", r"28\%"),
    (r"\text{Evelyn}", "Evelyn"),
    (r"\text{Evelyn}", r"\textbf{evelyn}"),
    (r"\text{(C)}", "C"),
    ("C", r"\text{(C)}"),
    ("E", r"\text{E}"),
    (r"\text{A,B}", "B, A"),
    ("204_5", "204_{5}"),
    ("12:00", "12:00"),
    (r"8\!:\!34 \text{ p.m.}", "8:34 p.m."),
    ("x=5", "5"),
    ("5", "x = 5"),
    ("1/3", r"x=\frac{2}{6}=\frac13"),
    ("11", r"x\approx 11"),
    ("1/3", r"k = 1/3 \approx 0.33"),
    ("y=-2x", "-2x"),
    ("y=-2x", "2x+y=0"),
    ("2x+4y-3=0", r"y=-\frac12x+\frac34"),
    ("x^2/4+y^2/3=1", "x^2/16+y^2/12=1/4"),
    ("5x - 7y + 11z + 4 = 0", "-5x+7y-11z-4=0"),
    (r"\frac{x+2}{7}", r"\frac{x}{7}+\frac{2}{7}"),
    ("n^2-n+1", "n(n-1)+1"),
    (r"\tan^2(y)+1", r"\sec^2(y)"),
    (r"2\sin b\cos a", r"\sin(a+b)-\sin(a-b)"),
    ("xy", "yx"),
    (r"\sqrt{1/n}", r"\frac{1}{\sqrt{n}}"),
    (r"\frac{1}{\sqrt n}", r"\sqrt{1/n}"),
    (r"\frac{\sqrt3}{3}", r"\frac{1}{\sqrt{3}}"),
    (r"\frac{5\sqrt{42}}{27}", r"\frac{10\sqrt{10.5}}{27}"),
    (r"1-1/\mathrm{e}", "1-e^{-1}"),
    (r"2^{1009}", r"2\cdot 2^{1008}"),
    (r"\binom{2n}{n}", r"\frac{(2n)!}{n!n!}"),
    ("1+2i", "2i+1"),
    ("-1", "i^2"),
    ("1024", "2^{10}"),
    ("6", "2(3)"),
    (r"3\sqrt{13}", r"3 \sqrt 13".replace(" 13", "{13}")),
    ("3", "√9"),
    ("12π", r"12\pi"),
    ("(1,2)", "(1, 2)"),
    ("(1,3)", "1,3"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)"),
    ("(1,\\frac{9}{2})", "(1,4.5)"),
    ("1,-2", "-2, 1"),
    (r"\{1,2\}", r"\{2,1\}"),
    (r"\{1,2\}", "1,2"),
    (r"1 \pm \sqrt{19}", r"1-\sqrt{19}, 1+\sqrt{19}"),
    (r"\pm 2021", "{-2021, 2021}"),
    (r"\{1\pm\sqrt{5},-2\}", r"-2, 1\pm\sqrt5"),
    ("19, 46, and 82", r"19, 46, \text{ and } 82"),
    (r"12\text{ and }13", "12 $ and $13"),
    ("$(1,1), (3,2)$", "(3,2),(1,1)"),
    ("$90^{\\circ}$,$60^{\\circ}$", r"60^\circ, 90^\circ"),
    (r"[-1, -\frac{1}{2}) \cup (-\frac{1}{2}, 0)", r"[-1,-\tfrac12)\cup(-\tfrac12,0)"),
    (r"(-\infty,2)\cup(3,\infty)", r"(3,\infty)\cup(-\infty,2)"),
    (r"x \in [-2,7]", "[-2,7]"),
    (r"x \in [-2,7]", r"-2 \le x \le 7"),
    (r"(2,\infty)", "x>2"),
    ("x >= 5", r"5 \leq x"),
    ("x<1", "-x > -1"),
    (r"\emptyset", r"\varnothing"),
    (
        r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}",
        r"\begin{bmatrix}\frac15\\-\frac{18}{5}\end{bmatrix}",
    ),
    (
        r"\begin{pmatrix}1 & 2 \\3 & 4\end{pmatrix}",
        r"\left[\begin{array}{cc}1 & 2 \\3 & 4\end{array}\right]",
    ),
    (
        r"\begin{pmatrix}6 & 8 \\ 10 & 12\end{pmatrix}",
        r"\begin{pmatrix}1&2\\3&4\end{pmatrix}+\begin{pmatrix}5&6\\7&8\end{pmatrix}",
    ),
    ("p - q", "-q+p"),
    ("8n^2 + 4n + 1", "(2n)^2+(2n+1)^2"),
    ("(1,2)", "1<x<2"),
    ("(-2,2)", "|x|<2"),
    ("(-2,7)", r"x > -2 \text{ and } x < 7"),
    ("6", r"\sum_{i=1}^3 i = 6"),
    ("13", r"\sum_{i=1}^n a_i = 13"),
    ("13", r"\int_0^1 f(x)\,dx = 13"),
    ("(5,6)", "(y,x)=(6,5)"),
    ("13", r"\mathbf{1}3"),
    ("120", "5!=120"),
    ('18"', "18 inches"),
    ("18", "18円"),
    ("AB", r"\overline{AB}"),
    ("13", "1\u00ad3"),
    (["41.8^\\circ\n", "41.8^{\\circ}\n"], "41.8"),
    (["0.01\n", "0.02\n"], "0.02"),
    (r"$\frac{9}{32}$", "9/32"),
]
# The first rows are math-verify's false positives on its default settings
WRONG = [
    ("5", "7=5"),
    ("5", "1=2=5"),
    ("5", r"500\%"),
    ("5", r"5 \text{ or maybe 6}"),
    (r"\frac{1}{2004!}", r"\frac{1}{2006!}"),
    ("1/2004!", "1/2006!"),
    ("10^{-8}", "0.0"),
    (r"1-1/\mathrm{e}", r"1+1/\mathrm{e}"),
    ("4", r"4\sqrt(2)"),
    (r"1,2,\ldots,n", r"1,3,5,\ldots,2n-1"),
    ("5050", r"\sum_{i=1}^{100} i"),
    (r"\{1,2\}", "(2,1)"),
    ("a", "A"),
    ("5", "5, 6"),
    ("5", "5 or 6"),
    ("5", "6"),
    ("5", "-5"),
    ("5", "55"),
    ("12", "1 2"),
    ("5", "2(3)"),
    ("5", "2 3"),
    ("5", "(2)(3)"),
    ("0", "1/2004!"),
    ("1", "0.99999999"),
    ("1/3", "0.333"),
    (r"\pi", "3.14"),
    (r"\sqrt2", "1.414"),
    ("28", "28/100"),
    ("0.28", "28"),
    ("1", r"100\%"),
    ("32349", "32, 349"),
    ("2", "2^{10}"),
    ("1", "1/3."),
    ("4.5e33", r"4.5 \times 10^{32}"),
    (r"5 \text{ cm}", "5 m"),
    ("5", r"5 \text{ is wrong, 6}"),
    ("204_5", "204_6"),
    ("204_5", "204"),
    ("12:00", "1:00"),
    (r"\text{Evelyn}", "Evelina"),
    (r"\text{C}", "D"),
    (r"\text{C}", "c"),
    ("3R^2", "3r^2"),
    ("x'+3", "x+3"),
    ("|x|", "x"),
    ("x", r"\sqrt{x^2}"),
    ("x=5", "y=5"),
    ("y=2x", "y=3x"),
    ("7=11a+c", "11a+c"),
    ("a+3z=0", "0"),
    ("2x+z=1", "1"),
    ("x>5", "x<5"),
    (r"x\ge5", "x>5"),
    ("x < 1", "x > -1"),
    ("(0,9)", "[0,9)"),
    ("[0,1)", "[0,1]"),
    ("(1,2)", "(2,1)"),
    ("(1,2)", r"1\le x<2"),
    ("(1,2)", "1<x"),
    ("[-3,3]", r"x^2\le9"),
    ("13", r"\gcd(12,18) = 13"),
    ("13", r"\text{lcm}(4,6) = 13"),
    ("13", r"\sum_{i=1}^3 i = 13"),
    ("13", r"13 = \int_0^1 x\,dx"),
    ("13", r"\lim_{x\to0} \frac{\sin x}{x} = 13"),
    ("13", r"\max(1,2) = 13"),
    ("13", r"10 \bmod 3 = 13"),
    ("13", r"C(4,2) = 13"),
    ("13", r"\log_2 8 \approx 13"),
    ("(5,6)", "(y,x)=(5,6)"),
    ("(5,6)", "(y=5,x=6)"),
    ("12", "1  2"),
    ("13", r"\mathbf{1} 3"),
    ("18", r"18 \text{ more}"),
    ('18"', "18'"),
    ("z", r"\overline{z}"),
    ("(3,1)", "{1,3}"),
    ("1,-2", "(1,-2)"),
    ("1, 2, 3", "1, 2, 3, ..."),
    (r"\pm 2021", "2021"),
    ("D = (0, 1)", "D = (0, 1.5)"),
    ("19, 46, and 82", "21, 36, and 82"),
    ("1,1,2", "1,2,2"),
    ("p-q", "q-p"),
    ("x+2n+1", "x+1"),
    ("(a+5)(b+2)", "(+5)(b+2)"),
    ("2", r"\frac{1+\sqrt{5}}{2}"),
    (r"\sqrt{19}", "19"),
    ("2^{1009}", "2^{1010}"),
    (r"\frac{100!}{2^{50}}", r"\frac{100!}{2^{51}}"),
    (r"\begin{pmatrix}1 & 2 \\ 3 & 4\end{pmatrix}", r"\begin{pmatrix}1 & 2 \\ 3 & 5\end{pmatrix}"),
    (r"\begin{pmatrix}1 \\ 2\end{pmatrix}", r"\begin{pmatrix}1 & 2\end{pmatrix}"),
    ("10", r"\boxed"),
    ("5", r"\text{five or 5}"),
    (r"F_n = \sum_{k=0}^{n-1} F_k F_{n-k-1}", r"F_n = \sum_{k=0}^{n-2} F_k F_{n-k-2}"),
    ("55", r"1+2+\cdots+10"),
    ("3", r"x \in \{3, 4\}"),
    ("5", "5=5=6"),
    (r"\ln 2", r"\ln 3"),
    ("0.5", "0.5000001"),
]


def test_labelled_answers(pool):
    cases = [(t, a, 1.0) for t, a in RIGHT] + [(t, a, 0.0) for t, a in WRONG]
    rewards = pool.score([("math", boxed(a), t) for t, a, _ in cases])
    assert [(t, a, r) for (t, a, want), r in zip(cases, rewards, strict=True) if r != want] == []


@pytest.mark.parametrize(
    "kind, response, truth, reward, reason",
    [
        (
            "math",
            r"<think>\boxed{5}</think> so \boxed{6}",
            "5",
            0.0,
            "",
        ),  # a box inside the thinking does not count
        ("math", r"<think>\boxed{6}</think> so \boxed{5}", "5", 1.0, ""),
        ("math", r"<think> so \boxed{5}", "5", 0.0, "no answer found"),  # thinking that never ends
        ("math", r"a</think>b</think> \boxed{5} <think> more", "5", 0.0, "no answer found"),
        ("math", r"\boxed{4} no, \boxed{5}", "5", 1.0, ""),
        ("math", r"\boxed{5} or \boxed{6}", "5", 0.0, ""),
        ("math", r"\boxed{5}, \boxed{6}", "5,6", 0.0, ""),
        ("math", r"\boxed{5", "5", 0.0, "no answer found"),
        ("math", r"\boxed{5} and \boxed{5", "5", 0.0, "no answer found"),
        ("math", "5", "5", 0.0, "no answer found"),
        (
            "math",
            r"\boxed{\frac{1}{\sqrt{\left\{4\right\}}}}".replace(r"\left\{4\right\}", "4"),
            "1/2",
            1.0,
            "",
        ),
        ("math", r"\boxed{\{1,2\}}", r"\{1,2\}", 1.0, ""),
        ("math", r"\fbox{5}", "5", 1.0, ""),
        ("math", r"\boxed{x=\boxed{5}}", "5", 1.0, ""),
        ("math", r"\boxed{}", "5", 0.0, "no answer found"),
        ("math", "", "5", 0.0, "no answer found"),
        ("math", r"\boxed{" + "1+" * 300 + "1}", "301", 0.0, "too long"),
        ("math", r"\boxed{9^{9^{9^9}}}", "5", 0.0, "too large"),
        ("math", r"\boxed{10^{99999}}", "5", 0.0, "too large"),
        ("math", r"\boxed{99999!}", "5", 0.0, "too large"),
        ("math", r"\boxed{(9!)!}", "5", 0.0, "too large"),
        ("math", r"\boxed{\binom{99999}{5000}}", "5", 0.0, "too large"),
        ("math", r"\boxed{9^9^9^9}", "5", 0.0, "too large"),
        ("math", r"\boxed{5}", "", 0.0, "truth unparsable"),
        ("math", r"\boxed{5}", None, 0.0, "truth unparsable"),
        ("math", r"\boxed{5}", [], 0.0, "truth unparsable"),
        ("math", r"\boxed{x+1}", r"\frac{1}{", 0.0, "truth unparsable"),
        ("math", r"\boxed{0.003}", ["0.003^{\\prime \\prime}\n"], 1.0, ""),
        ("math", r"\boxed{5}", ["\\frac{1}{", "5"], 1.0, ""),
        ("math", r"\boxed{6}", ["\\frac{1}{", "5"], 0.0, ""),
        ("math", r"\boxed{t(0,4]}", "$t(0,4]$", 1.0, ""),
        ("math:answer", "I say\nAnswer: 5", "5", 1.0, ""),
        ("math:answer", r"\boxed{5}", "5", 0.0, "no answer found"),
        ("math:answer", "Answer: 4\nAnswer: $5$.", "5", 1.0, ""),
        ("math:answer", "**Answer:** 5", "5", 1.0, ""),
        ("math:number", "so 3 and then 1,234", "1234", 1.0, ""),
        ("math:number", r"\boxed{5} but 6", "5", 0.0, ""),
        ("math:number", "none", "5", 0.0, "no answer found"),
        ("math:number", "it is -1/2.", "-0.5", 1.0, ""),
    ],
)
def test_rule_and_reason(pool, kind, response, truth, reward, reason):
    assert pool.score([(kind, response, truth)]) == [reward] and pool.reasons == [reason]


def test_unknown_kind():
    with pytest.raises(ValueError, match="math:answer"):
        verify.Verifier(1).score([("maths", "5", "5")])


def test_fast_path_against_rationals():
    """Plain numbers, written in every way we read, against Fraction itself; none of them reaches a
    worker."""
    rng = random.Random(1)
    for _ in range(3000):
        a, b = rng.randint(-999, 9999), rng.choice((1, 2, 4, 5, 8, 20, 125, 3, 7, 60))
        value = Fraction(a, b)
        ways = [
            f"{a}/{b}",
            f"\\frac{{{a}}}{{{b}}}",
            f"-\\dfrac{{{-a}}}{{{b}}}" if a < 0 else f"\\tfrac{{{a}}}{{{b}}}",
        ]
        if 10**6 % b == 0:
            ways += [
                f"{a / b:.6f}".rstrip("0").rstrip("."),
                f"{a / b:.6f}",
                f"{a / b / 100:.8f}\\times 10^{{2}}",
                f"{a / b:.6f}e0",
            ]
        if b == 1:
            ways += [f"{a:,}", f"{a}.0", f"{a}", f" {a} ", f"{a}\\%".replace("\\%", "")]
        if value > 1 and value.denominator > 1:
            whole, rest = divmod(value.numerator, value.denominator)
            ways.append(f"{whole}\\frac{{{rest}}}{{{value.denominator}}}")
        gold, pred = rng.choice(ways), rng.choice(ways)
        assert verify.math_judge(boxed(pred), gold, quick=True) == (1.0, ""), (gold, pred)
        other = value + rng.choice((1, -1, Fraction(1, 8), 10))
        assert verify.math_judge(
            boxed(f"{other.numerator}/{other.denominator}"), gold, quick=True
        ) == (0.0, ""), (gold, other)


@pytest.mark.parametrize(
    "text",
    [
        "9" * 60,
        "{" * 60,
        "\\frac" * 12,
        "(" * 60,
        "1," * 30,
        "1 " * 30,
        "a" * 60,
        "\\text{" * 10,
        "=" * 60,
        "\\pm" * 20,
        "^{" * 30,
        "-" * 60,
        "%" * 60,
        "\\boxed{" * 8,
    ],
)
def test_what_runs_in_the_caller_is_quick(text):
    for response in (
        f"\\boxed{{{text}}}",
        "\\boxed{" * 20000 + text,
        text * 2000,
        "<think>" * 20000 + text,
        ("answer " * 20 + " " * 2000) * 20 + text,
    ):
        for kind in ("math", "math:answer", "math:number", "countdown"):
            start = (
                time.process_time()
            )  # a thousand times less than what a pattern that backtracks would take
            verify.judge(
                kind,
                response,
                {"numbers": [1], "target": 1} if kind == "countdown" else "5",
                quick=True,
            )
            assert time.process_time() - start < 2


# ==== 2. Math: the golds of the datasets ========================================================

GOLDS = [
    "math500.json",
    "aime24.json",
    "amc.json",
    "minerva.json",
    "olympiad_bench.json",
    "math_train.json",
]
MALFORMED = {
    "olympiad_bench.json": [96]
}  # $t(0,4]$; the other one, $221,$8$, reads as the list 221, 8
EMPTY = {"math_train.json": [886, 1009, 5328, 5330]}  # rows with no answer at all


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=[pytest.mark.slow] * (name in ("math_train.json", "olympiad_bench.json"))
        )
        for name in GOLDS
    ],
)
def test_golds_verify_against_themselves(pool, name):
    golds = [row["answer"] for row in load(name)]
    said = [gold[0] if isinstance(gold, list) else gold for gold in golds]
    rewards = pool.score([("math", boxed(s), gold) for s, gold in zip(said, golds, strict=True)])
    assert [i for i, r in enumerate(rewards) if not r] == EMPTY.get(name, [])
    assert all(pool.reasons[i] == "truth unparsable" for i in EMPTY.get(name, []))
    rewards = pool.score([("math", boxed("77777"), gold) for gold in golds])
    assert [golds[i] for i, r in enumerate(rewards) if r] == []
    unread = [
        i for i, reason in enumerate(pool.reasons) if reason == "truth unparsable"
    ]  # only as it is written can such a truth be met
    assert unread == EMPTY.get(name, []) + MALFORMED.get(name, []), [golds[i] for i in unread]


@pytest.mark.parametrize(
    "name", ["aime25.parquet", pytest.param("dapo_math_17k.parquet", marks=pytest.mark.slow)]
)
def test_golds_of_the_parquets(pool, name):
    golds = [row["reward_model"]["ground_truth"] for row in load(name)]
    assert sum(pool.score([("math", boxed(gold), gold) for gold in golds])) == len(golds)
    assert sum(
        pool.score([("math:answer", f"So.\nAnswer: {gold}", gold) for gold in golds])
    ) == len(golds)
    assert (
        sum(
            pool.score(
                [("math", boxed(str(gold).removesuffix("^\\circ") + "1"), gold) for gold in golds]
            )
        )
        == 0
    )


# ==== 3. Countdown ==============================================================================


@pytest.mark.parametrize(
    "response, reward",
    [
        ("(3+4)*7", 1),
        ("7*(4+3)", 1),
        ("7*4+7*3", 0),
        ("(3+4)*7=49", 1),
        ("(3+4)*7 = 50", 0),
        ("49", 0),
        ("3*4+7", 0),
        ("(3+4)*7*1", 0),
        ("(3+4)**7", 0),
        ("7//3*4", 0),
        ("(3+4)*7 # ok", 0),
        ("(03+4)*7", 0),
        ("__import__('os')", 0),
        ("(3+4)*7;1", 0),
        ("(3+4)*07", 0),
        ("3_0+19", 0),
        ("(3+4)*7.0", 0),
        ("((3+4)*7", 0),
        ("", 0),
        ("(" * 150 + "3", 0),
        ("(3 + 4) × 7", 1),
        (r"(3+4)\times 7", 1),
        ("1" * 250, 0),
        ("7/(3-3)", 0),
        ("work 1+1 <answer>(3+4)*7</answer>", 1),
        (r"so \boxed{(3+4)*7}", 1),
        ("<answer>1</answer> <answer>(3+4)*7</answer>", 1),
        ("<think>(3+4)*7", 0),
        ("<think>no</think>(3+4)*7", 1),
        ("-(3+4)*-7", 1),
        ("٣+4*7", 0),
        ("(3+4)*7\n", 1),
    ],
)
def test_countdown(response, reward):
    assert verify.countdown_reward(response, {"numbers": [3, 4, 7], "target": 49}) == reward


def test_countdown_truth_unparsable():
    with verify.Verifier(1) as v:
        assert v.score([("countdown", "1+2", {"numbers": [1, 2]})]) == [0.0] and v.reasons == [
            "truth unparsable"
        ]


def test_countdown_is_exact():
    assert verify.countdown_reward("6/(1-3/4)", {"numbers": [1, 3, 4, 6], "target": 24}) == 1.0
    assert verify.countdown_reward("(1/3+1/3)*3", {"numbers": [1, 1, 3, 3, 3], "target": 2}) == 1.0
    assert (
        verify.countdown_reward("(1/49)*49", {"numbers": [1, 49], "target": 1}) == 0.0
    )  # 49 twice


def test_countdown_puzzles_of_the_data():
    """Every train puzzle that a small search solves is accepted as found, and refused with one
    number changed."""
    import itertools

    solved = 0
    for row in load("countdown_train.parquet")[:300]:
        numbers, target = [int(n) for n in row["nums"]], int(row["target"])
        for order in itertools.permutations(numbers):
            for ops in itertools.product("+-*/", repeat=len(numbers) - 1):
                text = str(order[0])
                for op, n in zip(ops, order[1:], strict=True):
                    text = f"({text}{op}{n})"
                if verify.countdown_reward(text, {"numbers": numbers, "target": target}):
                    solved += 1
                    assert eval(re.sub(r"(\d+)", r"Fraction(\1)", text)) == target
                    assert not verify.countdown_reward(
                        text, {"numbers": numbers[:-1] + [numbers[-1] + 1], "target": target}
                    )
                    break
            else:
                continue
            break
    assert solved > 150


def test_countdown_needs_no_worker():
    rng, items = random.Random(0), []
    for _ in range(512):
        a, b, c = (rng.randint(1, 99) for _ in range(3))
        items.append(("countdown", f"({a}+{b})*{c}", {"numbers": [a, b, c], "target": (a + b) * c}))
    v = verify.Verifier(2)
    assert sum(v.score(items)) == 512 and not v.live  # in the caller: no worker was started


# ==== 4. Code ===================================================================================

SUM = {"inputs": ["3 4\n", "1 1\n"], "outputs": ["7\n", "2\n"]}


@pytest.mark.parametrize(
    "response, reward, reason",
    [
        (code("a, b = map(int, input().split())\nprint(a + b)"), 1.0, ""),
        (code("print(7)"), 0.0, ""),
        (code("print(7")[:-40], 0.0, "no answer found"),
        ("print(7)", 0.0, "no answer found"),
        (
            code("print(8)") + code("import sys\nprint(sum(map(int, sys.stdin.read().split())))"),
            1.0,
            "",
        ),
        (code("print(sum(map(int, input().split())))") + code("print(0)"), 0.0, ""),
        (
            "<think>" + code("print(sum(map(int, input().split())))") + "</think> no",
            0.0,
            "no answer found",
        ),
        ("```\nprint(sum(map(int, input().split())))\n```", 1.0, ""),
        ("```cpp\nint main(){}\n```", 0.0, "no answer found"),
        (code("import numpy as np\nprint(int(np.sum(list(map(int, input().split())))))"), 1.0, ""),
        (code("if __name__ == '__main__':\n    print(sum(map(int, input().split())))"), 1.0, ""),
        (
            code(
                "import sys, threading\n"
                "sys.setrecursionlimit(10**6)\n"
                "threading.stack_size(2**26)\n"
                "def f(n): return 0 if n == 0 else 1 + f(n - 1)\n"
                "def main(): f(50000); print(sum(map(int, input().split())))\n"
                "t = threading.Thread(target=main); t.start(); t.join()"
            ),
            1.0,
            "",
        ),
        (code("print(sum(map(int, input().split())))\nexit()"), 1.0, ""),
        (code("print(sum(map(int, input().split())))\nquit(0)"), 1.0, ""),
        (code("raise ValueError"), 0.0, "crashed"),
        (code("def f(:"), 0.0, "crashed"),
        (code("x = 1\n" * 50000), 0.0, "too long"),
        (code("open('/tmp/x', 'w').write('1')\nprint(sum(map(int, input().split())))"), 1.0, ""),
        (
            code(
                "import os\n"
                "assert not os.path.exists('/tmp/x')\n"
                "print(sum(map(int, input().split())))"
            ),
            1.0,
            "",
        ),
    ],
)
def test_program(pool, response, reward, reason):
    pytest.importorskip("numpy") if "numpy" in response else None
    assert pool.score([("code", response, SUM)]) == [reward] and pool.reasons == [reason]


@pytest.mark.parametrize(
    "got, want, same",
    [
        ("1 2\n3", "1 2\n3\n", 1),
        ("1  2 \n3\n\n", "1 2\n3", 1),
        ("1\n2", "1 2", 0),
        ("2 1", "1 2", 0),
        ("1 1 2", "1 2 2", 0),
        ("1.0", "1", 1),
        ("1", "1.0", 1),
        ("0.3333333", "0.333333333333", 1),
        ("0.334", "0.333333333", 0),
        ("3.1", "3", 0),
        ("1000000000000000001", "1000000000000000000", 0),
        ("1e3", "1000", 1),
        ("YES", "Yes", 0),
        ("nan", "nan", 1),
        ("inf", "1e999", 0),
        ("", "", 1),
        ("", "0", 0),
        ("1/2", "0.5", 0),
        ("1_0", "10", 0),
        ("٣", "3", 0),
        ("a b", "a  b", 1),
    ],
)
def test_output_comparison(got, want, same):
    assert programs.same_output(got, want) == bool(same)


FORMATS = [
    [{"input": "3 4", "output": "7"}],
    json.dumps([{"input": "3 4\n", "output": "7", "testtype": "stdin"}]),
    {"inputs": [["3 4"]], "outputs": [["7"]]},
    {"inputs": ["3 4"], "outputs": ["7"], "time_limit": 2, "memory_mb": 256},
]
CALLS = [
    {"fn_name": "add", "inputs": [[3, 4]], "outputs": [7]},
    {"fn_name": "add", "inputs": ["3\n4", "1\n1"], "outputs": ["7", "2"]},
    {
        "functional": (
            "def check(candidate):\n    assert candidate(3, 4) == 7\n\ncheck(Solution().add)"
        )
    },
    [{"input": "3\n4", "output": "7", "testtype": "functional", "metadata": {"func_name": "add"}}],
    {
        "prompt": "",
        "entry_point": "add",
        "test": "def check(candidate):\n    assert candidate(3, 4) == 7\n",
    },
    {
        "functional": "def check(candidate):\n    assert candidate(3, 4) == 7\n",
        "entry_point": "Solution().add",
    },
    {"test": "assert candidate(3, 4) == 7\nassert candidate(b=1, a=2) == 3", "entry_point": "add"},
    {
        "prompt": "",
        "entry_point": "add",
        "canonical_solution": "def add(a, b): return a + b",
        "base_input": [[3, 4]],
        "plus_input": [[2**70, 1]],
        "atol": 0,
    },
]


def test_formats(pool):
    rewards = pool.score(
        [("code", code("print(sum(map(int, input().split())))"), t) for t in FORMATS]
        + [("code", code("print(6)"), t) for t in FORMATS]
    )
    assert rewards == [1.0] * len(FORMATS) + [0.0] * len(FORMATS)
    for program, want in (
        ("def add(a, b): return a + b", 1.0),
        ("class Solution:\n    def add(self, a, b): return a + b", 1.0),
        ("def add(a, b): return a - b", 0.0),
    ):
        tests = [
            t for t in CALLS if want == 0.0 or "class" not in program or "entry_point" not in t
        ]
        tests = [t for t in tests if "class" in program or "functional" not in t]
        assert pool.score([("code", code(program), t) for t in tests]) == [want] * len(tests)


@pytest.mark.parametrize(
    "tests",
    [
        "not json",
        {},
        [],
        {"inputs": [], "outputs": []},
        {"inputs": ["1"], "outputs": []},
        {"functional": "def check(:"},
        None,
        {"inputs": [1], "outputs": [2], "time_limit": "x"},
    ],
)
def test_tests_that_cannot_be_read(pool, tests):
    assert pool.score([("code", code("print(1)"), tests)]) == [0.0] and pool.reasons == [
        "truth unparsable"
    ]


def test_plain_data_passes_between_the_boxes(pool):
    values = [
        None,
        True,
        0,
        -1,
        2**200,
        1.5,
        float("inf"),
        "é\n",
        [],
        [1, [2]],
        (1, (2,)),
        {1, 2},
        {},
        {"a": {1: (2, 3)}},
        {(1, 2): [3]},
    ]
    test = "def check(candidate):\n" + "".join(
        f"    x = candidate({v!r}); assert x == {v!r} and type(x) is type({v!r})\n" for v in values
    ).replace("inf", "float('inf')")
    assert pool.score(
        [("code", code("def f(x): return x"), {"test": test, "entry_point": "f"})]
    ) == [1.0]


def test_leetcode_solutions(pool):
    rows = load("leetcode.json")
    rewards = pool.score([("code", code(row["solutions"]), row["tests"]) for row in rows])
    needs = [i for i, row in enumerate(rows) if "sortedcontainers" in row["solutions"]]
    try:
        import sortedcontainers  # noqa: F401
    except ImportError:
        assert (
            [i for i, r in enumerate(rewards) if not r] == needs == [126]
        )  # installed packages are what a program may import
    else:
        assert sum(rewards) == len(rows)


def test_humaneval_solutions(pool):
    rows = load("humaneval.jsonl.gz")
    assert (
        pool.score([("code", code(row["prompt"] + row["canonical_solution"]), row) for row in rows])
        == [1.0] * 164
    )


@pytest.mark.slow
def test_humaneval_plus_inputs():
    rows = load("humaneval_plus.jsonl.gz")
    with verify.Verifier(workers=2, timeout=300) as v:
        assert (
            v.score(
                [
                    (
                        "code",
                        code(row["prompt"] + row["canonical_solution"]),
                        row | {"time_limit": 250},
                    )
                    for row in rows
                ]
            )
            == [1.0] * 164
        )


class Flip(ast.NodeTransformer):
    """Flip the n-th operator: < and >=, == and !=, + and -, * and +, and and or."""

    PAIRS = {
        ast.Lt: ast.GtE,
        ast.GtE: ast.Lt,
        ast.Gt: ast.LtE,
        ast.LtE: ast.Gt,
        ast.Eq: ast.NotEq,
        ast.NotEq: ast.Eq,
        ast.Add: ast.Sub,
        ast.Sub: ast.Add,
        ast.Mult: ast.Add,
        ast.And: ast.Or,
        ast.Or: ast.And,
        ast.Mod: ast.Mult,
    }

    def __init__(self, n):
        self.n = n

    def visit(self, node):
        if type(node) in self.PAIRS:
            self.n -= 1
            return self.PAIRS[type(node)]() if self.n == -1 else node
        return self.generic_visit(node)


def mutants(source):
    for n in range(1000):
        tree = Flip(n)
        changed = ast.unparse(tree.visit(ast.parse(source)))
        if tree.n >= 0:
            return
        yield changed


def test_mutated_solutions_fail(pool):
    """One operator flipped. A few mutants are the same function, so not quite all can fail; nearly
    all do."""
    rows = load("humaneval.jsonl.gz")[:80]
    items = [
        (i, ("code", code(m), row | {"time_limit": 1}))
        for i, row in enumerate(rows)
        for m in list(mutants(row["prompt"] + row["canonical_solution"]))[:4]
    ]
    rewards = pool.score([item for _, item in items])
    survived = [(i, r) for (i, _), r in zip(items, rewards, strict=True) if r]
    assert len(items) > 150 and len(survived) < 0.12 * len(items), (
        f"{len(survived)} of {len(items)} survive"
    )


# ==== 5. The pool ===============================================================================

HANGS = [
    ("math", boxed(r"\int_0^{9999999} \sin(x^x) e^{x^3} dx"), r"\int_0^{1} \sin(x^x) dx"),
    ("math", boxed("((9^{9999})^{9999})^{9999}"), "5"),
    ("math", boxed("(" + "+".join(f"x_{{{i}}}" for i in range(30)) + ")^{99}-1"), "(a+b)^{99}"),
    ("code", code("while True: pass"), SUM),
    ("code", code("import os, signal, time\ntime.sleep(99)"), SUM),
    ("code", code("import os\nos.abort()"), SUM),
    ("code", code("x = [0] * 10**12"), SUM),
]


def test_nothing_is_late(pool):
    """Whatever an item contains it takes its timeout plus half a second at most, and a zero."""
    with verify.Verifier(workers=1, timeout=1) as v:
        v.score(
            [("math", boxed("x+1"), "1+x"), ("code", code("print(7)"), SUM)]
        )  # start the workers
        for item in HANGS:
            start = time.monotonic()
            assert v.score([item]) == [0.0] and v.reasons[0].partition(":")[0] in (
                "timeout",
                "crashed",
                "too large",
                "",
            ), item
            assert time.monotonic() - start < 1.5 + GRACE, item
            assert v.score([("math", boxed("x+1"), "1+x")]) == [
                1.0
            ]  # a lost worker is started again, outside anyone's clock


def test_poison_among_ten_thousand():
    rng, items, want = random.Random(0), [], []
    for i in range(10_000):
        a = rng.randint(-999, 999)
        if i % 100 == 50:
            (
                items.append(
                    HANGS[rng.randrange(len(HANGS))]
                    if i % 1000 == 50
                    else rng.choice(
                        [
                            ("math", boxed("9^{9^{9^9}}"), "5"),
                            ("code", code("import os\nos.abort()"), SUM),
                        ]
                    )
                ),
                want.append(0.0),
            )
        elif i % 250 == 0:
            (
                items.append(("math", boxed(f"x+{a}"), f"{a}+x" if a % 2 else f"{a}+y")),
                want.append(float(a % 2)),
            )
        elif i % 100 == 1:
            (
                items.append(
                    ("code", code(f"print({a})"), {"inputs": [""], "outputs": [str(a + i % 2 - 1)]})
                ),
                want.append(1.0),
            )
        else:
            right = rng.random() < 0.5
            items.append(("math", boxed(a), str(a if right else a + 1))), want.append(float(right))
    with verify.Verifier(workers=2, timeout=2) as v:
        got = v.score(items)
        reasons = v.reasons
    # On a busy machine an answer that is right may need more than two seconds: it is asked again
    late = [i for i, why in enumerate(reasons) if why.startswith("timeout") and want[i]]
    with verify.Verifier(workers=1, timeout=GRACE) as v:
        for i, reward in zip(late, v.score([items[i] for i in late]), strict=True):
            got[i] = reward
    assert got == want


def test_any_order_any_number_of_workers():
    items = [("math", boxed(a), t) for t, a in (RIGHT + WRONG)[::4]] + [
        ("code", code(f"print({i})"), {"inputs": [""], "outputs": [str(i % 3)]}) for i in range(9)
    ]
    with verify.Verifier(workers=1, timeout=20) as v:
        want = v.score(items), v.reasons
    order = list(range(len(items)))
    random.Random(3).shuffle(order)
    with verify.Verifier(workers=3, timeout=20) as v:
        got = v.submit([items[i] for i in order]).result()
        assert [got[order.index(i)] for i in range(len(items))] == list(zip(*want, strict=True))


def test_empty_batch_and_large_items(pool):
    assert pool.score([]) == [] and pool.reasons == []
    text = "x" * 3_000_000
    assert pool.score(
        [
            ("code", code("print(len(input()))"), {"inputs": [text], "outputs": ["3000000"]}),
            ("code", code("print('x' * 3000000)"), {"inputs": [""], "outputs": [text]}),
        ]
    ) == [1.0, 1.0]


def test_single_functions_cannot_hang_the_caller():
    assert (
        verify.math_reward(boxed("x+1"), "1+x") == 1.0
        and verify.code_reward(code("print(sum(map(int, input().split())))"), SUM) == 1.0
    )
    start = time.monotonic()
    assert verify.math_reward(boxed("((9^{9999})^{9999})^{9999}"), "5") == 0.0
    assert time.monotonic() - start < verify.ONE.timeout + GRACE


CALLER = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import verify
print("main module ran", flush=True)
v = verify.Verifier(2, 30)
one = {{"inputs": [""], "outputs": ["1"]}}
v.score([("math", "\\\\boxed{{x+1}}", "1+x"), ("code", "```python\\nprint(1)\\n```", one)])
print(*[w.pid for w in v.live], flush=True)
v.submit([
    ("math", "\\\\boxed{{((9^{{9999}})^{{9999}})^{{9999}}}}", "5"),
    ("code", "```python\\nwhile True: pass\\n```", one | {{"time_limit": 25}}),
])
time.sleep(60)
"""


def alive(pid):
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_the_caller(tmp_path, how):
    """The caller's main module is not imported again; when the caller dies its workers and boxes
    do: hung ones within their timeout plus 5 s (here: idle)."""
    script = tmp_path / "caller.py"
    script.write_text(CALLER.replace("v.submit(", "0 and v.submit("))
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # a shell's background jobs ignore it
    assert process.stdout.readline() == "main module ran\n"
    pids = process.stdout.readline().split()
    assert len(pids) == 2 and all(map(alive, pids))
    modules = [Path(f"/proc/{pid}/maps").read_text() for pid in pids]
    assert not any("libtorch" in m or "vllm" in m for m in modules)
    process.send_signal(how)
    process.wait(GRACE)
    deadline = time.monotonic() + GRACE
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, pids))


ORPHAN = f"""
import json, subprocess, sys, time
hung = (
    "import sys; sys.path.insert(0, {str(ROOT)!r}); import verify; "
    "verify.judge = lambda *item: sum(iter(int, 1)); "
    "verify.worker_main('math', '0.5', 'auto')"
)
pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
worker = subprocess.Popen([sys.executable, "-c", hung], start_new_session=True, **pipes)
worker.stdout.readline()
print(json.dumps(["math", "1", "1"]), file=worker.stdin, flush=True)
print(worker.pid, flush=True)
time.sleep(60)
"""


def test_a_hung_orphan_ends_by_its_timer():
    """The caller is killed while its worker hangs in C, where it neither reads its pipe nor runs a
    handler: the kernel ends it, at its timeout plus 5 s."""
    process = subprocess.Popen([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, text=True)
    pid, start = process.stdout.readline().strip(), time.monotonic()
    process.kill()
    process.wait(10)
    time.sleep(2)
    assert alive(pid)  # hung, and not ended by the closed pipe
    while alive(pid) and time.monotonic() - start < GRACE:
        time.sleep(0.05)
    assert not alive(pid)


def test_workers_that_cannot_start_say_so(monkeypatch, tmp_path):
    """Not a silent batch of zeros."""
    (tmp_path / "broken.py").write_text("import sys\nsys.exit(3)\n")
    monkeypatch.setattr(verify, "__file__", str(tmp_path / "broken.py"))
    with verify.Verifier(1, 5) as v, pytest.raises(RuntimeError, match="cannot start"):
        v.score([("math", boxed("x+1"), "1+x")])


def test_imports_without_torch_or_sympy():
    out = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path.insert(0, {str(ROOT)!r}); import verify; "
            "heavy = ('torch', 'vllm', 'sympy', 'math_verify'); "
            "print([name for name in heavy if name in sys.modules])",
        ],
        capture_output=True,
        text=True,
    )
    assert out.stdout == "[]\n"


# ==== 6. The command, the figures, the file =====================================================


def test_command(tmp_path):
    rows = [
        {"kind": "math", "response": boxed("x+1"), "truth": "1+x"},
        {"kind": "math", "response": "none", "truth": "5"},
        {"kind": "countdown", "response": "1+2", "truth": {"numbers": [1, 2], "target": 3}},
        {"kind": "code", "response": code("print(0)"), "truth": SUM},
    ]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = subprocess.run(
        [sys.executable, str(ROOT / "verify.py"), str(tmp_path / "items.jsonl")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert [line.split()[1:] for line in done.stdout.splitlines()] == [
        ["math", "1"],
        ["math", "0", "no", "answer", "found"],
        ["countdown", "1"],
        ["code", "0"],
    ]
    assert (
        "4 items, 2 right" in done.stderr
        and "1 no answer found" in done.stderr
        and "1 wrong" in done.stderr
    )


def run_command(tmp_path, *lines):
    """verify.py on a file of these lines."""
    path = tmp_path / "items.jsonl"
    path.write_text("".join(line + "\n" for line in lines))
    command = [sys.executable, str(ROOT / "verify.py"), str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_command_says_what_was_wanted(tmp_path):
    right = {"kind": "math", "response": boxed("5"), "truth": "5", "want": 1}
    wrong = right | {"response": boxed("6")}
    # A blank line is no item
    done = run_command(tmp_path, json.dumps(right), "", json.dumps(wrong))
    assert done.returncode == 1
    assert done.stdout.splitlines()[1].endswith("<- wanted 1")
    assert "1 not as wanted" in done.stderr
    done = run_command(tmp_path, json.dumps(right), json.dumps(wrong | {"want": 0}))
    assert done.returncode == 0
    assert "0 not as wanted" in done.stderr


ITEM = {"kind": "math", "response": "5", "truth": "5"}


@pytest.mark.parametrize(
    "line, said",
    [
        ("{", "line 1: not JSON"),
        ("[1]", "line 1: an item is"),
        (json.dumps({"kind": "math", "response": "5"}), "line 1: an item is"),
        (json.dumps(ITEM | {"kind": "maths"}), "line 1: kind 'maths'"),
        (json.dumps(ITEM | {"response": None}), "line 1: the response has to be a string"),
        ("", "has no items"),
    ],
)
def test_command_refuses_in_one_line(tmp_path, line, said):
    done = run_command(tmp_path, line)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("verify.py: error: ") and done.stderr.count("\n") == 1
    assert said in done.stderr


def test_command_without_a_file():
    for arguments in ([], ["/nowhere/items.jsonl"], ["a", "b"]):
        command = [sys.executable, str(ROOT / "verify.py"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr


def test_system_calls_are_what_they_are_called():
    header = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    if not header.exists():
        pytest.skip(f"{header} is absent")
    numbers = {
        int(n): name for name, n in re.findall(r"#define __NR_(\w+) (\d+)", header.read_text())
    }
    spans = [(span.split("-") * 2)[:2] for span in sandbox.SYSCALLS.split()]
    allowed = {numbers[n] for a, b in spans for n in range(int(a), int(b) + 1)}
    bad = (
        "fork|vfork|clone|exec|kill|tgkill|tkill|sigqueue|socket|connect|bind|accept|listen|send|recv|ptrace|process_vm|pidfd|mount|umount|pivot|chroot|unshare|setns|memfd|userfaultfd|io_uring|bpf|perf|key|module|kexec|reboot|"
        "swap|setuid|setgid|setres|setreu|setreg|setfs|setgroups|capset|chmod|chown|mknod|xattr|utime|prctl|personality|shm|msg|sem|mq_|fanotify|inotify|open_by_handle|link|iopl|ioperm|seccomp|landlock|setpriority|sched_set|setrlimit|prlimit|acct|quota|syslog"
    )
    assert {name for name in allowed if re.search(bad, name)} == {
        "link",
        "unlink",
        "symlink",
        "readlink",
        "unlinkat",
        "readlinkat",
    }  # within 32 MB of /tmp
    assert {
        "read",
        "write",
        "mmap",
        "openat",
        "futex",
        "exit_group",
        "newfstatat",
        "getrandom",
        "clock_nanosleep",
    } <= allowed
