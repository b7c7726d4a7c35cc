"""The stream that a container engine attaches to a container: stdout and stderr in one.

The engine puts eight bytes before each piece: which stream, three zeros, the length (big endian).
"""

from __future__ import annotations

from collections.abc import Iterator

STDOUT, STDERR = 1, 2
_HEADER_BYTES = 8


class ContainerStream:
    """Cuts the bytes of the stream into pieces."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """Take bytes; yield the complete pieces as (stream, content).

        Pieces that are not taken from the iterator stay for the next call.
        """
        self._buffer += data
        while len(self._buffer) >= _HEADER_BYTES:
            end = _HEADER_BYTES + int.from_bytes(self._buffer[4:_HEADER_BYTES], "big")
            if len(self._buffer) < end:
                return
            stream, piece = self._buffer[0], bytes(self._buffer[_HEADER_BYTES:end])
            del self._buffer[:end]
            yield stream, piece


def last_line(text: bytes | bytearray) -> str:
    """The last line of what a process wrote before it ended, for error messages."""
    lines = text.decode("utf-8", "backslashreplace").strip().splitlines()
    return lines[-1] if lines else "no message"
