"""
A judge of logical diversity: a model reads the responses to one problem and says, 1 to 5, how
different they are in their logic.
"""

import json
import os
import re
import time
import urllib.request

from harness.settings import die

RUBRIC = """You compare responses to one problem and rate how different they are in their logic: \
the key idea, the decomposition, the theorem or algorithm, the order of deduction. Ignore wording, \
length, notation, names, and whether the final answer is right. 1: all follow essentially the same \
reasoning. 2: the same approach with small changes in some steps. 3: a mix, with at least one \
clearly different step or idea. 4: several clearly different approaches. 5: nearly every response \
takes an approach of its own. Explain in at most three sentences, then end with one line: \
"Score: N".

Problem:
{problem}"""

BUSY = (429, 500, 502, 503, 504)  # HTTP codes after which one may ask again


def judge_prompt(record):
    """Of a finished problem: the rubric, the problem, its first 8 responses."""
    parts = [RUBRIC.format(problem=record["statement"])]
    for number, text in enumerate(record["responses"][:8], 1):
        parts.append(f"Response {number}:\n{text[:4000]}")
    return "\n\n".join(parts)


def read_score(reply):
    """1 to 5; None where the reply gives none."""
    found = re.findall(r"(?i)score\W*([1-5])\b", reply or "")
    if not found:
        return None
    return int(found[-1])


def ask(url, model, prompt):
    """The reply of an OpenAI-compatible endpoint; asked again, later, where it is busy."""
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
