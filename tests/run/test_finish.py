"""How commands end: one line and an exit code for what is known, a traceback for what is not."""

import errno

import pytest

from tir_alp.algorithm.guards import Tripped
from tir_alp.engines.base import EngineFailed
from tir_alp.roles import RoleLost
from tir_alp.rollouts.queue import RolloutsFailed
from tir_alp.rollouts.renderer import PromptTooLong
from tir_alp.run.finish import finish
from tir_alp.run.interrupt import Interrupted
from tir_alp.run.supervise import CannotStart
from tir_alp.tools.sandbox import SandboxRefused


def raising(error):
    def work():
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("no such column"), 2, "no such column"),
        (CannotStart("no template"), 2, "no template"),
        (EngineFailed("the server is gone"), 2, "the server is gone"),
        (RolloutsFailed("no group ended"), 2, "no group ended"),
        (RoleLost("rank 0 was lost"), 2, "rank 0 was lost"),
        (SandboxRefused("no namespaces"), 2, "no namespaces"),
        (PermissionError(errno.EACCES, "Permission denied", "runs"), 2, "cannot write (runs)"),
        (Tripped("kl is above its guard"), 3, "kl is above its guard"),
        (Interrupted(), 130, "goes on"),
        (KeyboardInterrupt(), 130, "goes on"),
    ],
)
def test_a_known_end_is_one_line_and_a_code(capsys, error, code, line):
    assert finish("evaluate", raising(error), interrupted="goes on") == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"tir_alp.evaluate: {line}") and err.count("\n") == 1


def test_the_code_of_the_work_is_that_of_the_command(capsys):
    assert [finish("doctor", lambda code=code: code) for code in (None, 0, 2)] == [0, 0, 2]
    assert capsys.readouterr() == ("", "")


def test_a_fault_of_ours_keeps_its_traceback():
    with pytest.raises(AssertionError):
        finish("train", raising(AssertionError("impossible")))
    with pytest.raises(ValueError, match="in the loop"):  # a user's mistake has another type there
        finish("train", raising(ValueError("in the loop")), mistake=PromptTooLong)
    assert finish("train", raising(PromptTooLong("9 tokens")), mistake=PromptTooLong) == 2
