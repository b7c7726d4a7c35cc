"""Finds an entry of a table by its name, or by `module:NAME` in a module outside the package."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import TypeVar

T = TypeVar("T")


def find(name: str, table: Mapping[str, T], kind: type[T]) -> T:
    """Return the entry called `name`.

    Args:
        name: A key of the table, or `module:NAME` for an attribute of an importable module.
        table: The entries that come with the package.
        kind: The class of an entry; its name stands in errors.

    Raises:
        ValueError: If there is no such entry.
    """
    if ":" in name:
        return find_outside(name, kind)
    if name not in table:
        raise ValueError(no_such(kind.__name__.lower(), name, table))
    return table[name]


def find_outside(name: str, kind: type[T]) -> T:
    """Return the attribute that `module:NAME` names.

    Raises:
        ValueError: If the module or the attribute does not exist, or is not a `kind`.
    """
    path, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in (*path.split("."), attribute)):
        raise ValueError(f"{name!r} is not of the form module:NAME")
    try:
        module = import_module(path)
    except ImportError as error:
        raise ValueError(f"cannot import the module {path!r} of {name!r}: {error}") from error
    if not hasattr(module, attribute):
        raise ValueError(f"the module {path!r} has no attribute {attribute!r}")
    found = getattr(module, attribute)
    if not isinstance(found, kind):
        raise ValueError(f"{name} is of type {type(found).__name__}, not {kind.__name__}")
    return found


def no_such(kind: str, name: str, names: Iterable[str]) -> str:
    """Return the error message for an unknown name; it lists the names and the closest one."""
    names = [*names]
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"no {kind} {name!r}; there are {', '.join(names)}{hint}"
