"""Checks what a program written by the model can reach, by running one through the environment.

The sandbox probes itself when it starts (`python -m tir_alp.sandbox probe` prints the list). This
is a second check, made at the end of the chain that a run uses, whatever the environment. Every
attack here is harmless if it succeeds.
"""

from __future__ import annotations

import socket
import tempfile
from pathlib import Path

import gymnasium

from tir_alp.doctor.check_result import CheckResult
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
_ANSWER = "reached:"  # not part of the program, which an environment may echo


def check_sandbox(env: gymnasium.Env[str, str], task: Task) -> CheckResult:
    """Let an environment run a program that tries to escape."""
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
        return CheckResult(
            "sandbox",
            not info.get("tool_calls"),
            f"the environment ran no program and answered {observation[-100:]!r}",
            "the check needs a program to run: find out why this one did not",
        )
    reached = reached.strip("; \n")
    return CheckResult(
        "sandbox",
        not reached,
        f"a program reached {reached}" if reached else "4 escapes tried, none succeeded",
        "the model's programs are not confined: use a backend that confines them (python -m "
        "tir_alp.sandbox probe), or run the trainer where they may do all of this",
    )
