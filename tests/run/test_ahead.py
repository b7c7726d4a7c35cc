"""What starts while a command is still importing torch."""

import contextlib
import ctypes
import os
import subprocess
import sys
from pathlib import Path

import gymnasium
import pytest

from tir_alp.run.ahead import start_tools
from tir_alp.run.command_line import load_config
from tir_alp.tools.sandbox import SandboxConfig, blocking

ROOT = Path(__file__).parents[2]
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER


class Reporting(gymnasium.Env[str, str]):
    """Notes that its tools were started, and that it was closed."""

    called: list[str]

    def run_report(self):
        self.called.append("started")
        raise OSError("nothing to start")

    def close(self):
        self.called.append("closed")


class Refusing(gymnasium.Env[str, str]):
    def __init__(self):
        raise RuntimeError("not here")


@pytest.fixture
def config_of():
    """Makes a config whose environment is of the given class."""

    def make(environment, *words):
        gymnasium.register("Ahead-v0", entry_point=environment)
        return load_config(["--env.id", "Ahead-v0", "--env.kwargs", "{}", *words], {})

    yield make
    del gymnasium.registry["Ahead-v0"]


def test_an_environment_starts_what_it_reports_on_and_is_closed_whatever_happens(config_of):
    Reporting.called = []
    thread = start_tools(config_of(Reporting))
    assert thread is not None
    thread.join(10)
    assert Reporting.called == ["started", "closed"]


def test_what_cannot_be_made_is_left_to_the_checks(config_of):
    assert start_tools(config_of(Refusing)) is None


def test_in_a_cluster_nothing_starts_here(config_of):
    Reporting.called = []
    assert start_tools(config_of(Reporting, "--cluster", "local")) is None
    assert Reporting.called == []


@pytest.mark.sandbox
def test_the_sandbox_of_the_python_tool_is_up_before_it_is_asked_for():
    limits = {"wall_s": 7.25}  # of no other test: sandboxes are shared by their settings
    words = ["--env.id", "tir_alp.envs:PythonMath-v0", "--env.kwargs.sandbox.preload", "[]"]
    words += ["--env.kwargs.sandbox.limits.wall_s", str(limits["wall_s"])]
    key = (os.getpid(), SandboxConfig.model_validate({"preload": [], "limits": limits}))
    assert key not in blocking._shared
    thread = start_tools(load_config(words, {}))
    assert thread is not None
    thread.join(60)
    session = blocking._shared[key].session()
    shown = session.run("import sys; print([each for each in sys.modules if 'torch' in each])")
    session.close()
    assert shown.stdout == "[]\n"


@pytest.mark.sandbox
def test_a_run_that_cannot_start_leaves_no_process_and_no_file(tmp_path):
    """Processes without a parent become children of this one, so that none is overlooked."""
    libc = ctypes.CDLL(None, use_errno=True)
    before = children()
    assert libc.prctl(_SUBREAPER, 1, 0, 0, 0) == 0
    try:
        words = ["--model.path", "./nowhere", "--name", "none"]
        done = subprocess.run(
            [sys.executable, "-m", "tir_alp.train", *words],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert (done.returncode, children() - before) == (2, set())
    finally:
        libc.prctl(_SUBREAPER, 0, 0, 0, 0)
    assert done.stdout.splitlines()[0] == "importing torch and transformers"
    assert done.stderr.startswith("tir_alp.train: there is no model folder './nowhere'; give a ")
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def children() -> set[int]:
    """The children of this process that live; those that have ended are waited for."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            state, parent, *_ = stat.read_text().rpartition(")")[2].split()
            if int(parent) == os.getpid() and state == "Z":
                os.waitpid(int(stat.parent.name), os.WNOHANG)
            elif int(parent) == os.getpid():
                found.add(int(stat.parent.name))
    return found
