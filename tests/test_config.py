"""Sections 1 and 2 of lad.py: every knob from one place, strict presets, data fields, one clear
line for bad input."""

import dataclasses
import json
import subprocess
import sys
import tomllib

import pytest
import torch
from conftest import DATA, ROOT, launch

import lad
from harness import settings
from harness.data import draw, load_data, read_rows

PRESETS = tomllib.loads((ROOT / "configs.toml").read_text())
PRESETS.pop("bench")  # eval.py's benchmarks


def refused(capsys, *argv):
    """The one line on stderr with which load_config leaves with code 2."""
    with pytest.raises(SystemExit) as stop:
        lad.load_config(argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and ": error: " in err and err.count("\n") == 1, err
    return err


def test_flags_over_preset_over_defaults():
    cfg = lad.load_config(["--config", "tiny", "--lr", "3e-4", "--group=12", "--chat", "false"])
    assert (cfg.lr, cfg.group, cfg.chat, cfg.model, cfg.config) == (3e-4, 12, False, "tiny", "tiny")
    assert (
        cfg.tis_cap == lad.Config().tis_cap and cfg.kind == PRESETS["tiny"]["kind"] == "countdown"
    )
    assert cfg.out == f"runs/tiny-{cfg.objective}-s0" and not cfg.resume
    plain = lad.load_config([])
    assert {
        f.name: getattr(plain, f.name) for f in dataclasses.fields(plain) if f.name != "out"
    } == {f.name: f.default for f in dataclasses.fields(plain) if f.name != "out"}


def test_bad_input_gets_one_clear_line(capsys, tmp_path):
    assert "did you mean 'prompts'" in refused(capsys, "--promts", "8")
    assert "'fade'" in refused(capsys, "--objective", "fad")
    assert "expected int" in refused(capsys, "--steps", "many")
    assert "expected bool" in refused(capsys, "--chat", "1")
    assert "at least 2" in refused(capsys, "--group", "1")
    assert "at most 1" in refused(capsys, "--top_p", "1.5")
    assert "did you mean 'tiny'" in refused(capsys, "--config", "tny")
    assert "no preset 'bench'" in refused(capsys, "--config", "bench")
    assert "needs a value" in refused(capsys, "--lr")
    assert "--help lists them" in refused(capsys, "--xyzzy", "8")
    assert "needs the folder of the run" in refused(capsys, "--resume")
    assert "no_such_run" in refused(capsys, "--resume", "no_such_run")
    assert "expected --key value" in refused(capsys, "lr=3")
    assert "minibatches" in refused(capsys, "--prompts", "10", "--minibatches", "4")
    preset = tmp_path / "p.toml"
    preset.write_text('# a comment\nlr = 1e-5\n\ndivergence = "jss"\n')
    line = refused(capsys, "--config", str(preset))
    assert f"{preset}, line 4: divergence = 'jss'" in line and "'js'" in line
    preset.write_text("group = 8.5\n")
    assert "line 1: group = 8.5: expected int" in refused(capsys, "--config", str(preset))
    preset.write_text("group = \n")
    assert str(preset) in refused(capsys, "--config", str(preset))
    assert "no.toml" in refused(capsys, "--config", "no.toml")


@pytest.mark.parametrize("key", [f.name for f in dataclasses.fields(lad.Config)])
def test_every_knob_has_help_and_refuses_a_wrong_type(key):
    field = lad.KNOBS[key]
    assert len(field.metadata["help"]) > 3 and field.default is not dataclasses.MISSING
    settings.check_value(
        key, field.default, "default", lad.KNOBS, lad.OBJECTIVES
    )  # the default itself is in range
    with pytest.raises(ValueError, match=f"expected {field.type.__name__}"):
        settings.check_value(key, [field.default], "test", lad.KNOBS, lad.OBJECTIVES)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_parses_and_repeats_no_default(name):
    lad.load_config(["--config", name])
    default = {f.name: f.default for f in dataclasses.fields(lad.Config)}
    assert not {k: v for k, v in PRESETS[name].items() if default[k] == v}


def test_importing_lad_is_light():
    """No vllm, no CUDA, no arguments parsed: the pure parts can be used from anywhere."""
    code = (
        "import sys, lad, torch; "
        "print('vllm' in sys.modules, 'transformers' in sys.modules, torch.cuda.is_initialized())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--nonsense"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.split() == ["False", "False", "False"], done.stderr


def test_default_preset_without_a_gpu_names_tiny():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = launch(["lad.py", "--objective", "fade"], check=False)
    assert done.returncode == 2 and done.stdout.count("\n") == 1 and "--config tiny" in done.stdout


@pytest.mark.parametrize("flags", [["-I"], []], ids=["-I", "PYTHONSAFEPATH"])
def test_lad_finds_its_own_files_from_anywhere_and_head_gets_no_traceback(flags, tmp_path):
    command = [sys.executable, *flags, str(ROOT / "lad.py"), "--help"]
    env = {"PATH": "/usr/bin:/bin", "PYTHONSAFEPATH": "1", "HOME": str(tmp_path)}
    with subprocess.Popen(
        command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() in (0, 141)


def test_a_home_that_cannot_be_written_is_named():
    done = launch(["lad.py", "--config", "tiny"], check=False, env={"HOME": "/proc/nobody"})
    assert done.returncode == 2 and "set HOME to a writable folder" in done.stdout, done.stdout
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize("text", ['\U0001d54f \x7f \x00 \x1f " \\ \u2028 \r\n', "$x_1$ # [a]"])
def test_what_we_write_as_toml_is_read_back(text):
    values = dict(a=text, b=True, c=1e-6, d=3)
    assert tomllib.loads(settings.to_toml(values)) == values


def test_help_lists_every_knob_and_objective(capsys):
    with pytest.raises(SystemExit) as stop:
        lad.load_config(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for name, field in lad.KNOBS.items():
        assert (
            f"--{name} {field.type.__name__} = {field.default!r}" in text
            and field.metadata["help"] in text
        )
    assert all(name in text for name in lad.OBJECTIVES)


# Data


class Letters:
    """A tokenizer of one token a character, with a chat template: enough for load_data."""

    chat_template = "as below"

    def __call__(self, text, add_special_tokens):
        return {
            "input_ids": [ord(c) for c in text]
            if not add_special_tokens
            else [1] + [ord(c) for c in text]
        }

    def apply_chat_template(self, messages, add_generation_prompt, tokenize):
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"


def load(tmp_path, rows, evaluation=False, **changes):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    base = dict(
        data=str(path),
        eval_data=str(path),
        prompt="Q: {q}",
        truth="a",
        eval_prompt="{q}",
        eval_truth="a",
        chat=False,
    )
    return load_data(
        dataclasses.replace(lad.Config(), **{**base, **changes}), Letters(), evaluation
    )


def test_templates_and_fields(tmp_path, capsys):
    rows = load(
        tmp_path,
        [
            {"q": "1+1", "a": {"b": "2"}},
            {"q": "x" * 40, "a": {"b": "3"}},
            {"q": "1+1", "a": {"b": "4"}},
        ],
        truth="a.b",
        max_prompt_tokens=20,
    )
    assert [(r["prompt"], r["truth"]) for r in rows] == [("Q: 1+1", "2")]
    assert rows[0]["prompt_ids"] == [1] + [ord(c) for c in "Q: 1+1"]
    assert "1 rows (1 duplicates and 1 prompts over 20 tokens dropped)" in capsys.readouterr().out
    rows = load(
        tmp_path,
        [{"q": "1", "a": "so\n#### 7", "n": [3, 4], "t": 7}],
        chat=True,
        system="S",
        truth_after="####",
    )
    assert (rows[0]["prompt"], rows[0]["truth"]) == (
        "<system>S<user>Q: 1<assistant>",
        "7",
    ) and rows[0]["prompt_ids"][0] == ord("<")
    rows = load(
        tmp_path,
        [{"n": [3, 4], "t": 7}],
        prompt="{n} -> {t} \\boxed{{}}",
        truth="numbers=n,target=t",
    )
    assert (rows[0]["prompt"], rows[0]["truth"]) == (
        "[3, 4] -> 7 \\boxed{}",
        {"numbers": [3, 4], "target": 7},
    )
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    rows = load(tmp_path, [{"prompt": messages, "a": "1"}], prompt="{prompt}", chat=True)
    assert rows[0]["prompt"] == "<system>s<user>u<assistant>"


def test_bad_rows_name_their_number(tmp_path, capsys):
    for rows, changes, expected in [
        (
            [{"q": "1", "a": "2"}, {"q": "2"}],
            {},
            "row 2: no field 'a', which truth or eval_truth names; it has q",
        ),
        ([{"q": "1", "a": "2"}, {"q": "2", "a": None}], {}, "row 2: a = 'None' is no truth"),
        (
            [{"q": "1", "a": {"numbers": [1]}}],
            dict(kind="countdown"),
            "is no truth for kind = countdown (needs numbers and target)",
        ),
        (
            [{"q": "1", "a": "2"}, {"z": "2", "a": "1"}],
            {},
            "row 2: the prompt template 'Q: {q}' does not fit: KeyError 'q'; the row has z, a",
        ),
        (
            [{"q": "1", "a": "2"}],
            dict(prompt="{q} \\boxed{}"),
            "row 1: the prompt template '{q} \\\\boxed{}' does not fit",
        ),
        ([{"q": "1", "a": "2"}], dict(prompt="{q"), "row 1: the prompt template '{q' does not fit"),
        (["q"], {}, "row 1: expected an object with named fields, not str"),
        (
            [{"q": "x" * 99, "a": "1"}],
            dict(max_prompt_tokens=9),
            "no row is left; raise max_prompt_tokens",
        ),
    ]:
        with pytest.raises(SystemExit):
            load(tmp_path, rows, **changes)
        assert expected in capsys.readouterr().err
    (tmp_path / "bad.jsonl").write_text('{"q": "1"}\n{"q": "2}\n{"q": "3"}\n')
    with pytest.raises(SystemExit):
        read_rows(str(tmp_path / "bad.jsonl"), "", "train")
    assert "line 2 column" in capsys.readouterr().err
    plain = Letters()
    plain.chat_template = None
    with pytest.raises(SystemExit):
        load_data(dataclasses.replace(lad.Config(), data=str(tmp_path / "rows.jsonl")), plain)
    assert "no chat template" in capsys.readouterr().err
    for source in (str(tmp_path / "no.jsonl"), str(tmp_path / "no.parquet")):
        with pytest.raises(SystemExit):
            read_rows(source, "", "train")
        assert f"cannot read {source!r}" in capsys.readouterr().err


def test_draw_continues_where_it_stopped():
    rows = list(range(10))
    whole = draw(rows, 0, 34, seed=3)
    assert whole[:10] != whole[10:20] and all(
        sorted(whole[i : i + 10]) == rows for i in (0, 10, 20)
    )
    assert whole == draw(rows, 0, 7, 3) + draw(rows, 7, 16, 3) + draw(rows, 23, 11, 3)
    assert whole != draw(rows, 0, 34, seed=4)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no data in {DATA}")
def test_published_files_load():
    dapo = dataclasses.replace(
        lad.load_config([]),
        data=str(DATA / "dapo_math_17k.parquet"),
        prompt="Solve: {prompt}",
        max_prompt_tokens=10**6,
    )
    rows = load_data(dapo, Letters())
    assert len(rows) == 17290  # of 17,917: what shared/data/README.md counts
    assert rows[0]["prompt"].startswith("<user>Solve: In triangle")
    assert rows[0]["truth"] == "34"


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no data in {DATA}")
def test_countdown_preset_reads_the_published_file():
    preset = PRESETS["countdown-small"]
    rows = load_data(
        dataclasses.replace(
            lad.Config(**{k: v for k, v in preset.items()}),
            data=str(DATA / "countdown_train.parquet"),
            max_prompt_tokens=10**6,
        ),
        Letters(),
    )
    assert {"numbers", "target"} == set(rows[0]["truth"]) and str(
        rows[0]["truth"]["target"]
    ) in rows[0]["prompt"]
