"""Are the arguments of a call what a tool's JSON schema asks for?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jsonschema.exceptions import SchemaError, best_match
from jsonschema.validators import Draft202012Validator, validator_for
from referencing import Registry
from referencing.exceptions import Unresolvable

_MOST_CHARS = 300


class ArgumentCheck:
    """Checks arguments by a schema, which is read once.

    Args:
        name: Of the tool, for errors.
        schema: JSON schema of an object, of the draft that it names, else 2020-12. Nothing is
            fetched for a `$ref`.

    Raises:
        ValueError: The schema is none.
    """

    def __init__(self, name: str, schema: Mapping[str, Any]) -> None:
        kind = validator_for(schema, default=Draft202012Validator)
        try:
            kind.check_schema(dict(schema))
        except SchemaError as error:
            raise ValueError(
                f"the parameters of the tool {name!r} are no JSON schema: {error.message}"
            ) from error
        self._validator = kind(schema, registry=Registry())

    def error(self, arguments: Mapping[str, Any]) -> str:
        """Say what is wrong, for the model to read; empty where nothing is.

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
