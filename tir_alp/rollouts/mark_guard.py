"""Keeps marks in messages apart from the marks that a chat template writes around messages.

Text from outside cannot become a mark of the conversation. Marks in a message are replaced by
stand-ins before the template sees it; in the rendered conversation they are encoded as text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from tir_alp.rollouts.end_marks import structure_marks
from tir_alp.rollouts.surrogates import SURROGATE
from tir_alp.rollouts.text_encoder import Ids, TextEncoder

_PRIVATE = range(0xE000, 0xF900)  # code points that no text means anything by


class MarkGuard:
    """Replaces marks by stand-ins, and encodes rendered conversations that contain stand-ins.

    Args:
        tokenizer: A fast Hugging Face tokenizer.
        encoder: Its encoder of pieces of a text.
    """

    def __init__(self, tokenizer: Any, encoder: TextEncoder) -> None:
        self._tokenizer, self._encoder = tokenizer, encoder
        marks = structure_marks(tokenizer)
        special = {*tokenizer.all_special_ids} | {
            each for each, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        self._marks = sorted(set(marks.values()), key=lambda text: (-len(text), text))
        self._numbers = {text: number for number, text in enumerate(self._marks)}
        self._any = _pattern(self._marks)
        self._special = _pattern([each for each in self._marks if self._is_one_of(each, special)])

    def over(self, texts: Iterable[str]) -> GuardedTexts:
        """Return the guard of one conversation.

        Args:
            texts: All texts of the conversation. The stand-ins occur in none of them.
        """
        joined = "".join(texts)
        return GuardedTexts(self, next(chr(each) for each in _PRIVATE if chr(each) not in joined))

    def replaced(
        self, text: str, stand_in: str, *, keeps_words: bool, kept: Collection[str] = ()
    ) -> str:
        """Replace the marks in a text; see `GuardedTexts`."""
        pattern = self._special if keeps_words else self._any
        text = SURROGATE.sub("\ufffd", text)
        if pattern is None:
            return text

        def replacement(found: re.Match[str]) -> str:
            mark = found[0]
            return mark if mark in kept else f"{stand_in}{self._numbers[mark]}{stand_in}"

        return pattern.sub(replacement, text)

    def encoded(self, text: str, stand_in: str, *, begins: bool) -> Ids:
        """Encode a rendered text; see `GuardedTexts`."""
        ids: list[int] = []
        for index, part in enumerate(re.split(f"{stand_in}([0-9]+){stand_in}", text)):
            if index % 2:
                ids += self._encoder.content(self._marks[int(part)], False)
            elif begins and index == 0:
                ids += self._tokenizer.encode(part, add_special_tokens=False, verbose=False)
            else:
                ids += self._encoder.mark(part)
        return tuple(ids)

    def _is_one_of(self, text: str, special: set[int]) -> bool:
        ids = self._encoder.mark(text)
        return len(ids) == 1 and ids[0] in special


class GuardedTexts:
    """The guard of one conversation; `MarkGuard.over` makes it.

    Args:
        guard: The guard of the tokenizer.
        stand_in: The character that stands on both sides of a mark's number.
    """

    def __init__(self, guard: MarkGuard, stand_in: str) -> None:
        self._guard, self.stand_in = guard, stand_in

    def outside(self, text: str) -> str:
        """Return a text that the policy did not write, without any mark."""
        return self._guard.replaced(text, self.stand_in, keeps_words=False)

    def written(self, text: str, kept: Collection[str] = ()) -> str:
        """Return a text of the assistant, which may contain marks that are words, as `<think>`.

        Special tokens are not words: they end turns, and text cannot.

        Args:
            text: The text.
            kept: Special tokens that may be in it all the same: the marks of its calls.
        """
        return self._guard.replaced(text, self.stand_in, keeps_words=True, kept=kept)

    def encoded(self, text: str, *, begins: bool) -> Ids:
        """Encode a rendered text that may contain stand-ins.

        Args:
            text: The text.
            begins: Whether it is the beginning of a conversation.
        """
        return self._guard.encoded(text, self.stand_in, begins=begins)


def mapped(value: Any, change: Callable[[str], str]) -> Any:
    """Return a JSON value with all its texts changed."""
    match value:
        case str():
            return change(value)
        case list() | tuple():
            return [mapped(each, change) for each in value]
        case Mapping():
            return {change(key): mapped(each, change) for key, each in value.items()}
        case _:
            return value


def _pattern(texts: Sequence[str]) -> re.Pattern[str] | None:
    return re.compile("|".join(map(re.escape, texts))) if texts else None
