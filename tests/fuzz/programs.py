"""Random programs, each run by `python FILE` and in the sandbox, which must not differ.

`python -m tests.fuzz.programs --programs 300 --seed 0` is the long run; a test makes a short one.
A program is a few pieces of `tests.fuzz.program_pieces`, one after the other, some of them in a
function, a thread, an exit handler or an imported module, and an end. Compared are stdout, the last
line of stderr and the exit status. What is documented as different (`docs/sandbox_service.md`) is
in no piece.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.program_ends import ENDS
from tests.fuzz.program_pieces import PIECES, WRAPPERS
from tests.fuzz.program_texts import HEADS, STDINS
from tir_alp.tools.sandbox import Limits, SandboxConfig, create_sandbox
from tir_alp.tools.sandbox.script import Script

_MAX_PIECES = 5
_WALL_S = 20.0
_FOLDER = re.compile(r"/[^\s\"']*/(?=main\.py)")
_DELETED = re.compile(r"^(?:deleted|closed|kept|cycle|finalized) \d+\n", re.MULTILINE)
"""What a piece prints when an object is deleted: objects in cycles, as classes are, have no order
among them, and are deleted whenever Python collects them."""
_ADDRESS = re.compile(r"\b0x[0-9a-f]{6,}")


@dataclass(frozen=True, slots=True)
class Program:
    """A program and its input."""

    code: bytes
    stdin: bytes


@dataclass(frozen=True, slots=True)
class Ended:
    """How a program ended."""

    stdout: str
    last_line: str
    """The last line of stderr."""
    status: int


@dataclass(frozen=True, slots=True)
class Difference:
    """A program that ends otherwise in the sandbox."""

    number: int
    program: Program
    plain: Ended
    confined: Ended
    stderr: str
    """All of stderr in the sandbox."""

    def __str__(self) -> str:
        code = self.program.code.decode("utf-8", "backslashreplace")
        return (
            f"--- program {self.number}, stdin {self.program.stdin!r}\n{code}\n"
            f"plain:    {self.plain}\nconfined: {self.confined}\n{self.stderr}"
        )


def make_program(seed: str) -> Program:
    """Draw a program."""
    rng = random.Random(seed)
    pieces = []
    for number in range(rng.randint(1, _MAX_PIECES)):
        piece = rng.choice(PIECES)(rng, number)
        if rng.random() < 0.3:
            piece = rng.choice(WRAPPERS)(piece, number)
        pieces.append(piece)
    end = rng.choice(ENDS)(rng)
    head, encoding, line_end = rng.choice(HEADS)
    text = "\n".join([*pieces, end])
    body = text.replace("\n", line_end).encode(encoding, "backslashreplace")
    return Program(head + body, rng.choice(STDINS))


def plain(program: Program) -> Ended | None:
    """Run a program as `python -u FILE < INPUT` with the environment of the sandbox.

    Returns:
        How it ended; None if it did not.
    """
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as stdin:
        stdin.write(program.stdin)
        stdin.seek(0)
        file = Path(folder) / "main.py"
        file.write_bytes(program.code)
        try:
            process = subprocess.run(
                [sys.executable, "-u", str(file)],
                stdin=stdin,
                capture_output=True,
                cwd=folder,
                env={"LANG": "C.UTF-8", "PATH": "/usr/bin"},
                timeout=_WALL_S,
            )
        except subprocess.TimeoutExpired:
            return None
    status = process.returncode if process.returncode >= 0 else 128 - process.returncode
    stdout, stderr = (
        each.decode("utf-8", "backslashreplace") for each in (process.stdout, process.stderr)
    )
    return _ended(stdout, stderr, status)


async def differences(programs: Sequence[Program], backend: str = "namespaces") -> list[Difference]:
    """Run programs in both ways, and return those that end differently. A program that does not
    end with plain Python is left out.
    """
    config = SandboxConfig.model_validate(
        {
            "backend": backend,
            "preload": (),
            "memory_mb": 512,
            "limits": Limits(wall_s=_WALL_S, output_chars=500_000),
        }
    )
    found = []
    async with create_sandbox(config) as sandbox:
        for number, program in enumerate(programs):
            expected = await asyncio.to_thread(plain, program)
            if expected is None:
                continue  # a program that never ends cannot be compared
            async with sandbox.session() as session:
                ended = await session.run_script(Script(code=program.code, stdin=program.stdin))
            result = ended.result
            confined = _ended(result.stdout, result.stderr, ended.exit_status)
            if confined != expected:
                found.append(Difference(number, program, expected, confined, result.stderr))
    return found


def _ended(stdout: str, stderr: str, status: int) -> Ended:
    """Leave out what the sandbox adds, the folder of the program and addresses of objects."""
    stdout = _DELETED.sub("", stdout) + "".join(sorted(_DELETED.findall(stdout)))
    texts = [_ADDRESS.sub("0x", _FOLDER.sub("", text)) for text in (stdout, stderr)]
    lines = [line for line in texts[1].splitlines() if not line.startswith("[the interpreter was ")]
    return Ended(texts[0], lines[-1] if lines else "", status)


def main() -> int:
    """Run the programs, and print those that end differently."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="namespaces")
    options = parser.parse_args()
    began = time.monotonic()
    programs = [make_program(f"{options.seed}/{n}") for n in range(options.programs)]
    found = asyncio.run(differences(programs, options.backend))
    for each in found:
        print(each)
    print(
        f"{len(found)} of {len(programs)} programs end differently; "
        f"{time.monotonic() - began:.0f} s"
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
