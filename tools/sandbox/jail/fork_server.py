"""The fork server: imports once, then turns every request of the host into a confined session.

One thread, one loop, no foreign code: what a program can reach is only its own forked copy. The
processes of a session, and who talks to whom:

    host ──requests──> fork server ──clone──> keeper (one a session) ──────fork──> interpreter
      ├──<──────────── obituaries ─────────────┘                                            │
      └──<── control (frames), stdout, stderr ──────────────────────────────────────────────┘
"""

from __future__ import annotations

import array
import contextlib
import dataclasses
import fcntl
import gc
import importlib
import io
import json
import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Any, Protocol

from tir_alp.tools.sandbox.jail import confine, frames, kernel
from tir_alp.tools.sandbox.jail.cells import CellRunner
from tir_alp.tools.sandbox.jail.room_folder import FolderRoom
from tir_alp.tools.sandbox.jail.room_gvisor import GvisorRoom
from tir_alp.tools.sandbox.jail.room_namespaces import NamespacesRoom
from tir_alp.tools.sandbox.jail.spec import JailSpec

_CONTROL = 3
_MAX_DESCRIPTORS = 1 << 16
_MAX_REQUEST = 1 << 18
_ROOMS = {"namespaces": NamespacesRoom, "folder": FolderRoom, "gvisor": GvisorRoom}


class Room(Protocol):
    """Where a session lives, and what keeps it there. One copy in each process of the session."""

    keeper_flags: int
    """Of the clone(2) that makes a keeper, its signal left out."""
    branch_flags: int
    """Of the clone(2) by which an interpreter copies itself."""

    def furnish(self) -> None:
        """In the keeper, first thing."""
        ...

    def enter(self) -> int | None:
        """In the interpreter, before it is confined; returns its Landlock rule set."""
        ...

    def wait(self, interpreter: int) -> tuple[int, int, str]:
        """In the keeper: the next death as (pid, wait status, the limit that it was killed for)."""
        ...

    def leave(self) -> None:
        """In the keeper, when no process of the session is left."""
        ...

    def enter_branch(self) -> None:
        """In a branch, which is confined already."""
        ...

    def furnish_branch(self, pidfd: int) -> None:
        """In a helper outside of the session: what a branch may not do itself."""
        ...


def main(requests_fd: int, obituaries_fd: int, readable: Sequence[str] = ()) -> None:
    """Serve until the host closes its end; that also ends every session.

    Args:
        requests_fd: The host's socket.
        obituaries_fd: The socket on which keepers tell the host of deaths.
        readable: What a program may read here, beside what the host says.
    """
    requests = socket.socket(fileno=requests_fd)
    fields = json.loads(requests.recv(_MAX_REQUEST))
    spec = JailSpec(**fields)
    spec = dataclasses.replace(spec, readable=(*spec.readable, *readable))
    sys.path[:] = [p for p in sys.path if p != "/jail"] + list(spec.import_paths)
    for name in spec.preload:
        importlib.import_module(name)
    for stream in (sys.stdout, sys.stderr):
        assert isinstance(stream, io.TextIOWrapper)
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    room: Room = _ROOMS[spec.room](spec)
    # Children are reaped by the kernel; keepers undo this for their own.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    gc.collect()
    gc.freeze()
    requests.send(b'{"ready": true}')
    while True:
        message, descriptors = _receive(requests)
        if not message:
            return
        if message["op"] == "session":
            try:
                pid = kernel.clone(room.keeper_flags | kernel.SIGCHLD)
            except OSError as error:  # no room for another process or namespace
                os.write(descriptors[2], str(error).encode())
            else:
                if pid == 0:
                    requests.close()  # else its end, and what waits in it, outlived the fork server
                    _keep(spec, room, message["id"], descriptors, obituaries_fd)
        elif message["op"] == "furnish_branch" and os.fork() == 0:
            _furnish_branch(requests, message["id"], descriptors[0], room)
        for descriptor in descriptors:
            os.close(descriptor)


def _receive(sock: socket.socket) -> tuple[dict[str, Any], list[int]]:
    data, ancillary, _, _ = sock.recvmsg(_MAX_REQUEST, socket.CMSG_SPACE(12))
    descriptors = array.array("i")
    for _, _, payload in ancillary:
        descriptors.frombytes(payload[: len(payload) - len(payload) % descriptors.itemsize])
    return (json.loads(data) if data else {}), list(descriptors)


def _furnish_branch(requests: socket.socket, number: int, pidfd: int, room: Room) -> None:
    error = ""
    try:
        room.furnish_branch(pidfd)
    except Exception as failure:
        error = f"{type(failure).__name__}: {failure}"[:1000]
    requests.send(json.dumps({"id": number, "error": error}).encode())
    os._exit(0)


def _keep(
    spec: JailSpec, room: Room, family: int, descriptors: list[int], obituaries_fd: int
) -> None:
    """The keeper: start the interpreter, reap it and its branches, tell the host how each ended."""
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        room.furnish()
        interpreter = os.fork()
        if interpreter == 0:
            _start_interpreter(spec, room, descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        obituaries = socket.socket(fileno=obituaries_fd)
        while True:
            obituary = [family, *room.wait(interpreter)]
            with contextlib.suppress(OSError):  # the host is gone, and nobody reads any more
                obituaries.send(json.dumps(obituary).encode())
    except ChildProcessError:
        room.leave()
        os._exit(0)
    except BaseException as failure:
        os.write(descriptors[2], f"{type(failure).__name__}: {failure}".encode())
        os._exit(1)


def _start_interpreter(spec: JailSpec, room: Room, descriptors: list[int]) -> None:
    try:
        ruleset = room.enter()
        if ruleset is not None:  # out of the way of the descriptors that are adopted
            ruleset = fcntl.fcntl(ruleset, fcntl.F_DUPFD_CLOEXEC, 10)
        _adopt(descriptors)
        control = socket.socket(fileno=_CONTROL)
        questions = confine.confine(spec, ruleset)
        _reseed()
        rights = [] if questions is None else [questions]
        hello = frames.encode({"hello": True, "pid": os.getpid()})
        socket.send_fds(control, [hello], rights)
        os.closerange(_CONTROL + 1, _MAX_DESCRIPTORS)
        _serve_cells(CellRunner(), control, room)
    except BaseException as failure:
        os.write(2, f"{type(failure).__name__}: {failure}\n".encode())
    os._exit(0)


def _adopt(descriptors: list[int]) -> None:
    control, out, err = descriptors
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.dup2(control, _CONTROL)


def _reseed() -> None:
    """Give this copy random numbers of its own; `random` does so by itself after a fork."""
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()


def _serve_cells(runner: CellRunner, control: socket.socket, room: Room) -> None:
    receive = control.recv
    while (message := frames.read_frame(receive)) is not None:
        if message["op"] == "run":
            reply = runner.execute(message["code"], message["value_chars"])
        else:
            reply = _branch(control, room)
            if reply is None:  # this is the branch now, and its control socket is a new one
                continue
        control.sendall(frames.encode(reply | {"id": message["id"]}))


def _branch(control: socket.socket, room: Room) -> dict[str, Any] | None:
    """Fork this interpreter; None in the branch, once the host has given it a /tmp of its own."""
    _, descriptors, _, _ = socket.recv_fds(control, 1, 3)
    error = ""
    pid = -1
    try:
        pid = kernel.clone(room.branch_flags)
    except OSError as failure:
        error = str(failure)
    if pid != 0:
        for descriptor in descriptors:
            os.close(descriptor)
        return {"error": error, "pid": pid}
    _adopt(descriptors)
    for descriptor in descriptors:
        os.close(descriptor)
    _reseed()
    room.enter_branch()
    folder = os.getcwd()
    control.sendall(frames.encode({"hello": True}))
    if frames.read_frame(control.recv) is None:
        os._exit(0)
    os.chdir(folder)  # by its name again, which may lie in another file system by now
    return None
