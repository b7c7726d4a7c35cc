"""What both sides of the benchmark have in common: a case, and a worker that is told when to step.

Only the standard library is imported: one side runs in the Python of TRL, which lacks this project.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAM = "print(sum(n * n for n in range(1000)))"
"""What every tool call runs."""
SHOWN = "332833500"
"""What it prints, and what is shown between two completions where there is no tool."""


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the table, for one side."""

    model: str
    """Name of the model, for people."""
    folder: str
    """Its Hugging Face folder."""
    num_completions: int
    """Completions of a sequence; between two of them there is an observation."""
    has_tool: bool
    """Whether each observation is the result of a tool call."""
    precision: str
    """"float32" or "bfloat16"."""
    share_prompts: bool
    """Whether our trainer computes a group's prompt once."""
    num_groups: int
    group_size: int
    num_tokens: int
    """Tokens of each completion."""
    steps: int
    """Steps, the one that warms up included."""
    threads: int
    num_examples: int = 0
    """Worked examples before each question, which make the prompt longer."""
    questions: tuple[str, ...] = ()
    """One question per group, in the order of the steps."""

    @property
    def num_sequences(self) -> int:
        """Sequences of a step."""
        return self.num_groups * self.group_size


class Channel:
    """Lines of JSON: from the benchmark on standard input, to it on what was standard output.

    Standard output itself becomes standard error, because libraries print there.
    """

    def __init__(self) -> None:
        self._out = os.dup(1)
        os.dup2(2, 1)

    def receive(self) -> dict[str, Any] | None:
        """Return the next message, None at the end; it reads no further than the line."""
        line = bytearray()
        while (byte := os.read(0, 1)) not in (b"", b"\n"):
            line += byte
        return json.loads(line) if line else None

    def send(self, message: dict[str, Any]) -> None:
        """Send one message."""
        data = json.dumps(message).encode() + b"\n"
        while data:
            data = data[os.write(self._out, data) :]


def serve(perform: Callable[[Case, Channel], None]) -> None:
    """Perform cases until the benchmark ends, each in a process of its own.

    The process is forked after the imports, which take longer than many a case, so that its peak
    memory is that of one case.
    """
    channel = Channel()
    channel.send({"ready": True})
    while (message := channel.receive()) is not None:
        message["questions"] = tuple(message["questions"])
        case = Case(**message)
        pid = os.fork()
        if pid == 0:
            sys.exit(_perform(perform, case, channel))  # not os._exit: a sandbox has to be closed
        os.waitpid(pid, 0)


def _perform(perform: Callable[[Case, Channel], None], case: Case, channel: Channel) -> int:
    try:
        perform(case, channel)
    except Exception as error:
        traceback.print_exc()
        channel.send({"error": f"{type(error).__name__}: {error}"})
        return 1
    channel.send({"peak_mb": peak_mb()})
    return 0


def wait_for_turn(channel: Channel) -> None:
    """Wait until the benchmark lets this side make its next step."""
    if channel.receive() is None:
        raise EOFError("the benchmark has ended")


def peak_mb() -> float:
    """Return the peak of this process's resident memory, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise OSError("/proc/self/status has no VmHWM: this benchmark needs Linux")


def report(
    seconds: float,
    rollout_s: float,
    prompts: Sequence[Sequence[int]],
    sampled: Sequence[Sequence[int]],
    observed: Sequence[int],
) -> dict[str, Any]:
    """Return the message about one step.

    Args:
        seconds: Of the whole step.
        rollout_s: Until all sequences were there.
        prompts: Token ids of each group's prompt.
        sampled: Tokens of each completion of each sequence.
        observed: Tokens that each sequence was shown after its prompt.
    """
    return {
        "seconds": seconds,
        "rollout_s": rollout_s,
        "update_s": seconds - rollout_s,
        "prompts": [list(each) for each in prompts],
        "sampled": sorted(list(each) for each in sampled),
        "observed": sorted(observed),
    }


def as_message(case: Case) -> dict[str, Any]:
    """Return a case as a worker reads it."""
    return dataclasses.asdict(case)
