"""What a JSON schema requires of a tool's arguments. It is also the process that checks them.

`arguments` imports it, and starts it by path for checks whose time nobody knows beforehand. It
imports nothing of this package, serves one request after the other, and may be killed at any
moment.
"""

from __future__ import annotations

import functools
import json
import resource
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

from jsonschema.exceptions import SchemaError, best_match
from jsonschema.protocols import Validator
from jsonschema.validators import Draft202012Validator, validator_for
from referencing import Registry
from referencing.exceptions import Unresolvable

_MEMORY_BYTES = 2 << 30
_ORPHAN_GRACE_S = 1.0
_MOST_CHARS = 300
_KEYWORDS_OF_UNKNOWN_TIME = frozenset(
    {
        *("$ref", "$dynamicRef", "$recursiveRef"),  # recursion can be exponential
        *("pattern", "patternProperties"),  # so can backtracking
        *("uniqueItems", "unevaluatedItems", "unevaluatedProperties"),  # quadratic
    }
)


def schema_fault(schema: str) -> str:
    """Why a text is not a JSON schema; empty if it is one."""
    try:
        _validator(schema)
    except SchemaError as error:
        return error.message
    except (ValueError, RecursionError) as error:
        return str(error) or type(error).__name__
    return ""


def arguments_fault(schema: str, arguments: Any) -> str:
    """What is wrong with arguments, for the model to read; empty if nothing is."""
    try:
        error = best_match(_validator(schema).iter_errors(arguments))
    except (RecursionError, Unresolvable) as failure:
        return f"the arguments cannot be checked: {type(failure).__name__}"
    if error is None:
        return ""
    message = error.message
    if len(message) > _MOST_CHARS:
        message = f"{message[:_MOST_CHARS]}..."
    return f"{error.json_path[2:]}: {message}" if len(error.path) else message


def takes_known_time(schema: Any) -> bool:
    """Whether checks take time in proportion to the sizes of schema and arguments at most."""
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            if not _KEYWORDS_OF_UNKNOWN_TIME.isdisjoint(part):
                return False
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part
    return True


@functools.lru_cache(maxsize=256)  # every episode has its own tools, with the same schemas
def _validator(schema: str) -> Validator:
    """The validator of a JSON schema. Checking a schema takes ten times as long as an episode."""
    parsed = json.loads(schema)
    kind = validator_for(parsed, default=Draft202012Validator)
    kind.check_schema(parsed)
    return kind(parsed, registry=Registry())


def _serve(requests: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    requests.send_bytes(b'"ready"')
    while True:
        try:
            schema, arguments, deadline_s = json.loads(requests.recv_bytes())
        except EOFError:
            return
        # The caller kills this process at the deadline. If the caller is gone, the kernel does.
        signal.setitimer(signal.ITIMER_REAL, deadline_s + _ORPHAN_GRACE_S)
        fault = schema_fault(schema) if arguments is None else arguments_fault(schema, arguments)
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        requests.send_bytes(json.dumps(fault).encode())


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
