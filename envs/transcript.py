"""What `render` shows of an episode of texts, by Gymnasium's convention for the mode "ansi"."""

from __future__ import annotations

from typing import Any

import gymnasium

METADATA: dict[str, Any] = {"render_modes": ["ansi"], "render_fps": 1}
"""The `metadata` of an environment with a `Transcript`. A frame is a turn of the model."""


class Transcript:
    """The texts of one episode, which are kept only if they are to be shown.

    Args:
        render_mode: "ansi", or None if nothing is shown.

    Raises:
        ValueError: There is no such mode.
    """

    def __init__(self, render_mode: str | None) -> None:
        if render_mode not in (None, *METADATA["render_modes"]):
            raise ValueError(
                f"render_mode is {render_mode!r}; environments of texts have only "
                f"{METADATA['render_modes']}, or None to show nothing"
            )
        self._is_kept = render_mode is not None
        self._parts: list[str] = []

    def begin(self, prompt: str) -> None:
        """Begin with the prompt of an episode."""
        self._parts = [f"[prompt]\n{prompt}\n"] if self._is_kept else []

    def add(self, action: str, observation: str) -> None:
        """Add a turn of the model, and what it reads next."""
        if not self._is_kept:
            return
        self._parts.append(f"[model]\n{action}\n")
        if observation:
            self._parts.append(f"[observation]\n{observation}\n")

    def render(self) -> str | None:
        """The episode so far; None, and a warning, if nothing was kept."""
        if not self._is_kept:
            gymnasium.logger.warn(
                "render() shows nothing without a render mode: gymnasium.make(ID, "
                'render_mode="ansi")'
            )
            return None
        return "\n".join(self._parts)
