"""How long a big run takes to open in the inspector, and how a long trajectory scrolls.

    python -m tests.benchmarks.bench_inspector [--trajectories 10000] [--tokens 3000]

Writes a run of that size to a temporary folder, indexes it, and starts the command anew. It prints
the seconds until the list of trajectories has been answered, by the server and, where there is a
browser, on the page; and the frames per second while 32,000 tokens scroll.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.inspector.made import add_step, trajectory, write_run
from tir_alp.inspector.index import TrajectoryIndex
from tir_alp.records.folder import RunFolder, step_file
from tir_alp.records.trajectories import to_record

_PER_STEP = 100
_SCROLL = """
() => new Promise((done) => {
  const began = performance.now();
  let frames = 0;
  const step = () => {
    scrollBy(0, 400);
    frames++;
    const seconds = (performance.now() - began) / 1000;
    if (seconds < 3) requestAnimationFrame(step); else done(frames / seconds);
  };
  requestAnimationFrame(step);
})
"""


def write_big(path: Path, num: int, num_tokens: int) -> None:
    """Write a run with `num` trajectories of `num_tokens` tokens each, in steps of 100."""
    write_run(path, [])
    folder = RunFolder(path)
    folder.go_on()
    add_step(folder, 1, [trajectory(0, _turns(1000, 32_000))])
    rng = random.Random(0)
    few = [json.dumps(to_record(trajectory(i, _turns(8, num_tokens)))) for i in range(4)]
    for step in range(2, 2 + num // _PER_STEP):
        records = []
        for i in range(_PER_STEP):
            text, uid = rng.choice(few), step * _PER_STEP + i
            text = re.sub(r'"sequence_uid": \d+', f'"sequence_uid": {uid}', text)
            records.append(re.sub(r'"group_id": \d+', f'"group_id": {uid // 8}', text) + "\n")
        (path / "trajectories" / step_file(step)).write_text("".join(records))
        folder.log(step, {"rollout/reward": rng.random()})
    folder.close()


def _turns(num: int, num_tokens: int) -> tuple[str, ...]:
    each = "x" * max(1, num_tokens // (2 * num))
    return ("q", *([each] * (2 * num - 1)))


def open_page(path: Path) -> tuple[float, str, subprocess.Popen[str]]:
    """Start the command; returns the seconds until the list is answered, and the address."""
    began = time.perf_counter()
    words = [sys.executable, "-m", "tir_alp.inspect", str(path)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    address = process.stdout.readline().split()[0]
    httpx.get(f"{address}api/trajectories/0?sort=-reward", timeout=60).raise_for_status()
    return time.perf_counter() - began, address, process


def look(address: str) -> tuple[float, float]:
    """Return the seconds until the page shows the list, and frames per second of scrolling."""
    from tests.inspector.browser import Watched, browser

    with browser() as opened:
        page: Any = Watched(opened, viewport={"width": 1280, "height": 900})
        began = time.perf_counter()
        page.open(address + "#trajectories").wait_for_selector("tr.row")
        seconds = time.perf_counter() - began
        page.open(address + "#tokens?run=0&kind=trajectories&step=1&line=1")
        return seconds, page.page.evaluate(_SCROLL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trajectories", type=int, default=10_000)
    parser.add_argument("--tokens", type=int, default=3000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "big"
        write_big(path, options.trajectories, options.tokens)
        size = sum(file.stat().st_size for file in (path / "trajectories").iterdir())
        began = time.perf_counter()
        TrajectoryIndex(path).refresh()
        indexed = time.perf_counter() - began
        print(
            f"{options.trajectories} trajectories, {size / 1e9:.2f} GB: indexed in {indexed:.1f} s"
        )
        seconds, address, process = open_page(path)
        try:
            print(f"opened again in {seconds:.2f} s, the start of Python included")
            try:
                shown, frames = look(address)
                print(f"shown in a browser in {shown:.2f} s; scrolls at {frames:.0f} frames/s")
            except pytest.skip.Exception as error:
                print(f"no browser: {error}")
        finally:
            process.terminate()
            process.wait()


if __name__ == "__main__":
    main()
