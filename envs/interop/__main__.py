"""`python -m tir_alp.envs.interop install LIBRARY | serve ID`."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tir_alp.envs.interop.libraries import LIBRARIES, find_python, install


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser("python -m tir_alp.envs.interop", description=__doc__)
    commands = found.add_subparsers(dest="command", required=True)
    for_install = commands.add_parser(
        "install", help="install a library into a virtual environment of its own"
    )
    for_install.add_argument("library", choices=LIBRARIES)
    for_install.add_argument("packages", nargs="*", help="further packages to install with it")
    for_serve = commands.add_parser("serve", help="serve an environment as an OpenEnv server")
    for_serve.add_argument("id", help="id of the environment, e.g. tir_alp.envs:PythonMath-v0")
    for_serve.add_argument("--kwargs", default={}, type=json.loads, help="its settings, as JSON")
    for_serve.add_argument("--host", default="127.0.0.1")
    for_serve.add_argument("--port", default=8000, type=int)
    for_serve.add_argument(
        "--max-sessions", default=256, type=int, help="maximum number of sessions"
    )
    return found


def main(arguments: Sequence[str]) -> int:
    """Run a command and return its exit code."""
    options = parser().parse_args(arguments)
    try:
        if options.command == "install":
            print(f"installed {options.library} in {install(options.library, options.packages)}")
            return 0
        python = find_python("openenv")
    except subprocess.CalledProcessError as error:
        print(f"tir_alp.envs.interop: pip failed with status {error.returncode}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"tir_alp.envs.interop: {error}", file=sys.stderr)
        return 2
    settings = {name: value for name, value in vars(options).items() if name != "command"}
    server = Path(__file__).with_name("openenv_server.py")
    settings["python"] = sys.executable
    os.execv(python, [python, str(server), json.dumps(settings)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
