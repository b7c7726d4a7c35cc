"""`python -m tir_alp.envs new NAME` writes an environment, `... check ID` examines one.

`python -m tir_alp.envs demonstrate --out FILE` writes transcripts for `python -m tir_alp.sft`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import gymnasium

from tir_alp.envs.check import check
from tir_alp.envs.demonstrations import PROGRAMS, Style, demonstrations
from tir_alp.envs.scaffold import write_package
from tir_alp.tools.sandbox import SandboxRefused
from tir_alp.tools.setting_words import read_section


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser("python -m tir_alp.envs", description=__doc__)
    commands = found.add_subparsers(dest="command", required=True)
    new = commands.add_parser("new", help="write a package with one environment and its tests")
    new.add_argument("name", help="name of the package, e.g. letter_count")
    new.add_argument("--into", type=Path, default=Path("."), help="folder to write the package in")
    examine = commands.add_parser(
        "check",
        help="examine an environment, as a linter would",
        epilog="Settings of the environment: --env.kwargs.KEY VALUE, as in training.",
    )
    examine.add_argument(
        "id", help="id as gymnasium.make takes it, e.g. letter_count:LetterCount-v0"
    )
    examine.add_argument("--seeds", type=int, default=4, help="number of tasks to play")
    show = commands.add_parser("demonstrate", help="write transcripts of solved tasks")
    show.add_argument("--out", type=Path, required=True, help="JSON lines file to write")
    show.add_argument("--kinds", default="arithmetic", help=f"from {', '.join(PROGRAMS)}")
    show.add_argument("--number", type=int, default=256, help="number of transcripts")
    show.add_argument("--seed", type=int, default=0, help="seed of tasks and wording")
    show.add_argument("--mistakes", type=float, default=0.2, help="share with a repaired mistake")
    show.add_argument("--guesses", type=float, default=0.0, help="share that guesses the answer")
    show.add_argument("--instruction", help="text before each question (default: that of the env)")
    return found


def main(arguments: Sequence[str]) -> int:
    """Run a command and return its exit code: 1 if `check` found faults, 2 for a wrong command."""
    try:
        kwargs, words = read_section(arguments, "env.kwargs")
        options = parser().parse_args(words)
        if kwargs and options.command != "check":
            raise ValueError(f"{options.command} takes no --env.kwargs: they are settings of check")
        if options.command == "demonstrate":
            number = demonstrate(options)
            print(f"wrote {number} transcripts to {options.out}. Next:")
            print(f"  python -m tir_alp.sft --model.path MODEL --data.path {options.out}")
            return 0
        if options.command == "new":
            folder, env_id = write_package(options.name, options.into)
            print(
                f"wrote {folder}. Next:\n"
                f"  pip install -e {folder}\n"
                f"  python -m pytest {folder}\n"
                f"  python -m tir_alp.envs check {env_id}\n"
                f"  python -m tir_alp.train --env.id {env_id} --data.source env"
            )
            return 0
        findings = check(options.id, range(options.seeds), kwargs)
    except (ValueError, SandboxRefused) as error:
        print(f"tir_alp.envs: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}" if error.filename else error
        print(f"tir_alp.envs: {reason}", file=sys.stderr)
        return 2
    for finding in findings:
        print(f"{options.id}: {finding.rule}: {finding.text}")
    num_errors = sum(not finding.is_note for finding in findings)
    print("all checks passed" if not num_errors else f"{num_errors} found")
    return 1 if num_errors else 0


def demonstrate(options: argparse.Namespace) -> int:
    """Write the file whole, or not at all; returns the number of its rows."""
    style = Style(options.mistakes, options.guesses)
    aside = options.out.with_name(f".{options.out.name}.part")
    kinds = [each.strip() for each in options.kinds.split(",")]
    env = gymnasium.make("tir_alp.envs:PythonMath-v0", instruction=options.instruction)
    try:
        with closing(env), aside.open("w") as file:
            for row in demonstrations(env, kinds, options.number, options.seed, style):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        os.replace(aside, options.out)
    finally:
        aside.unlink(missing_ok=True)
    return options.number


if __name__ == "__main__":
    sys.path.insert(0, "")  # modules in the working folder
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # all is imported
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("tir_alp.envs: interrupted", file=sys.stderr)
        sys.exit(130)
