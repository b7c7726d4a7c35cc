"""Which settings an environment takes, by the signature of what makes it. Pure."""

from __future__ import annotations

import difflib
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

_PLAIN = (bool, int, float, str)
_OPEN = inspect.Parameter.VAR_KEYWORD
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def settings_mistake(creator: Callable[..., Any], given: Mapping[str, Any]) -> str:
    """Say which key an environment does not take, or which value has the wrong type.

    Args:
        creator: The class of the environment, or a function that makes it.
        given: The settings.

    Returns:
        A sentence that begins with the key; empty if nothing is wrong as far as can be told.
    """
    accepted = accepted_settings(creator)
    if accepted is None:
        return ""
    for key, value in given.items():
        if key not in accepted:
            near = difflib.get_close_matches(key, accepted, 1)
            hint = f"Did you mean {near[0]}? " if near else ""
            return f"env.kwargs.{key}: there is no such setting. {hint}It takes {_listed(accepted)}"
        wanted = accepted[key]
        is_wrong = wanted in _PLAIN and not isinstance(value, wanted)
        is_wrong = is_wrong and not (wanted is float and isinstance(value, int))
        is_wrong = is_wrong or (wanted in (int, float) and isinstance(value, bool))
        if is_wrong:
            return f"env.kwargs.{key}: it must be of type {wanted.__name__} (it is {value!r:.100})"
    return ""


def accepted_settings(creator: Callable[..., Any]) -> dict[str, Any] | None:
    """Return the settings that a class or function takes, with their types.

    What a class passes on with `**settings` is looked up in `Unpack[...]` if it says so, else in
    the class above it. None: it takes any setting.
    """
    found: dict[str, Any] = {}
    for function in _functions(creator):
        try:
            signature = inspect.signature(function)
            hints = typing.get_type_hints(function)
        except (ValueError, TypeError, NameError, AttributeError):
            return None
        rest = None
        for name, parameter in signature.parameters.items():
            if name != "self" and parameter.kind in _NAMED:
                found.setdefault(name, hints.get(name))
            elif parameter.kind is _OPEN:
                rest = hints.get(name, Any)
        if rest is None:
            return found
        if typing.get_origin(rest) is typing.Unpack:
            (table,) = typing.get_args(rest)
            return found | {key: found.get(key, kind) for key, kind in _typed(table).items()}
    return None


def _functions(creator: Callable[..., Any]) -> list[Callable[..., Any]]:
    if not isinstance(creator, type):
        return [creator]
    own = (vars(each).get("__init__") for each in creator.__mro__ if each is not object)
    return [each for each in own if each is not None]


def _typed(table: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(table)
    except NameError:
        return dict.fromkeys(getattr(table, "__annotations__", {}))


def _listed(accepted: Mapping[str, Any]) -> str:
    return ", ".join(sorted(accepted)) if accepted else "none"
