"""Adapts OpenEnv, the package `openenv`: a client of the server at the address NAME.

An OpenEnv environment defines the fields of its actions and observations. Settings select the ones
that hold text:

* `action_field`: the field that receives the model's text. None: the text itself must be the
  action, as a JSON object, alone or in the last block between fences.
* `action`: further fields of every action.
* `observation_field`: the field to show. None: all fields except metadata, as JSON.
* `reset`: further arguments of every reset.
* `send_task`: whether every reset receives the `task`.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import json
import re
from importlib.metadata import version as package_version
from typing import Any

from openenv.core import GenericEnvClient

_FENCED = re.compile(r"^```(?:json)?[ \t]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_PATIENT = 1e6  # the caller has a deadline, and ends this process


def version() -> str:
    """Return the installed version."""
    return package_version("openenv")


class Environment:
    """One session at an OpenEnv server."""

    def __init__(self, name: str, settings: dict[str, Any]) -> None:
        known = {"action_field", "action", "observation_field", "reset", "send_task"}
        if unknown := settings.keys() - known:
            raise ValueError(f"settings of OpenEnv are {sorted(known)}, not {sorted(unknown)}")
        self._action_field = settings.get("action_field")
        self._action = settings.get("action", {})
        self._observation_field = settings.get("observation_field")
        self._reset = settings.get("reset", {})
        self._send_task = settings.get("send_task", False)
        self._client = GenericEnvClient(base_url=name, message_timeout_s=_PATIENT).sync()

    def reset(self, seed: int, task: dict[str, Any]) -> str:
        """Begin an episode, by the seed."""
        sent = {"task": task} if self._send_task and task else {}
        return self._text(self._client.reset(seed=seed, **self._reset, **sent))

    def step(self, action: str) -> dict[str, Any]:
        """Play one turn. A text that is not an action gets an error message and makes no step."""
        if self._action_field is not None:
            fields = {self._action_field: action}
        else:
            fields, complaint = _parse(action)
            if fields is None:
                return {
                    "observation": complaint,
                    "reward": 0.0,
                    "terminated": False,
                    "truncated": False,
                    "outcome": "tool_error",
                    "info": {},
                }
        result = self._client.step({**self._action, **fields})
        truncated = bool(
            result.observation.get("truncated")
        )  # set by tir_alp's own server; OpenEnv has no such field
        return {
            "observation": self._text(result),
            "reward": float(result.reward or 0.0),
            "terminated": bool(result.done) and not truncated,
            "truncated": truncated,
            "info": dict(result.observation),
        }

    def close(self) -> None:
        """End the session."""
        self._client.close()

    def _text(self, result: Any) -> str:
        shown = dict(result.observation)
        if self._observation_field is not None:
            if self._observation_field not in shown:
                raise ValueError(
                    f"the observation has no field {self._observation_field!r}: set "
                    f"settings.observation_field to one of {sorted(shown)}"
                )
            return str(shown[self._observation_field])
        for field in ("metadata", "done", "reward"):
            shown.pop(field, None)
        return json.dumps(shown, ensure_ascii=False)


def _parse(text: str) -> tuple[dict[str, Any] | None, str]:
    """Return the action in a text and "", or None and a message about the fault."""
    blocks = _FENCED.findall(text)
    try:
        action = json.loads(blocks[-1] if blocks else text)
    except (ValueError, RecursionError) as error:
        return None, f"[an action is a JSON object: {error}]"
    if not isinstance(action, dict):
        return None, "[an action is a JSON object]"
    return action, ""
