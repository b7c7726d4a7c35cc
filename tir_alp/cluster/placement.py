"""The roles of a run as actors of a Ray cluster, handed out as `roles.Placement`.

A run that goes on from a checkpoint gets a new trainer; the other parts stay.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import secrets
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gymnasium
import ray
from ray.exceptions import RayError, RuntimeEnvSetupError
from ray.util.placement_group import placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from tir_alp.cluster.config import ActorsConfig
from tir_alp.cluster.engine_host import EngineHost
from tir_alp.cluster.engine_pool import EnginePool
from tir_alp.cluster.environment_host import EnvironmentHost
from tir_alp.cluster.environment_pool import Environments
from tir_alp.cluster.poison_tasks import Suspects
from tir_alp.cluster.remote_trainer import RemoteTrainer
from tir_alp.cluster.reservation import KINDS, check_gpus, connect, parts_of, reserve
from tir_alp.cluster.same_code import Host, differences, own_code
from tir_alp.cluster.sandbox_host import SandboxHost
from tir_alp.cluster.trainer_host import TrainerHost
from tir_alp.cluster.watched_actor import WatchedActor, reason_of, wait_for
from tir_alp.config import Config
from tir_alp.engines.base import AskTrainer, Engine
from tir_alp.roles import TrainerRole
from tir_alp.rollouts.renderer import Renderer
from tir_alp.tools.sandbox.config import TOKEN_VARIABLE

Start = Callable[[str, Any], Awaitable[None]]
"""Makes an actor ready for work, given the name of its place."""
_MOST_CALLS = 1 << 16  # at a time, of an actor whose calls share one event loop


class Cluster:
    """The parts of one run. Made by `open_cluster`.

    Args:
        config: Of the run.
        places: The placement group, with a bundle a part.
        log: Told, in a sentence, what happens to parts.
    """

    def __init__(self, config: Config, places: Any, log: Callable[[str], None]) -> None:
        self._config, self._places, self._log = config, places, log
        self._token = os.environ.get(TOKEN_VARIABLE) or secrets.token_urlsafe(24)
        self._addresses: dict[str, str] = {}  # of sandbox hosts, by their place
        self._engines: EnginePool | None = None
        # Actors are named for `ray list actors`; several runs may share a cluster.
        self._run = f"{config.name or 'run'}-{secrets.token_hex(3)}"
        self._numbers = itertools.count()
        self._checked: set[str] = set()  # names of places whose first actor had the same
        self.parts: dict[str, list[WatchedActor]] = {kind: [] for kind in KINDS}
        """What there is, by kind."""

    async def open(self) -> None:
        """Start sandbox hosts and environment runners."""
        self.parts["sandboxes"] = self._make_parts("sandboxes", SandboxHost, self._start_sandbox)
        await open_all(self.parts["sandboxes"])
        rollout = self._config.rollout
        num_episodes = (rollout.max_staleness + 1) * rollout.groups_per_step * rollout.group_size
        self.parts["environments"] = self._make_parts(
            "environments",
            EnvironmentHost,
            lambda _, actor: wait_for(actor.start.remote()),
            max_concurrency=num_episodes,
            concurrency_groups={"health": 1},
        )
        await open_all(self.parts["environments"])
        self.environments = Environments(
            self.parts["environments"],
            self._env_config,
            Suspects(self._log, rollout.env_timeout_s),
            rollout.env_timeout_s,
            has_sandboxes=bool(self.parts["sandboxes"]),
        )

    async def close(self) -> None:
        """End all parts."""
        timeout_s = self._config.cluster.patience_s
        served = [*self.parts["engines"], *self.parts["sandboxes"]]
        stops = (part.call("stop", timeout_s=timeout_s) for part in served)
        await asyncio.gather(*stops, return_exceptions=True)  # those that cannot are killed
        await close_all([part for parts in self.parts.values() for part in parts])

    # ------------------------------------------------------------------ as roles.Placement

    @asynccontextmanager
    async def engine(
        self, path: str, version: int, renderer: Renderer, ask_trainer: AskTrainer
    ) -> AsyncIterator[Engine]:
        """As `Placement.engine`: all engines, as one. Those that are there take the weights."""
        pool = await self._pool(absolute(path), version, renderer, ask_trainer)
        try:
            yield pool
        finally:
            await pool.close()

    async def _pool(
        self, path: str, version: int, renderer: Renderer, ask_trainer: AskTrainer
    ) -> EnginePool:
        if self._engines is not None:
            self._engines.ask_trainer = ask_trainer
            await self._engines.abort()
            await self._engines.load_weights(Path(path), version)
            return self._engines

        def make(start: Callable[[Any], Awaitable[None]]) -> list[WatchedActor]:
            options = {"max_concurrency": _MOST_CALLS}
            return self._make_parts("engines", EngineHost, lambda _, each: start(each), **options)

        pool = EnginePool(self._config, path, version, renderer, ask_trainer, make)
        self.parts["engines"] = pool.parts
        await open_all(pool.parts)
        self._engines = pool
        return pool

    async def trainer(self, run: Path, initial: str, found: Path | None) -> TrainerRole:
        """As `Placement.trainer`: all ranks, as one."""
        await close_all(self.parts["trainer"])
        paths = (run.resolve(), absolute(initial), None if found is None else found.resolve())
        size = self._config.cluster.trainer.count
        place = asyncio.get_running_loop().create_future()  # where ranks meet: with the first

        async def start(name: str, actor: Any) -> None:
            rank = int(name.rpartition("-")[2])
            if rank == 0:
                try:
                    place.set_result(await wait_for(actor.meeting_place.remote()))
                except RayError as error:
                    place.set_exception(error)
            address, port = await place
            variables = {
                **{"MASTER_ADDR": address, "MASTER_PORT": str(port), "WORLD_SIZE": str(size)},
                **{"RANK": str(rank), "LOCAL_RANK": "0"},  # Ray shows an actor its own GPUs alone
            }
            await wait_for(actor.start.remote(self._config, *paths, variables))

        options = {"concurrency_groups": {"health": 1}}
        ranks = self._make_parts("trainer", TrainerHost, start, **options)
        self.parts["trainer"] = ranks
        await open_all(ranks)
        return RemoteTrainer(ranks, self._config.cluster.step_timeout_s)

    def make_env(self) -> gymnasium.Env[str, str]:
        """As `Placement.make_env`."""
        return self.environments.make()

    # ------------------------------------------------------------------ places

    def layout(self) -> list[str]:
        """Which parts have their places on which node: a line a node."""
        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
        nodes = placement_group_table(self._places)["bundles_to_node_id"]
        names = [name for kind in KINDS for name in self._names(kind)]
        here: defaultdict[str, list[str]] = defaultdict(list)
        for index, name in enumerate(names):
            here[nodes[index]].append(name)
        return [f"on {addresses.get(node, '?')}: {', '.join(here[node])}" for node in sorted(here)]

    def _names(self, kind: str) -> list[str]:
        return [f"{KINDS[kind]}-{index}" for index in range(self._config_of(kind).count)]

    def _make_parts(
        self, kind: str, host: type[Host], start: Start, **options: Any
    ) -> list[WatchedActor]:
        async def begin(name: str, actor: Any) -> None:
            await self._check(kind, name, actor)
            await start(name, actor)

        return [
            WatchedActor(
                name,
                self._maker(kind, index, host, **options),
                functools.partial(begin, name),
                self._config.cluster,
                self._log,
                is_replaced=kind != "trainer",
            )
            for index, name in enumerate(self._names(kind))
        ]

    async def _check(self, kind: str, name: str, actor: Any) -> None:
        """See that an actor is there, and runs the code that this process runs.

        Raises:
            ValueError: It does not, or its image cannot be started. Of a later actor of the place
                it is only said that its code is another: people work in the checkout of a run.
        """
        image = self._config_of(kind).image
        try:
            code = await wait_for(actor.code.remote())
        except RuntimeEnvSetupError as error:
            where = f"cluster.{kind}.image = {image!r}: " if image is not None else ""
            raise ValueError(f"{where}{name} cannot be started: {reason_of(error)}") from error
        if not (differs := differences(own_code(), code)):
            self._checked.add(name)
            return
        text = f"{name} runs other code of tir_alp than this process: {differs}"
        if name in self._checked:
            self._log(text)
            return
        remedy = "build its image again" if image is not None else "install the same on all nodes"
        raise ValueError(f"{text}; {remedy}")

    def _config_of(self, kind: str) -> ActorsConfig:
        return parts_of(self._config.cluster)[kind]

    def _maker(self, kind: str, index: int, host: type, **options: Any) -> Callable[[], Any]:
        """What makes the actor of one place."""
        config, kinds = self._config_of(kind), [*KINDS]
        before = sum(self._config_of(each).count for each in kinds[: kinds.index(kind)])
        strategy = PlacementGroupSchedulingStrategy(
            self._places, placement_group_bundle_index=before + index
        )
        environment: dict[str, Any] = {"env_vars": {TOKEN_VARIABLE: self._token}}
        if config.image is not None:
            environment["image_uri"] = config.image
        made = ray.remote(
            num_cpus=config.cpus,
            num_gpus=config.gpus,
            scheduling_strategy=strategy,
            runtime_env=environment,
            **options,
        )(host)
        place = self._names(kind)[index]
        return lambda: made.options(name=f"{self._run}/{place}/{next(self._numbers)}").remote()

    async def _start_sandbox(self, name: str, actor: Any) -> None:
        """Start a sandbox host, at the address of the one before it if that is free."""
        config = self._config.env.kwargs.get("sandbox") or {}
        port = urlsplit(self._addresses.get(name, "")).port or 0
        starting = actor.start.remote(config, port, self._token)
        self._addresses[name] = await wait_for(starting)

    def _env_config(self) -> Config:
        """The config, with the environment's sandbox at the hosts that there are now."""
        env = self._config.env
        if not self._addresses:
            return self._config
        sandbox = dict(env.kwargs.get("sandbox") or {})
        kept = {name: sandbox[name] for name in ("limits", "max_wait_s") if name in sandbox}
        hosts = tuple(self._addresses[name] for name in sorted(self._addresses))
        remote = {**kept, "backend": "remote", "hosts": hosts}
        env = env.model_copy(update={"kwargs": {**env.kwargs, "sandbox": remote}})
        return self._config.model_copy(update={"env": env})


@asynccontextmanager
async def open_cluster(config: Config) -> AsyncIterator[Cluster]:
    """Join or start a Ray cluster, and reserve the places of a run's parts in it.

    Raises:
        ValueError: If there is no such cluster, it is too small, or a part cannot work in it.
    """
    settings = config.cluster
    check_gpus(config)
    async with AsyncExitStack() as stack:
        if not ray.is_initialized():
            connect(settings, log)
            stack.callback(ray.shutdown)
        places = await reserve(settings, log)
        stack.callback(remove_placement_group, places)
        cluster = Cluster(config, places, log)
        if len(layout := cluster.layout()) > 1:
            log("\n".join(layout))
        stack.push_async_callback(cluster.close)
        await cluster.open()
        yield cluster


def log(text: str) -> None:
    """To whoever watches the run."""
    print(text, file=sys.stderr, flush=True)


def absolute(model: str) -> str:
    """A folder as every process finds it; the id of a model stays what it is."""
    return str(Path(model).resolve()) if Path(model).exists() else model


async def open_all(parts: Sequence[WatchedActor]) -> None:
    """Open parts at once; as soon as one of them cannot start, none is left."""
    opening = [asyncio.create_task(part.open()) for part in parts]
    try:
        for each in asyncio.as_completed(opening):
            await each
    except BaseException:
        for each in opening:
            each.cancel()
        await asyncio.gather(*opening, return_exceptions=True)
        await close_all(parts)
        raise


async def close_all(parts: Sequence[WatchedActor]) -> None:
    """Close parts at once."""
    await asyncio.gather(*(part.close() for part in parts))
