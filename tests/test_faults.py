"""Faults, injected into real runs: the real lad.main, vLLM, verifier and optimizer, killed, starved and fed with rubbish.

    python -m pytest tests/test_faults.py                # the short form, for CI
    LAD_LONG=1 python -m pytest tests/test_faults.py -s  # the long form: more kills, at random moments, 500 steps; about half an hour on two cores

A process that has imported everything (`python tests/test_faults.py`) forks a child for each run: the child calls lad.main as the
command line does, and a start costs 3 s, not 12 (with TORCHDYNAMO_DISABLE, or vLLM would compile its sampler for 2 s each time). A fault is a moment (the n-th call of a function) and what happens then: SIGKILL at
once, or `delay` seconds later, or something that the function does instead. Other faults have tests elsewhere: a wrong type for
every key, and rows that lack fields, in test_config.py; SIGTERM, torn files and other world sizes in test_run.py; what programs
and answers may do to the verifier in test_sandbox.py and test_verify.py.
"""
import contextlib, itertools, json, os, random, select, shutil, signal, socket, subprocess, sys, time, traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LONG = bool(os.environ.get("LAD_LONG"))
FLAGS = ["--config", "tiny", "--objective", "fade", "--steps", "4", "--prompts", "4", "--group", "4", "--minibatches", "2", "--epochs", "1", "--max_tokens", "8",
         "--eval_every", "2", "--eval_samples", "2", "--eval_prompts", "8", "--checkpoint_every", "1"]

# ==== 1. The process that forks, and the faults ========================================================================

def half_a_line(lad, strike):
    """metrics.jsonl gets the first half of a line."""
    append = lad.append
    def torn(cfg, name, **fields):
        if lad.rank() == 0 and strike.now():
            with open(Path(cfg.out) / name, "a") as f:
                f.write(json.dumps(fields)[:40])
                f.flush()
                strike()
        append(cfg, name, **fields)
    lad.append = torn


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
        owner = lad if module == "lad" else __import__(module, fromlist=["x"])
        for name in names[:-1]:
            owner = getattr(owner, name)
        original = getattr(owner, names[-1])
        def wrapped(*args, **kwargs):
            if strike.now():
                strike()
            return original(*args, **kwargs)
        setattr(owner, names[-1], wrapped)
    return install


MOMENTS = {"rollout": call("vllm/LLM/generate"), "verify": call("verify/Verifier/score"), "backward": call("torch/Tensor/backward"), "optimizer step": call("torch.optim/AdamW/step"),
           "clip": call("lad/optimizer_step"), "weight sync": some_weights, "log line": half_a_line, "checkpoint": call("torch.distributed.checkpoint/save"),
           "state.json": half_a_file("state.json"), "rename": call("pathlib/Path/rename"), "rmtree": call("shutil/rmtree"), "export": call("transformers/PreTrainedModel/save_pretrained"),
           "config.toml": half_a_file("config.toml"), "plot": call("lad/draw_plot"), "load": call("lad/load_checkpoint"), "rewind": call("lad/rewind"), "set-up": call("lad/start_vllm")}


def small_disk(folder, megabytes):
    """From here on this process sees an empty disk of that size at `folder`; where mounting is denied it exits with code 77."""
    import ctypes
    libc, uid, gid = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()
    if libc.unshare(0x20000) and libc.unshare(0x20000 | 0x10000000):   # mounts; and a user namespace, which lets anyone have them
        os._exit(77)
    if uid:
        for name, line in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
            Path(f"/proc/self/{name}").write_text(line)
    libc.mount(b"none", b"/", None, 0x44000, None)
    if libc.mount(b"none", os.fsencode(folder), b"tmpfs", 0, b"size=%dk" % (megabytes * 1000)):
        os._exit(77)


def child(request, pipe):
    """One rank of one run, as `python lad.py ARGV` would be but for the fault."""
    import lad
    os.setsid()
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2), os.close(0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(request["env"])
    count = itertools.count(1)
    for moment, nth, delay in request["faults"]:
        def strike():
            if delay is None:
                os.kill(os.getpid(), signal.SIGKILL)
            os.write(pipe, b"%f\n" % delay)
        strike.now = lambda: next(count) == nth
        MOMENTS[moment](lad, strike)
    for line in request["patch"]:   # faults that are not kills: some Python each
        exec(line, dict(lad=lad, os=os, time=time, signal=signal, Path=Path, small_disk=small_disk))
    try:
        sys.argv = ["lad.py", *request["argv"]]
        lad.main(request["argv"])
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(OSError):
        sys.stdout.flush(), sys.stderr.flush()
    if request["keep"]:   # what is on a disk of one's own, for the others to see
        shutil.copytree(*request["keep"])
    os._exit(code)


def serve():
    """For each line of stdin, a request, fork its ranks; answer with their exit codes, in order of the ranks, and the seconds from the first death to the last."""
    os.environ.update(OMP_NUM_THREADS="1", VLLM_LOGGING_LEVEL="ERROR", TORCH_CPP_LOG_LEVEL="ERROR", TORCHDYNAMO_DISABLE="1")
    sys.path.insert(0, str(ROOT))
    import lad, torch.distributed.checkpoint.hf_storage, transformers, vllm   # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer               # noqa: F401
    from vllm import LLM, SamplingParams                                       # noqa: F401
    assert len(os.listdir("/proc/self/task")) == 1, "a fork would lose threads"
    print("ready", flush=True)
    for line in sys.stdin:
        request, pids = json.loads(line), []
        read, write = os.pipe()
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        for rank in range(request["ranks"]):
            if request["ranks"] > 1:
                request["env"] |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(request["ranks"]), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            if not (pid := os.fork()):
                if rank != request["rank"]:
                    request["faults"] = []
                child(request, write)
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
                if request["together"] and codes[pid] == -9:   # the machine is gone, not one process
                    for other in set(pids) - set(codes):
                        os.kill(other, signal.SIGKILL)
            if time.monotonic() > end:
                for other in set(pids) - set(codes):
                    os.kill(other, signal.SIGKILL)
                end += 1e9
        os.close(read), os.close(write)
        print(json.dumps([[codes[pid] for pid in pids], time.monotonic() - first]), flush=True)


if __name__ == "__main__":
    serve()
    raise SystemExit

import pytest
import torch

import lad, verify
from conftest import ENV, launch, metrics
from test_run import deterministic


class Runs:
    """Runs of lad.main, each in a process of its own that dies as it likes."""

    def __init__(self):
        self.process = subprocess.Popen([sys.executable, __file__], env=ENV, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout.readline() == "ready\n"

    def start(self, out, *flags, faults=(), ranks=1, rank=0, env=None, patch=(), seconds=240, together=True, keep=()):
        """Begin a run into `out`; its pids."""
        self.log = Path(f"{out}.log")
        self.log.unlink(missing_ok=True)
        argv = [*FLAGS, "--out", str(out), *map(str, flags)]
        print(json.dumps(dict(argv=argv, log=str(self.log), faults=list(faults), ranks=ranks, rank=rank, env=env or {}, patch=list(patch), seconds=seconds, together=together, keep=[*map(str, keep)])), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def wait(self):
        """(exit codes, what was printed, seconds from the first rank's end to the last's)."""
        codes, seconds = json.loads(self.process.stdout.readline())
        return codes, self.log.read_text(errors="replace"), seconds

    def __call__(self, out, *flags, code=0, **more):
        """A whole run; what it printed. Its ranks must all exit with `code`."""
        self.start(out, *flags, **more)
        codes, text, _ = self.wait()
        assert code is None or codes == [code] * len(codes), f"exit codes {codes}\n{text[-5000:]}"
        return text


@pytest.fixture(scope="module")
def runs(tiny):
    r = Runs()
    yield r
    r.process.stdin.close()
    r.process.wait(10)


@pytest.fixture(scope="module")
def whole(runs, tmp_path_factory):
    """{ranks: folder of a run that nothing happened to}."""
    made = {}
    def get(ranks):
        if ranks not in made:
            made[ranks] = tmp_path_factory.mktemp("whole") / f"{ranks}"
            runs(made[ranks], ranks=ranks)
        return made[ranks]
    return get


def same_run(a, b):
    """Metrics bit for bit, no step missing or twice, no torn line, the same exported weights, no half checkpoint left."""
    assert deterministic(metrics(a)) == deterministic(metrics(b))
    assert [(x["step"], "loss" in x) for x in metrics(a)] == [(0, False), (1, True), (2, True), (2, False), (3, True), (4, True), (4, False)]
    assert (a / "hf/model.safetensors").read_bytes() == (b / "hf/model.safetensors").read_bytes()
    assert [p.name for p in sorted((a / "checkpoints").iterdir())] == ["step_3", "step_4"]
    assert len((a / "samples.jsonl").read_text().splitlines()) == len((b / "samples.jsonl").read_text().splitlines())


def kill_and_resume(runs, out, chain, ranks):
    """Run, killed at each of the moments in turn, resumed after each; how many of the moments came."""
    struck = 0
    for i, fault in enumerate(chain):
        runs.start(out, *["--resume"] * (i > 0), faults=[fault], ranks=ranks)
        codes, text, _ = runs.wait()
        assert set(codes) <= {0, -9}, f"{fault}: {codes}\n{text[-5000:]}"
        struck += -9 in codes
    runs(out, "--resume", ranks=ranks)
    return struck


# ==== 2. Killed ========================================================================================================

# moment, which call of it (counted from the start of the process), seconds from then to the kill (none: at once)
SHORT_1 = [("config.toml", 1, None), ("rollout", 2, 0.005), ("verify", 3, None), ("backward", 3, 0.001), ("optimizer step", 2, None), ("weight sync", 30, None), ("checkpoint", 1, 0.002),
           ("rename", 2, None), ("log line", 1, None), ("export", 1, 0.01)]
SHORT_2 = [("checkpoint", 2, 0.003), ("backward", 3, None)]


@pytest.mark.parametrize("ranks, chain", [(1, SHORT_1), (2, SHORT_2)], ids=["one rank", "two ranks"])
def test_killed_at_each_moment_equals_never_killed(runs, whole, tmp_path, ranks, chain):
    struck = kill_and_resume(runs, tmp_path / "run", chain, ranks)
    assert struck == len(chain)
    same_run(tmp_path / "run", whole(ranks))


@pytest.mark.skipif(not LONG, reason="the long form: LAD_LONG=1")
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_at_random_moments(runs, whole, tmp_path, ranks, capsys):
    """Chains of six kills, each at a random call of a random function, at once or a random time later, until 60 (one rank) or 30 (two) have struck."""
    rng, struck, seconds = random.Random(7 + ranks), 0, dict(rollout=0.1, checkpoint=0.02, export=0.05, backward=0.02)
    for attempt in itertools.count():
        chain = []
        for _ in range(6):
            moment = rng.choice(sorted(MOMENTS))
            chain.append((moment, rng.choice([1, 2, 3]) if moment != "weight sync" else rng.randint(1, 150), rng.choice([None, rng.uniform(0, seconds.get(moment, 0.5))])))
        struck += kill_and_resume(runs, tmp_path / f"run{attempt}", chain, ranks)
        same_run(tmp_path / f"run{attempt}", whole(ranks))
        with capsys.disabled():
            print(f"\n{ranks} rank(s), chain {attempt}: {struck} kills so far, last {chain}")
        if struck >= (60 if ranks == 1 else 30):
            break


# ==== 3. Signals ========================================================================================================

def wait_for(path, text, seconds=120):
    end = time.monotonic() + seconds
    while text not in (path.read_text(errors="replace") if path.exists() else ""):
        assert time.monotonic() < end, f"no {text!r} in {path}"
        time.sleep(0.02)


def test_ctrl_c_finishes_the_step_and_a_second_one_leaves_at_once(runs, whole, tmp_path):
    [pid] = runs.start(tmp_path / "run", "--checkpoint_every", 0)
    wait_for(runs.log, "step     1/4")
    os.kill(pid, signal.SIGINT)
    codes, text, _ = runs.wait()
    assert codes == [128 + signal.SIGINT] and "stopped by a signal after step" in text and f"--resume {tmp_path / 'run'}" in text
    runs(tmp_path / "run", "--resume")
    same_run(tmp_path / "run", whole(1)) if not LONG else None
    [pid] = runs.start(tmp_path / "two", "--steps", 500, patch=["collect = lad.collect\ndef slow(*a):\n    time.sleep(30 * (a[6] == 2))\n    return collect(*a)\nlad.collect = slow"])
    wait_for(runs.log, "step     1/500")
    time.sleep(0.3)
    os.kill(pid, signal.SIGINT)
    wait_for(runs.log, "once more leaves at once")
    os.kill(pid, signal.SIGINT)
    began = time.monotonic()
    codes, text, _ = runs.wait()
    assert codes == [128 + signal.SIGINT] and time.monotonic() - began < 2, text[-3000:]
