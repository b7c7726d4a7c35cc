"""Length-prefixed JSON over a stream: four bytes, big endian, then one object."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

HEADER = struct.Struct(">I")
_CHUNK = 1 << 20


def encode(message: dict[str, Any]) -> bytes:
    """Encode a message as one frame."""
    body = json.dumps(message, ensure_ascii=True).encode()
    return HEADER.pack(len(body)) + body


class FrameReader:
    """Cuts a stream into frames; refuses one longer than `max_bytes` or not a JSON object."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._buffer = bytearray()

    @property
    def has_rest(self) -> bool:
        """Whether there are bytes that are not yet a whole frame."""
        return bool(self._buffer)

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """Take bytes from the stream; return the frames that they complete.

        Raises:
            ValueError: The stream breaks the protocol; nothing that follows can be trusted.
        """
        self._buffer += data
        frames = []
        while len(self._buffer) >= HEADER.size:
            (length,) = HEADER.unpack_from(self._buffer)
            if length > self._max_bytes:
                raise ValueError(
                    f"a frame of {length} bytes; at most {self._max_bytes} are allowed"
                )
            end = HEADER.size + length
            if len(self._buffer) < end:
                break
            frame = _parse(bytes(self._buffer[HEADER.size : end]))
            del self._buffer[:end]
            frames.append(frame)
        return frames


def _parse(body: bytes) -> dict[str, Any]:
    try:
        frame = json.loads(body)
    except (UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"a frame that is not JSON: {type(error).__name__}") from error
    if not isinstance(frame, dict):
        raise ValueError(f"a frame that is a {type(frame).__name__}, not an object")
    return frame


def read_frame(receive: Callable[[int], bytes]) -> dict[str, Any] | None:
    """Read one frame with a blocking `receive(count)`; None at the end of the stream."""
    header = _read_exactly(receive, HEADER.size)
    if not header:
        return None
    body = _read_exactly(receive, HEADER.unpack(header)[0])
    return json.loads(body)


def _read_exactly(receive: Callable[[int], bytes], count: int) -> bytearray:
    """Read this many bytes; fewer, namely none, at the end of the stream."""
    data = bytearray()
    while len(data) < count:
        chunk = receive(min(count - len(data), _CHUNK))
        if not chunk:
            return bytearray()
        data += chunk
    return data
