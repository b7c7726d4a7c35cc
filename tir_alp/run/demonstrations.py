"""Opens what supervised fine-tuning imitates: conversations in files, or trajectories of a run.

Every row is read and encoded once when the data is opened, so that each fault of the data is found
and named before anything starts. Only an index stays in memory; a row is read again when it is
trained on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tir_alp.config import TranscriptsConfig
from tir_alp.models.resolve import resolve
from tir_alp.records.folder import read_run_config
from tir_alp.records.trajectories import from_record
from tir_alp.rollouts.data_files import JsonLines, RawRows, raw_rows
from tir_alp.rollouts.demonstration import Demonstrator
from tir_alp.rollouts.transcripts import Transcript, read_transcript
from tir_alp.tools.held_out import stable_hash
from tir_alp.training import checkpoint_folder
from tir_alp.training.policy import load_tokenizer
from tir_alp.training.samples import samples_of
from tir_alp.types import Sample, TokenSpan, Trajectory, trace_uid

_PROGRESS_ROWS = 5000


@dataclass(frozen=True, slots=True)
class Row:
    """Where a demonstration is read again."""

    file: int
    """Index of its file."""
    key: int
    """Its key in the file; see `data_files.RawRows`."""
    number: int
    """The line or row number shown to users."""


class DemonstrationSource(Protocol):
    """Demonstrations by row."""

    def rows(self) -> Iterator[Row]:
        """Yield all rows in order."""
        ...

    def trajectory(self, row: Row, uid: int) -> Trajectory:
        """Read and encode a row. Raises ValueError, with file and number, if it is broken."""
        ...

    def transcript(self, row: Row) -> Transcript | None:
        """Read a row as text; None if there are only tokens."""
        ...


class TranscriptFile:
    """Conversations in a file or a data set of the hub, one per row.

    Args:
        rows: The unparsed rows.
        demonstrator: Encodes conversations.
        column: Column that holds the messages; see `read_transcript`.
    """

    def __init__(self, rows: RawRows, demonstrator: Demonstrator, column: str | None) -> None:
        self._rows, self._demonstrator, self._column = rows, demonstrator, column

    def rows(self) -> Iterator[Row]:
        """Yield all rows in order."""
        for number, key, _ in self._rows:
            yield Row(0, key, number)

    def trajectory(self, row: Row, uid: int) -> Trajectory:
        """Read and encode a conversation."""
        return self._demonstrator.trajectory(self.transcript(row), uid)

    def transcript(self, row: Row) -> Transcript:
        """Read a conversation."""
        raw, location = self._rows.read(row.key), f"{Path(self._rows.name).name}:{row.number}"
        if isinstance(raw, bytes):
            raw = _json(raw, location)
        return read_transcript(raw, location, self._column)


class RecordedTrajectories:
    """The trajectories of a run or an evaluation, token by token as they were sampled.

    Args:
        path: Folder of the run or evaluation.
        min_reward: Trajectories with a lower reward are left out.

    Raises:
        ValueError: There are no trajectories in the folder.
    """

    def __init__(self, path: Path, min_reward: float) -> None:
        files = sorted((path / "trajectories").glob("*.jsonl"))
        if not files:
            raise ValueError(f"{path} has no trajectories to learn from")
        self._files, self._min_reward = [JsonLines(file) for file in files], min_reward

    def rows(self) -> Iterator[Row]:
        """Yield the rows with enough reward, each sequence of tokens once."""
        seen: set[bytes] = set()
        for index, file in enumerate(self._files):
            for number, key, raw in file:
                trajectory = self._read(Row(index, key, number), raw)
                if trajectory.reward < self._min_reward or not trajectory.turns:
                    continue
                ids = np.array(
                    [token for each in trajectory.conversation for token in each.token_ids],
                    np.int32,
                ).tobytes()
                digest = hashlib.blake2b(ids, digest_size=16).digest()
                if digest not in seen:
                    seen.add(digest)
                    yield Row(index, key, number)

    def trajectory(self, row: Row, uid: int) -> Trajectory:
        """Read a trajectory; what the policy wrote in it is learnt, except for void turns."""
        found = self._read(row, self._files[row.file].read(row.key))
        *earlier, last = (
            self._learnt(each, uid, number) for number, each in enumerate(found.conversation)
        )
        return replace(last, branches=tuple(earlier), is_forked=found.is_forked)

    def _learnt(self, found: Trajectory, uid: int, number: int) -> Trajectory:
        turns = tuple(
            replace(
                turn,
                completion=TokenSpan(
                    turn.completion.token_ids, (0.0,) * len(turn.completion), not turn.is_void
                ),
                policy_version=0,
                version_spans=(),
            )
            for turn in found.turns
        )
        uids = {"group_id": uid, "sequence_uid": trace_uid(uid, number)}
        return replace(found, turns=turns, branches=(), is_forked=False, **uids)

    def transcript(self, row: Row) -> None:
        """None: a run records tokens."""

    def _read(self, row: Row, raw: bytes) -> Trajectory:
        location = f"{self._files[row.file].name}:{row.number}"
        try:
            return from_record(_json(raw, location))
        except ValueError as error:
            raise ValueError(f"{location}: {error}") from None


@dataclass(frozen=True, slots=True)
class Demonstrations:
    """What a run of supervised fine-tuning learns from and is measured on."""

    source: DemonstrationSource
    trained: Sequence[Row]
    held_out: Sequence[Row]
    left_out: Sequence[str]
    """Sentences about the rows that were left out."""
    num_tokens: int
    """Tokens of all rows that are trained on."""
    sha256: str
    """Digest of the tokens of all rows."""

    def samples(self, row: Row, uid: int) -> list[Sample]:
        """Read a row, as the trainer takes it: each trace with the advantage 1."""
        return samples_of(self.source.trajectory(row, uid), 1.0)


def open_demonstrations(
    config: TranscriptsConfig,
    demonstrator: Demonstrator,
    tokenizer: Any,
    max_tokens: int,
    log: Callable[[str], None],
) -> Demonstrations:
    """Read and check all rows.

    Args:
        config: Where they are.
        demonstrator: Encodes conversations.
        tokenizer: Tokenizer of the model that learns.
        max_tokens: Longer conversations are left out.
        log: Called with a line for people.

    Raises:
        ValueError: A row is broken and that is fatal, or none is left to train on.
    """
    if config.source == "run":
        assert config.path is not None
        check_tokenizer(config.path, tokenizer)
        source: DemonstrationSource = RecordedTrajectories(config.path, config.min_reward)
    else:
        rows = raw_rows(config.source, config.path, config.dataset, config.subset, config.split)
        source = TranscriptFile(rows, demonstrator, config.column)
    trained: list[Row] = []
    held_out: list[Row] = []
    left_out: list[str] = []
    num_tokens = 0
    digest = hashlib.sha256()
    for number, row in enumerate(source.rows(), start=1):
        if number % _PROGRESS_ROWS == 0:
            log(f"{number} conversations read")
        try:
            trajectory = source.trajectory(row, 0)
        except ValueError as error:
            if config.broken_rows == "fatal":
                raise ValueError(f'{error}; or set data.broken_rows = "skip"') from None
            left_out.append(str(error))
            continue
        lengths = [len(each.token_ids) for each in trajectory.conversation]
        for each in trajectory.conversation:
            digest.update(f"{trajectory.task_id} {each.token_ids}\n".encode())
        if not any(any(each.loss_mask) for each in trajectory.conversation):
            left_out.append(f"{trajectory.task_id}: nothing in it is to be learnt")
        elif (length := max(lengths)) > max_tokens:
            left_out.append(
                f"{trajectory.task_id} has {length} tokens; rollout.max_context_tokens is "
                f"{max_tokens}"
            )
        elif _is_held_out(trajectory, config.held_out):
            held_out.append(row)
        else:
            trained.append(row)
            num_tokens += sum(lengths)
    if not trained:
        reasons = "".join(f"\n  {each}" for each in left_out[:5])
        raise ValueError(f"there is no conversation to train on in {describe(config)}{reasons}")
    return Demonstrations(source, trained, held_out, left_out, num_tokens, digest.hexdigest())


def describe(config: TranscriptsConfig) -> str:
    """Name the data; for a run, with the reward that is asked for."""
    if config.source == "run":
        return f"{config.path} with a reward of at least {config.min_reward:g}"
    return str(config.path or config.dataset)


def files_of(config: TranscriptsConfig) -> list[Path]:
    """The files that the demonstrations are read from."""
    if config.path is None:
        return []
    return (
        sorted((config.path / "trajectories").glob("*.jsonl"))
        if config.source == "run"
        else [config.path]
    )


def check_tokenizer(path: Path, tokenizer: Any) -> None:
    """See that the trajectories of a run hold tokens of this tokenizer.

    Raises:
        ValueError: They do not, or the run's tokenizer is not there.
    """
    theirs = load_tokenizer(model_of(path))
    if theirs.get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"the trajectories of {path} are tokens of another tokenizer than that of the model "
            f"{tokenizer.name_or_path!r}: start from the model of that run"
        )


def model_of(path: Path) -> str:
    """The folder or id of a run's model: its newest checkpoint, or what it began with.

    Raises:
        ValueError: It is not the folder of a run.
    """
    try:
        return str(checkpoint_folder.newest(path / "checkpoints")[0])
    except checkpoint_folder.CheckpointError:
        model = read_run_config(path).get("model", {})
        name = model.get("path", "") if isinstance(model, dict) else ""
        return resolve(name)


def _is_held_out(trajectory: Trajectory, share: float) -> bool:
    prompt = ",".join(map(str, trajectory.conversation[0].prompt.token_ids))
    return stable_hash(f"demonstrations/{prompt}") < share * 2**128


def _json(raw: bytes, location: str) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{location}: not JSON ({error}): fix or delete the line") from None
