"""The roles of a run as actors of a Ray cluster: the `roles.Placement` of a run on several nodes.

A run that goes on from a checkpoint gets a new trainer; the other actors stay.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import secrets
import sys
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gymnasium
import ray
from ray.exceptions import RayError, RuntimeEnvSetupError
from ray.util.placement_group import placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from tir_alp.cluster.engine_host import EngineHost
from tir_alp.cluster.engine_pool import EnginePool
from tir_alp.cluster.environment_host import EnvironmentHost
from tir_alp.cluster.environment_pool import EnvironmentPool
from tir_alp.cluster.poison_tasks import Suspects
from tir_alp.cluster.remote_trainer import RemoteTrainer
from tir_alp.cluster.reservation import KINDS, check_gpus, connect, reserve
from tir_alp.cluster.same_code import ReportsCode, differences, own_code
from tir_alp.cluster.sandbox_host import SandboxHost
from tir_alp.cluster.trainer_host import TrainerHost
from tir_alp.cluster.watched_actor import WatchedActor, reason_of, wait_for
from tir_alp.config import ActorsConfig, Config
from tir_alp.engines.base import AskTrainer, Engine, Log
from tir_alp.roles import Node, TrainerRole
from tir_alp.rollouts.renderer import Renderer
from tir_alp.tools.sandbox.config import TOKEN_VARIABLE

StartActor = Callable[[str, Any], Awaitable[None]]
"""Makes an actor ready for work, given the name of its slot."""
_MOST_CALLS = 1 << 16  # at a time, to an actor whose calls share one event loop


class ClusterPlacement:
    """The actors of one run; `open_cluster` makes one.

    Args:
        config: The config of the run.
        reservation: The placement group, with one bundle per actor.
        log: Receives losses and replacements of actors.
    """

    def __init__(self, config: Config, reservation: Any, log: Log) -> None:
        self._config, self._reservation, self._log = config, reservation, log
        self._token = os.environ.get(TOKEN_VARIABLE) or secrets.token_urlsafe(24)
        self._addresses: dict[str, str] = {}  # of sandbox hosts, by slot
        self._engines: EnginePool | None = None
        # Actors are named for `ray list actors`; several runs may share a cluster.
        self._run = f"{config.name or 'run'}-{secrets.token_hex(3)}"
        self._numbers = itertools.count()
        self._checked: set[str] = set()  # slots whose first actor ran the same code
        self.actors: dict[str, list[WatchedActor]] = {kind: [] for kind in KINDS}
        """The actors that were started, by kind."""

    async def open(self) -> None:
        """Start sandbox hosts and environment runners."""
        self.actors["sandboxes"] = self._make_actors("sandboxes", SandboxHost, self._start_sandbox)
        await open_all(self.actors["sandboxes"])
        rollout = self._config.rollout
        num_episodes = (rollout.max_staleness + 1) * rollout.groups_per_step * rollout.group_size
        self.actors["environments"] = self._make_actors(
            "environments",
            EnvironmentHost,
            lambda _, actor: wait_for(actor.start.remote()),
            max_concurrency=num_episodes,
            concurrency_groups={"health": 1},
        )
        await open_all(self.actors["environments"])
        self.environment_pool = EnvironmentPool(
            self.actors["environments"],
            self._env_config,
            Suspects(self._log, rollout.env_timeout_s),
            rollout.env_timeout_s,
            has_sandboxes=bool(self.actors["sandboxes"]),
        )

    async def close(self) -> None:
        """End all actors."""
        timeout_s = self._config.cluster.patience_s
        with_servers = [*self.actors["engines"], *self.actors["sandboxes"]]
        stops = (each.call("stop", timeout_s=timeout_s) for each in with_servers)
        await asyncio.gather(*stops, return_exceptions=True)  # those that do not stop are killed
        await close_all([each for actors in self.actors.values() for each in actors])

    # ------------------------------------------------------------------ as roles.Placement

    @asynccontextmanager
    async def engine(
        self, path: str, version: int, renderer: Renderer, ask_trainer: AskTrainer | None
    ) -> AsyncIterator[Engine]:
        """As `Placement.engine`: all engines as one. Engines that run already take the weights."""
        pool = await self._pool(absolute(path), version, renderer, ask_trainer)
        try:
            yield pool
        finally:
            await pool.close()

    async def _pool(
        self, path: str, version: int, renderer: Renderer, ask_trainer: AskTrainer | None
    ) -> EnginePool:
        if self._engines is not None:
            self._engines.set_trainer(ask_trainer)
            await self._engines.abort()
            if self._config.adapters is None:  # else the run gives them next
                await self._engines.load_weights(Path(path), version)
            return self._engines

        def make(start: Callable[[Any], Awaitable[None]]) -> list[WatchedActor]:
            options = {"max_concurrency": _MOST_CALLS}
            return self._make_actors("engines", EngineHost, lambda _, each: start(each), **options)

        pool = EnginePool(self._config, path, version, renderer, ask_trainer, make)
        self.actors["engines"] = pool.actors
        await open_all(pool.actors)
        self._engines = pool
        return pool

    async def trainer(self, run: Path, initial: str, found: Path | None) -> TrainerRole:
        """As `Placement.trainer`: all ranks as one."""
        await close_all(self.actors["trainer"])
        paths = (run.resolve(), absolute(initial), None if found is None else found.resolve())
        size = self._config.cluster.trainer.count
        meeting = asyncio.get_running_loop().create_future()  # address and port of rank 0

        async def start(name: str, actor: Any) -> None:
            rank = int(name.rpartition("-")[2])
            if rank == 0:
                try:
                    meeting.set_result(await wait_for(actor.meeting_place.remote()))
                except RayError as error:
                    meeting.set_exception(error)
            address, port = await meeting
            variables = _rank_variables(rank, size, address, port)
            await wait_for(actor.start.remote(self._config, *paths, variables))

        options = {"concurrency_groups": {"health": 1}}
        ranks = self._make_actors("trainer", TrainerHost, start, **options)
        self.actors["trainer"] = ranks
        await open_all(ranks)
        return RemoteTrainer(ranks, self._config.cluster.step_timeout_s)

    def make_env(self) -> gymnasium.Env[str, str]:
        """As `Placement.make_env`."""
        return self.environment_pool.make()

    # ------------------------------------------------------------------ slots

    def nodes(self) -> Sequence[Node]:
        """As `Placement.nodes`; the memory is what Ray counts as a node's resource `memory`."""
        if self._config.cluster.address == "local":
            return ()
        found = {node["NodeID"]: node for node in ray.nodes()}
        nodes = []
        for key, slots in sorted(self._slots().items()):
            has, address = found[key]["Resources"], found[key]["NodeManagerAddress"]
            nodes.append(
                Node(
                    f"node {address} ({key[:8]})",
                    int(has["memory"]) if "memory" in has else None,
                    int(has.get("CPU", 1)),
                    Counter(kind for kind, _ in slots),
                )
            )
        return nodes

    def layout(self) -> list[str]:
        """Which actors are on which node: one line per node."""
        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
        return [
            f"on {addresses.get(node, '?')}: {', '.join(name for _, name in slots)}"
            for node, slots in sorted(self._slots().items())
        ]

    def _slots(self) -> Mapping[str, list[tuple[str, str]]]:
        """Kind and name of the actors on each node, by the node's id."""
        nodes = placement_group_table(self._reservation)["bundles_to_node_id"]
        slots = [(kind, name) for kind in KINDS for name in self._names(kind)]
        here: defaultdict[str, list[tuple[str, str]]] = defaultdict(list)
        for index, slot in enumerate(slots):
            here[nodes[index]].append(slot)
        return here

    def _names(self, kind: str) -> list[str]:
        return [f"{KINDS[kind]}-{index}" for index in range(self._config_of(kind).count)]

    def _make_actors(
        self, kind: str, host: type[ReportsCode], start: StartActor, **options: Any
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
        """Check that an actor has started and runs the same code as this process.

        If a later actor of the slot runs other code, that is only logged: people work in the
        checkout of a run.

        Raises:
            ValueError: If the first actor of the slot runs other code, or its image cannot be
                started.
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
        return self._config.cluster.actors[kind]

    def _maker(self, kind: str, index: int, host: type, **options: Any) -> Callable[[], Any]:
        """The function that makes the actor of one slot."""
        config, kinds = self._config_of(kind), [*KINDS]
        before = sum(self._config_of(each).count for each in kinds[: kinds.index(kind)])
        strategy = PlacementGroupSchedulingStrategy(
            self._reservation, placement_group_bundle_index=before + index
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
        slot = self._names(kind)[index]
        return lambda: made.options(name=f"{self._run}/{slot}/{next(self._numbers)}").remote()

    async def _start_sandbox(self, name: str, actor: Any) -> None:
        """Start a sandbox host, at the address of its predecessor if that is free."""
        config = self._config.env.kwargs.get("sandbox") or {}
        port = urlsplit(self._addresses.get(name, "")).port or 0
        starting = actor.start.remote(config, port, self._token)
        self._addresses[name] = await wait_for(starting)

    def _env_config(self) -> Config:
        """The config, with the environment's sandbox at the current sandbox hosts."""
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
async def open_cluster(config: Config) -> AsyncIterator[ClusterPlacement]:
    """Join or start a Ray cluster, and reserve the resources of a run's actors in it.

    Raises:
        ValueError: If there is no such cluster, it is too small, or an actor cannot work in it.
    """
    settings = config.cluster
    check_gpus(config)
    async with AsyncExitStack() as stack:
        if not ray.is_initialized():
            connect(settings, log)
            stack.callback(ray.shutdown)
        reservation = await reserve(settings, log)
        stack.callback(remove_placement_group, reservation)
        cluster = ClusterPlacement(config, reservation, log)
        if len(layout := cluster.layout()) > 1:
            log("\n".join(layout))
        stack.push_async_callback(cluster.close)
        await cluster.open()
        yield cluster


def _rank_variables(rank: int, size: int, address: str, port: int) -> Mapping[str, str]:
    """The environment variables by which the ranks of a trainer find one another."""
    return {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(size),
        "RANK": str(rank),
        "LOCAL_RANK": "0",  # Ray shows an actor its own GPUs alone
    }


def log(text: str) -> None:
    """Print a line for the person who watches the run."""
    print(text, file=sys.stderr, flush=True)


def absolute(model: str) -> str:
    """The absolute path of a model's folder; the id of a model is returned as it is."""
    return str(Path(model).resolve()) if Path(model).exists() else model


async def open_all(actors: Sequence[WatchedActor]) -> None:
    """Start actors at once. If one cannot start, all of them are closed."""
    opening = [asyncio.create_task(each.open()) for each in actors]
    try:
        for each in asyncio.as_completed(opening):
            await each
    except BaseException:
        for each in opening:
            each.cancel()
        await asyncio.gather(*opening, return_exceptions=True)
        await close_all(actors)
        raise


async def close_all(actors: Sequence[WatchedActor]) -> None:
    """Close actors at once."""
    await asyncio.gather(*(each.close() for each in actors))
