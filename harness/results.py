"""
Results of an evaluation on disk: a JSON line for each finished problem, and for each verdict of a
judge.

A line carries all its settings, so that files may be merged with cat, an interrupted evaluation
goes on where it stopped, and other settings never mix.
"""

import json
from pathlib import Path

from harness.ranks import print0


def append(file, record):
    """One line, handed to the system before the next. What a kill tore stays a line of its own,
    which read skips."""
    line = json.dumps(record) + "\n"
    with open(file, "ab+") as lines:
        if lines.tell() > 0:
            lines.seek(-1, 2)
            if lines.read(1) != b"\n":
                line = "\n" + line
        lines.write(line.encode())


def read(out, full=False):
    """{settings as JSON: {problem: record}} of all .jsonl files in a folder; a judge's score
    becomes its record's. `full` keeps the responses."""
    results = {}
    judged = []
    torn = 0
    for path in sorted(Path(out).glob("*.jsonl")):
        with open(path, errors="replace") as lines:
            for line in lines:
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                    key = json.dumps(record["settings"], sort_keys=True)
                    number = record["problem"]
                except (ValueError, KeyError, TypeError):
                    torn += 1
                    continue
                if "judge" in record:
                    judged.append((key, number, record))
                    continue
                if not full:
                    record.pop("responses", None)
                results.setdefault(key, {}).setdefault(number, record)

    for key, number, line in judged:
        if number in results.get(key, {}):
            results[key][number].setdefault("judged", {})[line["judge"]] = line["score"]
    if torn:
        print0(f"eval      {torn} torn lines in {out} skipped")
    return results
