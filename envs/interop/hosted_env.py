"""A Gymnasium environment that plays the episodes of another library, in a process of its own.

Registered as `Gem-v0`, `SkyRLGym-v0`, `OpenEnv-v0`, `Verifiers-v0`, and as `Hosted-v0` for any
`gymnasium` environment of texts whose packages cannot be installed in this interpreter. All
environments of a process with the same library and interpreter share one host, which lives as long
as this process. A host that died or was killed is replaced when the next environment is made.

Every failure of a library is an `infra_error`: the episode is truncated, and its reward of 0 is
meaningless.
"""

from __future__ import annotations

import copy
import hashlib
import math
import os
import threading
from collections.abc import Mapping
from typing import Any, ClassVar

import gymnasium
from gymnasium.error import ResetNeeded

from tir_alp.envs.interop.host_process import HostError, HostProcess, LibraryError
from tir_alp.envs.interop.libraries import LIBRARIES, find_python
from tir_alp.envs.spaces import TextSpace
from tir_alp.envs.tool_env import StepInfo
from tir_alp.envs.transcript import METADATA, Transcript
from tir_alp.tools.outcome import Outcome


class HostedEnv(gymnasium.Env[str, str]):
    """One environment of another library.

    The seed of an episode is the task's `seed`; without one, it is derived from the `task_id`. All
    episodes of a group therefore play the same game, if the library draws by the seed alone.

    Args:
        library: Name of the library, a key of `LIBRARIES`.
        name: Name of its environment; for OpenEnv, the address of a server.
        settings: Settings for the library; `docs/interop.md` lists them.
        instruction: Text before the first observation, to describe what the model may do.
        python: Interpreter that has the library; None: see `find_python`.
        start_timeout_s: Seconds to import the library, and seconds for each reset.
        step_timeout_s: Seconds for each step.
        render_mode: "ansi" if `render` is to return the text of the episode; None if not.

    Raises:
        ValueError: The library is not installed, or has no environment of that name.
        HostError: The library's process does not start.
    """

    metadata: ClassVar[dict[str, Any]] = METADATA

    def __init__(
        self,
        *,
        library: str,
        name: str,
        settings: Mapping[str, Any] | None = None,
        instruction: str = "",
        python: str | None = None,
        start_timeout_s: float = 120.0,
        step_timeout_s: float = 60.0,
        render_mode: str | None = None,
    ):
        self.render_mode = render_mode
        self._transcript = Transcript(render_mode)
        self.observation_space = TextSpace()
        self.action_space = TextSpace()
        self._library = library
        self._instruction = instruction
        self._start_timeout_s = start_timeout_s
        self._step_timeout_s = step_timeout_s
        self._is_under_way = False
        self._name = name
        self._settings = dict(settings or {})
        self._python = python
        self._open()

    def _open(self) -> None:
        python = find_python(self._library, self._python)
        self._host = _shared_host(python, self._library, self._start_timeout_s)
        try:
            self._number: int | None = self._host.ask(
                "open", self._start_timeout_s, name=self._name, settings=self._settings
            )
        except LibraryError as error:
            raise ValueError(f"{self._library} cannot make {self._name!r}: {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        if self._is_under_way:
            raise TypeError(
                f"{self._name!r} cannot be pickled in an episode, whose state is in a process of "
                f"{self._library}: pickle it before reset() or after the episode's end"
            )
        return {name: each for name, each in self.__dict__.items() if name != "_host"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        is_closed = self._number is None
        self._open()
        if is_closed:
            self.close()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Begin an episode.

        Args:
            seed: Seed from which the library's seed is drawn if there is no task.
            options: `{"task": {...}}` sets the task.

        Returns:
            The first observation, and `{"task": {...}, "library_seed": ...}`.

        Raises:
            HostError: The process has ended, or did not answer in time.
            LibraryError: The library refuses the task.
        """
        super().reset(seed=seed)
        self._is_under_way = False
        task = dict((options or {}).get("task") or {})
        library_seed = _seed(task) if task else int(self.np_random.integers(2**31))
        text = self._host.ask(
            "reset", self._start_timeout_s, env=self._number, seed=library_seed, task=task
        )
        self._is_under_way = True
        prompt = f"{self._instruction}\n\n{text}" if self._instruction else text
        self._transcript.begin(prompt)
        return prompt, {"task": copy.deepcopy(task), "library_seed": library_seed}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Play one turn of the model.

        The info has the fields of `StepInfo`, and the library's own info as `library_info`.
        """
        if not self._is_under_way:
            raise ResetNeeded("no episode is under way: call reset() before step()")
        try:
            answer = self._host.ask("step", self._step_timeout_s, env=self._number, action=action)
        except (HostError, LibraryError) as error:
            return self._broken(str(error))
        if not math.isfinite(answer["reward"]):
            return self._broken(f"{self._library} returned a reward of {answer['reward']}")
        terminated = answer["terminated"]
        # Some libraries set both if a limit ends the last turn; that counts as terminated.
        truncated = answer["truncated"] and not terminated
        self._is_under_way = not (terminated or truncated)
        info = StepInfo(
            outcome=Outcome(answer.get("outcome", Outcome.OK)).value,
            tool_calls=answer.get("tool_calls", 0),
        )
        info = {**info.to_dict(), "library_info": answer["info"]}
        self._transcript.add(action, answer["observation"])
        return answer["observation"], answer["reward"], terminated, truncated, info

    def _broken(self, error: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self._is_under_way = False
        info = StepInfo(outcome=Outcome.INFRA_ERROR.value, error=error)
        return "", 0.0, False, True, {**info.to_dict(), "library_info": {}}

    def render(self) -> str | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the episode so far as text, if `render_mode` is "ansi"."""
        return self._transcript.render()

    def run_report(self) -> dict[str, Any]:
        """Report the version of the library."""
        return {"libraries": {self._library: self._host.version}, "warnings": []}

    def close(self) -> None:
        """Free the library's environment; its process stays for the next one."""
        number, self._number = self._number, None
        self._is_under_way = False
        if number is not None and self._host.is_alive:
            try:
                self._host.ask("close", self._step_timeout_s, env=number)
            except (HostError, LibraryError):
                return  # a failure after the last turn loses nothing


def _seed(task: Mapping[str, Any]) -> int:
    seed = task.get("seed")
    if seed is not None:
        return int(seed)
    name = str(task.get("task_id", "")).encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(name, digest_size=4).digest()) >> 1


_hosts: dict[tuple[str, ...], HostProcess] = {}
_lock = threading.Lock()


def _shared_host(python: str, library: str, start_timeout_s: float) -> HostProcess:
    """Return the live process of a library and interpreter; start one if there is none."""
    key = (python, library)
    with _lock:
        host = _hosts.get(key)
        if host is None or not host.is_alive:
            module = LIBRARIES[library].module
            host = _hosts[key] = HostProcess([python], module, start_timeout_s)
        return host


def _forget_hosts() -> None:
    global _lock
    _lock = threading.Lock()
    _hosts.clear()


os.register_at_fork(after_in_child=_forget_hosts)  # the pipes are the parent's
