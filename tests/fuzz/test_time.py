"""Whatever reads untrusted text takes time that grows linearly with the length of the text.

Most of it runs in the event loop of the service, which answers nobody meanwhile.
"""

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest

pytest.importorskip("aiohttp")
pytest.importorskip("mcp")
from mcp.types import jsonrpc_message_adapter
from pydantic import ValidationError

from tests.fuzz.parsers import ALL_FORMS, TYPES
from tir_alp.envs.parsing import parse_action
from tir_alp.envs.reasoning_gym_env import _tagged, is_program
from tir_alp.rollouts.formats import canonical, watcher
from tir_alp.rollouts.formats.readers import JsonReader
from tir_alp.tools.boxed import extract_boxed
from tir_alp.tools.calculator import evaluate
from tir_alp.tools.calls import (
    CALL_FORMATS,
    CallFormat,
    call_watcher,
    find_call,
    has_call,
    prose,
    read_call,
)
from tir_alp.tools.mcp_lines import FaultyLines
from tir_alp.tools.outcome import Outcome
from tir_alp.tools.python_tool import _as_text
from tir_alp.tools.sandbox.interpreters.container_stream import ContainerStream, last_line
from tir_alp.tools.sandbox.jail import frames
from tir_alp.tools.sandbox.output import HeadTail, cut_middle
from tir_alp.tools.sandbox.result import RunResult
from tir_alp.tools.sandbox.script import ScriptResult
from tir_alp.tools.sandbox.service import compat
from tir_alp.tools.sandbox.service.files import Fetched

CHUNK = 1 << 16
SMALL, LARGE = 1 << 15, 1 << 18
"""Lengths of the texts in bytes. What is exponential never gets through the small one."""
MOST_GROWTH = 4.0
"""How often the proportional time may be exceeded; quadratic growth exceeds it 8 times."""
NOISE_S = 0.02
"""Less than this is not compared: a busy machine takes as long now and then."""
NUM_RUNS, NUM_TRIES = 3, 4
NUM_SMALL_RUNS = 8
"""More for the small text: if it seems slow, growth seems small. Each takes milliseconds."""

FRAME = '  File "<cell 1>", line 1, in f\n    return f(n - 1)\n           ^^^^^^^^\n'
HEADER = "Traceback (most recent call last):\n"
SEEDS = {
    "frames": FRAME,
    "nested tracebacks": HEADER + FRAME + "ValueError: 1\n\nDuring handling of it:\n\n",
    "headers": HEADER,
    "exits": HEADER + FRAME + "SystemExit: 1\n",
    "repeats": "  [Previous line repeated 2978 more times]\n",
    "backticks": "`",
    "fences": "```python\n",
    "spaced fences": "```   ",
    "fences in a row": "``` py ",
    "tags": "<tool_call>",
    "closed tags": "<tool_call></tool_call>",
    "parameters": "<parameter=x>1</parameter>",
    "keys": "<arg_key>",
    "heads": "<|message|>to=functions.",
    "lists": "[",
    "objects": '{"a":',
    "quotes": '"',
    "escapes": "\\",
    "escaped quotes": '\\"',
    "spaces": " ",
    "blank lines": " \n",
    "line ends": "\n",
    "carriage returns": "\r",
    "digits": "1",
    "decimals": "1.",
    "minus": "-",
    "braces": "{}",
    "boxes": "\\boxed{",
    "bare boxes": "\\boxed ",
    "answers": "<answer>",
    "line ends of strings": '"\\n',
    "ids": '"id": ',
    "slashes": "a/",
    "dots": "../",
    "surrogates": "\ud800",
    "bytes": "\udcff",
    "cut characters": "\udcf0\udc9f",
    "null": "\0",
    "wide": "\U0001f600",
}
TAILS = ("", "x", "SystemExit: 3\n")


def from_bytes(text: str) -> bytes:
    """The bytes of a text, in which "\\udcff" stands for a byte that is not UTF-8."""
    return text.replace("\ud800", "?").encode("utf-8", "surrogateescape")


def result_of(text: str) -> RunResult:
    return RunResult(
        outcome=Outcome.TOOL_ERROR,
        stdout=text,
        stderr=text,
        value=text,
        duration_s=0.0,
        cpu_s=0.0,
        truncated=False,
    )


def collected(text: str) -> None:
    data = from_bytes(text)
    for max_chars in (100, len(data) // 4, len(data)):
        output = HeadTail(max_chars)
        for start in range(0, len(data), CHUNK):
            output.feed(data[start : start + CHUNK])
        output.text()


def framed(text: str) -> None:
    bodies = (from_bytes(text), json.dumps({"value": text}).encode())
    for body in bodies:
        reader = frames.FrameReader(16 << 20)
        data = frames.HEADER.pack(len(body)) + body
        try:
            for start in range(0, len(data), CHUNK):
                reader.feed(data[start : start + CHUNK])
        except ValueError:
            pass


def received(text: str) -> None:
    body = json.dumps({"value": text})
    data = frames.encode({"value": text})
    view, position = memoryview(data), 0

    def receive(count: int) -> bytes:
        nonlocal position
        start, position = position, position + min(count, 1 << 12)
        return bytes(view[start:position])

    assert json.loads(body) == frames.read_frame(receive)


def streamed(text: str) -> None:
    data = from_bytes(text)
    stream = ContainerStream()
    pieces = b"".join(
        b"\1\0\0\0" + len(data[i : i + 1000]).to_bytes(4, "big") + data[i : i + 1000]
        for i in range(0, len(data), 1000)
    )
    for start in range(0, len(pieces), CHUNK):
        for _ in stream.feed(pieces[start : start + CHUNK]):
            pass
    last_line(data)


def replied(text: str) -> None:
    result = result_of(text)
    script = ScriptResult(result, 1)
    compat.fusion_reply(script, Fetched())
    compat.faas_reply(script)
    compat.notebook_reply([result], [[]], Fetched())
    _as_text(result)
    cut_middle(text, 1000)


def requested(text: str) -> None:
    sent = text.encode("utf-8", "replace").decode()
    program = {"code": sent, "language": "python", "stdin": sent}
    bodies: list[tuple[type[compat.BaseModel], object]] = [
        (compat.FusionRequest, program),
        (compat.FusionRequest, program | {"files": {sent: sent}, "fetch_files": [sent]}),
        (compat.FaasRequest, program),
    ]
    validated(bodies)


def requested_in_parts(size: int) -> None:
    program = {"code": "", "language": "python"}
    validated(
        [
            (compat.FusionRequest, program | {"files": {f"{i}/": "" for i in range(size // 20)}}),
            (compat.FusionRequest, program | {"fetch_files": ["/"] * (size // 5)}),
            (compat.FusionNotebook, {"cells": [1] * (size // 3)}),
        ]
    )


def validated(bodies: list[tuple[type[compat.BaseModel], object]]) -> None:
    for model, body in bodies:
        try:
            model.model_validate_json(json.dumps(body))
        except ValidationError as error:
            error.errors()


def called(text: str) -> None:
    for call_format in CALL_FORMATS:
        find_call(text, call_format)
        has_call(text, call_format)
        prose(text, call_format)


FORMS_OF_EACH_KIND = {
    (type(form.read), form.ends, bool(form.opening), bool(form.section_end)): form
    for form in ALL_FORMS
}.values()


def called_in_forms(text: str) -> None:
    for form in FORMS_OF_EACH_KIND:
        canonical(text, form, TYPES)
        canonical(form.opening + text, form, TYPES)
        watch = watcher(form, TYPES, 2)
        watch(form.opening)
        for start in range(0, len(text), 64):
            watch(text[start : start + 64])


def read_as_calls(text: str) -> None:
    in_list = JsonReader(in_list=True)
    for content in (text, f'{{"name": "{text}', f'{{"name": "f", "arguments": {{"x": {text}'):
        read_call(content)
        in_list(content, TYPES)


def watched(text: str) -> None:
    begins: tuple[tuple[CallFormat, str], ...] = (
        ("tool_call", ""),
        ("tool_call", "<tool_call>"),
        ("fenced", ""),
    )
    for call_format, begun in begins:
        watch = call_watcher(call_format)
        watch(begun)
        for start in range(0, len(text), 64):
            watch(text[start : start + 64])


def answered(text: str) -> None:
    parse_action(text)
    extract_boxed(text)
    _tagged(text)
    is_program(text)


def sent_by_a_server(text: str) -> None:
    lines = FaultyLines()
    flat = text.replace("\n", " ")
    pieces = [flat[start : start + 1000] for start in range(0, len(flat), 1000)]
    for line in ('{"jsonrpc": "2.0", "id": 1, "result": {', *pieces, '{"jsonrpc": "' + flat):
        try:
            jsonrpc_message_adapter.validate_json(line)
        except ValidationError as error:
            list(lines.read(error))


def calculated(text: str) -> None:
    with contextlib.suppress(ValueError, ZeroDivisionError):
        evaluate(text)


@dataclass(frozen=True)
class Growth:
    small_s: float
    large_s: float

    @property
    def is_linear(self) -> bool:
        proportional_s = max(self.small_s * LARGE / SMALL, NOISE_S)
        return self.large_s <= MOST_GROWTH * proportional_s


def growth(read: Callable[[str], object], seed: str, tail: str) -> Growth:
    """How the time grows; measured again if it seems too much, since the machine may be busy."""
    for _ in range(NUM_TRIES):
        large_s = best_time(read, make(seed, LARGE) + tail, NUM_RUNS)
        found = Growth(best_time(read, make(seed, SMALL) + tail, NUM_SMALL_RUNS), large_s)
        if found.is_linear:
            break
    return found


def make(seed: str, size: int) -> str:
    return seed * (size // len(seed))


def best_time(read: Callable[[str], object], text: str, num_runs: int) -> float:
    times = []
    for _ in range(num_runs):
        began = time.perf_counter()
        read(text)
        times.append(time.perf_counter() - began)
        if times[-1] < NOISE_S * SMALL / LARGE:
            break
    return min(times)


@pytest.mark.parametrize(
    "read",
    [
        *(
            answered,
            calculated,
            called,
            called_in_forms,
            collected,
            framed,
            read_as_calls,
            received,
            replied,
        ),
        *(requested, sent_by_a_server, streamed, watched),
    ],
    ids=lambda read: read.__name__,
)
def test_time_is_linear_in_the_length_of_a_text(read: Callable[[str], object]):
    slow = {
        (name, tail): found
        for name, seed in SEEDS.items()
        for tail in TAILS
        if not (found := growth(read, seed, tail)).is_linear
    }
    assert slow == {}


def test_time_is_linear_in_the_number_of_parts_of_a_request():
    assert growth(lambda text: requested_in_parts(len(text)), "x", "").is_linear


def test_a_quadratic_reader_is_noticed():
    def quadratic(text: str) -> None:
        while text:
            text = text[4:]

    assert not growth(quadratic, "ab", "").is_linear
