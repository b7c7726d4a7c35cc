"""The fork server: imports once, then turns every request of the host into a confined session.

It has one thread and one loop, and runs no foreign code: a program reaches only its own forked
copy. The processes of a session, and the channels between them:

    host ──requests──> fork server ──clone──> keeper (per session) ────────fork──> interpreter
      ├──<──────────── obituaries ─────────────┘                                            │
      └──<── control (frames), stdout, stderr ──────────────────────────────────────────────┘
"""

from __future__ import annotations

import array
import base64
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
from typing import Any, NoReturn, Protocol

from tir_alp.tools.sandbox.jail import confine, frames, kernel
from tir_alp.tools.sandbox.jail.cells import CellRunner
from tir_alp.tools.sandbox.jail.room_folder import FolderRoom
from tir_alp.tools.sandbox.jail.room_gvisor import GvisorRoom
from tir_alp.tools.sandbox.jail.room_namespaces import NamespacesRoom
from tir_alp.tools.sandbox.jail.script import run_script
from tir_alp.tools.sandbox.jail.spec import JailSpec

ABORTED = 128 + signal.SIGABRT
"""Exit status that stands for SIGABRT, as a shell shows it."""
_CONTROL = 3
_MAX_DESCRIPTORS = 1 << 16
_MAX_REQUEST = 1 << 18
_ROOMS = {"namespaces": NamespacesRoom, "folder": FolderRoom, "gvisor": GvisorRoom}


class Room(Protocol):
    """Where a session lives. Every process of the session has a copy of this object."""

    keeper_flags: int
    """Flags of the clone(2) that makes a keeper, without its signal."""
    branch_flags: int
    """Flags of the clone(2) by which an interpreter copies itself."""
    stdin_file: str | None
    """The file to which `/dev/stdin` leads in a session; None if it leads to descriptor 0."""

    def furnish(self) -> None:
        """Called in the keeper, before anything else."""
        ...

    def enter(self) -> int | None:
        """Called in the interpreter before it is confined; returns its Landlock rule set."""
        ...

    def wait(self, interpreter: int) -> tuple[int, int, str]:
        """Called in the keeper: wait for a death.

        Returns:
            The pid, the wait status, and the limit for which the process was killed ("" if none).

        Raises:
            ChildProcessError: No process of the session is left.
        """
        ...

    def leave(self) -> None:
        """Called in the keeper when no process of the session is left."""
        ...

    def enter_branch(self) -> None:
        """Called in a branch, which is confined already."""
        ...

    def furnish_branch(self, pidfd: int) -> None:
        """Called in a helper outside of the session: does what a branch may not do itself."""
        ...


def main(requests_fd: int, obituaries_fd: int, readable: Sequence[str] = ()) -> None:
    """Serve until the host closes its end, which also ends every session.

    Args:
        requests_fd: Socket to the host.
        obituaries_fd: Socket on which keepers report deaths to the host.
        readable: Paths that a program may read here, in addition to those in the host's spec.
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
    os.abort = _abort
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
            except OSError as error:  # no more processes or namespaces can be had
                os.write(descriptors[2], str(error).encode())
            else:
                if pid == 0:
                    requests.close()  # otherwise it would stay open after the fork server's end
                    _keep(spec, room, message["id"], descriptors, obituaries_fd)
        elif message["op"] == "furnish_branch" and os.fork() == 0:
            _furnish_branch(requests, message["id"], descriptors[0], room)
        for descriptor in descriptors:
            os.close(descriptor)


def _abort() -> NoReturn:
    """What `os.abort` does here: no signal can be sent, so abort(3) would end in a SIGSEGV."""
    os._exit(ABORTED)


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
    """The keeper: start the interpreter, reap it and its branches, report how each ended."""
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
        if ruleset is not None:  # away from the numbers of the descriptors that are adopted
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
        os._exit(1)
    os._exit(0)


def _adopt(descriptors: list[int]) -> None:
    control, out, err = descriptors
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.dup2(control, _CONTROL)


def _reseed() -> None:
    """Give this copy random numbers of its own; `random` reseeds itself after a fork."""
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()


def _serve_cells(runner: CellRunner, control: socket.socket, room: Room) -> None:
    receive = control.recv
    while (message := frames.read_frame(receive)) is not None:
        if message["op"] == "run":
            reply = runner.execute(message["code"], message["value_chars"])
        elif message["op"] == "script":
            code, stdin = (base64.b64decode(message[key]) for key in ("code", "stdin"))
            reply = run_script(code, stdin, room.stdin_file)
        else:
            reply = _branch(control, room)
            if reply is None:  # this is the branch now, with a control socket of its own
                continue
        control.sendall(frames.encode(reply | {"id": message["id"]}))


def _branch(control: socket.socket, room: Room) -> dict[str, Any] | None:
    """Fork this interpreter; return None in the branch, once it has a /tmp of its own."""
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
    os.chdir(folder)  # the same path may lead into another file system by now
    return None
