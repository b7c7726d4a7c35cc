"""Many engines as one: the protocol `Engine`, over actors.

A sequence goes to the engine that has its earlier turns in its cache, unless others are much less
busy. A request whose engine is lost is sent once more, to another engine. Nothing of the first
attempt has been returned, so no result is used twice.

An engine that cannot take new weights is replaced, and what it still returns is ignored.
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
from tir_alp.engines.probe import ProbeMaker
from tir_alp.roles import RoleLost
from tir_alp.rollouts.renderer import Renderer
from tir_alp.run.watchdog import note_host

_FIRST_PROBE = range(64)  # token ids, while nothing has been sampled
_PAUSE_S = 0.1
_WORST = {"tensors_compared": min, "probe_difference": max}
_SPILL = 8  # requests more than the least busy engine has, at which an engine is passed over


@dataclass(frozen=True, slots=True)
class WeightsRef:
    """A handle to packed weights in the object store, which costs nothing to pass on."""

    ref: Any


class EnginePool:
    """Engines that take the same weights.

    Args:
        config: The config of the run.
        path: Folder or Hugging Face id of the first weights.
        version: Policy version of those weights.
        renderer: The renderer of the run, whose rule ends completions.
        ask_trainer: Asks the trainer for the logprobs by which new weights are verified.
        make_actors: Makes the slots of the engines, given the function that starts an actor.
    """

    def __init__(
        self,
        config: Config,
        path: str,
        version: int,
        renderer: Renderer,
        ask_trainer: AskTrainer | None,
        make_actors: Callable[[Callable[[Any], Any]], list[WatchedActor]],
    ) -> None:
        self._config, self._first = config, (path, version, ray.put(renderer))
        self._rule = renderer.stop_matcher
        self._probes = ProbeMaker(ask_trainer, _FIRST_PROBE)
        # The newest weights, their version, and the probe by which they are verified.
        self._source: tuple[Any, int, Probe | None] | None = None
        self._running: Counter[WatchedActor] = Counter()
        self.actors = make_actors(self._start)

    def set_trainer(self, ask_trainer: AskTrainer | None) -> None:
        """Verify new weights by another trainer from now on."""
        self._probes.ask_trainer = ask_trainer

    async def generate(self, token_ids: tuple[int, ...], sampling: Sampling) -> Completion:
        """As `Engine.generate`. Raises RoleLost if two engines are lost during one request."""
        has_rule = sampling.stop_matcher == self._rule  # the hosts have the rule, which is large
        if has_rule:
            sampling = replace(sampling, stop_matcher=None)
        request = (token_ids, sampling, has_rule)
        lost: list[RoleLost] = []
        while len(lost) < 2:
            engine = await self._choose(sampling.sequence_uid)
            note_host(engine.name)
            self._running[engine] += 1
            try:
                timeout_s = self._config.rollout.generate_timeout_s
                completion = await engine.call("generate", *request, timeout_s=timeout_s)
                self._probes.note((*token_ids, *completion.token_ids))
                return completion
            except RoleLost as error:
                lost.append(error)
            finally:
                self._running[engine] -= 1
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
        if failures and len(failures) == len(self.actors) and isinstance(failures[0], ValueError):
            raise failures[0]
        await self._wait_for_one(self._config.cluster.start_timeout_s)

    async def lend_memory(self) -> None:
        """As `Engine.lend_memory`, on all engines; one that fails is replaced."""
        timeout_s = self._config.cluster.step_timeout_s

        async def lend(engine: WatchedActor) -> None:
            actor = engine.actor
            try:
                await engine.call("lend_memory", timeout_s=timeout_s)
            except RoleLost:
                pass
            except Exception as error:
                engine.report_suspicion(actor, f"it did not free its memory: {error!r}")

        await asyncio.gather(*map(lend, self.actors))

    async def abort(self, sequence_uid: int | None = None) -> None:
        """As `Engine.abort`, on all engines."""
        timeout_s = self._config.cluster.patience_s
        calls = (each.call("abort", sequence_uid, timeout_s=timeout_s) for each in self.actors)
        await asyncio.gather(*calls, return_exceptions=True)

    def health(self) -> Mapping[str, float]:
        """As `Engine.health`: the sum of the engines' last reports, or the worst of them."""
        reports = [each.health for each in self.actors if each.health]
        names = {name for report in reports for name in report} - {"pid"}
        total = {
            name: _WORST.get(name, sum)([report[name] for report in reports if name in report])
            for name in sorted(names)
        }
        return {**total, "engines": sum(each.actor is not None for each in self.actors)}

    async def close(self) -> None:
        """Abort what runs. The engines stay, for a run that goes on from a checkpoint."""
        await self.abort()

    async def _start(self, actor: Any) -> None:
        """Load the model, and then the weights that are the newest by then."""
        await wait_for(actor.start.remote(self._config, *self._first))
        taken = None
        while taken is not self._source:
            taken = self._source
            assert taken is not None
            await wait_for(actor.load_weights.remote(*taken))

    async def _give_all(self) -> list[Exception | None]:
        assert self._source is not None
        return await asyncio.gather(*(self._give(each, *self._source) for each in self.actors))

    async def _make_probe(self) -> Probe | None:
        return await self._probes.make() if self._config.engine.needs_probe else None

    async def _give(
        self, engine: WatchedActor, source: Any, version: int, probe: Probe | None
    ) -> Exception | None:
        """Give an engine the weights. One that fails is replaced, and starts with them."""
        actor, timeout_s = engine.actor, self._config.cluster.step_timeout_s
        try:
            report = await engine.call("load_weights", source, version, probe, timeout_s=timeout_s)
            engine.take_report(report)
        except RoleLost as error:
            return error
        except Exception as error:  # whatever it is, half of its weights may be the new ones
            reason = f"it did not take the weights of version {version}: {error!r}"
            engine.report_suspicion(actor, reason)
            return error
        return None

    async def _choose(self, sequence_uid: int) -> WatchedActor:
        """Choose the engine for a sequence; waits until there is one. The caller has a deadline."""
        while not (there := [each for each in self.actors if each.actor is not None]):
            await asyncio.sleep(_PAUSE_S)
        home = max(there, key=lambda each: zlib.crc32(f"{sequence_uid}/{each.name}".encode()))
        idlest = min(there, key=self._running.__getitem__)
        return idlest if self._running[home] > self._running[idlest] + _SPILL else home

    async def _wait_for_one(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while all(each.actor is None for each in self.actors):
            if time.monotonic() > deadline:
                raise RoleLost(f"there is no engine, and none could be started in {timeout_s:g} s")
            await asyncio.sleep(_PAUSE_S)
