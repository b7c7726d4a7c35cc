"""Pictures and a page of a run, or of several side by side: `python -m tir_alp.report RUN ...`.

    read.py       the files of a run's folder -> Record
    catalogue.py  what there is to draw, and what each metric means
    methods.py    the colour of each method; which runs are seeds of one method
    figures.py    records -> matplotlib figures
    compare.py    records -> the numbers of the table that compares them
    page.py       figures and numbers -> one HTML file that needs nothing beside it
    write.py      what is written where

A report only reads what a run wrote, so it can be drawn of a run that still goes on, was killed, or
comes from another version: a metric that is not there is left out.
"""

from tir_alp.report.write import write_comparison, write_run_report

__all__ = ["write_comparison", "write_run_report"]
