"""A command as an agent: Anthropic's client, whose calls of a tool it answers itself."""

import json
import os
from pathlib import Path
from typing import Any

import anthropic

from tests.agents.openai_loop import PYTHON, run

FUNCTION = PYTHON["function"]
TOOL: Any = {"name": "python", "input_schema": FUNCTION["parameters"]}

task = json.loads(os.environ["TIR_ALP_TASK"])
assert task == json.loads(Path("task.json").read_text())
assert "answer" not in task
messages: list[Any] = [{"role": "user", "content": task["question"]}]
client = anthropic.Anthropic()
for _ in range(3):
    reply: Any = client.messages.create(model="m", max_tokens=64, messages=messages, tools=[TOOL])
    calls = [each for each in reply.content if each.type == "tool_use"]
    if not calls:
        Path("answer.txt").write_text("".join(each.text for each in reply.content))
        break
    results = [
        {"type": "tool_result", "tool_use_id": each.id, "content": run(each.input["code"])}
        for each in calls
    ]
    messages.append({"role": "assistant", "content": reply.content})
    messages.append({"role": "user", "content": results})
