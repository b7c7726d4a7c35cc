"""A study: methods × settings × seeds, from a file that says beforehand what is asked and how.

`definition` reads the file, `perform` makes the runs, `rows` keeps what a run came to, `summary`
and `figures` make tables and pictures of rows. `python -m tir_alp.studies.study FILE` does it all.
"""
