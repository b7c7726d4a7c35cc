"""What the parts have in common: how they are started, how large they measure, what they write.

A part is a process of its own: `python -m tests.gpu.NAME --out FILE --seconds LIMIT [--reduced]`.
It writes its figures after each measurement, so that a part that is stopped leaves what it has.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import statistics
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

GROUP_SIZE = 8
"""Sequences of a group."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured."""

    groups: int
    """Groups per training step, of 8 sequences each."""
    num_prompt: int
    """Tokens of a prompt."""
    num_completion: int
    """Tokens of a completion."""
    micro_batch_tokens: int
    """Tokens of one forward of the training step."""
    warm_up: int
    """Steps before those that are measured."""
    rounds: int
    """Steps, or calls, that are measured; the median of their seconds counts."""
    decoded: tuple[int, ...]
    """Numbers of sequences that are sampled at the same time."""
    decode_tokens: int
    """Tokens that each of them samples."""
    matrix: int
    """Rows and columns of the matrices whose product gives the rate of the device."""
    copied: int
    """Bytes that are copied to measure the bandwidth of the device's memory."""
    reduced_bytes: int
    """Bytes of the tensor that is summed over ranks."""
    curve_steps: int
    """Steps of the short run of reinforcement learning."""

    @property
    def step_tokens(self) -> int:
        """Tokens of all sequences of a training step."""
        return self.groups * GROUP_SIZE * (self.num_prompt + self.num_completion)


FULL = Scale(
    groups=2,
    num_prompt=768,
    num_completion=256,
    micro_batch_tokens=8192,
    warm_up=2,
    rounds=4,
    decoded=(8, 32, 128),
    decode_tokens=64,
    matrix=8192,
    copied=1 << 31,
    reduced_bytes=1 << 28,
    curve_steps=50,
)
REDUCED = Scale(
    groups=1,
    num_prompt=24,
    num_completion=8,
    micro_batch_tokens=512,
    warm_up=1,
    rounds=3,
    decoded=(1, 2),
    decode_tokens=24,
    matrix=256,
    copied=1 << 22,
    reduced_bytes=1 << 16,
    curve_steps=1,
)
"""For a CPU: the same code in seconds. Its figures mean nothing."""


@dataclass(frozen=True, slots=True)
class Task:
    """What a part was started with."""

    report: Report
    device: torch.device
    is_reduced: bool
    smollm2: Path | None
    """Folder of SmolLM2-135M; None: random weights of its shape take its place."""
    deadline: float
    """When the part is stopped, on the clock of `time.monotonic`."""

    @property
    def scale(self) -> Scale:
        """How much is measured."""
        return REDUCED if self.is_reduced else FULL


@dataclass(slots=True)
class Report:
    """The figures and the errors of a part, in a file that is always whole."""

    file: Path
    figures: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, value: Any) -> None:
        """Add a figure, or a table of them."""
        self.figures[name] = value
        print(f"{name}: {json.dumps(value)}", flush=True)
        self._write()

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Note the error of a measurement, so that the next one is made all the same."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.errors[name] = f"{type(error).__name__}: {error}"[:500]
            self._write()
        finally:
            free_memory()

    def _write(self) -> None:
        partial = self.file.with_suffix(".partial")
        partial.write_text(json.dumps({"figures": self.figures, "errors": self.errors}))
        os.replace(partial, self.file)


def perform(work: Callable[[Task], None]) -> int:
    """Start a part from the command line; return its exit code, 1 if a measurement failed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--reduced", action="store_true")
    parser.add_argument("--smollm2", type=Path)
    options = parser.parse_args()
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    report = Report(options.out)
    with report.attempt("part"):
        work(
            Task(
                report,
                torch.device("cpu" if options.reduced else "cuda"),
                options.reduced,
                options.smollm2,
                time.monotonic() + options.seconds,
            )
        )
    return 1 if report.errors else 0


def _end_with_parent(parent: int) -> None:
    """Kill this part and its children when nobody waits for it any more."""
    while os.getppid() == parent:
        time.sleep(1)
    if os.getpgrp() == os.getpid():  # else it was started by hand
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def free_memory() -> None:
    """Give back the device's memory that nothing uses any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def wait_for(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(
    work: Callable[[], object], device: torch.device, warm_up: int, rounds: int
) -> float:
    """Return the median of the seconds of some calls, after those that warm up."""
    seconds = []
    for _ in range(warm_up + rounds):
        wait_for(device)
        began = time.perf_counter()
        work()
        wait_for(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[warm_up:])


def copy_rate(device: torch.device, num_bytes: int) -> float:
    """Return the bytes per second, read and written together, of a copy within the device."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / seconds_of(lambda: target.copy_(source), device, 2, 5)


def product_rate(device: torch.device, size: int) -> float:
    """Return the FLOP per second of a product of two square bfloat16 matrices."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / seconds_of(lambda: a @ b, device, 3, 10)
