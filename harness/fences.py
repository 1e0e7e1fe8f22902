"""
The program of a response: its fenced blocks, by CommonMark's rule for fences, and which of them is
meant.

A fence is a line of three or more backticks or tildes; what follows the opening one is its tag. It
is closed by a line of as many of the same character and nothing else, indented by less than four
columns more; the end of the text closes it too. What a closing fence ends can thus never be read
as another block's beginning. The indentation of the opening fence is taken off the lines of the
block.

Models write more than CommonMark has, and three things are read beyond it: an opening fence behind
text on its line ("Code: ```python"), a closing one behind the last line of code or before text
("```</answer>"), where the block is no Python otherwise, and a block inside of one that is not
Python (a whole answer in a ```markdown block).

The program is the last block whose tag is Python and that has more than comments, else the last
untagged one that is a program and not an example of data.
"""

import ast
import re
import textwrap
import warnings
from typing import NamedTuple

LONGEST = 200_000  # characters of a program that are parsed

# What a program's literals are warned of is no concern of the caller's
warnings.filterwarnings("ignore", module="<program>")

FENCE = re.compile(r"(`{3,}|~{3,})([^`]*)$")
LIST_MARKER = re.compile(r"[ \t]*(?:[-*+]|\d{1,9}[.)])[ \t]+")
QUOTE = re.compile(r"[ \t]*(?:>[ \t]?)+")
PYTHON = re.compile(r"(?i)(?:lang(?:uage)?-)?(?:python|pypy|cpython|ipython|py)[-_]?[\d.]*")
PYTHON_FILE = re.compile(r"(?i)[\w./-]+\.py")


class Block(NamedTuple):
    """A fenced block: its tag, its lines as they stand, and the columns before its fence."""

    tag: str
    lines: list
    width: int


class Fence(NamedTuple):
    """An opening fence: its characters, its tag, the columns before it, and whether it is quoted
    (>)."""

    marks: str
    tag: str
    width: int
    quoted: bool


# ==== 1. Blocks =================================================================================


def blocks(text, glued=False):
    """The fenced blocks of a text. glued: a closing fence may stand behind code, or before text."""
    found = []
    fence = None  # the open one
    for line in text.split("\n"):
        # A quotation: its marks are no part of the lines
        if fence and fence.quoted:
            mark = QUOTE.match(line)
            if mark:
                line = line[mark.end() :]
            else:  # the quotation has ended, and its block with it
                fence = None
        # Outside of a block, at its end, or in it
        if fence is None:
            fence = opening(line)
            if fence:
                found.append(Block(fence.tag, [], fence.width))
        elif closes(line, fence):
            fence = None
        elif glued and code_before_fence(line, fence):
            found[-1].lines.append(code_before_fence(line, fence))
            fence = None
        elif glued and text_behind_fence(line, fence):
            fence = None
        else:
            found[-1].lines.append(line)
    return found


def opening(line):
    """The fence that a line opens, or None."""
    match = FENCE.search(line)
    if not match:
        return None
    before = line[: match.start()]
    marks, tag = match[1], match[2].strip()
    # At the beginning of a line, or of an item of a list
    if not before.strip() or LIST_MARKER.fullmatch(before):
        return Fence(marks, tag, columns(before), False)
    # In a quotation
    quote = QUOTE.match(before)
    if quote:
        inner = opening(line[quote.end() :])
        return inner and inner._replace(quoted=True)
    # Behind text: not in the middle of `code`, and with no more than a tag behind it
    if marks[0] == "`" and before.count("`") % 2 == 0 and re.fullmatch(r"[\w+#.{}-]*", tag):
        return Fence(marks, tag, 0, False)
    return None


def closes(line, fence):
    """Whether a line is the closing fence."""
    marks = line.strip()
    if len(marks) < len(fence.marks) or marks != fence.marks[0] * len(marks):
        return False
    return columns(line[: len(line) - len(line.lstrip())]) < fence.width + 4


def code_before_fence(line, fence):
    """What stands before a closing fence at the end of a line; "" where there is none."""
    code = line.rstrip()
    if not code.endswith(fence.marks):
        return ""
    return code.rstrip(fence.marks[0])


def text_behind_fence(line, fence):
    """Whether a line is a closing fence and text that cannot be a tag: ```</answer>, ```. Then."""
    behind = line.strip().removeprefix(fence.marks).lstrip(fence.marks[0])
    if not line.strip().startswith(fence.marks) or "`" in behind:
        return False
    return bool(re.match(r"[^\w\s{]|\s+\w+[\s.,:]", behind))


def columns(before):
    """How many columns a text takes at the beginning of a line."""
    return len(before.expandtabs(4))


# ==== 2. Programs ===============================================================================


def last_program(text):
    """The program of a response, without its fence's indentation; "" where it has none."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    found = blocks(text)
    # By the rule
    program = last_tagged(found) or last_untagged(found)
    # With closing fences behind code, where the rule finds no Python
    if not parsed(program):
        lenient = blocks(text, glued=True)
        other = last_tagged(lenient) or last_untagged(lenient)
        if parsed(other):
            program = other
    if program:
        return program
    # a block of Python inside of another, or behind one that was never closed
    for block in reversed(found):
        program = last_tagged(blocks("\n".join(block.lines)))
        if program:
            return program
    return ""


def last_tagged(found):
    """The last block whose tag is Python and that has more than comments."""
    for block in reversed(found):
        if is_python(block.tag) and has_code(block):
            return outdented(block)
    return ""


def has_code(block):
    """Whether any of its lines is neither empty nor a comment: "# usage" often ends a response."""
    lines = [line.strip() for line in block.lines]
    return any(line and not line.startswith("#") for line in lines)


def last_untagged(found):
    """The last block without a tag that is a program; else the last that at least sets a name."""
    programs = [outdented(block) for block in reversed(found) if not block.tag]
    for accepts in (acts, sets):
        for program in programs:
            if accepts(program):
                return program
    return ""


def is_python(tag):
    """Python's name in one of the ways it is written: python, Py3, python3.11, {.python}, python
    title=x.py; or the name of a file of Python: main.py."""
    first = re.split(r"[\s:,;{}=|(#\\]", tag.removeprefix("{code-cell}").strip("{}[]. "))[0]
    return bool(PYTHON.fullmatch(first) or PYTHON_FILE.fullmatch(first))


def outdented(block):
    """Its text without the indentation of the fence.

    By CommonMark up to that many columns go from each line. Behind a list marker models often begin
    the lines at the margin; then only what all lines have in common may go.
    """
    # By the rule, else by what all lines share
    text = "\n".join(outdent(line, block.width) for line in block.lines) + "\n"
    if block.width and not parsed(text):
        common = textwrap.dedent("\n".join(block.lines) + "\n")
        if parsed(common):
            return common
    return text


def outdent(line, width):
    """A line without up to `width` columns of white space."""
    taken = 0
    for place, char in enumerate(line):
        taken += {" ": 1, "\t": 4}.get(char, width + 1)
        if taken > width:
            return line[place:]
    return ""


def parsed(program):
    """Its syntax tree; None of what is empty or no Python."""
    if not program.strip() or len(program) > LONGEST:
        return None
    try:
        return compile(program, "<program>", "exec", ast.PyCF_ONLY_AST)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None


STATEMENTS = (
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.ClassDef,
    ast.Import,
    ast.ImportFrom,
    ast.For,
    ast.While,
    ast.If,
    ast.With,
    ast.Try,
)


def acts(text):
    """Whether a text without a tag is a program, not an example of data: 7, YES, O(n) and
    nums = [3,3] are Python too, but do nothing."""
    tree = parsed(text)
    if tree is None:
        return False
    return any(isinstance(node, STATEMENTS) or prints(node) for node in tree.body)


def sets(text):
    """Whether it at least sets a name: f = lambda x: x."""
    tree = parsed(text)
    return tree is not None and any(isinstance(node, ast.Assign) for node in tree.body)


def prints(statement):
    """Whether a bare expression calls print, or a method: sys.stdout.write."""
    if not isinstance(statement, ast.Expr):
        return False
    for node in ast.walk(statement):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute) or getattr(node.func, "id", "") == "print":
                return True
    return False
