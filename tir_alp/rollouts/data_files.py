"""Data sets in files: read once to be checked and indexed, then row by row as they are needed.

What stays in memory is an index, some 16 bytes a row, however long the rows are. A row that is
broken is named by file and line (or row), and is fatal or left out, as the config says.

Rows come in two forms: with a question and an answer in two columns, and as verl has them, with
`prompt` (a list of messages), `reward_model.ground_truth`, `data_source` and `extra_info`.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import tempfile
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeGuard

import numpy as np

from tir_alp.config import SourceConfig
from tir_alp.tools.held_out import Split, is_held_out

_HALF_PAIR = re.compile("[\ud800-\udfff]")  # which no tokenizer takes
_BATCH_ROWS = 1024  # of a row group that are turned into Python objects at a time


class RawRows(Protocol):
    """Rows of a file as they are. Each has a key, by which it can be read again."""

    name: str

    def __iter__(self) -> Iterator[tuple[int, int, Any]]:
        """Yield number (of the line or row, for people), key and row."""
        ...

    def read(self, key: int) -> Any:
        """Return the row of a key."""
        ...


class JsonLines:
    """A file with one JSON object a line; blank lines are no rows. A key is a place in the file."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self.file = path.name
        self._descriptor = os.open(path, os.O_RDONLY)

    def __iter__(self) -> Iterator[tuple[int, int, bytes]]:
        key = 0
        with open(self._descriptor, "rb", closefd=False) as file:
            file.seek(0)
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, key, line
                key += len(line)

    def read(self, key: int) -> bytes:
        """Read a line; from any thread, since nothing is moved."""
        line, size = b"", 1 << 14
        while b"\n" not in line:
            more = os.pread(self._descriptor, size, key + len(line))
            if not more:
                break
            line, size = line + more, size * 2
        return line.partition(b"\n")[0]

    def __del__(self) -> None:
        os.close(self._descriptor)


class ParquetRows:
    """A parquet file. A key is the number of a row, from 0.

    Row groups are decompressed one after the other, once, into an Arrow file without a name in the
    folder for temporary files; that is mapped into memory, and each access reads one row of it.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow

        self.name, self.file = str(path), path.name
        self._map = _unpacked(path)
        pyarrow.default_memory_pool().release_unused()  # else it keeps 100 MB for nothing
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

    @functools.lru_cache(maxsize=1)  # noqa: B019 (it holds no data, and one file lives as long)
    def _batch(self, index: int) -> Any:
        return self._batches.get_batch(index)


def _unpacked(path: Path) -> Any:
    """Map the Arrow file that is made of a parquet file, row group after row group."""
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
    """A data set of the Hugging Face hub, by its id or folder. A key is the number of a row."""

    def __init__(self, dataset: str, subset: str | None, split: str) -> None:
        import datasets

        self.name = self.file = f"{dataset}[{split}]"
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
    """[N] int64."""
    numbers: np.ndarray
    """[N] int64, of the lines or rows."""

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"task {index} of {len(self)}")
        raw = self.rows.read(int(self.keys[index]))
        return read_row(raw, self.rows, int(self.numbers[index]), self.config)


@dataclass(frozen=True, slots=True)
class Opened:
    """A file that has been read once."""

    splits: Mapping[Split, FileTasks]
    broken: tuple[str, ...]
    """A sentence for each row that was left out because it is broken."""
    num_filtered: int
    """Rows that were left out because of their length."""


def open_rows(config: SourceConfig) -> Opened:
    """Read a file once: check every row, and index those of either split.

    A file that has not changed is not read a second time by one process.

    Raises:
        ValueError: It cannot be read, has no row, or, where that is fatal, a broken one.
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
    rows = _raw_rows(config)
    found: dict[Split, tuple[array[int], array[int]]] = {
        split: (array("q"), array("q")) for split in ("train", "held_out")
    }
    broken: list[str] = []
    num_filtered = num_rows = 0
    for number, key, raw in rows:
        num_rows += 1
        try:
            question = read_row(raw, rows, number, config)["question"]
        except ValueError as error:
            if config.broken_rows == "fatal":
                raise
            broken.append(str(error))
            continue
        most = config.max_question_chars
        if len(question) < config.min_question_chars or (most is not None and len(question) > most):
            num_filtered += 1
            continue
        keys, numbers = found["held_out" if is_held_out(question) else "train"]
        keys.append(key)
        numbers.append(number)
    if not num_rows:
        raise ValueError(f"{rows.name} holds no tasks: it needs one JSON object a line, or rows")
    splits: dict[Split, FileTasks] = {
        split: FileTasks(rows, config, np.array(keys, np.int64), np.array(numbers, np.int64))
        for split, (keys, numbers) in found.items()
    }
    return Opened(splits, tuple(broken), num_filtered)


def read_row(raw: Any, rows: RawRows, number: int, config: SourceConfig) -> dict[str, Any]:
    """Make a task of a row: `task_id`, `question`, `answer`, and what else it has.

    Args:
        raw: Bytes of a line of JSON, or the row itself.
        rows: Where it comes from.
        number: Of its line or row.
        config: Says in which columns question and answer are.

    Raises:
        ValueError: It is broken; begins with file and number.
    """
    place = f"{rows.name}:{number}"
    if isinstance(raw, bytes):
        try:
            raw = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}: not JSON ({error}): mend or delete the line") from None
    if not isinstance(raw, dict):
        raise ValueError(f'{place}: not an object: write {{"question": ..., "answer": ...}}')
    columns = config.question_column, config.answer_column
    if columns == ("question", "answer") and "question" not in raw and "reward_model" in raw:
        question, answer = _prompt_of(raw, place), _inside(raw, "reward_model.ground_truth")
        columns = "prompt", "reward_model.ground_truth"
    else:
        question, answer = (_inside(raw, column) for column in columns)
    if not _is_text(question):
        raise ValueError(
            f"{place}: {columns[0]!r} must be a text that is not empty, not {question!r:.100}"
        )
    if isinstance(answer, int | float) and not isinstance(answer, bool) and math.isfinite(answer):
        answer = str(answer)
    if not _is_text(answer):
        raise ValueError(f"{place}: {columns[1]!r} must be a text or a number, not {answer!r:.100}")
    task_id = raw.get("task_id")
    if task_id is None:
        task_id = f"{Path(rows.name).name}:{number}"
    return raw | {"task_id": str(task_id), "question": question, "answer": answer}


def _is_text(value: Any) -> TypeGuard[str]:
    """Whether it is a text with something in it, and no half of a surrogate pair."""
    return isinstance(value, str) and bool(value.strip()) and not _HALF_PAIR.search(value)


def _prompt_of(raw: Mapping[str, Any], place: str) -> Any:
    """The text of a prompt in verl's form: one message of the user, perhaps behind a system's."""
    prompt = raw.get("prompt")
    if isinstance(prompt, str):
        return prompt
    messages: list[Any] = prompt if isinstance(prompt, list) else []
    roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
    if roles not in (["user"], ["system", "user"]):
        raise ValueError(
            f"{place}: 'prompt' must be a message of the user, perhaps behind one of the system; "
            f"its roles are {roles!r:.100}"
        )
    contents = [message.get("content") for message in messages]
    return "\n\n".join(contents) if all(isinstance(each, str) for each in contents) else contents


def _inside(row: Any, column: str) -> Any:
    """The value of a column, whose name may have dots for objects in objects; None: none."""
    for name in column.split("."):
        row = row.get(name) if isinstance(row, dict) else None
    return row


def _raw_rows(config: SourceConfig) -> RawRows:
    if config.source == "hub":
        assert config.dataset is not None
        try:
            return HubRows(config.dataset, config.subset, config.split)
        except ImportError as error:
            raise ValueError(f"{error}; install it: pip install 'tir_alp[data]'") from error
        except Exception as error:  # of many kinds, by what is wrong with id, subset, split or net
            raise ValueError(f"cannot load the data set {config.dataset!r}: {error}") from error
    assert config.path is not None
    if config.source == "jsonl":
        try:
            return JsonLines(config.path)
        except OSError as error:
            raise ValueError(f"cannot read the tasks in {config.path}: {error.strerror}") from None
    try:
        return ParquetRows(config.path)
    except ImportError as error:
        raise ValueError(f"{error}; install it: pip install 'tir_alp[data]'") from error
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise ValueError(f"cannot read the parquet file {config.path}: {error}") from error
