"""Texts that were rendered not long ago, by what they were rendered from."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable


class RecentTexts:
    """Keeps the texts that were asked for last.

    Args:
        most_chars: Number of characters that it holds at most.
    """

    def __init__(self, most_chars: int) -> None:
        self._most_chars, self._num_chars = most_chars, 0
        self._texts: OrderedDict[Hashable, str] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], str]) -> str:
        """Return the text of a key, which is made if it is not there."""
        text = self._texts.get(key)
        if text is not None:
            self._texts.move_to_end(key)
            return text
        text = self._texts[key] = make()
        self._num_chars += len(text)
        while self._num_chars > self._most_chars:
            _, oldest = self._texts.popitem(last=False)
            self._num_chars -= len(oldest)
        return text
