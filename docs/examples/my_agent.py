"""An agent in one file: OpenAI's client, a question and an answer."""

import openai


async def solve(task, variables):
    url, key = variables["OPENAI_BASE_URL"], variables["OPENAI_API_KEY"]
    async with openai.AsyncOpenAI(base_url=url, api_key=key) as client:
        messages = [{"role": "user", "content": task["question"]}]
        reply = await client.chat.completions.create(model="policy", messages=messages)
        return reply.choices[0].message.content
