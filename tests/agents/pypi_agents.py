"""Agents from PyPI as a command: runs the one that the task names, unchanged.

It needs none of tir_alp, and is started by an interpreter that has the agents. Between an agent and
the gateway is a relay that writes down each reply as it came: `received.jsonl`.
"""

import asyncio
import http.client
import importlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

RECEIVED = "received.jsonl"
MODEL = "policy"
ARITHMETIC = re.compile(r"\s*print\(([0-9+*() -]{1,40})\)\s*")


def python(code: str) -> str:
    """Run Python code.

    Args:
        code: The code.
    """
    found = ARITHMETIC.fullmatch(code)
    if found is None or "**" in code:
        return "error"
    try:
        return str(eval(found[1], {"__builtins__": {}}))
    except (SyntaxError, TypeError):
        return "error"


class Relay(BaseHTTPRequestHandler):
    """Passes requests on to the gateway, and replies back."""

    gateway = urlsplit(os.environ.get("ANTHROPIC_BASE_URL", ""))
    received: Any = None
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        hidden = ("host", "connection", "accept-encoding")
        headers = {k: v for k, v in self.headers.items() if k.lower() not in hidden}
        connection = http.client.HTTPConnection(self.gateway.netloc, timeout=60)
        connection.request("POST", self.gateway.path + self.path, body, headers)
        reply = connection.getresponse()
        data = reply.read()
        connection.close()
        if reply.status == 200:
            self.received.write(json.dumps([self.path, data.decode()]) + "\n")
            self.received.flush()
        self.send_response(reply.status)
        self.send_header("Content-Type", reply.headers["Content-Type"])
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def openai_chat(question: str) -> str | None:
    import openai

    schema: Any = {
        "name": "python",
        "parameters": {"type": "object", "properties": {"code": {"type": "string"}}},
    }
    client = openai.OpenAI()
    messages: list[Any] = [{"role": "user", "content": question}]
    for _ in range(3):
        made: Any = client.chat.completions.create(
            model=MODEL, messages=messages, tools=[{"type": "function", "function": schema}]
        )
        message = made.choices[0].message
        messages.append(message)
        if not message.tool_calls:
            return message.content
        (call,) = message.tool_calls
        output = python(**json.loads(call.function.arguments))
        messages.append({"role": "tool", "tool_call_id": call.id, "content": output})
    return None


def openai_completions(question: str) -> str | None:
    import openai

    client, text = openai.OpenAI(), f"<|user|>\n{question}<|end|>\n<|assistant|>\n"
    for _ in range(2):
        reply = client.completions.create(model=MODEL, prompt=text, stop=["\n```"], max_tokens=48)
        text += reply.choices[0].text + "\n```<|end|>\n"
    return text


def openai_responses(question: str) -> str | None:
    import openai

    schema: Any = {"type": "object", "properties": {"code": {"type": "string"}}}
    tools: Any = [{"type": "function", "name": "python", "parameters": schema, "strict": False}]
    client = openai.OpenAI()
    items: list[Any] = [{"role": "user", "content": question}]
    for _ in range(3):
        reply: Any = client.responses.create(model=MODEL, input=items, tools=tools)
        calls = [each for each in reply.output if each.type == "function_call"]
        if not calls:
            return reply.output_text
        items += reply.output
        for each in calls:
            output = python(**json.loads(each.arguments))
            made = {"type": "function_call_output", "call_id": each.call_id, "output": output}
            items.append(made)
    return None


def streams(question: str) -> str | None:
    """Ask each API for a stream, in a conversation of its own; answer what the last one said."""
    import anthropic
    import openai

    client, said = openai.OpenAI(), ""
    schema: Any = {"type": "object", "properties": {"code": {"type": "string"}}}
    named: Any = {"name": "python", "parameters": schema}
    asked: Any = [{"role": "user", "content": question}]
    chat: Any = {"messages": asked, "tools": [{"type": "function", "function": named}]}
    for _ in client.chat.completions.create(model=MODEL, stream=True, **chat):
        pass
    asked = [{"role": "system", "content": "Be brief."}, *asked]
    items: Any = {"input": asked, "tools": [{"type": "function", "strict": False, **named}]}
    for _ in client.responses.create(model=MODEL, stream=True, **items):
        pass
    asked = [{"role": "user", "content": f"Once more: {question}"}]
    tools: Any = [{"name": "python", "input_schema": schema}]
    messages: Any = {"messages": asked, "tools": tools, "max_tokens": 64}
    with anthropic.Anthropic().messages.stream(model=MODEL, **messages) as stream:
        for text in stream.text_stream:
            said += text
    return said


def anthropic(question: str) -> str | None:
    import anthropic

    schema = {"type": "object", "properties": {"code": {"type": "string"}}}
    tools: Any = [{"name": "python", "input_schema": schema}]
    client = anthropic.Anthropic()
    messages: list[Any] = [{"role": "user", "content": question}]
    for _ in range(3):
        reply: Any = client.messages.create(
            model=MODEL, max_tokens=64, messages=messages, tools=tools
        )
        calls = [each for each in reply.content if each.type == "tool_use"]
        if not calls:
            return "".join(each.text for each in reply.content)
        results: Any = [
            {"type": "tool_result", "tool_use_id": each.id, "content": python(**each.input)}
            for each in calls
        ]
        messages.append({"role": "assistant", "content": reply.content})
        messages.append({"role": "user", "content": results})
    return None


def openai_agents(question: str) -> str | None:
    agents = importlib.import_module("agents")
    agents.set_tracing_disabled(True)
    made = agents.Agent(name="solver", model=MODEL, tools=[agents.function_tool(python)])
    try:
        return agents.Runner.run_sync(made, question, max_turns=3).final_output
    except agents.MaxTurnsExceeded:
        return None


def openai_agents_with_mcp(question: str) -> str | None:
    agents, mcp = importlib.import_module("agents"), importlib.import_module("agents.mcp")
    agents.set_tracing_disabled(True)
    headers = {"Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}"}
    place = {"url": os.environ["TIR_ALP_MCP_URL"], "headers": headers}

    async def solve() -> str | None:
        async with mcp.MCPServerStreamableHttp(place, client_session_timeout_seconds=60) as server:
            made = agents.Agent(name="solver", model=MODEL, mcp_servers=[server])
            return (await agents.Runner.run(made, question, max_turns=3)).final_output

    try:
        return asyncio.run(solve())
    except agents.MaxTurnsExceeded:
        return None


def smolagents(question: str) -> str | None:
    smolagents = importlib.import_module("smolagents")
    model = smolagents.OpenAIServerModel(
        model_id=MODEL, api_base=os.environ["OPENAI_BASE_URL"], api_key=os.environ["OPENAI_API_KEY"]
    )
    made = smolagents.CodeAgent(tools=[], model=model, max_steps=1, verbosity_level=0)
    # Its own prompt is ten times as long as what the tiny model was trained on.
    made.prompt_templates["system_prompt"] = "Write Python between <code> and </code>."
    return str(made.run(question))


def langgraph(question: str) -> str | None:
    prebuilt = importlib.import_module("langgraph.prebuilt")
    errors = importlib.import_module("langgraph.errors")
    model = importlib.import_module("langchain_openai").ChatOpenAI(model=MODEL)
    made = prebuilt.create_react_agent(model, [python])
    asked = {"messages": [("user", question)]}
    try:
        return made.invoke(asked, {"recursion_limit": 6})["messages"][-1].content
    except errors.GraphRecursionError:
        return None


def pydantic_ai(question: str) -> str | None:
    pydantic_ai = importlib.import_module("pydantic_ai")
    limits = pydantic_ai.UsageLimits(request_limit=3)
    made = pydantic_ai.Agent(f"openai-chat:{MODEL}", tools=[python])
    try:
        return made.run_sync(question, usage_limits=limits).output
    except (pydantic_ai.UsageLimitExceeded, pydantic_ai.UnexpectedModelBehavior):
        return None


def mini_swe_agent(question: str) -> str | None:
    default = importlib.import_module("minisweagent.agents.default")
    local = importlib.import_module("minisweagent.environments.local")
    litellm = importlib.import_module("minisweagent.models.litellm_model")
    model = litellm.LitellmModel(model_name=f"openai/{MODEL}", cost_tracking="ignore_errors")
    made = default.DefaultAgent(
        model,
        local.LocalEnvironment(cwd=os.getcwd()),
        system_template="You run commands.",
        instance_template="{{task}}",
        step_limit=2,
        cost_limit=0,
    )
    return str(made.run(question))


def verifiers_bash(question: str) -> str | None:
    """Run the program of verifiers' Bash harness, in the environment that has the library."""
    python = json.loads(os.environ["TIR_ALP_TASK"])["python"]
    launch = "verifiers.v1.harnesses.utils.launch"
    write = f"import {launch} as made; print(made.CHAT_PROGRAM_SOURCE)"
    program = subprocess.run([python, "-c", write], check=True, capture_output=True, text=True)
    Path("program.py").write_text(program.stdout)
    url, key = os.environ["OPENAI_BASE_URL"], os.environ["OPENAI_API_KEY"]
    words = [f"--base-url={url}", f"--api-key={key}", f"--model={MODEL}", "--bash"]
    subprocess.run([python, "program.py", *words, f"--prompt={question}"], check=True, timeout=120)
    return None


def verifiers_harness(question: str) -> str | None:
    """Run an agent of verifiers with its Bash harness, whole, where the library is installed."""
    python = json.loads(os.environ["TIR_ALP_TASK"])["python"]
    installed = Path(sys.executable).parent  # has uv, which the harness runs
    environment = os.environ | {
        "PATH": f"{installed}{os.pathsep}{os.environ['PATH']}",
        "UV_CACHE_DIR": str(installed.parent / "uv_cache"),
        "UV_PYTHON_DOWNLOADS": "never",
    }
    script = Path(__file__).with_name("verifiers_agent.py")
    command = [python, str(script), question]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, timeout=360, env=environment
    )
    return done.stdout.strip()


VERIFIERS = ("verifiers_bash", "verifiers_harness")
"""Agents that need the library verifiers, which has an environment of its own."""

AGENTS: dict[str, Callable[[str], str | None]] = {
    each.__name__: each
    for each in (
        openai_chat,
        openai_completions,
        openai_responses,
        streams,
        anthropic,
        openai_agents,
        openai_agents_with_mcp,
        smolagents,
        langgraph,
        pydantic_ai,
        mini_swe_agent,
        verifiers_bash,
        verifiers_harness,
    )
}


def main() -> None:
    task = json.loads(os.environ["TIR_ALP_TASK"])
    with Path(RECEIVED).open("w") as Relay.received:
        server = ThreadingHTTPServer(("127.0.0.1", 0), Relay)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        os.environ |= {"ANTHROPIC_BASE_URL": url}
        os.environ |= {"OPENAI_BASE_URL": f"{url}/v1", "OPENAI_API_BASE": f"{url}/v1"}
        os.environ |= {"MSWEA_GLOBAL_CONFIG_DIR": os.getcwd(), "MSWEA_SILENT_STARTUP": "1"}
        answer = AGENTS[task["client"]](task["question"])
        server.shutdown()
    Path("answer.txt").write_text(answer or "")


if __name__ == "__main__":
    main()
