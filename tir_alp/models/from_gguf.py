"""Converts a GGUF file into an ordinary Hugging Face folder.

transformers dequantises the weights (`gguf_file=`). A file whose model would silently be another
one (weights that are not there, rotary positions whose scale is not read) is refused. The folder
appears under its name only when it is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers import AutoModelForCausalLM

from tir_alp.models.gguf_header import Header, read_header
from tir_alp.models.gguf_tokenizer import check_saved, load_gguf_tokenizer
from tir_alp.models.whole_folder import is_taken, whole_folder

Log = Callable[[str], None]
Dtype = Literal["float32", "bfloat16"]

_FORMAT = 1  # of the conversion: with another number, cached folders are made again


def convert(source: Path, out: Path, dtype: Dtype, log: Log) -> None:
    """Convert a GGUF file into a Hugging Face folder.

    Args:
        source: The GGUF file.
        out: The folder to make; it may exist if it is empty.
        dtype: Data type of the weights on disk. Dequantised weights are float32 numbers, which
            bfloat16 rounds.
        log: Called with a line for people.

    Raises:
        ValueError: For what a user can fix; nothing is left at `out` then.
    """
    check_is_free(out)
    with whole_folder(out, log) as folder:
        if folder is None:
            raise ValueError(f"another process has made {out} meanwhile")
        _write(source, folder, dtype, log)


def check_is_free(out: Path) -> None:
    """Raise ValueError if a new folder cannot be made at a path."""
    if is_taken(out):
        what = "exists and is not empty" if out.is_dir() else "is not a folder"
        raise ValueError(f"{out} {what}: give another folder as --out")


def cached(source: Path, log: Log) -> Path:
    """Return the converted folder of a GGUF file, and convert it if this was not done before.

    Folders are kept in `$XDG_CACHE_HOME/tir_alp/gguf`, below `~/.cache` if that is not set, by the
    digest of the file. The weights are float32, because a trainer computes with them.

    Raises:
        ValueError: For what a user can fix.
    """
    if not source.is_file():
        raise ValueError(f"there is no model file {str(source)!r}; give a GGUF file that exists")
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tir_alp" / "gguf"
    out = root / f"{source.stem}-{_digest(source)[:16]}-{_FORMAT}"
    if not is_taken(out):
        log(f"converting {source} once, into {out}")
        try:
            with whole_folder(out, log) as folder:
                if folder is not None:
                    _write(source, folder, "float32", log)
        except OSError as error:
            raise ValueError(
                f"cannot keep the converted model in {out}: {error.strerror or error}; "
                "XDG_CACHE_HOME names another folder for such files"
            ) from error
    return out


def _write(source: Path, folder: Path, dtype: Dtype, log: Log) -> None:
    header = read_header(source)
    size = source.stat().st_size / 1e6
    log(f"reading {source.name} ({header.architecture}, {header.quantization}, {size:.0f} MB)")
    model = _load_model(source, header, dtype)
    log(f"{model.num_parameters() / 1e6:.1f} M parameters; reading the tokenizer")
    tokenizer = load_gguf_tokenizer(source, header, log)
    log(f"writing the weights as {dtype}")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    check_saved(tokenizer, folder)
    record = {
        "file": source.name,
        "sha256": _digest(source),
        "name": header.fields.get("general.name", ""),
        "licence": header.licence,
        "quantization": header.quantization,
        "dtype": dtype,
    }
    (folder / "source.json").write_text(json.dumps(record, indent=2) + "\n")


def _load_model(source: Path, header: Header, dtype: Dtype) -> Any:
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            dtype=getattr(torch, dtype),
            output_loading_info=True,
        )
    except (ValueError, KeyError, AttributeError, NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"transformers {transformers.__version__} cannot make a causal language model of "
            f"{source}, whose architecture is {header.architecture!r} ({_first_line(error)}). "
            "Use the model's Hugging Face folder"
        ) from error
    model, loading = loaded
    missing = [str(each) for key in ("missing_keys", "mismatched_keys") for each in loading[key]]
    if missing:
        raise ValueError(
            f"{source} has no fitting weights for {', '.join(sorted(missing)[:3])} ({len(missing)} "
            "in all). Use the model's Hugging Face folder"
        )
    _check_positions(source, header, model.config)
    states = {id(each): each.numel() for each in model.state_dict(keep_vars=True).values()}
    if header.num_weights > sum(states.values()):
        raise ValueError(
            f"{source} has {header.num_weights:,} weights, of which transformers "
            f"{transformers.__version__} reads {sum(states.values()):,}: the model would be "
            "another one. Use the model's Hugging Face folder"
        )
    ends = [*header.end_token_ids]
    if ends:
        model.config.eos_token_id = ends[0]
        model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
    return model


def _check_positions(source: Path, header: Header, config: Any) -> None:
    """Refuse a file that scales its rotary positions, unless transformers has read that."""
    kind = header.fields.get(f"{header.architecture}.rope.scaling.type", "none")
    tensors = sorted(each for each in header.tensors if each.startswith(("rope_fr", "rope_fa")))
    is_read = (getattr(config, "rope_parameters", None) or {}).get("rope_type") != "default"
    if (kind != "none" or tensors) and not is_read:
        raise ValueError(
            f"{source} scales its rotary positions ({', '.join(tensors) or kind}), which "
            f"transformers {transformers.__version__} does not read from a GGUF file: the model "
            "would be another one. Use the model's Hugging Face folder"
        )


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0][:200].rstrip(".:")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
