"""Checks the arguments of a call against a tool's JSON schema."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

from jsonschema.exceptions import SchemaError, best_match
from jsonschema.protocols import Validator
from jsonschema.validators import Draft202012Validator, validator_for
from referencing import Registry
from referencing.exceptions import Unresolvable

_MOST_CHARS = 300


class ArgumentCheck:
    """Checks arguments against a schema, which is read once.

    Args:
        name: Name of the tool, for error messages.
        schema: JSON schema of an object, in the draft that it names or else 2020-12. Nothing is
            fetched for a `$ref`.

    Raises:
        ValueError: It is not a JSON schema.
    """

    def __init__(self, name: str, schema: Mapping[str, Any]) -> None:
        try:
            self._validator = _validator(json.dumps(dict(schema)))
        except (SchemaError, TypeError) as error:
            reason = error.message if isinstance(error, SchemaError) else error
            raise ValueError(
                f"the parameters of the tool {name!r} are not a JSON schema: {reason}"
            ) from error

    def error(self, arguments: Mapping[str, Any]) -> str:
        """Describe what is wrong, for the model to read; empty if nothing is.

        Example: `"'code' is a required property"`.
        """
        try:
            error = best_match(self._validator.iter_errors(arguments))
        except (RecursionError, Unresolvable) as failure:
            return f"the arguments cannot be checked: {type(failure).__name__}"
        if error is None:
            return ""
        message = error.message
        if len(message) > _MOST_CHARS:
            message = f"{message[:_MOST_CHARS]}..."
        return f"{error.json_path[2:]}: {message}" if len(error.path) else message


@functools.lru_cache(maxsize=256)  # every episode has its own tools, with the same schemas
def _validator(schema: str) -> Validator:
    """The validator of a JSON schema. Checking a schema takes ten times as long as an episode."""
    parsed = json.loads(schema)
    kind = validator_for(parsed, default=Draft202012Validator)
    kind.check_schema(parsed)
    return kind(parsed, registry=Registry())
