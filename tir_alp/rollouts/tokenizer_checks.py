"""Checks a tokenizer and the schemas of tools before anything is rendered with them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tir_alp.rollouts.end_marks import structure_marks


def check_tokenizer(tokenizer: Any) -> None:
    """Raise ValueError unless the tokenizer is fast, with an end token and a chat template."""
    name = tokenizer.name_or_path
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"tokenizer {name!r} is not a fast one; convert it to tokenizer.json")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer {name!r} has no eos token; set eos_token in its config")
    if not tokenizer.chat_template:
        raise ValueError(f"tokenizer {name!r} has no chat template; add chat_template.jinja")


def check_schemas(tokenizer: Any, tools: Sequence[Mapping[str, Any]]) -> None:
    """Refuse schemas, which may come from a tool server, that contain marks of a conversation.

    A chat template writes them into its own text, where they would become those marks.
    """
    marks = structure_marks(tokenizer).values()
    for tool in tools:
        text = json.dumps(tool, ensure_ascii=False)
        if found := next((each for each in marks if each in text), None):
            name = tool.get("function", tool).get("name")
            raise ValueError(
                f"the description of the tool {name!r} contains {found!r}, which is a mark of this "
                "model's conversations: change the description, or let the environment show the "
                "tools, as plain text: env.kwargs.tools_in_prompt = true"
            )
