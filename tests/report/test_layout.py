"""Where panels go: whatever is drawn, nothing is cut off and nothing covers anything else."""

import itertools
import math

import pytest
from matplotlib.transforms import Bbox

from tests.report.test_report import METRICS, make_run
from tir_alp.algorithm.presets import ALGORITHMS
from tir_alp.report.figures import pictures_of_methods, pictures_of_run
from tir_alp.report.methods import by_method
from tir_alp.report.read import read_run

LAYERS = {f"alp/sigma_{layer}": 0.01 * (layer + 1) for layer in range(28)}
LAYERS |= {f"alp/relative_rms_{layer}": 1e-7 * (layer + 1) for layer in range(6)}
PERCENTILES = {
    f"{prefix}{n}": 10 ** ((n - 50) / 8)
    for prefix in ("ratio/p", "ratio/turn_p", "ratio/token_p")
    for n in (2, 5, 25, 50, 75, 95, 98)
}
OUTCOMES = {
    f"outcome/{name}": 10.0**number
    for number, name in enumerate(
        ("ok", "tool_error", "tool_timeout", "resource_limit", "infra_error", "grader_error")
    )
}
OTHER = {
    **{"kl/rollout_k3": -3e-7, "mismatch/k3": 1e-9, "mismatch/kl": 2.5e-7, "train/lr": 1.25e-6},
    **{"mismatch/probe_mean": 1e-5, "mismatch/probe_kl": -1e-12, "grad_norm/log_sigma": 3e-6},
    **{"loss/value": -123456.0, "perplexity/policy": 1.0000001, "tokens/per_second": 1.3e7},
    **{"staleness/share_0": 0.2, "staleness/share_1": 0.3, "staleness/max": 1.0},
}
EVERYTHING = METRICS | LAYERS | PERCENTILES | OUTCOMES | OTHER


def series(factor):
    """A run of 60 steps whose values grow or shrink by a factor in all."""
    return [
        (step, {name: value * factor ** (step / 60) for name, value in EVERYTHING.items()})
        for step in range(1, 61)
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    odd = {
        name: [math.nan, math.inf, value][n % 3]
        for n, (name, value) in enumerate(EVERYTHING.items())
    }
    kinds = {
        "flat": series(1.0),
        "grows": series(1e6),
        "shrinks": series(1e-9),
        "short": [(1, EVERYTHING)],
        "odd": [(1, EVERYTHING), (2, odd), (123456, EVERYTHING)],
    }
    return {
        name: read_run(make_run(folder / name, metrics, algorithm=ALGORITHMS[algorithm]))
        for (name, metrics), algorithm in zip(kinds.items(), sorted(ALGORITHMS), strict=False)
    }


def boxes(figure):
    """The rectangles of axes, with all that is written around them, and of shared legends."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    drawn = [axes.get_tightbbox(renderer) for axes in figure.axes]
    return drawn + [legend.get_window_extent(renderer) for legend in figure.legends]


def assert_in_place(pictures):
    assert pictures
    for picture in pictures:
        found, (width, height) = boxes(picture.figure), picture.figure.bbox.size
        for box in found:
            edges = (box.x0, box.y0, width - box.x1, height - box.y1)
            assert min(edges) >= -1, (picture.name, edges)
        for one, other in itertools.combinations(found, 2):
            shared = Bbox.intersection(one, other)
            assert shared is None or min(shared.size) < 1, (picture.name, one, other)


@pytest.mark.parametrize("name", ["flat", "grows", "shrinks", "short", "odd"])
def test_a_picture_of_a_run_has_room_for_all_that_is_in_it(runs, name):
    assert_in_place(pictures_of_run(runs[name]))


def test_a_picture_of_methods_has_room_for_all_that_is_in_it(runs):
    assert_in_place(pictures_of_methods(by_method([*runs.values()])))
    assert_in_place(pictures_of_methods(by_method([runs["flat"]])))
