"""Does an environment keep what the trainer relies on? Findings, as a linter gives them.

Each rule has a name. What an environment does not offer (`gold_action`, say) is not checked, and a
note says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import gymnasium
from gymnasium.utils.env_checker import check_env

from tir_alp.tools.outcome import Outcome

_SAID = "I do not know."


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong, or that could not be checked."""

    rule: str
    text: str
    is_note: bool = False
    """Whether it is no fault."""


def check(id: str, seeds: Iterable[int]) -> list[Finding]:
    """Examine an environment.

    Args:
        id: What `gymnasium.make` takes.
        seeds: Of the tasks that are played.

    Raises:
        ValueError: There is no such environment.
    """
    try:
        env = gymnasium.make(id, disable_env_checker=True).unwrapped
        again = gymnasium.make(id, disable_env_checker=True).unwrapped
    except (gymnasium.error.Error, ImportError, TypeError) as error:
        raise ValueError(f"cannot make the environment {id!r}: {error}") from error
    seeds = list(seeds)
    with closing(env), closing(again):
        return [*_gymnasium(env), *_seeds(env, again, seeds), *_texts(env), *_answers(env, seeds)]


def _gymnasium(env: gymnasium.Env[Any, Any]) -> Iterator[Finding]:
    """Gymnasium's own checker, whose warnings are findings too."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            check_env(env, skip_render_check=True)
        except Exception as error:  # it asserts, and the environment may raise anything
            yield Finding("gymnasium", f"{type(error).__name__}: {error}")
    for warning in caught:
        yield Finding("gymnasium", " ".join(str(warning.message).split()))


def _seeds(
    env: gymnasium.Env[Any, Any], again: gymnasium.Env[Any, Any], seeds: list[int]
) -> Iterator[Finding]:
    """The same seed gives the same task, in another instance too."""
    first = [env.reset(seed=seed)[0] for seed in seeds]
    second = [again.reset(seed=seed)[0] for seed in seeds]
    for seed, one, other in zip(seeds, first, second, strict=True):
        if one != other:
            yield Finding("seed", f"seed {seed} gives {one!r:.60} and then {other!r:.60}")
    if len(seeds) > 1 and len(set(map(str, first))) == 1:
        yield Finding("seed", "every seed gives the same task", is_note=True)


def _texts(env: gymnasium.Env[Any, Any]) -> Iterator[Finding]:
    """Observations are texts, any text is an action, and a step never both ends and is cut."""
    observation, _ = env.reset(seed=0)
    if not isinstance(observation, str) or not observation:
        yield Finding("text", f"reset gives {observation!r:.60} instead of a text")
        return
    for action in ("", "\u03c0 \U0001f600 \ud800", "```python\n", "\\boxed{", "<tool_call>"):
        env.reset(seed=0)
        if not env.action_space.contains(action):
            yield Finding("text", f"the action space does not have {action!r}")
            continue
        try:
            observation, _, terminated, truncated, info = env.step(action)
        except Exception as error:
            yield Finding("text", f"the action {action!r} raises {type(error).__name__}: {error}")
            continue
        if not isinstance(observation, str):
            yield Finding("text", f"the action {action!r} gives {observation!r:.60}, no text")
        if terminated and truncated:
            yield Finding("end", f"the action {action!r} terminates and truncates at once")
        outcome = info.get("outcome", Outcome.OK)
        if outcome not in list(Outcome):
            yield Finding("outcome", f"{outcome!r} is none of {', '.join(Outcome)}")


def _answers(env: gymnasium.Env[Any, Any], seeds: list[int]) -> Iterator[Finding]:
    """Gold answers earn 1 and are correct; wrong ones, and none, are not."""
    for name, is_gold in (("gold_action", True), ("wrong_action", False)):
        make = getattr(env, name, None)
        if make is None:
            yield Finding(name, f"not checked: the environment has no {name}(task)", is_note=True)
            continue
        for seed in seeds:
            _, info = env.reset(seed=seed)
            _, reward, terminated, _, step = env.step(make(info["task"]))
            earned = step.get("rewards", {}).get("answer", reward)
            if not terminated:
                yield Finding(name, f"seed {seed}: the episode goes on; {step.get('error')}")
            elif is_gold and (earned != 1 or step.get("correct") is False):
                yield Finding(name, f"seed {seed}: the gold answer earns {earned:g}, not 1")
            elif not is_gold and (earned >= 1 or step.get("correct")):
                yield Finding(name, f"seed {seed}: a wrong answer earns {earned:g}")
    env.reset(seed=0)
    reward = float(env.step(_SAID)[1])
    if reward >= 1:
        yield Finding("no_answer", f"{_SAID!r} earns {reward:g}")
