"""How a tool call, a turn or a grading ended: one vocabulary, from the sandbox to the advantage."""

from enum import StrEnum


class Outcome(StrEnum):
    """Who caused an end. Only the first four outcomes are evidence about the policy.

    The policy is responsible for `OK`, `TOOL_ERROR`, `TOOL_TIMEOUT` and `RESOURCE_LIMIT`: its
    program ran, and this is how it ended. The other three are failures of the infrastructure: an
    episode that ends in one of them is retried or dropped, and never scored as reward 0.
    """

    OK = "ok"
    """The program ran to its end."""
    TOOL_ERROR = "tool_error"
    """The program raised, exited, crashed its interpreter, or the call's arguments were wrong."""
    TOOL_TIMEOUT = "tool_timeout"
    """The program was still running at its wall-clock or CPU limit and was killed."""
    RESOURCE_LIMIT = "resource_limit"
    """The program reached its limit of memory, processes, files or output."""
    INFRA_ERROR = "infra_error"
    """The sandbox, an engine or a host failed; the program may not have run at all."""
    GRADER_ERROR = "grader_error"
    """The answer could not be graded: the grader crashed or ran out of time."""
    CANCELLED = "cancelled"
    """The call was given up: the run is ending or the episode was aborted."""

    @property
    def is_infrastructure(self) -> bool:
        """True if the policy is not responsible, so that no reward may be derived from the end."""
        return self in (Outcome.INFRA_ERROR, Outcome.GRADER_ERROR, Outcome.CANCELLED)
