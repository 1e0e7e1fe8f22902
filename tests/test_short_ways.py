r"""Plain numbers go short ways through the verifier. Here each is compared with the whole way, on
every answer of the other tests and on small texts of the characters that numbers are made of."""

import itertools
import json
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from test_answers import ANSWERS, KINDS, MORE, NO_ANSWERS, NO_NUMBERS, NUMBERS, boxed

import verify
from harness import math_answers


@pytest.fixture(scope="module")
def items():
    """(kind, response, truth) of all mathematical answers in the tests."""
    items = []
    for line in MORE.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["kind"].startswith("math"):
            items.append((row["kind"], row["response"], row["truth"]))
    for right, wrong in KINDS.values():
        items += [("math", boxed(answer), truth) for truth, answer in right + wrong]
    items += [("math:answer", line, "13") for line in ANSWERS + NO_ANSWERS]
    items += [("math:number", *pair) for pair in NUMBERS + NO_NUMBERS]
    return items


def pieces(*choices):
    """Every text of one piece from each row of choices."""
    return ["".join(words) for words in itertools.product(*choices)]


def texts(items):
    """Answers and truths of the tests, all short texts of certain characters, and numbers in
    pieces."""
    found = [str(truth) for _, _, truth in items]
    found += [verify.find_answer(response, kind[5:] or "boxed") for kind, response, _ in items]
    # Up to four characters
    for length in range(5):
        found += pieces(*["07.,/+-e%^' \\{}\n²٣"] * length)
    # Sign, thousands, decimals, and what may stand behind
    signs = ["", "-", "+", "--"]
    heads = ["", "0", "7", "007", "12", "123", "1234"]
    thousands = ["", ",234", ",23", ",2345", ",234,567", ",,234", "{,}234", " 234"]
    tails = ["", ".5", ".", ".50", "/7", "/-7", "/0", ".5.", "/7/7", "e5", "%", "'", "th", " and 1"]
    found += pieces(signs, heads, thousands, tails)
    # Fractions
    tops = ["1", "-1", "+1", "0", "", " 1", "1.5", "x"]
    found += pieces(signs, ["\\frac", "\\dfrac", "frac"], ["{"], tops, ["}{"], tops, ["}", "}2"])
    return sorted(set(found))


def test_tidy_and_plain(items):
    """No rule of tidy changes what it leaves as it is, and plain reads integers as ever."""
    tidy_numbers = integers = 0
    for text in texts(items):
        if math_answers.TIDY_NUMBER.fullmatch(text):
            tidy_numbers += 1
            assert math_answers.by_all_rules(text) == text
        if math_answers.INTEGER.fullmatch(text):
            integers += 1
            assert math_answers.plain(text) == math_answers.by_all_forms(text)
    assert tidy_numbers > 500  # so many are compared
    assert integers > 100


# Numbers in all forms that `plain` reads, and some that it does not
FORMS = r"""
5 -5 +5 05 0 -0 5. 5.0 .5 -.5 0.5 0.50 5% 50% 50\% 500% 0.5% 28% 0.28 0.28% 100% 1
1/2 -1/2 2/4 \frac{1}{2} \frac12 -\frac{1}{2} \frac{-1}{2} \frac{1}{-2} \dfrac{1}{2} 1\frac{1}{2}
1/3 0.333333 0.333 0.3333334 0.\overline{3} 0.(3) 0.\dot{3} 0.333\ldots 33.3333\% \frac{100}{3}\%
5000 5,000 5{,}000 5000.00 5e3 5\times10^3 5\cdot10^{3} 10^3 1000 5*10^3 10^{3} 1,2 1.2
\$5 \$5.00 5\text{dollar} 5/1 1/0 12 500000 5{,}00 5,00
""".split()
FORMS += ["5 %", "1 1/2", "5 000", "1 2", "5 dollars", "", "-"]


def test_by_numbers_is_same():
    """Whichever number is the truth, and whichever the answer."""
    compared = 0
    tidy = {form: math_answers.by_all_rules(form) for form in FORMS}
    for truth, answer in itertools.product(FORMS, FORMS):
        verdict = verify.by_numbers(answer, [tidy[truth]])
        if verdict is None:
            continue
        compared += 1
        same = math_answers.same(tidy[truth], tidy[answer])
        assert verdict == (float(same), ""), (truth, answer)
    assert compared > 2000


def test_quick_is_whole(items):
    """The caller's verdicts are those of a worker, also where a list of truths holds several."""
    quick = 0
    for kind, response, truth in items:
        for truths in (truth, ["7", truth], [truth, "1/3"]):
            verdict = verify.judge(kind, response, truths, quick=True)
            if verdict is not None:
                quick += 1
                assert verdict == verify.judge(kind, response, truths), (kind, response, truths)
    assert quick > 500


def spans(pattern, text):
    return [match.span() for match in pattern.finditer(text)]


def test_where_answers_stand(items):
    """The patterns that find a number, an answer line and grouped thousands pass over text that
    cannot hold them: they find what they would find without."""
    # Each as it would be written without care for time
    number = re.compile(math_answers.LAST_NUMBER.pattern.removeprefix(math_answers.BEGINS))
    line = math_answers.ANSWER_LINE.pattern.replace(r"answer(?<![A-Za-z\d]answer)", "answer")
    line = re.compile(line.replace("answer", r"(?<![A-Za-z\d])answer", 1))
    assert number.pattern != math_answers.LAST_NUMBER.pattern

    found = [response for _, response, _ in items]
    # Numbers side by side, and what stands before them
    before = ["", "x", "x_", "2^", "2^{-", "\\{", "{", ")**", "\n", "1 ", "٣"]
    starts = ["5", "-5", "−5", "–5", ".5", "½", "1½", "\\frac12", "\\frac{1}{2}", "٣", "5 x 10^3"]
    found += pieces(before, starts, ["", " 7", "/7", "e5", "^2", "²", " ½", "\\frac12", "x", "{"])
    # The word in its letters, and what stands before and behind it
    words = ["answer", "Answer", "ANSWER", "anſwer", "Answers", "Answer answer"]
    marks = [":", "：", "**:", " :\t", "</b>:", "<answer>:", "-", ": Answer:"]
    found += pieces(["", " ", "x", "9", "_", "é", "**", "answer"], words, marks, ["", " 13"])
    for text in found:
        assert spans(math_answers.LAST_NUMBER, text) == spans(number, text)
        assert spans(math_answers.ANSWER_LINE, text) == spans(line, text)
        joined = math_answers.GROUPED.sub("", math_answers.WRAPPING.sub(math_answers.opened, text))
        assert verify.find_answer(text, "number") == verify.find_answer(joined, "number")


@pytest.mark.parametrize("group", ["{,}", ",\\!", "\u00a0", "\u2009", "\u202f"])
def test_grouped_thousands(group):
    assert verify.find_answer(f"so it is 1{group}234{group}567.", "number") == "1234567"
