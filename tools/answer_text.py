r"""The text of an answer: tidied, compared as text, and read as a number. Pure functions.

Nothing here evaluates an expression. Patterns have no nested repetition, and callers bound the
length of what they pass, so that no text takes long.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

MAX_CHARS = 2000
"""Longer answers are not read as mathematics."""
_MAX_DIGITS = 4000
_MAX_UNIT_CHARS = 80
_MAX_EXPONENT = 4000

_CHARACTERS = str.maketrans(
    {
        "\u2212": "-",  # minus sign
        "\u2013": "-",  # en dash
        "\u00d7": r"\times ",
        "\u00f7": r"\div ",
        "\u00b7": r"\cdot ",
        "\u22c5": r"\cdot ",
        "\u00b0": r"^{\circ}",
        "\u03c0": r"\pi ",
        "\u221e": r"\infty ",
        "\u221a": r"\sqrt ",
        "\u2264": r"\le ",
        "\u2265": r"\ge ",
        "\u2205": r"\emptyset ",
        "\u222a": r"\cup ",
        "\u27e8": "(",
        "\u27e9": ")",
        **dict.fromkeys("\u00a0\u2009\u202f\u2007\u2002\u2003\u200b\t\r\n", " "),
        **{chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)},  # full width
    }
)
_RAISED = {"\u207b": "-", "\u207a": "+", "\u00b9": "1", "\u00b2": "2", "\u00b3": "3"} | {
    chr(0x2070 + digit): str(digit) for digit in (0, 4, 5, 6, 7, 8, 9)
}
_LOWERED = {chr(0x2080 + digit): str(digit) for digit in range(10)}
_SCRIPTS = re.compile(f"(?P<raised>[{''.join(_RAISED)}]+)|(?P<lowered>[{''.join(_LOWERED)}]+)")
_VULGAR = re.compile("[\u00bc-\u00be\u2150-\u215e]")
_DOUBLED = re.compile(r"\\\\(?=[A-Za-z])")  # a backslash that was escaped once too often
_REWRITES: tuple[tuple[re.Pattern[str], Any], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^\s*\*\*(?P<inside>[^*]+)\*\*\s*$", r"\g<inside>"),
        (r"(?<!\\)\\[()\[\]]|(?<!\\)\$", ""),
        (r"\\\$|[\u00a3\u20ac\u00a5\u20b9](?=\s?\d)|(?<=\d)\s?[\u00a3\u20ac\u00a5\u20b9]", ""),
        (r"^\s*(?:\\(?:approx|simeq|therefore|implies|Rightarrow)(?![A-Za-z])|[\u2248\u2234])", ""),
        (r"\\(?:text)?color\s?\{[^{}]{0,40}\}", ""),
        (r"\\(?:tiny|small|normalsize|[lL]arge|LARGE|[hH]uge)(?![A-Za-z])", ""),
        (r"(?<=\d)_(?=\d\d\d(?!\d))", ","),  # as Python groups digits
        (r"\\(?:displaystyle|textstyle|limits|nolimits)(?![A-Za-z])", ""),
        (r"\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])\.?", ""),
        (r"\\land(?![A-Za-z])", " and "),
        (r"\\lor(?![A-Za-z])", " or "),
        (r"\\varnothing(?![A-Za-z])", r"\\emptyset"),
        (r"\\langle(?![A-Za-z])", "("),
        (r"\\rangle(?![A-Za-z])", ")"),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\lg(?![A-Za-z])", r"\\log_{10}"),
        (r"\\[dt]?binom ?(\d) ?(\d)", r"\\binom{\1}{\2}"),
        (r"\\[dt]binom(?![A-Za-z])", r"\\binom"),
        (r"\{([^{}\\]{1,40})\\choose(?![A-Za-z])([^{}\\]{1,40})\}", r"\\binom{\1}{\2}"),
        (r"\\(le|ge|ne)q(?![A-Za-z])", r"\\\1"),
        (r"(?<=\d)(?:\\[,:;! ]|~|\{,\}|,\\! ?)(?=\d\d\d(?!\d))", ","),
        (r"\\!|(?<!\\)\\$", ""),
        (r"\\\\\s*(?=\\end(?![A-Za-z]))", ""),  # after the last row
        (r"(?<!\\)\\(?:[,:;> ]|quad(?![A-Za-z])|qquad(?![A-Za-z]))|~", " "),
        (
            r"(?:\^(?:\\circ(?![A-Za-z])|\{\\circ\})|\\degree(?![A-Za-z]))"
            r"(?:\s?(?:\\(?:text|mathrm)\{[CF]\}|[CF](?![A-Za-z])))?",
            "",
        ),
        (r"\\(?:text|mbox|textrm)\{[^{}]*[:=]\s*\}\s*(?=[^\s])", ""),  # a label before the value
    )
)
_WRAPPERS = frozenset(
    [
        "underline",
        "mathrm",
        "mathbf",
        "mathit",
        "mathsf",
        "mathtt",
        "bm",
        "boldsymbol",
        "text",
        "textbf",
        "textit",
        "textrm",
        "texttt",
        "textnormal",
        "mbox",
        "operatorname",
        "boxed",
        "fbox",
    ]
)
_TOKEN = re.compile(r"\\(?P<command>[A-Za-z]+)\*?\s*|\\.|[{}]|.", re.DOTALL)
_UNIT = (
    r"\\(?:text|mathrm|textrm|mbox|rm)\s?\{(?!\s?(?:[ie]|[a-z]* ?[ie]) ?\})[^{}\d]*\}"
    r"(?:\^\{?-?\d\}?)?"
)
_UNITS = re.compile(rf"(?:\s?(?:\\cdot\s?|/\s?)?{_UNIT})+$")
_WORDS = re.compile(
    r"(?P<words>(?: [A-Za-z]{3,}| [mgls]| ?(?:[kcmd]m|[km]g|gm|ml|m[stL]|mi|ft|in|yd|oz|lbs?|gal"
    r"|hrs?|yrs?|min|sec|deg|mph|km?ph|kmh|rpm|Hz|Pa|kWh?|sq|cu|cc|pm|am"
    r"|feet|inch(?:es)?|yards?|miles?|meters?|metres?|hours?|minutes?|seconds?|days?|degrees?"
    r"|dollars?|cents?|points?|units?|grams?|lit(?:er|re)s?|pounds?|acres?))"
    r"(?:[ /-][A-Za-z]+)*)(?:\^\{?\d\}?)?\.?$"
)
_CONSTANT = re.compile(
    r"(?=.*(?:\d|\\pi))(?:\\(?:[dt]?frac|sqrt|pi|cdot|times|ln|log)(?![A-Za-z])|[0-9 .,{}()^+*/-])+"
)
_NO_UNITS = re.compile(
    r"\b(?:or|and|to|plus|minus|times|over|by|mod|base|hundred|thousand|million|billion|trillion|"
    r"dozen|pi|sqrt|infty|choose|not|is|half|halves|thirds?|fourths?|quarters?)\b",
    re.IGNORECASE,
)


def tidy(text: str) -> str:
    r"""Remove what only concerns the layout, and write the same thing in one way.

    Example:
        >>> tidy(r"\displaystyle \underline{1\,234}"), tidy("37{+5}")
        ('1,234', '37+5')
    """
    text = _SCRIPTS.sub(_script, _VULGAR.sub(_vulgar, text)).translate(_CHARACTERS)
    if r"\begin" not in text:  # else it separates rows
        text = _DOUBLED.sub(r"\\", text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = " ".join(text.split()).strip()
    return _without_units(text)


def _vulgar(match: re.Match[str]) -> str:
    over, _, under = unicodedata.normalize("NFKC", match[0]).partition("\u2044")
    return rf"\frac{{{over}}}{{{under or 1}}}"


def _script(match: re.Match[str]) -> str:
    if raised := match["raised"]:
        return f"^{{{''.join(map(_RAISED.__getitem__, raised))}}}"
    return f"_{{{''.join(map(_LOWERED.__getitem__, match['lowered']))}}}"


def _without_units(text: str) -> str:
    units = _UNITS.search(text)
    if units and units.start() and _takes_units(flat(text[: units.start()]), units[0]):
        text = text[: units.start()]
    text = flat(text)
    words = _WORDS.search(text, max(0, len(text) - _MAX_UNIT_CHARS))
    if words and not _NO_UNITS.search(words["words"]) and words["words"].strip() != "percent":
        number = text[: words.start()].strip()
        if _takes_units(number, words["words"]):
            return number
    return text


def _takes_units(number: str, units: str) -> bool:
    r"""Whether a text is a number, or a constant such as 5\pi, so that a unit may follow it."""
    if read_number(number) is not None:
        return True
    return _CONSTANT.fullmatch(number) is not None and not _NO_UNITS.search(units)


def flat(text: str) -> str:
    """Remove wrappers that only change the looks, and braces that are no command's argument."""
    pieces: list[str] = []
    keeps: list[tuple[bool, bool]] = []  # per open brace: is it kept, may another argument follow
    is_argument = may_follow = is_option = False
    for token in _TOKEN.finditer(text):
        piece, command = token[0], token["command"]
        if is_option or (piece == "[" and is_argument and may_follow):  # as in \sqrt[3]{x}
            is_option = piece != "]"
            pieces.append(piece)
            continue
        if command in _WRAPPERS:
            is_argument = may_follow = False
            continue
        if piece == "{":
            keeps.append((is_argument, may_follow))
            if is_argument:
                pieces.append(piece)
            is_argument = may_follow = False
        elif piece == "}":
            kept, follow = keeps.pop() if keeps else (True, False)
            if kept:
                pieces.append(piece)
            is_argument = may_follow = kept and follow
        else:
            if command:
                piece = f"\\{command}{' ' if piece[-1].isspace() else ''}"
                is_argument = may_follow = True
            elif piece in "^_":
                is_argument, may_follow = True, False
            elif piece != " ":
                is_argument = may_follow = False
            pieces.append(piece)
    kept = "".join(pieces).strip()
    return kept.removesuffix(".").rstrip() if not kept.endswith("..") else kept


# ------------------------------------------------------------------------------------ numbers


@dataclass(frozen=True, slots=True)
class Number:
    """A number as it was written.

    Example, "0.50": `Number(Fraction(1, 2), places=2)`.
    """

    value: Fraction
    places: int | None = None
    """Number of digits after the decimal point; None if it is written as a fraction."""
    is_percent: bool = False
    base: int | None = None
    """Base that a subscript gives; the value is then that of the digits as decimal ones."""


_DIGITS = r"(?:\d{1,3}(?:[, ]\d{3})+(?!\d)|\d+)"
_PLAIN = re.compile(
    rf"(?P<whole>{_DIGITS}|(?=\.\d))(?:\.(?P<rest>\d*)"
    r"(?:\\(?:overline|dot|bar) ?\{?(?P<again>\d+)\}?)?)?"
    r"(?:[eE](?P<exponent>[+-]?\d{1,9}))?"
    r"(?: ?(?:\\times|\\cdot|\*) ?10 ?(?:\^|\*\*) ?[{(]?(?P<power>[+-]?\d{1,9})[})]?)?"
)
_POWER = re.compile(r"10 ?(?:\^|\*\*) ?[{(]?(?P<power>[+-]?\d{1,9})[})]?")
_FRACTION = re.compile(
    r"(?:(?P<whole>\d+) ?)?\\frac ?(?:\{ ?(?P<over>[+-]?\d+) ?\}|(?P<over1>\d)) ?"
    r"(?:\{ ?(?P<under>[+-]?\d+) ?\}|(?P<under1>\d))"
    r"|(?:(?P<whole2>\d+) )?(?P<over2>\d+) ?/ ?(?P<under2>\d+)"
)
_PERCENT = re.compile(r" ?(?:\\?%|percent)$")
_BASED = re.compile(r"(?P<digits>\d+)_\{?(?P<base>\d{1,2})\}?")


def read_number(text: str) -> Number | None:
    r"""Read a tidied text as a number: `-3`, `1,234`, `1.5e3`, `\frac{1}{2}`, `0.\overline{3}`.

    None if it is something else, if it would have to be worked out, or if it is enormous.
    """
    if len(text) > _MAX_DIGITS:
        return None
    percent = _PERCENT.search(text)
    body = (text[: percent.start()] if percent else text).strip()
    if body.startswith("(") and body.endswith(")"):
        body = body[1:-1].strip()
    sign = -1 if body.startswith("-") else 1
    body = body.removeprefix("-" if sign < 0 else "+").lstrip()
    if body.startswith("(") and body.endswith(")") and body[1:2].isdigit():
        body = body[1:-1].strip()
    if based := _BASED.fullmatch(body):
        return Number(sign * Fraction(int(based["digits"])), None, False, int(based["base"]))
    found: tuple[Fraction, int | None] | None = None
    if match := _PLAIN.fullmatch(body):
        found = _plain(match)
    elif match := _FRACTION.fullmatch(body):
        found = _fraction(match)
    elif (match := _POWER.fullmatch(body)) and abs(int(match["power"])) <= _MAX_EXPONENT:
        found = Fraction(10) ** int(match["power"]), None
    return None if found is None else Number(sign * found[0], found[1], percent is not None)


def _plain(match: re.Match[str]) -> tuple[Fraction, int | None] | None:
    whole = re.sub("[, ]", "", match["whole"])
    rest, again = match["rest"] or "", match["again"] or ""
    shift = int(match["exponent"] or 0) + int(match["power"] or 0)
    if abs(shift) > _MAX_EXPONENT:
        return None
    value = Fraction(int(whole + rest or "0"), 10 ** len(rest))
    if again:
        value += Fraction(int(again), (10 ** len(again) - 1) * 10 ** len(rest))
    return value * Fraction(10) ** shift, None if again else len(rest) - shift


def _fraction(match: re.Match[str]) -> tuple[Fraction, int | None] | None:
    whole = int(match["whole"] or match["whole2"] or 0)
    over = int(match["over"] or match["over1"] or match["over2"])
    under = int(match["under"] or match["under1"] or match["under2"])
    return (whole + Fraction(over, under), None) if under else None


def same_number(one: Number, other: Number) -> bool:
    """Whether two numbers are equal; see "How answers are compared" in docs/environments.md."""
    if one.base != other.base and None not in (one.base, other.base):
        return False
    return any(_close(*x, *y) for x in _readings(one) for y in _readings(other))


def is_rounding(number: Number, value: Fraction) -> bool:
    """Whether a decimal is a value cut or rounded to at least 6 significant digits."""
    if number.places is None:
        return False
    unit = Fraction(10) ** -number.places
    return abs(number.value) >= 10**5 * unit and abs(number.value - value) < unit


def _readings(number: Number) -> Iterator[tuple[Fraction, int | None]]:
    yield number.value, number.places
    if number.is_percent:
        yield number.value / 100, None if number.places is None else number.places + 2


def _close(x: Fraction, x_places: int | None, y: Fraction, y_places: int | None) -> bool:
    if x == y:
        return True
    if x_places is None and y_places is None:
        return False
    if x_places is not None and y_places is not None:
        # Two decimals: noise of floating point, or the same digits up to the sixth place at least.
        if abs(x - y) * 10**12 <= max(abs(x), abs(y)):
            return max(x_places, y_places) > 12
        unit = Fraction(10) ** -min(x_places, y_places)
        return abs(x - y) < unit and min(abs(x), abs(y)) % 1 >= 10**5 * unit
    decimal, exact = (Number(x, x_places), y) if y_places is None else (Number(y, y_places), x)
    return not _is_decimal(exact) and is_rounding(decimal, exact)


def _is_decimal(value: Fraction) -> bool:
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1


# --------------------------------------------------------------------------------------- text

_CLOCK = re.compile(r"0?(\d|1\d|2[0-3]):([0-5]\d)(:[0-5]\d)? ?(?:([ap])\.?m\.?)?", re.IGNORECASE)
_RATIO = re.compile(r"\d{1,20}(?:\.\d{1,20})?(?: ?: ?\d{1,20}(?:\.\d{1,20})?)+")
_CHOICE = re.compile(
    r"\(?(?P<letter>[A-Z])(?:\)|\.(?!\d)|:(?!\S))+ ?(?P<rest>.*)|\(?(?P<alone>[A-Z])\)?"
)
_EMPTY = str.maketrans("", "", "{}\\$")
_TRUTHS = {"true": "true", "false": "false", "yes": "yes", "no": "no", "none": "none"}
_WORD = re.compile(r"[A-Za-z]{4,}")
_LABEL = re.compile(
    r"(?:\\(?:angle|triangle|overline|overrightarrow|vec|widehat|odot|square) ?)?"
    r"\{?(?:[A-Z](?:_?\{?\d\}?|'){0,2}){2,20}\}?"
)
_NAMES = re.compile(
    r"(?:arc|a)?(?:sin|cos|tan|sec|csc|cot)h?|log|ln|exp|sqrt|pi|infty|inf|alpha|beta|gamma|delta|"
    r"epsilon|theta|lambda|sigma|omega|phi|psi",
    re.IGNORECASE,
)


def text_key(text: str) -> str:
    """Return a form of a tidied text that is the same for equal texts."""
    if clock := _CLOCK.fullmatch(text):
        return f"{clock[1]}:{clock[2]}{clock[3] or ''}{(clock[4] or '').lower()}"
    key = re.sub(r"(?<![0-9]) | (?![0-9])", "", text)
    key = re.sub(r"\{([A-Za-z0-9])\}", r"\1", key).strip("\"'`")
    has_word = _WORD.search(text) or key.lower() in _TRUTHS or not key.isascii()
    return key.casefold() if has_word and "\\" not in key else key


def same_text(answer: str, truth: str) -> bool:
    """Whether a tidied answer equals the truth as text; of a choice, its letter is enough."""
    key = text_key(truth)
    if key and text_key(answer) == key:
        return True
    one, other = _CHOICE.fullmatch(truth), _CHOICE.fullmatch(answer)
    if not one or not other:
        return False
    letters = {each["letter"] or each["alone"] for each in (one, other)}
    rests = {text_key(each["rest"]) for each in (one, other) if each["rest"]}
    return len(letters) == 1 and len(rests) < 2


def is_only_text(truth: str) -> bool:
    """Whether a tidied truth is text, so that reading it as mathematics would be a mistake."""
    if text_key(truth) in _TRUTHS or _CLOCK.fullmatch(truth) or is_label(truth):
        return True
    choice = _CHOICE.fullmatch(truth)
    if choice and choice["rest"]:
        return True
    if any(unicodedata.category(each) == "Lo" for each in truth):
        return True
    return (
        re.fullmatch(r"[A-Za-z][A-Za-z0-9 ,.'!?&-]*", truth) is not None
        and _WORD.search(truth) is not None
        and not _NAMES.match(truth)
    )


def is_label(text: str) -> bool:
    """Whether a tidied text names a segment, an angle or choices by upper-case letters: `ABC`."""
    return _LABEL.fullmatch(text) is not None


def ratio_of(text: str) -> tuple[Fraction, ...] | None:
    """Read a tidied text as a ratio `2:3` or `1:2:5`, which is not a time of day."""
    if not _RATIO.fullmatch(text) or _CLOCK.fullmatch(text):
        return None
    return tuple(Fraction(each.strip()) for each in text.split(":"))


def is_same_ratio(answer: str, truth: tuple[Fraction, ...]) -> bool:
    """Whether a tidied answer is a multiple of a ratio, or its value if there are two terms."""
    ratio = ratio_of(answer)
    if ratio is None:
        number = read_number(answer)
        return bool(number and len(truth) == 2 and truth[1] and number.value * truth[1] == truth[0])
    if len(ratio) != len(truth) or not any(ratio):
        return False
    pairs = list(zip(ratio, truth, strict=True))
    return all(x * b == y * a for x, a in pairs for y, b in pairs)


def is_gradable(truth: str) -> bool:
    """Whether a truth says anything: it consists of more than braces and backslashes."""
    return bool(truth.translate(_EMPTY).split())
