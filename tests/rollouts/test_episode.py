"""Episodes with a scripted policy and a scripted environment, token by token."""

from dataclasses import replace

import gymnasium
import pytest

from tests.rollouts.scripted import (
    ANSWERED,
    ASSISTANT,
    CALL,
    END,
    GO_ON,
    PROMPT,
    TASK,
    TOOL,
    A,
    B,
    Policy,
    Scripted,
    completion,
    episode,
    play,
)
from tir_alp.engines.base import Completion
from tir_alp.models.tiny.model import make_tokenizer
from tir_alp.rollouts.renderer import PromptTooLong
from tir_alp.rollouts.traces import mask_overlong, mask_void_turns
from tir_alp.tools.outcome import Outcome
from tir_alp.types import StopReason, TokenSpan, Turn, VersionSpan

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
    assert first.timing.keys() == {"prepare", "begin", "queue", "generate", "tool"}
    assert second.timing.keys() == {"begin", "queue", "generate", "tool"}

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
