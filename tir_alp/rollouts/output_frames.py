"""The encoded text around the outputs of a turn's calls, whose names and ids it may contain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tir_alp.rollouts.chat_template import CALL_ID, ChatTemplate, Frame
from tir_alp.rollouts.formats import CallForm, ReadCall
from tir_alp.rollouts.observation_frames import observation_frames
from tir_alp.rollouts.text_encoder import EncodedFrame, TextEncoder

_MAX_KEPT = 512  # combinations of names and ids
_OTHER_ID = "111111111"

_Key = tuple[tuple[str, str], ...]
"""Name of the tool and id of the call, per output; empty where the text does not depend on it."""


class OutputFrames:
    """Renders and encodes the text around outputs, once for each combination of names and ids.

    Args:
        template: The chat template.
        encoder: Encodes its text.
        form: How native calls are written; None if calls are ordinary text.

    Raises:
        ValueError: The template cannot show an output.
    """

    def __init__(self, template: ChatTemplate, encoder: TextEncoder, form: CallForm | None) -> None:
        self._template, self._encoder, self._form = template, encoder, form
        self._kept: dict[_Key, tuple[EncodedFrame, ...]] = {}
        names = template.tool_names
        first = self._around(names[0], CALL_ID)
        self._has_names = any(self._around(name, CALL_ID) != first for name in names[1:])
        try:
            self._has_ids = form is not None and self._around(names[0], _OTHER_ID) != first
        except ValueError:  # a template may refuse the id
            self._has_ids = False

    @property
    def depends_on_calls(self) -> bool:
        """Whether the text contains the names of tools or the ids of calls."""
        return self._has_names or self._has_ids

    def of(self, calls: Sequence[ReadCall], count: int) -> tuple[EncodedFrame, ...]:
        """Return one frame per output.

        Args:
            calls: The calls of the turn, which need not be as many.
            count: Number of outputs.

        Raises:
            ValueError: The template cannot show so many outputs of one turn.
        """
        named = [(each.name, each.call_id) for each in calls[:count]]
        named += [("", "")] * (count - len(named))
        known = self._template.tool_names
        key = tuple(
            (name if self._has_names and name in known else "", each if self._has_ids else "")
            for name, each in named
        )
        try:
            return self._frames(key)
        except ValueError:  # the template refuses an id that the model wrote
            return self._frames(tuple((name, "") for name, _ in key))

    def _frames(self, key: _Key) -> tuple[EncodedFrame, ...]:
        if key not in self._kept:
            if len(self._kept) >= _MAX_KEPT:
                self._kept.clear()
            names = [name or self._template.tool_names[0] for name, _ in key]
            ids = [each for _, each in key]
            frames = observation_frames(self._template, self._form, names, ids)
            self._kept[key] = tuple(map(self._encoder.frame, frames))
        return self._kept[key]

    def _around(self, name: str, call_id: str) -> Frame:
        (frame,) = observation_frames(self._template, self._form, [name], [call_id])
        return replace(frame, left="")
