"""Sampling from models that have more between their tokens than keys and values.

Linear attention, state spaces and convolutions keep states, and windows roll: transformers' own
caches hold all that. Every request has a cache and a forward of its own. How much of a sequence a
model reads exactly with its cache is measured when the engine opens, because some families ignore
their states when they read several tokens at once, and some caches are wrong:

* `in pieces`: a sequence is read on from where its cache ends;
* `token by token`: only a whole sequence is read at once, and after that one token at a time;
* `anew`: nothing is kept, and the whole sequence is read for each token.

The first that is exact is used. The last one always is, and slow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache

from tir_alp.engines.embedded.forward import CachedForward
from tir_alp.engines.embedded.prefix import Prefix, States
from tir_alp.engines.embedded.request import EmbeddedRequest
from tir_alp.training.arrangement import SPELLED_OUT, TOLERANCE
from tir_alp.training.policy import next_token_logits

Reading = Literal["in pieces", "token by token", "anew"]
READINGS: tuple[Reading, ...] = ("in pieces", "token by token", "anew")
_PIECES: dict[Reading, tuple[int, ...]] = {
    "in pieces": (12, 1, 9, 1, 1, 8),
    "token by token": (12, *(1,) * 20),
}
"""Lengths of the pieces in which a sequence is read to measure a reading; windows are shorter."""


class OwnCaches:
    """One cache of transformers per running request, in the order of the requests.

    It has the members of `KVCache` that the engine uses. Nothing is shared between rows.
    """

    shares_prefixes = False

    def __init__(self, model: Any, reading: Reading) -> None:
        self._config = model.config.get_text_config()
        self.reading = reading
        self.caches: list[DynamicCache] = []
        self.lengths: list[int] = []
        """Tokens cached in each row."""
        self.num_shared = 0

    @property
    def size(self) -> int:
        """Tokens that the caches hold."""
        return sum(self.lengths)

    def add_row(self, prefix: Prefix | None = None) -> int:
        """Append an empty row; returns its index."""
        assert prefix is None
        self.caches.append(DynamicCache(config=self._config))
        self.lengths.append(0)
        return len(self.lengths) - 1

    def num_cached(self, row: int) -> int:
        """Tokens of a sequence that are cached."""
        return self.lengths[row]

    def routing(self, row: int) -> None:
        """Experts of the cached tokens, which are not recorded here."""

    def copy_row(self, row: int) -> States:
        """Return what a row has cached; the row is to be removed, so nothing is copied."""
        return {0: (self.caches[row], self.lengths[row])}  # pyright: ignore[reportReturnType]

    def fill_row(self, row: int, states: States) -> None:
        """Fill an empty row with what another one had cached."""
        self.caches[row], self.lengths[row] = states[0]  # pyright: ignore

    def remove_row(self, row: int) -> None:
        """Remove a row; the last row takes its index."""
        self.caches[row], self.lengths[row] = self.caches[-1], self.lengths[-1]
        self.caches.pop()
        self.lengths.pop()

    def clear(self) -> None:
        """Remove every row."""
        self.caches.clear()
        self.lengths.clear()

    def size_for(self, num_rows: int, width: int, num_shared: int) -> int:
        """The largest `size` that this number of rows of this width can need."""
        return num_rows * width


class OwnCacheForward(CachedForward):
    """A model that reads and samples with transformers' own caches, one request at a time."""

    def __init__(self, model: Any, caches: OwnCaches, precision: str, logit_noise: float) -> None:
        super().__init__(model, caches, precision, logit_noise)
        self._caches = caches

    @torch.inference_mode()
    def step(self, running: list[EmbeddedRequest], num_joining: int, version: int) -> int:
        """Sample one token for every running request; see `CachedForward.step`."""
        for row in range(len(running) - num_joining, len(running)):
            self._caches.add_row()
            parked, running[row].parked = running[row].parked, None
            if parked is not None:
                self._caches.fill_row(row, parked.states)
        logits = [self._next_logits(row, request.tokens) for row, request in enumerate(running)]
        self._draw(running, torch.stack(logits), version)
        return len(running)

    def _next_logits(self, row: int, tokens: Sequence[int]) -> Tensor:
        """[V] logits of the token after a sequence."""
        caches, start = self._caches, self._caches.lengths[row]
        ids = torch.tensor(tokens, device=self.model.device)
        if caches.reading == "anew":
            return read(self.model, ids, [])[-1]
        unread = len(tokens) - start
        in_one = start == 0 or caches.reading == "in pieces"
        pieces = [unread] if in_one else [1] * unread
        caches.lengths[row] = len(tokens)
        return read(self.model, ids[start:], pieces, caches.caches[row])[-1]


def read(
    model: Any, ids: Tensor, pieces: Sequence[int], cache: DynamicCache | None = None
) -> Tensor:
    """Return the logits [T, V] of tokens.

    Args:
        model: A causal LM.
        ids: [T] tokens, of which `cache` has none yet.
        pieces: The numbers of tokens to read at a time; of no meaning without a cache.
        cache: What was read before them, which grows; None: nothing is kept.
    """
    decoder = model.get_decoder()
    if cache is None:
        hidden = decoder(input_ids=ids[None], use_cache=False).last_hidden_state[0]
        return next_token_logits(model, hidden[-1:] if not pieces else hidden)
    found = [
        decoder(input_ids=piece[None], past_key_values=cache, use_cache=True).last_hidden_state[0]
        for piece in ids.split(list(pieces))
    ]
    return next_token_logits(model, found[-1][-1:] if len(pieces) == 1 else torch.cat(found))


@torch.no_grad()
def measure_reading(model: Any) -> Reading:
    """Find out how a model that is not packed reads exactly, and let it use its own attention."""
    model.set_attn_implementation(SPELLED_OUT)
    generator = torch.Generator().manual_seed(0)
    size = model.get_input_embeddings().weight.shape[0]
    for reading in READINGS[:-1]:
        pieces = _PIECES[reading]
        ids = torch.randint(size, (sum(pieces),), generator=generator).to(model.device)
        own = read(model, ids, pieces)
        try:
            cache = DynamicCache(config=model.config.get_text_config())
            found = read(model, ids, pieces, cache)
        except Exception:  # the family has a cache of another kind
            continue
        shift = (found - own).norm(dim=-1) / own.norm(dim=-1)
        if shift.nan_to_num(nan=torch.inf).max() <= TOLERANCE:
            return reading
    return "anew"
