"""The embedded engine's model: one forward per step over the running batch, and its weights.

Everything here runs in the engine's own thread; nothing here decides which requests run.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tir_alp.algorithm.noise import name_hashes, normal, nth_keys
from tir_alp.engines.base import EngineFailed
from tir_alp.engines.embedded.adapted_linear import adapt
from tir_alp.engines.embedded.layouts import CachedStep, PrefixRead
from tir_alp.engines.embedded.precision import layer_matrices, quantised
from tir_alp.engines.embedded.prefix import Prefix
from tir_alp.engines.embedded.request import EmbeddedRequest
from tir_alp.engines.embedded.sampling import sample
from tir_alp.engines.embedded.thin_linear import use_thin_linears
from tir_alp.training.policy import cast_parameters, hidden_states, next_token_logits
from tir_alp.training.routing import find_routers, recorded


class CachedForward:
    """A model that reads and samples with the cache.

    Args:
        model: A causal LM loaded by `load_policy`; it is written to.
        cache: The keys and values of the running requests, one row per request, in their order.
        precision: "float32", "bfloat16", "float16", "int8" or "fp8"; see `TransformersConfig`.
        logit_noise: Standard deviation of noise on the logits.
    """

    def __init__(self, model: Any, cache: Any, precision: str, logit_noise: float) -> None:
        self.model: Any = model.eval().requires_grad_(False)
        self._routers = find_routers(model)
        self._cache, self._precision, self._logit_noise = cache, precision, logit_noise
        if precision in ("bfloat16", "float16"):
            cast_parameters(model, getattr(torch, precision))
        use_thin_linears(self.model)
        self._quantised = layer_matrices(model) if precision in ("int8", "fp8") else frozenset()
        if self._quantised:
            self.copy_weights(model.state_dict())

    @torch.no_grad()
    def copy_weights(self, source: Mapping[str, Tensor]) -> int:
        """Copy weights into the model; returns the number of tensors compared afterwards.

        Raises:
            EngineFailed: If a tensor that is not quantised differs from its source afterwards.
        """
        own = self.model.state_dict()
        for name, tensor in own.items():
            new = source[name]
            tensor.copy_(quantised(new, self._precision) if name in self._quantised else new)
        compared = [name for name in own if name not in self._quantised]
        return _compare(own, source, compared)

    @torch.no_grad()
    def copy_adapters(self, source: Mapping[str, Tensor], scale: float) -> int:
        """Copy adapters beside the weights; returns the number of tensors compared afterwards.

        Raises:
            ValueError: If the model has no such linear layers; nothing is changed.
            EngineFailed: If a tensor differs from its source afterwards.
        """
        own = adapt(self.model, source, scale)
        for name, tensor in own.items():
            tensor.copy_(source[name])
        return _compare(own, source, own)

    @torch.inference_mode()
    def step(self, running: list[EmbeddedRequest], num_joining: int, version: int) -> int:
        """Sample one token for every running request.

        A request that joins reads its tokens, except for those that its sequence has parked and
        those of its prefix, which is read once for all. Where another row begins with the same
        tokens, it copies their keys and values and reads the last token alone.

        Args:
            running: The requests, in the order of the cache's rows. Those that join are ordered
                anew.
            num_joining: How many of them, at the end, have no row yet.
            version: Policy version of the model's weights.

        Returns:
            The number of tokens sampled.
        """
        first = len(running) - num_joining
        if first:
            old = running[:first]
            self._forward(range(first), old, [each.token_ids[-1:] for each in old], version)
        if not num_joining:
            return len(running)
        self._read_prefixes(running[first:])
        sources = _beginnings(running, first)
        second = len(running) - len(sources)  # the first of those that read one token
        for row in range(first, second):
            self._cache.add_row(running[row].prefix)
            parked, running[row].parked = running[row].parked, None
            if parked is not None:
                self._cache.fill_row(row, parked.states)
        self._read(range(first, second), running, version)
        for row, source in zip(range(second, len(running)), sources, strict=True):
            self._cache.add_row(running[row].prefix)
            if source is not None:
                missing = running[row].num_tokens - 1 - self._cache.num_cached(row)
                self._cache.copy_beginning(source, row, missing)
        self._read(range(second, len(running)), running, version)
        return len(running)

    def _read_prefixes(self, joining: Sequence[EmbeddedRequest]) -> None:
        """Read the prefixes of requests that no forward has read yet."""
        prefixes = dict.fromkeys(each.prefix for each in joining if each.prefix is not None)
        new = [prefix for prefix in prefixes if prefix.stack is None]
        if new:
            layout = PrefixRead(new, self.model.device)
            token_ids = torch.tensor([token for prefix in new for token in prefix.token_ids])
            self._hidden_states(token_ids, layout.positions, layout)

    def _read(self, rows: range, running: Sequence[EmbeddedRequest], version: int) -> None:
        """Read what is not in the cache of some rows, and sample a token for each."""
        if not rows:
            return
        requests = [running[row] for row in rows]
        unread = [
            each.tokens[self._cache.num_cached(row) :]
            for row, each in zip(rows, requests, strict=True)
        ]
        self._forward(rows, requests, unread, version)

    def _forward(
        self,
        rows: range,
        requests: Sequence[EmbeddedRequest],
        new_tokens: Sequence[Sequence[int]],
        version: int,
    ) -> None:
        device = self.model.device
        step = CachedStep(self._cache, rows, [len(tokens) for tokens in new_tokens], device)
        token_ids = torch.tensor([token for tokens in new_tokens for token in tokens])
        hidden = self._hidden_states(token_ids, step.positions, step)
        step.commit()
        self._draw(requests, next_token_logits(self.model, hidden[step.last]), version)

    def _hidden_states(
        self, token_ids: Tensor, positions: Tensor, layout: CachedStep | PrefixRead
    ) -> Tensor:
        """Run the decoder, and keep which experts computed each token beside the keys."""
        token_ids = token_ids.to(self.model.device)
        if self._routers is None:
            return hidden_states(self.model, token_ids, positions, layout)
        with recorded(self.model, self._routers) as recording:
            hidden = hidden_states(self.model, token_ids, positions, layout)
        layout.keep_routing(recording.experts())
        return hidden

    def _draw(self, requests: Sequence[EmbeddedRequest], logits: Tensor, version: int) -> None:
        """Draw the next token of each request from its logits, [R, V]."""
        device = logits.device
        if self._logit_noise > 0:
            logits = logits + self._noise(requests, logits.shape[1]).to(device)
        drawn = sample(
            logits,
            torch.tensor([request.sampling.temperature for request in requests]),
            torch.tensor([request.sampling.top_p for request in requests]),
            torch.tensor([request.uniforms[len(request.token_ids)] for request in requests]),
        )
        token_ids, logprobs = torch.stack([each.double() for each in drawn]).tolist()  # one wait
        for request, token_id, logprob in zip(requests, token_ids, logprobs, strict=True):
            if request.stop_reason is None:  # else it was aborted while this forward ran
                request.push(int(token_id), logprob, version)

    def _noise(self, requests: Sequence[EmbeddedRequest], vocab_size: int) -> Tensor:
        """[R, V] noise, a function of run seed, sequence and position."""
        streams = name_hashes(
            f"logits/{each.sampling.seed}/{each.sampling.sequence_uid}" for each in requests
        )
        positions = torch.tensor([each.num_tokens for each in requests])
        return self._logit_noise * normal(nth_keys(streams, positions), vocab_size)


def _compare(
    own: Mapping[str, Tensor], source: Mapping[str, Tensor], names: Collection[str]
) -> int:
    """Compare tensors with their source, bit for bit; returns their number."""
    for name in names:
        if not torch.equal(own[name], source[name].to(own[name])):
            raise EngineFailed(
                f"the engine does not hold the weights that it was given: {name!r} differs. "
                "Its numbers are not finite, or its model has it tied to another tensor"
            )
    return len(names)


def _beginnings(running: list[EmbeddedRequest], first: int) -> list[int | None]:
    """Order the requests from `first` on so that those that need to read one token come last.

    Returns:
        For each of these, in order, the row that begins with its tokens; None: its prefix does.
    """
    known: dict[tuple[int, ...], tuple[int | None, Prefix | None]] = {
        each.prompt: (row, each.prefix)
        for row, each in enumerate(running[:first])
        if len(each.prompt) > 1
    }
    readers: list[EmbeddedRequest] = []
    others: list[tuple[EmbeddedRequest, int | None]] = []
    for request in running[first:]:
        tokens = request.tokens
        source, prefix = known.get(tokens, (None, None))
        if request.parked is None and request.prefix is not None and request.num_unread == 1:
            others.append((request, None))
        elif request.parked is None and source is not None and prefix is request.prefix:
            others.append((request, source))
        else:
            if len(tokens) > 1:
                known.setdefault(tokens, (first + len(readers), request.prefix))
            readers.append(request)
    running[first:] = [*readers, *(request for request, _ in others)]
    return [source for _, source in others]
