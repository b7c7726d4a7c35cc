"""A local page that shows every token of a run: `python -m tir_alp.inspect RUN [OTHER ...]`.

    rows.py        the record of a trajectory -> the row that lists show of it
    index.py       the rows of all trajectories of a run, in a database that grows with the run
    pieces.py      token ids -> the text of each token
    highlight.py   where code is in a text, and how it is coloured
    episode.py     one trajectory -> everything that the page shows of its tokens
    curves.py      metrics of a run
    findings.py    the audit of a run, in a process of its own
    source.py      a run -> what the page asks for
    server.py      serves page and data on this machine alone
    export.py      the page with its data as one file
    static/        the page

The inspector only reads what a run wrote; a cache of its own is all that it writes. Text of models
and tools is hostile: it leaves here as JSON, and the page puts it into text nodes alone.
"""
