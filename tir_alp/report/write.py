"""Writes a report: `report.html`, and its pictures as files in `figures/`.

A comparison also writes its table as text, `table.md`.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tir_alp.report.catalogue import PICTURES
from tir_alp.report.compare import markdown
from tir_alp.report.figures import DrawnPicture, pictures_of_methods, pictures_of_run
from tir_alp.report.methods import by_method
from tir_alp.report.page import page_of_methods, page_of_run
from tir_alp.report.read import RecordedRun, read_run

TABLE = "table.md"
"""File with the table of a comparison, beside the page."""


def write_run_report(path: Path, out: Path | None = None) -> Path:
    """Draw a run; an older report in the same folder is replaced.

    Args:
        path: The run folder.
        out: Folder to write to, created if it is missing; None means the run folder.

    Returns:
        The path of the page.

    Raises:
        ValueError: If `path` is not a run folder.
    """
    run = read_run(path)
    drawn = pictures_of_run(run)
    return _write(out or path, drawn, lambda pictures: page_of_run(run, drawn, pictures))


def write_comparison(paths: Sequence[Path], out: Path) -> Path:
    """Draw several runs in the same pictures; see `write_run_report`.

    Raises:
        ValueError: If a path is not a run folder or is given twice, or if `out` is a run folder.
    """
    runs: dict[Path, RecordedRun] = {}
    for path in paths:
        run = read_run(path)
        if run.path in runs:
            raise ValueError(f"{path} is given twice")
        runs[run.path] = run
    if (out / "config.json").exists():
        raise ValueError(f"{out} is a run folder, whose own report would be overwritten")
    methods = by_method([*runs.values()])
    drawn = pictures_of_methods(methods)
    out.mkdir(parents=True, exist_ok=True)
    (out / TABLE).write_text(markdown(methods), encoding="utf-8")
    return _write(out, drawn, lambda pictures: page_of_methods(methods, drawn, pictures))


def _write(
    out: Path, drawn: Sequence[DrawnPicture], page: Callable[[Mapping[str, bytes]], str]
) -> Path:
    pictures = {each.name: _png(each) for each in drawn}
    figures = out / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    for picture in PICTURES:  # an older report may have had more
        (figures / f"{picture.name}.png").unlink(missing_ok=True)
    for name, content in pictures.items():
        (figures / f"{name}.png").write_bytes(content)
    temporary = out / ".report.html.part"
    temporary.write_text(page(pictures), encoding="utf-8")
    os.replace(temporary, out / "report.html")
    return out / "report.html"


def _png(drawn: DrawnPicture) -> bytes:
    content = io.BytesIO()
    drawn.figure.savefig(content, format="png")
    return content.getvalue()
