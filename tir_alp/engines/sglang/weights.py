"""How new weights get into a running SGLang server, and how it is verified that they did.

Three ways with one interface: a folder that both sides see, tensors in the request, or a broadcast
in a process group. Each is one update to the server: a version is never named before all of its
tensors are loaded. Two checks follow, both against the trainer's own tensors: sampled tensors as
the server reports them, equal to the last bit, and the logprobs of a probe (`engines.probe`).

Not here: who pauses the server, and what happens to one that fails a check.
"""

# torch.distributed exports its stores and groups, but does not declare them:
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import pickle
import random
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from tir_alp.engines.servers.http_client import ServerFailed
from tir_alp.engines.servers.weights import WeightSnapshot, write_version
from tir_alp.engines.sglang.client import SGLangClient

_BUCKET_BYTES = 256 << 20  # of tensors in one request or broadcast
_NUM_SAMPLED = 4  # tensors that are compared after an update
_NUM_ROWS = 2  # of each that are compared
_MOST_ELEMENTS = 1 << 25  # of a sampled tensor: the server sends its rows as text
_GROUP = "tir_alp_weights"
_Group = Any  # a group of gloo or NCCL: torch types neither


class WeightTransfer(Protocol):
    """A way to get weights into a paused server."""

    async def send(self, client: SGLangClient, snapshot: WeightSnapshot) -> None:
        """Load the snapshot's tensors. If it raises ServerFailed, some of them may be loaded."""
        ...

    def forget(self, client: SGLangClient) -> None:
        """Drop the connection to a server that is lost."""
        ...

    def close(self) -> None:
        """Free what is held."""
        ...


class DiskTransfer:
    """Writes a folder that the servers read.

    Args:
        folder: A folder on a file system that trainer and servers share.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._written: asyncio.Task[Path] | None = None
        self._version: int | None = None

    async def send(self, client: SGLangClient, snapshot: WeightSnapshot) -> None:
        """Write the snapshot, once for all servers, and have the server read it."""
        if self._written is None or self._version != snapshot.version:
            self._version = snapshot.version
            self._written = asyncio.create_task(
                asyncio.to_thread(write_version, self._folder, snapshot)
            )
        path = await asyncio.shield(self._written)
        await client.call(
            "/update_weights_from_disk",
            client.load_timeout_s,
            model_path=str(path),
            weight_version=client.label(snapshot.version),
        )

    def forget(self, client: SGLangClient) -> None:
        """Do nothing: there is no connection."""

    def close(self) -> None:
        """Remove what was written."""
        for path in self._folder.glob("version_*"):
            shutil.rmtree(path, ignore_errors=True)


class TensorTransfer:
    """Sends tensors inside the request: no shared disk or memory is needed.

    They are sent as plain bytes. The other encoding that SGLang reads, handles of shared memory,
    would tie the lives of trainer and server together.

    Args:
        num_ranks: Tensor-parallel ranks of a server; each gets a copy.
    """

    def __init__(self, num_ranks: int = 1) -> None:
        self._num_ranks = num_ranks

    async def send(self, client: SGLangClient, snapshot: WeightSnapshot) -> None:
        """Send the tensors in buckets; the last one names the version."""
        assert snapshot.tensors is not None
        await client.call("/begin_weight_update", client.load_timeout_s)
        for bucket, is_last in buckets(snapshot.tensors):
            packed = await asyncio.to_thread(pickled, bucket)
            await client.call(
                "/update_weights_from_tensor",
                client.load_timeout_s,
                serialized_named_tensors=[packed] * self._num_ranks,
                flush_cache=is_last,
                **({"weight_version": client.label(snapshot.version)} if is_last else {}),
            )
        await client.call("/end_weight_update", client.load_timeout_s)

    def forget(self, client: SGLangClient) -> None:
        """Do nothing: there is no connection."""

    def close(self) -> None:
        """Do nothing: nothing is held."""


class DistributedTransfer:
    """Broadcasts tensors to the ranks of a server: gloo between CPUs, NCCL between GPUs.

    Each server has a group of its own, so that one that dies takes no other down with it.

    Args:
        backend: "gloo" or "nccl".
        host: Address of this machine, as the servers see it.
        num_ranks: Tensor-parallel ranks of a server.
    """

    def __init__(self, backend: str, host: str = "127.0.0.1", num_ranks: int = 1) -> None:
        self._backend, self._host, self._num_ranks = backend, host, num_ranks
        self._groups: dict[str, tuple[dist.TCPStore, _Group]] = {}
        self._num_groups = 0

    async def send(self, client: SGLangClient, snapshot: WeightSnapshot) -> None:
        """Broadcast the tensors in buckets; the last one names the version."""
        assert snapshot.tensors is not None
        if client.url not in self._groups:
            await self._join(client)
        group = self._groups[client.url][1]
        device = "cuda" if self._backend == "nccl" else "cpu"
        await client.call("/begin_weight_update", client.load_timeout_s)
        for bucket, is_last in buckets(snapshot.tensors):
            received = client.call(
                "/update_weights_from_distributed",
                client.load_timeout_s,
                names=[name for name, _ in bucket],
                dtypes=[str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
                shapes=[list(tensor.shape) for _, tensor in bucket],
                group_name=self._group_name(client),
                flush_cache=is_last,
                **({"weight_version": client.label(snapshot.version)} if is_last else {}),
            )
            tensors = [tensor.to(device) for _, tensor in bucket]
            await asyncio.gather(received, asyncio.to_thread(_broadcast, group, tensors))
        await client.call("/end_weight_update", client.load_timeout_s)

    def forget(self, client: SGLangClient) -> None:
        """Leave the group of a server."""
        self._groups.pop(client.url, None)

    def close(self) -> None:
        """Leave all groups."""
        self._groups.clear()

    def _group_name(self, client: SGLangClient) -> str:
        return f"{_GROUP}_{self._groups[client.url][0].port}"

    async def _join(self, client: SGLangClient) -> None:
        """Make a group of this process, rank 0, and the ranks of a server."""
        size = 1 + self._num_ranks
        limit = timedelta(seconds=client.load_timeout_s)
        store = dist.TCPStore(
            self._host, 0, size, is_master=True, timeout=limit, wait_for_workers=False
        )
        name = f"{_GROUP}_{store.port}"
        # The prefixes that torch, and so the server, gives the keys of a group of this name.
        device = "cuda" if self._backend == "nccl" else "cpu"
        keys: dist.Store = store
        for prefix in (name, f"{name}/", f"{device}/"):
            keys = dist.PrefixStore(prefix, keys)
        joined = client.call(
            "/init_weights_update_group",
            client.load_timeout_s,
            master_address=self._host,
            master_port=store.port,
            rank_offset=1,
            world_size=size,
            group_name=name,
            backend=self._backend,
        )
        _, group = await asyncio.gather(joined, asyncio.to_thread(self._connect, keys, size, limit))
        self._groups[client.url] = (store, group)

    def _connect(self, keys: dist.Store, size: int, limit: timedelta) -> _Group:
        if self._backend == "nccl":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = limit
            return dist.ProcessGroupNCCL(keys, 0, size, options)
        return dist.ProcessGroupGloo(keys, 0, size, limit)


def buckets(
    tensors: Mapping[str, Tensor], max_bytes: int = _BUCKET_BYTES
) -> Iterator[tuple[list[tuple[str, Tensor]], bool]]:
    """Divide tensors into lists of about `max_bytes`; True comes with the last one."""
    bucket: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in tensors.items():
        if bucket and size + tensor.nbytes > max_bytes:
            yield bucket, False
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    yield bucket, True


@dataclass(frozen=True, slots=True)
class TensorCheck:
    """What a successful comparison of sampled tensors covered."""

    num_compared: int
    """Tensors compared; 0 if the model's class reports none, or names them differently."""
    digest: str
    """Digest of their names and of the rows that were compared."""


async def verify_tensors(client: SGLangClient, snapshot: WeightSnapshot) -> TensorCheck:
    """Compare sampled tensors with what the server reports, to the last bit.

    Raises:
        ServerFailed: If one differs; or if the server reports none of them and the snapshot has no
            probe, so that nothing shows whether it has these weights.
    """
    assert snapshot.tensors is not None
    names = sorted(n for n, t in snapshot.tensors.items() if 0 < t.numel() <= _MOST_ELEMENTS)
    drawn = random.Random(snapshot.version).sample(names, min(_NUM_SAMPLED, len(names)))
    digest = hashlib.blake2b(digest_size=16)
    num_compared = 0
    for name in drawn:
        rows = await client.weights_by_name(name, _NUM_ROWS)
        if rows is None:
            continue
        reported = torch.tensor(rows, dtype=torch.float32)
        expected = snapshot.tensors[name][:_NUM_ROWS].float()
        if not torch.equal(reported, expected):
            raise ServerFailed(
                f"{client.url} does not have the weights of version {snapshot.version}: {name!r} "
                "differs from the trainer's"
            )
        digest.update(name.encode() + expected.numpy().tobytes())
        num_compared += 1
    if not num_compared and snapshot.probe is None:
        raise ServerFailed(
            f"{client.url} reports none of {len(drawn)} sampled tensors, and there is no probe: "
            f"nothing shows whether it has the weights of version {snapshot.version}"
        )
    return TensorCheck(num_compared, digest.hexdigest())


def pickled(tensors: list[tuple[str, Tensor]] | dict[str, Tensor]) -> str:
    """Return tensors as SGLang reads them out of a request."""
    packed = io.BytesIO()
    pickle.dump(tensors, packed)
    return base64.b64encode(packed.getvalue()).decode()


def _broadcast(group: _Group, tensors: list[Tensor]) -> None:
    for work in [group.broadcast(tensor, 0) for tensor in tensors]:
        work.wait()
