"""`python tests/agents/install.py FOLDER`: agents from PyPI, in a virtual environment of their own.

Their dependencies do not agree with those of tir_alp. What is installed is `requirements.txt`, and
nothing else: it has what the agents import, and leaves out what they depend on for other uses,
above all libraries of data sets. Tests find the environment by the variable `TIR_ALP_AGENTS`;
without it they are skipped.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

FOLDER_VARIABLE = "TIR_ALP_AGENTS"
_REQUIREMENTS = Path(__file__).with_name("requirements.txt")


def install(folder: Path) -> None:
    """Create or update the environment."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.EnvBuilder(with_pip=True).create(folder)
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    pip += ["--no-deps", "--no-compile", "--only-binary=:all:"]
    subprocess.run([*pip, "-r", str(_REQUIREMENTS)], check=True)


def find_python() -> str | None:
    """Return the interpreter of the environment; None if there is none."""
    folder = os.environ.get(FOLDER_VARIABLE, "")
    python = Path(folder, "bin", "python")
    return str(python) if folder and python.exists() else None


if __name__ == "__main__":
    install(Path(sys.argv[1]))
