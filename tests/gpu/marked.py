"""The tests that are marked `gpu`, by pytest; without a GPU all of them are skipped."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from tests.gpu.part import Task, perform

ROOT = Path(__file__).parents[2]
MARK = "@pytest.mark." + "gpu"


def marked_files() -> list[Path]:
    """Return the files with such tests: others may import what a bare machine lacks."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [each for each in files if MARK in each.read_text()]


def work(task: Task) -> None:
    """Run them, and count how they ended."""
    files = [str(each.relative_to(ROOT)) for each in marked_files()]
    task.report.add("files", files)
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.xml"
        words = ["-m", "gpu", "-q", "-ra", "-p", "no:cacheprovider", f"--junitxml={found}"]
        left = task.deadline - time.monotonic() - 3
        subprocess.run(
            [sys.executable, "-m", "pytest", *words, *files], cwd=ROOT, timeout=left, check=False
        )
        if not found.exists():
            raise ValueError("pytest ended without a report; see the log")
        cases = [*ElementTree.parse(found).getroot().iter("testcase")]
    ends = {f"{case.get('classname')}::{case.get('name')}": end_of(case) for case in cases}
    counts = {end: [*ends.values()].count(end) for end in ("passed", "failed", "skipped")}
    task.report.add("ends", ends)
    task.report.add("counts", counts)
    if counts["failed"] or not cases:
        raise ValueError(f"{counts['failed']} of {len(cases)} tests failed")
    if task.device.type == "cuda" and not counts["passed"]:
        raise ValueError("all tests were skipped on a machine with a GPU")


def end_of(case: ElementTree.Element) -> str:
    """Return "passed", "failed" or "skipped"."""
    kinds = {child.tag for child in case}
    if kinds & {"failure", "error"}:
        return "failed"
    return "skipped" if "skipped" in kinds else "passed"


if __name__ == "__main__":
    sys.exit(perform(work))
