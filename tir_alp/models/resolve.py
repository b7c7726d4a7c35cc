"""From `model.path` to a folder or Hugging Face id that transformers loads: the one place."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

from tir_alp.models.tiny import SHIPPED

_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
"""What can be a Hugging Face id."""


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def resolve(path: str, log: Callable[[str], None] = _say) -> str:
    """Return where the model is that a path names.

    Args:
        path: A name of `SHIPPED`, a GGUF file, which is converted once and kept in the user's
            cache, a folder, or a Hugging Face id; the last two are returned as they are.
        log: Called with a line for people while a file is converted, or asked for on the hub.

    Raises:
        ValueError: A GGUF file cannot be converted.
    """
    if path in SHIPPED:
        return str(SHIPPED[path])
    if path.lower().endswith(".gguf"):
        from tir_alp.models.from_gguf import cached  # needs torch, which takes seconds to import

        return str(cached(Path(path).expanduser(), log))
    if _ID.fullmatch(path) and not Path(path).exists():
        log(f"there is no folder {path!r} here: looking for it on the Hugging Face hub")
    return path
