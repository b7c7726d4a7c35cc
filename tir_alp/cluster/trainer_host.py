"""What lives in a trainer rank's actor: a learner."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray

from tir_alp.batch import Sample
from tir_alp.checkpoint import Position
from tir_alp.cluster.weights import Packed, pack
from tir_alp.config import Config
from tir_alp.parts import make_learner
from tir_alp.rollout_queue import QueueState


class TrainerHost:
    """One rank. Calls block, and run one after another in a thread."""

    def meeting_place(self) -> tuple[str, int]:
        """Address of this node, and a port that is free on it."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def start(
        self, config: Config, run: Path, initial: str, found: Path | None, ranks: Mapping[str, str]
    ) -> None:
        """Load the model; `ranks` are the variables by which ranks find one another."""
        os.environ.update(ranks)
        self._rank = int(ranks["RANK"])
        self._learner = make_learner(config, run, initial, found)

    def step(self, groups: Sequence[Sequence[Sample]], step: int) -> dict[str, float]:
        """As `Learner.step`."""
        return self._learner.step(groups, step)

    @ray.method(num_returns=2)
    def weights(self) -> tuple[Packed, bool]:
        """As `Learner.weights`, packed, and a sign that they are there; for rank 0 alone."""
        weights = self._learner.weights()
        return ({} if self._rank else pack(weights)), True

    def save(self, folder: Path, position: Position, rollouts: QueueState, keep: int) -> Path:
        """As `Learner.save`."""
        return self._learner.save(folder, position, rollouts, keep)

    def load(self, path: Path) -> None:
        """As `Learner.load`."""
        self._learner.load(path)

    @ray.method(concurrency_group="health")
    def heartbeat(self) -> Mapping[str, Any]:
        """The number of its process. It has a thread of its own."""
        return {"pid": os.getpid()}
