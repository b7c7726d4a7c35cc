"""Draws a page of one run, or of several: `python -m tir_alp.report RUN ...`.

    read.py        a run folder -> RecordedRun; examples.py: some of its trajectories
    catalogue.py   the table of pictures
    methods.py     the colour of each method, and which runs are seeds of one method
    series.py      the lines of a panel; intervals.py: means with intervals; rules.py: clip bounds
    figures.py     runs -> matplotlib figures; layout.py: where their panels go
    curves.py      runs -> the same panels as data, for curves that can be zoomed
    verdict.py     a run -> sentences made from its numbers; facts.py: where it comes from
    compare.py     runs -> summary numbers, and the rows of the table that compares methods
    of_run.py      a run -> Document (document.py); of_methods.py: several runs -> Document
    html.py        a Document -> one HTML file; markdown.py: the same as Markdown
    write.py       writes the files

A report only reads what a run wrote, so it can be drawn for a run that is still going on, was
killed, or was written by another version: a missing metric is left out.
"""

from tir_alp.report.write import write_comparison, write_run_report

__all__ = ["write_comparison", "write_run_report"]
