"""Checks that an environment keeps the contract that the trainer relies on, as a linter would.

Each rule has a name. A method that an environment does not offer, such as `gold_action`, is not
checked; a note reports that.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import gymnasium
from gymnasium.utils.env_checker import check_env

from tir_alp.tools.make_env import make_env
from tir_alp.tools.outcome import Outcome

_NO_ANSWER = "I do not know."


@dataclass(frozen=True, slots=True)
class Finding:
    """One violation, or one thing that could not be checked."""

    rule: str
    text: str
    is_note: bool = False
    """Whether this is information rather than a fault."""


def check(id: str, seeds: Iterable[int], kwargs: Mapping[str, Any] | None = None) -> list[Finding]:
    """Examine an environment.

    Args:
        id: Id of the environment, as `gymnasium.make` takes it.
        seeds: Seeds of the tasks to play.
        kwargs: Settings of the environment; None: its defaults.

    Raises:
        ValueError: The environment cannot be made, or refuses its settings.
    """
    env, again = (make_env(id, kwargs or {}).unwrapped for _ in range(2))
    seeds = list(seeds)
    with closing(env), closing(again):
        return [*_gymnasium(env), *_seeds(env, again, seeds), *_texts(env), *_answers(env, seeds)]


def _gymnasium(env: gymnasium.Env[Any, Any]) -> Iterator[Finding]:
    """Run Gymnasium's own checker; its warnings are findings too."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            check_env(env, skip_render_check=True)
        except Exception as error:  # the checker asserts, and an environment may raise anything
            yield Finding("gymnasium", f"{type(error).__name__}: {error}")
    for warning in caught:
        yield Finding("gymnasium", " ".join(str(warning.message).split()))


def _seeds(
    env: gymnasium.Env[Any, Any], again: gymnasium.Env[Any, Any], seeds: list[int]
) -> Iterator[Finding]:
    """Check that the same seed gives the same task, also in another instance."""
    first = [env.reset(seed=seed)[0] for seed in seeds]
    second = [again.reset(seed=seed)[0] for seed in seeds]
    for seed, one, other in zip(seeds, first, second, strict=True):
        if one != other:
            yield Finding("seed", f"seed {seed} gives {one!r:.60} and then {other!r:.60}")
    if len(seeds) > 1 and len(set(map(str, first))) == 1:
        yield Finding("seed", "every seed gives the same task", is_note=True)


def _texts(env: gymnasium.Env[Any, Any]) -> Iterator[Finding]:
    """Check that observations and actions are texts, and that no step ends in two ways."""
    observation, _ = env.reset(seed=0)
    if not isinstance(observation, str) or not observation:
        yield Finding("text", f"reset returns {observation!r:.60} instead of a text")
        return
    for action in ("", "\u03c0 \U0001f600 \ud800", "```python\n", "\\boxed{", "<tool_call>"):
        env.reset(seed=0)
        if not env.action_space.contains(action):
            yield Finding("text", f"the action space does not contain {action!r}")
            continue
        try:
            observation, reward, terminated, truncated, info = env.step(action)
        except Exception as error:
            yield Finding("text", f"the action {action!r} raises {type(error).__name__}: {error}")
            continue
        if not isinstance(observation, str):
            yield Finding(
                "text", f"the action {action!r} returns {observation!r:.60} instead of a text"
            )
        if not _is_number(reward):
            yield Finding("reward", f"the action {action!r} earns {reward!r:.60}, no finite number")
        if terminated and truncated:
            yield Finding("end", f"the action {action!r} terminates and truncates at once")
        outcome = info.get("outcome", Outcome.OK)
        if outcome not in list(Outcome):
            yield Finding("outcome", f"{outcome!r} is not one of {', '.join(Outcome)}")


def _answers(env: gymnasium.Env[Any, Any], seeds: list[int]) -> Iterator[Finding]:
    """Check that gold answers are correct and earn 1, and that other turns do not."""
    for name, is_gold in (("gold_action", True), ("wrong_action", False)):
        make = getattr(env, name, None)
        if make is None:
            yield Finding(name, f"not checked: the environment has no {name}(task)", is_note=True)
            continue
        for seed in seeds:
            _, info = env.reset(seed=seed)
            try:
                _, reward, terminated, _, step = env.step(make(info["task"]))
            except Exception as error:
                yield Finding(name, f"seed {seed} raises {type(error).__name__}: {error}")
                continue
            earned = step.get("rewards", {}).get("answer", reward)
            if not _is_number(earned):
                yield Finding(name, f"seed {seed} earns {earned!r:.60}, which is no finite number")
                continue
            if not terminated:
                yield Finding(
                    name, f"seed {seed}: the episode does not terminate; {step.get('error')}"
                )
            elif is_gold and (earned != 1 or step.get("correct") is False):
                yield Finding(name, f"seed {seed}: the gold answer earns {earned:g}, not 1")
            elif not is_gold and (earned >= 1 or step.get("correct")):
                yield Finding(name, f"seed {seed}: a wrong answer earns {earned:g}")
    env.reset(seed=0)
    reward: Any = env.step(_NO_ANSWER)[1]
    if _is_number(reward) and reward >= 1:
        yield Finding("no_answer", f"{_NO_ANSWER!r} earns {reward:g}")


def _is_number(reward: Any) -> bool:
    """Whether a reward is a finite number, and no text that looks like one."""
    try:
        return not isinstance(reward, str) and math.isfinite(float(reward))
    except (TypeError, ValueError):
        return False
