"""The roles of a run in this process.

The loop in `train` sees an engine, a trainer and environments. `LocalPlacement` makes them here;
`tir_alp.cluster` makes them in other processes, on this machine or on others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import gymnasium

from tir_alp.config import Config
from tir_alp.engines.base import AskTrainer, Engine
from tir_alp.engines.open import open_engine
from tir_alp.records.folder import RunFolder
from tir_alp.roles import Node, TrainerRole
from tir_alp.rollouts.environment import make_environment
from tir_alp.rollouts.renderer import Renderer
from tir_alp.training.local_trainer import LocalTrainer


class LocalPlacement:
    """Places all roles in this process.

    Args:
        config: Config of the run.
        log: Called with a line about what happens to the engine's servers.
    """

    def __init__(self, config: Config, log: Callable[[str], None] = print) -> None:
        self._config, self._log = config, log

    def engine(
        self, path: str, version: int, renderer: Renderer, ask_trainer: AskTrainer | None
    ) -> AbstractAsyncContextManager[Engine]:
        """As `Placement.engine`."""
        return open_engine(self._config, path, version, ask_trainer, self._log)

    async def trainer(self, run: Path, initial: str, found: Path | None) -> TrainerRole:
        """As `Placement.trainer`."""
        dump = RunFolder(run).dump_bad_update
        trainer = LocalTrainer(self._config, initial=initial, found=found, on_bad_update=dump)
        if (size := trainer.ranks.size) > 1:
            trainer.close()
            raise ValueError(
                f"a run is one process, but this is one of {size} ranks: start it without "
                "torch.distributed.run, and with --cluster and --cluster.trainer.count"
            )
        return trainer

    def make_env(self) -> gymnasium.Env[str, str]:
        """As `Placement.make_env`."""
        return make_environment(self._config)

    def nodes(self) -> Sequence[Node]:
        """As `Placement.nodes`."""
        return ()
