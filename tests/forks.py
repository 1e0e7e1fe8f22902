"""
Runs of the project's programs in a second or two: a process that has imported everything forks a
child for each of them.

A child calls lad.main (or eval.main, or a function of worker.py) as the command line does, real
vLLM, verifier and optimizer included; only the 12 seconds that Python takes to import them are
spent once for all tests. A child may be killed, stopped, starved of disk, or patched: a fault is a
moment (the n-th call of a function) and what happens then, SIGKILL at once, or `delay` seconds
later, or something done instead.

This file is the server when it is started, and has the client, Forks, for whoever imports it.
"""

import contextlib
import gc
import importlib
import itertools
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# ==== 1. Faults, installed in the child
# ================================================================================


def half_a_line(lad, strike):
    """metrics.jsonl gets the first half of a line."""
    from harness import tracking

    append = tracking.append

    def torn(cfg, name, **fields):
        if lad.rank() == 0 and strike.now():
            with open(Path(cfg.out) / name, "a") as f:
                f.write(json.dumps(fields)[:40])
                f.flush()
                strike()
        append(cfg, name, **fields)

    tracking.append = torn


def half_a_file(name):
    """Path.write_text of that file stops half-way."""

    def install(lad, strike):
        write_text = Path.write_text

        def torn(self, text, *args, **kwargs):
            if self.name.startswith(name) and strike.now():
                write_text(self, text[: len(text) // 2])
                strike()
            return write_text(self, text, *args, **kwargs)

        Path.write_text = torn

    return install


def some_weights(lad, strike):
    """The n-th tensor on its way to vLLM is the last."""
    named_weights = lad.named_weights

    def torn(*args):
        for item in named_weights(*args):
            if strike.now():
                strike()
            yield item

    lad.named_weights = torn


def call(path):
    """The n-th call of a function, `path` from the module on: the fault comes as it begins."""

    def install(lad, strike):
        module, *names = path.split("/")
        owner = lad if module == "lad" else importlib.import_module(module)
        for name in names[:-1]:
            owner = getattr(owner, name)
        original = getattr(owner, names[-1])

        def wrapped(*args, **kwargs):
            if strike.now():
                strike()
            return original(*args, **kwargs)

        setattr(owner, names[-1], wrapped)

    return install


MOMENTS = {
    "rollout": call("vllm/LLM/generate"),
    "verify": call("verify/Verifier/submit"),
    "backward": call("torch/Tensor/backward"),
    "optimizer step": call("torch.optim/AdamW/step"),
    "clip": call("lad/optimizer_step"),
    "weight sync": some_weights,
    "log line": half_a_line,
    "checkpoint": call("torch.distributed.checkpoint/save"),
    "state.json": half_a_file("state.json"),
    "rename": call("pathlib/Path/rename"),
    "rmtree": call("shutil/rmtree"),
    "export": call("transformers/PreTrainedModel/save_pretrained"),
    "config.toml": half_a_file("config."),
    "load": call("harness.checkpoint/load"),
    "rewind": call("harness.tracking/rewind"),
    "set-up": call("lad/start_vllm"),
}


def small_disk(folder, megabytes):
    """From here on this process sees an empty disk of that size at `folder`; where mounting is
    denied it exits with code 77."""
    import ctypes

    libc, uid, gid = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()
    if libc.unshare(0x20000) and libc.unshare(
        0x20000 | 0x10000000
    ):  # mounts; and a user namespace, which lets anyone have them
        os._exit(77)
    if uid:
        for name, line in (
            ("setgroups", "deny"),
            ("uid_map", f"0 {uid} 1"),
            ("gid_map", f"0 {gid} 1"),
        ):
            Path(f"/proc/self/{name}").write_text(line)
    libc.mount(b"none", b"/", None, 0x44000, None)
    if libc.mount(b"none", os.fsencode(folder), b"tmpfs", 0, b"size=%dk" % (megabytes * 1000)):
        os._exit(77)


# ==== 2. The server
# ================================================================================================


def striker(pipe, count, nth, delay):
    """What kills the run at the nth call of a moment: at once, or (delay: seconds) its parent."""

    def strike():
        if delay is None:
            os.kill(os.getpid(), signal.SIGKILL)
        os.write(pipe, b"%f\n" % delay)

    strike.now = lambda: next(count) == nth
    return strike


def child(request, pipe):
    """One rank of one run, as `python PROGRAM ARGV` would be but for the faults."""
    import lad
    from harness import ranks, tracking

    os.setsid()
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(0)
    os.chdir(ROOT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(request["env"])
    count = itertools.count(1)
    for moment, nth, delay in request["faults"]:
        MOMENTS[moment](lad, striker(pipe, count, nth, delay))
    for line in request["patch"]:  # faults that are not kills: some Python each
        exec(
            line,
            dict(
                lad=lad,
                tracking=tracking,
                ranks=ranks,
                os=os,
                time=time,
                signal=signal,
                Path=Path,
                small_disk=small_disk,
            ),
        )
    program = ROOT / request["program"]
    try:
        sys.argv = [request["program"], *request["argv"]]
        sys.orig_argv = [
            sys.executable,
            str(program),
            *request["argv"],
        ]  # eval.py begins anew with it
        sys.path.insert(0, str(program.parent))
        __import__(program.stem).main(request["argv"])
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        code = 1
        sys.excepthook(*sys.exc_info())
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    if request["keep"]:  # what is on a disk of one's own, for the others to see
        shutil.copytree(*request["keep"])
    os._exit(code)


# What a run imports sooner or later; what is not there (a CUDA build has another worker) is left to
# the children
IMPORTED = [
    "lad",
    "eval",
    "harness.plot",
    "torch.distributed.checkpoint.hf_storage",
    "transformers",
    "transformers.models.qwen2.modeling_qwen2",
    "vllm",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.engine.core",
    "vllm.model_executor.models.qwen2",
    "matplotlib.pyplot",
    "matplotlib.backends.backend_agg",
    "PIL.PngImagePlugin",
]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def serve():
    """For each line of stdin, a request, fork its ranks; answer with their pids, then with their
    exit codes and the seconds from the first death to the last."""
    sys.path.insert(0, str(ROOT))
    for name in IMPORTED:
        importlib.import_module(name)
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401 (lazy: they are imported when they are named)
    from vllm import LLM, SamplingParams  # noqa: F401

    assert len(os.listdir("/proc/self/task")) == 1, "a fork would lose threads"
    gc.freeze()  # vLLM collects garbage seven times: children need not look through it all
    print("ready", flush=True)
    for line in sys.stdin:
        request, pids = json.loads(line), []
        read, write = os.pipe()
        port = free_port()
        for rank in range(request["ranks"]):
            env = dict(request["env"])
            if request["ranks"] > 1:
                env |= dict(
                    RANK=str(rank),
                    LOCAL_RANK=str(rank),
                    WORLD_SIZE=str(request["ranks"]),
                    MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=str(port),
                )
            if not (pid := os.fork()):
                child(
                    dict(
                        request,
                        env=env,
                        faults=request["faults"] if rank == request["rank"] else [],
                    ),
                    write,
                )
            pids.append(pid)
        print(json.dumps(pids), flush=True)
        codes, first, end = {}, None, time.monotonic() + request["seconds"]
        while len(codes) < len(pids):
            if select.select([read], [], [], 0.02)[0]:
                time.sleep(float(os.read(read, 99).split()[0]))
                for pid in pids:
                    os.kill(pid, signal.SIGKILL)
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid in pids:
                codes[pid], first = os.waitstatus_to_exitcode(status), first or time.monotonic()
                if request["together"] and codes[pid] == -9:  # the machine is gone, not one process
                    for other in set(pids) - set(codes):
                        os.kill(other, signal.SIGKILL)
            if time.monotonic() > end:
                for other in set(pids) - set(codes):
                    os.kill(other, signal.SIGKILL)
                end += 1e9
        os.close(read)
        os.close(write)
        print(json.dumps([[codes[pid] for pid in pids], time.monotonic() - first]), flush=True)


# ==== 3. The client
# ================================================================================================


class Forks:
    """Runs of a program, each in a process of its own that dies as it likes. One at a time."""

    def __init__(self, folder, env):
        self.folder, self.number = Path(folder), 0  # of the logs
        # Compiling one line of its sampler takes vLLM 2 s a process. One thread: a fork has no
        # others, and libraries make theirs as they are imported
        env = env | dict(
            TORCHDYNAMO_DISABLE="1",
            VLLM_LOGGING_LEVEL="ERROR",
            TORCH_CPP_LOG_LEVEL="ERROR",
            OMP_NUM_THREADS="1",
        )
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout.readline() == "ready\n"

    def start(
        self,
        program,
        argv,
        faults=(),
        ranks=1,
        rank=0,
        env=None,
        patch=(),
        seconds=600,
        together=True,
        keep=(),
    ):
        """Begin; the pids of its ranks. faults: [(moment, nth, delay or None)] of rank `rank`;
        patch: Python source to execute first."""
        self.number += 1
        self.log = self.folder / f"{self.number}.log"
        request = dict(
            program=program,
            argv=[*map(str, argv)],
            log=str(self.log),
            faults=list(faults),
            ranks=ranks,
            rank=rank,
            env=env or {},
            patch=list(patch),
            seconds=seconds,
            together=together,
            keep=[*map(str, keep)],
        )
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def wait(self):
        """(exit codes, what was printed, seconds from the first rank's end to the last's)."""
        codes, seconds = json.loads(self.process.stdout.readline())
        return codes, self.log.read_text(errors="replace"), seconds

    def run(self, program, *argv, code=0, **more):
        """A whole run; what it printed. Its ranks must all exit with `code`, if one is given."""
        self.start(program, argv, **more)
        codes, text, _ = self.wait()
        assert code is None or codes == [code] * len(codes), f"exit codes {codes}\n{text[-6000:]}"
        return text

    def close(self):
        self.process.stdin.close()
        self.process.wait(120)


if __name__ == "__main__":
    serve()
