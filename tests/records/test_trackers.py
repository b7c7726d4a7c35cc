"""Trackers with their real packages, offline: what arrives, resuming, and what fails."""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tir_alp.config import Config
from tir_alp.records.folder import RunFolder
from tir_alp.records.trackers import TRACKERS, MLflow, TrackedRun, TrackerThread, check_trackers

ROOT = Path(__file__).parents[2]


def python(code: str, *flags: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a program that imports this package."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    return subprocess.run(
        [sys.executable, *flags, "-c", textwrap.dedent(code)],
        env=kept | {"PYTHONPATH": str(ROOT)} | env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


def two_lives(path: Path, tracker: str, lines: list[str]) -> None:
    """Log steps 1 to 3 of a run, then resume it after step 2 and log steps 3 and 4."""
    folder = RunFolder(path)
    folder.create(Config.model_validate({"trackers": [tracker]}), say=lines.append)
    for step in (1, 2, 3):
        folder.log(step, {"rollout/reward": step / 8, "loss/value": float("nan")})
    folder.close()
    folder = RunFolder(path)
    folder.reopen(2, say=lines.append)
    for step in (3, 4):
        folder.log(step, {"rollout/reward": step / 4})
    folder.close()


def test_the_choices_are_those_of_the_config():
    assert Config.model_validate({"trackers": [*TRACKERS]}).trackers == tuple(TRACKERS)
    assert Config().trackers == ("tensorboard",)


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow", "tensorboard"])
def test_a_missing_package_is_named_with_what_to_install(name):
    code = f"from tir_alp.records.trackers import check_trackers; check_trackers(['{name}'])"
    done = python(code, "-S")  # without the packages that are installed
    package = "tensorboard" if name == "tensorboard" else f"'tir_alp[{name}]'"
    assert f"pip install {package}" in done.stderr.splitlines()[-1]


def test_tensorboard_hides_what_a_resumed_run_writes_again(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    two_lives(tmp_path / "run", "tensorboard", [])
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    scalars = events.Scalars("rollout/reward")
    assert [(each.step, each.value) for each in scalars] == [
        (1, 0.125),
        (2, 0.25),
        (3, 0.75),
        (4, 1.0),
    ]


def log_records(content: bytes) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format, after W&B's header of 7 bytes."""
    at, record = 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # the rest of a block is too short for a header
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield record
            record = b""


def test_wandb_offline_needs_no_network_and_goes_on_in_the_same_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    records: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers(["wandb"])
    lines: list[str] = []
    two_lives(tmp_path / "run", "wandb", lines)
    assert all("offline" in line for line in lines), lines
    files = sorted((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))
    known = (tmp_path / "run/trackers/wandb.id").read_text().strip()
    assert [file.name for file in files] == [f"run-{known}.wandb"] * 2

    def rows() -> list[list[float]]:
        found = []
        for data in (each for file in files for each in log_records(file.read_bytes())):
            record = records.Record()
            record.ParseFromString(data)
            items = {(each.key or each.nested_key[0]): each for each in record.history.item}
            if "rollout/reward" in items:
                keys = ("step", "rollout/reward")
                found.append([json.loads(items[key].value_json) for key in keys])
        return found

    # W&B writes in a process of its own, a moment after it says that it has finished.
    deadline = time.monotonic() + 20
    while len(rows()) < 5 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert rows() == [[1, 0.125], [2, 0.25], [3, 0.375], [3, 0.75], [4, 1.0]]


def test_wandb_without_a_login_is_refused_before_a_run(tmp_path):
    pytest.importorskip("wandb")
    code = "from tir_alp.records.trackers import check_trackers; check_trackers(['wandb'])"
    done = python(code, HOME=str(tmp_path), NETRC=str(tmp_path / "none"))
    assert "set WANDB_MODE=offline" in done.stderr.splitlines()[-1]


def test_trackio_goes_on_in_the_same_run(tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))
    code = """
        import sys
        from pathlib import Path
        from tests.records.test_trackers import two_lives
        two_lives(Path(sys.argv[1] if sys.argv[1:] else "run"), "trackio", [])
        from trackio.sqlite_storage import SQLiteStorage
        known = Path("run/trackers/trackio.id").read_text().strip()
        logs = SQLiteStorage.get_logs("tir_alp", known)
        print([(each["step"], each["rollout/reward"]) for each in logs])
    """
    monkeypatch.chdir(tmp_path)
    done = python(code, TRACKIO_DIR=str(tmp_path / "store"))
    found = [(1, 0.125), (2, 0.25), (3, 0.375), (3, 0.75), (4, 1.0)]
    assert str(found) in done.stdout, done.stdout + done.stderr


def test_mlflow_goes_on_in_the_same_run(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    check_trackers(["mlflow"])
    two_lives(tmp_path / "run", "mlflow", [])
    client = MlflowClient()
    experiment = client.get_experiment_by_name("tir_alp")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert run.data.params["trainer.lr"] == "1e-06"
    history = client.get_metric_history(run.info.run_id, "rollout/reward")
    found = [(each.step, each.value) for each in history]
    assert sorted(found) == [(1, 0.125), (2, 0.25), (3, 0.375), (3, 0.75), (4, 1.0)]


def test_mlflow_needs_an_address(monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ValueError, match="set MLFLOW_TRACKING_URI"):
        check_trackers(["mlflow"])


# ------------------------------------------------------------------------------------ what fails


@pytest.fixture
def silent_server() -> Iterator[str]:
    """A server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_server_that_never_answers_holds_nothing_up(tmp_path, monkeypatch, silent_server):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", silent_server)
    check_trackers(["mlflow"])  # imports it, which would take longer than what is measured
    lines: list[str] = []
    run = TrackedRun(tmp_path, {}, None)
    thread = TrackerThread("mlflow", lambda: MLflow(run, lines.append), lines.append, 5)
    began = time.monotonic()
    for step in range(100):
        thread.log(step, {"loss/value": 1.0})
    assert time.monotonic() - began < 1.0
    thread.finish()
    thread.join(time.monotonic() + 0.5)
    assert time.monotonic() - began < 2.0
    (line,) = lines
    assert "mlflow does not keep up: from step 5 on" in line


def test_a_server_that_is_not_there_is_reported_once(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    lines: list[str] = []
    folder = RunFolder(tmp_path / "run")
    folder.create(Config.model_validate({"trackers": ["mlflow"]}), say=lines.append)
    folder.log(1, {"loss/value": 1.0})
    while not any(tmp_path.glob("store/*/*/metrics/loss/value")):
        time.sleep(0.02)
    subprocess.run(["rm", "-r", str(tmp_path / "store")], check=True)
    for step in (2, 3, 4):
        folder.log(step, {"loss/value": 1.0})
    folder.close()
    failures = [line for line in lines if "the tracker mlflow" in line]
    assert len(failures) == 1 and "failed at step 2" in failures[0]
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 4


def test_a_full_disk_is_reported_and_ends_nothing(tmp_path):
    code = f"""
        import resource, sys
        from pathlib import Path
        from tir_alp.records.trackers import Trackers, TrackedRun
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        trackers = Trackers(["tensorboard"], TrackedRun(Path({str(tmp_path)!r}), {{}}, None), print)
        for step in range(2000):
            trackers.log(step, {{"loss/value": 1.0}})
        trackers.close()
        print("goes on")
    """
    done = python(code)
    reported = [line for line in done.stdout.splitlines() if "the tracker tensorboard" in line]
    assert len(reported) == 1 and done.stdout.endswith("goes on\n"), done.stdout + done.stderr
    assert done.returncode == 0


@pytest.mark.slow
def test_the_command_logs_to_wandb_and_resumes_there(tmp_path):
    pytest.importorskip("wandb")
    tiny = ("--rollout.groups_per_step", "2", "--rollout.group_size", "2", "--eval.num_tasks", "1")
    starts = (
        ("--name", "run", "--steps", "1", "--trackers", "wandb,tensorboard", *tiny),
        ("--resume", "runs/run", "--steps", "2"),
    )
    # wandb leaves the address of this process's own service to every process that it starts.
    without_wandb = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    for words in starts:
        done = subprocess.run(
            [sys.executable, "-m", "tir_alp.train", *words],
            cwd=tmp_path,
            env=without_wandb | {"PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"},
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "the tracker" not in done.stdout, done.stdout
    files = sorted((tmp_path / "runs/run/wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2 and len({file.name for file in files}) == 1
    assert all(b"rollout/reward" in file.read_bytes() for file in files)
    assert list((tmp_path / "runs/run/tensorboard").glob("events.*"))
