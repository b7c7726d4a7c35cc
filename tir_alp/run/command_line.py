"""Reads a command line into a run's config.

    --config FILE --algorithm NAME --dotted.key VALUE --dotted.key=VALUE --flag

The command line wins over the file, the file over the defaults; of two equal keys the later one
wins. Nothing here needs torch, so that `--help` and the report of a mistake come at once.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_origin

from pydantic import ValidationError

from tir_alp import __version__
from tir_alp.algorithm.section import Section, merge
from tir_alp.config import Config
from tir_alp.models.tiny import SHIPPED
from tir_alp.run.settings import (
    annotations_of,
    engine_keys,
    help_page,
    item_annotations,
    settings,
    unknown_key,
)
from tir_alp.tools.setting_words import literal

_SHORT = {"algorithm": "algorithm.name", "cluster": "cluster.address"}
"""Sections that may be given by one word: a preset's name, a cluster's address."""


@dataclass(frozen=True, slots=True)
class Words:
    """A command line, sorted by what each word is."""

    options: Mapping[str, str]
    """Options of the command itself, without their dashes, such as `config`."""
    values: Mapping[str, Any]
    """Settings as nested mappings, ready to be validated."""


@dataclass(frozen=True, slots=True)
class Command:
    """A command that takes the settings of a run."""

    usage: str
    """How it is called, and what it does."""
    options: Mapping[str, str]
    """Options that are not settings, such as `config FILE`, with their descriptions. One without a
    word for its value takes none."""
    root: type[Section] = Config
    """The config that it reads."""

    def read(self, words: Sequence[str]) -> Words:
        """Sort the words; `--help [SECTION]` and `--version` are answered here.

        Raises:
            SystemExit: After an answer.
            ValueError: For a word that is not understood.
        """
        if "--version" in words:
            print(__version__)
            raise SystemExit(0)
        for word in ("--help", "-h"):
            if word in words:
                after = words[words.index(word) + 1 :]
                section = after[0] if after and not after[0].startswith("-") else ""
                described = {f"--{name}": text for name, text in self.options.items()}
                described["--help [SECTION]"] = "this page, or only one section: --help rollout"
                described["--version"] = "the version of tir_alp"
                print(help_page(self.usage, described, section, self.root))
                raise SystemExit(0)
        flags = [name for name in self.options if " " not in name]
        return split_words(
            words, [name.split()[0] for name in self.options], self.root, flags=flags
        )


def split_words(
    words: Sequence[str],
    options: Sequence[str],
    root: type[Section] = Config,
    flags: Sequence[str] = (),
) -> Words:
    """Sort the words of a command line.

    Args:
        words: As the shell passes them.
        options: Names that are not settings.
        flags: Those of them that take no value; the others take one each.
        root: The config that the settings belong to.

    Raises:
        ValueError: For a word that is neither; the message suggests the key that was meant.
    """
    found: dict[str, str] = {}
    values: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"{word!r} is not expected here: give settings as --dotted.key VALUE")
        key, has_value, text = word.removeprefix("--").partition("=")
        key = _SHORT.get(key, key)
        annotations = [] if key in options else annotations_of(key, root)
        if key not in options and not annotations:
            raise ValueError(unknown_key(key, dashes="--", root=root))
        if key in flags and not has_value:
            text = "true"
        elif not has_value:
            if rest and not rest[0].startswith("--"):
                text = rest.pop(0)
            elif bool in annotations:
                text = "true"
            else:
                raise ValueError(f"--{key} needs a value")
        if key in options:
            found[key] = text
        else:
            _put(values, key, _value(text, annotations), bool(item_annotations(annotations)))
    return Words(found, values)


def read_config(words: Words, default: Path) -> Config:
    """Build a new run's config from a command line and the file that it names, else `default`.

    The default is that of the embedded tiny model, whose limits and bare prompts suit no other: for
    a model that the command line or the file names, the defaults of `Config` hold instead.

    Raises:
        ValueError: With one line for each mistake.
    """
    file = words.options.get("config")
    below = {} if file is None else read_toml(Path(file))
    in_file = _inside(below, "model", "path")
    model = _inside(words.values, "model", "path") or in_file
    if model is None or (in_file is None and model in SHIPPED):
        below = lay_over(below, read_toml(default))
    return overlay(words.values, below)


def _inside(values: Mapping[str, Any], section: str, key: str) -> Any:
    """A key of a section; None where there is none, or the section is no table."""
    found = values.get(section)
    return found.get(key) if isinstance(found, Mapping) else None


def load_config(words: Sequence[str], below: Mapping[str, Any]) -> Config:
    """Build a run's config: defaults, then `below`, then the settings of a command line.

    Where the command line names another environment than `below`, its `env.kwargs` are left out;
    where it names another type of engine, the settings that this type does not have.

    Args:
        words: Settings as `--dotted.key VALUE`.
        below: The contents of a config file.

    Raises:
        ValueError: With one line for each key that is unknown or has a wrong value.
    """
    return overlay(split_words(words, ()).values, below)


def overlay(values: Mapping[str, Any], below: Mapping[str, Any]) -> Config:
    """As `load_config`, for settings that are nested mappings already."""
    below = {"algorithm": Config.model_fields["algorithm"].default.name, **below}
    if isinstance(below["algorithm"], str):
        below["algorithm"] = {"name": below["algorithm"]}
    return parse_config(lay_over(values, below))


def lay_over(values: Mapping[str, Any], below: Mapping[str, Any]) -> dict[str, Any]:
    """Lay settings over those below them, as a command line's over a file's; see `load_config`."""
    below = dict(below)
    named = _inside(values, "env", "id")
    if named is not None and named != _inside(below, "env", "id"):
        below["env"] = {}  # its settings are those of another environment
    kind = _inside(values, "engine", "type")
    if kind is not None and isinstance(below.get("engine"), Mapping):
        known = engine_keys(kind)  # the file's settings for another kind of engine are left out
        below["engine"] = {key: value for key, value in below["engine"].items() if key in known}
    return merge(below, values)


def _put(values: dict[str, Any], key: str, value: Any, is_list: bool) -> None:
    """Set a dotted key of nested mappings; a list that is given twice grows."""
    *sections, last = key.split(".")
    for section in sections:
        inner = values.get(section)
        values[section] = inner if isinstance(inner, dict) else {}
        values = values[section]
    if is_list and isinstance(values.get(last), list) and isinstance(value, list):
        value = values[last] + value
    if isinstance(value, Mapping) and isinstance(values.get(last), Mapping):
        value = merge(values[last], value)
    values[last] = value


def _value(text: str, annotations: Sequence[Any]) -> Any:
    """The value that a word stands for; a wrong one is left to the validation of the config."""
    if text in ("null", "none", "None") and type(None) in annotations:
        return None
    if items := item_annotations(annotations):
        if not text.startswith("["):
            return [_value(each.strip(), items) for each in text.split(",") if each.strip()]
    elif any(each in (str, Path) or get_origin(each) is Literal for each in annotations):
        return text
    return literal(text)


def read_toml(file: Path) -> dict[str, Any]:
    """Read a config file. Raises ValueError if it is not there or not TOML."""
    try:
        return tomllib.loads(file.read_text())
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"cannot read the config {str(file)!r}: {reason}") from error
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{file} is not valid TOML: {error}") from error


def parse_config(values: Mapping[str, Any]) -> Config:
    """Validate the config of a run; see `parse_as`."""
    return parse_as(Config, values)


S = TypeVar("S", bound=Section)


def parse_as(root: type[S], values: Mapping[str, Any]) -> S:
    """Validate a config that is given as nested mappings.

    Raises:
        ValueError: With one line for each mistake, which begins with its key.
    """
    try:
        return root(**values)
    except ValidationError as error:
        raise ValueError("\n".join(_mistake(each, root) for each in error.errors())) from error


def _mistake(mistake: Any, root: type[Section]) -> str:
    """One line about a mistake: the key, what is wrong, and the value if it is not evident."""
    location = mistake["loc"]
    if location[:1] == ("engine",):  # the second entry names the kind of engine that was meant
        location = (location[0], *location[2:])
    key = ".".join(map(str, location))
    message, kind = mistake["msg"].removeprefix("Value error, "), mistake["type"]
    if kind == "extra_forbidden":
        return unknown_key(key, root=root)
    if kind == "value_error":  # the message names the value itself
        return f"{key}: {message}" if key else message
    if kind == "missing":
        about = [each.description for each in settings(root) if each.key == key]
        return ": ".join([key, "a value is required", *about])
    if kind == "union_tag_invalid":
        tag, tags = mistake["ctx"]["tag"], mistake["ctx"]["expected_tags"].replace("'", "")
        return f"{key}.type: there is no {tag!r}; there are {tags}"
    if kind in ("dict_type", "model_type", "model_attributes_type"):
        message = f"it is a section: give its keys one by one, as --{key}.KEY VALUE"
    if kind == "tuple_type":
        message = "it must be a list, in [brackets]"
    return f"{key}: {message} (it is {mistake['input']!r:.100})"
