"""The tokenizer of a GGUF file, as a tokenizer of transformers.

transformers builds it from the file's vocabulary; what it leaves out or gets wrong is put right
from the file's own metadata: the special tokens, which tokens are marks, and how text is split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import transformers
from tokenizers import AddedToken, Regex, decoders, pre_tokenizers
from transformers import AutoTokenizer

from tir_alp.models.gguf_header import Header

_PROBE = "A 12  345\n\n6 it's\n    x = 7 // 8é ▁\n"  # text that tokenizers split differently

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _bytes(*, use_regex: bool) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _pattern(pattern: str) -> Any:
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, _bytes(use_regex=False)])


def _single_digits() -> Any:
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, _bytes(use_regex=True)])


SPLITTING: Mapping[str, Callable[[], Any]] = {
    "gpt-2": lambda: _bytes(use_regex=True),
    "smollm": _single_digits,
    "llama-bpe": lambda: _pattern(rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}"),
    "qwen2": lambda: _pattern(rf"{_WORDS}|\p{{N}}|{_REST}"),
}
"""`tokenizer.ggml.pre` -> how a byte-level tokenizer splits text before it merges."""

_WHOLE_WORDS = {"llama-bpe"}  # a piece that is a token is not merged from smaller ones


def load_gguf_tokenizer(source: Path, header: Header, log: Callable[[str], None]) -> Any:
    """Load the tokenizer of a GGUF file.

    Args:
        source: The file.
        header: Its header.
        log: Called with a line for people, if texts may be split in another way than by the
            model's own tokenizer.

    Raises:
        ValueError: transformers cannot read it.
    """
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(
            f"transformers {transformers.__version__} cannot read the tokenizer of {source}: "
            f"{error!r}. Use the model's Hugging Face folder"
        ) from error
    tokenizer.add_tokens(
        [
            AddedToken(text, normalized=False, special=is_control)
            for text, is_control in header.marks.items()
        ]
    )
    for name, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        text = header.special_token(key)
        if text is not None:
            setattr(tokenizer, f"{name}_token", text)
    backend, splitting = tokenizer.backend_tokenizer, header.splitting
    if splitting is not None and splitting in SPLITTING:
        backend.pre_tokenizer, backend.decoder = SPLITTING[splitting](), decoders.ByteLevel()
        backend.model.ignore_merges = splitting in _WHOLE_WORDS
    elif splitting is not None:
        log(
            f"note: {source.name} splits text as {splitting!r}, which is not known here: some "
            "texts may be encoded in other tokens than those that the model was trained on"
        )
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.init_kwargs.pop("model_type", None)  # it is the tokenizer's in the file, "gpt2"
    return tokenizer


def check_saved(tokenizer: Any, folder: Path) -> None:
    """Raise ValueError if another tokenizer is read from a folder than was written to it."""
    again = AutoTokenizer.from_pretrained(folder)
    for what, of in (
        ("the tokens of a text", _probe),
        ("a text", lambda each: each.decode(_probe(each))),
        ("the mark of the end", lambda each: each.eos_token_id),
        ("the chat template", lambda each: each.chat_template),
    ):
        if of(again) != of(tokenizer):
            raise ValueError(
                f"transformers {transformers.__version__} reads back another tokenizer than it "
                f"wrote ({what}: {of(tokenizer)!r} became {of(again)!r}). Use the model's Hugging "
                "Face folder"
            )


def _probe(tokenizer: Any) -> list[int]:
    return tokenizer(_PROBE, add_special_tokens=False).input_ids
