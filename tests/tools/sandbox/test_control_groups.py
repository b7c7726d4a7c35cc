"""What control groups leave, read from folders like those that kernels show."""

from pathlib import Path

import pytest

from tir_alp.tools.sandbox.machine import capacity as machine
from tir_alp.tools.sandbox.machine import control_groups
from tir_alp.tools.sandbox.machine.control_groups import free_memory, free_processes

GB = 1 << 30
VERSION_1 = """\
9:name=systemd:/
8:pids:/job
4:memory:/job/inner
3:cpu,cpuacct:/
0::/"""


@pytest.fixture
def groups(tmp_path: Path, monkeypatch):
    """`groups(lines of /proc/self/cgroup, {file: text})` sets what this process then sees."""

    def see(own: str, files: dict[str, object]) -> None:
        for name, text in {"proc/self/cgroup": own, **files}.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(f"{text}\n")

        def within(controller: str):
            return control_groups.control_groups(
                controller, top=tmp_path, processes=tmp_path / "proc"
            )

        monkeypatch.setattr(machine, "control_groups", within)

    return see


def test_version_1_the_tightest_group_outwards_counts(groups, tmp_path: Path):
    groups(
        VERSION_1,
        {
            "memory/memory.limit_in_bytes": 9223372036854771712,  # none
            "memory/memory.usage_in_bytes": 90 * GB,
            "memory/memory.stat": "total_inactive_file 0",
            "memory/job/memory.limit_in_bytes": 512 << 20,
            "memory/job/memory.usage_in_bytes": 384 << 20,
            "memory/job/memory.stat": f"inactive_file 5\ntotal_inactive_file {128 << 20}",
            "memory/job/inner/memory.limit_in_bytes": 100 * GB,
            "memory/job/inner/memory.usage_in_bytes": 384 << 20,
            "memory/job/inner/memory.stat": "total_inactive_file 0",
            "pids/job/pids.max": 50,
            "pids/job/pids.current": 10,
        },
    )
    assert machine.share_of_free_memory_mb() == 192  # 3/4 of 512 - 384 + 128
    assert machine.share_of_free_processes() == 30


def test_version_2_and_groups_that_cannot_be_seen(groups):
    groups(
        "0::/outside/of/this/container",
        {
            "memory.max": 64 << 20,
            "memory.current": 32 << 20,
            "memory.stat": "anon 1\ninactive_file 0",
            "pids.max": "max",
            "pids.current": 3,
        },
    )
    assert machine.share_of_free_memory_mb() == 24
    assert machine.share_of_free_processes() > 10


def test_a_group_without_a_limit_or_with_nothing_left(tmp_path: Path):
    assert free_memory(tmp_path) is None and free_processes(tmp_path) is None
    for name, text in {
        "memory.max": "100",
        "memory.current": "130",
        "memory.stat": "inactive_file 10",
        "pids.max": "3",
        "pids.current": "4",
    }.items():
        (tmp_path / name).write_text(text)
    assert free_memory(tmp_path) == 0 and free_processes(tmp_path) == 0
