"""Every key of the config: its type, its default, what it means, and what it was confused with.

Nothing here needs torch, so that `--help` and the report of a mistake come at once.
"""

from __future__ import annotations

import difflib
import json
import re
import textwrap
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from tir_alp.config import Config

_WIDTH = 100
_KEY_WIDTH = 40
_LONGEST_CHOICES = 24  # characters; more choices are listed in the description


@dataclass(frozen=True, slots=True)
class Setting:
    """One key of the config."""

    key: str
    """Dotted path, such as `rollout.group_size`."""
    annotation: Any
    default: Any
    description: str

    @property
    def is_empty(self) -> bool:
        """Whether the default is nothing: None, or an empty text, list or table."""
        return self.default in (None, "", (), {})


# ------------------------------------------------------------------------------- what can be set


def _flat(annotation: Any) -> Iterator[Any]:
    """The members of unions, without their metadata."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _flat(get_args(annotation)[0])
    elif origin in (Union, types.UnionType):
        for each in get_args(annotation):
            yield from _flat(each)
    else:
        yield annotation


def _sections(annotation: Any) -> list[type[BaseModel]]:
    return [
        each for each in _flat(annotation) if isinstance(each, type) and issubclass(each, BaseModel)
    ]


def item_annotations(annotations: Sequence[Any]) -> list[Any]:
    """What the items of a list may be; empty if the value is not a list."""
    for each in annotations:
        if get_origin(each) in (tuple, list):
            return [item for inner in get_args(each) if inner is not ... for item in _flat(inner)]
    return []


def _sections_of_items(annotations: Sequence[Any]) -> list[type[BaseModel]]:
    return [section for item in item_annotations(annotations) for section in _sections(item)]


def annotations_of(key: str, root: type[BaseModel] = Config) -> list[Any]:
    """The types that a dotted key of a config may have; empty if there is no such key."""
    found: list[Any] = [root]
    for name in key.split("."):
        inner: list[Any] = []
        for each in found:
            if get_origin(each) is dict or each is Any:
                inner.append(Any)
            elif isinstance(each, type) and issubclass(each, BaseModel):
                field = each.model_fields.get(name)
                inner += [] if field is None else _flat(field.annotation)
        found = inner
    return found


def settings(section: type[BaseModel] = Config, prefix: str = "") -> list[Setting]:
    """List every key below a section: first its own, then those of the sections in it."""
    found: dict[str, Setting] = {}
    inner: dict[str, list[type[BaseModel]]] = {}
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        if sections := _sections(field.annotation):
            inner[f"{key}."] = sections
            continue
        default = field.get_default(call_default_factory=True, validated_data={})
        found[key] = Setting(key, field.annotation, default, field.description or "")
    for each, sections in inner.items():
        for one in sections:
            for setting in settings(one, each):
                found.setdefault(setting.key, setting)
    return [*found.values()]


def engine_keys(kind: str) -> set[str]:
    """The keys of the engine section of a type; all keys of all types if it is unknown."""
    sections = _sections(Config.model_fields["engine"].annotation)
    named = [each for each in sections if kind in get_args(each.model_fields["type"].annotation)]
    return {key for each in named or sections for key in each.model_fields}


def kinds_of_engine(key: str) -> list[str]:
    """The types of engines that have a key."""
    sections = _sections(Config.model_fields["engine"].annotation)
    return [
        kind
        for section in sections
        if key in section.model_fields
        for kind in get_args(section.model_fields["type"].annotation)
    ]


def unknown_key(key: str, dashes: str = "", root: type[BaseModel] = Config) -> str:
    """Report an unknown key, with the keys that may have been meant."""
    if key in {each.key for each in settings(root)}:  # of another kind of the same section
        kinds = " or ".join(kinds_of_engine(key.partition(".")[2]))
        return f"{dashes}{key}: there is no such key in an engine of this type, but in {kinds}"
    meant = suggestions(key, root)
    hint = f"; did you mean {' or '.join(dashes + each for each in meant)}?" if meant else ""
    return f"{dashes}{key}: there is no such key{hint}"


def suggestions(key: str, root: type[BaseModel] = Config) -> list[str]:
    """Up to two keys that an unknown one may stand for, by its spelling or by its meaning."""
    if found := re.fullmatch(r"(.+)\.(\d+)\.(\w+)", key):  # of a table in a list: eval.data.0.pat
        tables = _sections_of_items(annotations_of(found[1], root))
        names = {name for each in tables for name in each.model_fields}
        near = difflib.get_close_matches(found[3], names, 1)
        return [f"{found[1]}.{found[2]}.{name}" for name in near]
    every = {each.key: each.description.lower() for each in settings(root)}
    sections = {each.rpartition(".")[0] for each in every} - {""}
    if near := difflib.get_close_matches(key, sections, 1, cutoff=0.9):
        return near
    prefix, _, last = key.rpartition(".")
    near = difflib.get_close_matches(key, every, 2, cutoff=0.8)
    if not near:
        same = [each for each in every if each.rpartition(".")[2] == last]
        near = same[:2] if len(same) <= 2 else []
    if not near:  # by the words of the description: `learning_rate` is `lr`
        words = last.replace("-", "_").lower().split("_")
        near = [each for each, text in every.items() if all(word in text for word in words)]
        near = [each for each in near if each.startswith(f"{prefix}.")] or near
        near = near[:2] if len(near) <= 3 else []
    if not near:
        near = difflib.get_close_matches(key, [*sections, *every], 1, cutoff=0.6)
    return near


# ------------------------------------------------------------------------------------------ help


def help_page(
    usage: str,
    options: Mapping[str, str],
    section: str = "",
    root: type[BaseModel] = Config,
) -> str:
    """Describe a command and its settings.

    Args:
        usage: The lines that show how the command is called, and what it does.
        options: Options that are not settings, with their descriptions.
        section: Only this key, or the settings below it; empty: all of them.
        root: The config that the command reads.

    Raises:
        ValueError: If there is no such section.
    """
    chosen = [
        each
        for each in settings(root)
        if not section or each.key == section or each.key.startswith(f"{section}.")
    ]
    if not chosen:
        raise ValueError(_unknown_section(section, root))
    lines = [] if section else [usage, "", *_entries(options.items())]
    if not section:
        lines += ["", "Settings, on the command line or in the file:"]
    group = None
    for each in chosen:
        name = each.key.rpartition(".")[0]
        if name != group:
            group = name
            lines += ["", f"{name or 'run'}: {about_section(name, root)}"]
        what = f"{each.description} {_default(each)}".strip()
        lines += _entries([(f"--{each.key} {type_name(each.annotation)}", what)])
    return "\n".join(lines)


def _unknown_section(name: str, root: type[BaseModel]) -> str:
    """Report an unknown section, with the one that may have been meant, or with all."""
    keys = [each.key.split(".") for each in settings(root)]
    names = dict.fromkeys(
        ".".join(parts[:depth]) for parts in keys for depth in range(1, len(parts) + 1)
    )
    near = difflib.get_close_matches(name, names, 1)
    sections = ", ".join(dict.fromkeys(each[0] for each in keys if len(each) > 1))
    hint = f"did you mean --help {near[0]}?" if near else f"there are {sections}"
    return f"--help {name}: there is no such section or key; {hint}"


def _entries(pairs: Any) -> Iterator[str]:
    for name, text in pairs:
        head = f"  {name}"
        wrapped = textwrap.wrap(" ".join(text.split()), _WIDTH - _KEY_WIDTH)
        if len(head) >= _KEY_WIDTH:
            yield head
            head = ""
        for line in wrapped or [""]:
            yield f"{head:<{_KEY_WIDTH}}{line}".rstrip()
            head = ""


def about_section(name: str, root: type[BaseModel]) -> str:
    """Return the first sentence about a section; an empty name stands for the whole config."""
    about = [each for each in annotations_of(name, root) if each is not type(None)]
    about = about if name else [root]
    docs = [(each.__doc__ or "").split("\n\n")[0] for each in about]
    return " ".join(docs[0].split())


def choices_of(annotation: Any) -> list[Any]:
    """Return the values that a key of this type can have, if they are listed; else nothing."""
    flat = [*_flat(annotation)]
    return [choice for each in flat if get_origin(each) is Literal for choice in get_args(each)]


def type_name(annotation: Any) -> str:
    """Return the kind of value that a key takes, in a word, as `--help` shows it."""
    names = {int: "INT", float: "NUMBER", bool: "true|false", str: "TEXT", Path: "PATH"}
    flat = [each for each in _flat(annotation) if each is not type(None)]
    if items := item_annotations(flat):
        return f"{type_name(items[0])},..." if len(items) == 1 else "LIST"
    if get_origin(flat[0]) is Literal:
        choices = "|".join(map(str, get_args(flat[0])))
        return choices if len(choices) <= _LONGEST_CHOICES else "NAME"
    return names.get(flat[0], "TABLE")


def word_of(value: Any) -> str:
    """Return a value as a word of the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict) or (isinstance(value, list) and isinstance(value[0], dict)):
        return json.dumps(value)
    return ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def _default(setting: Setting) -> str:
    choices = choices_of(setting.annotation)
    said = ""
    if len("|".join(map(str, choices))) > _LONGEST_CHOICES:
        said = f"One of {', '.join(map(str, choices))}. "
    if setting.default is PydanticUndefined:
        return f"{said}(required)"
    return f"{said}(default: {'none' if setting.is_empty else word_of(setting.default)})"
