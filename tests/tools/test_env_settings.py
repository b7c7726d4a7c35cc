"""The settings of an environment are told from the signature of what makes it."""

from typing import Any, TypedDict, Unpack

import pytest

from tir_alp.tools.env_settings import accepted_settings, settings_mistake


class Shared(TypedDict, total=False):
    level: int


class Base:
    def __init__(self, size: int = 3, ratio: float = 0.5) -> None: ...


class Passing(Base):
    def __init__(self, *, name: str = "", **rest: Any) -> None: ...


class Sharing(Base):
    def __init__(self, *, name: str = "", **rest: Unpack[Shared]) -> None: ...


class Silent(Base):
    pass


def make(flag: bool = False) -> Base:
    return Base()


def make_any(**settings: Any) -> Base:
    return Base()


@pytest.mark.parametrize(
    ("creator", "names"),
    [
        (Base, {"size", "ratio"}),
        (Passing, {"name", "size", "ratio"}),
        (Sharing, {"name", "level"}),
        (Silent, {"size", "ratio"}),
        (make, {"flag"}),
    ],
)
def test_accepted_settings(creator, names):
    assert set(accepted_settings(creator) or ()) == names


@pytest.mark.parametrize(
    ("creator", "given", "words"),
    [
        (Base, {"sise": 3}, "env.kwargs.sise: there is no such setting. Did you mean size?"),
        (Sharing, {"level": "high"}, "env.kwargs.level: it must be of type int (it is 'high')"),
        (Base, {"size": True}, "must be of type int"),
        (Base, {"size": 2, "ratio": 1}, ""),
        (make_any, {"anything": 1}, ""),
    ],
)
def test_mistakes(creator, given, words):
    message = settings_mistake(creator, given)
    assert words in message and bool(words) == bool(message)
