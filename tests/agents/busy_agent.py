"""An agent that compacts its context, starts two sub-agents at once, and retries a call."""

import asyncio
from typing import Any

import openai

from tests.agents.templates import TOOL


async def solve(task, variables):
    async with openai.AsyncOpenAI(
        base_url=variables["OPENAI_BASE_URL"],
        api_key=variables["OPENAI_API_KEY"],
        max_retries=0,
    ) as client:
        tools: Any = [TOOL]

        async def ask(messages: Any, **how: Any) -> Any:
            made: Any = await client.chat.completions.create(
                model="policy", messages=messages, tools=tools, **how
            )
            return made.choices[0].message

        messages: list[Any] = [
            {"role": "system", "content": "plan"},
            {"role": "user", "content": "go"},
        ]
        for _ in range(2):
            reply = await ask(messages)
            messages.append(reply)
            for call in reply.tool_calls or ():
                output = {"role": "tool", "tool_call_id": call.id, "content": "out <|end|>"}
                messages.append(output)
            if not reply.tool_calls:
                messages.append({"role": "user", "content": "go on"})

        async def sub_agent(name):
            talk = [{"role": "user", "content": f"you are {name}"}]
            talk.append(await ask(talk))
            talk.append({"role": "user", "content": "and?"})
            return await ask(talk)

        await asyncio.gather(sub_agent("one"), sub_agent("two"))
        await ask(messages)  # a call whose result is lost, and the same call again
        messages.append(await ask(messages))
        compacted = [messages[0], {"role": "user", "content": "in short: all is well. go"}]
        answer = await ask(compacted, stop=["!"])
        return answer.content
