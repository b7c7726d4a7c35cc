"""Arguments are checked against schemas from outside, and no check takes longer than its time."""

import json
import os
import pickle
import threading
import time

import pytest

from tir_alp.tools import arguments
from tir_alp.tools.arguments import ArgumentCheck


def nested(opening, closing, depth):
    return json.loads(opening * depth + "{}" + closing * depth)


DOUBLED = {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(60)}
TREE = {"anyOf": [{"properties": {"x": {"$ref": "#/$defs/n"}}, "required": ["x"]}] * 2}
SLOW = {
    "pattern": ({"properties": {"a": {"pattern": "^(a+)+$"}}}, {"a": "a" * 50 + "b"}),
    "patternProperties": ({"patternProperties": {"^(a|a)*$": True}}, {"a" * 50 + "b": 1}),
    "propertyNames": ({"propertyNames": {"pattern": "(.*)*x$"}}, {"a" * 50: 1}),
    "additionalProperties": (
        {"patternProperties": {"(a*)*b": {}}, "additionalProperties": False},
        {"a" * 50: 1},
    ),
    "uniqueItems": (
        {"properties": {"a": {"uniqueItems": True}}},
        {"a": [{"i": n} for n in range(20_000)]},
    ),
    "doubled $ref": (
        {"$defs": {**DOUBLED, "d60": {"type": "object"}}, "$ref": "#/$defs/d0"},
        {"a": 1},
    ),
    "recursive $ref": ({"$defs": {"n": TREE}, "$ref": "#/$defs/n"}, nested('{"x":', "}", 60)),
    "unevaluatedProperties": (
        {
            "$defs": {**DOUBLED, "d60": {}},
            "unevaluatedProperties": False,
            "$ref": "#/$defs/d0",
        },
        {"a": 1},
    ),
    "many alternatives": (
        {"additionalProperties": {"items": {"anyOf": [{"enum": [n]} for n in range(5000)]}}},
        {"a": list(range(5000, 15_000))},
    ),
}


@pytest.mark.parametrize("kind", SLOW)
def test_a_check_ends_at_its_deadline(kind):
    schema, value = SLOW[kind]
    check = ArgumentCheck("t", schema, deadline_s=0.4)
    began = time.monotonic()
    assert check.error(value) == "the arguments cannot be checked: that takes more than 0.4 s"
    assert time.monotonic() - began < 10.0


def test_the_next_check_is_made_by_a_new_process():
    schema, value = SLOW["pattern"]
    check = ArgumentCheck("t", schema, deadline_s=5.0)
    assert check.error({"a": "aa"}) == ""
    assert "cannot be checked" in ArgumentCheck("t", schema, deadline_s=0.3).error(value)
    assert check.error({"a": "b"}) == "a: 'b' does not match '^(a+)+$'"


def test_a_slow_check_delays_no_other_thread():
    schema, value = SLOW["pattern"]
    slow = ArgumentCheck("t", schema, deadline_s=5.0)
    quick = ArgumentCheck("t", {"$ref": "#/$defs/a", "$defs": {"a": {"required": ["x"]}}})
    thread = threading.Thread(target=slow.error, args=(value,))
    thread.start()
    began = time.monotonic()
    assert quick.error({}) == "'x' is a required property"
    assert thread.is_alive() and time.monotonic() - began < 4.0
    thread.join()


@pytest.mark.parametrize(
    ("schema", "value", "error"),
    [
        ({"pattern": 1}, {}, None),
        ({"properties": {"pattern": {"type": "string"}}}, {"pattern": 1}, "pattern: 1 is not of"),
        ({"$ref": "#"}, {"a": 1}, "the arguments cannot be checked: RecursionError"),
        ({"$ref": "#/nowhere"}, {"a": 1}, "the arguments cannot be checked: _Wrapped"),
        ({"properties": {"a": {"pattern": "^x"}}}, {"a": "\ud800"}, "a: '\\ud800' does not match"),
        ({"properties": {"a": {"uniqueItems": True}}}, {"a": [1, True, "1"]}, ""),
        ({"type": "object"}, nested('{"x":', "}", 900), ""),
    ],
)
def test_the_answer_does_not_depend_on_where_the_check_is_made(schema, value, error):
    if error is None:
        with pytest.raises(ValueError, match="not a JSON schema"):
            ArgumentCheck("t", schema)
        return
    found = ArgumentCheck("t", schema).error(value)
    assert found.startswith(error) if error else found == ""


def test_a_schema_that_is_too_large_or_too_deep_is_refused():
    with pytest.raises(ValueError, match="it has 2000019 characters, and at most 1000000"):
        ArgumentCheck("t", {"description": "x" * 2_000_000})
    with pytest.raises(ValueError, match="not a JSON schema: maximum recursion depth"):
        ArgumentCheck("t", nested('{"not":', "}", 300))
    with pytest.raises(ValueError, match="not a JSON schema: maximum recursion depth"):
        ArgumentCheck("t", {"pattern": "(" * 3000 + "a" + ")" * 3000})
    large = {"properties": {f"p{n}": {"type": "string", "enum": ["a"]} for n in range(8000)}}
    with pytest.raises(ValueError, match=r"it cannot be checked: that takes more than 0\.2 s"):
        ArgumentCheck("t", large, schema_deadline_s=0.2)


def test_a_process_that_was_killed_is_replaced():
    check = ArgumentCheck("t", {"properties": {"a": {"pattern": "^x"}}})
    assert check.error({"a": "x"}) == ""
    process = arguments._processes()._slots.queue[-1]
    assert process is not None
    process._process.kill()
    process._process.wait()
    assert check.error({"a": "x"}) == ""


def test_a_check_can_be_pickled_and_used_in_a_forked_process():
    check = ArgumentCheck("t", {"properties": {"a": {"pattern": "^x"}}})
    assert check.error({"a": "y"})
    copy = pickle.loads(pickle.dumps(check))
    assert copy.error({"a": "y"}) == check.error({"a": "y"})
    pid = os.fork()
    if pid == 0:
        os._exit(0 if check.error({"a": "y"}) and len(arguments._by_process) == 2 else 1)
    assert os.waitpid(pid, 0)[1] == 0
