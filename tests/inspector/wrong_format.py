"""An environment that reads answers in another form than the model writes."""

import re

import gymnasium

from tir_alp.envs.math_env import PythonMathEnv


class WrongFormatEnv(PythonMathEnv):
    def answer_in(self, action: str) -> str | None:
        found = re.search(r"<answer>(.*?)</answer>", action)
        return None if found is None else found[1]

    def gold_action(self, task) -> str:
        return f"<answer>{task['answer']}</answer>"

    def wrong_action(self, task) -> str:
        return "<answer>-1000001</answer>"


gymnasium.register(id="WrongFormat-v0", entry_point=WrongFormatEnv)
