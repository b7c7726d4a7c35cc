"""Probes: short sequences whose logprobs, by the trainer and by an engine, have to agree.

An engine that reports none of its tensors can still be checked: it has the trainer's weights if it
gives the trainer's logprobs.
"""

from __future__ import annotations

from collections.abc import Sequence

from tir_alp.engines.base import AskTrainer, EngineFailed, Probe

PROBE_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.15, "float16": 0.05}
"""Largest mean |difference| of a probe's logprobs, by the engine's dtype, in nats per token.

Equal weights stay far below: 1e-6 for float32, 0.01 to 0.03 for bfloat16 on small models.
"""


class ProbeMaker:
    """Makes the probe of new weights from the sequence that was sampled last.

    Args:
        ask_trainer: Asks the trainer for the logprobs; None: there are no probes.
        first: Token ids of the probe while nothing has been sampled.
        max_tokens: Limit of a probe, in tokens.
    """

    def __init__(
        self, ask_trainer: AskTrainer | None, first: Sequence[int], max_tokens: int = 256
    ) -> None:
        self.ask_trainer = ask_trainer
        self._token_ids, self._max_tokens = tuple(first), max_tokens

    def note(self, token_ids: Sequence[int]) -> None:
        """Remember the beginning of a sequence for the next probe; one token is too few."""
        if len(token_ids) > 1:
            self._token_ids = tuple(token_ids[: self._max_tokens])

    async def make(self) -> Probe | None:
        """Ask the trainer, which has the new weights; None if there is nobody to ask."""
        return None if self.ask_trainer is None else await self.ask_trainer(self._token_ids)


def check_probe(
    probe: Probe, reported: Sequence[float], dtype: str, *, server: str, version: int
) -> float:
    """Compare a server's logprobs of a probe with the trainer's.

    Args:
        probe: The sequence, and the trainer's logprobs.
        reported: What the server reports for the same sequence.
        dtype: Precision of the server's arithmetic.
        server: The server's address, for the message.
        version: Policy version of the weights that it should have.

    Returns:
        The mean |difference|, in nats per token.

    Raises:
        EngineFailed: If the difference is larger than the dtype explains.
    """
    distance = mean_distance(reported, probe.logprobs)
    if not distance <= PROBE_TOLERANCE[dtype]:
        raise EngineFailed(
            f"{server} does not sample from the weights of version {version}: its logprobs of a "
            f"probe are {distance:.3g} nats from the trainer's, and {dtype} explains "
            f"{PROBE_TOLERANCE[dtype]:g}"
        )
    return distance


def mean_distance(some: Sequence[float], others: Sequence[float]) -> float:
    """Mean |difference|; infinite if the lengths differ or a number is not finite."""
    if len(some) != len(others) or not some:
        return float("inf")
    distance = sum(abs(a - b) for a, b in zip(some, others, strict=True)) / len(some)
    return distance if distance == distance else float("inf")
