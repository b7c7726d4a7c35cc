"""The rows of all trajectories of a run, in a SQLite database that grows with the run.

Files of a step are complete when they appear, so each is read once, and again only if its size or
its time changes. A reader sees what has been indexed so far.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tir_alp.inspector.rows import COLUMNS, row_of
from tir_alp.records.folder import step_file

KINDS = ("trajectories", "replaced")
"""Folders with trajectories."""
RANGES = (
    *("step", "reward", "advantage", "turns", "tokens", "sampled", "tool_calls", "void_turns"),
    *("staleness", "version", "group_id", "uid", "branches", "seconds"),
)
"""Columns with which rows can be restricted to a range."""
WORDS = ("kind", "outcome", "ended", "stop")
"""Columns with which rows can be restricted to a value."""

_FORMAT = 1  # of the database; another one is made again
_FILES = "CREATE TABLE files (name TEXT PRIMARY KEY, size INTEGER, time INTEGER, bad INTEGER)"
_ROWS = f"CREATE TABLE rows ({', '.join(f'{name} {kind}' for name, kind in COLUMNS.items())})"
_INDEXES = (
    "CREATE INDEX by_place ON rows (kind, step, line)",
    "CREATE INDEX by_group ON rows (group_id)",
)
_UPDATE = b'{"kind": "update"'


@dataclass(frozen=True, slots=True)
class Query:
    """Which rows, and in which order."""

    ranges: Mapping[str, tuple[float | None, float | None]] = field(default_factory=dict)
    """Column of `RANGES` -> lowest and highest value, both inclusive."""
    words: Mapping[str, str] = field(default_factory=dict)
    """Column of `WORDS` -> value."""
    text: str = ""
    """A part of the task id, the answer or the beginning of the text."""
    sort: str = "step"
    descending: bool = True
    offset: int = 0
    limit: int = 200


@dataclass(slots=True)
class TrajectoryIndex:
    """The index of one run.

    Args:
        path: The run folder.
        cache: The file of the database; None: in the run folder, or in the user's cache folder if
            that cannot be written.
    """

    path: Path
    cache: Path | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.cache = self.cache or _cache_file(self.path)
        with closing(self._open()) as database:
            version = database.execute("PRAGMA user_version").fetchone()[0]
            if version != _FORMAT:
                for table in ("files", "rows"):
                    database.execute(f"DROP TABLE IF EXISTS {table}")
                for statement in (_FILES, _ROWS, *_INDEXES):
                    database.execute(statement)
                database.execute(f"PRAGMA user_version = {_FORMAT}")
                database.commit()

    def refresh(self, most: int | None = None) -> int:
        """Index files that are new or have changed, and forget those that are gone.

        Args:
            most: Number of files to read at most; None: all.

        Returns:
            Number of files that are still to be read.
        """
        with self._lock, closing(self._open()) as database:
            known = {
                name: (size, time)
                for name, size, time in database.execute("SELECT name, size, time FROM files")
            }
            found = dict(self._files())
            for name in known.keys() - found.keys():
                self._forget(database, name)
            due = sorted(name for name, state in found.items() if known.get(name) != state)
            for name in due[:most]:
                self._read(database, name, found[name])
                database.commit()
            database.commit()
            return len(due) - len(due[:most])

    def select(self, query: Query) -> tuple[int, list[dict[str, Any]]]:
        """Return how many rows a query has, and those of its page."""
        where, values = _where(query)
        order = query.sort if query.sort in COLUMNS else "step"
        direction = "DESC" if query.descending else "ASC"
        with closing(self._open()) as database:
            (total,) = database.execute(f"SELECT COUNT(*) FROM rows {where}", values).fetchone()
            rows = database.execute(
                f"SELECT * FROM rows {where} ORDER BY {order} {direction} NULLS LAST, kind DESC, "
                f"step {direction}, line LIMIT ? OFFSET ?",
                (*values, max(0, min(query.limit, 2000)), max(0, query.offset)),
            )
            return total, [dict(zip(COLUMNS, row, strict=True)) for row in rows]

    def summary(self, query: Query) -> dict[str, Any]:
        """Return what the rows of a query have in common: counts, means and distinct values."""
        where, values = _where(query)
        with closing(self._open()) as database:

            def counts(column: str) -> dict[str, int]:
                return dict(
                    database.execute(
                        f"SELECT COALESCE({column}, 'none'), COUNT(*) FROM rows {where} "
                        "GROUP BY 1 ORDER BY 2 DESC LIMIT 12",
                        values,
                    )
                )

            names = ("total", "reward", "low", "high", "called", "void", "tokens", "flat")
            row = database.execute(
                "SELECT COUNT(*), AVG(reward), MIN(reward), MAX(reward), AVG(tool_calls > 0), "
                "AVG(void_turns > 0), SUM(tokens), "
                f"AVG(advantage IS NULL OR advantage = 0) FROM rows {where}",
                values,
            ).fetchone()
            return dict(zip(names, row, strict=True)) | {
                "outcomes": counts("outcome"),
                "stops": counts("stop"),
                "answers": counts("answer"),
                "rewards": counts("reward"),
            }

    def row(self, kind: str, step: int, line: int) -> dict[str, Any] | None:
        """Return the row of one line of one file; None if there is none."""
        with closing(self._open()) as database:
            found = database.execute(
                "SELECT * FROM rows WHERE kind = ? AND step = ? AND line = ?", (kind, step, line)
            ).fetchone()
            return None if found is None else dict(zip(COLUMNS, found, strict=True))

    def record(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Read the record that a row is about. Raises ValueError if it has gone or changed."""
        file = self.path / row["kind"] / step_file(row["step"])
        try:
            with file.open("rb") as opened:
                opened.seek(row["start"])
                record = json.loads(opened.read(row["size"]))
            if record["sequence_uid"] != row["uid"]:
                raise KeyError
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(f"{file}:{row['line']} is no longer what was indexed") from None
        return record

    @property
    def num_unreadable(self) -> int:
        """Number of lines that are no trajectories."""
        with closing(self._open()) as database:
            return database.execute("SELECT COALESCE(SUM(bad), 0) FROM files").fetchone()[0]

    # ------------------------------------------------------------------------------------ files

    def _open(self) -> sqlite3.Connection:
        assert self.cache is not None
        database = sqlite3.connect(self.cache, timeout=30)
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = OFF")  # what is lost is read again
        return database

    def _files(self) -> Iterator[tuple[str, tuple[int, int]]]:
        for kind in KINDS:
            folder = self.path / kind
            if folder.is_dir():
                for entry in os.scandir(folder):
                    if entry.name.startswith("step_") and entry.name.endswith(".jsonl"):
                        state = entry.stat()
                        yield f"{kind}/{entry.name}", (state.st_size, state.st_mtime_ns)

    def _forget(self, database: sqlite3.Connection, name: str) -> None:
        kind, step = _place(name)
        database.execute("DELETE FROM rows WHERE kind = ? AND step = ?", (kind, step))
        database.execute("DELETE FROM files WHERE name = ?", (name,))

    def _read(self, database: sqlite3.Connection, name: str, state: tuple[int, int]) -> None:
        self._forget(database, name)
        kind, step = _place(name)
        advantages = self._advantages(step) if kind == "trajectories" else {}
        rows, start, num_bad = [], 0, 0
        try:
            with (self.path / name).open("rb") as file:
                for line, raw in enumerate(file, start=1):
                    try:
                        row = row_of(json.loads(raw), kind, step, line)
                        row |= {"start": start, "size": len(raw)}
                        rows.append({**row, "advantage": advantages.get(row["uid"])})
                    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                        num_bad += 1
                    start += len(raw)
        except OSError:
            return
        names = ", ".join(f":{column}" for column in COLUMNS)
        database.executemany(f"INSERT INTO rows VALUES ({names})", rows)
        database.execute("INSERT INTO files VALUES (?, ?, ?, ?)", (name, *state, num_bad))

    def _advantages(self, step: int) -> dict[int, float]:
        """Read the advantages in the loss, by sequence, from the ledger; only their rows."""
        found = {}
        try:
            with (self.path / "ledger" / step_file(step)).open("rb") as file:
                for line in file:
                    if line.startswith(_UPDATE):
                        found |= {each[0]: each[3] for each in json.loads(line)["sequences"]}
        except (OSError, ValueError, KeyError, IndexError, TypeError):
            pass
        return found


def _where(query: Query) -> tuple[str, list[Any]]:
    terms, values = [], []
    for column, bounds in query.ranges.items():
        for bound, sign in zip(bounds, (">=", "<="), strict=True):
            if column in RANGES and bound is not None:
                terms.append(f"{column} {sign} ?")
                values.append(bound)
    for column, value in query.words.items():
        if column in WORDS:
            terms.append(f"{column} = ?")
            values.append(value)
    if query.text:
        columns = ("task_id", "answer", "preview")
        terms.append("(" + " OR ".join(f"instr(lower({each}), ?) > 0" for each in columns) + ")")
        values += [query.text.lower()] * len(columns)
    return (f"WHERE {' AND '.join(terms)}" if terms else ""), values


def _place(name: str) -> tuple[str, int]:
    kind, _, file = name.partition("/")
    return kind, int(file.removeprefix("step_").removesuffix(".jsonl"))


def _cache_file(path: Path) -> Path:
    if os.access(path, os.W_OK):
        return path / ".inspector.sqlite"
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = home / "tir_alp" / "inspector"
    folder.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    return folder / f"{name}.sqlite"


@contextmanager
def kept_fresh(indexes: Sequence[TrajectoryIndex], every_s: float) -> Iterator[None]:
    """Refresh indexes in a thread while the block runs.

    Args:
        indexes: The indexes.
        every_s: Seconds between looks at folders in which nothing is left to be read.
    """
    ends = threading.Event()

    def work() -> None:
        while not ends.is_set():
            left = [index.refresh(most=1) for index in indexes]
            if not any(left):
                ends.wait(every_s)

    thread = threading.Thread(target=work, name="index", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ends.set()
        thread.join(timeout=30)
