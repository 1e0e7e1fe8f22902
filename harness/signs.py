"""
Signs that a run does not learn, read off its lines of metrics.jsonl: nothing is right, all is
right, nothing tells the responses to a prompt apart, all are cut, no answer is found, the entropy
is gone.

Each is said once, on one line of the screen, with what is seen and what people change; what to look
at next stands in docs/when-it-does-not-learn.md. A resumed run reads its log, and says nothing
twice.
"""

import math
from collections import Counter, deque

from harness.ranks import print0, world

WINDOW = 5  # batches in a row that must show a sign
CUT = 0.9  # of the responses, at max_tokens
UNANSWERED = 0.5  # of the responses, without an answer, where none is right
GONE = 0.1  # of the entropy of the first batch
LEARNED = 0.9  # solve rate above which little entropy is no fault
PAGE = "docs/when-it-does-not-learn.md"

# ==== 1. What is seen ===========================================================================


def signs(first, recent, rewarded=True):
    """{sign: what is seen, in words} of the training lines `recent`, where all of these show it; of
    several the one that explains the others. first is the run's first training line. rewarded:
    False where rewards are measured only (distill).

    A number that is nan, because nothing could be scored, is no sign.
    """
    batches = f"the last {len(recent)} batches"
    responses = f"the {sum(line['samples'] for line in recent):,.0f} responses of {batches}"
    rates = [line["solve_rate"] for line in recent]
    found = {}

    # What was there has gone
    if max(rates) == 0 and first["solve_rate"] > 0:
        found["lost"] = (
            f"none of {responses} was right, and of the first of all {first['solve_rate']:.0%} were"
        )

    # Responses that are nearly the same, and not because they are right
    start = first["entropy_old"]
    is_gone = all(line["entropy_old"] < GONE * start for line in recent)
    if is_gone and max(rates) < LEARNED and not found:
        most = max(line["entropy_old"] for line in recent)
        found["collapsed"] = (
            f"in {batches} the entropy of a token was at most {most:.2g} nats, and in the first of "
            f"all {start:.2g}"
        )

    # Cut before an answer could come
    cut = min(line["truncated"] for line in recent)
    if cut >= CUT and not found:
        found["cut"] = f"{share(cut)} the responses of each of {batches} were cut"

    # Verdicts that tell no response to a prompt from another
    is_scored = all(map(math.isfinite, rates))
    is_equal = all(line["zero_variance"] == 1 for line in recent)
    if rewarded and is_scored and is_equal and not found:
        unanswered = min(line.get("unanswered", 0) for line in recent)
        if max(rates) == 0 and unanswered >= UNANSWERED:
            found["unanswered"] = (
                f"none of {responses} was right: {share(unanswered)} them had no answer to judge"
            )
        elif max(rates) == 0:
            found["unsolved"] = f"none of {responses} was right"
        elif min(rates) == 1:
            found["solved"] = f"all of {responses} were right"
        else:
            found["equal"] = f"in {batches} the responses to a prompt were all right or all wrong"
    return found


def share(x):
    return "all of" if x == 1 else f"at least {x:.0%} of"


# ==== 2. What people change =====================================================================

CHANGES = {
    "lost": "a much smaller lr = {cfg.lr:g} or grad_clip = {cfg.grad_clip:g}, from a checkpoint "
    "before it",
    "cut": "a larger max_tokens = {cfg.max_tokens}; a model or chat template that ends its "
    "responses",
    "unanswered": "the prompt, so that it asks for what kind = {cfg.kind} reads; the kind",
    "unsolved": "easier rows; a model that solves some of them; a larger group = {cfg.group}; a "
    "verifier or reward that accepts what is right",
    "solved": "harder rows; a verifier or reward that tells right from wrong",
    "equal": "a larger group = {cfg.group}; a temperature = {cfg.temperature:g} that is not near "
    "0; rows that are solved now and then; a reward that looks at the response",
    "collapsed": "a reward that one response to everything can earn; a smaller lr = {cfg.lr:g}; "
    "kl_coef; an objective that counts entropy, as kl_cov, clip_cov, entadv or fade",
}

# ==== 3. A run's watch ==========================================================================


def begin(cfg, lines=()):
    """The watch over a run whose log has these lines so far: its first training line, the last
    ones, and the signs that these have shown."""
    watch = dict(first=None, recent=deque(maxlen=WINDOW), said=set(), rewarded=True)
    watch["rewarded"] = cfg.objective != "distill"
    for line in lines:
        if "entropy_old" in line:  # a batch, and no evaluation
            look(watch, line)
    return watch


def look(watch, line):
    """The signs that a new training line completes, and that were not seen before."""
    if watch["first"] is None:
        watch["first"] = line
    watch["recent"].append(line)
    if len(watch["recent"]) < WINDOW:
        return {}
    found = signs(watch["first"], watch["recent"], watch["rewarded"])
    new = {name: seen for name, seen in found.items() if name not in watch["said"]}
    watch["said"] |= set(new)
    return new


def tell(watch, cfg, line, drawn):
    """Say what a new training line completes. drawn: this rank's groups of its batch, for the
    verifier's reasons."""
    for name, seen in look(watch, line).items():
        changes = CHANGES[name].format(cfg=cfg)
        print0(
            f"sign      step {line['step']}: {seen} ({reasons(drawn)}); people change: {changes}; "
            f"{PAGE}#{name}"
        )


def reasons(drawn):
    """What the verifier said of a batch's samples, counted, the most frequent first."""
    counts = Counter()
    for group in drawn:
        for s in group:
            verdict = "right" if s["correct"] > 0.5 else "wrong"
            counts[s["reason"] or verdict] += 1
    where = "rank 0's last batch" if world() > 1 else "the last batch"
    return f"{where}: " + ", ".join(f"{n} x {reason}" for reason, n in counts.most_common(3))
