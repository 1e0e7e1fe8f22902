"""
Ranks that look after one another: when one dies or hangs, the others say which it was and leave, instead of waiting in a collective.
"""
import atexit, datetime, os, sys, threading, time

import torch.distributed as dist


def watch(rank, world, seconds=40):
    """A thread that ends this process when another rank has not been heard of for so long, and says which: a collective would wait for it for hours.
    Each rank keeps a clock going in the store that the ranks met at, and looks at the next one's."""
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=datetime.timedelta(seconds=seconds))
    over, after = threading.Event(), (rank + 1) % world
    def beat():
        heard, since, lost = None, time.time(), ""
        while not over.wait(2):
            try:
                store.set(f"lad beat {rank}", str(time.time()))
                if (now := store.get(f"lad beat {after}")) != heard:
                    heard, since = now, time.time()
                elif time.time() - since > seconds:
                    store.set("lad lost", f"rank {after} has not been heard of for {seconds} s")
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
