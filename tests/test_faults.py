"""
Faults, injected into real runs: the real lad.main, vLLM, verifier and optimizer, killed, starved
and fed with rubbish (forks.py).

    python -m pytest tests/test_faults.py                     # the short form python -m pytest
    tests/test_faults.py -m slow -s          # kills at random moments, 500 steps: about half an
    hour on two cores

Other faults have tests elsewhere: a wrong type for every key, and rows that lack fields, in
test_config.py; SIGTERM, torn files and other world sizes in test_run.py; what programs and answers
may do to the verifier in test_sandbox.py and test_verify.py.
"""

import itertools
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ENV, GRACE, ROOT, metrics
from forks import MOMENTS
from test_run import deterministic

import lad
import verify
from harness.data import HUB_SECONDS, HUB_TRIES, load_data

FLAGS = [
    "--config",
    "tiny",
    "--objective",
    "fade",
    "--steps",
    "4",
    "--prompts",
    "4",
    "--group",
    "4",
    "--minibatches",
    "2",
    "--epochs",
    "1",
    "--max_tokens",
    "8",
    "--eval_every",
    "2",
    "--eval_samples",
    "2",
    "--eval_prompts",
    "8",
    "--checkpoint_every",
    "1",
]


SECRET = "hf_thisMustNotBeSeenAnywhere"


class Runs:
    """Runs of lad.py with FLAGS into a folder."""

    def __init__(self, forks):
        self.forks = forks

    def start(self, out, *flags, **more):
        """Begin a run; its pids."""
        return self.forks.start("lad.py", [*FLAGS, "--out", out, *flags], **more)

    @property
    def log(self):
        return self.forks.log

    def wait(self):
        return self.forks.wait()

    def __call__(self, out, *flags, code=0, **more):
        return self.forks.run("lad.py", *FLAGS, "--out", out, *flags, code=code, **more)


@pytest.fixture(scope="module")
def runs(forks):
    return Runs(forks)


@pytest.fixture(scope="module")
def whole(runs, tmp_path_factory):
    """{ranks: folder of a run that nothing happened to}."""
    made = {}

    def get(ranks):
        if ranks not in made:
            made[ranks] = tmp_path_factory.mktemp("whole") / f"{ranks}"
            made[f"{ranks} printed"] = runs(
                made[ranks], ranks=ranks, env=dict(HF_TOKEN=SECRET, WANDB_API_KEY=SECRET)
            )
        return made[ranks]

    get.printed = lambda ranks: made[f"{ranks} printed"]
    return get


def same_run(a, b):
    """Metrics bit for bit, no step missing or twice, no torn line, the same exported weights, no
    half checkpoint left."""
    assert deterministic(metrics(a)) == deterministic(metrics(b))
    assert [(x["step"], "loss" in x) for x in metrics(a)] == [
        (0, False),
        (1, True),
        (2, True),
        (2, False),
        (3, True),
        (4, True),
        (4, False),
    ]
    assert (a / "hf/model.safetensors").read_bytes() == (b / "hf/model.safetensors").read_bytes()
    assert [p.name for p in sorted((a / "checkpoints").iterdir())] == ["step_3", "step_4"]
    assert len((a / "samples.jsonl").read_text().splitlines()) == len(
        (b / "samples.jsonl").read_text().splitlines()
    )


def kill_and_resume(runs, out, chain, ranks):
    """Run, killed at each of the moments in turn, resumed after each; how many of the moments
    came."""
    struck = 0
    for i, fault in enumerate(chain):
        runs.start(out, *["--resume"] * (i > 0), faults=[fault], ranks=ranks)
        codes, text, _ = runs.wait()
        assert set(codes) <= {0, -9} or -9 in codes, f"{fault}: {codes}\n{text[-5000:]}"
        struck += -9 in codes
    runs(out, "--resume", ranks=ranks)
    return struck


# ==== 2. Killed
# ================================================================================================

# moment, which call of it (counted from the start of the process), seconds from then to the kill
# (none: at once)
CHAINS = {
    "one rank": (
        1,
        [
            ("rollout", 2, 0.005),
            ("optimizer step", 2, None),
            ("checkpoint", 1, 0.002),
            ("log line", 1, None),
        ],
    ),
    "two ranks": (2, [("checkpoint", 2, 0.003)]),
    "one rank, more": (
        1,
        [
            ("config.toml", 1, None),
            ("verify", 3, None),
            ("backward", 3, 0.001),
            ("weight sync", 30, None),
            ("rename", 2, None),
            ("export", 1, None),
        ],
    ),
    "two ranks, more": (2, [("backward", 3, None), ("export", 1, None)]),
}


@pytest.mark.parametrize(
    "chain", [pytest.param(name, marks=[pytest.mark.slow] * ("more" in name)) for name in CHAINS]
)
def test_killed_at_each_moment_equals_never_killed(runs, whole, tmp_path, chain):
    ranks, moments = CHAINS[chain]
    struck = kill_and_resume(runs, tmp_path / "run", moments, ranks)
    assert struck == len(moments)
    same_run(tmp_path / "run", whole(ranks))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_at_random_moments(runs, whole, tmp_path, ranks, capsys):
    """Chains of six kills, each at a random call of a random function, at once or a random time
    later, until 30 (one rank) or 12 (two) have struck."""
    rng, struck, seconds = (
        random.Random(7 + ranks),
        0,
        dict(rollout=0.1, checkpoint=0.02, export=0.05, backward=0.02),
    )
    for attempt in itertools.count():
        chain = []
        for _ in range(6):
            moment = rng.choice(sorted(MOMENTS))
            chain.append(
                (
                    moment,
                    rng.choice([1, 2, 3]) if moment != "weight sync" else rng.randint(1, 150),
                    rng.choice([None, rng.uniform(0, seconds.get(moment, 0.5))]),
                )
            )
        struck += kill_and_resume(runs, tmp_path / f"run{attempt}", chain, ranks)
        same_run(tmp_path / f"run{attempt}", whole(ranks))
        with capsys.disabled():
            print(f"\n{ranks} rank(s), chain {attempt}: {struck} kills so far, last {chain}")
        if struck >= (30 if ranks == 1 else 12):
            break


# ==== 3. Signals, and a rank that is gone
# ===============================================================================


def wait_for(path, text, seconds=1200):
    end = time.monotonic() + seconds
    while text not in (path.read_text(errors="replace") if path.exists() else ""):
        assert time.monotonic() < end, f"no {text!r} in {path}"
        time.sleep(0.02)


def test_ctrl_c_finishes_the_step_and_a_second_one_leaves_at_once(runs, whole, tmp_path):
    [pid] = runs.start(tmp_path / "run", "--checkpoint_every", 0)
    wait_for(runs.log, "step     1/4")
    os.kill(pid, signal.SIGINT)
    codes, text, _ = runs.wait()
    assert (
        codes == [128 + signal.SIGINT]
        and "stopped by a signal after step" in text
        and f"--resume {tmp_path / 'run'}" in text
    )
    # again, the second one half a second after the first, in the middle of a step
    slow = """collect = lad.collect
def slow(*a):
    time.sleep(600 * (a[6] == 2))
    return collect(*a)
lad.collect = slow"""
    [pid] = runs.start(
        tmp_path / "run",
        "--checkpoint_every",
        0,
        "--resume",
        patch=[slow.replace("a[6] == 2", "True")],
    )
    wait_for(runs.log, "steps done")
    time.sleep(1)
    os.kill(pid, signal.SIGINT)
    wait_for(runs.log, "once more leaves at once")
    time.sleep(0.5)
    os.kill(pid, signal.SIGINT)
    began = time.monotonic()
    codes, text, _ = runs.wait()
    assert codes == [128 + signal.SIGINT] and time.monotonic() - began < GRACE, text[
        -3000:
    ]  # not the ten minutes of the step
    runs(tmp_path / "run", "--resume", "--checkpoint_every", 1)
    assert deterministic(metrics(tmp_path / "run")) == deterministic(metrics(whole(1)))


@pytest.mark.parametrize("how", ["killed", pytest.param("stopped", marks=pytest.mark.slow)])
def test_a_rank_that_is_gone_is_named_soon(runs, tmp_path, how):
    """Without torchrun, as on another node. Killed: gloo's connection breaks at once. Stopped
    (SIGSTOP), as by a dead machine or a hung driver: it stays silent. The 40 s after which a rank
    counts as lost are 6 here."""
    fault = dict(faults=[("backward", 2, None)])
    sooner = "ranks.LIMIT = 6"
    if how == "stopped":
        fault = dict(faults=[])
        sooner += """
step = lad.optimizer_step
def stop(*a):
    if lad.rank() == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    return step(*a)
lad.optimizer_step = stop"""
    pids = runs.start(tmp_path / "run", ranks=2, rank=1, together=False, patch=[sooner], **fault)
    if how == "stopped":
        wait_for(runs.log, "rank 0 leaves")
        os.kill(pids[1], signal.SIGKILL)
    codes, text, seconds = runs.wait()
    assert codes == [1, -9] and (
        "rank 1 has not been heard of for" in text or "rank 1 was never heard of" in text
    ), (codes, text[-3000:])
    assert seconds < 6 + GRACE


@pytest.mark.slow
def test_a_rank_dies_under_torchrun(tmp_path):
    """The command that users give; one of its two workers gets SIGKILL."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "lad.py",
        *FLAGS,
        "--steps",
        "999",
        "--out",
        str(tmp_path / "run"),
    ]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=ENV, stdout=log, stderr=subprocess.STDOUT)
    wait_for(tmp_path / "log", "step     2/")
    workers = {
        int(p): Path(f"/proc/{p}/environ").read_bytes().split(b"\0")
        for p in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    }
    [pid] = [p for p, env in workers.items() if b"RANK=1" in env]
    os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    process.wait(120)
    text = (tmp_path / "log").read_text()
    assert (
        process.returncode == 1
        and time.monotonic() - began < 60 + GRACE
        and "rank      : 1 (local_rank: 1)" in text
        and "Signal 9 (SIGKILL)" in text
    ), text[-5000:]
    print(f"torchrun ended {time.monotonic() - began:.0f} s after its rank 1")


# ==== 4. A full disk
# ================================================================================================


@pytest.mark.slow
def test_disk_full(runs, whole, tmp_path):
    """A disk of 18 MB: two checkpoints of 7 MB fit, the third does not while the two are kept. Then
    one so full that no line of the log fits. Room made, the run goes on, the same."""
    disk = tmp_path / "disk"
    disk.mkdir()
    runs.start(
        disk / "run",
        patch=[f"small_disk({str(disk)!r}, 18)"],
        keep=(disk / "run", tmp_path / "kept"),
    )
    codes, text, _ = runs.wait()
    if codes == [77]:
        pytest.skip("no mounts and no user namespaces on this machine")
    assert codes == [0] and text.count("not written") == 2, text[
        -5000:
    ]  # of step 3 and of step 4; training goes on, and the export fits
    assert (
        "checkpoint of step 3 not written: 7.1 MB needed" in text
        and "['step_1', 'step_2'] kept, the run continues" in text
        and "No space left on device" in text
    )
    assert sorted(p.name for p in (tmp_path / "kept/checkpoints").iterdir()) == ["step_1", "step_2"]
    assert deterministic(metrics(tmp_path / "kept")) == deterministic(metrics(whole(1)))
    shutil.rmtree(tmp_path / "kept/hf")
    full = f"""small_disk({str(disk)!r}, 18)
append = tracking.append
def filled(cfg, name, **fields):
    if fields["step"] == 2:
        with open(Path(cfg.out) / "ballast", "wb", buffering=0) as f:
            try:
                while f.write(bytes(4096)): pass
            except OSError: pass
        fields["response"] = "x" * 5000
    append(cfg, name, **fields)
tracking.append = filled"""
    runs.start(disk / "run", patch=[full], keep=(disk / "run", tmp_path / "kept2"))
    codes, text, _ = runs.wait()
    assert (
        codes == [2]
        and "No space left on device" in text
        and "of metrics.jsonl needed" in text
        and "the run stops, whole up to step 1" in text
    ), text[-5000:]
    (tmp_path / "kept2/ballast").unlink()
    runs(tmp_path / "kept2", "--resume")
    same_run(tmp_path / "kept2", whole(1))


# ==== 5. A verifier that fails
# ================================================================================================

BROKEN = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import verify
judge = verify.judge
def flood():
    for _ in range(512):
        os.write(1, b"x" * (1 << 20))
        os.write(2, b"x" * (1 << 20))
faults = dict(
    HANG=lambda: sum(iter(int, 1)),
    EXIT=lambda: os._exit(3),
    ALLOCATE=lambda: bytearray(50 << 30),
    RAISE=lambda: 1 / 0,
    ABORT=os.abort,
    PRINT=flood,
    FORK=lambda: os.fork() or time.sleep(1000),
)
def faulty(kind, response, *rest, **more):
    for word, fault in faults.items():
        if word in response:
            fault()
    return judge(kind, response, *rest, **more)
verify.judge = faulty
verify.worker_main(*sys.argv[2:])
"""


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """Verifiers made from here on have workers that hang in C, exit, allocate 50 GB, raise, abort
    or print 1 GB when an item says so."""
    (tmp_path / "broken.py").write_text(BROKEN)
    monkeypatch.setattr(verify, "__file__", str(tmp_path / "broken.py"))
    return tmp_path / "broken.py"


def test_a_worker_that_fails_costs_only_its_item(broken, capfd):
    good, item = (
        ("math", "\\boxed{x+1}", "1+x"),
        lambda word: ("math", f"{word} \\boxed{{x+1}}", "1+x"),
    )
    expected = dict(
        HANG="timeout: worker replaced",
        EXIT="crashed: worker replaced",
        ALLOCATE="crashed: MemoryError",
        RAISE="crashed: ZeroDivisionError",
        ABORT="crashed: worker replaced",
        PRINT="",
    )
    with verify.Verifier(workers=2, timeout=2) as v:
        assert v.score([good, good]) == [1.0, 1.0]
        for word, reason in expected.items():
            began = time.monotonic()
            rewards = v.score([good, item(word), good, good, good])
            assert rewards == [1.0, float(word == "PRINT"), 1.0, 1.0, 1.0] and v.reasons == [
                "",
                reason,
                "",
                "",
                "",
            ], (word, rewards, v.reasons)
            assert time.monotonic() - began < 2 + GRACE, word
        words = [w for w in expected for _ in range(3)]
        random.Random(0).shuffle(words)
        rewards = v.score([x for w in words for x in (item(w), good)])
        assert rewards == [x for w in words for x in (float(w == "PRINT"), 1.0)]
        assert len(v.live) <= 2 and all(w.poll() is None for w in v.live)
        pids = [w.pid for w in v.live]
    assert not any(
        Path(f"/proc/{pid}").exists() for pid in pids
    )  # ended and waited for: no zombies
    out = capfd.readouterr()
    assert len(out.out) + len(out.err) < 1000  # a gigabyte was printed


def rows(path, n, **fields):
    path.write_text(
        "".join(
            json.dumps({k: v(i) if callable(v) else v for k, v in fields.items()}) + "\n"
            for i in range(n)
        )
    )
    return path


@pytest.mark.slow
def test_failed_verifications_stop_the_run_with_state_saved(runs, broken, tmp_path, monkeypatch):
    """Every worker dies on every item from the third batch on: two steps are trained and saved, the
    third is not, and the message says why. Mended, the run goes on."""
    data = rows(
        tmp_path / "data.jsonl",
        16,
        prompt=lambda i: f"1 2 {i % 9 + 1}={i + 3}:",
        answer={"inputs": [""], "outputs": ["7"]},
    )
    flags = [
        "--data",
        data,
        "--eval_data",
        "",
        "--kind",
        "code",
        "--verify_workers",
        1,
        "--checkpoint_every",
        0,
        "--objective",
        "reinforce",
    ]
    fault = f"""import verify
verify.__file__ = {str(broken)!r}
submit = verify.Verifier.submit
calls = []
def late(self, items):
    calls.append(1)
    return submit(self, [(k, 'EXIT' * (len(calls) > 3) + r, t) for k, r, t in items])
verify.Verifier.submit = late"""
    text = runs(tmp_path / "run", *flags, patch=[fault], code=2)
    says = (
        "step 3: 100% of its samples could not be scored (max_failed = 0.5): 16 x crashed: worker "
    )
    assert says + "replaced; step 2 is saved" in text, text[-3000:]
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step_2"] and [
        x["step"] for x in metrics(tmp_path / "run")
    ] == [1, 2]
    assert [x["failed"] for x in metrics(tmp_path / "run")] == [0, 0]
    runs(tmp_path / "run", *flags, "--resume")
    assert [x["step"] for x in metrics(tmp_path / "run")] == [1, 2, 3, 4]


# ==== 6. Batches that teach nothing, and numbers that are none
# ===========================================================


def test_bad_numbers(runs, whole, tmp_path):
    """Step 1: an empty response. Step 2: a NaN and an infinity among vLLM's log-probs. Step 3: a
    loss of NaN in one of the two updates. Step 4 is as good as any."""
    patch = """
import math
generate, loss, calls = lad.generate, lad.policy_loss, []
def some(llm, cfg, ids, n, seed, logprobs=True, **more):
    groups = generate(llm, cfg, ids, n, seed, logprobs, **more)
    if logprobs:
        calls.append("g")
        if calls.count("g") == 1:
            groups[0][0].update(tokens=[], behaviour=[])
        if calls.count("g") == 2:
            groups[0][0]["behaviour"][0], groups[1][2]["behaviour"][-1] = math.nan, -math.inf
    return groups
def bad(*args, **more):
    value, info = loss(*args, **more)
    if calls.count("g") == 3 and "bad" not in calls and value.numel() > 20:
        calls.append("bad")
        value = value * math.nan
    return value, info
lad.generate, lad.policy_loss = some, bad"""
    text = runs(tmp_path / "run", "--aggregation", "sequence", patch=[patch])
    train = [x for x in metrics(tmp_path / "run") if "loss" in x]
    assert [x["step"] for x in train] == [1, 2, 3, 4] and all(
        torch.isfinite(torch.tensor([v for v in x.values() if not isinstance(v, str)])).all()
        for x in train
    )
    assert [x["failed"] for x in train] == [0, 2 / 16, 0, 0] and [x["skipped"] for x in train] == [
        0,
        0,
        1,
        1,
    ]
    assert "step 3: 1 of 2 optimizer steps skipped" in text and train[3]["grad_norm"] > 0


@pytest.mark.slow
def test_nothing_but_bad_numbers_stops_the_run(runs, tmp_path):
    patch = """
generate = lad.generate
def nan(*a, **k):
    groups = generate(*a, **k)
    for s in [s for group in groups for s in group if s['behaviour']]:
        s['behaviour'] = [float('nan')] * len(s['tokens'])
    return groups
lad.generate = nan"""
    text = runs(tmp_path / "run", "--eval_data", "", patch=[patch], code=2)
    assert (
        "step 1: 100% of its samples could not be scored" in text
        and "16 x log-prob not finite" in text
    )


@pytest.mark.parametrize(
    "flags, zero",
    [(["--overlong", "mask", "--max_tokens", "1"], "truncated"), ([], "zero_variance")],
    ids=["all truncated and masked", "all rewards equal"],
)
def test_batches_that_teach_nothing(runs, tiny, tmp_path, flags, zero):
    """The run goes through, and the weights stay what they were, bit for bit."""
    from safetensors.torch import load_file

    data = rows(
        tmp_path / "data.jsonl",
        16,
        prompt=lambda i: f"1 2 {i % 9 + 1}={i + 3}:",
        answer={"numbers": [1, 2, 3], "target": 10**9},
    )
    runs(tmp_path / "run", "--data", data, "--eval_data", "", "--steps", 2, *flags)
    train = metrics(tmp_path / "run")
    assert (
        [x[zero] for x in train] == [1.0, 1.0]
        and [x["grad_norm"] for x in train] == [0, 0]
        and all(x["loss"] == 0 for x in train)
    )
    before, after = (
        load_file(tiny["model"] / "model.safetensors"),
        load_file(tmp_path / "run/hf/model.safetensors"),
    )
    assert all(torch.equal(before[k], after[k]) for k in before)


# ==== 7. Data, hub, config
# ================================================================================================


def test_bad_data(tmp_path, tiny, capsys):
    """What test_config.py has not: empty, null, enormous and duplicated prompts, bytes that are no
    UTF-8, half a surrogate pair, wrong types."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny["model"])

    def cfg(path):
        return lad.load_config(["--config", "tiny", "--data", str(path), "--prompts", "4"])

    good = dict(prompt="1 2 3=6:", answer={"numbers": [1, 2, 3], "target": 6})
    for row, says in [
        (dict(good, prompt=""), "row 2: its prompt is empty"),
        (dict(good, prompt="  \n"), "row 2: its prompt is empty"),
        (dict(good, prompt=None), "a field in it is null"),
        (
            dict(good, prompt="\ud83d"),
            "row 2: the prompt template '{prompt}' does not fit: UnicodeEncodeError",
        ),
        (dict(good, prompt="1 1 1=3:", answer=7), "row 2: answer = '7' is no truth"),
        (
            dict(good, prompt=[{"content": "a"}, "b"]),
            "row 2, message 1: it has no role; it has content",
        ),
        ([good], "row 2: expected an object"),
        (None, "row 2: expected an object"),
    ]:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (good, row)))
        with pytest.raises(SystemExit) as stop:
            load_data(cfg(tmp_path / "rows.jsonl"), tokenizer)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and says in err and err.count("\n") == 1, err
    for content, says in [
        (b'{"prompt": "1 2\xff", "answer": 1}\n', "can't decode byte 0xff in position 15"),
        (b"", "no row is left"),
        (b'{"prompt": "\x00"\n', "Invalid control character at: line 1"),
        (b"\x1f\x8b\x08\x00junk", "can't decode"),
    ]:
        (tmp_path / "rows.jsonl").write_bytes(content)
        with pytest.raises(SystemExit):
            load_data(cfg(tmp_path / "rows.jsonl"), tokenizer)
        assert says in (err := capsys.readouterr().err) and err.count("\n") == 1, err
    began = time.monotonic()
    (tmp_path / "rows.jsonl").write_text(
        "".join(
            json.dumps(dict(good, prompt=p)) + "\n"
            for p in ["1 2 3=6:", "1" * 100_000, "1 2 3=6:", "2 2 2=6:", "7 " * 50_000]
        )
    )
    assert (
        len(load_data(cfg(tmp_path / "rows.jsonl"), tokenizer)) == 2
        and time.monotonic() - began < 10 + GRACE
    )
    assert "2 rows (1 duplicates and 2 prompts over 40 tokens dropped)" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("how", ["refuses", "never answers"])
def test_hub_that_cannot_be_reached(how, runs, tmp_path):
    """One clear line, for a model and for data, in a bounded time."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen(50) if how == "never answers" else None
        env = [
            f"""
os.environ['HF_ENDPOINT'] = 'http://127.0.0.1:{s.getsockname()[1]}'
import huggingface_hub.constants as c, datasets.config as d
c.ENDPOINT = d.HF_ENDPOINT = os.environ['HF_ENDPOINT']
c.HUGGINGFACE_CO_URL_TEMPLATE = c.ENDPOINT + '/{{repo_id}}/resolve/{{revision}}/{{filename}}'"""
        ]
        for flags, says in (
            (
                ["--model", "nobody/nothing"],
                "model = 'nobody/nothing': no such folder, and the hub says",
            ),
            (["--data", "nobody/nothing"], "cannot read 'nobody/nothing'"),
        ):
            began = time.monotonic()
            text = runs(tmp_path / "run", *flags, patch=env, code=2)
            assert says in text, text[-3000:]
            print(f"{how}, {flags[0]}: {time.monotonic() - began:.0f} s")
            assert time.monotonic() - began < HUB_TRIES * (HUB_SECONDS + 1) + GRACE


@pytest.mark.parametrize("key", [k for k, f in lad.KNOBS.items() if f.type in (int, float)])
def test_every_number_out_of_range_is_refused(key, capsys):
    """Below its floor, above its ceiling, infinite, not a number, absurdly large."""
    knob = lad.KNOBS[key]
    low, high = knob.metadata["low"], knob.metadata["high"]
    for value in [
        *([] if low is None else [low - 1]),
        *([] if high is None else [high + 1]),
        10**30,
        *(["inf", "-inf", "nan"] if knob.type is float else ["inf", "1.5"]),
    ]:
        with pytest.raises(SystemExit) as stop:
            lad.load_config(["--config", "tiny", f"--{key}={value}"])
        assert (
            stop.value.code == 2
            and key in (err := capsys.readouterr().err)
            and err.count("\n") == 1
        )


@pytest.mark.slow
def test_ranks_that_do_not_divide_and_checkpoints_from_one_rank(runs, whole, tmp_path):
    """Two ranks refuse 5 prompts before anything is loaded, and go on from a checkpoint of one rank
    (test_run.py has the other way, and another objective; here, another model)."""
    text = runs(tmp_path / "none", "--prompts", 5, "--minibatches", 1, ranks=2, code=2)
    assert (
        "prompts = 5 does not divide by 2 ranks x 1 minibatches" in text and "training" not in text
    )
    shutil.copytree(whole(1), tmp_path / "run")
    text = runs(tmp_path / "run", "--resume", "--model", str(whole(1) / "hf"), code=2)
    assert "was trained with model = " in text and "give another --out" in text
    shutil.rmtree(tmp_path / "run/checkpoints/step_4")
    runs(tmp_path / "run", "--resume", "--eval_data", "", ranks=2)
    old, new = ([x for x in metrics(p) if "loss" in x] for p in (whole(1), tmp_path / "run"))
    assert (
        deterministic(new[:3]) == deterministic(old[:3])
        and [x["step"] for x in new] == [1, 2, 3, 4]
        and new[3]["rollout_kl"] < 1e-6
    )


@pytest.mark.slow
def test_a_torn_config_does_not_stop_resume_by_folder(runs, tmp_path):
    runs.start(tmp_path / "run", "--steps", 1, "--eval_data", "")
    assert runs.wait()[0] == [0]
    runs.start(tmp_path / "run", "--resume", faults=[("config.toml", 1, None)])
    assert runs.wait()[0] == [-9]
    assert lad.load_config(["--resume", str(tmp_path / "run")]).steps == 1


# ==== 8. What goes on for long, and what must not get out
# ===============================================================


@pytest.mark.slow
def test_memory_processes_and_files_stay_flat(runs, tmp_path, capsys):
    """Memory of the process and of each of its verifier's workers, open files, threads, zombies,
    and the files of the run (but the logs): the same at the end as in the middle."""
    steps = 400
    data = rows(
        tmp_path / "data.jsonl", 64, prompt=lambda i: f"1 2 {i % 9 + 1}={i + 3}:", answer="x+1"
    )
    patch = """
import json, resource, threading
append, judge = tracking.append, lad.verify.judge
def slowly(kind, response, truth, *a, quick=False, **k):   # everything goes to the workers
    return None if quick else judge(kind, response, truth, *a, **k)
lad.verify.judge = slowly
def rss(pid):
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 1e6
def look(cfg, name, **fields):
    append(cfg, name, **fields)
    if name == "metrics.jsonl":
        children = []
        for task in Path("/proc/self/task").iterdir():
            children += (task / "children").read_text().split()
        stats = [Path(f"/proc/{p}/stat").read_text() for p in children]
        states = [text.rpartition(")")[2].split()[0] for text in stats]
        files = [f for f in Path(cfg.out).rglob("*") if f.is_file() and f.suffix != ".jsonl"]
        seen = dict(step=fields["step"], rss=rss("self"), workers={p: rss(p) for p in children})
        seen["zombies"] = states.count("Z")
        seen["fds"] = len(os.listdir("/proc/self/fd"))
        seen["threads"] = threading.active_count()
        seen["files"] = sum(f.stat().st_size for f in files)
        print("LOOK", json.dumps(seen), flush=True)
tracking.append = look"""
    text = runs(
        tmp_path / "run",
        "--steps",
        steps,
        "--data",
        data,
        "--truth",
        "answer",
        "--kind",
        "math",
        "--eval_data",
        "",
        "--objective",
        "w_reinforce",
        "--checkpoint_every",
        5,
        "--verify_workers",
        2,
        patch=[patch],
        seconds=3000,
    )
    look = [json.loads(line[5:]) for line in text.splitlines() if line.startswith("LOOK")]
    a, b = look[steps // 2], look[-1]  # by the middle malloc's arenas have settled
    third, last = look[steps // 2 : 3 * steps // 4], look[3 * steps // 4 :]
    # In a quarter of the steps, whatever a moment holds
    grown = statistics.median(x["rss"] for x in last) - statistics.median(x["rss"] for x in third)
    with capsys.disabled():
        print(f"\nafter {a['step']} steps {a}\nafter {b['step']} steps {b}")
    assert len(look) == steps and all(x["zombies"] == 0 and len(x["workers"]) <= 2 for x in look)
    # MB: 0.1 a step would be seen
    assert grown < 10 and abs(b["files"] - a["files"]) < 1e5, (grown, a, b)
    # The second worker starts when both are wanted at once: maybe later
    growth = {pid: b["workers"][pid] - a["workers"][pid] for pid in a["workers"]}
    assert set(a["workers"]) <= set(b["workers"]) and max(growth.values()) < 10, growth
    late = len(b["workers"]) - len(a["workers"])
    assert b["fds"] <= a["fds"] + 2 * late and b["threads"] <= a["threads"] + late, (a, b)


def test_no_secret_and_no_port(runs, whole, tmp_path):
    """Tokens of the environment are in no file of a run and in nothing it printed; a run of one
    process listens on loopback alone (gloo does), and so do its children."""
    whole(1)
    for path in whole(1).rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path
    assert SECRET not in whole.printed(1)
    [pid] = runs.start(
        tmp_path / "run",
        "--steps",
        2,
        patch=[
            """collect = lad.collect
def slow(*a):
    print('GENERATING', flush=True)
    time.sleep(2)
    return collect(*a)
lad.collect = slow"""
        ],
    )
    wait_for(runs.log, "GENERATING")
    lines = [
        line.split()
        for name in ("tcp", "tcp6", "udp", "udp6")
        for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]
    ]
    loopback = ("0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000")
    outside = {
        line[9] for line in lines if line[3] != "01" and line[1].split(":")[0] not in loopback
    }  # listening TCP, unconnected UDP
    pids = [
        pid,
        *(
            p
            for task in Path(f"/proc/{pid}/task").iterdir()
            for p in (task / "children").read_text().split()
        ),
    ]
    held = {
        os.readlink(f)[8:-1]
        for p in pids
        for f in Path(f"/proc/{p}/fd").iterdir()
        if os.path.islink(f) and os.readlink(f).startswith("socket:")
    }
    runs.wait()
    assert not held & outside, [line for line in lines if line[9] in held & outside]


def test_a_pickle_is_never_run(runs, tiny, tmp_path):
    """A model folder whose weights are a pickle that would write a file: refused, nothing written.
    No file of ours reads pickles."""
    shutil.copytree(tiny["model"], tmp_path / "model")
    (tmp_path / "model/model.safetensors").unlink()

    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "canary",)

    torch.save({"model.embed_tokens.weight": Evil()}, tmp_path / "model/pytorch_model.bin")
    text = runs(tmp_path / "run", "--model", tmp_path / "model", code=2)
    assert "finds no *.safetensors file" in text, text[-3000:]
    assert not (tmp_path / "canary").exists()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("harness/*.py")]:
        assert not any(
            word in path.read_text()
            for word in ("torch.load(", "pickle.load", "trust_remote_code=True")
        ), path
