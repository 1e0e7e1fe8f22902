"""
A judge of logical diversity: a model reads the responses to one problem and says, 1 to 5, how
different they are in their logic.
"""

import json
import math
import os
import re
import time
import urllib.request
from dataclasses import dataclass

from harness.settings import die

LOGIC = """You compare responses to one problem and rate how different they are in their logic: \
the key idea, the decomposition, the theorem or algorithm, the order of deduction. Ignore wording, \
length, notation, names, and whether the final answer is right. 1: all follow essentially the same \
reasoning. 2: the same approach with small changes in some steps. 3: a mix, with at least one \
clearly different step or idea. 4: several clearly different approaches. 5: nearly every response \
takes an approach of its own. Explain in at most three sentences, then end with one line: \
"Score: N".

Problem:
{problem}"""

FLOWRL = """Rate, from 1 to 5, how diverse {count} attempts at one competition problem in \
mathematics are in their approach. Two attempts take the same approach if they set the problem up \
alike, choose the same variables and follow the same path, whatever their wording, notation and \
arithmetic. Even subtle differences of method count: other variables, another technique \
(algebraic, geometric, analytic), another decomposition, another way to use the constraints, \
another path of computation. Whether an attempt is right or finished does not count.

First count the attempts that take the commonest approach, then rate:
1: {one} or more of them take it; the others differ in trifles.
2: {two} or more; one or two other approaches appear, rarely.
3: {three} or more; two or three other approaches are there.
4: {four} or more; three or four strategies are well represented.
5: fewer; four or more strategies, none of which dominates.

Answer with the number alone.

Problem:
{problem}"""


@dataclass(frozen=True)
class Rubric:
    """What a judge is asked, and of what."""

    text: str
    responses: int  # of a problem, the first
    characters: int  # of a response, the first
    max_tokens: int  # of the reply, where the judge runs in vLLM
    score: str  # a pattern that finds the number in the reply; the last one counts


# "logic" is ours. "flowrl" is the public one of arXiv 2509.15207 (its appendix and its evaluation
# code), in our words: how many of 16 attempts take the commonest approach decides
RUBRICS = {
    "logic": Rubric(LOGIC, 8, 4000, 512, r"(?i)score\W*([1-5])\b"),
    "flowrl": Rubric(FLOWRL, 16, 300, 64, r"(?im)(?:^|score|rating)\W*([1-5])(?:/5)?\W*$"),
}

BUSY = (429, 500, 502, 503, 504)  # HTTP codes after which one may ask again


def judge_name(model, rubric):
    """Under which a score is kept: scores by different rubrics do not compare."""
    return model if rubric == "logic" else f"{model}, {rubric}"


def judge_prompt(record, rubric):
    """Of a finished problem: the rubric, the problem, its first responses."""
    rubric = RUBRICS[rubric]
    responses = record["responses"][: rubric.responses]
    counts = counts_of(len(responses))
    parts = [rubric.text.format(problem=record["statement"], count=len(responses), **counts)]
    for number, text in enumerate(responses, 1):
        cut = text[: rubric.characters]
        parts.append(f"Response {number}:\n{cut}")
    return "\n\n".join(parts)


def counts_of(n):
    """From how many attempts of the commonest approach on the score is 1, 2, 3, 4: of 16 as
    published, 14, 11, 7 and 4; of fewer the same shares."""
    of_16 = dict(one=14, two=11, three=7, four=4)
    return {name: math.ceil(n * count / 16) for name, count in of_16.items()}


def read_score(reply, rubric):
    """1 to 5; None where the reply gives none."""
    found = re.findall(RUBRICS[rubric].score, reply or "")
    if not found:
        return None
    return int(found[-1])


def ask(url, model, prompt):
    """The reply of an OpenAI-compatible endpoint, at temperature 0; asked again, later, where it
    is busy."""
    message = dict(role="user", content=prompt)
    body = json.dumps(dict(model=model, messages=[message], temperature=0)).encode()
    headers = {"Content-Type": "application/json"}
    key = os.environ.get("OPENAI_API_KEY")
    if key:
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(f"{url.rstrip('/')}/chat/completions", body, headers)
    for wait in (1, 5, 20, None):
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                return json.load(answer)["choices"][0]["message"]["content"]
        except (OSError, ValueError, LookupError) as error:  # HTTPError is an OSError
            if wait is None or getattr(error, "code", 0) not in BUSY:
                die(f"--judge {url}, model {model}: {error}")
            time.sleep(wait)
