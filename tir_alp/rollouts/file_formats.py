"""Opens a file of tasks in the form in which rows can be read again by offset: JSON lines.

Compressed files are decompressed, and CSV files converted, into an unnamed temporary file. A file
of another format is refused with the format that it has and the setting that reads it.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import io
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import IO

_GZIP, _PARQUET, _ZIP = b"\x1f\x8b", b"PAR1", b"PK\x03\x04"


def open_lines(path: Path) -> int:
    """Return a descriptor of JSON lines: the file itself, or its decompressed contents.

    Raises:
        ValueError: The file has another format.
        OSError: It cannot be read.
    """
    if path.is_dir():
        raise ValueError(_folder(path))
    descriptor = os.open(path, os.O_RDONLY)
    start = os.pread(descriptor, 512, 0)
    try:
        if start.startswith(_GZIP):
            with gzip.open(path) as packed:
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
    if path.is_dir():
        raise ValueError(_folder(path))
    with contextlib.ExitStack() as stack:
        file: IO[bytes] = stack.enter_context(path.open("rb"))
        if file.peek(2).startswith(_GZIP):  # type: ignore[attr-defined]
            file = stack.enter_context(gzip.open(file))  # type: ignore[arg-type]
        try:
            _refuse_others(path, file.peek(512)[:512], is_csv=True)  # type: ignore[attr-defined]
        except (OSError, EOFError) as error:
            raise ValueError(f"{path} is compressed, and torn: {error}") from None
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        spilled = stack.enter_context(tempfile.TemporaryFile())
        reader = csv.DictReader(text, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(
                        f"{path}:{reader.line_num}: the row does not have the "
                        f"{len(reader.fieldnames or ())} values that the header names"
                    )
                spilled.write(json.dumps(row).encode() + b"\n")
        except (csv.Error, UnicodeDecodeError, EOFError, OSError) as error:
            raise ValueError(f"{path}:{reader.line_num}: not CSV in UTF-8 ({error})") from None
        spilled.flush()
        return os.dup(spilled.fileno())


def _spilled(packed: gzip.GzipFile, descriptor: int, path: Path) -> int:
    """Decompress into a temporary file that takes the descriptor's place."""
    with tempfile.TemporaryFile() as spilled:
        try:
            shutil.copyfileobj(packed, spilled)
        except (OSError, EOFError) as error:
            raise ValueError(f"{path} is compressed, and torn: {error}") from None
        spilled.flush()
        start = os.pread(spilled.fileno(), 512, 0)
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
    if start.startswith(_PARQUET):
        raise ValueError(f'{path} is a parquet file: set data.source = "parquet"')
    if start.startswith(_ZIP):
        raise ValueError(f"{path} is a zip archive: unpack it")
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


def _folder(path: Path) -> str:
    return (
        f"{path} is a folder: name a file in it, or, for a folder that the datasets library saved, "
        f'set data.source = "hub" and data.dataset = "{path}"'
    )
