"""Predicts throughput, staleness and idle time of a run on other numbers of machines.

    python -m tir_alp.studies.simulate runs/NAME --engines 4 --trainers 8 --max-staleness 0 1 2

`costs` measures the costs of a recorded run, and `pipeline` simulates rollouts, engines, trainer
and weight updates with these costs as discrete events. It knows a machine only by the recorded
times: it does not predict limits of network or memory that the recorded run did not meet.
"""
