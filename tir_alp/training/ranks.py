"""Ranks: the processes that train one model together.

Every rank runs the same program in step, and all ranks make their collective calls in the same
order: this is the invariant of all code that gets `Ranks`. A single process is a group of one rank
and runs the same code. Who starts the processes is not decided here.

A rank that fails leaves its reason in the store of the process group before it stops. On the other
ranks the next collective call fails or misses its deadline, and they report that reason.
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
    """Another rank failed, ended or hangs, so this one cannot continue."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process, as one of those that train together."""

    rank: int
    """Index of this rank, from 0."""
    size: int
    """Number of ranks."""
    device: torch.device
    """Device on which this rank computes."""
    mesh: DeviceMesh
    """Mesh of shape [size], over which tensors are sharded."""

    @property
    def is_first(self) -> bool:
        """Whether this rank does what only one rank must do, e.g. write files."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over all ranks, bit for bit the same on each."""
        total = values.detach().clone()
        if self.size > 1:
            dist.all_reduce(total, group=self.mesh.get_group())
        return total

    def meet(self) -> None:
        """Wait until all ranks have called this."""
        if self.size > 1:
            dist.barrier(self.mesh.get_group())

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in their order; values are small and picklable."""
        values: list[T] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self.mesh.get_group())
        return values

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Run a block that needs all ranks; an error on one rank stops all, with its reason.

        An error of this rank is raised unchanged, and left in the store for the other ranks.

        Args:
            what: Description of the block, for the error message.

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
    """Join the group of ranks, and leave it at the end of the block.

    The ranks are those of the process group that exists already, if any; otherwise those that the
    environment variables describe, as `python -m torch.distributed.run` sets them; otherwise this
    process alone.

    Args:
        timeout_s: Deadline of a collective call, in seconds: how long ranks wait for a late one.
        device: Device to compute on. With "cuda" each rank uses the GPU numbered `LOCAL_RANK`.
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
    """Return this process as the only rank, until it ends; for scripts and notebooks."""
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
    """Return the backends: gloo carries what is on the CPU, e.g. objects and offloaded tensors."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def _first_failure(reason: str) -> str:
    """Put a reason of failure into the store, unless it has one; return the one that it has."""
    with suppress(Exception):  # the store may have ended with the process that held it
        return _get_default_store().compare_set(_FAILURE, "", reason).decode()
    return reason


def _is_of_a_peer(error: Exception) -> bool:
    """Whether a collective call failed here because of another rank."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)
