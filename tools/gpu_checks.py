"""
gpu_checks.py: what is asked of a GPU and no other tool answers. tools/first_hour.py asks it all.

    python tools/gpu_checks.py machine OUT             # driver, compiler, headers, torch, vLLM
    python tools/gpu_checks.py model OUT [MODEL]       # flags of lad.py for a model and rows
    python tools/gpu_checks.py agreement OUT FLAGS..   # vLLM's log-probs beside the trainer's
    python tools/gpu_checks.py stop OUT FLAGS..        # SIGTERM after the second batch, --resume

OUT is a folder, which gets figures.json; FLAGS are those of lad.py. The last two run on a CPU as
well: `.. agreement OUT --config tiny`.
"""

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
if __name__ == "__main__":  # as in lad.py: read when torch, OpenMP and vLLM are imported
    os.environ.setdefault("OMP_NUM_THREADS", str(min(16, len(os.sched_getaffinity(0)))))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from harness import command
from harness.settings import did_you_mean, die

# Nothing heavy up to here: tools/first_hour.py imports this, and the check `machine` is to say what
# is missing

DRIVER = 580  # the oldest that knows CUDA 13.0, which the wheels are built for
GLIBC = 2.31  # the oldest that llguidance, which vLLM needs, is built for
GIB = 2**30

# ==== 1. The machine ============================================================================


def look_at_machine(folder):
    """Leaves with exit code 1, and a line for each thing to change, where a GPU is there and what
    the CUDA wheels need beside it is not."""
    import torch

    # Alike with a GPU and without
    figures = {
        "glibc": float(platform.libc_ver()[1] or 0),
        "C compiler": find_compiler(),
        "Python.h": find_header(),
        "CUDA of torch": torch.version.cuda or "none: a CPU build",
        "host memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB,
        "free disk": shutil.disk_usage(HERE).free / 1e9,
    }
    began = time.perf_counter()
    import vllm  # noqa: F401

    figures["import of vLLM"] = time.perf_counter() - began

    # The GPU, by its driver and by torch, which has to compute something on it
    gpu = find_gpu()
    if gpu["driver"]:
        figures["driver"] = int(gpu["driver"].split(".")[0])
    if torch.cuda.is_available():
        figures["GPUs"] = torch.cuda.device_count()
        figures["GPU memory"] = torch.cuda.get_device_properties(0).total_memory / GIB
        figures["compute capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
        torch.ones(2, device="cuda").sum().item()
    write_figures(folder, figures)

    problems = missing(figures, gpu)
    for problem in problems:
        print(f"machine: {problem}")
    raise SystemExit(1 if problems else 0)


def missing(figures, gpu):
    """What has to change before anything runs on this machine's GPU; nothing where there is
    none."""
    problems = []
    if not gpu["driver"]:
        return problems
    if figures["driver"] < DRIVER:
        problems.append(f"driver {gpu['driver']}: the CUDA 13 wheels need {DRIVER} or newer")
    if "GPUs" not in figures:
        problems.append(
            f"torch (CUDA: {figures['CUDA of torch']}) sees no GPU; if .venv was made without "
            "one: rm -r .venv && LAD_DEVICE=cuda bash setup.sh"
        )
    elif float(figures["compute capability"]) < 8:
        problems.append(f"compute capability {figures['compute capability']}: bf16 needs 8.0")
    if figures["C compiler"] == "none":
        problems.append("no C compiler, which triton needs: apt-get install gcc")
    if figures["Python.h"] == "none":
        problems.append("no Python.h, which triton needs: apt-get install python3-dev")
    if figures["glibc"] < GLIBC:
        problems.append(f"glibc {figures['glibc']}: llguidance is built for {GLIBC} or newer")
    return problems


def find_gpu():
    """{name, driver} of the first GPU by nvidia-smi, empty strings where there is none."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        said = ""
    first = said.partition("\n")[0].split(", ")
    if len(first) != 2:  # nvidia-smi says in prose why it cannot tell
        return dict(name="", driver="")
    return dict(name=first[0], driver=first[1])


def find_compiler():
    """The one that triton looks for."""
    names = [os.environ.get("CC", "gcc"), "gcc", "clang"]
    found = [path for path in map(shutil.which, names) if path]
    return found[0] if found else "none"


def find_header():
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return str(header) if header.exists() else "none"


# ==== 2. A model and rows =======================================================================

SMALL = "Qwen/Qwen2.5-0.5B-Instruct"  # the model of the preset gsm8k-small


def find_model_and_rows(folder, wanted=""):
    """flags.json: the flags of lad.py that name a model, and rows for it that are made here.

    `wanted` is a folder, a hub name, or random:SHAPE, random weights of a shape of tools/bench.py.
    Without it: SMALL, and where the hub cannot be reached random:0.5b. Random weights show all but
    a reward that rises.
    """
    # Which one
    if not wanted:
        wanted = ask_hub(SMALL) or "random:0.5b"
    elif not wanted.startswith("random:") and not Path(wanted).is_dir():
        wanted = ask_hub(wanted)
        if not wanted:
            die("without --model a model is found here")

    # With sums to solve, if it can read; else with the puzzles of the preset tiny
    kind, _, shape = wanted.partition(":")
    if kind == "random":
        path = random_weights(shape, folder / "weights")
        flags = ["--config", "tiny", "--model", path, "--checkpointing", "true"]
    else:
        path = wanted
        rows = write_sums(folder / "sums.jsonl")
        flags = ["--config", "gsm8k-small", "--model", path, "--data", str(rows)]
        flags += ["--data_name", "", "--truth_after", ""]
    (folder / "flags.json").write_text(json.dumps(flags))
    write_figures(folder, {"model": wanted, "parameters": count_parameters(path)})


def ask_hub(name):
    """Its folder, or "" where the hub cannot be reached and the cache does not have it."""
    import lad
    from harness.data import download
    from harness.ranks import join

    join(lad.load_config(["--config", "tiny", "--device", "cpu"]))  # a group of one
    try:
        return str(download(name))
    except SystemExit:  # it has said why
        return ""


def random_weights(shape, folder):
    """A folder with a model of that shape, and the tokenizer of the preset tiny."""
    import torch

    from harness import tiny
    from tools import bench

    if shape not in bench.MODELS:
        die(f"random:{shape}{did_you_mean(shape, bench.MODELS)}")
    bench.random_model(shape, folder, torch.device("cpu"))
    tiny.make_tokenizer().save_pretrained(folder)
    return str(folder)


def write_sums(path):
    """512 sums of three numbers of two digits, in the fields of GSM8K."""
    lines = []
    for i in range(512):
        a = (i * 37 + 11) % 90 + 10
        b = (i * 53 + 7) % 90 + 10
        c = (i // 90 * 17 + 5) % 90 + 10
        lines.append(json.dumps(dict(question=f"What is {a} + {b} + {c}?", answer=str(a + b + c))))
    path.write_text("\n".join(lines) + "\n")
    return path


def count_parameters(folder):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    return sum(p.numel() for p in model.parameters())


# ==== 3. Agreement ==============================================================================


def compare_logprobs(folder, *flags):
    """What vLLM and the trainer say of the same tokens, with weights that were pushed once, twice
    and three times: on a GPU vLLM sleeps between."""
    import lad
    from harness.data import find_model, load_data, load_tokenizer
    from harness.ranks import join

    # As lad.main begins
    cfg = lad.load_config(list(flags))
    device = join(cfg)
    model_folder = find_model(cfg)
    rows = load_data(cfg, load_tokenizer(model_folder))
    llm = lad.start_vllm(cfg, model_folder, device)
    model = lad.build_model(model_folder, cfg, device)

    figures = {}
    for pushes, said in ((1, "1 push"), (2, "2 pushes"), (3, "3 pushes")):
        with lad.awake(llm, model, device):
            mine, groups = lad.rollout(llm, cfg, rows[: cfg.prompts], 2, pushes, 0)
        differences = differences_of(mine, groups, model, cfg, device)
        figures[f"mean difference, {said}"] = differences.mean().item()
        figures[f"largest difference, {said}"] = differences.max().item()
        figures["tokens compared"] = len(differences)
    write_figures(folder, figures)


def differences_of(rows, groups, model, cfg, device):
    """|log-prob in the trainer - log-prob in vLLM| [R], of all tokens of the samples."""
    import torch

    import lad

    samples = []
    for row, group in zip(rows, groups, strict=True):
        samples += [dict(s, prompt=row["prompt_ids"]) for s in group if s["tokens"]]
    lad.score_samples(model, "old", samples, cfg, device)
    ours = torch.cat([s["old"].cpu() for s in samples])  # [R]
    theirs = torch.tensor([x for s in samples for x in s["behaviour"]])  # [R]
    return (ours - theirs).abs()


# ==== 4. Stop and go on =========================================================================


def stop_and_go_on(folder, *flags):
    """A run of lad.py in a process of its own gets SIGTERM after its second batch; then it is
    resumed."""
    run = folder / "run"
    program = [sys.executable, "lad.py"]
    pipes = dict(cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process = subprocess.Popen([*program, *flags, "--out", str(run)], **pipes)
    told = 0.0
    for line in process.stdout:
        print(line, end="", flush=True)
        if re.match(r"step +2/", line):
            told = time.time()
            process.send_signal(signal.SIGTERM)
    figures = {"exit code after SIGTERM": process.wait()}
    figures["from SIGTERM to the end"] = time.time() - told

    again = subprocess.run([*program, "--resume", str(run)], cwd=HERE)
    figures["exit code of --resume"] = again.returncode
    with open(run / "metrics.jsonl") as lines:
        steps = [x["step"] for x in map(json.loads, lines) if "seconds" in x]
    wanted = list(range(1, max(steps) + 1))
    figures["batches"] = len(wanted)
    figures["batches missing or twice"] = len(set(wanted) - set(steps)) + len(steps)
    figures["batches missing or twice"] -= len(set(steps))
    write_figures(folder, figures)


# ==== 5. main ===================================================================================

CHECKS = {
    "machine": look_at_machine,
    "model": find_model_and_rows,
    "agreement": compare_logprobs,
    "stop": stop_and_go_on,
}


def write_figures(folder, figures):
    (folder / "figures.json").write_text(json.dumps(figures))


def main(argv):
    parser = command.parser(__doc__)
    parser.add_argument("check", choices=CHECKS, metavar="CHECK", help=", ".join(CHECKS))
    parser.add_argument("out", help="a folder")
    # Not the parser's: what follows is lad.py's
    args = parser.parse_args(argv[:2])
    folder = Path(args.out).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    CHECKS[args.check](folder, *argv[2:])


if __name__ == "__main__":
    command.run(main)
