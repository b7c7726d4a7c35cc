"""configs/cluster/slurm.sh under a real Slurm, on two hosts of this machine."""

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray")

from tests.cluster.slurm import NEEDED, slurm
from tests.hosts import HOSTS, SECOND, hosts, processes_of
from tests.runs import assert_honest
from tests.tools.sandbox.processes import wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="makes hosts as root"),
    pytest.mark.skipif(
        not all(map(shutil.which, NEEDED)), reason=f"needs {', '.join(NEEDED)} (apt)"
    ),
]
CONFIGS = Path(__file__).parents[2] / "configs"
RUN = (
    *("--config", str(CONFIGS / "tiny.toml"), "--name", "run", "--cluster", "auto"),
    *("--cluster.spread", "true", "--cluster.trainer.count", "2"),
    *("--rollout.groups_per_step", "2", "--rollout.group_size", "2", "--eval.num_tasks", "4"),
    *("--checkpoint.every", "1", "--steps", "400"),
)
INTERRUPTED = "130:0"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with hosts(), slurm(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture
def folder(tmp_path):
    """A folder with what the script expects of the checkout in which the job is started."""
    (tmp_path / ".venv").symlink_to(sys.prefix)
    return tmp_path


class Job:
    """A job that runs configs/cluster/slurm.sh in `folder`."""

    def __init__(self, cluster, folder, *words):
        self.cluster = cluster
        script = CONFIGS / "cluster" / "slurm.sh"
        command = ["sbatch", "--parsable", "--cpus-per-task=8", script, *words]
        self.id = cluster.call(*map(str, command), cwd=folder).strip()
        self.output = folder / f"slurm-{self.id}.out"

    def until(self, holds):
        wait_until(holds, 120.0, pause_s=0.2, more=self.output.read_text)

    def ended(self):
        """The state and the exit code of a job that has ended."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL")
        self.until(lambda: self.cluster.field(self.id, "JobState") in over)
        return self.cluster.field(self.id, "JobState"), self.cluster.field(self.id, "ExitCode")


def test_a_run_survives_a_lost_node_and_saves_before_its_time_is_up(cluster, folder):
    run = folder / "runs" / "run"

    def last():
        return max((int(path.name[5:]) for path in run.glob("checkpoints/step_*")), default=0)

    job = Job(cluster, folder, *RUN)
    job.until(last)
    cluster.call("scontrol", "update", f"NodeName={SECOND}", "State=DOWN", "Reason=test")
    job.until(lambda: "the run goes on from step" in job.output.read_text())
    lost_at = last()
    job.until(lambda: last() > lost_at)
    cluster.call("scancel", "--batch", "--signal=TERM", job.id)  # as `--signal=B:TERM@300` does
    assert job.ended() == ("FAILED", INTERRUPTED)
    printed = job.output.read_text()
    assert all(f"on {address}: trainer-" in printed for address in HOSTS.values())
    assert "is saved; go on from it" in printed
    assert_honest(run)
    cluster.call("scontrol", "update", f"NodeName={SECOND}", "State=IDLE")


def test_a_job_ends_at_once_if_ray_cannot_start_on_one_node(cluster, folder):
    job = Job(cluster, folder, *RUN)

    def starting():
        return [pid for pid, words in processes_of(SECOND).items() if "/ray start" in words]

    job.until(starting)
    os.kill(starting()[0], signal.SIGKILL)
    assert job.ended() == ("FAILED", "1:0")
    assert "slurm.sh: Ray has ended on one of tir-alp-a tir-alp-b\n" in job.output.read_text()
    assert not (folder / "runs").exists()


def test_a_job_without_arguments_reports_what_it_needs(cluster, folder):
    job = Job(cluster, folder)
    assert job.ended() == ("FAILED", "1:0")
    assert "what is to run? --config FILE, or --resume runs/NAME" in job.output.read_text()
