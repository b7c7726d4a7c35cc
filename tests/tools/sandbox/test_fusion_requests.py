"""Requests of the kinds that SandboxFusion's own clients make, as JSON, and our replies to them.

`docs/sandbox_service.md` has a table of what differs.
"""

import base64
import json
import time
import urllib.error
import urllib.request
from typing import Any

import pytest

pytest.importorskip("aiohttp")
pytestmark = pytest.mark.sandbox


@pytest.fixture(scope="module", params=["namespaces", "landlock"])
def address(request, serving):
    with serving("--no-token", "--backend", request.param) as at:
        yield at


def post(address, path, body) -> tuple[int, Any]:
    data = json.dumps(body).encode()
    request = urllib.request.Request(f"{address}{path}", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=100) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def run_code(address, code, **fields):
    status, reply = post(address, "/run_code", {"code": code, "language": "python", **fields})
    assert status == 200, reply
    return reply


def notebook(address, *cells, **fields):
    status, reply = post(address, "/run_jupyter", {"cells": cells, **fields})
    assert status == 200, reply
    return reply


def encoded(data):
    return base64.b64encode(data).decode()


# -------------------------------------------------------------------------------- run_code


def test_the_reply_has_every_field_of_the_schema(address):
    reply = run_code(address, "print('Hello, world!')")
    assert reply.keys() == {
        *("status", "message", "compile_result", "run_result", "executor_pod_name", "files")
    }
    assert reply["run_result"].keys() >= {
        *("status", "execution_time", "return_code", "stdout", "stderr")
    }
    assert (reply["status"], reply["run_result"]["status"]) == ("Success", "Finished")
    assert reply["run_result"]["stdout"] == "Hello, world!\n"


@pytest.mark.parametrize(
    ("code", "return_code", "stderr"),
    [
        ("assert 1 == 2", 1, "AssertionError"),
        ("print(1", 1, "SyntaxError"),
        ("raise ValueError('x')", 1, "ValueError: x"),
        ("import sys; sys.exit(7)", 7, ""),
        ("import os; os._exit(3)", 3, ""),
    ],
)
def test_a_program_that_fails(address, code, return_code, stderr):
    reply = run_code(address, code)
    assert (reply["status"], reply["run_result"]["status"]) == ("Failed", "Finished")
    assert reply["run_result"]["return_code"] == return_code
    assert stderr in reply["run_result"]["stderr"]


def test_stdin_is_read_to_its_end(address):
    code = "import sys\nn = int(input())\nprint(n, sum(map(int, sys.stdin.read().split())))"
    assert run_code(address, code, stdin="2\n3 4\n5")["run_result"]["stdout"] == "2 12\n"
    reply = run_code(address, "input()")
    assert "EOFError" in reply["run_result"]["stderr"]


def test_a_timeout_keeps_what_was_printed(address):
    began = time.monotonic()
    code = "print('begun', flush=True)\nimport time\ntime.sleep(60)"
    result = run_code(address, code, run_timeout=1, compile_timeout=1)
    assert result["status"] == "Failed" and time.monotonic() - began < 30
    assert result["run_result"]["status"] == "TimeLimitExceeded"
    assert (result["run_result"]["stdout"], result["run_result"]["return_code"]) == (
        "begun\n",
        None,
    )


def test_files_are_binary_in_both_directions(address):
    content = bytes(range(256))
    code = "open('b/out.bin', 'wb').write(open('b/in.bin', 'rb').read()[::-1])"
    reply = run_code(
        address, code, files={"b/in.bin": encoded(content)}, fetch_files=["b/out.bin", "none"]
    )
    assert reply["files"] == {"b/out.bin": encoded(content[::-1])}


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({"language": "python"}, "code: Field required"),
        ({"code": "1"}, "language: Field required"),
        ({"code": 1, "language": "python"}, "code: Input should be a valid string"),
        ({"code": "1", "language": "python", "run_timeout": -1}, "run_timeout: "),
        ({"code": "1", "language": "python", "files": {"a": "not base64!"}}, "files.a: "),
        ({"code": "1", "language": "pytest"}, "language: Input should be 'python'"),
        ([], "Input should be "),
    ],
)
def test_a_request_that_is_not_understood_names_the_field(address, body, place):
    status, text = post(address, "/run_code", body)
    assert status == 400 and place in text


# ------------------------------------------------------------------------------ run_jupyter


def test_cells_share_variables_and_show_their_last_value(address):
    reply = notebook(address, "a = 2", "print(a)", "a * 21", "a;")
    assert reply.keys() == {*("status", "message", "driver", "cells", "executor_pod_name", "files")}
    assert reply["status"] == "Success" and reply["driver"]["status"] == "Finished"
    assert [cell["stdout"] for cell in reply["cells"]] == ["", "2\n", "", ""]
    assert [cell["display"] for cell in reply["cells"]] == [[], [], [{"text/plain": "42"}], []]
    assert reply["files"] == {} and reply["message"] == ""


def test_an_error_ends_a_cell_and_not_the_notebook(address):
    cells = notebook(address, "display(0)\nprint(1)\n1 / 0\nprint(2)", "print(3)")["cells"]
    first, second = cells
    assert first["stdout"] == "1\n" and second["stdout"] == "3\n"
    assert first["display"] == [{"text/plain": "0"}]
    (error,) = first["error"]
    assert (error["ename"], error["evalue"]) == ("ZeroDivisionError", "division by zero")
    assert error["traceback"][-1] == "ZeroDivisionError: division by zero"


def test_await_outside_of_functions(address):
    cells = (
        "import asyncio\nawait asyncio.sleep(0.01, 'slept')",
        "async def f(n):\n    await asyncio.sleep(0)\n    return n",
        "x = [await f(n) for n in range(3)]\nx",
        "await asyncio.gather(f(1), f(2))",
    )
    shown = [cell["display"] for cell in notebook(address, *cells)["cells"]]
    assert shown == [
        [{"text/plain": "'slept'"}],
        [],
        [{"text/plain": "[0, 1, 2]"}],
        [{"text/plain": "[1, 2]"}],
    ]


def test_display_gives_the_forms_that_an_object_has(address):
    cells = (
        "display(1, 'two')\nprint('printed')\n3",
        "class Table:\n    def _repr_html_(self): return '<b>x</b>'\n"
        "    def __repr__(self): return 'table'\ndisplay(Table())",
        "class Broken:\n    def _repr_html_(self): 1 / 0\n    def __repr__(self): return 'b'\n"
        "display(Broken())",
    )
    first, second, third = notebook(address, *cells)["cells"]
    assert first["stdout"] == "printed\n"
    assert first["display"] == [{"text/plain": text} for text in ("1", "'two'", "3")]
    assert second["display"] == [{"text/plain": "table", "text/html": "<b>x</b>"}]
    assert third["display"] == [{"text/plain": "b"}] and third["error"] == []


FIGURE = "import matplotlib.pyplot as plt\nplt.figure(figsize=(1, 1))\nx = plt.plot([1, 2])\n"


def test_figures_are_shown_and_returned_as_files(address):
    pytest.importorskip("matplotlib")
    reply = notebook(
        address,
        FIGURE + "plt.show()\nplt.close()",
        FIGURE + "fig = plt.gcf()",
        FIGURE + "plt.savefig('saved.png')\nplt.close()\nimport os\nos.makedirs('a/b')\n"
        "open('a/b/drawn.svg', 'w').write('<svg/>');",
        total_timeout=100,
        files={"given.png": encoded(b"as it was")},
    )
    assert [cell["error"] for cell in reply["cells"]] == [[], [], []]
    assert [cell["stderr"] for cell in reply["cells"]] == ["", "", ""]
    for number in (0, 1):
        (shown,) = reply["cells"][number]["display"]
        assert shown["text/plain"] == "<Figure size 100x100 with 1 Axes>"
        assert base64.b64decode(shown["image/png"]).startswith(b"\x89PNG")
        assert reply["files"][f"figures/cell_{number + 1}_1.png"] == shown["image/png"]
    assert reply["cells"][2]["display"] == []
    assert base64.b64decode(reply["files"]["saved.png"]).startswith(b"\x89PNG")
    assert base64.b64decode(reply["files"]["a/b/drawn.svg"]) == b"<svg/>"
    assert len(reply["files"]) == 4  # not what was uploaded


SHOW = (
    "class P:\n    def _repr_png_(self): return b'x' * size\n    def __repr__(self): return 'p'\n"
)


def test_images_are_bounded_in_number_and_size(address):
    many = notebook(address, f"size = 10\n{SHOW}display(*[P()] * 30)")
    assert len(many["files"]) == 20 and len(many["cells"][0]["display"]) == 20
    assert "20 images" in many["message"]
    cells = [f"size = 500_000\n{SHOW}", *["display(P())"] * 12]
    large = notebook(address, *cells, total_timeout=100)
    assert sum(map(len, large["files"].values())) < 4 << 20 and large["message"]
    assert large["cells"][-1]["display"] == []
    huge = notebook(address, f"size = 2_000_000\n{SHOW}display(P())")
    assert huge["cells"][0]["display"][0]["text/plain"].startswith("[left out: 2666")
    saved = notebook(address, "for n in range(40): x = open(f'{n}.png', 'w').write('x')")
    assert len(saved["files"]) == 20


@pytest.mark.parametrize(
    "code",
    [
        "import sys\nsys.modules['_notebook'].shown = 5",
        "import sys\nsys.modules['_notebook'].shown = [{'image/png': 'no base64'}, 7, {1: 2}]",
        "import sys\ndel sys.modules['_notebook']",
        "import sys\nsys.modules['_notebook'] = None",
        "import json\njson.dumps = lambda x: '['",
        "del display",
    ],
)
def test_a_program_that_breaks_the_collection_only_loses_what_it_shows(address, code):
    reply = notebook(address, "print(1)", code, "print(2)\n3")
    assert reply["status"] == "Success"
    assert [cell["stdout"] for cell in reply["cells"]] == ["1\n", "", "2\n"]
    assert {"text/plain": "3"} in reply["cells"][2]["display"]


@pytest.mark.parametrize("limit", ["cell_timeout", "total_timeout"])
def test_a_notebook_ends_with_the_cell_that_takes_too_long(address, limit):
    reply = notebook(address, "print(1)", "while True: pass", "print(2)", **{limit: 1})
    assert reply["status"] == "Failed"
    assert reply["driver"]["status"] == "TimeLimitExceeded"
    assert [cell["stdout"] for cell in reply["cells"]] == ["1\n", ""]


def test_files_of_a_notebook_are_there_and_modules_among_them_can_be_imported(address):
    files = {"m.py": encoded(b"y = 5"), "d/t.txt": encoded("é".encode())}
    cells = ("import m\nm.y", "print(open('d/t.txt').read())\nx = open('o', 'w').write('z')")
    reply = notebook(address, *cells, files=files, fetch_files=["o", "d/t.txt"])
    assert reply["cells"][0]["display"] == [{"text/plain": "5"}]
    assert reply["cells"][1]["stdout"] == "é\n"
    assert reply["files"] == {"o": encoded(b"z"), "d/t.txt": encoded("é".encode())}


def test_a_notebook_without_cells_or_with_a_wrong_kernel(address):
    assert notebook(address)["cells"] == []
    status, text = post(address, "/run_jupyter", {"cells": [], "kernel": "bash"})
    assert status == 400 and "kernel: Input should be 'python3'" in text
