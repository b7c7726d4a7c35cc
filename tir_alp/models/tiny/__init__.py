"""The embedded default: a decoder of 0.4 M parameters that knows the format and is bad at the job.

`base/` and `able/` are ordinary Hugging Face folders, which
`python -m tir_alp.models.tiny.make` makes.
"""

from pathlib import Path

_HERE = Path(__file__).parent

BASE = _HERE / "base"
"""Solves some 5 % of the tasks."""

ABLE = _HERE / "able"
"""Solves 10 to 20 %: where it starts, whether a run takes off is no matter of luck."""

SHIPPED = {"tiny": BASE, "tiny-able": ABLE}
"""The models that come with the package, by the `model.path` that names them."""

TRAIN_CONFIG = _HERE / "train.toml"
"""The run that trains the base; `configs/tiny.toml`."""
