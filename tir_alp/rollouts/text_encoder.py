"""Encodes pieces of a conversation so that they get the tokens that they have in the whole of it.

Some tokenizers, those of SentencePiece above all, put a space before a text, which is right for its
beginning and wrong for a piece from its middle. Others join a space with the word after it, so that
a piece must not end with a space. Which of this applies is found out by encoding a conversation
with short stand-ins for the content as a whole, and comparing.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from tir_alp.rollouts.chat_template import Frame
from tir_alp.rollouts.end_marks import structure_marks

_PROBES = ("x", "What", "7")

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EncodedFrame:
    """The tokens around a content, and how the content between them is encoded."""

    before: Ids
    after: Ids
    lead: str
    """Spaces at the end of the text before the content, which are encoded with the content."""
    starts_text: bool
    """Whether the content is encoded like the beginning of a text."""
    content: Frame
    """How the content is written."""


class TextEncoder:
    """Encodes frames, with their marks, and contents, without any.

    Args:
        tokenizer: A fast Hugging Face tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._marks = frozenset(structure_marks(tokenizer))
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        inside = _without_leading_space(state)
        self._inner = None if inside == state else _make(inside)
        plain = _make(_with_special(state, self._marks))
        self._plain_start = plain
        self._plain_inner = plain if inside == state else _make(_with_special(inside, self._marks))

    def frame(self, frame: Frame) -> EncodedFrame:
        """Encode the text around a content as in a whole conversation."""
        texts = [f"{frame.left}{frame.before}{probe}" for probe in _PROBES]
        whole = [self._marked(text) for text in texts]
        stripped = frame.before.rstrip(" ")
        splits = [(frame.before, ""), (stripped, frame.before[len(stripped) :])]
        encoders = (self._marked, self._marked_inside)
        for (before, lead), encode, starts in itertools.product(splits, encoders, (True, False)):
            ids = encode(before)
            parts = [ids + self.content(lead + probe, starts) for probe in _PROBES]
            if all(map(_ends_with if frame.left else tuple.__eq__, whole, parts)):
                break
        else:  # the tokenizer joins the content with the text before it
            lead, starts = "", False
            ids = self._marked_inside(frame.before) if frame.left else self._marked(frame.before)
        ends = [self._marked(text + frame.after) for text in texts]
        after = self._fitting(encoders, frame.after, ends)
        return EncodedFrame(ids, after, lead, starts, frame)

    def content(self, text: str, starts_text: bool) -> Ids:
        """Encode text from outside: `<|im_end|>` in it is ten characters, not the token.

        Args:
            text: The content.
            starts_text: Whether it is encoded like the beginning of a text.
        """
        ids: list[int] = []
        pieces = [text]
        encoder = self._plain_start if starts_text else self._plain_inner
        while pieces:
            encoder.encode_special_tokens = True  # marks are not looked for; pickling forgets it
            piece = pieces.pop()
            encoding = encoder.encode(piece, add_special_tokens=False)
            marked = [
                span
                for token_id, span in zip(encoding.ids, encoding.offsets, strict=True)
                if token_id in self._marks
            ]
            if marked:  # some vocabularies also contain marks as words: they are cut in two
                pieces += reversed(_cut_inside(piece, marked))
            else:
                ids += encoding.ids
                encoder = self._plain_inner
        return tuple(ids)

    def written(self, text: str) -> Ids:
        """Encode text in the middle of a turn as the model writes it.

        Tokens that were added for the model to write, such as `<think>`, are single tokens; special
        tokens are not: they end turns, and text cannot.
        """
        if self._inner is None:
            encode = self._tokenizer.encode
            return tuple(encode(text, add_special_tokens=False, split_special_tokens=True))
        self._inner.encode_special_tokens = True
        return tuple(self._inner.encode(text, add_special_tokens=False).ids)

    def mark(self, text: str) -> Ids:
        """Encode a mark of the template, which may be a special token."""
        return self._marked_inside(text)

    def _fitting(
        self, encoders: Sequence[Callable[[str], Ids]], text: str, ends: Sequence[Ids]
    ) -> Ids:
        """Return the encoding of a text with which all of some encoded texts end."""
        encodings = [encode(text) for encode in encoders]
        return next(
            (ids for ids in encodings if all(_ends_with(end, ids) for end in ends)), encodings[-1]
        )

    def _marked(self, text: str) -> Ids:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False, verbose=False))

    def _marked_inside(self, text: str) -> Ids:
        if self._inner is None:
            return self._marked(text)
        self._inner.encode_special_tokens = False
        return tuple(self._inner.encode(text, add_special_tokens=False).ids)


def _ends_with(whole: Ids, end: Ids) -> bool:
    return whole[len(whole) - len(end) :] == end if end else True


def _cut_inside(text: str, spans: Sequence[tuple[int, int]]) -> list[str]:
    """Cut a text in the middle of each span; a span of a single character becomes U+FFFD."""
    pieces, end = [], 0
    for start, stop in spans:
        if stop - start < 2:
            pieces += [text[end:start], "\ufffd"]
            end = stop
        else:
            middle = (start + stop) // 2
            pieces.append(text[end:middle])
            end = middle
    return [each for each in (*pieces, text[end:]) if each and each != text]


def _make(state: Mapping[str, Any]) -> Tokenizer:
    made = Tokenizer.from_str(json.dumps(state))
    made.no_truncation()
    made.no_padding()
    return made


def _with_special(state: Mapping[str, Any], marks: Collection[int]) -> Mapping[str, Any]:
    """Copy the state of a tokenizer, with marks as special tokens, which it can leave unread."""
    tokens = state["added_tokens"]
    return {
        **state,
        "added_tokens": [
            each | {"special": each["special"] or each["id"] in marks} for each in tokens
        ],
    }


def _without_leading_space(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Copy the state of a tokenizer, without what puts a space before a text."""
    return {**state, **{name: _strip(state[name]) for name in ("normalizer", "pre_tokenizer")}}


def _strip(step: dict[str, Any] | None) -> dict[str, Any] | None:
    """Copy the state of a normalizer or pre-tokenizer, without adding a space; None: no step."""
    match step:
        case {"type": "Prepend"}:
            return None
        case {"type": "Metaspace"}:
            return step | {"prepend_scheme": "never"}
        case {"type": "ByteLevel", "add_prefix_space": True}:
            return step | {"add_prefix_space": False}
        case {"type": "Sequence"}:
            name = "normalizers" if "normalizers" in step else "pretokenizers"
            stripped = [_strip(each) for each in step[name]]
            return step | {name: [each for each in stripped if each is not None]}
        case _:
            return step


def split_at(text: str, marks: Sequence[str]) -> list[tuple[bool, str]]:
    """Cut a text at marks; return its pieces, and whether each is a mark."""
    if not marks:
        return [(False, text)]
    pattern = re.compile("(" + "|".join(map(re.escape, marks)) + ")")
    pieces = enumerate(pattern.split(text))
    return [(index % 2 == 1, piece) for index, piece in pieces if piece]
