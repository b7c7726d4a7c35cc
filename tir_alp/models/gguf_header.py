"""Reads what a GGUF file says about itself: its metadata and the names of its tensors."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MAGIC = b"GGUF"
_CONTROL, _USER_DEFINED = 3, 4  # in tokenizer.ggml.token_type
_END_KEYS = ("eos", "eot", "eom")

_END_MARKS = (
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "</s>",
)
"""Marks at which programs for GGUF files end a sequence, whatever the file declares."""


@dataclass(frozen=True, slots=True)
class Header:
    """The metadata of a GGUF file."""

    fields: Mapping[str, Any]
    """Metadata by key, e.g. `general.name`; arrays are lists."""
    tensors: frozenset[str]
    """Names of the tensors."""
    num_weights: int
    """Number of elements of all tensors."""
    quantization: str
    """The type of most weights, e.g. `Q4_1`."""

    @property
    def architecture(self) -> str:
        """The family of the model as the file names it, e.g. `llama`."""
        return str(self.fields["general.architecture"])

    @property
    def licence(self) -> str:
        """The licence as the file writes it; empty if it says nothing."""
        return str(self.fields.get("general.license", ""))

    @property
    def chat_template(self) -> str | None:
        """The chat template; None if the file has none."""
        return self.fields.get("tokenizer.chat_template")

    @property
    def splitting(self) -> str | None:
        """How a byte-level tokenizer splits text before it merges; None for another tokenizer."""
        if self.fields.get("tokenizer.ggml.model") != "gpt2":
            return None
        return str(self.fields.get("tokenizer.ggml.pre", "gpt-2"))

    def special_token(self, name: str) -> str | None:
        """Return the text of a token that the file names, e.g. "eos"; None if it does not."""
        index = self.fields.get(f"tokenizer.ggml.{name}_token_id")
        return None if index is None else self.fields["tokenizer.ggml.tokens"][int(index)]

    @property
    def marks(self) -> dict[str, bool]:
        """Tokens that text is never merged into, and whether each is a control token."""
        return {
            token: kind == _CONTROL
            for token, kind in zip(
                self.fields.get("tokenizer.ggml.tokens", ()),
                self.fields.get("tokenizer.ggml.token_type", ()),
                strict=False,
            )
            if kind in (_CONTROL, _USER_DEFINED)
        }

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a sequence: those that the file declares, then the usual marks."""
        tokens = self.fields.get("tokenizer.ggml.tokens", ())
        declared = (self.fields.get(f"tokenizer.ggml.{key}_token_id") for key in _END_KEYS)
        marks = [tokens.index(each) for each in _END_MARKS if self.marks.get(each)]
        found = [int(each) for each in declared if each is not None]
        return tuple(dict.fromkeys([*found, *marks]))


def read_header(path: Path) -> Header:
    """Read the header of a GGUF file; this takes seconds.

    Raises:
        ValueError: The package gguf is missing, there is no such file, or it is not a whole GGUF
            file.
    """
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(
                f"reading {path} needs the package {package}: pip install 'tir_alp[gguf]'"
            )
    import gguf

    try:
        with path.open("rb") as file:
            begin = file.read(len(_MAGIC))
    except OSError as error:
        raise ValueError(f"cannot read the model file {path}: {error.strerror}") from error
    if begin != _MAGIC:
        raise ValueError(
            f"{path} is not a GGUF file: it begins with {begin!r} and not with {_MAGIC!r}; give a "
            "GGUF file, a model's folder or a Hugging Face id"
        )
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        kinds = [each.tensor_type.name for each in reader.tensors if len(each.shape) > 1]
        header = Header(
            fields=fields,
            tensors=frozenset(each.name for each in reader.tensors),
            num_weights=sum(int(each.n_elements) for each in reader.tensors),
            quantization=max(kinds, key=kinds.count, default=""),
        )
        if "general.architecture" not in fields:
            raise ValueError("it names no architecture")
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is damaged or not complete ({error}): copy or download it again"
        ) from error
    if int(fields.get("split.count", 1)) > 1:
        raise ValueError(
            f"{path} is one of {fields['split.count']} parts: join them (llama-gguf-split --merge "
            "FIRST_PART WHOLE.gguf) and give the whole file"
        )
    return header
