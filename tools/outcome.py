"""How a tool call, a turn or a grading ended: one vocabulary from the sandbox to the advantage."""

from enum import StrEnum


class Outcome(StrEnum):
    """Whose doing an end was. Only the first four say anything about the policy.

    The policy is answerable for `OK`, `TOOL_ERROR`, `TOOL_TIMEOUT` and `RESOURCE_LIMIT`: its
    program ran and this is what became of it. The other three are ours: an episode that ends in one
    of them is retried or dropped, and never scored as reward 0.
    """

    OK = "ok"
    """The program ran to its end."""
    TOOL_ERROR = "tool_error"
    """The program raised, exited, crashed its interpreter, or the call's arguments were wrong."""
    TOOL_TIMEOUT = "tool_timeout"
    """The program was still running at its wall-clock or CPU limit and was killed."""
    RESOURCE_LIMIT = "resource_limit"
    """The program hit its limit of memory, processes, files or output."""
    INFRA_ERROR = "infra_error"
    """The sandbox, an engine or a host failed; the program may not have run at all."""
    GRADER_ERROR = "grader_error"
    """The answer could not be graded: the grader crashed or ran out of time."""
    CANCELLED = "cancelled"
    """We gave up on it: the run is ending or the episode was aborted."""

    @property
    def is_infrastructure(self) -> bool:
        """True where the policy is not answerable, so that no reward may be derived from it."""
        return self in (Outcome.INFRA_ERROR, Outcome.GRADER_ERROR, Outcome.CANCELLED)
