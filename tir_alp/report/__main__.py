"""`python -m tir_alp.report RUN [RUN ...] [--out FOLDER]`: draw a run, or compare several."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tir_alp.process import run_command
from tir_alp.report import write_comparison, write_run_report
from tir_alp.report.write import TABLE


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser("python -m tir_alp.report", description=__doc__)
    found.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder")
    found.add_argument(
        "--out",
        type=Path,
        help="folder to write to; default: the run folder, or report-TIME beside the first run",
    )
    found.add_argument(
        "--price-per-hour",
        type=float,
        metavar="PRICE",
        help="what an hour of the machine costs, for the cost of one run",
    )
    return found


def main(arguments: Sequence[str]) -> int:
    """Write the report and print its path; return 2 if an argument is not a run folder."""
    options = parser().parse_args(arguments)
    runs: list[Path] = options.runs
    try:
        if len(runs) == 1:
            page = write_run_report(runs[0], options.out, options.price_per_hour)
        else:
            beside = runs[0].parent / f"report-{time.strftime('%Y%m%d-%H%M%S')}"
            page = write_comparison(runs, options.out or beside)
            print((page.parent / TABLE).read_text(encoding="utf-8"))
    except ValueError as error:
        print(f"tir_alp.report: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}" if error.filename else error
        print(f"tir_alp.report: {reason}; --out FOLDER writes elsewhere", file=sys.stderr)
        return 2
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
