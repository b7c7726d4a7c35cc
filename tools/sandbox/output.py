"""Keeps the head and the tail of an output of any length, in bounded memory."""

from __future__ import annotations

_REMARK = "\n[... output cut here ...]\n"
_BYTES_PER_CHAR = 4  # at most, so head and tail hold at least as many characters as needed
_ESCAPES = {0xDC00 + byte: f"\\x{byte:02x}" for byte in range(0x80, 0x100)}
"""What "surrogateescape" makes of a byte that is not UTF-8 -> how it is shown."""


class HeadTail:
    """Bytes go in, bounded text comes out; `total_bytes` counts what went in."""

    def __init__(self, max_chars: int) -> None:
        self.total_bytes = 0
        self._max_chars = max_chars
        self._capacity = max_chars * _BYTES_PER_CHAR
        self._head = bytearray()
        self._tail = bytearray()

    def feed(self, data: bytes) -> None:
        """Take the next bytes."""
        self.total_bytes += len(data)
        room = self._capacity - len(self._head)
        self._head += data[:room]
        self._tail += data[room:]
        if len(self._tail) > 2 * self._capacity:
            del self._tail[: -self._capacity]

    def text(self) -> tuple[str, bool]:
        r"""The text, and whether something was cut. Bytes that are not UTF-8 become `\xNN`."""
        data = self._head + self._tail
        try:
            return cut_middle(data.decode("utf-8"), self._max_chars)
        except UnicodeDecodeError:
            text = data.decode("utf-8", "surrogateescape")
        # Escaping is slow, so it is done only where something is kept: at both ends.
        if len(text) > 2 * self._max_chars:
            text = text[: self._max_chars] + text[-self._max_chars :]
        return cut_middle(text.translate(_ESCAPES), self._max_chars)


def cut_middle(text: str, max_chars: int) -> tuple[str, bool]:
    """Keep both ends of a text that is longer than `max_chars`, which includes the remark between.

    Returns:
        The text, and whether something was cut.
    """
    if len(text) <= max_chars:
        return text, False
    room = max(0, max_chars - len(_REMARK))
    head, tail = text[: room - room // 2], text[len(text) - room // 2 :]
    return (head + _REMARK + tail)[:max_chars], True
