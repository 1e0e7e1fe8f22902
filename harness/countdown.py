r"""
Countdown: make a target from numbers, each used once, with + - * / and brackets.

    <answer>(3 + 4) * 7</answer>    for {"numbers": [3, 4, 7], "target": 49}

Read are the signs that people and LaTeX have for these (×, ·, ÷, the Unicode minus, \times, \cdot,
\div, \frac{a}{b}, \left( \right), square brackets), dollar signs, a fence or quotation marks around
it, and the target on either side of an equals sign or an arrow. No other operator is covered, and
nothing is rounded. The work is bounded by the 200 characters that an expression may have.
"""

import ast
import operator
import re
from fractions import Fraction

from harness.math_answers import GROUP, after_thinking, last_box, usual

LONGEST = 200  # characters of an expression

OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}

# fmt: off
SIGNS = str.maketrans({
    "−": "-", "–": "-",
    "×": "*", "·": "*", "⋅": "*", "∙": "*", "•": "*", "∗": "*",
    "÷": "/", "∕": "/", "⁄": "/",
    "→": "=", "⇒": "=", "[": "(", "]": ")", "$": " ",
})
# fmt: on
MACROS = [
    (re.compile(r"\\(?:times|cdot|ast)(?![A-Za-z])"), "*"),
    (re.compile(r"\\div(?![A-Za-z])"), "/"),
    (re.compile(r"\\(?:to|rightarrow|Rightarrow|implies)(?![A-Za-z])"), "="),
    (re.compile(r"\\(?:left|right|[bB]igg?[lr]?|displaystyle)(?![A-Za-z])|\\[,;:! ()\[\]]"), " "),
    (re.compile(r"\\(?:text|boldsymbol|bm|math(?:bf|rm|tt)|text(?:bf|tt))\s*(?=\{)"), " "),
    (re.compile(r"\\(?=[{}])"), ""),
]
LETTER_X = re.compile(r"(?<=[\d)])\s*[xX]\s*(?=[\d(])")
FRAC = re.compile(rf"\\[dtc]?frac\s*({GROUP}|\d)\s*({GROUP}|\d)")


def answer_of(response):
    """What a response gives as its answer: the last <answer>..</answer>, else its box, else all
    that follows its thoughts. Of thoughts that never end only a whole <answer>..</answer> counts:
    a prompt may have opened them."""
    # Where it may stand
    response = usual(response)
    text = after_thinking(response)
    if not text and "</answer>" in response.rpartition("<answer>")[2]:
        text = response
    if "<answer>" in text:
        text = text.rpartition("<answer>")[2].partition("</answer>")[0]
    if "\\boxed" in text:
        text = last_box(text)
    return text


def expression(text):
    """An answer in the signs that `value_of` reads; its sides where it has an equals sign."""
    # Signs, a letter for each
    text = text[: 4 * LONGEST].translate(SIGNS)
    text = LETTER_X.sub("*", text)
    # Macros, and fractions
    if "\\" in text:
        for pattern, new in MACROS:
            text = pattern.sub(new, text)
        count = 1
        while count:  # from the inside out
            text, count = FRAC.subn(r"((\1)/(\2))", text)
    text = text.replace("{", "(").replace("}", ")").replace("==", "=")
    # What encloses it: a fence, bold, code, quotation marks; and the period of a sentence
    text = re.sub(r"^\s*```\w*\n(.*)\n\s*```\s*$", r"\1", text, flags=re.S)
    text = " ".join(text.split())
    text = re.sub(r"^(\*\*|`+|[\"'])(.*)\1$", r"\2", text)
    return re.sub(r"(?<=[\d)])\s*[.,;]$", "", text).strip()


def solve(text, used):
    """Exact value of an expression in text; the numbers in it are added to `used`. None where it is
    none."""
    if not re.fullmatch(r"[0-9+\-*/() ]+", text):
        return None
    try:
        return value_of(ast.parse(text.strip(), mode="eval").body, used)
    except (ValueError, SyntaxError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def value_of(node, used):
    """The same of a syntax tree; raises for anything but + - * / and integers."""
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        left = value_of(node.left, used)
        right = value_of(node.right, used)
        return OPERATORS[type(node.op)](left, right)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -value_of(node.operand, used)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd):
        return value_of(node.operand, used)
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used.append(node.value)
        return Fraction(node.value)
    raise ValueError("outside the grammar")


def whole(number):
    """An integer, as a number or as a string; ValueError for anything else."""
    if type(number) is int:
        return number
    value = Fraction(str(number).strip())
    if value.denominator != 1:
        raise ValueError(f"{number} is no integer")
    return int(value)


def read_puzzle(puzzle):
    """(sorted numbers, target) of {"numbers", "target"}; both may be strings."""
    numbers = puzzle["numbers"]
    if isinstance(numbers, str):
        numbers = re.findall(r"-?\d+", numbers)
    return sorted(map(whole, numbers)), whole(puzzle["target"])


def countdown_judge(response, puzzle):
    """(reward, reason) of the answer of a response. Each side of an equals sign has to be the
    target, and one of them uses each number once. Raises where the puzzle is none."""
    numbers, target = read_puzzle(puzzle)
    text = expression(answer_of(response))
    if not text:
        return 0.0, "no answer found"
    if len(text) > LONGEST:
        return 0.0, "too long"
    # Each side of =, one of which uses the numbers
    uses_all = False
    for side in text.split("="):
        used = []
        if solve(side, used) != target:
            return 0.0, ""
        uses_all |= sorted(used) == numbers
    return float(uses_all), ""
