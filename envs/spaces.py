"""The space of texts."""

from __future__ import annotations

from typing import Any

import gymnasium


class TextSpace(gymnasium.Space[str]):
    r"""Every `str`, whatever its characters and its length.

    `gymnasium.spaces.Text` admits only a fixed character set, so that a model's first `π` would be
    outside of it.

    Example:
        >>> "π ≈ 3.14\n" in TextSpace()
        True
    """

    def __init__(self, seed: int | None = None):
        super().__init__(shape=None, dtype=str, seed=seed)

    def sample(self, mask: None = None, probability: None = None) -> str:
        """Draw up to 32 characters of the Unicode range below the surrogates."""
        if mask is not None or probability is not None:
            raise ValueError("a TextSpace takes no mask or probability")
        points = self.np_random.integers(1, 0xD800, size=self.np_random.integers(33))
        return "".join(map(chr, points))

    def contains(self, x: Any) -> bool:
        """Whether `x` is a text."""
        return isinstance(x, str)

    @property
    def is_np_flattenable(self) -> bool:
        """False: texts have no fixed size."""
        return False

    def __repr__(self) -> str:
        return "TextSpace()"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TextSpace)
