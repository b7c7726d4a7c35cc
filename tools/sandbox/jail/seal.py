"""Frames that only the holders of a key can make, and that are accepted only in order.

They protect a stream that others can reach: a program in a guest may find ways to read or write the
descriptors of the relay, but not to read its memory.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from typing import Any

from tir_alp.tools.sandbox.jail import frames


class Seal:
    """One direction of a stream. Each end of the stream has one per direction."""

    def __init__(self, key: bytes, sender: str) -> None:
        self._key = key
        self._sender = sender
        self._count = 0

    def close(self, message: dict[str, Any]) -> bytes:
        """The frame of a message."""
        body = json.dumps(message)
        return frames.encode({"body": body, "mac": self._next_mac(body)})

    def open(self, frame: dict[str, Any]) -> dict[str, Any]:
        """The message of a frame.

        Raises:
            ValueError: It is not the next frame of the other end.
        """
        body, mac = frame.get("body"), frame.get("mac")
        if not isinstance(body, str) or not isinstance(mac, str):
            raise ValueError("a frame without a seal")
        if not hmac.compare_digest(mac.encode(), self._next_mac(body).encode()):
            raise ValueError("a frame with another's seal")
        return json.loads(body)

    def _next_mac(self, body: str) -> str:
        self._count += 1
        text = f"{self._sender} {self._count} {body}".encode()
        return hmac.new(self._key, text, hashlib.sha256).hexdigest()
