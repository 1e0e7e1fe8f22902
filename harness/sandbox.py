"""The box that a program runs in and the judging of code, for verify.py: by Linux alone, no root, daemon or container.

A worker keeps two boxes (python -I -S sandbox.py --box MODE PACKAGES), each pid 1 of its own namespaces, forking a
child a run. Job and stdin come in memory files, output leaves by a pipe, expected outputs stay with the worker. Tests
that are code run in the second box and call the program over two pipes. Covered: Python 3 with its standard library
and what is installed, on stdin or called by tests; 32 MB of /tmp, 1 GB, 64 threads; no processes or network. Not
covered: other languages, asyncio, interactive problems, several right outputs, tests of changed arguments or kept
objects; side channels, kernel bugs; machines but x86-64 Linux. OSError where a sandbox cannot be had.
"""
import atexit, builtins, copy, ctypes, json, os, re, resource, select, signal, socket, struct, subprocess, sys
import sysconfig, threading, time, types
import bisect, collections, functools, heapq, itertools, math, operator, random, string, typing   # for programs, once
from fractions import Fraction

PRELUDE = """
from typing import *; from collections import *; from itertools import *; from functools import *; from heapq import *
from bisect import *; from math import *; from string import *; from builtins import pow
import collections, itertools, functools, heapq, bisect, math, string, re, random, operator"""
SYSCALLS = """0-25 28 32-39 60 63 72 74 77-89 95-100 102 104 107 108 110 111 131 186 201 202 204 217-219 228-231 257 258
    262-264 267 269-271 273 292 293 318 332 334 436 439"""   # files, memory, time; no exec, fork, kill, socket, mount
ENVIRONMENT = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")   # else a thread a core, whose
                                                             # stacks alone are more than a program may have where there are many
PDEATHSIG, DUMPABLE, SECCOMP, NO_NEW_PRIVS = 1, 4, 22, 38    # of prctl; next, system calls that libc has no name for
CAPSET, PIVOT_ROOT, MOUNT_SETATTR, LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 126, 155, 442, 444, 445, 446

def attempt(function, *args):
    """Its result, or None where it raises."""
    try:
        return function(*args)
    except Exception:
        return None

# ==== 1. The box (x86-64 Linux) ======================================================================================

def libc(name, *args):
    """A function of libc, or a system call by its number; raises OSError."""
    lib = ctypes.CDLL(None, use_errno=True)
    if (result := lib.syscall(name, *args) if isinstance(name, int) else getattr(lib, name)(*args)) < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result

def seccomp(threads):
    """From here on only SYSCALLS, clone only for threads, prlimit only on oneself; all else is EPERM."""
    load, equal, has, ret, allow, refuse = 0x20, 0x15, 0x45, 0x06, 0x7FFF0000, 0x50001
    code = [(load, 4), (equal, 0xC000003E, 1), (ret, 0x80000000), (load, 0)]        # of another architecture: die
    for first, last in ((span.split("-") * 2)[:2] for span in SYSCALLS.split()):
        for number in range(int(first), int(last) + 1):
            code += [(equal, number, 0, 1), (ret, allow)]
    code += [(equal, 435, 0, 1), (ret, 0x50026)]                                    # clone3: ENOSYS
    code += [(equal, 302, 0, 4), (load, 16), (equal, 0, 0, 1), (ret, allow), (ret, refuse)]
    code += [(equal, 56, 0, 3), (load, 16), (has, 0x10000 if threads else 0, 0, 1), (ret, allow), (ret, refuse)]
    packed = b"".join(struct.pack("HBBI", op, *(*jumps, 0, 0)[:2], k) for op, k, *jumps in code)
    address = ctypes.addressof(buffer := ctypes.create_string_buffer(packed))
    libc("prctl", NO_NEW_PRIVS, 1, 0, 0, 0)                                         # wanted before a filter
    libc("prctl", SECCOMP, 2, struct.pack("HxxxxxxP", len(code), address), 0, 0)

def landlock(readable):
    """Where namespaces are denied: no files but these trees, to read, and /dev/null."""
    rules = libc(LANDLOCK_CREATE, struct.pack("Q", (1 << 13) - 1), 8, 0)
    for path, rights in [("/dev/null", 0b110), *((path, 0b1100) for path in readable)]:     # folder, file, write
        libc(LANDLOCK_ADD, rules, 1, struct.pack("=Qi", rights, os.open(path, os.O_PATH)), 0)
    libc("prctl", NO_NEW_PRIVS, 1, 0, 0, 0)
    libc(LANDLOCK_RESTRICT, rules, 0)

def namespaces(readable):
    """Become pid 1 of new namespaces, in a read-only root of binds: these trees, three devices and an empty /tmp.

    Returns the trees that lie under /tmp, [(their place, where else they are)]: the /tmp of each program hides them, so they are
    laid into it anew."""
    uid, gid, spaces = os.geteuid(), os.getegid(), 0x6C020000                       # pid, net, mount, ipc, uts
    if uid or attempt(libc, "unshare", spaces) is None:                             # also a root without capabilities
        libc("unshare", spaces | 0x10000000)                                        # a user namespace grants them
        for name, line in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open("/proc/self/" + name, "w") as f:
                f.write(line)
    if os.fork():                                                                   # waits, and dies with its worker
        os.wait()
        os._exit(0)
    libc("prctl", PDEATHSIG, signal.SIGKILL, 0, 0, 0)                               # die with it, too
    libc("mount", b"none", b"/", None, 0x44000, None)                               # mounts from here on are private
    sources = [os.path.realpath(path) for path in readable]                         # links in /proc lead nowhere from the next line on
    libc("mount", b"box", b"/proc", b"tmpfs", 0, b"size=1m,mode=755")               # /proc itself is wanted nowhere
    hidden = []
    for number, (path, source) in enumerate(zip(readable, sources)):
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
    libc("umount2", b".", 2)
    os.chdir("/")
    libc(MOUNT_SETATTR, -100, b"/", 0x8000, struct.pack("QQQQ", 3, 0, 0, 0), 32)    # all read-only, recursively
    return hidden

def bind(source, place):
    """`source` is seen at `place` too, with what is mounted in it; OSError. Read-only and without set-uid programs where it was so."""
    if not os.path.exists(place):
        os.makedirs(place)
    libc("mount", os.fsencode(source), os.fsencode(place), None, 0x5000, None)

def fresh_tmp(hidden):
    """An empty /tmp of 32 MB for one program, and in it the trees that it would hide."""
    libc("mount", b"tmp", b"/tmp", b"tmpfs", 6, b"size=32m,nr_inodes=1000,mode=1777")
    for path, place in hidden:
        bind(place, path)
        libc(MOUNT_SETATTR, -100, os.fsencode(path), 0x8000, struct.pack("QQQQ", 3, 0, 0, 0), 32)

def box_main(mode, packages):
    """Answer "ready"; then for each message fork a child, wait for it or for word to kill it, answer its status."""
    libc("prctl", PDEATHSIG, signal.SIGKILL, 0, 0, 0)                               # die with the worker
    control, lib = socket.socket(fileno=os.dup(0)), os.path.dirname(os.path.dirname(os.__file__))
    links = [os.path.join(packages, os.readlink(entry)) for entry in os.scandir(packages) if entry.is_symlink()]
    trees = dict.fromkeys((lib, "/lib", "/lib64", "/usr/lib", "/usr/lib64", packages, *map(os.path.normpath, links)))
    readable = [path for path in trees if os.path.isdir(path)]
    try:
        if mode not in ("namespaces", "landlock", "unsafe"):
            raise OSError("no such sandbox")
        if mode != "unsafe" and os.uname()[::4] != ("Linux", "x86_64"):
            raise OSError("the system call filter is written for x86-64 Linux")
        if mode != "unsafe":                                                        # Landlock: its version, if any
            if mode == "namespaces":
                hidden = namespaces(readable)
            else:
                libc(LANDLOCK_CREATE, None, 0, 1)
        libc("prctl", DUMPABLE, 0, 0, 0, 0)                                         # not to be traced
    except OSError as error:
        return control.send(f"{mode}: {error}".encode())
    sys.path.append(packages)
    control.send(b"ready")
    while (message := socket.recv_fds(control, 100, 8))[0]:
        if message[0] == b"kill":                                                   # it was over already
            continue
        if mode == "namespaces":
            fresh_tmp(hidden)
        if (child := os.fork()) == 0:
            try:
                child_main(mode, readable, message[1])
            finally:
                os._exit(70)                                                        # it raised
        watch = os.pidfd_open(child)
        if watch not in select.select([watch, control], [], [])[0]:
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        for fd in (*message[1], watch):
            os.close(fd)
        if mode == "namespaces":
            libc("umount2", b"/tmp", 2)
        control.send(b"%d" % status)

def child_main(mode, readable, fds):
    """Give up everything, then "run" a program, "serve" its functions or "check" it by the tests."""
    if mode == "landlock":
        landlock(readable)
    with open(fds[0]) as f:
        job = json.load(f)
    kept = [fds[1], fds[2], os.open(os.devnull, os.O_RDWR), *fds[3:]]
    for place, fd in enumerate(kept):
        os.dup2(fd, place + 20)
    for place in range(len(kept)):
        os.dup2(place + 20, place)
    os.closerange(len(kept), 65536)
    os.chdir("/tmp" if mode == "namespaces" else "/")
    if mode == "namespaces" and os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(*[job["uid"]] * 3)
        os.setresuid(*[job["uid"]] * 3)
    limits = dict(AS=job["memory"], CPU=int(job["seconds"]) + 1, FSIZE=1 << 24, NOFILE=64, CORE=0, STACK=1 << 28)
    limits |= {"MEMLOCK": 0} | ({"NPROC": 64} if mode == "namespaces" else {})      # elsewhere it counts all the user's
    for name, value in limits.items():
        hard = resource.getrlimit(kind := getattr(resource, "RLIMIT_" + name))[1]
        resource.setrlimit(kind, [value if hard < 0 else min(value, hard)] * 2)
    if mode != "unsafe":
        libc(CAPSET, struct.pack("II", 0x20080522, 0), bytes(24))                   # no capabilities
        seccomp(threads=mode == "namespaces")
    role, sys.argv, builtins.exit, builtins.quit = job["role"], ["main.py"], sys.exit, sys.exit
    sys.modules["__main__"] = module = types.ModuleType("__main__" if role == "run" else "solution")
    try:
        exec("" if role == "run" else PRELUDE, names := vars(module))
        exec(compile(job.get("program", ""), "main.py", "exec"), names)
        if role != "run":
            serve(names) if role == "serve" else check(names, job)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code & 255)

# ==== 2. Tests that call the program, by plain data only =============================================================

def pack(value):
    """Plain data as JSON, tagged where JSON has no word for it; anything else is a TypeError."""
    if isinstance(value, dict):
        return {"dict": [[pack(key), pack(member)] for key, member in value.items()]}
    if isinstance(value, (list, tuple, set, frozenset)):
        members = [pack(member) for member in value]
        return members if isinstance(value, list) else {"tuple" if isinstance(value, tuple) else "set": members}
    if not isinstance(value, (bool, int, float, str, type(None))):
        raise TypeError(f"{type(value).__name__} is not plain data")
    return {"int": hex(value)} if isinstance(value, int) and value.bit_length() > 64 else value

def unpack(tagged):
    """The value that pack tagged."""
    [(kind, value)] = tagged.items()
    return {"dict": dict, "tuple": tuple, "set": set, "int": lambda text: int(text, 16)}[kind](value)

def serve(names):
    """In the program's box: make the calls that come on descriptor 3, answer on 4."""
    with open(3) as calls, open(4, "w", buffering=1) as replies:
        for line in calls:
            try:
                path, args, kwargs = json.loads(line, object_hook=unpack)
                target = names["Solution" if hasattr(names.get("Solution"), path[0]) else path.pop(0)]
                for name in path:
                    target = getattr(target() if isinstance(target, type) else target, name)
                reply = ["value", pack(target(*args, **kwargs))]
            except Exception as error:
                reply = ["error", type(error).__name__]
            print(json.dumps(reply), file=replies)

class Remote:
    """A name of the program, as tests see it. A call over the link (replies, calls, seconds for one) gives its value
    or the same kind of error; SIGALRM ends the tests where it is late. Solution() is made anew for each call."""
    ERRORS = {"ValueError": ValueError, "TypeError": TypeError, "KeyError": KeyError, "IndexError": IndexError}

    def __init__(self, path, link):
        self._path, self._link = path, link

    def __getattr__(self, name):
        return Remote(self._path + [name], self._link)

    def __call__(self, *args, **kwargs):
        if self._path == ["Solution"]:
            return self
        replies, calls, seconds = self._link
        print(json.dumps([self._path, pack(args), pack(kwargs)]), file=calls)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        kind, value = json.loads(replies.readline(1 << 26), object_hook=unpack)
        signal.setitimer(signal.ITIMER_REAL, 0)
        if kind != "value":
            raise Remote.ERRORS.get(value, RuntimeError)
        return value

def equal(got, want, atol):
    """Equal plain data; tuples as lists; floats to atol or one part in 10^7."""
    if isinstance(got, (list, tuple)) and isinstance(want, (list, tuple)):
        return len(got) == len(want) and all(equal(g, w, atol) for g, w in zip(got, want))
    if isinstance(got, dict) and isinstance(want, dict):
        return got.keys() == want.keys() and all(equal(got[key], want[key], atol) for key in want)
    if got == want or {type(got), type(want)} not in ({float}, {int, float}):
        return got == want
    return (got != got and want != want) or abs(got - want) <= max(atol, 1e-6) + 1e-7 * abs(want)

def check(names, job):
    """In the tests' box: write b"pass", or b"unparsable" where the tests themselves do not load."""
    link, verdict, entry = (open(3), open(4, "w", buffering=1), job["seconds"]), os.dup(1), job["entry"]
    os.dup2(2, 1)                                                                   # what the tests print is no verdict
    try:
        exec(job["prelude"], names)
        reference, tests = names.pop(entry, None), compile(job["test"], "tests.py", "exec")
    except BaseException:
        return os.write(verdict, b"unparsable")
    candidate = Remote([entry], link)
    names |= {"Solution": Remote(["Solution"], link), "candidate": candidate, entry: candidate}
    for args, *want in job["cases"]:
        got, want = candidate(*args), want[0] if want else reference(*copy.deepcopy(args))
        any_root = entry == "find_zero" and "poly" in names                         # any root is right, as in EvalPlus
        assert abs(names["poly"](args[0], got)) <= 1e-4 if any_root else equal(got, want, job["atol"])
    exec(tests, names)
    if entry and "check" in names and not re.search(r"^check\(", job["test"], re.M):
        names["check"](candidate)
    os.write(verdict, b"pass")

# ==== 3. The worker's side ===========================================================================================

def drain(fd, cap, deadline):
    """What comes out of a pipe until it is closed, time is up, or it is more than cap bytes."""
    data, left = b"", lambda: max(0, deadline - time.monotonic())
    while len(data) <= cap and select.select([fd], [], [], left())[0] and (more := os.read(fd, 1 << 16)):
        data += more
    os.close(fd)
    return data

class Sandbox:
    """The two boxes of a worker, started when first needed and again when lost. Modes: namespaces, landlock, unsafe
    (limits of resources only), auto (the first that works of the first two). OSError where that cannot be had."""

    def __init__(self, mode):
        """Start the program's box at once, to know."""
        self.boxes, self.mode, self.why = {}, "namespaces" if mode == "auto" else mode, ""
        try:
            self.box("program")
        except OSError as error:
            if mode != "auto":
                raise
            self.mode, self.why = "landlock", str(error)                                # what namespaces failed for
            self.box("program")

    def box(self, name):
        """(control socket, process) of the box for the "program" or the "tests"."""
        if name not in self.boxes:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            command = [sys.executable, "-I", "-S", "-X", "utf8", os.path.abspath(__file__)]
            process = subprocess.Popen([*command, "--box", self.mode, sysconfig.get_path("purelib")], env=ENVIRONMENT,
                                       stdin=theirs, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            theirs.close()
            ours.settimeout(30)
            if (answer := ours.recv(4096).decode()) != "ready":
                raise OSError(answer or f"{self.mode}: the box process died")
            ours.settimeout(2)
            self.boxes[name] = ours, process
        return self.boxes[name]

    def start(self, name, job, stdin, *fds):
        """Begin a run in a box; the descriptors are handed over and closed here."""
        (control, process), held = self.box(name), [os.memfd_create("job"), os.memfd_create("stdin"), *fds]
        job["uid"] = (1 << 30) + process.pid                              # a user of its own: so are its limits
        for fd, data in zip(held, (json.dumps(job), stdin)):
            with open(fd, "w", closefd=False) as f:
                f.write(data)
                f.seek(0)
        socket.send_fds(control, [b"run"], held)
        for fd in held:
            os.close(fd)

    def finish(self, name, deadline):
        """The exit status (negative: a signal), or None where it had to be killed for time."""
        control = self.box(name)[0]
        if select.select([control], [], [], max(0, deadline - time.monotonic()))[0]:
            return int(control.recv(64))
        control.send(b"kill")
        control.recv(64)

    def lost(self):
        """End both boxes; the next item gets new ones."""
        while self.boxes:
            control, process = self.boxes.popitem()[1]
            process.kill()
            process.wait()
            control.close()

    def run(self, program, stdin, cap, limits, deadline):
        """(reason, output) of one program on one stdin."""
        (read, write), end = os.pipe(), min(deadline, time.monotonic() + limits["seconds"])
        self.start("program", {"role": "run", "program": program, **limits}, stdin, write)
        output = drain(read, cap, end)
        status = self.finish("program", end if len(output) <= cap else 0)
        late = status in (None, -signal.SIGXCPU)
        return "too long" if len(output) > cap else "timeout" if late else "crashed" if status else "", output

    def call(self, program, job, limits, deadline):
        """Run tests that are code: "" where they pass, else the reason, or "wrong"."""
        (ask_r, ask_w), (answer_r, answer_w), (read, write) = os.pipe(), os.pipe(), os.pipe()
        served = {"role": "serve", "program": program, **limits, "seconds": deadline - time.monotonic()}
        self.start("program", served, "", os.open(os.devnull, os.O_WRONLY), ask_r, answer_w)
        self.start("tests", {"role": "check", **job, **limits}, "", write, answer_r, ask_w)
        said, late = drain(read, 100, deadline), self.finish("tests", deadline) in (None, -signal.SIGALRM)
        self.finish("program", 0 if late else time.monotonic() + 0.05)
        return {b"pass": "", b"unparsable": "truth unparsable"}.get(said, "timeout" if late else "wrong")

# ==== 4. Judging code ================================================================================================

NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?")
BLOCK = re.compile(r"^[ \t]*```[ \t]*(?:python3?|py|Python)?[ \t]*\n(.*?)^[ \t]*```", re.S | re.M)

def same_output(got, want):
    """Lines stripped, token by token, numbers as numbers: exactly, or to 1e-6 where the truth has a decimal point."""
    def same_token(got, want):
        if got == want or len(got + want) > 400 or not (NUMBER.fullmatch(got) and NUMBER.fullmatch(want)):
            return got == want
        return abs(Fraction(got) - Fraction(want)) * 10**6 <= ("." in want and max(1, abs(Fraction(want))))
    got, want = ([line.split() for line in text.strip().splitlines()] for text in (got, want))
    return [*map(len, got)] == [*map(len, want)] and all(all(map(same_token, g, w)) for g, w in zip(got, want))

def read_tests(tests):
    """(stdin-stdout pairs or None, job of the tests' box or None, limits) from the forms of the datasets."""
    if isinstance(tests, str):
        tests = json.loads(tests)
    if isinstance(tests, list):
        named = (test["metadata"]["func_name"] for test in tests if test.get("testtype") == "functional")
        tests = {"inputs": [test["input"] for test in tests], "outputs": [test["output"] for test in tests],
                 "fn_name": next(named, None)}
    name = tests.get("fn_name") or tests.get("func_name") or tests.get("entry_point") or ""
    name = name.rpartition(".")[2]                                                  # also "Solution().name"
    limits = {"memory": int(tests.get("memory_mb", 1024)) << 20, "seconds": float(tests.get("time_limit", 6))}
    job = {"prelude": tests.get("prompt", ""), "test": tests.get("functional") or tests.get("test") or "",
           "entry": name, "cases": [], "atol": tests.get("atol", 0)}
    if "plus_input" in tests:
        job["cases"] = [[args] for args in tests["base_input"] + tests["plus_input"]]
        job |= {"test": "", "prelude": tests["prompt"] + tests["canonical_solution"]}
    elif not job["test"]:
        pairs = list(zip(tests["inputs"], tests["outputs"], strict=True))
        if not name:
            text = lambda side: "\n".join(side) if isinstance(side, list) else side
            return [[*map(text, pair)] for pair in pairs] or None, None, limits
        load = lambda x: [json.loads(line) for line in x.splitlines() if line.strip()] if isinstance(x, str) else x
        job["cases"] = [[load(i), load(o)[0] if isinstance(o, str) else o] for i, o in pairs]
    return None, job, limits

def code_judge(text, tests, sandbox, timeout):
    """(1.0, "") where the last Python block of the text passes every test; stops at the first that fails. Else 0.0 and
    why: truth unparsable, no answer found, too long, timeout, crashed, or "" for a wrong answer. Raises nothing."""
    deadline, blocks = time.monotonic() + timeout, BLOCK.findall(text)
    pairs, job, limits = attempt(read_tests, tests) or (None, None, None)
    if not pairs and not job:
        return 0.0, "truth unparsable"
    if not blocks or len(blocks[-1]) > 200_000:
        return 0.0, "too long" if blocks else "no answer found"
    try:
        if job:
            reason = sandbox.call(blocks[-1], job, limits, deadline)
            return float(reason == ""), reason.replace("wrong", "")
        for stdin, want in pairs:
            reason, output = sandbox.run(blocks[-1], stdin, 4 * len(want) + 65536, limits, deadline)
            if reason or not same_output(output.decode(errors="replace"), want):
                return 0.0, reason
        return 1.0, ""
    except (OSError, ValueError):                                                   # a box was lost
        sandbox.lost()
        return 0.0, "crashed"

if __name__ == "__main__":
    box_main(*sys.argv[2:])
