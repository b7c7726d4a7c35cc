"""`python -m tir_alp.sandbox probe | run FILE | serve`."""

from tir_alp.process import run_command
from tir_alp.tools.sandbox.cli import main, parser

__all__ = ["main", "parser"]

if __name__ == "__main__":
    raise SystemExit(run_command(main))
