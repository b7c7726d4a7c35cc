"""What a run is made of, wherever it lives: in this process, or in actors of a cluster.

The loop in `train` sees an engine, a trainer and environments. `LocalParts` makes them here;
`tir_alp.cluster` makes the same in other processes, on this machine or on many.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

import gymnasium

from tir_alp.batch import Sample
from tir_alp.checkpoint import Position
from tir_alp.config import Config, ServersConfig, SGLangConfig, VLLMConfig
from tir_alp.doctor.engine import Judge
from tir_alp.engines.base import Engine, Reference
from tir_alp.engines.transformers import TransformersEngine
from tir_alp.environments import make_environment
from tir_alp.learner import Learner
from tir_alp.ledger import Row
from tir_alp.policy import compute_device, end_token_ids, load_outline, load_policy
from tir_alp.renderer import Renderer
from tir_alp.run_folder import RunFolder


class PartLost(RuntimeError):
    """A part of the run died, or was ended because it did not answer."""


class TrainerPart(Judge, Protocol):
    """The trainer of a run; see `Learner`. Its calls block."""

    def step(
        self, groups: Sequence[Sequence[Sample]], step: int
    ) -> tuple[dict[str, float], list[Row]]:
        """Make the updates of one step; metrics, and rows for the ledger."""
        ...

    def weights(self) -> Any:
        """The policy, as the engine of the same parts takes it: tensors, or a handle to them."""
        ...

    def save(
        self, folder: Path, position: Position, rollouts: Mapping[str, Any], keep: int
    ) -> Path:
        """Write a checkpoint."""
        ...

    def load(self, path: Path) -> None:
        """Take up a checkpoint."""
        ...

    def close(self) -> None:
        """Free what is held."""
        ...


class Parts(Protocol):
    """Makes the parts of a run."""

    def engine(
        self, path: str, version: int, renderer: Renderer, reference: Reference
    ) -> AbstractAsyncContextManager[Engine]:
        """An engine with the weights in the folder `path`, for as long as the block runs.

        Args:
            path: Of the first weights.
            version: Their version.
            renderer: Of the run: its rule ends completions.
            reference: What the engine's logprobs can be held against.
        """
        ...

    async def trainer(self, run: Path, initial: str, found: Path | None) -> TrainerPart:
        """A trainer; the arguments are the run's folder and those of `Learner`."""
        ...

    def make_env(self) -> gymnasium.Env[str, str]:
        """An environment, for a thread to block in."""
        ...


class LocalParts:
    """All in this process.

    Args:
        config: Of the run.
        say: Told what happens to servers.
    """

    def __init__(self, config: Config, say: Callable[[str], None] = print) -> None:
        self._config, self._say = config, say

    def engine(
        self, path: str, version: int, renderer: Renderer, reference: Reference
    ) -> AbstractAsyncContextManager[Engine]:
        """As `Parts.engine`."""
        return open_engine(self._config, path, version, reference, self._say)

    async def trainer(self, run: Path, initial: str, found: Path | None) -> TrainerPart:
        """As `Parts.trainer`."""
        learner = make_learner(self._config, run, initial, found)
        if (size := learner.ranks.size) > 1:
            learner.close()
            raise ValueError(
                f"a run is one process, but this is one of {size} ranks: start it without "
                "torch.distributed.run, and with --cluster and --cluster.trainer.count"
            )
        return learner

    def make_env(self) -> gymnasium.Env[str, str]:
        """As `Parts.make_env`."""
        return make_environment(self._config)


@asynccontextmanager
async def open_parts(config: Config, say: Callable[[str], None] = print) -> AsyncIterator[Parts]:
    """Here, or on the cluster that the config names.

    Raises:
        ValueError: If there is no such cluster, or it is too small.
    """
    if not config.cluster.is_used:
        yield LocalParts(config, say)
        return
    try:
        from tir_alp.cluster.cluster import open_cluster
    except ImportError as error:
        raise ValueError(f"{error}; a cluster needs: pip install 'tir_alp[ray]'") from error
    async with open_cluster(config) as cluster:
        yield cluster


@asynccontextmanager
async def open_engine(
    config: Config,
    path: str,
    version: int,
    reference: Reference,
    say: Callable[[str], None],
) -> AsyncIterator[Engine]:
    """The engine that the config names, in this process or in servers that it starts.

    Raises:
        ValueError: If it cannot start.
    """
    settings, on_update = config.engine, config.rollout.on_update
    if isinstance(settings, ServersConfig):
        try:
            from tir_alp.engines.sglang import open_sglang
            from tir_alp.engines.vllm import open_vllm
        except ImportError as error:
            raise ValueError(
                f'engine.type = "{settings.type}" needs aiohttp: install it as docs/sglang.md says'
            ) from error
    if isinstance(settings, VLLMConfig):
        async with open_vllm(
            settings,
            load_outline(path),
            Path(path) if Path(path).is_dir() else load_policy(path).state_dict(),
            version=version,
            seed=config.seed,
            reference=reference,
            say=say,
        ) as engine:
            yield engine
        return
    if isinstance(settings, SGLangConfig):
        outline = load_outline(path)
        async with open_sglang(
            settings,
            model_path=path,
            version=version,
            vocab_size=outline.config.get_text_config().vocab_size,
            end_token_ids=end_token_ids(outline),
            seed=config.seed,
            reference=reference,
            on_update=on_update,
            say=say,
        ) as engine:
            yield engine
        return
    engine = TransformersEngine(
        load_policy(path, compute_device(config.trainer.device)),
        max_cache_tokens=settings.max_cache_tokens,
        version=version,
        precision=settings.precision,
        logit_noise=settings.logit_noise,
        on_update=on_update,
    )
    try:
        yield engine
    finally:
        await engine.close()


def make_learner(config: Config, run: Path, initial: str, found: Path | None) -> Learner:
    """The trainer that the config asks for, in this process."""
    on_bad_update = RunFolder(run).dump_bad_update
    return Learner(config, initial=initial, found=found, on_bad_update=on_bad_update)
