"""What the loss saw of each token, for people who look at single tokens of a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from numpy.typing import NDArray

FLOATS = (
    *("logprob", "log_ratio", "level_log_ratio", "entropy", "advantage"),
    *("proximal", "reference", "clean"),
)
"""Columns of float32. `logprob` is under the policy of the loss: with ALP, the perturbed one;
`log_ratio` is its difference to the denominator, and `level_log_ratio` that of the token's turn or
sequence where the ratio is formed over these; `clean` is the logprob without noise."""
CLIPPED = "clipped"
"""Column of uint8: bit i is set where the surrogate clips on the i-th of its sides, in the order of
their names."""


@dataclass(frozen=True, slots=True)
class TokenValues:
    """One sequence in the loss."""

    uid: int
    """Identity of the sequence within the run."""
    update: int
    """Number of updates of the run before the one that it was in."""
    columns: Mapping[str, NDArray]
    """Name -> [n], one entry per loss token, in order; see `FLOATS` and `CLIPPED`."""
    clip_sides: tuple[str, ...]
    """Names of the sides, in the order of the bits."""

    def __len__(self) -> int:
        return len(self.columns["logprob"])
