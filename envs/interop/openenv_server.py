"""Serves a Gymnasium environment of texts as an OpenEnv server.

It runs in the interpreter that has OpenEnv and not tir_alp; the environment runs in a process of
tir_alp's interpreter, at the other end of a pipe. `python -m tir_alp.envs.interop serve` starts it.

An action is `{"text": ...}`; an observation has `text`, `truncated` and `info`. A reset takes a
`task`, or draws one by the seed. An infrastructure failure is an error of the session, never a
reward of 0.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import json
import sys
from typing import Any

import uvicorn
from fastapi import HTTPException
from host_process import HostProcess, LibraryError
from openenv.core.env_server.http_server import create_fastapi_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, Observation, State
from pydantic import Field

_START_TIMEOUT_S = 120.0
_TIMEOUT_S = 300.0
_INFRASTRUCTURE = ("infra_error", "grader_error", "cancelled")
_NO_EPISODE = (
    "no episode is under way: reset before the first step and after the last one. OpenEnv keeps an "
    "episode only in a session of the WebSocket /ws; each POST has an environment of its own"
)


class TextAction(Action):
    """One turn of a model."""

    text: str = Field(description="What the model wrote")


class TextObservation(Observation):
    """What the model reads next."""

    text: str = Field(default="", description="Observation of the environment")
    truncated: bool = Field(default=False, description="Whether a limit ended the episode")
    info: dict[str, Any] = Field(default_factory=dict, description="Info of the environment")


class TextEnvironment(Environment):
    """One session, with one environment in the process that all sessions share."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self, host: HostProcess, name: str, settings: dict[str, Any]) -> None:
        super().__init__()
        self._host = host
        self._number = host.ask("open", _TIMEOUT_S, name=name, settings=settings)
        self._state = State(step_count=0)
        self._is_under_way = False

    def reset(
        self,
        seed: int | None = None,
        episode_id: str | None = None,
        task: dict[str, Any] | None = None,
        **_: Any,
    ) -> TextObservation:
        """Begin an episode. A task that the environment refuses is a 400."""
        self._is_under_way = False
        try:
            text = self._host.ask("reset", _TIMEOUT_S, env=self._number, seed=seed, task=task)
        except LibraryError as error:
            if task is None:
                raise
            raise HTTPException(400, f"the environment refuses the task: {error}") from error
        self._state = State(episode_id=episode_id, step_count=0)
        self._is_under_way = True
        return TextObservation(text=text)

    def step(self, action: TextAction, timeout_s: float | None = None, **_: Any) -> TextObservation:
        """Play one turn. Without an episode, that is a 409."""
        if not self._is_under_way:
            raise HTTPException(409, _NO_EPISODE)
        answer = self._host.ask(
            "step", timeout_s or _TIMEOUT_S, env=self._number, action=action.text
        )
        self._state.step_count += 1
        self._is_under_way = not (answer["terminated"] or answer["truncated"])
        if answer["info"].get("outcome") in _INFRASTRUCTURE:
            raise RuntimeError(f"{answer['info']['outcome']}: {answer['info'].get('error')}")
        return TextObservation(
            text=answer["observation"],
            truncated=answer["truncated"],
            info=answer["info"],
            reward=answer["reward"],
            done=answer["terminated"] or answer["truncated"],
        )

    @property
    def state(self) -> State:
        """The id of the episode, and its number of steps."""
        return self._state

    def close(self) -> None:
        """Free the environment."""
        if self._host.is_alive:
            self._host.ask("close", _TIMEOUT_S, env=self._number)


def main(settings: dict[str, Any]) -> None:
    """Serve until the process is interrupted."""
    host = HostProcess([settings["python"]], "host_gymnasium", _START_TIMEOUT_S)
    try:
        app = create_fastapi_app(
            lambda: TextEnvironment(host, settings["id"], settings["kwargs"]),
            TextAction,
            TextObservation,
            max_concurrent_envs=settings["max_sessions"],
            env_name=settings["id"].rpartition(":")[2],
        )
        uvicorn.run(app, host=settings["host"], port=settings["port"], log_level="warning")
    finally:
        host.kill()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
