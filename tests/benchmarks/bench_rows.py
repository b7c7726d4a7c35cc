"""The memory cost of a large data set: RSS of a process that reads a million rows in random order.

    python tests/benchmarks/bench_rows.py [--rows 1000000] [--read 200000]

Writes a JSONL and a parquet file with the same rows, then opens each in its own process, as a run
does, and reads rows at random positions. RSS is resident memory beyond that of the imports: `own`
is anonymous memory, and `mapped` are pages of files that the kernel may reclaim at any time. The
peak is that of `own`. Seconds are wall-clock time.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]


def row(number: int) -> dict[str, str]:
    """Make a row whose length is typical of a set of mathematical questions."""
    rng = random.Random(number)
    words = " ".join(rng.choices(("sum", "angle", "prime", "of", "the", "integer"), k=40))
    return {"question": f"{number}: {words}?", "answer": str(rng.randrange(10**6))}


def write(folder: Path, num_rows: int) -> None:
    """Write both files without holding all rows in memory."""
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema([("question", pyarrow.string()), ("answer", pyarrow.string())])
    batch = 10_000
    with (
        (folder / "rows.jsonl").open("w") as lines,
        pyarrow.parquet.ParquetWriter(folder / "rows.parquet", schema) as parquet,
    ):
        for first in range(0, num_rows, batch):
            rows = [row(number) for number in range(first, min(first + batch, num_rows))]
            lines.writelines(json.dumps(each) + "\n" for each in rows)
            parquet.write_table(pyarrow.Table.from_pylist(rows, schema))


def resident_mb() -> tuple[float, float]:
    """Return the anonymous and the mapped megabytes of this process."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    own, mapped = (int(fields[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile"))
    return own, mapped


def measure(path: Path, num_reads: int) -> Iterator[tuple[str, float, float, float, float]]:
    """Yield each action, its seconds, and own, mapped and peak megabytes after it."""
    sys.path.insert(0, str(ROOT))
    import pyarrow.parquet  # noqa: F401

    from tir_alp.config import DataConfig
    from tir_alp.rollouts.data import load_order

    before, peak, is_over = resident_mb(), 0.0, threading.Event()

    def sample_peak() -> None:
        nonlocal peak
        while not is_over.wait(0.02):
            peak = max(peak, resident_mb()[0])

    def state(what: str, start: float) -> tuple[str, float, float, float, float]:
        own, mapped = resident_mb()
        seconds = time.monotonic() - start
        return what, seconds, own - before[0], mapped - before[1], max(peak, own) - before[0]

    threading.Thread(target=sample_peak, daemon=True).start()
    start = time.monotonic()
    order = load_order(DataConfig(source=path.suffix[1:], path=path), seed=0)  # type: ignore[arg-type]
    yield state("open", start)
    start = time.monotonic()
    for position in range(num_reads):
        order[position]
    yield state(f"read {num_reads}", start)
    is_over.set()


def main() -> None:
    """Measure both files, each in its own process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--read", type=int, default=200_000)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.file is not None:
        size = options.file.stat().st_size / 2**20
        for what, seconds, *megabytes in measure(options.file, options.read):
            figures = "".join(f"{each:10.1f}" for each in megabytes)
            print(f"{options.file.suffix[1:]:9}{size:9.1f}  {what:13}{seconds:9.1f}{figures}")
        return
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), options.rows)
        print(f"{options.rows} rows")
        print(f"{'file':9}{'MB':>9}  {'':13}{'s':>9}{'own':>10}{'mapped':>10}{'peak':>10}")
        for name in ("rows.jsonl", "rows.parquet"):
            command = [sys.executable, __file__, "--read", str(options.read)]
            subprocess.run([*command, "--file", f"{folder}/{name}"], check=True, timeout=3600)


if __name__ == "__main__":
    main()
