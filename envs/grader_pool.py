"""A few processes that grade; each is killed and replaced when it exceeds its deadline.

A request that takes long does not hold up the others: after `patience_s` it goes on in overtime,
and another process takes over its slot.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

_PROCESS = Path(__file__).with_name("grader_process.py")
_MATH_JUDGE = Path(__file__).with_name("math_judge.py")
_MOST_BYTES = 1 << 16  # size of a verdict
_WALL_FACTOR = 10  # wall time over processor time that a request gets on a busy machine


class GraderError(Exception):
    """An answer could not be graded; whether it is right is unknown."""


class GaveUp(GraderError):
    """The judge began with a request, but exceeded its deadline, crashed or raised."""


class GraderPool:
    """Grades for any number of threads with at most `num_workers` processes, and some in overtime.

    Processes start when they are first needed. A slot in the queue is the right to use one
    process: it holds an idle worker, or None if the worker has yet to be started or was killed.

    Args:
        num_workers: Maximum number of processes, and the maximum number of those in overtime.
        judge_file: File with the function that decides; see `grader_process`.
        deadline_s: Seconds of processor time for one verdict.
        patience_s: Seconds of processor time after which a request goes on in overtime.
        start_deadline_s: Seconds for the start of a worker.
        queue_deadline_s: Seconds to wait for a free worker.
    """

    def __init__(
        self,
        num_workers: int = 2,
        *,
        judge_file: Path = _MATH_JUDGE,
        deadline_s: float = 5.0,
        patience_s: float = 0.1,
        start_deadline_s: float = 60.0,
        queue_deadline_s: float = 60.0,
    ):
        self.num_workers = num_workers
        self.judge_file = judge_file
        self.deadline_s = deadline_s
        self.patience_s = patience_s
        self.start_deadline_s = start_deadline_s
        self.queue_deadline_s = queue_deadline_s
        self._overtime = threading.Semaphore(num_workers)
        self._spares: queue.LifoQueue[_Worker] = queue.LifoQueue()
        self._slots: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(num_workers):
            self._slots.put(None)

    def verify(self, *request: Any) -> Any:
        """Return the judge's verdict; the default judge asks math-verify whether two are equal.

        Args:
            request: Arguments of the judge; for the default one, an answer and the truth.

        Raises:
            GaveUp: The judge exceeded its deadline, crashed or raised on this request.
            GraderError: The judge could not be asked.
        """
        try:
            worker = self._slots.get(timeout=self.queue_deadline_s)
        except queue.Empty:
            raise GraderError(
                f"all {self.num_workers} graders were busy for {self.queue_deadline_s:g} s"
            ) from None
        has_slot = True
        try:
            if worker is None:
                worker = self._new_worker()
            worker.send((request, self.deadline_s * _WALL_FACTOR))
            if not worker.has_verdict(min(self.patience_s, self.deadline_s)):
                has_slot = not self._overtime.acquire(blocking=False)
                if not has_slot:
                    self._fill_slot()
            verdict = worker.receive(self.deadline_s)
        except BaseException:
            if worker is not None:
                worker.kill()
                worker = None
            raise
        finally:
            if has_slot:
                self._slots.put(worker)
            else:
                self._overtime.release()
                self._add_spare(worker)
        if isinstance(verdict, str):
            raise GaveUp(verdict)
        return verdict

    def close(self) -> None:
        """End all processes after their current verdicts; a later call would start new ones."""
        slots = []
        for _ in range(self.num_workers):
            try:
                slots.append(self._slots.get(timeout=self.deadline_s))
            except queue.Empty:
                break  # still starting: it ends by itself when its pipe closes
        for worker in slots:
            if worker is not None:
                worker.kill()
            self._slots.put(None)
        while not self._spares.empty():
            self._spares.get().kill()

    def _new_worker(self) -> _Worker:
        try:
            return self._spares.get_nowait()
        except queue.Empty:
            return _Worker(self.judge_file, self.start_deadline_s)

    def _add_spare(self, worker: _Worker | None) -> None:
        """Keep a worker that is ready for the next request in overtime."""
        if self._spares.qsize() >= self.num_workers:
            if worker is not None:
                worker.kill()
            return
        with contextlib.suppress(GraderError):  # the next request that needs a worker reports it
            self._spares.put(worker or _Worker(self.judge_file, self.start_deadline_s))

    def _fill_slot(self) -> None:
        """Give the slot of a request in overtime, which waits anyway, to a worker that is ready."""
        worker = None
        try:
            with contextlib.suppress(GraderError):  # the next request tries again, and reports it
                worker = self._new_worker()
        finally:
            self._slots.put(worker)


class _Worker:
    """One process, which handles one request at a time."""

    def __init__(self, judge_file: Path, start_deadline_s: float):
        self._pipe, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                # -P keeps the file's folder, with `parsing` and `tasks`, off the path
                [sys.executable, "-P", str(_PROCESS), str(theirs.fileno()), str(judge_file)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is meant for the trainer, not for the grader
            )
        self._used_s = 0.0  # processor time before the current request
        try:
            if not self._pipe.poll(start_deadline_s):
                raise GraderError(f"the grader did not start within {start_deadline_s:g} s")
            self._read("did not start")
        except BaseException:
            self.kill()
            raise

    def send(self, request: tuple[Any, ...]) -> None:
        """Send a request, or raise `GraderError`."""
        try:
            self._used_s = self._processor_s()
            self._pipe.send(request)
        except OSError:
            raise GraderError("the grader had died between two requests") from None

    def has_verdict(self, seconds: float) -> bool:
        """Wait for the verdict for some processor time, and return whether it is there."""
        for _ in range(_WALL_FACTOR):
            if self._pipe.poll(seconds):
                return True
            try:
                if self._processor_s() - self._used_s >= 0.8 * seconds:
                    return False
            except OSError:
                return True  # it has ended: the pipe reports so
        return False

    def receive(self, deadline_s: float) -> Any:
        """Return the verdict, or raise `GaveUp` after a deadline in processor time."""
        end = time.monotonic() + deadline_s * _WALL_FACTOR
        while not self._pipe.poll(0.0):
            try:
                rest_s = deadline_s - (self._processor_s() - self._used_s)
            except OSError:
                rest_s = 0.05  # it has ended: the pipe reports so
            if rest_s <= 0.0 or time.monotonic() > end:
                raise GaveUp(f"the grader gave no verdict within {deadline_s:g} s and was killed")
            self._pipe.poll(max(rest_s, 0.01))
        try:
            return self._read("gave no verdict")
        except GraderError as error:
            raise GaveUp(str(error)) from None

    def kill(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._pipe.close()

    def _processor_s(self) -> float:
        """Return the processor time that the process has used, in seconds."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _read(self, failure: str) -> Any:
        try:
            # JSON, never a pickle: the sender has processed a model's answer.
            return json.loads(self._pipe.recv_bytes(_MOST_BYTES))
        except (EOFError, OSError):
            status = self._process.wait()
            raise GraderError(f"the grader {failure}: it ended with status {status}") from None
