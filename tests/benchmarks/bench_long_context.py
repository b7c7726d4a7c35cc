"""Peak memory of a training step against the length of a trajectory, by how it is divided.

    python -m tests.benchmarks.bench_long_context [--lengths 4096 8192 16384] [--ranks 1 2]
        [--kept] [--rows FILE]

A step of a random decoder trains on one trajectory with a forward of its own. Each measurement is a
process per rank, over gloo. Printed is what the step takes above what the process had before it,
of the rank that takes most: activations, states of recomputed layers, chunks of logits, gradients
and buffers of what is sent. With every layer recomputed; with `--kept` also without.

At the end is the length that each number of ranks reaches at the peak of one rank at the shortest
length without recomputation, by a straight line through the measured lengths.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from tests.benchmarks.synthetic import Size, groups_of, make_model
from tir_alp.algorithm.presets import ALGORITHMS
from tir_alp.config import TrainerConfig
from tir_alp.training.ranks import join
from tir_alp.training.trainer import Trainer

_SAID = 512  # tokens of the completion; the others are its prompt


def status(name: str) -> int:
    """Return a figure of this process's memory in bytes, by its name in /proc."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(each.split()[1]) for each in lines if each.startswith(f"{name}:"))


def one_rank(length: int, recomputed: bool, folder: Path) -> None:
    """Make a step as one of the ranks, and write what it took."""
    torch.set_num_threads(1)
    size = Size(
        width=384,
        layers=8,
        groups=1,
        group_size=1,
        num_prompt=length - _SAID,
        num_said=_SAID,
    )
    with join(600, torch.device("cpu")) as ranks:
        settings = TrainerConfig(
            micro_batch_tokens=length,
            gradient_checkpointing=recomputed,
            sequence_parallel=ranks.size,
            logprob_chunk_tokens=256,
        )
        trainer = Trainer(
            make_model(size),
            settings,
            ALGORITHMS["alp_sequence"],
            ranks=ranks,
            temperature=1.0,
            on_bad_update=lambda update, _: print(f"update {update} was not finite"),
        )
        groups = groups_of(size)
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # begins a new peak
        trainer.step(groups, 0)
        peak = max(ranks.gather(status("VmHWM") - before))
        if ranks.is_first:
            (folder / "peak").write_text(str(peak))


def measure(num_ranks: int, length: int, recomputed: bool) -> int:
    """Return the peak of a step in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
        words += ["-m", "tests.benchmarks.bench_long_context", "--rank-writes", folder]
        words += ["--lengths", str(length), *([] if recomputed else ["--kept"])]
        subprocess.run([sys.executable, *words], check=True, env=os.environ)
        return int((Path(folder) / "peak").read_text())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16_384])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--kept", action="store_true", help="also without recomputation")
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--rank-writes", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_writes is not None:
        return one_rank(options.lengths[0], not options.kept, options.rank_writes)
    print("  ".join(["ranks", "layers    ", *(f"{each:>9,}" for each in options.lengths)]))
    found: dict[tuple[int, bool], list[int]] = {}
    kinds = [False, True] if options.kept else [True]
    for number, recomputed in itertools.product(options.ranks, kinds):
        peaks = [measure(number, length, recomputed) for length in options.lengths]
        found[number, recomputed] = peaks
        kind = "recomputed" if recomputed else "kept      "
        figures = "  ".join(f"{peak / 2**20:6.0f} MB" for peak in peaks)
        print(f"{number:5}  {kind}  {figures}", flush=True)
        if options.rows is not None:
            row = {"ranks": number, "recomputed": recomputed, "lengths": options.lengths}
            with open(options.rows, "a") as file:
                file.write(json.dumps(row | {"peaks": peaks}) + "\n")
    first = found[options.ranks[0], kinds[0]][0]
    for (number, recomputed), peaks in found.items():
        slope, base = np.polyfit(options.lengths, peaks, 1) if len(peaks) > 1 else (np.nan, 0)
        times = (first - base) / slope / options.lengths[0]
        how = "recomputed" if recomputed else "kept"
        print(f"{number} ranks, {how}: at {first / 2**20:.0f} MB, {times:.1f} times the length")


if __name__ == "__main__":
    main()
