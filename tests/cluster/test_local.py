"""A cluster that a run starts on this machine for itself."""

import subprocess
import sys

import pytest

pytest.importorskip("ray")

PROGRAM = """
import os
import ray
from tir_alp.cluster.reservation import connect
from tir_alp.config import ClusterConfig
connect(ClusterConfig(address="local"), print)
print(os.nice(0), ray.get(ray.remote(lambda: os.nice(0)).remote()))
"""


def test_actors_have_the_priority_of_the_run_itself():
    """In its own process: a process can be in one cluster only."""
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    of_the_run, of_an_actor = done.stdout.split()
    assert of_an_actor == of_the_run
