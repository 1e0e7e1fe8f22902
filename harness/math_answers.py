r"""
Mathematical answers: where a response says its answer, and whether two answers are the same.

    1  the answer in a response    after_thinking, last_box, find_answer
    2  one spelling for one thing  tidy, squash
    3  plain numbers               plain, same_number
    4  structure                   same: lists, sets, tuples, intervals, unions, matrices, equations
    5  units                       scalar: one number, word or expression against another
    6  the library                 by_library: sympy and math-verify, behind guards

Sections 1 to 3 take a time that is bounded by the length of their text: verify.py calls them where
it is called itself. The library may take hours, so that `same` belongs into a process that can be
killed. Answers are strings of LaTeX or of what people type; "gold" is the truth, "pred" what a
response says.
"""

import random
import re
from fractions import Fraction

# ==== 1. The answer in a response ===============================================================


def after_thinking(response):
    """What follows the last </think>; nothing where a <think> is never closed."""
    tail = response.rpartition("</think>")[2]
    if "<think>" in tail:
        return ""
    return tail


BRACES = re.compile(r"\\.|[{}]", re.S)  # \{ and \} are characters, not groups


def last_box(text):
    r"""Content of the last \boxed{} or \fbox{}, by brace matching; "" if it never closes."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return ""
    depth = 0
    for token in BRACES.finditer(text, start + 1):
        if token[0] == "{":
            depth += 1
        elif token[0] == "}":
            depth -= 1
            if depth == 0:
                return text[start : token.start()].partition("{")[2].strip()
    return ""


STYLES = {
    "answer": re.compile(r"(?i)\banswer\s*:[ \t*]*([^\n]+)"),
    "number": re.compile(r"(?<![\w.])-?(?:\d[\d,]*\d|\d)(?:\.\d+)?(?:/\d+)?"),
}


def find_answer(response, style):
    """The answer where the style of the prompt puts it, or "". Styles: boxed, answer (the last
    "Answer:" line), number (the last number)."""
    text = after_thinking(response)
    if style == "boxed":
        found = [last_box(text)]
    else:
        found = STYLES[style].findall(text)
    return found[-1].strip("* ") if found else ""


# ==== 2. One spelling for one thing =============================================================

# fmt: off
UNICODE = {
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "π": r"\pi ", "∞": r"\infty ",
    "°": r"^\circ ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∈": r"\in ",
    "√": r"\sqrt ", "²": "^2", "³": "^3", "½": r"\frac12", "∅": r"\emptyset ", "±": r"\pm ",
    "≈": r"\approx ", "…": r"\ldots ", "％": "%",
}

GROUP = r"\{(?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})*\}"  # braces, four deep

REWRITES = [(re.compile(old), new) for old, new in [
    # digits grouped by {,} and by ,\!
    (r"(?<=\d)(?:\{,\}|,\\!)\s*(?=\d{3})", ""),
    (r"\\(?:left|right)\s*\.", ""),
    # size, spacing, dollar signs
    (r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|limits|phantom)(?![A-Za-z])", ""),
    (r"(?<!\\)\\!|\\?\$|(?<!\\)\\[()\[\]]", ""),
    (r"(?<!\\)\\[,;:> ]|~|\\q?quad(?![A-Za-z])", " "),
    # other names of one macro
    (r"\\[lr]vert(?![A-Za-z])", "|"),
    (r"\\[dtc]frac(?![a-z])", r"\\frac"),
    (r"\\log\s*_\s*(\w)\s+", r"\\log_{\1} "),
    (r"\\(le|ge|ne)q(?:slant)?(?![a-z])", r"\\\1 "),
    (r"\\lt(?![a-z])", "<"),
    (r"\\gt(?![a-z])", ">"),
    (r"<=", r"\\le "),
    (r">=", r"\\ge "),
    (r"!=", r"\\ne "),
    (r"\*\*", "^"),
    (r"\\varnothing(?![a-z])|\\\{\s*\\\}", r"\\emptyset "),
    (r"\\[cld]?dots[cbm]?(?![a-z])|\.\.\.", r"\\ldots "),
    (r"\\%|\bper ?cent(?:age)?\b|\bpct\b|\\text\{\s*percent\s*\}", "%"),
    (r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?\s*(?:[CF](?![A-Za-z]))?", r"^\\circ "),
    # braces where TeX would take one token, or a person writes none
    (r"\^\s*\(([^()]*)\)", r"^{\1}"),
    (r"\^\s*(-\d+)", r"^{\1}"),
    (r"\\?sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"\\(frac|sqrt|d?binom)\s*(\d|\\pi|[A-Za-z](?![A-Za-z]))", r"\\\1{\2}"),
    (rf"(\\(?:frac|binom)\s*{GROUP})\s*(\d|\\pi|[A-Za-z])", r"\1{\2}"),
    # the end of a sentence, the comma that "and" leaves behind one
    (r"[\s.,;]+$", ""),
    (r",\s*,", ","),
    (r"(?<=\d)\s*(?:\^\s*\{?\s*(?:\\prime\s*)+\}?|'+)", r"\\text{prime}"),
]]
# fmt: on

FUNCTIONS = (
    "arcsin arccos arctan arcsec arccsc arccot sinh cosh tanh sin cos tan sec csc cot log ln exp "
    "max min gcd lcm det"
).split()
TEXT = re.compile(
    r"\\(text(?:bf|it|rm|sf|normal)?|mbox|math(?:rm|bf|it|sf)|operatorname\*?)\s*\{([^{}]*)\}"
    r"|,?\s*(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])"
)


def tidy(text):
    """One spelling for spacing, sizing, macros and text."""
    text = "".join(UNICODE.get(char, char) for char in text)
    text = TEXT.sub(tidy_word, text)
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    return text.strip()


def tidy_word(match):
    r"""A match of TEXT: "and" and "or" become a comma, \text{x} the variable x, all else
    \text{..}."""
    macro = match[1]
    inner = (match[2] or "").strip()
    if macro is None or inner.strip(" ,") in ("and", "or"):
        return ","
    if inner in FUNCTIONS and not macro.startswith("text"):
        return f"\\{inner} "
    if len(inner) == 1:
        return f" {inner} "
    return f"\\text{{{inner}}}"


def squash(text):
    """No spaces (but 1 2 is not 12), x_1 for x_{1}."""
    text = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)
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
    r"(?:\\frac\{\s*([+-]?\d+)\s*\}\{\s*(\d+)\s*\}|(?<!\d)([+-]?\d+)/(\d+))"
)


def plain(text):
    """(value, written as a decimal?, percent?) of an integer, decimal, fraction, mixed number or
    a.b x 10^n; None of anything else. The value is a Fraction: nothing is rounded."""
    if len(text) > 1000:
        return None
    percent = text.endswith("%")
    text = text.rstrip("% ")
    text = re.sub(r"\s*(\\times|\\cdot|[*+/^-])\s*", r"\1", text)
    if text.startswith("10^"):
        text = "1*" + text

    found = decimal_value(DECIMAL.fullmatch(text)) or fraction_value(FRACTION.fullmatch(text))
    if found is None:
        return None
    value, decimal = found
    return value, decimal, percent


def decimal_value(match):
    """(value, written with a point or an exponent?) of a match of DECIMAL that has a digit."""
    if not match or not re.search(r"\d", match[2] + (match[3] or "")):
        return None
    whole = re.sub("[ ,]", "", match[2]) or "0"
    exponent = match[4] or match[5] or "0"
    value = Fraction(whole + (match[3] or "").rstrip(".")) * Fraction(10) ** int(
        exponent.strip("{}")
    )
    decimal = bool(match[3] or match[4] or match[5])
    return (-value if match[1] == "-" else value), decimal


def fraction_value(match):
    """(value, False) of a match of FRACTION, unless it divides by 0 or is 1 -2/3."""
    if not match:
        return None
    top = match[3] or match[5]
    bottom = int(match[4] or match[6])
    signed_part = match[2] and top[0] in "+-"
    if bottom == 0 or signed_part:
        return None
    value = int(match[2] or 0) + Fraction(int(top), bottom)
    return (-value if match[1] == "-" else value), False


def near(a, b):
    """To six places and four figures."""
    difference = abs(a - b)
    return difference * 2 * 10**6 <= 1 + 1e-9 and difference * 10**4 <= max(abs(a), abs(b))


def endless(x):
    """Whether a fraction has no last decimal, as 1/3: its denominator has a prime but 2 and 5."""
    return pow(10, x.denominator.bit_length(), x.denominator) != 0


def same_number(gold, pred):
    """Whether two numbers, as `plain` reads them, are one. 28% takes 28%, 28, 0.28; 0.28 takes 28%;
    5 neither 5% nor 500%; 1/3 takes 0.333333, which no decimal can equal."""
    g, g_decimal, g_percent = gold
    p, p_decimal, p_percent = pred
    if g_percent:
        return p == g or (not p_percent and 100 * p == g)
    if p_percent:
        return g.denominator != 1 and p == 100 * g
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
    r"(?:\\?[A-Za-z][\w\\{}',|\s]*(?:\([A-Za-z0-9,\\ ]*\))?"
    r"|\([A-Za-z,\s_{}\d]*[A-Za-z][A-Za-z,\s_{}\d]*\)|\\text\{[^{}]*\}|)"
)
RELATION = re.compile(r"[<>]|\\(?:le|ge|ne)(?![a-z])")


def same(gold, pred):
    """Is pred the answer gold? Both as `tidy` leaves them.

    Compared part by part: lists, sets and unions in any order; tuples, intervals and matrices in
    theirs and with the same brackets; of a chain of = every side has to be right (7=5 is not 5).
    Raises Unjudged.
    """
    if squash(gold) == squash(pred) or same_text(gold, pred):
        return True
    gold, pred = meat(gold), meat(pred)
    if squash(gold) == squash(pred):
        return True
    if re.fullmatch(r"-?\d+,\d{1,2}", pred) and plain(gold) and plain(gold)[1]:
        pred = pred.replace(",", ".")  # a decimal comma

    golds, preds = items(gold), items(pred)
    if len(golds) > 1 or len(preds) > 1:
        return same_list(gold, pred)
    if is_single(wrapped(gold)) or is_single(wrapped(pred)):
        return same(unwrap(gold), unwrap(pred))
    if is_union(gold) or is_union(pred):
        return same_union(gold, pred) or by_library(gold, pred)
    return same_shape(gold, pred)


def same_text(gold, pred):
    r"""Words, where one of the two has \text: whatever the case, with or without it."""
    if "\\text" not in gold + pred:
        return False
    g, p = (squash(re.sub(r"\\text\{([^{}]*)\}", r"\1", text)) for text in (gold, pred))
    return g.strip(".").casefold() == p.strip(".").casefold() != ""


def meat(text):
    r"""Without what introduces it (x \in), approximates it, or bare braces."""
    head, *tail = split_top(text, "\\in")
    if tail and NAME.fullmatch(head):
        text = tail[0]
    head, *tail = split_top(text, "\\approx")
    text = tail[0] if tail and NAME.fullmatch(head) else head
    text = re.sub(r"^\\text(\{[^{}]*\})$", r"\1", text)
    pair = wrapped(text)
    if pair and pair[0] + pair[2] == "{}":
        return text[1:-1].strip()
    return text


def items(text):
    r"""The members of a list, \pm written out; 1,234 is one number."""
    parts = [text] if plain(text) else split_top(text, ",")
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
        return in_order(split_top(pair[1], ","), preds)
    return in_any_order(members(gold), members(pred))


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
    return len(split_top(text, "\\cup")) > 1


def same_union(gold, pred):
    """Unions of the same parts, in any order."""
    return in_any_order(split_top(gold, "\\cup"), split_top(pred, "\\cup"))


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
    if g_rows or p_rows or RELATION.search(gold + pred):
        return by_library(gold, pred)
    return same_sides(gold, pred)


def same_sides(gold, pred):
    """Equations as equations; a value with a name, as in x=5, as the value; the rest as scalars."""
    g_name, g_sides = name_and_sides(gold)
    p_name, p_sides = name_and_sides(pred)
    names_differ = g_name and p_name and g_name != p_name
    whole = g_name and not p_name and len(p_sides) > 1  # y=-2x against 2x+y=0
    if (len(g_sides) > 1 and not g_name) or names_differ or whole:
        return gold.count("=") == pred.count("=") == 1 and by_library(gold, pred)
    if g_name or p_name or len(p_sides) > 1:
        return all(same(g_sides[-1], side) for side in p_sides)
    return scalar(gold, pred)


def name_and_sides(text):
    """(name of the value or "", the sides beside it) of an equation, or of what has no =."""
    sides = split_top(text, "=")
    if len(sides) > 1 and NAME.fullmatch(sides[0]):
        return squash(sides[0]), sides[1:]
    return "", sides


# ==== 5. Units ==================================================================================

# Spellings of one measure in a row; the first of them stands for all
# fmt: off
SPELLINGS = [row.split() for row in [
    "cm centimeter centimeters", "mm millimeter millimeters", "m meter meters metre metres",
    "km kilometer kilometers", "in inch inches", "ft foot feet", "yd yard yards", "mi mile miles",
    "g gram grams", "kg kilogram kilograms", "s sec second seconds", "min minute minutes",
    "h hr hour hours", "day days", "week weeks", "month months", "yr year years",
    "$ dollar dollars usd", "cent cents", "euro euros", "mph", "gallon gallons", "liter liters",
    "acre acres", "lb pound pounds", "2 square sq squared", "3 cubic cu cubed",
    "deg degree degrees", "rad radian radians",
    "unit units point points people way ways student students value values ordered pair pairs "
    "integer integers solution solutions",
]]
# fmt: on
MEASURES = {name: names[0] for names in SPELLINGS for name in names}
UNITS = re.compile(
    r"(.*?)\s*(\^\\circ|(?:\\text\{[^{}\d]*\}(?:\^\{?-?\d+\}?)?\s*)+"
    r"|(?<=[\d}%) ])[a-zA-Z]+(?:\^\{?\d\}?)?(?:\s+[a-zA-Z]+(?:\^\{?\d\}?)?)*)",
    re.S,
)
TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|sec|csc|cot)")


def units(text):
    r"""(what is measured, unit words): 5 cm, 5\text{ cm}^2, 90^\circ."""
    match = UNITS.fullmatch(text)
    if not match or not re.search(r"\d|\\pi", match[1]):
        return text, []
    number, unit = match.groups()
    if unit == "^\\circ" and TRIGONOMETRY.search(number):
        return text, []
    if unit[0] not in "\\^":
        # letters without \text are units behind a plain number, and with a space or two of them
        spaced = re.search(r"\s|[a-z]{2}", unit + text[len(number) : -1])
        if not (plain(number) and spaced):
            return text, []
    words = unit.replace("\\text", "").replace("^\\circ", "degree").lower()
    return number, re.findall(r"[a-z]+|(?<=\^)\d|(?<=\^\{)\d", words)


def measure(unit):
    """What the unit words measure; "unit" itself measures nothing."""
    known = [word for word in unit if word in MEASURES or word.isdigit()]
    return {MEASURES.get(word, word) for word in known} - {"unit"}


def scalar(gold, pred):
    """One number, word or expression against another."""
    g, g_unit = units(gold)
    p, p_unit = units(pred)
    for word in p_unit:
        if word not in MEASURES and word not in g_unit and not word.isdigit():
            return False  # 5 \text{ or so}
    if measure(g_unit) and measure(p_unit) and measure(g_unit) != measure(p_unit):
        return False

    g_number, p_number = plain(g), plain(p)
    if g_number and p_number:
        return same_number(g_number, p_number)
    as_written = re.search(r"\\text|:|\d_", g + "\n" + p)
    if as_written or re.fullmatch(r"[A-Za-z][a-z]{3,}(?: [A-Za-z]+)*", g):
        return False  # words, times and numbers in a base are the same as strings only
    if UNEVALUATED.search(p) and not UNEVALUATED.search(g):
        return False  # a sum is not its value
    return by_library(g, p)


# ==== 6. The library ============================================================================

UNEVALUATED = re.compile(r"\\(?:sum|prod|int|lim|ldots|[bp]?mod)(?![a-z])")

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


def parse(text):
    """A sympy object by math-verify's parser, kept from what it misreads; raises where it cannot
    read it all."""
    if re.search(r"\d\s+\d", text):
        raise ValueError("two numbers side by side, which the parser adds")
    # names that the parser takes for its own constants
    rename = {"E": r"\Xi ", "I": r"\Upsilon ", r"\gamma": r"\varpi ", r"\prime": "'"}
    text = re.sub(r"\\[A-Za-z]+|[EI]", lambda match: rename.get(match[0], match[0]), text)
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
    interval = bool(re.search(r"\[|\]|\\infty|\\cup", gold))
    return bool(math_verify.verify(g, p, allow_set_relation_comp=interval, timeout_seconds=None))


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
