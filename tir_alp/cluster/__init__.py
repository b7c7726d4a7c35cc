"""A run whose parts are actors of a Ray cluster, each replaced when it dies or hangs.

`cluster` places them; `part` watches one of them; `engine_pool`, `environments` and `trainer` are
what the loop in `train` sees of them, and `*_host` what lives in the actors. Ray is imported
nowhere else.
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
