"""harness/benchmarks.py and harness/codeforces.py: every benchmark's file through prompt, verifier
and record; LiveCodeBench's releases; ratings computed by hand."""

import base64
import gzip
import importlib.util
import json
import math
import pickle
import types
import zlib
from pathlib import Path

import pytest
from conftest import DATA, GRACE
from server import Server

import eval as ev
import verify
from harness import benchmarks, codeforces, metrics
from harness.data import read_rows

BENCHES, TEMPLATES = benchmarks.read_tables(ev.SHARED)
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no data in {DATA}")


class Bytes:
    """A tokenizer of one token a byte: any text comes back as it was."""

    all_special_ids = ()
    added_tokens_decoder = {}

    def batch_decode(self, rows, skip_special_tokens):
        return [bytes(row).decode() for row in rows]


@pytest.fixture(scope="module")
def verifier():
    with verify.Verifier(2, 20.0 + GRACE) as v:
        yield v


def load(name, data, **changes):
    limit = changes.pop("limit", 0)
    return benchmarks.load_problems(name, BENCHES[name] | changes, TEMPLATES, data, limit)


def record_of(name, problem, texts, verifier):
    """What eval.py would write of these responses."""
    problem = dict(problem, prompt=problem["text"], asked="", replaces=[])
    outputs = [types.SimpleNamespace(token_ids=t.encode(), finish_reason="stop") for t in texts]
    settings = dict(kind=BENCHES[name]["kind"])
    return ev.make_record(settings, problem, outputs, Bytes(), verifier)


def rewards_of(name, problem, texts, verifier):
    return record_of(name, problem, texts, verifier)["rewards"]


def block(program):
    return f"```python\n{program}\n```"


# ==== 1. Local files ============================================================================

MATH = {"math500": 500, "aime24": 30, "aime25": 30, "amc": 83, "minerva": 272, "olympiad": 675}


@needs_data
@pytest.mark.parametrize("name", MATH)
def test_gold_answers_score_one(name, verifier):
    """Every problem of the file, through loading, prompt, extraction, verifier and summary. Beside
    it another number, which is wrong."""
    problems, source = load(name, DATA)
    assert len(problems) == MATH[name] and str(DATA) in source
    records = []
    for problem in problems:
        gold = problem["truth"]
        if isinstance(gold, list):
            gold = gold[0]
        right = f"First \\boxed{{77777}}, no: \\boxed{{{str(gold).strip()}}}."
        wrong = "It is \\boxed{7.77777777}."
        records.append(record_of(name, problem, [right, wrong], verifier))
    assert [
        p["number"] for p, r in zip(problems, records, strict=True) if r["rewards"][0] != 1
    ] == []
    assert sum(record["rewards"][1] for record in records) == 0
    for problem in problems:
        assert problem["statement"] in problem["text"]
        assert problem["text"].endswith("put your final answer within \\boxed{}.")


def raw_rows(source):
    if source.endswith("gz"):
        with gzip.open(source, "rt") as lines:
            return [json.loads(line) for line in lines]
    return json.loads(Path(source).read_text())


ALL_PROGRAMS = [
    pytest.param(name, 1, marks=pytest.mark.slow)
    for name in ("humaneval", "humaneval_plus", "leetcode")
]


@needs_data
@pytest.mark.parametrize("name, step", [("humaneval", 8), ("leetcode", 10), *ALL_PROGRAMS])
def test_canonical_programs_score_one(name, step, verifier):
    problems, source = load(name, DATA)
    rows = raw_rows(source)
    assert len(problems) == len(rows) == {"leetcode": 200}.get(name, 164)
    for problem, row in list(zip(problems, rows, strict=True))[::step]:
        if name == "leetcode":
            program = row["solutions"]
        else:
            program = row["prompt"] + row["canonical_solution"]
        imports = "import sortedcontainers" in program.replace("from", "import")
        if imports and not importlib.util.find_spec("sortedcontainers"):
            assert (name, problem["number"]) == ("leetcode", 126)  # the one that needs a package
            continue
        found = record_of(name, problem, ["Here:\n" + block(program), block("pass")], verifier)
        assert found["rewards"] == [1.0, 0.0], (problem["number"], found["reasons"])


SOLVED = [
    (
        "codeforces",
        408,
        "for _ in range(int(input())):\n    print(*sorted(map(int, input().split())))",
    ),
    (
        "code_contests",
        165,
        "n, m = map(int, input().split())\n"
        "rows = [input() for _ in range(n)]\n"
        "def key(i):\n"
        "    return [-ord(c) if j % 2 else ord(c) for j, c in enumerate(rows[i - 1])]\n"
        "print(*sorted(range(1, n + 1), key=key))",
    ),
]


@needs_data
@pytest.mark.parametrize("name, count, program", SOLVED)
def test_programs_without_solutions_load(name, count, program, verifier):
    """These files come without solutions: the first problem of each is solved here."""
    problems, _ = load(name, DATA)
    assert len(problems) == count
    assert "from stdin" in problems[0]["text"] and problems[0]["text"].endswith("backticks)\n\n")
    found = record_of(name, problems[0], [block(program), block("print(0)")], verifier)
    assert found["rewards"] == [1.0, 0.0], found["reasons"]


@needs_data
def test_codeforces_problems_have_their_ids():
    problems, _ = load("codeforces", DATA)
    assert problems[11]["id"] == "1972D1"
    assert all(codeforces.read_id(problem["id"]) for problem in problems)


@needs_data
def test_countdown_golds(verifier):
    problems, source = load("countdown", DATA)
    golds = [row["answer"] for row in read_rows(source, "", "train")]
    assert len(problems) == 1024
    for problem in problems:
        assert str(problem["truth"]["target"]) in problem["text"]
        assert problem["statement"] in problem["text"]
    right = [("countdown", g, p["truth"]) for g, p in zip(golds, problems, strict=True)]
    others = [("countdown", g, p["truth"]) for g, p in zip(golds[1:], problems, strict=False)]
    assert sum(verifier.score(right)) == 1024
    assert sum(verifier.score(others)) < 5


# ==== 2. The hub's schemas ======================================================================


def make_hub(folder, rows, name="", split="test"):
    """A local copy of a hub data set: parquet files, with a README that names its configuration, as
    the hub has them."""
    import datasets

    (folder / "data").mkdir(parents=True)
    parquet = folder / "data" / f"{split}-00000-of-00001.parquet"
    datasets.Dataset.from_list(rows).to_parquet(parquet)
    (folder / "README.md").write_text(
        f"---\nconfigs:\n- config_name: {name or 'default'}\n  data_files:\n  - split: {split}\n"
        f"    path: data/{split}-*\n---\n"
    )
    return str(folder)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """datasets takes folders of one name for one data set: a cache for each test."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


ASKED = {"problem": "1+1?"}
QUESTION = {"question": "1+1?"}
HUB_ROWS = [
    ("math500", ASKED | {"solution": "2", "answer": "2", "subject": "Algebra", "level": 1}, "2"),
    ("aime24", ASKED | {"id": 60, "solution": "\\boxed{2}", "url": "u"}, "\\boxed{2}"),
    ("aime25", ASKED | {"answer": "2", "id": "0"}, "2"),
    ("amc", ASKED | {"id": 0, "answer": 2.0, "url": "u"}, 2.0),
    ("minerva", QUESTION | {"answer": "2"}, "2"),
    ("olympiad", QUESTION | {"id": 1, "solution": ["s"], "final_answer": ["$2$"]}, ["$2$"]),
    ("gsm8k", QUESTION | {"answer": "It is <<1+1=2>>2\n#### 2"}, "2"),
]


@pytest.mark.parametrize("name, row, truth", HUB_ROWS)
def test_hub_rows_load(name, row, truth, tmp_path, verifier, own_cache):
    table = BENCHES[name]
    hub = make_hub(tmp_path / "hub", [row] * 3, table.get("name"), table.get("split", "test"))
    problems, source = load(name, tmp_path / "nowhere", hub=hub, limit=2)
    assert [problem["truth"] for problem in problems] == [truth] * 2
    assert problems[0]["statement"] == "1+1?" and source == hub
    assert rewards_of(name, problems[0], ["\\boxed{2}", "\\boxed{3}"], verifier) == [1.0, 0.0]


@pytest.mark.parametrize("name", ["humaneval", "humaneval_plus"])
def test_hub_programs_load(name, tmp_path, verifier, own_cache):
    stub = 'def add(a, b):\n    """Sum."""\n'
    test = (
        "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(-1, 1) == 0\n"
    )
    row = dict(task_id="t/0", prompt=stub, test=test, entry_point="add")
    row["canonical_solution"] = "    return a + b\n"
    hub = make_hub(tmp_path / name, [row])
    [problem], _ = load(name, tmp_path / "nowhere", hub=hub)
    programs = [block(f"{stub}    return a {operator} b") for operator in "+-"]
    assert rewards_of(name, problem, programs, verifier) == [1.0, 0.0]


def test_hub_rows_of_codeforces_and_countdown(tmp_path, verifier, own_cache):
    tests = json.dumps([{"input": "4", "output": "8"}])
    rows = [{"problem": "Double it.", "tests": tests}]
    hub = make_hub(tmp_path / "cf", rows, "codeforces")
    [problem], _ = load("codeforces", tmp_path / "nowhere", hub=hub)
    programs = [block(f"print({k} * int(input()))") for k in (2, 3)]
    assert rewards_of("codeforces", problem, programs, verifier) == [1.0, 0.0]

    hub = make_hub(tmp_path / "cd", [{"target": 24, "nums": [4, 6]}] * 4, split="train")
    problems, _ = load("countdown", tmp_path / "nowhere", hub=hub, split="train[2:4]")
    answers = ["<answer>4*6</answer>", "<answer>24</answer>"]
    assert len(problems) == 2
    assert rewards_of("countdown", problems[0], answers, verifier) == [1.0, 0.0]


# ==== 3. Errors =================================================================================


def refusal(capsys, name, data, **changes):
    """The one line with which loading ends the program."""
    with pytest.raises(SystemExit) as stop:
        load(name, data, **changes)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1
    return err


def test_a_row_that_lacks_a_field(tmp_path, capsys):
    (tmp_path / "math500.json").write_text('[{"problem": "1", "answer": "1"}, {"problem": "2"}]')
    said = refusal(capsys, "math500", tmp_path)
    assert "math500.json, row 2: no field 'answer'" in said and "it has problem" in said


@pytest.mark.parametrize(
    "prompt", ["{problem} {", "}", "{problem!x}", "{problem:d}", "{problem.x}", "{0[}"]
)
def test_a_prompt_that_does_not_fit(prompt, tmp_path, capsys):
    (tmp_path / "math500.json").write_text('[{"problem": "1", "answer": "1"}]')
    said = refusal(capsys, "math500", tmp_path, prompt=prompt)
    assert "row 1: the prompt template" in said


def test_a_prompt_with_a_field_that_is_not_there(tmp_path, capsys):
    (tmp_path / "math500.json").write_text('[{"problem": "1", "answer": "1"}]')
    said = refusal(capsys, "math500", tmp_path, prompt="{nosuch}")
    assert "row 1: the prompt template needs field 'nosuch'; it has format, problem, answer" in said


def test_braces_in_rows_and_doubled_braces_are_no_fields(tmp_path):
    (tmp_path / "math500.json").write_text(json.dumps([{"problem": "{x} } {", "answer": "1"}]))
    [problem], _ = load("math500", tmp_path, prompt="{{problem}}: {problem}")
    assert problem["text"] == "{problem}: {x} } {"


# ==== 4. LiveCodeBench ==========================================================================


def pack(tests):
    """As its private tests are: pickled, compressed, in base64."""
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


HIDDEN = [dict(input="-3\n", output="-6\n", testtype="stdin")]
PUBLIC = [dict(input="2\n", output="4\n", testtype="stdin")]
CALLS = [dict(input="5", output="10", testtype="functional")]


def lcb_row(number, date="2024-01-01T00:00:00", private=None, public=PUBLIC, **more):
    row = dict(
        question_title="t",
        question_content=f"Double it ({number}).",
        platform="atcoder",
        question_id=f"q{number}",
        contest_id="c",
        contest_date=date,
        starter_code="",
        difficulty="easy",
        public_test_cases=json.dumps(public),
        private_test_cases=pack(HIDDEN) if private is None else private,
        metadata="{}",
    )
    return row | more


def write_release(folder, *files):
    """test.jsonl, test2.jsonl, .. of rows, or of lines as they are."""
    folder = folder / "livecodebench"
    folder.mkdir(exist_ok=True)
    for number, rows in enumerate(files, 1):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        name = "test.jsonl" if number == 1 else f"test{number}.jsonl"
        (folder / name).write_text("\n".join(lines) + "\n")
    return folder


def numbers(problems):
    return [int(problem["statement"][11:-2]) for problem in problems]


def test_a_release_is_its_files_not_a_window(tmp_path, capsys):
    """Rows of later files that are dated within an earlier release's time do not belong to it;
    eleven files are in the order of their numbers."""
    files = [[lcb_row(i, f"2024-01-{20 - i:02d}T00:00:00")] for i in range(1, 12)]
    write_release(tmp_path, *files)
    v5, _ = load("lcb_v5", tmp_path)
    said = capsys.readouterr().out
    assert numbers(v5) == [1, 2, 3, 4, 5]
    assert "lcb_v5: 5 problems of release v5 (test.jsonl to test5.jsonl), no window, dated " in said
    assert "dated 2024-01-15..2024-01-19" in said
    assert "the published release has 880, these files 5" in said
    v6, _ = load("lcb_v6", tmp_path)
    assert numbers(v6) == [1, 2, 3, 4, 5, 6]
    everything, _ = load("lcb_v6", tmp_path, release=11)
    assert numbers(everything) == list(range(1, 12))


def test_published_counts_are_met_without_a_word(tmp_path, capsys):
    """880 and 1,055 problems: 400, 111, 101, 101, 167 and 175 in a file."""
    sizes = [400, 111, 101, 101, 167, 175]
    files = []
    first = 0
    for size in sizes:
        files.append([lcb_row(first + i, private="[]") for i in range(size)])
        first += size
    write_release(tmp_path, *files)
    assert len(load("lcb_v5", tmp_path)[0]) == 880
    assert len(load("lcb_v6", tmp_path)[0]) == 1055
    said = capsys.readouterr().out
    assert "880 problems of release v5" in said and "1055 problems of release v6" in said
    assert "published" not in said and "NOT" not in said


def test_a_window_within_a_release_is_inclusive(tmp_path, capsys):
    days = ["2023-04-30", "2023-05-01", "2025-01-31", "2025-02-01"]
    write_release(tmp_path, [lcb_row(i, f"{day}T12:00:00") for i, day in enumerate(days)])
    window = dict(release=1, start="2023-05-01", end="2025-01-31")
    problems, _ = load("lcb_v5", tmp_path, **window)
    assert numbers(problems) == [1, 2]
    said = capsys.readouterr().out
    assert (
        "2 problems of release v1 (test.jsonl to test.jsonl), window 2023-05-01..2025-01-31" in said
    )
    assert "the published release has 400, these files 4" in said
    assert numbers(load("lcb_v5", tmp_path, release=1, start="2025-01-31")[0]) == [2, 3]
    assert numbers(load("lcb_v5", tmp_path, release=1, end="2023-05-01")[0]) == [0, 1]


def test_what_is_wrong_with_rows_is_counted_in_one_line(tmp_path, capsys):
    whole = lcb_row(1)
    lines = [
        whole,
        "",
        "   ",
        json.dumps(lcb_row(2))[:70],
        whole,
        lcb_row(3, None),
        lcb_row(4, ""),
        lcb_row(5, private=""),
        lcb_row(6, private="[]"),
        lcb_row(7, private=pack([])),
        lcb_row(8, private=None) | {"private_test_cases": None},
        lcb_row(9, private="[]", public=[]),
        "[1]",
        "null",
        "{}",
        lcb_row(10, question_id="q1"),  # another problem under the same name
        "\x00\x00",
    ]
    write_release(tmp_path, lines, [whole, lcb_row(11)])
    problems, _ = load("lcb_v5", tmp_path, release=2)
    assert numbers(problems) == [1, 3, 4, 5, 6, 7, 8, 10, 11]
    [line] = [x for x in capsys.readouterr().out.splitlines() if x.startswith("data ")]
    assert "9 problems of release v2" in line
    assert "2 without a date" in line
    assert "4 with public tests only" in line
    for part in (
        "2 x blank line",
        "2 x torn line",
        "2 x duplicate",
        "1 x problem without tests",
        "3 x line without a problem",
    ):
        assert part in line, part

    # in a window, a problem without a date is nowhere
    problems, _ = load("lcb_v5", tmp_path, release=2, start="2020-01-01")
    assert numbers(problems) == [1, 5, 6, 7, 8, 10, 11]
    assert "2 x problem without a date" in capsys.readouterr().out


def test_files_that_are_not_there(tmp_path, capsys):
    folder = write_release(tmp_path, [lcb_row(1)], [lcb_row(2)])
    problems, _ = load("lcb_v5", tmp_path)
    assert len(problems) == 2
    said = capsys.readouterr().out
    assert "NOT THE RELEASE: test3.jsonl, test4.jsonl, test5.jsonl not there" in said
    for path in folder.glob("*"):
        path.unlink()
    assert "no test.jsonl in" in refusal(capsys, "lcb_v5", tmp_path)
    assert "release = '5'" in refusal(capsys, "lcb_v5", tmp_path, release="5")


def test_a_window_is_for_what_has_dates(tmp_path, capsys):
    (tmp_path / "math500.json").write_text('[{"problem": "1", "answer": "1"}]')
    said = refusal(capsys, "math500", tmp_path, start="2024-01-01")
    assert "math500 has no dates" in said


def test_tests_of_livecodebench_by_stdin_and_by_call(tmp_path, verifier):
    """Private tests plain or packed; what only passes the public ones is wrong."""
    function = lcb_row(
        3,
        private=pack(CALLS),
        public=CALLS,
        starter_code="class Solution:\n    def twice(self, x: int) -> int:\n",
        metadata='{"func_name": "twice"}',
    )
    write_release(tmp_path, [lcb_row(1), lcb_row(2, private=json.dumps(HIDDEN)), function])
    problems, _ = load("lcb_v5", tmp_path, release=1)
    programs = [block("print(2 * int(input()))"), block("print(2 * abs(int(input())))")]
    for problem in problems[:2]:
        assert "from stdin" in problem["text"]
        assert rewards_of("lcb_v5", problem, programs, verifier) == [1.0, 0.0]
    assert "starter code" in problems[2]["text"] and "def twice" in problems[2]["text"]
    calls = [block(f"class Solution:\n    def twice(self, x): return {k} * x") for k in (2, 3)]
    assert rewards_of("lcb_v6", problems[2], calls, verifier) == [1.0, 0.0]


@pytest.mark.parametrize(
    "changes",
    [
        dict(private_test_cases="!" * 300),
        dict(private_test_cases=pack(HIDDEN * 99)[:-9]),
        dict(private_test_cases=base64.b64encode(b"x" * 300).decode()),
        dict(private_test_cases=base64.b64encode(zlib.compress(pickle.dumps(1))).decode()),
        dict(private_test_cases="[1, 2, 3]"),
        dict(public_test_cases="{"),
        dict(metadata="{"),
        dict(private_test_cases=7),
    ],
)
def test_tests_that_cannot_be_read_are_counted_with_the_failures(changes, tmp_path, verifier):
    write_release(tmp_path, [lcb_row(1, **changes), lcb_row(2)])
    broken, whole = load("lcb_v5", tmp_path, release=1)[0]
    found = record_of("lcb_v5", broken, [block("print(2 * int(input()))")], verifier)
    assert found["rewards"] == [0.0] and found["reasons"] == ["truth unparsable"]
    assert rewards_of("lcb_v5", whole, [block("print(2 * int(input()))")], verifier) == [1.0]


def test_no_metadata_is_no_function_name(tmp_path, verifier):
    write_release(tmp_path, [lcb_row(1, metadata=""), lcb_row(2, metadata=None)])
    for problem in load("lcb_v5", tmp_path, release=1)[0]:
        assert rewards_of("lcb_v5", problem, [block("print(2 * int(input()))")], verifier) == [1.0]


def test_the_digest_of_a_truth_is_of_all_tests(tmp_path):
    rows = [
        lcb_row(1),
        lcb_row(2, private=pack(HIDDEN * 2)),
        lcb_row(3, public=PUBLIC * 2),
        lcb_row(4, metadata='{"func_name": "f"}'),
        lcb_row(5),
    ]
    write_release(tmp_path, rows)
    digests = [problem["truth_digest"] for problem in load("lcb_v5", tmp_path, release=1)[0]]
    assert digests[0] == digests[4]
    assert len(set(digests)) == 4


# ==== 5. What training has seen =================================================================


@needs_data
def test_overlap_of_dapo_with_the_benchmarks():
    """The data set's notes: DAPO has problems of AMC, Olympiad, MATH500, none of AIME."""
    rows = read_rows(str(DATA / "dapo_math_17k.parquet"), "", "train")
    training = [row["prompt"][-1]["content"] for row in rows]
    found = {}
    for name in ("amc", "aime24", "aime25", "math500"):
        statements = [problem["statement"] for problem in load(name, DATA)[0]]
        found[name] = metrics.overlap(statements, training)
    assert found["aime24"] == found["aime25"] == (0, 0)
    assert 15 <= found["amc"][0] <= 36 <= found["amc"][1] <= 60
    assert 5 <= found["math500"][0] <= 11 <= found["math500"][1] <= 40


# ==== 6. Codeforces =============================================================================


def standings(rows, problems):
    """rows: [(handle, points, penalty, rating before, None for a guest)]."""
    return dict(
        problems=problems,
        rows=[[handle, points, lost] for handle, points, lost, _ in rows],
        ratings={handle: rating for handle, _, _, rating in rows if rating is not None},
    )


TWO = standings(
    [("a", 900, 0, 1500), ("b", 100, 0, 1500), ("guest", 5000, 0, None)],
    {"A": 500, "B": 1000},
)
FOUR = standings(
    [("a", 3, 50, 1100), ("b", 3, 60, 1900), ("c", 1, 10, 1100), ("d", 0, 0, 1900)],
    {"A": None, "B": None, "C": None},
)


@pytest.mark.parametrize(
    "submissions, rating",
    [
        ({"A": [True]}, 1500),  # 500: behind a, as likely as not; the unrated guest is nobody
        ({"A": [False, True]}, 1500),  # 450
        ({"A": [False] * 8 + [True]}, 0),  # the ninth does not count: rank 3, the lower end
        ({"A": [True], "B": [False] * 3 + [True]}, 1600),  # 500 + 850: rank 1, the upper end
    ],
)
def test_rating_where_problems_have_points(submissions, rating):
    """Two equals at 1500: to expect rank 2 is to beat one of two, m = 1500."""
    assert codeforces.contest_rating(TWO, submissions, 0) == pytest.approx(rating, abs=1e-6)


def test_rating_where_problems_have_none():
    def rate(submissions):
        return codeforces.contest_rating(FOUR, submissions, 0)

    # 2 solved, rank 3 of 4 at {1100, 1900} x 2: two of four are ahead, m = 1500 by symmetry
    assert rate({"A": [True], "B": [True]}) == pytest.approx(1500, abs=1e-6)
    # penalty 20 and 10, both behind c
    late = rate({"A": [False, True]})
    assert rate({"A": [False, False, True]}) == pytest.approx(late)
    # with rank r the sum of the four odds is r - 1
    odds = [1 / (1 + 10 ** ((late - rating) / 400)) for rating in (1100, 1900, 1100, 1900)]
    assert sum(odds) == pytest.approx(3) and late < 1500


def test_small_contests_have_no_rating():
    assert codeforces.contest_rating(FOUR, {}, least=4) is None
    assert codeforces.contest_rating(FOUR, {}, least=3) is not None


def test_percentile_counts_those_below():
    table = {"-5": 1, "0": 2, "100": 1}
    found = [codeforces.percentile(rating, table) for rating in (-9, -5, 0, 50, 100, 101)]
    assert found == [0, 0, 25, 75, 75, 100]


@needs_data
def test_percentile_of_the_shared_table():
    table = json.loads((DATA / "codeforces_ratings_2024.json").read_text())
    assert codeforces.percentile(1530, table) == pytest.approx(82.3, abs=0.05)


@pytest.mark.parametrize(
    "text",
    [
        "1873A",
        "1873/A",
        "CF1873A",
        "cf 1873 a",
        "1873_A",
        "1873-A",
        "codeforces_1873_A",
        "contest/1873/problem/A",
        "problemset/problem/1873/A",
        "https://codeforces.com/contest/1873/problem/A",
        "http://www.codeforces.com/problemset/problem/1873/A/",
    ],
)
def test_ids_in_the_ways_they_are_written(text):
    assert codeforces.read_id(text) == ("1873", "A")


def test_ids_of_more_than_a_letter_and_what_is_none():
    assert codeforces.read_id("1972D1") == codeforces.read_id("CF1972/d1") == ("1972", "D1")
    assert codeforces.read_id("921/01") == ("921", "01")
    for text in ("", "A", "1873", "1873AB", "abc301_a", "gym/100001/A", "1873A1B", None, 1873):
        assert codeforces.read_id(text) is None, text


def api_of_contest_7(path, body, count):
    """201 people of 1500, with 1000, 999, .. points; no other contest is known."""
    if "contestId=7&" not in path and not path.endswith("contestId=7"):
        return 400, {"status": "FAILED", "comment": "no such contest"}
    if "ratingChanges" in path:
        changes = [{"handle": f"h{i}", "oldRating": 1500} for i in range(201)]
        return 200, {"status": "OK", "result": changes}
    rows = []
    for i in range(201):
        rows.append(dict(party={"members": [{"handle": f"h{i}"}]}, points=1000 - i, penalty=0))
    rows.append(dict(party={"members": [{"handle": "unofficial"}]}, points=1, penalty=0))
    problems = [{"index": "A", "points": 500}, {"index": "B"}]
    return 200, {"status": "OK", "result": {"problems": problems, "rows": rows}}


def test_contests_come_from_the_api_once_and_then_from_the_cache(tmp_path):
    records = [dict(id="7A", rewards=[0.0, 1.0]), dict(id="9Z1", rewards=[1.0])]
    cache = tmp_path / "cache"
    with Server(api_of_contest_7) as server:
        url = server.url
        text = codeforces.rate(records, tmp_path, cache, url)
        asked = [path.split("?")[0] for path, _, _ in server.seen]
        assert asked == ["/contest.standings", "/contest.ratingChanges"] * 2
        assert "showUnofficial=false" in server.seen[0][0]
    # 450 points: rank 202 of 201 rated, the lower end; contest 9 is unknown
    assert text.startswith("rating 0, no percentile") and "1 of 2 contests" in text
    assert "Inflated" in text and "could not be read" not in text

    # the server is gone
    assert codeforces.rate(records, tmp_path, cache, url) == text
    more = [*records, dict(id="8A", rewards=[1.0])]
    assert "cannot be reached" in codeforces.rate(more, tmp_path, cache, url)

    # the same under other spellings, and beside ids that are none
    spelled = [dict(records[0], id="CF7/a"), dict(records[1], id="9_z1")]
    assert codeforces.rate(spelled, tmp_path, cache, url) == text
    strange = [*spelled, dict(id="abc", rewards=[1.0]), dict(id="", rewards=[1.0])]
    found = codeforces.rate(strange, tmp_path, cache, url)
    assert found == text + "; 2 ids could not be read (the first: 'abc')"
    assert "no id names a contest" in codeforces.rate(strange[2:], tmp_path, cache, url)

    # 1000 - 150 points: behind h0 .. h150. Among 201 equals of 1500 the odds of each being ahead
    # are 151/201: m = 1500 - 400 log10(151/50)
    contest = codeforces.contest("7", cache, url) | {"problems": {"A": 1000}}
    rating = codeforces.contest_rating(contest, {"A": [False] * 3 + [True]})
    assert rating == pytest.approx(1500 - 400 * math.log10(151 / 50))
