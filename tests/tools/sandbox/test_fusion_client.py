"""SandboxFusion's client from PyPI, unchanged, against our service: its documented Python calls.

The data sets of its manual (`get_prompts`, `submit`, ...) are a service that we do not offer.
"""

import asyncio
import base64
import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("aiohttp")
fusion: Any = pytest.importorskip("sandbox_fusion")  # its models use pydantic 1: untyped here

RunCodeRequest, RunJupyterRequest = fusion.RunCodeRequest, fusion.RunJupyterRequest
RunStatus, CommandRunStatus = fusion.RunStatus, fusion.CommandRunStatus

pytestmark = pytest.mark.sandbox

SUMMARY = fusion.SummaryMapping(
    Success="right", Failed="wrong", RunFailed="raised", RunTimeout="slow"
)


@pytest.fixture(scope="module", params=["namespaces", "landlock"])
def endpoint(request, serving):
    with serving("--no-token", "--backend", request.param) as address:
        fusion.set_sandbox_endpoint(address)
        yield address


def run(code, **settings):
    return fusion.run_code(RunCodeRequest(code=code, language="python", **settings), max_attempts=1)


def encoded(text):
    return base64.b64encode(text.encode()).decode()


def decoded(files):
    return {path: base64.b64decode(content).decode() for path, content in files.items()}


@pytest.mark.parametrize(
    ("code", "settings", "status", "summary", "stdout"),
    [
        ("print(123)", {}, RunStatus.Success, "right", "123\n"),
        ("print(input())", {"stdin": "typed\nmore"}, RunStatus.Success, "right", "typed\n"),
        ("print(1)\n1 / 0", {}, RunStatus.Failed, "raised", "1\n"),
        ("this is no Python", {}, RunStatus.Failed, "raised", ""),
        (
            "print(1, flush=True)\nwhile True: pass",
            {"run_timeout": 0.5},
            RunStatus.Failed,
            "slow",
            "1\n",
        ),
    ],
)
def test_run_code_and_its_summary(endpoint, code, settings, status, summary, stdout):
    response = run(code, **settings)
    assert response.status == status
    assert fusion.summary_run_code_result(response, SUMMARY) == summary
    assert response.run_result.stdout == stdout
    assert response.run_result.execution_time > 0
    assert response.compile_result is None


def test_a_program_that_fails_says_why(endpoint):
    result = run("import sys\nprint('to stderr', file=sys.stderr)\nsys.exit(3)").run_result
    assert (result.return_code, result.stderr) == (3, "to stderr\n")
    assert run("[][1]").run_result.stderr.endswith("IndexError: list index out of range\n")


def test_programs_do_not_see_each_other(endpoint):
    run("x = 1\nopen('left', 'w').close()")
    response = run("import os\nprint('x' in globals(), os.path.exists('left'))")
    assert response.run_result.stdout == "False False\n"


def test_files_come_and_go(endpoint):
    files = {"in/flag.txt": encoded("secret"), "helper.py": encoded("x = 5"), "unused": None}
    code = """
import helper, os
print(open("in/flag.txt").read(), helper.x, os.path.exists("unused"))
os.makedirs("out")
open("out/kept.txt", "w").write("kept")
buffered = open("buffered.txt", "w")
buffered.write("flushed when it ends")
os.chdir("out")
"""
    response = run(code, files=files, fetch_files=["out/kept.txt", "buffered.txt", "missing"])
    assert response.run_result.stdout == "secret 5 False\n"
    assert decoded(response.files) == {
        "out/kept.txt": "kept",
        "buffered.txt": "flushed when it ends",
    }


def test_large_files_survive_the_way(endpoint):
    text = "0123456789" * 200_000
    code = "open('copy', 'w').write(open('original').read()[::-1])"
    response = run(code, files={"original": encoded(text)}, fetch_files=["copy"])
    assert decoded(response.files) == {"copy": text[::-1]}


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("import os\nos.symlink('/etc/passwd', 'x')", ""),
        ("import os\nos.symlink('/proc/self/environ', 'x')", ""),
        ("import os\nos.mkdir('x')", ""),
        ("with open('x', 'wb') as file: file.truncate(1 << 24)", "more than the 4194304 bytes"),
        ("open('x', 'w').close()\nimport base64\nbase64.b64encode = lambda data: b'!'", "broken"),
        ("open('x', 'w').close()\nimport os\nos._exit(0)", "gone with the interpreter"),
    ],
)
def test_what_may_not_be_fetched_is_not(endpoint, code, problem):
    response = run(code, fetch_files=["x"])
    assert response.files == {}
    if problem:  # links that lead out lead nowhere, or to what the program may read itself
        assert response.message.startswith("not fetched: 'x'") and problem in response.message


@pytest.mark.parametrize("path", ["../escape", "/etc/escape", "/tmp/../etc/escape", "a/../../b"])
def test_paths_that_lead_out_are_refused(endpoint, path):
    with pytest.raises(Exception, match=r"code 400: .*working folder"):
        run("1", files={path: encoded("x")})
    with pytest.raises(Exception, match=r"code 400: .*working folder"):
        run("1", fetch_files=[path])


def test_files_that_do_not_fit_are_an_error(endpoint):
    with pytest.raises(Exception, match="the files cannot be written: "):
        run("1", files={"x" * 300: encoded("")})


def test_run_jupyter(endpoint):
    cells = [
        "a = 123\na",
        "import sys\nprint(a)\nx = sys.stderr.write('e')",
        "raise Exception('no')",
    ]
    response = fusion.run_jupyter(
        RunJupyterRequest(
            cells=[*cells, "open('out', 'w').write(open('in').read())"],
            files={"in": encoded("through")},
            fetch_files=["out"],
        ),
        max_attempts=1,
    )
    assert response.status == RunStatus.Success
    assert response.driver.status == CommandRunStatus.Finished
    assert [cell.display for cell in response.cells[:2]] == [[{"text/plain": "123"}], []]
    assert (response.cells[1].stdout, response.cells[1].stderr) == ("123\n", "e")
    (error,) = response.cells[2].error
    assert (error["ename"], error["evalue"]) == ("Exception", "no")
    assert decoded(response.files) == {"out": "through"}


@pytest.mark.parametrize("timeout", ["cell_timeout", "total_timeout"])
def test_run_jupyter_ends_with_a_cell_that_takes_too_long(endpoint, timeout):
    request = RunJupyterRequest(cells=["1", "while True: pass", "2"], **{timeout: 0.5})
    response = fusion.run_jupyter(request, max_attempts=1)
    assert response.status == RunStatus.Failed
    assert response.driver.status == CommandRunStatus.TimeLimitExceeded
    assert len(response.cells) == 2


def test_run_concurrent(endpoint):
    requests = [[RunCodeRequest(code=f"print({i})", language="python")] for i in range(123, 183)]
    responses = fusion.run_concurrent(fusion.run_code, args=requests)
    assert [r.run_result.stdout for r in responses] == [f"{i}\n" for i in range(123, 183)]


def test_asynchronous_variants(endpoint):
    async def both():
        code = fusion.run_code_async(RunCodeRequest(code="print(1)", language="python"))
        notebook = fusion.run_jupyter_async(RunJupyterRequest(cells=["x = 2", "x"]))
        return await asyncio.gather(code, notebook)

    code, notebook = asyncio.run(both())
    assert code.run_result.stdout == "1\n"
    assert notebook.cells[1].display == [{"text/plain": "2"}]


def test_a_client_that_does_not_wait(endpoint):
    request = RunCodeRequest(code="import time; time.sleep(60)", language="python", run_timeout=90)
    with pytest.raises(Exception, match="timed out"):
        fusion.run_code(request, max_attempts=1, client_timeout=0.5)
    assert run("print(1)").status == RunStatus.Success


def test_other_languages_are_refused_by_name(endpoint):
    with pytest.raises(Exception, match="code 400: language: Input should be 'python'"):
        fusion.run_code(RunCodeRequest(code="1", language="cpp"), max_attempts=1)


def test_endpoint_from_the_environment_and_from_the_call(endpoint):
    program = """
from sandbox_fusion import *
print(run_code(RunCodeRequest(code='print(7)', language='python')).run_result.stdout)
"""
    printed = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"SANDBOX_FUSION_ENDPOINT": endpoint},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert printed.stdout.strip() == "7", printed.stderr
    fusion.set_endpoint("http://127.0.0.1:9")
    try:
        request = RunCodeRequest(code="print(8)", language="python")
        response = fusion.run_code(request, endpoint=endpoint + "/", max_attempts=1)
    finally:
        fusion.set_endpoint(endpoint)
    assert response.run_result.stdout == "8\n"
