"""Serves the page and its data: on this machine alone, under a secret path, with a strict policy.

The page may load nothing from elsewhere, and no other page may read it: the address holds a token,
the name in a request must be that of this machine, and what runs are the files of the package.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import socket
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route

from tir_alp.inspector.assets import static_files, static_text
from tir_alp.inspector.finite import finite
from tir_alp.inspector.index import RANGES, WORDS, Query
from tir_alp.inspector.source import RunSource
from tir_alp.records.meanings import meaning

HOST = "127.0.0.1"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
_MOST_NAMES = 200


def new_token() -> str:
    """Return a token for the address of a page."""
    return secrets.token_urlsafe(18)


def make_app(sources: Sequence[RunSource], token: str) -> Starlette:
    """Return the application.

    Args:
        sources: The runs.
        token: The first part of every path; a request without it gets 404.
    """
    api = _Api(sources)
    routes = [
        Route("/", _file("index.html")),
        Route("/api/runs", api.answer(api.runs)),
        Route("/api/state", api.answer(api.state)),
        Route("/api/metrics/{run:int}", api.answer(api.metrics)),
        Route("/api/meanings", api.answer(api.meanings)),
        Route("/api/trajectories/{run:int}", api.answer(api.trajectories)),
        Route("/api/trajectory/{run:int}/{kind}/{step:int}/{line:int}", api.answer(api.trajectory)),
        Route("/api/audit/{run:int}", api.answer(api.audit)),
        Route("/api/audit/{run:int}", api.answer(api.start_audit), methods=["POST"]),
        *(Route(f"/{name}", _file(name)) for name in static_files()),
    ]
    return Starlette(
        routes=[Mount(f"/{token}", routes=routes)],
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"]),
            Middleware(GZipMiddleware, minimum_size=4096, compresslevel=1),
        ],
    )


@contextmanager
def listening(port: int) -> Iterator[socket.socket]:
    """Listen on a port of this machine, 0 for a free one, while the block runs.

    Raises:
        ValueError: The port is taken.
    """
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
    except OSError as error:
        listener.close()
        raise ValueError(f"cannot listen on port {port}: {error.strerror}; give another") from None
    with listener:
        yield listener


def _file(name: str) -> Callable[[Request], Awaitable[Response]]:
    kind = _TYPES[name[name.rindex(".") :]]

    async def send(request: Request) -> Response:
        return Response(static_text(name), media_type=kind, headers=_HEADERS)

    return send


@dataclass(frozen=True, slots=True)
class _Api:
    """What the page asks for; each method takes a request and returns what is sent as JSON."""

    sources: Sequence[RunSource]

    def answer(self, find: Callable[[Request], Any]) -> Callable[[Request], Awaitable[Response]]:
        """Return a handler that runs `find` in a thread; ValueError and LookupError are 404."""

        async def handle(request: Request) -> Response:
            try:
                found = await asyncio.to_thread(find, request)
            except (ValueError, LookupError) as error:
                return JSONResponse({"error": str(error)}, 404, _HEADERS)
            text = json.dumps(finite(found), separators=(",", ":"))
            return Response(text, media_type="application/json", headers=_HEADERS)

        return handle

    def runs(self, request: Request) -> Any:
        return [each.about() for each in self.sources]

    def state(self, request: Request) -> Any:
        return [each.state() for each in self.sources]

    def metrics(self, request: Request) -> Any:
        names = request.query_params.getlist("name")
        return self._run(request).metrics(names[:_MOST_NAMES])

    def meanings(self, request: Request) -> Any:
        return meanings_of({name for each in self.sources for name in each.curves.all()})

    def trajectories(self, request: Request) -> Any:
        return self._run(request).trajectories(query_of(request.query_params))

    def trajectory(self, request: Request) -> Any:
        path = request.path_params
        sequence = int(request.query_params.get("sequence", 0))
        return self._run(request).trajectory(path["kind"], path["step"], path["line"], sequence)

    def audit(self, request: Request) -> Any:
        return self._run(request).audit.state

    def start_audit(self, request: Request) -> Any:
        self._run(request).audit.start()
        return self._run(request).audit.state

    def _run(self, request: Request) -> RunSource:
        return self.sources[request.path_params["run"]]


def meanings_of(names: set[str]) -> dict[str, list[str]]:
    """Return meaning and unit of each metric that the report's table knows."""
    return {name: list(meaning(name)) for name in sorted(names)}


def query_of(parameters: Any) -> Query:
    """Return the query that the parameters of a request describe.

    `sort=-reward` descends; `reward=0:1` is a range, of which either end may be missing.

    Raises:
        ValueError: If a number is none.
    """
    ranges = {}
    for name in RANGES:
        if name in parameters:
            low, _, high = parameters[name].partition(":")
            ranges[name] = float(low) if low else None, float(high) if high else None
    sort = parameters.get("sort", "-step")
    return Query(
        ranges=ranges,
        words={name: parameters[name] for name in WORDS if parameters.get(name)},
        text=parameters.get("text", ""),
        sort=sort.lstrip("-"),
        descending=sort.startswith("-"),
        offset=int(parameters.get("offset", 0)),
        limit=int(parameters.get("limit", 200)),
    )
