"""Real chat templates: each is reproduced token for token, or refused with a reason.

`python -m tests.fuzz.templates --fetch FOLDER` downloads two public packages that contain chat
templates (trl from PyPI, @huggingface/ollama-utils from npm) to a folder outside this repository;
`python -m tests.fuzz.templates FOLDER` prints for each template whether it is accepted.

The tokenizer is the tiny one, with the marks that occur in the template as special tokens. An
accepted template renders a conversation of three turns itself; the prompt and the observations of
the renderer must be in it, in order, with nothing but the assistant's turns between them.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from tir_alp.models.tiny.model import make_tokenizer
from tir_alp.rollouts.end_marks import ordinary_tokens
from tir_alp.rollouts.renderer import Renderer
from tir_alp.tools.calls import CallFormat
from tir_alp.types import StopReason

CLOCK = datetime(2026, 1, 31, 23, 59)
TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "python",
            "description": "Run a program.",
            "parameters": {
                "type": "object",
                "properties": {"code": {"type": "string", "description": "The program."}},
                "required": ["code"],
            },
        },
    },
)
WORDS = "Let me see."
THOUGHTS = "<think>\nHm, 6*7.\n</think>\n\nSo it is."
_FORMATS: tuple[CallFormat, ...] = ("fenced", "tool_call")
OUTPUTS = ("42", ' a "b" <c>\n  \\n & d')
_MARK = re.compile(
    r"<[|\uff5c][^<>{}'\" ]+[|\uff5c]>|</?(?:s|bos|eos|[a-z]+_of_turn)>|\[/?[A-Z_]+\]"
)
_ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eot|>",
    "</s>",
    "<|end|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
)
_TEXT = "|".join(rf"{q}(?:[^{q}\\]|\\.)*{q}" for q in "\"'`")
_ENTRY = re.compile(rf'model: "([^"]*)",\s*gguf: ({_TEXT})', re.DOTALL)
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|.)", re.DOTALL)


def fetch(folder: Path) -> None:
    """Download the two packages, and extract their templates to a folder."""
    with tempfile.TemporaryDirectory() as name:
        downloads = Path(name)
        pip = ["pip", "download", "--quiet", "--no-deps", "--dest", name, "trl"]
        subprocess.run([sys.executable, "-m", *pip], check=True)
        npm = ["npm", "pack", "--silent", "--pack-destination", name, "@huggingface/ollama-utils"]
        subprocess.run(npm, check=True)
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(next(downloads.glob("*.whl"))) as wheel:
            for file in wheel.namelist():
                if file.endswith(".jinja"):
                    (folder / f"trl-{Path(file).name}").write_bytes(wheel.read(file))
        with tarfile.open(next(downloads.glob("*.tgz"))) as package:
            source = package.extractfile("package/src/chat-template-automap.ts")
            assert source is not None
            for model, text in _ENTRY.findall(source.read().decode()):
                file = re.sub(r"\W+", "_", model.removeprefix("library/"))
                (folder / f"ollama-{file}.jinja").write_text(_ESCAPE.sub(_character, text[1:-1]))


def _character(escape: re.Match[str]) -> str:
    code = escape.group(1)
    if len(code) == 5:
        return chr(int(code[1:], 16))
    return {"n": "\n", "t": "\t", "r": "\r", "\n": ""}.get(code, code)


def tokenizer_for(template: str) -> Any:
    """The tiny tokenizer with a template and the marks that occur in it."""
    tokenizer = make_tokenizer()
    marks = sorted(set(_MARK.findall(template)) - set(tokenizer.get_vocab()))
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    eos = next((mark for mark in _ENDS if mark in template), "</s>")
    tokenizer.add_special_tokens({"eos_token": eos, "bos_token": "<s>"})
    tokenizer.chat_template = template
    return tokenizer


def examine(template: str, call_format: CallFormat, words: str) -> str:
    """Return why a template is refused; empty if it is accepted, and then it is reproduced.

    Raises:
        AssertionError: It is accepted, and the renderer's text is not the template's.
    """
    tokenizer = tokenizer_for(template)
    native = call_format == "tool_call"
    tools = TOOLS if native else ()
    try:
        renderer = Renderer(tokenizer, call_format=call_format, tools=tools, clock=CLOCK)
    except ValueError as error:
        return str(error)
    assert not ordinary_tokens(tokenizer, renderer.stop_token_ids), "it stops at text"
    assert renderer.observation("1", StopReason.STOP).token_ids
    if native and not renderer.marks.opening:
        words = ""
    pieces = [tokenizer.decode(renderer.prompt("What is 6*7?").token_ids)]
    for output in OUTPUTS:
        pieces.append(tokenizer.decode(renderer.observation(output, StopReason.STOP).token_ids))
    whole = _render(tokenizer, native, words)
    assert whole.startswith(pieces[0]), f"the prompt {pieces[0]!r} is not in {whole!r}"
    assert whole.endswith(pieces[-1]), f"the observation {pieces[-1]!r} is not in {whole!r}"
    turns = list(_between(whole, pieces))
    for turn in turns:
        expected = "".join(words.split())
        found = "".join(turn.split())
        prefilled = expected.removeprefix("<think>")
        assert found.startswith((expected, prefilled)), f"the turn {turn!r}"
        assert native or found in (expected, prefilled), f"the turn {turn!r}"
    return ""


def _between(whole: str, pieces: list[str]) -> Iterator[str]:
    position = len(pieces[0])
    for piece in pieces[1:]:
        start = whole.find(piece, position)
        assert start >= 0, f"the observation {piece!r} is not in {whole[position:]!r}"
        yield whole[position:start]
        position = start + len(piece)


def _render(tokenizer: Any, native: bool, words: str) -> str:
    """Render three turns, as whoever deploys the model does."""
    arguments: Any = {"code": "6*7"}
    for form in (arguments, json.dumps(arguments)):
        messages: list[dict[str, Any]] = [{"role": "user", "content": "What is 6*7?"}]
        for output in OUTPUTS:
            turn: dict[str, Any] = {"role": "assistant", "content": words}
            if native:
                call = {"name": "python", "arguments": form}
                turn["tool_calls"] = [{"type": "function", "id": "000000000", "function": call}]
            answer = {"role": "tool", "name": "python", "tool_call_id": "000000000"}
            messages += [turn, {**answer, "content": output}]
        try:
            return tokenizer.apply_chat_template(
                messages,
                tools=list(TOOLS) if native else None,
                tokenize=False,
                add_generation_prompt=True,
                strftime_now=CLOCK.strftime,
            )
        except Exception as error:
            problem = error
    raise AssertionError(f"it does not render the conversation: {problem!r}")


def examine_all(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Yield for each template and form of calls: its name, what became of it, and the details."""
    for file in sorted(folder.glob("*.jinja")):
        template = file.read_text()
        for call_format in _FORMATS:
            name = f"{file.stem} {call_format}"
            try:
                refusal = examine(template, call_format, THOUGHTS)
            except AssertionError as error:
                yield name, "WRONG", str(error)
                continue
            except Exception as error:
                yield name, "CRASHED", repr(error)
                continue
            try:
                refusal = refusal or examine(template, call_format, WORDS)
            except AssertionError:  # turns of this model begin with thoughts
                yield name, "thoughts", "reproduced if each turn begins with thoughts"
                continue
            yield name, "refused" if refusal else "accepted", refusal


def main() -> int:
    """Fetch templates or examine them; return 1 if one is accepted and not reproduced."""
    parser = argparse.ArgumentParser("tests.fuzz.templates", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--fetch", action="store_true", help="download the templates first")
    arguments = parser.parse_args()
    if arguments.fetch:
        fetch(arguments.folder)
    counts: Counter[str] = Counter()
    for name, verdict, detail in examine_all(arguments.folder):
        counts[verdict] += 1
        print(f"{verdict:8} {name}: {' '.join(detail.split())[:400]}")
    print(dict(counts))
    return int(counts["WRONG"] + counts["CRASHED"] > 0 or not counts)


if __name__ == "__main__":
    sys.exit(main())
