"""The default models: decoders of 0.4 M parameters that know the format and often fail the tasks.

`base/` and `able/` are ordinary Hugging Face folders, made by
`python -m tir_alp.models.tiny.make`.
"""

from pathlib import Path

_HERE = Path(__file__).parent

BASE = _HERE / "base"
"""Solves about 5 % of the tasks."""

ABLE = _HERE / "able"
"""Solves 10 to 20 % of the tasks, enough that learning takes off with every seed."""

SHIPPED = {"tiny": BASE, "tiny-able": ABLE}
"""`model.path` -> folder, for the models in this package."""

TRAIN_CONFIG = _HERE / "train.toml"
"""The config that trains the base model, which is also `configs/tiny.toml`."""
