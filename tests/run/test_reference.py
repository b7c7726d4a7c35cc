"""The generated page of all settings is the config as it is, and its examples are accepted."""

import shlex
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from tir_alp.config import Config, SFTConfig
from tir_alp.run.command_line import split_words
from tir_alp.run.reference import configuration_page, words_of
from tir_alp.run.settings import settings

PAGE = Path(__file__).parents[2] / "docs/configuration.md"


def test_the_page_is_what_the_config_says():
    """If not: `python -m tir_alp.run.reference > docs/configuration.md`."""
    assert PAGE.read_text() == configuration_page()


@pytest.mark.parametrize("root", [Config, SFTConfig])
def test_every_example_is_accepted(root):
    found = settings(root)
    for setting in found:
        value = split_words(shlex.split(words_of(setting)), (), root=root).values
        for name in setting.key.split("."):
            value = value[name]
        TypeAdapter(setting.annotation).validate_python(value)
    assert len(found) > 80
