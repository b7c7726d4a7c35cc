"""What libraries say as messages, as one text: our environments are text only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Messages = Sequence[Mapping[str, Any]]


def as_text(messages: Messages) -> str:
    """Join the contents of messages that the model reads, the system's included.

    Raises:
        ValueError: One of them is the model's own, or holds something other than text.
    """
    parts = []
    for message in messages:
        if message["role"] == "assistant":
            raise ValueError("a prompt with turns of the model's in it cannot be shown as one text")
        content = message["content"]
        if not isinstance(content, str):
            kinds = [part.get("type") for part in content]
            if kinds != ["text"] * len(kinds):
                raise ValueError(f"a message holds {kinds}, and only texts can be shown")
            content = "\n".join(part["text"] for part in content)
        parts.append(content)
    return "\n\n".join(parts)
