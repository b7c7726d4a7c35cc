"""What runs in a trainer rank's actor: one rank's `LocalTrainer`."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray

from tir_alp.cluster.packed_weights import Packed, pack
from tir_alp.cluster.same_code import ReportsCode
from tir_alp.config import Config
from tir_alp.records.folder import RunFolder
from tir_alp.training.checkpoint_folder import Position
from tir_alp.training.local_trainer import LocalTrainer
from tir_alp.training.step_report import StepReport
from tir_alp.types import Sample

_SIOCGIFADDR = 0x8915


class TrainerHost(ReportsCode):
    """One rank. Calls block, and run one after another in one thread."""

    def meeting_place(self) -> tuple[str, int]:
        """Address of this node, and a port that is free on it."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def start(
        self, config: Config, run: Path, initial: str, found: Path | None, ranks: Mapping[str, str]
    ) -> None:
        """Load the model.

        Args:
            config: The config of the run.
            run: Folder of the run.
            initial: The model that the run began with.
            found: The checkpoint to go on from; None: a new run.
            ranks: The environment variables by which ranks find one another.
        """
        os.environ.update(ranks)
        if interface := interface_of(ray.util.get_node_ip_address()):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        self._rank = int(ranks["RANK"])
        dump = RunFolder(run).dump_bad_update
        self._trainer = LocalTrainer(config, initial=initial, found=found, on_bad_update=dump)

    def step(self, groups: Sequence[Sequence[Sample]], step: int) -> StepReport:
        """As `LocalTrainer.step`."""
        return self._trainer.step(groups, step)

    def mean_loss(self, samples: Sequence[Sample]) -> float:
        """As `LocalTrainer.mean_loss`."""
        return self._trainer.mean_loss(samples)

    def completion_logprobs(
        self, prompt: Sequence[int], completion: Sequence[int], temperature: float, top_p: float
    ) -> list[float]:
        """As `LocalTrainer.completion_logprobs`."""
        return self._trainer.completion_logprobs(prompt, completion, temperature, top_p)

    def perturb_weights(self, scale: float) -> None:
        """As `LocalTrainer.perturb_weights`."""
        self._trainer.perturb_weights(scale)

    @ray.method(num_returns=2)
    def weights(self) -> tuple[Packed, bool]:
        """As `LocalTrainer.weights`, packed; empty on other ranks than 0.

        The second result is small: waiting for it is waiting for the weights without fetching them.
        """
        weights = self._trainer.weights()
        return ({} if self._rank else pack(weights)), True

    def save(
        self,
        folder: Path,
        position: Position,
        rollouts: Mapping[str, Any],
        keep: int,
        end_token_ids: frozenset[int] = frozenset(),
    ) -> Path:
        """As `LocalTrainer.save`."""
        return self._trainer.save(folder, position, rollouts, keep, end_token_ids)

    def load(self, path: Path) -> None:
        """As `LocalTrainer.load`."""
        self._trainer.load(path)

    @ray.method(concurrency_group="health")
    def heartbeat(self) -> Mapping[str, Any]:
        """Health report: the process id. It has a thread of its own."""
        return {"pid": os.getpid()}


def interface_of(address: str) -> str | None:
    """Name of this node's network interface with an IPv4 address; None: there is none.

    Gloo would take the interface of the address that the host name resolves to. On many hosts that
    is 127.0.0.1, which other hosts cannot reach.
    """
    with socket.socket() as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            try:
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, request)
            except OSError:  # it has no address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
