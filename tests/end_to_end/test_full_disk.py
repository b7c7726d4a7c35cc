"""A disk that fills up in the middle of a run: a planned end, the truth about what is saved."""

import contextlib
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import assert_honest

WORDS = (
    *("--name", "full", "--eval.num_tasks", "2", "--eval.greedy", "false", "--steps", "4"),
    *("--rollout.groups_per_step", "2", "--rollout.group_size", "2"),
    *("--checkpoint.every", "1", "--doctor.ignore", "disk"),
)


def train(folder, *words, largest_file=resource.RLIM_INFINITY):
    limits = (largest_file, resource.RLIM_INFINITY)
    return subprocess.run(
        [sys.executable, "-m", "tir_alp.train", *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits),
        capture_output=True,
        text=True,
        timeout=200,
    )


def assert_planned_end(ended, saved, reason="the disk is full"):
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"tir_alp.train: {reason}"), ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert f"step {saved} is saved" in ended.stdout if saved else "is saved" not in ended.stdout


@pytest.mark.slow
@pytest.mark.parametrize("megabytes", [1, 2], ids=["weights", "optimizer"])
def test_a_checkpoint_that_cannot_be_written_ends_the_run_in_one_line(tmp_path, megabytes):
    ended = train(tmp_path, *WORDS, largest_file=megabytes << 20)
    assert_planned_end(ended, saved=0, reason="a file may not grow any further")
    assert "there is no checkpoint in runs/full" in ended.stdout
    assert checkpoints(tmp_path) == []


def checkpoints(folder):
    """Everything in the run's folder of checkpoints, torn or whole, but the note on the best."""
    there = sorted(each.name for each in (folder / "runs/full/checkpoints").iterdir())
    return [name for name in there if name != "best.json"]


@contextlib.contextmanager
def disk(folder: Path, kilobytes: int):
    """A file system of a given size, in memory."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("only root may mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.slow
def test_a_run_that_cannot_begin_leaves_its_name_free(tmp_path):
    with disk(tmp_path, 12) as folder:
        assert_planned_end(train(folder, *WORDS), saved=0)
        assert not (folder / "runs/full").exists()


@pytest.mark.slow
def test_records_that_cannot_be_written_end_the_run_in_one_line(tmp_path):
    with disk(tmp_path, 48) as folder:
        ended = train(folder, *WORDS, "--checkpoint.every", "0", "--steps", "40")
        assert_planned_end(ended, saved=0)
        assert "the report could not be drawn" in ended.stdout


@pytest.mark.slow
def test_a_run_goes_on_from_what_was_saved_when_there_is_space_again(tmp_path):
    with disk(tmp_path, 7200) as folder:
        assert_planned_end(train(folder, *WORDS), saved=1)
        assert checkpoints(folder) == ["step_1"]
        subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
        assert train(folder, "--resume", "runs/full").returncode == 0
        assert_honest(folder / "runs/full")
