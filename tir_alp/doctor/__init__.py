"""Checks, before a run starts, for faults that would otherwise only make its curves slightly wrong.

`python -m tir_alp.doctor [--config ...]` prints the results as a table. Every run makes the same
checks at its start, and does not start if one fails, unless `doctor.ignore` names it.
`docs/audit.md` describes what each check proves.
"""
