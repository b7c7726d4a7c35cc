"""docs/examples/rl_loop.py: at most 80 lines, and it trains."""

import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "rl_loop.py"


def test_the_loop_without_the_trainer_runs():
    assert len(EXAMPLE.read_text().splitlines()) <= 80
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "2"], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    steps = [line for line in done.stdout.splitlines() if line.startswith("step ")]
    assert [line.split(":")[0] for line in steps] == ["step 1", "step 2"]
