"""Answers in other notations and answers of slightly other values, for the grader of mathematics.

`python -m tests.fuzz.graders --pairs 20000` is the long run; a test makes a short one. Every pair
is written from values that are drawn, never read back from a text, and whether it is right is
decided from these values by sympy at 50 digits. The grader has no part in that.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import sympy

from tests.fuzz.compounds import KINDS
from tests.fuzz.notations import Compound, Kind
from tir_alp.envs.grading import Grade, grade

DIGITS = 50


@dataclass(frozen=True, slots=True)
class Pair:
    """An answer, a truth, and whether the answer is right."""

    kind: str
    answer: str
    truth: str
    is_right: bool


@dataclass(slots=True)
class Result:
    """What the grader made of many pairs."""

    num_right: int = 0
    num_wrong: int = 0
    false_positives: list[Pair] = field(default_factory=list)
    false_negatives: list[Pair] = field(default_factory=list)
    without_verdict: list[Pair] = field(default_factory=list)


def pairs(seed: int) -> Iterator[Pair]:
    """Yield pairs without end, of every kind in turn, right ones and wrong ones alternating."""
    rng = random.Random(seed)
    while True:
        for name, kind in KINDS.items():
            value = kind.draw(rng)
            truths, _ = kind.write(value)
            truth = rng.choice(truths)
            yield Pair(name, _answer(rng, kind, value), truth, True)
            other = kind.change(rng, value)
            if not is_same(kind.value(other), kind.value(value)):
                yield Pair(name, _answer(rng, kind, other), truth, False)


def _answer(rng: random.Random, kind: Kind, value: Any) -> str:
    truths, others = kind.write(value)
    return rng.choice(truths + others)


def is_same(one: Any, other: Any) -> bool:
    """Whether two values are equal: at 50 digits, and at three points if they have symbols."""
    if isinstance(one, Compound) or isinstance(other, Compound):
        return _is_same_compound(one, other)
    for point in (sympy.Rational(7, 3), sympy.Rational(-11, 5), sympy.Rational(1, 9)):
        x, y = (
            sympy.N(each.subs({s: point + 3 * k for k, s in enumerate(_symbols(each))}), DIGITS)
            for each in (one, other)
        )
        if x == y:
            continue
        if sympy.oo in (abs(x), abs(y)) or abs(x - y) > max(abs(x), abs(y)) * 10.0**-40:
            return False
    return _symbols(one) == _symbols(other) or bool(sympy.expand(one - other) == 0)


def _symbols(value: Any) -> list[Any]:
    return sorted(value.free_symbols, key=str)


def _is_same_compound(one: Any, other: Any) -> bool:
    if not isinstance(one, Compound) or not isinstance(other, Compound):
        return False
    if (one.form, len(one.members)) != (other.form, len(other.members)):
        return False
    if one.form != "set":
        return all(map(is_same, one.members, other.members))
    rest = list(other.members)
    for member in one.members:
        match = next((each for each in rest if is_same(member, each)), None)
        if match is None:
            return False
        rest.remove(match)
    return True


def fuzz(
    num_pairs: int, seed: int = 0, ask: Callable[[str, str], Grade] = grade, num_threads: int = 4
) -> Result:
    """Grade pairs, and compare the verdicts with what sympy says.

    Args:
        num_pairs: Number of pairs.
        seed: Seed of the pairs.
        ask: The grader: a function of an answer and a truth.
        num_threads: Number of threads that grade.
    """
    result = Result()
    source = pairs(seed)
    drawn = [next(source) for _ in range(num_pairs)]
    with ThreadPoolExecutor(num_threads) as threads:
        grades = threads.map(lambda pair: ask(pair.answer, pair.truth), drawn)
        for pair, verdict in zip(drawn, grades, strict=True):
            result.num_right += pair.is_right
            result.num_wrong += not pair.is_right
            if verdict.correct is None:
                result.without_verdict.append(pair)
            elif verdict.correct and not pair.is_right:
                result.false_positives.append(pair)
            elif not verdict.correct and pair.is_right:
                result.false_negatives.append(pair)
    return result


def main() -> int:
    """Print the result; the exit status is 1 if the grader is worse than it is documented to be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=60, help="examples of each fault to print")
    options = parser.parse_args()
    begin = time.perf_counter()
    result = fuzz(options.pairs, options.seed)
    seconds = time.perf_counter() - begin
    for name, total in (
        ("false_positives", result.num_wrong),
        ("false_negatives", result.num_right),
        ("without_verdict", options.pairs),
    ):
        found: list[Pair] = getattr(result, name)
        print(f"{name}: {len(found)} of {total} ({len(found) / max(total, 1):.2%})")
        print(f"    by kind: {dict(Counter(pair.kind for pair in found))}")
        for pair in found[: options.show]:
            print(f"    {pair.kind:12} {pair.answer!r} for {pair.truth!r}")
    print(f"{options.pairs} pairs in {seconds:.0f} s, the drawing included")
    share = len(result.false_negatives) / max(result.num_right, 1)
    return int(bool(result.false_positives or result.without_verdict) or share >= 0.01)


if __name__ == "__main__":
    sys.exit(main())
