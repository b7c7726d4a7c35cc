"""ALP: learnable Gaussian noise on the hidden state that enters each decoder layer.

    h'_l = h_l + sigma_l * eps_l,      eps_l ~ N(0, I),      sigma_l = exp(log_sigma_l)

No class is patched and the model is not changed: `LayerwisePerturbation.active` registers forward
hooks on the layers, or for the ablation `site="logits"` on the output head, and removes them again.
Outside of it the model is bit for bit unchanged, and `log_sigma` is never part of the model's state
dict.

The noise is not drawn from a generator but *looked up* (`noise.py`): it is a pure function of
(seed, update, sequence uid, draw, layer, position, channel); in a prompt that several sequences
share, the uid is that of the prompt. Everything else follows from this invariant: a token gets the
same noise however its sequence is padded, packed, split over micro-batches or recomputed, on every
device and in every dtype, whether a shared prompt is computed once or for each of its sequences,
and a resumed run needs no saved state.

The optimizer group of `log_sigma`, and the sum of its gradient over data-parallel ranks, belong to
the trainer.

Axis letters: B sequences, T tokens of the longest sequence, N tokens of all, L layers, H hidden.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.hooks import RemovableHandle

from tir_alp.algorithm.noise import name_hashes, normal_pieces, nth_keys
from tir_alp.algorithm.presets import PerturbationConfig
from tir_alp.algorithm.sites import find_decoder_layers, find_output_head

PaddingSide = Literal["left", "right"]

_NUM_MEASURED = 256  # number of tokens that an `Effect` measures: a sample, to save time
_LOGITS = "logits"


class NoiseKey(NamedTuple):
    """Key of the noise of one sequence in one update, for a given seed and layer."""

    update: int
    """Number of optimizer updates before this one."""
    sequence_uid: int
    """Identity of the sequence within the run."""
    prompt_uid: int | None = None
    """Identity of its prompt within the run. Sequences with the same one have the same noise in
    their prompts, so that these can be computed once; None: the prompt is like other tokens."""
    num_prompt_tokens: int = 0
    """Number of tokens of the prompt, with which the sequence begins; 0 if `prompt_uid` is None."""


@dataclass(slots=True)
class Effect:
    """What the noise did to the states that it was added to; filled only when measured.

    The keys are those of `LayerwisePerturbation.names`. Rounding to the compute dtype can lose a
    small sigma, so look here rather than at sigma.
    """

    changed: dict[str, Tensor] = field(default_factory=dict)
    """Share of the elements of h' that differ from h in the compute dtype; scalars."""
    relative: dict[str, Tensor] = field(default_factory=dict)
    """RMS(h' - h) / RMS(h); scalars."""

    def record(self, name: str, hidden: Tensor, perturbed: Tensor, tokens: _TokenMap) -> None:
        """Measure one layer on its first tokens, without synchronising with the device."""
        state, shift = (_wide(_rows(h)[:_NUM_MEASURED]) for h in (hidden, perturbed))
        shift = shift - state  # 0 in the padding
        num_tokens = torch.tensor(len(state), device=state.device)
        if tokens.is_token is not None:
            is_token = tokens.is_token.flatten()[:_NUM_MEASURED]
            state, num_tokens = torch.where(is_token[:, None], state, 0), is_token.sum()
        self.changed[name] = (shift != 0).sum() / (num_tokens * hidden.shape[-1])
        self.relative[name] = (shift.square().sum() / state.square().sum()).sqrt()

    def metrics(self) -> dict[str, float]:
        """Return each layer's RMS ratio and the means over layers; empty if not measured."""
        if not self.changed:
            return {}
        relative = torch.stack([*self.relative.values()])
        return {
            "alp/effective": torch.stack([*self.changed.values()]).mean().item(),
            "alp/relative_rms": relative.mean().item(),
            **{
                f"alp/relative_rms_{name}": value
                for name, value in zip(self.relative, relative.tolist(), strict=True)
            },
        }


class LayerwisePerturbation:
    """The noise of ALP for any Hugging Face decoder, wrapped or not.

        perturbation = LayerwisePerturbation(model, PerturbationConfig(init_std=0.01))
        keys = [NoiseKey(update=3, sequence_uid=uid) for uid in batch.sequence_uids]
        with perturbation.active(keys, batch.lengths):
            loss = ...model(...)
            loss.backward()                # inside: checkpointed layers run again in backward

    `init_std=0` is exactly off: `log_sigma` is -inf and is not trained, and no hook is registered.

    With `site="logits"` the noise is added to the logits instead, with one sigma. Where logits are
    computed for chosen tokens only, [M, V], the call must name them: `head(hidden, rows=rows)`,
    where `rows` [M] are the positions of their hidden states among the packed tokens. The head
    takes this argument only inside `active`, and requires it there: noise can be neither forgotten
    nor misplaced.

    Create it after the model was moved to its device.
    """

    log_sigma: nn.Parameter
    """[L] float32, one per perturbed layer, or [1] for the logits; requires grad if learnable."""

    def __init__(self, model: nn.Module, config: PerturbationConfig) -> None:
        self.config = config
        self._sites = _find_sites(model, config)
        self._is_active = False
        log_std = math.log(config.init_std) if config.init_std > 0 else -math.inf
        device = next(model.parameters()).device
        self.log_sigma = nn.Parameter(
            torch.full((len(self._sites),), log_std, device=device),
            requires_grad=config.learnable and config.init_std > 0,
        )

    @property
    def sigma(self) -> Tensor:
        """[L] standard deviations, detached."""
        return self.log_sigma.detach().exp()

    @property
    def names(self) -> list[str]:
        """Names of the entries of `log_sigma`: the index of the layer, or "logits"."""
        return [*self._sites]

    @contextmanager
    def active(
        self,
        keys: Sequence[NoiseKey],
        lengths: Sequence[int],
        padding_side: PaddingSide = "right",
        *,
        draw: int = 0,
        measure: bool = False,
        in_forward: Tensor | None = None,
    ) -> Iterator[Effect]:
        """Perturb every forward of the model inside the `with` block.

        Hidden states are either padded, [B, T, H] with T at least the longest length, or packed,
        [1, sum(lengths), H], or packed without the tokens that are computed for another sequence,
        [1, M, H]; the shape tells which.

        With gradient checkpointing (the non-reentrant kind, Hugging Face's default) the layers run
        again in backward, so backward belongs inside too; outside, torch raises `CheckpointError`.

        Args:
            keys: One key per sequence, all different.
            lengths: Number of tokens of each sequence, without padding.
            padding_side: Side of the padding in padded hidden states; padding gets no noise.
            draw: Index of one of the `config.draws` independent draws of an update. With
                `config.antithetic` every odd draw is the negative of the one before it.
            measure: Whether to fill the yielded `Effect`.
            in_forward: [M] int64, positions of the tokens that the forward computes, among the
                packed tokens of all sequences; None: it computes all of them.

        Yields:
            The effect of the last forward; empty unless `measure`.
        """
        if self._is_active:
            raise RuntimeError("this perturbation is already active; `active` does not nest")
        if len(keys) != len(lengths):
            raise ValueError(f"{len(keys)} noise keys for {len(lengths)} lengths")
        if len(set(keys)) != len(keys):
            raise ValueError("two sequences have the same noise key: is sequence_uid set?")
        effect = Effect()
        if self.config.init_std == 0 and self.config.site == "hidden":
            yield effect
            return
        sign = -1 if self.config.antithetic and draw % 2 else 1
        stream = draw // 2 if self.config.antithetic else draw
        streams = _Streams(
            self.config.seed, keys, stream, [*self._sites], lengths, padding_side, sign, in_forward
        )
        handles = []
        self._is_active = True
        try:
            for row, (name, module) in enumerate(self._sites.items()):
                add = functools.partial(self._add, row, name, effect if measure else None)
                hooks = _hooks_of_head if name == _LOGITS else _hooks_of_layer
                handles += hooks(module, streams, add)
            yield effect
        finally:
            self._is_active = False
            for handle in handles:
                handle.remove()

    def _add(
        self, row: int, name: str, effect: Effect | None, hidden: Tensor, tokens: _TokenMap
    ) -> Tensor:
        """Return the states with noise, scaled by the sigma at index `row`."""
        if self.config.init_std == 0:  # a head has its hooks even then, to accept `rows`
            return hidden
        log_sigma = self.log_sigma[row].to(hidden.device)
        units = _units(hidden.detach(), self.config.scale, tokens.is_token)
        token_keys = tokens.token_keys(row)
        perturbed = _AddNoise.apply(hidden, log_sigma, token_keys, units, tokens.sign)
        if effect is not None:
            effect.record(name, hidden.detach(), perturbed.detach(), tokens)
        return perturbed


Perturb = Callable[[Tensor, "_TokenMap"], Tensor]


def _hooks_of_layer(layer: nn.Module, streams: _Streams, add: Perturb) -> list[RemovableHandle]:
    """Register the hook that perturbs the input of a decoder layer."""

    def hook(
        layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        hidden = args[0] if args else kwargs["hidden_states"]
        perturbed = add(hidden, streams.locate(hidden.shape[:-1], hidden.device))
        if args:
            return (perturbed, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": perturbed}

    return [layer.register_forward_pre_hook(hook, with_kwargs=True)]


def _hooks_of_head(head: nn.Module, streams: _Streams, add: Perturb) -> list[RemovableHandle]:
    """Register the hooks that perturb the logits, and let the head accept `rows`."""
    chosen: list[Tensor | None] = []

    def take_rows(
        head: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        chosen[:] = [kwargs.pop("rows", None)]
        return args, kwargs

    def perturb(head: nn.Module, args: tuple[Any, ...], logits: Tensor) -> Tensor:
        (rows,) = chosen
        if rows is not None:
            return add(logits, streams.locate_rows(rows))
        if logits.dim() == 2:
            raise ValueError("logits of chosen tokens need head(hidden, rows=...) to get noise")
        return add(logits, streams.locate(logits.shape[:-1], logits.device))

    return [
        head.register_forward_pre_hook(take_rows, with_kwargs=True),
        head.register_forward_hook(perturb),
    ]


def _find_sites(model: nn.Module, config: PerturbationConfig) -> dict[str, nn.Module]:
    """Return the modules whose states get noise, by name."""
    if config.site == "logits":
        return {_LOGITS: find_output_head(model)}
    layers = find_decoder_layers(model)
    start, stop = config.layers or (0, len(layers))
    if stop > len(layers):
        raise ValueError(f"layers [{start}, {stop}) of a model with {len(layers)} layers")
    return {str(index): layers[index] for index in range(start, stop)}


# ------------------------------------------------------------------------------- adding the noise


class _AddNoise(torch.autograd.Function):
    """h + sigma * unit * eps, added in float32 (or wider) and rounded once, to the dtype of h.

    Backward, with g the gradient of h': dh = g, and dlog_sigma = sigma * sum(unit * eps * g),
    equation (6). The noise is generated in pieces that are used immediately, and generated again
    for backward: 8 bytes per token are kept of it.

    `log_sigma` is saved on purpose even where it is fixed: a checkpointed layer that is recomputed
    without its hook then saves one tensor less, which torch reports.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        log_sigma: Tensor,
        token_keys: Tensor,
        units: Tensor | None,
        sign: int,
    ) -> Tensor:
        ctx.save_for_backward(log_sigma, units, token_keys if ctx.needs_input_grad[1] else None)
        ctx.sign = sign
        sigma = sign * log_sigma.exp()
        perturbed = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        rows, result = _rows(hidden), _rows(perturbed)
        for piece, noise in normal_pieces(token_keys, hidden.shape[-1]):
            wide = _wide(rows[piece])
            scale = sigma if units is None else sigma * units[piece]
            torch.addcmul(wide, noise.to(wide.dtype), scale, out=result[piece])
        return perturbed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        log_sigma, units, token_keys = ctx.saved_tensors
        if token_keys is None:
            return grad, None, None, None, None
        rows, total = _rows(grad), log_sigma.new_zeros((), dtype=_wide_dtype(grad))
        for piece, noise in normal_pieces(token_keys, grad.shape[-1]):
            wide = _wide(rows[piece]) if units is None else _wide(rows[piece]) * units[piece]
            total += torch.dot(wide.flatten(), noise.flatten().to(wide.dtype))
        return grad, ctx.sign * log_sigma.exp() * total, None, None, None


def _units(hidden: Tensor, scale: str, is_token: Tensor | None) -> Tensor | None:
    """Return the unit of sigma for each row of states, [N, 1], 0 in the padding; None: all 1."""
    if scale == "absolute":
        return None if is_token is None else is_token.reshape(-1, 1).to(_wide_dtype(hidden))
    rms = _wide(hidden).square().mean(-1).sqrt().reshape(-1, 1)
    return rms if is_token is None else torch.where(is_token.reshape(-1, 1), rms, 0)


def _rows(states: Tensor) -> Tensor:
    """Return [N, H], one row per token."""
    return states.flatten(0, -2)


def _wide_dtype(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)


def _wide(values: Tensor) -> Tensor:
    return values.to(_wide_dtype(values))


# --------------------------------------------------------------- which token gets which noise


class _TokenMap(NamedTuple):
    """Maps each row of the states to its token, and to the stream of its noise.

    `stream`, `position` and `is_token` are [B, T] if padded and [1, N] if packed.
    """

    stream_keys: Tensor
    """[L, S] int64, one key per perturbed layer and stream."""
    stream: Tensor
    """Index of the token's stream: that of its sequence, or that of its prompt."""
    position: Tensor
    """Position of the token in its sequence."""
    is_token: Tensor | None
    """False in the padding; None: there is no padding."""
    sign: int
    """+1, or -1 for the negative of the noise."""

    def token_keys(self, row: int) -> Tensor:
        """Return the keys [N] int64 of the noise in one layer, one per row of the states."""
        return nth_keys(self.stream_keys[row][self.stream], self.position).flatten()

    def only(self, rows: Tensor) -> _TokenMap:
        """Return the map of some of the packed tokens."""
        return self._replace(stream=self.stream[:, rows], position=self.position[:, rows])


@dataclass(slots=True)
class _Streams:
    """The noise streams of one micro-batch, and the rows of its tokens in the states."""

    seed: int
    keys: Sequence[NoiseKey]
    draw: int
    names: Sequence[str]
    lengths: Sequence[int]
    padding_side: PaddingSide
    sign: int
    in_forward: Tensor | None
    _maps: dict[tuple[torch.Size, torch.device], _TokenMap] = field(default_factory=dict)

    def locate(self, shape: torch.Size, device: torch.device) -> _TokenMap:
        """Map rows to tokens; the result is cached, since all layers see the same shape."""
        if (shape, device) not in self._maps:
            rows = self.in_forward
            if rows is not None and shape == (1, len(rows)):
                self._maps[shape, device] = self._packed(device).only(rows.to(device))
            else:
                self._maps[shape, device] = self._map_tokens(shape, device)
        return self._maps[shape, device]

    def locate_rows(self, rows: Tensor) -> _TokenMap:
        """Map chosen rows of packed states to tokens."""
        return self._packed(rows.device).only(rows)

    def _packed(self, device: torch.device) -> _TokenMap:
        return self.locate(torch.Size((1, sum(self.lengths))), device)

    def _map_tokens(self, shape: torch.Size, device: torch.device) -> _TokenMap:
        rows, columns = shape
        num_tokens, num_sequences = sum(self.lengths), len(self.lengths)
        is_padded = rows == num_sequences and columns >= max(self.lengths)
        if not is_padded and (rows, columns) != (1, num_tokens):
            raise ValueError(
                f"hidden states of {rows} rows of {columns} tokens are neither padded nor packed "
                f"sequences of lengths {list(self.lengths)}"
            )
        lengths = torch.tensor(self.lengths, device=device)
        index = torch.arange(num_sequences, device=device)
        column = torch.arange(columns, device=device)
        is_token = None
        if is_padded:
            starts = columns - lengths if self.padding_side == "left" else torch.zeros_like(lengths)
            position = column - starts[:, None]
            if num_tokens < rows * columns:
                is_token = (position >= 0) & (position < lengths[:, None])
            sequence = index[:, None].expand(shape)
        else:
            sequence = index.repeat_interleave(lengths, output_size=num_tokens)[None]
            starts = lengths.cumsum(0) - lengths
            position = column - starts[sequence]
        of_prompt, num_prompt = self._prompt_streams(device)
        stream = torch.where(position < num_prompt[sequence], of_prompt[sequence], sequence)
        return _TokenMap(self._stream_keys().to(device), stream, position, is_token, self.sign)

    def _prompt_streams(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the index [B] of each sequence's stream for its prompt, and the lengths [B]."""
        places = {uid: len(self.keys) + place for place, uid in enumerate(self._prompts())}
        of_prompt = [
            index if key.prompt_uid is None else places[key.update, key.prompt_uid]
            for index, key in enumerate(self.keys)
        ]
        num_prompt = [0 if key.prompt_uid is None else key.num_prompt_tokens for key in self.keys]
        return torch.tensor(of_prompt, device=device), torch.tensor(num_prompt, device=device)

    def _prompts(self) -> list[tuple[int, int]]:
        """Return the different prompts, as update and identity, in the order of their streams."""
        found = ((key.update, key.prompt_uid) for key in self.keys if key.prompt_uid is not None)
        return [*dict.fromkeys(found)]

    def _stream_keys(self) -> Tensor:
        """Return [L, S] keys: of the sequences, and then of the prompts.

        Layers count from 1; 0 stands for the logits.
        """
        suffix = f"/{self.draw}" if self.draw else ""
        names = [f"{key.update}/{key.sequence_uid}" for key in self.keys]
        names += [f"{update}/prompt/{uid}" for update, uid in self._prompts()]
        streams = name_hashes(f"{self.seed}/{name}{suffix}" for name in names)
        numbers = torch.tensor([0 if name == _LOGITS else int(name) + 1 for name in self.names])
        return nth_keys(streams, numbers[:, None])
