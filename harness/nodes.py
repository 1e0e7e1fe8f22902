"""
Once a machine: what all ranks need and one can fetch, a model or a data set of the hub.

The first rank of each machine (LOCAL_RANK 0) fetches, the others of that machine wait and find it
in the cache. Where several machines share the cache's disk, their first ranks take turns, by a lock
file: the first one downloads, and those after it find what it has. So do runs that start at the
same time.
"""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path

from harness.ranks import all_reduce

BEAT = 5  # seconds between two signs of life of the process that has the turn
SILENT = 90  # seconds without one, after which it counts as dead. NFS may show them a minute late
SETTLE = 3  # seconds in which everybody sees who has taken a dead process's turn


def fetch_once(fetch, name):
    """fetch() in one process of each machine, while the others wait: what it returned, there, and
    None in the others. `name`, of what is fetched, is that of the lock file and stands in what a
    waiting process prints.

    fetch leaves (SystemExit) where it cannot do its work, having said why: then all ranks leave,
    with exit code 2.
    """
    found = None
    failed = False
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        try:
            with turn(lock_file(name), name):
                found = fetch()
        except SystemExit:
            failed = True
    # Who has nothing to fetch waits here
    if all_reduce([failed], "max")[0]:
        raise SystemExit(2)
    return found


def lock_file(name):
    """In the folder that the hub's own locks are in: on the disk that they guard."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / ".locks" / f"lad--{name.replace('/', '--')}.lock"


# ==== Taking turns ==============================================================================
# The lock is the file's existence. Making it is atomic on every disk that machines share; flock is
# not known everywhere, and on some disks works on each machine by itself. So flock only tells, on
# the machine where the file was made, whether its process lives. Other machines go by the file's
# time, which that process renews.


@contextlib.contextmanager
def turn(path, name):
    """Run the block in one process at a time, of all that see the file `path`. Where it cannot be
    made, as in a cache that is read-only, nobody waits."""
    try:
        file = wait_for_turn(path, name)
    except OSError:
        file = None
    over = threading.Event()
    if file:
        threading.Thread(target=give_signs, args=(file, over), daemon=True).start()
    try:
        yield
    finally:
        over.set()
        if file:
            leave(file, path)


def wait_for_turn(path, name):
    """The open file `path`, ours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seen = None  # the last sign of life of whoever has the turn
    since = time.monotonic()
    waiting = False
    while True:
        # Nobody has it, or a process of this machine that is no more
        file = make(path) or inherit(path)
        if file:
            return file

        # Somebody has it, perhaps on another machine. Does it live?
        sign = sign_of_life(path)
        if sign != seen:
            seen = sign
            since = time.monotonic()
        elif sign and time.monotonic() - since > SILENT:
            file = take_over(path, sign)
            if file:
                return file

        # Wait, and say for whom
        if sign and not waiting:
            owner = read_owner(path)
            who = "process {pid} on {host}".format(**owner) if owner else "another process"
            print(f"hub       {name}: {who} is fetching it; waiting for that", flush=True)
            waiting = True
        time.sleep(0.5)


def make(path):
    """The file, if there was none."""
    try:
        return sign_up(open(path, "x+"))
    except FileExistsError:
        return None


def inherit(path):
    """The file of a process of this machine that was killed: the kernel has let its lock go."""
    if read_owner(path).get("boot") != boot():
        return None
    try:
        file = open(path, "r+")
    except OSError:  # it has just ended, or it is another user's
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
            return sign_up(file)
    except OSError:  # it lives, or it has just ended, or this disk has no flock
        pass
    file.close()
    return None


def take_over(path, sign):
    """A file of our own in the place of one that is silent, unless another one was quicker."""
    # Written beside it, then moved into its place, if it is silent still
    ours = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}")
    file = sign_up(open(ours, "w+"))
    if sign_of_life(path) != sign:
        file.close()
        ours.unlink()
        return None
    ours.rename(path)

    # Of several that do this at once, the last one's file stays
    time.sleep(SETTLE)
    if is_ours(file, path):
        return file
    file.close()
    return None


def sign_up(file):
    """Lock it where the disk can, then write who has it: in this order, for a file that names its
    owner and is not locked is inherited."""
    with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    owner = dict(host=socket.gethostname(), boot=boot(), pid=os.getpid())
    file.truncate(0)
    file.write(json.dumps(owner))
    file.flush()
    return file


def read_owner(path):
    """{host, boot, pid}; {} where there is none."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def boot():
    """The name of this start of this machine: no other has it."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def sign_of_life(path):
    """What changes as long as the file's process lives; None without a file. It is opened, since
    that makes NFS ask its server."""
    try:
        with open(path) as file:
            found = os.fstat(file.fileno())
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def give_signs(file, over):
    while not over.wait(BEAT):
        with contextlib.suppress(OSError, ValueError):  # a disk that hangs; the block has ended
            os.utime(file.fileno())


def is_ours(file, path):
    try:
        return os.fstat(file.fileno()).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False


def leave(file, path):
    """Remove it, unless somebody took us for dead and has the turn."""
    with contextlib.suppress(OSError):
        if is_ours(file, path):
            path.unlink()
    file.close()
