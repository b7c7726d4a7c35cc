"""Episodes that fail, hang or run side by side, with a scripted policy and environment."""

import asyncio
import threading
import time
from dataclasses import replace
from typing import Any

import pytest

from tests.rollouts.scripted import (
    ANSWERED,
    END,
    GO_ON,
    TASK,
    A,
    B,
    Policy,
    Scripted,
    broken,
    completion,
    episode,
    failure,
    group_of,
    play,
)
from tir_alp.engines.base import Completion, Sampling
from tir_alp.rollouts.episode import EpisodeRunner
from tir_alp.tools.outcome import Outcome
from tir_alp.types import StopReason

# ------------------------------------------------------------------------------------ failures


@pytest.mark.parametrize("outcome", [each for each in Outcome if each.is_infrastructure])
def test_a_failure_of_infrastructure_fails_the_episode(outcome):
    env = Scripted(GO_ON, broken(outcome.value, "the sandbox is gone"))
    error = failure(Policy(), env)
    assert error.outcome is outcome
    assert str(error) == "task t7, sequence 40, turn 1: the sandbox is gone"
    assert env.num_closed == 1


@pytest.mark.parametrize("outcome", [each for each in Outcome if not each.is_infrastructure])
def test_a_failure_of_the_policy_is_part_of_the_trajectory(outcome):
    env = Scripted(("b", 0.0, False, False, {"outcome": outcome.value}), ANSWERED)
    assert episode(Policy(), env).turns[0].outcome is outcome


def test_an_episode_that_infrastructure_broke_gets_another_in_a_fresh_environment():
    first, second = Scripted(broken("infra_error")), Scripted(ANSWERED)
    policy = Policy()
    group, failures = play(group_of(3), policy, first, second, group_size=1)
    assert [trajectory.reward for trajectory in group.trajectories] == [1.0]
    assert group.num_failed == 0
    assert [str(each) for each in failures] == ["task t7, sequence 3, turn 0: infra_error"]
    assert (first.num_closed, second.num_closed) == (1, 1)
    assert policy.samplings[0].sequence_uid == policy.samplings[1].sequence_uid == 3


def test_an_episode_that_fails_twice_is_dropped_and_counted_and_has_no_reward():
    """The environment of an episode depends on the threads, so all of sequence 7's fail."""

    async def generate(token_ids: tuple[int, ...], sampling: Sampling) -> Completion:
        return completion(B if sampling.sequence_uid == 7 else A, END)

    class BreaksAtB(Scripted):
        def step(self, action):
            return broken("infra_error") if action == "b" else ANSWERED

    envs = [BreaksAtB() for _ in range(5)]
    group, failures = play(group_of(1), generate, *envs, group_size=4)
    assert [each.sequence_uid for each in group.trajectories] == [4, 5, 6]
    assert (group.num_failed, group.rewards) == (1, (1.0, 1.0, 1.0))
    assert [str(each) for each in failures] == ["task t7, sequence 7, turn 0: infra_error"] * 2
    assert [env.num_closed for env in envs] == [1] * 5


def test_a_lone_survivor_has_nothing_to_be_compared_with():
    async def generate(token_ids: tuple[int, ...], sampling: Sampling) -> Completion:
        reason = StopReason.ABORT if sampling.sequence_uid else StopReason.EOS
        return completion(END, reason=reason)

    envs = [Scripted(ANSWERED) for _ in range(3)]
    group, failures = play(group_of(0), generate, *envs, group_size=2)
    assert (group.trajectories, group.num_failed) == ((), 2)
    assert [each.outcome for each in failures] == [Outcome.CANCELLED] * 2
    assert str(failures[0]) == "task t7, sequence 1, turn 0: the completion was aborted"


def test_an_engine_that_fails_fails_the_episode():
    async def generate(token_ids: tuple[int, ...], sampling: Sampling) -> Completion:
        raise RuntimeError("out of memory")

    error = failure(generate, Scripted())
    assert error.outcome is Outcome.INFRA_ERROR
    assert str(error) == "task t7, sequence 40, turn 0: the engine failed: out of memory"


def test_a_mistake_in_an_environment_fails_its_episode_and_is_named():
    env = Scripted(lambda: 1 / 0)
    error = failure(Policy(), env)
    assert error.outcome is Outcome.INFRA_ERROR
    assert "turn 0: env.step raised ZeroDivisionError('division by zero')" in str(error)
    assert env.num_closed == 1


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (("", float("nan"), True, False, {}), "the reward is nan, which is no finite number"),
        (("", float("inf"), True, False, {}), "the reward is inf, which is no finite number"),
        (("", "1", True, False, {}), "the reward is '1', which is no finite number"),
        (("", None, True, False, {}), "NoneType"),
        ((b"", 1.0, True, False, {}), "the observation is b'', which is no text"),
        (("", 1.0, True, False, {"outcome": "fine"}), "'fine' is not a valid Outcome"),
        (("", 1.0, True, False, None), "'NoneType' object has no attribute 'get'"),
        (("", 1.0, True, {}), "not enough values to unpack"),
    ],
)
def test_what_an_environment_may_not_return_fails_its_episode_and_is_named(step, reason):
    error = failure(Policy(), Scripted(lambda: step))
    assert error.outcome is Outcome.INFRA_ERROR
    assert "turn 0: env.step raised" in str(error) and reason in str(error)


# ----------------------------------------------------------------------------------- deadlines


class Hanging(Scripted):
    """Hangs in one of its methods until the test ends or the environment is closed."""

    def __init__(self, method: str):
        super().__init__(GO_ON, ANSWERED)
        self.method, self.closed = method, threading.Event()

    def reset(self, *, seed=None, options=None):
        if self.method == "reset":
            self.closed.wait(10)
        return super().reset(seed=seed, options=options)

    def step(self, action):
        if self.method == "step" and self.actions:
            self.closed.wait(10)
        return super().step(action)

    def close(self):
        super().close()
        self.closed.set()


@pytest.mark.parametrize(
    ("method", "where"),
    [
        ("reset", "task t7, sequence 40: env.reset"),
        ("step", "task t7, sequence 40, turn 1: env.step"),
    ],
)
def test_an_environment_that_hangs_meets_its_deadline_and_is_named(method, where):
    env = Hanging(method)
    began = time.monotonic()
    error = failure(Policy(), env, env_timeout_s=0.2)
    assert time.monotonic() - began < 5
    assert str(error) == f"{where} did not answer within 0.2 s"
    assert error.outcome is Outcome.INFRA_ERROR
    assert env.num_closed == 1


def test_an_engine_that_hangs_meets_its_deadline_and_is_named():
    cancelled = []

    async def generate(token_ids: tuple[int, ...], sampling: Sampling) -> Completion:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(sampling.sequence_uid)
            raise
        raise AssertionError

    env = Scripted()
    error = failure(generate, env, generate_timeout_s=0.1)
    where = "task t7, sequence 40, turn 0"
    assert str(error) == f"{where}: the engine gave no completion within 0.1 s"
    assert error.outcome is Outcome.INFRA_ERROR
    assert cancelled == [40]
    assert env.num_closed == 1


def test_an_episode_that_is_cancelled_closes_its_environment():
    env = Scripted()

    async def generate(token_ids: tuple[int, ...], sampling: Sampling) -> Completion:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        episode(generate, env)
    assert env.num_closed == 1


# --------------------------------------------------------------------------------- concurrency


def test_there_is_no_barrier_between_turns():
    """The slow episode's first step ends only after the quick one has played all its turns."""
    quick_is_done = threading.Event()

    def last() -> tuple:
        quick_is_done.set()
        return ANSWERED

    def slow() -> tuple:
        assert quick_is_done.wait(10)
        return GO_ON

    envs = [Scripted(slow, ANSWERED), Scripted(GO_ON, GO_ON, GO_ON, last)]
    group, _ = play(group_of(0), Policy(), *envs, group_size=2, env_timeout_s=20)
    assert sorted(len(each.turns) for each in group.trajectories) == [2, 4]


def test_no_more_episodes_play_at_a_time_than_there_are_slots():
    playing, most, lock = 0, 0, threading.Lock()

    class Counting(Scripted):
        def reset(self, *, seed=None, options=None):
            nonlocal playing, most
            with lock:
                playing += 1
                most = max(most, playing)
            return super().reset(seed=seed, options=options)

        def step(self, action):
            nonlocal playing
            time.sleep(0.01)
            with lock:
                playing -= 1
            return super().step(action)

    envs = [Counting(ANSWERED) for _ in range(6)]
    group, _ = play(group_of(0), Policy(), *envs, group_size=6, slots=2)
    assert len(group.trajectories) == 6
    assert most == 2


def test_an_episode_is_admitted_for_as_long_as_it_plays():
    inside: list[str] = []

    class Admission:
        def __enter__(self):
            inside.append("enter")

        def __exit__(self, *_):
            inside.append("exit")

    async def generate(token_ids: tuple[int, ...], sampling: Sampling) -> Completion:
        inside.append("generate")
        return completion(END)

    def work(runner: EpisodeRunner) -> Any:
        return replace(runner, admission=Admission).run_episode(TASK, 0, 0)

    play(work, generate, Scripted(GO_ON, ANSWERED))
    assert inside == ["enter", "generate", "generate", "exit"]
