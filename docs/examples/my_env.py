"""An environment in one file: add two numbers and answer in \\boxed{}."""

import random

import gymnasium

from tir_alp.envs.grading import Grade
from tir_alp.envs.tool_env import ToolEnv


class Sums:
    """Tasks by index: each one is computed when it is needed."""

    def __len__(self):
        return 100_000

    def __getitem__(self, index):
        rng = random.Random(index)
        a, b = rng.randrange(100), rng.randrange(100)
        return {"task_id": f"sums/{index}", "question": f"What is {a}+{b}?", "answer": str(a + b)}


class MyEnv(ToolEnv):
    """One question, one answer, no tools."""

    instruction = "Write the answer in \\boxed{}."

    def __init__(self, **settings):
        super().__init__(tools=[], tasks=Sums(), **settings)

    def grade(self, task, answer):
        return Grade(correct=answer == task["answer"])


gymnasium.register(id="Mine-v0", entry_point="my_env:MyEnv")
