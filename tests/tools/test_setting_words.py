"""Settings of an environment mean the same to a check as to a run."""

import pytest

from tir_alp.run.command_line import split_words
from tir_alp.tools.setting_words import read_section

WORDS = [
    ["--env.kwargs.max_turns", "3"],
    ["--env.kwargs.name=x=y", "--env.kwargs.path", "a/b"],
    ["--env.kwargs.tools", '["python", "search"]', "--env.kwargs.empty", ""],
    ["--env.kwargs.sandbox.limits.wall_s", "5.5", "--env.kwargs.sandbox.preload", "[]"],
    ["--env.kwargs", '{"a": {"b": 1}}', "--env.kwargs.a.c", "true", "--env.kwargs.d", "null"],
    ["--env.kwargs.a.b", "1", "--env.kwargs.a", '{c = 2, "d.e" = 3}'],
    ["--env.kwargs.a", "1", "--env.kwargs.a.b", "2"],
    ["--env.kwargs.a.b", "2", "--env.kwargs.a", "1"],
    ["--env.kwargs.x", "one\ntwo", "--env.kwargs.y", "-3", "--env.kwargs.z", "2026-01-02"],
]


@pytest.mark.parametrize("words", WORDS)
def test_words_mean_what_they_mean_to_a_run(words):
    found, others = read_section(["check", *words, "id"], "env.kwargs")
    assert found == split_words(words, ()).values["env"]["kwargs"]
    assert others == ["check", "id"]


def test_other_words_are_left():
    words = ["--env.kwargsx", "1", "--env.id", "x", "env.kwargs.y"]
    assert read_section(words, "env.kwargs") == ({}, words)


@pytest.mark.parametrize("words", [["--env.kwargs.a"], ["--env.kwargs.a", "--b"], ["--env.kwargs"]])
def test_a_setting_without_a_value_is_refused(words):
    with pytest.raises(ValueError, match=r"--env\.kwargs(\.a)? needs a value"):
        read_section(words, "env.kwargs")
