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
import dataclasses
import hashlib
import json
import math
import os
import re
import socket
import sys
import time
import tomllib
import warnings
import zlib
from collections import deque
from pathlib import Path

HERE = Path(__file__).resolve().parent

if __name__ == "__main__":  # OpenMP and vLLM read these when they are imported, hence up here
    os.environ.setdefault("OMP_NUM_THREADS", str(min(16, len(os.sched_getaffinity(0)))))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    warnings.filterwarnings("ignore", category=FutureWarning)

import numpy as np
from tqdm import tqdm

import lad
import verify
from harness import benchmarks, codeforces, judge, ranks, results
from harness.data import find_model, is_chat, read_rows
from harness.metrics import distinct_n, overlap, pass_at_k, summarize  # noqa: F401 (pass_at_k)
from harness.ranks import print0
from harness.responses import answer_key, solution
from harness.settings import checked, did_you_mean, die

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
SHARED += ("verify_workers", "verify_timeout")


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
    args.bench = args.bench.split(",")
    for name in args.bench:
        if name not in benches:
            die(f"--bench {name}: no such benchmark{did_you_mean(name, benches)}")
    if args.n < 1 or args.limit < 0:
        die(f"--n {args.n} --limit {args.limit}: expected at least 1 and 0")
    return args


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
        help="run directory, folder, hub name, or tiny; none: report what is in --out",
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
    for key in SHARED:
        parser.add_argument(f"--{key}", help=lad.KNOBS[key].metadata["help"].replace("%", "%%"))


# ==== 2. Generating and scoring =================================================================
# One JSON line for each problem, as it finishes.


def engine(cfg, folder, device):
    """vLLM with the folder's weights, awake."""
    options = {}
    if device.type == "cpu":
        # To take back the token of an unfinished prefill vLLM moves the generator's offset, which a
        # CPU's has not: leave none unfinished
        options["enable_chunked_prefill"] = False
    llm = lad.start_vllm(cfg, folder, device, **options)
    if device.type == "cuda":
        # start_vllm leaves the weights asleep, and dropped: read them from the folder again
        llm.wake_up(["weights"])
        llm.collective_rpc("reload_weights")
        llm.wake_up(["kv_cache"])
    return llm


def encode(tokenizer, cfg, text):
    """Token ids of a prompt, in the chat template if cfg says so."""
    if cfg.chat:
        messages = [{"role": "user", "content": text}]
        if cfg.system:
            messages = [{"role": "system", "content": cfg.system}, *messages]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    # a chat template writes its own <bos>
    return tokenizer(text, add_special_tokens=not cfg.chat)["input_ids"]


def answer(llm, cfg, problems, settings, tokenizer, verifier, file):
    """n responses to each problem; a thread verifies and writes while vLLM goes on. Ranks of one
    engine pass the same problems, and all but one of them file = None."""
    run = llm.llm_engine
    numbered = {str(problem["number"]): problem for problem in problems}
    for number, problem in numbered.items():
        prompt = {"prompt_token_ids": problem["prompt_ids"]}
        run.add_request(number, prompt, sampling(cfg, settings, number))

    def finish(output):
        if file:
            problem = numbered[output.request_id]
            record = make_record(settings, problem, output.outputs, tokenizer, verifier)
            results.append(file, record)

    title = f"{settings['model']} {settings['bench']}"
    bar = tqdm(total=len(problems), desc=title, unit="problem", disable=ranks.rank() > 0)
    pending = deque()
    with concurrent.futures.ThreadPoolExecutor(1) as thread, bar:
        while run.has_unfinished_requests() or pending:
            if run.has_unfinished_requests():
                for output in run.step():
                    pending.append(thread.submit(finish, output))
            while pending and (pending[0].done() or not run.has_unfinished_requests()):
                pending.popleft().result()  # a verifier that cannot work ends the evaluation here
                bar.update()


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


def make_record(settings, problem, outputs, tokenizer, verifier):
    """All that the table needs of one problem; `outputs` are its responses, as vLLM returns
    them."""
    kind = settings["kind"]
    tokens = [list(output.token_ids) for output in outputs]
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    truth = problem["truth"]
    if callable(truth):
        truth = truth()
    rewards = verifier.score([(kind, text, truth) for text in texts])
    return dict(
        settings=settings,
        problem=problem["number"],
        id=problem["id"],
        statement=problem["statement"],
        rewards=rewards,
        reasons=list(verifier.reasons),
        lengths=[len(response) for response in tokens],
        truncated=[output.finish_reason == "length" for output in outputs],
        answers=[answer_key(kind, text) for text in texts],
        solutions=[short_hash(solution(kind, text)) for text in texts],
        **diversity_of(tokens, rewards, set(tokenizer.all_special_ids)),
        responses=texts,
    )


def short_hash(text):
    return hashlib.sha1(text.encode()).hexdigest()[:12]


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


def contamination(model, problems):
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
    for bench, (mine, _) in problems.items():
        verbatim, half = overlap([problem["statement"] for problem in mine], training)
        notes.append(
            f"{model}, {bench}: of {len(mine)} problems {verbatim} stand in the training data "
            f"({run['data']}) word for word, {half} with at least half of their 10-word windows"
        )
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
    is_remote = args.judge.startswith("http")
    name = args.judge_model if is_remote else args.judge
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
                judge=name,
                score=judge.read_score(reply),
                reply=reply,
            )
            results.append(file, line)

    def ask(record):
        return judge.ask(args.judge, name, judge.judge_prompt(record))

    if is_remote:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            save(pool.map(ask, todo))  # they come in order, each as soon as it can
    elif ranks.all_reduce([len(todo)], "max")[0]:
        save(judge_in_vllm(args.judge, todo, cfg, device))


def place(record):
    return record["settings"]["model"], record["settings"]["bench"], record["problem"]


def judge_in_vllm(model, todo, cfg, device):
    """Replies to the records' prompts; none on a rank that only lends its GPU to its engine."""
    from transformers import AutoTokenizer

    cfg = dataclasses.replace(cfg, model=model, temperature=0.0, top_p=1.0, max_tokens=512)
    folder = find_model(cfg)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    cfg.chat = bool(tokenizer.chat_template)
    prompts = [encode(tokenizer, cfg, judge.judge_prompt(record)) for record in todo]
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
    """[(label, settings, records, summary)] of {settings as JSON: {problem: record}}; models
    evaluated twice are told apart by the settings that differ."""
    rows = [(json.loads(key), list(records.values())) for key, records in found.items()]
    out = []
    for settings, records in rows:
        twins = [other for other, _ in rows if same_place(other, settings)]
        differ = []
        for key, value in settings.items():
            if any(twin.get(key) != value for twin in twins):
                differ.append(f"{key} {value}")
        label = settings["model"]
        if differ:
            label += f" ({', '.join(differ)})"
        out.append((label, settings, records, summarize(records)))
    return out


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
            if all(record["id"] for record in records):
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
    largest = max(x["n"] for _, _, _, x in rows)
    ks = [2**i for i in range(1, 15) if 2**i < largest]
    dists = ["dist-3", "dist-4", "dist-3 right", "dist-4 right"]
    head = ["model", "problems", "n", "avg@n", *[f"pass@{k}" for k in ks], "pass@n", "maj@n"]
    head += [*dists, "distinct", "judge", "tokens", "truncated", "failures"]
    lines = []
    for label, _, _, x in rows:
        curve = [number(x["pass_at"][k - 1], 1, 100) if k <= x["n"] else "-" for k in ks]
        line = [label, x["problems"], x["n"], percent(x, 1), *curve, percent(x, x["n"])]
        line.append(number(x["maj"], 1, 100))
        line += [number(x["dist"][key], 3) for key in dists]
        line += [number(x["distinct"], 2), show_judges(x["judge"])]
        line += [number(x["length"], 1), number(x["truncated"], 1, 100)]
        line.append(", ".join(f"{n} {reason}" for reason, n in x["reasons"].items()) or "-")
        lines.append(line)
    return show_settings(bench, rows) + "\n\n" + markdown(head, lines)


def show_settings(bench, rows):
    parts = []
    for key in ("temperature", "top_p", "max_tokens", "seed", "kind", "source", "tokenizer"):
        values = sorted({str(settings[key]) for _, settings, _, _ in rows})
        parts.append(f"{key} {' / '.join(values)}")
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
    return re.sub(r"[^\w.-]+", "_", name).strip("_")


def share(items, cfg):
    """This rank's: ranks that share an engine are one replica."""
    first = ranks.rank() // cfg.tensor_parallel
    return items[first :: ranks.world() // cfg.tensor_parallel]


def resolve(model, cfg):
    """(folder of the weights, a hash of config.json and of 1 MB of each file: no training step
    leaves those as they were, config of the run or {})."""
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
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            file.seek(path.stat().st_size // 2)
            digest.update(file.read(1 << 20))
    return str(folder), digest.hexdigest()[:12], run


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


def settings_of(args, model, weights, bench, source, tokenizer, table, cfg):
    """What tells one evaluation of a benchmark from another."""
    settings = dict(
        model=model.rstrip("/"),
        weights=weights,
        bench=bench,
        source=Path(source).name if Path(source).exists() else source,
        n=args.n,
    )
    for key in ("temperature", "top_p", "max_tokens", "seed", "kind", "prompt", "chat", "system"):
        settings[key] = getattr(cfg, key)
    settings["verify_timeout"] = cfg.verify_timeout
    settings["window"] = [table.get("start"), table.get("end")]
    settings["tokenizer"] = f"{type(tokenizer).__name__}, {len(tokenizer)} tokens"
    return settings


def missing(args, model, cfg, tables, problems, done, wanted):
    """(folder of the model, its tokenizer, [(config, problems without a line, settings)]). What
    the report will want is added to `wanted`, {settings as JSON: numbers of problems}."""
    from transformers import AutoTokenizer

    folder, weights, run = resolve(model, cfg)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    of_model = dict(
        chat=run.get("chat", bool(tokenizer.chat_template)), system=run.get("system", "")
    )
    work = []
    for bench, (rows, source) in problems.items():
        table = tables[bench]
        knobs = {key: value for key, value in table.items() if key in SHARED}
        knobs = checked(knobs, f"configs.toml, [bench.{bench}]", lad.KNOBS)
        now = lad.Config(**DEFAULTS | of_model | knobs)
        settings = settings_of(args, model, weights, bench, source, tokenizer, table, now)
        key = json.dumps(settings, sort_keys=True)
        wanted[key] = {row["number"] for row in rows}

        todo = []
        for row in rows:
            if row["number"] in done.get(key, {}):
                continue
            ids = encode(tokenizer, now, row["text"])
            if len(ids) > now.max_prompt_tokens:
                die(
                    f"{bench}: a prompt has {len(ids)} tokens, more than --max_prompt_tokens "
                    f"{now.max_prompt_tokens}"
                )
            todo.append(dict(row, prompt_ids=ids))
        if todo:
            work.append((now, todo, settings))
    return folder, tokenizer, work


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


def pick(found, wanted):
    """Of what was read, the problems that are wanted."""
    picked = {}
    for key, numbers in wanted.items():
        records = found.get(key, {})
        picked[key] = {number: record for number, record in records.items() if number in numbers}
    return {key: records for key, records in picked.items() if records}


def report(args, found, notes):
    """Print and write table.md; the pictures, if they are asked for."""
    out = Path(args.out)
    rows = labelled(found)
    if not rows:
        die(f"no MODEL is given and {out} has no results to report; see python eval.py --help")
    text = show(rows, args.data, notes)
    print(f"\n{text}\n", flush=True)
    (out / "table.md").write_text(text + "\n")
    if args.plot:
        plot(rows, out)


def main(argv):
    benches, templates = benchmarks.read_tables(SHARED)
    args = parse(argv, benches)
    out = Path(args.out)
    if not args.models:
        report(args, results.read(out), ())
        return

    # The problems, before anything that takes long
    tables = {name: benches[name] | args.knobs for name in args.bench}
    problems = {}
    for name, table in tables.items():
        problems[name] = benchmarks.load_problems(name, table, templates, args.data, args.limit)
    size = dict(prompts=int(os.environ.get("WORLD_SIZE", 1)))
    cfg = lad.Config(**DEFAULTS | args.knobs | size)
    cfg.config = "eval.py"
    device = ranks.join(cfg)
    out.mkdir(parents=True, exist_ok=True)
    done = results.read(out)
    ranks.dist.barrier()  # every rank has read what was done before any writes more

    # What is missing, model by model
    wanted = {}
    has_engine = False
    for model in args.models:
        folder, tokenizer, work = missing(args, model, cfg, tables, problems, done, wanted)
        if not work:
            continue
        if has_engine:
            restart()
        has_engine = True
        evaluate(args, model, folder, tokenizer, work, cfg, device)

    if args.judge:
        if has_engine and not args.judge.startswith("http"):
            restart()
        found = pick(results.read(out, full=True), wanted)
        records = [record for mine in found.values() for record in mine.values()]
        rate_diversity(args, records, cfg, device, out)
        ranks.dist.barrier()

    if ranks.rank() == 0:
        notes = [note for model in args.models for note in contamination(model, problems)]
        report(args, pick(results.read(out), wanted), notes)


if __name__ == "__main__":
    main(sys.argv[1:])
