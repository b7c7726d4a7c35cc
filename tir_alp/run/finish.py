"""How a command ends once its command line has been read: what it prints, and its exit code.

What a user has to fix is one line and exit code 2, a guard is 3, Ctrl-C is 130. Every other
exception is a bug of ours, and its traceback is shown. This module needs torch, so commands import
it after they have read their command lines.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from transformers.utils.logging import disable_progress_bar

from tir_alp.algorithm.guards import Tripped
from tir_alp.engines.base import EngineFailed
from tir_alp.process import EXIT_CODE, raise_on_interrupt
from tir_alp.roles import RoleLost
from tir_alp.rollouts.queue import RolloutsFailed
from tir_alp.run.describe import describe_os_error
from tir_alp.run.interrupt import Interrupted
from tir_alp.run.supervise import CannotStart, RunLost
from tir_alp.tools.sandbox import SandboxRefused

_LOST = (CannotStart, RunLost, RolloutsFailed, EngineFailed, RoleLost, SandboxRefused)


def finish(
    command: str,
    work: Callable[[], int | None],
    *,
    mistake: type[ValueError] = ValueError,
    interrupted: str = "interrupted",
) -> int:
    """Do the work of a command; returns its exit code.

    Args:
        command: Its name, such as `train`.
        work: The work, which returns the exit code; None is 0.
        mistake: Type of the ValueErrors that stand for something that the user has to fix.
        interrupted: Is printed after Ctrl-C.
    """
    raise_on_interrupt()  # until now it ended the process
    disable_progress_bar()  # the library's own, for every file that it reads or writes
    expected = (*_LOST, mistake)
    code = 2
    try:
        return work() or 0
    except Tripped as error:
        text, code = str(error), 3
    except BrokenPipeError:
        raise  # `run_command` ends a command whose output nobody reads any more
    except OSError as error:
        text = describe_os_error(error)
    except expected as error:
        text = str(error)
    except (Interrupted, KeyboardInterrupt):
        text, code = interrupted, EXIT_CODE
    print(f"tir_alp.{command}: {text}", file=sys.stderr)
    return code
