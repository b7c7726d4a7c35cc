"""A few processes that grade; each is killed and replaced when it exceeds its deadline."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

_PROCESS = Path(__file__).with_name("grader_process.py")
_MATH_JUDGE = Path(__file__).with_name("math_judge.py")
_MOST_BYTES = 1 << 16  # size of a verdict


class GraderError(Exception):
    """An answer could not be graded; whether it is right is unknown."""


class GaveUp(GraderError):
    """The judge began with a request, but exceeded its deadline, crashed or raised."""


class GraderPool:
    """Grades for any number of threads with at most `num_workers` processes.

    Processes start when they are first needed. A slot in the queue is the right to use one
    process: it holds an idle worker, or None if the worker has yet to be started or was killed.

    Args:
        num_workers: Maximum number of processes.
        judge_file: File with the function that decides; see `grader_process`.
        deadline_s: Seconds for one verdict.
        start_deadline_s: Seconds for the start of a worker.
        queue_deadline_s: Seconds to wait for a free worker.
    """

    def __init__(
        self,
        num_workers: int = 2,
        *,
        judge_file: Path = _MATH_JUDGE,
        deadline_s: float = 5.0,
        start_deadline_s: float = 60.0,
        queue_deadline_s: float = 60.0,
    ):
        self.num_workers = num_workers
        self.judge_file = judge_file
        self.deadline_s = deadline_s
        self.start_deadline_s = start_deadline_s
        self.queue_deadline_s = queue_deadline_s
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
        try:
            if worker is None:
                worker = _Worker(self.judge_file, self.start_deadline_s)
            verdict = worker.ask((request, self.deadline_s), self.deadline_s)
        except BaseException:
            if worker is not None:
                worker.kill()
                worker = None
            raise
        finally:
            self._slots.put(worker)
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
        try:
            self._receive(start_deadline_s, "did not start")
        except BaseException:
            self.kill()
            raise

    def ask(self, request: tuple[Any, ...], deadline_s: float) -> Any:
        """Send a request and return its verdict, or raise `GraderError`."""
        try:
            self._pipe.send(request)
        except OSError:
            raise GraderError("the grader had died between two requests") from None
        try:
            return self._receive(deadline_s, "gave no verdict")
        except GraderError as error:
            raise GaveUp(str(error)) from None

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._pipe.close()

    def _receive(self, deadline_s: float, failure: str) -> Any:
        if not self._pipe.poll(deadline_s):
            raise GraderError(f"the grader {failure} within {deadline_s:g} s and was killed")
        try:
            # JSON, never a pickle: the sender has processed a model's answer.
            return json.loads(self._pipe.recv_bytes(_MOST_BYTES))
        except (EOFError, OSError):
            status = self._process.wait()
            raise GraderError(f"the grader {failure}: it ended with status {status}") from None
