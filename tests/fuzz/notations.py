"""Values, and the notations in which people, models and sympy write them; for `graders`.

A kind draws a value, changes it a little, and writes it: first as truths of data sets write it,
then as answers may. A value is a plain tuple, so that it is never read back from a text.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from math import gcd
from typing import Any

import sympy

Texts = tuple[list[str], list[str]]  # as truths and answers have it, as answers alone have it


@dataclass(frozen=True, slots=True)
class Compound:
    """A value of several numbers: "tuple", "set", "matrix", "interval" or "percent"."""

    form: str
    members: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of value."""

    draw: Callable[[random.Random], Any]
    change: Callable[[random.Random, Any], Any]
    value: Callable[[Any], Any]
    write: Callable[[Any], Texts]


def _sign(rng: random.Random) -> int:
    return rng.choice((1, 1, -1))


def _step(rng: random.Random, number: int) -> int:
    """Return another integer: a neighbour, the opposite, or with digits changed."""
    other = rng.choice((number + 1, number - 1, -number, number + 10, number * 10, number // 10))
    return other if other != number else number + 1


# ----------------------------------------------------------------------------------- numbers


def _write_integer(n: int) -> Texts:
    truths = [str(n)]
    if abs(n) >= 1000:
        truths += [f"{n:,}", f"{n:,}".replace(",", "{,}"), f"{n:,}".replace(",", r"\,")]
    answers = [f"${n}$", f"{n}.0", f"x={n}", f"{n}.", rf"\boxed{{{n}}}", f"{n:,}"]
    answers += [rf"\text{{{n}}}", f"{n}\\text{{ cm}}", f" {n} ", f"{n}.00"]
    if n > 0:
        answers += [f"+{n}", f"{n} apples", f"{n}^\\circ"]
    return truths, answers


def _write_fraction(value: tuple[int, int]) -> Texts:
    p, q = value
    sign, a = ("-", -p) if p < 0 else ("", p)
    truths = [rf"{sign}\frac{{{a}}}{{{q}}}", rf"\frac{{{p}}}{{{q}}}", f"{p}/{q}"]
    answers = [
        rf"{sign}\dfrac{{{a}}}{{{q}}}",
        rf"{sign}\tfrac{{{a}}}{{{q}}}",
        rf"{sign}\frac{{{3 * a}}}{{{3 * q}}}",
        f"{2 * p}/{2 * q}",
        f"{p} / {q}",
        f"Fraction({p}, {q})",
        f"Rational({p}, {q})",
        f"{sign}({a}/{q})",
        f"{sign}{{{a}}}/{{{q}}}",
    ]
    if a > q > 1 and a % q:
        truths += [rf"{sign}{a // q}\frac{{{a % q}}}{{{q}}}"]
        answers += [f"{sign}{a // q} {a % q}/{q}"]
    if q % 2 and q % 5 and q > 1:
        answers.append(f"{p / q:.12g}" if abs(p / q) > 0.01 else truths[0])
    return truths, answers


def _draw_fraction(rng: random.Random) -> tuple[int, int]:
    while True:
        p, q = rng.randint(1, 99), rng.randint(2, 60)
        if gcd(p, q) == 1:
            return _sign(rng) * p, q


def _change_fraction(rng: random.Random, value: tuple[int, int]) -> tuple[int, int]:
    p, q = value
    return rng.choice(((p + 1, q), (p, q + 1), (-p, q), (q if p > 0 else -q, abs(p)), (p - 1, q)))


def exact(value: tuple[int, int]) -> str:
    """Write digits and places as a decimal: (1234, 2) is 12.34."""
    digits, places = value
    text = str(abs(digits)).rjust(places + 1, "0")
    return "-" * (digits < 0) + (f"{text[:-places]}.{text[-places:]}" if places else text)


def _write_decimal(value: tuple[int, int]) -> Texts:
    digits, places = value
    text = exact(value)
    fraction = Fraction(digits, 10**places)
    answers = [f"{text}0", f"${text}$", f"x = {text}", f"{float(fraction):.3e}".replace("e", "E")]
    answers = [each for each in answers if "E" not in each or abs(digits) < 10_000]
    answers += [repr(float(fraction)), f"Float('{text}')".replace("Float('", "").rstrip("')")]
    sign, over = ("-", -fraction) if fraction < 0 else ("", fraction)
    answers += [f"{fraction}", rf"{sign}\frac{{{over.numerator}}}{{{over.denominator}}}"]
    if text.startswith("0."):
        answers.append(text[1:])
    return [text], answers


def _write_scientific(value: tuple[int, int, int]) -> Texts:
    digits, places, power = value
    mantissa = exact((digits, places))
    truths = [rf"{mantissa}\times10^{{{power}}}", rf"{mantissa} \times 10^{{{power}}}"]
    truths += [rf"{mantissa}\cdot 10^{{{power}}}"]
    answers = [f"{mantissa}e{power}", f"{mantissa}E{power:+03d}", f"{mantissa}*10**{power}"]
    answers += [f"{mantissa}*10^{power}", rf"{mantissa}\times {{10}}^{{{power}}}"]
    answers += [f"{mantissa}e{power:+d}", f"{mantissa} \u00d7 10^{{{power}}}"]
    whole = Fraction(digits) * Fraction(10) ** (power - places)
    if whole.denominator == 1:
        answers += [str(whole), f"{whole.numerator:,}"]
    elif power > -12:
        answers.append(exact((digits, places - power)))
    return truths, answers


def _scientific_value(value: tuple[int, int, int]) -> Any:
    digits, places, power = value
    return sympy.Rational(digits) * sympy.Integer(10) ** (power - places)


def _change_scientific(rng: random.Random, value: tuple[int, int, int]) -> tuple[int, int, int]:
    digits, places, power = value
    return rng.choice(
        (
            (digits + rng.choice((1, -1)), places, power),
            (digits, places, power + 1),
            (digits, places, power - 1),
            (-digits, places, power),
            (digits, places, -power),
        )
    )


def _write_percent(n: int) -> Texts:
    text = exact((n, 1)) if n % 10 else str(n // 10)
    return [rf"{text}\%", f"{text}%"], [f"{text} percent", rf"{text}\ \%", rf"${text}\%$", text]


# ------------------------------------------------------------------- roots, constants, powers


def _coefficient(p: int, q: int, latex: str, python: str) -> tuple[list[str], list[str]]:
    """Write p/q times something, in LaTeX and in Python."""
    sign, a = ("-", -p) if p < 0 else ("", p)
    times = "" if a == 1 else str(a)
    star = "" if a == 1 else f"{a}*"
    if q == 1:
        implicit = [f"{sign}{times}{python}"] if python[0].isalpha() else []
        return [f"{sign}{times}{latex}"], [f"{sign}{star}{python}", *implicit]
    return (
        [
            rf"{sign}\frac{{{times}{latex}}}{{{q}}}",
            rf"{sign}\frac{{{a}}}{{{q}}}{latex}",
        ],
        [
            f"{sign}{star}{python}/{q}",
            f"({sign}{star}{python})/{q}",
            f"{sign}({a}/{q})*{python}",
            f"{sign}{times}{latex}/{q}",
            f"{python}*{p}/{q}" if p > 0 else f"{sign}{python}*{a}/{q}",
        ],
    )


def _draw_surd(rng: random.Random) -> tuple[int, int, int, int]:
    p, q = _draw_fraction(rng) if rng.random() < 0.6 else (_sign(rng) * rng.randint(1, 12), 1)
    return rng.choice((0, 0, 0, rng.randint(-9, 9))), p, q, rng.choice((2, 3, 5, 6, 7, 10, 11, 15))


def _write_surd(value: tuple[int, int, int, int]) -> Texts:
    n, p, q, r = value
    truths, answers = _coefficient(p, q, rf"\sqrt{{{r}}}", f"sqrt({r})")
    if r < 10:
        answers += _coefficient(p, q, rf"\sqrt{r}", f"{r}**(1/2)")[0]
    answers += [_coefficient(p, q, rf"\sqrt {{{r}}}", f"{r}**0.5")[0][0]]
    if abs(p) == 1:
        answers += [_coefficient(p, q, f"{r}^{{1/2}}", f"sqrt({r})")[0][0]]
    if q == 1:
        sign = "-" * (p < 0)
        answers += [rf"{sign}\sqrt{{{p * p * r}}}", f"{sign}sqrt({p * p * r})"]
    else:
        sign = "-" * (p < 0)
        answers += [rf"{sign}\frac{{{abs(p) * r}}}{{{q}\sqrt{{{r}}}}}"]
        answers += [f"{sign}{abs(p) * r}/({q}*sqrt({r}))"]
    if n:
        truths, answers = (
            [f"{n}{each}" if each.startswith("-") else f"{n}+{each}" for each in texts]
            for texts in (truths, answers)
        )
        root = _coefficient(p, q, rf"\sqrt{{{r}}}", f"sqrt({r})")
        answers += [f"{root[0][0]}{n:+d}", f"{root[1][0]} {'+' if n > 0 else '-'} {abs(n)}"]
    return truths, answers


def _change_surd(rng: random.Random, value: tuple[int, int, int, int]) -> tuple[int, ...]:
    n, p, q, r = value
    return rng.choice(
        ((n, -p, q, r), (n + 1, p, q, r), (n, p + 1 or 2, q, r), (n, p, q, r + 1), (-n, p, q, r))
    )


def _surd_value(value: tuple[int, int, int, int]) -> Any:
    n, p, q, r = value
    return n + sympy.Rational(p, q) * sympy.sqrt(r)


def _draw_root(rng: random.Random) -> tuple[int, int, int, int]:
    p, q = _sign(rng) * rng.randint(1, 9), rng.choice((1, 2, 3, 7))
    return p, q, rng.randint(3, 5), rng.choice((2, 3, 6, 7))


def _change_root(rng: random.Random, value: tuple[int, int, int, int]) -> tuple[int, ...]:
    p, q, degree, r = value
    return rng.choice(((p + 1 or 2, q, degree, r), (p, q, degree + 1, r), (-p, q, degree, r)))


def _write_root(value: tuple[int, int, int, int]) -> Texts:
    p, q, degree, r = value
    latex, python = rf"\sqrt[{degree}]{{{r}}}", f"{r}**(1/{degree})"
    truths, answers = _coefficient(p, q, latex, python)
    answers = [each for each in answers if "/" not in each or "**" in each or "sqrt" in each]
    sign = "-" * (p < 0)
    if q == 1:
        answers += [rf"{sign}\sqrt[{degree}]{{{abs(p) ** degree * r}}}"]
        answers += [rf"{p}\cdot {r}^{{1/{degree}}}", rf"{p}\cdot {r}^{{\frac{{1}}{{{degree}}}}}"]
    return truths, answers


def _write_pi(value: tuple[int, int, int]) -> Texts:
    p, q, power = value
    latex, python = (r"\pi", "pi") if power == 1 else (rf"\pi^{power}", f"pi**{power}")
    truths, answers = _coefficient(p, q, latex, python)
    if power == 1:
        answers += [each.replace(r"\pi", "\u03c0") for each in truths]
    return truths, [*answers, rf"{truths[0]}\text{{ cm}}^2"]


def _write_e(value: tuple[int, int, int]) -> Texts:
    p, q, power = value
    latex = "e" if power == 1 else f"e^{{{power}}}"
    truths, answers = _coefficient(p, q, latex, f"exp({power})")
    answers += _coefficient(p, q, r"\mathrm{e}" + latex[1:], f"E**({power})")[0]
    return truths, answers + _coefficient(p, q, latex, f"e**({power})")[1][:2]


def _draw_power(rng: random.Random) -> tuple[int, int, int]:
    return rng.choice((2, 3, 5, 6, 7)), rng.randint(20, 400), rng.choice((0, 0, 1, -1))


def _write_power(value: tuple[int, int, int]) -> Texts:
    base, power, plus = value
    tail = f"{plus:+d}" if plus else ""
    answers = [
        f"{base}**{power}{tail}",
        f"{base}^{power}{tail}" if power < 10 else f"{base}**{power}",
    ]
    answers = [answers[0], rf"{{{base}}}^{{{power}}}{tail}", f"{base}^({power}){tail}"]
    if plus:
        answers.append(f"{plus}+{base}^{{{power}}}")
    if power % 2 == 0:
        answers.append(f"{base**2}^{{{power // 2}}}{tail}")
    return [f"{base}^{{{power}}}{tail}"], answers


def _change_power(rng: random.Random, value: tuple[int, int, int]) -> tuple[int, int, int]:
    base, power, plus = value
    changes = ((base + 1, power, plus), (base, power + 1, plus), (base, power, plus + 1))
    return rng.choice((*changes, (base, power - 1, plus)))


def _draw_complex(rng: random.Random) -> tuple[int, int]:
    return rng.choice((0, rng.randint(-20, 20))), _sign(rng) * rng.randint(1, 20)


def _write_complex(value: tuple[int, int]) -> Texts:
    a, b = value
    times = {1: "", -1: "-"}.get(b, str(b))
    star = f"{times}*" if times not in ("", "-") else times
    if not a:
        return [f"{times}i"], [f"{star}I", f"{times}\\mathrm{{i}}", f"0{'+' * (b > 0)}{times}i"]
    plus = "+" if b > 0 else ""
    turned = f"{times}i{a:+d}"
    answers = [turned, f"{a}{plus}{star}I", f"{a} {'+' if b > 0 else '-'} {star.lstrip('-')}I"]
    answers += [rf"{a}{plus}{times}\mathrm{{i}}", f"{a}{plus}i*{abs(b)}" if b > 0 else turned]
    return [f"{a}{plus}{times}i"], answers


# -------------------------------------------------------------------------------- polynomials


_X, _Y = sympy.symbols("x y")


def _draw_polynomial(rng: random.Random) -> tuple[int, int, int, int]:
    return rng.randint(1, 4), rng.randint(-9, 9), rng.randint(-9, 9), rng.choice((0, 0, 1, 2))


def _polynomial(value: tuple[int, int, int, int]) -> Any:
    a, b, c, d = value
    return (a * _X + b) * (_X + c) + d * _Y


def _write_polynomial(value: tuple[int, int, int, int]) -> Texts:
    a, b, c, d = value
    whole = sympy.expand(_polynomial(value))
    tail = f"{'+' * bool(d)}{d}y" if d else ""
    factors = f"({'' if a == 1 else a}x{f'{b:+d}' if b else ''})(x{f'{c:+d}' if c else ''}){tail}"
    stars = f"({a}*x + ({b}))*(x + ({c})) + {d}*y"
    turned = "+".join(f"({sympy.latex(each)})" for each in reversed(whole.as_ordered_terms()))
    truths = [sympy.latex(whole), factors]
    return truths, [str(whole), stars, turned, sympy.latex(whole).replace(" ", "")]


def _change_polynomial(rng: random.Random, value: tuple[int, ...]) -> tuple[int, ...]:
    place = rng.randrange(4)
    step = rng.choice((1, -1))
    return tuple(each + step * (k == place) for k, each in enumerate(value))


# ------------------------------------------------------------------------------------- kinds


NUMBERS: dict[str, Kind] = {
    "integer": Kind(
        lambda rng: _sign(rng) * rng.choice((rng.randint(0, 99), rng.randint(100, 10**7))),
        _step,
        sympy.Integer,
        _write_integer,
    ),
    "fraction": Kind(
        _draw_fraction, _change_fraction, lambda v: sympy.Rational(*v), _write_fraction
    ),
    "decimal": Kind(
        lambda rng: (_sign(rng) * rng.randint(1, 99_999), rng.randint(1, 4)),
        lambda rng, v: rng.choice(((v[0] + 1, v[1]), (v[0], v[1] + 1), (-v[0], v[1]))),
        lambda v: sympy.Rational(v[0], 10 ** v[1]),
        _write_decimal,
    ),
    "scientific": Kind(
        lambda rng: (_sign(rng) * rng.randint(101, 999), 2, rng.choice((-19, -7, -3, 4, 8, 23))),
        _change_scientific,
        _scientific_value,
        _write_scientific,
    ),
    "percent": Kind(
        lambda rng: rng.randint(1, 999),
        lambda rng, n: rng.choice((n + 1, n + 10, n * 2)),
        lambda n: Compound("percent", (sympy.Rational(n, 10),)),
        _write_percent,
    ),
    "surd": Kind(_draw_surd, _change_surd, _surd_value, _write_surd),
    "root": Kind(
        _draw_root,
        _change_root,
        lambda v: sympy.Rational(v[0], v[1]) * sympy.root(v[3], v[2]),
        _write_root,
    ),
    "pi": Kind(
        lambda rng: (*_draw_fraction(rng), rng.choice((1, 1, 1, 2))),
        lambda rng, v: (*_change_fraction(rng, v[:2]), v[2]),
        lambda v: sympy.Rational(v[0], v[1]) * sympy.pi ** v[2],
        _write_pi,
    ),
    "e": Kind(
        lambda rng: (*_draw_fraction(rng), rng.choice((1, 2, 3, -1, -4))),
        lambda rng, v: (*v[:2], v[2] + rng.choice((1, -1))),
        lambda v: sympy.Rational(v[0], v[1]) * sympy.E ** v[2],
        _write_e,
    ),
    "power": Kind(
        _draw_power, _change_power, lambda v: sympy.Integer(v[0]) ** v[1] + v[2], _write_power
    ),
    "complex": Kind(
        _draw_complex,
        lambda rng, v: rng.choice(((v[0] + 1, v[1]), (v[0], -v[1]), (-v[0], v[1]), v[::-1])),
        lambda v: v[0] + v[1] * sympy.I,
        _write_complex,
    ),
    "polynomial": Kind(_draw_polynomial, _change_polynomial, _polynomial, _write_polynomial),
}
