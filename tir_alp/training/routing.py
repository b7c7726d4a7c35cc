"""Which experts compute each token of a mixture of experts: recorded in one forward, replayed in
another.

Engine and trainer round differently, and a router near a tie then sends a token to other experts,
which changes its logprobs by far more than rounding does. Where the engine reports its choices, the
trainer makes the same ones (R3, arXiv 2510.11370): it weights the engine's experts by its own
scores, so that the router is trained too.

Routers are not known by their names. In each layer, the last `torch.topk` over the tokens chooses
the experts; whether that is so is measured, by replaying its own choices and others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tir_alp.algorithm.sites import find_decoder_layers
from tir_alp.training.arrangement import TOLERANCE, is_packed, ordinary_tokens
from tir_alp.training.attention import PackedSequences
from tir_alp.training.policy import hidden_states, next_token_logits

_NUM_MEASURED = 24  # tokens of the forward that looks for routers

Act = Callable[[int, int, Tensor, Any], Any]
"""Is given the index of the layer, the number of its calls of topk before this one, scores [N, E]
and what was chosen; returns what is chosen instead."""


@dataclass(frozen=True, slots=True)
class Routers:
    """The routers of a model."""

    calls: Mapping[int, int]
    """Index of each layer that has a router -> which of its calls of topk chooses the experts."""
    num_layers: int
    """Decoder layers, with a router or without."""
    num_experts: int
    num_chosen: int
    """Experts that compute a token in one layer."""


@dataclass(slots=True)
class RouterCounts:
    """What routers did in the forwards that were watched, as sums on the device."""

    routers: Routers
    load: dict[int, Tensor] = field(default_factory=dict)
    """Layer -> [E] number of tokens that each expert computed."""
    agreed: Tensor | int = 0
    """Choices of this model that are the replayed ones."""
    compared: Tensor | int = 0

    def add(self, layer: int, own: Tensor, replayed: Tensor | None) -> None:
        """Count the choices of one layer, [N, K] each, without waiting for the device."""
        used = own
        if replayed is not None:
            is_known = replayed >= 0
            used = replayed.where(is_known, own)
            same = (own[:, :, None] == replayed[:, None]).any(-1)
            self.agreed = self.agreed + (same & is_known).sum()
            self.compared = self.compared + is_known.sum()
        ones = torch.ones(used.numel(), dtype=torch.float64, device=used.device)
        load = torch.zeros(self.routers.num_experts, dtype=torch.float64, device=used.device)
        load.scatter_add_(0, used.flatten(), ones)
        self.load[layer] = self.load.get(layer, 0) + load

    def sums(self) -> Tensor:
        """Return all counts as one vector, on the CPU, to be added up over ranks."""
        empty = torch.zeros(self.routers.num_experts, dtype=torch.float64)
        load = [torch.as_tensor(self.load.get(layer, empty)).cpu() for layer in self.routers.calls]
        ends = torch.tensor([float(self.agreed), float(self.compared)], dtype=torch.float64)
        return torch.cat([*load, ends])


def router_metrics(routers: Routers, sums: Tensor) -> dict[str, float]:
    """Describe the counts of all ranks; empty if no forward was watched."""
    *_, agreed, compared = sums.tolist()
    load = sums[:-2].view(-1, routers.num_experts)
    if not load.sum():
        return {}
    share = load / load.sum(-1, keepdim=True)
    entropy = torch.special.entr(share).sum(-1) / math.log(routers.num_experts)
    metrics = {
        "router/entropy": entropy.mean().item(),
        "router/largest_share": share.max(-1).values.mean().item(),
    }
    return metrics | ({"router/agreement": agreed / compared} if compared else {})


class Recording:
    """The choices of a forward."""

    def __init__(self, routers: Routers) -> None:
        self._routers = routers
        self.chosen: dict[int, Tensor] = {}
        """Layer -> [N, K] indices of experts."""

    def experts(self) -> Tensor:
        """Return the choices [N, L, K] int16; -1 in layers without a router."""
        some = next(iter(self.chosen.values())).to(torch.int16)
        none = torch.full_like(some, -1)
        layers = range(self._routers.num_layers)
        return torch.stack([self.chosen.get(each, none).to(some) for each in layers], dim=1)


@contextmanager
def recorded(model: nn.Module, routers: Routers) -> Iterator[Recording]:
    """Record the choices of a forward inside of the `with` block."""
    found = Recording(routers)

    def record(layer: int, number: int, scores: Tensor, chosen: Any) -> Any:
        if routers.calls.get(layer) == number:
            found.chosen[layer] = chosen.indices
        return chosen

    with _watched(model, record):
        yield found


@contextmanager
def replayed(
    model: nn.Module, routers: Routers, experts: Tensor | None, counts: RouterCounts | None = None
) -> Iterator[None]:
    """Make given choices in every forward inside of the `with` block.

    Layers that are recomputed in the backward pass make them again, so it belongs inside too.

    Args:
        model: The model, wrapped or not.
        routers: Its routers.
        experts: [N, L, K] experts of each token that the forward computes, in each layer; -1: the
            model's own choice. None: all choices are its own.
        counts: What is added to, once for each layer.
    """
    counted: set[int] = set()

    def choose(layer: int, number: int, scores: Tensor, chosen: Any) -> Any:
        if routers.calls.get(layer) != number:
            return chosen
        given = None if experts is None else experts[:, layer].to(chosen.indices)
        if counts is not None and layer not in counted:
            counted.add(layer)
            counts.add(layer, chosen.indices, given)
        if given is None:
            return chosen
        used = given.where(given >= 0, chosen.indices)
        return torch.return_types.topk((scores.gather(-1, used), used))

    with _watched(model, choose):
        yield


@contextmanager
def _watched(model: nn.Module, act: Act) -> Iterator[None]:
    """Let `act` see and change what is chosen by topk in each layer of a model."""
    modes: list[_Choices] = []
    handles = []

    def leave(*_: Any) -> None:
        modes.pop().__exit__(None, None, None)

    for index, layer in enumerate(find_decoder_layers(model)):

        def enter(*_: Any, index: int = index) -> None:
            modes.append(_Choices(index, act))
            modes[-1].__enter__()

        # Of a layer that is recomputed, what is inside of its wrapper runs twice.
        inside = getattr(layer, "_checkpoint_wrapped_module", layer)
        handles.append(inside.register_forward_pre_hook(enter))
        handles.append(inside.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Choices(TorchFunctionMode):
    """Lets `act` see each call of topk in one layer."""

    def __init__(self, layer: int, act: Act) -> None:
        super().__init__()
        self._layer, self._act, self._number = layer, act, 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") != "topk":
            return found
        number, self._number = self._number, self._number + 1
        scores = args[0] if args else kwargs["input"]
        return self._act(self._layer, number, scores, found)


@torch.no_grad()
def find_routers(model: Any) -> Routers | None:
    """Find the routers of a model whose sequences are packed, by a few short forwards.

    Args:
        model: A causal LM in float32, loaded by `load_policy`.

    Returns:
        None if there are none, or if their choices cannot be replayed exactly.
    """
    if not is_packed(model) or not any("expert" in name for name, _ in model.named_modules()):
        return None
    ids = ordinary_tokens(model, _NUM_MEASURED, torch.Generator().manual_seed(0))
    layout = PackedSequences((len(ids),), model.device)
    positions = torch.arange(len(ids), device=model.device)
    seen: dict[int, list[tuple[tuple[int, ...], Any]]] = {}

    def look(layer: int, number: int, scores: Tensor, chosen: Any) -> Any:
        seen.setdefault(layer, []).append((tuple(scores.shape), chosen.indices))
        return chosen

    def logits() -> Tensor:
        return next_token_logits(model, hidden_states(model, ids, positions, layout))

    with _watched(model, look):
        own = logits()
    calls = {layer: len(of_layer) - 1 for layer, of_layer in seen.items()}
    shapes = {(of_layer[-1][0], of_layer[-1][1].shape) for of_layer in seen.values()}
    if len(shapes) != 1:
        return None
    ((scores, chosen),) = shapes
    if len(scores) != 2 or scores[0] != len(ids) or scores[1] == chosen[1]:
        return None
    routers = Routers(calls, len(find_decoder_layers(model)), scores[1], chosen[1])
    recording = Recording(routers)
    recording.chosen |= {layer: of_layer[-1][1] for layer, of_layer in seen.items()}
    experts = recording.experts()
    with replayed(model, routers, experts):
        same = logits()
    with replayed(model, routers, (experts + 1) % routers.num_experts):
        other = logits()
    is_same = _shift(same, own) <= TOLERANCE
    return routers if is_same and _shift(other, own) > TOLERANCE else None


def _shift(found: Tensor, own: Tensor) -> float:
    relative = (found - own).norm(dim=-1) / own.norm(dim=-1)
    return relative.nan_to_num(nan=torch.inf).max().item()
