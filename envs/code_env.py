"""`PythonCode-v0`: write a function or a program, which hidden tests grade."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Unpack

from tir_alp.envs.code_grading import grade_function, grade_program
from tir_alp.envs.code_tasks import CodeTasks
from tir_alp.envs.grading import Grade
from tir_alp.envs.tasks import TaskSource
from tir_alp.envs.tool_env import EnvSettings, ToolEnv
from tir_alp.tools.code_forms import FunctionTests, read_tests
from tir_alp.tools.fenced import code_blocks
from tir_alp.tools.outcome import Outcome
from tir_alp.tools.python_tool import PythonTool
from tir_alp.tools.sandbox import SandboxConfig, SandboxError, SandboxRefused, shared_sandbox


class PythonCodeEnv(ToolEnv):
    r"""A function or a program to write, and a Python tool; the reward is 1 if all tests pass.

    A task needs `tests`: calls of a function, whose name is `entry_point`, or pairs of an input and
    an output of a program; see `tools.code_forms`. What the tests expect never enters the sandbox.

    Args:
        sandbox: Settings of the sandbox, whose limits apply to each test; None for the defaults.
        tasks: Tasks that `reset` draws from if it is not given one; default: generated ones.
        settings: Settings of `ToolEnv`.
    """

    instruction: ClassVar[str] = """\
You may try out Python code in a block that begins with a line ```python and ends with a line ```. \
The block is run as soon as it is complete, and you are shown what it prints; then go on. When you \
are sure of the function or program, write all of it in a block that begins with a line \
```solution."""
    task_keys: ClassVar[tuple[str, ...]] = ("question", "tests")

    def __init__(
        self,
        *,
        sandbox: Mapping[str, Any] | None = None,
        tasks: TaskSource | None = None,
        **settings: Unpack[EnvSettings],
    ):
        self._sandbox = SandboxConfig.model_validate(sandbox or {})
        super().__init__(
            tools=[PythonTool(sandbox=self._sandbox)],
            tasks=CodeTasks(seed=0, size=2**31) if tasks is None else tasks,
            **settings,
        )

    def prompt(self, task: Mapping[str, Any]) -> str:
        """Return the instruction and the question. Raises ValueError for malformed tests."""
        read_tests(task)
        return super().prompt(task)

    def answer_in(self, action: str) -> str | None:
        """Return the code of the last complete block tagged `solution`, or None."""
        blocks = [each for each in code_blocks(action) if each.is_complete]
        solutions = [block.code for block in blocks if block.tag == "solution"]
        return solutions[-1] if solutions else None

    def grade(self, task: Mapping[str, Any], answer: str) -> Grade:
        """Run the hidden tests in fresh sessions."""
        tests, limits = read_tests(task), self._sandbox.limits
        try:
            sandbox = shared_sandbox(self._sandbox)
            if isinstance(tests, FunctionTests):
                return grade_function(answer, tests, sandbox, limits)
            return grade_program(answer, tests, sandbox, limits)
        except SandboxRefused:
            raise
        except SandboxError as error:
            return Grade(correct=None, outcome=Outcome.GRADER_ERROR, error=str(error))

    def gold_action(self, task: Mapping[str, Any]) -> str:
        """Return a turn with the reference solution, which is the task's answer if it has one."""
        return f"```solution\n{task['answer']}\n```"

    def wrong_action(self, task: Mapping[str, Any]) -> str:
        """Return a turn with a function or program that returns or prints something wrong."""
        tests = read_tests(task)
        if isinstance(tests, FunctionTests):
            return f"```solution\ndef {tests.entry_point}(*args, **kwargs):\n    return 'no'\n```"
        return "```solution\nprint('no, that is not it')\n```"
