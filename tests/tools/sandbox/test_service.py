"""The HTTP service and its client, over real sockets of this machine."""

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from tir_alp.tools.sandbox import Limits, Outcome, SandboxConfig, SandboxRefused, create_sandbox
from tir_alp.tools.sandbox.config import TOKEN_VARIABLE
from tir_alp.tools.sandbox.script import Script

aiohttp = pytest.importorskip("aiohttp")
from aiohttp import web  # noqa: E402
from aiohttp.test_utils import TestClient, TestServer  # noqa: E402

from tir_alp.tools.sandbox.service.server import Service, ServiceConfig  # noqa: E402

pytestmark = pytest.mark.sandbox

BARE = SandboxConfig(backend="namespaces", preload=(), memory_mb=512)


@contextlib.asynccontextmanager
async def client_of(
    sandbox_config: SandboxConfig = BARE, **settings: Any
) -> AsyncIterator[TestClient]:
    config = ServiceConfig(**{"token": None, **settings})
    async with (
        create_sandbox(sandbox_config) as sandbox,
        TestClient(TestServer(Service(sandbox, config).application())) as client,
    ):
        yield client


async def post(client: TestClient, path: str, **body: Any) -> Any:
    async with client.post(path, json=body) as response:
        is_json = response.content_type == "application/json"
        return response.status, await (response.json() if is_json else response.text())


def run(scenario: Callable[[], Awaitable[Any]]) -> Any:
    async def bounded():
        async with asyncio.timeout(60):
            return await scenario()

    return asyncio.run(bounded())


def test_sessions_keep_state_fork_and_close():
    async def scenario():
        async with client_of() as client:
            _, opened = await post(client, "/v1/sessions")
            path = f"/v1/sessions/{opened['session']}"
            await post(client, f"{path}/run", code="x = 1")
            _, branch = await post(client, f"{path}/fork")
            await post(client, f"{path}/run", code="x = 2")
            _, own = await post(client, f"{path}/run", code="x")
            _, copy = await post(client, f"/v1/sessions/{branch['session']}/run", code="x")
            assert (own["value"], copy["value"], own["outcome"]) == ("2", "1", "ok")
            async with client.delete(path) as response:
                assert response.status == 200
            assert (await post(client, f"{path}/run", code="x"))[0] == 404

    run(scenario)


def test_single_programs():
    async def scenario():
        async with client_of() as client:
            _, reply = await post(client, "/v1/run", code="print(input())", stdin="typed\n")
            assert (reply["stdout"], reply["exit_status"]) == ("typed\n", 0)
            limits = {"wall_s": 0.2}
            _, reply = await post(
                client, "/v1/run", code="print(1)\nwhile True: pass", limits=limits
            )
            assert (reply["outcome"], reply["stdout"]) == ("tool_timeout", "1\n")
            assert reply["exit_status"] == 124

    run(scenario)


NESTED = "def f(n):\n    return f(n - 1) if n else 1 / 0\n"


@pytest.mark.parametrize("call", ["f(5)", "f(50)", "f(5000)"])
def test_the_service_answers_while_and_after_a_nested_traceback(call: str):
    async def scenario():
        async with client_of() as client:
            running = asyncio.create_task(post(client, "/v1/run", code=NESTED + call))
            while not running.done():
                async with asyncio.timeout(2), client.get("/v1/health") as response:
                    assert response.status == 200
            _, reply = running.result()
            assert (reply["outcome"], reply["exit_status"]) == ("tool_error", 1)
            assert reply["duration_s"] < 5
            async with asyncio.timeout(2):
                _, reply = await post(client, "/run_code", code=NESTED + call, language="python")
            assert reply["run_result"]["return_code"] == 1

    run(scenario)


def test_the_service_answers_while_programs_run():
    programs = (
        "while True: pass",
        "import os\nwhile True: os.write(1, b'x' * 65536)",
        "import os\nwhile True: os.write(2, b'\\xff' * 65536)",
        "import threading\nwhile True: threading.Thread(target=print).start()",
        "x = 'x' * 10 ** 6\nwhile True: print(x, end='')",
    )
    limits = {"wall_s": 2, "output_bytes": 1 << 50, "output_chars": 1_000_000}

    async def scenario():
        async with client_of() as client:
            posts = (post(client, "/v1/run", code=code, limits=limits) for code in programs)
            running = asyncio.gather(*posts)
            while not running.done():
                async with asyncio.timeout(2), client.get("/v1/health") as response:
                    assert response.status == 200
                await asyncio.sleep(0.01)
            for _, reply in running.result():
                assert reply["outcome"] in ("tool_timeout", "resource_limit")
                assert reply["duration_s"] - reply["queue_s"] < 5

    run(scenario)


def test_a_request_with_parts_without_number_is_refused_at_once():
    many = {f"{number}/": "" for number in range(100_000)}
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/run_code", {"code": "", "language": "python", "files": many}),
        ("/run_jupyter", {"cells": [1] * 1_000_000}),
        ("/run_jupyter", {"cells": [""] * 1_000_000}),
    ]

    async def scenario():
        async with client_of() as client:
            for path, body in bodies:
                began = time.perf_counter()
                status, text = await post(client, path, **body)
                assert status == 400 and len(text) < 1000
                assert time.perf_counter() - began < 5

    run(scenario)


@pytest.mark.parametrize(
    ("code", "timeout_s", "status", "run_status", "return_code", "stdout"),
    [
        ("print(input())", 5, "Success", "Finished", 0, "typed\n"),
        ("import sys; print(2); sys.exit(3)", 5, "Failed", "Finished", 3, "2\n"),
        ("1 / 0", 5, "Failed", "Finished", 1, ""),
        ("print(1, flush=True)\nwhile True: pass", 0.3, "Failed", "TimeLimitExceeded", None, "1\n"),
    ],
)
def test_sandbox_fusion(
    code: str, timeout_s: float, status: str, run_status: str, return_code: int, stdout: str
):
    async def scenario():
        async with client_of() as client:
            _, reply = await post(
                client,
                "/run_code",
                code=code,
                language="python",
                stdin="typed",
                run_timeout=timeout_s,
                compile_timeout=1,
                memory_limit_MB=-1,
                files={},
                fetch_files=[],
            )
            assert reply["status"] == status
            assert reply["run_result"]["status"] == run_status
            assert reply["run_result"]["return_code"] == return_code
            assert reply["run_result"]["stdout"] == stdout
            assert reply["compile_result"] is None and reply["files"] == {}

    run(scenario)


def test_sandbox_fusion_notebook():
    async def scenario():
        async with client_of() as client:
            cells = ["x = 2", "print(x)", "x * 3", "1 / 0", "x"]
            _, reply = await post(client, "/run_jupyter", cells=cells)
            assert reply["status"] == "Success"
            assert [c["stdout"] for c in reply["cells"]] == ["", "2\n", "", "", ""]
            assert reply["cells"][2]["display"] == [{"text/plain": "6"}]
            assert reply["cells"][3]["error"][0]["ename"] == "ZeroDivisionError"
            _, reply = await post(
                client, "/run_jupyter", cells=["while True: pass", "1"], total_timeout=0.3
            )
            assert (reply["status"], len(reply["cells"])) == ("Failed", 1)

    run(scenario)


@pytest.mark.parametrize(
    ("code", "status"),
    [("print(1)", "success"), ("1 / 0", "runtime_error"), ("while True: pass", "timeout")],
)
def test_faas(code: str, status: str):
    async def scenario():
        async with client_of() as client:
            request = {"code": code, "stdin": "", "language": "python", "compile_timeout": 1.0}
            _, reply = await post(client, "/faas/sandbox/", run_timeout=0.5, **request)
            assert reply["status"] == reply["run_result"]["status"] == status
            assert reply["run_result"]["stdout"] == ("1\n" if status == "success" else "")

    run(scenario)


@pytest.mark.parametrize(
    ("path", "body", "settings", "status"),
    [
        ("/v1/run", {"code": "1"}, {"token": "secret"}, 401),
        ("/run_code", {"code": "1", "language": "python"}, {"token": "secret"}, 401),
        ("/v1/run", {"code": 1}, {}, 400),
        ("/v1/run", {"code": "1", "unknown": 1}, {}, 400),
        ("/v1/run", {"code": "1", "limits": {"wall_s": 1000}}, {}, 400),
        ("/run_code", {"code": "1", "language": "cpp"}, {}, 400),
        ("/v1/run", {"code": "#" * 2000}, {"max_body_bytes": 1000}, 413),
        ("/v1/sessions/no-such-session/run", {"code": "1"}, {}, 404),
        ("/v1/nothing", {}, {}, 404),
    ],
)
def test_bad_requests_are_turned_away(path: str, body: dict, settings: dict, status: int):
    async def scenario():
        async with client_of(**settings) as client:
            assert (await post(client, path, **body))[0] == status

    run(scenario)


def test_back_pressure_says_when_to_come_again():
    async def scenario():
        config = BARE.model_copy(update={"max_sessions": 6})
        async with client_of(config, max_waiting=1, max_wait_s=0.5) as client:
            for _ in range(6):
                assert (await post(client, "/v1/sessions"))[0] == 200
            waiting = asyncio.create_task(client.post("/v1/sessions", json={}))
            await asyncio.sleep(0.2)
            async with client.post("/v1/run", json={"code": "1"}) as response:
                assert (response.status, response.headers["Retry-After"]) == (429, "1")
            async with await waiting as response:
                assert (response.status, response.headers["Retry-After"]) == (503, "1")
            async with client.get("/metrics") as response:
                text = await response.text()
            assert 'sandbox_refused_requests_total{status="429"} 1.0' in text
            assert "sandbox_sessions 6.0" in text

    run(scenario)


def test_forgotten_session_is_closed():
    async def scenario():
        async with client_of(session_ttl_s=0.2) as client:
            _, opened = await post(client, "/v1/sessions")
            await asyncio.sleep(0.6)
            path = f"/v1/sessions/{opened['session']}/run"
            assert (await post(client, path, code="1"))[0] == 404

    run(scenario)


def test_session_that_cannot_be_closed_is_counted_and_the_next_is_closed():
    async def scenario():
        broken, whole = _FakeSession(is_broken=True), _FakeSession(is_broken=False)
        sandbox: Any = _FakeSandbox([broken, whole])
        service = Service(sandbox, ServiceConfig(token=None, session_ttl_s=0.2))
        async with TestClient(TestServer(service.application())) as client:
            for _ in range(2):
                assert (await post(client, "/v1/sessions"))[0] == 200
                await asyncio.sleep(0.4)  # the broken one is swept first, by itself
            async with client.get("/metrics") as response:
                text = await response.text()
        assert (broken.num_closes, whole.num_closes) == (1, 1)
        assert "sandbox_failed_closes_total 1.0" in text and "sandbox_sessions 0.0" in text

    run(scenario)


class _FakeSession:
    def __init__(self, is_broken: bool) -> None:
        self.num_closes = 0
        self._is_broken = is_broken

    async def close(self) -> None:
        self.num_closes += 1
        if self._is_broken:
            raise OSError("broken")


class _FakeSandbox:
    def __init__(self, sessions: list[_FakeSession]) -> None:
        self._sessions = iter(sessions)

    async def open_session(self) -> _FakeSession:
        return next(self._sessions)


@contextlib.asynccontextmanager
async def remote(*clients: TestClient, **changes: Any):
    urls = tuple(str(client.make_url("/")) for client in clients)
    config = SandboxConfig(backend="remote", hosts=urls, **changes)
    async with create_sandbox(config) as sandbox:
        yield sandbox


def test_remote_is_a_sandbox_like_any_other():
    async def scenario():
        async with client_of() as host, remote(host) as sandbox, sandbox.session() as python:
            assert sandbox.report.backend == "remote (namespaces)"
            await python.run("x = 6")
            async with await python.fork() as branch:
                await branch.run("x = 7")
            result = await python.run("print(x)\nx", Limits(wall_s=3))
            assert (result.stdout, result.value, result.outcome) == ("6\n", "6", Outcome.OK)
            result = await python.run("while True: pass", Limits(wall_s=0.2))
            assert result.outcome is Outcome.TOOL_TIMEOUT
            assert "restarted" in (await python.run("1")).note
            async with sandbox.session() as fresh:
                code = b"\xef\xbb\xbfprint(open(0, 'rb').read())\nraise SystemExit(3)"
                script = await fresh.run_script(Script(code=code, stdin=b"\xff\n"))
            assert (script.result.stdout, script.exit_status) == ("b'\\xff\\n'\n", 3)
            assert script.result.outcome is Outcome.TOOL_ERROR

    run(scenario)


def test_remote_spreads_sessions_and_survives_a_host():
    async def scenario():
        async with client_of() as one, client_of() as two, remote(one, two) as sandbox:
            sessions = [await sandbox.open_session() for _ in range(4)]
            for session in sessions[:3]:
                await session.run("x = 1")
            await two.close()
            results = [await session.run("'x' in globals()") for session in sessions]
            lost = [r.outcome for r in results].count(Outcome.INFRA_ERROR)
            assert lost in (1, 2)  # the sessions of the dead host that had variables
            again = [await session.run("2") for session in sessions]
            assert [r.value for r in again] == ["2"] * 4

    run(scenario)


def test_remote_waits_while_the_host_is_full():
    async def scenario():
        config = BARE.model_copy(update={"max_sessions": 6})
        async with (
            client_of(config, max_waiting=1, max_wait_s=0.1) as host,
            remote(host) as sandbox,
        ):
            sessions = [await sandbox.open_session() for _ in range(6)]
            late = asyncio.create_task(sandbox.open_session())
            await asyncio.sleep(0.4)
            assert not late.done()
            await sessions[0].close()
            assert (await (await late).run("1")).value == "1"

    run(scenario)


def test_remote_does_not_repeat_what_may_have_run():
    async def scenario():
        calls = []

        async def cut(request: web.Request):
            calls.append(await request.json())
            assert request.transport is not None
            request.transport.abort()
            return web.Response()

        async def opened(request: web.Request):
            return web.json_response({"session": "s", "backend": "fake", "warnings": []})

        app = web.Application()
        app.router.add_post("/v1/sessions/s/run", cut)
        app.router.add_post("/v1/sessions", opened)
        app.router.add_get("/v1/health", opened)
        async with TestClient(TestServer(app)) as host, remote(host) as sandbox:
            session = await sandbox.open_session()
            result = await session.run("print(1)")
            assert result.outcome is Outcome.INFRA_ERROR and len(calls) == 1

    run(scenario)


def test_cancelled_call_gives_its_session_back():
    async def scenario():
        async with client_of() as host, remote(host) as sandbox:
            session = await sandbox.open_session()
            call = asyncio.create_task(session.run("import time; time.sleep(30)"))
            await asyncio.sleep(0.3)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            for _ in range(50):
                async with host.get("/v1/health") as response:
                    if (await response.json())["sessions"] == 0:
                        return (await session.run("1")).value
                await asyncio.sleep(0.1)

    assert run(scenario) == "1"


def test_remote_refuses_without_a_host():
    async def scenario():
        async with create_sandbox(SandboxConfig(backend="remote", hosts=("http://127.0.0.1:9",))):
            pass

    with pytest.raises(SandboxRefused, match=r"127\.0\.0\.1:9"):
        run(scenario)


def test_command_serves_with_a_token_and_ends_on_sigterm(serving, monkeypatch):
    with serving(**{TOKEN_VARIABLE: "secret"}) as address:

        async def scenario():
            config = SandboxConfig(backend="remote", hosts=(address,))
            async with create_sandbox(config) as sandbox, sandbox.session() as python:
                return (await python.run("6 * 7")).value

        with pytest.raises(SandboxRefused, match="401"):
            run(scenario)
        monkeypatch.setenv(TOKEN_VARIABLE, "secret")
        assert run(scenario) == "42"


def test_command_says_that_an_address_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "tir_alp.sandbox", "serve", "--preload", "", "--no-token"]
        ended = subprocess.run(
            [*command, "--port", port], capture_output=True, text=True, timeout=60
        )
    assert ended.returncode == 69
    assert f"cannot listen on 127.0.0.1:{port}" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_clients_that_hang_up_leave_no_session_in_use(serving):
    with serving("--no-token", "--max-sessions", "6") as address:
        host, port = address.removeprefix("http://").split(":")
        body = json.dumps({"code": "while True: pass", "limits": {"wall_s": 110}}).encode()
        request = b"POST /v1/run HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b"
        for moment_s in (0, 0, 0, 0.005, 0.02, 0.1):  # while it opens a session, or runs
            with socket.create_connection((host, int(port))) as client:
                client.sendall(request % (len(body), body))
                time.sleep(moment_s)

        async def scenario():
            url = f"{address}/v1/run"
            async with (
                aiohttp.ClientSession() as client,
                client.post(url, json={"code": "print(6 * 7)"}) as response,
            ):
                return (await response.json())["stdout"]

        assert run(scenario) == "42\n"


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"{", 400, "Invalid JSON"),
        (b"\xff\xfe", 400, "Invalid JSON"),
        (b"[" * 100_000, 400, "recursion"),
        (b"[]", 400, "should be an object"),
        (b'{"language": "python"}', 400, "code: Field required"),
        (b'{"code": "1", "language": "cpp"}', 400, "language: Input should be 'python'"),
        (b'{"code": "1", "language": "python", "run_timeout": -1}', 400, "run_timeout"),
        (b'{"code": "1", "language": "python", "run_timeout": 1e9}', 400, "at most 120 s"),
        (b'{"code": "1", "language": "python", "files": {"../x": ""}}', 400, "working folder"),
        (b'{"code": "1", "language": "python", "fetch_files": ["/etc/x"]}', 400, "working folder"),
        (b'{"code": "1", "language": "python", "files": {"x": "a"}}', 400, "Base64"),
        (b" " * (5 << 20), 413, "exceeded"),
    ],
)
def test_a_bad_body_gets_a_status_and_a_reason(body: bytes, status: int, reason: str):
    async def scenario():
        async with client_of() as client:
            async with client.post("/run_code", data=body) as response:
                text = await response.text()
                assert response.status == status and reason.lower() in text.lower(), text
            assert (await post(client, "/v1/run", code="1"))[0] == 200

    run(scenario)
