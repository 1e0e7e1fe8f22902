r"""
The tests of a row, from the forms of the data sets. What each set's rows look like stands in a
table of docs/verifiers.md; in short

    {"inputs": [..], "outputs": [..]}                     stdin (CodeContests, TACO, APPS)
    {"inputs": [[args], ..], "outputs": [..], "fn_name"}  calls (TACO, APPS)
    [{"input", "output"}, ..]                             stdin (Codeforces)
    [{.., "testtype": "functional", "metadata": {"func_name"}}, ..]  calls (LiveCodeBench)
    [{.., "type": "function_call", "fn_name"}, ..]        calls (PrimeIntellect)
    {"functional": "def check(candidate): ..; check(Solution().f)"}  code (LeetCode)
    {"prompt", "test", "entry_point"}                     code (HumanEval)
    {"prompt", "canonical_solution", "base_input", "plus_input", "entry_point"}  EvalPlus
    "assert f(1) == 2", or a list of such                 code (MBPP)

each as an object or as a string that holds it in JSON or as a Python literal. DeepCoder has several
of them. A row that means calls is never read as stdin, where a program that prints would pass: what
cannot be read for sure is Unreadable.
"""

import ast
import json
import math
import re
from typing import NamedTuple

from harness.sandbox import pack

STDIN = ("stdin", "stdin_stdout", "stdio", "standard_input")
CALLS = ("functional", "function_call", "function", "call_based", "call")
NAMES = ("fn_name", "func_name", "entry_point", "function_name")
CODE = ("functional", "test", "test_code", "test_list", "assert_case")
WRAPPERS = (
    "verification_info",
    "input_output",
    "reward_model",
    "ground_truth",
    "tests",
    "test_cases",
    "official_tests",
)
SPECIAL = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}  # as Python prints them


class Unreadable(ValueError):
    """Tests that cannot be read, or not for sure."""


class Tests(NamedTuple):
    """Either pairs of stdin and stdout, or a job of the tests' box; and limits: memory in bytes,
    seconds for one run or call."""

    pairs: list
    job: dict
    limits: dict


def read_tests(truth):
    """The Tests of a row; Unreadable."""
    # The row, from whatever stands around it
    row = as_object(truth)
    if isinstance(row, list):
        row = from_list(row)
    row = without_wrappers(row)
    if not isinstance(row, dict):
        raise Unreadable(f"{type(row).__name__} holds no tests")
    # What a program may have
    limits = {
        "memory": int(row.get("memory_mb") or 1024) << 20,
        "seconds": seconds(row.get("time_limit") or 6),
    }
    # What its tests are: from the forms that leave no doubt to those that do
    if "plus_input" in row:
        return Tests([], evalplus_job(row), limits)
    if any(row.get(key) for key in CODE):
        return Tests([], code_job(row), limits)
    given, expected = sides(row)
    if function_name(row) or kind_of(row) or begins_code(row):
        return Tests([], calls_job(row, given, expected), limits)
    return Tests(stdin_pairs(given, expected), None, limits)


# ==== 1. The forms of a row =====================================================================


def as_object(truth):
    """What a string holds: JSON, a Python literal (TACO), or code of tests."""
    if not isinstance(truth, str):
        return truth
    for read in (json.loads, ast.literal_eval):
        try:
            return read(truth)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    return {"test": truth}


def without_wrappers(row):
    """The innermost object, with the fields that stand around it (starter_code, fn_name)."""
    while isinstance(row, dict):
        key = next((key for key in WRAPPERS if key in row), None)
        if key is None:
            return with_contest_tests(row)
        inner = as_object(row[key])
        outer = {name: value for name, value in row.items() if name != key}
        if isinstance(inner, list):
            inner = from_list(inner, outer)
        if not isinstance(inner, dict):
            raise Unreadable(f"{key} holds no tests")
        row = outer | inner
    return row


def with_contest_tests(row):
    """CodeContests: public, private and generated tests, one after the other."""
    inputs, outputs = [], []
    for key in ("public_tests", "private_tests", "generated_tests"):
        group = row.get(key) or {"input": [], "output": []}
        inputs += group["input"]
        outputs += group["output"]
    if not inputs:
        return row
    return row | {"inputs": inputs, "outputs": outputs}


def from_list(tests, outer=()):
    """A list of tests, an object each, as lists of inputs and outputs; a list of strings is code.

    What kind of test they are is said by a type, or by the name of a function; all have to agree.
    """
    # What they all have to have
    if not tests:
        raise Unreadable("no tests")
    if all(isinstance(test, str) for test in tests):
        return {"test": "\n".join(tests)}
    if not all(isinstance(test, dict) and "input" in test and "output" in test for test in tests):
        raise Unreadable("a test without input and output")
    # What they have to agree in
    kinds = {kind_of(test) for test in tests}
    names = {function_name(test) for test in tests}
    if len(kinds) > 1 or len(names) > 1:
        raise Unreadable("tests of several kinds")
    # The name may stand beside the list
    calls = kinds.pop()
    name = names.pop()
    if not name and calls is not False:
        name = function_name(dict(outer))
    return {
        "inputs": [test["input"] for test in tests],
        "outputs": [test["output"] for test in tests],
        "fn_name": name,
        "calls": calls,
    }


def kind_of(test):
    """Whether a test is a call: True, False, or None where it does not say."""
    if isinstance(test.get("calls"), bool):
        return test["calls"]
    # By its type, in the words of the several sets
    said = test.get("testtype") or test.get("type") or test.get("call_type")
    if said in STDIN:
        return False
    if said in CALLS:
        return True
    if said:
        raise Unreadable(f"a test of type {said!r}")
    return None


def function_name(row):
    """The name of the function that is called, "" where none is said. "Solution().name" is name.
    Unreadable where a test of stdin has one."""
    metadata = as_object(row.get("metadata") or {})
    for place in (row, metadata):
        for key in NAMES:
            if isinstance(place, dict) and place.get(key):
                if kind_of(row) is False:
                    raise Unreadable(f"{key} in a test that says stdin")
                return place[key].strip().rpartition(".")[2]
    if kind_of(row) is False:
        return ""
    return defined_last(row.get("starter_code") or "")


def begins_code(row):
    """Whether a row that says no type gives a class or a function to begin with: it means calls,
    even where it leaves open of what (class MinStack, two methods)."""
    starter = row.get("starter_code") or ""
    return kind_of(row) is None and bool(re.search(r"^\s*(?:class|def)\s", starter, re.M))


def defined_last(code):
    """The function that a beginning of code leaves to be written: the only method of its class
    Solution, else the last function; "" where there is none."""
    try:
        body = ast.parse(complete(code)).body
    except SyntaxError:
        return ""
    # A class Solution, as on LeetCode
    for node in body:
        if isinstance(node, ast.ClassDef) and node.name == "Solution":
            methods = [item.name for item in node.body if isinstance(item, ast.FunctionDef)]
            public = [name for name in methods if not name.startswith("__")]
            return public[0] if len(public) == 1 else ""
    # Or a function, behind its helpers
    functions = [node.name for node in body if isinstance(node, ast.FunctionDef)]
    return functions[-1] if functions else ""


def complete(code):
    """A beginning of code, that ends in the head of a function, as code; SyntaxError."""
    for ending in ("", "\n    pass", "\n        pass"):
        try:
            ast.parse(code.rstrip() + ending)
            return code.rstrip() + ending + "\n"
        except SyntaxError:
            continue
    raise SyntaxError("no code")


LIMIT = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|milliseconds?|s|secs?|seconds?)?(?: per test)?")


def seconds(limit):
    """2, "2", "2.0 seconds", "2 s", "500 ms", {"seconds": 2, "nanos": 0}; Unreadable."""
    # Codeforces writes it as protocol buffers do
    if isinstance(limit, dict):
        return float(limit["seconds"]) + float(limit.get("nanos") or 0) / 1e9
    match = LIMIT.fullmatch(str(limit).strip())
    if not match:
        raise Unreadable(f"a time limit of {limit!r}")
    in_thousandths = (match[2] or "").startswith("m")
    return float(match[1]) / (1000 if in_thousandths else 1)


def sides(row):
    """The lists of inputs and of outputs; further outputs are left out, as the sets' judges do."""
    given = row.get("inputs", row.get("input"))
    expected = row.get("outputs", row.get("output"))
    if not isinstance(given, list) or not isinstance(expected, list):
        raise Unreadable("no lists of inputs and outputs")
    if not given or len(expected) < len(given):
        raise Unreadable(f"{len(given)} inputs, {len(expected)} outputs")
    return given, expected[: len(given)]


# ==== 2. What is to be done ====================================================================


def stdin_pairs(given, expected):
    """Pairs of texts. Unreadable where a side is not text, or the inputs are arguments of a call:
    nums = [3,3], target = 6."""
    # A stdin that is written like arguments is taken for arguments
    pairs = [(as_text(side), as_text(other)) for side, other in zip(given, expected, strict=True)]
    if all(keywords(stdin) for stdin, _ in pairs):
        raise Unreadable("arguments of a function without a name")
    return pairs


def as_text(side):
    """stdin or stdout; a list holds its lines. Anything else means calls."""
    if isinstance(side, list) and side and all(isinstance(line, str) for line in side):
        return "\n".join(side)
    if isinstance(side, str):
        return side
    raise Unreadable(f"{type(side).__name__} as stdin or stdout")


def calls_job(row, given, expected):
    """Calls with the values that they should give, compared as the sets' judges do: exactly.

    TACO and APPS have rows where each expected value is wrapped in a list: job["wrapped"]; and JSON
    has made strings of the numbers that were keys of their dictionaries.
    """
    name = function_name(row)
    if not name:
        raise Unreadable("calls of a function without a name")
    # One case a test, as the box will read it
    in_lines = isinstance(given[0], str)  # LiveCodeBench: a value in JSON on each line
    cases = []
    for side, other in zip(given, expected, strict=True):
        args, named = arguments(side)
        want = value(other) if isinstance(side, str) and isinstance(other, str) else other
        if not in_lines:
            args = [number_keys(arg) for arg in args]
            want = [number_keys(w) for w in want] if isinstance(want, list) else number_keys(want)
        cases.append(json.dumps(pack([args, named, want])))
    # TACO: maybe each value in a list of its own
    wrapped = not in_lines and all(isinstance(side, list) and len(side) == 1 for side in expected)
    return new_job(row, name) | {"cases": cases, "wrapped": wrapped}


def number_keys(argument):
    """{"1": 2} is {1: 2}."""
    if isinstance(argument, dict) and all(re.fullmatch(r"-?\d+", str(key)) for key in argument):
        return {int(key): member for key, member in argument.items()}
    return argument


def arguments(side):
    """(positional, by name) of a call: a list, or a string that holds one in JSON on each line or
    all of them as in a call."""
    if isinstance(side, list):
        return side, {}
    if not isinstance(side, str):
        raise Unreadable(f"{type(side).__name__} as arguments")
    # In a string: as a call has them, else a value a line
    named = keywords(side)
    if named:
        return [], named
    return [value(line) for line in side.splitlines() if line.strip()], {}


def keywords(text):
    """{"nums": [3, 3], "target": 6} of "nums = [3,3], target = 6"; None of anything else."""
    if not re.match(r"\s*[A-Za-z_]\w*\s*=[^=]", text):
        return None
    # Only literals are read, nothing is evaluated
    try:
        call = ast.parse(f"f({text.strip()})", mode="eval").body
        if call.args or not call.keywords:
            return None
        return {word.arg: ast.literal_eval(word.value) for word in call.keywords}
    except (SyntaxError, ValueError, AttributeError, MemoryError, RecursionError):
        return None


def value(text):
    """A value in JSON, or as Python writes it; Unreadable."""
    if text.strip() in SPECIAL:
        return SPECIAL[text.strip()]
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    raise Unreadable(f"{text[:40]!r} is no value")


def code_job(row):
    """Tests that are code: functions that check a candidate, or asserts that name it."""
    # The code, in its order
    parts = [row.get("test_imports"), row.get("test_setup_code")]
    parts += [row[key] for key in CODE if row.get(key)]
    lines = []
    for part in parts:
        if isinstance(part, str):
            lines.append(part)
        elif part:
            lines += part
    code = "\n".join(lines)
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError) as error:
        raise Unreadable(f"tests that are no Python: {error}") from None
    # Tests that can be failed
    if not any(can_fail(node) for node in ast.walk(tree)):
        raise Unreadable("tests that no program can fail")
    name = function_name(row) or defined_last(row.get("prompt") or "")
    # All of them are run
    code = without_solution(code, tree)
    code += "".join(f"\n{test}()" for test in uncalled_tests(tree))
    # The names in it that may be the program's
    uses = sorted({node.id for node in ast.walk(tree) if isinstance(node, ast.Name)})
    if not name and "candidate" in free_names(tree):
        raise Unreadable("tests of a candidate without a name")
    if not name and defines(tree, "check") and not re.search(r"^check\(", code, re.M):
        raise Unreadable("check is never called, and no function has a name")
    return new_job(row, name) | {"test": code, "uses": uses}


def without_solution(code, tree):
    """KodCode's tests import the program's functions from a module of this name; here they are
    there anyway."""
    lines = code.split("\n")
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module == "solution":
            for number in range(node.lineno, node.end_lineno + 1):
                lines[number - 1] = ""
    return "\n".join(lines)


def uncalled_tests(tree):
    """The functions test_.., as pytest would find them, that nothing calls: what they assert would
    never be looked at. Unreadable where they need arguments, or are methods of a class."""
    called = {node.func.id for node in ast.walk(tree) if is_call_by_name(node)}
    found = []
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            methods = [item.name for item in node.body if isinstance(item, ast.FunctionDef)]
            if any(name.startswith("test") for name in methods) and node.name not in called:
                raise Unreadable(f"nothing runs the tests of class {node.name}")
        elif isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
            if node.name in called:
                continue
            if len(node.args.args) > len(node.args.defaults):
                raise Unreadable(f"{node.name} needs arguments, and nothing calls it")
            found.append(node.name)
    return found


def is_call_by_name(node):
    """f(..), not a.f(..)."""
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name)


def can_fail(node):
    """assert, raise, or a method as assertEqual."""
    if isinstance(node, ast.Attribute):
        return node.attr.lower().startswith("assert")
    return isinstance(node, (ast.Assert, ast.Raise))


def defines(tree, name):
    """Whether code defines a function of that name, at its top."""
    return any(isinstance(node, ast.FunctionDef) and node.name == name for node in tree.body)


def free_names(tree):
    """Names that are read, and are nowhere a parameter or assigned."""
    read, bound = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.Name):
            names = read if isinstance(node.ctx, ast.Load) else bound
            names.add(node.id)
    return read - bound


def evalplus_job(row):
    """EvalPlus: inputs, and the solution that says what is right."""
    job = new_job(row, function_name(row))
    job["reference"] = row["prompt"] + row["canonical_solution"]
    given = row["base_input"] + row["plus_input"]
    job["cases"] = [json.dumps(pack([args, {}])) for args in given]
    job["atol"] = row.get("atol", 0)
    return job


def new_job(row, name):
    """A job of the tests' box: the code of the prompt, the name of the function, and no tests yet.
    A case is [arguments, arguments by name, expected value if there is one], packed."""
    try:
        prompt = complete(row.get("prompt") or "")
    except SyntaxError:  # words
        prompt = ""
    return {
        "prompt": prompt,
        "entry": name,
        "cases": [],
        "test": "",
        "uses": [],
        "reference": "",
        "atol": None,
        "wrapped": False,
    }
