"""What a report is on the disk: `report.html`, and its pictures again in `figures/`.

A comparison also has its table as text, `table.md`.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tir_alp.report.catalogue import PICTURES
from tir_alp.report.compare import markdown
from tir_alp.report.figures import Drawn, pictures_of_methods, pictures_of_run
from tir_alp.report.methods import by_method
from tir_alp.report.page import page_of_methods, page_of_run
from tir_alp.report.read import Record, read_run

TABLE = "table.md"
"""The numbers that compare runs, beside the page."""


def write_run_report(path: Path, out: Path | None = None) -> Path:
    """Draw a run into its own folder, or into another; an older report there is replaced.

    Args:
        path: The run's folder.
        out: Where to; made if it is not there.

    Returns:
        The page.

    Raises:
        ValueError: If `path` is not a run folder.
    """
    record = read_run(path)
    drawn = pictures_of_run(record)
    return _write(out or path, drawn, lambda pictures: page_of_run(record, drawn, pictures))


def write_comparison(paths: Sequence[Path], out: Path) -> Path:
    """Draw several runs over one another; see `write_run_report`.

    Raises:
        ValueError: If one is no run, or is given twice, or `out` is the folder of a run.
    """
    records: dict[Path, Record] = {}
    for path in paths:
        record = read_run(path)
        if record.path in records:
            raise ValueError(f"{path} is given twice")
        records[record.path] = record
    if (out / "config.json").exists():
        raise ValueError(f"{out} is the folder of a run, whose own report would be lost")
    methods = by_method([*records.values()])
    drawn = pictures_of_methods(methods)
    out.mkdir(parents=True, exist_ok=True)
    (out / TABLE).write_text(markdown(methods), encoding="utf-8")
    return _write(out, drawn, lambda pictures: page_of_methods(methods, drawn, pictures))


def _write(out: Path, drawn: Sequence[Drawn], page: Callable[[Mapping[str, bytes]], str]) -> Path:
    pictures = {each.name: _png(each) for each in drawn}
    figures = out / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    for picture in PICTURES:  # an older report's may have had more
        (figures / f"{picture.name}.png").unlink(missing_ok=True)
    for name, content in pictures.items():
        (figures / f"{name}.png").write_bytes(content)
    aside = out / ".report.html.part"
    aside.write_text(page(pictures), encoding="utf-8")
    os.replace(aside, out / "report.html")
    return out / "report.html"


def _png(drawn: Drawn) -> bytes:
    content = io.BytesIO()
    drawn.figure.savefig(content, format="png")
    return content.getvalue()
