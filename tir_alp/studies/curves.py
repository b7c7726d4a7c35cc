"""Curves of reward from the rows of a study: `python -m tir_alp.studies.curves ROWS --out PNG`.

The rows are those of `docs/results/real.jsonl` and `docs/results/mixture.jsonl`. Each model that
was trained by reinforcement learning has a thick line, the mean over its seeds, and a thin one per
seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tir_alp.process import run_command
from tir_alp.report.layout import arrange, canvas
from tir_alp.report.methods import colour_of

_REWARD = "rollout/reward"
_DASHES = ("-", "--", ":")  # of one method in several precisions
Curve = Mapping[int, float]
"""Step -> mean reward."""


def curves_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Curve]]:
    """Return the curves of each model and precision, one per seed, in the order of the rows.

    Rows without a curve, those of models that were not trained so, are left out, and so are those
    of evaluations that repeat the training of another row.
    """
    found: dict[str, dict[int, Curve]] = defaultdict(dict)
    for row in rows:
        steps = [step for step in row.get("steps", ()) if _REWARD in step]
        if steps:
            label = ", ".join(filter(None, (row["model"], row.get("dtype"))))
            found[label][row["seed"]] = {step["step"]: step[_REWARD] for step in steps}
    return {model: [*by_seed.values()] for model, by_seed in found.items()}


def mean_of(curves: Sequence[Curve]) -> Curve:
    """Return the mean of some curves over the steps that all of them have."""
    common = sorted(set.intersection(*(set(curve) for curve in curves)))
    return {step: statistics.fmean(curve[step] for curve in curves) for step in common}


def draw(curves: Mapping[str, Sequence[Curve]], out: Path) -> None:
    """Draw the curves of some models into a PNG file."""
    figure, (axes,) = canvas(1)
    num_drawn: Counter[str] = Counter()
    for label, of_seeds in curves.items():
        method = label.partition(",")[0]
        dash = _DASHES[num_drawn[method] % len(_DASHES)]
        look: dict[str, Any] = {"color": colour_of(method), "linestyle": dash}
        num_drawn[method] += 1
        for curve in of_seeds:
            axes.plot(*_points(curve), **look, linewidth=0.8, alpha=0.4)
        count = len(of_seeds)
        text = f"{label}, {count} seed{'s' * (count > 1)}"
        axes.plot(*_points(mean_of(of_seeds)), **look, linewidth=2, label=text)
    axes.set_xlabel("step")
    axes.set_ylabel("mean reward of the step")
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.25)
    arrange(figure, [axes], shared=[axes])
    figure.savefig(out, dpi=110, metadata={"Software": None})


def _points(curve: Curve) -> tuple[list[int], list[float]]:
    return [*curve], [*curve.values()]


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser("python -m tir_alp.studies.curves", description=__doc__)
    found.add_argument("rows", type=Path, help="file of rows, in JSON lines")
    found.add_argument("--out", type=Path, required=True, help="PNG file that is written")
    return found


def main(arguments: Sequence[str]) -> int:
    """Draw a file of rows; returns the exit code, 2 if it has no curve."""
    of_words = parser()
    options = of_words.parse_args(arguments)
    try:
        rows = [json.loads(line) for line in options.rows.read_text().splitlines()]
        curves = curves_of(rows)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        of_words.error(
            f"{options.rows} is no file of rows of a study: {type(error).__name__}: {error}"
        )
    if not curves:
        of_words.error(f"{options.rows} has no row with steps of reinforcement learning")
    draw(curves, options.out)
    for model, of_seeds in curves.items():
        print(f"{model}: seeds: {len(of_seeds)}, steps: {len(mean_of(of_seeds))}")
    print(options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
