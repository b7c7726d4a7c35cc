"""The colour of each method, the same in every picture, and which runs are seeds of one method.

The hues are those of Okabe and Ito, which people with any common colour blindness can tell apart;
the token form of a method has the hue of its sequence form, dashed. Runs of one method that differ
in more than their seed are variants: they share its colour, and each has a marker of its own.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tir_alp.report.read import Record

_SOLID, _DASHED = "-", (0, (4, 1.5))

STYLES: dict[str, tuple[str, Any]] = {
    "alp_sequence": ("#D55E00", _SOLID),
    "alp_token": ("#D55E00", _DASHED),
    "bypass_sequence": ("#0072B2", _SOLID),
    "bypass_token": ("#0072B2", _DASHED),
    "tis_sequence": ("#009E73", _SOLID),
    "tis_token": ("#009E73", _DASHED),
    "mis_sequence": ("#CC79A7", _SOLID),
    "mis_token": ("#CC79A7", _DASHED),
    "grpo": ("#000000", _SOLID),
    "dr_grpo": ("#000000", _DASHED),
    "cispo": ("#56B4E9", _SOLID),
    "dapo": ("#E69F00", _SOLID),
    "gspo": ("#808080", _SOLID),
    "icepop": ("#7A4A1E", _SOLID),
}
"""Method -> colour, dash."""
_OTHER = ("#4B2E83", _SOLID)
_MARKERS = ("", "o", "s", "^", "D", "v", "P", "X", "*")
_NOT_THE_METHOD = ("name", "seed")


@dataclass(frozen=True)
class Method:
    """Runs that differ in nothing but their seed, and how they are drawn."""

    label: str
    """The algorithm's name; if others have it too, with the settings that tell them apart."""
    algorithm: str
    records: tuple[Record, ...]
    colour: str
    dash: Any
    marker: str

    @property
    def seeds(self) -> str:
        """For people, e.g. "0, 1, 2"."""
        return ", ".join(str(record.seed) for record in self.records)


def colour_of(algorithm: str) -> str:
    """The one colour of a method."""
    return STYLES.get(algorithm, _OTHER)[0]


def by_method(records: Sequence[Record]) -> list[Method]:
    """Put together the runs that differ in nothing but name and seed, in the order given."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        settings = {k: v for k, v in record.settings.items() if k not in _NOT_THE_METHOD}
        groups.setdefault(json.dumps(settings, sort_keys=True), []).append(record)
    members = [*groups.values()]
    methods = []
    for number, group in enumerate(members):
        first = group[0]
        twins = [other[0] for other in members if other[0].algorithm == first.algorithm]
        variant = sum(other[0].algorithm == first.algorithm for other in members[:number])
        colour, dash = STYLES.get(first.algorithm, _OTHER)
        methods.append(
            Method(
                label=_label(first, twins),
                algorithm=first.algorithm,
                records=tuple(group),
                colour=colour,
                dash=dash,
                marker=_MARKERS[variant % len(_MARKERS)],
            )
        )
    return methods


def _label(record: Record, twins: Sequence[Record]) -> str:
    """Name a method by its algorithm and by what tells it from others of the same algorithm."""
    keys = dict.fromkeys(itertools.chain.from_iterable(twin.settings for twin in twins))
    telling = [
        key
        for key in keys
        if key not in _NOT_THE_METHOD
        and len({json.dumps(twin.settings.get(key)) for twin in twins}) > 1
    ]
    if not telling:
        return record.algorithm
    values = (f"{key.rpartition('.')[2]}={record.settings.get(key)}" for key in telling[:3])
    more = f", {len(telling) - 3} more" if len(telling) > 3 else ""
    return f"{record.algorithm} ({', '.join(values)}{more})"
