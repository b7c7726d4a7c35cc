"""The job of configs/cluster/kuberay.yaml, submitted to Ray's job server as KubeRay does."""

import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytest.importorskip("ray")

import ray

from tests.hosts import FIRST, apart, end_processes_of, hosts, on
from tests.runs import assert_honest
from tests.tools.sandbox.processes import wait_until

CONFIGS = Path(__file__).parents[2] / "configs"
SPEC = yaml.safe_load((CONFIGS / "cluster" / "kuberay.yaml").read_text())["spec"]
CONFIG = "/opt/tir_alp/configs/cluster/two_nodes.toml"
SERVER = "--address=http://127.0.0.1:8265"
RUN = "--name run --cluster auto --checkpoint.every 1000 --eval.num_tasks 4 --steps 1000"


def test_the_file_names_the_installed_version_of_ray():
    assert SPEC["rayClusterSpec"]["rayVersion"] == ray.__version__


def test_the_config_that_it_names_exists():
    assert CONFIG in SPEC["entrypoint"]
    assert (CONFIGS / Path(CONFIG).relative_to("/opt/tir_alp/configs")).exists()


@pytest.fixture
def call(tmp_path):
    """Run a script on a host with the head of a Ray cluster, as a container of the head would."""
    (container,) = SPEC["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    settings = os.environ | {each["name"]: each["value"] for each in container["env"]}
    settings |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    settings["RAY_worker_niceness"] = "0"  # in a container no other programs compete
    settings["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

    def call(script):
        words = on(FIRST, "bash", "-c", script)
        return subprocess.run(words, env=settings, capture_output=True, text=True, timeout=120)

    with hosts():
        start = "ray start --head --block --num-cpus=8 --num-gpus=0 --node-ip-address=127.0.0.1"
        log = tmp_path / "head.log"
        with log.open("wb") as file:
            words = apart(FIRST, f"exec {start}")
            head = subprocess.Popen(words, env=settings, cwd="/", stdout=file, stderr=file)
        try:
            wait_until(lambda: call(f"ray job list {SERVER}").returncode == 0, more=log.read_text)
            yield call
        finally:
            end_processes_of(FIRST)
            head.wait()


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="makes a host as root")
@pytest.mark.skipif(shutil.which("ip") is None, reason="needs ip (apt install iproute2)")
def test_a_stopped_run_has_a_checkpoint_in_the_volume(call, tmp_path):
    entrypoint = SPEC["entrypoint"].replace(CONFIG, str(CONFIGS / "tiny.toml"))
    entrypoint = entrypoint.replace("/runs", str(tmp_path))
    submitted = call(
        f"ray job submit {SERVER} --submission-id it --no-wait -- {entrypoint} {RUN} ;"
    )
    assert submitted.returncode == 0, submitted.stderr
    run = tmp_path / "runs" / "run"
    wait_until(
        lambda: any(run.glob("trajectories/step_*.jsonl")),
        100.0,
        more=lambda: call(f"ray job logs {SERVER} it").stdout,
    )
    stopped = call(f"ray job stop {SERVER} it")
    assert "Job 'it' was stopped" in stopped.stdout + stopped.stderr
    logs = call(f"ray job logs {SERVER} it").stdout
    assert "is saved; go on from it" in logs
    assert [path.name for path in run.glob("checkpoints/step_*") if path.name != "step_0"]
    assert_honest(run)
