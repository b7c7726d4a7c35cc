"""The gradient norms of recent updates, with which the next one is compared."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from statistics import median

import torch
from torch import Tensor

_MOST_NORMS = 64  # updates whose norms are kept
_LEAST_NORMS = 8  # with fewer norms, no spike can be recognised


class GradientNorms:
    """The norms of the last updates that were made, by name.

    Args:
        names: Names of the norms that every update has.
        factor: A norm is a spike if it is more than this times the median of recent ones; None: no
            norm is.
    """

    def __init__(self, names: Iterable[str], factor: float | None) -> None:
        self._recent = {name: deque[float](maxlen=_MOST_NORMS) for name in names}
        self._factor = factor

    def is_sound(self, loss: float, norms: Mapping[str, float]) -> bool:
        """Whether the loss and the norms of an update are finite, and no norm is a spike."""
        is_finite = all(map(math.isfinite, (loss, *norms.values())))
        return is_finite and not any(
            is_spike(norm, self._recent[name], self._factor) for name, norm in norms.items()
        )

    def add(self, norms: Mapping[str, float]) -> None:
        """Remember the norms of an update that is made."""
        for name, norm in norms.items():
            self._recent[name].append(norm)

    def state(self) -> dict[str, Tensor]:
        """Return the norms as tensors of a checkpoint, which have fixed shapes."""
        return {name: _padded(norms) for name, norms in self._recent.items()}

    def finish_loading(self, state: Mapping[str, Tensor]) -> None:
        """Take what was read into the tensors of `state`."""
        for name, norms in self._recent.items():
            norms.clear()
            norms.extend(norm for norm in state[name].tolist() if norm == norm)


def is_spike(norm: float, recent: Sequence[float], factor: float | None) -> bool:
    """Whether a gradient norm is more than `factor` times the median of recent norms."""
    if factor is None or len(recent) < _LEAST_NORMS:
        return False
    return norm > factor * median(recent)


def _padded(norms: Sequence[float]) -> Tensor:
    """[_MOST_NORMS] float64, padded with NaN."""
    missing = [torch.nan] * (_MOST_NORMS - len(norms))
    return torch.tensor([*norms, *missing], dtype=torch.float64)
