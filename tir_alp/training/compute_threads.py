"""The threads that torch computes with on a CPU, of which each of our threads has some of its own.

OpenMP keeps a team of threads for every thread that ever computed something. GNU's, which torch for
Linux comes with, lets them wait for work awake only while there are at most as many as processors.
With the teams of the thread that loaded the model, of the trainer and of the engine there are more,
and then every product of matrices begins by waking up sleepers: a decode step of SmolLM2-135M in
bfloat16 took twice as long on two cores (docs/performance.md). How long they stay awake is set in
`tir_alp.process`.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

_SOFT = 1  # `omp_pause_soft` of OpenMP 5.0: what the program has set stays as it is


@functools.cache
def _pause() -> Callable[[int], int] | None:
    """Return OpenMP's own function from what torch is linked with; None if it has none."""
    return getattr(ctypes.CDLL(torch._C.__file__), "omp_pause_resource_all", None)


def release_threads() -> None:
    """End the team of the calling thread, which gets another one when it computes again.

    That takes less than a tenth of a millisecond, so it is for when the thread has finished a step,
    or has nothing to do. Must not be called within an operation of torch.
    """
    if (pause := _pause()) is not None:
        pause(_SOFT)


def releasing(call: Callable[P, T]) -> Callable[P, T]:
    """Return a function that ends the team of its thread after a call."""

    @functools.wraps(call)
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return call(*args, **kwargs)
        finally:
            release_threads()

    return called
