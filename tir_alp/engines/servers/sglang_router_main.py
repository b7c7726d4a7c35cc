"""Entry point of a router's own process.

    python -m tir_alp.engines.servers.sglang_router_main ARGUMENTS

The arguments are those of `sglang_router.launch_router`. That module is not run itself because it
also imports a Python server, which takes six seconds. The process ends when the one that started it
ends, and reads its API key from the environment.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys

from tir_alp.engines.servers.lifetime import die_with_parent

KEY_VARIABLE = "TIR_ALP_ROUTER_KEY"
"""Environment variable with the router's API key. Every user of the machine could read it in a
command line."""


def main(words: list[str]) -> None:
    """Run a router until it is asked to end."""
    settings = importlib.import_module("sglang_router.router_args").RouterArgs
    router = importlib.import_module("sglang_router.router").Router
    parser = argparse.ArgumentParser("sglang_router")
    settings.add_cli_args(parser)
    router.from_args(settings.from_cli_args(parser.parse_args(words))).start()


if __name__ == "__main__":
    die_with_parent()
    key = os.environ.pop(KEY_VARIABLE, None)
    # One word: a key may begin with a dash.
    main(sys.argv[1:] + ([f"--api-key={key}"] if key else []))
