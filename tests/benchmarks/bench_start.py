"""What the start and the end of commands cost, beside the steps between them.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.bench_start [--repeats 3]

Runs `import tir_alp`, `--help`, a run of one step, an evaluation, fine-tuning for one step and an
empty chat, each in a process of its own and in turns. Printed are seconds since the start of the
process when each line appeared: wall-clock time, and processor time of the process itself, user and
system. Other programs change the first far more than the second. The last row of a command is its
end, with the processor time of the processes that it started, which are those of its sandbox.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
_TICKS = os.sysconf("SC_CLK_TCK")
_ROW = '{"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]}'


@dataclass(frozen=True, slots=True)
class Command:
    """A command, and the lines that end its phases."""

    words: tuple[str, ...]
    phases: dict[str, str] = field(default_factory=dict)
    """Name of a phase -> how the line begins that ends it."""


_IMPORTED = {"first line": "importing torch", "imports": "reading the model"}
COMMANDS = {
    "import": Command(("-c", "import tir_alp")),
    "help": Command(("-m", "tir_alp.train", "--help"), {"first line": "usage:"}),
    "train": Command(
        ("-m", "tir_alp.train", "--name", "{name}", "--steps", "1", "--eval.num_tasks", "8"),
        {
            **_IMPORTED,
            "inputs": "checking this machine",
            "sandbox and checks": "starting trainer",
            "trainer, engine and their checks": "step 0: evaluating",
            "first evaluation, first step, checkpoint": "step 1: evaluating",
            "last evaluation": "the model is in",
            "report": "report:",
        },
    ),
    "evaluate": Command(
        ("-m", "tir_alp.evaluate", "--model", "tiny", "--eval.num_tasks", "8", "--out", "{name}"),
        {
            **_IMPORTED,
            "inputs, checks, engine": "evaluation {name}",
            "episodes": "result:",
        },
    ),
    "sft": Command(
        (
            *("-m", "tir_alp.sft", "--model.path", "tiny", "--data.path", "rows.jsonl"),
            *("--steps", "1", "--name", "{name}"),
        ),
        {
            **_IMPORTED,
            "inputs": "checking this machine",
            "checks": "starting the trainer",
            "trainer, step, checkpoint": "the model is in",
            "report": "report:",
        },
    ),
    "chat": Command(
        ("-m", "tir_alp.chat", "--model", "tiny"),
        {"first line": "importing torch", "imports, inputs, engine": "{model}"},
    ),
}


def processor_s(pid: int) -> float:
    """Processor time of a process so far, without that of its children."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def measure(command: Command, folder: Path, name: str) -> dict[str, tuple[float, float]]:
    """Run a command; return wall-clock and processor seconds at the end of each phase."""
    model = str(ROOT / "tir_alp/models/tiny/base")
    words = [each.format(name=name) for each in command.words]
    ends = {phase: line.format(name=name, model=model) for phase, line in command.phases.items()}
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    found: dict[str, tuple[float, float]] = {}
    printed = ""
    assert process.stdout is not None
    for line in process.stdout:
        printed += line
        for phase, end in ends.items():
            if phase not in found and line.startswith(end):
                found[phase] = time.monotonic() - began, processor_s(process.pid)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or found.keys() != ends.keys():
        sys.exit(f"{' '.join(words)} ended with {process.returncode}:\n{printed}")
    found["end"] = time.monotonic() - began, usage.ru_utime + usage.ru_stime
    return found


def main() -> None:
    """Print a table per command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=list(COMMANDS), default=list(COMMANDS))
    arguments = parser.parse_args()
    results: dict[str, list[dict[str, tuple[float, float]]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "rows.jsonl").write_text(f"{_ROW}\n" * 16)
        for repeat in range(arguments.repeats):
            for name in arguments.only:
                one = measure(COMMANDS[name], Path(folder), f"{name}{repeat}")
                results.setdefault(name, []).append(one)
    for name, repeats in results.items():
        print(f"\n{name}: medians of {len(repeats)}\n{'until the end of':42}   wall s  processor s")
        for phase in repeats[0]:
            wall, own = (statistics.median(each[phase][i] for each in repeats) for i in (0, 1))
            print(f"{phase:42} {wall:8.2f} {own:12.2f}")


if __name__ == "__main__":
    main()
