"""The rule that divides questions into a training split and a held-out split.

It looks at the question alone, so that no question is in both splits, whatever the source, its seed
and its size. Environments and the trainer both follow it.
"""

from __future__ import annotations

import hashlib
from typing import Literal

Split = Literal["train", "held_out"]

_HELD_OUT_SHARE = 1 / 8


def is_held_out(question: str) -> bool:
    """Whether a question belongs to the held-out split: by its hash, one in eight does."""
    return stable_hash(f"split/{question}") < _HELD_OUT_SHARE * 2**128


def stable_hash(text: str) -> int:
    """Hash a text to 128 bits, the same on every machine and in every version of Python."""
    data = text.encode(errors="surrogatepass")  # JSON can hold lone surrogates
    return int.from_bytes(hashlib.blake2b(data, digest_size=16).digest())
