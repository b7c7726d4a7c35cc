"""ALP: learnable Gaussian noise on the hidden state that enters each decoder layer.

    h'_l = h_l + sigma_l * eps_l,      eps_l ~ N(0, I),      sigma_l = exp(log_sigma_l)

No class is patched and the model is not changed: `LayerwisePerturbation.active` puts forward
pre-hooks on the layers and takes them off again. Outside it the model is bit for bit itself, and
`log_sigma` is never part of the model's state dict.

The noise is not drawn from a generator, it is *looked up*: a pure function of (seed, update,
sequence uid, layer, position, channel), made of integer operations and one table. That is the
invariant of this file, and everything else follows from it: the same noise for a token however
its sequence is padded, packed, split over micro-batches or recomputed, on every device and in
every dtype; nothing to save for a resume; nothing to keep for backward, which looks it up again.

Not here: the optimizer group of `log_sigma`, and the sum of its gradient over data-parallel ranks.
Both are the trainer's.

Axis letters: B sequences, T tokens of the longest sequence, N tokens of all, L layers, H hidden.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tir_alp.config import PerturbationConfig

PaddingSide = Literal["left", "right"]

_NUM_MEASURED = 1024  # tokens that an `Effect` looks at: a sample, since it costs time


class NoiseKey(NamedTuple):
    """Names the noise of one sequence in one update; the layer and the run's seed complete it."""

    update: int
    """Optimizer steps before this one."""
    sequence_uid: int
    """Identity of the sequence within the run."""


@dataclass(slots=True)
class Effect:
    """What the noise did to the hidden states, by layer index; filled only when measured.

    sigma can be too small to survive the rounding to the compute dtype, so look here, not at sigma.
    """

    changed: dict[int, Tensor] = field(default_factory=dict)
    """Share of the elements of h' that differ from h in the compute dtype; scalars."""
    relative: dict[int, Tensor] = field(default_factory=dict)
    """RMS(h' - h) / RMS(h); scalars."""

    def record(self, index: int, hidden: Tensor, perturbed: Tensor, place: _Place) -> None:
        """Measure one layer on its first tokens, without waiting for the device."""
        state, shift = (_wide(h.flatten(0, 1)[:_NUM_MEASURED]) for h in (hidden, perturbed))
        shift = shift - state  # 0 in the padding
        num_tokens = torch.tensor(len(state), device=state.device)
        if place.is_token is not None:
            is_token = place.is_token.flatten()[:_NUM_MEASURED]
            state, num_tokens = torch.where(is_token[:, None], state, 0), is_token.sum()
        self.changed[index] = (shift != 0).sum() / (num_tokens * hidden.shape[-1])
        self.relative[index] = (shift.square().sum() / state.square().sum()).sqrt()

    def metrics(self) -> dict[str, float]:
        """Means over the layers, for the log; empty if nothing was measured."""
        if not self.changed:
            return {}
        return {
            "alp/effective": torch.stack([*self.changed.values()]).mean().item(),
            "alp/relative_rms": torch.stack([*self.relative.values()]).mean().item(),
        }


class LayerwisePerturbation:
    """The noise of ALP for any Hugging Face decoder, wrapped or not.

        perturbation = LayerwisePerturbation(model, PerturbationConfig(init_std=0.01))
        keys = [NoiseKey(update=3, sequence_uid=uid) for uid in batch.sequence_uids]
        with perturbation.active(keys, batch.lengths):
            loss = ...model(...)
            loss.backward()                # inside: checkpointed layers run again in backward

    `init_std=0` is exactly off: `log_sigma` is -inf and does not learn, and no hook is placed.

    Build it when the model stands on its device.
    """

    log_sigma: nn.Parameter
    """[L] float32, one a perturbed layer; requires a gradient if learnable."""

    def __init__(self, model: nn.Module, config: PerturbationConfig) -> None:
        layers = find_decoder_layers(model)
        start, stop = config.layers or (0, len(layers))
        if stop > len(layers):
            raise ValueError(f"layers [{start}, {stop}) of a model with {len(layers)} layers")
        self.config = config
        self._layers = {index: layers[index] for index in range(start, stop)}
        self._is_active = False
        log_std = math.log(config.init_std) if config.init_std > 0 else -math.inf
        self.log_sigma = nn.Parameter(
            torch.full((stop - start,), log_std, device=next(model.parameters()).device),
            requires_grad=config.learnable and config.init_std > 0,
        )

    @property
    def sigma(self) -> Tensor:
        """[L] standard deviations, detached."""
        return self.log_sigma.detach().exp()

    @contextmanager
    def active(
        self,
        keys: Sequence[NoiseKey],
        lengths: Sequence[int],
        padding_side: PaddingSide = "right",
        measure: bool = False,
    ) -> Iterator[Effect]:
        """Perturb every forward of the model inside the `with`, and nothing outside it.

        The model's hidden states are either padded, [B, T, H] with T at least the longest
        length, or packed, [1, sum(lengths), H]; which one is seen from their shape.

        With gradient checkpointing (the non-reentrant kind, Hugging Face's default) the layers run
        again in backward, so backward belongs inside too; outside, torch raises `CheckpointError`.

        Args:
            keys: One a sequence, all different.
            lengths: Tokens of each sequence, without padding.
            padding_side: Where padded hidden states have their padding, which gets no noise.
            measure: Whether to fill the yielded `Effect`.

        Yields:
            The effect of the last forward; empty unless `measure`.
        """
        if self._is_active:
            raise RuntimeError("this perturbation is active already; `active` does not nest")
        if len(keys) != len(lengths):
            raise ValueError(f"{len(keys)} noise keys for {len(lengths)} lengths")
        if len(set(keys)) != len(keys):
            raise ValueError("two sequences have the same noise key: is sequence_uid set?")
        effect = Effect()
        if self.config.init_std == 0:
            yield effect
            return
        streams = _Streams(self.config.seed, keys, list(self._layers), lengths, padding_side)
        handles = []
        self._is_active = True
        try:
            for row, (index, layer) in enumerate(self._layers.items()):
                hook = self._hook(row, index, streams, effect if measure else None)
                handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
            yield effect
        finally:
            self._is_active = False
            for handle in handles:
                handle.remove()

    def _hook(
        self, row: int, index: int, streams: _Streams, effect: Effect | None
    ) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], tuple[Any, dict[str, Any]]]:
        """The pre-hook of layer `index` of the model, whose sigma is at `row`."""

        def perturb(hidden: Tensor) -> Tensor:
            place = streams.place(hidden)
            noise = _noise(place, row, hidden.shape[-1])
            log_sigma = self.log_sigma[row].to(hidden.device)
            units = _units(hidden.detach(), self.config.scale, place.is_token)
            perturbed = _AddNoise.apply(hidden, log_sigma, noise, units)
            if effect is not None:
                effect.record(index, hidden.detach(), perturbed.detach(), place)
            return perturbed

        def hook(
            layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[Any, dict[str, Any]]:
            if args:
                return (perturb(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": perturb(kwargs["hidden_states"])}

        return hook


def find_decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a model, by structure: its longest list of modules of one class.

    Lists inside such a list are not looked at: the experts of a layer can outnumber the layers.
    """
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(layer) for layer in module}) == 1
    }
    outermost = [
        module
        for name, module in lists.items()
        if not any(name.startswith(f"{other}.") for other in lists)
    ]
    if not outermost:
        raise ValueError(f"{type(model).__name__} has no nn.ModuleList of decoder layers")
    return max(outermost, key=len)


# ------------------------------------------------------------------------------- adding the noise


class _AddNoise(torch.autograd.Function):
    """h + sigma * unit * eps, added in float32 (or wider) and rounded once, to the dtype of h.

    Backward, with g the gradient of h': dh = g, and dlog_sigma = sigma * sum(unit * eps * g),
    equation (6). Where sigma learns, the noise is kept for that: 4 bytes an element of h, which
    with gradient checkpointing is one layer's at a time.

    `log_sigma` is saved on purpose even where it is fixed: a checkpointed layer that is recomputed
    without its hook then saves one tensor less, which torch reports.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, log_sigma: Tensor, noise: Tensor, units: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(log_sigma, units, noise if ctx.needs_input_grad[1] else None)
        scale = log_sigma.exp() if units is None else log_sigma.exp() * units
        wide = _wide(hidden.flatten(0, 1))
        return torch.addcmul(wide, noise.to(wide.dtype), scale).to(hidden.dtype).view_as(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        log_sigma, units, noise = ctx.saved_tensors
        if noise is None:
            return grad, None, None, None
        wide = _wide(grad.flatten(0, 1)) if units is None else _wide(grad.flatten(0, 1)) * units
        total = torch.dot(wide.flatten(), noise.flatten().to(wide.dtype))
        return grad, log_sigma.exp() * total, None, None


def _units(hidden: Tensor, scale: str, is_token: Tensor | None) -> Tensor | None:
    """[N, 1] unit of sigma at each row of hidden states, 0 in the padding; None: 1 everywhere."""
    if scale == "absolute":
        return None if is_token is None else is_token.reshape(-1, 1).to(_wide_dtype(hidden))
    rms = _wide(hidden).square().mean(-1).sqrt().reshape(-1, 1)
    return rms if is_token is None else torch.where(is_token.reshape(-1, 1), rms, 0)


def _wide_dtype(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)


def _wide(values: Tensor) -> Tensor:
    return values.to(_wide_dtype(values))


# ---------------------------------------------------------------------------- which noise is where


class _Place(NamedTuple):
    """Which token each row of the hidden state is, and where its noise comes from.

    `sequence`, `position` and `is_token` are [B, T] if padded and [1, N] if packed.
    """

    stream_keys: Tensor
    """[L, B] int64, one a perturbed layer and sequence."""
    sequence: Tensor
    """Index of the token's sequence."""
    position: Tensor
    """The token's position there."""
    is_token: Tensor | None
    """False in the padding; None: there is none."""
    num_tokens: int


@dataclass(slots=True)
class _Streams:
    """The noise streams of one micro-batch, and where its tokens stand in its hidden states."""

    seed: int
    keys: Sequence[NoiseKey]
    layers: Sequence[int]
    lengths: Sequence[int]
    padding_side: PaddingSide
    _places: dict[tuple[torch.Size, torch.device], _Place] = field(default_factory=dict)

    def place(self, hidden: Tensor) -> _Place:
        """Locate the tokens: once, since all layers see the same shape, and then from memory."""
        shape, device = hidden.shape[:-1], hidden.device
        if (shape, device) not in self._places:
            self._places[shape, device] = self._locate(shape, device)
        return self._places[shape, device]

    def _locate(self, shape: torch.Size, device: torch.device) -> _Place:
        rows, columns = shape
        num_tokens, num_sequences = sum(self.lengths), len(self.lengths)
        is_padded = rows == num_sequences and columns >= max(self.lengths)
        if not is_padded and (rows, columns) != (1, num_tokens):
            raise ValueError(
                f"hidden states of {rows} rows of {columns} tokens are neither padded nor packed "
                f"sequences of lengths {list(self.lengths)}"
            )
        stream_keys = _stream_keys(self.seed, self.keys, self.layers, device)
        lengths = torch.tensor(self.lengths, device=device)
        index = torch.arange(num_sequences, device=device)
        column = torch.arange(columns, device=device)
        if is_padded:
            starts = columns - lengths if self.padding_side == "left" else torch.zeros_like(lengths)
            position = column - starts[:, None]
            is_token = (position >= 0) & (position < lengths[:, None])
            if num_tokens == rows * columns:
                is_token = None
            sequence = index[:, None].expand(shape)
            return _Place(stream_keys, sequence, position, is_token, num_tokens)
        sequence = index.repeat_interleave(lengths, output_size=num_tokens)
        starts = lengths.cumsum(0) - lengths
        position = column - starts[sequence]
        return _Place(stream_keys, sequence[None], position[None], None, num_tokens)


# -------------------------------------------------------------------------------- making the noise
#
# SplitMix64 (Steele, Lea, Flood 2014): stepping a 64-bit counter by an odd constant and scrambling
# it gives a random word. It is used twice: stream key and position give the key of a token, and
# that with the number of a word gives four 16-bit indices into a table of Gaussian quantiles.


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word


_STEP = _signed(0x9E3779B97F4A7C15)
_MULTIPLIERS = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _stream_keys(
    seed: int, keys: Sequence[NoiseKey], layers: Sequence[int], device: torch.device
) -> Tensor:
    """[L, B] int64, one 64-bit hash a layer and sequence: they name the streams."""
    digests = (
        hashlib.blake2b(f"{seed}/{key.update}/{key.sequence_uid}".encode(), digest_size=8).digest()
        for key in keys
    )
    sequences = torch.tensor([int.from_bytes(each, "little", signed=True) for each in digests])
    steps = (torch.tensor(layers) + 1) * _STEP
    return _scramble(steps[:, None] + sequences).to(device)


def _noise(place: _Place, row: int, num_channels: int) -> Tensor:
    """The noise of one layer: [N, H] float32, a row a token or place; arbitrary in the padding.

    On a CPU it is made in pieces so small that the work on them stays in the cache, and most of it
    on one thread: waking threads for a hundred short operations costs dearly on a busy machine.
    """
    device = place.position.device
    token_keys = place.stream_keys[row][place.sequence] + place.position * _STEP
    token_keys = _scramble(token_keys).flatten()
    num_words = -(-num_channels // 4)
    counters = torch.arange(num_words, device=device) * _STEP
    quantiles = _normal_quantiles(device)
    noise = torch.empty(len(token_keys), num_words * 4, device=device)
    num_at_once = max(1, (1 << 15 if device.type == "cpu" else 1 << 22) // num_words)
    for keys, rows in zip(token_keys.split(num_at_once), noise.split(num_at_once), strict=True):
        words = _scramble(keys[:, None] + counters)
        indices = words.view(torch.uint16).to(torch.int32).flatten()
        torch.index_select(quantiles, 0, indices, out=rows.view(-1))
    return noise[:, :num_channels]


def _scramble(words: Tensor) -> Tensor:
    """SplitMix64's finaliser, in place, on int64: every input bit moves every output bit."""
    _xor_shift(words, 30).mul_(_MULTIPLIERS[0])
    _xor_shift(words, 27).mul_(_MULTIPLIERS[1])
    return _xor_shift(words, 31)


def _xor_shift(words: Tensor, shift: int) -> Tensor:
    high_bits = words.bitwise_right_shift(shift).bitwise_and_((1 << (64 - shift)) - 1)
    return words.bitwise_xor_(high_bits)


@functools.cache
def _normal_quantiles(device: torch.device) -> Tensor:
    """[65536] float32: the quantiles of N(0, 1) at (i + 1/2) / 65536, scaled to variance exactly 1.

    A step function for the Gaussian: their distribution functions differ by at most 2^-17, and no
    value exceeds 4.4. It is what makes the noise cheap, and the same everywhere.
    """
    quantiles = torch.special.ndtri((torch.arange(1 << 16, dtype=torch.float64) + 0.5) / (1 << 16))
    return (quantiles / quantiles.square().mean().sqrt()).float().to(device)
