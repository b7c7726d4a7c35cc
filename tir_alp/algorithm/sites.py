"""Where in a causal LM noise can go: its decoder layers, or its output head."""

from __future__ import annotations

from torch import nn


def find_output_head(model: nn.Module) -> nn.Module:
    """The module that makes logits of hidden states, of a model that may be wrapped."""
    for module in model.modules():
        get = getattr(module, "get_output_embeddings", None)
        if callable(get) and isinstance(head := get(), nn.Module):
            return head
    raise ValueError(f"{type(model).__name__} has no output head: it makes no logits")


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
