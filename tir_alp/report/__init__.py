"""Draws pictures and a page of one run, or of several: `python -m tir_alp.report RUN ...`.

    read.py       a run folder -> RecordedRun
    catalogue.py  the table of pictures
    meanings.py   what each metric means, and its unit
    methods.py    the colour of each method, and which runs are seeds of one method
    figures.py    runs -> matplotlib figures
    layout.py     where the panels of a figure go
    compare.py    runs -> summary numbers, and the table that compares methods
    page.py       figures and numbers -> one self-contained HTML file
    write.py      writes the files

A report only reads what a run wrote, so it can be drawn for a run that is still going on, was
killed, or was written by another version: a missing metric is left out.
"""

from tir_alp.report.write import write_comparison, write_run_report

__all__ = ["write_comparison", "write_run_report"]
