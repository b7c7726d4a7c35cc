"""A run whose roles are actors of a Ray cluster, each replaced when it dies or hangs.

`placement` starts the actors and `watched_actor` watches one of them. `engine_pool`,
`environment_pool` and `remote_trainer` are what the loop in `train` sees of them; the `*_host`
modules are what runs inside them. Ray is imported nowhere else.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tir_alp.config import Config
from tir_alp.roles import Placement


@asynccontextmanager
async def open_cluster(config: Config) -> AsyncIterator[Placement]:
    """Open the cluster that a config names; see `placement.open_cluster`.

    Raises:
        ValueError: Ray is not installed, there is no such cluster, or it is too small.
    """
    try:
        from tir_alp.cluster import placement  # needs Ray, which is optional
    except ImportError as error:
        raise ValueError(f"{error}; a cluster needs: pip install 'tir_alp[ray]'") from error
    async with placement.open_cluster(config) as cluster:
        yield cluster
