"""
Results of an evaluation on disk: a JSON line for each finished problem, and for each verdict of a
judge.

A line carries all its settings and a digest of what was asked, so that files may be merged with
cat, an interrupted evaluation goes on where it stopped, other settings never mix, and no line
answers for another question: a changed row of a file of the same name, another chat template,
other weights.
"""

import json
from pathlib import Path

from harness.ranks import print0
from harness.settings import die, one_line

# What a line of a finished problem must have for the tables, and what its settings must have
FIELDS = ("id", "statement", "rewards", "reasons", "lengths", "truncated", "answers", "solutions")
SETTINGS = ("model", "bench", "kind", "n")


def append(file, record):
    """One line, handed to the system before the next. What a kill tore stays a line of its own,
    which read skips."""
    line = json.dumps(record) + "\n"
    try:
        with open(file, "ab+") as lines:
            if lines.tell() > 0:
                lines.seek(-1, 2)
                if lines.read(1) != b"\n":
                    line = "\n" + line
            lines.write(line.encode())
    except OSError as error:  # a full disk, most likely
        die(
            f"{file}: {one_line(error)}; the problems before this one are saved: make room, then "
            "give the same command"
        )


def key_of(settings):
    """What tells one evaluation of a benchmark from another."""
    return json.dumps(settings, sort_keys=True)


def place_of(line):
    """(number of the problem, digest of what was asked) of a line; the latter is None in files
    that were written before lines had it."""
    return line["problem"], line.get("asked")


def read(out, full=False):
    """{key of the settings: {place: record}} of all .jsonl files in a folder; a judge's score
    becomes its record's. `full` keeps the responses."""
    # Finished problems, and the verdicts of judges
    results = {}
    judged = []
    bad = 0
    for path in sorted(Path(out).glob("*.jsonl")):
        with open(path, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if not line.strip():
                    continue
                record = parse(line)
                if record is None:
                    bad += 1
                elif "judge" in record:
                    judged.append(record)
                else:
                    if not full:
                        record.pop("responses", None)
                    key = key_of(record["settings"])
                    results.setdefault(key, {}).setdefault(place_of(record), record)

    # Each verdict to its problem
    for line in judged:
        record = results.get(key_of(line["settings"]), {}).get(place_of(line))
        if record is not None:
            record.setdefault("judged", {})[line["judge"]] = line["score"]
    if bad:
        print0(f"eval      {bad} torn lines in {out} skipped")
    return results


def parse(line):
    """The object of a line, with all that is asked of it later; None where it is torn, or no
    result."""
    try:
        record = json.loads(line)
        fields = ("judge", "score") if "judge" in record else FIELDS
        whole = all(name in record for name in (*fields, "problem"))
        whole = whole and all(name in record["settings"] for name in SETTINGS)
        hash(place_of(record))
    except (ValueError, KeyError, TypeError):
        return None
    return record if whole else None


def pick(results, wanted):
    """Of what was read, the problems at the places that are wanted, {key: places}."""
    picked = {}
    for key, places in wanted.items():
        records = results.get(key, {})
        found = {place: records[place] for place in records if place in places}
        if found:
            picked[key] = found
    return picked


def latest(results):
    """Of what was read, without the lines whose question has changed since: a line names those
    that it was written in place of."""
    kept = {}
    for key, records in results.items():
        replaced = set()
        for (number, _), record in records.items():
            replaced |= {(number, asked) for asked in record.get("replaces", [])}
        kept[key] = {place: records[place] for place in records if place not in replaced}
    return kept


def without_question(results):
    """How many lines are too old to say what was asked."""
    places = [place for records in results.values() for place in records]
    return sum(asked is None for _, asked in places)
