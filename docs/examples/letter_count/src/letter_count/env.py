"""How often does a letter occur in a word? Change the tasks, the instruction and the grading."""

import random

from tir_alp.envs.grading import Grade
from tir_alp.envs.tool_env import ToolEnv
from tir_alp.tools.python_tool import PythonTool


class Tasks:
    def __len__(self):
        return 100_000

    def __getitem__(self, index):
        rng = random.Random(index)
        word = "".join(rng.choices("aeinrst", k=8))
        letter = rng.choice(word)
        question = f"How often does {letter} occur in {word}?"
        return {"task_id": str(index), "question": question, "answer": str(word.count(letter))}


class LetterCountEnv(ToolEnv):
    instruction = "You may run code in a ```python block. Write the answer in \\boxed{}."

    def __init__(self, *, sandbox=None, **settings):
        super().__init__(tools=[PythonTool(sandbox)], tasks=Tasks(), **settings)

    def grade(self, task, answer):
        return Grade(correct=answer == task["answer"])
