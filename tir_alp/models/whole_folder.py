"""A folder that appears under its name only when it is whole.

It is written beside its place and renamed. Whoever writes holds a lock on what is unfinished, which
the kernel frees when its holder dies; the next one who writes begins anew.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_TIMEOUT_S = 3600.0


@contextmanager
def whole_folder(out: Path, log: Callable[[str], None]) -> Iterator[Path | None]:
    """Give an empty folder to write to, which becomes `out` when the block ends without an error.

    Args:
        out: The folder to make; it may exist if it is empty.
        log: Called with a line for people, if another process has to be waited for.

    Yields:
        The folder to write to; None if another process has made `out` meanwhile.

    Raises:
        ValueError: Another process writes it for too long.
    """
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.parent / f".{out.name}.unfinished"
    was_there = is_taken(out)
    descriptor = _locked(aside, out, log)
    try:
        if is_taken(out) and not was_there:
            yield None
            return
        for each in aside.iterdir():  # of a process that died
            shutil.rmtree(each) if each.is_dir() else each.unlink()
        yield aside
        aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        os.close(descriptor)


def is_taken(out: Path) -> bool:
    """Return whether there is something at a path, other than an empty folder."""
    return any(out.iterdir()) if out.is_dir() else out.exists() or out.is_symlink()


def _locked(aside: Path, out: Path, log: Callable[[str], None]) -> int:
    """Make the unfinished folder and lock it; returns its descriptor."""
    deadline = time.monotonic() + _TIMEOUT_S
    is_told = False
    while True:
        aside.mkdir(exist_ok=True)
        descriptor = os.open(aside, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_ino == aside.stat().st_ino:
                return descriptor
        except (BlockingIOError, FileNotFoundError):  # it was or is written by another process
            pass
        os.close(descriptor)
        if time.monotonic() > deadline:
            raise ValueError(
                f"another process has been writing {out} for {_TIMEOUT_S / 60:g} minutes: see what "
                "it does, or stop it"
            )
        if not is_told:
            log(f"another process is writing {out}; waiting for it")
            is_told = True
        time.sleep(0.2)
