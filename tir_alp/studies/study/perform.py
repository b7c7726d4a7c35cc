"""Makes the runs of a study, several at a time, and keeps their rows."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tir_alp.report.read import read_run
from tir_alp.studies.study.definition import Planned, Study
from tir_alp.studies.study.rows import Row, read_rows, row_of, write_rows

_ENDED = (0, 3)  # exit codes: of its own accord, or stopped by a guard


@dataclass(frozen=True, slots=True)
class Failed:
    """A run that left no row."""

    planned: Planned
    output: str
    """The last lines that it printed."""


def missing(study: Study, rows: Iterable[Row]) -> list[Planned]:
    """Return the runs that have no row yet.

    Raises:
        ValueError: If a row belongs to no run of the study, or to a run with other settings.
    """
    found = {(row["setting"], row["method"], row["seed"]): row["digest"] for row in rows}
    planned = {each.key: each for each in study.runs}
    for key, digest in found.items():
        setting, method, seed = key
        if key not in planned:
            raise ValueError(
                f"there is a row of setting {setting!r}, method {method!r}, seed {seed}, which the "
                "study does not have: remove the row, or take the method and setting back"
            )
        if planned[key].digest != digest:
            raise ValueError(
                f"the row of setting {setting!r}, method {method!r}, seed {seed} was made with "
                "other settings: remove the row, and the run is made again; or give the study "
                "another name"
            )
    return [each for each in study.runs if each.key not in found]


def perform(
    study: Study,
    rows_file: Path,
    jobs: int,
    *,
    keep: bool,
    log: Callable[[str], None],
    minutes: float | None = None,
) -> list[Failed]:
    """Make the runs that have no row, and add their rows; return those that failed.

    Args:
        study: The study.
        rows_file: Where its rows are.
        jobs: Number of runs at a time.
        keep: Whether the folders of runs are kept once they have a row.
        log: Takes a line about each run.
        minutes: After so many minutes no further run is begun; None: all are made.
    """
    left = missing(study, read_rows(rows_file))
    log(f"{len(study.runs) - len(left)} of {len(study.runs)} runs have a row")
    lock, failed = threading.Lock(), []

    def add(planned: Planned, row: Row) -> None:
        with lock:
            write_rows(rows_file, [*read_rows(rows_file), row])
            log(f"{planned.config.name}: {_shown(row)}")

    for planned, result in make_runs(study, left, jobs, minutes):
        if isinstance(result, Failed):
            failed.append(result)
            log(f"{planned.config.name} failed:\n{result.output}")
            continue
        add(planned, result)
        if not keep:
            shutil.rmtree(_folder(planned), ignore_errors=True)
    return failed


def make_runs(
    study: Study, planned: Sequence[Planned], jobs: int, minutes: float | None = None
) -> Iterable[tuple[Planned, Row | Failed]]:
    """Make runs, `jobs` at a time, and yield what each came to, as they end.

    After `minutes` no further run is begun.
    """
    deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes

    def make(each: Planned) -> Row | Failed | None:
        return _run(study, each) if time.monotonic() < deadline else None

    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(make, each): each for each in planned}
        try:
            for future in as_completed(futures):
                if (found := future.result()) is not None:
                    yield futures[future], found
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _run(study: Study, planned: Planned) -> Row | Failed:
    """Make one run from its start in a process of its own; what an earlier attempt left is gone."""
    folder = _folder(planned)
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "tir_alp.train", "--config", str(study.base), *planned.words]
    result = _called(command, planned.threads, subprocess.STDOUT)
    if result.returncode not in _ENDED:
        lines = [f"exit code {result.returncode}", *result.stdout.splitlines()[-15:]]
        return Failed(planned, "\n".join(lines))
    measures = study.config.measures
    found = _landscape(folder, planned.threads) if measures.landscape else None
    return row_of(read_run(folder), planned, measures, found)


def _landscape(folder: Path, threads: int) -> Any:
    """Measure the last policy of a run; None if it left none."""
    command = [sys.executable, "-m", "tir_alp.studies.landscape", str(folder)]
    result = _called(command, threads, subprocess.PIPE)
    return json.loads(result.stdout) if result.returncode == 0 else None


def _called(command: Sequence[str], threads: int, stderr: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )


def _folder(planned: Planned) -> Path:
    assert planned.config.name is not None
    return Path("runs") / planned.config.name


def _shown(row: Row) -> str:
    took_off = "no take-off" if row["took_off"] is None else f"take-off in step {row['took_off']}"
    collapsed = "" if row["collapsed"] is None else f", collapse in step {row['collapsed']}"
    return f"{took_off}{collapsed}, level {row['level']}, accuracy {row['accuracy']}"
