"""The sandboxed Python that agents are offered: an MCP server, and a function with an endpoint."""

import asyncio
import threading
from contextlib import asynccontextmanager
from typing import Any

import pytest

pytest.importorskip("openai")

import openai
from aiohttp import ClientSession

from tests.agents.served import gateway
from tests.agents.templates import Scripted
from tir_alp.agents.episode_python import MAX_WAITING
from tir_alp.agents.runner import python_of
from tir_alp.agents.session import Session, SessionSettings
from tir_alp.config import AgentsConfig
from tir_alp.tools.base import NoSession, ToolResult
from tir_alp.tools.mcp import McpError, mcp_tools
from tir_alp.tools.outcome import Outcome

CALL = '<tool_call>\n{"name": "python", "arguments": {"code": "%s"}}\n</tool_call>'


@asynccontextmanager
async def opened(*engines, **how):
    """Yield the gateway, and an endpoint for each engine."""
    async with gateway(**how) as (made, encodes):
        settings = SessionSettings()
        yield made, [made.open(Session(each.generate, encodes, settings)) for each in engines]


def server(endpoint, key=None):
    address = endpoint.environment()["TIR_ALP_MCP_URL"]
    return {"url": address, "headers": {"Authorization": f"Bearer {key or endpoint.key}"}}


def run(tool, session, code):
    return tool.run({"code": code}, session).text


@pytest.mark.sandbox
def test_every_connection_of_an_episode_has_its_variables_and_no_other_episode_has():
    def talk(one, other):
        found = []
        for endpoint in (one, one, other):
            (tool,) = mcp_tools(server(endpoint))
            session = tool.open_session()
            found.append(run(tool, session, "x = globals().get('x', 0) + 1; x"))
            assert "ValueError: no" in run(tool, session, "raise ValueError('no')")
            assert tool.run({"code": "1/0"}, session).outcome is Outcome.TOOL_ERROR
            session.close()
        assert tool.name == "python" and "sandboxed" in tool.description
        return found

    async def main():
        async with opened(Scripted("a"), Scripted("b")) as (_, endpoints):
            assert await asyncio.to_thread(talk, *endpoints) == ["1", "2", "1"]
            assert not any(each.session.failures for each in endpoints)

    asyncio.run(main())


def test_a_wrong_key_and_an_ended_episode_have_no_python():
    def refused(endpoint, key=None):
        with pytest.raises(McpError):
            mcp_tools(server(endpoint, key))

    async def main():
        async with opened(Scripted("a"), Scripted("b")) as (made, (one, other)):
            await asyncio.to_thread(refused, one, other.key)
            await made.end(one)
            await asyncio.to_thread(refused, one)
            async with ClientSession() as http:
                for url in (f"{other.openai_url}/tools", other.environment()["TIR_ALP_MCP_URL"]):
                    async with http.get(url, headers={"Authorization": "Bearer no"}) as reply:
                        assert reply.status == 401 and (await reply.json())["error"]["message"]

    asyncio.run(main())


@pytest.mark.sandbox
def test_a_function_of_openais_form_and_an_endpoint_that_runs_its_calls():
    engine = Scripted(CALL % "print(6*7)", "It is 42.")

    async def main():
        async with opened(engine) as (_, (endpoint,)):
            async with openai.AsyncOpenAI(
                base_url=endpoint.openai_url, api_key=endpoint.key
            ) as opened_client:
                client: Any = opened_client
                tools = (await client.get("/tools", cast_to=object))["data"]
                messages = [{"role": "user", "content": "6*7?"}]
                reply = await client.chat.completions.create(
                    model="m", messages=messages, tools=tools
                )
                message = reply.choices[0].message
                (call,) = message.tool_calls
                result = await client.post(
                    "/tools/python", cast_to=object, body=call.function.arguments
                )
                assert result == {"content": "42", "outcome": "ok"}
                output = {"role": "tool", "tool_call_id": call.id, "content": result["content"]}
                await client.chat.completions.create(
                    model="m", messages=[*messages, message, output], tools=tools
                )
                bad = [('{"code": 3}', "takes one argument"), ("[1]", "not a JSON object")]
                for arguments, reason in [*bad, ("{", "not JSON")]:
                    result = await client.post("/tools/python", cast_to=object, body=arguments)
                    assert result["outcome"] == "tool_error" and reason in result["content"]
                with pytest.raises(openai.NotFoundError, match="there is no tool 'bash'"):
                    await client.post("/tools/bash", cast_to=object, body={})
            assert not endpoint.session.failures
            (trace,) = endpoint.session.capture.traces
            assert len(trace.exchanges) == 2

    asyncio.run(main())


class Held:
    """A tool whose calls wait."""

    name, description, parameters = "python", "", {}

    def __init__(self):
        self.go = threading.Event()
        self.running = self.most = 0
        self.outcome = Outcome.OK

    def open_session(self):
        return NoSession()

    def run(self, arguments, session):
        self.running += 1
        self.most = max(self.most, self.running)
        self.go.wait(10)
        self.running -= 1
        return ToolResult(outcome=self.outcome, text="x", duration_s=0.0, error="broken")


def test_calls_of_an_episode_run_one_by_one_and_a_flood_is_refused():
    tool = Held()

    async def main():
        async with opened(Scripted("a"), python=tool) as (_, (endpoint,)), ClientSession() as http:
            headers = {"Authorization": f"Bearer {endpoint.key}"}

            async def call():
                url = f"{endpoint.openai_url}/tools/python"
                async with http.post(url, json={}, headers=headers) as reply:
                    return reply.status

            calls = [asyncio.create_task(call()) for _ in range(MAX_WAITING + 5)]
            done, _ = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED, timeout=10)
            assert {each.result() for each in done} == {429}
            tool.go.set()
            statuses = await asyncio.gather(*calls)
            assert statuses.count(200) == MAX_WAITING and statuses.count(429) == 5
            assert tool.most == 1

    asyncio.run(main())


def test_a_sandbox_that_fails_is_a_failure_of_the_episode_until_it_ends():
    async def main(ends):
        tool = Held()
        tool.outcome = Outcome.INFRA_ERROR
        async with opened(Scripted("a"), python=tool) as (made, (endpoint,)):
            call = asyncio.create_task(endpoint.python.run({}))
            await asyncio.sleep(0.1)
            ending = asyncio.create_task(made.end(endpoint)) if ends else None
            await asyncio.sleep(0.1)
            tool.go.set()
            assert (await call).outcome is Outcome.INFRA_ERROR
            if ending is not None:
                await ending
            return endpoint.session.failures

    assert asyncio.run(main(False)) == ["the sandbox failed: broken"]
    assert asyncio.run(main(True)) == []


def test_its_settings_are_those_of_the_run():
    tool = python_of(AgentsConfig(python={"max_output_chars": 7, "stateful": False}))
    assert "not kept" in tool.description
    for wrong in ({"seconds": 3}, {"limits": {"seconds": 3}}):
        with pytest.raises(ValueError, match=r"agents\.python"):
            python_of(AgentsConfig(python=wrong))
