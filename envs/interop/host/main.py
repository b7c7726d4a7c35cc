"""Runs the environments of one library, at the other end of a pipe: `main.py FD MODULE`.

It runs in an interpreter that has the library and perhaps nothing else, so it imports nothing from
tir_alp. Each line that arrives is a request, and each line sent is a reply. Threads handle the
requests, so that a slow environment delays only its own episode; an environment gets one request at
a time. The process ends when the pipe does.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

_MAX_THREADS = 256
"""Maximum number of threads, unless the module defines `MAX_THREADS`."""


def main(descriptor: int, library: str) -> None:
    """Handle requests until the pipe ends."""
    pipe = socket.socket(fileno=descriptor)
    sending = threading.Lock()

    def send(message: dict[str, Any]) -> None:
        line = (json.dumps(message, default=str) + "\n").encode()
        with sending:
            pipe.sendall(line)

    module = importlib.import_module(library)
    environments: dict[int, Any] = {}
    numbers = itertools.count()

    def run(request: dict[str, Any]) -> Any:
        if request["op"] == "open":
            number = next(numbers)
            environments[number] = module.Environment(request["name"], request["settings"])
            return number
        if request["op"] == "close":
            return environments.pop(request["env"]).close()
        environment = environments[request["env"]]
        if request["op"] == "reset":
            return environment.reset(request["seed"], request["task"])
        return environment.step(request["action"])

    def handle(request: dict[str, Any]) -> None:
        try:
            reply = {"id": request["id"], "result": run(request)}
        except BaseException as error:  # the library may raise anything, CancelledError included
            reply = {"id": request["id"], "error": f"{type(error).__name__}: {error}"}
        try:
            send(reply)
        except OSError:
            os._exit(1)

    send({"id": 0, "result": module.version()})
    with pipe.makefile("r", encoding="utf-8", newline="\n") as lines:
        threads = ThreadPoolExecutor(getattr(module, "MAX_THREADS", _MAX_THREADS))
        for line in lines:
            threads.submit(handle, json.loads(line))
    os._exit(0)  # threads of the library may hang


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
