"""Small GGUF files, written by the package gguf: a decoder of two layers with random weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
USER_DEFINED = "<tool>"
MERGES = ("Ġ Ġ", "Ċ Ċ", "Ġ x", "i n", "1 2", "12 3", "' s")
TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_HIDDEN, _FFN, _HEADS, _KV_HEADS, _LAYERS = 64, 128, 2, 1, 2


def byte_characters() -> list[str]:
    """The 256 characters that byte-level tokenizers write bytes with, by byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def vocabulary() -> list[str]:
    return [*MARKS, *byte_characters(), *(each.replace(" ", "") for each in MERGES), USER_DEFINED]


def write_gguf(
    file: Path,
    *,
    architecture: str = "llama",
    splitting: str = "smollm",
    fields: Mapping[str, Any] | None = None,
    without: str = "",
    extra: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write a file.

    Args:
        file: Where to.
        architecture: The family that it names.
        splitting: How it says that text is split.
        fields: More fields: numbers or texts by key.
        without: Name of a tensor to leave out.
        extra: More tensors.
    """
    writer = gguf.GGUFWriter(file, architecture)
    tokens = vocabulary()
    kinds = [3] * len(MARKS) + [1] * (len(tokens) - len(MARKS) - 1) + [4]
    writer.add_name("small")
    writer.add_license("mit")
    writer.add_block_count(_LAYERS)
    writer.add_context_length(256)
    writer.add_embedding_length(_HIDDEN)
    writer.add_feed_forward_length(_FFN)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_rope_dimension_count(_HIDDEN // _HEADS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(list(MERGES))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for key, value in (fields or {}).items():
        if isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_uint32(key, value)
    for name, weight in _weights(len(tokens)).items():
        if name != without:
            _add(writer, name, weight)
    for name, weight in (extra or {}).items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _weights(num_tokens: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    head = _HIDDEN // _HEADS
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (num_tokens, _HIDDEN)}
    for layer in range(_LAYERS):
        shapes |= {
            f"blk.{layer}.attn_norm.weight": (_HIDDEN,),
            f"blk.{layer}.ffn_norm.weight": (_HIDDEN,),
            f"blk.{layer}.attn_q.weight": (_HIDDEN, _HIDDEN),
            f"blk.{layer}.attn_k.weight": (_KV_HEADS * head, _HIDDEN),
            f"blk.{layer}.attn_v.weight": (_KV_HEADS * head, _HIDDEN),
            f"blk.{layer}.attn_output.weight": (_HIDDEN, _HIDDEN),
            f"blk.{layer}.ffn_gate.weight": (_FFN, _HIDDEN),
            f"blk.{layer}.ffn_up.weight": (_FFN, _HIDDEN),
            f"blk.{layer}.ffn_down.weight": (_HIDDEN, _FFN),
        }
    shapes["output_norm.weight"] = (_HIDDEN,)
    return {name: rng.normal(0, 0.05, shape).astype(np.float32) for name, shape in shapes.items()}


def _add(writer: gguf.GGUFWriter, name: str, weight: np.ndarray) -> None:
    """Add a tensor: a matrix as Q4_1, the embeddings as Q8_0, a vector as it is."""
    if weight.ndim == 1:
        writer.add_tensor(name, weight)
        return
    types = gguf.GGMLQuantizationType
    kind = types.Q8_0 if name.startswith("token_embd") else types.Q4_1
    writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)
