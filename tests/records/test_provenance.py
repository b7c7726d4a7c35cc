"""Each start of a run says where its numbers come from."""

import json
import shlex
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import torch

from tir_alp.config import Config
from tir_alp.records.folder import RunFolder
from tir_alp.records.provenance import PROVENANCE, describe_start

ROOT = Path(__file__).parents[2]


def read(folder: RunFolder) -> dict:
    return json.loads((folder.path / PROVENANCE).read_text())


def test_a_run_names_its_command_code_packages_machine_and_times(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.create(Config())
    found = read(folder)
    assert found["command"] == shlex.join(sys.orig_argv)
    assert found["versions"]["torch"] == torch.__version__
    assert found["hardware"]["cores"] >= 1 and found["hardware"]["memory_gb"] > 0.5
    (times,) = found["times"]
    assert times["ended"] is None
    folder.close()
    (times,) = read(folder)["times"]
    assert datetime.fromisoformat(times["started"]) <= datetime.fromisoformat(times["ended"])


def test_a_later_start_is_added_to_the_first(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.create(Config())
    folder.close()
    first = read(folder)
    folder.reopen(step=0)
    again = read(folder)
    assert {**first, "times": again["times"], "resumed": again["resumed"]} == again
    assert len(again["times"]) == 2 and again["times"][1]["ended"] is None
    assert [each["command"] for each in again["resumed"]] == [first["command"]]


def test_the_commit_is_that_of_the_code_and_says_whether_it_was_changed(tmp_path):
    copy = tmp_path / "checkout"
    (copy / "tir_alp").mkdir(parents=True)
    for name in ("__init__.py", "records/__init__.py", "records/provenance.py"):
        (copy / "tir_alp" / name).parent.mkdir(exist_ok=True)
        source = ROOT / "tir_alp" / name
        (copy / "tir_alp" / name).write_text(source.read_text() if "prov" in name else "")

    def git(*words: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        command = ["git", "-C", str(copy), *identity, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def commit() -> str:
        program = "from tir_alp.records.provenance import describe_start as d; print(d()['commit'])"
        return subprocess.run(
            [sys.executable, "-c", program], cwd=copy, check=True, capture_output=True, text=True
        ).stdout.strip()

    assert commit() == "None"
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    assert commit() == git("rev-parse", "HEAD")
    (copy / "tir_alp/__init__.py").write_text("# changed\n")
    assert commit() == git("rev-parse", "HEAD") + " (changed)"


def test_a_file_that_cannot_be_read_is_written_anew(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.create(Config())
    (folder.path / PROVENANCE).write_text("{")
    folder.close()
    folder.reopen(step=0)
    assert read(folder)["hardware"] == describe_start()["hardware"]
