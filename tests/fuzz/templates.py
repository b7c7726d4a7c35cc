"""Real chat templates: each is reproduced token for token, or refused with a reason.

    python -m tests.fuzz.templates --fetch FOLDER

downloads public packages that contain chat templates (trl, axolotl and the source of
llama-cpp-python from PyPI and, where there is npm, @huggingface/ollama-utils) to a folder outside
this repository, and examines the templates.
What becomes of each is in `template_verdicts.tsv`, one row per template and one column per form of
calls; the command prints what differs from it, and then returns 1. Without `--fetch` it examines
what is in the folder, and `--write` rewrites the table, after a change that is meant.

The tokenizer is the tiny one, with the marks that occur in the template as special tokens. An
accepted template renders a conversation of three turns itself; the prompt and the observations of
the renderer must be in it, in order, with nothing but the assistant's turns between them.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import shutil
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

TABLE = Path(__file__).with_name("template_verdicts.tsv")
FEWEST = 60  # templates that are examined at all
_WHEELS = ("trl==1.16.0", "axolotl==0.19.0")
_SOURCE = "llama-cpp-python==0.3.36"
_NPM = "@huggingface/ollama-utils@0.0.18"
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
    "<|return|>",
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
    """Download the packages, and extract their templates to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        downloads = Path(name)
        pip = ["pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", name]
        subprocess.run([sys.executable, "-m", *pip, *_WHEELS], check=True)
        for path in sorted(downloads.glob("*.whl")):
            package = path.name.partition("-")[0]
            with zipfile.ZipFile(path) as wheel:
                for file in wheel.namelist():
                    if file.endswith(".jinja"):
                        (folder / f"{package}-{Path(file).name}").write_bytes(wheel.read(file))
        source = ["pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "--dest", name]
        subprocess.run([sys.executable, "-m", *source, _SOURCE], check=True)
        with tarfile.open(next(downloads.glob("llama_cpp_python-*.tar.gz"))) as package:
            for member in package:
                if re.search(r"/models/templates/[^/]+\.jinja$", member.name):
                    text = package.extractfile(member)
                    assert text is not None
                    (folder / f"llamacpp-{Path(member.name).name}").write_bytes(text.read())
        if shutil.which("npm") is None:
            print(f"{_NPM} is left out: there is no npm here", file=sys.stderr)
            return
        npm = ["npm", "pack", "--silent", "--pack-destination", name, _NPM]
        subprocess.run(npm, check=True, stdout=subprocess.DEVNULL)
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
    if native and not renderer.form.opening:
        words = ""
    pieces = [tokenizer.decode(renderer.prompt("What is 6*7?").token_ids)]
    for output in OUTPUTS:
        pieces.append(tokenizer.decode(renderer.observation(output, StopReason.STOP).token_ids))
    whole = _render(renderer, native, words)
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


def _render(renderer: Renderer, native: bool, words: str) -> str:
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
            # The system prompt, too, is that of the renderer: it may have to show the tools.
            return renderer.template.render(messages, generation=True)
        except Exception as error:
            problem = error
    raise AssertionError(f"it does not render the conversation: {problem!r}")


_REASONS = {
    "no tools": "does not show the model its tools",
    "no calls": "writes no calls",
    "form of calls": "writes a call as",
    "marks of calls": "between words and a call",
    "place of calls": "does not write 1 calls in one turn",
    "drops thinking": "it drops the thinking of a turn",
    "shortens outputs": "it shortens a long output",
    "changes earlier text": "changes the text before it",
    "changes the prompt": "it does not keep the prompt",
    "outputs differ": "it does not write the output after",
    "changes turns": "it writes turn",
    "role tool": "does not keep the content of a 'tool' message",
    "role user": "does not keep the content of a 'user' message",
    "raises": "refuses a message",
}
"""Why a template is refused, in short: the first of these sentences that the message contains."""


def short_reason(refusal: str) -> str:
    """Return the short form of a refusal; itself if it is none of the usual ones."""
    return next((short for short, text in _REASONS.items() if text in refusal), refusal)


def examine_all(folder: Path) -> Iterator[tuple[str, CallFormat, str, str]]:
    """Yield for each template and form of calls: its name, what became of it, and the details."""
    for file in sorted(folder.glob("*.jinja")):
        for call_format in _FORMATS:
            yield file.stem, call_format, *_verdict(file.read_text(), call_format)


def _verdict(template: str, call_format: CallFormat) -> tuple[str, str]:
    try:
        refusal = examine(template, call_format, THOUGHTS)
    except AssertionError as error:
        return "WRONG", str(error)
    except Exception as error:
        return "CRASHED", repr(error)
    if refusal:
        return f"refused: {short_reason(refusal)}", refusal
    try:
        refusal = examine(template, call_format, WORDS)
    except AssertionError:  # turns of this model begin with thoughts
        return "thoughts", "reproduced if each turn begins with thoughts"
    assert not refusal, "the conversation is refused or accepted by its template alone"
    return "accepted", ""


Verdicts = dict[tuple[str, str], str]


def read_table() -> Verdicts:
    """Return the verdict of each template and form of calls."""
    with TABLE.open(newline="") as file:
        rows = csv.DictReader(file, delimiter="\t")
        return {(row["template"], form): row[form] for row in rows for form in _FORMATS}


def write_table(verdicts: Verdicts) -> None:
    """Write the verdicts of some templates over those in the table."""
    known = (read_table() if TABLE.exists() else {}) | verdicts
    lines = [("template", *_FORMATS)]
    names = sorted({name for name, _ in known})
    lines += [(name, *(known[name, form] for form in _FORMATS)) for name in names]
    TABLE.write_text("".join("\t".join(line) + "\n" for line in lines))


def differences(folder: Path) -> list[str]:
    """Examine the templates in a folder; return where they differ from the table, in sentences."""
    expected, found = read_table(), [*examine_all(folder)]
    number = len({name for name, *_ in found})
    sentences = [f"there are {number} templates, fewer than {FEWEST}"] if number < FEWEST else []
    for name, call_format, verdict, detail in found:
        known = expected.get((name, call_format), "not in the table")
        if verdict != known:
            detail = " ".join(detail.split())[:400]
            sentences.append(f"{name} {call_format}: {verdict}, not {known}. {detail}")
    return sentences


def main() -> int:
    """Fetch templates or examine them; return 1 if what becomes of one differs from the table."""
    parser = argparse.ArgumentParser(
        "python -m tests.fuzz.templates",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="folder of *.jinja files")
    parser.add_argument("--fetch", action="store_true", help="download the templates first")
    parser.add_argument("--write", action="store_true", help="rewrite the table of verdicts")
    arguments = parser.parse_args()
    if arguments.fetch:
        fetch(arguments.folder)
    found = [*examine_all(arguments.folder)]
    wrong = [each for each in found if each[2] in ("WRONG", "CRASHED")]
    if arguments.write and not wrong:
        write_table({(name, form): verdict for name, form, verdict, _ in found})
    print(dict(Counter(verdict.partition(":")[0] for *_, verdict, _ in found)))
    sentences = differences(arguments.folder)
    print("".join(f"{each}\n" for each in sentences), end="")
    return int(bool(sentences))


if __name__ == "__main__":
    sys.exit(main())
