"""A run's folder has one writer: a second one is refused, by name, and destroys nothing."""

import os
import subprocess
import sys

import pytest

from tir_alp.records.run_lock import RunLock

HOLD = """
import sys
from pathlib import Path
from tir_alp.records.run_lock import RunLock
RunLock(Path(sys.argv[1])).acquire()
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_process_is_refused_and_told_who_holds_the_lock(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=rf"being written by process {holder.pid} on .*since"):
            RunLock(tmp_path).acquire()
        with pytest.raises(ValueError, match="wait until that ends, or stop it"):
            RunLock(tmp_path).check_is_free()
        holder.kill()
    lock = RunLock(tmp_path)  # the kernel has freed it with its holder
    lock.check_is_free()
    lock.acquire()
    assert f'"pid": {os.getpid()}' in (tmp_path / "run.lock").read_text()
    lock.release()
    RunLock(tmp_path).check_is_free()


def test_a_lock_file_that_cannot_be_read_is_still_a_lock(tmp_path):
    lock = RunLock(tmp_path)
    lock.acquire()
    (tmp_path / "run.lock").write_text("torn")
    with pytest.raises(ValueError, match="is being written by another process"):
        RunLock(tmp_path).acquire()
    lock.release()
