"""The first process in a container with a kernel of its own, such as gVisor's.

The host's descriptors cannot be passed into such a container. So this process starts a fork server
beside itself, plays the host's role towards it, and passes all bytes on as frames over its own
stdin and stdout:

    host ──one stream──> relay ──requests──> fork server ──> keeper ──> interpreter, branches
      └──<────────────────┴──<── control, stdout, stderr of each, obituaries ──┘

It decides nothing: the host tells each interpreter what to do and checks what it returns. When the
stream ends, so does the container.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

from tir_alp.tools.sandbox.jail import container_entry as container
from tir_alp.tools.sandbox.jail import frames, kernel
from tir_alp.tools.sandbox.jail.credentials import CREDENTIALS_SPACE, sender
from tir_alp.tools.sandbox.jail.seal import Seal

CONTROL, STDOUT, STDERR = 0, 1, 2
"""The streams of an interpreter, in the order in which the fork server wants them."""
HOST, GUEST = "host", "guest"
"""The two ends of the one stream. All frames except the first of each end are sealed."""
_CHUNK = 1 << 16
_MAX_FRAME = 32 << 20
_PIPES = 4
"""Capacity of a pipe, in reads of `_CHUNK` bytes."""
_LOOK_EVERY_S = 0.02
_OBITUARY_S = 0.2
"""How long after a death its keeper may take to report it."""


def main() -> None:
    """Serve the host until its stream ends."""
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)  # programs run as the same user, and must not look in
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # as the first process here, it inherits orphans
    # Forked before there is a key, so that no copy of this process's memory contains it.
    requests, obituaries = _start_fork_server()
    uname = os.uname()
    hello = {
        "code": container.fingerprint(),
        "breaches": dict(container.breaches_of_rights()),
        "kernel": [uname.release, uname.version],
    }
    _write(frames.encode(hello))
    host = frames.FrameReader(_MAX_FRAME)
    first: list[dict[str, Any]] = []
    while not first:
        first = host.feed(_read_from_host())
    requests.send(json.dumps(first[0]["spec"]).encode())
    _Relay(requests, obituaries, host, bytes.fromhex(first[0]["key"])).serve()


class _Interpreter:
    """This process's ends of one interpreter's streams."""

    def __init__(self) -> None:
        self.pid = 0
        """The pid that the kernel attached to its first message; 0 before that."""
        self.control, self._their_control = socket.socketpair()
        self.control.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        pipes = [os.pipe() for _ in (STDOUT, STDERR)]
        self.readers = {STDOUT: pipes[0][0], STDERR: pipes[1][0]}
        self.theirs = [self._their_control.fileno(), pipes[0][1], pipes[1][1]]
        for reader in self.readers.values():
            os.set_blocking(reader, False)

    def close_theirs(self) -> None:
        self._their_control.close()
        for writer in self.theirs[1:]:
            os.close(writer)


class _Relay:
    def __init__(
        self,
        requests: socket.socket,
        obituaries: socket.socket,
        host: frames.FrameReader,
        key: bytes,
    ) -> None:
        self._requests = requests
        self._obituaries = obituaries
        self._host = host
        self._from_host, self._to_host = Seal(key, HOST), Seal(key, GUEST)
        self._interpreters: dict[int, _Interpreter] = {}
        self._dying: dict[int, float] = {}
        """Number of an interpreter that should end soon -> when it was last seen alive."""
        self._selector = selectors.DefaultSelector()
        self._selector.register(0, selectors.EVENT_READ, self._on_host)
        self._selector.register(requests, selectors.EVENT_READ, self._on_fork_server)
        self._selector.register(obituaries, selectors.EVENT_READ, self._on_obituary)

    def serve(self) -> None:
        while True:
            for key, _ in self._selector.select(_LOOK_EVERY_S if self._dying else None):
                if key.fd in self._selector.get_map():  # otherwise an earlier event has closed it
                    key.data()
            self._look_after_dying()

    def _look_after_dying(self) -> None:
        """Notice deaths that no keeper sees: a branch can be the child of another branch."""
        for number in [n for n in self._dying if n not in self._interpreters]:
            del self._dying[number]
        for number, since in list(self._dying.items()):
            if _is_alive(self._interpreters[number].pid):
                self._dying[number] = time.monotonic()
            elif time.monotonic() - since > _OBITUARY_S:
                self._bury(number, None, "")

    def _on_host(self) -> None:
        for frame in self._host.feed(_read_from_host()):
            self._obey(**self._from_host.open(frame))

    def _obey(self, op: str, n: int, to: int = 0, data: str = "") -> None:
        if op == "start":
            made = self._add(n)
            request = json.dumps({"op": "session", "id": n}).encode()
            socket.send_fds(self._requests, [request], made.theirs)
            made.close_theirs()
        elif (interpreter := self._interpreters.get(n)) is None:
            return  # it has ended, and the host will learn that in a moment
        elif op == "kill":
            if interpreter.pid:
                self._dying[n] = time.monotonic()
                with contextlib.suppress(ProcessLookupError):
                    os.kill(interpreter.pid, signal.SIGKILL)
        else:
            branch = self._add(to) if op == "branch" else None
            with contextlib.suppress(OSError):  # it is dying, and its obituary will follow
                interpreter.control.sendall(base64.b64decode(data))
                if branch is not None:
                    socket.send_fds(interpreter.control, [b"\0"], branch.theirs)
            if branch is not None:
                branch.close_theirs()

    def _add(self, number: int) -> _Interpreter:
        made = self._interpreters[number] = _Interpreter()
        watch: Callable[..., object] = self._selector.register
        watch(made.control, selectors.EVENT_READ, lambda: self._on_control(number))
        for stream, reader in made.readers.items():
            watch(reader, selectors.EVENT_READ, lambda s=stream: self._on_output(number, s))
        return made

    def _on_fork_server(self) -> None:
        message = self._requests.recv(_CHUNK)
        if not message:
            sys.exit("the fork server died")
        self._tell(**json.loads(message))

    def _on_control(self, number: int) -> None:
        interpreter = self._interpreters[number]
        try:
            data, ancillary, _, _ = interpreter.control.recvmsg(_CHUNK, CREDENTIALS_SPACE)
        except OSError:
            data, ancillary = b"", []
        if not interpreter.pid:
            interpreter.control.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 0)
            interpreter.pid = sender(ancillary)
            if interpreter.pid and self._is_of_another(number, interpreter.pid):
                data = b""  # it poses as its own branch
        if not data:
            self._selector.unregister(interpreter.control)
            if interpreter.pid:
                self._dying[number] = time.monotonic()
        for stream in interpreter.readers:  # what was printed before is passed on first
            self._drain(number, stream)
        self._tell_bytes(number, CONTROL, data)

    def _is_of_another(self, number: int, pid: int) -> bool:
        return any(pid == i.pid for other, i in self._interpreters.items() if other != number)

    def _on_output(self, number: int, stream: int) -> bool:
        """Pass on what can be read; return whether there may be more."""
        reader = self._interpreters[number].readers[stream]
        try:
            data = os.read(reader, _CHUNK)
        except BlockingIOError:
            return False
        if not data:
            self._selector.unregister(reader)
            return False
        self._tell_bytes(number, stream, data)
        return True

    def _drain(self, number: int, stream: int) -> None:
        """Pass on what a pipe holds now; what is written meanwhile may have to wait."""
        reader = self._interpreters[number].readers[stream]
        for _ in range(_PIPES):
            if reader not in self._selector.get_map() or not self._on_output(number, stream):
                return

    def _on_obituary(self) -> None:
        _, pid, status, limit = json.loads(self._obituaries.recv(_CHUNK))
        for number, interpreter in list(self._interpreters.items()):
            if interpreter.pid == pid:
                self._bury(number, status, limit)

    def _bury(self, number: int, status: int | None, limit: str) -> None:
        """Pass on its last output, and how it ended."""
        interpreter = self._interpreters[number]
        for stream, reader in interpreter.readers.items():
            self._drain(number, stream)
            if reader in self._selector.get_map():
                self._selector.unregister(reader)
            os.close(reader)
        if interpreter.control in self._selector.get_map():
            self._selector.unregister(interpreter.control)
        interpreter.control.close()
        del self._interpreters[number]
        self._tell(n=number, status=status, limit=limit)

    def _tell(self, **message: object) -> None:
        _write(self._to_host.close(message))

    def _tell_bytes(self, number: int, stream: int, data: bytes) -> None:
        self._tell(n=number, stream=stream, data=base64.b64encode(data).decode())


def _start_fork_server() -> tuple[socket.socket, socket.socket]:
    """Fork the fork server; return our ends of its sockets for requests and obituaries."""
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
    if os.fork() == 0:
        for ours, _ in pairs:
            ours.close()
        null = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1):  # these lead to the host, and are not for programs
            os.dup2(null, number)
        container.become_fork_server(*(theirs.detach() for _, theirs in pairs))
        os._exit(0)
    for _, theirs in pairs:
        theirs.close()
    return pairs[0][0], pairs[1][0]


def _is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _read_from_host() -> bytes:
    data = os.read(0, _CHUNK)
    if not data:
        sys.exit()
    return data


def _write(data: bytes) -> None:
    while data:
        data = data[os.write(1, data) :]
