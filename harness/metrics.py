"""Metrics of evaluation: pure functions of counts, of texts, and of finished problems."""

import ast
import functools
import itertools
import math
import operator
import re
import unicodedata
import warnings
from collections import Counter

import numpy as np

from harness.math_answers import INVISIBLE

# ==== 1. How many are right =====================================================================


def pass_at_k(n, c, k):
    """Unbiased pass@k = 1 - C(n-c, k)/C(n, k) of c right among n, arXiv 2107.03374.

    ValueError if k > n, for which there is no estimate.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass_at_k(n={n}, c={c}, k={k}) needs 0 <= c <= n and 1 <= k <= n")
    return 1.0 - math.prod((n - c - i) / (n - i) for i in range(k))


def pass_curve(n, c):
    """[pass@1, .., pass@n] of c right among n: pass_at_k for every k, by one running product."""
    factors = [max(n - c - i, 0) / (n - i) for i in range(n)]
    return [1 - miss for miss in itertools.accumulate(factors, operator.mul)]


def majority(record):
    """1 where the most frequent answer of a finished problem is right, else 0; among equals the
    first to appear counts. None where the kind has no answers to vote on."""
    votes = Counter(answer for answer in record["answers"] if answer)
    if votes:
        winner = votes.most_common(1)[0][0]
        return float(record["rewards"][record["answers"].index(winner)] > 0.5)
    if record["settings"]["kind"].startswith("math"):
        return 0.0
    return None


def interval(values):
    """95% bootstrap interval of the mean over problems: (low, high) for each column of values
    [problems, ...]. The same every time."""
    n = len(values)
    generator = np.random.default_rng(0)
    # how often each problem is drawn, in each of 1,000 draws
    counts = generator.multinomial(n, np.full(n, 1 / n), size=1000)  # [1000, problems]
    means = counts @ np.asarray(values, dtype=float) / n
    return np.percentile(means, [2.5, 97.5], axis=0)


# ==== 2. How different they are =================================================================


def distinct_n(texts, n):
    """dist-n: unique n-grams / all n-grams of the texts together, which are lists of tokens (a
    string is split at white space). nan where there is no n-gram."""
    grams = []
    for text in texts:
        tokens = text.split() if isinstance(text, str) else text
        grams += [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    if not grams:
        return math.nan
    return len(set(grams)) / len(grams)


# The field of each kind of node that holds a name
NAMES = {
    ast.Name: "id",
    ast.arg: "arg",
    ast.Attribute: "attr",
    ast.alias: "asname",
    ast.FunctionDef: "name",
    ast.AsyncFunctionDef: "name",
    ast.ClassDef: "name",
    ast.ExceptHandler: "name",
}


def normal_form(program):
    """A program up to comments, docstrings, layout and the names it gives itself, which become
    v0, v1, ..; what is no Python: up to layout."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "\\d" in a model's program is no news
            tree = ast.parse(program)
        nodes = list(ast.walk(tree))
        rename(nodes, own_names(nodes))
        for node in nodes:
            if isinstance(getattr(node, "body", None), list):
                node.body = [line for line in node.body if not is_bare_constant(line)]
        return ast.dump(tree)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "".join(program.split())


def own_names(nodes):
    """The names that a program gives: what it assigns, defines, imports as, takes as an
    argument."""
    found = set()
    for node in nodes:
        is_given = not isinstance(getattr(node, "ctx", None), ast.Load)
        if type(node) in NAMES and is_given:
            found.add(getattr(node, NAMES[type(node)]))
    return found - {None}


def rename(nodes, own):
    """Number the own names by their first appearance."""
    new = {}
    for node in nodes:
        field = NAMES.get(type(node))
        if field is None:
            continue
        name = getattr(node, field)
        if name in own:
            new.setdefault(name, f"v{len(new)}")
            setattr(node, field, new[name])


def is_bare_constant(statement):
    """A docstring, most likely; in any case nothing that does something."""
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


# ==== 3. Finished problems ======================================================================


def summarize(records):
    """The numbers of one model on one benchmark, of its finished problems."""
    records = sorted(records, key=lambda record: record["problem"])
    n = len(records[0]["rewards"])
    # pass@k of each problem
    curves = []
    for record in records:
        right = sum(reward > 0.5 for reward in record["rewards"])
        curves.append(pass_curve(n, right))
    curves = np.array(curves)  # [problems, k]

    # Means of what the records say
    dist = {}
    for key in records[0]:
        if key.startswith("dist-"):
            dist[key] = mean(record[key] for record in records)
    reasons = [reason for record in records for reason in record["reasons"] if reason]
    return dict(
        problems=len(records),
        n=n,
        reward=mean(x for record in records for x in record["rewards"]),
        pass_at=curves.mean(0),  # [k]
        interval=interval(curves),  # [2, k]
        maj=mean(majority(record) for record in records),
        dist=dist,
        distinct=mean(different(record, "solutions") for record in records),
        distinct_texts=mean(different(record, "texts") for record in records),
        judge=judged(records),
        length=mean(x for record in records for x in record["lengths"]),
        truncated=mean(x for record in records for x in record["truncated"]),
        reasons=Counter(reasons),
    )


def different(record, key):
    """How many right responses differ in this; None where the line does not have it."""
    if key not in record:
        return None
    right = [reward > 0.5 for reward in record["rewards"]]
    return len(set(itertools.compress(record[key], right)))


def judged(records):
    """{judge: (mean score, replies without one)}."""
    scores = {}
    for record in records:
        for judge, score in record.get("judged", {}).items():
            scores.setdefault(judge, []).append(score)
    return {judge: (mean(scores[judge]), scores[judge].count(None)) for judge in sorted(scores)}


def mean(values):
    """Of those that are not None; None where all are."""
    known = [x for x in values if x is not None]
    if not known:
        return None
    return float(np.mean(known))


# ==== 4. What training has seen =================================================================


def overlap(statements, training):
    """(how many statements stand word for word in a training text, how many have at least half of
    their 10-word windows somewhere in the training). One without a word, which is all that is
    compared, is in neither."""
    # All windows of the training, and all its texts as one
    known = set()
    texts = []
    for text in set(training):
        found = words(text)
        known |= windows(found)
        texts.append(f" {' '.join(found)} ")
    whole = "|".join(texts)

    verbatim = 0
    half = 0
    for statement in statements:
        found = words(statement)
        if not found:
            continue
        verbatim += f" {' '.join(found)} " in whole
        mine = windows(found)
        half += 2 * len(mine & known) >= len(mine)
    return verbatim, half


def words(text):
    """The words and numbers of a text in any script, without case, width, ways to write an accent,
    and what is not seen, as the hyphen of a line that was broken once."""
    text = re.sub(f"[{INVISIBLE}]", "", text)
    return word_pattern().findall(unicodedata.normalize("NFKC", text).casefold())


# Thai, Lao, Burmese, Khmer, kana, Han: written without spaces, so that each character is a word
SPACELESS = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)


@functools.cache
def word_pattern():
    """A word is of \\w without the underscore, and of the marks that vowels are written with in
    many scripts, which \\w leaves out."""
    marks = [chr(i) for i in range(0x300, 0x1F000) if unicodedata.category(chr(i))[0] == "M"]
    mark = re.escape("".join(marks))
    return re.compile(rf"[{SPACELESS}]|(?:(?![{SPACELESS}_])[\w{mark}])+")


def windows(found):
    """The runs of 10 words; of fewer words, the one run of all; of none, none."""
    if not found:
        return set()
    return {" ".join(found[i : i + 10]) for i in range(max(1, len(found) - 9))}
