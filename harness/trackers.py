"""
A run shown by another program: wandb, trackio or tensorboard (--track).

    python harness/trackers.py wandb runs/NAME      # the same of a run that is over

The run does not speak to it. A process of its own follows the run's folder, in which metrics.jsonl
stays the truth, and hands on what it finds there: the settings, each line, and at the end samples
and picture. It may fail, hang or lack a network: the run loses nothing and waits for it LIMIT
seconds, at its end alone.
"""

import atexit
import contextlib
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
import uuid
from pathlib import Path

if __name__ == "__main__":  # from this folder nothing is imported by its bare name
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(path for path in sys.path if path != str(here))]

from harness.settings import die, one_line, replace

NAMES = ("wandb", "trackio", "tensorboard")
PROJECT = "lad"  # unless WANDB_PROJECT or TRACKIO_PROJECT says another
LIMIT = 60  # seconds that the end of a run waits for its tracker
PAUSE = 0.5  # seconds between two looks at the log
SHOWN = 1000  # samples in the table, the last of them

# ==== 1. The run's side =========================================================================

FOLLOWERS = []  # (process, name, folder) of the tracker that follows this run


def check(name):
    """Leave in one line, before anything heavy is loaded, where its package is missing."""
    if name != "off" and importlib.util.find_spec(name) is None:
        die(f"track = {name} needs a package: {sys.executable} -m pip install {name}")


def follow(name, out):
    """Start the process that follows the run in the folder `out`. On the first rank only."""
    if name == "off":
        return
    command = [sys.executable, os.path.abspath(__file__), name, str(out), "--limit", str(LIMIT)]
    quiet = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}  # GPUs and cores are the run's
    try:
        process = subprocess.Popen(
            command,
            env=os.environ | quiet,
            stdin=subprocess.PIPE,  # whose end is the end of the run, however that comes
            start_new_session=True,  # Ctrl-C is for the run
        )
    except OSError as error:
        print(f"track     {name} did not start: {one_line(error)}; the run goes on", flush=True)
        return
    FOLLOWERS.append((process, name, out))
    atexit.register(finish)


def finish():
    """Tell the tracker that the run is over, and wait for it, but not for long."""
    while FOLLOWERS:
        process, name, out = FOLLOWERS.pop()
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            print(
                f"track     {name} was not done {LIMIT} s after the run and was ended; all is in "
                f"{out}: python harness/trackers.py {name} {out}",
                flush=True,
            )


# ==== 2. Following a run ========================================================================


def lines_of(out, over):
    """The objects of out/metrics.jsonl as they are written, until the event `over` is set and all
    of them have been read."""
    path = Path(out) / "metrics.jsonl"
    torn = ""  # the beginning of a line whose end is not there yet
    place = 0
    while True:
        is_over = over.is_set()
        if path.exists():
            with open(path, encoding="utf-8") as file:
                file.seek(place)
                text = torn + file.read()
                place = file.tell()
            *whole, torn = text.split("\n")
            for line in whole:
                with contextlib.suppress(ValueError):  # one that a kill tore
                    yield json.loads(line)
        if is_over:
            return
        over.wait(PAUSE)


def numbers_of(line):
    """What of a line can be drawn."""
    found = {}
    for key, value in line.items():
        if key != "step" and isinstance(value, (int, float)) and math.isfinite(value):
            found[key] = value
    return found


def new_lines(lines, memory):
    """Those that were not handed on before: a run that is resumed writes some of its steps again.
    `memory` is a file."""
    sent = recall(memory)
    for line in lines:
        kind = "trained" if "loss" in line else "evaluated"
        if line["step"] > sent.get(kind, -1):
            yield line
            sent[kind] = line["step"]
            replace(memory, json.dumps(sent))


def recall(memory):
    """{what: the last step that was handed on}, and the id of the run."""
    try:
        return json.loads(memory.read_text())
    except (OSError, ValueError):
        return {"id": uuid.uuid4().hex[:8]}


def read_samples(out):
    """The last samples, as rows of texts and numbers, under the names of their columns."""
    columns = ["step", "prompt", "response", "truth", "reward", "reason"]
    path = Path(out) / "samples.jsonl"
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines()[-SHOWN:]:
            with contextlib.suppress(ValueError):  # torn by a kill
                sample = json.loads(line) | {"truth": line_of_truth(json.loads(line))}
                rows.append([sample.get(key, "") for key in columns])
    return columns, rows


def line_of_truth(sample):
    truth = sample.get("truth")
    return truth if isinstance(truth, str) else json.dumps(truth)


# ==== 3. The trackers ===========================================================================
# Each takes the folder, the settings, the lines as they come, and a function that tells people
# where to look.


def to_wandb(out, config, lines, say):
    import wandb

    memory = out / "wandb.json"
    known = recall(memory)
    replace(memory, json.dumps(known))
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=out.name,
        id=known["id"],
        resume="allow",
        config=config,
        dir=str(out),
        settings=wandb.Settings(console="off"),
    )
    say(run.url or f"offline, in {out}/wandb: wandb sync sends it")
    for line in new_lines(lines, memory):
        run.log(numbers_of(line), step=line["step"])
    columns, rows = read_samples(out)
    texts = [[str(x) for x in row] for row in rows]  # a column has one type
    end = {"samples": wandb.Table(columns=columns, data=texts)}
    if (out / "plot.png").exists():
        end["plot"] = wandb.Image(str(out / "plot.png"))
    run.log(end)
    run.finish()


def to_trackio(out, config, lines, say):
    import pandas
    import trackio

    memory = out / "trackio.json"
    project = os.environ.get("TRACKIO_PROJECT", PROJECT)
    quiet = dict(embed=False, auto_log_gpu=False, auto_log_cpu=False)
    resume = "allow" if memory.exists() else "never"
    trackio.init(project=project, name=out.name, config=config, resume=resume, **quiet)
    say(f"trackio show --project {project}")
    step = 0
    for line in new_lines(lines, memory):
        step = line["step"]
        trackio.log(numbers_of(line), step=step)
    columns, rows = read_samples(out)
    if rows:
        table = trackio.Table(dataframe=pandas.DataFrame(rows, columns=columns))
        trackio.log({"samples": table}, step=step)
    if (out / "plot.png").exists():
        trackio.log({"plot": trackio.Image(str(out / "plot.png"))}, step=step)
    trackio.finish()


def to_tensorboard(out, config, lines, say):
    """Event files in out/tensorboard, written anew from the first line on each time."""
    import numpy
    from PIL import Image
    from torch.utils.tensorboard import SummaryWriter

    folder = out / "tensorboard"
    shutil.rmtree(folder, ignore_errors=True)
    writer = SummaryWriter(str(folder))
    say(f"tensorboard --logdir {folder}")
    writer.add_text("config", in_markdown(["setting", "value"], config.items()))
    step = 0
    for line in lines:
        step = line["step"]
        for key, value in numbers_of(line).items():
            writer.add_scalar(key, value, step)
        writer.flush()
    writer.add_text("samples", in_markdown(*read_samples(out)), step)
    if (out / "plot.png").exists():
        picture = numpy.asarray(Image.open(out / "plot.png").convert("RGB"))  # [H,W,3]
        writer.add_image("plot", picture, step, dataformats="HWC")
    writer.close()


def in_markdown(columns, rows):
    lines = [columns, ["---"] * len(columns), *rows]
    cells = [[" ".join(str(cell).replace("|", "\\|").split()) for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


TRACKERS = {"wandb": to_wandb, "trackio": to_trackio, "tensorboard": to_tensorboard}


# ==== 4. main ===================================================================================


def main(argv):
    from harness import command

    parser = command.parser(__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    parser.add_argument("--limit", type=float, help="follow the run until stdin ends, then so long")
    args = parser.parse_args(argv)
    check(args.name)
    if not (args.run / "config.toml").exists():
        die(f"{args.run}: no config.toml; give the folder of a run of lad.py")
    config = tomllib.loads((args.run / "config.toml").read_text(encoding="utf-8"))

    # The run is over when it closes our stdin, or dies; without a run, at once
    over = threading.Event()
    if args.limit is None:
        over.set()
    else:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        threading.Thread(target=wait_for_end, args=(over, args.limit), daemon=True).start()

    # What libraries print goes into a file, what we say to where the run prints
    console = os.dup(1)
    log = os.open(args.run / "track.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)

    def say(text):
        with contextlib.suppress(OSError):
            os.write(console, f"track     {args.name}: {text}\n".encode())

    try:
        TRACKERS[args.name](args.run.resolve(), config, lines_of(args.run, over), say)
    except Exception as error:
        import traceback

        traceback.print_exc()
        say(f"failed: {one_line(error)}; the run goes on, and all is in {args.run} (track.log)")
        sys.exit(1)


def wait_for_end(over, limit):
    """In a thread: the end of stdin is the end of the run. Whoever hangs then is ended."""
    while os.read(0, 1 << 16):
        pass
    over.set()
    time.sleep(limit + 5)
    os._exit(1)


if __name__ == "__main__":
    from harness import command

    command.run(main)
