"""
A Codeforces rating of a model's submissions, by CodeElo's procedure (arXiv 2501.01257): each
contest's score is placed in its real standings, the rating that expects this place is the
contest's, the mean over contests is the model's.
"""

import json
import re
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
from tqdm import tqdm

from harness.settings import die

API = "https://codeforces.com/api"
CACHE = Path("~/.cache/lad/codeforces").expanduser()
SUBMISSIONS = 8  # of a problem that count, the first


def rate(records, data, folder=CACHE, api=API, least=200):
    """One line: mean rating over contests, and percentile; or why there is none."""
    # {contest: {problem: its submissions, right or not}}
    contests = {}
    unknown = []
    for record in records:
        name = read_id(record["id"])
        if name is None:
            unknown.append(record["id"])
            continue
        number, index = name
        right = [reward > 0.5 for reward in record["rewards"]]
        contests.setdefault(number, {})[index] = right
    if not contests:
        return f"no rating: no id names a contest and a problem, as 1873A does: {unknown[0]!r}"

    # A rating for each contest that has enough participants
    ratings = []
    try:
        for number in tqdm(contests, "contest standings", unit="contest"):
            found = contest(number, folder, api)
            if found:
                ratings.append(contest_rating(found, contests[number], least))
    except OSError as error:
        return (
            f"no rating: the standings of {len(contests)} contests are needed, not all are in "
            f"{folder}, and {api} cannot be reached ({error})"
        )
    ratings = [rating for rating in ratings if rating is not None]
    if not ratings:
        return (
            f"no rating: none of {len(contests)} contests has more than {least} rated participants"
        )

    # Their mean, and how many people are below it
    left_out = ""
    if unknown:
        left_out = f"; {len(unknown)} ids could not be read (the first: {unknown[0]!r})"
    rating = np.mean(ratings)
    table = Path(data, "codeforces_ratings_2024.json")
    place = f"no percentile: no {table}"
    if table.exists():
        share = percentile(rating, json.loads(table.read_text()))
        place = f"percentile {share:.1f} by {table.name}"
    return (
        f"rating {rating:.0f}, {place}; mean over {len(ratings)} of {len(contests)} contests, at "
        f"most {SUBMISSIONS} submissions a problem. Inflated where the tests are only the samples, "
        "as most of codeforces.json's are; problems of a contest that the file lacks count as "
        "unsolved" + left_out
    )


# What may stand around the number and the index in an id, and in an address
AROUND = re.compile(r"https?://|www\.|codeforces(\.com)?|problemset|contest|problem|cf", re.I)


def read_id(text):
    """(number of the contest, index of the problem) of an id as 1873A, 1873/A, CF1873A, 1873_A or
    the problem's address; None where it is none."""
    text = AROUND.sub("/", str(text))
    text = re.sub(r"[\s/_.:-]+", "/", text).strip("/")
    match = re.fullmatch(r"(\d+)/?([A-Za-z]\d{0,2})", text)
    if match is None:
        match = re.fullmatch(r"(\d+)/(\d\d?)", text)  # 921/01
    if match is None:
        return None
    return match[1], match[2].upper()


def contest(number, folder, api=API):
    """{problems: {index: points or None}, rows: [[handle, points, penalty]], ratings: {handle:
    rating before}}, from the folder or, the first time, from the API; None: no such contest."""
    path = Path(folder, f"{number}.json")
    if not path.exists():
        standings = call(api, f"standings?contestId={number}&showUnofficial=false")
        changes = call(api, f"ratingChanges?contestId={number}")
        found = None
        if standings and changes:
            rows = []
            for row in standings["rows"]:
                handle = row["party"]["members"][0]["handle"]
                rows.append([handle, row["points"], row["penalty"]])
            found = dict(
                problems={p["index"]: p.get("points") for p in standings["problems"]},
                rows=rows,
                ratings={change["handle"]: change["oldRating"] for change in changes},
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".new").write_text(json.dumps(found))
        path.with_suffix(".new").rename(path)
    return json.loads(path.read_text())


def call(api, method):
    """What the API's contest.METHOD returns; None where it has no such contest. OSError where it
    cannot be reached."""
    if api == API:
        time.sleep(2)  # its limit is a call in two seconds
    try:
        with urllib.request.urlopen(f"{api}/contest.{method}", timeout=60) as answer:
            return json.load(answer)["result"]
    except urllib.error.HTTPError as error:
        if error.code == 400:  # {"status": "FAILED", ..}
            return None
        die(f"{api}/contest.{method}: {error}")


def contest_rating(found, submissions, least=200):
    """The rating at which a contestant expects the rank that these submissions get; None where at
    most `least` rated people took part. submissions: {index: [right or not, ..]}.

    The rank is counted from 1, behind everybody with the same score. The rating m solves 1 +
    sum_i 1/(1 + 10^((m - old_i)/400)) = rank, in 0 .. max old_i + 100 as CodeElo looks for it
    (for rank 1 the solution is infinite).
    """
    rows = [row for row in found["rows"] if row[0] in found["ratings"]]
    if len(rows) <= least:
        return None

    # The place among them: more points first, then the smaller penalty
    score, penalty = contest_score(found["problems"], submissions)
    rank = 1
    for _, points, lost in rows:
        rank += points > score or (points == score and lost <= penalty)

    # The rating that expects this place, by bisection
    old = np.array([found["ratings"][row[0]] for row in rows], dtype=float)
    low = 0.0
    high = old.max() + 100
    for _ in range(60):  # the expected rank falls as m grows
        middle = (low + high) / 2
        expected = 1 + (1 / (1 + 10 ** ((middle - old) / 400))).sum()
        if expected < rank:
            high = middle
        else:
            low = middle
    return low


def contest_score(problems, submissions):
    """(points, penalty). A problem gives max(0, points - 50 fails), or, where the contest has no
    points, 1 and a penalty of 10 a fail. problems: {index: points or None}."""
    score = penalty = 0
    for index, points in problems.items():
        tries = submissions.get(index, [])[:SUBMISSIONS]
        if True not in tries:
            continue
        fails = tries.index(True)
        if points is None:
            score += 1
            penalty += 10 * fails
        else:
            score += max(0, points - 50 * fails)
    return score, penalty


def percentile(rating, table):
    """Share in % of the people in {rating: number of people} who are rated lower."""
    lower = sum(people for other, people in table.items() if int(other) < rating)
    return 100 * lower / sum(table.values())
