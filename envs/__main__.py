"""`python -m tir_alp.envs new NAME` writes an environment, `... check ID` examines one."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from tir_alp.envs.check import check
from tir_alp.envs.scaffold import write_package


def main(arguments: Sequence[str]) -> int:
    """Run a command and return its exit code: 1 if `check` found faults, 2 for a wrong command."""
    parser = argparse.ArgumentParser("tir_alp.envs", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    new = commands.add_parser("new", help="write a package with one environment and its tests")
    new.add_argument("name", help="name of the package, e.g. letter_count")
    new.add_argument("--into", type=Path, default=Path("."), help="folder to write the package in")
    examine = commands.add_parser("check", help="examine an environment, as a linter would")
    examine.add_argument(
        "id", help="id as gymnasium.make takes it, e.g. letter_count:LetterCount-v0"
    )
    examine.add_argument("--seeds", type=int, default=4, help="number of tasks to play")
    options = parser.parse_args(arguments)
    try:
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
        findings = check(options.id, range(options.seeds))
    except ValueError as error:
        print(f"tir_alp.envs: {error}", file=sys.stderr)
        return 2
    for finding in findings:
        print(f"{options.id}: {finding.rule}: {finding.text}")
    num_errors = sum(not finding.is_note for finding in findings)
    print("all checks passed" if not num_errors else f"{num_errors} found")
    return 1 if num_errors else 0


if __name__ == "__main__":
    sys.path.insert(0, "")  # modules in the working folder
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # all is imported
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
