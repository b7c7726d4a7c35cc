"""An environment with a tool of its own: look up prices, and answer with the sum."""

import random
from collections.abc import Mapping
from typing import Any

import gymnasium

from tir_alp.envs.grading import grade
from tir_alp.envs.tool_env import ToolEnv
from tir_alp.tools.base import NoSession, ToolResult
from tir_alp.tools.outcome import Outcome

PRICES = {"apple": 7, "pear": 9, "plum": 4, "fig": 12}


class PriceTool:
    name = "price"
    description = "Returns the price of a fruit."
    parameters: Mapping[str, Any] = {  # JSON schema of `arguments`
        "type": "object",
        "properties": {"fruit": {"type": "string"}},
        "required": ["fruit"],
    }

    def open_session(self):
        return NoSession()  # the state of one episode, with a close(); here there is none

    def run(self, arguments, session):
        price = PRICES.get(arguments["fruit"])
        if price is None:
            return ToolResult(outcome=Outcome.TOOL_ERROR, text="Error: no such fruit", duration_s=0)
        return ToolResult(outcome=Outcome.OK, text=str(price), duration_s=0)


class Purchases:
    def __len__(self):
        return 10_000

    def __getitem__(self, index):
        rng = random.Random(index)
        number, fruit = rng.randint(2, 99), rng.choice(list(PRICES))
        question = f"What do {number} times {fruit} cost?"
        return {"task_id": str(index), "question": question, "answer": str(number * PRICES[fruit])}


class ShopEnv(ToolEnv):
    instruction = "Look up the price, and write the answer in \\boxed{}."

    def __init__(self, **settings):
        super().__init__(tools=[PriceTool()], tasks=Purchases(), **settings)

    def grade(self, task, answer):
        return grade(answer, task["answer"])  # compares as mathematics


gymnasium.register(id="Shop-v0", entry_point="shop_env:ShopEnv")
