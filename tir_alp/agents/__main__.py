"""`tir-alp agents serve`: a gateway in front of a model, for agents that run on their own."""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

from tir_alp.process import missing_extra, run_command, torch_imports

KEY_VARIABLE = "TIR_ALP_AGENTS_KEY"


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser("python -m tir_alp.agents", description=__doc__)
    verbs = found.add_subparsers(required=True)
    serve = verbs.add_parser("serve", help="serve a model over OpenAI's and Anthropic's API")
    serve.add_argument("--model", default="tiny-able", help="folder or Hugging Face id")
    serve.add_argument("--port", type=_port, default=8000, help="0: any free port")
    serve.add_argument("--calls", choices=("template", "fenced"), default="template")
    serve.add_argument("--max-context-tokens", type=int, default=16384)
    serve.add_argument("--max-turn-tokens", type=int, default=2048)
    serve.add_argument("--seed", type=int, default=0)
    serve.add_argument("--out", type=Path, help="file for what was captured, written at the end")
    return found


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code: 2 for what the user has to fix."""
    given = parser().parse_args(arguments)
    with torch_imports():
        try:
            from tir_alp.agents.serve import ServeOptions, serve
        except ImportError as error:
            module = (error.name or "").partition(".")[0]
            print(f"tir_alp.agents: needs {module}, and {missing_extra(module)}", file=sys.stderr)
            return 2
        from tir_alp.config import AgentsConfig
        from tir_alp.models.resolve import resolve

    options = ServeOptions(
        model=resolve(given.model),
        port=given.port,
        key=os.environ.get(KEY_VARIABLE) or f"sk-{secrets.token_hex(16)}",
        calls=AgentsConfig(calls=given.calls),
        max_context_tokens=given.max_context_tokens,
        max_turn_tokens=given.max_turn_tokens,
        seed=given.seed,
        out=given.out,
    )
    try:
        asyncio.run(serve(options, lambda line: print(line, flush=True)))
    except (ValueError, OSError) as error:
        print(f"tir_alp.agents: {error}", file=sys.stderr)
        return 2
    return 0


def _port(text: str) -> int:
    if not 0 <= (port := int(text)) < 1 << 16:
        raise argparse.ArgumentTypeError(f"{port} is not a port: ports go from 0 to 65535")
    return port


if __name__ == "__main__":
    sys.exit(run_command(main, imports=True))
