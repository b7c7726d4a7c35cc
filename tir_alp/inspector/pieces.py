"""The text of each token, such that the texts of all of them make the text of the whole."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from tir_alp.records.readable import REDACTED, secret_ranges


def pieces_of(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Return the text that each token adds to those before it.

    A character of several tokens belongs to the last of them; the others add nothing.

    Args:
        tokenizer: The tokenizer.
        ids: The tokens of a span.
    """
    stream = DecodeStream(skip_special_tokens=False)
    pieces = []
    for token in ids:
        try:
            pieces.append(stream.step(tokenizer, token) or "")
        except Exception:  # the tokenizer's own kind of error, for an id that it does not have
            stream = DecodeStream(skip_special_tokens=False)
            pieces.append("\ufffd")
    whole = tokenizer.decode([*ids], skip_special_tokens=False)
    shown = "".join(pieces)
    if pieces and whole.startswith(shown):  # an unfinished character at the end
        pieces[-1] += whole[len(shown) :]
    return pieces


def without_secrets(pieces: Sequence[str], values: Sequence[str]) -> list[str]:
    """Return pieces without the secrets in their text: the first token of each says so.

    Args:
        pieces: The text of each token.
        values: Secrets besides those that are recognised by their form.
    """
    whole = "".join(pieces)
    ranges = secret_ranges(whole, values)
    shown, stop = [], 0
    for piece in pieces:
        start, stop = stop, stop + len(piece)
        kept, at = "", start
        for low, high in ranges:
            if low < stop and high > start:
                kept += whole[at : max(at, low)]
                kept += REDACTED if low >= start else ""
                at = max(at, min(high, stop))
        shown.append(kept + whole[at:stop])
    return shown


def load_pieces(path: Path, config: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer of a run, without loading torch if that is possible.

    Args:
        path: The run folder.
        config: The run's config.

    Raises:
        ValueError: There is none.
    """
    model = config.get("model")
    name = model.get("path", "") if isinstance(model, dict) else ""
    folders = [*(path / "checkpoints").glob("step_*"), Path(str(name))]
    for file in (folder / "tokenizer.json" for folder in folders):
        if file.is_file():
            try:
                return Tokenizer.from_file(str(file))
            except Exception as error:  # the library raises Exception itself
                raise ValueError(f"{file} is not a tokenizer: {error}") from None
    # Imported here because it needs torch, for which a page need not wait.
    from tir_alp.run.demonstrations import model_of
    from tir_alp.training.policy import load_tokenizer

    state = load_tokenizer(model_of(path)).backend_tokenizer.to_str()
    return Tokenizer.from_str(json.dumps(json.loads(state)))
