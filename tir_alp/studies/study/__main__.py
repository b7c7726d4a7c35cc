"""Makes the runs of a study, and its table and pictures: `tir-alp study FILE`.

    tir-alp study FILE [--jobs N] [--minutes N]     the runs that have no row yet, then the table
    tir-alp study FILE --table                      table and pictures of the rows that there are
    tir-alp study FILE --repeat SETTING METHOD      that cell once more; fails if a row differs

FILE says which question is asked, what is expected and how it is decided, before any run is made.
Rows are kept in a folder with the name of FILE beside it: `rows.jsonl`, `table.md` and pictures. An
interrupted study goes on where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tir_alp.process import run_command
from tir_alp.studies.study.definition import Study, read_study
from tir_alp.studies.study.figures import draw
from tir_alp.studies.study.perform import Failed, make_runs, missing, perform
from tir_alp.studies.study.rows import read_rows
from tir_alp.studies.study.summary import markdown


def write_summary(study: Study, folder: Path) -> None:
    """Write the table and the pictures of the rows in a folder."""
    rows = read_rows(folder / "rows.jsonl")
    missing(study, rows)  # refuses rows of other settings
    (folder / "table.md").write_text(markdown(study.config, rows))
    draw(study.config, rows, folder)
    print(f"{len(rows)} of {len(study.runs)} runs: {folder / 'table.md'}")


def repeat(study: Study, rows_file: Path, setting: str, method: str, jobs: int) -> int:
    """Make the runs of a cell once more; return the number of rows that differ or are missing."""
    kept = {(row["setting"], row["method"], row["seed"]): row for row in read_rows(rows_file)}
    cell = [each for each in study.runs if (each.setting, each.method) == (setting, method)]
    if not cell:
        raise ValueError(f"the study has no setting {setting!r} with a method {method!r}")
    again = []
    for each in cell:
        name = f"{each.config.name}-again"
        config = each.config.model_copy(update={"name": name})
        values = {**each.values, "name": name}
        again.append(dataclasses.replace(each, config=config, values=values))
    differ = 0
    for planned, found in make_runs(study, again, jobs):
        is_equal = not isinstance(found, Failed) and found == kept.get(planned.key)
        print(f"{planned.config.name}: {'equal' if is_equal else 'DIFFERENT'}", flush=True)
        differ += not is_equal
    return differ


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser(
        "tir-alp study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("file", type=Path, metavar="FILE", help="TOML file of the study")
    found.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    found.add_argument("--minutes", type=float, help="begin no further run after so many minutes")
    found.add_argument("--keep-runs", action="store_true", help="keep the folders of the runs")
    found.add_argument("--table", action="store_true", help="make no runs, only the table")
    found.add_argument(
        "--repeat", nargs=2, metavar=("SETTING", "METHOD"), help="make a cell once more"
    )
    return found


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    options = parser().parse_args(arguments)
    if options.jobs < 1:
        parser().error(f"--jobs ({options.jobs}) must be at least 1")
    try:
        study = read_study(options.file)
        folder = options.file.with_suffix("")
        folder.mkdir(exist_ok=True)
        if options.repeat:
            setting, method = options.repeat
            return int(repeat(study, folder / "rows.jsonl", setting, method, options.jobs) > 0)
        failed = []
        if not options.table:
            failed = perform(
                study,
                folder / "rows.jsonl",
                options.jobs,
                keep=options.keep_runs,
                log=lambda line: print(line, flush=True),
                minutes=options.minutes,
            )
        write_summary(study, folder)
    except ValueError as error:
        print(f"tir-alp study: {error}", file=sys.stderr)
        return 2
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
