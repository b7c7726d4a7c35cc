"""Checks, before a run begins, what would otherwise show as a curve that is a little off.

`python -m tir_alp.doctor [--config ...]` prints the table; every run makes the same checks at its
start, and does not start where one fails, unless `doctor.ignore` names it. `docs/audit.md` says
what each of them proves.
"""
