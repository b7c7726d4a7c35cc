"""All checks of a start without the run, as a table."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence

from rich.table import Table

from tir_alp.cluster import open_cluster
from tir_alp.config import Config
from tir_alp.doctor.check_result import CheckResult
from tir_alp.doctor.start import examine_environment, examine_inputs, examine_launched
from tir_alp.run.console import RunConsole
from tir_alp.run.launch import launch
from tir_alp.run.placement import open_placement
from tir_alp.run.prepare import prepare


async def examine(config: Config) -> list[CheckResult]:
    """Make all checks of a start.

    Raises:
        ValueError: For a mistake that keeps the checks from being made.
    """
    console = RunConsole()
    prepared = await asyncio.to_thread(prepare, config, None, console.print)
    async with open_placement(config, open_cluster, console.print) as placement:
        await asyncio.to_thread(examine_environment, prepared, placement.make_env, 1)
        findings, prompts = await asyncio.to_thread(
            examine_inputs, prepared, placement.make_env, placement.nodes()
        )
        async with launch(prepared, placement) as launched:
            return findings + await examine_launched(prepared, launched, prompts)


def table_of(findings: Sequence[CheckResult], ignored: Collection[str]) -> Table:
    """One row per check: its verdict, the figure, and the fix if it failed."""
    table = Table("check", "", box=None, header_style="bold")
    for column in ("figure", "fix"):
        table.add_column(column, overflow="fold")  # a setting's name is never cut
    for finding in findings:
        is_ignored = finding.check in ignored
        verdict = "ok" if finding.holds else "ignored" if is_ignored else "[red]FAILS"
        table.add_row(finding.check, verdict, finding.figure, "" if finding.holds else finding.fix)
    return table
