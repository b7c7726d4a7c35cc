"""Opens a file of tasks in the form in which rows can be read again by offset: JSON lines.

Compressed files are decompressed, and CSV files converted, into an unnamed temporary file. A file
of another format is refused with the format that it has and the setting that reads it.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import csv
import gzip
import io
import json
import lzma
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO

_OPENERS: tuple[tuple[bytes, Callable[[IO[bytes]], IO[bytes]]], ...] = (
    (b"\x1f\x8b", gzip.open),  # type: ignore[assignment]
    (b"BZh", bz2.open),  # type: ignore[assignment]
    (b"\xfd7zXZ\0", lzma.open),  # type: ignore[assignment]
)
"""First bytes of a compressed file, and what decompresses it."""
_TORN = (OSError, EOFError, lzma.LZMAError, zlib.error)
_OTHERS = (
    (b"PAR1", 'a parquet file: set data.source = "parquet"'),
    (b"PK\x03\x04", "a zip archive, or a file of an office program: unpack it, or save it as CSV"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd: decompress it, with unzstd"),
    (b"ARROW1", "an Arrow file: convert it to parquet, or name its folder as data.dataset"),
    (b"SQLite format 3", "a database of SQLite: export its rows as CSV"),
    (b"\x93NUMPY", "an array of NumPy: write one JSON object per line"),
    (b"\x89HDF", "an HDF5 file: write one JSON object per line"),
    (b"\x80", "a pickle, or no text at all: write one JSON object per line"),
)
"""First bytes of files of other formats, and what to do with them."""
_START = 512  # bytes that show the format


def open_lines(path: Path) -> int:
    """Return a descriptor of JSON lines: the file itself, or its decompressed contents.

    Raises:
        ValueError: The file has another format.
        OSError: It cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY)
    start = os.pread(descriptor, _START, 0)
    try:
        if (opener := _opener(start)) is not None:
            with path.open("rb") as file, opener(file) as packed:
                return _spilled(packed, descriptor, path)
        _refuse_others(path, start)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def open_csv(path: Path) -> int:
    """Convert a CSV file with a header, compressed or not, to JSON lines; all values are texts.

    Raises:
        ValueError: It is not CSV, or a row has another number of values than the header.
        OSError: It cannot be read.
    """
    with contextlib.ExitStack() as stack:
        file: IO[bytes] = stack.enter_context(path.open("rb"))
        start = os.pread(file.fileno(), _START, 0)
        if (opener := _opener(start)) is not None:
            file = stack.enter_context(opener(file))
            try:
                start = file.peek(_START)[:_START]  # type: ignore[attr-defined]
            except _TORN as error:
                raise ValueError(f"{path} is compressed, and torn: {error}") from None
        _refuse_others(path, start, is_csv=True)
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        spilled = stack.enter_context(tempfile.TemporaryFile())
        reader = csv.DictReader(text, strict=True, delimiter=_delimiter(start))
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(
                        f"{path}:{reader.line_num}: the row does not have the "
                        f"{len(reader.fieldnames or ())} values that the header names"
                    )
                spilled.write(json.dumps(row).encode() + b"\n")
        except (csv.Error, UnicodeDecodeError, *_TORN) as error:
            raise ValueError(f"{path}:{reader.line_num}: not CSV in UTF-8 ({error})") from None
        spilled.flush()
        return os.dup(spilled.fileno())


def _opener(start: bytes) -> Callable[[IO[bytes]], IO[bytes]] | None:
    return next((opener for magic, opener in _OPENERS if start.startswith(magic)), None)


def _delimiter(start: bytes) -> str:
    """What separates the values of a table: a comma, unless its header has only tabs or ;."""
    header = start.partition(b"\n")[0].decode(errors="replace")
    return next((each for each in ",\t;" if each in header), ",")


def _spilled(packed: IO[bytes], descriptor: int, path: Path) -> int:
    """Decompress into a temporary file that takes the descriptor's place."""
    with tempfile.TemporaryFile() as spilled:
        try:
            shutil.copyfileobj(packed, spilled)
        except _TORN as error:
            raise ValueError(f"{path} is compressed, and torn: {error}") from None
        spilled.flush()
        start = os.pread(spilled.fileno(), _START, 0)
        _refuse_others(path, start)
        os.dup2(spilled.fileno(), descriptor)
    return descriptor


def _refuse_others(path: Path, start: bytes, is_csv: bool = False) -> None:
    if coding := _wide_coding(start):
        raise ValueError(
            f"{path} is in {coding}, not in UTF-8: convert it, "
            f"e.g. with: iconv -f {coding} -t UTF-8 {path.name} > utf8-{path.name}"
        )
    stripped = start.lstrip()
    for magic, what in _OTHERS:
        if start.startswith(magic):
            raise ValueError(f"{path} is {what}")
    if stripped.startswith(b"[") and b"{" in stripped[:64]:
        raise ValueError(
            f"{path} is one JSON array: write one object per line, "
            f"e.g. with: jq -c '.[]' {path.name} > tasks.jsonl"
        )
    if stripped and path.suffix == ".csv" and not is_csv and not stripped.startswith(b"{"):
        raise ValueError(f'{path} is a CSV file: set data.source = "csv"')


def _wide_coding(start: bytes) -> str:
    """Return the encoding of a text with two or four bytes per character; empty if it is none.

    Such a text begins with a byte order mark or, since tasks begin with ASCII, has zeros at the
    same place of each character.
    """
    if start.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "UTF-32"
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    if len(start) >= 4 and not start[0] and start[1] and not start[2] and start[3]:
        return "UTF-16BE"
    if len(start) >= 4 and start[0] and not start[1] and start[2] and not start[3]:
        return "UTF-16LE"
    return ""


def format_of(path: Path) -> str | None:
    """Describe a file that is no parquet file, and say what reads it; None if that is unknown."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        start = file.read(_START)
        if start.lstrip().startswith(b"{"):
            return 'a file of JSON lines: set data.source = "jsonl"'
        others = [what for magic, what in _OTHERS if magic != b"PAR1" and start.startswith(magic)]
        return next(iter(others), None)
    return None
