"""Threads that compute end with what they computed, so that those of the next part need not sleep.

With more of them than processors, GNU's OpenMP puts all of them to sleep between two operations.
"""

import os
import subprocess
import sys

import pytest

NUM_OTHERS = """
import os, threading, time, torch
torch.set_num_threads(2)
from tir_alp.training.compute_threads import release_threads, releasing

def others():
    "Threads that are not Python's: those that compute, and those of gloo."
    return len(os.listdir("/proc/self/task")) - threading.active_count()

def compute():
    torch.ones(900, 900) @ torch.ones(900, 900)

def settled(number):
    "A thread that was told to end takes a moment."
    end = time.monotonic() + 60
    while others() != number and time.monotonic() < end:
        time.sleep(0.05)
    return others()
"""

OF_ONE_CALL = """
release_threads()
before = others()
compute()
during = others()
releasing(compute)()
print(during - before, settled(before) - before)
"""

OF_A_TRAINER = """
from tests.training.harness import noisy, trainer
from tests.training.test_shared_prompts import groups_of, near_policy
torch.set_num_threads(2)  # the modules above set 1
one, groups = trainer(noisy()), near_policy(groups_of(sizes=(8,), num_prompt=(600, 700)))
release_threads()
before = others()
releasing(one.step)(groups, 0)
dict(one.weights())
release_threads()
print(torch.get_num_threads() - 1, settled(before) - before)
"""

OF_AN_ENGINE = """
import asyncio
from tests.engines.embedded import opened
from tir_alp.engines.base import Sampling
torch.set_num_threads(2)  # the module above sets 1

async def run():
    async with opened() as engine:
        release_threads()
        before = others()
        prompt = tuple(range(6, 262)) * 4
        asked = (Sampling(max_tokens=3, sequence_uid=uid) for uid in range(16))
        await asyncio.gather(*(engine.generate(prompt, each) for each in asked))
        print(torch.get_num_threads() - 1, await asyncio.to_thread(settled, before) - before)

asyncio.run(run())
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs Linux")
@pytest.mark.parametrize("script", [OF_ONE_CALL, OF_A_TRAINER, OF_AN_ENGINE])
def test_no_thread_is_left_that_computed(script: str):
    done = subprocess.run(
        [sys.executable, "-c", NUM_OTHERS + script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1", "0"]


@pytest.mark.parametrize(("given", "found"), [({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7")])
def test_a_command_says_how_long_threads_wait_awake(given: dict[str, str], found: str):
    kept = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    script = "from tir_alp.process import *; begin_command(); print(os.environ['GOMP_SPINCOUNT'])"
    printed = subprocess.check_output([sys.executable, "-c", script], env=kept | given, text=True)
    assert printed.strip() == found
