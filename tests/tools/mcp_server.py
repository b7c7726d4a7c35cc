"""A server for the tests of `tir_alp.tools.mcp`, which misbehaves on request.

Run it as `python mcp_server.py` for stdio, or with a port for HTTP.
"""

import os
import subprocess
import sys
import time

import anyio
from mcp.server.mcpserver import Context, MCPServer
from mcp.types import ImageContent

server = MCPServer("naughty", log_level="ERROR")
calls = 0


@server.tool()
def count() -> str:
    """The number of calls of this tool so far."""
    global calls
    calls += 1
    return str(calls)


@server.tool()
async def sleep(seconds: float) -> str:
    """Answers after a while."""
    await anyio.sleep(seconds)
    return "slept"


@server.tool()
async def freeze() -> str:
    """Stops answering anybody, and leaves a process that it started."""
    subprocess.Popen(["sleep", "1000"], stdin=subprocess.DEVNULL)
    time.sleep(1000)  # blocks the event loop itself
    return ""


@server.tool()
def die() -> str:
    """Ends the server in the middle of the call, with a message for people."""
    print("out of luck", file=sys.stderr, flush=True)
    os._exit(3)


@server.tool()
def environment() -> str:
    """Names of the server's environment variables."""
    return " ".join(sorted(os.environ))


@server.tool()
def flood(characters: int) -> str:
    """A long answer."""
    return "<" + "x" * (characters - 2) + ">"


@server.tool()
def picture() -> list:
    """Text and an image."""
    return ["look:", ImageContent(type="image", data="AAAA", mime_type="image/png")]


@server.tool()
def header(name: str, context: Context) -> str:
    """The value of a header of the request."""
    request = context.request_context.request
    assert request is not None
    return request.headers.get(name, "")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        server.run("streamable-http", host="127.0.0.1", port=int(sys.argv[1]))
    else:
        server.run("stdio")
