"""Runs the environments of one library, at the other end of a pipe: `main.py FD MODULE`.

It is run by an interpreter that has the library and perhaps nothing else: nothing of ours is
imported here. A line in is a question, a line out its answer. Questions are answered by threads, so
that a slow environment keeps only its own episode waiting; one environment is asked one thing at a
time. When the pipe ends, so does the process.
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
"""At a time, unless the module says otherwise in `MAX_THREADS`."""


def main(descriptor: int, library: str) -> None:
    """Answer until the pipe ends."""
    pipe = socket.socket(fileno=descriptor)
    sending = threading.Lock()

    def send(answer: dict[str, Any]) -> None:
        line = (json.dumps(answer, default=str) + "\n").encode()
        with sending:
            pipe.sendall(line)

    module = importlib.import_module(library)
    environments: dict[int, Any] = {}
    numbers = itertools.count()

    def run(question: dict[str, Any]) -> Any:
        if question["op"] == "open":
            number = next(numbers)
            environments[number] = module.Environment(question["name"], question["settings"])
            return number
        if question["op"] == "close":
            return environments.pop(question["env"]).close()
        environment = environments[question["env"]]
        if question["op"] == "reset":
            return environment.reset(question["seed"], question["task"])
        return environment.step(question["action"])

    def answer(question: dict[str, Any]) -> None:
        try:
            reply = {"id": question["id"], "result": run(question)}
        except BaseException as error:  # of anybody's code, a cancelled coroutine's too
            reply = {"id": question["id"], "error": f"{type(error).__name__}: {error}"}
        try:
            send(reply)
        except OSError:
            os._exit(1)

    send({"id": 0, "result": module.version()})
    with pipe.makefile("r", encoding="utf-8", newline="\n") as lines:
        threads = ThreadPoolExecutor(getattr(module, "MAX_THREADS", _MAX_THREADS))
        for line in lines:
            threads.submit(answer, json.loads(line))
    os._exit(0)  # threads of the library's may be stuck


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
