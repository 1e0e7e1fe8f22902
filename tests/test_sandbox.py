"""
The sandbox of verify.py against hostile programs, as root and as an unprivileged user, in
namespaces and under Landlock.

A row of PROBES tries to get out in every way of its kind and prints "contained" only when each one
was refused, so its reward must be 1. A row of DEADLY has to be ended from outside or wins nothing,
so its reward must be 0 for the stated reason. After each: in time, the next honest program passes,
no process or thread is left, nothing outside has changed.
"""

import json
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from conftest import GRACE

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or os.uname().machine != "x86_64",
    reason="the sandbox is written for x86-64 Linux",
)

DRIVER = """
import json, sys
sys.path.insert(0, sys.argv[1])
import verify
with verify.Verifier(workers=1, timeout=60, sandbox=sys.argv[2]) as v:
    for line in sys.stdin:
        print(json.dumps([v.score([("code", *json.loads(line))])[0], v.reasons[0]]), flush=True)
"""
CONFIGS = [
    ("root", "namespaces"),
    ("nobody", "namespaces"),
    ("root", "landlock"),
    ("nobody", "landlock"),
]


def python_for(uid):
    """A Python that this user can start: ours may live in a closed home."""
    for exe in (sys.executable, "/usr/bin/python3", shutil.which("python3")):
        try:
            if (
                exe
                and subprocess.run(
                    [exe, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"],
                    user=uid,
                    capture_output=True,
                ).returncode
                == 0
            ):
                return exe
        except OSError:
            pass
    pytest.skip("no Python 3.11 that the unprivileged user can start")


class Driver:
    """A Verifier in a process of another user."""

    def __init__(self, user, mode):
        uid = 0 if user == "root" else pwd.getpwnam("nobody").pw_uid
        if os.geteuid() != 0 and user == "root":
            pytest.skip("not root")
        uid = uid if os.geteuid() == 0 else os.geteuid()
        self.home = tempfile.mkdtemp(prefix="verify-test-")
        shutil.copy(ROOT / "verify.py", self.home)
        shutil.copytree(
            ROOT / "harness",
            os.path.join(self.home, "harness"),
            ignore=shutil.ignore_patterns("__pycache__"),
        )
        self.canary = os.path.join(self.home, "canary")
        os.mkdir(self.canary)
        Path(self.canary, "file").write_text("untouched")
        for path in (self.home, self.canary, self.canary + "/file"):
            os.chmod(path, 0o777)
        exe = python_for(uid)
        self.process = subprocess.Popen(
            [exe, "-c", DRIVER, self.home, mode],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd="/",
            env={"SECRET_VARIABLE": "1"},
            **({"user": uid, "group": uid} if os.geteuid() == 0 else {}),
        )
        self.box_processes = 2 if mode == "namespaces" else 1

    def score(self, program, tests):
        start = time.monotonic()
        self.process.stdin.write(json.dumps(["```python\n" + program + "\n```", tests]) + "\n")
        self.process.stdin.flush()
        reward, reason = json.loads(self.process.stdout.readline())
        return reward, reason, time.monotonic() - start

    def boxes(self):
        """(pid, threads) of every live process that is a box of this driver or came out of one."""
        found = []
        for entry in os.listdir("/proc"):
            try:
                if (
                    entry.isdigit()
                    and "--box" in (command := Path("/proc", entry, "cmdline").read_text())
                    and self.home in command
                ):
                    status = Path("/proc", entry, "status").read_text()
                    found += (
                        [(entry, status.partition("Threads:\t")[2].split()[0])]
                        if "State:\tZ" not in status
                        else []
                    )
            except OSError:
                pass
        return found

    def outside(self):
        return (
            sorted(os.listdir(self.canary)),
            Path(self.canary, "file").read_text(),
            os.stat(os.__file__).st_mtime,
        )

    def close(self):
        self.process.stdin.close()
        self.process.wait(10)
        shutil.rmtree(self.home)


@pytest.fixture(scope="module", params=CONFIGS, ids="-".join)
def driver(request):
    d = Driver(*request.param)
    d.mode = request.param[1]
    yield d
    d.close()


HONEST = "a, b = map(int, input().split())\nprint(a + b)"
SUM = {
    "inputs": ["3 4\n"],
    "outputs": ["7\n"],
    "time_limit": 50,
}  # a busy machine is no fault: what has to end in time says so itself

# Every attempt is a call that must raise (or come back with -1 from libc).
PROBE = """
import ctypes, os, sys
libc = ctypes.CDLL(None)
def refused(attempt):
    try:
        result = attempt()
    except (OSError, RuntimeError, ValueError, ImportError, MemoryError):
        return True
    return result == -1
attempts = [{attempts}]
out = [str(i) for i, a in enumerate(attempts) if not refused(a)]
print("escaped " + " ".join(out) if out else "contained")
"""
PROBES = {
    "exec": (
        'lambda: os.execv("/bin/true", ["true"]), lambda: os.execve(sys.executable, ["python"], {})'
    ),
    "subprocess": (
        'lambda: __import__("subprocess").run(["/bin/true"]), '
        'lambda: os.posix_spawn("/bin/true", ["true"], {}), '
        'lambda: os.popen("true").read() or 0, '
        'lambda: -1 if os.system("true") in (-1, 32512) or os.system("touch '
        'CANARY/made") else 0'
    ),
    "fork": (
        "os.fork, "
        "lambda: libc.fork(), "
        "lambda: libc.vfork(), "
        "lambda: libc.syscall(57), "
        "lambda: libc.syscall(58), "
        "lambda: libc.syscall(56, 17, 0, 0, 0, 0), "
        "lambda: libc.syscall(435, bytes(88), 88)"
    ),
    "fork bomb": "lambda: [os.fork() for _ in range(100000)]",
    "daemon": (
        "lambda: os.setsid() if os.fork() == 0 else 0, "
        "lambda: __import__('multiprocessing').Process(target=print).start()"
    ),
    "kill the parent": (
        "lambda: os.kill(os.getppid() or 1, 9), "
        "lambda: os.kill(1, 9), "
        "lambda: os.kill(-1, 9), "
        "lambda: os.killpg(0, 9), "
        "lambda: libc.syscall(234, 1, 1, 9), "
        "lambda: libc.syscall(129, 1, 9, bytes(128))"
    ),
    "stop the parent": (
        "lambda: os.kill(os.getppid() or 1, 19), lambda: os.kill(1, 19), lambda: os.kill(-1, 19)"
    ),
    "ptrace": (
        "lambda: libc.ptrace(16, os.getppid(), 0, 0), "
        "lambda: libc.ptrace(16, 1, 0, 0), "
        "lambda: libc.syscall(101, 16, 1, 0, 0)"
    ),
    "parent memory": (
        'lambda: open("/proc/1/mem"), '
        'lambda: open("/proc/self/mem"), '
        'lambda: open(f"/proc/{os.getppid()}/maps"), '
        'lambda: os.listdir("/proc/1"), '
        "lambda: libc.process_vm_readv(1, bytes(16), 1, bytes(16), 1, 0), "
        "lambda: libc.syscall(438, 3, 0, 0), "
        "lambda: libc.syscall(434, 1, 0)"
    ),
    "limits of others": (
        "lambda: libc.prlimit(1, 0, bytes(16), 0), "
        "lambda: __import__('resource').setrlimit(9, (-1, -1)), "
        "lambda: os.setpriority(0, 0, -5), "
        "lambda: os.sched_setaffinity(0, [0])"
    ),
    "environment": (
        'lambda: os.environ["SECRET_VARIABLE"], '
        'lambda: 0 if set(os.environ) - {"LC_CTYPE", "OPENBLAS_NUM_THREADS", '
        '"OMP_NUM_THREADS", "MKL_NUM_THREADS"} else -1, '
        'lambda: open("/proc/self/environ"), '
        'lambda: open("/proc/1/environ")'
    ).replace(
        'lambda: os.environ["SECRET_VARIABLE"]',
        'lambda: 0 if "SECRET_VARIABLE" in os.environ else -1',
    ),
    "home and files": (
        'lambda: open("HOME/.bashrc"), '
        'lambda: open("HOME/.profile"), '
        'lambda: open("HOME/.verify-test"), '
        'lambda: os.listdir("/home"), '
        'lambda: open("/etc/passwd"), '
        'lambda: os.listdir("CANARY"), '
        'lambda: open("CANARY/file"), '
        'lambda: os.listdir("REPO"), '
        'lambda: open("REPO/verify.py"), '
        'lambda: open("REPO/harness/sandbox.py"), '
        # the folder that the installed packages are in: only the way to them may be passed
        "lambda: os.listdir(os.path.dirname(sys.path[-1])), "
        'lambda: os.listdir("/sys"), '
        'lambda: open("/etc/hostname")'
    ),
    "write outside": (
        'lambda: open("CANARY/made", "w"), '
        'lambda: open("CANARY/file", "w"), '
        'lambda: os.mkdir("/made"), '
        'lambda: os.unlink("CANARY/file"), '
        'lambda: os.chmod("CANARY/file", 0), '
        'lambda: os.rename("CANARY/file", "CANARY/x"), '
        'lambda: open("/dev/shm/x", "w")'
    ),
    "site-packages": (
        'lambda: open(os.__file__, "a"), '
        'lambda: open(os.path.dirname(os.__file__) + "/site-packages/evil.pth", "w"), '
        'lambda: open(os.path.dirname(os.__file__) + "/sitecustomize.py", "w"), '
        'lambda: os.mkdir("/usr/lib/made"), '
        "lambda: os.chmod(os.__file__, 0o777)"
    ),
    "symlinks out": (
        'lambda: (os.symlink("/etc/passwd", "/tmp/a"), open("/tmp/a"))[1], '
        'lambda: (os.symlink("CANARY", "/tmp/b"), open("/tmp/b/file"))[1], '
        'lambda: open("/tmp/../../../../etc/passwd"), '
        'lambda: (os.link("CANARY/file", "/tmp/c"))'
    ),
    "loopback": (
        'lambda: __import__("socket").create_connection(("127.0.0.1", PORT), 1), '
        'lambda: __import__("socket").socket(), '
        'lambda: __import__("socket").socket(1), '
        'lambda: __import__("socket").socketpair(), '
        "lambda: libc.socket(16, 3, 0)"
    ),
    "outside network": (
        'lambda: __import__("socket").create_connection(("8.8.8.8", 53), 1), '
        'lambda: __import__("socket").socket(2, 2).sendto(b"x", ("8.8.8.8", 53)), '
        'lambda: __import__("urllib.request").request.urlopen("http://example.com", '
        "timeout=1), "
        "lambda: libc.socket(17, 3, 0)"
    ),
    "inherited descriptors": (
        "lambda: 0 if [fd for fd in range(3, 4096) if libc.fcntl(fd, 1) != -1] else -1"
    ),
    "namespaces and mounts": (
        "lambda: libc.unshare(0x10000000), "
        'lambda: libc.mount(b"x", b"/tmp", b"tmpfs", 0, 0), '
        'lambda: libc.umount2(b"/", 2), '
        'lambda: os.chroot("/tmp"), '
        "lambda: libc.setns(0, 0), "
        "lambda: os.setuid(0) if os.getuid() else -1, "
        'lambda: libc.sethostname(b"x", 1), '
        'lambda: libc.syscall(155, b".", b"."), '
        'lambda: os.mknod("/tmp/n", 0o60600, 1)'
    ),
    "memory files and modules": (
        'lambda: os.memfd_create("x"), '
        'lambda: libc.syscall(319, b"x", 0), '
        'lambda: libc.syscall(313, 0, b"", 0), '
        "lambda: libc.syscall(321, 0, bytes(64), 64), "
        "lambda: libc.syscall(425, 1, bytes(120)), "
        "lambda: libc.syscall(323, 0), "
        "lambda: libc.syscall(298, bytes(120), 0, -1, -1, 0), "
        "lambda: libc.syscall(250, 0, 0), "
        "lambda: libc.syscall(246, 0, 0, 0, 0)"
    ),
    "32-bit and x32 calls": (
        "lambda: libc.syscall(0x40000000 + 39), "
        "lambda: libc.syscall(0x40000000 + 57), "
        "lambda: libc.syscall(0x40000000 + 41, 2, 1, 0)"
    ),
}
WHOLE = {  # programs that measure how far they get and print "contained" themselves
    "threads by the thousand": """
import threading, time
threading.stack_size(65536)
n = 0
try:
    while n < 5000:
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start(); n += 1
except RuntimeError:
    pass
print("contained" if n < 1000 else n, flush=True)
__import__("os")._exit(0)""",
    "disk fill": """
n = 0
try:
    for k in range(100):
        with open(f"/tmp/{k}", "wb") as f:
            for _ in range(64):
                n += f.write(bytes(1 << 20))
except OSError:
    pass
print("contained" if n < 1 << 26 else n)""",
    "inode fill": """
n = 0
try:
    while n < 20000:
        open(f"/tmp/f{n}", "w").close(); n += 1
except OSError:
    pass
print("contained" if n < 5000 else n)""",
    "monkeypatched builtins": (
        "\n"
        "import builtins, json, os, sys, fractions\n"
        "str.__eq__ if 0 else None\n"
        "builtins.isinstance = lambda *a: True; builtins.map = lambda *a: [True]; "
        "builtins.all = lambda *a: True; builtins.float = lambda *a: 1.0\n"
        "json.loads = json.dumps = lambda *a, **k: '[1.0, \"\"]'; os.waitpid = os._exit; "
        "fractions.Fraction = int\n"
        'sys.stdout.write("contained")'
    ),
}
DEADLY = {
    "sys.exit(0)": ("import sys\nsys.exit(0)", ""),
    "os._exit(0)": ("import os\nos._exit(0)", ""),
    "exit in a finaliser": ("import atexit, os\natexit.register(os._exit, 0)\nprint('no')", ""),
    "abort": ("import os\nos.abort()", "crashed"),
    "segmentation fault": ("import ctypes\nctypes.string_at(0)", "crashed"),
    "loop in Python": ("while True: pass", "timeout"),
    "loop in C": ("sum(iter(int, 1))", "timeout"),
    "loop in re": ("import re\nre.match('(a+)+$', 'a' * 60 + 'b')", "timeout"),
    "huge power": ("print(len(str(9 ** (9 ** 9))))", "timeout"),
    "ignored signals": (
        (
            "import signal\n"
            "for s in range(1, 65):\n"
            "    try: signal.signal(s, signal.SIG_IGN)\n"
            "    except (OSError, ValueError): pass\n"
            "while True: pass"
        ),
        "timeout",
    ),
    "sleep": ("import time\ntime.sleep(1000)", "timeout"),
    "waits for input": ("import os\nr, w = os.pipe()\nos.read(r, 1)", "timeout"),
    "closed stdout": ("import os, time\nos.close(1); os.close(2)\ntime.sleep(1000)", "timeout"),
    "a thread that stays": (
        (
            "import threading, time\n"
            "try: threading.Thread(target=time.sleep, args=(1000,)).start()\n"
            "except RuntimeError: time.sleep(1000)"
        ),
        "timeout",
    ),
    "1 GB of output": (
        "import sys\nfor _ in range(1 << 10): sys.stdout.write('x' * (1 << 20))",
        "too long",
    ),
    "1 GB to stderr": (
        "import sys\nfor _ in range(1 << 10): sys.stderr.write('x' * (1 << 20))",
        "",
    ),
    "memory bomb": ("x = []\nwhile True: x.append(bytearray(1 << 24))", "crashed"),
    "memory bomb, mapped": (
        "import mmap\nm = [mmap.mmap(-1, 1 << 28) for _ in range(100)]",
        "crashed",
    ),
    "zip bomb": (
        (
            "import zlib\n"
            "c = zlib.compressobj(9, 8, -15)\n"
            "b = c.compress(bytes(1 << 20)) + c.flush(zlib.Z_FULL_FLUSH)\n"
            "zlib.decompress(b * 4000, -15)"
        ),
        "crashed or timeout",
    ),
    "huge recursion": (
        "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(): f()\nf()",
        "crashed or timeout",
    ),
    "huge recursion in C": (
        (
            "import sys\n"
            "sys.setrecursionlimit(10 ** 9)\n"
            "class A:\n"
            "    def __repr__(self): return repr([self])\n"
            "repr(A())"
        ),
        "crashed or timeout",
    ),
    "deep JSON": ("import json\njson.loads('[' * 10 ** 6)", "crashed"),
    "deep source": ("(" * 10**5, "crashed"),
    "null byte in source": ("print(7)\0", "crashed"),
    "invalid UTF-8": ("import os\nos.write(1, b'\\xff\\xfe7\\n')", ""),
    "right answer, then a crash": ("print(7)\nraise SystemExit(3)", "crashed"),
    "faked protocol": (
        (
            "import os\n"
            "for fd in range(64):\n"
            "    for m in (b'0', b'[1.0, \"\"]\\n', b'pass', b'k', b'run'):\n"
            "        try: os.write(fd, m)\n"
            "        except OSError: pass"
        ),
        "",
    ),
}


def aftermath(d, before, start, limit):
    assert time.monotonic() - start < limit
    reward, reason, _ = d.score(HONEST, SUM)
    assert (reward, reason) == (1.0, "")  # the next honest program passes
    deadline = time.monotonic() + GRACE
    while (boxes := d.boxes()) and len(boxes) != d.box_processes and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(boxes) == d.box_processes and {threads for _, threads in boxes} == {"1"}
    assert d.outside() == before


@pytest.mark.parametrize("name", [*PROBES, *WHOLE])
def test_probe(driver, name):
    driver.score(HONEST, SUM)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        program = WHOLE.get(name) or PROBE.replace("{attempts}", PROBES[name])
        program = (
            program.replace("CANARY", driver.canary)
            .replace("REPO", driver.home)
            .replace("HOME", os.path.expanduser("~"))
            .replace("PORT", str(server.getsockname()[1]))
        )
        before, start = driver.outside(), time.monotonic()
        assert driver.score(program, {"inputs": [""], "outputs": ["contained"], "time_limit": 50})[
            :2
        ] == (1.0, "")
        with pytest.raises(BlockingIOError):
            server.accept()  # nobody called
    aftermath(driver, before, start, GRACE)


@pytest.mark.parametrize("name", DEADLY)
def test_deadly(driver, name):
    driver.score(HONEST, SUM)
    program, reason = DEADLY[name]
    before, start, limit = (
        driver.outside(),
        time.monotonic(),
        {"timeout": 0.5, "crashed or timeout": 2}.get(reason, 50),
    )
    reward, why, _ = driver.score(
        program, {"inputs": ["3 4\n"], "outputs": ["7\n"], "time_limit": limit}
    )
    assert reward == 0.0 and why in reason.split(" or ")
    aftermath(driver, before, start, limit + GRACE)


SEARCH = """
import gc, sys
found, frame = [], sys._getframe()
while frame:
    for v in list(frame.f_locals.values()):
        held = v.values() if isinstance(v, dict) else [v]
        found += [w for w in held if isinstance(w, (str, bytes))]
    frame = frame.f_back
for o in gc.get_objects():
    if isinstance(o, (dict, list, tuple)) and o is not found:
        held = list(o.values() if isinstance(o, dict) else o)
        found += [v for v in held if isinstance(v, (str, bytes))]
found = [str(v) for v in found]
"""


def test_expected_outputs_cannot_be_found(driver):
    """Neither in frames nor anywhere on the heap, while the program's own input can."""
    program = SEARCH + (
        "print(any(''.join(['XYZ', 'ZY']) in v for v in found), any(''.join(['HOC', "
        "'US']) in v for v in found))  # HOCUS"
    )
    assert driver.score(program, {"inputs": ["", ""], "outputs": ["False True", "XYZZY"]})[:2] == (
        0.0,
        "",
    )
    assert driver.score(program, {"inputs": [""], "outputs": ["False True"], "unused": "XYZZY"})[
        :2
    ] == (1.0, "")


CHECK = {
    "functional": (
        "def check(candidate):\n"
        "    assert candidate(x=3) == 'XYZZYsecret'\n"
        "    assert candidate(x=4) == [1, (2, 3), {'a': {5}}]\n\n"
        "check(Solution().f)"
    )
}
CHEATS = {
    "always equal": (
        "class E:\n"
        "    def __eq__(self, o): return True\n"
        "    __hash__ = object.__hash__\n"
        "class Solution:\n"
        "    def f(self, x): return E()"
    ),
    "always equal str": (
        "class E(str):\n"
        "    def __eq__(self, o): return True\n"
        "    __hash__ = str.__hash__\n"
        "class Solution:\n"
        "    def f(self, x): return E('no')"
    ),
    "always equal list": (
        "class E(list):\n"
        "    def __eq__(self, o): return True\n"
        "class Solution:\n"
        "    def f(self, x): return E([E(), E()])"
    ),
    "an always equal class": (
        "class Solution:\n"
        "    class f:\n"
        "        def __init__(self, x): pass\n"
        "        def __eq__(self, o): return True"
    ),
    "sys.exit(0)": "import sys\nclass Solution:\n    def f(self, x): sys.exit(0)",
    "sys.exit(0) at once": "import sys\nsys.exit(0)",
    "os._exit(0)": "import os\nclass Solution:\n    def f(self, x): os._exit(0)",
    "raises": "class Solution:\n    def f(self, x): raise AssertionError",
    "raises StopIteration": "class Solution:\n    def f(self, x): raise StopIteration",
    "raises SystemExit": "class Solution:\n    def f(self, x): raise SystemExit(0)",
    "its own check": "def check(candidate): pass\nclass Solution:\n    def f(self, x): return None",
    "monkeypatched builtins": (
        "import builtins, json\n"
        "builtins.AssertionError = ValueError\n"
        'json.dumps = lambda v: \'["value", "pass"]\'\n'
        "class Solution:\n"
        "    def f(self, x): return 1"
    ),
    "reads the tests from a frame": SEARCH
    + (
        "class Solution:\n"
        "    def f(self, x): return next((v for v in found if v.startswith('XYZ' + "
        "'ZY')), None)"
    ),
    "pass on every descriptor": (
        "import os\n"
        "for fd in range(1, 64):\n"
        "    try: os.write(fd, b'pass')\n"
        "    except OSError: pass\n"
        "class Solution:\n"
        "    def f(self, x): return 1"
    ),
    "frames on every descriptor": (
        "import os\n"
        'm = b\'["value", "pass"]\'\n'
        "for fd in range(1, 64):\n"
        "    try: os.write(fd, len(m).to_bytes(8, 'big') + m)\n"
        "    except OSError: pass\n"
        "class Solution:\n"
        "    def f(self, x): return 1"
    ),
    "a huge frame": (
        "import os\n"
        "class Solution:\n"
        "    def f(self, x):\n"
        "        os.write(4, b'\\x00' + b'\\xff' * 7)\n"
        "        return 1"
    ),
    "deep JSON": (
        "import os\n"
        "class Solution:\n"
        "    def f(self, x):\n"
        "        m = b'[' * 10 ** 6\n"
        "        os.write(4, len(m).to_bytes(8, 'big')); os.write(4, m)\n"
        "        return 1"
    ),
    "an error named exit": (
        "import os\n"
        "class Solution:\n"
        "    def f(self, x):\n"
        '        m = b\'["error", "SystemExit"]\'\n'
        "        os.write(4, len(m).to_bytes(8, 'big') + m)\n"
        "        return 1"
    ),
    "unhashable keys": (
        "import os\n"
        "class Solution:\n"
        "    def f(self, x):\n"
        '        m = b\'["value", {"set": [[]]}]\'\n'
        "        os.write(4, len(m).to_bytes(8, 'big') + m)\n"
        "        return 1"
    ),
    "a generator": "class Solution:\n    def f(self, x): yield 1",
}


@pytest.mark.parametrize("name", CHEATS)
def test_cheat_on_function_tests(driver, name):
    start = time.monotonic()
    reward, reason, _ = driver.score(CHEATS[name], CHECK)
    # The tests fail, the program dies in a call, or it hangs in one: never a pass
    assert reward == 0.0 and reason in ("", "crashed", "timeout")
    assert time.monotonic() - start < GRACE
    assert driver.score(
        (
            "class Solution:\n"
            "    def f(self, x): return 'XYZZYsecret' if x == 3 else [1, (2, 3), {'a': {5}}]"
        ),
        CHECK,
    )[:2] == (1.0, "")


def test_function_that_hangs(driver):
    start = time.monotonic()
    assert driver.score(
        "class Solution:\n    def f(self, x):\n        while True: pass", CHECK | {"time_limit": 1}
    )[:2] == (0.0, "timeout")
    assert time.monotonic() - start < 1 + GRACE


def test_refused_without_a_sandbox(monkeypatch, capfd):
    """Where a sandbox cannot be had no program runs unless the caller insists, and nothing scores a
    silent zero."""
    sys.path.insert(0, str(ROOT))
    import verify

    program, tests = "```python\nprint(7)\n```", {"inputs": [""], "outputs": ["7"]}
    with (
        verify.Verifier(1, 5, sandbox="nonsense") as v,
        pytest.raises(RuntimeError, match="cannot be run safely here.*unsafe"),
    ):
        v.score([("code", program, tests)])
    with verify.Verifier(1, 5, sandbox="unsafe") as v:
        assert v.score([("code", program, tests)]) == [1.0]
    monkeypatch.setattr(verify.Verifier, "warned", "")
    with verify.Verifier(2, 5, sandbox="landlock") as v:
        assert v.score([("code", program, tests)] * 4) == [1.0] * 4
    assert capfd.readouterr().err.count("landlock") == 1  # one clear warning


def test_a_box_that_failed_is_waited_for():
    """What could not be had leaves no zombie behind."""
    sys.path.insert(0, str(ROOT))
    from harness import sandbox

    with pytest.raises(OSError, match="no such sandbox"):
        sandbox.Sandbox("nonsense")
    left = [
        child
        for task in Path("/proc/self/task").iterdir()
        for child in (task / "children").read_text().split()
    ]
    assert not [
        pid
        for pid in left
        if "nonsense" in Path(f"/proc/{pid}/cmdline").read_text()
        or "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    ]


def test_namespaces_denied_falls_back():
    """With user namespaces switched off (as a container does) an unprivileged worker takes Landlock
    and still works."""
    if os.geteuid() != 0:
        pytest.skip("needs root to switch namespaces off")
    code = f"""
import ctypes, sys, os
sys.path.insert(0, {str(ROOT)!r})
import verify
from harness import sandbox
def deny_unshare():  # a seccomp filter in the caller, inherited by the boxes
    import struct
    op = lambda c, k, y=0, n=0: struct.pack("HBBI", c, y, n, k)
    code = op(0x20, 0) + op(0x15, 272, 0, 1) + op(0x06, 0x50001) + op(0x06, 0x7FFF0000)
    code = ctypes.create_string_buffer(code)
    sandbox.libc("prctl", 38, 1, 0, 0, 0)
    sandbox.libc("prctl", 22, 2, struct.pack("HxxxxxxP", 4, ctypes.addressof(code)), 0, 0)
deny_unshare()
with verify.Verifier(1, 5) as v:
    print(v.score([("code", "```python\\nprint(7)\\n```", {{"inputs": [""], "outputs": ["7"]}})]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[1.0]\n" and "landlock" in done.stderr
