"""MCP servers as tools: one from PyPI, one from npm if it is installed, and one that misbehaves."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.tools.mcp_http import http_server
from tests.tools.sandbox.processes import wait_until
from tir_alp.tools.outcome import Outcome

pytest.importorskip("mcp", reason="the extra `mcp` is not installed")

from tir_alp.tools.mcp import McpSession, McpTool, mcp_tools
from tir_alp.tools.mcp_connection import McpError, McpServer, ProcessGroup

NAUGHTY = (sys.executable, str(Path(__file__).with_name("mcp_server.py")))
BROKEN = (sys.executable, str(Path(__file__).with_name("mcp_broken_server.py")))
TIME = (sys.executable, "-m", "mcp_server_time", "--local-timezone", "UTC")
PATIENT = 120.0


MARK = {"MARK": uuid.uuid4().hex}
"""An environment variable by which the tests find their servers among all processes."""


def naughty(**settings: Any) -> McpServer:
    patient = {"start_timeout_s": PATIENT, "call_timeout_s": PATIENT}
    return McpServer.model_validate({"command": NAUGHTY, "env": MARK} | patient | settings)


def processes(server: McpServer) -> list[int]:
    """Living processes of a server, including those that it started."""
    mark = f"MARK={server.env['MARK']}\0".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            is_zombie = folder.joinpath("stat").read_text().rpartition(")")[2].split()[0] == "Z"
            if mark in folder.joinpath("environ").read_bytes() and not is_zombie:
                found.append(int(folder.name))
        except OSError:
            continue
    return found


class Tools:
    """The tools of a server in one episode, called by name."""

    def __init__(self, server: McpServer, stack: ExitStack, only=None):
        self.tools: Mapping[str, McpTool] = {tool.name: tool for tool in mcp_tools(server, only)}
        self.sessions: Mapping[str, McpSession] = {
            name: stack.enter_context(closing(tool.open_session()))
            for name, tool in self.tools.items()
        }

    def __call__(self, name: str, /, **arguments: Any) -> tuple[Outcome, str, str]:
        result = self.tools[name].run(arguments, self.sessions[name])
        return result.outcome, result.text, result.error


@pytest.fixture
def episode() -> Iterator[Callable[..., Tools]]:
    with ExitStack() as stack:
        yield lambda server, only=None: Tools(server, stack, only)
    wait_until(lambda: not processes(naughty()))
    assert not [thread for thread in threading.enumerate() if thread.name == "mcp"]


# ------------------------------------------------------------------------------- from registries


def test_a_server_from_pypi_answers_and_refuses(episode):
    tools = episode(naughty(command=TIME))
    assert sorted(tools.tools) == ["convert_time", "get_current_time"]
    outcome, text, _ = tools(
        "convert_time", source_timezone="UTC", time="12:00", target_timezone="Asia/Tokyo"
    )
    assert outcome is Outcome.OK
    assert json.loads(text)["target"]["datetime"].endswith("T21:00:00+09:00")
    outcome, text, error = tools("get_current_time", timezone="Mars/Olympus")
    assert outcome is Outcome.TOOL_ERROR and "Mars/Olympus" in text and error == text


def test_a_server_from_pypi_is_killed_in_the_middle_of_a_call(episode):
    server = McpServer(
        command=TIME,
        env={"MARK": uuid.uuid4().hex},
        start_timeout_s=PATIENT,
        call_timeout_s=PATIENT,
    )
    tools = episode(server)
    assert tools("get_current_time", timezone="UTC")[0] is Outcome.OK
    (pid,) = processes(server)
    os.kill(pid, signal.SIGSTOP)  # the call below cannot have its answer
    with ThreadPoolExecutor(1) as thread:
        call = thread.submit(tools, "get_current_time", timezone="UTC")
        with pytest.raises(TimeoutError):
            call.result(0.5)
        os.kill(pid, signal.SIGKILL)
        outcome, text, error = call.result(PATIENT)
    assert outcome is Outcome.INFRA_ERROR and text == "[the tool is not available]"
    assert "was lost in a call of 'get_current_time'" in error
    assert tools("get_current_time", timezone="UTC")[0] is Outcome.OK  # of a new process
    assert processes(server) not in ([], [pid])


@pytest.mark.skipif(not shutil.which("mcp-server-everything"), reason="npm's server is not there")
def test_a_server_from_npm_answers_and_times_out(episode):
    server = McpServer(command=("mcp-server-everything", "stdio"), call_timeout_s=3)
    tools = episode(server)
    assert tools("get-sum", a=2, b=3)[:2] == (Outcome.OK, "The sum of 2 and 3 is 5.")
    assert tools("get-sum", a=2)[0] is Outcome.TOOL_ERROR
    assert tools("get-resource-links", count=1)[0] is Outcome.OK
    assert tools("trigger-long-running-operation", duration=60)[0] is Outcome.TOOL_TIMEOUT


# --------------------------------------------------------------------------- how a call can end


def test_arguments_are_checked_by_the_schema_before_the_call(episode):
    server = naughty()
    tools = episode(server)
    outcome, text, _ = tools("sleep", seconds="long")
    assert (outcome, text) == (
        Outcome.TOOL_ERROR,
        "[bad arguments: seconds: 'long' is not of type 'number']",
    )
    assert tools("sleep")[1] == "[bad arguments: 'seconds' is a required property]"
    assert tools("sleep", seconds=float("nan"))[0] is Outcome.TOOL_ERROR
    assert tools("header", name="half a pair: \ud800")[0] is Outcome.TOOL_ERROR
    assert not processes(server)  # none of these had to start the server


def test_a_call_that_takes_too_long_is_stopped_with_all_that_the_server_started(episode):
    server = naughty(call_timeout_s=1.5)
    tools = episode(server)
    assert tools("count")[1] == "1"
    outcome, text, _ = tools("freeze")
    assert outcome is Outcome.TOOL_TIMEOUT
    assert text == (
        "[the tool did not answer within 1.5 s and was stopped; what it remembered is lost]"
    )
    wait_until(lambda: not processes(server))


def test_a_server_that_ends_is_named_with_its_last_words(episode):
    server = naughty()
    tools = episode(server)
    outcome, _, error = tools("die")
    assert outcome is Outcome.INFRA_ERROR and "out of luck" in error
    assert tools("count")[:2] == (Outcome.OK, "1")


def test_the_text_is_bounded_and_what_is_no_text_is_named(episode):
    tools = episode(naughty(max_output_chars=100))
    outcome, text, _ = tools("flood", characters=1_000_000)
    assert outcome is Outcome.OK and len(text) == 100
    assert text.startswith("<x") and text.endswith("x>")
    assert tools("picture")[1] == "look:\n[image image/png]"


@pytest.mark.parametrize("before", ["", "log: {\n", "{'a': 1}\n{}\n\n", '{"level": "info"}\n'])
@pytest.mark.parametrize("kind", ["", "half", "lines", "one per line", "raw line ends"])
def test_an_answer_in_another_form_is_read_at_once(episode, before, kind):
    say = episode(naughty(command=BROKEN))
    expected = "one\n\ufffd" if kind == "half" else "one\n<half>"
    assert say("say", before=before, kind=kind)[:2] == (Outcome.OK, expected)
    assert say("say", before="", kind="")[0] is Outcome.OK  # the server lives on


def test_an_answer_that_is_no_json_is_an_error_at_once(episode):
    say = episode(naughty(command=BROKEN))
    outcome, text, _ = say("say", before="", kind="garbage")
    assert outcome is Outcome.TOOL_ERROR
    assert text.startswith("[the server's answer is not JSON: Expecting ")
    assert say("say", before="", kind="")[0] is Outcome.OK


# ------------------------------------------------------------------------- what episodes share


def test_the_tools_of_an_environment_share_one_server_and_those_of_two_do_not(episode):
    server = naughty()
    one, other = episode(server), episode(server)
    assert [one("count")[1], one("count")[1], other("count")[1]] == ["1", "2", "1"]
    one("sleep", seconds=0)  # of another tool, and no third server
    assert len(processes(server)) == 2


def test_a_shared_server_serves_the_others_while_one_call_is_too_slow(episode):
    server = naughty(shared=True, call_timeout_s=2.0)
    one, other = episode(server), episode(server)
    assert [one("count")[1], other("count")[1]] == ["1", "2"]
    with ThreadPoolExecutor(1) as thread:
        slow = thread.submit(one, "sleep", seconds=600)
        assert other("count")[1] == "3"
        outcome, text, _ = slow.result(PATIENT)
    assert (outcome, text) == (
        Outcome.TOOL_TIMEOUT,
        "[the tool did not answer within 2 s and was stopped]",
    )
    assert one("count")[1] == "4"  # it was not started anew


def test_a_shared_server_that_hangs_is_no_fault_of_the_model_and_is_replaced(episode):
    server = naughty(shared=True, call_timeout_s=1.0)
    tools = episode(server)
    outcome, _, error = tools("freeze")
    assert outcome is Outcome.INFRA_ERROR and "hangs since a call of 'freeze'" in error
    assert tools("count")[:2] == (Outcome.OK, "1")


def test_a_server_gets_none_of_our_secrets(episode, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    _, text, _ = episode(naughty())("environment")
    assert "MARK" in text.split()
    allowed = {"HOME", "LOGNAME", "PATH", "SHELL", "TERM", "USER", "MARK", "PWD", "LC_CTYPE"}
    assert set(text.split()) <= allowed


def test_start_of_one_server_does_not_keep_the_others_waiting(episode):
    mark = {"MARK": uuid.uuid4().hex}
    slow = McpServer(command=("sleep", "1000"), env=mark, start_timeout_s=PATIENT)
    other = naughty(env=MARK | {"OTHER": uuid.uuid4().hex})  # which nobody has listed yet
    with ThreadPoolExecutor(1) as thread:
        starting = thread.submit(mcp_tools, slow)
        wait_until(lambda: processes(slow))
        tools = episode(other)
        assert tools("count")[:2] == (Outcome.OK, "1")
        assert not starting.done()
        for pid in processes(slow):
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(McpError, match="did not start"):
            starting.result(PATIENT)


# -------------------------------------------------------------------------------- process groups


def leader_of_a_group(program: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["sh", "-c", program], start_new_session=True, stdout=subprocess.PIPE)


def group_members(leader: int) -> list[int]:
    """Living processes of a process group."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            fields = folder.joinpath("stat").read_text().rpartition(")")[2].split()
            if fields[0] != "Z" and int(fields[2]) == leader:
                found.append(int(folder.name))
    return found


def test_processes_are_killed_after_the_leader_of_their_group_was_reaped():
    leader = leader_of_a_group("sleep 1000 >/dev/null & read _ < /dev/null; sleep 0.2")
    with closing(ProcessGroup(leader.pid)) as group:
        leader.communicate()
        assert len(group_members(leader.pid)) == 1
        group.kill()
        wait_until(lambda: not group_members(leader.pid))
        group.kill()  # nobody is left, and that is no error


@pytest.mark.skipif(os.geteuid() != 0, reason="chooses the number of a process")
def test_another_group_that_got_the_number_is_left_alone():
    for _ in range(50):  # another process may take the number first
        leader = leader_of_a_group("true")
        with closing(ProcessGroup(leader.pid)) as group:
            leader.communicate()
            Path("/proc/sys/kernel/ns_last_pid").write_text(str(leader.pid - 1))
            stranger = leader_of_a_group("exec sleep 1000")
            group.kill()
            time.sleep(0.1)
            is_alive = stranger.poll() is None
            stranger.kill()
            stranger.communicate()
            assert is_alive
            if stranger.pid == leader.pid:
                return
    pytest.skip("the number could not be had again")


# ----------------------------------------------------------------------------- what cannot start


def test_a_server_that_is_not_there_is_named():
    with pytest.raises(McpError, match=r"did not start.*not found"):
        mcp_tools({"command": ["no-such-mcp-server"]})


def test_a_server_that_says_nothing_is_given_up():
    server = McpServer(command=("sleep", "1000"), env=MARK, start_timeout_s=0.5)
    with pytest.raises(McpError, match=r"did not start: no answer within 0\.5 s"):
        mcp_tools(server)
    assert not processes(server)


def test_settings_that_cannot_be_meant_are_refused():
    with pytest.raises(ValueError, match="either a command"):
        McpServer()
    with pytest.raises(ValueError, match="headers is for an MCP server with a url"):
        McpServer(command=TIME, headers={"a": "b"})
    with pytest.raises(ValueError, match="has no tool 'tell_time'; it has: get_current_time, conv"):
        mcp_tools(naughty(command=TIME), only=["tell_time"])


# ------------------------------------------------------------------------------------------- HTTP


def naughty_at(port: int) -> list[str]:
    return [*NAUGHTY, str(port)]


def test_over_http_with_headers_until_the_server_is_killed_in_a_call(episode):
    with http_server(naughty_at) as (url, process):
        server = McpServer(url=url, headers={"X-Key": "k"}, call_timeout_s=PATIENT)
        tools = episode(server)
        assert tools("header", name="x-key")[:2] == (Outcome.OK, "k")
        with ThreadPoolExecutor(1) as thread:
            call = thread.submit(tools, "sleep", seconds=600)
            time.sleep(1)
            process.kill()
            assert call.result(PATIENT)[0] is Outcome.INFRA_ERROR
        assert tools("count")[0] is Outcome.INFRA_ERROR
    with http_server(naughty_at) as (url, _):
        assert episode(McpServer(url=url))("count")[:2] == (Outcome.OK, "1")
