r"""
Mathematical answers: where a response says its answer, and whether two answers are the same.

    1  the answer in a response    after_thinking, last_box, find_answer
    2  one spelling for one thing  tidy, squash
    3  plain numbers               plain, same_number
    4  structure                   same: lists, sets, tuples, intervals, unions, matrices, equations
    5  scalars                     scalar: one number, word or expression against another
    6  the library                 by_library: sympy and math-verify, behind guards

Sections 1 to 3 take a time that is bounded by the length of their text: verify.py calls them where
it is called itself. The library may take hours, so that `same` belongs into a process that can be
killed. Answers are strings of LaTeX or of what people type; "gold" is the truth, "pred" what a
response says.
"""

import random
import re
from fractions import Fraction

from harness.units import NOTHING, one_unit, scaled, units

# ==== 1. The answer in a response ===============================================================


def after_thinking(response):
    """What follows the last </think>; nothing where a <think> is never closed."""
    tail = response.rpartition("</think>")[2]
    if "<think>" in tail:
        return ""
    return tail


# What shows nothing: soft hyphens, spaces of no width, marks of direction, choices of a glyph
INVISIBLE = "\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufe00-\ufe0f\ufeff"
# Full-width characters but the !, which in prose is no factorial
UNUSUAL = re.compile(f"[{INVISIBLE}、\uff02-\uff5e￠￡￥￦]")
SHOWN = {chr(code): chr(code - 0xFEE0) for code in range(0xFF02, 0xFF5F)}
SHOWN |= {"￠": "¢", "￡": "£", "￥": "¥", "￦": "₩"}
SHOWN |= {"，": ", ", "、": ", "}  # between the members of a list, never between thousands


def usual(text):
    """A text without invisible characters, and full-width ones as ASCII has them."""
    if text.isascii():
        return text
    return UNUSUAL.sub(lambda match: SHOWN.get(match[0], ""), text)


BRACES = re.compile(r"\\.|[{}]", re.S)  # \{ and \} are characters, not groups
BOXES = re.compile(r"\\(?:boxed|fbox|framebox)(?![A-Za-z])\s*")
NUMERAL = r"-?\d[\d,]*(?:\.\d+)?"
# What a box without braces holds; TeX would take the first digit alone
TOKEN = re.compile(
    rf"{NUMERAL}|\\[dtc]?frac\s*(?:\{{[^{{}}]*\}}|\d)\s*(?:\{{[^{{}}]*\}}|\d)|[A-Za-z]\b"
)


def last_box(text):
    r"""Content of the last \boxed{} or \fbox{}, by brace matching, or of \boxed 5; "" if it never
    closes."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"), text.rfind("\\framebox"))
    if start < 0:
        return ""
    # Without braces: the token that follows
    box = BOXES.match(text, start)
    if not box:
        return ""
    if text[box.end() : box.end() + 1] != "{":
        token = TOKEN.match(text, box.end())
        return token[0] if token else ""
    # Up to the brace that closes it
    depth = 0
    for token in BRACES.finditer(text, box.end()):
        if token[0] == "{":
            depth += 1
        elif token[0] == "}":
            depth -= 1
            if depth == 0:
                return text[box.end() + 1 : token.start()].strip()
    return ""


MARKS = r"(?:[*_`~\s]|</?\w+>)*"  # bold, italics, code
# What may not stand before it is looked at where it is found: a third of the time
ANSWER_LINE = re.compile(rf"(?i)answer(?<![A-Za-z\d]answer){MARKS}[:：][ \t]*")
CHINESE_LINE = re.compile(rf"答(?:案|え)?(?:[是为為])?{MARKS}[:：][ \t]*")
# A point of a list, on a line of its own; behind "Answer:" itself a dash is a minus
POINT = re.compile(r"\s*[-+*•‣▪●◦]\s+(?=\S)")
# Lines that enclose a formula, and what else says nothing by itself
EMPTY_LINE = re.compile(
    r"\s*(?:\$\$?|\\\[|\\\]|[`~]{3,}\w*|-{3,}|\\(?:begin|end)\{[a-z]+\*?\}|</?[A-Za-z]+>)\s*"
)

EXPONENT = r"(?:(?:\^|\*\*)\s*\{?\s*[-−]?\d+\s*\}?|[⁻]?[⁰¹²³⁴-⁹]+)"
POWER_OF_TEN = rf"(?:\s*(?:\\times|\\cdot|[×·⋅*xX])\s*10\s*{EXPONENT})?"
VULGAR = "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
# How a number begins: letters are passed over in half of the time
BEGINS = rf"(?=[-−–\\.\d{VULGAR}])"
# What may stand between a minus and its number: -$18, -\$18, -**18**
SIGN = r"[-−–]"
BEHIND_SIGN = r"(?:\\?\$|[€£¥₹{]|\*\*|\\\()*"
LAST_NUMBER = re.compile(
    rf"{BEGINS}"
    # not in the middle of a word, of an exponent or of a macro's braces, as in \frac{a}{2}
    r"(?<![\w.^√∛])(?<!(?<!\\)\{)(?<!\^[-−])(?<!\^\{[-−])(?<![\w)]\*\*)(?<!\\sqrt )"
    rf"(?:{SIGN}{BEHIND_SIGN})?(?:"
    r"(?:\d+\s*)?\\[dtc]?frac\s*(?:\{\s*[-−]?\d+\s*\}\s*\{\s*[-−]?\d+\s*\}|\d\s*\d)"
    r"|\d+ \d+/\d+"
    rf"|\d*[{VULGAR}]"
    rf"|\d+\s*{EXPONENT}"
    # commas are between thousands: 1,234 is one number, 12,34 and 1,2,3 are several
    rf"|(?:\d{{1,3}}(?:,\d{{3}})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][+-]?\d+(?!\w))?(?:\s?/\s?\d+)?{POWER_OF_TEN}"
    r"|\.\d+(?:[eE][+-]?\d+(?!\w))?)"
)
# Thousands that TeX or a narrow space sets apart
GROUPED = re.compile(r"(?<=\d)(?:\{,\}|,\\!|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))")
WRAPPING = re.compile(r"([-−–]?)\\(?:boxed|fbox|text|textbf|mathbf|mathrm)\s*\{")
# The index of a root, the height of a line
OPTION = re.compile(r"(\\sqrt\s*|\\\\)\[[^\[\]]*\]")


def find_answer(response, style):
    """The answer where the style of the prompt puts it, or "". Styles: boxed, answer (the last
    "Answer:" line), number (the last number)."""
    text = after_thinking(response)
    if style == "boxed":
        return last_box(text) or last_box(usual(text))
    text = usual(text)
    if style == "answer":
        return answer_line(text)
    # The last number; what a macro encloses counts, its own numbers do not
    text = WRAPPING.sub(opened, text)
    if "[" in text:
        text = OPTION.sub(r"\1", text)
    if "{,}" in text or ",\\!" in text or not text.isascii():
        text = GROUPED.sub("", text)
    found = ""
    for match in LAST_NUMBER.finditer(text):
        found = match[0]
    # Its minus stands beside it
    found = re.sub(rf"^({SIGN}){BEHIND_SIGN}", r"\1", found)
    # 1.5 x 10^3, where x is the sign
    found = re.sub(r"\s*[xX]\s*", "*", found)
    return re.sub("[−–]", "-", found)


def opened(match):
    """What stands for a match of WRAPPING: a space, or a minus that belongs to what is inside."""
    return match[1] or " "


def answer_line(text):
    """What stands behind the last "Answer:", or where that is nothing on the next line that holds
    something, without its marks of bold, code, quotation and mathematics."""
    # The last of them
    end = -1
    for match in ANSWER_LINE.finditer(text):
        end = match.end()
    if "答" in text:
        for match in CHINESE_LINE.finditer(text, max(end, 0)):
            end = match.end()
    if end < 0:
        return ""
    # The first line behind it that holds something
    lines = text[end:].split("\n")[:20]
    for number, line in enumerate(lines):
        if line.strip().strip("*_`~> ") and not EMPTY_LINE.fullmatch(line):
            if number and POINT.match(line):
                return points_of_list(lines[number:])
            return unmarked(line)
    return ""


def points_of_list(lines):
    """What the points say that these lines begin with, between commas."""
    said = []
    for line in lines:
        match = POINT.match(line)
        if not match:
            break
        said.append(unmarked(line[match.end() :]))
    return ", ".join(said)


# 13 (thirteen), 13 [i.e. thirteen], 13 (13 apples)
REMARK = re.compile(
    rf"(\$?({NUMERAL})\$?)\s*[(\[](?:i\.e\.,?\s*)?(?:\2\s+)?([A-Za-z]+(?:[ -][A-Za-z]+)*)[)\]]"
)
QUOTED = [("**", "**"), ("*", "*"), ("__", "__"), ("_", "_"), ("`", "`"), ("$$", "$$"), ("$", "$")]
QUOTED += [('"', '"'), ("'", "'"), ("“", "”"), ("\\(", "\\)"), ("\\[", "\\]"), ("「", "」")]


def unmarked(line):
    """A line without what encloses it, a period at its end, and a remark: 13 (thirteen)."""
    if BOXES.search(line):
        return last_box(line) or line
    if len(line) > 2000:  # too long for an answer, and for the loop below
        return line
    # Marks within it: bold words, tags of HTML, the end of the text, a tick
    text = re.sub(r"</?[A-Za-z]+\s*/?>|<\|\w+\|>|[✓✔✅]|^\s*>", " ", line)
    text = re.sub(r"\*\*([^*]+)\*\*(?!\w)", r"\1", text)
    # Mark after mark, from the outside
    text = text.strip()
    before = None
    while text != before:
        before = text
        text = text.strip("*` \t•").rstrip(".。！").strip()
        for left, right in QUOTED:
            inside = text[len(left) : -len(right)]
            if text.startswith(left) and text.endswith(right) and inside and left not in inside:
                text = inside.strip()
    # A remark in words
    remark = REMARK.fullmatch(text)
    if remark and is_remark(remark[1].strip("$"), remark[3]):
        return remark[1].strip("$")
    return text


ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


def is_remark(number, words):
    """Whether words in brackets behind a number say the same number, or a unit."""
    parts = re.split(r"[ -]", words.lower())
    if parts[0] in ONES + TENS:
        return spoken(parts) == number.replace(",", "")
    return units(f"{number}\\text{{{words}}}", plain)[1] != NOTHING


def spoken(words):
    """A number below a thousand in words, in digits; "" for anything else."""
    total = 0
    for word in words:
        if word in ONES:
            total += ONES.index(word)
        elif word in TENS:
            total += 10 * TENS.index(word) + 20
        elif word == "hundred":
            total *= 100
        elif word != "and":
            return ""
    return str(total)


# ==== 2. One spelling for one thing =============================================================

# fmt: off
UNICODE = {
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "π": r"\pi ", "∞": r"\infty ",
    "°": r"^\circ ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∈": r"\in ",
    "√": r"\sqrt ", "∅": r"\emptyset ", "±": r"\pm ", "℃": r"^\circ C", "℉": r"^\circ F",
    "≈": r"\approx ", "∑": r"\sum ", "∏": r"\prod ", "∫": r"\int ",
    "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ",
    "…": r"\ldots ", "⋅": r"\cdot ", "∨": r"\lor ", "∧": r"\land ", "″": '"', "′": "'",
    "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "“": '"', "”": '"',
    "½": r"\frac12", "⅓": r"\frac13", "⅔": r"\frac23", "¼": r"\frac14", "¾": r"\frac34",
    "⅕": r"\frac15", "⅖": r"\frac25", "⅗": r"\frac35", "⅘": r"\frac45", "⅙": r"\frac16",
    "⅚": r"\frac56", "⅛": r"\frac18", "⅜": r"\frac38", "⅝": r"\frac58", "⅞": r"\frac78",
}
CURRENCY_SIGNS = {
    "€": "euro", "£": "sterling", "¥": "yen", "円": "yen", "元": "yuan", "₹": "rupee", "₨": "rupee",
    "₩": "won", "원": "won", "₽": "ruble", "฿": "baht", "₫": "dong", "₺": "lira", "₱": "peso",
    "₪": "shekel", "₦": "naira", "₴": "hryvnia", "¢": "cent",
}
UNICODE |= {sign: f"\\text{{{name}}}" for sign, name in CURRENCY_SIGNS.items()}
# What takes more than one character
RAISED = re.compile("⁻?[⁰¹²³⁴-⁹]+")
DIGITS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
CHARACTERS = [
    (re.compile("((?:\\d[\u0304\u0305])+)"), lambda found: f"\\overline{{{found[1][::2]}}}"),
    (re.compile("(\\d)\u0307"), r"\\dot{\1}"),
    (re.compile(r"\\(?:text|mathrm|mbox)\s*\{\s*(°\s*[CF]?|℃|℉)\s*\}"), r"\1"),
    (re.compile(rf"\\(?:text|mathrm|mbox)\s*\{{\s*([{''.join(CURRENCY_SIGNS)}])\s*\}}"), r"\1"),
    (re.compile(rf"\\text\s*\{{\s*([{''.join(CURRENCY_SIGNS)}]\s*\d[\d,.]*)\s*\}}"), r"\1"),
    (re.compile(rf"\\text\s*\{{\s*(\d[\d,.]*\s*[{''.join(CURRENCY_SIGNS)}])\s*\}}"), r"\1"),
    (re.compile(r"∛\s*(\w+)"), r"\\sqrt[3]{\1}"),
    (re.compile(r"∛\s*\(([^()]*)\)"), r"\\sqrt[3]{\1}"),
]

INTRODUCTION = r"(?i:(?:the\s+)?(?:final\s+)?answer)\s*(?:is|:|=)[:=\s]*"
CURRENCIES = "|".join(sorted(set(CURRENCY_SIGNS.values()) - {"cent"}))
CODES = "USD|EUR|GBP|JPY|CNY|RMB|INR|KRW|Rs"  # without \\text as well
CURRENCIES = rf"(?i:{CURRENCIES}|{CODES}|dollars?)"
AMOUNT = r"(?:\s|~|\\[,;: ])*(\d[\d,]*(?:\.\d+)?)"
PAREN = r"\((?:[^()]|\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\))*\)"  # brackets, four deep
GROUP = r"\{(?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})*\}"  # braces, four deep

POWERED = "sin|cos|tan|cot|sec|csc|ln|log|arcsin|arccos|arctan|sinh|cosh|tanh"
INNER = PAREN[2:-2]

REWRITES = [(re.compile(old), new) for old, new in [
    # digits grouped by {,} and by ,\!
    (r"(?<=\d)(?:\{,\}|,\\!)\s*(?=\d{3})", ""),
    # dollars are a unit, dollar signs around a formula are not
    (rf"\\text\{{\s*((?:{CODES})\.?\s*\d[\d,.]*)\s*\}}", r"\1"),
    (r"(?<![A-Za-z\\])US\s*(?=\\?\$\s*\d)", r"\\"),
    (r"\\+\$\s*(\d[\d,]*(?:\.\d+)?|\.\d+)", r"\1\\text{dollar}"),
    (rf"(?<![A-Za-z\\{{])({CODES})\.?{AMOUNT}", r"\2\\text{\1}"),
    (rf"\\text\{{\s*({CURRENCIES})\.?\s*\}}{AMOUNT}", r"\2\\text{\1}"),
    (r"\\pounds\s*(\d[\d,]*(?:\.\d+)?)", r"\1\\text{sterling}"),
    # what introduces an answer, and which one of many it is: the 18th
    (rf"^\\text\{{\s*{INTRODUCTION}\}}|^{INTRODUCTION}", ""),
    (r"^\s*=(?!=)", ""),
    (r"(?<=\d)\s*\^?\s*\{?\s*\\text\{\s*(?:st|nd|rd|th)\s*\}\s*\}?", ""),
    (r"(?<=\d)(?:st|nd|rd|th)(?![A-Za-z])", ""),
    (r"\\(?:left|right)\s*\.", ""),
    # what shows nothing, or beside the formula; size, spacing, dollar signs
    (rf"\\[hv]?phantom(?![A-Za-z])\s*(?:{GROUP}|\\[A-Za-z]+|[^\\\s{{}}])", " "),
    (rf"\\(?:tag\*?|label)\s*{GROUP}", " "),
    (r"\\(?:left|right|[bB]igg?[lrm]?|limits)(?![A-Za-z])", ""),
    (r"\\(?:display|text|script|scriptscript)style(?![A-Za-z])", ""),
    (r"(?<!\\)\\!|\\?\$|(?<!\\)\\[()\[\]]", ""),
    (r"(?<!\\)\\[,;:> ]|~|\\[hv]space\*?\s*\{[^{}]*\}", " "),
    (r"\\(?:q?quad|(?:en|thin|med|thick|negthin|nobreak)?space|hfill?)(?![A-Za-z])", " "),
    # other names of one macro
    (r"\\[lr]vert(?![A-Za-z])", "|"),
    (r"\\[dtc]frac(?![a-z])", r"\\frac"),
    (r"\\log\s*_\s*(\w)\s+", r"\\log_{\1} "),
    (r"\\(le|ge|ne)q(?:slant)?(?![a-z])", r"\\\1 "),
    (r"\\lt(?![a-z])", "<"),
    (r"\\gt(?![a-z])", ">"),
    (r"<=", r"\\le "),
    (r">=", r"\\ge "),
    # but 5!=120 says what a factorial is
    (r"(?<![\d)])!=", r"\\ne "),
    (r"^\s*(\*{1,3}|_{1,2}|`+|[\"'])([^*_`\"']+)\1\s*$", r"\2"),
    (r"\*\*", "^"),
    (r"\\varnothing(?![a-z])|\\\{\s*\\\}", r"\\emptyset "),
    (r"\\[cld]?dots[cbm]?(?![a-z])|\.\.\.", r"\\ldots "),
    (r"\\(?:lor|vee)(?![a-z])", r"\\lor "),
    (r"\\(?:land|wedge)(?![a-z])", r"\\land "),
    (r"\\(?:long)?rightarrow(?![a-z])", r"\\to "),
    # repeating decimals
    (r"(?<=\d)\{\.\}", "."),
    (r"\\bar\s*(?=[{\d])", r"\\overline"),
    (r"\\(overline|dot)\s*(\d)", r"\\\1{\2}"),
    (r"\\(overline|dot)\s*\{\s*(\d+)\s*\}\s*", r"\\\1{\2}"),
    (r"\.\{(\\overline\{\d+\})\}", r".\1"),
    (r"(\.\d*\\overline\{\d+\})\s*\\ldots", r"\1"),
    (r"\\%|\bper ?cent(?:age)?\b|\bpct\b|\\text\{\s*percent\s*\}", "%"),
    (r"(?<!\^)(?<!\{)\\degree(?![a-z])|(?<=\d)\s*\\circ\s*$", r"^\\circ "),
    (r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?\s*C(?![A-Za-z])", r"^\\circ \\text{celsius}"),
    (r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?\s*F(?![A-Za-z])", r"^\\circ \\text{fahrenheit}"),
    (r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?\s*", r"^\\circ "),
    # the U that people type between intervals
    (r"(?<=[\])])\s*U\s*(?=[(\[])", r"\\cup "),
    # braces where TeX would take one token, or a person writes none
    (rf"\\exp\s*({PAREN})", r"e^\1"),
    (rf"(\\(?:{POWERED})\s*{PAREN})\s*(\^\s*(?:\{{[^{{}}]*\}}|\w))", r"(\1)\2"),
    (rf"\^\s*\(({INNER})\)", r"^{\1}"),
    (r"\^\s*(-\d+)", r"^{\1}"),
    (rf"\\?sqrt\s*\(({INNER})\)", r"\\sqrt{\1}"),
    (rf"\\?sqrt\s*\(({INNER})\)", r"\\sqrt{\1}"),  # one inside of another
    # permutations of 2 from 4, and 4 over 2
    (r"(?:\{\s*\})?[_^]\s*\{?(\d+)\}?\s*P\s*_\s*(?:\{(\d+)\}|(\d))", r"\\frac{\1!}{(\1-\2\3)!}"),
    (r"(?<![A-Za-z\\])nCr\s*\(\s*(\d+)\s*,\s*(\d+)\s*\)", r"\\binom{\1}{\2}"),
    (r"(?<![A-Za-z\\])nPr\s*\(\s*(\d+)\s*,\s*(\d+)\s*\)", r"\\frac{\1!}{(\1-\2)!}"),
    (r"\{\s*(\w+)\s*\\choose\s*(\w+)\s*\}", r"\\binom{\1}{\2}"),
    (r"(?:\{\s*\})?[_^]\s*\{?(\d+)\}?\s*C\s*_\s*(?:\{(\d+)\}|(\d))", r"\\binom{\1}{\2\3}"),
    (r"(?<![A-Za-z\\])C\s*\(\s*(\d+)\s*,\s*(\d+)\s*\)(?=\s*(?:=|$))", r"\\binom{\1}{\2}"),
    (
        r"(?<![A-Za-z\\])C\s*_\s*\{?(\d+)\}?\s*\^\s*\{?(\d+)\}?(?=\s*(?:=|$))",
        r"\\binom{\1}{\2}",
    ),
    (r"\\(frac|sqrt|d?binom)\s*(\d|\\pi|[A-Za-z](?![A-Za-z]))", r"\\\1{\2}"),
    (rf"(\\(?:frac|binom)\s*{GROUP})\s*(\d|\\pi|[A-Za-z])", r"\1{\2}"),
    # the end of a sentence, the comma that "and" leaves behind one
    (r"(?:[\s.,;。]|\\(?=[\s\\]|$))+$", ""),
    (r",\s*,", ","),
    (r"(?<=\d)\s*(?:\^\s*\{?\s*(?:\\prime\s*){2}\}?|''|\")", r"\\text{inch}"),
    (r"(?<=\d)\s*(?:\^\s*\{?\s*(?:\\prime\s*)+\}?|'+)", r"\\text{prime}"),
]]
# fmt: on

FUNCTIONS = (
    "arcsin arccos arctan arcsec arccsc arccot sinh cosh tanh sin cos tan sec csc cot log ln exp "
    "max min gcd lcm det"
).split()
# Their names in \text, and what stands behind such a one: (12, or \left(12, or {12
CALLED_BY_WORDS = {name: name for name in FUNCTIONS} | {"gcf": "gcd", "hcf": "gcd", "mod": "bmod"}
CALL = re.compile(r"\s*(?:\\left\s*)?(?:\(|\[|\\\{)|(?<=mod\})\s*\d|(?<=mod \})\s*\d")
TEXT = re.compile(
    r"\\(text(?:bf|it|rm|sf|tt|sc|up|md|sl|normal)?|mbox|hbox|emph"
    r"|math(?:rm|bf|it|sf|tt|normal)|operatorname\*?)\s*\{([^{}]*)\}"
    r"|,?\s*(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])"
    r"|(?<=[\w)\]},])\s+(?:AND|And|OR|Or)(?=\s+[-\w\\(\[{|])"
)
UNIT_LETTERS = "mgshNJWVAKCFTHL"
BEHIND_NUMBER = re.compile(
    r"(?:[\d}]|\d(?:\s|\\[,;: ])*\\[dt]?frac\s*\{|\}\s*\{|\}\s*(?:\\cdot|/))(?:\s|\\[,;: ]|~)*$"
)

# Colour, weight and size say nothing
STYLED = re.compile(
    rf"\\(?:boldsymbol|bold|bm|pmb|underline|uline|ensuremath|mathord|mathop|mathrel|mathbin|smash"
    rf"|mathstrut)(?![A-Za-z])\s*({GROUP})?"
    rf"|\\(?:(?:math|text)(?:bf|it|sf|tt|rm|normal)|emph)\s*(?=\{{[^{{}}]*\{{)({GROUP})"
    r"|\\(?:text)?color\s*(?:\[[^\]]*\])?\s*\{[^{}]*\}"
    rf"\s*({GROUP})?"
    rf"|\\f?colorbox\s*(?:\{{[^{{}}]*\}}){{1,2}}\s*({GROUP})"
    r"|\\(?:tiny|scriptsize|footnotesize|small|normalsize|large|Large|LARGE|huge|Huge"
    r"|bf|it|rm|sf|tt|em|bfseries|itshape|boldmath|unboldmath)(?![A-Za-z])"
    r"|\\math(?:bf|rm|it|sf|tt|normal)\s*(?=[\d\\-])"
)

# Functions and constants without a backslash, as people type them
CALLED = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|csc|ln|log|exp"
NAMED = "Arcsin|Arccos|Arctan|Sinh|Cosh|Tanh|Sin|Cos|Tan|Cot|Sec|Csc|Ln|Log|Exp|Sqrt|Abs"


def in_small_letters(match):
    return match[0].lower()


TYPED = [
    (re.compile(old), new)
    for old, new in [
        (rf"(?<![A-Za-z\\])(?:{NAMED})(?=\s*\()", in_small_letters),
        (r"(?<![A-Za-z\\])cbrt\s*\(([^()]*)\)", r"\\sqrt[3]{\1}"),
        (r"(?<![A-Za-z\\])a(sin|cos|tan)(?=\s*\()", r"\\arc\1"),
        (r"(?<![A-Za-z\\])(sec|max|min|gcd|lcm|det)(?=\s*\()", r"\\\1"),
        (r"(?<![A-Za-z\\])(?:GCD|HCF|GCF|gcf|hcf)(?=\s*\()", r"\\gcd"),
        (r"(?<![A-Za-z\\])LCM(?=\s*\()", r"\\lcm"),
        (r"(?<![A-Za-z\\])(sum|prod|int|lim)(?=\s*_)", r"\\\1 "),
        (r"(?<=\d)\s+mod\s+(?=\d)", r"\\bmod "),
        (r"(?<![A-Za-z\\])log(?:_?(\d+)(?=\s*\()|_(\d+)(?=\s+[\w\\]))", r"\\log_{\1\2}"),
        (
            rf"(?<![A-Za-z\\])(?:([xtn])\s*)?({CALLED})(?=\s*[(^_{{\\]|\s*\d|\s*[a-z](?![a-z])|\s+pi\b|pi\b)",
            r"\1\\\2 ",
        ),
        (r"(?<![A-Za-z\\])sqrt(?=\s*[\d({\\a-z])", r"\\sqrt "),
        (r"(?<![A-Za-z\\])abs\s*\(([^()]*)\)", r"|\1|"),
        (r"(?<![A-Za-z\\])(?:pi|Pi|PI)(?![A-Za-z])", r"\\pi "),
        (r"(?<![A-Za-z\\])(?:[Ii]nfinity|infty|inf|oo)(?![A-Za-z])", r"\\infty "),
        (r"(?<![A-Za-z\\])(theta|alpha|beta|phi|lambda|omega)(?![A-Za-z])", r"\\\1 "),
    ]
]
LETTERS = re.compile(r"(?<![A-Za-z\\])[A-Za-z]{2}")
# Numbers as they mostly are, which none of the rules changes
TIDY_NUMBER = re.compile(
    r"[+-]?(?:[0-9]+(?:,[0-9]{3})*(?:[./][0-9]+)?|\\frac\{[+-]?[0-9]+\}\{[+-]?[0-9]+\})"
)


def tidy(text):
    """One spelling for spacing, sizing, macros and text."""
    if TIDY_NUMBER.fullmatch(text):
        return text
    return by_all_rules(text)


def by_all_rules(text):
    """The same by every rule, whatever the text: what the short way of `tidy` has to agree with."""
    # Characters, styles, texts, names, and then macros
    if not text.isascii():
        text = in_ascii(usual(text))
    if "cent" in text:
        text = DOLLARS_AND_CENTS.sub(r"\1.\2\\text{dollar}", text)
    if "\\" in text:
        for _ in range(3):  # one style inside of another
            text = STYLED.sub(unstyled, text)
    text = TEXT.sub(tidy_word, text)
    if LETTERS.search(text):
        text = "".join(map(with_macros, re.split(r"(\\text\{[^{}]*\})", text)))
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    return text.strip()


# 18 dollars and 50 cents
DOLLARS_AND_CENTS = re.compile(
    r"(\d[\d,]*)\s*(?:\\text\{)?\s*dollars?\s*\}?\s*(?:\\text\{)?\s*(?:and|,)\s*\}?"
    r"\s*(\d\d)\s*(?:\\text\{)?\s*cents?\s*\}?"
)


def in_ascii(text):
    """What LaTeX has a macro for, by its macro: ×, π, ½, superscripts, 3 with a bar above."""
    for pattern, new in CHARACTERS:
        text = pattern.sub(new, text)
    text = RAISED.sub(raised, text)
    return "".join(UNICODE.get(char, char) for char in text)


def raised(match):
    """A superscript: ^2, or ^{-3} where it is more than a digit."""
    exponent = match[0].translate(DIGITS)
    return f"^{exponent}" if len(exponent) == 1 else f"^{{{exponent}}}"


def unstyled(match):
    r"""What a match of STYLED is the style of, in braces where more than a token is raised."""
    # What it encloses; a raised group of several tokens stays one
    group = "".join(match.groups(""))  # there is one at most
    inner = group[1:-1].strip()
    raised = match.string[match.end() : match.end() + 1] in ("^", "_")
    if raised and len(inner) > 1:
        return f"{{{inner}}}"
    if inner[:1].isdigit() and match.string[match.start() - 1 : match.start()].isdigit():
        return inner  # 1\\boldsymbol{3}
    return f" {inner}"


def with_macros(text):
    r"""A part without \text, its functions and constants with a backslash."""
    if text.startswith("\\text{") or not LETTERS.search(text):
        return text
    for pattern, new in TYPED:
        text = pattern.sub(new, text)
    return text


def tidy_word(match):
    r"""A match of TEXT: "and" becomes a comma, "or" \lor, \text{x} the variable x (but m behind a
    number stays a unit), what has no letters itself, all else \text{..}."""
    # What it says
    macro = match[1]
    inner = re.sub(r"~|\\[,;:! ]", " ", match[2] or "").strip()
    word = match[0].strip(" ,") if macro is None else inner.strip(" ,")
    is_between = macro is None or (match.start() > 0 and word in ("AND", "And", "OR", "Or"))
    conjunction = word.lower() if is_between else word
    if conjunction == "and":
        return ","
    if conjunction == "or":
        return "\\lor "
    # A function, a letter, a number, or words
    if word in FUNCTIONS and not macro.startswith("text"):
        return f"\\{word} "
    if macro in ("mathbf", "mathit", "mathsf", "mathtt", "mathnormal") and "\\" in inner:
        return f" {inner} "
    function = CALLED_BY_WORDS.get(word.casefold().removeprefix("the "))
    if function and CALL.match(match.string, match.end()):
        return f"\\{function} "
    if re.fullmatch(r"[\d.]+", inner):  # digits of a number: 1\mathbf{3} is 13, 1\text{ 3} is not
        return inner if macro.startswith("math") else match[2]
    if len(inner) == 1:
        behind = BEHIND_NUMBER.search(match.string[: match.start()][-20:])
        if not (behind and inner in UNIT_LETTERS):
            return f" {inner} "
    if not re.search(r"[A-Za-z]", inner):
        return f" {inner} "
    return f"\\text{{{inner}}}"


def squash(text):
    """No spaces (but 1 2 is not 12), x_1 for x_{1}."""
    text = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", " ".join(text.split()))
    return re.sub(r"([_^])\{(\w)\}", r"\1\2", text)


OPENING = ("(", "[", "{", "\\{", "\\langle")
CLOSING = (")", "]", "}", "\\}", "\\rangle")


def scan(text):
    """(token, depth of brackets after it) of each token."""
    depth = 0
    for token in re.findall(r"\\[A-Za-z]+|\\.|.", text, re.S):
        if token in OPENING:
            depth += 1
        elif token in CLOSING:
            depth -= 1
        yield token, depth


def split_top(text, separator):
    """Split where the separator stands outside all brackets."""
    parts = [""]
    for token, depth in scan(text):
        if token == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += token
    return [part.strip() for part in parts]


def wrapped(text):
    """(open, inside, close) where one pair of brackets, maybe unlike, encloses all; else None."""
    scanned = list(scan(text))
    if len(scanned) < 2 or scanned[-1][1] != 0:
        return None
    if min(depth for _, depth in scanned[:-1]) <= 0:
        return None
    tokens = [token for token, _ in scanned]
    return tokens[0], "".join(tokens[1:-1]).strip(), tokens[-1]


MATRIX = re.compile(
    r"\\begin\{([pbB]?matrix|array)\}(?:\{[clr|]*\})?((?:(?!\\begin).)*)\\end\{\1\}", re.S
)


def matrix(text):
    """Its rows of entries, or None."""
    match = MATRIX.fullmatch(text)
    if not match:
        return None
    rows = re.split(r"\\\\(?:\[[^\]]*\])?", match[2])
    return [row.split("&") for row in rows if row.strip()]


# ==== 3. Plain numbers ==========================================================================

DECIMAL = re.compile(
    r"([+-]?)(\d{1,3}(?:[, ]\d{3})+|\d*)(\.\d*)?"
    r"(?:[eE]([+-]?\d{1,3})|(?:\\times|\\cdot|\*)10\^(\{[+-]?\d{1,3}\}|\d))?"
)
FRACTION = re.compile(
    r"([+-]?)(?:(\d+)\s*)??"
    r"(?:\\frac\{\s*([+-]?\d+)\s*\}\{\s*([+-]?\d+)\s*\}|(?<!\d)([+-]?\d+)/(\d+))"
)


INTEGER = re.compile(r"[+-]?[0-9]{1,100}")


def plain(text):
    """(value, written as a decimal?, percent?) of an integer, decimal, fraction, mixed number,
    repeating decimal or a.b x 10^n; None of anything else. The value is a Fraction: nothing is
    rounded."""
    if INTEGER.fullmatch(text):
        return Fraction(int(text)), False, False
    return by_all_forms(text)


def by_all_forms(text):
    """The same from every form: what the short way of `plain` has to agree with."""
    if len(text) > 1000:
        return None
    percent = text.endswith("%")
    text = text.rstrip("% ")
    text = re.sub(r"\s*(\\times|\\cdot|[*+/^-])\s*", r"\1", text)
    if text.startswith("10^"):
        text = "1*" + text

    found = (
        decimal_value(DECIMAL.fullmatch(text))
        or fraction_value(FRACTION.fullmatch(text))
        or repeating_value(text)
    )
    if found is None:
        return None
    value, decimal = found
    return value, decimal, percent


def decimal_value(match):
    """(value, written with a point or an exponent?) of a match of DECIMAL that has a digit."""
    if not match or not re.search(r"\d", match[2] + (match[3] or "")):
        return None
    whole = re.sub("[ ,]", "", match[2]) or "0"
    exponent = match[4] or match[5]
    value = Fraction(whole + (match[3] or "").rstrip("."))
    if exponent:
        value *= Fraction(10) ** int(exponent.strip("{}"))
    decimal = bool(match[3] or match[4] or match[5])
    return (-value if match[1] == "-" else value), decimal


def fraction_value(match):
    """(value, False) of a match of FRACTION, unless it divides by 0 or is 1 -2/3."""
    if not match:
        return None
    top = match[3] or match[5]
    bottom = int(match[4] or match[6])
    signed_part = match[2] and (top[0] in "+-" or bottom < 0)
    if bottom == 0 or signed_part:
        return None
    value = int(match[2] or 0) + Fraction(int(top), bottom)
    return (-value if match[1] == "-" else value), False


REPEATING = re.compile(r"([+-]?)(\d*)\.(\d*)(?:\\overline\{(\d+)\}|\((\d+)\))")
DOTS = re.compile(r"([+-]?)(\d*)\.(\d+)\s*\\ldots\s*(?:\\overline\{\d+\})?")
DOTTED = re.compile(r"([+-]?)(\d*)\.(\d*)\\dot\{?(\d)\}?(?:(\d*)\\dot\{?(\d)\}?)?")


def repeating_value(text):
    r"""(value, False) of 0.1\overline{6}, 0.(3), 0.\dot{1}4\dot{2} and 0.333\ldots, where digits at
    the end have to be there three times, or a block of several twice; None of anything else."""
    # A bar above, or brackets around, what repeats
    match = REPEATING.fullmatch(text)
    if match and not (match[5] and match[3]):  # 0.5(3) may be a product
        return repeated(match[1], match[2], match[3], match[4] or match[5])
    # A dot above its first and last digit
    match = DOTTED.fullmatch(text)
    if match:
        return repeated(match[1], match[2], match[3], "".join(match.groups("")[3:]))
    # Dots behind digits that repeat already
    match = DOTS.fullmatch(text)
    digits = match[3][:200] if match else ""
    for size in range(1, len(digits) // 2 + 1):
        block = digits[-size:]
        if digits.endswith(block * (3 if size == 1 else 2)):
            return repeated(match[1], match[2], digits, block)
    return None


def repeated(sign, whole, fixed, block):
    """(value, False) of whole.fixed, then the block without end."""
    places = len(fixed)
    value = int(whole or "0") + Fraction(int(fixed or "0"), 10**places)
    value += Fraction(int(block), (10 ** len(block) - 1) * 10**places)
    return (-value if sign == "-" else value), False


def near(a, b):
    """To six places and four figures."""
    difference = abs(a - b)
    return difference * 2 * 10**6 <= 1 + 1e-9 and difference * 10**4 <= max(abs(a), abs(b))


def endless(x):
    """Whether a fraction has no last decimal, as 1/3: its denominator has a prime but 2 and 5."""
    return pow(10, x.denominator.bit_length(), x.denominator) != 0


def same_number(gold, pred):
    """Whether two numbers, as `plain` reads them, are one. 28% takes 28%, 28, 0.28; 0.28 takes 28%;
    10 takes 10%, as in the data sets' own rules, but neither 1000% nor 0.1; 1/3 takes 0.333333,
    which no decimal can equal."""
    g, g_decimal, g_percent = gold
    p, p_decimal, p_percent = pred
    if g_percent:
        candidates = [p] if p_percent else [p, 100 * p]
        return any(
            value == g or (p_decimal and endless(g) and near(g, value)) for value in candidates
        )
    if p_percent:
        is_share = g.denominator != 1 and p == 100 * g
        return is_share or (abs(g) >= 1 and p == g)
    if g == p:
        return True
    rounded = (p_decimal and endless(g)) or (g_decimal and endless(p))
    return rounded and near(g, p)


# ==== 4. Structure ==============================================================================


class Unjudged(Exception):
    """Its reason: "truth unparsable", or "too large" for what could take minutes or gigabytes."""


# What may stand before an equals sign as the name of a value: x, S_n, f(x), (x,y), \text{area}
NAME = re.compile(
    r"(?!.*\\(?:frac|sqrt|pi|sum|int|prod|infty))"
    r"(?:\\?[A-Za-z][\w\\{}',|\s]*(?:\^(?:-1|\{-1\}))?(?:\([A-Za-z0-9,\\ ]*\))?"
    r"|\([a-z]\s*\\circ\s*[a-z]\)\([a-z]\)"
    r"|\([A-Za-z,\s_{}\d]*[A-Za-z][A-Za-z,\s_{}\d]*\)|\\text\{[^{}]*\}|)"
)
VARIABLE = r"[A-Za-z](?:_\w)?|\\(?:theta|alpha|beta)"
RELATION = re.compile(r"[<>]|\\(?:le|ge|ne)(?![a-z])")


def same(gold, pred):
    """Is pred the answer gold? Both as `tidy` leaves them.

    Compared part by part: lists, sets and unions in any order; tuples, intervals and matrices in
    theirs and with the same brackets; of a chain of = every side has to be right (7=5 is not 5).
    Raises Unjudged.
    """
    if squash(gold) == squash(pred) or same_text(gold, pred) or is_choice(gold, pred):
        return True
    gold, pred = condition(gold), condition(pred)
    if "\\lor" in gold + pred:
        gold, pred = without_or(gold), without_or(pred)
    gold, pred = in_order_of_names(meat(gold)), in_order_of_names(meat(pred))
    if squash(gold) == squash(pred):
        return True
    if re.fullmatch(r"-?\d+,\d{1,2}", pred) and plain(gold) and plain(gold)[1]:
        pred = pred.replace(",", ".")  # a decimal comma

    if RELATION.search(pred):
        gold_unknown, gold_range = ("", gold) if is_interval(gold) else both(gold)
        unknown, pred_range = both(pred)
        if gold_range and pred_range and gold_unknown in ("", unknown):
            return same_shape(gold_range, pred_range)
    golds, preds = items(gold), items(pred)
    if len(golds) > 1 or len(preds) > 1:
        return same_list(gold, pred)
    if is_single(wrapped(gold)) or is_single(wrapped(pred)):
        return same(unwrap(gold), unwrap(pred))
    if is_union(gold) or is_union(pred):
        return same_union(gold, pred) or by_library(gold, pred)
    return same_shape(gold, pred)


KNOWN_WORDS = (
    "yes no true false none east west north south even odd both neither always sometimes never"
).split()


def same_text(gold, pred):
    r"""Words: whatever the case, with or without \text. Letters alone are the names of things: AB
    is not ab, MW not mW."""
    in_text = "\\text" in gold + pred
    g, p = (re.sub(r"\\text\{([^{}]*)\}", r"\1", text).strip(" .") for text in (gold, pred))
    if squash(g) == squash(p):
        return bool(g) and (in_text or all(map(is_word, g.split())))
    if " ".join(g.casefold().split()) != " ".join(p.casefold().split()):
        return False
    # Those that differ in case have to be words
    for one, other in zip(g.split(), p.split(), strict=True):
        both_words = is_word(one) and is_word(other)
        in_capitals = in_text and len(one) > 2 and one.isalpha()
        if one != other and not both_words and not in_capitals:
            return False
    return True


def is_word(text):
    """Yes, even, Monday, TRUE; not AB, x or ABC."""
    if text.casefold() in KNOWN_WORDS:
        return True
    return bool(re.fullmatch(r"[A-Za-z][a-z]{2,}", text) and re.search(r"(?i)[aeiou]", text))


CHOICE = re.compile(r"(?:\(([A-J])\)|([A-J])\)|([A-J])[.:])\s+(.+)", re.S)

OTHER_CHOICE = re.compile(  # or a word that makes another answer; a polygenic score is none
    r"\\lor|(?<![A-Za-z\\])(?:or|and|not|A(?!\s[a-z]{2})|[B-J])(?![A-Za-z])"
)


def is_choice(gold, pred):
    r"""Whether a letter of a list of choices stands before what it stands for: (B)\ 5, E: a score.
    A second letter makes it two answers."""
    gold = gold.strip("() ")
    if not re.fullmatch("[A-J]", gold):
        return False
    match = CHOICE.fullmatch(re.sub(r"\\text\{([^{}]*)\}", r"\1", pred).strip())
    if not match or gold not in match.groups():
        return False
    return not OTHER_CHOICE.search(match[4])


BUILDER = re.compile(
    rf"\\\{{\s*(?:{VARIABLE})\s*(?:\\in\s*\\mathbb\s*\{{?\s*R\s*\}}?)?\s*(?::|\||\\mid(?![a-z]))(.+)\\\}}"
)


def condition(text):
    r"""The inequalities of \{x : x>2\}; any other text as it is."""
    match = BUILDER.fullmatch(text.strip())
    if match and RELATION.search(match[1]):
        return match[1].strip()
    return text


def without_or(text):
    r"""\lor between intervals or inequalities of one unknown is a union, between anything else a
    comma."""
    # Of one unknown, all of them ranges?
    parts = [part.rstrip(", ") for part in split_top(text, "\\lor")]
    if len(parts) > 1:
        listed = [member for part in parts for member in split_top(part, ",")]
        if all(RELATION.search(member) for member in listed):  # 0<x<1, 2<x<3, or 4<x<5
            parts = listed
        ranges = [as_range(meat(part)) for part in parts]
        unknowns = {unknown for unknown, interval in ranges if unknown}
        if len(unknowns) < 2 and all(interval for _, interval in ranges):
            return "\\cup ".join(interval for _, interval in ranges)
    return ",".join(parts)


def is_interval(text):
    """Whether a text is written as one interval; (1,2) may be a point."""
    pair = wrapped(text)
    is_wrapped = pair and pair[0] + pair[2] in ("()", "[]", "(]", "[)")
    return bool(is_wrapped) and len(split_top(pair[1], ",")) == 2


SIZE = re.compile(rf"\|({VARIABLE})\|(<|\\le)([^<>|]+)")


def both(text):
    r"""(unknown, interval) of what says both of its ends: -2<x<7, |x|<2, x>-2 and x<7; ("", "") of
    anything else, and where there is nothing between them."""
    parts = re.split(r",|\\land(?![a-z])", text)
    parts = [re.sub(r"\\(le|ge)\s*", r"\\\1", squash(part)) for part in parts if part.strip()]
    size = SIZE.fullmatch(parts[0]) if len(parts) == 1 else None
    if size:
        x, relation, end = size.groups()
        minus = end if plain(end) else f"({end})"
        parts = [f"-{minus}{relation}{x}{relation}{end}"]
    ranges = [as_range(part) for part in parts]
    if len({unknown for unknown, _ in ranges}) != 1 or not ranges[0][0]:
        return "", ""
    intervals = [wrapped(interval) for _, interval in ranges]
    # Two half lines, from below and from above
    if len(intervals) == 2:
        intervals.sort(key=lambda interval: interval[1].startswith("-\\infty"))
        (left, low, _), (_, high, right) = intervals
        low, low_end = split_top(low, ",")
        high_end, high = split_top(high, ",")
        if low_end != "\\infty" or high_end != "-\\infty":
            return "", ""
        intervals = [(left, f"{low},{high}", right)]
    if len(intervals) != 1:
        return "", ""
    left, inside, right = intervals[0]
    low, high = map(plain, split_top(inside, ","))
    if low and high and low[0] >= high[0]:
        return "", ""
    return ranges[0][0], f"{left}{inside}{right}"


CHAIN = re.compile(rf"(.+?)(<|\\le)({VARIABLE})(<|\\le)(.+)")
ONE_SIDED = re.compile(rf"({VARIABLE})(<|>|\\le|\\ge)(.+)")


def as_range(text):
    r"""(unknown, interval) of x\ge 7, which is [7,\infty), of 1<x\le 2, which is (1,2], and of an
    interval or a union of some, as they are; ("", "") of anything else."""
    # An interval, a union of some, or an inequality
    pair = wrapped(text)
    is_interval = pair and pair[0] + pair[2] in ("()", "[]", "(]", "[)") and "," in pair[1]
    if is_interval or is_union(text):
        return "", text
    if not RELATION.search(text):
        return "", ""
    text = re.sub(r"\\(le|ge)\s*", r"\\\1", squash(text))
    # From the left, or from the right
    for side in (text, turned(text)):
        chain = CHAIN.fullmatch(side)
        if chain and not re.search(r"[<>]|\\[lgn]e", chain[1] + chain[5]):
            left = "[" if chain[2] == "\\le" else "("
            right = "]" if chain[4] == "\\le" else ")"
            return chain[3], f"{left}{chain[1]},{chain[5]}{right}"
        match = ONE_SIDED.fullmatch(side)
        if match and not re.search(r"[<>]|\\[lgn]e", match[3]):
            return match[1], half_line(match[2], match[3])
    return "", ""


def turned(text):
    """An inequality read from the right: 7<x is x>7."""
    parts = re.split(r"(<|>|\\le|\\ge)", text)
    swap = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}
    return "".join(swap.get(part, part) for part in reversed(parts))


def half_line(relation, end):
    """The interval of a one-sided inequality."""
    if relation in ("<", "\\le"):
        return f"(-\\infty,{end}" + ("]" if relation == "\\le" else ")")
    return ("[" if relation == "\\ge" else "(") + f"{end},\\infty)"


# From one point to another: nothing else is the same with a bar
SEGMENT = re.compile(r"^\\overline\s*\{\s*([A-Z]'?\s*[A-Z]'?)\s*\}$")


def meat(text):
    r"""Without what introduces it (x \in), approximates it, or bare braces."""
    head, *tail = split_top(text, "\\in")
    if tail and NAME.fullmatch(head):
        text = tail[0]
    head, *tail = split_top(text, "\\approx")
    if not tail or not NAME.fullmatch(head):
        text = head
    elif not has_value(head) or rounds_to(head, tail[0]):
        text = tail[0]
    text = re.sub(r"^\\text(\{[^{}]*\})$", r"\1", text)
    text = SEGMENT.sub(r"\1", text)
    pair = wrapped(text)
    if pair and pair[0] + pair[2] == "{}":
        return text[1:-1].strip()
    return text


def items(text):
    r"""The members of a list, \pm written out; 1,234 is one number."""
    is_one = plain(text) or plain(units(text, plain)[0])
    parts = [text] if is_one else split_top(text, ",")
    signed = []
    for part in parts:
        if re.search(r"\\(?:pm|mp)(?![a-z])", part) and not part.startswith("\\{"):
            signed.append(part.replace("\\pm", "+").replace("\\mp", "-"))
            signed.append(part.replace("\\pm", "-").replace("\\mp", "+"))
        else:
            signed.append(part)
    return [re.sub(r"(^|[=(,])\s*\+", r"\1", part).strip() for part in signed]


def same_list(gold, pred):
    """Lists and sets in any order; 1,2 may also stand for the pair (1,2), in its order."""
    golds, preds = items(gold), items(pred)
    pair = wrapped(gold)
    if len(golds) == 1 and pair and pair[0] == "(":
        return in_order(split_top(pair[1], ","), by_name(preds))
    return in_any_order(members(gold), members(pred))


def by_name(parts):
    """Coordinates in the order of their names, where these are neighbours in the alphabet or differ
    in their index: y=5, x=6 is (6,5). Of other names (n=3, k=2) nobody knows the order: they stay
    as they are written."""
    names = [name_and_sides(part)[0] for part in parts]
    if "" in names:
        return parts
    ordered = " ".join(sorted(names))
    are_letters = ordered in "a b c d e f g h i j k l m n o p q r s t u v w x y z"
    if not are_letters and not re.fullmatch(r"([A-Za-z]_)\d(?: \1\d)*", ordered):
        return parts
    return [part for _, part in sorted(zip(names, parts, strict=True))]


def in_order_of_names(text):
    """(y,x)=(5,6) as (x,y)=(6,5), and (y=5,x=6) in brackets, as `by_name` orders them; any other
    text as it is."""
    if "=" not in text or "(" not in text:
        return text
    sides = split_top(text, "=")
    pairs = [wrapped(side) for side in sides]
    if not all(pairs) or len(sides) > 2 or any(pair[0] + pair[2] != "()" for pair in pairs):
        return text
    parts = [split_top(pair[1], ",") for pair in pairs]
    # Names with their values, or names beside values
    if len(sides) == 1:
        return f"({','.join(by_name(parts[0]))})" if len(parts[0]) > 1 else text
    names, values = parts
    if len(names) != len(values) or not all(
        re.fullmatch(r"[A-Za-z](?:_\w)?", name) for name in names
    ):
        return text
    named = by_name([f"{name}={value}" for name, value in zip(names, values, strict=True)])
    names, values = zip(*(part.split("=", 1) for part in named), strict=True)
    return f"({','.join(names)})=({','.join(values)})"


def members(text):
    """Of a set in braces, or of a list."""
    parts = items(text)
    pair = wrapped(text)
    if len(parts) == 1 and pair and pair[0] == "\\{":
        return items(pair[1])
    return parts


def in_order(golds, preds):
    """Each the same as the other's at its place."""
    return len(golds) == len(preds) and all(map(same, golds, preds))


def in_any_order(golds, preds):
    """Each with a partner of its own, the one that is written alike if there is one."""
    if len(golds) != len(preds):
        return False
    left = list(preds)
    for gold in golds:
        partner = partner_of(gold, left)
        if partner is None:
            return False
        left.remove(partner)
    return True


def partner_of(gold, preds):
    """The first that is written like gold, else the first that is the same; None if there is
    none."""
    for pred in preds:
        if squash(pred) == squash(gold):
            return pred
    for pred in preds:
        if same(gold, pred):
            return pred
    return None


def is_single(pair):
    """Whether brackets hold just one thing: (5), {5}, and those of a matrix."""
    if not pair or len(items(pair[1])) != 1:
        return False
    return pair[0] + pair[2] in ("()", "\\{\\}") or pair[1].startswith("\\begin")


def unwrap(text):
    """Without such brackets."""
    pair = wrapped(text)
    return pair[1] if is_single(pair) else text


def is_union(text):
    r"""Whether \cup stands outside of brackets, and of bars: |A \cup B| is a number."""
    parts = split_top(text, "\\cup")
    return len(parts) > 1 and all(part.count("|") % 2 == 0 for part in parts)


def same_union(gold, pred):
    """Unions of the same parts, in any order."""
    gold, pred = as_union(gold), as_union(pred)
    return in_any_order(split_top(gold, "\\cup"), split_top(pred, "\\cup"))


def as_union(text):
    """With its inequalities as intervals, where it has some."""
    return "\\cup ".join(as_range(part)[1] or part for part in split_top(text, "\\cup"))


def same_shape(gold, pred):
    """Tuples and intervals, sets, matrices, relations; all else by what stands beside the =."""
    g, p = wrapped(gold), wrapped(pred)
    if g and p and "," in g[1] and "," in p[1]:
        if "\\{" in (g[0], p[0]):
            return g[0] == p[0] and in_any_order(items(g[1]), items(p[1]))
        if (g[0], g[2]) != (p[0], p[2]):
            return False
        return in_order(split_top(g[1], ","), split_top(p[1], ","))
    g_rows, p_rows = matrix(gold), matrix(pred)
    if g_rows and p_rows:
        return len(g_rows) == len(p_rows) and all(map(in_order, g_rows, p_rows))
    if g_rows or p_rows or is_relation(gold) or is_relation(pred):
        return by_library(gold, pred)
    return same_sides(gold, pred)


def is_relation(text):
    """Whether an inequality stands outside of brackets, or in some but without an = outside."""
    outside = "".join(token for token, depth in scan(text) if depth == 0)
    return bool(RELATION.search(text if "=" not in outside else outside))


def same_sides(gold, pred):
    """Equations as equations; a value with a name, as in x=5, as the value; the rest as scalars."""
    g_name, g_sides = name_and_sides(gold)
    p_name, p_sides = name_and_sides(pred)
    # What something is, against its value
    if len(g_sides) == 1 and is_quantity(p_sides, g_sides[0]):
        return each_is(gold, p_sides[1:])
    is_turned = len(p_sides) == 2 and not letters(p_sides[0])  # 13 = m+n
    if len(g_sides) == 1 and is_turned and is_quantity(p_sides[::-1], g_sides[0]):
        return g_name in ("", squash(p_sides[1])) and same(gold, p_sides[0])
    if is_total(g_sides) and len(p_sides) == 1:
        return same(g_sides[1], pred)
    # Equations against equations
    names_differ = g_name and p_name and g_name != p_name
    whole = g_name and not p_name and len(p_sides) > 1  # y=-2x against 2x+y=0
    if (len(g_sides) > 1 and not g_name) or names_differ or whole:
        return gold.count("=") == pred.count("=") == 1 and by_library(gold, pred)
    # A named value against a value
    if g_name or p_name or len(p_sides) > 1:
        return each_is(g_sides[-1], p_sides)
    return scalar(gold, pred)


def name_and_sides(text):
    """(name of the value or "", the sides beside it) of an equation, or of what has no =."""
    sides = split_top(text, "=")
    if len(sides) > 1 and NAME.fullmatch(sides[0]) and not has_value(sides[0]):
        return squash(sides[0]), sides[1:]
    return "", sides


# Macros of which numbers make a number; any other is a name, as a letter is
COMPUTED = re.compile(
    r"\\(?:(?:begin|end)\{[a-zA-Z]+\}|(?:frac|sqrt|[dt]?binom|log|ln|lg|exp|sin|cos|tan|cot|sec|csc"
    r"|sinh|cosh|tanh|arc[a-z]+|arg|Re|Im|gcd|lcm|max|min|sup|inf|det|sum|prod|i*int|lim|[bp]?mod"
    r"|[lr](?:floor|ceil)|pi|infty|circ|cdot|times|div|ldots|to|le|ge|ne|in|mid)(?![A-Za-z]))"
)
# Letters that sums, products, limits and extremes bind in their subscript: i=1, x\to 0, 1\le i<j
SUBSCRIPT = re.compile(rf"\\(?:sum|prod|lim|max|min|sup|inf)\s*_\s*({GROUP}|[A-Za-z])")
BINDS = re.compile(
    r"(\\(?:theta|phi|alpha|beta)|[A-Za-z])"
    r"(?=\s*(?:[=<>|,}]|\\(?:le|ge|ne|to|in|mid)(?![a-z])|$))"
)


def bound(text):
    """The letters of a text that its sums, limits and integrals bind."""
    found = set()
    for subscript in SUBSCRIPT.findall(text):
        found.update(BINDS.findall(subscript))
    if "\\int" in text:
        found.update(re.findall(r"d\s*(\\[a-z]+|[A-Za-z])", COMPUTED.sub(" ", text)), "d")
    return found


def has_value(text):
    r"""Whether a text says a value of its own, as \binom{4}{2} or \sum_{i=1}^3 i: it has numbers,
    and no name. \sin\theta, \gcd(a,b), \sum a_k are names."""
    names = re.findall(r"\\text\{[^{}]*\}|\\[A-Za-z]+|[A-Za-z]", COMPUTED.sub(" ", text))
    of_numbers = re.search(r"\d|\\(?:pi|infty)(?![a-z])|\\(?:ln|log)\s*e", text)
    return bool(of_numbers) and set(names) <= {"e", "i"} | bound(text)


def is_quantity(sides, value):
    r"""Whether an equation says what something is: m+n = 13, |S| = 4, P(X=3) = 1/2. Its left side
    has an unknown letter (7 = 5 says nothing of 5, nor does \sum_{i=1}^3 i = 5), and the value
    none."""
    says_what = letters(COMPUTED.sub(" ", sides[0])) - bound(sides[0])
    return len(sides) > 1 and bool(says_what) and not letters(value)


def each_is(gold, sides):
    """Whether each side of an equation is gold. Sums, integrals and limits are worked out there,
    as long as a side says their value."""
    to_work_out = [side for side in sides if TO_WORK_OUT.search(side) and has_value(side)]
    if UNEVALUATED.search(gold) or len(to_work_out) == len(sides):
        to_work_out = []
    for side in sides:
        if side in to_work_out:
            if not works_out_to(gold, side):
                return False
        elif not same(gold, side):
            return False
    return True


def works_out_to(gold, side):
    """Whether a sum, an integral or the like has the value gold."""
    g, p = parse_or_none(gold), parse_or_none(written_out(side))
    if g is None or p is None or not (is_expression(g) and is_expression(p)):
        return False
    return identical(g, p.doit())


SERIES = re.compile(r"(\d{1,9})\s*\+\s*(\d{1,9})((?:\s*\+\s*\d+)*)\s*\+\s*\\ldots\s*\+\s*(\d{1,9})")


def written_out(text):
    r"""The sum of 1+2+\ldots+10 with its sign, where the terms are at equal distances."""
    match = SERIES.fullmatch(text.strip())
    if not match:
        return text
    first, second, last = (int(match[k]) for k in (1, 2, 4))
    terms = [first, second, *map(int, re.findall(r"\d+", match[3]))]
    step = second - first
    is_even = all(term == first + step * k for k, term in enumerate(terms))
    if step <= 0 or not is_even or last <= terms[-1] or (last - first) % step:
        return text
    return f"\\sum_{{k=0}}^{{{(last - first) // step}}} ({first}+{step}k)"


def rounds_to(exact, rounded):
    """Whether a number in decimals is what another is about, to its last place."""
    number = plain(rounded)
    tree = parse_or_none(exact)
    if not number or tree is None or not is_expression(tree):
        return False
    places = len(rounded.partition(".")[2])
    difference = (tree - sympy.Rational(number[0].numerator, number[0].denominator)).evalf(30)
    return bool(difference.is_real and abs(difference) * 10**places <= 1)


def is_total(sides):
    """Whether a truth is the value of something and not the equation of a line or a curve, which
    has coordinates, coefficients or a 0: m+n = 13 is 13, 2x+z = 1 is not 1."""
    if len(sides) != 2 or not plain(sides[1]) or plain(sides[1])[0] == 0:
        return False
    summands = re.fullmatch(r"(?:10*)?[a-w](?:\+(?:10*)?[a-w])+", squash(sides[0]))
    size = re.fullmatch(r"\|[^|]*\||[A-Z]\([^()]*\)|\[[A-Z]+\]|\\mathbb\{E\}.*", squash(sides[0]))
    return bool(summands or size)


def letters(text):
    """The letters of a text that may be unknowns: not macros, \\text, or the constants e and i."""
    return set(re.findall(r"[A-Za-z]", re.sub(r"\\text\{[^{}]*\}|\\[A-Za-z]+", "", text))) - {
        "e",
        "i",
    }


# ==== 5. Scalars ================================================================================


def scalar(gold, pred):
    """One number, word or expression against another."""
    # Units
    g, g_unit = units(gold, plain)
    p, p_unit = units(pred, plain)
    if not one_unit(g_unit, p_unit):
        return False
    # Numbers; a share is no number of centimetres
    g_number, p_number = plain(g), plain(p)
    if g_number and p_number:
        if (g_number[2] and p_unit.measures) or (p_number[2] and g_unit.measures):
            return False
        return same_number(scaled(g_number, g_unit.scale), scaled(p_number, p_unit.scale))
    if g_unit.scale != p_unit.scale:
        return False
    # Words, and expressions
    as_written = re.search(r"\\text|:|\d_", g + "\n" + p)
    if as_written or re.fullmatch(r"[A-Za-z][a-z]{3,}(?: [A-Za-z]+)*|[A-Z]{3,}", g):
        return (
            False  # words, times, numbers in a base, and orders (BCA) are the same as strings only
        )
    if UNEVALUATED.search(p) and not UNEVALUATED.search(g):
        return False  # a sum is not its value
    return by_library(g, p)


# ==== 6. The library ============================================================================

UNEVALUATED = re.compile(r"\\(?:sum|prod|int|lim|ldots|[bp]?mod)(?![a-z])")
TO_WORK_OUT = re.compile(UNEVALUATED.pattern + r"|\\(?:gcd|lcm)(?![a-z])")

# Towers of powers, factorials and binomials that would be written out
TOO_LARGE = re.compile(
    r"\d{1001}|\^\s*\{?[^{}^]*\d{5}|\^\s*\w+\s*\^\s*\w+\s*\^|\^\{[^{}]*\^\{[^{}]*\^|"
    r"\^\s*\{?\(*\d+\}?\s*\^|\^\s*\{\s*\d+\s*\^|\d{5}\s*!|\}\s*!|!\s*[)}]*\s*!|"
    r"\\binom\{?[^{}]*\d{5}|\\binom\{[^{}]*\}\{[^{}]*\d{5}"
)


def load_library():
    """Import sympy and math-verify (seconds); before it nothing here needs them."""
    global latex, math_verify, sympy
    import latex2sympy2_extended.latex2sympy2 as latex
    import math_verify
    import sympy


# The largest of a set
EXTREME = re.compile(r"\\(max|min|gcd|lcm)\s*(?:\\\{|\[)([^{}\[\]]*)(?:\\\}|\])")


def parse(text):
    """A sympy object by math-verify's parser, kept from what it misreads; raises where it cannot
    read it all."""
    text = re.sub(r"(\\int\s*_\s*\w\s*\^\s*)(\d)(?=\s)", r"\1{\2}", text)
    if re.search(r"\d\s+\d", text):
        raise ValueError("two numbers side by side, which the parser adds")
    # names that the parser takes for its own constants
    rename = {"E": r"\Xi ", "I": r"\Upsilon ", r"\gamma": r"\varpi ", r"\prime": "'"}
    text = re.sub(r"\\[A-Za-z]+|[EI]", lambda match: rename.get(match[0], match[0]), text)
    text = text.replace("\\bmod", "\\mod")
    text = EXTREME.sub(r"\\\1(\2)", text)
    # x' is not x
    text = re.sub(r"\^\{?\s*('+)\s*\}?", r"\1", text)
    text = re.sub(r"([A-Za-z])('+)", lambda match: f"{match[1]}_{{9{len(match[2])}}}", text)
    # 2(3) is not 5
    text = re.sub(r"(?<![\d_^.])(\d[\d.]*)\s*\(", r"\1\\cdot(", text)
    text = re.sub(r"\)\s*([\d(])", r")\\cdot \1", text)

    tree = latex.latex2sympy(
        text,
        is_real=True,
        convert_degrees=True,
        normalization_config=None,
        conversion_config=latex.ConversionConfig(lowercase_symbols=False),
    )
    if not is_expression(tree):
        return tree
    # decimals are exact, i is the imaginary unit, an unknown f(x) is a symbol
    exact = {number: sympy.Rational(str(number)) for number in tree.atoms(sympy.Float)}
    tree = tree.xreplace(exact)
    tree = tree.subs({symbol: sympy.I for symbol in tree.free_symbols if symbol.name == "i"})
    calls = tree.atoms(sympy.core.function.AppliedUndef)
    return tree.xreplace({call: sympy.Symbol(str(call)) for call in calls})


def parse_or_none(text):
    """The same; None where it cannot be read, or may be too large to be written out."""
    if TOO_LARGE.search(text):
        return None
    try:
        return parse(text)
    except Exception:  # of a dozen types
        return None


def is_expression(tree):
    """A number or a formula for one."""
    return isinstance(tree, sympy.Expr) and not isinstance(tree, sympy.MatrixExpr)


def by_library(gold, pred):
    """Expressions, equations, inequalities, sets: by math-verify, with what its defaults lack."""
    if TOO_LARGE.search(pred):
        raise Unjudged("too large")
    g, p = parse_or_none(gold), parse_or_none(pred)
    if g is None:
        raise Unjudged("truth unparsable")
    if isinstance(g, sympy.Eq) or isinstance(p, sympy.Eq):
        return type(g) is type(p) and proportional(g.lhs - g.rhs, p.lhs - p.rhs)
    if is_expression(g) and is_expression(p):
        one_is_decimal = bool(re.search(r"\.\d", gold)) != bool(re.search(r"\.\d", pred))
        return identical(g, p, one_is_decimal)
    if p is None:
        return False
    # may 1 < x < 2 stand for (1,2)? Not where that could be a point
    interval = bool(re.search(r"\[|\]|\\infty|\\cup", gold)) and is_solved(pred)
    return bool(math_verify.verify(g, p, allow_set_relation_comp=interval, timeout_seconds=None))


def is_solved(text):
    r"""Whether each inequality of a text has its unknown alone, or in bars, on a side: x^2\le 9 is
    a question, and no answer to it."""
    for part in re.split(r",|\\l(?:or|and)(?![a-z])", text):
        sides = [side.strip() for side in RELATION.split(part)]
        alone = [re.fullmatch(rf"\|?({VARIABLE})\|?", side) for side in sides]
        if len(sides) > 1:
            unknown = next((match[1] for match in alone if match), "")
            if not unknown or any(unknown in side for side in sides if side.strip("|") != unknown):
                return False
    return True


def points(names):
    """Ten times values for the unknowns: exact, of both signs, the same every time."""
    rng = random.Random(0)
    for k in range(10):
        values = {}
        for name in names:
            size = sympy.Rational(rng.randint(20, 300), 97)
            values[name] = size * (rng.choice((1, -1)) if k % 2 else 1)
        yield values


def is_nothing(value):
    """Whether not one digit of a number is known to differ from 0."""
    return all(part == 0 or getattr(part, "_prec", 0) == 1 for part in value.as_real_imag())


def identical(a, b, decimal=False):
    r"""To 30 digits where sampled and gold is real: 1/2004! is not 1/2006!, \sqrt{1/n} is
    1/\sqrt{n}, |x| not x. decimal: one of two numbers is rounded, and `near` will do."""
    if a == b:
        return True
    names = sorted(a.free_symbols | b.free_symbols, key=str)
    seen = 0  # samples that agree; three are wanted
    for values in points(names):
        size = a.subs(values).evalf(30)
        difference = (a.subs(values) - b.subs(values)).evalf(30)
        if not (difference.is_finite and size.is_finite):
            continue
        if names and not a.has(sympy.I) and not is_nothing(size.as_real_imag()[1]):
            continue
        if not is_nothing(difference) and abs(difference) * 10**25 > abs(size):
            return bool(decimal and not names and near(size, size - difference))
        seen += 1 if names else 3
    if seen >= 3:
        return True
    # by its form, where it cannot be sampled
    if not names or a.free_symbols != b.free_symbols:
        return False
    return bool(math_verify.verify(a, b, timeout_seconds=None))


def proportional(f, g):
    """f = 0 and g = 0 are one equation: f is a constant times g."""
    names = sorted(f.free_symbols | g.free_symbols, key=str)
    if not names:
        return False
    for values in points(names):
        f_value, g_value = f.subs(values), g.subs(values)
        if f_value.is_zero is False and g_value.is_zero is False:
            return identical(f * g_value, g * f_value)
    return False
