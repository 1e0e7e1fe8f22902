"""
Benchmarks, by the [bench.*] tables of configs.toml: rows of a local file or of the hub become
problems with a prompt and a verifiable truth. Whatever is wrong with a row ends the program in
one line.
"""

import base64
import gzip
import itertools
import json
import pickletools
import tomllib
import zlib
from collections import Counter
from functools import partial
from pathlib import Path

from harness import digest, tiny
from harness.data import field, is_chat, read_rows
from harness.ranks import print0
from harness.settings import PRESETS, did_you_mean, die, one_line

# What a table may say of where its rows are and which field is what
FIELDS = ("hub", "name", "split", "file", "local", "ids")
FIELDS += ("problem", "truth", "truth_after", "release", "start", "end")

# ==== 1. Tables =================================================================================


def read_tables(knobs):
    """({benchmark: its table}, {name: prompt template}) of configs.toml. knobs: the names of
    lad.py's settings that a table may set."""
    benches = {}
    templates = {}
    for name, value in tomllib.loads(PRESETS.read_text(encoding="utf-8"))["bench"].items():
        if isinstance(value, str):
            templates[name] = value
            continue
        benches[name] = value
        for key in [*value, *value.get("local", {})]:
            if key not in FIELDS and key not in knobs:
                hint = did_you_mean(key, [*FIELDS, *knobs])
                die(f"configs.toml, [bench.{name}]: unknown key {key!r}{hint}")
    return benches, templates


def read_bench(name, table, data):
    """(rows, source, table) of the file in the folder `data` where there is one, else of the hub.
    The table that is returned has the fields' names as they are in that source."""
    # A local file wins over the hub
    source = table.get("hub")
    file = Path(data, table.get("file", "-"))
    if table.get("file") in tiny.TASKS:
        file = tiny.make(table["file"])["test"]
    if file.exists():
        source = str(file)
        table = table | table.get("local", {})
    if not source:
        die(f"{name}: no file {file}; name the folder that has it: --data DIR")

    if "release" in table:
        rows = livecodebench(name, source, table)
    elif table.get("start") or table.get("end"):
        die(f"--start, --end: {name} has no dates; they are for LiveCodeBench, as lcb_v6")
    elif source.endswith(".gz"):
        with gzip.open(source, "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
    else:
        rows = read_rows(source, table.get("name", ""), table.get("split", "test"))
    return rows, source, table


# ==== 2. Problems ===============================================================================


def load_problems(name, table, templates, data, limit=0):
    """([{number, id, statement, text (the prompt), truth, its digest}], source), the first
    `limit` of them if that is not 0. A truth that is a function is to be called when it is
    needed."""
    rows, source, table = read_bench(name, table, data)
    ids = read_ids(table, data)
    problems = []
    for number, row in enumerate(itertools.islice(rows, limit or None)):
        where = f"{source}, row {number + 1}"
        if "release" in table:
            row = row | {"problem": row["question_content"]}
        # What a response is verified against
        if table.get("reward"):  # which gets the row
            truth = row
            truth_digest = digest.of_truth(row)
        elif "release" in table:
            truth = partial(livecodebench_tests, row)
            truth_digest = digest.digest(*(row.get(key) for key in TESTS))
        else:
            truth = truth_of(row, table, where)
            truth_digest = digest.of_truth(truth)
        # What a model is asked
        statement = statement_of(row, table, where)
        problem = dict(
            number=number,
            id=ids[number] if ids else "",
            statement=statement,
            text=fill_prompt(row, statement, table["prompt"], templates, where),
            truth=truth,
            truth_digest=truth_digest,
        )
        problems.append(problem)
    return problems, source


def read_ids(table, data):
    """Names of the problems, row by row, from a file beside theirs; none where it is not
    there."""
    path = Path(data, table.get("ids", "-"))
    if not path.exists():
        return []
    return json.loads(path.read_text())


def statement_of(row, table, where):
    """What is asked, as a person reads it: a field, of a chat its last message, or a template
    over fields."""
    path = table.get("problem", "problem")
    if "{" in path:
        return fill(path, row, where)
    statement = field(row, path, where)
    if is_chat(statement):
        statement = statement[-1]["content"]
    return str(statement)


def truth_of(row, table, where):
    """What a response is verified against: a field, or a dictionary of some ("a=x,b=y")."""
    path = table.get("truth", "answer")
    if "=" in path:
        truth = {}
        for pair in path.split(","):
            key, value = pair.split("=")
            truth[key] = field(row, value, where)
        return truth
    truth = field(row, path, where)
    if "truth_after" in table:
        truth = str(truth).rpartition(table["truth_after"])[2].strip()
    return truth


def fill_prompt(row, statement, prompt, templates, where):
    """The prompt: a template of configs.toml by its name, or one as it is given, over the row's
    fields. {format} is how the program is to be written: from stdin to stdout, or as the starter
    code has it."""
    template = templates.get(prompt, prompt)
    form = fill(templates["starter" if row.get("starter_code") else "stdin"], row, where)
    return fill(template, {"format": form} | row | {"problem": statement}, where)


def fill(template, row, where):
    """A template over the fields of a row."""
    try:
        return template.format(**row)
    except (KeyError, IndexError) as error:
        die(f"{where}: the prompt template needs field {error}; it has {', '.join(row)}")
    except (ValueError, AttributeError, TypeError) as error:
        die(
            f"{where}: the prompt template {template[:60]!r} does not fit: {one_line(error)} "
            "(write a brace that is not a field twice: {{ }})"
        )


# ==== 3. LiveCodeBench, arXiv 2403.07974 ========================================================
# A release is a number of files, not a window of dates: version 1 is test.jsonl, each later one
# adds a file. The files overlap in time: a window over all of them holds other problems than a
# release.

TESTS = ("public_test_cases", "private_test_cases", "metadata")  # the fields of a truth
PUBLISHED = (400, 511, 612, 713, 880, 1055)  # problems in releases 1, 2, .., by its card
# What a field of tests that is torn, or no base64, zlib, pickle or JSON, raises
UNREADABLE = (ValueError, zlib.error, StopIteration, TypeError, AttributeError, EOFError)


def livecodebench(name, source, table):
    """Rows of the files of a release, those dated start..end, inclusive, where the table has a
    window. Tests stay packed until they are used: unpacked, all are many GB."""
    release = table["release"]
    if type(release) is not int or release < 1:
        die(f"configs.toml, [bench.{name}]: release = {release!r}: expected a number of files")
    start = table.get("start", "")
    end = table.get("end", "")
    # Its files
    names = ["test.jsonl", *(f"test{i}.jsonl" for i in range(2, release + 1))]
    folder = find_release(source, names)
    absent = [name for name in names if not (folder / name).exists()]
    if len(absent) == len(names):
        die(
            f"{name}: no {names[0]} in {folder}; name the folder that has livecodebench: --data DIR"
        )

    # Their rows, in the window if there is one
    rows, left_out = read_release([folder / name for name in names if name not in absent])
    found = len(rows)
    if start or end:
        rows, outside = in_window(rows, start, end)
        left_out += outside
    say_release(name, names, absent, found, rows, left_out, start, end)
    return rows


def find_release(source, names):
    """The folder of its files; from the hub these files alone are fetched."""
    try:
        folder = Path(source)
        if folder.is_dir():
            return folder
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(source, repo_type="dataset", allow_patterns=names))
    except Exception as error:  # hub errors come in a dozen types
        die(
            f"cannot read {source!r}: {one_line(error)}; put its test*.jsonl into a folder "
            "livecodebench in --data"
        )


def read_release(paths):
    """(rows, Counter of why others were left out). A problem that comes twice counts once."""
    rows = []
    seen = set()
    left_out = Counter()
    for path in paths:
        with open(path, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                row, problem = read_problem(line)
                if not problem and identity(row) in seen:
                    problem = "duplicate"
                if problem:
                    left_out[problem] += 1
                    continue
                seen.add(identity(row))
                rows.append(row)
    return rows, left_out


def identity(row):
    """What two rows of one problem share."""
    return digest.digest(*(row.get(key) for key in ("platform", "question_id", "question_content")))


def read_problem(line):
    """(row, "") of a line, or (None, what is wrong with it)."""
    if not line.strip():
        return None, "blank line"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None, "torn line"
    if not isinstance(row, dict) or not isinstance(row.get("question_content"), str):
        return None, "line without a problem"
    if not (has_tests(row, "public_test_cases") or has_tests(row, "private_test_cases")):
        return None, "problem without tests"
    return row, ""


def has_tests(row, key):
    """Whether there is a test in a field; one that cannot be read is found out when it is
    used."""
    packed = row.get(key)
    if not packed or len(str(packed)) > 200:  # an empty list is shorter, packed or not
        return bool(packed)
    try:
        return bool(unpack(packed))
    except UNREADABLE:
        return True


def in_window(rows, start, end):
    """(rows dated start..end, inclusive, Counter of why others were left out); "" is an open
    end."""
    kept = []
    left_out = Counter()
    for row in rows:
        day = day_of(row)
        if not day:
            left_out["problem without a date"] += 1
        elif start <= day and (not end or day <= end):
            kept.append(row)
    return kept, left_out


def day_of(row):
    """YYYY-MM-DD; "" where a row has no date."""
    date = row.get("contest_date")
    return date[:10] if isinstance(date, str) else ""


def say_release(name, names, absent, found, rows, left_out, start, end):
    """One line: how many problems there are, of which window, and what was left out."""
    # What was asked for, and what is there
    release = len(names)
    window = "no window"
    if start or end:
        window = f"window {start or 'any'}..{end or 'any'} inclusive"
    days = sorted(day for day in map(day_of, rows) if day) or ["none"]
    parts = [
        f"{len(rows)} problems of release v{release} ({names[0]} to {names[-1]}), {window}, dated "
        f"{days[0]}..{days[-1]}"
    ]

    # What is not as it should be
    without = sum(not has_tests(row, "private_test_cases") for row in rows)
    undated = sum(not day_of(row) for row in rows)
    if absent:
        parts.append(f"NOT THE RELEASE: {', '.join(absent)} not there")
    elif release <= len(PUBLISHED) and found != PUBLISHED[release - 1]:
        parts.append(f"the published release has {PUBLISHED[release - 1]}, these files {found}")
    if undated:
        parts.append(f"{undated} without a date")
    if without:
        parts.append(f"{without} with public tests only")
    if left_out:
        parts.append("left out: " + ", ".join(f"{n} x {why}" for why, n in left_out.items()))
    print0(f"data      {name}: " + "; ".join(parts))


def livecodebench_tests(row):
    """Public and private tests as verify.py reads them; None, which it calls unparsable, where
    they cannot be read."""
    try:
        metadata = json.loads(row.get("metadata") or "{}") or {}
        tests = []
        for key in ("public_test_cases", "private_test_cases"):
            if row.get(key):
                tests += unpack(row[key])
        return [test | {"metadata": metadata} for test in tests]
    except UNREADABLE:
        return None


def unpack(packed):
    """Tests in JSON. Private ones are the one string in a pickle, compressed and in base64: it is
    picked out, nothing is unpickled."""
    if packed.lstrip().startswith("["):
        return json.loads(packed)
    pickled = zlib.decompress(base64.b64decode(packed))
    text = next(value for _, value, _ in pickletools.genops(pickled) if isinstance(value, str))
    return json.loads(text)
