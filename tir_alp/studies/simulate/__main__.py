"""`python -m tir_alp.studies.simulate RUN [--engines 4] [--max-staleness 0 1 2] ...`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tir_alp.process import run_command
from tir_alp.records.folder import read_run_config
from tir_alp.studies.simulate.costs import read_costs
from tir_alp.studies.simulate.pipeline import Costs, PipelineLayout, simulate


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser("python -m tir_alp.studies.simulate", description=__doc__)
    found.add_argument("run", type=Path, help="a recorded run with rollout.max_staleness = 0")
    found.add_argument("--engines", type=int, nargs="+", default=[1], help="engines")
    found.add_argument("--trainers", type=int, nargs="+", default=[1], help="trainer ranks")
    found.add_argument("--max-staleness", type=int, nargs="+", default=[0])
    found.add_argument("--groups-per-step", type=int, help="default: the run's")
    found.add_argument("--group-size", type=int, help="default: the run's")
    found.add_argument("--engine-slots", type=int, help="concurrent requests per engine")
    found.add_argument("--tool-slots", type=int, help="concurrent tool calls")
    found.add_argument("--on-update", choices=["wait", "keep", "drop"], help="default: the run's")
    found.add_argument(
        "--slowdown",
        type=float,
        default=1.0,
        help="factor by which engine and trainer slow each other down on a shared device",
    )
    found.add_argument("--steps", type=int, default=30, help="simulated training steps")
    return found


def describe(costs: Costs) -> str:
    """Describe the measured costs in one line."""
    engine, trainer = costs.engine, costs.trainer
    return (
        f"a decoding step of b requests: {engine.step_s * 1e3:.3g} + b x "
        f"{engine.request_s * 1e3:.3g} ms; prefill {engine.prefill_token_s * 1e6:.3g} us "
        f"per token; a training step of n tokens: {trainer.step_s:.3g} s + n x "
        f"{trainer.token_s * 1e6:.3g} us; weight update {costs.sync_s:.3g} s"
    )


def main(arguments: Sequence[str]) -> int:
    """Simulate each combination and print one row for each; return 2 if the input is invalid."""
    options = parser().parse_args(arguments)
    try:
        costs = read_costs(options.run, slowdown=options.slowdown)
        recorded = read_run_config(options.run)["rollout"]
        layouts = [
            PipelineLayout(
                groups_per_step=options.groups_per_step or recorded["groups_per_step"],
                group_size=options.group_size or recorded["group_size"],
                max_staleness=staleness,
                engines=engines,
                trainers=trainers,
                engine_slots=options.engine_slots,
                tool_slots=options.tool_slots,
                on_update=options.on_update or recorded["on_update"],
            )
            for engines in options.engines
            for trainers in options.trainers
            for staleness in options.max_staleness
        ]
        forecasts = [simulate(costs, layout, steps=options.steps) for layout in layouts]
    except ValueError as error:
        print(f"tir_alp.studies.simulate: {error}", file=sys.stderr)
        return 2
    table = Table(caption=describe(costs), caption_justify="left")
    names = ("engines", "trainers", "max staleness", "tokens/s", "s per step", "staleness")
    for name in (*names, "engines idle", "trainer idle"):
        table.add_column(name, justify="right")
    for layout, forecast in zip(layouts, forecasts, strict=True):
        table.add_row(
            str(layout.engines),
            str(layout.trainers),
            str(layout.max_staleness),
            f"{forecast.tokens_per_s:,.0f}",
            f"{forecast.seconds_per_step:.3g}",
            f"{forecast.staleness:.2f} (at most {forecast.max_staleness})",
            f"{forecast.engine_idle:.0%}",
            f"{forecast.trainer_idle:.0%}",
        )
    Console(width=120).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
