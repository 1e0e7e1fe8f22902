"""
What is read in a response: the text that the verifier sees, and what tells one solution from
another.

lad.py and eval.py both go through here, so that the same tokens get the same score from both.
"""

from harness import countdown, fences, math_answers
from harness.metrics import normal_form

# ==== 1. The text that the verifier sees ========================================================

TAGS = ("<think>", "</think>", "<answer>", "</answer>")  # verify.py looks for these


def response_texts(tokenizer, prompt, responses):
    """Texts of the responses (lists of token ids) to one prompt, as it was rendered.

    Special tokens (ends, pads, markers of a chat template) are left out, but for TAGS, which some
    tokenizers make special. A <think> that the prompt ends with was opened by it and belongs to
    the response: one that is cut inside its thought has then no answer.
    """
    # Without the tokens that are no text
    hidden = hidden_tokens(tokenizer)
    visible = [[token for token in tokens if token not in hidden] for tokens in responses]
    texts = tokenizer.batch_decode(visible, skip_special_tokens=False)
    # With the tag that the prompt has
    if prompt.rstrip().endswith("<think>"):
        texts = ["<think>" + text for text in texts]
    return texts


def hidden_tokens(tokenizer):
    """Ids of the special tokens that are no part of a response's text."""
    hidden = set(tokenizer.all_special_ids)
    for number, token in tokenizer.added_tokens_decoder.items():
        if token.content.strip() in TAGS:
            hidden.discard(number)
        elif token.special:
            hidden.add(number)
    return hidden


# ==== 2. What tells one solution from another ===================================================


def solution_key(kind, text):
    """What two solutions are compared by: the final answer of mathematics, the expression of
    countdown, a program up to its names and layout; of any other kind the text without white
    space. "" where a response has none."""
    if kind.startswith("math"):
        return answer_key(kind, text)
    if kind == "countdown":
        return expression(text)
    if kind == "code":
        program = last_program(text)
        return normal_form(program) if program else ""
    return text_key(text)


def text_key(text):
    """What two responses are compared by as texts: all but white space, the thoughts included."""
    return "".join(text.split())


def count_distinct(kind, texts):
    """(how many of the texts differ in their solution, how many in their text)."""
    solutions = {solution_key(kind, text) for text in texts}
    return len(solutions), len({text_key(text) for text in texts})


def answer_key(kind, text):
    """What majority voting counts: a number's value, else the tidied spelling; "" where there is
    no answer, or the kind has none."""
    if not kind.startswith("math"):
        return ""
    answer = math_answers.find_answer(text, kind.partition(":")[2] or "boxed")
    if len(answer) > 400:
        return ""
    answer = math_answers.tidy(answer)
    number = math_answers.plain(answer)
    if number is None:
        return math_answers.squash(answer)
    value, _, is_percent = number
    return f"{value}%" if is_percent else str(value)


def expression(text):
    """The expression of a countdown answer, in one spelling, without white space and without the
    target that it is equal to."""
    answer = countdown.expression(countdown.answer_of(text))
    sides = "".join(answer.split()).split("=")
    for side in sides:
        if not side.isdigit():
            return side
    return sides[0]


def last_program(text):
    """The program of a response, or ""."""
    return fences.last_program(math_answers.after_thinking(text))
