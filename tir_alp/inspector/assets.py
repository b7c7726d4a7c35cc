"""The files of the page, and how scripts and data are put into a page that is one file."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable
from importlib import resources
from typing import Any

from tir_alp.inspector.finite import finite

_KINDS = (".html", ".js", ".css")
_IMPORT = re.compile(r"^import\s[^;]*?from\s+\"\./[\w.]+\";\n", re.MULTILINE)
_EXPORT = re.compile(r"^export (?=async function|function|const|class)", re.MULTILINE)


def static_files() -> list[str]:
    """Return the names of the page's files, which are all in one folder."""
    folder = resources.files("tir_alp.inspector") / "static"
    return sorted(each.name for each in folder.iterdir() if each.name.endswith(_KINDS))


def static_text(name: str) -> str:
    """Return the content of one of the page's files."""
    return (resources.files("tir_alp.inspector") / "static" / name).read_text("utf-8")


def as_one(modules: Iterable[str]) -> str:
    """Return modules as one that imports nothing.

    Args:
        modules: Their texts, each after those of the modules that it imports.
    """
    return "\n".join(_EXPORT.sub("", _IMPORT.sub("", text)) for text in modules)


def as_data(data: Any) -> str:
    """Return a JSON value as the content of a script element of data.

    In such an element "<" would be read as markup, and everything else is JSON.
    """
    return json.dumps(finite(data), separators=(",", ":")).replace("<", "\\u003c")


def policy_of(scripts: Iterable[str], style: str) -> str:
    """Return a policy that allows these scripts and this style, by their digests, alone.

    Args:
        scripts: The content of each script element that runs.
        style: The content of the style element.
    """
    return (
        f"default-src 'none'; script-src {' '.join(map(_digest, scripts))}; "
        f"style-src {_digest(style)}; img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
