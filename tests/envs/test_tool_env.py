import contextlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from gymnasium.error import ResetNeeded

from tir_alp.envs.grading import Grade
from tir_alp.envs.tool_env import ToolEnv
from tir_alp.tools.base import NoSession, ToolReport, ToolResult
from tir_alp.tools.calls import ToolCall, write_call
from tir_alp.tools.outcome import Outcome

CODE = "```python\nprint(42)\n```"
TASKS = [{"question": f"q{number}", "answer": str(number)} for number in range(50)]


@dataclass
class Session:
    is_open: bool = True

    def close(self):
        self.is_open = False


@dataclass
class Script:
    """A tool that returns the same result for every call."""

    result: ToolResult
    name: str = "python"
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    sessions: list[Session] = field(default_factory=list)
    calls: list = field(default_factory=list)

    def open_session(self):
        self.sessions.append(Session())
        return self.sessions[-1]

    def run(self, arguments, session):
        assert session.is_open
        self.calls.append(arguments)
        return self.result


class Quiz(ToolEnv):
    def prompt(self, task):
        return task["question"]

    def grade(self, task, answer):
        if answer == "hang":
            return Grade(correct=None, outcome=Outcome.GRADER_ERROR, error="too slow")
        return Grade(correct=answer == task["answer"])


def quiz(text="42", outcome=Outcome.OK, error="", max_turns=3, tasks=TASKS):
    tool = Script(ToolResult(outcome=outcome, text=text, duration_s=0.25, error=error))
    env = Quiz(tools=[tool], tasks=tasks, max_turns=max_turns)
    return env, tool


def test_calls_are_written_as_the_tools_need_by_default():
    calculator = Script(ToolResult(outcome=Outcome.OK, text="", duration_s=0), name="calculator")
    python = Script(ToolResult(outcome=Outcome.OK, text="", duration_s=0))
    forms = [Quiz(tools=tools, tasks=TASKS).call_format for tools in ([], [calculator], [python])]
    assert forms == ["none", "tool_call", "fenced"]
    assert Quiz(tools=[calculator, python], tasks=TASKS).call_format == "fenced"


def info(**changes):
    nothing = {
        "outcome": "ok",
        "tool_calls": 0,
        "bad_calls": 0,
        "void": False,
        "answer": None,
        "correct": None,
        "error": "",
        "tool_s": 0.0,
        "calls": [],
        "rewards": {},
    }
    return nothing | changes


def begin(env):
    env.reset(options={"task": {"question": "6*7?", "answer": "42"}})
    return env


# ---------------------------------------------------------------------- how a step can end


def test_a_block_runs_in_the_tool_and_its_text_is_the_observation():
    env, tool = quiz(text="42\n")
    assert begin(env).step(CODE) == ("42\n", 0.0, False, False, info(tool_calls=1, tool_s=0.25))
    assert tool.calls == [{"code": "print(42)\n"}]


def test_a_right_answer_terminates_with_reward_one():
    env, _ = quiz()
    step = begin(env).step(r"\boxed{42}")
    assert step == ("", 1.0, True, False, info(answer="42", correct=True, rewards={"answer": 1.0}))


def test_a_wrong_answer_terminates_with_reward_zero():
    env, _ = quiz()
    step = begin(env).step(r"\boxed{41}")
    assert step == ("", 0.0, True, False, info(answer="41", correct=False, rewards={"answer": 0.0}))


@pytest.mark.parametrize(
    "action",
    ["", "42", "```python\nprint(42)", "```python\nprint(r'\\boxed{42}')", r"\boxed{42"],
    ids=["empty", "no code, no box", "unclosed code", "box in unclosed code", "unclosed box"],
)
def test_a_void_turn_terminates_with_reward_zero(action):
    env, tool = quiz()
    assert begin(env).step(action) == (
        "",
        0.0,
        True,
        False,
        info(void=True, rewards={"answer": 0.0}),
    )
    assert tool.calls == []


def test_a_box_in_the_program_neither_scores_nor_ends_the_episode():
    env, _ = quiz()
    _, reward, terminated, truncated, step = begin(env).step(
        "```python\nprint(r'\\boxed{42}')\n```"
    )
    assert (reward, terminated, truncated) == (0.0, False, False)
    assert step["answer"] is None


def test_a_box_printed_by_the_tool_neither_scores_nor_ends_the_episode():
    env, _ = quiz(text=r"\boxed{42}")
    observation, reward, terminated, truncated, _ = begin(env).step(CODE)
    assert (observation, reward, terminated, truncated) == (r"\boxed{42}", 0.0, False, False)
    assert env.step("The tool said it.")[1:3] == (0.0, True)


def test_a_block_takes_precedence_over_the_box_after_it():
    env, tool = quiz()
    _, reward, terminated, _, _ = begin(env).step(CODE + "\n\\boxed{42}")
    assert (reward, terminated, len(tool.calls)) == (0.0, False, 1)


@pytest.mark.parametrize(
    "outcome", [Outcome.TOOL_ERROR, Outcome.TOOL_TIMEOUT, Outcome.RESOURCE_LIMIT]
)
def test_a_program_that_fails_is_an_observation_like_any_other(outcome):
    env, _ = quiz(text="ValueError", outcome=outcome)
    observation, _, terminated, truncated, step = begin(env).step(CODE)
    assert (observation, terminated, truncated) == ("ValueError", False, False)
    assert step["outcome"] == outcome.value


def test_the_model_reads_that_a_tool_does_not_exist():
    env = Quiz(tools=[], tasks=TASKS, max_turns=3, call_format="fenced")
    observation, _, terminated, truncated, step = begin(env).step(CODE)
    assert "there is no tool named 'python'" in observation
    assert (terminated, truncated, step["outcome"]) == (False, False, "tool_error")


# ------------------------------------------------------------------------------ the limits


def test_the_last_turn_truncates_when_it_is_a_call():
    env, _ = quiz(max_turns=2)
    begin(env)
    assert env.step(CODE)[2:4] == (False, False)
    observation, reward, terminated, truncated, _ = env.step(CODE)
    assert (observation, reward, terminated, truncated) == ("42", 0.0, False, True)


def test_the_last_turn_terminates_when_it_is_an_answer():
    env, _ = quiz(max_turns=2)
    begin(env)
    env.step(CODE)
    assert env.step(r"\boxed{42}")[1:4] == (1.0, True, False)


def test_every_episode_has_its_turns():
    env, _ = quiz(max_turns=2)
    for _ in range(2):
        begin(env)
        assert env.step(CODE)[3] is False
        assert env.step(CODE)[3] is True


# ------------------------------------------------------------------------- infrastructure


def test_a_failing_sandbox_truncates_and_is_named():
    env, _ = quiz(text="", outcome=Outcome.INFRA_ERROR, error="host 3 is gone")
    step = begin(env).step(CODE)
    assert step[:4] == ("", 0.0, False, True)
    assert step[4] == info(outcome="infra_error", tool_calls=1, error="host 3 is gone", tool_s=0.25)


def test_a_failing_grader_truncates_and_gives_no_verdict():
    env, _ = quiz()
    step = begin(env).step(r"\boxed{hang}")
    assert step[:4] == ("", 0.0, False, True)
    assert step[4] == info(outcome="grader_error", answer="hang", error="too slow")


# ----------------------------------------------------------------------- reset and sessions


def test_one_session_lasts_one_episode():
    env, tool = quiz()
    begin(env)
    env.step(CODE)
    env.step(CODE)
    assert [session.is_open for session in tool.sessions] == [True]
    env.step(r"\boxed{42}")
    assert [session.is_open for session in tool.sessions] == [False]


def test_reset_in_mid_episode_frees_the_session():
    env, tool = quiz()
    begin(env).step(CODE)
    begin(env).step(CODE)
    assert [session.is_open for session in tool.sessions] == [False, True]


def test_close_frees_the_session_and_may_be_called_twice():
    env, tool = quiz()
    begin(env).step(CODE)
    env.close()
    env.close()
    assert [session.is_open for session in tool.sessions] == [False]


def test_an_episode_without_a_call_opens_no_session():
    env, tool = quiz()
    begin(env).step(r"\boxed{42}")
    assert tool.sessions == []


def test_reset_gives_the_prompt_and_the_whole_task():
    env, _ = quiz()
    task = {"question": "6*7?", "answer": "42", "source": {"page": 3}}
    observation, reset_info = env.reset(options={"task": task})
    assert (observation, reset_info) == ("6*7?", {"task": task})
    reset_info["task"]["answer"] = "0"
    assert env.step(r"\boxed{42}")[1] == 1.0


def test_without_a_task_one_is_drawn_by_the_seed():
    env, _ = quiz()
    first = [env.reset(seed=5)[0], env.reset()[0], env.reset()[0]]
    again = [env.reset(seed=5)[0], env.reset()[0], env.reset()[0]]
    assert first == again
    assert len(set(first)) > 1


@pytest.mark.parametrize("before", ["nothing", "an answer", "close"])
def test_a_step_without_an_episode_is_refused(before):
    env, _ = quiz()
    if before != "nothing":
        begin(env)
    if before == "an answer":
        env.step(r"\boxed{42}")
    if before == "close":
        env.close()
    with pytest.raises(ResetNeeded, match="call reset"):
        env.step(CODE)


def test_an_episode_needs_a_turn_and_a_task():
    with pytest.raises(ValueError, match="max_turns is 0"):
        quiz(max_turns=0)
    with pytest.raises(ValueError, match="there are no tasks to draw from"):
        quiz(tasks=[])


class ReportingScript(Script):
    def report(self):
        return ToolReport(runs_in={"host": "there"}, warnings=("mind the gap",))


def test_tools_that_report_what_they_run_in_are_asked():
    env, silent = quiz()
    assert env.run_report() == {"tools": {}, "warnings": []}
    speaking = ReportingScript(silent.result, name="speaking")
    env = Quiz(tools=[silent, speaking], tasks=TASKS, max_turns=3)
    assert env.run_report() == {
        "tools": {"speaking": {"host": "there"}},
        "warnings": ["mind the gap"],
    }


def test_a_recorded_episode_is_played_again_without_its_tools():
    env, tool = quiz()
    recorded = [{"outcome": "tool_error", "text": "boom", "duration_s": 0.5, "error": "boom"}, None]
    env.reset(options={"task": TASKS[3], "tool_results": recorded})
    played = env.step(CODE)
    assert played == (
        "boom",
        0.0,
        False,
        False,
        info(outcome="tool_error", tool_calls=1, error="boom", tool_s=0.5),
    )
    assert env.step(r"\boxed{3}")[1:4] == (1.0, True, False)
    assert tool.calls == tool.sessions == []
    env.reset(options={"task": TASKS[3]})  # the record is for one episode
    assert env.step(CODE)[0] == "42"


def test_a_call_without_a_recorded_result_is_refused():
    env, _ = quiz()
    env.reset(options={"task": TASKS[3], "tool_results": [None]})
    with pytest.raises(ValueError, match="turn 0 has a tool call, but tool_results has no result"):
        env.step(CODE)


# ------------------------------------------------------------------------ several calls in a turn


class Meeting:
    """A tool whose calls wait for one another, and that keeps nothing unless it is told to."""

    description = ""
    parameters: Mapping[str, Any] = {"type": "object", "properties": {"n": {"type": "integer"}}}

    def __init__(self, name: str, size: int, session: type[Any] = NoSession) -> None:
        self.name, self.session = name, session
        self.barrier = threading.Barrier(size)
        self.began, self.num_inside, self.most_inside = [], 0, 0

    def open_session(self):
        return self.session()

    def run(self, arguments, session):
        self.began.append(arguments["n"])
        self.num_inside += 1
        self.most_inside = max(self.most_inside, self.num_inside)
        with contextlib.suppress(threading.BrokenBarrierError):
            self.barrier.wait(timeout=0.5 if self.barrier.parties > 1 else None)
        self.num_inside -= 1
        return ToolResult(outcome=Outcome.OK, text=f"{self.name} {arguments['n']}", duration_s=0.5)


class Notebook:
    """A session that keeps something."""

    def close(self):
        pass


def marked(*calls):
    return "".join(
        write_call(ToolCall(name, arguments), "tool_call") or "" for name, arguments in calls
    )


def turn_of(tools, *calls, **settings):
    env = Quiz(tools=tools, tasks=TASKS, call_format="tool_call", **settings)
    env.reset(options={"task": TASKS[3]})
    return env.step(marked(*calls))


def test_the_calls_of_a_turn_run_in_order_and_each_has_its_output():
    tool = Meeting("meet", 1)
    observation, _, _, _, info = turn_of(
        [tool], *[("meet", {"n": n}) for n in (2, 1)], ("meet", {"n": "x"}), max_calls=3
    )
    assert tool.began == [2, 1] and tool.most_inside == 1
    assert [each["text"] for each in info["calls"][:2]] == ["meet 2", "meet 1"]
    assert [each["outcome"] for each in info["calls"]] == ["ok", "ok", "tool_error"]
    assert observation.startswith("meet 2\nmeet 1\nError: the arguments of 'meet' do not fit")
    assert (info["outcome"], info["tool_calls"], info["bad_calls"]) == ("tool_error", 3, 0)
    assert info["tool_s"] == 1.0


def test_calls_that_keep_nothing_run_at_the_same_time_if_they_may():
    tool = Meeting("meet", 3)
    calls = [("meet", {"n": n}) for n in range(3)]
    turn_of([tool], *calls, max_calls=3, parallel_calls=True)
    assert tool.most_inside == 3 and not tool.barrier.broken


def test_calls_that_share_a_session_run_in_order():
    tool = Meeting("meet", 2, session=Notebook)
    calls = [("meet", {"n": n}) for n in range(3)]
    turn_of([tool], *calls, max_calls=3, parallel_calls=True)
    assert tool.most_inside == 1 and tool.began == [0, 1, 2]


def test_a_turn_has_one_more_answer_than_calls_that_are_run_at_most():
    tool = Meeting("meet", 1)
    info = turn_of([tool], *[("meet", {"n": n}) for n in range(9)], max_calls=2)[4]
    assert tool.began == [0, 1] and info["tool_calls"] == 3
    assert "at most 2 calls of a turn can be run" in info["calls"][2]["text"]


def test_several_recorded_results_take_the_place_of_the_tools():
    tool = Meeting("meet", 1)
    calls = [("meet", {"n": n}) for n in range(2)]
    played = turn_of([tool], *calls, max_calls=2)
    env = Quiz(tools=[tool], tasks=TASKS, call_format="tool_call", max_calls=2)
    env.reset(options={"task": TASKS[3], "tool_results": [played[4]["calls"]]})
    assert env.step(marked(*calls)) == played
    assert tool.began == [0, 1]


def test_a_call_that_is_not_complete_is_answered_and_counted():
    observation, _, terminated, _, info = turn_of([Meeting("meet", 1)])
    assert (terminated, info["void"]) == (True, True)
    env = Quiz(tools=[Meeting("meet", 1)], tasks=TASKS)
    env.reset(options={"task": TASKS[3]})
    observation, _, terminated, _, info = env.step('<tool_call>{"name": "meet"')
    assert observation == "Error: the call is not complete: it does not end with </tool_call>"
    assert (terminated, info["bad_calls"], info["tool_calls"]) == (False, 1, 1)


def test_fenced_code_has_one_call_per_turn():
    with pytest.raises(ValueError, match="max_calls is 2: with call_format = 'fenced'"):
        Quiz(tools=[Meeting("python", 1)], tasks=TASKS, max_calls=2)
