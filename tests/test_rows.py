"""Rows of messages as people write them, against a real tokenizer with real chat templates; a head
that the config does not know of; top_p in training."""

import dataclasses
import json
import shutil

import pytest
import torch

import lad
from harness import checkpoint
from harness.data import load_data, read_rows

PLAIN = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
NO_SYSTEM = (  # as Gemma's: it refuses the role
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}" + PLAIN
)


@pytest.fixture
def load(tiny, tmp_path):
    """load(rows, template, changes of settings): the prompts of the rows."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny["model"])

    def prompts(rows, chat_template=PLAIN, **changes):
        tokenizer.chat_template = chat_template
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in rows))
        base = dict(data=str(path), prompt="{chat}", truth="a", max_prompt_tokens=999)
        cfg = dataclasses.replace(lad.Config(), **base | changes)
        return [row["prompt"] for row in load_data(cfg, tokenizer)]

    return prompts


def refused(capsys, function, *args, **more):
    """The one line on stderr with which a function leaves with code 2."""
    with pytest.raises(SystemExit) as stop:
        function(*args, **more)
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and printed.count("\n") == 1, printed
    return printed


def user(content):
    return dict(role="user", content=content)


def system(content):
    return dict(role="system", content=content)


def assistant(content):
    return dict(role="assistant", content=content)


def test_two_rows_are_duplicates_if_their_whole_prompts_are(load, capsys):
    follow_up = [user("5+5?"), assistant("10"), user("why?")]
    rows = [
        dict(chat=[user("1+1?"), assistant("2"), user("why?")], a="x"),
        dict(chat=follow_up, a="x"),
        dict(chat=follow_up, a="y"),
        dict(chat=[system("s"), *follow_up], a="x"),
    ]
    assert len(load(rows)) == 3
    assert "3 rows (1 duplicates" in capsys.readouterr().out


def test_system_goes_to_rows_that_have_none(load, capsys):
    rows = [dict(chat=[user("1")], a="x"), dict(chat=[system("own"), user("2")], a="x")]
    assert load(rows, system="S") == [
        "<system>S<user>1<assistant>",
        "<system>own<user>2<assistant>",
    ]
    assert "1 rows have a system message, for which --system is ignored" in capsys.readouterr().out
    assert load(rows)[0] == "<user>1<assistant>"
    assert "ignored" not in capsys.readouterr().out


def test_an_answer_at_the_end_is_left_out_and_counted(load, capsys):
    rows = [
        dict(chat=[user("1"), assistant("right")], a="x"),
        dict(chat=[user("2"), assistant("a"), user("3"), assistant("b"), assistant("c")], a="x"),
        dict(chat=[user("4")], a="x"),
    ]
    wanted = ["<user>1<assistant>", "<user>2<assistant>a<user>3<assistant>", "<user>4<assistant>"]
    assert load(rows) == wanted
    assert "2 rows end with an answer, which is left out" in capsys.readouterr().out
    assert load(rows, prompt="Q: {chat}")[1] == "<user>Q: 3<assistant>"  # the last question


def test_sharegpt_and_parts(load):
    rows = [
        {
            "chat": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "1"},
                {"from": "gpt", "value": "2"},
                {"from": "human", "value": "3"},
                {"from": "gpt", "value": "the answer"},
            ],
            "a": "x",
        },
        {"chat": [user([dict(type="text", text="one "), dict(type="text", text="two")])], "a": "x"},
    ]
    assert load(rows) == [
        "<system>s<user>1<assistant>2<user>3<assistant>",
        "<user>one two<assistant>",
    ]


def test_blank_lines_are_skipped_and_a_torn_one_is_named(load, capsys):
    row = json.dumps(dict(chat=[user("1\u20282")], a="x"), ensure_ascii=False)
    assert load(["\ufeff" + row, "", "   ", ""]) == ["<user>1\u20282<assistant>"]
    assert "Unterminated string starting at: line 3 column 2" in refused(
        capsys, load, [row, "", '{"a']
    )


@pytest.mark.parametrize(
    "chat, says",
    [
        ([dict(content="1")], "row 2, message 1: it has no role; it has content"),
        ([dict(role="user", content=None)], "row 2, message 1: its content is null or missing"),
        ([dict(role="user")], "row 2, message 1: its content is null or missing"),
        ([dict(role=None, content="1")], "row 2, message 1: it has no role"),
        ([user("1"), "2"], "row 2, message 2: expected an object with role and content, not str"),
        ([user([dict(type="image", url="x")])], "row 2, message 1: its content has a part that"),
        ([user(7)], "row 2, message 1: its content is int, not text"),
        ([{"from": "human", "value": None}], "row 2, message 1: its content is null"),
        ([{"from": 3, "value": "1"}], "row 2, message 1: it has no role"),
        ([assistant("1")], "row 2: its messages hold no question, only assistant messages"),
        ([system("1"), assistant("2")], "row 2: its messages hold no question"),
        ([], "row 2: its prompt is empty"),
        ([user(" \n")], "row 2: its prompt is empty"),
    ],
)
def test_messages_that_cannot_be_read_are_refused_with_the_rows_number(load, capsys, chat, says):
    line = refused(capsys, load, [dict(chat=[user("0")], a="x"), dict(chat=chat, a="x")])
    assert says in line


def test_a_template_that_refuses_is_named(load, capsys):
    rows = [dict(chat=[user("0")], a="x"), dict(chat=[system("s"), user("1")], a="x")]
    line = refused(capsys, load, rows, NO_SYSTEM)
    assert "row 2: the chat template refuses its messages (system, user): System role not" in line
    assert "row 1: the chat template" in refused(capsys, load, rows, NO_SYSTEM, system="S")
    assert load(rows[:1], NO_SYSTEM) == ["<user>0<assistant>"]


def test_a_head_of_its_own_under_a_config_that_says_tied(tiny, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny["model"], tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    cfg = dataclasses.replace(lad.Config(), checkpointing=False)
    tied = weights["model.embed_tokens.weight"].clone()
    for head, is_right in ((tied, True), (tied + 1, False), (tied[:-8], False)):
        save_file(weights | {"lm_head.weight": head.contiguous()}, folder / "model.safetensors")
        says = checkpoint.other_head(folder)
        assert (says == "") == is_right
        if is_right:
            lad.build_model(str(folder), cfg, torch.device("cpu"))
        else:
            line = refused(capsys, lad.build_model, str(folder), cfg, torch.device("cpu"))
            assert "says tie_word_embeddings = true" in line


def test_top_p_below_one_is_for_evaluation_alone(capsys):
    line = refused(capsys, lad.load_config, ["--config", "tiny", "--top_p", "0.95"])
    assert "top_p = 0.95" in line and "train with top_p = 1" in line
    assert lad.load_config(["--config", "tiny", "--top_p", "1"]).top_p == 1


def test_rows_that_a_function_makes(tmp_path, capsys):
    """FILE.py:function is called without arguments; who names no such function is told."""
    path = tmp_path / "made.py"
    path.write_text("def rows():\n    yield from [{'q': i} for i in range(3)]\n\nnumber = 7\n")
    assert read_rows(f"{path}:rows", "", "train") == [{"q": 0}, {"q": 1}, {"q": 2}]
    for name in ("number", "nothing"):
        said = refused(capsys, read_rows, f"{path}:{name}", "", "train")
        assert f"{path} has no function {name!r}" in said
    said = refused(capsys, read_rows, f"{tmp_path}/none.py:rows", "", "train")
    assert "No such file" in said and "FILE.py:function" in said
