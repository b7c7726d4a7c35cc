"""The sandbox for blocking code: its thread, its end, and what a call after its end reports."""

import os
import threading

import pytest

from tir_alp.tools.sandbox import BlockingSandbox, Outcome, SandboxConfig, SandboxError

CONFIG = SandboxConfig(backend="unsafe", preload=(), ready_sessions=0)


def sandbox_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "sandbox"]


@pytest.fixture
def sandbox():
    sandbox = BlockingSandbox(CONFIG)
    yield sandbox
    sandbox.close()


def test_call_that_fails_at_once_reports_the_time_that_passed(sandbox: BlockingSandbox):
    session = sandbox.session()
    sandbox.close()
    result = session.run("1")
    assert result.outcome is Outcome.INFRA_ERROR and "the sandbox is closed" in result.stderr
    assert result.duration_s < 1


def test_close_ends_the_thread_and_may_be_repeated(sandbox: BlockingSandbox):
    others = len(sandbox_threads()) - 1
    session = sandbox.session()
    assert session.run("6 * 7").value == "42"
    sandbox.close()
    sandbox.close()
    session.close()
    assert len(sandbox_threads()) == others
    with pytest.raises(SandboxError, match="the sandbox is closed"):
        sandbox.session()


def test_close_in_a_forked_child_leaves_the_parent_alone(sandbox: BlockingSandbox):
    session = sandbox.session()
    child = os.fork()
    if child == 0:
        sandbox.close()
        os._exit(0)
    assert os.waitpid(child, 0) == (child, 0)
    assert session.run("6 * 7").value == "42"


def test_failed_start_leaves_no_thread():
    others = len(sandbox_threads())
    with pytest.raises(SandboxError, match="no_such_module"):
        BlockingSandbox(CONFIG.model_copy(update={"preload": ("no_such_module",)}))
    assert len(sandbox_threads()) == others
