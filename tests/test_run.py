"""lad.py as a user runs it, on the offline default: real vLLM, real verifier, one and two ranks,
stop and resume."""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import time
import tomllib

import pytest
import torch
from conftest import ROOT, launch, metrics

import lad
from harness import checkpoint, tracking

SHORT = [
    "--config",
    "tiny",
    "--steps",
    4,
    "--prompts",
    8,
    "--group",
    8,
    "--eval_every",
    2,
    "--eval_samples",
    4,
    "--eval_prompts",
    16,
    "--checkpoint_every",
    2,
]
# Two numbers of threads add in two orders: what is compared bit for bit has the same
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
KEYS = """step objective reward solve_rate loss entropy grad_norm lr response_tokens truncated
zero_variance mass_success mass_failure fade_alpha fade_delta fade_p fade_h ratio_max clipped
rollout_kl tis_mean tokens seconds seconds_rollout seconds_reward seconds_train seconds_sync
tokens_per_second memory_gb rank_one head_change failed skipped kl trained samples entropy_old
unanswered""".split()


def deterministic(lines):
    """Everything but the clock and the memory."""
    return [
        {k: v for k, v in line.items() if not k.startswith(("seconds", "tokens_per", "memory"))}
        for line in lines
    ]


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A whole run of four batches of FADE, in eight optimizer steps each, started as a user
    does."""
    out = tmp_path_factory.mktemp("run") / "whole"
    done = launch(["lad.py", *SHORT, "--objective", "fade", "--out", out], env=ONE_THREAD)
    return out, done.stdout


def test_run_directory(run):
    out, printed = run
    assert {
        "config.toml",
        "source",
        "metrics.jsonl",
        "samples.jsonl",
        "plot.png",
        "checkpoints",
        "hf",
    } <= {p.name for p in out.iterdir()}
    assert not (out / "lock").exists()  # it is held no more
    for name in (
        "lad.py",
        "baselines.py",
        "verify.py",
        "harness/ranks.py",
        "harness/sandbox.py",
        "configs.toml",
    ):
        assert (out / "source" / name).read_text() == (ROOT / name).read_text()
    resolved = tomllib.loads((out / "config.toml").read_text())
    assert (
        resolved["objective"] == "fade"
        and set(resolved) == set(lad.KNOBS)
        and resolved["group"] == 8
    )
    lines = metrics(out)
    train, evals = [x for x in lines if "loss" in x], [x for x in lines if "eval/pass@1" in x]
    assert [x["step"] for x in train] == [1, 2, 3, 4] and [x["step"] for x in evals] == [0, 2, 4]
    assert all(
        set(KEYS) <= set(x) and all(math.isfinite(v) for v in x.values() if not isinstance(v, str))
        for x in train
    )
    assert all(
        x["rollout_kl"] < 1e-6 and abs(x["tis_mean"] - 1) < 1e-3 for x in train
    )  # fp32 vLLM is the fp32 trainer
    assert all(0 <= x["eval/pass@1"] <= x["eval/pass@4"] <= 1 for x in evals)
    assert train[0]["ratio_max"] > 1 and train[-1]["grad_norm"] > 0
    assert "| fade | 0 |" in printed and "| fade | 4 |" in printed
    samples = [json.loads(line) for line in open(out / "samples.jsonl")]
    assert len(samples) == 8 and all(s["prompt"].endswith(":") for s in samples)
    import verify

    assert all(verify.countdown_reward(s["response"], s["truth"]) == s["reward"] for s in samples)


def test_metrics_add_up(run):
    """FADE's statistics follow from the logged solve rates; a power_asym weight has the masses of
    its definition."""
    cfg, p = lad.Config(), 0.5
    for x in [x for x in metrics(run[0]) if "loss" in x]:
        p = (1 - cfg.fade_rate) * p + cfg.fade_rate * x["solve_rate"]
        assert x["fade_p"] == pytest.approx(p) and x["reward"] == pytest.approx(x["solve_rate"])
        assert x["fade_alpha"] == pytest.approx(min(max(1.5 * (1 - p) / p, 1), 3))
        # delta = 1 here (H stays above H*): (r - rbar) sums to zero in a group, and the focus
        # factor is the group's
        if x["fade_delta"] == 1.0:
            assert x["mass_success"] == pytest.approx(x["mass_failure"], rel=1e-5)


def test_exported_model_is_the_checkpoint(run, tiny):
    """hf/ loads in transformers and holds the last checkpoint's weights; they are not the starting
    ones."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    out, _ = run
    saved = load_file(next((out / "checkpoints/step_4").glob("*.safetensors")))
    model = AutoModelForCausalLM.from_pretrained(out / "hf")
    start = AutoModelForCausalLM.from_pretrained(tiny["model"])
    for name, p in model.named_parameters():
        assert torch.equal(p, saved[name])
    assert any(
        not torch.equal(p, q) for p, q in zip(model.parameters(), start.parameters(), strict=True)
    )


def check_change(line, weights, start):
    """What a line logs of W_t - W_0 is that of two folders, their singular values in float64."""
    from transformers import AutoModelForCausalLM

    before = dict(AutoModelForCausalLM.from_pretrained(start).named_parameters())
    squares = {}
    for name, weight in weights.items():
        difference = weight.double() - before[name].detach().double()
        squares[name] = difference.square().sum().item()
        if name == "model.embed_tokens.weight":  # tied: the head too
            largest = torch.linalg.svdvals(difference)[0].item()
    of_head = squares["model.embed_tokens.weight"]
    assert set(squares) == set(before)
    assert line["rank_one"] == pytest.approx(largest**2 / of_head, rel=1e-4)
    assert line["head_change"] == pytest.approx(of_head / sum(squares.values()), rel=1e-4)


def test_change_is_since_the_start_of_the_run(run, tiny):
    """Not since the batch before, nor of Adam's last step."""
    from safetensors.torch import load_file

    out, _ = run
    for x in [x for x in metrics(out) if "loss" in x and x["step"] in (2, 4)]:
        [file] = (out / f"checkpoints/step_{x['step']}").glob("*.safetensors")
        saved = load_file(file)
        weights = {k: v for k, v in saved.items() if not k.startswith("exp_avg")}
        check_change(x, weights, tiny["model"])


def wait_for(path, text):
    end = time.monotonic() + 600
    while text not in (path.read_text(errors="replace") if path.exists() else ""):
        assert time.monotonic() < end, f"no {text!r} in {path}"
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_stopped_and_resumed_equals_never_stopped(forks, run, tmp_path, number):
    """SIGTERM finishes the step and saves; SIGKILL leaves what was saved. --resume goes on: the
    same metrics, bit for bit, and the same weights."""
    out, _ = run
    other = tmp_path / "stopped"
    every, moment = ("0", "step     1/") if number == signal.SIGTERM else ("1", "step     3/")
    [pid] = forks.start(
        "lad.py",
        [*SHORT, "--objective", "fade", "--out", other, "--checkpoint_every", every],
        env=ONE_THREAD,
    )
    wait_for(forks.log, moment)
    os.kill(pid, number)
    codes, printed, _ = forks.wait()
    assert codes == [128 + signal.SIGTERM if number == signal.SIGTERM else -signal.SIGKILL], printed
    stopped_at = int(checkpoint.listed(other)[-1].name[5:])
    assert 1 <= stopped_at < 4 and (
        number == signal.SIGKILL or f"--resume {other}" in printed.splitlines()[-1]
    ), printed
    # What a kill leaves behind: a line of a step that is not in the checkpoint, a torn one, half a
    # checkpoint
    with open(other / "metrics.jsonl", "a") as f:
        f.write(json.dumps({"step": stopped_at + 1, "loss": 0.0}) + "\n" + '{"step": 9, "lo')
    (other / "checkpoints/tmp").mkdir(exist_ok=True)
    (other / "checkpoints/tmp/shard-00001-model-00001-of-00001.safetensors").write_text("torn")
    forks.run("lad.py", "--resume", other, env=ONE_THREAD)
    assert deterministic(metrics(other)) == deterministic(metrics(out))
    from safetensors.torch import load_file

    a, b = (load_file(o / "hf/model.safetensors") for o in (out, other))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_resuming_a_finished_run_exports_again_and_changes_nothing(forks, run, tmp_path):
    """A run killed between its last checkpoint and the end of its export is finished by
    --resume."""
    out = tmp_path / "copy"
    shutil.copytree(run[0], out)
    shutil.rmtree(out / "hf")
    (out / "plot.png").unlink()
    forks.run("lad.py", "--resume", out)
    assert metrics(out) == metrics(run[0]) and (out / "plot.png").exists()
    assert (out / "hf/model.safetensors").read_bytes() == (
        run[0] / "hf/model.safetensors"
    ).read_bytes()


def test_two_ranks_train_and_resume_on_one(forks, run, tiny, tmp_path):
    """The same prompts in the same order on two sharded ranks, each with a seed of its own; their
    checkpoint goes on under one. (Under torchrun: test_hub.py.)"""
    out = tmp_path / "two"
    forks.run("lad.py", *SHORT, "--objective", "fade", "--out", out, "--steps", 2, ranks=2)
    two = [x for x in metrics(out) if "loss" in x]
    assert (
        len(two) == 2
        and all(x["rollout_kl"] < 1e-6 for x in two)
        and len(list((out / "checkpoints/step_2").glob("*.safetensors"))) == 2
    )
    one = [x for x in map(json.loads, open(run[0] / "samples.jsonl")) if x["step"] == 1]
    mine = [x for x in map(json.loads, open(out / "samples.jsonl")) if x["step"] == 1]
    assert (
        mine[0]["prompt"] == one[0]["prompt"]
    )  # rank 0's first prompt is the batch's first, for every number of ranks
    forks.run("lad.py", "--resume", out, "--steps", 3)
    three = [x for x in metrics(out) if "loss" in x]
    assert three[:2] == two and three[2]["step"] == 3 and three[2]["rollout_kl"] < 1e-6
    assert three[2]["fade_p"] == pytest.approx(
        0.98 * two[1]["fade_p"] + 0.02 * three[2]["solve_rate"]
    )
    # A resumed run's W_0 is the first run's
    from safetensors.torch import load_file

    check_change(three[2], load_file(out / "hf/model.safetensors"), tiny["model"])


def test_ranks_draw_from_seeds_of_their_own(monkeypatch):
    """Rank r of W owns rows r, r + W, ..; ranks that share an engine (tensor_parallel) pass it the
    same rows under one seed, others never do."""
    seen = []

    def generate(llm, cfg, ids, n, seed, **more):
        seen.append((seed, [i for [i] in ids]))
        return [[i] for [i] in ids]

    monkeypatch.setattr(lad, "generate", generate)
    monkeypatch.setattr(lad, "world", lambda: 4)
    rows = [dict(prompt_ids=[i]) for i in range(8)]
    for tensor_parallel, engines in ((1, 4), (2, 2)):
        seen.clear()
        shares = []
        for rank in range(4):
            monkeypatch.setattr(lad, "rank", lambda rank=rank: rank)
            mine, groups = lad.rollout(
                None,
                dataclasses.replace(lad.Config(), tensor_parallel=tensor_parallel),
                rows,
                1,
                1,
                0,
            )
            assert (
                [g[0] for g in groups] == [row["prompt_ids"][0] for row in mine] == [rank, rank + 4]
            )
            shares += [row["prompt_ids"][0] for row in mine]
        assert len({seed for seed, _ in seen}) == len(
            {tuple(ids) for _, ids in seen}
        ) == engines and sorted(shares) == list(range(8))


@pytest.mark.parametrize(
    "flags",
    [
        [
            "--objective",
            "lad",
            "--ratio",
            "sequence",
            "--aggregation",
            "sequence",
            "--zero_variance",
            "refill",
            "--kl_coef",
            "0.05",
        ],
        [
            "--objective",
            "dr_grpo",
            "--aggregation",
            "constant",
            "--minibatches",
            "1",
            "--epochs",
            "1",
            "--overlong",
            "shape",
            "--overlong_buffer",
            "8",
            "--max_tokens",
            "10",
        ],
        [
            "--objective",
            "grpo",
            "--zero_variance",
            "drop",
            "--group",
            "2",
            "--track_change",
            "false",
        ],
        [
            "--objective",
            "w_reinforce",
            "--overlong",
            "mask",
            "--max_tokens",
            "6",
            "--checkpointing",
            "true",
            "--tis_cap",
            "0",
        ],
    ],
    ids=lambda f: f[1],
)
def test_options_run(forks, flags, tmp_path):
    forks.run("lad.py", *SHORT, "--steps", 2, "--eval_data", "", "--out", tmp_path / "run", *flags)
    train = metrics(tmp_path / "run")
    assert [x["step"] for x in train] == [1, 2] and all(
        math.isfinite(x["loss"]) and x["grad_norm"] > 0 for x in train
    )
    if "refill" in flags:
        assert (
            train[0]["kl"] >= 0 and train[1]["kl"] > 0
        )  # the frozen reference: left behind after the first step
    if "shape" in flags:
        assert (
            train[0]["reward"] < train[0]["solve_rate"] and train[0]["ratio_max"] == 1.0
        )  # one update: the old policy is the new one
    if "drop" in flags:
        assert train[0]["zero_variance"] > 0
    tracked = {"rank_one", "head_change"}
    assert all(tracked & set(x) == (set() if "--track_change" in flags else tracked) for x in train)
    if "mask" in flags:
        assert train[0]["truncated"] > 0.3


def test_what_a_log_line_says_of_its_updates():
    """Steps without a token, and steps whose gradient was not finite, dilute no mean."""

    def update(loss, norm, tokens, ratio):
        means = ("loss", "entropy", "clipped", "tis_mean", "rollout_kl", "kl")
        update = dict.fromkeys(means, loss)
        return update | dict(grad_norm=norm, tokens=tokens, ratio_max=ratio)

    empty = update(0.0, 0.0, 0, 1.0)
    broken = update(math.nan, math.nan, 9, 8.0)
    found = tracking.summary([update(2.0, 1.0, 10, 1.5), empty, broken, update(4.0, 3.0, 7, 1.2)])
    assert found["loss"] == found["entropy"] == 3.0
    assert found["grad_norm"] == 2.0 and found["ratio_max"] == 1.5
    assert set(tracking.summary([empty]).values()) == {0.0}


def test_a_lost_sample_stays_lost(tiny):
    """Verified twice, it is still lost: a NaN would be taken for a log-prob of 0."""
    from transformers import AutoTokenizer

    import verify

    cfg, tokenizer = (
        lad.load_config(
            [
                "--config",
                "tiny",
                "--zero_variance",
                "drop",
                "--prompts",
                "1",
                "--minibatches",
                "1",
                "--group",
                "2",
            ]
        ),
        AutoTokenizer.from_pretrained(tiny["model"]),
    )
    row = dict(
        prompt="1 2 3=6:",
        prompt_ids=tokenizer("1 2 3=6:")["input_ids"],
        truth=dict(numbers=[1, 2, 3], target=6),
    )

    def answer(text, behaviour):
        return dict(tokens=tokenizer(text)["input_ids"], behaviour=behaviour, truncated=False)

    def rollout(*asked):
        return [row], [[answer("1+2+3", [-0.1] * 5), answer("1+2", [-0.1, math.nan, -0.1])]]

    lad_rollout, lad.rollout = lad.rollout, rollout
    try:
        with verify.Verifier(1, 10.0) as verifier:
            groups, drawn, position, pending = lad.collect(
                None, cfg, tokenizer, verifier, [row], 0, 1, lambda name: None
            )
            assert not pending  # with drop they have been looked at
            lad.finish_verification(
                groups[0],
                verifier.submit([("countdown", s["text"], s["row"]["truth"]) for s in groups[0]]),
                cfg,
            )
    finally:
        lad.rollout = lad_rollout
    lad.set_advantages(groups, cfg, lad.new_state())
    good, bad = groups[0]
    assert (good["reward"], good["lost"], good["failed"]) == (1.0, False, "")
    assert bad["lost"] and not lad.is_trained_on(bad, cfg) and lad.is_trained_on(good, cfg)
    known = lad.batch_statistics(drawn)
    assert known["failed"] == 0.5 and known["entropy_old"] == pytest.approx(0.1)  # the good one's
    cfg = dataclasses.replace(cfg, objective="lad_anchor")  # a rank whose groups were all dropped
    lad.set_advantages([], cfg, lad.new_state())
    assert (
        lad.gradient_mass([], cfg, 2) == {"mass_success": 0, "mass_failure": 0}
        and lad.batch_statistics(drawn)["zero_variance"] == 0
    )


def test_another_objective_or_model_is_refused(forks, run, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(run[0], out)
    for flags, was in (
        (["--objective", "grpo"], "objective = 'fade'"),
        (["--seed", 1], "seed = 0"),
        (["--ref_every", 10], "ref_every = 0"),
    ):
        printed = forks.run("lad.py", "--resume", out, *flags, code=2)
        assert f"was trained with {was}" in printed and printed.count("lad.py: error") == 1


def test_two_runs_do_not_share_a_folder(forks, run, tmp_path):
    """The second is refused in one line, by the folder's name and through a symbolic link, resumed
    or not; the first ends as if alone. A link as --out is followed, and what it led to is moved
    aside when the run is over."""
    out = tmp_path / "run"
    (tmp_path / "link").symlink_to(out)
    slow = f"""
collect = lad.collect
def slow(*a):
    while not os.path.exists({str(tmp_path / "go")!r}):
        time.sleep(0.01)
    return collect(*a)
lad.collect = slow"""
    argv = [*SHORT, "--objective", "fade", "--out"]
    forks.start("lad.py", [*argv, out], env=ONE_THREAD, patch=[slow])
    log = forks.log
    wait_for(log, "eval     0/")
    for flags in ([*argv, tmp_path / "link"], ["--resume", out]):
        done = launch(["lad.py", *flags], check=False)
        assert (
            done.returncode == 2 and done.stdout.count("\n") == 1 and "is at work in" in done.stdout
        ), done.stdout
    (tmp_path / "go").touch()
    codes, printed, _ = forks.wait()
    assert codes == [0] and deterministic(metrics(out)) == deterministic(metrics(run[0]))
    printed = forks.run("lad.py", *argv, tmp_path / "link", "--steps", 0, "--eval_data", "")
    assert (
        "moved to" in printed
        and (tmp_path / "link").is_symlink()
        and not (out / "metrics.jsonl").exists()
    )
    [aside] = [p for p in tmp_path.iterdir() if p.name.startswith("run.")]
    assert len(metrics(aside)) == len(metrics(run[0]))


@pytest.mark.slow
def test_readme_diff_of_an_own_objective_trains(tmp_path):
    """The README's diff, applied to a copy of lad.py: every hunk fits exactly one place; two
    batches; its fixed point by bandit.py."""
    diff = re.search(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), re.S).group(1)
    for path in [*ROOT.glob("*.py"), ROOT / "configs.toml"]:
        shutil.copy(path, tmp_path)
    shutil.copytree(ROOT / "harness", tmp_path / "harness")
    text = (ROOT / "lad.py").read_text()
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines(True)
        before, after = (
            "".join(line[1:] for line in lines if line[0] in kinds) for kinds in (" -", " +")
        )
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    assert 5 <= diff.count("\n+") <= 15
    (tmp_path / "mine.py").write_text(text)
    launch(
        [
            tmp_path / "mine.py",
            *SHORT,
            "--steps",
            2,
            "--eval_data",
            "",
            "--objective",
            "smooth",
            "--softness",
            "2",
            "--out",
            tmp_path / "run",
        ],
        env={"PYTHONPATH": str(tmp_path)},
    )
    train = metrics(tmp_path / "run")
    assert len(train) == 2 and all(
        x["objective"] == "smooth" and x["grad_norm"] > 0 and math.isfinite(x["loss"])
        for x in train
    )
    assert "smooth" in (tmp_path / "run/source/mine.py").read_text()
    checked = launch(
        [tmp_path / "bandit.py", "--check", tmp_path / "mine.py:smooth", "--out", tmp_path],
        env={"PYTHONPATH": str(tmp_path)},
    ).stdout
    assert (
        re.search(r"pi_old every step, exact: +collapsed", checked)
        and (tmp_path / "check-masses.png").exists()
    )
