"""What the embedded engine keeps of sequences whose last completion has ended."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from tir_alp.engines.embedded.request import EmbeddedRequest, ParkedSequence


class ParkedSequences:
    """Parked sequences by uid, the oldest first."""

    def __init__(self) -> None:
        self._by_uid: OrderedDict[int, ParkedSequence] = OrderedDict()
        self.num_tokens = 0
        """Tokens held, without those of prefixes."""

    def __iter__(self) -> Iterator[ParkedSequence]:
        return iter(self._by_uid.values())

    def __len__(self) -> int:
        return len(self._by_uid)

    def put(self, uid: int, parked: ParkedSequence) -> None:
        """Keep a sequence, of which nothing is kept so far."""
        self._by_uid[uid] = parked
        self.num_tokens += parked.num_own

    def drop(self, uid: int) -> ParkedSequence | None:
        """Let go of a sequence, and return what was kept of it."""
        parked = self._by_uid.pop(uid, None)
        if parked is not None:
            self.num_tokens -= parked.num_own
        return parked

    def drop_oldest(self) -> None:
        """Let go of the sequence that was put first."""
        self.drop(next(iter(self._by_uid)))

    def hand_over(self, request: EmbeddedRequest) -> None:
        """Give what is kept of a request's sequence to it, if its prompt begins with that."""
        parked = self.drop(request.sampling.sequence_uid)
        if parked is None or len(parked.token_ids) >= len(request.prompt):
            return
        if request.prompt[: len(parked.token_ids)] == parked.token_ids:
            request.parked, request.prefix = parked, parked.prefix

    def take_back(self, request: EmbeddedRequest) -> None:
        """Undo `hand_over` for a request that cannot join yet, and what else it was to begin with.

        What it would begin with may be gone when it joins.
        """
        parked, request.parked, request.prefix = request.parked, None, None
        if parked is not None:
            self.put(request.sampling.sequence_uid, parked)

    def clear(self) -> None:
        """Let go of everything."""
        self._by_uid.clear()
        self.num_tokens = 0
