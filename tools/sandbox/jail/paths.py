"""The files of an installation that Python has to see, on the host or in an image."""

from __future__ import annotations

import os
import sys

_SYSTEM_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib")
LINKER_CACHE = "/etc/ld.so.cache"


def python() -> str:
    """Path of the interpreter itself, not of the link to it in a virtual environment."""
    return os.path.realpath(sys.executable)


def library_folders() -> list[str]:
    """Folders where the interpreter, its compiled modules and their dependencies find libraries."""
    folders = (*_SYSTEM_LIBRARIES, f"{sys.base_prefix}/lib")
    return [p for p in folders if os.path.isdir(p)]


def package_folders() -> list[str]:
    """Folders in which packages are installed."""
    names = ("site-packages", "dist-packages")
    return [p for p in sys.path if os.path.basename(p) in names and os.path.isdir(p)]


def files() -> list[str]:
    """Files that are needed in addition to those folders."""
    return [p for p in (python(), LINKER_CACHE) if os.path.exists(p)]


def outermost(paths: list[str]) -> list[str]:
    """Drop every path that lies below another."""
    unique = list(dict.fromkeys(paths))
    return [p for p in unique if not any(p.startswith(q + "/") for q in unique)]
