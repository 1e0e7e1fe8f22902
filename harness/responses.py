"""What of a response is compared: the final answer of mathematics, an expression, a program."""

import re

from harness.metrics import normal_form

# verify.py's, of a fenced block of Python
BLOCK = re.compile(r"^[ \t]*```[ \t]*(?:python3?|py|Python)?[ \t]*\n(.*?)^[ \t]*```", re.S | re.M)


def answer_key(kind, text):
    """What majority voting counts: a number's value, else the tidied spelling; "" where there is
    no answer."""
    import verify

    answer = ""
    if kind.startswith("math"):
        answer = verify.find_answer(text, kind.partition(":")[2] or "boxed")
    if len(answer) > 400:
        return ""
    answer = verify.tidy(answer)
    number = verify.plain(answer)
    if number is None:
        return verify.squash(answer)
    value, _, is_percent = number
    return f"{value}%" if is_percent else str(value)


def solution(kind, text):
    """The text of a response with which `distinct` compares it."""
    text = text.rpartition("</think>")[2]
    if kind == "countdown":
        text = text.rpartition("<answer>")[2].partition("</answer>")[0]
    if kind == "code":
        blocks = BLOCK.findall(text)
        if blocks:
            return normal_form(blocks[-1])
    return "".join(text.split())
