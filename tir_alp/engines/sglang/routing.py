"""The experts that computed each token in an SGLang server, as it reports them."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROUTING_FLAG = "--enable-return-routed-experts"
"""Argument of a server that reports them."""

RoutingShape = tuple[int, int]
"""Decoder layers, and experts that compute a token in one of them."""


def routing_shape(outline: Any) -> RoutingShape | None:
    """Return the shape of a token's routing, or None if the model has no experts.

    Args:
        outline: The model, without weights.
    """
    config = outline.config.get_text_config()
    number = getattr(config, "num_experts_per_tok", None)
    return (config.num_hidden_layers, number) if isinstance(number, int) and number > 0 else None


def read_routing(meta: Mapping[str, Any], shape: RoutingShape | None) -> NDArray | None:
    """Read the routing [K, L, E] int16 of a sequence's first tokens from what a server reports.

    Args:
        meta: What it reports of a completion.
        shape: L and E; None: it was not asked.

    Returns:
        None if it was not asked, or does not report it.

    Raises:
        ValueError: If what it reports does not have this shape.
    """
    if shape is None or (data := meta.get("routed_experts")) is None:
        return None
    return np.frombuffer(base64.b64decode(data), "<i4").reshape(-1, *shape).astype(np.int16)
