"""What is wrong with a model's folder, in one line that says what to do. Reads no weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_MOST_NAMED = 5


def check_model_folder(path: str) -> None:
    """Check that a folder has what a causal LM is loaded from; a Hugging Face id passes.

    Raises:
        ValueError: A part is missing.
    """
    if not path.strip():
        raise ValueError("model.path is empty: give a folder or a Hugging Face id")
    folder = Path(path)
    if not folder.is_dir():
        return
    _check_config(folder)
    _check_weights(folder)
    check_tokenizer_files(folder)


def check_tokenizer_files(folder: Path) -> None:
    """Raise ValueError if a folder has no tokenizer."""
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise ValueError(
            f"the model folder {folder} has no tokenizer.json: copy tokenizer.json, "
            "tokenizer_config.json and chat_template.jinja from the model that it was made from"
        )


def load_config(path: str) -> Any:
    """Read the config of a model, given by folder or Hugging Face id.

    Raises:
        ValueError: There is none, or it is of an architecture that is not known here.
    """
    folder = Path(path)
    if folder.is_dir():
        _check_config(folder)
    try:
        return AutoConfig.from_pretrained(path)
    except OSError as error:
        raise ValueError(
            f"there is no model folder {path!r}, and no model of this name could be loaded from "
            f"the Hugging Face hub: {first_line(error)}"
            if not folder.exists()
            else f"cannot load the config of the model {path!r}: {first_line(error)}"
        ) from error
    except ValueError as error:
        raise ValueError(unknown_architecture(path, error)) from error


def unknown_architecture(path: str, error: ValueError) -> str:
    """Say that transformers does not know a model, without the advice to upgrade it."""
    reason = first_line(error).partition(" Model type should be one of ")[0]
    reason = reason.partition(" This could be because ")[0]
    return (
        f"cannot load the model {path!r} as a causal LM: {reason} tir_alp is made for transformers "
        f"{transformers.__version__}, which is installed: take another model"
    )


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, with a period; libraries add advice below it."""
    line = str(error).strip().split("\n")[0].strip()
    return line if line.endswith(".") else f"{line}."


def _check_config(folder: Path) -> None:
    if (folder / "config.json").is_file():
        return
    if packed := sorted(folder.glob("*.gguf")):
        raise ValueError(
            f"the model folder {folder} has no config.json, but {packed[0].name}: give the file "
            f"itself, {packed[0]}, which is then converted"
        )
    names = sorted(each.name for each in folder.iterdir())
    inside = [each.name for each in folder.iterdir() if (each / "config.json").is_file()]
    hint = f"; did you mean {folder / sorted(inside)[-1]}?" if inside else ""
    found = ", ".join(names[:_MOST_NAMED]) if names else "nothing"
    raise ValueError(
        f"the model folder {folder} has no config.json, so it is not one of transformers; there "
        f"is {found}{hint}"
    )


def _check_weights(folder: Path) -> None:
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return
        index = folder / f"{name}.index.json"
        if index.is_file():
            try:
                shards = {*json.loads(index.read_text())["weight_map"].values()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"cannot read {index} ({error!r}): copy it again") from None
            if missing := sorted(each for each in shards if not (folder / each).is_file()):
                raise ValueError(
                    f"the model folder {folder} lacks {len(missing)} of its {len(shards)} files of "
                    f"weights; the first is {missing[0]}: copy or download it again"
                )
            return
    raise ValueError(
        f"the model folder {folder} has no weights: it needs model.safetensors, or "
        "model.safetensors.index.json and the files that this names"
    )
