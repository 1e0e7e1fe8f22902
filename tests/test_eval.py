"""eval.py: the whole program on the tiny model with real vLLM, and what its lines are known by."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ENV, GRACE, ROOT, launch
from server import Server

import eval as ev
import verify
from harness import digest, judge, results

FLAGS = ["--bench", "tiny", "--samples", 8, "--limit", 24]


def lines(out):
    """{(settings, problem, judge): the rest} of all lines, judges' too."""
    keyed = {}
    for path in sorted(Path(out).glob("*.jsonl")):
        for line in open(path):
            record = json.loads(line)
            settings = json.dumps(record.pop("settings"), sort_keys=True)
            key = (settings, record["problem"], record.get("judge"))
            assert key not in keyed
            keyed[key] = record
    return keyed


def of_tiny(records):
    return {key: r for key, r in records.items() if json.loads(key[0])["model"] == "tiny"}


def table(said):
    return [line for line in said.splitlines() if line.startswith("|")]


def row_of(said, start):
    """Cells of the table's first line with that start, by the names of its columns."""
    rows = table(said)
    at = next(i for i, line in enumerate(rows) if line.startswith(start))
    head = max(i for i in range(at) if rows[i + 1].startswith("| ---"))
    return dict(zip(rows[head].split(" | "), rows[at].split(" | "), strict=True))


CONFIG = """data = "{data}"
data_name = ""
data_split = "train"
prompt = "{{prompt}}"
chat = false
system = ""
"""


@pytest.fixture(scope="module")
def run_folder(random_model, tiny, tmp_path_factory):
    """A run directory as lad.py leaves it, of a model with random weights."""
    out = tmp_path_factory.mktemp("runs") / "r0"
    shutil.copytree(random_model, out / "hf")
    (out / "config.toml").write_text(CONFIG.format(data=tiny["train"]))
    with open(out / "metrics.jsonl", "w") as file:
        for i in range(4):
            line = {"step": i, "reward": i / 10, "entropy": 1 - i / 10, "response_tokens": 5}
            line |= {"eval/pass@1": i / 10, "eval/pass@8": 0.5, "eval/distinct": 2}
            file.write(json.dumps(line) + "\n")
    return out


@pytest.fixture(scope="module")
def evaluated(forks, run_folder, tmp_path_factory):
    """tiny and a run, in one command, with pictures. (As a user gives it: test_hub.py.)"""
    out = tmp_path_factory.mktemp("evals")
    return out, forks.run("eval.py", "tiny", run_folder, *FLAGS, "--out", out, "--plot")


# ==== 1. Lines, table, pictures =================================================================


def test_one_command_evaluates_two_models(evaluated, tiny):
    """Rewards are the verifier's for these very responses; lengths end with <eos>."""
    out, said = evaluated
    found = lines(out)
    assert len(found) == 2 * 24
    assert said.count("24 problems x 8 to do") == 2
    puzzles = [json.loads(line) for line in open(tiny["test"])]
    for (_, number, _), record in found.items():
        truth = puzzles[number]["answer"]
        assert len(record["responses"]) == 8
        assert record["rewards"] == [verify.countdown_reward(t, truth) for t in record["responses"]]
        assert record["statement"] == puzzles[number]["prompt"]
        for length, cut in zip(record["lengths"], record["truncated"], strict=True):
            assert length == 12 if cut else 1 <= length <= 12


def test_the_table_is_computed_from_the_lines(forks, evaluated, run_folder):
    out, said = evaluated
    mine = list(of_tiny(lines(out)).values())
    average = 100 * np.mean([np.mean(r["rewards"]) for r in mine])
    best = 100 * np.mean([max(r["rewards"]) for r in mine])
    dist = []
    solutions = []
    for record in mine:
        texts = record["responses"]
        grams = [text[i : i + 3] for text in texts for i in range(len(text) - 2)]
        dist.append(len(set(grams)) / len(grams))
        scored = zip(texts, record["rewards"], strict=True)
        right = {"".join(text.split()).partition("=")[0] for text, reward in scored if reward == 1}
        solutions.append(len(right))

    row = row_of(said, "| tiny | 24 | 8 |")
    assert average > 0
    assert row["avg@n"].startswith(f"{average:.1f} [")
    assert row["pass@n"].startswith(f"{best:.1f} [")
    assert row["dist-3"] == f"{np.mean(dist):.3f}"
    assert row["distinct"] == f"{np.mean(solutions):.2f}"
    assert f"{run_folder}, tiny: of 24 problems 0 stand in the training data" in said
    again = forks.run("eval.py", "--out", out)  # from the lines alone: no model is needed
    assert table(again) == table(said)


@pytest.mark.parametrize("name, models", [("passk", 2), ("diversity", 2), ("training", 1)])
def test_pictures_show_the_models(evaluated, name, models):
    import matplotlib.image

    image = matplotlib.image.imread(evaluated[0] / f"{name}.png")[..., :3]
    image = (image * 255).round().astype(int)
    for colour in [(31, 119, 180), (255, 127, 14)][:models]:
        assert (np.abs(image - colour).max(-1) < 3).sum() > 50, colour


def test_two_ranks_and_one_give_the_same_lines(forks, evaluated, tmp_path):
    forks.run("eval.py", "tiny", *FLAGS, "--out", tmp_path, ranks=2)
    assert of_tiny(lines(tmp_path)) == of_tiny(lines(evaluated[0]))
    assert len(list(tmp_path.glob("*.jsonl"))) == 2


def test_training_counts_distinct_answers_beside_distinct_texts(forks, tmp_path):
    flags = ["--steps", 0, "--eval_samples", 4, "--out", tmp_path / "run"]
    forks.run("lad.py", "--config", "tiny", *flags)
    [line] = [json.loads(line) for line in open(tmp_path / "run/metrics.jsonl")]
    assert 0 < line["eval/distinct"] <= line["eval/distinct_texts"] <= 4


# ==== 2. Stopped, and gone on with ==============================================================


def wait_for_lines(file, count):
    end = time.monotonic() + 10 * GRACE
    while time.monotonic() < end:
        if file.exists() and file.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.01)
    raise AssertionError(f"no {count} lines in {file}")


def test_killed_and_restarted_equals_never_killed(forks, evaluated, tmp_path):
    """SIGKILL after a few problems, a torn line left behind, files merged by cat, other settings
    beside them: the same lines in the end."""
    argv = ["tiny", *FLAGS, "--out", tmp_path]
    [pid] = forks.start("eval.py", [*argv, "--samples", 512])
    file = tmp_path / "tiny.tiny.0.jsonl"
    wait_for_lines(file, 3)
    os.kill(pid, signal.SIGKILL)
    codes, printed, _ = forks.wait()
    killed = file.read_bytes().count(b"\n")
    assert codes == [-signal.SIGKILL] and 3 <= killed < 24, printed

    # What a kill of the run with --n 8 leaves
    whole = (evaluated[0] / "tiny.tiny.0.jsonl").read_bytes().splitlines(keepends=True)
    torn = whole[5][: len(whole[5]) // 2]
    file.write_bytes(file.read_bytes() + b"".join(whole[:5]) + torn)
    said = forks.run("eval.py", *argv)
    assert "19 problems x 8 to do" in said and "1 torn lines" in said

    shutil.copy(file, tmp_path / "copy.jsonl")  # merged twice: the same
    found = results.read(tmp_path, full=True)
    want = results.read(evaluated[0], full=True)
    key = next(key for key in want if json.loads(key)["model"] == "tiny")
    [other] = set(found) - {key}  # --n 512 stands apart
    assert found[key] == want[key]
    assert len(found[other]) >= killed


def test_ctrl_c_says_what_is_saved_and_how_to_go_on(forks, tmp_path):
    argv = ["tiny", *FLAGS, "--samples", 256, "--out", tmp_path]
    [pid] = forks.start("eval.py", argv)
    file = tmp_path / "tiny.tiny.0.jsonl"
    wait_for_lines(file, 1)
    os.kill(pid, signal.SIGINT)
    codes, printed, _ = forks.wait()
    saved = file.read_bytes().count(b"\n")
    assert codes == [130] and 1 <= saved < 24, printed
    last = printed.splitlines()[-1]
    assert last.startswith(f"eval.py: stopped; {saved} finished problems are saved in {tmp_path}")
    assert "the same command" in last
    assert "Traceback" not in printed
    # and so it goes on
    assert f"{24 - saved} problems x 256 to do" in forks.run("eval.py", *argv)


def test_nobody_reads_on(evaluated):
    """| head: no word of it on stderr."""
    command = [sys.executable, "eval.py", "--out", str(evaluated[0])]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, cwd=ROOT, env=ENV, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


# ==== 3. A line answers for what was asked ======================================================

ROWS = [
    {"problem": "1 2 3=6:", "answer": "6"},
    {"problem": "2 2 3=7:", "answer": "7"},
    {"problem": "4 2 3=9:", "answer": "9"},
]


@pytest.mark.slow
def test_another_question_under_the_same_name_is_asked(forks, random_model, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(random_model, model)
    rows = tmp_path / "math500.json"
    out = tmp_path / "out"
    flags = ["--bench", "math500", "--data", tmp_path, "--out", out, "--n", 2]
    flags += ["--max_tokens", 4, "--max_prompt_tokens", 64, "--prompt", "{problem}"]

    def evaluate(problems):
        rows.write_text(json.dumps(problems))
        return forks.run("eval.py", model, *flags)

    def weights_of(said):
        return [json.loads(line)["settings"]["weights"] for line in open(said)]

    assert "3 problems x 2 to do" in evaluate(ROWS)
    assert "to do" not in evaluate(ROWS)

    # A row that changed: its prompt, or its truth alone
    changed = [ROWS[0], dict(ROWS[1], problem="2 2 3=12:"), dict(ROWS[2], answer="10")]
    said = evaluate(changed)
    assert "2 problems x 2 to do" in said
    assert row_of(said, f"| {model} | 3 | 2 |")
    assert table(forks.run("eval.py", "--out", out)) == table(said)
    # and back: their lines are still there
    said = evaluate(ROWS)
    assert "to do" not in said and row_of(said, f"| {model} | 3 | 2 |")

    # Weights that differ in one number
    [path] = model.glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert "3 problems x 2 to do" in evaluate(ROWS)
    [file] = out.glob("*.jsonl")
    assert len(set(weights_of(file))) == 2

    # A chat template
    template = "{{ messages[-1].content }}"
    (model / "chat_template.jinja").write_text(template)
    assert "3 problems x 2 to do" in evaluate(ROWS)
    (model / "chat_template.jinja").write_text(template + "1")
    assert "3 problems x 2 to do" in evaluate(ROWS)
    assert "to do" not in evaluate(ROWS)


def test_a_question_is_its_tokens_and_its_truth():
    asked = digest.of_question([1, 2, 3], digest.of_truth("6"))
    assert asked == digest.of_question([1, 2, 3], digest.of_truth("6"))
    others = [
        digest.of_question([1, 2, 4], digest.of_truth("6")),
        digest.of_question([1, 23], digest.of_truth("6")),
        digest.of_question([1, 2, 3], digest.of_truth("7")),
        digest.of_question([1, 2, 3], digest.of_truth(6)),
    ]
    assert len({asked, *others}) == 5


def test_weights_are_known_by_every_byte(tmp_path, monkeypatch):
    """Also where the digest of a large file is remembered."""
    monkeypatch.setattr(digest, "MEMORY", tmp_path / "cache" / "weights.json")
    monkeypatch.setattr(digest, "LARGE", 10)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(bytes(100))
    first = digest.of_weights(model)
    assert digest.MEMORY.exists()
    assert digest.of_weights(model) == first
    found = [first]
    for name, data in [("model.safetensors", bytes(99) + b"1"), ("config.json", b'{"a": 1}')]:
        (model / name).write_bytes(data)
        found.append(digest.of_weights(model))
    assert len(set(found)) == 3
    # A memory that is no memory
    digest.MEMORY.write_text("[1")
    assert digest.of_weights(model) == found[-1]


def test_lines_of_an_older_program_are_not_used_and_named(forks, evaluated, tmp_path):
    for line in open(evaluated[0] / "tiny.tiny.0.jsonl"):
        record = json.loads(line)
        del record["asked"]
        results.append(tmp_path / "old.jsonl", record)
    said = forks.run("eval.py", "tiny", *FLAGS, "--out", tmp_path)
    assert "24 lines" in said and "older eval.py" in said
    assert "24 problems x 8 to do" in said


# ==== 4. Judges =================================================================================


def answer_as_a_judge(path, body, count):
    """Busy once, then a score by how many responses differ; the third reply has none."""
    if count == 1:
        return 503, {}
    prompt = json.loads(body)["messages"][0]["content"]
    blocks = prompt.split(":\n")[2:]
    texts = {block.split("\n\n")[0].strip() for block in blocks}
    score = "none" if count == 3 else str(1 + (len(texts) > 4))
    return 200, {"choices": [{"message": {"content": f"They differ.\nScore: {score}"}}]}


def test_a_judge_behind_http(forks, evaluated, tmp_path):
    """Asked once for each problem, never again; a rubric's scores are its own."""
    for path in evaluated[0].glob("*.jsonl"):
        shutil.copy(path, tmp_path)
    key = dict(OPENAI_API_KEY="secret")
    command = ["eval.py", "tiny", *FLAGS, "--limit", 6, "--out", tmp_path]
    with Server(answer_as_a_judge) as server:
        asks = [*command, "--judge", f"{server.url}/v1", "--judge_model", "j"]
        said = forks.run(*asks, env=key)
        assert len(server.seen) == 7
        assert {path for path, _, _ in server.seen} == {"/v1/chat/completions"}
        _, headers, body = server.seen[1]
        assert headers["Authorization"] == "Bearer secret"
        assert json.loads(body)["model"] == "j" and "Response 8:" in body.decode()
        assert table(forks.run(*asks, env=key)) == table(said)
        assert len(server.seen) == 7

        other = forks.run(*asks, "--judge_rubric", "flowrl", env=key)
        assert len(server.seen) == 13
        assert "j, flowrl " in other

    scores = [r["score"] for (_, _, name), r in lines(tmp_path).items() if name == "j"]
    known = [score for score in scores if score]
    assert len(scores) == 6 and len(known) == 5
    assert f" j {np.mean(known):.2f}" in said

    gone = [*command, "--judge", f"{server.url}/v1", "--judge_model", "other"]
    assert "eval.py: error: --judge" in forks.run(*gone, code=2)


def test_a_rubric_says_which_responses_it_wants():
    record = dict(statement="What is 1+1?", responses=[f"{i} " + "x" * 5000 for i in range(20)])
    logic = judge.judge_prompt(record, "logic")
    assert "Response 8:\n7 " in logic and "Response 9:" not in logic
    assert "x" * 3998 in logic and "x" * 3999 not in logic
    flowrl = judge.judge_prompt(record, "flowrl")
    assert "Response 16:\n15 " in flowrl and "Response 17:" not in flowrl
    assert "x" * 298 in flowrl and "x" * 299 not in flowrl
    assert "diverse 16 attempts" in flowrl and "What is 1+1?" in flowrl
    for rating, count in enumerate((14, 11, 7, 4), 1):
        assert f"{rating}: {count} or more" in flowrl


@pytest.mark.parametrize(
    "rubric, reply, score",
    [
        ("logic", "Two ideas.\nScore: 3", 3),
        ("logic", "Score: 2. No.\n**Score:** 4", 4),
        ("logic", "Score: 9", None),
        ("logic", "4", None),
        ("flowrl", "4", 4),
        ("flowrl", " 5\n", 5),
        ("flowrl", "Rating: 2/5", 2),
        ("flowrl", "14 of 16 do", None),
        ("flowrl", "6", None),
        ("flowrl", "", None),
        ("flowrl", None, None),
    ],
)
def test_scores_are_read_in_replies(rubric, reply, score):
    assert judge.read_score(reply, rubric) == score


@pytest.mark.slow
def test_a_judge_in_vllm(evaluated, random_model, tmp_path):
    """A local model with random weights and room for the prompt: it gives no score, which is
    counted, and its replies are kept."""
    model = tmp_path / "model"
    shutil.copytree(random_model, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    for path in evaluated[0].glob("tiny*.jsonl"):
        shutil.copy(path, tmp_path)
    command = ["eval.py", "tiny", *FLAGS, "--limit", 4, "--out", tmp_path, "--judge", model]
    said = launch(command).stdout
    replies = [r for (_, _, name), r in lines(tmp_path).items() if name == str(model)]
    assert len(replies) == 4
    assert all(r["reply"] and r["score"] is None for r in replies)
    assert "(4 replies without a score)" in said


# ==== 5. Bad input ==============================================================================

REFUSED = [
    (["x", "--bench", "mth500"], "did you mean 'math500'"),
    (["x", "--n", "many"], "invalid int value: 'many'"),
    (["x", "--n", "0"], "at least 1"),
    (["x", "--temperature", "hot"], "temperature = 'hot': expected float"),
    (["x", "--nosuch", "1"], "unrecognized arguments: --nosuch"),
    (["x", "--kind", "maths"], "did you mean 'math'"),
    (["x", "--judge_rubric", "flowlr"], "did you mean 'flowrl'"),
    (["x", "--bench", "lcb_v6", "--start", "May"], "expected a day"),
    (["x", "--bench", "tiny", "--prompt", "{prompt} {"], "does not fit"),
    (["x", "--bench", "tiny", "--prompt", "{nosuch}"], "needs field 'nosuch'"),
    (["x", "--bench", "tiny", "--out", "/proc/self/none"], "name a folder that can be written"),
    (["x", "--bench", "tiny", "--out", __file__], "name a folder that can be written"),
]


@pytest.mark.parametrize("argv, expected", REFUSED)
def test_bad_flags_get_one_clear_line(argv, expected, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["eval.py", *argv])
    with pytest.raises(SystemExit) as stop:
        ev.main(argv)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1, said
    assert said.startswith("eval.py: error: ") and expected in said


def test_nothing_to_report_and_a_file_that_is_not_there(capsys, tmp_path):
    cases = [
        (["--out", tmp_path], "no results to report"),
        (["--out", tmp_path / "none"], "no results to report"),
        (["x", "--bench", "leetcode", "--data", tmp_path, "--out", tmp_path], "leetcode: no file"),
    ]
    for argv, expected in cases:
        with pytest.raises(SystemExit) as stop:
            ev.main(list(map(str, argv)))
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.count("\n") == 1 and expected in said


def test_a_model_that_is_none_and_a_run_that_is_not_finished(forks, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.toml").write_text("chat = false\n")
    cases = [
        (tmp_path / "run", [], "has not finished"),
        (tmp_path, [], "not a model"),
        ("tiny", ["--max_prompt_tokens", 5], "more than --max_prompt_tokens 5"),
    ]
    for model, flags, expected in cases:
        said = forks.run("eval.py", model, *FLAGS, "--out", tmp_path / "out", *flags, code=2)
        last = said.splitlines()[-1]
        assert last.startswith("eval.py: error: ") and expected in last


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("../e/m1", "e_m1"),
        ("./runs/tiny-lad-s0", "runs_tiny-lad-s0"),
        ("org/model@v1.5", "org_model_v1.5"),
        ("/abs/.hidden", "abs_.hidden"),
    ],
)
def test_no_file_of_answers_is_hidden(name, file):
    assert ev.slug(name) == file
