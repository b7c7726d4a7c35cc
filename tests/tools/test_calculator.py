from fractions import Fraction

import pytest

from tir_alp.tools.arguments import ArgumentCheck
from tir_alp.tools.base import NoSession
from tir_alp.tools.calculator import CalculatorTool, evaluate
from tir_alp.tools.outcome import Outcome


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        ("6*7", "42"),
        ("-(2 - 5)", "3"),
        ("1/3 + 1/6", "1/2 = 0.5"),
        ("0.1 + 0.2", "3/10 = 0.3"),
        ("7 // 2 + 7 % 2", "4"),
        ("2**-2", "1/4 = 0.25"),
        (" 2**100 ", str(2**100)),
    ],
)
def test_it_is_exact(expression, text):
    result = CalculatorTool().run({"expression": expression}, NoSession())
    assert (result.outcome, result.text) == (Outcome.OK, text)


@pytest.mark.parametrize(
    "expression",
    [
        *("", "x", "1 +", "9**9**9", "1/0", "True", "'a'*3", "f(1)", "(" * 999, "-" * 999 + "1"),
        *("1" * 1001, "2**0.5", "1e999999999", "[1]", "1; 2", "\ud800", "10**1200 * 10**1200"),
    ],
)
def test_what_it_cannot_do_is_an_error_that_is_told(expression):
    result = CalculatorTool().run({"expression": expression}, NoSession())
    assert result.outcome is Outcome.TOOL_ERROR
    assert result.text.startswith("Error: ") and len(result.text) < 400


def test_a_value_is_a_fraction():
    assert evaluate("1/3") == Fraction(1, 3)


SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}, "of": {"$ref": "#/$defs/text"}},
    "$defs": {"text": {"type": "string"}},
    "required": ["n"],
}


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"n": 1, "of": "x"}, ""),
        ({}, "'n' is a required property"),
        ({"n": "x"}, "n: 'x' is not of type 'integer'"),
        ({"n": 1, "of": [2]}, "of: [2] is not of type 'string'"),
    ],
)
def test_arguments_are_checked_by_the_schema(arguments, error):
    assert ArgumentCheck("t", SCHEMA).error(arguments) == error


def test_errors_stay_short_and_nothing_is_fetched():
    assert len(ArgumentCheck("t", SCHEMA).error({"n": "x" * 10_000})) < 400
    remote = {"properties": {"a": {"$ref": "http://example.invalid/s.json"}}}
    assert "cannot be checked" in ArgumentCheck("t", remote).error({"a": 1})


def test_a_schema_that_is_none_is_refused():
    with pytest.raises(ValueError, match="the parameters of the tool 't' are not a JSON schema"):
        ArgumentCheck("t", {"type": "objekt"})
