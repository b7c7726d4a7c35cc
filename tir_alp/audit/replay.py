"""Replays recorded episodes, with recorded tool results in place of the tools."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import gymnasium

from tir_alp.audit.trajectory import Answer, Replayed
from tir_alp.rollouts.data import Task
from tir_alp.rollouts.renderer import Renderer
from tir_alp.tools.outcome import Outcome
from tir_alp.types import REPORT, Trajectory, Turn


def replay(
    env: gymnasium.Env[str, str], task: Task, trajectory: Trajectory, renderer: Renderer
) -> Replayed:
    """Reset an environment to a task and take the recorded actions.

    The recorded tool results are passed as the reset option `tool_results`. An environment that
    ignores this option runs its tools again; see `tir_alp.envs.tool_env.ToolEnv.reset`.

    Args:
        env: The environment to play in.
        task: The task that the recorded episode was about.
        trajectory: The recorded episode.
        renderer: Decodes completions to actions.
    """
    options = task.to_options() | {
        "tool_results": [_tool_result(t) for t in trajectory.conversation_turns]
    }
    actions = [renderer.action(turn.completion.token_ids) for turn in trajectory.conversation_turns]
    return _replay(env, task, options, actions)


def grade_again(env: gymnasium.Env[str, str], task: Task, trajectory: Trajectory) -> Replayed:
    """Reset the environment of an agent to a task, and grade the recorded report.

    Args:
        env: The environment.
        task: The task that the recorded episode was about.
        trajectory: The recorded episode.
    """
    report = trajectory.turns[-1].info.get(REPORT) if trajectory.turns else None
    return _replay(env, task, task.to_options(), [report] if isinstance(report, str) else [])


def _replay(
    env: gymnasium.Env[str, str], task: Task, options: dict[str, Any], actions: Sequence[str]
) -> Replayed:
    prompt, _ = env.reset(seed=task.seed, options=options)
    answers: list[Answer] = []
    for action in actions:
        try:
            answer = env.step(action)
        except Exception as error:  # any environment may raise anything: the audit continues
            return Replayed(prompt, answers, f"the environment raised {error!r}")
        text, reward, terminated, truncated, info = answer
        outcome = Outcome(info.get("outcome", Outcome.OK))
        if outcome.is_infrastructure:
            return Replayed(prompt, answers, f"cannot be replayed: {info.get('error')}")
        info = json.loads(json.dumps(info))
        answers.append(Answer(text, float(reward), bool(terminated), bool(truncated), info))
        if terminated or truncated:
            break
    return Replayed(prompt, answers)


def _tool_result(turn: Turn) -> dict[str, Any] | list[dict[str, Any]] | None:
    if not turn.info.get("tool_calls"):
        return None
    if calls := turn.info.get("calls"):
        return list(calls)
    return {
        "outcome": turn.info.get("outcome", Outcome.OK),
        "text": turn.info.get("observation", ""),
        "duration_s": turn.info.get("tool_s", 0.0),
        "error": turn.info.get("error", ""),
    }
