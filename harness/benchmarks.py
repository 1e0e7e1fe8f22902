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
from functools import partial
from pathlib import Path

from harness.data import field, is_chat, read_rows
from harness.ranks import print0
from harness.settings import PRESETS, did_you_mean, die, one_line

# What a table may say of where its rows are and which field is what
FIELDS = ("hub", "name", "split", "file", "local", "ids")
FIELDS += ("problem", "truth", "truth_after", "start", "end")

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
    source = table.get("hub")
    file = Path(data, table.get("file", "-"))
    if table.get("file") == "tiny":
        from harness import tiny

        file = tiny.make()["test"]
    if file.exists():
        source = str(file)
        table = table | table.get("local", {})
    if not source:
        die(f"{name}: no file {file}; name the folder that has it: --data DIR")

    if "start" in table:
        rows = livecodebench(name, source, table["start"], table["end"])
    elif source.endswith(".gz"):
        with gzip.open(source, "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
    else:
        rows = read_rows(source, table.get("name", ""), table.get("split", "test"))
    return rows, source, table


# ==== 2. Problems ===============================================================================


def load_problems(name, table, templates, data, limit=0):
    """([{number, id, statement, text (the prompt), truth}], source), the first `limit` of them if
    that is not 0. A truth that is a function is to be called when it is needed."""
    rows, source, table = read_bench(name, table, data)
    ids = read_ids(table, data)
    problems = []
    for number, row in enumerate(itertools.islice(rows, limit or None)):
        where = f"{source}, row {number + 1}"
        if "private_test_cases" in row:
            truth = partial(livecodebench_tests, row)
            row = row | {"problem": row["question_content"]}
        else:
            truth = truth_of(row, table, where)
        statement = statement_of(row, table, where)
        problem = dict(
            number=number,
            id=ids[number] if ids else "",
            statement=statement,
            text=fill_prompt(row, statement, table["prompt"], templates, where),
            truth=truth,
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
    """What is asked, as a person reads it; of a chat its last message."""
    statement = field(row, table.get("problem", "problem"), where)
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
    form = templates["starter" if row.get("starter_code") else "stdin"]
    try:
        form = form.format(**row)
        return template.format(**{"format": form} | row | {"problem": statement})
    except (KeyError, IndexError) as error:
        die(f"{where}: the prompt template needs field {error}; it has {', '.join(row)}")


# ==== 3. LiveCodeBench, arXiv 2403.07974 ========================================================


def livecodebench(name, source, start, end):
    """Rows dated start..end, inclusive, of test*.jsonl. Tests stay packed until they are used:
    unpacked, all are many GB."""
    try:
        folder = Path(source)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            found = snapshot_download(source, repo_type="dataset", allow_patterns="test*.jsonl")
            folder = Path(found)
    except Exception as error:  # hub errors come in a dozen types
        die(
            f"cannot read {source!r}: {one_line(error)}; put its test*.jsonl into a folder "
            "livecodebench in --data"
        )

    rows = []
    number = 0
    for path in sorted(folder.glob("test*.jsonl")):
        with open(path, encoding="utf-8") as lines:
            for line in lines:
                number += 1
                row = json.loads(line)
                day = field(row, "contest_date", f"{source}, row {number}")[:10]
                if start <= day <= end:
                    rows.append(row)
    days = [row["contest_date"][:10] for row in rows] or ["none"]
    print0(
        f"data      {name}: {len(rows)} problems in {start}..{end} inclusive, dated "
        f"{min(days)}..{max(days)}"
    )
    return rows


def livecodebench_tests(row):
    """Public and private tests as verify.py reads them."""
    private = row["private_test_cases"]
    if not private.startswith("["):
        private = unpack(private)
    metadata = json.loads(row["metadata"])
    tests = json.loads(row["public_test_cases"]) + json.loads(private)
    return [test | {"metadata": metadata} for test in tests]


def unpack(text):
    """The one string in a pickle, compressed and in base64. It is picked out, nothing is
    unpickled."""
    pickled = zlib.decompress(base64.b64decode(text))
    return next(value for _, value, _ in pickletools.genops(pickled) if isinstance(value, str))
