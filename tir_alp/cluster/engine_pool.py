"""Many engines as one: the protocol `Engine`, over actors.

A sequence goes to the engine that has its earlier turns in its cache, unless others are much less
busy. A request whose engine is lost is made once more, by another one: what it samples is a
function of its tokens and its draws, so that nothing is repeated that anybody has seen.

An engine that cannot take new weights is replaced, and what it still says is not heard.
"""

from __future__ import annotations

import asyncio
import time
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from torch import Tensor

from tir_alp.cluster.packed_weights import pack
from tir_alp.cluster.watched_actor import WatchedActor, wait_for
from tir_alp.config import Config
from tir_alp.engines.base import AskTrainer, Completion, Probe, Sampling
from tir_alp.roles import RoleLost
from tir_alp.rollouts.renderer import Renderer
from tir_alp.run.watchdog import note_host

_PROBE_TOKENS = 256
_PAUSE_S = 0.1
_WORST = {"tensors_compared": min, "probe_difference": max}
_SPILL = 8  # requests by which an engine may be busier than the others before it is passed over


@dataclass(frozen=True, slots=True)
class WeightsRef:
    """Packed weights in the object store: a handle to them, which costs nothing to pass on."""

    ref: Any


class EnginePool:
    """Engines that take the same weights.

    Args:
        config: Of the run.
        path: Folder of the first weights.
        version: Their version.
        renderer: Of the run, whose rule ends completions.
        ask_trainer: What servers are checked against behind new weights.
        make_parts: Makes the places of the engines, given how an actor is started.
    """

    def __init__(
        self,
        config: Config,
        path: str,
        version: int,
        renderer: Renderer,
        ask_trainer: AskTrainer,
        make_parts: Callable[[Callable[[Any], Any]], list[WatchedActor]],
    ) -> None:
        self._config, self._first = config, (path, version, ray.put(renderer))
        self._rule = renderer.stop_matcher
        self.ask_trainer = ask_trainer
        self._recent: tuple[int, ...] = ()  # of the last sequence
        # The newest weights, their version, and what their logprobs are held against.
        self._source: tuple[Any, int, Probe | None] | None = None
        self._running: Counter[WatchedActor] = Counter()
        self.parts = make_parts(self._start)

    async def generate(self, token_ids: tuple[int, ...], sampling: Sampling) -> Completion:
        """As `Engine.generate`. Raises RoleLost if two engines are lost under a request."""
        has_rule = sampling.stop_matcher == self._rule  # the hosts have it: it would be heavy
        if has_rule:
            sampling = replace(sampling, stop_matcher=None)
        request = (token_ids, sampling, has_rule)
        lost: list[RoleLost] = []
        while len(lost) < 2:
            part = await self._choose(sampling.sequence_uid)
            note_host(part.name)
            self._running[part] += 1
            try:
                timeout_s = self._config.rollout.generate_timeout_s
                completion = await part.call("generate", *request, timeout_s=timeout_s)
                self._recent = (*token_ids, *completion.token_ids)[:_PROBE_TOKENS]
                return completion
            except RoleLost as error:
                lost.append(error)
            finally:
                self._running[part] -= 1
        raise RoleLost("; ".join(map(str, lost)))

    async def load_weights(self, source: Mapping[str, Tensor] | Path | Any, version: int) -> None:
        """As `Engine.load_weights`, from tensors, a folder or a handle.

        Raises:
            ValueError: If no engine could take them.
            RoleLost: If there is no engine within the deadline of a start.
        """
        if isinstance(source, WeightsRef):
            source = source.ref
        elif not isinstance(source, Path):
            source = ray.put(pack(source))
        self._source = (source, version, await self._make_probe())
        failures = [error for error in await self._give_all() if error is not None]
        if failures and len(failures) == len(self.parts) and isinstance(failures[0], ValueError):
            raise failures[0]
        await self._wait_for_one(self._config.cluster.start_timeout_s)

    async def lend_memory(self) -> None:
        """As `Engine.lend_memory`, in all engines; one that fails is replaced."""
        timeout_s = self._config.cluster.step_timeout_s

        async def lend(part: WatchedActor) -> None:
            actor = part.actor
            try:
                await part.call("lend_memory", timeout_s=timeout_s)
            except RoleLost:
                pass
            except Exception as error:
                part.report_suspicion(actor, f"it did not free its memory: {error!r}")

        await asyncio.gather(*map(lend, self.parts))

    async def abort(self, sequence_uid: int | None = None) -> None:
        """As `Engine.abort`, in all engines."""
        timeout_s = self._config.cluster.patience_s
        calls = (part.call("abort", sequence_uid, timeout_s=timeout_s) for part in self.parts)
        await asyncio.gather(*calls, return_exceptions=True)

    def health(self) -> Mapping[str, float]:
        """As `Engine.health`: what was last heard of each, added up, or of the worst one."""
        heard = [part.health for part in self.parts if part.health]
        names = {name for each in heard for name in each} - {"pid"}
        total = {
            name: _WORST.get(name, sum)([each[name] for each in heard if name in each])
            for name in sorted(names)
        }
        return {**total, "engines": sum(part.actor is not None for part in self.parts)}

    async def close(self) -> None:
        """End what runs. The engines stay, for a run that goes on from a checkpoint."""
        await self.abort()

    async def _start(self, actor: Any) -> None:
        """Load the model, and then the weights that are newest when that has been done."""
        await wait_for(actor.start.remote(self._config, *self._first))
        taken = None
        while taken is not self._source:
            taken = self._source
            assert taken is not None
            await wait_for(actor.load_weights.remote(*taken))

    async def _give_all(self) -> list[Exception | None]:
        assert self._source is not None
        return await asyncio.gather(*(self._give(part, *self._source) for part in self.parts))

    async def _make_probe(self) -> Probe | None:
        """For servers; the embedded engine compares all that it was given."""
        if not self._config.engine.needs_probe:
            return None
        return await self.ask_trainer(self._recent or tuple(range(_PROBE_TOKENS // 4)))

    async def _give(
        self, part: WatchedActor, source: Any, version: int, probe: Probe | None
    ) -> Exception | None:
        """Give an engine the weights; one that fails is replaced, and begins with them."""
        actor, timeout_s = part.actor, self._config.cluster.step_timeout_s
        try:
            part.relay_log(
                await part.call("load_weights", source, version, probe, timeout_s=timeout_s)
            )
        except RoleLost as error:
            return error
        except Exception as error:  # whatever it is, half of its weights may be the new ones
            part.report_suspicion(
                actor, f"it did not take the weights of version {version}: {error!r}"
            )
            return error
        return None

    async def _choose(self, sequence_uid: int) -> WatchedActor:
        """The engine for a sequence; waits until there is one. The caller has the deadline."""
        while not (there := [part for part in self.parts if part.actor is not None]):
            await asyncio.sleep(_PAUSE_S)
        home = max(there, key=lambda part: zlib.crc32(f"{sequence_uid}/{part.name}".encode()))
        idlest = min(there, key=self._running.__getitem__)
        return idlest if self._running[home] > self._running[idlest] + _SPILL else home

    async def _wait_for_one(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while all(part.actor is None for part in self.parts):
            if time.monotonic() > deadline:
                raise RoleLost(f"there is no engine, and none could be started in {timeout_s:g} s")
            await asyncio.sleep(_PAUSE_S)
