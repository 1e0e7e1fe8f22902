"""eval.py: metrics against enumeration and hand-computed values, every benchmark file, and the whole program on the tiny model with real vLLM."""
import base64, gzip, http.server, importlib.util, itertools, json, math, os, pickle, shutil, signal, threading, time, types, zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

import eval as ev
import verify
from harness import benchmarks, codeforces, metrics, responses, results
from harness.data import read_rows
from conftest import DATA, launch

BENCHES, TEMPLATES = benchmarks.read_tables(ev.SHARED)
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no data in {DATA}")


# Metrics

def test_pass_at_k_is_enumeration_and_exact_for_ten_thousand():
    for n in range(1, 8):
        for c in range(n + 1):
            outcomes = [1] * c + [0] * (n - c)
            curve = metrics.pass_curve(n, c)
            for k in range(1, n + 1):
                draws = list(itertools.combinations(outcomes, k))
                want = sum(map(any, draws)) / len(draws)
                assert ev.pass_at_k(n, c, k) == pytest.approx(want, abs=1e-15) and curve[k - 1] == pytest.approx(want, abs=1e-15)
    n = 10_000
    for c in (0, 1, 7, 5000, 9999, 10_000):
        curve = metrics.pass_curve(n, c)
        for k in (1, 2, 100, 3333, 9999, 10_000):
            want = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
            assert abs(Fraction(curve[k - 1]) - want) < Fraction(1, 10**12) and abs(Fraction(ev.pass_at_k(n, c, k)) - want) < Fraction(1, 10**12), (c, k)
    with pytest.raises(ValueError):
        ev.pass_at_k(4, 0, 5)


def test_bootstrap_interval_covers_what_theory_says():
    """For the mean of 400 coin flips of 0.3 the 95% interval is 0.3 -+ 1.96 sqrt(0.3 0.7/400); it is the same every time, and per column."""
    flips = np.array([1.0] * 120 + [0.0] * 280)
    low, high = metrics.interval(flips)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 400)
    assert low == pytest.approx(0.3 - half, abs=0.006) and high == pytest.approx(0.3 + half, abs=0.006)
    both = metrics.interval(np.stack([flips, np.full(400, 0.5)], 1))
    assert both[:, 0].tolist() == [low, high] and both[:, 1].tolist() == pytest.approx([0.5, 0.5])


def test_distinct_n():
    assert ev.distinct_n(["a b c d", "a b c e"], 3) == 3 / 4          # abc bcd | abc bce
    assert ev.distinct_n([[1, 2, 3], [1, 2, 3], [1, 2, 3]], 2) == 2 / 6
    assert ev.distinct_n([[7] * 10], 4) == 1 / 7 and math.isnan(ev.distinct_n(["a b"], 3))


def test_majority_counts_equal_numbers_as_one_answer():
    record = lambda texts, rewards: dict(answers=[responses.answer_key("math", t) for t in texts], rewards=rewards, settings=dict(kind="math"))
    half = ["so \\boxed{\\frac12}", "\\boxed{0.5}", "\\boxed{3}", "\\boxed{3} no, \\boxed{1/2}", "\\boxed{3}", "nothing"]
    assert metrics.majority(record(half, [1, 1, 0, 1, 0, 0])) == 1
    assert metrics.majority(record(half[:3] + half[4:5], [1, 1, 0, 0])) == 1    # two and two: the first given
    assert metrics.majority(record(half[2:] , [0, 1, 0, 0])) == 0 and metrics.majority(record(["none"], [0])) == 0
    assert metrics.majority(dict(answers=[""], rewards=[1], settings=dict(kind="code"))) is None


PROGRAM = '''
import heapq as hq
class Solution:
    """Says what it does."""
    def solve(self, xs, k):
        best = max(xs)          # a comment
        self.seen = [best]
        for i, x in enumerate(xs):
            hq.heappush(self.seen, x + i)
        return self.seen[:k]
'''


def test_programs_are_compared_up_to_names_and_layout():
    renamed = PROGRAM
    for old, new in [("hq", "h"), ("Solution", "S"), ("solve", "run"), ("xs", "values"), ("best", "top"), ("seen", "heap"), ("    ", "  "), ("          # a comment", ""),
                     ('"""Says what it does."""', "'other'")]:
        renamed = renamed.replace(old, new)
    same = lambda a, b: metrics.normal_form(a) == metrics.normal_form(b)
    assert renamed != PROGRAM and same(PROGRAM, renamed)
    for old, new in [("max(", "min("), ("heappush", "heappop"), ("x + i", "i + x"), ("[:k]", "[:k + 1]"), ("enumerate", "list")]:
        assert not same(PROGRAM, PROGRAM.replace(old, new)), old
    assert not same("a = 1\nb = 2\nprint(a)", "a = 1\nb = 2\nprint(b)")
    assert same("not python (", "not  python(") and not same("not python (", "no python (")
    assert responses.solution("code", "```python\nx = 1\n```\nbetter:\n```python\ny  = 2\n```") == metrics.normal_form("z=2")
    assert responses.solution("countdown", "<think>1+2</think> so <answer> 2 + 1 </answer>.") == "2+1"


def test_summary_of_two_problems_by_hand():
    base = dict(settings=dict(kind="math"), lengths=[1, 3], truncated=[False, True], solutions=["x", "y"], answers=["1", "2"], **{"dist-3": 0.5, "dist-4": None})
    s = metrics.summarize([{**base, "problem": 1, "rewards": [1.0, 1.0], "reasons": ["", ""]},
                      {**base, "problem": 0, "rewards": [0.0, 1.0], "reasons": ["timeout", ""], "dist-3": 0.25, "judged": {"j": 4}}])
    assert s["pass_at"].tolist() == [0.75, 1.0] and s["maj"] == 0.5 and s["distinct"] == 1.5 and s["dist"] == {"dist-3": 0.375, "dist-4": None}
    assert (s["length"], s["truncated"], s["reasons"], s["judge"]) == (2, 0.5, {"timeout": 1}, {"j": (4, 0)})


# CodeForces

def standings(rows, problems):
    return dict(problems=problems, rows=[[h, p, lost] for h, p, lost, _ in rows], ratings={h: r for h, _, _, r in rows if r is not None})


def test_rating_from_standings_computed_by_hand():
    """Two equals at 1500: expected rank 2 means beating one of two, m = 1500. Rank 3 of 4 at {1100, 1900} x 2: two of four ahead, m = 1500 by symmetry."""
    two = standings([("a", 900, 0, 1500), ("b", 100, 0, 1500), ("guest", 5000, 0, None)], {"A": 500, "B": 1000})
    rate = lambda submissions, found=two: codeforces.contest_rating(found, submissions, least=0)
    assert rate({"A": [True]}) == pytest.approx(1500, abs=1e-6)                        # 500: behind a; the unrated guest is nobody
    assert rate({"A": [False, True]}) == pytest.approx(1500, abs=1e-6)                 # 450
    assert rate({"A": [False] * 8 + [True]}) == pytest.approx(0, abs=1e-6)             # the ninth does not count: rank 3, the lower end
    assert rate({"A": [True], "B": [False, False, False, True]}) == pytest.approx(1600, abs=1e-6)   # 500 + 850: rank 1, the upper end
    four = standings([("a", 3, 50, 1100), ("b", 3, 60, 1900), ("c", 1, 10, 1100), ("d", 0, 0, 1900)], {"A": None, "B": None, "C": None})
    assert rate({"A": [True], "B": [True]}, four) == pytest.approx(1500, abs=1e-6)     # 2 solved
    assert rate({"A": [False, False, True]}, four) == pytest.approx(rate({"A": [False, True]}, four))    # penalty 20 and 10, both behind c
    # one solved without a fail (penalty 0) is ahead of c (10): rank 3 again; with rank r the sum of the four odds is r - 1
    m = rate({"A": [False, True]}, four)
    assert sum(1 / (1 + 10 ** ((m - r) / 400)) for r in (1100, 1900, 1100, 1900)) == pytest.approx(3) and m < 1500
    assert codeforces.contest_rating(four, {}, least=4) is None and codeforces.contest_rating(four, {}, least=3) is not None


def test_percentile_counts_those_below():
    assert [codeforces.percentile(r, {"-5": 1, "0": 2, "100": 1}) for r in (-9, -5, 0, 50, 100, 101)] == [0, 0, 25, 75, 75, 100]


@needs_data
def test_percentile_of_the_shared_table():
    assert codeforces.percentile(1530, json.loads((DATA / "codeforces_ratings_2024.json").read_text())) == pytest.approx(82.3, abs=0.05)


class Server(http.server.ThreadingHTTPServer):
    """A real HTTP server on a free port; answer(handler, path, body) -> (status, object)."""
    def __init__(self, answer):
        self.seen = []
        class Handler(http.server.BaseHTTPRequestHandler):
            def reply(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                self.server.seen.append((self.path, dict(self.headers), body))
                status, thing = answer(self.path, body, len(self.server.seen))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(thing).encode())
            do_GET = do_POST = reply
            log_message = lambda *_: None
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __exit__(self, *args):
        self.shutdown()
        super().__exit__(*args)


def test_contests_come_from_the_api_once_and_then_from_the_cache(tmp_path):
    people = [(f"h{i}", 1000 - i, 0, 1500) for i in range(201)]
    def answer(path, body, count):
        if "contestId=7" not in path:
            return 400, {"status": "FAILED", "comment": "no such contest"}
        rows = [{"party": {"members": [{"handle": h}]}, "points": p, "penalty": lost} for h, p, lost, _ in people + [("unofficial", 1, 0, None)]]
        changes = [{"handle": h, "oldRating": r} for h, _, _, r in people]
        result = {"problems": [{"index": "A", "points": 500}, {"index": "B"}], "rows": rows} if "standings" in path else changes
        return 200, {"status": "OK", "result": result}
    records = [dict(id="7A", rewards=[0.0, 1.0]), dict(id="9Z1", rewards=[1.0])]
    with Server(answer) as server:
        # 450 points: rank 202 of 201 rated, the lower end; contest 9 is unknown
        text = codeforces.rate(records, tmp_path, tmp_path / "cache", server.url)
        assert text.startswith("rating 0, no percentile") and "1 of 2 contests" in text and "Inflated" in text
        assert [p.split("?")[0] for p, _, _ in server.seen] == ["/contest.standings", "/contest.ratingChanges"] * 2 and "showUnofficial=false" in server.seen[0][0]
        url = server.url
    assert codeforces.rate(records, tmp_path, tmp_path / "cache", url) == text
    assert "cannot be reached" in codeforces.rate(records + [dict(id="8A", rewards=[1.0])], tmp_path, tmp_path / "cache", url)
    # 1000 - 150 points: behind h0 .. h150. Among 201 equals of 1500 the odds of each being ahead are 151/201: m = 1500 - 400 log10(151/50)
    found = codeforces.contest("7", tmp_path / "cache", url) | {"problems": {"A": 1000}}
    assert codeforces.contest_rating(found, {"A": [False] * 3 + [True]}) == pytest.approx(1500 - 400 * math.log10(151 / 50))


# Benchmarks

class Bytes:
    """A tokenizer of one token a byte: any text comes back as it was."""
    all_special_ids = ()
    def batch_decode(self, ids, skip_special_tokens):
        return [bytes(x).decode() for x in ids]


def record_of(name, problem, texts, verifier):
    settings = dict(kind=BENCHES[name]["kind"])
    return ev.make_record(settings, problem, [types.SimpleNamespace(token_ids=t.encode(), finish_reason="stop") for t in texts], Bytes(), verifier)


@pytest.fixture(scope="module")
def verifier():
    with verify.Verifier(2, 20.0) as v:
        yield v


MATH_FILES = {"math500": (500, set()), "aime24": (30, set()), "aime25": (30, set()), "amc": (83, set()), "minerva": (272, set()), "olympiad": (675, set())}


@needs_data
@pytest.mark.parametrize("name", MATH_FILES)
def test_gold_answers_score_one(name, verifier):
    """Every problem of the file, through loading, prompt, extraction, verifier and summary. Beside it the answer with something added, which is wrong."""
    problems, source = benchmarks.load_problems(name, BENCHES[name], TEMPLATES, DATA)
    count, cannot = MATH_FILES[name]
    assert len(problems) == count and str(DATA) in source
    gold = lambda p: str(p["truth"][0] if isinstance(p["truth"], list) else p["truth"]).strip()
    records = [record_of(name, p, [f"First \\boxed{{77777}}, no: \\boxed{{{gold(p)}}}.", "It is \\boxed{7.77777777}."], verifier) for p in problems]
    assert {p["number"] for p, r in zip(problems, records) if r["rewards"][0] != 1.0} == cannot
    assert sum(r["rewards"][1] for r in records) == 0
    assert all(p["statement"] in p["text"] and p["text"].endswith("put your final answer within \\boxed{}.") for p in problems)


@needs_data
@pytest.mark.parametrize("name, step", [("humaneval", 8), ("leetcode", 10)] + [pytest.param(name, 1, marks=pytest.mark.slow) for name in ("humaneval", "humaneval_plus", "leetcode")])
def test_canonical_programs_score_one(name, step, verifier):
    problems, source = benchmarks.load_problems(name, BENCHES[name], TEMPLATES, DATA)
    raw = [json.loads(line) for line in gzip.open(source, "rt")] if source.endswith("gz") else json.loads(Path(source).read_text())
    assert len(problems) == len(raw) == {"leetcode": 200}.get(name, 164)
    for p, row in list(zip(problems, raw))[::step]:
        program = row["solutions"] if name == "leetcode" else row["prompt"] + row["canonical_solution"]
        if "import sortedcontainers" in program.replace("from", "import") and not importlib.util.find_spec("sortedcontainers"):
            assert (name, p["number"]) == ("leetcode", 126)   # the one program that needs a package
            continue
        r = record_of(name, p, [f"Here:\n```python\n{program}\n```", "```python\npass\n```"], verifier)
        assert r["rewards"] == [1.0, 0.0], (p["number"], r["reasons"])


@needs_data
def test_programs_without_solutions_load(verifier):
    """codeforces.json and code_contests.json come without solutions: the first problem of each is solved here."""
    for name, count, program in [("codeforces", 408, "for _ in range(int(input())):\n    print(*sorted(map(int, input().split())))"),
                                 ("code_contests", 165, "n, m = map(int, input().split())\nrows = [input() for _ in range(n)]\n"
                                  "print(*sorted(range(1, n + 1), key=lambda i: [(-ord(c) if j % 2 else ord(c)) for j, c in enumerate(rows[i - 1])]))")]:
        problems, _ = benchmarks.load_problems(name, BENCHES[name], TEMPLATES, DATA)
        assert len(problems) == count and "from stdin" in problems[0]["text"] and problems[0]["text"].endswith("backticks)\n\n")
        r = record_of(name, problems[0], [f"```python\n{program}\n```", "```python\nprint(0)\n```"], verifier)
        assert r["rewards"] == [1.0, 0.0], r["reasons"]
    assert benchmarks.load_problems("codeforces", BENCHES["codeforces"], TEMPLATES, DATA)[0][11]["id"] == "1972D1"


@needs_data
def test_countdown_golds(verifier):
    problems, source = benchmarks.load_problems("countdown", BENCHES["countdown"], TEMPLATES, DATA)
    gold = [row["answer"] for row in read_rows(source, "", "train")]
    assert len(problems) == 1024 and all(str(p["truth"]["target"]) in p["text"] for p in problems)
    scores = verifier.score([("countdown", g, p["truth"]) for g, p in zip(gold, problems)])
    assert sum(scores) == 1024 and sum(verifier.score([("countdown", g, p["truth"]) for g, p in zip(gold[1:], problems)])) < 5


def make_hub(folder, rows, name="", split="test"):
    """A local copy of a hub data set: parquet files, with a README that names its configuration, as the hub has them."""
    import datasets
    (folder / "data").mkdir(parents=True)
    datasets.Dataset.from_list(rows).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: {name or 'default'}\n  data_files:\n  - split: {split}\n    path: data/{split}-*\n---\n")


@pytest.mark.parametrize("name, row, truth", [
    ("math500", {"problem": "1+1?", "solution": "2", "answer": "2", "subject": "Algebra", "level": 1, "unique_id": "t"}, "2"),
    ("aime24", {"id": 60, "problem": "1+1?", "solution": "\\boxed{2}", "url": "u"}, "\\boxed{2}"),
    ("aime25", {"problem": "1+1?", "answer": "2", "id": "0"}, "2"),
    ("amc", {"id": 0, "problem": "1+1?", "answer": 2.0, "url": "u"}, 2.0),
    ("minerva", {"question": "1+1?", "answer": "2"}, "2"),
    ("olympiad", {"id": 1, "question": "1+1?", "solution": ["s"], "final_answer": ["$2$"], "is_multiple_answer": False, "unit": None, "answer_type": "Numerical"}, ["$2$"]),
    ("gsm8k", {"question": "1+1?", "answer": "It is <<1+1=2>>2\n#### 2"}, "2")])
def test_hub_rows_load_from_a_folder_of_the_same_schema(name, row, truth, tmp_path, verifier, monkeypatch):
    import datasets
    table = BENCHES[name]
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")   # it takes folders of one name for one data set
    make_hub(tmp_path / "hub", [row] * 3, table.get("name"), table.get("split", "test"))
    problems, source = benchmarks.load_problems(name, table | {"hub": str(tmp_path / "hub")}, TEMPLATES, tmp_path / "nowhere", limit=2)
    assert [p["truth"] for p in problems] == [truth] * 2 and problems[0]["statement"] == "1+1?" and source == str(tmp_path / "hub")
    assert record_of(name, problems[0], ["\\boxed{2}", "\\boxed{3}"], verifier)["rewards"] == [1.0, 0.0]


def test_hub_programs_load_from_a_folder_of_the_same_schema(tmp_path, verifier, monkeypatch):
    import datasets
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    stub = "def add(a, b):\n    \"\"\"Sum.\"\"\"\n"
    test = "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(-1, 1) == 0\n"
    for name in ("humaneval", "humaneval_plus"):
        make_hub(tmp_path / name, [{"task_id": "t/0", "prompt": stub, "canonical_solution": "    return a + b\n", "test": test, "entry_point": "add"}])
        (p,), _ = benchmarks.load_problems(name, BENCHES[name] | {"hub": str(tmp_path / name)}, TEMPLATES, tmp_path / "nowhere")
        assert record_of(name, p, [f"```python\n{stub}    return a {op} b\n```" for op in "+-"], verifier)["rewards"] == [1.0, 0.0]
    make_hub(tmp_path / "cf", [{"problem": "Double it.", "tests": json.dumps([{"input": "4", "output": "8"}])}], "codeforces")
    (p,), _ = benchmarks.load_problems("codeforces", BENCHES["codeforces"] | {"hub": str(tmp_path / "cf")}, TEMPLATES, tmp_path / "nowhere")
    assert record_of("codeforces", p, [f"```python\nprint({k} * int(input()))\n```" for k in (2, 3)], verifier)["rewards"] == [1.0, 0.0]
    make_hub(tmp_path / "cd", [{"target": 24, "nums": [4, 6]}] * 4, split="train")
    problems, _ = benchmarks.load_problems("countdown", BENCHES["countdown"] | {"hub": str(tmp_path / "cd"), "split": "train[2:4]"}, TEMPLATES, tmp_path / "nowhere")
    assert len(problems) == 2 and record_of("countdown", problems[0], ["<answer>4*6</answer>", "<answer>24</answer>"], verifier)["rewards"] == [1.0, 0.0]


def test_livecodebench_window_and_packed_tests(tmp_path, verifier, capsys):
    """The repository's files: test.jsonl, test2.jsonl; private tests plain or pickled, compressed and in base64; by stdin and by function."""
    folder = tmp_path / "livecodebench"
    folder.mkdir()
    pack = lambda tests: base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()
    def row(date, private, starter="", metadata="{}", public=None):
        return json.dumps(dict(question_title="t", question_content=f"Double it ({date}).", platform="atcoder", question_id="q", contest_id="c", contest_date=date + "T00:00:00",
                               starter_code=starter, difficulty="easy", public_test_cases=json.dumps(public or [dict(input="2\n", output="4\n", testtype="stdin")]),
                               private_test_cases=private, metadata=metadata)) + "\n"
    hidden = [dict(input="-3\n", output="-6\n", testtype="stdin")]
    function = [dict(input="5", output="10", testtype="functional")]
    (folder / "test.jsonl").write_text(row("2023-04-30", "[]") + row("2023-05-01", pack(hidden)) + row("2025-01-31", json.dumps(hidden)))
    (folder / "test2.jsonl").write_text(row("2025-02-01", pack(function), "class Solution:\n    def twice(self, x: int) -> int:\n", '{"func_name": "twice"}', function) + row("2025-04-30", "[]")
                                        + row("2025-05-01", "[]"))
    v5, _ = benchmarks.load_problems("lcb_v5", BENCHES["lcb_v5"], TEMPLATES, tmp_path)
    v6, _ = benchmarks.load_problems("lcb_v6", BENCHES["lcb_v6"], TEMPLATES, tmp_path)
    assert [p["statement"][11:21] for p in v5] == ["2023-05-01", "2025-01-31"] and [p["statement"][11:21] for p in v6] == ["2023-05-01", "2025-01-31", "2025-02-01", "2025-04-30"]
    assert "lcb_v5: 2 problems in 2023-05-01..2025-01-31 inclusive, dated 2023-05-01..2025-01-31" in capsys.readouterr().out
    right, public_only = ("```python\nprint(2 * int(input()))\n```", "```python\nprint(2 * abs(int(input())))\n```")
    for p in v5:
        assert record_of("lcb_v5", p, [right, public_only], verifier)["rewards"] == [1.0, 0.0] and "from stdin" in p["text"]
    assert "starter code" in v6[2]["text"] and "def twice" in v6[2]["text"]
    assert record_of("lcb_v6", v6[2], [f"```python\nclass Solution:\n    def twice(self, x): return {k} * x\n```" for k in (2, 3)], verifier)["rewards"] == [1.0, 0.0]


def test_overlap_with_the_training_set():
    long = "one two three four five six seven eight nine ten eleven twelve thirteen"
    training = [f"Solve: {long.upper()}!", "What is 2 + 3?", long.replace("twelve", "x")]
    assert metrics.overlap([long, "what is 2+3", "is 2 + 3", "one two three", long + " " + " ".join("abcdefgh"), "unseen words here"], training) == (4, 2)


@needs_data
def test_overlap_of_dapo_with_the_benchmarks():
    """README of shared/data: DAPO has AMC, Olympiad and MATH500 problems, and none of AIME 2024 and 2025."""
    rows = read_rows(str(DATA / "dapo_math_17k.parquet"), "", "train")
    training, found = [row["prompt"][-1]["content"] for row in rows], {}
    for name in ("amc", "aime24", "aime25", "math500"):
        found[name] = metrics.overlap([p["statement"] for p in benchmarks.load_problems(name, BENCHES[name], TEMPLATES, DATA)[0]], training)
    assert found["aime24"] == found["aime25"] == (0, 0)
    assert 15 <= found["amc"][0] <= 36 <= found["amc"][1] <= 60 and 5 <= found["math500"][0] <= 11 <= found["math500"][1] <= 40


# The whole program

FLAGS = ["--bench", "tiny", "--samples", 8, "--limit", 24]


def lines(out):
    """{(settings, problem): the rest} of all lines, judges' too."""
    records = [json.loads(line) for path in sorted(Path(out).glob("*.jsonl")) for line in open(path)]
    keyed = {(json.dumps(r.pop("settings"), sort_keys=True), r["problem"], r.get("judge")): r for r in records}
    assert len(keyed) == len(records)
    return keyed


@pytest.fixture(scope="module")
def run_folder(random_model, tiny, tmp_path_factory):
    """A run directory as lad.py leaves it, of a model with random weights."""
    out = tmp_path_factory.mktemp("runs") / "r0"
    shutil.copytree(random_model, out / "hf")
    (out / "config.toml").write_text(f'data = "{tiny["train"]}"\ndata_name = ""\ndata_split = "train"\nprompt = "{{prompt}}"\nchat = false\nsystem = ""\n')
    (out / "metrics.jsonl").write_text("".join(json.dumps({"step": i, "reward": i / 10, "entropy": 1 - i / 10, "response_tokens": 5, "eval/pass@1": i / 10, "eval/pass@8": 0.5, "eval/distinct": 2}) + "\n"
                                               for i in range(4)))
    return out


@pytest.fixture(scope="module")
def evaluated(forks, run_folder, tmp_path_factory):
    """tiny and a run, in one command, with pictures. (As a user gives it: test_hub.py.)"""
    out = tmp_path_factory.mktemp("evals")
    return out, forks.run("eval.py", "tiny", run_folder, *FLAGS, "--out", out, "--plot")


def test_one_command_evaluates_two_models(forks, evaluated, run_folder, tiny):
    out, said = evaluated
    found = lines(out)
    assert len(found) == 2 * 24 and said.count("24 problems x 8 to do") == 2
    puzzles = [json.loads(line) for line in open(tiny["test"])]
    for (key, number, _), r in found.items():   # the rewards are the verifier's for these very responses; the lengths end with <eos>
        assert r["rewards"] == [verify.countdown_reward(t, puzzles[number]["answer"]) for t in r["responses"]] and r["statement"] == puzzles[number]["prompt"]
        assert all(n == 12 if cut else 1 <= n <= 12 for n, cut in zip(r["lengths"], r["truncated"])) and len(r["responses"]) == 8
    mine = [r for (key, *_), r in found.items() if json.loads(key)["model"] == "tiny"]
    avg, best = (100 * np.mean([f(r["rewards"]) for r in mine]) for f in (np.mean, max))
    grams = [[t[i:i + 3] for t in r["responses"] for i in range(len(t) - 2)] for r in mine]
    dist = np.mean([len(set(g)) / len(g) for g in grams])
    row = next(line for line in said.splitlines() if line.startswith("| tiny | 24 | 8 |")).split(" | ")
    assert avg > 0 and row[3].startswith(f"{avg:.1f} [") and row[6].startswith(f"{best:.1f} [") and row[8] == f"{dist:.3f}"
    assert f"{run_folder}, tiny: of 24 problems 0 stand in the training data" in said
    again = forks.run("eval.py", "--out", out)   # the table comes from the lines alone, no model is needed
    assert [x for x in again.splitlines() if x.startswith("|")] == [x for x in said.splitlines() if x.startswith("|")]


def test_pictures_show_both_models(evaluated):
    import matplotlib.image
    for name, colours in [("passk", 2), ("diversity", 2), ("training", 1)]:
        image = (matplotlib.image.imread(evaluated[0] / f"{name}.png")[..., :3] * 255).round().astype(int)
        for colour in [(31, 119, 180), (255, 127, 14)][:colours]:
            assert (np.abs(image - colour).max(-1) < 3).sum() > 50, (name, colour)


def of_tiny(records):
    return {key: record for key, record in records.items() if json.loads(key[0])["model"] == "tiny"}


def test_two_ranks_and_one_give_the_same_lines(forks, evaluated, tmp_path):
    forks.run("eval.py", "tiny", *FLAGS, "--out", tmp_path, ranks=2)
    assert of_tiny(lines(tmp_path)) == of_tiny(lines(evaluated[0])) and len(list(tmp_path.glob("*.jsonl"))) == 2


def test_killed_and_restarted_equals_never_killed(forks, evaluated, tmp_path):
    """SIGKILL after a few problems, a torn line left behind, files merged by cat, other settings beside them: the same lines in the end."""
    argv = ["tiny", *FLAGS, "--out", tmp_path]
    [pid] = forks.start("eval.py", [*argv, "--samples", 512])
    file = tmp_path / "tiny.tiny.0.jsonl"
    end = time.monotonic() + 600
    while not (file.exists() and file.read_bytes().count(b"\n") >= 3) and time.monotonic() < end:
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    codes, printed, _ = forks.wait()
    killed = file.read_bytes().count(b"\n")
    assert codes == [-signal.SIGKILL] and 3 <= killed < 24, printed
    whole = (evaluated[0] / "tiny.tiny.0.jsonl").read_bytes().splitlines(keepends=True)
    file.write_bytes(file.read_bytes() + b"".join(whole[:5]) + whole[5][:len(whole[5]) // 2])   # what a kill of the run with --n 8 leaves
    said = forks.run("eval.py", *argv)
    assert "19 problems x 8 to do" in said and "1 torn lines" in said
    shutil.copy(file, tmp_path / "copy.jsonl")   # merged twice: the same
    found = results.read(tmp_path, full=True)
    want = results.read(evaluated[0], full=True)
    key = next(k for k in want if json.loads(k)["model"] == "tiny")
    assert found[key] == want[key] and len(found) == 2   # --n 512 stands apart
    assert len(next(v for k, v in found.items() if k != key)) >= killed


def test_a_judge_behind_http(forks, evaluated, tmp_path):
    """A real server: busy once, then scores by what it reads; asked once for each problem, never again."""
    for path in evaluated[0].glob("*.jsonl"):
        shutil.copy(path, tmp_path)
    def answer(path, body, count):
        if count == 1:
            return 503, {}
        prompt = json.loads(body)["messages"][0]["content"]
        texts = [block.split("\n\n")[0].strip() for block in prompt.split(":\n")[2:]][:8]
        return 200, {"choices": [{"message": {"content": "They differ.\nScore: " + ("none" if count == 3 else str(1 + (len(set(texts)) > 4)))}}]}
    key = dict(OPENAI_API_KEY="secret")
    with Server(answer) as server:
        command = ["eval.py", "tiny", *FLAGS, "--limit", 6, "--out", tmp_path, "--judge", f"{server.url}/v1", "--judge_model", "j"]
        said = forks.run(*command, env=key)
        assert len(server.seen) == 7 and {p for p, _, _ in server.seen} == {"/v1/chat/completions"} and server.seen[1][1]["Authorization"] == "Bearer secret"
        assert json.loads(server.seen[1][2])["model"] == "j" and "Response 8:" in server.seen[1][2].decode()
        assert [x for x in forks.run(*command, env=key).splitlines() if x.startswith("|")] == [x for x in said.splitlines() if x.startswith("|")] and len(server.seen) == 7
    scores = [r["score"] for (_, _, judge), r in lines(tmp_path).items() if judge]
    known = [s for s in scores if s]
    assert len(scores) == 6 and len(known) == 5 and f" j {np.mean(known):.2f}" in said
    assert "eval.py: error: --judge" in forks.run("eval.py", "tiny", *FLAGS, "--limit", 6, "--out", tmp_path, "--judge", f"{server.url}/v1", "--judge_model", "other", code=2)


@pytest.mark.slow
def test_a_judge_in_vllm(evaluated, random_model, tmp_path):
    """A local model with random weights and room for the prompt: it gives no score, which is counted, and its replies are kept."""
    shutil.copytree(random_model, tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    for path in evaluated[0].glob("tiny*.jsonl"):
        shutil.copy(path, tmp_path)
    said = launch(["eval.py", "tiny", *FLAGS, "--limit", 4, "--out", tmp_path, "--judge", tmp_path / "model"]).stdout
    replies = [r for (_, _, judge), r in lines(tmp_path).items() if judge == str(tmp_path / "model")]
    assert len(replies) == 4 and all(r["reply"] and r["score"] is None for r in replies) and "(4 replies without a score)" in said


def test_bad_input_gets_one_clear_line(capsys, tmp_path, monkeypatch):
    (tmp_path / "bad.json").write_text('[{"problem": "1", "answer": "1"}, {"problem": "2"}]')
    monkeypatch.setitem(BENCHES, "bad", dict(file="bad.json", prompt="boxed", kind="math"))
    with pytest.raises(SystemExit):
        benchmarks.load_problems("bad", BENCHES["bad"], TEMPLATES, tmp_path)
    assert "bad.json, row 2: no field 'answer', which truth or eval_truth names; it has problem" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        benchmarks.load_problems("bad", BENCHES["bad"] | {"prompt": "{nosuch}"}, TEMPLATES, tmp_path)
    assert "row 1: the prompt template needs field 'nosuch'" in capsys.readouterr().err
    for argv, expected in [(["x", "--bench", "mth500"], "did you mean 'math500'"), (["x", "--n", "many"], "invalid int value: 'many'"), (["x", "--n", "0"], "at least 1"),
                           (["x", "--temperature", "hot"], "temperature = 'hot': expected float"), (["x", "--nosuch", "1"], "unrecognized arguments: --nosuch"), (["x", "--kind", "maths"], "did you mean 'math'"),
                           (["--out", str(tmp_path)], "no results to report"), (["x", "--bench", "leetcode", "--data", str(tmp_path)], "leetcode: no file")]:
        with pytest.raises(SystemExit) as stop:
            ev.main(argv)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1 and "error: " in err and expected in err, err


def test_a_model_that_is_none_and_a_run_that_is_not_finished(forks, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.toml").write_text("chat = false\n")
    for model, flags, expected in [(tmp_path / "run", [], "has not finished"), (tmp_path, [], "not a model"), ("tiny", ["--max_prompt_tokens", 5], "more than --max_prompt_tokens 5")]:
        said = forks.run("eval.py", model, *FLAGS, "--out", tmp_path / "out", *flags, code=2)
        assert expected in said.splitlines()[-1], said
