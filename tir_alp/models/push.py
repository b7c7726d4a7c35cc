"""Uploads a checkpoint of a run to the Hugging Face hub, with a model card."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from tir_alp.models.model_card import model_card
from tir_alp.records.folder import read_records
from tir_alp.training import checkpoint_folder

_OWN = {"trainer", "rollouts.json", "manifest.json"}
"""What only resuming a run needs."""


@dataclass(frozen=True, slots=True)
class Upload:
    """What is uploaded."""

    checkpoint: Path
    step: int
    files: tuple[str, ...]
    """Paths in the checkpoint, without the model card."""
    card: str


def prepare_upload(run: Path, which: str) -> Upload:
    """Choose a checkpoint, check that it is whole, and write its card.

    Args:
        run: The run's folder.
        which: "last", "best", which is the one that the run kept as such, or else the first with
            the highest `eval/accuracy` of those that are there, or the number of its step.

    Raises:
        ValueError: There is no such run or checkpoint, or it is not whole.
    """
    checkpoint = _checkpoint(run, which)
    step = checkpoint_folder.verify(checkpoint).step
    files = [
        str(file.relative_to(checkpoint))
        for file in sorted(checkpoint.rglob("*"))
        if file.is_file() and file.relative_to(checkpoint).parts[0] not in _OWN
    ]
    return Upload(checkpoint, step, tuple(files), str(model_card(run, step)))


def push(upload: Upload, repo: str, *, is_public: bool, log: Callable[[str], None]) -> str:
    """Upload a checkpoint in one commit; returns the address of the model.

    Args:
        upload: What to upload.
        repo: `ORGANISATION/NAME`; it is made if it does not exist.
        is_public: Whether a new repository can be read by anybody.
        log: Called with a line for people.

    Raises:
        ValueError: The hub refused it, or cannot be reached.
    """
    api = HfApi()
    try:
        url = api.create_repo(repo, private=not is_public, exist_ok=True)
        log(f"uploading {len(upload.files) + 1} files of {upload.checkpoint} to {url}")
        with tempfile.TemporaryDirectory(prefix="tir_alp-") as scratch:
            for name in upload.files:
                link = Path(scratch) / name
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to((upload.checkpoint / name).resolve())
            (Path(scratch) / "README.md").write_text(upload.card)
            api.upload_folder(
                repo_id=repo, folder_path=scratch, commit_message=f"Step {upload.step}"
            )
    except HFValidationError as error:
        raise ValueError(f"--repo {repo!r}: {error}") from error
    except HfHubHTTPError as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"the hub refused {repo!r}: {reason}. Log in with `hf auth login`, or set HF_TOKEN to "
            "a token that may write"
        ) from error
    except (httpx.HTTPError, OSError) as error:
        raise ValueError(f"the hub at {api.endpoint} cannot be reached: {error}") from error
    return str(url)


def _checkpoint(run: Path, which: str) -> Path:
    folder = run / "checkpoints"
    kept = {
        int(path.name.removeprefix("step_")): path
        for path in checkpoint_folder.newest_first(folder)
    }
    if not kept:
        raise ValueError(f"there is no checkpoint in {folder}: give the folder of a run")
    if which == "last":
        return kept[max(kept)]
    if which == "best":
        best = checkpoint_folder.read_best(folder)
        if best is not None and best.step in kept:  # as `tir_alp.evaluate` understands the word
            return kept[best.step]
        measured = {
            row["step"]: row["eval/accuracy"]
            for row in read_records(run / "metrics.jsonl")[0]
            if "eval/accuracy" in row and row["step"] in kept
        }
        if not measured:
            raise ValueError(
                f"none of the checkpoints {sorted(kept)} was evaluated: give --checkpoint last, or "
                "train with eval.every and checkpoint.every"
            )
        return kept[max(measured, key=lambda step: (measured[step], -step))]
    if which.isdigit() and int(which) in kept:
        return kept[int(which)]
    raise ValueError(f"--checkpoint {which}: there are best, last and {sorted(kept)}")
