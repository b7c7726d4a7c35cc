"""The agent of the tests: the loop that OpenAI's documentation shows, with one tool."""

import json
import re
from typing import Any

import openai

from tir_alp.tools.calculator import CalculatorTool

PYTHON: Any = {
    "type": "function",
    "function": {
        "name": "python",
        "parameters": {
            "type": "object",
            "properties": {"code": {"type": "string"}},
            "required": ["code"],
        },
    },
}


def run(code: str) -> str:
    """Print the value of an expression, which is all that the tiny model's programs do."""
    found = re.fullmatch(r"\s*print\((.*)\)\s*", code)
    if found is None:
        return "error"
    tool = CalculatorTool()
    return tool.run({"expression": found[1]}, tool.open_session()).text


async def solve(task, variables):
    """Answer a question; the client finds the model by its usual variables."""
    async with openai.AsyncOpenAI(
        base_url=variables["OPENAI_BASE_URL"], api_key=variables["OPENAI_API_KEY"]
    ) as client:
        messages: list[Any] = [{"role": "user", "content": task["question"]}]
        for _ in range(3):
            reply = await client.chat.completions.create(
                model="policy", messages=messages, tools=[PYTHON]
            )
            message: Any = reply.choices[0].message
            messages.append(message)
            if not message.tool_calls:
                return message.content
            for call in message.tool_calls:
                output = run(json.loads(call.function.arguments)["code"])
                messages.append({"role": "tool", "tool_call_id": call.id, "content": output})
    return None


async def solve_twice(task, variables):
    """Answer twice in conversations of their own, and return the second answer."""
    await solve(task, variables)
    return await solve(task, variables)
