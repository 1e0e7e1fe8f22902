r"""
Units and words behind a number: 5 cm, 5\text{ cm}^2, 90^\circ, 18\text{ apples}, 3.2\text{ m/s}^2.

A number with a unit is the bare number, whichever of the two is the truth. A number of one thing is
not the number of another: where both say a unit, the units have to be one. What is behind a number
and is no unit (or, not, if, more, wrong) makes it another answer.
"""

import re
from fractions import Fraction
from typing import NamedTuple

# Spellings of one measure in a row; the first of them stands for all
# fmt: off
SPELLINGS = [row.split() for row in [
    "cm centimeter centimeters centimetre centimetres", "mm millimeter millimeters millimetre",
    "m meter meters metre metres", "km kilometer kilometers kilometre kilometres kms",
    "nm nanometer nanometers", "in inch inches", "ft foot feet", "yd yard yards",
    "mi mile miles", "au", "ly", "pc parsec parsecs", "angstrom angstroms",
    "g gram grams gm gms", "kg kilogram kilograms kgs", "mg milligram milligrams",
    "lb pound pounds lbs", "oz ounce ounces", "ton tons tonne tonnes",
    "s sec second seconds secs", "ms millisecond milliseconds", "min minute minutes mins",
    "h hr hour hours hrs", "day days", "week weeks", "month months", "yr year years yrs",
    "dollar dollars usd buck bucks", "cent cents", "euro euros eur", "sterling gbp", "yen jpy",
    "L liter liters litre litres l", "ml milliliter milliliters millilitre", "gallon gallons gal",
    "quart quarts", "pint pints", "acre acres", "hectare hectares ha",
    "degree degrees deg", "rad radian radians",
    "N newton newtons", "J joule joules", "W watt watts", "Pa pascal pascals", "V volt volts",
    "A ampere amperes amp amps", "K kelvin kelvins", "C coulomb coulombs", "F farad farads",
    "T tesla teslas", "H henry henries", "ohm ohms Ω", "hz hertz", "mol mole moles",
    "kw kilowatt kilowatts", "kwh", "kj kilojoule kilojoules", "mev", "ev", "kev", "gev",
    "cal calorie calories", "kcal", "kpa", "atm", "bar", "mmhg", "khz", "mhz", "ghz",
    "erg ergs", "dyne dynes", "rpm", "bit bits", "byte bytes", "db",
    "yuan cny rmb", "won krw", "ruble rubles rouble roubles", "baht", "dong", "lira liras", "naira",
    "peso pesos", "shekel shekels", "hryvnia hryvnias", "kr krona kronor krone kroner",
    "unit units", "celsius", "fahrenheit", "rupee rupees inr rs", "microm micrometer micrometers",
    "micros microsecond microseconds", "microg microgram micrograms",
]]
# fmt: on
MEASURES = {name: names[0] for names in SPELLINGS for name in names}
COMPOUND = {"mph": ("mi", "/h"), "kph": ("km", "/h"), "kmh": ("km", "/h"), "mps": ("m", "/s")}
POWERS = {"square": "2", "sq": "2", "squared": "2", "cubic": "3", "cu": "3", "cubed": "3"}
SCALES = {
    "dozen": 12,
    "hundred": 10**2,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
# Words that may stand beside a unit and say nothing
FILLERS = set(
    "of the a an in total altogether left remaining each long wide high tall deep away old "
    "different distinct possible whole full from more fewer additional extra".split()
)
# Those of them that may stand alone: 18 left; 18 more is a difference
ALONE = set(
    "left remaining total altogether overall combined together each apiece long wide high tall "
    "deep old away different distinct possible whole".split()
)
FILLERS |= ALONE
IN_TOTAL = re.compile(r"(?i)\bin\s+(?:total|all|sum)\b")
BEYOND_THE_HEAD = ("of", "in", "from")  # pieces of candy are pieces
# Words that make another answer of a number: what denies, doubts or compares it, asks a condition,
# computes with it, or makes a sentence of it. These are closed classes of words: no noun is missing
# here
OTHERS = set(
    # denied or doubted
    "not no none nor never neither either wrong right correct incorrect invalid impossible false "
    "true yes unknown unsure unclear undefined undetermined indeterminate infinity infinite "
    "maybe possibly perhaps probably presumably likely unlikely supposedly approximately roughly "
    "approx circa almost nearly exactly precisely about around error guess nothing something "
    # compared
    "less than least most over under above below up down beyond near at between among within "
    "only both but except without instead otherwise rather unlike like as so too enough "
    # on a condition, at a time, for a reason
    "if when where while unless until till because since although though whereas whether for by "
    "before after during once then thus hence therefore otherwise given assuming provided "
    # of a sentence
    "is are was were be been being am has have had having do does did done can cannot could may "
    "might must shall should will would isn't aren't wasn't doesn't don't didn't can't won't "
    "i you he she it we they me him us them this that these those who whom whose which what why "
    "how there here some any all every and or also even just still yet again to on into onto upon "
    "off out with through via toward towards "
    # computed with
    "plus minus divided multiplied added subtracted mod modulo base factorial choose percent half "
    "halves third thirds quarter double triple twice thrice score remainder negative positive "
    "sin cos tan log exp sqrt cot csc "
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety "
    "ones twos threes fours fives tens hundreds thousands millions billions trillions zero "
    "dozens gross myriad myriads lakh lakhs crore crores mil mils doubled tripled halved ish "
    "tenth tenths hundredth hundredths thousandth thousandths millionth millionths fourth fourths "
    "fifth fifths sixth sixths seventh sevenths eighth eighths ninth ninths twelfth twelfths "
    # of the answer itself
    "answer option choice".split()
)
IRREGULAR = {
    "men": "man",
    "women": "woman",
    "children": "child",
    "people": "person",
    "mice": "mouse",
    "geese": "goose",
    "teeth": "tooth",
    "leaves": "leaf",
    "loaves": "loaf",
    "knives": "knife",
    "shelves": "shelf",
    "pence": "penny",
}

POWER = r"(?:\^\{?-?\d+\}?)?"
IN_TEXT = rf"\\text\{{[^{{}}]*\}}{POWER}"
BARE = rf"[A-Za-z]+{POWER}"
UNITS = re.compile(
    r"(.*?)\s*("
    rf"\^\\circ(?:\s*{IN_TEXT})?"
    rf"|{IN_TEXT}(?:\s*(?:/|\\cdot\b|\*)?\s*{IN_TEXT})*\s*"
    rf"|(?<=[\d}}%) ]){BARE}(?:\s*(?:/|\\cdot\b|\s)\s*{BARE})*)",
    re.S,
)
TEXT_RATIO = re.compile(rf"\\frac\{{\s*({IN_TEXT})\s*\}}\{{\s*({IN_TEXT})\s*\}}")
TOKENS = re.compile(r"/\s*\(|/|\^-?\d+|[A-Za-zΩ]+\d?(?![A-Za-z\d])\.?|\S")
OHMS = re.compile(r"(?<=\d)\s*(?:\\text\{\s*([kMGm])\s*\}|([kMGm]))?\s*\\Omega$")
MICRO = re.compile(
    r"(?<=\d)\s*(?:\\mu|[μµ])\s*(?:\\text\{\s*([A-Za-z]+)\s*\}|([A-Za-z])(?![A-Za-z]))$"
)
# Symbols with a prefix, of which m and M are two: mW and MW
PREFIXED = re.compile(r"[TGMkmnpf](?:W|Wh|Pa|Hz|g|J|eV|V|A|N|ohm|F|C|T|L|l|B|bar|mol|m|s)")
TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|sec|csc|cot)")
SINGLE = set("NJWVK")  # letters that are units without \text, behind a number and a space


class Unit(NamedTuple):
    """What is behind a number: what it measures (cm2, /s), other words (red, apple), the one of
    them that is counted (apple), and what the number is multiplied by (million)."""

    measures: frozenset
    words: frozenset
    head: str
    scale: int


NOTHING = Unit(frozenset(), frozenset(), "", 1)


def units(text, is_number):
    r"""(the number, its Unit) of a tidy text; (text, NOTHING) where it has none. is_number says
    whether a text is a plain number: letters without \text are a unit behind such a one only."""
    text = TEXT_RATIO.sub(r"\1/\2", text)
    text = OHMS.sub(r"\\text{\1\2ohm}", text)
    text = MICRO.sub(r"\\text{micro\1\2}", text)
    # What is behind the number
    match = UNITS.fullmatch(text)
    if not match or not re.search(r"\d|\\pi", match[1]):
        return text, NOTHING
    number, written = match.groups()
    # A unit without \text is one under conditions
    in_text = written[0] in "\\^"
    if written.startswith("^\\circ") and (TRIGONOMETRY.search(number) or "\\pi" in number):
        return text, NOTHING  # 2\pi is an angle in radians
    if not in_text:
        # with a space between, or two letters of them
        spaced = re.search(r"\s|[a-z]{2}", written + text[len(number) : -1])
        if not (is_number(number) and spaced):
            return text, NOTHING
    unit = read_unit(written, in_text)
    if unit is None:
        return text, NOTHING
    return number, unit


def read_unit(written, in_text):
    """The Unit that is written; None where some of it is none."""
    # Words, slashes and powers alone
    written = written.replace("^\\circ", " degree ").replace("\\text", " ")
    written = re.sub(r"\\cdot\b|\*|·", " ", written)
    written = re.sub(r"\^\{(-?\d+)\}", r"^\1", written)
    written = IN_TOTAL.sub("total", re.sub(r"[{}]", " ", written))
    measures, words, scale = [], [], 1
    below = ""  # "/" behind a slash or "per", for one measure
    all_below = False  # inside of brackets behind a slash: J/(kg K)
    power = ""  # of the next measure, behind "square"
    head = ""
    head_is_past = False
    alone = True  # all of it says nothing
    # One token after the other
    for token in TOKENS.findall(written):
        word = token.rstrip(".")
        low = word.lower()
        alone &= low in ALONE
        if all_below and token != ")":
            below = "/"
        if token == "/" or low == "per":
            below = "/"
        elif token.startswith("/"):
            below = "/"
            all_below = True
        elif token == ")" and all_below:
            below = ""
            all_below = False
        elif token.startswith("^"):
            if not measures:
                return None
            measures[-1] = raised(measures[-1], token[1:])
        elif low in POWERS:
            if low.endswith("ed"):
                if not measures:
                    return None
                measures[-1] = raised(measures[-1], POWERS[low])
            else:
                power = POWERS[low]
        elif low in COMPOUND:
            measures += COMPOUND[low]
        elif low in SCALES and not below:
            scale *= SCALES[low]
        elif low in FILLERS and (low not in MEASURES or words or measures):
            head_is_past |= bool(head) and low in BEYOND_THE_HEAD
        elif measure_of(word, in_text):
            measures.append(below + raised(measure_of(word, in_text), power))
            below = power = ""
        elif is_noun(low, in_text) and below:  # apples per basket
            words.append("/" + singular(low))
            below = ""
        elif is_noun(low, in_text):
            words.append(singular(low))
            head = head if head_is_past else words[-1]
        else:
            return None
    if below or not (measures or words or scale > 1 or alone):
        return None
    # A bare "unit" measures nothing
    measured = frozenset(name for name in measures if not name.lstrip("/").startswith("unit"))
    return Unit(measured, frozenset(words), head, scale)


def measure_of(word, in_text):
    """Its first spelling; "" where it is no measure. Single letters keep their case."""
    if PREFIXED.fullmatch(word) and word not in MEASURES:
        return (word[0] if word[0] in "Mm" else word[0].lower()) + word[1:].lower()
    if len(word) == 1:
        known = word.islower() or in_text or word in SINGLE
        return MEASURES.get(word, "") if known else ""
    power = ""
    if word[-1].isdigit():  # cm2
        word, power = word[:-1], word[-1]
    name = MEASURES.get(word) or MEASURES.get(word.lower(), "")
    return raised(name, power) if name else ""


def raised(name, power):
    """m and 2 are m2; s and -1 are /s, m and -2 are /m2."""
    if power.startswith("-"):
        name = "/" + name
        power = power[1:]
    return name if power in ("", "1") else name + power


def is_noun(word, in_text):
    r"""Whether a word is a thing that is counted: letters without \text may be a product."""
    if not re.fullmatch(r"[a-z]+(?:-[a-z]+)*", word) or word in OTHERS:
        return False
    return len(word) >= (3 if in_text else 4) or word in IRREGULAR


def singular(word):
    """apples and apple, boxes and box, cherries and cherry."""
    if word in IRREGULAR:
        return IRREGULAR[word]
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if re.search(r"(?:sh|ch|x|ss|z)es$", word):
        return word[:-2]
    if word.endswith("s") and not word.endswith("ss"):
        return word[:-1]
    return word


def one_unit(gold, pred):
    """Whether two Units may be one: the same measures, and the same thing that is counted, of which
    one may say more (red apples are apples, apple trees are not); or one of the two says
    nothing."""
    if not (gold.measures or gold.words) or not (pred.measures or pred.words):
        return True
    if gold.measures != pred.measures:
        return False
    if gold.head and pred.head and gold.head != pred.head:
        return False
    if rates(gold) != rates(pred):
        return False
    return gold.words <= pred.words or pred.words <= gold.words


def rates(unit):
    """What stands below the slash of its words: baskets, of apples per basket."""
    return {word for word in unit.words if word.startswith("/")}


def scaled(number, scale):
    """A plain number (value, decimal, percent) times its scale."""
    value, decimal, percent = number
    return value * Fraction(scale), decimal, percent
