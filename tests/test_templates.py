"""
Prompts of the families that people train, as their chat templates write them.

The tokenizers here are small: a token for each byte, and the family's own special tokens. The
templates have what is particular to each family: who writes the <bos>, a system message that is
there by default or has no role of its own, names of the roles, thoughts that are taken out of
earlier turns, a thought that the prompt opens or closes.
"""

import dataclasses
import json
from dataclasses import dataclass

import pytest

import eval as ev
import lad
from harness.data import load_data
from harness.responses import response_texts

# ==== 1. The families ===========================================================================


@dataclass(frozen=True)
class Family:
    template: str
    special: tuple  # special tokens
    ends: tuple  # those that end a response: eos_token_id of generation_config.json
    bos: str = ""  # the template writes it, and so does the tokenizer when it is not told otherwise
    bos_token: str = ""  # what the tokenizer calls so, where nothing writes it
    plain: tuple = ()  # added tokens that are text


# ChatML; without a system message there is the family's own
CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nDEFAULT<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Earlier answers lose their thoughts; a prompt without thinking has an empty thought at its end
QWEN3 = (
    "{% for m in messages %}{% set content = m.content %}"
    "{% if m.role == 'assistant' and '</think>' in content %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# No role for a system message: it goes before the first question; the assistant is the model
GEMMA3 = (
    "{{ bos_token }}{% set first = '' %}{% set turns = messages %}"
    "{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
    "{% set turns = messages[1:] %}{% endif %}"
    "{% for m in turns %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ first if loop.first else '' }}{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# A system message without marks; earlier answers lose their thoughts; the prompt opens one
DEEPSEEK = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}{% endif %}"
    "{% if m.role == 'assistant' %}<｜Assistant｜>{{ m.content.split('</think>')[-1] }}"
    "<｜end▁of▁sentence｜>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)

FAMILIES = {
    "qwen2.5": Family(
        CHATML,
        special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        ends=("<|im_end|>", "<|endoftext|>"),
    ),
    "qwen3": Family(
        QWEN3,
        special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        ends=("<|im_end|>", "<|endoftext|>"),
        plain=("<think>", "</think>"),
    ),
    "llama3": Family(
        LLAMA3,
        special=("<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        ends=("<|eot_id|>", "<|end_of_text|>"),
        bos="<|begin_of_text|>",
    ),
    "gemma3": Family(
        GEMMA3,
        special=("<eos>", "<start_of_turn>", "<end_of_turn>"),
        ends=("<end_of_turn>", "<eos>"),
        bos="<bos>",
    ),
    "deepseek-r1-distill": Family(
        DEEPSEEK,
        special=("<｜end▁of▁sentence｜>",),
        ends=("<｜end▁of▁sentence｜>",),
        bos="<｜begin▁of▁sentence｜>",
        plain=("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
    ),
    "smollm2": Family(
        CHATML,
        special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        ends=("<|im_end|>",),
        bos_token="<|im_start|>",
    ),
}


def make_tokenizer(family):
    """A token for each byte, then the family's; where it has a <bos>, one before each plain text,
    as Llama's, Gemma's and DeepSeek's tokenizers have it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={x: i for i, x in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = list(family.special)
    if family.bos:
        special.append(family.bos)
    made.add_special_tokens([AddedToken(x, special=True, normalized=False) for x in special])
    made.add_tokens([AddedToken(x, normalized=False) for x in family.plain])
    if family.bos:
        bos = (family.bos, made.token_to_id(family.bos))
        made.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[bos]
        )
    names = dict(eos_token=family.ends[0])
    if family.bos or family.bos_token:
        names["bos_token"] = family.bos or family.bos_token
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, **names)
    tokenizer.chat_template = family.template
    return tokenizer


@pytest.fixture(scope="module", params=FAMILIES)
def named(request):
    """(name of a family, itself, its tokenizer)."""
    family = FAMILIES[request.param]
    return request.param, family, make_tokenizer(family)


# ==== 2. Conversations, and what each family makes of them ======================================

ASKED = [dict(role="user", content="1+1?")]
AGAIN = [
    dict(role="system", content="Be brief."),
    dict(role="user", content="1+1?"),
    dict(role="assistant", content="<think>\nhm\n</think>\n\n2"),
    dict(role="user", content="why?"),
]
# Written out: the first conversation, and the second
WRITTEN = {
    "qwen2.5": (
        "<|im_start|>system\nDEFAULT<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n"
        "<|im_start|>assistant\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nhm\n</think>\n\n2<|im_end|>\n"
        "<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n",
    ),
    "qwen3": (
        "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n"
        "<|im_start|>assistant\n2<|im_end|>\n<|im_start|>user\nwhy?<|im_end|>\n"
        "<|im_start|>assistant\n",
    ),
    "llama3": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n1+1?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n1+1?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n<think>\nhm\n</think>\n\n2<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nwhy?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "gemma3": (
        "<bos><start_of_turn>user\n1+1?<end_of_turn>\n<start_of_turn>model\n",
        "<bos><start_of_turn>user\nBe brief.\n\n1+1?<end_of_turn>\n"
        "<start_of_turn>model\n<think>\nhm\n</think>\n\n2<end_of_turn>\n"
        "<start_of_turn>user\nwhy?<end_of_turn>\n<start_of_turn>model\n",
    ),
    "deepseek-r1-distill": (
        "<｜begin▁of▁sentence｜><｜User｜>1+1?<｜Assistant｜><think>\n",
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>1+1?<｜Assistant｜>\n\n2<｜end▁of▁sentence｜>"
        "<｜User｜>why?<｜Assistant｜><think>\n",
    ),
}
WRITTEN["smollm2"] = WRITTEN["qwen2.5"]


def load(tokenizer, conversation, tmp_path, **changes):
    """The one row that lad.py makes of a conversation."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(dict(messages=conversation, truth="2")))
    base = dict(data=str(path), prompt="{messages}", truth="truth")
    cfg = dataclasses.replace(lad.Config(), **base | changes)
    [row] = load_data(cfg, tokenizer)
    return row


def ids_of(tokenizer, conversation, **options):
    """transformers' own way from messages to token ids."""
    made = tokenizer.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True, **options
    )
    return made["input_ids"]


@pytest.mark.parametrize("number", [0, 1], ids=["a question", "a conversation"])
def test_prompt_is_what_the_template_makes_of_it(named, tmp_path, number):
    name, family, tokenizer = named
    conversation = [ASKED, AGAIN][number]
    row = load(tokenizer, conversation, tmp_path)
    assert row["prompt"] == WRITTEN[name][number]
    assert row["prompt_ids"] == ids_of(tokenizer, conversation)
    # Token by token: the family's marks are one token each, and nothing was added
    assert tokenizer.decode(row["prompt_ids"], skip_special_tokens=False) == row["prompt"]
    for mark in (*family.special, family.bos, *family.plain):
        if mark:
            count = row["prompt_ids"].count(tokenizer.convert_tokens_to_ids(mark))
            assert count == row["prompt"].count(mark), mark
    if family.bos:
        assert row["prompt_ids"].count(tokenizer.bos_token_id) == 1


def test_a_plain_prompt_gets_the_tokenizers_own_bos_once(named, tmp_path):
    _, family, tokenizer = named
    row = load(tokenizer, ASKED, tmp_path, chat=False)
    assert tokenizer.decode(row["prompt_ids"]) == family.bos + "1+1?"


def test_eval_asks_with_the_same_ids(named):
    name, _, tokenizer = named
    text, ids = ev.render(tokenizer, lad.Config(), "1+1?")
    assert text == WRITTEN[name][0]
    assert ids == ids_of(tokenizer, ASKED)


def test_what_ends_a_response_is_no_part_of_its_text(named):
    name, family, tokenizer = named
    for end in family.ends:
        tokens = tokenizer("2" + end, add_special_tokens=False)["input_ids"]
        assert len(tokens) == 2
        [text] = response_texts(tokenizer, WRITTEN[name][0], [tokens])
        opened = "<think>" if name.startswith("deepseek") else ""
        assert text == opened + "2"


# ==== 3. Variables of a template: Qwen3 without thinking ========================================

OFF = '{"enable_thinking": false}'


def test_thinking_is_switched_off_in_training_and_in_evaluation(tmp_path):
    tokenizer = make_tokenizer(FAMILIES["qwen3"])
    row = load(tokenizer, ASKED, tmp_path, chat_options=OFF)
    assert row["prompt"] == WRITTEN["qwen3"][0] + "<think>\n\n</think>\n\n"
    assert row["prompt_ids"] == ids_of(tokenizer, ASKED, enable_thinking=False)
    assert ev.render(tokenizer, lad.Config(chat_options=OFF), "1+1?")[1] == row["prompt_ids"]
    # A thought that the prompt has closed is not the response's
    [text] = response_texts(tokenizer, row["prompt"], [tokenizer("2<|im_end|>")["input_ids"]])
    assert text == "2"
    # Thinking: it is up to the model to open one
    thought = tokenizer("<think>\n1+1=2\n</think>\n\n2<|im_end|>")["input_ids"]
    [text] = response_texts(tokenizer, WRITTEN["qwen3"][0], [thought])
    assert text == "<think>\n1+1=2\n</think>\n\n2"


@pytest.mark.parametrize("options", ["{enable_thinking: false}", "[1]", "no"])
def test_options_that_are_no_json_object_are_refused_in_one_line(tmp_path, capsys, options):
    tokenizer = make_tokenizer(FAMILIES["qwen3"])
    with pytest.raises(SystemExit) as stop:
        load(tokenizer, ASKED, tmp_path, chat_options=options)
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.count("\n") == 1
    assert "chat_options" in said and "expected a JSON object" in said
