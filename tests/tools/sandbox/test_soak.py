"""A short run of `tests/benchmarks/soak_sandbox.py`."""

import os
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.sandbox, pytest.mark.slow]


@pytest.mark.skipif(os.geteuid() != 0, reason="looks into the fork server")
@pytest.mark.parametrize("backend", ["namespaces", "landlock"])
def test_nothing_grows(backend: str):
    command = ["unshare", "--mount", sys.executable, "-m", "tests.benchmarks.soak_sandbox"]
    options = ["--backend", backend, "--preload", "", "--calls", "2000", "--recycle", "100"]
    result = subprocess.run([*command, *options], capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "GREW" not in result.stdout and "2000 calls" in result.stdout
