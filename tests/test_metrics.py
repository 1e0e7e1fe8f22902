"""harness/metrics.py and harness/responses.py, against enumeration and values computed by hand."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from conftest import ROOT  # noqa: F401 (puts the project on sys.path)

import eval as ev
import lad
import verify
from harness import metrics, responses, tiny

# ==== 1. How many are right =====================================================================


def test_pass_at_k_is_enumeration():
    for n in range(1, 8):
        for c in range(n + 1):
            outcomes = [1] * c + [0] * (n - c)
            curve = metrics.pass_curve(n, c)
            for k in range(1, n + 1):
                draws = list(itertools.combinations(outcomes, k))
                want = sum(any(draw) for draw in draws) / len(draws)
                assert ev.pass_at_k(n, c, k) == pytest.approx(want, abs=1e-15)
                assert curve[k - 1] == pytest.approx(want, abs=1e-15)
    with pytest.raises(ValueError):
        ev.pass_at_k(4, 0, 5)


def test_pass_at_k_is_exact_for_ten_thousand():
    n = 10_000
    for c in (0, 1, 7, 5000, 9999, 10_000):
        curve = metrics.pass_curve(n, c)
        for k in (1, 2, 100, 3333, 9999, 10_000):
            want = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
            assert abs(Fraction(curve[k - 1]) - want) < Fraction(1, 10**12), (c, k)
            assert abs(Fraction(ev.pass_at_k(n, c, k)) - want) < Fraction(1, 10**12), (c, k)


def test_bootstrap_interval_covers_what_theory_says():
    """For the mean of 400 coin flips of 0.3 the 95% interval is 0.3 -+ 1.96 sqrt(0.3 0.7/400); it
    is the same every time, and per column."""
    flips = np.array([1.0] * 120 + [0.0] * 280)
    low, high = metrics.interval(flips)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 400)
    assert low == pytest.approx(0.3 - half, abs=0.006)
    assert high == pytest.approx(0.3 + half, abs=0.006)
    both = metrics.interval(np.stack([flips, np.full(400, 0.5)], 1))
    assert both[:, 0].tolist() == [low, high]
    assert both[:, 1].tolist() == pytest.approx([0.5, 0.5])


def voted(texts, rewards, kind="math"):
    answers = [responses.answer_key(kind, text) for text in texts]
    return dict(answers=answers, rewards=rewards, settings=dict(kind=kind))


def test_majority_counts_equal_numbers_as_one_answer():
    texts = [
        r"so \boxed{\frac12}",
        r"\boxed{0.5}",
        r"\boxed{3}",
        r"\boxed{3} no, \boxed{1/2}",
        r"\boxed{3}",
        "nothing",
    ]
    assert metrics.majority(voted(texts, [1, 1, 0, 1, 0, 0])) == 1
    two_and_two = [*texts[:3], texts[4]]
    assert metrics.majority(voted(two_and_two, [1, 1, 0, 0])) == 1  # the first given wins
    assert metrics.majority(voted(texts[2:], [0, 1, 0, 0])) == 0
    assert metrics.majority(voted(["none"], [0])) == 0
    assert metrics.majority(voted(["print(1)"], [1], "code")) is None


def test_summary_of_two_problems_by_hand():
    base = dict(
        settings=dict(kind="math"),
        lengths=[1, 3],
        truncated=[False, True],
        solutions=["x", "x"],
        texts=["x", "y"],
        answers=["1", "2"],
    )
    first = base | {"problem": 1, "rewards": [1.0, 1.0], "reasons": ["", ""]}
    first |= {"dist-3": 0.5, "dist-4": None}
    second = base | {"problem": 0, "rewards": [0.0, 1.0], "reasons": ["timeout", ""]}
    second |= {"dist-3": 0.25, "dist-4": None, "judged": {"j": 4}}
    found = metrics.summarize([first, second])
    assert found["pass_at"].tolist() == [0.75, 1.0]
    assert found["maj"] == 0.5
    assert found["distinct"] == 1.0
    assert found["distinct_texts"] == 1.5
    assert found["dist"] == {"dist-3": 0.375, "dist-4": None}
    assert found["length"] == 2
    assert found["truncated"] == 0.5
    assert found["reasons"] == {"timeout": 1}
    assert found["judge"] == {"j": (4, 0)}

    # a line from before texts were compared
    del first["texts"], second["texts"]
    assert metrics.summarize([first, second])["distinct_texts"] is None


# ==== 2. How different they are =================================================================


def test_distinct_n():
    assert ev.distinct_n(["a b c d", "a b c e"], 3) == 3 / 4  # abc bcd | abc bce
    assert ev.distinct_n([[1, 2, 3], [1, 2, 3], [1, 2, 3]], 2) == 2 / 6
    assert ev.distinct_n([[7] * 10], 4) == 1 / 7
    assert math.isnan(ev.distinct_n(["a b"], 3))


PROGRAM = '''
import heapq as hq
class Solution:
    """Says what it does."""
    def solve(self, xs, k):
        best = max(xs)          # a comment
        self.seen = [best]
        for i, x in enumerate(xs):
            hq.heappush(self.seen, x + i)
        return self.seen[:k]
'''

OTHER_NAMES = [
    ("hq", "h"),
    ("Solution", "S"),
    ("solve", "run"),
    ("xs", "values"),
    ("best", "top"),
    ("seen", "heap"),
    ("    ", "  "),
    ("          # a comment", ""),
    ('"""Says what it does."""', "'other'"),
]


def same_program(a, b):
    return metrics.normal_form(a) == metrics.normal_form(b)


def test_programs_are_compared_up_to_names_and_layout():
    renamed = PROGRAM
    for old, new in OTHER_NAMES:
        renamed = renamed.replace(old, new)
    assert renamed != PROGRAM and same_program(PROGRAM, renamed)
    assert same_program("not python (", "not  python(")


@pytest.mark.parametrize(
    "old, new",
    [
        ("max(", "min("),
        ("heappush", "heappop"),
        ("x + i", "i + x"),
        ("[:k]", "[:k + 1]"),
        ("enumerate", "list"),
    ],
)
def test_other_programs_differ(old, new):
    assert not same_program(PROGRAM, PROGRAM.replace(old, new))


def test_names_are_numbered_each_for_itself():
    assert not same_program("a = 1\nb = 2\nprint(a)", "a = 1\nb = 2\nprint(b)")
    assert not same_program("not python (", "no python (")


SAME = [
    ("math", r"so \boxed{\frac12}", r"Thus \boxed{0.5}."),
    ("math", r"<think>\boxed{3}</think> \boxed{x + 1}", r"\boxed{x+1}"),
    ("math:answer", "long\nAnswer: 1,000", "Answer: 1000"),
    ("countdown", "<think>1+2</think> so <answer> 2 + 1 </answer>.", "2+1"),
    ("countdown", r"\boxed{2 \times 3 = 6}", "<answer>2*3</answer>"),
    ("countdown", "6 = 2×3", "2*3=6"),
    ("code", "```python\nx = 1\n```\nbetter:\n```python\ny  = 2\n```", "```python\nz=2\n```"),
    ("other", "a b\n", "ab"),
]
DIFFERENT = [
    ("math", r"\boxed{50\%}", r"\boxed{50}"),
    ("math", r"\boxed{(1,2)}", r"\boxed{(2,1)}"),
    ("countdown", "2+1", "1+2"),
    ("countdown", "<answer>2*3</answer>", "<answer>2+3</answer>"),
    ("code", "```python\nprint(1)\n```", "```python\nprint(2)\n```"),
    ("other", "ab", "ba"),
]


@pytest.mark.parametrize("kind, one, other", SAME)
def test_one_solution_written_in_two_ways(kind, one, other):
    assert responses.solution_key(kind, one) == responses.solution_key(kind, other) != ""


@pytest.mark.parametrize("kind, one, other", DIFFERENT)
def test_two_solutions(kind, one, other):
    assert responses.solution_key(kind, one) != responses.solution_key(kind, other)


def test_chains_of_thought_make_no_other_solution():
    """Whole texts always differ; what they answer may not."""
    thoughts = ["<think>3+4 first", "<think>7*7, so 3+4", "<think>hm"]
    texts = [f"{thought}</think> <answer>(3+4)*7</answer>" for thought in thoughts]
    assert responses.count_distinct("countdown", texts) == (1, 3)
    texts.append("<answer>7*(3+4) = 49</answer>")
    assert responses.count_distinct("countdown", texts) == (2, 4)
    texts.append("<answer> 7 * (3+4) = 49 </answer>")  # white space is no other text
    assert responses.count_distinct("countdown", texts) == (2, 4)
    assert responses.count_distinct("countdown", []) == (0, 0)

    answers = [r"<think>1</think>\boxed{\frac12}", r"<think>2</think>\boxed{0.5}"]
    assert responses.count_distinct("math", answers) == (1, 2)
    programs = ["one\n```python\na = 1\n```", "two\n```python\nb = 1  # why\n```"]
    assert responses.count_distinct("code", programs) == (1, 2)
    assert responses.count_distinct("other", programs) == (2, 2)


def test_a_program_in_a_thought_is_none():
    thought = "<think>```python\nx = 1\n```"
    assert responses.last_program(thought) == ""
    text = thought.replace("= 1", "= 2") + "</think>\n```python\nx = 1\n```"
    assert responses.last_program(text) == "x = 1\n"


def test_a_response_without_a_solution():
    for kind in ("math", "math:answer", "code"):
        assert responses.solution_key(kind, "I do not know") == ""


# ==== 3. The text that the verifier sees ========================================================


def make_tokenizer(special):
    """Letters and digits a token each; the tags and a marker of a chat template are tokens of their
    own, `special` ones or not."""
    from transformers import AddedToken, Qwen2Tokenizer

    letters = [*map(chr, range(33, 127)), "Ġ", "Ċ"]  # the last two: space and line break
    names = ["<pad>", "<eos>", "<unk>", *letters]
    tokenizer = Qwen2Tokenizer(
        vocab={name: i for i, name in enumerate(names)},
        merges=[],
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
    )
    tags = [AddedToken(tag, special=special) for tag in responses.TAGS]
    marker = AddedToken("<|im_end|>", special=True)
    tokenizer.add_tokens([*tags, marker], special_tokens=False)
    tokenizer.chat_template = (
        "{{ messages[-1].content }}{% if add_generation_prompt %}<think>\n{% endif %}"
    )
    return tokenizer


@pytest.fixture(scope="module", params=[True, False], ids=["special tags", "plain tags"])
def tokenizer(request):
    return make_tokenizer(request.param)


PUZZLE = dict(numbers=[3, 4, 7], target=49)
# (a prompt ends in <think>, the response, what the verifier sees, its score)
RESPONSES = [
    (True, "7*7? no</think>(3+4)*7<eos>", "<think>7*7? no</think>(3+4)*7", 1.0),
    (True, "(3+4)*7<eos>", "<think>(3+4)*7", 0.0),  # cut inside its thought
    (True, "x</think><answer>(3+4)*7</answer>", "<think>x</think><answer>(3+4)*7</answer>", 1.0),
    (True, "<answer>(3+4)*7</answer>", "<think><answer>(3+4)*7</answer>", 1.0),  # whole
    (False, "<think>x</think>(3+4)*7", "<think>x</think>(3+4)*7", 1.0),
    (False, "<think>(3+4)*7", "<think>(3+4)*7", 0.0),
    (False, "so <answer>(3+4)*7</answer><eos><pad><pad>", "so <answer>(3+4)*7</answer>", 1.0),
    (False, "(3+4)*7<|im_end|><eos>", "(3+4)*7", 1.0),
    (False, "(3+4)*<unk>7", "(3+4)*7", 1.0),
    (False, "(3+4)+7<eos>", "(3+4)+7", 0.0),
    (False, "", "", 0.0),
]


def score_in_lad(tokenizer, verifier, prompt, tokens):
    row = dict(prompt=prompt, prompt_ids=[1], truth=PUZZLE)
    groups = [[dict(tokens=tokens, behaviour=[])]]
    lad.describe([row], groups, tokenizer)
    cfg = lad.Config(kind="countdown")
    [(score, _)] = lad.start_verification(verifier, groups[0], cfg).result()
    return score, groups[0][0]["text"]


def score_in_eval(tokenizer, verifier, prompt, tokens):
    from types import SimpleNamespace

    problem = dict(
        number=0, id="", statement="", truth=PUZZLE, asked="", replaces=[], prompt=prompt
    )
    output = SimpleNamespace(token_ids=tokens, finish_reason="stop")
    settings = dict(kind="countdown")
    record = ev.make_record(settings, problem, [output], tokenizer, verifier)
    return record["rewards"][0], record["responses"][0]


@pytest.mark.parametrize("opened, response, text, score", RESPONSES)
def test_both_programs_give_a_response_the_same_score(tokenizer, opened, response, text, score):
    messages = [dict(role="user", content="3 4 7=49:")]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=opened, tokenize=False)
    tokens = tokenizer(response)["input_ids"]
    verifier = verify.ONE
    assert score_in_lad(tokenizer, verifier, prompt, tokens) == (score, text)
    assert score_in_eval(tokenizer, verifier, prompt, tokens) == (score, text)


def test_tags_inside_a_word_are_no_prompt_that_thinks(tokenizer):
    """Only a prompt that ends with the tag opens a thought."""
    for prompt in ("use <think> tags: 1+1=", "<think></think>", "<think>\n\n</think>\n\n", ""):
        assert responses.response_texts(tokenizer, prompt, [[3]]) == ["!"]
    for prompt in ("<think>", "<think>\n", "go <think> \n\n"):
        assert responses.response_texts(tokenizer, prompt, [[3], []]) == ["<think>!", "<think>"]


def test_ordinary_tokens_are_decoded_as_they_always_were():
    tokenizer = tiny.make_tokenizer()
    rows = [[i, j, tokenizer.eos_token_id] for i in range(len(tokenizer)) for j in (0, 5, 9, 23)]
    want = tokenizer.batch_decode(rows, skip_special_tokens=True)
    assert responses.response_texts(tokenizer, "1 2 3=6:", rows) == want


# ==== 4. What training has seen =================================================================


def test_overlap_with_the_training_set():
    long = "one two three four five six seven eight nine ten eleven twelve thirteen"
    training = [f"Solve: {long.upper()}!", "What is 2 + 3?", long.replace("twelve", "x")]
    statements = [
        long,
        "what is 2+3",
        "is 2 + 3",
        "one two three",
        long + " " + " ".join("abcdefgh"),
        "unseen words here",
    ]
    assert metrics.overlap(statements, training) == (4, 2)


@pytest.mark.parametrize(
    "statement, training",
    [
        ("Сколько будет 2 + 3?", "Ответьте: сколько будет 2+3? Кратко."),
        ("Ποιο είναι το άθροισμα;", "ποιο ΕΊΝΑΙ το άθροισμα"),
        ("求 1+1 的值。", "题目:求1+1的值。答案?"),  # nothing but its neighbours says where it ends
        ("दो और दो कितने?", "बताओ दो और दो कितने होते हैं"),
        ("ما هو مجموع 2 و 3؟", "سؤال: ما هو مجموع 2 و 3؟"),
        ("Cafe\u0301 à 5 €", "le CAFÉ à ５ euros"),  # an accent in two ways, a wide digit
        ("x_1 + x_2", "find x1: no, x 1 x 2"),
        ("the number of apples", "the num\u00adber of ap\u200bples"),
        ("the num\u00adber of ap\u2060ples", "\ufeffthe number of apples"),
    ],
)
def test_overlap_in_any_script(statement, training):
    assert metrics.overlap([statement], [training])[0] == 1
    assert metrics.overlap([statement], ["something else", "1", "2 3", "其他"])[0] == 0


@pytest.mark.parametrize(
    "statement, training",
    [
        ("दो", "दी"),  # only their vowels differ
        ("求和", "和求"),
        ("1 2", "12"),
        ("том", "атом"),
    ],
)
def test_no_overlap_of_other_words(statement, training):
    assert metrics.overlap([statement], [training]) == (0, 0)


@pytest.mark.parametrize("statement", ["", "   ", "?!", "— «…» —", "$$ \\( \\) $$", "___", "+-*/="])
def test_nothing_to_compare_is_no_overlap(statement):
    assert metrics.words(statement) == []
    for training in (["..."], [""], ["?!", "words too"], [statement]):
        assert metrics.overlap([statement], training) == (0, 0)
