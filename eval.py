"""
eval.py: the papers' evaluation of any checkpoint, side by side.

    python eval.py tiny runs/tiny-lad-s0 --bench tiny --plot    # before and after training
    python eval.py RUN Qwen/Qwen2.5-7B --bench math500,aime24,amc,minerva,olympiad --n 32
    torchrun --nproc_per_node=8 eval.py RUN --bench lcb_v6 --samples 16
    python eval.py --out evals --plot                           # the table again, and pictures

(--samples is --n, which torchrun takes for its own.)

MODEL: a run directory of lad.py, a folder in Hugging Face's format, a hub name, or `tiny`. vLLM
writes n responses to each problem, verify.py scores them, each problem becomes one JSON line in
--out as soon as it is finished. A line carries all its settings: files may be merged with cat, an
interrupted evaluation goes on where it stopped, other settings never mix. All that is printed or
drawn comes from the lines.

Every response has a seed of its own, made of --seed, benchmark, problem and number: neither batch
nor ranks nor interruptions change it. On a CPU in fp32 the tokens are the same, bit for bit (a
test); on a GPU in bf16 a kernel may round differently in another batch.
"""

# ruff: noqa: E402 (some settings go before the imports that read them)
import argparse
import concurrent.futures
import contextlib
import dataclasses
import datetime
import json
import math
import os
import re
import signal
import socket
import sys
import tempfile
import time
import tomllib
import warnings
import zlib
from collections import deque
from pathlib import Path

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:  # python -I and PYTHONSAFEPATH leave out a script's own folder
    sys.path.insert(0, str(HERE))


def stop_early(*_):
    """Ctrl-C while Python imports, which takes some seconds."""
    print("eval.py: stopped while starting; nothing was asked yet", file=sys.stderr, flush=True)
    os._exit(130)


if __name__ == "__main__":  # OpenMP and vLLM read these when they are imported, hence up here
    os.environ.setdefault("OMP_NUM_THREADS", str(min(16, len(os.sched_getaffinity(0)))))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    warnings.filterwarnings("ignore", category=FutureWarning)
    signal.signal(signal.SIGINT, stop_early)

import numpy as np
from tqdm import tqdm

import lad
import verify
from harness import (
    benchmarks,
    codeforces,
    command,
    digest,
    judge,
    ranks,
    results,
    rewards,
    vllm_options,
)
from harness.data import chat_options, find_model, is_chat, read_rows
from harness.metrics import distinct_n, overlap, summarize, words
from harness.metrics import pass_at_k as pass_at_k  # for whoever imports this file
from harness.ranks import print0
from harness.responses import answer_key, response_texts, solution_key, text_key
from harness.settings import checked, did_you_mean, die, one_line, program

# ==== 1. Flags ==================================================================================

# FlowRL's evaluation scripts, whose models and benchmarks are LAD's: temperature 0.6, top-p 0.95,
# 2,048 + 8,192 tokens. FADE: --temperature 1 --top_p 1
DEFAULTS = dict(
    temperature=0.6,
    top_p=0.95,
    max_prompt_tokens=2048,
    max_tokens=8192,
    device="auto",
    vllm_memory=0.85,
)

# lad.py's knobs that are flags here and may stand in a benchmark's table
SHARED = ("seed", "temperature", "top_p", "max_tokens", "max_prompt_tokens", "prompt", "kind")
SHARED += ("chat", "system", "device", "tensor_parallel", "vllm_memory", "vllm_seqs", "vllm_eager")
SHARED += ("verify_workers", "verify_timeout", "reward", "chat_options", "vllm")

# What is said of those that mean something else here than in training
HELP = dict(
    seed="of sampling",
    temperature="of sampling (default 0.6)",
    top_p="nucleus sampling (default 0.95)",
    max_tokens="of a response (default 8192)",
    max_prompt_tokens="a longer prompt ends the program (default 2048)",
    prompt="template over a row's fields, or the name of one: boxed, program, function",
    reward="FILE.py:function, a reward of your own in place of the benchmark's: docs/rewards.md",
)


def parse(argv, benches):
    """The flags. Those that are lad.py's knobs are checked as lad.py checks them and stand in
    .knobs if they were given."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = refuse_flags
    add_flags(parser, benches)
    args = parser.parse_args(argv)

    given = {key: getattr(args, key) for key in SHARED if getattr(args, key) is not None}
    args.knobs = checked(given, "command line", lad.KNOBS)
    vllm_options.read(args.knobs.get("vllm", ""))
    args.bench = args.bench.split(",")
    for name in args.bench:
        if name not in benches:
            die(f"--bench {name}: no such benchmark{did_you_mean(name, benches)}")
    if args.n < 1 or args.limit < 0:
        die(f"--n {args.n} --limit {args.limit}: expected at least 1 and 0")
    if args.judge_rubric not in judge.RUBRICS:
        hint = did_you_mean(args.judge_rubric, judge.RUBRICS)
        die(f"--judge_rubric {args.judge_rubric}: no such rubric{hint}")
    args.window = {key: day(args, key) for key in ("start", "end") if getattr(args, key)}
    return args


def day(args, key):
    """A day as LiveCodeBench writes it."""
    text = getattr(args, key)
    try:
        return datetime.date.fromisoformat(text).isoformat()
    except ValueError:
        die(f"--{key} {text}: expected a day, as 2024-08-01")


def refuse_flags(message):
    die(f"{message}; see python eval.py --help")


def add_flags(parser, benches):
    def add(name, default, help):
        help = f"{help} (default {default!r})".replace("%", "%%")
        parser.add_argument(f"--{name}", type=type(default), default=default, help=help)

    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help="run directory, folder, hub name, tiny or tiny-hard; none: report what is in --out",
    )
    parser.add_argument(
        "--n", "--samples", type=int, default=32, help="responses to a problem (default 32)"
    )
    parser.add_argument(
        "--plot",
        action="store_true",
        help="draw passk.png, diversity.png and training.png in --out",
    )
    add("bench", "math500", f"with commas between: {', '.join(benches)}")
    add("limit", 0, "only the first so many problems; 0: all")
    add("out", "evals", "folder of the JSON lines and pictures")
    data = os.environ.get("LAD_DATA", str(HERE / "shared/data"))
    add("data", data, "folder of benchmark files, looked into before the hub; $LAD_DATA")
    add(
        "judge",
        "",
        "rates logical diversity: URL of an OpenAI-compatible endpoint (key: $OPENAI_API_KEY), "
        "or a model for vLLM",
    )
    add("judge_model", "gpt-4o", "the judge endpoint's model")
    add("judge_rubric", "logic", f"what the judge is asked: {', '.join(judge.RUBRICS)}")
    add("start", "", "LiveCodeBench: only problems of contests from this day on, as 2024-08-01")
    add("end", "", "LiveCodeBench: only problems of contests up to this day, and on it")
    for key in SHARED:
        help = HELP.get(key, lad.KNOBS[key].metadata["help"])
        parser.add_argument(f"--{key}", help=help.replace("%", "%%"))


# ==== 2. Generating and scoring =================================================================
# One JSON line for each problem, as it finishes.


def engine(cfg, folder, device):
    """vLLM with the folder's weights, awake."""
    options = {}
    if device.type == "cuda":
        options["kv_cache_memory_bytes"] = None  # nobody trains beside it: what vLLM measures
    else:
        # Requests have seeds of their own here. To take back the token of a prefill that was cut,
        # vLLM moves the request's generator's offset, which a CPU's has not: so none is cut
        options["enable_chunked_prefill"] = False
    llm = lad.start_vllm(cfg, folder, device, **options)
    if device.type == "cuda":
        # start_vllm leaves the weights asleep, and dropped: read them from the folder again
        llm.wake_up(["weights"])
        llm.collective_rpc("reload_weights")
        llm.wake_up(["kv_cache"])
    return llm


def render(tokenizer, cfg, text):
    """(a prompt as the model gets it, in the chat template if cfg says so, its token ids)."""
    if cfg.chat:
        messages = [{"role": "user", "content": text}]
        if cfg.system:
            messages = [{"role": "system", "content": cfg.system}, *messages]
        text = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False, **chat_options(cfg)
        )
    # a chat template writes its own <bos>
    return text, tokenizer(text, add_special_tokens=not cfg.chat)["input_ids"]


def answer(llm, cfg, problems, settings, tokenizer, verifier, file):
    """n responses to each problem; a thread verifies and writes while vLLM goes on. Ranks of one
    engine pass the same problems, and all but one of them file = None."""
    # All problems to the engine, which schedules them
    run = llm.llm_engine
    numbered = {str(problem["number"]): problem for problem in problems}
    for number, problem in numbered.items():
        prompt = {"prompt_token_ids": problem["prompt_ids"]}
        run.add_request(number, prompt, sampling(cfg, settings, number))

    def finish(output):
        if file:
            problem = numbered[output.request_id]
            kind = lad.scored_by(cfg)
            record = make_record(settings, problem, output.outputs, tokenizer, verifier, kind)
            results.append(file, record)

    # Step by step; what is finished goes to the thread
    title = f"{settings['model']} {settings['bench']}"
    bar = tqdm(total=len(problems), desc=title, unit="problem", disable=ranks.rank() > 0)
    pending = deque()
    with concurrent.futures.ThreadPoolExecutor(1) as thread, bar, told_of_stopping(pending):
        while run.has_unfinished_requests() or pending:
            if run.has_unfinished_requests():
                for output in run.step():
                    pending.append(thread.submit(finish, output))
            while pending and (pending[0].done() or not run.has_unfinished_requests()):
                pending[0].result()  # a verifier that cannot work ends the evaluation here
                pending.popleft()
                bar.update()


@contextlib.contextmanager
def told_of_stopping(pending):
    """Ctrl-C: what vLLM has finished is still verified and written; once more, and it is not."""
    try:
        yield
    except KeyboardInterrupt:
        left = sum(not future.done() for future in pending)
        if left:
            print0(
                f"\neval      {left} more problems are verified and saved; Ctrl-C leaves at once"
            )
        raise


def sampling(cfg, settings, number):
    """vLLM's parameters for a problem. It gives response i the seed + i."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    return SamplingParams(
        n=settings["n"],
        temperature=cfg.temperature,
        top_p=cfg.top_p,
        max_tokens=cfg.max_tokens,
        detokenize=False,
        seed=zlib.crc32(f"{cfg.seed} {settings['bench']} {number}".encode()),
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def make_record(settings, problem, outputs, tokenizer, verifier, scored_by=""):
    """All that the table needs of one problem; `outputs` are its responses, as vLLM returns
    them. scored_by: the verifier's kind, where that is not what tells solutions apart."""
    kind = settings["kind"]
    tokens = [list(output.token_ids) for output in outputs]
    texts = response_texts(tokenizer, problem["prompt"], tokens)
    truth = problem["truth"]
    if callable(truth):
        truth = truth()
    scores = verifier.score([(scored_by or kind, text, truth) for text in texts])
    record = dict(
        settings=settings,
        problem=problem["number"],
        asked=problem["asked"],
        id=problem["id"],
        statement=problem["statement"],
        rewards=scores,
        reasons=list(verifier.reasons),
        lengths=[len(response) for response in tokens],
        truncated=[output.finish_reason == "length" for output in outputs],
        answers=[answer_key(kind, text) for text in texts],
        solutions=[digest.digest(solution_key(kind, text)) for text in texts],
        texts=[digest.digest(text_key(text)) for text in texts],
        **diversity_of(tokens, scores, set(tokenizer.all_special_ids)),
        responses=texts,
    )
    if problem["replaces"]:
        record["replaces"] = problem["replaces"]
    return record


def diversity_of(tokens, rewards, special):
    """{dist-3, dist-4} of the responses to a problem, and of its right ones; None where they are
    too short for it."""
    words = [[t for t in response if t not in special] for response in tokens]
    right = [response for response, reward in zip(words, rewards, strict=True) if reward > 0.5]
    found = {}
    for name, group in (("", words), (" right", right)):
        for n in (3, 4):
            value = distinct_n(group, n)
            found[f"dist-{n}{name}"] = None if math.isnan(value) else value
    return found


# ==== 3. What training has seen =================================================================


def contamination(model, loaded):
    """Lines on the overlap of a run's training data with each benchmark; none where the model is
    no run of lad.py."""
    run = read_run(model)
    if not run:
        return []
    try:
        rows = read_rows(run["data"], run["data_name"], run["data_split"])
    except SystemExit:  # read_rows has said why
        return [f"{model}: its training data cannot be read here: no decontamination counts"]

    training = [run["prompt"].format(**last_messages(row)) for row in rows]

    notes = []
    for name, bench in loaded.items():
        statements = [row["statement"] for row in bench["rows"]]
        verbatim, half = overlap(statements, training)
        note = (
            f"{model}, {name}: of {len(statements)} problems {verbatim} stand in the training data "
            f"({run['data']}) word for word, {half} with at least half of their 10-word windows"
        )
        wordless = sum(not words(statement) for statement in statements)
        if wordless:
            note += f"; {wordless} have no word to compare"
        notes.append(note)
    return notes


def last_messages(row):
    """A row in which the last message stands for a chat."""
    return {key: value[-1]["content"] if is_chat(value) else value for key, value in row.items()}


def read_run(model):
    """The config of a run of lad.py; {} where the model is none."""
    path = Path(model, "config.toml")
    if not path.exists():
        return {}
    return tomllib.loads(path.read_text())


# ==== 4. A judge in vLLM ========================================================================


def rate_diversity(args, records, cfg, device, out):
    """Append a line {settings, problem, judge, score, reply} for each record that has none of
    this judge."""
    # Problems without a score of this judge, this rank's share
    is_remote = args.judge.startswith("http")
    model = args.judge_model if is_remote else args.judge
    rubric = args.judge_rubric
    name = judge.judge_name(model, rubric)
    todo = [record for record in records if name not in record.get("judged", {})]
    todo = share(sorted(todo, key=place), cfg)
    file = out / f"judge.{slug(name)}.{ranks.rank()}.jsonl"

    def save(replies):
        title = f"judge {name}"
        bar = tqdm(replies, title, len(todo), unit="problem", disable=ranks.rank() > 0)
        for record, reply in zip(todo, bar, strict=False):
            line = dict(
                settings=record["settings"],
                problem=record["problem"],
                asked=record["asked"],
                judge=name,
                score=judge.read_score(reply, rubric),
                reply=reply,
            )
            results.append(file, line)

    def ask(record):
        return judge.ask(args.judge, model, judge.judge_prompt(record, rubric))

    if is_remote:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            save(pool.map(ask, todo))  # they come in order, each as soon as it can
    elif ranks.all_reduce([len(todo)], "max")[0]:
        save(judge_in_vllm(model, rubric, todo, cfg, device))


def place(record):
    return record["settings"]["model"], record["settings"]["bench"], record["problem"]


def judge_in_vllm(model, rubric, todo, cfg, device):
    """Replies to the records' prompts; none on a rank that only lends its GPU to its engine."""
    from transformers import AutoTokenizer

    # The judge as a model of its own, greedy
    length = judge.RUBRICS[rubric].max_tokens
    cfg = dataclasses.replace(cfg, model=model, temperature=0.0, top_p=1.0, max_tokens=length)
    folder = find_model(cfg)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    cfg.chat = bool(tokenizer.chat_template)

    # Prompts, and room for the longest of any rank
    prompts = [render(tokenizer, cfg, judge.judge_prompt(record, rubric))[1] for record in todo]
    longest = max((len(ids) for ids in prompts), default=1)
    cfg.max_prompt_tokens = int(ranks.all_reduce([longest], "max")[0])
    llm = engine(cfg, folder, device)
    groups = lad.generate(
        llm, cfg, prompts, 1, cfg.seed, logprobs=False, progress=ranks.rank() == 0
    )
    if ranks.rank() % cfg.tensor_parallel:
        return []
    return [tokenizer.decode(group[0]["tokens"], skip_special_tokens=True) for group in groups]


# ==== 5. Report: tables and pictures, from the JSON lines alone =================================


def labelled(found):
    """[(label, settings, records, summary)] of {settings as JSON: {place: record}}; models
    evaluated twice are told apart by the settings that differ."""
    rows = [(json.loads(key), list(records.values())) for key, records in found.items()]
    out = []
    for settings, records in rows:
        twins = [other for other, _ in rows if same_place(other, settings)]
        differ = []
        for key, value in settings.items():
            if any(twin.get(key, "") != value for twin in twins):
                differ.append(f"{key} {shortened(value) or 'none'}")
        label = settings["model"]
        if differ:
            label += f" ({', '.join(differ)})"
        out.append((label, settings, records, summarize(records)))
    return out


def shortened(value):
    """A setting, in a cell of a table."""
    text = " ".join(str(value).replace("|", "/").split())
    return text if len(text) <= 40 else text[:37] + "..."


def same_place(one, other):
    return (one["model"], one["bench"]) == (other["model"], other["bench"])


def in_order(names):
    """Each once, as they come."""
    return list(dict.fromkeys(names))


def show(rows, data, notes=()):
    """Models against benchmarks, then each benchmark in detail, in markdown."""
    benches = in_order(settings["bench"] for _, settings, _, _ in rows)
    parts = [overview(rows, benches)]
    for bench in benches:
        mine = [row for row in rows if row[1]["bench"] == bench]
        parts.append(detail(bench, mine))
        for label, _, records, _ in mine:
            if any(record["id"] for record in records):
                parts.append(f"{label}, {bench}: {codeforces.rate(records, data)}")
    return "\n\n".join([*parts, *notes])


def overview(rows, benches):
    cells = {(label, settings["bench"]): percent(x, 1) for label, settings, _, x in rows}
    lines = []
    for label in in_order(row[0] for row in rows):
        lines.append([label] + [cells.get((label, bench), "-") for bench in benches])
    return markdown(["avg@n in %", *benches], lines)


def detail(bench, rows):
    """A benchmark's settings, and a line for each model."""
    # Columns: pass@2, 4, 8, .. below the largest n
    largest = max(x["n"] for _, _, _, x in rows)
    ks = [2**i for i in range(1, 15) if 2**i < largest]
    dists = ["dist-3", "dist-4", "dist-3 right", "dist-4 right"]
    head = ["model", "problems", "n", "avg@n", *[f"pass@{k}" for k in ks], "pass@n", "maj@n"]
    head += [*dists, "distinct", "distinct texts", "judge", "tokens", "truncated", "failures"]
    lines = []
    for label, _, _, x in rows:
        curve = [number(x["pass_at"][k - 1], 1, 100) if k <= x["n"] else "-" for k in ks]
        line = [label, x["problems"], x["n"], percent(x, 1), *curve, percent(x, x["n"])]
        line.append(number(x["maj"], 1, 100))
        line += [number(x["dist"][key], 3) for key in dists]
        line += [number(x["distinct"], 2), number(x["distinct_texts"], 2), show_judges(x["judge"])]
        line += [number(x["length"], 1), number(x["truncated"], 1, 100)]
        line.append(", ".join(f"{n} {reason}" for reason, n in x["reasons"].items()) or "-")
        lines.append(line)
    return show_settings(bench, rows) + "\n\n" + markdown(head, lines)


def show_settings(bench, rows):
    parts = []
    for key in ("temperature", "top_p", "max_tokens", "seed", "kind", "source", "tokenizer"):
        values = sorted({str(settings.get(key, "-")) for _, settings, _, _ in rows})
        parts.append(f"{key} {' / '.join(values)}")
    for label, settings, _, x in rows:
        if "reward" in settings:
            parts.append(f"{label}: reward {settings['reward']}, mean {x['reward']:.3f}")
    return f"{bench}: {'; '.join(parts)}. avg, pass, maj and truncated in %"


def show_judges(judges):
    parts = []
    for name, (score, missing) in judges.items():
        part = f"{name} {number(score, 2)}"
        if missing:
            part += f" ({missing} replies without a score)"
        parts.append(part)
    return "; ".join(parts) or "-"


def number(x, digits, scale=1):
    return "-" if x is None else f"{scale * x:.{digits}f}"


def percent(x, k):
    """pass@k of a summary and its interval, in %."""
    low, high = x["interval"]
    values = [100 * curve[k - 1] for curve in (x["pass_at"], low, high)]
    return "{:.1f} [{:.1f}, {:.1f}]".format(*values)


def markdown(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def plot(rows, out):
    """passk.png, diversity.png, and, of models that are runs of lad.py, training.png."""
    benches = in_order(settings["bench"] for _, settings, _, _ in rows)
    draw_panels(out / "passk.png", benches, rows, draw_passk)
    draw_panels(out / "diversity.png", benches, rows, draw_diversity)
    runs = {}
    for model in in_order(settings["model"] for _, settings, _, _ in rows):
        path = Path(model, "metrics.jsonl")
        if path.exists():
            runs[model] = [json.loads(line) for line in open(path)]
    if runs:
        keys = in_order(key for lines in runs.values() for line in lines for key in line)
        keys = [key for key in keys if key.startswith("eval/")]
        titles = ["reward", "entropy", "response_tokens", *keys]
        draw_panels(out / "training.png", titles, runs, draw_training)


def draw_panels(path, titles, what, draw):
    """A picture with a panel for each title, three in a row, drawn by draw(ax, title, what)."""
    os.environ["MPLBACKEND"] = "Agg"  # no window
    import matplotlib.pyplot as plt

    high = math.ceil(len(titles) / 3)
    wide = min(len(titles), 3)
    size = (4.4 * wide, 3.6 * high)
    fig, axes = plt.subplots(high, wide, figsize=size, squeeze=False, layout="constrained")
    panels = list(axes.flat)
    for ax, title in zip(panels, titles, strict=False):
        draw(ax, title, what)
        ax.set_title(title)
        ax.grid(alpha=0.3, which="both")
    for ax in panels[len(titles) :]:
        ax.set_visible(False)
    names = panels[0].get_legend_handles_labels()
    fig.legend(*names, loc="outside lower center", ncols=wide, fontsize=8, frameon=False)
    fig.savefig(path, dpi=160)
    print(f"plot      {path}")


def colours(labels):
    """The same model has the same colour in every panel."""
    return {label: f"C{i % 10}" for i, label in enumerate(in_order(labels))}


def draw_passk(ax, bench, rows):
    """pass@k against k, log axes, 95% bands."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    colour = colours(row[0] for row in rows)
    for label, settings, _, x in rows:
        if settings["bench"] != bench:
            continue
        ks = np.arange(1, x["n"] + 1)
        style = "o-" if x["n"] <= 64 else "-"
        ax.plot(ks, x["pass_at"], style, ms=2.5, color=colour[label], label=label)
        ax.fill_between(ks, *x["interval"], color=colour[label], alpha=0.15, lw=0)

    @FuncFormatter
    def few(value, _):
        """1, 2, 3 and 5 of each decade have their number."""
        return f"{value:g}" if f"{value:e}"[0] in "1235" else ""

    ax.set(xscale="log", yscale="log", xlabel="k", ylabel="pass@k")
    ax.xaxis.set(
        major_locator=LogLocator(2), major_formatter="{x:g}", minor_formatter=NullFormatter()
    )
    ax.yaxis.set(major_formatter=few, minor_formatter=few)


def draw_diversity(ax, bench, rows):
    """avg@n against dist-4."""
    colour = colours(row[0] for row in rows)
    for label, settings, _, x in rows:
        diversity = x["dist"]["dist-4"]
        if settings["bench"] != bench or diversity is None:
            continue
        average = x["pass_at"][0]
        error = np.abs(x["interval"][:, :1] - average)
        ax.errorbar(diversity, average, error, fmt="o", capsize=3, color=colour[label], label=label)
    ax.set(xlabel="dist-4 (diversity)", ylabel="avg@n (accuracy)", xmargin=0.15, ymargin=0.15)


def draw_training(ax, key, runs):
    """A metric against the step."""
    colour = colours(runs)
    style = "o-" if key.startswith("eval/") else "-"
    for model, lines in runs.items():
        points = [(line["step"], line[key]) for line in lines if key in line]
        steps = [step for step, _ in points]
        values = [value for _, value in points]
        ax.plot(steps, values, style, ms=3, lw=1.2, color=colour[model], label=model)
    ax.set_xlabel("rollout batch")


# ==== 6. main ===================================================================================


def slug(name):
    """A name as part of a file's name, which does not begin with a dot: ../e/m1 is e_m1."""
    return re.sub(r"[^\w.-]+", "_", name).strip("._")


def share(items, cfg):
    """This rank's: ranks that share an engine are one replica."""
    first = ranks.rank() // cfg.tensor_parallel
    return items[first :: ranks.world() // cfg.tensor_parallel]


def resolve(model, cfg):
    """(folder of the weights, their digest, config of the run or {})."""
    run = read_run(model)
    if run:
        folder = Path(model, "hf")
    else:
        folder = Path(find_model(dataclasses.replace(cfg, model=model)))
    if not (folder / "config.json").exists():
        why = ": not a model"
        if run:
            why = f": the run has not finished; go on with: python lad.py --resume {model}"
        die(f"{model}: no {folder}/config.json{why}")
    # One rank reads them, and tells the others
    value = int(digest.of_weights(folder), 16) if ranks.rank() == 0 else 0
    value = int(ranks.all_reduce([value], "max")[0])
    return str(folder), f"{value:012x}", run


def restart():
    """vLLM gives all its memory back only when its process ends. What is done is on disk, so
    begin anew: finished work will be skipped."""
    # torchrun's store keeps the keys of this round: the next one gets its own, at a port that
    # rank 0 chooses
    with socket.create_server(("", 0)) as free:
        mine = free.getsockname()[1] if ranks.rank() == 0 else 0
        port = int(ranks.all_reduce([mine], "max")[0])
    time.sleep(1)  # nobody may still be inside the all_reduce
    os.environ.update(MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="False")
    if "MASTER_ADDR" not in os.environ:  # RANK was set by ranks.join, not by torchrun
        del os.environ["RANK"]
    sys.stdout.flush()
    os.execv(sys.executable, sys.orig_argv)


def settings_of(args, model, weights, name, bench, tokenizer, cfg):
    """What tells one evaluation of a benchmark from another."""
    source = bench["source"]
    settings = dict(
        model=model.rstrip("/"),
        weights=weights,
        bench=name,
        source=Path(source).name if Path(source).exists() else source,
        n=args.n,
    )
    for key in ("temperature", "top_p", "max_tokens", "seed", "kind", "chat", "system"):
        settings[key] = getattr(cfg, key)
    settings["prompt"] = bench["template"]
    settings["chat_template"] = digest.digest(tokenizer.chat_template) if cfg.chat else ""
    if cfg.chat_options:
        settings["chat_options"] = cfg.chat_options
    if cfg.vllm:
        settings["vllm"] = cfg.vllm
    settings["verify_timeout"] = cfg.verify_timeout
    if cfg.reward:  # by what it says, wherever it is
        path, function = rewards.split(cfg.reward)
        settings["reward"] = f"{path.name}:{function} {digest.digest(path.read_bytes())}"
    for key in ("release", "start", "end"):
        settings[key] = bench["table"].get(key, "")
    kind = type(tokenizer).__name__
    settings["tokenizer"] = f"{kind}, {len(tokenizer)} tokens, {digest.of_tokenizer(tokenizer)}"
    return settings


def missing(args, model, cfg, loaded, done, wanted):
    """(folder of the model, its tokenizer, [(config, problems without a line, settings)]). The
    places that the report will want are added to `wanted`, {key of the settings: places}."""
    from transformers import AutoTokenizer

    folder, weights, run = resolve(model, cfg)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    of_model = dict(
        chat=run.get("chat", bool(tokenizer.chat_template)),
        system=run.get("system", ""),
        chat_options=run.get("chat_options", ""),
    )
    work = []
    for name, bench in loaded.items():
        # The config of this model on this benchmark
        knobs = {key: value for key, value in bench["table"].items() if key in SHARED}
        knobs = checked(knobs, f"configs.toml, [bench.{name}]", lad.KNOBS)
        now = lad.Config(**DEFAULTS | of_model | knobs)
        settings = settings_of(args, model, weights, name, bench, tokenizer, now)

        # Its problems, as they are asked, and which of them have no line
        key = results.key_of(settings)
        rows = [ask_for(row, tokenizer, now) for row in bench["rows"]]
        wanted[key] = {results.place_of(row) for row in rows}
        todo = unanswered(rows, done.get(key, {}))
        for row in todo:
            size = len(row["prompt_ids"])
            if size > now.max_prompt_tokens:
                die(
                    f"{name}: a prompt has {size} tokens, more than --max_prompt_tokens "
                    f"{now.max_prompt_tokens}"
                )
        if todo:
            work.append((now, todo, settings))
    return folder, tokenizer, work


def ask_for(row, tokenizer, cfg):
    """A problem as a model is asked it: with its prompt's token ids and the digest that it is
    known by."""
    prompt, ids = render(tokenizer, cfg, row["text"])
    asked = digest.of_question(ids, row["truth_digest"])
    return dict(row, problem=row["number"], prompt=prompt, prompt_ids=ids, asked=asked)


def unanswered(rows, records):
    """The problems that have no line, each with the digests of what was asked under its number
    before."""
    before = {}
    for number, asked in records:
        if asked is not None:
            before.setdefault(number, []).append(asked)
    todo = []
    for row in rows:
        others = before.get(row["number"], [])
        if row["asked"] not in others:
            todo.append(dict(row, replaces=sorted(others)))
    return todo


def room(work):
    """The config that asks most of vLLM."""
    configs = [now for now, _, _ in work]
    return max(configs, key=lambda now: now.max_prompt_tokens + now.max_tokens)


def evaluate(args, model, folder, tokenizer, work, cfg, device):
    """Write the missing lines of a model."""
    largest = room(work)
    llm = engine(largest, folder, device)
    writes = ranks.rank() % cfg.tensor_parallel == 0
    with verify.Verifier(largest.verify_workers, largest.verify_timeout) as verifier:
        for now, todo, settings in work:
            bench = settings["bench"]
            print0(f"eval      {model}, {bench}: {len(todo)} problems x {args.n} to do")
            file = Path(args.out, f"{slug(model)}.{bench}.{ranks.rank()}.jsonl")
            mine = share(todo, cfg)
            answer(llm, now, mine, settings, tokenizer, verifier, file if writes else None)
    ranks.dist.barrier()


def make_folder(out):
    """--out, made if need be; one line where it cannot be used."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        die(f"--out {str(out)[:200]}: {error.strerror}; name a folder that can be written")


def report(args, found, notes):
    """Print and write table.md; the pictures, if they are asked for."""
    out = Path(args.out)
    rows = labelled(found)
    if not rows:
        die(f"no MODEL is given and {out} has no results to report; see python eval.py --help")
    text = show(rows, args.data, notes)
    print(f"\n{text}\n", flush=True)
    try:
        (out / "table.md").write_text(text + "\n", encoding="utf-8")
        if args.plot:
            plot(rows, out)
    except OSError as error:
        die(f"{out}: {one_line(error)}; the table above is whole, not all of it is on disk")


def with_reward(name, table):
    """A benchmark's table, the file of its reward of one's own as every process finds it."""
    if table.get("reward"):
        try:
            return table | {"reward": rewards.find(table["reward"])}
        except ValueError as error:
            die(error)
    if table.get("kind") == "text":
        die(f"{name}: kind = text says only how solutions are told apart: it needs a --reward")
    return table


def run(args, benches, templates):
    out = Path(args.out)
    if not args.models:
        found = results.read(out) if os.path.isdir(out) else {}
        report(args, results.latest(found), ())
        return

    # The problems, and all else that is cheap to refuse, before anything that takes long
    make_folder(out)
    loaded = {}
    for name in args.bench:
        table = with_reward(name, benches[name] | args.knobs | args.window)
        rows, source = benchmarks.load_problems(name, table, templates, args.data, args.limit)
        template = templates.get(table["prompt"], table["prompt"])
        loaded[name] = dict(table=table, rows=rows, source=source, template=template)
    size = dict(prompts=int(os.environ.get("WORLD_SIZE", 1)))
    cfg = lad.Config(**DEFAULTS | args.knobs | size)
    cfg.config = "eval.py"
    device = ranks.join(cfg)
    vllm_options.check_environment(device, trains=False)
    done = results.read(out)
    old = results.without_question(done)
    if old:
        print0(
            f"eval      {old} lines in {out} are of an older eval.py, which did not say what was "
            "asked: they are not used"
        )
    ranks.dist.barrier()  # every rank has read what was done before any writes more

    # What is missing, model by model
    wanted = {}
    has_engine = False
    for model in args.models:
        folder, tokenizer, work = missing(args, model, cfg, loaded, done, wanted)
        if not work:
            continue
        if has_engine:
            restart()
        has_engine = True
        evaluate(args, model, folder, tokenizer, work, cfg, device)

    if args.judge:
        if has_engine and not args.judge.startswith("http"):
            restart()
        found = results.pick(results.read(out, full=True), wanted)
        records = [record for mine in found.values() for record in mine.values()]
        rate_diversity(args, records, cfg, device, out)
        ranks.dist.barrier()

    if ranks.rank() == 0:
        notes = [note for model in args.models for note in contamination(model, loaded)]
        report(args, results.pick(results.read(out), wanted), notes)


def leave_at_interrupt(out):
    """Say what is saved and how to go on; nothing is left to be tidied up."""
    if ranks.rank() == 0:
        saved = 0
        if os.path.isdir(out):
            saved = sum(len(records) for records in results.read(out).values())
        print(
            f"\n{program()}: stopped; {saved} finished problems are saved in {out}; give the same "
            "command to go on from there",
            file=sys.stderr,
            flush=True,
        )
    os._exit(130)


def main(argv):
    benches, templates = benchmarks.read_tables(SHARED)
    args = parse(argv, benches)
    try:
        run(args, benches, templates)
    except KeyboardInterrupt:
        leave_at_interrupt(args.out)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    command.run(main)
