"""
eval.py: the papers' evaluation of any checkpoint, side by side.

    python eval.py tiny runs/tiny-lad-s0 --bench tiny --plot                             # before and after training
    python eval.py RUN Qwen/Qwen2.5-7B --bench math500,aime24,amc,minerva,olympiad --n 32
    torchrun --nproc_per_node=8 eval.py RUN --bench lcb_v6 --samples 16                  # data-parallel; torchrun takes --n for its own
    python eval.py --out evals --plot                                                    # the table again, and pictures

MODEL: a run directory of lad.py, a folder in Hugging Face's format, a hub name, or `tiny`. vLLM writes n responses to each problem, verify.py
scores them, each problem becomes one JSON line in --out as soon as it is finished. A line carries all its settings: files may be merged
with cat, an interrupted evaluation goes on where it stopped, other settings never mix. All that is printed or drawn comes from the lines.
Every response has a seed of its own, made of --seed, benchmark, problem and number: neither batch nor ranks nor interruptions change it. On a CPU
in fp32 the tokens are the same, bit for bit (a test); on a GPU in bf16 a kernel may round differently in another batch.
"""
import argparse, ast, base64, collections, concurrent.futures, dataclasses, gzip, hashlib, itertools, json, math, operator, os
import pickletools, re, socket, sys, time, tomllib, urllib.error, urllib.request, warnings, zlib
from functools import partial
from pathlib import Path
if __name__ == "__main__":   # read by OpenMP and by vLLM when they are imported, hence up here
    for key, value in dict(OMP_NUM_THREADS=str(min(16, len(os.sched_getaffinity(0)))), OMP_WAIT_POLICY="passive", VLLM_LOGGING_LEVEL="ERROR", TORCH_CPP_LOG_LEVEL="ERROR").items():
        os.environ.setdefault(key, value)
    warnings.filterwarnings("ignore", category=FutureWarning)

import numpy as np
from tqdm import tqdm
import lad, verify
from harness import ranks
from harness.data import field, find_model, read_rows
from harness.metrics import pass_at_k   # for whoever imports this file
from harness.ranks import print0
from harness.settings import checked, did_you_mean, die
HERE, CACHE, CODEFORCES = Path(__file__).resolve().parent, Path("~/.cache/lad").expanduser(), "https://codeforces.com/api"
# FlowRL's evaluation scripts, whose models and benchmarks are LAD's: temperature 0.6, top-p 0.95, 2,048 + 8,192 tokens. FADE: --temperature 1 --top_p 1
DEFAULTS = dict(temperature=0.6, top_p=0.95, max_prompt_tokens=2048, max_tokens=8192, device="auto", vllm_memory=0.85)
SHARED = ("seed temperature top_p max_tokens max_prompt_tokens prompt kind chat system device tensor_parallel vllm_memory vllm_seqs vllm_eager "
          "verify_workers verify_timeout").split()   # lad.py's knobs that are flags here and may stand in a benchmark's table
FIELDS = "hub name split file local ids problem truth truth_after start end".split()   # the table's own

def parse(argv, benches):
    """The flags. Those that are lad.py's knobs are checked as lad.py checks them and stand in .knobs if they were given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = lambda message: die(message + "; see python eval.py --help")
    parser.add_argument("models", nargs="*", metavar="MODEL", help="run directory, folder, hub name, or tiny; none: report what is in --out")
    parser.add_argument("--n", "--samples", type=int, default=32, help="responses to a problem (default 32)")
    parser.add_argument("--plot", action="store_true", help="draw passk.png, diversity.png and training.png in --out")
    for name, default, help in [("bench", "math500", "with commas between: " + ", ".join(benches)), ("limit", 0, "only the first so many problems; 0: all"),
                                ("out", "evals", "folder of the JSON lines and pictures"), ("judge_model", "gpt-4o", "the judge endpoint's model"),
                                ("data", os.environ.get("LAD_DATA", str(HERE / "shared/data")), "folder of benchmark files, looked into before the hub; $LAD_DATA"),
                                ("judge", "", "rates logical diversity: URL of an OpenAI-compatible endpoint (key: $OPENAI_API_KEY), or a model for vLLM")]:
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{help} (default {default!r})")
    for key in SHARED: parser.add_argument(f"--{key}", help=lad.KNOBS[key].metadata["help"].replace("%", "%%"))
    args = parser.parse_args(argv)
    args.knobs = checked({key: value for key in SHARED if (value := getattr(args, key)) is not None}, "command line", lad.KNOBS)
    for name in set(args.bench.split(",")) - set(benches):
        die(f"--bench {name}: no such benchmark{did_you_mean(name, benches)}")
    return args if args.n >= 1 and args.limit >= 0 else die(f"--n {args.n} --limit {args.limit}: expected at least 1 and 0")

# ==== 1. Benchmarks: rows from a local file or the hub, by the tables of configs.toml ===================================
def read_tables():
    """({benchmark: its table}, {name: prompt template}) of configs.toml."""
    tables = tomllib.loads((HERE / "configs.toml").read_text())["bench"]
    benches, templates = ({k: v for k, v in tables.items() if isinstance(v, kind)} for kind in (dict, str))
    for name, key in ((name, key) for name, table in benches.items() for key in [*table, *table.get("local", {})] if key not in FIELDS + SHARED):
        die(f"configs.toml, [bench.{name}]: unknown key {key!r}{did_you_mean(key, FIELDS + SHARED)}")
    return benches, templates

def read_bench(name, table, data):
    """(rows, source, table) of the local file where there is one, else of the hub."""
    source, file = table.get("hub"), Path(data, table.get("file", "-"))
    if table.get("file") == "tiny":
        from harness import tiny
        file = tiny.make()["test"]
    if file.exists():
        source, table = str(file), table | table.get("local", {})
    source or die(f"{name}: no file {file}; name the folder that has it: --data DIR")
    if "start" in table:
        return livecodebench(name, source, table["start"], table["end"]), source, table
    rows = [json.loads(x) for x in gzip.open(source, "rt")] if source.endswith(".gz") else read_rows(source, table.get("name", ""), table.get("split", "test"))
    return rows, source, table

def livecodebench(name, source, start, end):
    """Rows dated start..end, inclusive, of test*.jsonl (arXiv 2403.07974). Tests stay packed until they are used: unpacked, all are many GB."""
    try:
        from huggingface_hub import snapshot_download
        folder = Path(source if Path(source).is_dir() else snapshot_download(source, repo_type="dataset", allow_patterns="test*.jsonl"))
    except Exception as error:   # hub errors come in a dozen types
        die(f"cannot read {source!r}: {str(error).splitlines()[0]}; put its test*.jsonl into a folder livecodebench in --data")
    rows = enumerate((json.loads(line) for path in sorted(folder.glob("test*.jsonl")) for line in open(path)), 1)
    rows = [row for i, row in rows if start <= field(row, "contest_date", f"{source}, row {i}")[:10] <= end]
    days = [row["contest_date"][:10] for row in rows] or ["none"]
    print0(f"data      {name}: {len(rows)} problems in {start}..{end} inclusive, dated {min(days)}..{max(days)}")
    return rows
def livecodebench_tests(row):
    """Public and private tests as verify.py reads them. The private ones are a pickled string: it is picked out, nothing is unpickled."""
    private = row["private_test_cases"]
    if not private.startswith("["):
        private = next(value for _, value, _ in pickletools.genops(zlib.decompress(base64.b64decode(private))) if isinstance(value, str))
    return [test | {"metadata": json.loads(row["metadata"])} for test in json.loads(row["public_test_cases"]) + json.loads(private)]

def load_problems(name, table, templates, data, limit=0):
    """([{number, id, statement, text (the prompt), truth}], source). A row that lacks a field ends the program with its number."""
    rows, source, table = read_bench(name, table, data)
    ids = json.loads(path.read_text()) if (path := Path(data, table.get("ids", "-"))).exists() else collections.defaultdict(str)
    template, path, problems = templates.get(table["prompt"], table["prompt"]), table.get("truth", "answer"), []
    for number, row in enumerate(itertools.islice(rows, limit or None)):
        pick = lambda path: field(row, path, f"{source}, row {number + 1}")
        if "private_test_cases" in row:
            truth, row = partial(livecodebench_tests, row), row | {"problem": row["question_content"]}
        else:
            truth = {k: pick(v) for k, v in (pair.split("=") for pair in path.split(","))} if "=" in path else pick(path)
            truth = str(truth).rpartition(table["truth_after"])[2].strip() if "truth_after" in table else truth
        statement = pick(table.get("problem", "problem"))
        statement = str(statement[-1]["content"] if isinstance(statement, list) else statement)
        try:
            form = templates["starter" if row.get("starter_code") else "stdin"].format(**row)
            text = template.format(**{"format": form} | row | {"problem": statement})
        except (KeyError, IndexError) as error:
            die(f"{source}, row {number + 1}: the prompt template needs field {error}; it has {', '.join(row)}")
        problems.append(dict(number=number, id=ids[number], statement=statement, text=text, truth=truth))
    return problems, source

# ==== 2. Generating and scoring: one JSON line for each problem, as it finishes =========================================
def engine(cfg, folder, device):
    """vLLM with the folder's weights, awake."""
    # To take back the token of an unfinished prefill vLLM moves the generator's offset, which a CPU's has not: leave none unfinished
    llm = lad.start_vllm(cfg, folder, device, **dict(enable_chunked_prefill=False) if device.type == "cpu" else {})
    if device.type == "cuda":   # start_vllm leaves the weights asleep, and dropped: read them from the folder again
        llm.wake_up(["weights"]), llm.collective_rpc("reload_weights"), llm.wake_up(["kv_cache"])
    return llm
def encode(tokenizer, cfg, text):
    if cfg.chat:
        messages = [{"role": "system", "content": cfg.system}] * bool(cfg.system) + [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=not cfg.chat)["input_ids"]   # a chat template writes its own <bos>

def evaluate(llm, cfg, problems, settings, tokenizer, verifier, file):
    """n responses to each problem; a thread verifies and writes while vLLM goes on. Ranks of one engine pass the same problems, and all but one file = None."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams
    run, numbered, pending, title = llm.llm_engine, {str(p["number"]): p for p in problems}, collections.deque(), f"{settings['model']} {settings['bench']}"
    for number, p in numbered.items():   # vLLM gives response i the seed + i
        run.add_request(number, {"prompt_token_ids": p["prompt_ids"]}, SamplingParams(
            n=settings["n"], temperature=cfg.temperature, top_p=cfg.top_p, max_tokens=cfg.max_tokens, detokenize=False,
            seed=zlib.crc32(f"{cfg.seed} {settings['bench']} {number}".encode()), output_kind=RequestOutputKind.FINAL_ONLY))
    finish = lambda output: file and append(file, make_record(settings, numbered[output.request_id], output.outputs, tokenizer, verifier))
    with concurrent.futures.ThreadPoolExecutor(1) as thread, tqdm(total=len(problems), desc=title, unit="problem", disable=ranks.rank() > 0) as bar:
        while run.has_unfinished_requests() or pending:
            pending.extend(thread.submit(finish, output) for output in (run.step() if run.has_unfinished_requests() else ()))
            while pending and (pending[0].done() or not run.has_unfinished_requests()):
                bar.update(not pending.popleft().result())   # a verifier that cannot work ends the evaluation here

def make_record(settings, problem, outputs, tokenizer, verifier):
    """All that the table needs of one problem; `outputs` are its responses, as vLLM returns them."""
    kind, special = settings["kind"], set(tokenizer.all_special_ids)
    texts = tokenizer.batch_decode([list(o.token_ids) for o in outputs], skip_special_tokens=True)
    truth = problem["truth"]() if callable(problem["truth"]) else problem["truth"]
    rewards = verifier.score([(kind, text, truth) for text in texts])
    tokens = [[t for t in o.token_ids if t not in special] for o in outputs]
    groups = {"": tokens, " right": [t for t, r in zip(tokens, rewards) if r > 0.5]}
    return dict(settings=settings, problem=problem["number"], id=problem["id"], statement=problem["statement"], rewards=rewards, reasons=list(verifier.reasons),
                lengths=[len(o.token_ids) for o in outputs], truncated=[o.finish_reason == "length" for o in outputs], answers=[answer_key(kind, t) for t in texts],
                solutions=[hashlib.sha1(solution(kind, t).encode()).hexdigest()[:12] for t in texts],
                **{f"dist-{n}{name}": None if math.isnan(d := distinct_n(group, n)) else d for name, group in groups.items() for n in (3, 4)}, responses=texts)
def append(file, record):
    """One line, handed to the system before the next. What a kill tore stays a line of its own, which read_lines skips."""
    with open(file, "ab+") as f:
        torn = f.tell() and (f.seek(-1, 2), f.read(1))[1] != b"\n"
        f.write(("\n" * bool(torn) + json.dumps(record) + "\n").encode())

def read_lines(out, full=False):
    """{settings as JSON: {problem: record}} of all .jsonl files in a folder; a judge's score becomes its record's. `full` keeps the responses."""
    results, judged, torn = collections.defaultdict(dict), [], 0
    for line in (line for path in sorted(Path(out).glob("*.jsonl")) for line in open(path, errors="replace") if line.strip()):
        try:
            record = json.loads(line)
            key, number, _ = json.dumps(record["settings"], sort_keys=True), record["problem"], full or record.pop("responses", None)
            judged.append((key, number, record)) if "judge" in record else results[key].setdefault(number, record)
        except (ValueError, KeyError, TypeError):
            torn += 1
    for key, number, line in judged:
        if number in results[key]:
            results[key][number].setdefault("judged", {})[line["judge"]] = line["score"]
    print0(f"eval      {torn} torn lines in {out} skipped") if torn else None
    return {key: records for key, records in results.items() if records}

# ==== 3. Metrics: pure functions =======================================================================================
def pass_curve(n, c):
    """[pass@1, .., pass@n] of c right among n: lad.pass_at_k for every k, by one running product."""
    return [1 - miss for miss in itertools.accumulate((max(n - c - i, 0) / (n - i) for i in range(n)), operator.mul)]
def distinct_n(texts, n):
    """Unique n-grams / all n-grams of the texts together (lists of tokens; a string is split at white space). nan where there is no n-gram."""
    grams = [tuple(t[i: i + n]) for t in (t.split() if isinstance(t, str) else t for t in texts) for i in range(len(t) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan
def answer_key(kind, text):
    """What majority voting counts: a number's value, else the tidied spelling; "" where there is no answer."""
    answer = verify.find_answer(text, kind.partition(":")[2] or "boxed") if kind.startswith("math") else ""
    answer = verify.tidy(answer) if len(answer) <= 400 else ""
    return f"{number[0]}{'%' * number[2]}" if (number := verify.plain(answer)) else verify.squash(answer)
def majority(record):
    """Is the most frequent answer right? None where nothing is voted on."""
    votes = collections.Counter(filter(None, record["answers"])).most_common(1)   # among equals the first to appear
    return record["rewards"][record["answers"].index(votes[0][0])] if votes else 0.0 if record["settings"]["kind"].startswith("math") else None

def solution(kind, text):
    """The text of a response with which `distinct` compares it."""
    text = text.rpartition("</think>")[2]
    text = text.rpartition("<answer>")[2].partition("</answer>")[0] if kind == "countdown" else text
    blocks = re.findall(r"^[ \t]*```[ \t]*(?:python3?|py|Python)?[ \t]*\n(.*?)^[ \t]*```", text, re.S | re.M) if kind == "code" else []   # as verify.py
    return normal_form(blocks[-1]) if blocks else "".join(text.split())

SLOTS = {ast.Name: "id", ast.arg: "arg", ast.Attribute: "attr", ast.alias: "asname"} | dict.fromkeys([ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.ExceptHandler], "name")

def normal_form(program):
    """A program up to comments, docstrings, layout and the names it gives itself, which become v0, v1, ..; what is no Python: up to layout."""
    try:
        nodes, new = list(ast.walk(tree := ast.parse(program))), {}
        own = {getattr(x, SLOTS[type(x)]) for x in nodes if type(x) in SLOTS and not isinstance(getattr(x, "ctx", None), ast.Load)} - {None}
        for x in nodes:
            if (old := getattr(x, SLOTS.get(type(x), ""), None)) in own:
                setattr(x, SLOTS[type(x)], new.setdefault(old, f"v{len(new)}"))
            if isinstance(getattr(x, "body", None), list):
                x.body = [line for line in x.body if not (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))]
        return ast.dump(tree)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "".join(program.split())
def interval(values):
    """95% bootstrap interval of the mean over problems: (low, high) for each column of values [problems, ...]."""
    counts = np.random.default_rng(0).multinomial(len(values), np.full(len(values), 1 / len(values)), size=1000)   # how often each problem is drawn
    return np.percentile(counts @ np.asarray(values, dtype=float) / len(values), [2.5, 97.5], axis=0)

def summarize(records):
    """The numbers of one model on one benchmark."""
    records, n = sorted(records, key=lambda r: r["problem"]), len(records[0]["rewards"])
    curves = np.array([pass_curve(n, sum(x > 0.5 for x in r["rewards"])) for r in records])   # [problems, k]
    mean = lambda values: float(np.mean(known)) if (known := [x for x in values if x is not None]) else None
    flat = lambda key: [x for r in records for x in r[key]]
    scores = {j: [r["judged"][j] for r in records if j in r.get("judged", {})] for j in sorted({j for r in records for j in r.get("judged", {})})}
    return dict(problems=len(records), n=n, pass_at=curves.mean(0), interval=interval(curves), maj=mean(map(majority, records)),
                dist={key: mean(r[key] for r in records) for key in records[0] if key.startswith("dist-")},
                distinct=mean(len({s for s, x in zip(r["solutions"], r["rewards"]) if x > 0.5}) for r in records), judge={j: (mean(s), s.count(None)) for j, s in scores.items()},
                length=mean(flat("lengths")), truncated=mean(flat("truncated")), reasons=collections.Counter(filter(None, flat("reasons"))))

def overlap(statements, training):
    """(how many statements stand word for word in a training text, how many have at least half of their 10-word windows somewhere in the training)."""
    words = lambda text: re.findall(r"[a-z0-9]+", text.lower())
    windows = lambda w: {" ".join(w[i: i + 10]) for i in range(max(1, len(w) - 9))}
    training, statements = [words(text) for text in set(training)], list(map(words, statements))
    known, whole = set().union(*map(windows, training)), "|".join(f" {' '.join(w)} " for w in training)
    return sum(f" {' '.join(w)} " in whole for w in statements), sum(2 * len(w & known) >= len(w) for w in map(windows, statements))
def contamination(model, problems):
    """Lines on the overlap of a run's training data with each benchmark; none where the model is no run of lad.py."""
    notes, run = [], tomllib.loads(path.read_text()) if (path := Path(model, "config.toml")).exists() else {}
    try:
        rows = read_rows(run["data"], run["data_name"], run["data_split"]) if run else []
    except SystemExit:   # read_rows has said why
        return [f"{model}: its training data cannot be read here: no decontamination counts"]
    last = lambda v: v[-1]["content"] if isinstance(v, list) and v and isinstance(v[0], dict) and "content" in v[0] else v
    training = [run["prompt"].format(**{k: last(v) for k, v in row.items()}) for row in rows]
    for bench, (mine, _) in problems.items() if run else ():
        notes.append("{}, {}: of {} problems {} stand in the training data ({}) word for word, {} with at least half of their 10-word windows".format(
            model, bench, len(mine), *(counts := overlap([p["statement"] for p in mine], training))[:1], run["data"], counts[1]))
    return notes

# ==== 4. CodeForces rating, by CodeElo's procedure (arXiv 2501.01257) ==================================================
def contest(number, folder, api=CODEFORCES):
    """{problems: {index: points or None}, rows: [[handle, points, penalty]], ratings: {handle: rating before}} from folder or API; None: no such contest."""
    path = Path(folder, f"{number}.json")
    def get(call):
        time.sleep(2 * (api == CODEFORCES))   # its limit is a call in two seconds
        try:
            return json.load(urllib.request.urlopen(f"{api}/contest.{call}", timeout=60))["result"]
        except urllib.error.HTTPError as error:   # 400: {"status": "FAILED", ..}, it has no such contest
            return None if error.code == 400 else die(f"{api}/contest.{call}: {error}")
    if not path.exists():
        standings, changes = get(f"standings?contestId={number}&showUnofficial=false"), get(f"ratingChanges?contestId={number}")
        found = dict(problems={p["index"]: p.get("points") for p in standings["problems"]}, ratings={c["handle"]: c["oldRating"] for c in changes},
                     rows=[[row["party"]["members"][0]["handle"], row["points"], row["penalty"]] for row in standings["rows"]]) if standings and changes else None
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".new").write_text(json.dumps(found)) and path.with_suffix(".new").rename(path)
    return json.loads(path.read_text())

def contest_rating(found, submissions, least=200):
    """The rating at which a contestant expects the rank that these submissions get; None where at most `least` rated people took part.
    submissions: {index: [right or not, ..]}, of which the first 8 count. A problem gives max(0, points - 50 fails), or, where the contest has no
    points, 1 and a penalty of 10 a fail. The rank is counted from 1, behind everybody with the same score. The rating m solves
    1 + sum_i 1/(1 + 10^((m - old_i)/400)) = rank, in 0 .. max old_i + 100 as CodeElo looks for it (for rank 1 the solution is infinite)."""
    if len(rows := [row for row in found["rows"] if row[0] in found["ratings"]]) <= least:
        return None
    score = penalty = 0
    for index, points in found["problems"].items():
        if True in (tries := submissions.get(index, [])[:8]):
            fails = tries.index(True)
            score, penalty = (score + 1, penalty + 10 * fails) if points is None else (score + max(0, points - 50 * fails), penalty)
    rank = 1 + sum(points > score or (points == score and lost <= penalty) for _, points, lost in rows)
    old = np.array([found["ratings"][row[0]] for row in rows], dtype=float)
    low, high = 0.0, old.max() + 100
    for _ in range(60):   # the expected rank falls as m grows
        middle = (low + high) / 2
        low, high = (low, middle) if 1 + (1 / (1 + 10 ** ((middle - old) / 400))).sum() < rank else (middle, high)
    return low
def percentile(rating, table):
    """Share in % of the people in {rating: number of people} who are rated lower."""
    return 100 * sum(people for r, people in table.items() if int(r) < rating) / sum(table.values())

def codeforces(records, data, folder=CACHE / "codeforces", api=CODEFORCES, least=200):
    """One line: mean rating over contests, and percentile; or why there is none."""
    contests, table = collections.defaultdict(dict), Path(data, "codeforces_ratings_2024.json")
    for r in records:
        number, index = re.fullmatch(r"(\d+)(\w+)", r["id"]).groups()
        contests[number][index] = [x > 0.5 for x in r["rewards"]]
    try:
        found = {number: contest(number, folder, api) for number in tqdm(contests, desc="contest standings", unit="contest")}
    except OSError as error:
        return f"no rating: the standings of {len(contests)} contests are needed, not all are in {folder}, and {api} cannot be reached ({error})"
    ratings = [r for number, c in found.items() if c and (r := contest_rating(c, contests[number], least)) is not None]
    if not ratings:
        return f"no rating: none of {len(contests)} contests has more than {least} rated participants"
    place = f"percentile {percentile(np.mean(ratings), json.loads(table.read_text())):.1f} by {table.name}" if table.exists() else f"no percentile: no {table}"
    return (f"rating {np.mean(ratings):.0f}, {place}; mean over {len(ratings)} of {len(contests)} contests, at most 8 submissions a problem. Inflated where the tests "
            "are only the samples, as most of codeforces.json's are; problems of a contest that the file lacks count as unsolved")

# ==== 5. A judge of logical diversity, off by default ==================================================================
JUDGE = """You compare responses to one problem and rate how different they are in their logic: the key idea, the decomposition, the theorem or algorithm, the order of deduction. Ignore wording, length, notation, names, and whether the final answer is right. 1: all follow essentially the same reasoning. 2: the same approach with small changes in some steps. 3: a mix, with at least one clearly different step or idea. 4: several clearly different approaches. 5: nearly every response takes an approach of its own. Explain in at most three sentences, then end with one line: "Score: N".

Problem:
{problem}"""
def judge_prompt(record):   # its first 8 responses
    return JUDGE.format(problem=record["statement"]) + "".join(f"\n\nResponse {i}:\n{text[:4000]}" for i, text in enumerate(record["responses"][:8], 1))
def ask(url, model, prompt):
    """The reply of an OpenAI-compatible endpoint; asked again, later, where it is busy."""
    body = json.dumps(dict(model=model, messages=[dict(role="user", content=prompt)], temperature=0)).encode()
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if (key := os.environ.get("OPENAI_API_KEY")) else {})
    for wait in (1, 5, 20, None):
        try:
            with urllib.request.urlopen(urllib.request.Request(f"{url.rstrip('/')}/chat/completions", body, headers), timeout=300) as answer:
                return json.load(answer)["choices"][0]["message"]["content"]
        except (OSError, ValueError, LookupError) as error:   # HTTPError is an OSError
            wait and getattr(error, "code", 0) in (429, 500, 502, 503, 504) or die(f"--judge {url}, model {model}: {error}")
            time.sleep(wait)

def judge(args, records, cfg, device, out):
    """Append a line {settings, problem, judge, score, reply} for each record that has none of this judge."""
    name = args.judge_model if (remote := args.judge.startswith("http")) else args.judge
    todo = share(sorted((r for r in records if name not in r.get("judged", {})), key=lambda r: (r["settings"]["model"], r["settings"]["bench"], r["problem"])), cfg)
    def save(replies):
        for r, reply in zip(todo, tqdm(replies, total=len(todo), desc=f"judge {name}", unit="problem", disable=ranks.rank() > 0)):
            score = int(found[-1]) if (found := re.findall(r"(?i)score\W*([1-5])\b", reply or "")) else None
            append(out / f"judge.{slug(name)}.{ranks.rank()}.jsonl", dict(settings=r["settings"], problem=r["problem"], judge=name, score=score, reply=reply))
    if remote:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:   # map's results come in order, each as soon as it can
            save(pool.map(lambda r: ask(args.judge, name, judge_prompt(r)), todo))
    elif ranks.all_reduce([len(todo)], "max")[0]:
        from transformers import AutoTokenizer
        cfg = dataclasses.replace(cfg, model=args.judge, temperature=0.0, top_p=1.0, max_tokens=512)
        tokenizer = AutoTokenizer.from_pretrained(folder := find_model(cfg))
        cfg.chat = bool(tokenizer.chat_template)
        prompts = [encode(tokenizer, cfg, judge_prompt(r)) for r in todo]
        cfg.max_prompt_tokens = int(ranks.all_reduce([max(map(len, prompts), default=1)], "max")[0])
        groups = lad.generate(engine(cfg, folder, device), cfg, prompts, 1, cfg.seed, logprobs=False, progress=ranks.rank() == 0)
        save(tokenizer.decode(g[0]["tokens"], skip_special_tokens=True) for g in (groups if ranks.rank() % cfg.tensor_parallel == 0 else ()))

# ==== 6. Report: tables and pictures, from the JSON lines alone ========================================================
def labelled(results):
    """[(model, settings, records, summary)]; models evaluated twice are told apart by the settings that differ."""
    rows, out = [(json.loads(key), list(records.values())) for key, records in results.items()], []
    for one, records in rows:
        twins = [s for s, _ in rows if (s["model"], s["bench"]) == (one["model"], one["bench"])]
        differ = [f"{k} {one[k]}" for k in one if any(s.get(k) != one[k] for s in twins)]
        out.append((one["model"] + f" ({', '.join(differ)})" * bool(differ), one, records, summarize(records)))
    return out

def markdown(head, rows):
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in [head, ["---"] * len(head), *rows])
def show(rows, data, notes=()):
    """Models against benchmarks, then each benchmark in detail."""
    number = lambda x, form="{:.3f}", scale=1: "-" if x is None else form.format(scale * x)
    percent = lambda x, k: "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * v[k - 1] for v in (x["pass_at"], *x["interval"])))
    by_bench = {bench: [row for row in rows if row[1]["bench"] == bench] for bench in dict.fromkeys(s["bench"] for _, s, _, _ in rows)}
    cells = {(label, s["bench"]): percent(x, 1) for label, s, _, x in rows}
    parts = [markdown(["avg@n in %", *by_bench], [[label] + [cells.get((label, b), "-") for b in by_bench] for label in dict.fromkeys(row[0] for row in rows)])]
    for bench, mine in by_bench.items():
        lines, ks = [], [2 ** i for i in range(1, 15) if 2 ** i < max(x["n"] for *_, x in mine)]
        for label, _, records, x in mine:
            judges = "; ".join(f"{j} {number(v, '{:.2f}')}" + f" ({bad} replies without a score)" * bool(bad) for j, (v, bad) in x["judge"].items())
            lines.append([label, x["problems"], x["n"], percent(x, 1), *[number(x["pass_at"][k - 1], "{:.1f}", 100) if k <= x["n"] else "-" for k in ks], percent(x, x["n"]),
                          number(x["maj"], "{:.1f}", 100), *[number(x["dist"][f"dist-{k}"]) for k in ("3", "4", "3 right", "4 right")], number(x["distinct"], "{:.2f}"), judges or "-",
                          f"{x['length']:.1f}", number(x["truncated"], "{:.1f}", 100), ", ".join(f"{count} {reason}" for reason, count in x["reasons"].items()) or "-"])
        same = {k: sorted({str(s[k]) for _, s, _, _ in mine}) for k in ("temperature", "top_p", "max_tokens", "seed", "kind", "source", "tokenizer")}
        parts.append(f"{bench}: {'; '.join(k + ' ' + ' / '.join(v) for k, v in same.items())}. avg, pass, maj and truncated in %\n\n" + markdown(
            ["model", "problems", "n", "avg@n", *[f"pass@{k}" for k in ks], "pass@n", "maj@n", "dist-3", "dist-4", "dist-3 right", "dist-4 right", "distinct", "judge",
             "tokens", "truncated", "failures"], lines))
        parts += [f"{label}, {bench}: {codeforces(records, data)}" for label, _, records, _ in mine if all(r["id"] for r in records)]
    return "\n\n".join([*parts, *notes])

def plot(rows, out):
    """passk.png: pass@k against k, log axes, 95% bands. diversity.png: avg@n against dist-4. training.png: curves of the models that are runs of lad.py."""
    os.environ["MPLBACKEND"] = "Agg"   # no window
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
    colour = {label: f"C{i % 10}" for i, label in enumerate(dict.fromkeys(row[0] for row in rows))}
    runs = {s["model"]: [json.loads(line) for line in open(p)] for _, s, _, _ in rows if (p := Path(s["model"], "metrics.jsonl")).exists()}
    def passk(ax, bench):
        for label, _, _, x in (row for row in rows if row[1]["bench"] == bench):
            ax.plot(ks := np.arange(1, x["n"] + 1), x["pass_at"], "o-" if x["n"] <= 64 else "-", ms=2.5, color=colour[label], label=label)
            ax.fill_between(ks, *x["interval"], color=colour[label], alpha=0.15, lw=0)
        few = FuncFormatter(lambda v, _: f"{v:g}" if f"{v:e}"[0] in "1235" else "")
        ax.set(xscale="log", yscale="log", xlabel="k", ylabel="pass@k")
        ax.xaxis.set(major_locator=LogLocator(2), major_formatter="{x:g}", minor_formatter=NullFormatter()), ax.yaxis.set(major_formatter=few, minor_formatter=few)
    def diversity(ax, bench):
        for label, _, _, x in (row for row in rows if row[1]["bench"] == bench and row[3]["dist"]["dist-4"] is not None):
            ax.errorbar(x["dist"]["dist-4"], x["pass_at"][0], np.abs(x["interval"][:, :1] - x["pass_at"][0]), fmt="o", capsize=3, color=colour[label], label=label)
        ax.set(xlabel="dist-4 (diversity)", ylabel="avg@n (accuracy)", xmargin=0.15, ymargin=0.15)
    def training(ax, key):
        for i, (model, lines) in enumerate(runs.items()):
            points = np.array([(x["step"], x[key]) for x in lines if key in x]).reshape(-1, 2)
            ax.plot(*points.T, "o-" if key.startswith("eval/") else "-", ms=3, lw=1.2, color=f"C{i % 10}", label=model)
        ax.set_xlabel("rollout batch")
    benches, keys = list(dict.fromkeys(s["bench"] for _, s, _, _ in rows)), {k: 0 for lines in runs.values() for x in lines for k in x if k.startswith("eval/")}
    for draw, titles in [(passk, benches), (diversity, benches)] + [(training, ["reward", "entropy", "response_tokens", *keys])] * bool(runs):
        high, wide = -(-len(titles) // 3), min(len(titles), 3)
        fig, axes = plt.subplots(high, wide, figsize=(4.4 * wide, 3.6 * high), squeeze=False, layout="constrained")
        for ax, title in itertools.zip_longest(axes.flat, titles):
            draw(ax, title) if title else ax.set_visible(False)
            ax.set_title(title), ax.grid(alpha=0.3, which="both")
        fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=wide, fontsize=8, frameon=False)
        fig.savefig(out / f"{draw.__name__}.png", dpi=160)
        print(f"plot      {out / draw.__name__}.png")
# ==== 7. main ==========================================================================================================
slug = lambda name: re.sub(r"[^\w.-]+", "_", name).strip("_")
share = lambda items, cfg: items[ranks.rank() // cfg.tensor_parallel:: ranks.world() // cfg.tensor_parallel]   # ranks that share an engine are one replica
def resolve(model, cfg):
    """(folder of the weights, a hash of config.json and of 1 MB of each file: no training step leaves those as they were, config of the run or {})."""
    run = tomllib.loads(path.read_text()) if (path := Path(model, "config.toml")).exists() else {}
    folder = Path(model, "hf") if run else Path(find_model(dataclasses.replace(cfg, model=model)))
    if not (folder / "config.json").exists():
        die(f"{model}: no {folder}/config.json" + (f": the run has not finished; go on with: python lad.py --resume {model}" if run else ": not a model"))
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as f:
            digest.update(f.read(1 << 20) if f.seek(path.stat().st_size // 2) else b"")
    return str(folder), digest.hexdigest()[:12], run
def restart():
    """vLLM gives all its memory back only when its process ends. What is done is on disk, so begin anew: finished work will be skipped."""
    with socket.create_server(("", 0)) as free:   # torchrun's store keeps the keys of this round: the next one gets its own, at a port of rank 0's choice
        port = int(ranks.all_reduce([free.getsockname()[1] if ranks.rank() == 0 else 0], "max")[0])
    time.sleep(1)   # nobody may still be inside the all_reduce
    os.environ.update(MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="False")
    "MASTER_ADDR" in os.environ or os.environ.pop("RANK")   # set by set_up, not by torchrun
    sys.stdout.flush()
    os.execv(sys.executable, sys.orig_argv)

def main(argv):
    benches, templates = read_tables()
    args = parse(argv, benches)
    out, wanted, used = Path(args.out), {}, False
    if args.models:
        tables = {name: benches[name] | args.knobs for name in args.bench.split(",")}
        knobs = {name: checked({k: v for k, v in table.items() if k in SHARED}, f"configs.toml, [bench.{name}]", lad.KNOBS) for name, table in tables.items()}
        problems = {name: load_problems(name, table, templates, args.data, args.limit) for name, table in tables.items()}
        cfg = lad.Config(**DEFAULTS | args.knobs | dict(prompts=int(os.environ.get("WORLD_SIZE", 1))))
        cfg.config = "eval.py"
        device = ranks.join(cfg)
        from transformers import AutoTokenizer
        out.mkdir(parents=True, exist_ok=True)
        done = read_lines(out), ranks.dist.barrier()   # every rank has read what was done before any writes more
    for model in args.models:   # write what is missing
        folder, weights, run = resolve(model, cfg)
        tokenizer, work = AutoTokenizer.from_pretrained(folder), []
        for bench, (rows, source) in problems.items():
            now = lad.Config(**DEFAULTS | dict(chat=run.get("chat", bool(tokenizer.chat_template)), system=run.get("system", "")) | knobs[bench])
            settings = dict(model=model.rstrip("/"), weights=weights, bench=bench, source=Path(source).name if Path(source).exists() else source, n=args.n,
                            **{k: getattr(now, k) for k in ("temperature", "top_p", "max_tokens", "seed", "kind", "prompt", "chat", "system", "verify_timeout")},
                            window=[tables[bench].get("start"), tables[bench].get("end")], tokenizer=f"{type(tokenizer).__name__}, {len(tokenizer)} tokens")
            key = json.dumps(settings, sort_keys=True)
            wanted[key] = {p["number"] for p in rows}
            todo = [dict(p, prompt_ids=encode(tokenizer, now, p["text"])) for p in rows if p["number"] not in done[0].get(key, {})]
            if (long := max((len(p["prompt_ids"]) for p in todo), default=0)) > now.max_prompt_tokens:
                die(f"{bench}: a prompt has {long} tokens, more than --max_prompt_tokens {now.max_prompt_tokens}")
            work += [(now, todo, settings)] if todo else []
        if work:
            used and restart()
            used, longest = True, max((now for now, *_ in work), key=lambda c: c.max_prompt_tokens + c.max_tokens)
            llm, writes = engine(longest, folder, device), ranks.rank() % cfg.tensor_parallel == 0
            with verify.Verifier(longest.verify_workers, longest.verify_timeout) as verifier:
                for now, todo, settings in work:
                    print0(f"eval      {model}, {settings['bench']}: {len(todo)} problems x {args.n} to do")
                    evaluate(llm, now, share(todo, cfg), settings, tokenizer, verifier, out / f"{slug(model)}.{settings['bench']}.{ranks.rank()}.jsonl" if writes else None)
            ranks.dist.barrier()
    pick = lambda results: {k: {n: r for n, r in results.get(k, {}).items() if n in numbers} for k, numbers in wanted.items()} if args.models else results
    if args.models and args.judge:
        used and not args.judge.startswith("http") and restart()
        judge(args, [r for records in pick(read_lines(out, full=True)).values() for r in records.values()], cfg, device, out)
        ranks.dist.barrier()
    if os.environ.get("RANK", "0") == "0":
        rows = labelled(pick(read_lines(out))) or die(f"no MODEL is given and {out} has no results to report; see python eval.py --help")
        print("\n" + (text := show(rows, args.data, [note for model in args.models for note in contamination(model, problems)])) + "\n", flush=True)
        (out / "table.md").write_text(text + "\n")
        plot(rows, out) if args.plot else None

if __name__ == "__main__":
    main(sys.argv[1:])
