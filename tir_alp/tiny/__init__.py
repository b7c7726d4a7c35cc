"""The embedded default: a decoder of 0.4 M parameters that knows the format and is bad at the job.

`base/` is an ordinary Hugging Face folder; `python -m tir_alp.tiny.make` makes it from nothing.
"""

from pathlib import Path

BASE = Path(__file__).parent / "base"
"""The shipped model."""

TRAIN_CONFIG = Path(__file__).parent / "train.toml"
"""The run that trains it; `configs/tiny.toml`."""
