"""harness/code_tests.py: the rows of every data set, with right programs, wrong ones, and programs
that only print; values that pass between a program and its tests."""

import collections
import json
import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import verify
from harness import code_tests, sandbox

ADD = "def add(a, b):\n    return a + b"
SUBTRACT = "def add(a, b):\n    return a - b"
METHOD = "class Solution:\n    def add(self, a, b):\n        return a + b"
READ_AND_ADD = "print(sum(map(int, input().split())))"
PRINTS = "print(7)"
STARTER = "class Solution:\n    def add(self, a: int, b: int) -> int:\n        "


def call_test(**fields):
    return {"input": "3\n4", "output": "7"} | fields


# A row, by the set that has it: each of these asks for a function add
CALLS = {
    "TACO, APPS": {"fn_name": "add", "inputs": [[3, 4], [1, 1]], "outputs": [7, 2]},
    "TACO, values wrapped": {"fn_name": "add", "inputs": [[3, 4], [1, 1]], "outputs": [[7], [2]]},
    "TACO, one output too many": {"fn_name": "add", "inputs": [[3, 4]], "outputs": [[7], [7]]},
    "TACO, a string": '{"fn_name": "add", "inputs": [[3, 4]], "outputs": [7]}',
    "TACO, a Python literal": "{'fn_name': 'add', 'inputs': [[3, 4]], 'outputs': [7]}",
    "APPS, in a row": {
        "input_output": '{"fn_name": "add", "inputs": [[3, 4]], "outputs": [7]}',
        "starter_code": "def add(a, b):\n\t",
    },
    "APPS, named by its starter code": {
        "input_output": '{"inputs": [[3, 4]], "outputs": [7]}',
        "starter_code": STARTER,
    },
    "LiveCodeBench": [call_test(testtype="functional", metadata={"func_name": "add"})],
    "LiveCodeBench, metadata a string": [
        call_test(testtype="functional", metadata='{"func_name": "add"}')
    ],
    "LiveCodeBench, in a string": json.dumps(
        [call_test(testtype="functional", metadata={"func_name": "add"})]
    ),
    "DeepCoder, of PrimeIntellect": json.dumps(
        [{"type": "function_call", "fn_name": "add", "input": [3, 4], "output": 7}]
    ),
    "PrimeIntellect, values wrapped": [
        {"type": "function_call", "fn_name": "add", "input": [3, 4], "output": [7]}
    ],
    "PrimeIntellect, in verification_info": {
        "verification_info": json.dumps(
            {
                "language": "python",
                "test_cases": [
                    {"type": "function_call", "fn_name": "add", "input": [3, 4], "output": 7}
                ],
            }
        )
    },
    "a list of tests with a name beside it": {
        "tests": [{"input": [3, 4], "output": 7}],
        "fn_name": "add",
    },
    "arguments as a call has them": {
        "fn_name": "add",
        "inputs": ["a = 3, b = 4"],
        "outputs": ["7"],
    },
    "LeetCode": {
        "functional": "def check(candidate):\n    assert candidate(a = 3, b = 4) == 7\n\n\n"
        "check(Solution().add)"
    },
    "LeetCode, entry_point": {
        "test": "def check(candidate):\n    assert candidate(a = 3, b = 4) == 7\n",
        "entry_point": "Solution().add",
        "prompt": "import collections\nfrom typing import *\n",
    },
    "HumanEval": {
        "prompt": 'def add(a, b):\n    """Add."""\n',
        "entry_point": "add",
        "test": "METADATA = {}\n\n\ndef check(candidate):\n    assert candidate(3, 4) == 7\n",
    },
    "HumanEval, named by its prompt": {
        "prompt": 'def add(a, b):\n    """Add."""\n',
        "test": "def check(candidate):\n    assert candidate(3, 4) == 7\n",
    },
    "EvalPlus": {
        "prompt": "def add(a, b):\n",
        "entry_point": "add",
        "canonical_solution": "    return a + b\n",
        "base_input": [[3, 4]],
        "plus_input": [[2**70, 1]],
        "atol": 0,
    },
    "MBPP": {"test_list": ["assert add(3, 4) == 7", "assert add(1, 1) == 2"]},
    "MBPP, with its set-up": {
        "test_list": ["assert math.isclose(add(3, 4), 7)"],
        "test_setup_code": "import math",
    },
    "asserts": {"test": "assert add(3, 4) == 7"},
    "asserts alone": "assert add(3, 4) == 7",
    "a list of asserts": ["assert add(3, 4) == 7", "assert add(0, 0) == 0"],
    "a check of one's own": {"test": "def check(c):\n    assert c(3, 4) == 7\ncheck(add)"},
    "KodCode": {"test": "def test_add():\n    assert add(3, 4) == 7\n\ntest_add()"},
    "KodCode, as pytest runs it": {
        "test": "from solution import add\n\ndef test_a():\n    assert add(3, 4) == 7\n\n"
        "def test_b(n=1):\n    assert add(n, 1) == 2\n"
    },
    "LiveCodeBench, named by its starter code": {
        "tests": [{"input": "3\n4", "output": "7", "testtype": "functional"}],
        "starter_code": "# class ListNode:\n#     pass\n" + STARTER,
    },
    "SYNTHETIC-1, a Python literal": {
        "verification_info": "{'language': 'python', 'test_cases': [{'type': 'function_call', "
        "'fn_name': 'add', 'input': [3, 4], 'output': 7}]}"
    },
    "in ground_truth": {
        "reward_model": {"ground_truth": '{"fn_name": "add", "inputs": [[3, 4]], "outputs": [7]}'}
    },
}
# Each of these asks for a program that adds two numbers of stdin
STDIN = {
    "CodeContests": {"inputs": ["3 4\n"], "outputs": ["7\n"]},
    "CodeContests, of DeepMind": {
        "public_tests": {"input": ["3 4\n"], "output": ["7\n"]},
        "private_tests": {"input": [], "output": []},
        "generated_tests": {"input": ["1 1\n"], "output": ["2\n"]},
    },
    "Codeforces": [{"input": "3 4", "output": "7"}, {"input": "1 1", "output": "2"}],
    "TACO": '{"inputs": ["3 4\\n"], "outputs": ["7\\n"]}',
    "TACO, without a name": {"inputs": ["3 4"], "outputs": ["7"], "fn_name": None},
    "APPS, in a row": {
        "input_output": '{"inputs": ["3 4"], "outputs": ["7"]}',
        "starter_code": "",
    },
    "APPS, lines": {"inputs": [["3 4"]], "outputs": [["7"]]},
    "LiveCodeBench": [
        {"input": "3 4\n", "output": "7", "testtype": "stdin", "metadata": {"func_name": None}}
    ],
    "PrimeIntellect": [{"type": "stdin_stdout", "input": "3 4\n", "output": "7\n"}],
    "Codeforces, official tests": {"official_tests": [{"input": "3 4", "output": "7"}]},
    "with a limit per test": {
        "inputs": ["3 4"],
        "outputs": ["7"],
        "time_limit": "50 seconds per test",
    },
    "with a limit in thousandths": {
        "inputs": ["3 4"],
        "outputs": ["7"],
        "time_limit": "50000 ms",
    },
    "starter code that begins no function": {
        "inputs": ["3 4"],
        "outputs": ["7"],
        "starter_code": "import sys\n",
    },
    "with limits": {
        "inputs": ["3 4"],
        "outputs": ["7"],
        "time_limit": "50 seconds",
        "memory_mb": 256,
    },
    "with limits of Codeforces": {
        "inputs": ["3 4"],
        "outputs": ["7"],
        "time_limit": {"seconds": 50, "nanos": 0},
    },
}
UNREADABLE = {
    "nothing": "",
    "null": None,
    "a number": 7,
    "an empty list": [],
    "an empty object": {},
    "no tests": {"inputs": [], "outputs": []},
    "no outputs": {"inputs": ["1"], "outputs": []},
    "too few outputs": {"inputs": ["1", "2"], "outputs": ["1"]},
    "words": "not json",
    "an expression": "1 + 1 == 2",
    "code without a test": {"test": "x = 1\n", "entry_point": "add"},
    "a check that is never called": {"test": "def check(candidate):\n    assert candidate(1)\n"},
    "code that is none": {"functional": "def check(:"},
    "calls without a name": {"inputs": [[3, 4]], "outputs": [7]},
    "calls by their type, without a name": [{"type": "function_call", "input": [3], "output": 3}],
    "arguments without a name": {"inputs": ["nums = [3,3], target = 6"], "outputs": ["[0,1]"]},
    "a type that nobody knows": [{"type": "interactive", "input": "1", "output": "1"}],
    "tests of two types": [
        {"type": "stdin_stdout", "input": "1", "output": "1"},
        {"type": "function_call", "fn_name": "f", "input": [1], "output": 1},
    ],
    "tests of two functions": [
        {"fn_name": "f", "input": [1], "output": 1},
        {"fn_name": "g", "input": [1], "output": 1},
    ],
    "stdin with the name of a function": [
        {"type": "stdin_stdout", "fn_name": "f", "input": "1", "output": "1"}
    ],
    "a test without an output": [{"input": "1"}],
    "tests that ask nothing": {"test_list": ["assert True"]},
    "a test of its own function": {"test": "def f():\n    return 1\nassert f() == 1"},
    "tests in a class": {
        "test": "import unittest\nclass T(unittest.TestCase):\n    def test_a(self):\n"
        "        self.assertEqual(add(3, 4), 7)"
    },
    "a test that needs arguments": {"test": "def test_a(x):\n    assert add(x, 4) == 7"},
    "a class to begin with": {
        "inputs": ['["MinStack", "push"]\n[[], [1]]'],
        "outputs": ["[null, null]"],
        "starter_code": "class MinStack:\n    def push(self, x):\n        pass\n",
    },
    "two methods to begin with": {
        "inputs": ["[1, 2]"],
        "outputs": ["3"],
        "starter_code": "class Solution:\n    def a(self): pass\n    def b(self): pass\n",
    },
    "a limit that is none": {"inputs": ["1"], "outputs": ["1"], "time_limit": "x"},
}


@pytest.fixture(scope="module")
def pool():
    with verify.Verifier(workers=2, timeout=60) as verifier:
        yield verifier


def code(program):
    return f"Here it is:\n```python\n{program}\n```\n"


def scores(pool, program, rows):
    """Rewards of one program on several rows; nothing is said of time."""
    rewards = pool.score([("code", code(program), row) for row in rows.values()])
    return dict(zip(rows, rewards, strict=True))


def test_rows_of_calls(pool):
    """A function is right, a program that prints is never."""
    functions = {name: row for name, row in CALLS.items() if "Solution().add)" not in str(row)}
    assert scores(pool, ADD, functions) == dict.fromkeys(functions, 1.0)
    assert scores(pool, SUBTRACT, CALLS) == dict.fromkeys(CALLS, 0.0)
    assert scores(pool, PRINTS, CALLS) == dict.fromkeys(CALLS, 0.0)
    assert scores(pool, READ_AND_ADD, CALLS) == dict.fromkeys(CALLS, 0.0)
    assert scores(pool, "pass", CALLS) == dict.fromkeys(CALLS, 0.0)


@pytest.mark.parametrize("name", ["TACO, APPS", "LiveCodeBench", "LeetCode", "APPS, in a row"])
def test_methods_of_a_solution(pool, name):
    assert scores(pool, METHOD, {name: CALLS[name]}) == {name: 1.0}
    wrong = METHOD.replace("+", "-")
    assert scores(pool, wrong, {name: CALLS[name]}) == {name: 0.0}


def test_rows_of_stdin(pool):
    assert scores(pool, READ_AND_ADD, STDIN) == dict.fromkeys(STDIN, 1.0)
    assert scores(pool, "print(8)", STDIN) == dict.fromkeys(STDIN, 0.0)
    assert scores(pool, ADD, STDIN) == dict.fromkeys(STDIN, 0.0)


@pytest.mark.parametrize("name", UNREADABLE)
def test_rows_that_cannot_be_read(pool, name):
    """They say so: a silent 0, or a 1 for a program that prints, is neither."""
    assert pool.score([("code", code("print(1)"), UNREADABLE[name])]) == [0.0]
    assert pool.reasons == ["truth unparsable"]


def call(value, **fields):
    """A row that calls f with no argument and wants a value."""
    return {"fn_name": "f", "inputs": [[]], "outputs": [value]} | fields


INF = float("inf")
# The value that a function returns, as code; a value that is wanted; whether they are one
VALUES = [
    ("7", 7, 1),
    ("7.0", 7, 1),
    ("True", True, 1),
    ("(1, 2)", [1, 2], 1),
    ("[(1, 2), (3, 4)]", [[1, 2], [3, 4]], 1),
    ("{'a': (1, 2)}", {"a": [1, 2]}, 1),
    ("{1: 2}", {"1": 2}, 1),
    ("'7'", 7, 0),
    ("7", "7", 0),
    ("collections.deque([1, (2, 3)])", [1, [2, 3]], 1),
    ("[collections.deque([1])]", [[1]], 1),
    ("collections.deque([2, 1])", [1, 2], 0),
    ("collections.deque([1, 2])", [1], 0),
    ("None", None, 1),
    ("None", 0, 0),
    ("[1, 2]", [2, 1], 0),
    ("0.1 + 0.2", 0.3, 0),  # exactly, as the judges of TACO, APPS and LiveCodeBench compare
    ("0.5", 0.5, 1),
    ("10**5000", 10**5000, 1),
    ("10**5000", 10**5000 + 1, 0),
    ("[10**5000, -10**5000]", [10**5000, -(10**5000)], 1),
    ("float('inf')", INF, 1),
    ("float('-inf')", -INF, 1),
    ("1e309", INF, 1),
    ("7", INF, 0),
    ("1e308", INF, 0),
    ("7", -INF, 0),
    ("float('inf')", -INF, 0),
    ("float('inf')", 7, 0),
    ("[1, [7, 2]]", [1, [INF, 2]], 0),
    ("[1, [float('inf'), 2]]", [1, [INF, 2]], 1),
    ("{'a': 7}", {"a": INF}, 0),
    ("7", math.nan, 0),
    ("float('nan')", 7, 0),
    ("float('nan')", INF, 0),
]
NUMPY = [
    ("np.int64(7)", 7, 1),
    ("np.float64(0.5)", 0.5, 1),
    ("np.float32(0.5)", 0.5, 1),
    ("np.bool_(True)", True, 1),
    ("np.sum([3, 4])", 7, 1),
    ("np.array([1, 2])", [1, 2], 1),
    ("np.array([[1, 2], [3, 4]])", [[1, 2], [3, 4]], 1),
    ("[np.int64(1), np.float64(2.5)]", [1, 2.5], 1),
    ("{'a': np.int64(1)}", {"a": 1}, 1),
    ("(np.array([1]), np.array([2]))", [[1], [2]], 1),
    ("np.str_('ab')", "ab", 1),
    ("np.inf", INF, 1),
    ("np.int64(8)", 7, 0),
    ("np.array([1, 3])", [1, 2], 0),
    ("np.bool_(False)", True, 0),
    ("np.float64('inf')", 7, 0),
    ("np.int64(7)", INF, 0),
]


def values_score(pool, values, before=""):
    items = []
    for expression, want, _ in values:
        program = f"{before}def f():\n    return {expression}"
        items.append(("code", code(program), call(want)))
    rewards = pool.score(items)
    for (expression, want, same), reward in zip(values, rewards, strict=True):
        assert reward == same, (expression, str(want)[:50])


def test_values_of_functions(pool):
    values_score(pool, VALUES)


def test_values_of_numpy(pool):
    pytest.importorskip("numpy")
    values_score(pool, NUMPY, "import numpy as np\n")


# The same in an assert, where tests say themselves what is equal
ASSERTED = [
    ("7", "f() == 7", 1),
    ("10**5000", "f() == 10**5000", 1),
    ("10**5000", "f() == 10**5000 + 1", 0),
    ("float('inf')", "f() == float('inf')", 1),
    ("7", "f() == float('inf')", 0),
    ("7", "f() == -float('inf')", 0),
    ("7", "f() == 1e309", 0),
    ("7", "math.isclose(f(), float('inf'))", 0),
    ("[7]", "f() == [float('inf')]", 0),
    ("7", "abs(f() - float('inf')) < 1e-6", 0),
    ("7", "abs(f() - float('nan')) < 1e-6", 0),
    ("(1, 2)", "f() == (1, 2)", 1),
    ("collections.deque([1])", "f() == collections.deque([1])", 1),
    ("{1: 2}", "f() == {1: 2}", 1),
    ("None", "f() < 3", 0),
]


def test_values_in_asserts(pool):
    items = []
    for expression, test, _ in ASSERTED:
        program = code(f"def f():\n    return {expression}")
        items.append(("code", program, {"test": f"import math\nassert {test}"}))
    rewards = pool.score(items)
    assert rewards == [reward for _, _, reward in ASSERTED]


INFINITE_TEXTS = [
    ("inf", "float('inf')", 1),
    ("Infinity", "float('inf')", 1),
    ("-Infinity", "float('-inf')", 1),
    ("1e309", "float('inf')", 1),
    ("[1, Infinity]", "[1, float('inf')]", 1),
    ("inf", "7", 0),
    ("Infinity", "10**300", 0),
    ("-inf", "7", 0),
    ("1e309", "7", 0),
    ("[1, Infinity]", "[1, 7]", 0),
    ("nan", "7", 0),
    ("NaN", "7", 0),
]


@pytest.mark.parametrize("text, returned, reward", INFINITE_TEXTS)
def test_infinite_values_as_texts(pool, text, returned, reward):
    """As LiveCodeBench writes them, a value in JSON."""
    row = [call_test(input="1", output=text, testtype="functional", metadata={"func_name": "f"})]
    program = f"def f(x):\n    return {returned}"
    assert pool.score([("code", code(program), row)]) == [reward]


@pytest.mark.parametrize("want", ["inf", "1e999", "-inf", "nan"])
def test_infinite_outputs(pool, want):
    row = {"inputs": [""], "outputs": [want]}
    assert pool.score([("code", code("print(7)"), row)]) == [0.0]
    assert pool.score([("code", code(f"print({want!r})"), row)]) == [1.0]


@pytest.mark.parametrize("wrong", ["float('inf')", "float('nan')", "7", "-1e308"])
def test_infinite_references(pool, wrong):
    """EvalPlus, whose own tolerance is relative."""
    row = CALLS["EvalPlus"] | {"canonical_solution": "    return [float('inf'), a + b]\n"}
    right = code("def add(a, b):\n    return [float('inf'), a + b]")
    assert pool.score([("code", right, row)]) == [1.0]
    if wrong != "float('inf')":
        program = code(f"def add(a, b):\n    return [{wrong}, a + b]")
        assert pool.score([("code", program, row)]) == [0.0]
    row = CALLS["EvalPlus"]
    assert pool.score([("code", code(f"def add(a, b):\n    return {wrong}"), row)]) == [0.0]


def test_wrapped_values_are_read_in_one_way(pool):
    """Each value wrapped, or none: not now the one, now the other."""
    row = {"fn_name": "f", "inputs": [[1], [2]], "outputs": [[1], [2]]}
    programs = {
        "def f(x): return x": 1.0,
        "def f(x): return [x]": 1.0,
        "def f(x): return x if x == 1 else [x]": 0.0,
        "def f(x): return [[x]]": 0.0,
    }
    items = [("code", code(program), row) for program in programs]
    assert pool.score(items) == list(programs.values())


def test_numbers_that_were_keys(pool):
    """JSON has made strings of them, and TACO's judge numbers again."""
    row = {"fn_name": "f", "inputs": [[{"1": 2}]], "outputs": [{"1": 3}]}
    right = "def f(d):\n    return {key + 0: value + 1 for key, value in d.items()}"
    assert pool.score([("code", code(right), row)]) == [1.0]
    assert pool.score([("code", code("def f(d): return d"), row)]) == [0.0]


HELPED = {
    "prompt": "def enc(s):\n    return s[::-1]\n\n\ndef dec(s):\n    '''doc'''\n",
    "test": "def check(candidate):\n    assert candidate('ab') == 'ab'\n",
    "entry_point": "dec",
}


def test_helpers_of_a_prompt(pool):
    """A program may use them; what the prompt leaves open is no program."""
    assert pool.score([("code", code("def dec(s):\n    return enc(enc(s))"), HELPED)]) == [1.0]
    assert pool.score([("code", code("def dec(s):\n    return enc(s)"), HELPED)]) == [0.0]
    nothing = HELPED | {"test": "def check(candidate):\n    assert candidate('ab') is None\n"}
    assert pool.score([("code", code("x = 1"), nothing)]) == [0.0]
    assert pool.reasons == ["crashed"]


# Why a function's row gives 0: only a wrong value has no reason
FAILURES = {
    "a wrong value": ("def add(a, b): return 0", ""),
    "no such function": ("def other(a, b): return a + b", "crashed"),
    "no Python": ("def add(a, b: return a + b", "crashed"),
    "an error at its beginning": ("raise ValueError\ndef add(a, b): return a + b", "crashed"),
    "an error": ("def add(a, b): return a / 0", "crashed"),
    "an error that tests may expect": ("def add(a, b): raise ValueError", "crashed"),
    "its end": ("import os\ndef add(a, b): os._exit(0)", "crashed"),
    "an exit": ("import sys\ndef add(a, b): sys.exit(0)", "crashed"),
    "a value that is no data": ("def add(a, b): return lambda: a + b", "crashed"),
    "no end": ("def add(a, b):\n    while True: pass", "timeout"),
    "more than there is memory": ("def add(a, b): return [0] * 10**10", "crashed"),
    "a value that is too long": ("def add(a, b): return 'x' * (1 << 27)", "too long"),
}


@pytest.mark.parametrize("name", FAILURES)
@pytest.mark.parametrize("row", ["TACO, APPS", "EvalPlus", "asserts"])
def test_reasons(pool, name, row):
    program, reason = FAILURES[name]
    tests = CALLS[row]
    if isinstance(tests, dict):
        tests = tests | {"time_limit": 1 if reason == "timeout" else 50}
    assert pool.score([("code", code(program), tests)]) == [0.0]
    assert pool.reasons == [reason]


@pytest.mark.slow
def test_the_tests_have_all_the_time_there_is():
    """The time of a call is not that of all calls: their own box is not ended by it. On a slow
    machine the reference of a right program takes longer than one call may."""
    row = {
        "prompt": "def f(n):\n",
        "entry_point": "f",
        "canonical_solution": "    for _ in range(n): pass\n    return [n / 2] * 1000\n",
        "base_input": [[4_000_000]] * 60,
        "plus_input": [],
        "time_limit": 1,
    }
    job = code_tests.read_tests(row).job
    assert len(job["cases"]) == 60
    program = "def f(n):\n    return [n / 2] * 1000"
    with verify.Verifier(1, 300) as verifier:
        assert verifier.score([("code", code(program), row)]) == [1.0], verifier.reasons


def test_equal_is_exact_where_it_should_be():
    assert sandbox.equal(0.1 + 0.2, 0.3, 0)
    assert not sandbox.equal(0.1 + 0.2, 0.3, None)
    assert not sandbox.equal(7, INF, 0)
    assert not sandbox.equal(INF, 7, 1e9)
    assert sandbox.equal(math.nan, math.nan, None)
    assert not sandbox.equal(math.nan, INF, 1e9)


PACKED = [None, True, 0, -1, 2**64, -(2**200), 1.5, INF, "é\n", b"\x00\xff", 1 + 2j, [], [1, [2]]]
PACKED += [collections.deque([1, (2,)])]
PACKED += [(1, (2,)), {1, 2}, {}, {"a": {1: (2, 3)}}, {(1, 2): [3]}, [1, 2**70, True, "x", None]]


@pytest.mark.parametrize("value", PACKED, ids=repr)
def test_pack_and_unpack(value):
    back = json.loads(json.dumps(sandbox.pack(value)), object_hook=sandbox.unpack)
    assert back == value and type(back) is type(value)


@pytest.mark.parametrize("value", [object(), print, iter([]), range(3), pytest])
def test_what_is_no_plain_data(value):
    with pytest.raises(TypeError):
        sandbox.pack([value])
