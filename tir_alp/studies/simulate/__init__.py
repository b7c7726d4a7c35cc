"""Predicts throughput, staleness and idle time of a run on machines that one does not have yet.

    python -m tir_alp.studies.simulate runs/NAME --engines 4 --trainers 8 --max-staleness 0 1 2

`costs` reads from a recorded run what its parts cost, `pipeline` plays rollouts, engines, trainer
and weight updates with these costs as discrete events. All that it knows of a machine are the
recorded times: it says nothing about networks or memory that the recorded run did not meet.
"""
