"""
Ranks that look after one another: when one dies or hangs, the others say which it was and leave, instead of waiting in a collective.
"""
import atexit, datetime, functools, os, sys, threading, time

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
