"""Values of several numbers, and how they are written; for `graders`."""

from __future__ import annotations

import random
from typing import Any

import sympy

from tests.fuzz.notations import NUMBERS, Compound, Kind, Texts, exact

_MEMBERS = ("integer", "fraction", "surd", "pi", "decimal")


def _draw_member(rng: random.Random) -> tuple[str, Any]:
    name = rng.choice(_MEMBERS)
    return name, NUMBERS[name].draw(rng)


def _draw_members(rng: random.Random) -> tuple[tuple[str, Any], ...]:
    return tuple(_draw_member(rng) for _ in range(rng.randint(2, 4)))


def _change_members(rng: random.Random, members: tuple[tuple[str, Any], ...]) -> Any:
    place = rng.randrange(len(members))
    how = rng.choice(("change", "change", "swap", "drop", "add"))
    listed = list(members)
    if how == "change":
        name, value = listed[place]
        listed[place] = name, NUMBERS[name].change(rng, value)
    elif how == "swap":
        listed[place], listed[place - 1] = listed[place - 1], listed[place]
    elif how == "drop" and len(listed) > 2:
        del listed[place]
    else:
        listed.append(_draw_member(rng))
    return tuple(listed)


def _values(members: tuple[tuple[str, Any], ...]) -> tuple[Any, ...]:
    return tuple(NUMBERS[name].value(value) for name, value in members)


def _member_texts(members: tuple[tuple[str, Any], ...]) -> list[list[str]]:
    """Write members: as LaTeX, as other LaTeX, as sympy prints them."""
    latex = [NUMBERS[name].write(value)[0][0] for name, value in members]
    spaced = [NUMBERS[name].write(value)[0][-1] for name, value in members]
    spaced = [x if "," in y or r"\," in y else y for x, y in zip(latex, spaced, strict=True)]
    python = [_as_sympy(name, value) for name, value in members]
    return [latex, spaced, python]


def _as_sympy(name: str, value: Any) -> str:
    return exact(value) if name == "decimal" else str(NUMBERS[name].value(value))


def _write_tuple(members: tuple[tuple[str, Any], ...]) -> Texts:
    latex, spaced, python = _member_texts(members)
    truths = [f"({', '.join(latex)})", rf"\left({','.join(latex)}\right)"]
    answers = [
        f"({','.join(spaced)})",
        f"({', '.join(python)})",
        rf"\big( {', '.join(latex)} \big)",
    ]
    return truths, [*answers, rf"\langle {','.join(latex)}\rangle"]


def _write_set(members: tuple[tuple[str, Any], ...]) -> Texts:
    latex, spaced, python = _member_texts(members)
    truths = [rf"\{{{','.join(latex)}\}}", rf"\left\{{{', '.join(latex)}\right\}}", ",".join(latex)]
    answers = [rf"\{{{','.join(reversed(spaced))}\}}", f"{{{', '.join(python)}}}"]
    answers += [f"[{', '.join(python)}]", f"FiniteSet({', '.join(python)})", ", ".join(spaced)]
    return truths, [*answers, r" \text{ and } ".join(latex), r"\text{ or }".join(reversed(latex))]


def _draw_set(rng: random.Random) -> tuple[tuple[str, Any], ...]:
    while True:
        members = _draw_members(rng)
        if len(set(_values(members))) == len(members):
            return members


def _change_set(rng: random.Random, members: Any) -> Any:
    while True:
        changed = _change_members(rng, members)
        if len(set(_values(changed))) == len(changed):
            return changed


def _draw_matrix(rng: random.Random) -> tuple[int, tuple[tuple[str, Any], ...]]:
    rows, columns = rng.choice(((2, 2), (2, 1), (3, 1), (1, 3), (2, 3), (3, 3)))
    names = ("integer", "integer", "fraction")
    drawn = [(name := rng.choice(names), NUMBERS[name].draw(rng)) for _ in range(rows * columns)]
    return columns, tuple(drawn)


def _change_matrix(rng: random.Random, value: tuple[int, Any]) -> tuple[int, Any]:
    columns, members = value
    listed = list(members)
    place = rng.randrange(len(listed))
    name, member = listed[place]
    listed[place] = name, NUMBERS[name].change(rng, member)
    return columns, tuple(listed)


def _write_matrix(value: tuple[int, tuple[tuple[str, Any], ...]]) -> Texts:
    columns, members = value
    latex, _, python = _member_texts(members)

    def rows(texts: list[str]) -> list[list[str]]:
        return [texts[k : k + columns] for k in range(0, len(texts), columns)]

    body = r" \\ ".join(" & ".join(row) for row in rows(latex))
    listed = ", ".join(f"[{', '.join(row)}]" for row in rows(python))
    truths = [rf"\begin{{{kind}}} {body} \end{{{kind}}}" for kind in ("pmatrix", "bmatrix")]
    answers = [
        f"Matrix([{listed}])",
        rf"\left[\begin{{array}}{{{'c' * columns}}}{body}\end{{array}}\right]",
    ]
    if columns > 1:
        answers.append(f"[{listed}]")
    return truths, answers


def _draw_interval(rng: random.Random) -> tuple[Any, Any, bool, bool]:
    while True:
        low, high = _draw_member(rng), _draw_member(rng)
        x, y = _values((low, high))
        if sympy.N(y - x, 30) > 0:
            return low, high, rng.random() < 0.5, rng.random() < 0.5


def _change_interval(rng: random.Random, value: tuple[Any, Any, bool, bool]) -> Any:
    low, high, is_left_open, is_right_open = value
    while True:
        which = rng.randrange(4)
        if which == 0:
            return low, high, not is_left_open, is_right_open
        if which == 1:
            return low, high, is_left_open, not is_right_open
        name, end = low if which == 2 else high
        other = name, NUMBERS[name].change(rng, end)
        ends = (other, high) if which == 2 else (low, other)
        x, y = _values(ends)
        if sympy.N(y - x, 30) > 0:
            return *ends, is_left_open, is_right_open


def _interval_value(value: tuple[Any, Any, bool, bool]) -> Compound:
    low, high, is_left_open, is_right_open = value
    flags = sympy.Integer(is_left_open), sympy.Integer(is_right_open)
    return Compound("interval", (*_values((low, high)), *flags))


def _write_interval(value: tuple[Any, Any, bool, bool]) -> Texts:
    low, high, is_left_open, is_right_open = value
    latex, spaced, python = _member_texts((low, high))
    left, right = "([", ")]"
    left, right = left[not is_left_open], right[not is_right_open]
    below, above = ("<" if is_open else r"\le " for is_open in (is_left_open, is_right_open))
    name = {(False, False): "", (True, True): ".open", (True, False): ".Lopen"}.get(
        (is_left_open, is_right_open), ".Ropen"
    )
    truths = [f"{left}{','.join(latex)}{right}", rf"\left{left}{', '.join(latex)}\right{right}"]
    chain = f"{latex[0]}{below}x{above}{latex[1]}"
    python_chain = f"{python[0]} {below.strip()} x {above.strip()} {python[1]}".replace(
        r"\le", "<="
    )
    turned = f"{latex[1]}{above}x{below}{latex[0]}".replace("<", ">").replace(r"\le", r"\ge")
    answers = [f"{left}{', '.join(spaced)}{right}", f"{left}{', '.join(python)}{right}"]
    answers += [f"Interval{name}({', '.join(python)})", rf"x\in{left}{','.join(latex)}{right}"]
    return [*truths, chain], [*answers, python_chain, turned, chain.replace(r"\le", r"\leq")]


KINDS: dict[str, Kind] = {
    **NUMBERS,
    "tuple": Kind(
        _draw_members, _change_members, lambda v: Compound("tuple", _values(v)), _write_tuple
    ),
    "set": Kind(_draw_set, _change_set, lambda v: Compound("set", _values(v)), _write_set),
    "matrix": Kind(
        _draw_matrix,
        _change_matrix,
        lambda v: Compound("matrix", (sympy.Integer(v[0]), *_values(v[1]))),
        _write_matrix,
    ),
    "interval": Kind(_draw_interval, _change_interval, _interval_value, _write_interval),
}
