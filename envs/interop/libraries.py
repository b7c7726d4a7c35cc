"""Which libraries there are, and where each is installed.

Their pins do not agree with ours or with one another's, so each has a virtual environment of its
own: `python -m tir_alp.envs.interop install NAME` makes it.
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
"""Environment variable: the folder of the virtual environments, else `~/.cache/tir_alp/interop`."""


@dataclass(frozen=True, slots=True)
class Library:
    """A library that others publish environments for."""

    module: str
    """Of `host/`."""
    imports: str
    """What it is imported as."""
    requirements: tuple[str, ...]
    """For pip: the versions that the tests run with."""


LIBRARIES = {
    "gem": Library("host_gem", "gem", ("gem-llm==0.1.0",)),
    "skyrl-gym": Library("host_skyrl_gym", "skyrl_gym", ("skyrl-gym==0.4.0",)),
    "openenv": Library("host_openenv", "openenv", ("openenv==0.10.0",)),
    "gymnasium": Library("host_gymnasium", "gymnasium", ("gymnasium>=1.2,<2",)),
    "verifiers": Library("host_verifiers", "verifiers", ("verifiers==0.4.0",)),
}


def folder_of(library: str) -> Path:
    """Where the virtual environment of a library is, or would be."""
    base = os.environ.get(FOLDER_VARIABLE)
    return (Path(base) if base else Path.home() / ".cache" / "tir_alp" / "interop") / library


def find_python(library: str, python: str | None = None) -> str:
    """The interpreter that has a library.

    Args:
        library: Of `LIBRARIES`.
        python: One that is told. None: that of the library's own virtual environment, or ours if
            the library is installed beside us.

    Raises:
        ValueError: There is no such library, or it is not installed.
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
    """Make or renew the virtual environment of a library, by pip.

    Args:
        library: Of `LIBRARIES`.
        packages: Further ones to install beside it, such as one with environments.

    Raises:
        subprocess.CalledProcessError: pip failed, and said why.
    """
    folder = folder_of(library)
    python = folder / "bin" / "python"
    if not python.exists():
        venv.EnvBuilder(with_pip=True).create(folder)
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    pip += ["--no-compile"]  # most of what comes along is never imported, the rest is compiled then
    subprocess.run([*pip, *LIBRARIES[library].requirements, *packages], check=True)
    return folder
