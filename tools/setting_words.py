"""Reads settings from the words of a command line: `--dotted.key VALUE`. Pure."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from typing import Any


def literal(text: str) -> Any:
    """Read JSON, else TOML, else take the text as it is."""
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return tomllib.loads(f"value = {text}")["value"] if "\n" not in text else text
    except tomllib.TOMLDecodeError:
        return text


def read_section(words: Sequence[str], section: str) -> tuple[dict[str, Any], list[str]]:
    """Read the settings of one section, whose keys are free.

    Args:
        words: Words of a command line. A setting is `--SECTION.KEY VALUE` or `--SECTION.KEY=VALUE`,
            where a key with dots is that of an object within, or `--SECTION VALUE` with a whole
            object as JSON or TOML.
        section: Name of the section, e.g. `env.kwargs`.

    Returns:
        The settings, and the other words.

    Raises:
        ValueError: A setting has no value, or the section is no object.
    """
    found: dict[str, Any] = {}
    others: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        key, has_value, text = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not f"{key}.".startswith(f"{section}."):
            others.append(word)
            continue
        if not has_value:
            if not rest or rest[0].startswith("--"):
                raise ValueError(f"--{key} needs a value")
            text = rest.pop(0)
        value, names = literal(text), key.removeprefix(section).split(".")[1:]
        if not names and not isinstance(value, dict):
            raise ValueError(f"--{section} is {text!r:.60}; it must be an object, as JSON or TOML")
        _put(found, names, value)
    return found, others


def _put(values: dict[str, Any], names: Sequence[str], value: Any) -> None:
    """Set what nested names name; an object leaves what is under other names."""
    above = names if isinstance(value, dict) else names[:-1]
    for name in above:
        inner = values.get(name)
        values[name] = inner if isinstance(inner, dict) else {}
        values = values[name]
    if isinstance(value, dict):
        for name, inner in value.items():
            _put(values, [name], inner)
    else:
        values[names[-1]] = value
