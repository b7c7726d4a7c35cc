"""Agents from PyPI, unchanged: each plays an episode that is one exact trace."""

import asyncio
import json

import pytest

pytest.importorskip("openai")

from tests.agents.served import serve
from tests.agents.templates import Scripted


def call(name: str, **arguments: str) -> str:
    written = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>\n{written}\n</tool_call>"


def played(engine, agent, **how):
    """Run a blocking agent in a thread against a session; return its answer and the capture."""

    async def main():
        async with serve(engine, max_context_tokens=1 << 17, **how) as endpoint:
            answer = await asyncio.to_thread(agent, endpoint)
            return answer, await endpoint.session.close()

    return asyncio.run(main())


def exact(engine, capture, num_completions):
    """Assert that an episode is one trace, each context of which begins with all tokens before."""
    assert [each.reason for each in capture.traces[1:]] == []
    (trace,) = capture.traces
    assert len(trace.exchanges) == num_completions
    tokens = trace.token_ids
    for (context, _), exchange in zip(engine.calls, trace.exchanges, strict=True):
        length = len(context) + len(exchange.completion.token_ids)
        assert context + exchange.completion.token_ids == tokens[:length]


def rewritten(capture):
    """Assert that the client changed a reply in its history, and that it was found."""
    first, second = capture.traces
    assert len(first.exchanges) == len(second.exchanges) == 1
    assert "message 2, a reply, was changed" in second.reason and second.parent is None


@pytest.mark.parametrize("api", ["ChatCompletions", "Responses"])
def test_openai_agents(api):
    agents = pytest.importorskip("agents", reason="openai-agents")
    openai = pytest.importorskip("openai")

    @agents.function_tool
    def add(a: str, b: str) -> str:
        """Add two numbers."""
        return str(int(a) + int(b))

    def agent(endpoint):
        agents.set_tracing_disabled(True)
        client = openai.AsyncOpenAI(base_url=endpoint.openai_url, api_key=endpoint.key)
        kind = getattr(agents, f"OpenAI{api}Model")
        model = kind(model="policy", openai_client=client)
        made = agents.Agent(name="adder", instructions="Add.", model=model, tools=[add])
        return agents.Runner.run_sync(made, "40 + 2?").final_output

    engine = Scripted("I add. " + call("add", a="40", b="2"), "It is 42.")
    answer, capture = played(engine, agent)
    assert answer == "It is 42."
    exact(engine, capture, 2)


def test_smolagents():
    smolagents = pytest.importorskip("smolagents")

    @smolagents.tool
    def add(a: str, b: str) -> str:
        """Add two numbers.

        Args:
            a: The first.
            b: The second.
        """
        return str(int(a) + int(b))

    def agent(endpoint):
        model = smolagents.OpenAIServerModel(
            model_id="policy", api_base=endpoint.openai_url, api_key=endpoint.key
        )
        made = smolagents.ToolCallingAgent(tools=[add], model=model, verbosity_level=0)
        return made.run("40 + 2?")

    engine = Scripted(call("add", a="40", b="2"), call("final_answer", answer="42"))
    answer, capture = played(engine, agent, max_turn_tokens=400)
    assert answer == "42"
    rewritten(capture)


def test_smolagents_that_write_code():
    smolagents = pytest.importorskip("smolagents")

    def agent(endpoint):
        model = smolagents.OpenAIServerModel(
            model_id="policy", api_base=endpoint.openai_url, api_key=endpoint.key
        )
        made = smolagents.CodeAgent(tools=[], model=model, verbosity_level=0)
        return made.run("40 + 2?")

    engine = Scripted(
        "Thought: I add.\n<code>\nprint(40 + 2)\n</code>",
        "Thought: done.\n<code>\nfinal_answer(42)\n</code>",
    )
    answer, capture = played(engine, agent, max_turn_tokens=400)
    assert answer == 42
    rewritten(capture)


def test_mini_swe_agent(tmp_path, monkeypatch):
    monkeypatch.setenv("MSWEA_GLOBAL_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("MSWEA_SILENT_STARTUP", "1")
    default = pytest.importorskip("minisweagent.agents.default")
    local = pytest.importorskip("minisweagent.environments.local")
    litellm = pytest.importorskip("minisweagent.models.litellm_model")

    def agent(endpoint):
        model = litellm.LitellmModel(
            model_name="openai/policy",
            model_kwargs={"api_base": endpoint.openai_url, "api_key": endpoint.key},
            cost_tracking="ignore_errors",
        )
        made = default.DefaultAgent(
            model,
            local.LocalEnvironment(cwd=str(tmp_path)),
            system_template="You run commands.",
            instance_template="{{task}}",
            step_limit=3,
            cost_limit=0,
        )
        return made.run("40 + 2?")

    done = "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT; echo 42"
    engine = Scripted(
        "I add. " + call("bash", command="echo $((40 + 2))"), "Done. " + call("bash", command=done)
    )
    _, capture = played(engine, agent, max_turn_tokens=400)
    exact(engine, capture, 2)
    assert "42" in engine.tokenizer.decode(list(engine.calls[1][0]))


def test_langgraph():
    prebuilt = pytest.importorskip("langgraph.prebuilt")
    langchain = pytest.importorskip("langchain_openai")

    def add(a: str, b: str) -> str:
        """Add two numbers."""
        return str(int(a) + int(b))

    def agent(endpoint):
        model = langchain.ChatOpenAI(
            model="policy", base_url=endpoint.openai_url, api_key=endpoint.key
        )
        made = prebuilt.create_react_agent(model, [add])
        return made.invoke({"messages": [("user", "40 + 2?")]})["messages"][-1].content

    engine = Scripted("I add. " + call("add", a="40", b="2"), "It is 42.")
    answer, capture = played(engine, agent)
    assert answer == "It is 42."
    exact(engine, capture, 2)


@pytest.mark.parametrize("api", ["openai", "anthropic"])
def test_pydantic_ai(api):
    pydantic_ai = pytest.importorskip("pydantic_ai")
    models = pytest.importorskip(f"pydantic_ai.models.{api}")
    providers = pytest.importorskip(f"pydantic_ai.providers.{api}")
    name = {"openai": "OpenAI", "anthropic": "Anthropic"}[api]
    model = getattr(models, "OpenAIChatModel" if api == "openai" else "AnthropicModel")
    provider_of = getattr(providers, f"{name}Provider")

    def add(a: str, b: str) -> str:
        """Add two numbers."""
        return str(int(a) + int(b))

    def agent(endpoint):
        url = endpoint.openai_url if api == "openai" else endpoint.url
        provider = provider_of(base_url=url, api_key=endpoint.key)
        made = pydantic_ai.Agent(model("policy", provider=provider), tools=[add])
        return made.run_sync("40 + 2?").output

    engine = Scripted("I add. " + call("add", a="40", b="2"), "It is 42.")
    answer, capture = played(engine, agent)
    assert answer == "It is 42."
    exact(engine, capture, 2)
