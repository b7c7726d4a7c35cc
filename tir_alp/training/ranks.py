"""Ranks: the processes that train one model together.

Every rank runs the same program in step, and the collective calls of all ranks meet in the same
order: that is the invariant of whatever gets `Ranks`. One process alone is a group of one rank and
runs the same code. Not here: who starts the processes.

A rank that fails says why before it stops, in the store where the ranks met; the others, whose next
collective call fails or misses its deadline, say it on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _get_default_store

T = TypeVar("T")

_FAILURE = "tir_alp/failure"


class RankFailed(RuntimeError):
    """Another rank failed, ended or hangs, so that this one cannot go on."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among all that train."""

    rank: int
    """From 0."""
    size: int
    """How many there are."""
    device: torch.device
    """Where this rank computes."""
    mesh: DeviceMesh
    """[size], over which tensors are sharded."""

    @property
    def is_first(self) -> bool:
        """Whether this rank does what is done once, e.g. write files."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, the same bit for bit on each."""
        total = values.detach().clone()
        dist.all_reduce(total, group=self.mesh.get_group())
        return total

    def meet(self) -> None:
        """Wait for all ranks to come here."""
        dist.barrier(self.mesh.get_group())

    def gather(self, value: T) -> list[T]:
        """A small picklable value of every rank, in their order."""
        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value, group=self.mesh.get_group())
        return values

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Do something that needs all ranks; what stops one of them stops all, with its reason.

        An error of this rank's own is left as it is, and told to the others.

        Args:
            what: Said in the error.

        Raises:
            RankFailed: If another rank failed, ended, or missed the deadline.
        """
        try:
            yield
        except Exception as error:
            if self.size == 1:
                raise
            first = _first_failure(f"rank {self.rank}, {what}: {type(error).__name__}: {error}")
            if not _is_of_a_peer(error):
                raise
            raise RankFailed(f"rank {self.rank} stopped in {what}; first failed {first}") from error


@contextmanager
def join(timeout_s: float, device: torch.device) -> Iterator[Ranks]:
    """Meet the other ranks, and part from them in the end.

    The ranks are those of the process group that is there already, if any; else those that the
    environment names, as `python -m torch.distributed.run` sets it; else this process alone.

    Args:
        timeout_s: Deadline of a collective call: so long, at most, ranks wait for one that is late.
        device: Where ranks compute, e.g. "cuda": each then has the GPU that `LOCAL_RANK` names.
    """
    is_ours = not dist.is_initialized()
    if is_ours and "WORLD_SIZE" in os.environ:
        dist.init_process_group(_backend(), timeout=timedelta(seconds=timeout_s))
    try:
        yield _here(device) if dist.is_initialized() else alone(device)
    finally:
        if is_ours:
            dist.destroy_process_group()


def alone(device: torch.device | str = "cpu") -> Ranks:
    """This process as the only rank, to its end: for scripts and notebooks."""
    if not dist.is_initialized():
        dist.init_process_group(_backend(), store=HashStore(), rank=0, world_size=1)
    assert dist.get_world_size() == 1, "this process is one of several ranks: use join"
    return _here(torch.device(device))


def _here(device: torch.device) -> Ranks:
    size = dist.get_world_size()
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    return Ranks(dist.get_rank(), size, device, init_device_mesh(device.type, (size,)))


def _backend() -> str:
    """What is on the CPU, e.g. objects and what is offloaded, goes by gloo."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def _first_failure(reason: str) -> str:
    """Leave the reason of a failure where the ranks met, unless one is there; what is there now."""
    with suppress(Exception):  # the store ends with the process that holds it
        return _get_default_store().compare_set(_FAILURE, "", reason).decode()
    return reason


def _is_of_a_peer(error: Exception) -> bool:
    """Whether a collective call failed here because of another rank."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)
