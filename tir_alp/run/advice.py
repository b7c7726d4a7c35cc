"""Notices that a run learns nothing, and says in words why and what to change.

Each sentence names the share of the step that it is about. The same advice is repeated only after
`_EVERY` steps, so that a run that is short of signal for a while does not fill the terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from tir_alp.types import TrajectoryGroup

_EVERY = 20  # steps
_MANY_VOID = 0.5  # share of turns
_NO_CALLS = 5  # steps in a row without a tool call
_EXAMPLE_CHARS = 200
_IDLE = ("no tokens", "no signal")


@dataclass(slots=True)
class Advice:
    """Watches the steps of a run."""

    decode: Callable[[Sequence[int]], str]
    """Turns the tokens of a completion into text, for an example."""
    has_tools: bool = True
    """Whether the environment has tools."""
    num_steps: int = 0
    """Steps seen."""
    num_idle: int = 0
    """Those of them that taught nothing."""
    _last: dict[str, int] = field(default_factory=dict)
    _without_calls: int = 0

    def of_step(
        self, step: int, groups: Sequence[TrajectoryGroup], metrics: Mapping[str, float]
    ) -> list[str]:
        """Return what is worth saying about a step.

        Args:
            step: Number of the step.
            groups: The groups that it trained on.
            metrics: Its metrics.
        """
        calls = metrics.get("rollout/tool_calls", 1.0)
        self._without_calls = self._without_calls + 1 if calls == 0 else 0
        notices = [*self._notice(groups, metrics)]
        self.num_steps += 1
        self.num_idle += any(kind in _IDLE for kind, _ in notices)
        found = []
        for kind, sentence in notices:
            if step - self._last.get(kind, -_EVERY) >= _EVERY:
                self._last[kind] = step
                found.append(sentence)
        return found

    def at_end(self) -> str:
        """Return what is worth saying about all steps; empty if they mostly taught something."""
        if self.num_idle <= self.num_steps / 2:
            return ""
        return (
            f"warning: {self.num_idle} of {self.num_steps} steps taught nothing, so the model is "
            "much as it was before; the lines above say why"
        )

    def _notice(
        self, groups: Sequence[TrajectoryGroup], metrics: Mapping[str, float]
    ) -> Iterator[tuple[str, str]]:
        void, example = metrics.get("rollout/void_turns", 0.0), self._example(groups)
        no_signal = sum(len(set(group.rewards)) == 1 for group in groups)
        if void > _MANY_VOID:
            sentence = (
                f"{void:.0%} of the turns hold neither a complete call nor an answer{example}. "
                "Show the model the format (env.kwargs.instruction), raise "
                "rollout.max_turn_tokens if turns are cut, or begin with a model that knows it"
            )
            yield "void", sentence
        if metrics.get("tokens/loss") == 0:
            sentence = (
                "no token entered the loss, so nothing was learnt in this step: every trajectory "
                "has a turn that takes it out (rollout.void_turns: with neither a call nor an "
                "answer; rollout.overlong: cut at a limit)"
            )
            yield "no tokens", sentence
        elif groups and no_signal == len(groups):
            rewards = {reward for group in groups for reward in group.rewards}
            what = f"all {rewards.pop():g}" if len(rewards) == 1 else "equal within each group"
            sentence = (
                "no group of this step had a signal, so nothing was learnt: the rewards are "
                f"{what}{example}. Check that the answer's format is what the grader reads; take "
                "easier tasks, or a model that solves some of them"
            )
            yield "no signal", sentence
        if self.has_tools and self._without_calls >= _NO_CALLS:
            sentence = (
                f"no tool was called in the last {self._without_calls} steps{example}. Show the "
                "model how a call is written (env.kwargs.instruction)"
            )
            yield "no calls", sentence

    def _example(self, groups: Sequence[TrajectoryGroup]) -> str:
        """Return the beginning of one turn as text."""
        for group in groups:
            for trajectory in group.trajectories:
                text = self.decode(trajectory.conversation_turns[0].completion.token_ids)
                shown = text[:_EXAMPLE_CHARS].replace("\n", "\\n")
                cut = " ..." if len(text) > _EXAMPLE_CHARS else ""
                return f'; one turn, for example: "{shown}"{cut}'
        return ""
