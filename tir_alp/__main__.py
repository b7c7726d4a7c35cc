"""`tir-alp COMMAND ...`, which is `python -m tir_alp.COMMAND ...`."""

from __future__ import annotations

import difflib
import os
import runpy
import sys
from collections.abc import Sequence

from tir_alp import __version__
from tir_alp.process import begin_command

COMMANDS = {
    "train": "train a model with tools, or go on with a run",
    "sft": "teach a model by demonstration: conversations, or a run's best trajectories",
    "evaluate": "measure a model on tasks: accuracy with intervals, pass@k, maj@k",
    "chat": "talk to a model and its real tools in a terminal",
    "agents": "serve a model to agents over OpenAI's and Anthropic's API",
    "doctor": "check that a run is sound on this machine, before it starts",
    "audit": "prove that every token of a saved run is accounted for",
    "inspect": "see every token and every curve of a run on a local page",
    "report": "draw the page of a run, or of several over one another",
    "sandbox": "run programs in the sandbox, probe it, serve it over HTTP",
    "models": "make a model's folder from a wheel or GGUF file, or upload one",
    "envs": "begin an environment of your own, and examine one",
    "study": "compare methods: settings, seeds, intervals; from a file, resumable",
}
_PLACES = {"study": "studies.study"}  # commands that are not directly below the package


def module_of(command: str) -> str:
    """Return the name of the module or package that a command runs."""
    return f"tir_alp.{_PLACES.get(command, command)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code.

    Args:
        arguments: The words after `tir-alp`; None: those of this process, which is then a command.
    """
    if arguments is None:
        begin_command()
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words[:1] == ["--version"]:
        print(__version__)
        return 0
    if not words or words[0] in ("--help", "-h"):
        print("usage: tir-alp COMMAND ...   (or: python -m tir_alp.COMMAND ...)\n")
        print("".join(f"  {name:<10}{text}\n" for name, text in COMMANDS.items()))
        print("tir-alp COMMAND --help describes a command; --version prints the version.")
        return 0 if words else 2
    command, *rest = words
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(COMMANDS)}"
        print(f"tir-alp: there is no command {command!r}; {hint}", file=sys.stderr)
        return 2
    if not {"", os.getcwd()} & set(sys.path):  # as `python -m` has it: `my_env:Mine-v0` is found
        sys.path.insert(0, os.getcwd())
    sys.argv = [f"tir-alp {command}", *rest]
    runpy.run_module(module_of(command), run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
