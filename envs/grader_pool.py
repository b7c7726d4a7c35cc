"""A few processes that grade; each is killed and replaced when it exceeds its deadline.

They are forked from one process that has imported everything, so that a replacement takes
milliseconds. A request that takes long does not hold up the others: after `patience_s` it goes on
in overtime, at a lower priority, and another process takes over its slot; so a hang costs others
next to nothing until it is killed.
"""

from __future__ import annotations

import json
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).absolute().parents[2]
_PROCESS = Path(__file__).with_name("grader_process.py")
_MATH_JUDGE = Path(__file__).with_name("math_judge.py")
_MOST_BYTES = 1 << 16  # size of a verdict
_WALL_FACTOR = 10  # wall time over processor time that a request gets on a busy machine
_OVERTIME_FACTOR = 8  # slow requests that go on at a low priority, per worker
_LONG_FACTOR = 10  # of the patience, after which the priority is lowered once more
_ONE_THREAD = {
    f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL", "NUMEXPR")
}  # a process with threads cannot be forked safely


class GraderError(Exception):
    """An answer could not be graded; whether it is right is unknown."""


class GaveUp(GraderError):
    """The judge began with a request, but exceeded its deadline, crashed or raised."""


class GraderPool:
    """Grades for any number of threads with at most `num_workers` processes, and some in overtime.

    Processes start when they are first needed. A slot in the queue is the right to use one
    process: it holds an idle worker, or None if the worker has yet to be forked or was killed.

    Args:
        num_workers: Maximum number of processes; eight times as many may be in overtime.
        judge_file: File with the function that decides; see `grader_process`.
        deadline_s: Seconds of processor time for one verdict.
        patience_s: Seconds of processor time after which a request goes on in overtime.
        start_deadline_s: Seconds for the start of the process that workers are forked from.
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
        self.queue_deadline_s = queue_deadline_s
        self._template = _Template(judge_file, start_deadline_s)
        self._overtime = threading.Semaphore(_OVERTIME_FACTOR * num_workers)
        self._slots = _Slots(num_workers)

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
                worker = _Worker(self._template)
            worker.send((request, self.deadline_s * _WALL_FACTOR))
            if not worker.has_verdict(min(self.patience_s, self.deadline_s)):
                has_slot = not self._overtime.acquire(blocking=False)
                if not has_slot:
                    self._slots.put(None)
                    worker.slow_down()
                    if not worker.has_verdict(_LONG_FACTOR * self.patience_s):
                        worker.slow_down()
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
                if worker is not None:  # its priority cannot be raised again
                    worker.kill()
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
                break  # its worker ends with the process that it was forked from
        self._template.close()
        for worker in slots:
            if worker is not None:
                worker.kill()
            self._slots.put(None)

    def abandon(self) -> None:
        """Let go of a parent's processes; for a forked child, which must not use them."""
        self._template.abandon()


class _Slots:
    """The slots that are free. They are handed out in the order of the requests.

    `queue.Queue` makes no such promise: there, a thread that returns a slot and asks again gets
    ahead of all that wait, for seconds.
    """

    def __init__(self, num_slots: int):
        self._lock = threading.Lock()
        self._free: list[_Worker | None] = [None] * num_slots
        self._waiting: deque[queue.SimpleQueue[_Worker | None]] = deque()

    def get(self, timeout: float) -> _Worker | None:
        """Take a slot, the one used last if several are free; raises `queue.Empty`."""
        with self._lock:
            if self._free:
                return self._free.pop()
            place: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()
            self._waiting.append(place)
        try:
            return place.get(timeout=timeout)
        except BaseException:
            with self._lock:
                if place in self._waiting:
                    self._waiting.remove(place)
                    raise
            self.put(place.get())  # it came in the last moment
            raise

    def put(self, worker: _Worker | None) -> None:
        """Give a slot back, to the thread that has waited longest."""
        with self._lock:
            if self._waiting:
                self._waiting.popleft().put(worker)
            else:
                self._free.append(worker)

    def idle(self) -> list[_Worker]:
        """Return the workers that wait for a request."""
        with self._lock:
            return [worker for worker in self._free if worker is not None]


class _Template:
    """The process that workers are forked from; it starts when it is first needed.

    Workers end with it, so nothing is left if it or this program is killed.
    """

    def __init__(self, judge_file: Path, start_deadline_s: float):
        self._judge_file = judge_file
        self._deadline_s = start_deadline_s
        self._lock = threading.Lock()
        self._running: tuple[subprocess.Popen[bytes], socket.socket] | None = None

    def fork(self, pipe: int) -> tuple[int, int]:
        """Fork a worker that serves the other end of a pipe.

        Returns:
            The process id of this process, and that of the worker.
        """
        with self._lock:
            if self._running is None:
                self._running = self._start()
            process, control = self._running
            return process.pid, int(self._ask(control, b"fork", [pipe]))

    def tell(self, what: str, template_pid: int, pid: int) -> int | None:
        """`slow` down or `end` a worker.

        Returns:
            The exit status of a worker that was to end; None if its template has ended before it.
        """
        with self._lock:
            if self._running is None or self._running[0].pid != template_pid:
                return None
            try:
                return int(self._ask(self._running[1], f"{what} {pid}".encode(), []))
            except GraderError:
                return None

    def close(self) -> None:
        """End the process, and with it all workers."""
        with self._lock:
            self._stop()

    def abandon(self) -> None:
        """Close a forked child's copy of the connection."""
        if self._running is not None:
            self._running[1].close()

    def _start(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            arguments = [str(theirs.fileno()), str(self._judge_file), str(_ROOT)]
            process = subprocess.Popen(
                # -P keeps the file's folder, with `parsing` and `tasks`, off the path
                [sys.executable, "-P", str(_PROCESS), *arguments],
                pass_fds=[theirs.fileno()],
                env=os.environ | _ONE_THREAD,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is meant for the trainer, not for the grader
            )
        ours.settimeout(self._deadline_s)
        self._running = process, ours
        self._ask(ours, b"", [])
        return process, ours

    def _ask(self, control: socket.socket, message: bytes, pipes: list[int]) -> bytes:
        """Send a message, if there is one, and return the answer."""
        answer = b""
        try:
            if message:
                socket.send_fds(control, [message], pipes)
            answer = control.recv(64)
        except TimeoutError:
            raise GraderError(f"the grader did not start within {self._deadline_s:g} s") from None
        except OSError:
            pass  # it has ended
        finally:
            status = None if answer else self._stop()  # also if a signal ended the wait
        if not answer:
            raise GraderError(f"the grader did not start: it ended with status {status}")
        return answer

    def _stop(self) -> int | None:
        if self._running is None:
            return None
        process, control = self._running
        self._running = None
        control.close()
        try:
            return process.wait(1.0)  # it kills its workers
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


class _Worker:
    """One process, which handles one request at a time."""

    def __init__(self, template: _Template):
        self._template = template
        self._pipe, theirs = Pipe()
        self._status: int | None = None  # its exit status, if it has ended
        self._used_s = 0.0  # processor time before the current request
        try:
            with theirs:
                self._template_pid, self.pid = template.fork(theirs.fileno())
        except BaseException:
            self._pipe.close()
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

    def slow_down(self) -> None:
        """Lower the priority of the process for the rest of its life."""
        self._template.tell("slow", self._template_pid, self.pid)

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
            # JSON, never a pickle: the sender has processed a model's answer.
            return json.loads(self._pipe.recv_bytes(_MOST_BYTES))
        except (EOFError, OSError):
            self.kill()
        if self._status is None:
            raise GraderError("the grader gave no verdict: the process it was forked from ended")
        raise GaveUp(f"the grader gave no verdict: it ended with status {self._status}")

    def kill(self) -> None:
        """End the process; once it has ended, do nothing."""
        if not self._pipe.closed:
            self._status = self._template.tell("end", self._template_pid, self.pid)
            self._pipe.close()

    def _processor_s(self) -> float:
        """Return the processor time that the process has used, in seconds."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
