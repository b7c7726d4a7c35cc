"""The colour of each method, the same in every report, and which runs are seeds of one method.

The hues are those of Okabe and Ito, which are distinguishable under the common forms of colour
blindness. The token form of a method has the hue of its sequence form, but is dashed. Runs of one
method that differ in more than their seed are variants: they share a colour, and each has its own
marker.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tir_alp.report.read import RecordedRun

_SOLID, _DASHED = "-", (0, (4, 1.5))
_DOTTED, _MIXED, _SPARSE = (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)), (0, (7, 3))

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
    **{
        name: (hue, dash)
        for hue, names in {
            "#E69F00": ("rloo", "reinforce_pp", "reinforce_pp_baseline"),
            "#56B4E9": ("opo", "max_rl", "pass_at_k"),
            "#808080": ("gdpo", "gigpo", "reinforce"),
            "#7A4A1E": ("otb", "tir_otb", "luspo"),
            "#009E73": ("tis_normalised", "tis_same_version", "vcpo"),
            "#CC79A7": ("kpop", "a3po", "mipu"),
            "#0072B2": ("dppo_tv", "dppo_kl", "tbpo"),
            "#000000": ("sapo", "vespo"),
            "#D55E00": ("gmpo", "vcpo_step"),
            "#66A61E": ("top_entropy", "entropy_bonus", "clip_cov"),
            "#1B6E7A": ("m2po", "kl_cov", "off_policy_mask"),
            "#A6194B": ("unbiased_kl",),
        }.items()
        for name, dash in zip(names, (_DOTTED, _MIXED, _SPARSE), strict=False)
    },
}
"""Algorithm name -> colour, matplotlib line style."""
_OTHER = ("#4B2E83", _SOLID)
_MARKERS = ("", "o", "s", "^", "D", "v", "P", "X", "*")
_NOT_THE_METHOD = ("name", "seed")


@dataclass(frozen=True)
class Method:
    """Runs that differ only in name and seed, and how they are drawn."""

    label: str
    """Name of the algorithm, followed by the settings that distinguish its variants, if any."""
    algorithm: str
    runs: tuple[RecordedRun, ...]
    colour: str
    dash: Any
    marker: str

    @property
    def seeds(self) -> str:
        """The seeds as text, e.g. "0, 1, 2"."""
        return ", ".join(str(run.seed) for run in self.runs)


def colour_of(algorithm: str) -> str:
    """Return the colour of an algorithm."""
    return STYLES.get(algorithm, _OTHER)[0]


def by_method(runs: Sequence[RecordedRun]) -> list[Method]:
    """Group the runs that differ only in name and seed, in the order given."""
    groups: dict[str, list[RecordedRun]] = {}
    for run in runs:
        settings = {k: v for k, v in run.settings.items() if k not in _NOT_THE_METHOD}
        groups.setdefault(json.dumps(settings, sort_keys=True), []).append(run)
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
                runs=tuple(group),
                colour=colour,
                dash=dash,
                marker=_MARKERS[variant % len(_MARKERS)],
            )
        )
    return methods


def _label(run: RecordedRun, twins: Sequence[RecordedRun]) -> str:
    """Return the algorithm's name with the settings that distinguish it from its variants.

    Args:
        run: A run of the method.
        twins: One run of each method with the same algorithm.
    """
    keys = dict.fromkeys(itertools.chain.from_iterable(twin.settings for twin in twins))
    distinguishing = [
        key
        for key in keys
        if key not in _NOT_THE_METHOD
        and len({json.dumps(twin.settings.get(key)) for twin in twins}) > 1
    ]
    if not distinguishing:
        return run.algorithm
    values = (f"{key.rpartition('.')[2]}={run.settings.get(key)}" for key in distinguishing[:3])
    more = f", {len(distinguishing) - 3} more" if len(distinguishing) > 3 else ""
    return f"{run.algorithm} ({', '.join(values)}{more})"
