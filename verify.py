r"""Verifiable rewards for math answers, programs and countdown puzzles: 1.0 or 0.0, in time, and for a reason.

    with Verifier(workers=8, timeout=10) as v:
        v.score([(kind, response, truth), ...])      # v.reasons then says of each zero why
    python verify.py FILE.jsonl                      # the same, as a command

Kinds: math (the last \boxed{}), math:answer (the last "Answer:" line), math:number (the last number), code, countdown:
the preset chooses. Reasons: "" (wrong), no answer found, too long, too large, timeout, crashed, truth unparsable;
with a colon ("timeout: worker replaced") they are the verifier's own failures.
Covered: numbers, exactly; expressions, equations, inequalities, intervals, unions, matrices, sets, lists, tuples, \pm,
units, percent, words; truths that are strings, numbers or lists of alternatives; programs as sandbox.py says. What is
not bounded work runs in processes that are killed. Not covered: proofs, sets by a condition, conversion of units,
answers over 400 characters, a <think> that stands in the prompt (pass it along).
Errors: ValueError for an unknown kind; RuntimeError where workers cannot start or code cannot be run safely.
"""
import ast, collections, concurrent.futures, json, logging, operator, os, random, re, resource, select, signal, subprocess, sys, threading, time
from fractions import Fraction

from harness.sandbox import Sandbox, attempt, code_judge

# ==== 1. The answer in a response, and countdown =====================================================================

def after_thinking(response):
    """What follows the last </think>; nothing where a <think> is never closed."""
    tail = response.rpartition("</think>")[2]
    return "" if "<think>" in tail else tail

def last_box(text):
    r"""Content of the last \boxed{} or \fbox{}, by brace matching; "" if it never closes."""
    start, depth = max(text.rfind("\\boxed"), text.rfind("\\fbox")), 0
    for token in re.compile(r"\\.|[{}]", re.S).finditer(text, start + 1) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(token[0], 0)     # \{ and \} are characters, not groups
        if depth == 0 and token[0] == "}": return text[start:token.start()].partition("{")[2].strip()
    return ""

STYLES = {"answer": re.compile(r"(?i)\banswer\s*:[ \t*]*([^\n]+)"),
          "number": re.compile(r"(?<![\w.])-?(?:\d[\d,]*\d|\d)(?:\.\d+)?(?:/\d+)?")}

def find_answer(response, style):
    """The answer where the style of the prompt puts it, or ""."""
    text = after_thinking(response)
    found = [last_box(text)] if style == "boxed" else STYLES[style].findall(text)
    return found[-1].strip("* ") if found else ""

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}

def countdown_value(node, used):
    """Exact value of an expression of + - * / and integers, which are added to `used`; raises for anything else."""
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](countdown_value(node.left, used), countdown_value(node.right, used))
    if isinstance(node, ast.UnaryOp) and type(node.op) is ast.USub:
        return -countdown_value(node.operand, used)
    if not isinstance(node, ast.Constant) or type(node.value) is not int:
        raise ValueError("outside the grammar")
    used.append(node.value)
    return Fraction(node.value)

def countdown_judge(response, puzzle):
    """(reward, reason) of the last <answer>..</answer>, else box, else all after thinking; "= target" may follow."""
    text, used = after_thinking(response), []
    if "<answer>" in text:
        text = text.rpartition("<answer>")[2].partition("</answer>")[0]
    elif "\\boxed" in text:
        text = last_box(text)
    text = re.sub(r"\\times|\\cdot|×", "*", re.sub(r"\\div|÷", "/", text))
    text, equals, right = text.strip().partition("=")
    if not text.strip() or len(text) > 200:             # bounded work, so it is done in the caller
        return 0.0, "too long" if text.strip() else "no answer found"
    if (equals and right.strip() != str(puzzle["target"])) or not re.fullmatch(r"[0-9+\-*/() ]+", text):
        return 0.0, ""
    value = attempt(lambda: countdown_value(ast.parse(text.strip(), mode="eval").body, used))
    return float(value == puzzle["target"] and sorted(used) == sorted(puzzle["numbers"])), ""

# ==== 2. Math: one spelling for one thing ============================================================================

UNICODE = dict(zip("−–×·÷π∞°≤≥≠∪∈√²³½∅±≈…％", r"-,-,\times ,\cdot ,/,\pi ,\infty ,^\circ ,\le ,\ge ,\ne ,\cup ,\in ,"
                   r"\sqrt ,^2,^3,\frac12,\emptyset ,\pm ,\approx ,\ldots ,%".split(",")))
GROUP = r"\{(?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})*\}"                          # braces, four deep
MACROS = "arcsin arccos arctan arcsec arccsc arccot sinh cosh tanh sin cos tan sec csc cot log ln exp max min gcd lcm det"
TEXT = re.compile(r"\\(text(?:bf|it|rm|sf|normal)?|mbox|math(?:rm|bf|it|sf)|operatorname\*?)\s*\{([^{}]*)\}"
                  r"|,?\s*(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])")
REWRITES = [(re.compile(old), new) for old, new in [
    (r"(?<=\d)(?:\{,\}|,\\!)\s*(?=\d{3})", ""), (r"\\(?:left|right)\s*\.", ""),              # 10,\!080 and 10{,}080
    (r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|limits|phantom)(?![A-Za-z])", ""),
    (r"(?<!\\)\\!|\\?\$|(?<!\\)\\[()\[\]]", ""), (r"(?<!\\)\\[,;:> ]|~|\\q?quad(?![A-Za-z])", " "),
    (r"\\[lr]vert(?![A-Za-z])", "|"), (r"\\[dtc]frac(?![a-z])", r"\\frac"), (r"\\log\s*_\s*(\w)\s+", r"\\log_{\1} "),
    (r"\\(le|ge|ne)q(?:slant)?(?![a-z])", r"\\\1 "), (r"\\lt(?![a-z])", "<"), (r"\\gt(?![a-z])", ">"),
    (r"<=", r"\\le "), (r">=", r"\\ge "), (r"!=", r"\\ne "), (r"\*\*", "^"),
    (r"\\varnothing(?![a-z])|\\\{\s*\\\}", r"\\emptyset "), (r"\\[cld]?dots[cbm]?(?![a-z])|\.\.\.", r"\\ldots "),
    (r"\\%|\bper ?cent(?:age)?\b|\bpct\b|\\text\{\s*percent\s*\}", "%"),
    (r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?\s*(?:[CF](?![A-Za-z]))?", r"^\\circ "),
    (r"\^\s*\(([^()]*)\)", r"^{\1}"), (r"\^\s*(-\d+)", r"^{\1}"), (r"\\?sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"\\(frac|sqrt|d?binom)\s*(\d|\\pi|[A-Za-z](?![A-Za-z]))", r"\\\1{\2}"),
    (rf"(\\(?:frac|binom)\s*{GROUP})\s*(\d|\\pi|[A-Za-z])", r"\1{\2}"), (r"[\s.,;]+$", ""), (r",\s*,", ","),
    (r"(?<=\d)\s*(?:\^\s*\{?\s*(?:\\prime\s*)+\}?|'+)", r"\\text{prime}")]]

def tidy(text):
    """One spelling for spacing, sizing, macros and text."""
    def word(match):
        macro, inner = match[1], (match[2] or "").strip()
        if macro is None or inner.strip(" ,") in ("and", "or"): return ","
        if inner in MACROS.split() and not macro.startswith("text"): return f"\\{inner} "
        return f" {inner} " if len(inner) == 1 else f"\\text{{{inner}}}"
    text = TEXT.sub(word, "".join(UNICODE.get(char, char) for char in text))
    for pattern, new in REWRITES: text = pattern.sub(new, text)
    return text.strip()

def squash(text):
    """No spaces (but 1 2 is not 12), x_1 for x_{1}."""
    return re.sub(r"([_^])\{(\w)\}", r"\1\2", re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text))

def scan(text, depth=0):
    """(token, depth of brackets after it) of each token."""
    for token in re.findall(r"\\[A-Za-z]+|\\.|.", text, re.S):
        depth += (token in ("(", "[", "{", "\\{", "\\langle")) - (token in (")", "]", "}", "\\}", "\\rangle"))
        yield token, depth

def split_top(text, separator):
    """Split where the separator stands outside all brackets."""
    parts = "".join("\0" if (token, depth) == (separator, 0) else token for token, depth in scan(text))
    return [part.strip() for part in parts.split("\0")]

def wrapped(text):
    """(open, inside, close) where one pair of brackets, maybe unlike, encloses all; else None."""
    tokens, depths = [*zip(*scan(text))] or ([], [])
    enclosed = len(tokens) > 1 and depths[-1] == 0 < min(depths[:-1])
    return (tokens[0], "".join(tokens[1:-1]).strip(), tokens[-1]) if enclosed else None

MATRIX = re.compile(r"\\begin\{([pbB]?matrix|array)\}(?:\{[clr|]*\})?((?:(?!\\begin).)*)\\end\{\1\}", re.S)

def matrix(text):
    """Its rows of entries, or None."""
    match = MATRIX.fullmatch(text)
    return match and [row.split("&") for row in re.split(r"\\\\(?:\[[^\]]*\])?", match[2]) if row.strip()]

DECIMAL = re.compile(r"([+-]?)(\d{1,3}(?:[, ]\d{3})+|\d*)(\.\d*)?"
                     r"(?:[eE]([+-]?\d{1,3})|(?:\\times|\\cdot|\*)10\^(\{[+-]?\d{1,3}\}|\d))?")
FRACTION = re.compile(r"([+-]?)(?:(\d+)\s*)??(?:\\frac\{\s*([+-]?\d+)\s*\}\{\s*(\d+)\s*\}|(?<!\d)([+-]?\d+)/(\d+))")

def plain(text):
    """(value, written as a decimal?, percent?) of an integer, decimal, fraction, mixed number or a.b x 10^n."""
    percent, text = text.endswith("%"), text.rstrip("% ") if len(text) <= 1000 else ""
    text = re.sub(r"\s*(\\times|\\cdot|[*+/^-])\s*", r"\1", text)
    if (m := DECIMAL.fullmatch("1*" * text.startswith("10^") + text)) and re.search(r"\d", m[2] + (m[3] or "")):
        digits = (re.sub("[ ,]", "", m[2]) or "0") + (m[3] or "").rstrip(".")
        value = Fraction(digits) * Fraction(10) ** int((m[4] or m[5] or "0").strip("{}"))
    elif (m := FRACTION.fullmatch(text)) and int(m[4] or m[6]) and not (m[2] and (m[3] or m[5])[0] in "+-"):
        value = int(m[2] or 0) + Fraction(int(m[3] or m[5]), int(m[4] or m[6]))
    else:
        return None
    return (-value if m[1] == "-" else value), m.re is DECIMAL and bool(m[3] or m[4] or m[5]), percent

def near(a, b):
    """To six places and four figures."""
    return abs(a - b) * 2 * 10**6 <= 1 + 1e-9 and abs(a - b) * 10**4 <= max(abs(a), abs(b))

def same_number(gold, pred):
    """28% takes 28%, 28, 0.28; 0.28 takes 28%; 5 neither 5% nor 500%; 1/3 takes 0.333333."""
    (g, g_decimal, g_percent), (p, p_decimal, p_percent) = gold, pred
    if g_percent: return p == g or (not p_percent and 100 * p == g)
    if p_percent: return g.denominator != 1 and p == 100 * g
    endless = lambda x: pow(10, x.denominator.bit_length(), x.denominator) != 0
    return g == p or (((p_decimal and endless(g)) or (g_decimal and endless(p))) and near(g, p))

# ==== 3. Math: comparing two answers =================================================================================

class Unjudged(Exception):
    """Its reason: "truth unparsable", or "too large" for what could take minutes or gigabytes to write out."""

NAME = re.compile(r"(?!.*\\(?:frac|sqrt|pi|sum|int|prod|infty))(?:\\?[A-Za-z][\w\\{}',|\s]*(?:\([A-Za-z0-9,\\ ]*\))?"
                  r"|\([A-Za-z,\s_{}\d]*[A-Za-z][A-Za-z,\s_{}\d]*\)|\\text\{[^{}]*\}|)")
RELATION = re.compile(r"[<>]|\\(?:le|ge|ne)(?![a-z])")
UNEVALUATED = re.compile(r"\\(?:sum|prod|int|lim|ldots|[bp]?mod)(?![a-z])")
TOO_LARGE = re.compile(r"\d{1001}|\^\s*\{?[^{}^]*\d{5}|\^\s*\w+\s*\^\s*\w+\s*\^|\^\{[^{}]*\^\{[^{}]*\^|"
                       r"\^\s*\{?\(*\d+\}?\s*\^|\^\s*\{\s*\d+\s*\^|\d{5}\s*!|\}\s*!|!\s*[)}]*\s*!|"
                       r"\\binom\{?[^{}]*\d{5}|\\binom\{[^{}]*\}\{[^{}]*\d{5}")
MEASURES = {name: names[0] for names in map(str.split, """cm centimeter centimeters|mm millimeter millimeters|m meter
    meters metre metres|km kilometer kilometers|in inch inches|ft foot feet|yd yard yards|mi mile miles|g gram grams|kg
    kilogram kilograms|s sec second seconds|min minute minutes|h hr hour hours|day days|week weeks|month months|yr year
    years|$ dollar dollars usd|cent cents|euro euros|mph|gallon gallons|liter liters|acre acres|lb pound pounds|2 square
    sq squared|3 cubic cu cubed|deg degree degrees|rad radian radians|unit units point points people way ways student
    students value values ordered pair pairs integer integers solution solutions""".split("|")) for name in names}

def same(gold, pred):
    """Is pred the answer gold? Compared part by part: lists, sets and unions in any order; tuples, intervals
    and matrices in theirs and with the same brackets; of a chain of = every side has to be right (7=5 is not 5)."""
    unwrap = lambda text: squash(re.sub(r"\\text\{([^{}]*)\}", r"\1", text)).strip(".").casefold()
    if squash(gold) == squash(pred) or ("\\text" in gold + pred and unwrap(gold) == unwrap(pred) != ""):
        return True
    if squash(gold := meat(gold)) == squash(pred := meat(pred)): return True
    if re.fullmatch(r"-?\d+,\d{1,2}", pred) and plain(gold) and plain(gold)[1]:         # a decimal comma
        pred = pred.replace(",", ".")
    golds, preds, g, p = items(gold), items(pred), wrapped(gold), wrapped(pred)
    if len(golds) == 1 < len(preds) and g and g[0] == "(":                              # 1,2 for the pair (1,2)
        return in_order(split_top(g[1], ","), preds)
    if len(golds) > 1 or len(preds) > 1:
        members = lambda parts, w: items(w[1]) if len(parts) == 1 and w and w[0] == "\\{" else parts
        return in_any_order(members(golds, g), members(preds, p))
    single = lambda w: w and len(items(w[1])) == 1 and (w[0] + w[2] in ("()", "\\{\\}") or w[1].startswith("\\begin"))
    if single(g) or single(p):                                                          # no structure around one thing
        return same(g[1] if single(g) else gold, p[1] if single(p) else pred)
    parts, rows = (split_top(gold, "\\cup"), split_top(pred, "\\cup")), (matrix(gold), matrix(pred))
    if (union := max(map(len, parts)) > 1) and in_any_order(*parts): return True
    if g and p and not union and "," in g[1] and "," in p[1]:
        if "\\{" in (g[0], p[0]): return g[0] == p[0] and in_any_order(items(g[1]), items(p[1]))
        return (g[0], g[2]) == (p[0], p[2]) and in_order(split_top(g[1], ","), split_top(p[1], ","))
    if all(rows): return len(rows[0]) == len(rows[1]) and all(map(in_order, *rows))
    return by_library(gold, pred) if union or any(rows) or RELATION.search(gold + pred) else same_sides(gold, pred)

def same_sides(gold, pred):
    """Equations as equations; a value with a name, as in x=5, as the value; what has no = as one thing."""
    g_sides, p_sides = split_top(gold, "="), split_top(pred, "=")
    named = lambda sides: squash(sides.pop(0)) if len(sides) > 1 and NAME.fullmatch(sides[0]) else ""
    g_name, p_name = named(g_sides), named(p_sides)
    whole = g_name and not p_name and len(p_sides) > 1
    if (len(g_sides) > 1 and not g_name) or (g_name and p_name and g_name != p_name) or whole:
        return gold.count("=") == pred.count("=") == 1 and by_library(gold, pred)
    if g_name or p_name or len(p_sides) > 1: return all(same(g_sides[-1], side) for side in p_sides)
    return scalar(gold, pred)

def meat(text):
    r"""Without what introduces it (x \in), approximates it, or bare braces."""
    head, *tail = split_top(text, "\\in")
    head, *tail = split_top(tail[0] if tail and NAME.fullmatch(head) else text, "\\approx")
    text = re.sub(r"^\\text(\{[^{}]*\})$", r"\1", tail[0] if tail and NAME.fullmatch(head) else head)
    return text[1:-1].strip() if (w := wrapped(text)) and w[0] + w[2] == "{}" else text

def items(text):
    r"""The members of a list, \pm written out; 1,234 is one number."""
    signed = []
    for part in [text] if plain(text) else split_top(text, ","):
        twice = re.search(r"\\(?:pm|mp)(?![a-z])", part) and not part.startswith("\\{")
        signed += [part.replace("\\pm", s).replace("\\mp", t) for s, t in ("+-", "-+")] if twice else [part]
    return [re.sub(r"(^|[=(,])\s*\+", r"\1", part).strip() for part in signed]

def in_order(golds, preds):
    """Each the same as the other's at its place."""
    return len(golds) == len(preds) and all(map(same, golds, preds))

def in_any_order(golds, preds):
    """Each with a partner of its own, the one that is written alike if there is one."""
    left = list(preds)
    for gold in golds if len(golds) == len(preds) else ():
        alike = (pred for pred in left if squash(pred) == squash(gold))
        found = next(alike, None) or next((pred for pred in left if same(gold, pred)), None)
        if found is None: return False
        left.remove(found)
    return len(golds) == len(preds)

UNITS = re.compile(r"(.*?)\s*(\^\\circ|(?:\\text\{[^{}\d]*\}(?:\^\{?-?\d+\}?)?\s*)+"
                   r"|(?<=[\d}%) ])[a-zA-Z]+(?:\^\{?\d\}?)?(?:\s+[a-zA-Z]+(?:\^\{?\d\}?)?)*)", re.S)

def units(text):
    r"""(what is measured, unit words): 5 cm, 5\text{ cm}^2, 90^\circ."""
    match = UNITS.fullmatch(text)
    if not match or not re.search(r"\d|\\pi", match[1]): return text, []
    number, unit = match.groups()
    if unit == "^\\circ" and re.search(r"\\(?:sin|cos|tan|sec|csc|cot)", number): return text, []
    if unit[0] not in "\\^" and not (plain(number) and re.search(r"\s|[a-z]{2}", unit + text[len(number):-1])):
        return text, []
    words = unit.replace("\\text", "").replace("^\\circ", "degree").lower()
    return number, re.findall(r"[a-z]+|(?<=\^)\d|(?<=\^\{)\d", words)

def scalar(gold, pred):
    """One number, word or expression against another."""
    (g, g_unit), (p, p_unit) = units(gold), units(pred)
    if any(not (word in MEASURES or word in g_unit or word.isdigit()) for word in p_unit):      # "5 \text{ or so}"
        return False
    measure = lambda unit: {MEASURES.get(word, word) for word in unit if word in MEASURES or word.isdigit()} - {"unit"}
    if measure(g_unit) and measure(p_unit) and measure(g_unit) != measure(p_unit): return False
    if plain(g) and plain(p): return same_number(plain(g), plain(p))
    if re.search(r"\\text|:|\d_", g + "\n" + p) or re.fullmatch(r"[A-Za-z][a-z]{3,}(?: [A-Za-z]+)*", g):
        return False                                                                    # these as strings only
    return bool(UNEVALUATED.search(g) or not UNEVALUATED.search(p)) and by_library(g, p)  # a sum is not its value

# ==== 4. Math: the library ===========================================================================================

def parse(text):
    """A sympy object by math-verify's parser, kept from what it misreads; raises where it cannot read it all."""
    if re.search(r"\d\s+\d", text): raise ValueError("two numbers side by side, which the parser adds")
    rename = {"E": r"\Xi ", "I": r"\Upsilon ", r"\gamma": r"\varpi ", r"\prime": "'"}   # its own names
    text = re.sub(r"\\[A-Za-z]+|[EI]", lambda m: rename.get(m[0], m[0]), text)
    text = re.sub(r"\^\{?\s*('+)\s*\}?", r"\1", text)
    text = re.sub(r"([A-Za-z])('+)", lambda m: f"{m[1]}_{{9{len(m[2])}}}", text)        # x' is not x
    text = re.sub(r"(?<![\d_^.])(\d[\d.]*)\s*\(", r"\1\\cdot(", text)                   # 2(3) is not 5
    text = re.sub(r"\)\s*([\d(])", r")\\cdot \1", text)
    tree = latex.latex2sympy(text, is_real=True, convert_degrees=True, normalization_config=None,
                             conversion_config=latex.ConversionConfig(lowercase_symbols=False))
    if not is_expression(tree): return tree
    tree = tree.xreplace({number: sympy.Rational(str(number)) for number in tree.atoms(sympy.Float)})
    tree = tree.subs({symbol: sympy.I for symbol in tree.free_symbols if symbol.name == "i"})
    return tree.xreplace({call: sympy.Symbol(str(call)) for call in tree.atoms(sympy.core.function.AppliedUndef)})

def is_expression(tree):
    """A number or a formula for one."""
    return isinstance(tree, sympy.Expr) and not isinstance(tree, sympy.MatrixExpr)

def by_library(gold, pred):
    """Expressions, equations, inequalities, sets: by math-verify, behind guards, with what its defaults lack."""
    if TOO_LARGE.search(pred): raise Unjudged("too large")
    g, p = None if TOO_LARGE.search(gold) else attempt(parse, gold), attempt(parse, pred)
    if g is None: raise Unjudged("truth unparsable")
    if isinstance(g, sympy.Eq) or isinstance(p, sympy.Eq):
        return type(g) is type(p) and proportional(g.lhs - g.rhs, p.lhs - p.rhs)
    if is_expression(g) and is_expression(p):
        return identical(g, p, bool(re.search(r"\.\d", gold)) != bool(re.search(r"\.\d", pred)))
    interval = bool(re.search(r"\[|\]|\\infty|\\cup", gold))    # not a point (1,2): may 1 < x < 2 stand for it?
    return p is not None and bool(math_verify.verify(g, p, allow_set_relation_comp=interval, timeout_seconds=None))

def points(names):
    """Values for the unknowns: exact, of both signs, the same every time."""
    rng = random.Random(0)
    for k in range(10):
        yield {name: sympy.Rational(rng.randint(20, 300), 97) * (rng.choice((1, -1)) if k % 2 else 1) for name in names}

def identical(a, b, decimal=False):
    r"""To 30 digits where sampled and gold is real: 1/2004! is not 1/2006!, \sqrt{1/n} is 1/\sqrt{n}, |x| not x."""
    names, seen = sorted(a.free_symbols | b.free_symbols, key=str), 0
    nothing = lambda v: all(part == 0 or getattr(part, "_prec", 0) == 1 for part in v.as_real_imag())   # no digit of it
    for values in points(names) if a != b else ():
        difference, size = (a.subs(values) - b.subs(values)).evalf(30), a.subs(values).evalf(30)
        if not (difference.is_finite and size.is_finite): continue
        if names and not a.has(sympy.I) and not nothing(size.as_real_imag()[1]): continue
        if not nothing(difference) and abs(difference) * 10**25 > abs(size):
            return bool(decimal and not names and near(size, size - difference))
        seen += 1 if names else 3
    by_form = names and a.free_symbols == b.free_symbols        # by its form, where it cannot be sampled
    return a == b or seen >= 3 or bool(by_form and math_verify.verify(a, b, timeout_seconds=None))

def proportional(f, g):
    """f = 0 and g = 0 are one equation: f is a constant times g."""
    names = sorted(f.free_symbols | g.free_symbols, key=str)
    for f_value, g_value in ((f.subs(values), g.subs(values)) for values in points(names) if values):
        if f_value.is_zero is False and g_value.is_zero is False: return identical(f * g_value, g * f_value)
    return False

def math_judge(response, answer, style="boxed", quick=False):
    """(reward, reason). A list of truths holds alternatives; quick: None where plain numbers do not settle it."""
    texts = [str(a) for a in (answer if isinstance(answer, (list, tuple)) else [answer]) if a is not None]
    golds, pred, reasons = [t for t in (tidy(last_box(a) or a) for a in texts) if t], find_answer(response, style), []
    if not golds or not pred: return 0.0, "no answer found" if golds else "truth unparsable"
    if len(pred) > max(400, 2 * max(map(len, golds))): return 0.0, "too long"
    if quick and not (len(pred) <= 60 and plain(tidy(pred)) and all(map(plain, golds))): return None
    for gold in golds:
        try:
            if same(gold, tidy(pred)): return 1.0, ""
        except Unjudged as why:
            reasons.append(str(why))
    return 0.0, reasons[0] if len(reasons) == len(golds) else ""        # a wrong answer where any truth could be read

# ==== 5. The pool ====================================================================================================

def judge(kind, response, truth, sandbox=None, timeout=None, quick=False):
    """(reward, reason), here and now; with quick, None where it is work for a worker. ValueError: an unknown kind."""
    name, _, style = kind.partition(":")
    if name == "countdown": return attempt(countdown_judge, response, truth) or (0.0, "truth unparsable")
    if name == "math" and style in ("", "boxed", "answer", "number"):
        return math_judge(response, truth, style or "boxed", quick)
    if name == "code":
        return None if quick else code_judge(after_thinking(response), truth, sandbox, timeout)
    raise ValueError(f"unknown kind {kind!r}: expected math, math:answer, math:number, code or countdown")

def worker_main(role, timeout, mode):
    """Answer each JSON line with [reward, reason]; ends when the parent closes the pipe or dies, hung or not."""
    global latex, math_verify, sympy
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.disable(logging.CRITICAL)
    reply, sandbox, timeout = os.fdopen(os.dup(1), "w", buffering=1), None, float(timeout)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)        # what a library prints is no reply
    try:
        if role == "code":
            sandbox = Sandbox(mode)
        else:
            import sympy, math_verify, latex2sympy2_extended.latex2sympy2 as latex
            resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
            same("x+1", "1+x")                          # what the first item would wait for
    except OSError as error:
        return print(json.dumps(["refused", str(error)]), file=reply)
    print(json.dumps(["ready", [sandbox.mode, sandbox.why] if sandbox else ["", ""]]), file=reply)
    os.dup2(1, 2)                                       # from here on nothing of an item reaches the caller's log
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, timeout + 5)      # the kernel ends an orphan that hangs
        try:
            result = judge(*json.loads(line), sandbox, timeout)
        except Exception as error:
            result = 0.0, f"crashed: {type(error).__name__}"
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(result), file=reply)

class Verifier:
    """Workers that can be killed. sandbox: "auto", "namespaces", "landlock", or "unsafe" for resource limits only.
    Every item gets its reward within its timeout plus 0.5 s; see the top for what is covered and raised."""
    warned = ""                                         # the mode that was warned of: once a process

    def __init__(self, workers=2, timeout=10.0, sandbox="auto"):
        self.timeout, self.sandbox, self.live, self.mine, self.results = timeout, sandbox, set(), threading.local(), []
        self.pool = concurrent.futures.ThreadPoolExecutor(workers)      # a thread for each worker, to wait on it
        self.front = concurrent.futures.ThreadPoolExecutor(1)           # and one that hands out

    def submit(self, items):
        """A future of [(reward, reason)] of items (kind, response, truth), while the caller goes on."""
        return self.front.submit(self.judge_all, items)

    def judge_all(self, items):
        """Bounded items are scored here; the workers begin with the others, which are then waited for."""
        self.results = [judge(*item, quick=True) or self.pool.submit(self.give, item) for item in items]
        return [result if isinstance(result, tuple) else result.result() for result in self.results]

    def score(self, items):
        """The rewards in order; .reasons stand beside them."""
        done = self.submit(items).result()
        self.reasons = [reason for _, reason in done]
        return [reward for reward, _ in done]

    def give(self, item):
        """In a thread: to its worker, which is killed when it is late and started when needed."""
        role = item[0].partition(":")[0]
        worker = getattr(self.mine, role, None) or self.spawn(role)
        try:
            line = json.dumps(item, default=str) + "\n"
            return tuple(self.ask(worker, line, self.timeout + 0.25 * (role == "code")))
        except (TimeoutError, OSError) as error:
            worker.kill()
            worker.wait()
            worker.stdout.close()
            attempt(worker.stdin.close)
            self.live.discard(worker)
            delattr(self.mine, role)
            return 0.0, ("timeout" if isinstance(error, TimeoutError) else "crashed") + ": worker replaced"

    def ask(self, worker, line, seconds):
        """A worker's answer to a line. TimeoutError when it is late, BrokenPipeError where it died."""
        worker.stdin.write(line)
        worker.stdin.flush()
        if not select.select([worker.stdout], [], [], seconds)[0]: raise TimeoutError
        if not (answer := worker.stdout.readline()).endswith("\n"): raise BrokenPipeError
        return json.loads(answer)

    def spawn(self, role):
        """A worker in its own session; it imports this file alone, never the caller's main module or torch."""
        env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "LD_"))}
        env |= {"SYMPY_GROUND_TYPES": "python", "PYTHONHASHSEED": "0"}      # gmpy2 would not be interrupted
        command = [sys.executable, os.path.abspath(__file__), "--worker", role, str(self.timeout), self.sandbox]
        worker = subprocess.Popen(command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        self.live.add(worker)
        state, said = attempt(self.ask, worker, "", 60) or ("dead", "")
        if state == "dead":
            raise RuntimeError("a verifier worker cannot start; to see why: " + " ".join(command))
        if state == "refused":
            raise RuntimeError(f'code cannot be run safely here ({said}); sandbox="unsafe" runs it all the same, '
                               "with resource limits only")
        mode, why = said
        if mode not in ("", "namespaces", Verifier.warned):
            Verifier.warned = mode
            print(f"verify: warning: programs run under {mode}" + f", because {why}" * bool(why), file=sys.stderr)
        setattr(self.mine, role, worker)
        return worker

    def close(self):
        """End the workers, whatever they are doing."""
        self.front.shutdown(wait=False, cancel_futures=True)
        self.pool.shutdown(wait=False, cancel_futures=True)
        for worker in list(self.live):
            worker.kill()
            worker.wait()

    __enter__, __exit__ = lambda self: self, lambda self, *_: self.close()

ONE = Verifier(workers=1)

def math_reward(response, answer):
    """1.0 where the last box holds the answer, as the top of this file covers; RuntimeError without a worker."""
    return ONE.score([("math", response, answer)])[0]

def code_reward(response, tests):
    """1.0 where the last Python block passes all tests, as sandbox.py covers; RuntimeError where that is not safe."""
    return ONE.score([("code", response, tests)])[0]

def countdown_reward(response, puzzle):
    """1.0 where the numbers, each used once by + - * /, make the target. No other operator is covered."""
    return ONE.score([("countdown", response, puzzle)])[0]

def main(path):
    """A line of output an item, then how many were right and why the others were not."""
    items = [(row["kind"], row["response"], row["truth"]) for row in map(json.loads, open(path))]
    start, n, v = time.monotonic(), len(items), Verifier(os.cpu_count())
    verdicts = v.submit(items)
    while not verdicts.done():
        done = sum(isinstance(result, tuple) or result.done() for result in v.results)
        print(f"\r{done:>7}/{n} [{'#' * (40 * done // n):40}]", end="", file=sys.stderr)
        time.sleep(0.1)
    rewards, reasons = [reward for reward, _ in verdicts.result()], [reason for _, reason in verdicts.result()]
    seconds = time.monotonic() - start
    for i, (reward, reason) in enumerate(zip(rewards, reasons)):
        print(f"{i:>7} {items[i][0]:<12} {reward:.0f} {reason}")
    why = collections.Counter(reason or "wrong" for reward, reason in zip(rewards, reasons) if not reward)
    print(f"\n{n} items, {sum(rewards):.0f} right, {n / seconds:.0f} a second; "
          + ", ".join(f"{count} {reason}" for reason, count in why.most_common()), file=sys.stderr)

if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker_main(*sys.argv[2:])
    elif len(sys.argv) == 2:
        main(sys.argv[1])
    else:
        sys.exit("usage: python verify.py FILE.jsonl")
