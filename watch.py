"""
Who else is there. Ranks look after one another: when one dies or hangs, the others say which it was and leave, instead of waiting in a
collective. And a run holds its folder: a second one that would write there is told who does.
"""
import atexit, contextlib, datetime, fcntl, functools, json, os, socket, sys, threading, time
from pathlib import Path

import torch.distributed as dist


LIMIT = 40        # seconds without a word from a rank
PATIENT = [0]     # how many functions that may hold the interpreter's lock for long are running: then it is ten minutes


def patiently(function):
    """A function in which all ranks may be silent for long: writing many GB of weights holds Python's lock, and no thread can speak."""
    @functools.wraps(function)
    def slow(*args):
        PATIENT[0] += 1
        try:
            return function(*args)
        finally:
            PATIENT[0] -= 1
    return slow


def watch(rank, world):
    """A thread that ends this process when another rank has not been heard of for LIMIT, and says which: a collective would wait for it for hours.
    Each rank keeps a clock going in the store that the ranks met at, and looks at the next one's."""
    seconds = LIMIT
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=datetime.timedelta(seconds=seconds))
    over, after = threading.Event(), (rank + 1) % world
    def beat():
        heard, since, lost = None, time.time(), ""
        while not over.wait(2):
            try:
                store.set(f"lad beat {rank}", str(time.time()))
                if (now := store.get(f"lad beat {after}")) != heard:
                    heard, since = now, time.time()
                elif time.time() - since > (600 if PATIENT[0] else seconds):
                    store.set("lad lost", f"rank {after} has not been heard of for {time.time() - since:.0f} s")
                lost = store.get("lad lost").decode() if store.check(["lad lost"]) else ""
            except RuntimeError:
                lost = f"rank {after} was never heard of" if heard is None else "the ranks' store is gone, and so is rank 0 or its machine"
            if lost and not over.is_set():
                print(f"lad.py: error: {lost}: rank {rank} leaves; --resume goes on from the last checkpoint",
                      file=sys.stderr, flush=True)
                os._exit(1)
    def wait_for_verdict(*error):   # gloo tells of a broken connection at once, but not whose
        sys.__excepthook__(*error)
        over.wait(2 * seconds) if "gloo" in str(error[1]) else None
    sys.excepthook = wait_for_verdict
    threading.Thread(target=beat, daemon=True).start()
    atexit.register(over.set)
    return over


BEAT = 5     # seconds between two signs of life in a run's folder
HELD = []    # open files, for as long as this process lives


def hold(folder):
    """Make `folder` if need be and hold it until this process ends; BlockingIOError, with who holds it, where another process does.

    A lock on the file `lock` in it is what counts on one machine: the kernel lets it go however a process ends. Disks that machines
    share do not always share locks, so whoever holds a folder also touches that file every few seconds, for others to see.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"{who_holds(folder)} is at work in {folder}") from None
        except OSError:   # a disk without locks: signs of life have to do
            pass
        try:   # another run may have moved the folder away since it was opened
            if os.fstat(lock.fileno()).st_ino == (folder / "lock").stat().st_ino:
                break
        except FileNotFoundError:
            pass
        lock.close()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()   # a word that no other machine has
    if holder(folder).get("boot", boot) != boot and is_touched(folder / "lock"):
        raise BlockingIOError(f"{who_holds(folder)} is at work in {folder}")
    lock.truncate(0)
    lock.write(json.dumps(dict(host=socket.gethostname(), boot=boot, pid=os.getpid(), since=time.strftime("%Y-%m-%d %H:%M:%S"))))
    lock.flush()
    HELD.append(lock)
    over = threading.Event()

    def beat():
        while not over.wait(BEAT):
            try:
                os.utime(lock.fileno())
            except OSError:   # a disk that hangs or is full for a moment
                pass

    def let_go():
        over.set()
        with contextlib.suppress(OSError):
            (folder / "lock").unlink(missing_ok=True)
            folder.rmdir()   # nothing was written: not even the folder is left

    threading.Thread(target=beat, daemon=True).start()
    atexit.register(let_go)


def holder(folder):
    """What the process that holds a folder, or held it, wrote of itself; nothing where it was killed meanwhile."""
    try:
        return json.loads((folder / "lock").read_text())
    except (OSError, ValueError):
        return {}


def who_holds(folder):
    found = holder(folder)
    return "process {pid} on {host}, since {since},".format(**found) if found else "another process"


def is_touched(path):
    """Whether somebody gives a sign of life within six times the time that they should take; waits no longer than that."""
    before = path.stat().st_mtime
    for _ in range(6):
        time.sleep(BEAT)
        if path.stat().st_mtime != before:
            return True
    return False
