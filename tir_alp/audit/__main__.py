"""`python -m tir_alp.audit RUN`: exit code 0 only if every token is accounted for."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tir_alp.audit import Findings, audit_run
from tir_alp.audit.evaluation import audit_evaluation
from tir_alp.audit.sft import audit_sft
from tir_alp.process import run_command
from tir_alp.records.folder import read_command

_MOST_SHOWN = 20
_AUDITS = {"sft": audit_sft, "evaluate": audit_evaluation}


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser("python -m tir_alp.audit", description=__doc__)
    found.add_argument("run", type=Path, metavar="RUN", help="the run folder")
    return found


def main(arguments: Sequence[str]) -> int:
    """Audit a run; return 1 if anything has drifted, 2 if the folder cannot be audited."""
    path: Path = parser().parse_args(arguments).run
    try:
        findings = _AUDITS.get(read_command(path), audit_run)(path)
    except ValueError as error:
        print(f"tir_alp.audit: {error}", file=sys.stderr)
        return 2
    _show(findings)
    if findings.drifts:
        print(f"{path}: {len(findings.drifts)} drifts; the first is\n  {findings.drifts[0]}")
        return 1
    print(f"{path}: every token is accounted for")
    return 0


def _show(findings: Findings) -> None:
    table = Table("checked", "how many", "drifted", box=None, header_style="bold")
    for check, (checked, drifted) in findings.totals().items():
        table.add_row(check, str(checked), f"[red]{drifted}" if drifted else "0")
    console = Console()
    console.print(table)
    for note in findings.notes:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    for drift in findings.drifts[:_MOST_SHOWN]:
        console.print(f"drift: {drift}", markup=False, highlight=False, soft_wrap=True)
    if (more := len(findings.drifts) - _MOST_SHOWN) > 0:
        console.print(f"and {more} more")


if __name__ == "__main__":
    sys.exit(run_command(main))
