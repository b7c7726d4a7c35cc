"""Finds the decoder layers and the output head of a causal LM."""

from __future__ import annotations

from torch import nn


def find_output_head(model: nn.Module) -> nn.Module:
    """Return the module that computes logits from hidden states; the model may be wrapped."""
    for module in model.modules():
        get = getattr(module, "get_output_embeddings", None)
        if callable(get) and isinstance(head := get(), nn.Module):
            return head
    raise ValueError(f"{type(model).__name__} has no output head: it computes no logits")


def find_decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the decoder layers of a model: the longest list of modules in its decoder.

    Lists inside such a list are ignored, because a layer can have more experts than there are
    layers. Layers of a hybrid can have several classes, and what encodes images can have more
    layers than the decoder.
    """
    lists = {
        name: module
        for name, module in _find_decoder(model).named_modules()
        if isinstance(module, nn.ModuleList)
    }
    outermost = [
        module
        for name, module in lists.items()
        if not any(name.startswith(f"{other}.") for other in lists)
    ]
    if not outermost:
        raise ValueError(f"{type(model).__name__} has no nn.ModuleList of decoder layers")
    return max(outermost, key=len)


def _find_decoder(model: nn.Module) -> nn.Module:
    for module in model.modules():
        get = getattr(module, "get_decoder", None)
        if callable(get) and isinstance(decoder := get(), nn.Module):
            return decoder
    return model
