"""harness/fences.py: which part of a response is its program."""

import pytest

from harness import fences

ADD = "a, b = map(int, input().split())\nprint(a + b)"
OTHER = "print('other')"


def fenced(program, tag="python", marks="```"):
    return f"{marks}{tag}\n{program}\n{marks}"


def indented(text, by):
    return "\n".join(by + line for line in text.split("\n"))


TAGS = (
    "python",
    "Python",
    "PYTHON",
    "python3",
    "Python3",
    "python 3",
    "py",
    "py3",
    "pypy3",
    "pypy",
    "cpython",
    "python3.11",
    "python title=x.py",
    "python:main.py",
    "python,linenos",
    "python {.line-numbers}",
    "python{1,3}",
    "{python}",
    "{.python}",
    "{.python .numberLines}",
    "language-python",
    "lang-py",
    " python ",
    "ipython3",
    "python-3",
    "python_3",
    "python#main.py",
    "{code-cell} python",
    "{code-cell} ipython3",
    "python3.12",
    "PyPy 3.10",
    "python3:solution.py",
    "py:main",
    "{.python .input}",
    "main.py",
    "src/Main.py",
    "solution.py title=x",
)


@pytest.mark.parametrize("tag", TAGS)
def test_tags_of_python(tag):
    assert fences.last_program(f"Here:\n{fenced(ADD, tag)}\nDone.").strip() == ADD


OTHER_TAGS = (
    "cpp",
    "java",
    "text",
    "json",
    "bash",
    "pseudocode",
    "pyx",
    "pycon",
    "python-repl",
    "pythonic",
    "output",
)


@pytest.mark.parametrize("tag", OTHER_TAGS)
def test_tags_of_something_else(tag):
    assert fences.last_program(fenced("print(7)", tag)) == ""


PLACES = {
    "alone": fenced(ADD),
    "in a numbered list": "1. Do this:\n" + indented(fenced(ADD), "   ") + "\n2. Then that.",
    "in a list of a list": "- a\n  - b\n" + indented(fenced(ADD), "      "),
    "behind a list marker": "- " + fenced(ADD).replace("\n", "\n  "),
    "behind a list marker, at the margin": "1. " + fenced(ADD),
    "indented by a tab": indented(fenced(ADD), "\t"),
    "the fence indented, the code at the margin": "  ```python\n" + ADD + "\n  ```",
    "the closing fence at the margin": "   ```python\n" + indented(ADD, "   ") + "\n```",
    "in a quotation": indented(fenced(ADD), "> "),
    "CRLF": fenced(ADD).replace("\n", "\r\n"),
    "CR": fenced(ADD).replace("\n", "\r"),
    "text before the fence": "Code: " + fenced(ADD),
    "text before the fence, no space": "Code:" + fenced(ADD),
    "in bold": "**Solution:** " + fenced(ADD),
    "the closing fence behind the code": "```python\n" + ADD + "```",
    "glued, then text": "```python\n" + ADD + "```\nThat is it.",
    "a closing tag behind the closing fence": "<answer>```python\n" + ADD + "\n```</answer>",
    "text behind the closing fence": "```python\n" + ADD + "\n``` This is it.",
    "a period behind the closing fence": "```python\n" + ADD + "\n```.",
    "an untagged session after": fenced(ADD, "") + "\n" + fenced(">>> add(1, 2)\n3", ""),
    "a command after": fenced(ADD) + "\nRun:\n" + fenced("python main.py < in", ""),
    "in two quotations": indented(fenced(ADD), "> > "),
    "in a block of tildes in one of backticks": "```markdown\n"
    + fenced(ADD, marks="~~~")
    + "\n```",
    "never closed": "```python\n" + ADD,
    "tildes": fenced(ADD, marks="~~~"),
    "four backticks": fenced(ADD, marks="````"),
    "a longer closing fence": "```python\n" + ADD + "\n`````",
    "spaces behind the closing fence": "```python\n" + ADD + "\n```   ",
    "in a block of markdown": "````markdown\n# Answer\n" + fenced(ADD) + "\n````",
    "in a block of markdown with fences as long": "```markdown\n" + fenced(ADD) + "\n```",
    "sample output after": fenced(ADD) + "\nOutput:\n" + fenced("7", ""),
    "complexity after": fenced(ADD) + "\n" + fenced("O(n)", ""),
    "an empty block after": fenced(ADD) + "\n" + fenced("", "python"),
    "a blank block after": fenced(ADD) + "\n" + fenced("  \n", "python"),
    "another language after": fenced(ADD) + "\n" + fenced("int main() {}", "cpp"),
    "an untagged program after": fenced(ADD) + "\n" + fenced(OTHER, ""),
    "sample input before": "Input:\n" + fenced("3 4", "") + "\n" + fenced(ADD),
    "an older program before": fenced(OTHER) + "\nBetter:\n" + fenced(ADD),
    "untagged": fenced(ADD, ""),
    "untagged, sample output after": fenced(ADD, "") + "\nOutput:\n" + fenced("7", ""),
    "untagged, words after": fenced(ADD, "") + "\n" + fenced("YES", ""),
    "untagged, arguments after": fenced(ADD, "") + "\n" + fenced("nums = [3,3], target = 6", ""),
    "untagged, pseudo-code after": fenced(ADD, "") + "\n" + fenced("for each x do print x", ""),
    "untagged, another language after": fenced(ADD, "") + "\n" + fenced("print(1)", "js"),
    "comments alone after": fenced(ADD) + "\nUsage:\n" + fenced("# usage\n\n  # echo 3 4"),
    "untagged, tagged comments after": fenced(ADD, "") + "\n" + fenced("# usage"),
    "fences named in prose": "Wrap it in ``` fences, as `x`.\n" + fenced(ADD),
    "three backticks at the end of a sentence": "Wrap it in ```\n" + fenced(ADD),
}


@pytest.mark.parametrize("place", PLACES)
def test_where_programs_stand(place):
    assert fences.last_program(PLACES[place]).strip() == ADD


NONE = {
    "no fence": ADD,
    "code in a line": "`print(7)` and ```print(7)```",
    "sample output alone": fenced("7", ""),
    "words": fenced("Hello world", ""),
    "another language alone": fenced("int main() {}", "cpp"),
    "between two samples": fenced("3 4", "") + "\n" + ADD + "\n" + fenced("7", ""),
    "between tildes": fenced("3", "", "~~~") + "\n" + ADD + "\n" + fenced("7", "", "~~~"),
    "a session": fenced(">>> " + ADD, "pycon"),
    "a difference": fenced("+" + ADD, "diff"),
    "its name alone": "python\n" + ADD,
    "two backticks": "``python\nprint(7)\n``",
    "an empty block": fenced("", "python"),
    "comments alone": fenced("# usage", "python"),
    "nothing": "",
}


@pytest.mark.parametrize("place", NONE)
def test_where_none_stands(place):
    assert fences.last_program(NONE[place]) == ""


def test_a_closing_fence_never_opens():
    """What lies between two blocks is no program, though fences enclose it."""
    text = fenced(OTHER) + "\nprint('between')\n" + fenced("7", "")
    assert fences.last_program(text).strip() == OTHER
    text = fenced("7", "") + "\nprint('between')\n" + fenced("8", "")
    assert fences.last_program(text) == ""


def test_fences_inside_of_a_program():
    """A longer fence is not closed by a shorter one, nor one of backticks by one of tildes."""
    program = 'text = """\n```\nnot the end\n```\n"""\nprint(7)'
    assert fences.last_program(fenced(program, marks="````")).strip() == program
    assert fences.last_program(fenced(program, marks="~~~")).strip() == program


def test_the_indentation_of_a_program_stays():
    """Only the fence's own is taken off."""
    program = "def f():\n    if True:\n        return 1"
    assert fences.last_program(indented(fenced(program), "    ")).strip() == program


@pytest.mark.parametrize("part", ["(", "-", "x=", "[1,", "f'{", "lambda:", "not ", "```", "~~~\n"])
def test_long_and_deep_texts_end(part):
    text = "```\n" + part * 20_000
    assert isinstance(fences.last_program(text), str)
    assert isinstance(fences.last_program(text + "\n" + fenced(ADD)), str)
