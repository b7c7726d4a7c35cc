"""What can be read of a model without its weights."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from tir_alp.training.model_folder import check_model_folder, load_config, unknown_architecture
from tir_alp.types import Origin


def load_outline(path: str) -> Any:
    """Load a causal LM whose weights have shapes but no values.

    Raises:
        ValueError: If there is no such model.
    """
    path = local_path(path)
    config = load_config(path)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except ValueError as error:  # it is no causal LM
        raise ValueError(unknown_architecture(path, error)) from error
    with suppress(OSError):  # not every model has a generation config
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model


def end_token_ids(model: Any) -> frozenset[int]:
    """Return the tokens that end a sequence by the model's config and generation config."""
    return _end_token_ids([model.config, getattr(model, "generation_config", None)])


def _end_token_ids(configs: Iterable[Any]) -> frozenset[int]:
    found: set[int] = set()
    for config in configs:
        ids = getattr(config, "eos_token_id", None)
        found |= set() if ids is None else {ids} if isinstance(ids, int) else set(ids)
    return frozenset(found)


def declared_end_token_ids(path: str) -> frozenset[int]:
    """Return the tokens that end a sequence by the config files of a model.

    Raises:
        ValueError: If there is no such model.
    """
    path = local_path(path)
    found = [load_config(path)]
    with suppress(OSError):  # not every model has a generation config
        found.append(GenerationConfig.from_pretrained(path))
    return _end_token_ids(found)


def new_origin(path: str) -> Origin:
    """Return the origin of what begins now with a model.

    Raises:
        ValueError: If there is no such model, or its folder lacks a part.
    """
    check_model_folder(local_path(path))
    return Origin(datetime.now(), tuple(sorted(declared_end_token_ids(path))))


def local_path(path: str) -> str:
    """Return a folder with `~` expanded, and a Hugging Face id unchanged.

    Raises:
        ValueError: If the path is a file, or looks like a folder and is not one.
    """
    if (file := Path(path).expanduser()).is_file():
        raise ValueError(
            f"the model {path!r} is a file: give the folder that it is in, "
            f"{file.resolve().parent}, or a GGUF file"
        )
    looks_local = path.startswith(("/", ".", "~")) or path.count("/") > 1
    expanded = str(Path(path).expanduser()) if looks_local else path
    if looks_local and not Path(expanded).is_dir():
        raise ValueError(f"there is no model folder {path!r}; give a folder or a Hugging Face id")
    return expanded
