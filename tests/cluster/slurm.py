"""A private Slurm on two hosts of this machine, from Debian's packages. It leaves nothing.

    with hosts(), slurm(folder) as cluster:
        job = cluster.call("sbatch", "--parsable", "--nodes=2", "script.sh", cwd=folder).strip()
        cluster.field(job, "JobState")

Its controller is on the first host, where commands are run as well. Needs root.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.hosts import FIRST, HOSTS, apart, end_processes_of, on
from tests.tools.sandbox.processes import wait_until

NEEDED = ("ip", "munged", "slurmctld", "slurmd", "sbatch")
CONFIG = """
ClusterName=private
SlurmctldHost={first}({first_address})
SlurmctldPort=6817
SlurmdPort=6818
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName={first} NodeHostname={first} NodeAddr={first_address} CPUs=64 Gres=gpu:8
NodeName={second} NodeHostname={second} NodeAddr={second_address} CPUs=64 Gres=gpu:8
PartitionName=all Nodes=ALL Default=YES
"""
# GPUs are plain files here. No control groups are made, but slurmd needs their file.
GPUS = "NodeName={first},{second} Name=gpu File={folder}/gpu[0-7]\n"
CGROUPS = "CgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\nCgroupAutomount=no\n"
_START_S = 30.0


@dataclass(frozen=True, slots=True)
class Slurm:
    """A running cluster."""

    folder: Path
    """Its configuration, state and logs."""

    def call(self, *words: str, cwd: Path | None = None) -> str:
        """Run a command of Slurm on the first host; returns what it printed."""
        result = subprocess.run(
            on(FIRST, *words),
            env=self.settings,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert result.returncode == 0, f"{words}: {result.stderr}"
        return result.stdout

    @property
    def settings(self) -> dict[str, str]:
        return os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def logs(self) -> str:
        """The last lines that its daemons logged."""
        logs = self.folder.glob("*.log")
        return "\n".join(f"{log.name}: {log.read_text()[-500:]}" for log in logs)

    def field(self, job: str, name: str) -> str:
        """A field of a job as `scontrol` reports it, such as `JobState` or `ExitCode`."""
        found = re.search(rf"\b{name}=(\S+)", self.call("scontrol", "show", "job", job))
        assert found, name
        return found[1]

    def is_ready(self) -> bool:
        """Whether the controller answers, and both hosts are free."""
        with contextlib.suppress(AssertionError):
            return self.call("sinfo", "--noheader", "--format=%T %D").split() == ["idle", "2"]
        return False


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[Slurm]:
    """Start the daemons on both hosts; at the end, kill them and all that they started."""
    names = dict(zip(("first", "second"), HOSTS, strict=True))
    names |= {f"{place}_address": HOSTS[host] for place, host in names.items()}
    for name, text in {"slurm": CONFIG, "gres": GPUS, "cgroup": CGROUPS}.items():
        (folder / f"{name}.conf").write_text(text.format(folder=folder, **names))
    lines = (f"{address} {host}\n" for host, address in HOSTS.items())
    (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(lines))
    (folder / "state").mkdir()
    for i in range(8):
        (folder / f"gpu{i}").touch()
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o600)
    munge = {"key-file": key} | {
        name: folder / f"munge.{name}" for name in ("socket", "pid-file", "log-file", "seed-file")
    }
    words = (f"--{name}={path}" for name, path in munge.items())
    commands = [
        (FIRST, " ".join(["munged --foreground --force", *words])),
        (FIRST, "slurmctld -D"),
        *((host, f"slurmd -D -N {host}") for host in HOSTS),
    ]
    cluster, daemons = Slurm(folder), []
    try:
        for host, command in commands:
            words = apart(host, f"mount --bind {folder}/hosts /etc/hosts; exec {command}")
            with (folder / f"{command.split()[0]}-{host}.log").open("wb") as log:
                daemon = subprocess.Popen(words, env=cluster.settings, stdout=log, stderr=log)
            daemons.append(daemon)
        wait_until(cluster.is_ready, _START_S, pause_s=0.2, more=cluster.logs)
        yield cluster
    finally:
        for host in HOSTS:
            end_processes_of(host)
        for daemon in daemons:
            daemon.wait()
