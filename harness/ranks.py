"""
Who else is there.

Ranks meet (join), add up numbers (all_reduce), leave together when one of them has an error, and
look after one another: when one dies or hangs, the others say which it was and leave, instead of
waiting in a collective for hours (watch). And a run holds its folder (hold): a second one that
would write there is told who does.
"""

import atexit
import contextlib
import datetime
import fcntl
import functools
import json
import logging
import os
import socket
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

from harness.settings import die, one_line, program

# ==== 1. The process group ======================================================================


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def print0(*args):
    """print, on the first rank."""
    if rank() == 0:
        print(*args, flush=True)


def all_reduce(values, op="sum"):
    """Sum, max or min of a list of numbers over all ranks, in fp64."""
    values = torch.tensor(values, dtype=torch.float64)
    if world() > 1:
        how = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}[op]
        dist.all_reduce(values, how)
    return values.tolist()


def uses_cuda(cfg):
    return torch.cuda.is_available() and cfg.device != "cpu"


def why_no_cuda():
    """What torch says of a GPU that it cannot use: no driver, one that is too old, a CPU build."""
    try:
        torch.cuda.init()
    except Exception as error:  # RuntimeError, AssertionError
        return one_line(error)
    return "it is not asked for"


def join(cfg):
    """Join the process group, of one if torchrun did not start us; this rank's device.

    Exits with code 2 and one line where the machine has no GPU that is asked for, or the batch does
    not divide by the ranks.
    """
    cuda = uses_cuda(cfg)
    if cfg.device == "cuda" and not cuda:
        die(
            f"preset {cfg.config!r} ({cfg.model}) needs CUDA GPUs and torch finds none here "
            f"({why_no_cuda()}); without one, try --config tiny"
        )
    options = {}
    if "RANK" not in os.environ:  # a store in memory opens no port; gloo does, but on loopback
        options = dict(store=dist.HashStore(), rank=0, world_size=1)
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", GLOO_SOCKET_IFNAME="lo")
    local_rank = int(os.environ["LOCAL_RANK"])
    if cuda:
        torch.cuda.set_device(local_rank)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    patience = datetime.timedelta(hours=6)  # a download takes long
    dist.init_process_group(backend, timeout=patience, **options)

    if cfg.prompts % (world() * cfg.minibatches):
        die(
            f"prompts = {cfg.prompts} does not divide by {world()} ranks x {cfg.minibatches} "
            "minibatches"
        )
    if world() % cfg.tensor_parallel or world() % (cfg.shard_size or 1):
        die(
            f"{world()} ranks do not divide by tensor_parallel = {cfg.tensor_parallel} or by "
            f"shard_size = {cfg.shard_size}"
        )
    be_quiet()
    return torch.device("cuda", local_rank) if cuda else torch.device("cpu")


def take_threads():
    """This rank's share of the machine's cores. torchrun gives a process one thread unless it is
    told, and with offload the clip and Adam are the CPU's."""
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    torch.set_num_threads(max(cores, 1))


def be_quiet():
    """Libraries that report on every file they read."""
    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # says a CPU has no Triton


def leave_together(message):
    """All ranks leave with exit code 2 if one of them has a message, which that one prints."""
    if message:
        print(f"{program()}: error: {message}", file=sys.stderr, flush=True)
    if all_reduce([bool(message)], "max")[0]:
        raise SystemExit(2)


def whole(x):
    """A tensor that is sharded over the ranks, gathered; any other as it is. All ranks must come
    here."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def shard_of(x):
    """This rank's part of a tensor that is sharded over the ranks, maybe none of it; any other as
    it is."""
    x = x.detach()
    return x.to_local() if hasattr(x, "to_local") else x


def set_whole(p, value, device):
    """Fill a parameter from a whole tensor that all ranks have; `device` is this rank's."""
    if hasattr(p, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(device), p.device_mesh, p.placements)
    p.data.copy_(value)


# ==== 2. Ranks that look after one another ======================================================

LIMIT = 40  # seconds without a word from a rank
PATIENT = [0]  # how many functions that may be silent for long are running: then it is ten minutes


def patiently(function):
    """A function in which all ranks may be silent for long: writing many GB of weights holds
    Python's lock, and no thread can speak."""

    @functools.wraps(function)
    def slow(*args):
        PATIENT[0] += 1
        try:
            return function(*args)
        finally:
            PATIENT[0] -= 1

    return slow


def watch():
    """A thread that ends this process when another rank has not been heard of for LIMIT seconds,
    and says which. None where there is no other; else an event that ends the watch.

    Each rank keeps a clock going in the store that the ranks met at, and looks at the next one's.
    From here on a collective waits an hour at most: nothing is downloaded any more.
    """
    dist.group.WORLD.set_timeout(datetime.timedelta(hours=1))
    if world() == 1:
        return None
    me = rank()
    neighbour = (me + 1) % world()
    patience = LIMIT
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=datetime.timedelta(seconds=patience),
    )
    over = threading.Event()

    def beat():
        heard = None
        since = time.time()
        lost = ""
        while not over.wait(2):
            try:
                store.set(f"lad beat {me}", str(time.time()))
                now = store.get(f"lad beat {neighbour}")
                silence = time.time() - since
                if now != heard:
                    heard = now
                    since = time.time()
                elif silence > (600 if PATIENT[0] else patience):
                    store.set(
                        "lad lost", f"rank {neighbour} has not been heard of for {silence:.0f} s"
                    )
                if store.check(["lad lost"]):
                    lost = store.get("lad lost").decode()
            except RuntimeError:
                lost = "the ranks' store is gone, and so is rank 0 or its machine"
                if heard is None:
                    lost = f"rank {neighbour} was never heard of"
            if lost and not over.is_set():
                print(
                    f"{program()}: error: {lost}: rank {me} leaves; --resume goes on from the "
                    "last checkpoint",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)

    def wait_for_verdict(*error):  # gloo tells of a broken connection at once, but not whose
        sys.__excepthook__(*error)
        if "gloo" in str(error[1]):
            over.wait(2 * patience)

    sys.excepthook = wait_for_verdict
    threading.Thread(target=beat, daemon=True).start()
    atexit.register(over.set)
    return over


def leave(over):
    """The end of a run: nobody watches any more, and nobody leaves before the others."""
    dist.barrier()
    if over is not None:
        over.set()
    dist.barrier()  # vLLM takes the process group down as it leaves


# ==== 3. A run's folder belongs to one run ======================================================

BEAT = 5  # seconds between two signs of life in a run's folder
HELD = []  # open files, for as long as this process lives


def claim(cfg, here):
    """This run's folder is its own from now on; a second run that would write there leaves in one
    line. `here`: the folder of the program, which is no run's."""
    message = ""
    if rank() == 0:
        try:
            out = Path(cfg.out).resolve()  # of a symbolic link, where it points
        except (OSError, RuntimeError) as error:  # a link that leads to itself
            message = f"out = {cfg.out!r}: {one_line(error)}; give a folder that can be written"
        else:
            message = not_a_run(cfg, out, here) or try_to_hold(cfg, out)
    leave_together(message)


def not_a_run(cfg, out, here):
    """ "" of a folder that may become a run's, else why it may not."""
    mine = f"give a run a folder of its own, as runs/{out.name or 'mine'}"
    taken = {place for path in (here, Path.cwd()) for place in (path, *path.parents)}
    if out in taken:
        return f"out = {cfg.out!r} holds the program, or the folder that you are in: {mine}"
    home = Path(os.path.expanduser("~"))  # where none is known, that is no place
    if out == home or os.path.exists(out / ".git"):  # which raises nothing, whatever is in the way
        return f"out = {cfg.out!r} is a home, or a repository: {mine}"
    parts = ("harness", "tests", "tools", "docs", "examples", ".git", ".venv")
    if any(out.is_relative_to(here / part) for part in parts):
        return f"out = {cfg.out!r} is a part of the program: {mine}"
    return ""


def try_to_hold(cfg, out):
    """ "" once the folder is held, else what is in the way."""
    try:
        hold(out)
    except BlockingIOError as error:
        return f"{error}; wait for it, or give another --out or --seed"
    except OSError as error:
        return f"out = {cfg.out!r}: {one_line(error)}; give a folder that can be written"
    return ""


def hold(folder):
    """Make `folder` if need be and hold it until this process ends; BlockingIOError, with who holds
    it, where another process does.

    A lock on the file `lock` in it is what counts on one machine: the kernel lets it go however a
    process ends. Disks that machines share do not always share locks, so whoever holds a folder
    also touches that file every few seconds, for others to see.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"{who_holds(folder)} is at work in {folder}") from None
        except OSError:  # a disk without locks: signs of life have to do
            pass
        if is_same_file(lock, folder / "lock"):
            break
        lock.close()  # another run has moved the folder away since it was opened

    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()  # no other machine has it
    if holder(folder).get("boot", boot) != boot and is_touched(folder / "lock"):
        raise BlockingIOError(f"{who_holds(folder)} is at work in {folder}")
    mine = dict(
        host=socket.gethostname(),
        boot=boot,
        pid=os.getpid(),
        since=time.strftime("%Y-%m-%d %H:%M:%S"),
    )
    lock.truncate(0)
    lock.write(json.dumps(mine))
    lock.flush()
    HELD.append(lock)

    over = threading.Event()

    def beat():
        while not over.wait(BEAT):
            with contextlib.suppress(OSError):  # a disk that hangs or is full for a moment
                os.utime(lock.fileno())

    def let_go():
        over.set()
        with contextlib.suppress(OSError):
            (folder / "lock").unlink(missing_ok=True)
            folder.rmdir()  # nothing was written: not even the folder is left

    threading.Thread(target=beat, daemon=True).start()
    atexit.register(let_go)


def is_same_file(file, path):
    try:
        return os.fstat(file.fileno()).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False


def holder(folder):
    """What the process that holds a folder, or held it, wrote of itself; {} where it was killed
    meanwhile."""
    try:
        return json.loads((folder / "lock").read_text())
    except (OSError, ValueError):
        return {}


def who_holds(folder):
    found = holder(folder)
    if not found:
        return "another process"
    return "process {pid} on {host}, since {since},".format(**found)


def is_touched(path):
    """Whether somebody gives a sign of life within six times the time that they should take; waits
    no longer than that."""
    before = path.stat().st_mtime
    for _ in range(6):
        time.sleep(BEAT)
        if path.stat().st_mtime != before:
            return True
    return False
