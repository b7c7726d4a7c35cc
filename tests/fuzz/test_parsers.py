"""A short run; `python -m tests.fuzz.parsers` is the long one."""

import pytest

from tests.fuzz.parsers import fuzz
from tir_alp.envs.parsing import parse_action
from tir_alp.tools.calls import BadCall, CallFormat, ToolCall


def test_adversarial_texts_break_no_parser():
    seen = fuzz(num_texts=1000, num_megabytes=3)
    assert seen["texts"] >= 1000
    for kind in ("Answer", "NoneType", ToolCall.__name__, BadCall.__name__, "scored"):
        assert seen[kind], f"no text was read as {kind}: the texts have become too tame"


def test_the_fuzzer_finds_a_broken_parser(monkeypatch):
    def careless(text: str, call_format: CallFormat = "fenced"):
        if "\ud800" in text:
            raise LookupError("a lone surrogate")
        return parse_action(text, call_format)

    monkeypatch.setattr("tests.fuzz.parsers.parse_action", careless)
    with pytest.raises(LookupError):
        fuzz(num_texts=300, num_megabytes=1)
