"""What can a program of the model's reach? Tried through the environment, as the model would.

The sandbox attacks itself when it starts (`tir_alp.sandbox probe` shows the whole list). This is
the second look, at the end of the chain that a run uses, whoever built it. Every attack here is
harmless where it works.
"""

from __future__ import annotations

import socket
import tempfile
from pathlib import Path

import gymnasium

from tir_alp.doctor.finding import Finding
from tir_alp.rollouts.data import Task

_PROGRAM = """\
```python
import os, socket, subprocess, sys
def reaches(attack):
    try:
        return bool(attack())
    except BaseException:
        return False
attacks = {{
    "a file of the host": lambda: open({file!r}).read() == "canary",
    "a folder of the host, to write": lambda: open({file!r} + ".x", "w").write("x"),
    "the network": lambda: socket.create_connection(("127.0.0.1", {port}), 2),
    "other programs": lambda: subprocess.run([sys.executable, "-c", ""]).returncode == 0,
}}
print("rea" "ched:", *[name for name, attack in attacks.items() if reaches(attack)], sep="; ")
```"""
_ANSWER = "reached:"  # not to be found in the program: an environment may only repeat that


def check_sandbox(env: gymnasium.Env[str, str], task: Task) -> Finding:
    """Let an environment run a program that tries to get out."""
    with (
        tempfile.TemporaryDirectory(prefix="doctor-") as folder,
        socket.create_server(("127.0.0.1", 0)) as server,
    ):
        canary = Path(folder, "canary")
        canary.write_text("canary")
        env.reset(seed=task.seed, options=task.to_options())
        program = _PROGRAM.format(file=str(canary), port=server.getsockname()[1])
        observation, *_, info = env.step(program)
    _, answered, reached = observation.partition(_ANSWER)
    if not answered:
        return Finding(
            "sandbox",
            not info.get("tool_calls"),
            f"the environment ran no program, and said {observation[-100:]!r}",
            "a program that tries to get out has to be able to run: see why this one did not",
        )
    reached = reached.strip("; \n")
    return Finding(
        "sandbox",
        not reached,
        f"a program reached {reached}" if reached else "4 ways out tried, none works",
        "programs of the model are not held in: take a backend that is (python -m tir_alp.sandbox "
        "probe), or run the trainer where they may do all that",
    )
