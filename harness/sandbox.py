"""
The box that a program runs in: by Linux alone, without root, daemon or container.

A worker of verify.py keeps two boxes (python -I -S sandbox.py --box MODE PACKAGES), each the first
process of its own namespaces, forking a child for each run. Job and stdin come in memory files,
output leaves by a pipe, expected outputs stay with the worker. Tests that are code run in the
second box and call the program over two pipes, by plain data only.

    1  the box            what a program may do: seccomp, Landlock, namespaces, limits
    2  calls              pack, unpack, serve (in the program's box), check (in the tests' box)
    3  the worker's side  Sandbox: starts the boxes, runs programs, tells time

A program has Python 3, its standard library and what is installed, 32 MB of /tmp (none under
Landlock), 1 GB of memory, 64 threads (none under Landlock); no processes, no network.

OSError where a sandbox cannot be had: on anything but x86-64 Linux, or where both kinds are denied.
This file is run by itself, in the box, and imports nothing of this project.
"""

import atexit
import builtins
import collections
import ctypes
import decimal
import fractions
import importlib
import json
import math
import os
import re
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
import threading
import time
import types

# What a program that is called by tests, and the tests, have at hand, as on LeetCode
PRELUDE = """
from typing import *; from collections import *; from itertools import *; from functools import *
from heapq import *; from bisect import *; from math import *; from string import *
from builtins import pow
import collections, itertools, functools, heapq, bisect, math, string, re, random, operator"""

# Imported by a box, so that they cost its programs nothing
MODULES = "bisect collections functools heapq itertools math operator random string typing".split()

# ==== 1. The box ================================================================================

# x86-64 system calls: files, memory, time; no exec, fork, kill, socket, mount
SYSCALLS = """0-25 28 32-39 60 63 72 74 77-89 95-100 102 104 107 108 110 111 131 186 201 202 204
    217-219 228-231 257 258 262-264 267 269-271 273 292 293 318 332 334 436 439"""

# Else a numerical library starts a thread a core, whose stacks alone may be more than a program has
ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}

# Arguments of prctl
PDEATHSIG = 1
DUMPABLE = 4
SECCOMP = 22
NO_NEW_PRIVS = 38

# System calls that libc has no name for
CAPSET = 126
PIVOT_ROOT = 155
CLONE = 56
CLONE3 = 435
PRLIMIT = 302
MOUNT_SETATTR = 442
LANDLOCK_CREATE = 444
LANDLOCK_ADD = 445
LANDLOCK_RESTRICT = 446

# Flags
NEW_USER = 0x10000000
NEW_PID_NET_MOUNT_IPC_UTS = 0x6C020000
MAKE_PRIVATE = 0x44000
BIND = 0x5000
RECURSIVELY = 0x8000


def attempt(function, *args):
    """Its result, or None where it raises."""
    try:
        return function(*args)
    except Exception:
        return None


def libc(name, *args):
    """A function of libc, or a system call by its number; raises OSError."""
    lib = ctypes.CDLL(None, use_errno=True)
    if isinstance(name, int):
        result = lib.syscall(name, *args)
    else:
        result = getattr(lib, name)(*args)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


def allowed_calls():
    """The numbers in SYSCALLS."""
    for span in SYSCALLS.split():
        first, _, last = span.partition("-")
        yield from range(int(first), int(last or first) + 1)


def seccomp(threads):
    """From here on only SYSCALLS, clone only for threads, prlimit only on oneself; all else is
    EPERM.

    A program of the kernel's packet filter: (operation, constant, jump if true, jump if false).
    """
    load, equal, has_bits, answer = 0x20, 0x15, 0x45, 0x06
    number, architecture, first_argument = 0, 4, 16  # where they lie in what the filter sees
    allow, refuse, no_such_call, die = 0x7FFF0000, 0x50001, 0x50026, 0x80000000

    # Another architecture has other numbers: none of it
    filter = [(load, architecture), (equal, 0xC000003E, 1), (answer, die), (load, number)]
    for call in allowed_calls():
        filter += [(equal, call, 0, 1), (answer, allow)]
    filter += [(equal, CLONE3, 0, 1), (answer, no_such_call)]  # libc then takes clone
    filter += [(equal, PRLIMIT, 0, 4), (load, first_argument), (equal, 0, 0, 1)]
    filter += [(answer, allow), (answer, refuse)]
    thread_bit = 0x10000 if threads else 0
    filter += [(equal, CLONE, 0, 3), (load, first_argument), (has_bits, thread_bit, 0, 1)]
    filter += [(answer, allow), (answer, refuse)]

    # As the kernel wants it
    packed = b""
    for operation, constant, *jumps in filter:
        if_true, if_false = (*jumps, 0, 0)[:2]
        packed += struct.pack("HBBI", operation, if_true, if_false, constant)
    buffer = ctypes.create_string_buffer(packed)
    program = struct.pack("HxxxxxxP", len(filter), ctypes.addressof(buffer))
    libc("prctl", NO_NEW_PRIVS, 1, 0, 0, 0)  # wanted before a filter
    libc("prctl", SECCOMP, 2, program, 0, 0)


def landlock(readable):
    """Where namespaces are denied: no files but these trees, to read, and /dev/null."""
    all_rights, write_and_read, read_file_and_folder = (1 << 13) - 1, 0b110, 0b1100
    rules = libc(LANDLOCK_CREATE, struct.pack("Q", all_rights), 8, 0)
    allowed = {"/dev/null": write_and_read}
    for path in readable:
        allowed[path] = read_file_and_folder
    for path, rights in allowed.items():
        below = struct.pack("=Qi", rights, os.open(path, os.O_PATH))
        libc(LANDLOCK_ADD, rules, 1, below, 0)
    libc("prctl", NO_NEW_PRIVS, 1, 0, 0, 0)
    libc(LANDLOCK_RESTRICT, rules, 0)


def unshare():
    """New namespaces; a user namespace grants them to who is not root, or a root without
    capabilities."""
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0 and attempt(libc, "unshare", NEW_PID_NET_MOUNT_IPC_UTS) is not None:
        return
    libc("unshare", NEW_PID_NET_MOUNT_IPC_UTS | NEW_USER)
    maps = {"setgroups": "deny", "uid_map": f"{uid} {uid} 1", "gid_map": f"{gid} {gid} 1"}
    for name, line in maps.items():
        with open("/proc/self/" + name, "w") as file:
            file.write(line)


def namespaces(readable):
    """Become the first process of new namespaces, in a read-only root of binds: these trees, three
    devices and an empty /tmp.

    Returns the trees that lie under /tmp, [(their place, where else they are)]: the /tmp of each
    program hides them, so they are laid into it anew.
    """
    unshare()
    if os.fork():  # waits, and dies with its worker
        os.wait()
        os._exit(0)
    libc("prctl", PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # die with it, too
    libc("mount", b"none", b"/", None, MAKE_PRIVATE, None)  # mounts from here on are private

    # The new root is built on /proc, which is wanted nowhere; links in it lead nowhere from then on
    sources = [os.path.realpath(path) for path in readable]
    libc("mount", b"box", b"/proc", b"tmpfs", 0, b"size=1m,mode=755")
    hidden = []
    for number, (path, source) in enumerate(zip(readable, sources, strict=True)):
        place = path
        if path == "/tmp" or path.startswith("/tmp/"):
            place = f"/trees/{number}"
            hidden.append((path, place))
        bind(source, "/proc" + place)
    os.makedirs("/proc/dev", exist_ok=True)
    for name in ("null", "zero", "urandom"):
        os.mknod("/proc/dev/" + name)
        bind("/dev/" + name, "/proc/dev/" + name)
    os.makedirs("/proc/tmp", exist_ok=True)

    os.chdir("/proc")
    libc(PIVOT_ROOT, b".", b".")
    libc("umount2", b".", 2)  # the old root
    os.chdir("/")
    read_only(b"/")
    return hidden


def bind(source, place):
    """`source` is seen at `place` too, with what is mounted in it; OSError. Read-only and without
    set-uid programs where it was so."""
    if not os.path.exists(place):
        # The folders on the way to it can be passed, and not listed: names tell of the machine
        umask = os.umask(0o666)
        os.makedirs(place)
        os.umask(umask)
    libc("mount", os.fsencode(source), os.fsencode(place), None, BIND, None)


def read_only(path):
    """Nothing can be written below it, nor a set-uid program run."""
    flags = struct.pack("QQQQ", 3, 0, 0, 0)
    libc(MOUNT_SETATTR, -100, path, RECURSIVELY, flags, 32)


def fresh_tmp(hidden):
    """An empty /tmp of 32 MB for one program, and in it the trees that it would hide."""
    libc("mount", b"tmp", b"/tmp", b"tmpfs", 6, b"size=32m,nr_inodes=1000,mode=1777")
    for path, place in hidden:
        bind(place, path)
        read_only(os.fsencode(path))


def trees(packages):
    """What a program may read: Python, its libraries, the installed packages and what links in
    their folder lead to."""
    lib = os.path.dirname(os.path.dirname(os.__file__))
    found = [lib, "/lib", "/lib64", "/usr/lib", "/usr/lib64", packages]
    for entry in os.scandir(packages):
        if entry.is_symlink():
            link = os.path.join(packages, os.readlink(entry))
            found.append(os.path.normpath(link))
    return [path for path in dict.fromkeys(found) if os.path.isdir(path)]


def close_box(mode, readable):
    """Shut this process in, as far as all programs share it; the trees that /tmp hides. OSError
    where the mode cannot be had."""
    if mode not in ("namespaces", "landlock", "unsafe"):
        raise OSError("no such sandbox")
    hidden = []
    if mode != "unsafe" and (os.uname().sysname, os.uname().machine) != ("Linux", "x86_64"):
        raise OSError("the system call filter is written for x86-64 Linux")
    if mode == "namespaces":
        hidden = namespaces(readable)
    if mode == "landlock":
        libc(LANDLOCK_CREATE, None, 0, 1)  # its version, if there is any
    libc("prctl", DUMPABLE, 0, 0, 0, 0)  # not to be traced
    return hidden


def box_main(mode, packages):
    """Answer "ready"; then for each message fork a child, wait for it or for word to kill it,
    answer its status."""
    libc("prctl", PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # die with the worker
    control = socket.socket(fileno=os.dup(0))
    for name in MODULES:
        importlib.import_module(name)
    readable = trees(packages)
    try:
        hidden = close_box(mode, readable)
    except OSError as error:
        control.send(f"{mode}: {error}".encode())
        return
    sys.path.append(packages)
    control.send(b"ready")
    while True:
        message, fds, _, _ = socket.recv_fds(control, 100, 8)
        if not message:
            return
        if message == b"kill":  # it was over already
            continue
        if mode == "namespaces":
            fresh_tmp(hidden)
        status = run_child(mode, readable, control, fds)
        if mode == "namespaces":
            libc("umount2", b"/tmp", 2)
        control.send(b"%d" % status)


def run_child(mode, readable, control, fds):
    """Fork for one job, wait for its end or for a message, which means to kill it; its exit
    status."""
    child = os.fork()
    if child == 0:
        try:
            child_main(mode, readable, fds)
        finally:
            os._exit(70)  # it raised
    # Until it ends, or a message comes
    watch = os.pidfd_open(child)
    if watch not in select.select([watch, control], [], [])[0]:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    for fd in (*fds, watch):
        os.close(fd)
    return os.waitstatus_to_exitcode(status)


def child_main(mode, readable, fds):
    """Give up everything, then "run" a program, "serve" its functions or "check" it by the
    tests."""
    if mode == "landlock":
        landlock(readable)
    with open(fds[0]) as file:
        job = json.load(file)
    take_places(fds)
    os.chdir("/tmp" if mode == "namespaces" else "/")
    if mode == "namespaces" and os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(job["uid"], job["uid"], job["uid"])
        os.setresuid(job["uid"], job["uid"], job["uid"])
    set_limits(job, mode)
    # Last what forbids the rest
    if mode != "unsafe":
        libc(CAPSET, struct.pack("II", 0x20080522, 0), bytes(24))  # no capabilities
        seccomp(threads=mode == "namespaces")

    # The program finds a fresh Python
    sys.argv = ["main.py"]
    sys.set_int_max_str_digits(0)  # a limit on time is set already
    builtins.exit = builtins.quit = sys.exit  # -S leaves them out
    code = execute(job)

    # What Python does at its end
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code & 255)


def take_places(fds):
    """stdin and stdout as given, no stderr, further ones from 3 on, and no other descriptor."""
    # By way of high numbers, so that none is overwritten
    kept = [fds[1], fds[2], os.open(os.devnull, os.O_RDWR), *fds[3:]]
    for place, fd in enumerate(kept):
        os.dup2(fd, place + 20)
    for place in range(len(kept)):
        os.dup2(place + 20, place)
    os.closerange(len(kept), 65536)


def set_limits(job, mode):
    """Of resources, as hard ones."""
    limits = {
        resource.RLIMIT_AS: job["memory"],
        resource.RLIMIT_CPU: int(job["seconds"]) + 1,
        resource.RLIMIT_FSIZE: 1 << 24,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_STACK: 1 << 28,
        resource.RLIMIT_MEMLOCK: 0,
    }
    if mode == "namespaces":
        limits[resource.RLIMIT_NPROC] = 64  # elsewhere it counts all that the user has
    for kind, value in limits.items():
        hard = resource.getrlimit(kind)[1]
        if hard >= 0:
            value = min(value, hard)
        resource.setrlimit(kind, (value, value))


def execute(job):
    """The program of a job, and what is to be done with it; its exit code."""
    role = job["role"]
    # A module of its own
    module = types.ModuleType("__main__" if role == "run" else "solution")
    sys.modules["__main__"] = module
    names = vars(module)
    try:
        if role != "run":
            exec(PRELUDE, names)
            begin(job, names)
        exec(compile(job.get("program", ""), "main.py", "exec"), names)
        if role == "serve":
            serve(names)
        elif role == "check":
            check(names, job)
    except SystemExit as stop:
        if isinstance(stop.code, int):
            return stop.code
        return int(stop.code is not None)
    return 0


def begin(job, names):
    """What the prompt of a row defines, as helpers of what it asks for, but not that itself: its
    beginning is no solution."""
    try:
        exec(job["prompt"], names)
    except Exception:  # it lacks a package, say: then the program does without
        pass
    names.pop(job["entry"], None)
    names.pop("Solution", None)


# ==== 2. Calls ==================================================================================


def pack(value):
    """Plain data as JSON, tagged where JSON has no word for it; anything else is a TypeError.
    Arrays and scalars of numpy are lists and numbers."""
    # Numpy, which the box itself does not import
    kind = type(value)
    if kind.__module__ == "numpy" and hasattr(value, "tolist"):
        return pack(value.tolist())
    # Containers
    if isinstance(value, dict):
        return {"dict": [[pack(key), pack(member)] for key, member in value.items()]}
    if isinstance(value, list):
        return value if kind is list and is_simple(value) else [pack(member) for member in value]
    for tag, kinds in TAGGED.items():
        if isinstance(value, kinds):
            return {tag: [pack(member) for member in value]}
    # Numbers and texts; long integers in hexadecimal, which takes linear time
    if isinstance(value, int) and value.bit_length() > 64:
        return {"int": hex(value)}
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    # What JSON has no word for
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, (fractions.Fraction, decimal.Decimal)):
        return {kind.__name__.lower(): str(value)}
    raise TypeError(f"{kind.__name__} is not plain data")


# Containers that JSON lists with a tag
TAGGED = {"tuple": tuple, "set": (set, frozenset), "deque": collections.deque}


def is_simple(values):
    """Whether JSON has a word for each member of a list: a million of them take no time then."""
    kinds = set(map(type, values))
    if not kinds <= {bool, int, float, str, type(None)}:
        return False
    return int not in kinds or all(
        value.bit_length() <= 64 for value in values if type(value) is int
    )


def unpack_int(text):
    return int(text, 16)


def unpack_complex(parts):
    return complex(*parts)


UNPACK = {
    "dict": dict,
    "tuple": tuple,
    "set": set,
    "deque": collections.deque,
    "int": unpack_int,
    "bytes": bytes.fromhex,
    "complex": unpack_complex,
    "fraction": fractions.Fraction,
    "decimal": decimal.Decimal,
}


def unpack(tagged):
    """The value that pack tagged."""
    [(kind, value)] = tagged.items()
    return UNPACK[kind](value)


def serve(names):
    """In the program's box: make the calls that come on descriptor 3, answer on 4."""
    with open(3) as calls, open(4, "w", buffering=1) as replies:
        for line in calls:
            try:
                path, args, kwargs = json.loads(line, object_hook=unpack)
                reply = ["value", pack(find(names, path)(*args, **kwargs))]
            except Exception as error:
                reply = ["error", type(error).__name__]
            print(json.dumps(reply), file=replies)


def find(names, path):
    """What a path of names leads to: from a class Solution that has the first of them, or from the
    program. A class on the way is instantiated."""
    # Where it begins
    if hasattr(names.get("Solution"), path[0]):
        target = names["Solution"]
    else:
        target = names[path[0]]
        path = path[1:]
    # Where it leads
    for name in path:
        if isinstance(target, type):
            target = target()
        target = getattr(target, name)
    return target


class Failed(BaseException):
    """The program gave no value: its reason is the item's. Tests that catch any Exception do not
    catch it."""


class Remote:
    """A name of the program, as tests see it. A call over the link (replies, calls, seconds for
    one) gives its value or the same kind of error; SIGALRM ends the tests where it is late.
    Solution() is made anew for each call."""

    ERRORS = {
        "ValueError": ValueError,
        "TypeError": TypeError,
        "KeyError": KeyError,
        "IndexError": IndexError,
    }
    LONGEST = 1 << 26  # characters of a reply
    calls = 0  # made so far

    def __init__(self, path, link):
        self._path = path
        self._link = link

    def __getattr__(self, name):
        return Remote([*self._path, name], self._link)

    def __call__(self, *args, **kwargs):
        if self._path == ["Solution"]:
            return self
        replies, calls, seconds = self._link
        Remote.calls += 1
        try:
            print(json.dumps([self._path, pack(args), pack(kwargs)]), file=calls)
        except BrokenPipeError:
            raise Failed("crashed") from None
        signal.setitimer(signal.ITIMER_REAL, seconds)
        reply = replies.readline(Remote.LONGEST)
        signal.setitimer(signal.ITIMER_REAL, 0)
        if len(reply) == Remote.LONGEST:
            raise Failed("too long")
        try:
            kind, value = json.loads(reply, object_hook=unpack)
        except (ValueError, TypeError, KeyError, ArithmeticError, RecursionError):
            raise Failed("crashed") from None  # it has ended, or what it wrote is no reply
        if kind != "value":
            raise Remote.ERRORS.get(value, RuntimeError)(Failed("crashed"))
        return value


SEQUENCES = (list, tuple, collections.deque)


def equal(got, want, atol):
    """Equal plain data, tuples and deques as lists. Floats are equal to atol or one part in 10^7;
    atol None: exactly. Nothing but infinity is equal to infinity."""
    if got == want:
        return True
    # Part by part
    if isinstance(got, SEQUENCES) and isinstance(want, SEQUENCES):
        if len(got) != len(want):
            return False
        return all(equal(g, w, atol) for g, w in zip(got, want, strict=True))
    if isinstance(got, dict) and isinstance(want, dict):
        return got.keys() == want.keys() and all(equal(got[key], want[key], atol) for key in want)
    # Numbers of which one is a float
    if {type(got), type(want)} not in ({float}, {int, float}):
        return False
    if got != got or want != want:
        return got != got and want != want
    if atol is None or math.inf in (abs(got), abs(want)):
        return False
    return abs(got - want) <= max(atol, 1e-6) + 1e-7 * abs(want)


def check(names, job):
    """In the tests' box: write to descriptor 1 what the tests say, see `verdict`."""
    # The link to the program, and the way out
    replies, calls = open(3), open(4, "w", buffering=1)
    link = (replies, calls, job["call_seconds"])
    out = os.dup(1)
    os.dup2(2, 1)  # what the tests print is no verdict
    os.write(out, verdict(names, job, link).encode())


def verdict(names, job, link):
    """ "pass", "wrong", or a reason: "truth unparsable" where the tests themselves do not load or
    never call the program, "crashed" where the program raised or ended, "too long" and "too large"
    where its values are."""
    # What the tests need
    try:
        reference = load_tests(names, job, link)
        tests = compile(job["test"], "tests.py", "exec")
    except BaseException:
        return "truth unparsable"
    # The tests themselves
    try:
        run_cases(names, job, Remote([job["entry"]], link), reference)
        exec(tests, names)
        if job["entry"] and "check" in names and not re.search(r"^check\(", job["test"], re.M):
            names["check"](names["candidate"])
    except Failed as why:
        return str(why)
    except AssertionError:
        return "wrong"
    except MemoryError:
        return "too large"
    except (ImportError, NameError, SystemExit):
        return "truth unparsable"
    except Exception as error:
        # of the program, or of tests that compute with the value of a wrong type
        of_program = any(isinstance(arg, Failed) for arg in error.args)
        return "crashed" if of_program else "wrong"
    if not Remote.calls:  # what asks nothing says nothing
        return "truth unparsable"
    return "pass"


def load_tests(names, job, link):
    """Give the tests the names of the program that they use; the solution that says what is right,
    if the row has one."""
    entry = job["entry"]
    # The solution of the row, under a name of ours
    exec(job["reference"], names)
    reference = names.pop(entry, None)
    names["Solution"] = Remote(["Solution"], link)
    # Every name that nobody defines is the program's
    for name in job["uses"]:
        if name not in names and not hasattr(builtins, name):
            names[name] = Remote([name], link)
    if entry:
        names[entry] = names["candidate"] = Remote([entry], link)
    return reference


def run_cases(names, job, candidate, reference):
    """Calls with the values that they should give, or with what the reference gives;
    AssertionError.

    Where a row may have wrapped each value in a list (job["wrapped"]), all values are read in one
    of the two ways.
    """
    readings = ["as it is", "wrapped"] if job["wrapped"] else ["as it is"]
    for case in job["cases"]:
        args, named, *want = json.loads(case, object_hook=unpack)
        got = candidate(*args, **named)
        if job["entry"] == "find_zero" and "poly" in names:  # any root is right, as in EvalPlus
            assert abs(names["poly"](args[0], got)) <= 1e-4
            continue
        expected = want[0] if want else reference(*args, **named)
        for reading in list(readings):
            value = expected[0] if reading == "wrapped" else expected
            if not equal(got, value, job["atol"]):
                readings.remove(reading)
        assert readings


# ==== 3. The worker's side ======================================================================


def drain(fd, cap, deadline):
    """What comes out of a pipe until it is closed, time is up, or it is more than cap bytes."""
    data = b""
    while len(data) <= cap:
        left = max(0, deadline - time.monotonic())
        if not select.select([fd], [], [], left)[0]:
            break
        more = os.read(fd, 1 << 16)
        if not more:
            break
        data += more
    os.close(fd)
    return data


class Sandbox:
    """The two boxes of a worker, started when first needed and again when lost. Modes: namespaces,
    landlock, unsafe (limits of resources only), auto (the first that works of the first two).
    OSError where that cannot be had."""

    def __init__(self, mode):
        """Start the program's box at once, to know."""
        self.boxes = {}
        self.mode = "namespaces" if mode == "auto" else mode
        self.why = ""  # what namespaces failed for
        try:
            self.box("program")
        except OSError as error:
            if mode != "auto":
                raise
            self.mode = "landlock"
            self.why = str(error)
            self.box("program")

    def box(self, name):
        """(control socket, process) of the box for the "program" or the "tests"."""
        if name not in self.boxes:
            self.boxes[name] = self.open_box()
        return self.boxes[name]

    def open_box(self):
        """A new box, which has said that it is ready. OSError, with what it says instead."""
        # The process, with one end of a socket as its stdin
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-I", "-S", "-X", "utf8", os.path.abspath(__file__)]
        command += ["--box", self.mode, sysconfig.get_path("purelib")]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, env=ENVIRONMENT, stdin=theirs, **quiet)
        theirs.close()
        ours.settimeout(30)
        # What it says when it has shut itself in
        answer = ""
        try:
            answer = ours.recv(4096).decode()
        finally:
            if answer != "ready":  # leave no zombie
                process.kill()
                process.wait()
                ours.close()
        if answer != "ready":
            raise OSError(answer or f"{self.mode}: the box process died")
        ours.settimeout(2)
        return ours, process

    def start(self, name, job, stdin, *fds):
        """Begin a run in a box; the descriptors are handed over and closed here."""
        control, process = self.box(name)
        job["uid"] = (1 << 30) + process.pid  # a user of its own: so are its limits
        held = [memory_file("job", json.dumps(job)), memory_file("stdin", stdin), *fds]
        socket.send_fds(control, [b"run"], held)
        for fd in held:
            os.close(fd)

    def finish(self, name, deadline):
        """The exit status (negative: a signal), or None where it had to be killed for time."""
        control, _ = self.box(name)
        left = max(0, deadline - time.monotonic())
        if select.select([control], [], [], left)[0]:
            return int(control.recv(64))
        control.send(b"kill")
        control.recv(64)
        return None

    def lost(self):
        """End both boxes; the next item gets new ones."""
        while self.boxes:
            _, (control, process) = self.boxes.popitem()
            process.kill()
            process.wait()
            control.close()

    def run(self, program, stdin, cap, limits, deadline):
        """(reason, output) of one program on one stdin."""
        # The program, its output capped
        read, write = os.pipe()
        end = min(deadline, time.monotonic() + limits["seconds"])
        self.start("program", {"role": "run", "program": program, **limits}, stdin, write)
        output = drain(read, cap, end)
        too_long = len(output) > cap
        status = self.finish("program", 0 if too_long else end)
        # Why its output does not count
        if too_long:
            return "too long", output
        if status in (None, -signal.SIGXCPU):
            return "timeout", output
        if status:
            return "crashed", output
        return "", output

    def call(self, program, job, limits, deadline):
        """Run tests that are code: "" where they pass, else the reason, or "wrong"."""
        # A pipe each for calls, values and the verdict
        ask_read, ask_write = os.pipe()
        answer_read, answer_write = os.pipe()
        verdict_read, verdict_write = os.pipe()
        served = {"role": "serve", "program": program, "memory": limits["memory"]}
        served |= {"prompt": job["prompt"], "entry": job["entry"]}
        served["seconds"] = max(0, deadline - time.monotonic())
        # The program, which sees neither tests nor verdict
        silence = os.open(os.devnull, os.O_WRONLY)
        self.start("program", served, "", silence, ask_read, answer_write)
        # The tests' own time is all that is left: they wait for many calls
        tests = {"role": "check", **job, "memory": limits["memory"], "seconds": served["seconds"]}
        tests["call_seconds"] = limits["seconds"]
        self.start("tests", tests, "", verdict_write, answer_read, ask_write)

        # What the tests say, and how the two ended
        said = drain(verdict_read, 100, deadline).decode()
        late = (None, -signal.SIGALRM, -signal.SIGXCPU)
        tests_late = self.finish("tests", deadline) in late
        program_end = 0 if tests_late else time.monotonic() + 0.05
        program_status = self.finish("program", program_end)
        if said == "pass":
            return ""
        if tests_late or (said == "crashed" and program_status == -signal.SIGXCPU):
            return "timeout"
        return said or "crashed"


def memory_file(name, text):
    """A descriptor of a file in memory, at its start."""
    fd = os.memfd_create(name)
    with open(fd, "w", closefd=False) as file:
        file.write(text)
        file.seek(0)
    return fd


if __name__ == "__main__":
    box_main(*sys.argv[2:])
