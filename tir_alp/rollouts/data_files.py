"""Data sets in files: read once to check and index them, then row by row as rows are needed.

Only an index stays in memory, 16 bytes per row, however long the rows are. A broken row is reported
by file and line (or row); the config decides whether it is fatal or left out.

Rows come in three forms: question and answer in two columns; verl's form with `prompt` (a list of
messages), `reward_model.ground_truth`, `data_source` and `extra_info`; and those of `code_rows`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import re
import tempfile
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeGuard

import numpy as np

from tir_alp.config import SourceConfig
from tir_alp.rollouts.answer_pattern import compile_pattern, cut_answer, gsm8k_answer
from tir_alp.rollouts.code_rows import as_coding_task
from tir_alp.rollouts.file_formats import format_of, open_csv, open_lines
from tir_alp.rollouts.surrogates import SURROGATE
from tir_alp.tools.answer_text import is_gradable
from tir_alp.tools.boxed import extract_boxed
from tir_alp.tools.code_forms import has_tests, read_tests
from tir_alp.tools.held_out import Split, is_held_out

_MAX_NAMED = 20  # columns in a message
_MESSAGES = re.compile(r'\s*\[\s*\{\s*"(?:role|content)"\s*:')
_BATCH_ROWS = 1024  # rows of a row group that are converted to Python objects at a time


class RawRows(Protocol):
    """The unparsed rows of a file. Each has a key, by which it can be read again."""

    name: str

    def __iter__(self) -> Iterator[tuple[int, int, Any]]:
        """Yield, for each row, the line or row number shown to users, the key and the row."""
        ...

    def read(self, key: int) -> Any:
        """Return the row with a key."""
        ...


class JsonLines:
    """A file with one JSON object per line; blank lines are skipped. A key is a byte offset.

    Args:
        path: Path of the file.
        opened: Opens it, and returns a descriptor of JSON lines; see `file_formats`.
    """

    def __init__(self, path: Path, opened: Callable[[Path], int] = open_lines) -> None:
        self.name = str(path)
        self.file = path.name
        self._descriptor = -1
        self._descriptor = opened(path)

    def __iter__(self) -> Iterator[tuple[int, int, bytes]]:
        key = 0
        with open(self._descriptor, "rb", closefd=False) as file:
            file.seek(0)
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, key, line
                key += len(line)

    def read(self, key: int) -> bytes:
        """Read one line. Safe in any thread, because the file position is not used."""
        line, size = b"", 1 << 14
        while b"\n" not in line:
            more = os.pread(self._descriptor, size, key + len(line))
            if not more:
                break
            line, size = line + more, size * 2
        return line.partition(b"\n")[0]

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


class ParquetRows:
    """A parquet file. A key is a row number, counted from 0.

    When the file is opened, its row groups are decompressed one after the other into an unnamed
    Arrow file in the folder for temporary files. That file is mapped into memory, and each access
    reads one row of it.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow

        self.name, self.file = str(path), path.name
        self._map = _unpacked(path)
        pyarrow.default_memory_pool().release_unused()  # otherwise it keeps 100 MB unused
        self._batches = pyarrow.ipc.open_file(self._map)
        sizes = [self._batch(index).num_rows for index in range(self._batches.num_record_batches)]
        self._starts = np.cumsum([0, *sizes])

    def __iter__(self) -> Iterator[tuple[int, int, Any]]:
        key = 0
        for index in range(self._batches.num_record_batches):
            for row in self._batch(index).to_pylist():
                yield key, key, row
                key += 1

    def read(self, key: int) -> Any:
        """Read one row."""
        index = int(np.searchsorted(self._starts, key, side="right")) - 1
        return self._batch(index).slice(key - int(self._starts[index]), 1).to_pylist()[0]

    @functools.lru_cache(maxsize=1)  # noqa: B019 (the cache holds no data, and lives as long as the file)
    def _batch(self, index: int) -> Any:
        return self._batches.get_batch(index)


def _unpacked(path: Path) -> Any:
    """Convert a parquet file to an Arrow file, one row group at a time, and map that file."""
    import pyarrow
    import pyarrow.parquet

    with (
        pyarrow.parquet.ParquetFile(path, pre_buffer=False) as parquet,
        tempfile.NamedTemporaryFile() as spilled,
    ):
        with pyarrow.ipc.new_file(spilled.name, parquet.schema_arrow) as writer:
            for batch in parquet.iter_batches(_BATCH_ROWS, use_threads=False):
                writer.write_batch(batch)
        return pyarrow.memory_map(spilled.name)


class HubRows:
    """A data set of the Hugging Face hub, by id or folder. A key is a row number."""

    def __init__(self, dataset: str, subset: str | None, split: str) -> None:
        import datasets

        self.name = self.file = f"{dataset}[{split}]"
        folder = Path(dataset)
        if (folder / "dataset_dict.json").is_file():  # written by `save_to_disk`
            splits: Any = datasets.load_from_disk(dataset)
            if split not in splits:
                raise ValueError(f"it has no split {split!r}, but {', '.join(splits)}: data.split")
            self._rows: Any = splits[split]
        elif (folder / "state.json").is_file():
            self._rows = datasets.load_from_disk(dataset)
        else:
            self._rows = datasets.load_dataset(dataset, subset, split=split)

    def __iter__(self) -> Iterator[tuple[int, int, Any]]:
        for key, row in enumerate(self._rows):
            yield key, key, row

    def read(self, key: int) -> Any:
        """Read one row."""
        return self._rows[key]


@dataclass(frozen=True)
class FileTasks:
    """The tasks of one split of a file, by index."""

    rows: RawRows
    config: SourceConfig
    keys: np.ndarray
    """[N] int64, the key of each row."""
    numbers: np.ndarray
    """[N] int64, the line or row number of each row."""

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"task {index} of {len(self)}")
        raw = self.rows.read(int(self.keys[index]))
        return read_row(raw, self.rows, int(self.numbers[index]), self.config)


@dataclass(frozen=True, slots=True)
class Opened:
    """A file that has been checked and indexed."""

    splits: Mapping[Split, FileTasks]
    broken: tuple[str, ...]
    """One sentence per row that was left out because it is broken."""
    num_filtered: int
    """Number of rows that were left out because of their length."""
    sha256: str
    """Digest of all questions and answers, in the order of the file."""

    @property
    def whole(self) -> FileTasks:
        """The tasks of both splits, in the order of the file."""
        splits = [*self.splits.values()]
        keys = np.concatenate([each.keys for each in splits])
        order = np.argsort(keys)
        numbers = np.concatenate([each.numbers for each in splits])
        return FileTasks(splits[0].rows, splits[0].config, keys[order], numbers[order])


def open_rows(config: SourceConfig) -> Opened:
    """Read a file once: check every row, and index the rows of each split.

    A process reads an unchanged file only once.

    Raises:
        ValueError: The file cannot be read, has no rows, or has a broken one where that is fatal.
    """
    version = (0, 0)
    if config.path is not None:
        try:
            status = config.path.stat()
        except OSError as error:
            raise ValueError(f"cannot read the tasks in {config.path}: {error.strerror}") from None
        version = (status.st_mtime_ns, status.st_size)
    return _open_version(config, version)  # type: ignore[arg-type]


@functools.lru_cache(maxsize=8)
def _open_version(config: SourceConfig, version: tuple[int, int]) -> Opened:
    if config.answer_pattern is not None:
        compile_pattern(config.answer_pattern)
    rows = raw_rows(config.source, config.path, config.dataset, config.subset, config.split)
    found: dict[Split, tuple[array[int], array[int]]] = {
        split: (array("q"), array("q")) for split in ("train", "held_out")
    }
    broken: list[str] = []
    num_filtered = num_rows = 0
    digest = hashlib.sha256()
    for number, key, raw in rows:
        num_rows += 1
        try:
            row = read_row(raw, rows, number, config)
        except ValueError as error:
            if config.broken_rows == "fatal":
                raise
            broken.append(str(error))
            continue
        question = row["question"]
        digest.update(f"{question}\0{row['answer']}\0".encode())
        most = config.max_question_chars
        if len(question) < config.min_question_chars or (most is not None and len(question) > most):
            num_filtered += 1
            continue
        keys, numbers = found["held_out" if is_held_out(question) else "train"]
        keys.append(key)
        numbers.append(number)
    if not num_rows:
        raise ValueError(f"{rows.name} holds no tasks: it needs one JSON object per line, or rows")
    splits: dict[Split, FileTasks] = {
        split: FileTasks(rows, config, np.array(keys, np.int64), np.array(numbers, np.int64))
        for split, (keys, numbers) in found.items()
    }
    return Opened(splits, tuple(broken), num_filtered, digest.hexdigest())


def read_row(raw: Any, rows: RawRows, number: int, config: SourceConfig) -> dict[str, Any]:
    """Convert a row to a task: `task_id`, `question`, `answer`, and the row's other columns.

    Args:
        raw: A line of JSON as bytes, or the row itself.
        rows: The file that the row comes from.
        number: Line or row number.
        config: Names the columns of question and answer.

    Raises:
        ValueError: The row is broken; the message begins with file and number.
    """
    location = f"{rows.name}:{number}"
    line = raw
    if isinstance(raw, bytes):
        try:
            raw = json.loads(raw)
        except (ValueError, RecursionError) as error:
            fix = "fix or delete the line"
            if number == 1 and not raw.lstrip().startswith(b"{"):
                fix += (
                    f", or set data.source to the format of the file: it begins with {raw[:40]!r}"
                )
            raise ValueError(f"{location}: not JSON ({error}): {fix}") from None
    if not isinstance(raw, dict):
        raise ValueError(f'{location}: not an object: write {{"question": ..., "answer": ...}}')
    columns = config.question_column, config.answer_column
    if columns == ("question", "answer"):
        try:
            raw = dict(as_coding_task(raw))
        except ValueError as error:
            raise ValueError(f"{location}: {error}") from None
    is_default = columns == ("question", "answer")
    if is_default and not {"question", "answer"} <= raw.keys() and "reward_model" in raw:
        question, answer = raw.get("prompt"), _inside(raw, "reward_model.ground_truth")
        columns = "prompt", "reward_model.ground_truth"
    else:
        _demand_columns(raw, columns, location)
        question, answer = (_inside(raw, column) for column in columns)
    question = _of_messages(question, f"{location}: {columns[0]!r}")
    if not _is_text(question):
        raise ValueError(
            f"{location}: {columns[0]!r} must be a text that is not empty, not {question!r:.100}"
        )
    if isinstance(answer, list) and answer and all(map(_is_text, answer)):
        answer = ", ".join(answer)
    if isinstance(answer, int | float) and not isinstance(answer, bool) and math.isfinite(answer):
        answer = _as_written(answer, line, columns[1])
    if not _is_text(answer):
        raise ValueError(
            f"{location}: {columns[1]!r} must be a text or a number, not {answer!r:.100}"
        )
    answer = _cut(answer, config, f"{location}: {columns[1]!r}")
    if has_tests(raw):
        try:
            read_tests(raw)
        except ValueError as error:
            raise ValueError(f"{location}: {error}") from None
    task_id = raw.get("task_id")
    if task_id is None:
        task_id = f"{Path(rows.name).name}:{number}"
    return raw | {"task_id": str(task_id), "question": question, "answer": answer}


def _demand_columns(raw: Mapping[str, Any], columns: Sequence[str], location: str) -> None:
    """Raise ValueError if the row lacks a column; names the columns that it has."""
    for key, column in zip(("question_column", "answer_column"), columns, strict=True):
        if column.split(".")[0] not in raw:
            there = ", ".join(map(repr, list(raw)[:_MAX_NAMED])) or "none"
            raise ValueError(
                f"{location}: there is no column {column!r}; the row has {there}: set data.{key} "
                f"(in a table of eval.data or data.mix: its {key})"
            )


def _as_written(answer: float, line: Any, column: str) -> str:
    """Return a number as the file has it: a float would make 5e-05 of 0.00005."""
    if isinstance(answer, float) and isinstance(line, bytes):
        return str(_inside(json.loads(line, parse_float=str), column))
    return str(answer)


def _cut(text: str, config: SourceConfig, column: str) -> str:
    """Return the answer within the text of its column."""
    if config.answer_pattern is None:
        answer = gsm8k_answer(text) or extract_boxed(text) or text
    else:
        found = cut_answer(text, config.answer_pattern)
        if not found:
            raise ValueError(
                f"{column} has nothing that data.answer_pattern {config.answer_pattern!r} finds: "
                f"{text[-100:]!r}"
            )
        answer = found
    if not is_gradable(answer):
        raise ValueError(
            f"{column} is neither text nor mathematics, so it cannot be graded: {answer!r:.100}"
        )
    return answer


def _is_text(value: Any) -> TypeGuard[str]:
    """Whether a value is a text that is not blank and contains no lone surrogate."""
    return isinstance(value, str) and bool(value.strip()) and not SURROGATE.search(value)


def _of_messages(value: Any, column: str) -> Any:
    """Return the text of a user message, optionally after a system one; other values as they are.

    The messages may be a list of objects, as in verl's form, or its JSON text.
    """
    if isinstance(value, str) and _MESSAGES.match(value):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return value
    if not isinstance(value, list):
        return value
    roles = [message.get("role") if isinstance(message, dict) else None for message in value]
    if roles not in (["user"], ["system", "user"]):
        raise ValueError(
            f"{column} must be a text, or a user message, optionally after a system message; its "
            f"roles are {roles!r:.100}"
        )
    contents = [message.get("content") for message in value]
    return "\n\n".join(contents) if all(isinstance(each, str) for each in contents) else contents


def _inside(row: Any, column: str) -> Any:
    """Return the value of a column, or None; dots in its name lead into nested objects."""
    for name in column.split("."):
        row = row.get(name) if isinstance(row, dict) else None
    return row


def raw_rows(
    source: str, path: Path | None, dataset: str | None, subset: str | None, split: str
) -> RawRows:
    """Open a file or a data set of the hub.

    Args:
        source: `jsonl`, `csv`, `parquet` or `hub`.
        path: The file.
        dataset: Id or folder of a data set of the hub.
        subset: Name of its subset.
        split: Name of its split.

    Raises:
        ValueError: It cannot be read; the message says what to do.
    """
    if source == "hub":
        assert dataset is not None
        try:
            return HubRows(dataset, subset, split)
        except ImportError as error:
            raise ValueError(f"{error}; install it: pip install 'tir_alp[data]'") from error
        except (
            Exception
        ) as error:  # the type depends on whether id, subset, split or network is wrong
            raise ValueError(f"cannot load the data set {dataset!r}: {error}") from error
    assert path is not None
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder: name a file in it, or, for a folder that the datasets library "
            f'saved, set data.source = "hub" and data.dataset = "{path}"'
        )
    if source in ("jsonl", "csv"):
        try:
            return JsonLines(path, open_csv if source == "csv" else open_lines)
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror}") from None
    try:
        return ParquetRows(path)
    except ImportError as error:
        raise ValueError(f"{error}; install it: pip install 'tir_alp[data]'") from error
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        if (found := format_of(path)) is not None:
            raise ValueError(f"{path} is {found}") from None
        raise ValueError(f"cannot read the parquet file {path}: {error}") from error
