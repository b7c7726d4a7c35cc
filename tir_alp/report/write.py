"""Writes a report: `report.html`, `report.md`, and their pictures as files in `figures/`.

A comparison also writes its table as text, `table.md`.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

from tir_alp.report.catalogue import PICTURES
from tir_alp.report.compare import COLUMNS, row
from tir_alp.report.curves import Curves, curves_of_methods, curves_of_run
from tir_alp.report.document import Document, Figure, Table
from tir_alp.report.examples import read_examples
from tir_alp.report.figures import DrawnPicture, pictures_of_methods, pictures_of_run
from tir_alp.report.html import page_of
from tir_alp.report.markdown import table_text, text_of
from tir_alp.report.methods import by_method
from tir_alp.report.of_methods import document_of_methods
from tir_alp.report.of_run import document_of_run
from tir_alp.report.read import RecordedRun, read_run

PAGE, TEXT, TABLE = "report.html", "report.md", "table.md"
"""Files: the page, the same as text, and the table of a comparison."""


def write_run_report(
    path: Path, out: Path | None = None, price_per_hour: float | None = None
) -> Path:
    """Draw a run; an older report in the same folder is replaced.

    Args:
        path: The run folder.
        out: Folder to write to, created if it is missing; None means the run folder.
        price_per_hour: What an hour of the machine costs, in any currency; None: unknown.

    Returns:
        The path of the page.

    Raises:
        ValueError: If `path` is not a run folder.
    """
    run = read_run(path)
    drawn = pictures_of_run(run)
    document = document_of_run(run, _figures(drawn), read_examples(path), price_per_hour)
    return _write(out or path, drawn, document, curves_of_run(run))


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
    table = Table(COLUMNS, tuple(tuple(row(method)) for method in methods))
    (out / TABLE).write_text(table_text(table), encoding="utf-8")
    document = document_of_methods(methods, _figures(drawn))
    return _write(out, drawn, document, curves_of_methods(methods))


def _figures(drawn: Sequence[DrawnPicture]) -> list[Figure]:
    return [Figure(each.name, each.title, each.caption) for each in drawn]


def _write(out: Path, drawn: Sequence[DrawnPicture], document: Document, curves: Curves) -> Path:
    pictures = {each.name: _png(each) for each in drawn}
    figures = out / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    for picture in PICTURES:  # an older report may have had more
        (figures / f"{picture.name}.png").unlink(missing_ok=True)
    for name, content in pictures.items():
        (figures / f"{name}.png").write_bytes(content)
    _replace(out / TEXT, text_of(document))
    _replace(out / PAGE, page_of(document, pictures, curves))
    return out / PAGE


def _replace(file: Path, text: str) -> None:
    temporary = file.with_name(f".{file.name}.part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)


def _png(drawn: DrawnPicture) -> bytes:
    content = io.BytesIO()
    drawn.figure.savefig(content, format="png")
    return content.getvalue()
