"""An environment in which a user asks back three times; `ThinkTalk-v0`."""

import gymnasium

from tir_alp.envs.spaces import TextSpace

MESSAGES = ("Why?", "Sure?", "And now?")


class ThinkTalk(gymnasium.Env[str, str]):
    """Four turns; the reward is 1 if the last one ends with "42"."""

    action_space = observation_space = TextSpace()
    call_format = "none"

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._number = 0
        return "6*7?", {}

    def step(self, action):
        self._number += 1
        if self._number <= len(MESSAGES):
            return MESSAGES[self._number - 1], 0.0, False, False, {"role": "user", "tool_calls": 0}
        is_right = action.endswith("42")
        return "", float(is_right), True, False, {"correct": is_right, "tool_calls": 0}


class Summarised(ThinkTalk):
    """Puts a summary in the place of the conversation; rewards texts of even length."""

    def step(self, action):
        self._number += 1
        if self._number <= len(MESSAGES):
            summary = [{"role": "user", "content": f"6*7? {len(action)}"}]
            return "", 0.0, False, False, {"messages": summary, "tool_calls": 0}
        is_even = len(action) % 2 == 0
        return "", float(is_even), True, False, {"correct": is_even, "tool_calls": 0}


gymnasium.register(id="ThinkTalk-v0", entry_point="tests.rollouts.forked_env:ThinkTalk")
gymnasium.register(id="Summarised-v0", entry_point="tests.rollouts.forked_env:Summarised")
