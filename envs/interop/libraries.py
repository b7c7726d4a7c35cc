"""The supported libraries, and where each is installed.

Their pinned dependencies agree neither with those of tir_alp nor with each other, so each library
has a virtual environment of its own, which `python -m tir_alp.envs.interop install NAME` makes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

FOLDER_VARIABLE = "TIR_ALP_INTEROP"
"""Environment variable: folder of the virtual environments; default ~/.cache/tir_alp/interop."""


@dataclass(frozen=True, slots=True)
class Library:
    """A library for which others publish environments."""

    module: str
    """Name of the module in `host/` that adapts the library."""
    imports: str
    """Name under which the library is imported."""
    requirements: tuple[str, ...]
    """Requirements for pip, with the versions that the tests use."""


LIBRARIES = {
    "gem": Library("host_gem", "gem", ("gem-llm==0.1.0",)),
    "skyrl-gym": Library("host_skyrl_gym", "skyrl_gym", ("skyrl-gym==0.4.0",)),
    "openenv": Library("host_openenv", "openenv", ("openenv==0.10.0",)),
    "gymnasium": Library("host_gymnasium", "gymnasium", ("gymnasium>=1.2,<2",)),
    "verifiers": Library("host_verifiers", "verifiers", ("verifiers==0.4.0",)),
}


def folder_of(library: str) -> Path:
    """Return the folder of a library's virtual environment, whether or not it exists."""
    base = os.environ.get(FOLDER_VARIABLE)
    return (Path(base) if base else Path.home() / ".cache" / "tir_alp" / "interop") / library


def find_python(library: str, python: str | None = None) -> str:
    """Return the interpreter that has a library.

    Args:
        library: Name of the library, a key of `LIBRARIES`.
        python: Interpreter to use. None: that of the library's virtual environment, or else this
            one if the library is installed here.

    Raises:
        ValueError: The library is unknown or not installed.
    """
    if library not in LIBRARIES:
        raise ValueError(f"there is no library {library!r}; there are: {', '.join(LIBRARIES)}")
    if python is not None:
        return python
    own = folder_of(library) / "bin" / "python"
    if own.exists():
        return str(own)
    if find_spec(LIBRARIES[library].imports) is not None:
        return sys.executable
    raise ValueError(
        f"{library} is not installed: run `python -m tir_alp.envs.interop install {library}`, or "
        "name an interpreter that has it (env.kwargs.python)"
    )


def install(library: str, packages: Sequence[str] = ()) -> Path:
    """Create or update the virtual environment of a library with pip; return its folder.

    Args:
        library: Name of the library, a key of `LIBRARIES`.
        packages: Further packages to install, e.g. one with environments.

    Raises:
        subprocess.CalledProcessError: pip failed; it has printed the reason.
    """
    folder = folder_of(library)
    python = folder / "bin" / "python"
    if not python.exists():
        venv.EnvBuilder(with_pip=True).create(folder)
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    pip += ["--no-compile"]  # most packages are never imported; the others are compiled then
    subprocess.run([*pip, *LIBRARIES[library].requirements, *packages], check=True)
    return folder
