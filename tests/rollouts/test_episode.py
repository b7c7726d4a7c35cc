"""Episodes with a scripted policy and a scripted environment, token by token."""

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import gymnasium
import pytest

from tir_alp.config import RolloutConfig
from tir_alp.engines.base import Completion, Sampling
from tir_alp.models.tiny.model import make_tokenizer
from tir_alp.rollouts.data import Task
from tir_alp.rollouts.episode import EpisodeFailed, EpisodeRunner, mask_overlong, mask_void_turns
from tir_alp.rollouts.renderer import PromptTooLong, Renderer
from tir_alp.tools.outcome import Outcome
from tir_alp.types import StopReason, TokenSpan, Trajectory, Turn, VersionSpan

END, USER, ASSISTANT, TOOL = 1, 2, 3, 4
A, B = 70, 71  # the tokens of "a" and "b"
PROMPT = (USER, A, B, END, ASSISTANT)
TASK = Task("t7", "ab", "42")
CALL = tuple(make_tokenizer().encode("```py\n1\n```", add_special_tokens=False))

GO_ON: tuple = ("b", 0.0, False, False, {})
ANSWERED: tuple = ("", 1.0, True, False, {"correct": True})


def broken(outcome: str, error: str = "") -> tuple:
    return ("", 0.0, False, True, {"outcome": outcome, "error": error})


def completion(*ids: int, reason=StopReason.EOS, version: int = 0) -> Completion:
    logprobs = tuple(-id / 100 for id in ids)
    return Completion(token_ids=ids, logprobs=logprobs, stop_reason=reason, policy_version=version)


class Scripted(gymnasium.Env[str, str]):
    """Returns the next line of its script from each step, or calls it if it is a function."""

    def __init__(self, *script: Any, prompt: str = "ab"):
        self.script, self.prompt = list(script), prompt
        self.tasks: list[Any] = []
        self.actions: list[str] = []
        self.num_closed = 0

    def reset(self, *, seed=None, options=None):
        self.tasks.append(options)
        return self.prompt, {}

    def step(self, action):
        self.actions.append(action)
        line = self.script.pop(0)
        return line() if callable(line) else line

    def close(self):
        self.num_closed += 1


class Policy:
    """Returns its lines as completions, and records the contexts that it was given."""

    def __init__(self, *lines: Completion):
        self.lines = list(lines)
        self.read: list[tuple[int, ...]] = []
        self.samplings: list[Sampling] = []

    async def __call__(self, token_ids: tuple[int, ...], sampling: Sampling) -> Completion:
        self.read.append(token_ids)
        self.samplings.append(sampling)
        return self.lines.pop(0) if self.lines else completion(END)


def play(
    work: Callable[[EpisodeRunner], Any],
    generate: Any,
    *envs: Scripted,
    slots: int = 8,
    max_observation_tokens: int = 64,
    **limits: Any,
) -> tuple[Any, list[EpisodeFailed]]:
    """Do some work with a runner that makes `envs` in order; return the failures as well."""
    failures: list[EpisodeFailed] = []
    waiting = list(envs)

    async def main() -> Any:
        runner = EpisodeRunner(
            make_env=lambda: waiting.pop(0),
            generate=generate,
            renderer=Renderer(make_tokenizer(), max_observation_tokens=max_observation_tokens),
            limits=RolloutConfig.model_validate(
                {"max_turn_tokens": 20, "max_context_tokens": 200} | limits
            ),
            threads=threads,
            slots=asyncio.Semaphore(slots),
            seed=11,
            on_failure=failures.append,
        )
        return await work(runner)

    with ThreadPoolExecutor(8) as threads:
        return asyncio.run(main()), failures


def episode(generate: Any, env: Scripted, **settings: Any) -> Trajectory:
    return play(lambda runner: runner.run_episode(TASK, 5, 40), generate, env, **settings)[0]


def group_of(group_id: int) -> Callable[[EpisodeRunner], Any]:
    return lambda runner: runner.run_group(TASK, group_id)


def failure(generate: Any, env: Scripted, **settings: Any) -> EpisodeFailed:
    with pytest.raises(EpisodeFailed) as caught:
        episode(generate, env, **settings)
    return caught.value


# ------------------------------------------------------------------------- two turns, literally


def test_an_episode_of_two_turns_token_by_token():
    spans = (VersionSpan(3, 0, 2), VersionSpan(4, 2, len(CALL) + 2))
    sampled = completion(*CALL, A, A, reason=StopReason.LENGTH, version=3)
    policy = Policy(replace(sampled, version_spans=spans), completion(A, END, version=4))
    env = Scripted(("b", 0.25, False, False, {"tool_calls": 1}), ANSWERED)
    trajectory = episode(policy, env)

    shown = (END, TOOL, B, END, ASSISTANT)
    first, second = trajectory.turns
    assert trajectory.prompt == TokenSpan(PROMPT)
    assert first.completion == TokenSpan(CALL, sampled.logprobs[: len(CALL)])
    assert first.observation == TokenSpan(shown)
    assert second.completion == TokenSpan((A, END), (-0.70, -0.01))
    assert second.observation == TokenSpan(())
    assert trajectory.token_ids == PROMPT + CALL + shown + (A, END)
    assert trajectory.loss_mask == (False,) * 5 + (True,) * len(CALL) + (False,) * 5 + (True,) * 2
    assert [turn.policy_version for turn in trajectory.turns] == [3, 4]
    assert first.version_spans == (VersionSpan(3, 0, 2), VersionSpan(4, 2, len(CALL)))
    assert [turn.stop_reason for turn in trajectory.turns] == [StopReason.STOP, StopReason.EOS]
    assert [turn.outcome for turn in trajectory.turns] == [Outcome.OK, Outcome.OK]
    assert (trajectory.reward, trajectory.terminated, trajectory.truncated) == (1.25, True, False)
    assert (trajectory.task_id, trajectory.group_id, trajectory.sequence_uid) == ("t7", 5, 40)
    assert first.info == {"tool_calls": 1, "observation": "b"}
    assert first.timing.keys() == {"prepare", "begin", "generate", "tool"}
    assert second.timing.keys() == {"begin", "generate", "tool"}

    assert policy.read == [PROMPT, PROMPT + CALL + shown]
    assert env.actions == ["```py\n1\n```", "a"]
    assert env.tasks == [{"task": {"task_id": "t7", "question": "ab", "answer": "42"}}]
    assert env.num_closed == 1


def test_an_end_token_that_was_sampled_stands_once():
    policy = Policy(completion(A, END), completion(B, END))
    trajectory = episode(policy, Scripted(GO_ON, ANSWERED))
    assert trajectory.token_ids == (*PROMPT, A, END, TOOL, B, END, ASSISTANT, B, END)


def test_the_engine_gets_the_sampling_settings_and_the_sequence():
    policy = Policy()
    episode(policy, Scripted(ANSWERED), temperature=0.7)
    (sampling,) = policy.samplings
    assert (sampling.seed, sampling.sequence_uid) == (11, 40)
    assert (sampling.temperature, sampling.top_p) == (0.7, 1.0)
    assert sampling.stop_token_ids == {END}
    assert sampling.stop_matcher is not None
    matches = sampling.stop_matcher()
    assert [matches(token) for token in CALL] == [False] * (len(CALL) - 1) + [True]


def test_a_temperature_of_zero_makes_an_episode_greedy():
    policy = Policy()
    play(lambda runner: runner.run_episode(TASK, 0, 0, 0.0), policy, Scripted(ANSWERED))
    assert policy.samplings[0].temperature == 0


# ------------------------------------------------------------------------------------- limits


def test_a_turn_gets_its_limit_of_tokens_or_what_is_left_of_the_context():
    policy = Policy(completion(A, A, A, END), completion(A, END))
    episode(policy, Scripted(GO_ON, ANSWERED), max_turn_tokens=8, max_context_tokens=20)
    assert [sampling.max_tokens for sampling in policy.samplings] == [8, 20 - len(PROMPT) - 8]


def test_an_episode_that_fills_its_context_is_truncated_without_a_last_observation():
    policy = Policy(completion(*(A,) * 15, reason=StopReason.LENGTH))
    trajectory = episode(policy, Scripted(GO_ON), max_turn_tokens=15, max_context_tokens=20)
    assert (trajectory.terminated, trajectory.truncated) == (False, True)
    assert trajectory.token_ids == PROMPT + (A,) * 15
    assert trajectory.turns[0].info["observation"] == "b"


@pytest.mark.parametrize(("max_context_tokens", "num_turns"), [(11, 1), (12, 2)])
def test_an_observation_that_leaves_no_room_to_write_ends_the_episode(
    max_context_tokens, num_turns
):
    policy = Policy(completion(A, END), completion(END))
    limits = {"max_turn_tokens": 2, "max_context_tokens": max_context_tokens}
    trajectory = episode(policy, Scripted(GO_ON, ANSWERED), **limits)
    assert len(trajectory.turns) == num_turns  # 5 tokens of the prompt, 2 sampled, 4 shown
    assert trajectory.truncated == (num_turns == 1)
    assert len(trajectory.turns[0].observation) == (0 if num_turns == 1 else 4)


def test_an_answer_with_the_last_token_of_the_context_terminates():
    policy = Policy(completion(A, END))
    trajectory = episode(policy, Scripted(ANSWERED), max_turn_tokens=2, max_context_tokens=7)
    assert (trajectory.terminated, trajectory.truncated) == (True, False)


def test_a_limit_of_the_environment_truncates():
    trajectory = episode(Policy(), Scripted(("b", 0.0, False, True, {})))
    assert (trajectory.terminated, trajectory.truncated) == (False, True)
    assert len(trajectory.turns[0].observation) == 0


def test_a_long_observation_is_cut_to_its_limit():
    policy = Policy(completion(A, END), completion(END))
    env = Scripted(("abbbba", 0.0, False, False, {}), ANSWERED)
    trajectory = episode(policy, env, max_observation_tokens=2)
    assert trajectory.turns[0].observation.token_ids == (TOOL, A, A, END, ASSISTANT)
    assert trajectory.turns[0].info["observation"] == "abbbba"


def test_a_prompt_that_fills_the_context_is_no_failure_of_the_episode():
    env = Scripted()
    with pytest.raises(PromptTooLong, match="task t7 has 5 tokens"):
        episode(Policy(), env, max_turn_tokens=2, max_context_tokens=5)
    assert env.num_closed == 1


# ---------------------------------------------------------------------------------- void turns


def turns(*void: bool) -> tuple[Turn, ...]:
    span = TokenSpan((A,), (-0.1,))
    return tuple(
        Turn(span, TokenSpan(()), 0, StopReason.EOS, Outcome.OK, 0.0, info={"void": each})
        for each in void
    )


@pytest.mark.parametrize(
    ("policy", "trainable"),
    [
        ("keep", [True, True, True]),
        ("mask_turn", [True, False, True]),
        ("mask_trajectory", [False, False, False]),
    ],
)
def test_void_turns_leave_the_loss_as_configured(policy, trainable):
    masked = mask_void_turns(turns(False, True, False), policy)
    assert [turn.completion.trainable for turn in masked] == trainable
    assert [turn.completion.rollout_logprobs for turn in masked] == [(-0.1,)] * 3


@pytest.mark.parametrize("policy", ["keep", "mask_turn", "mask_trajectory"])
def test_without_a_void_turn_every_turn_stays(policy):
    assert mask_void_turns(turns(False, False), policy) == turns(False, False)


@pytest.mark.parametrize(
    ("policy", "learnt"), [("keep", 3), ("mask_turn", 2), ("mask_trajectory", 0)]
)
def test_the_policy_for_void_turns_reaches_the_trajectory(policy, learnt):
    script = (GO_ON, ("", 0.0, True, False, {"void": True}))
    generate = Policy(completion(A, END), completion(END))
    assert sum(episode(generate, Scripted(*script), void_turns=policy).loss_mask) == learnt


# ------------------------------------------------------------------------------------ over-long


@pytest.mark.parametrize(
    ("policy", "truncated", "trainable"),
    [
        ("keep", True, [True, True]),
        ("zero_advantage", True, [True, True]),
        ("mask_turn", True, [False, True]),
        ("mask_turn", False, [False, True]),
        ("mask_trajectory", True, [False, False]),
        ("mask_trajectory", False, [False, False]),
    ],
)
def test_a_completion_that_a_limit_cut_leaves_the_loss_as_configured(policy, truncated, trainable):
    cut, whole = turns(False, False)
    played = (replace(cut, stop_reason=StopReason.LENGTH), whole)
    masked = mask_overlong(played, policy, truncated)
    assert [turn.completion.trainable for turn in masked] == trainable


@pytest.mark.parametrize(("policy", "learnt"), [("mask_turn", True), ("mask_trajectory", False)])
def test_a_trajectory_that_ran_out_of_turns_is_overlong_but_none_of_its_turns(policy, learnt):
    masked = mask_overlong(turns(False), policy, truncated=True)
    assert [turn.completion.trainable for turn in masked] == [learnt]
    assert mask_overlong(turns(False), policy, truncated=False) == turns(False)


@pytest.mark.parametrize(
    ("policy", "learnt"), [("keep", 3), ("mask_turn", 1), ("mask_trajectory", 0)]
)
def test_the_policy_for_over_long_turns_reaches_the_trajectory(policy, learnt):
    cut = completion(A, B, reason=StopReason.LENGTH)
    played = episode(Policy(cut, completion(END)), Scripted(GO_ON, ANSWERED), overlong=policy)
    assert sum(played.loss_mask) == learnt
    assert played.is_overlong and not played.truncated


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


# --------------------------------------------------------------------- a shipped environment


def test_python_math_plays_a_call_and_an_answer():
    tokenizer = make_tokenizer()

    def complete(text: str) -> Completion:
        return completion(*tokenizer.encode(text, add_special_tokens=False), END)

    env = gymnasium.make(
        "tir_alp.envs:PythonMath-v0",
        disable_env_checker=True,
        instruction="",
        sandbox={"preload": []},
    )
    policy = Policy(complete("```python\nprint(6*7)\n```\nSo it is"), complete("\\boxed{42}"))
    trajectory = episode(policy, env)  # type: ignore[arg-type]
    call, answer = trajectory.turns
    assert tokenizer.decode(list(trajectory.token_ids)) == (
        "<|user|>ab<|end|><|assistant|>```python\nprint(6*7)\n```<|end|>"
        "<|tool|>42<|end|><|assistant|>\\boxed{42}<|end|>"
    )
    assert (call.reward, answer.reward, trajectory.terminated) == (0.0, 1.0, True)
    assert (call.info["tool_calls"], answer.info["correct"]) == (1, True)
