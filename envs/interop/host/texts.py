"""Converts the messages of a library to one text, because environments are text only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Messages = Sequence[Mapping[str, Any]]


def as_text(messages: Messages) -> str:
    """Join the contents of messages that the model reads, system messages included.

    Raises:
        ValueError: A message is the model's own, or contains something other than text.
    """
    texts = []
    for message in messages:
        if message["role"] == "assistant":
            raise ValueError("a prompt with turns of the model cannot be shown as one text")
        content = message["content"]
        if not isinstance(content, str):
            kinds = [part.get("type") for part in content]
            if kinds != ["text"] * len(kinds):
                raise ValueError(f"a message contains {kinds}, and only texts can be shown")
            content = "\n".join(part["text"] for part in content)
        texts.append(content)
    return "\n\n".join(texts)
