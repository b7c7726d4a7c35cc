"""A server with the requests of the hub's API that an upload in one commit makes."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class LocalHub:
    """What was asked of the server."""

    url: str = ""
    token: str = "hf_right"
    created: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    """What the commit contains, by path."""
    message: str = ""


@contextmanager
def local_hub() -> Iterator[LocalHub]:
    hub, large = LocalHub(), dict[str, bytes]()

    def mode_of(path: str) -> str:
        return "lfs" if path.endswith(".safetensors") else "regular"

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(
                200, {"name": "somebody", "siblings": [], "id": "me/model", "sha": "0" * 40}
            )

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers["Authorization"] != f"Bearer {hub.token}":
                return self._answer(401, {"error": "Invalid credentials"})
            if self.path == "/api/repos/create":
                hub.created.append(json.loads(body))
                return self._answer(200, {"url": f"{hub.url}/me/model"})
            if "/preupload/" in self.path:
                files = [
                    {
                        "path": each["path"],
                        "uploadMode": mode_of(each["path"]),
                        "shouldIgnore": False,
                    }
                    for each in json.loads(body)["files"]
                ]
                return self._answer(200, {"files": files})
            if self.path.endswith("/info/lfs/objects/batch"):
                objects = [
                    {**each, "actions": {"upload": {"href": f"{hub.url}/lfs/{each['oid']}"}}}
                    for each in json.loads(body)["objects"]
                ]
                return self._answer(200, {"transfer": "basic", "objects": objects})
            if "/commit/" in self.path:
                for line in body.splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "header":
                        hub.message = entry["value"]["summary"]
                    elif entry["key"] == "file":
                        content = base64.b64decode(entry["value"]["content"])
                        hub.files[entry["value"]["path"]] = content
                    elif entry["key"] == "lfsFile":
                        hub.files[entry["value"]["path"]] = large[entry["value"]["oid"]]
                commit = {"commitUrl": f"{hub.url}/me/model/commit/{'1' * 40}"}
                return self._answer(200, commit | {"commitOid": "1" * 40})
            return self._answer(200, {})

        def do_PUT(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            assert hashlib.sha256(content).hexdigest() == self.path.removeprefix("/lfs/")
            large[self.path.removeprefix("/lfs/")] = content
            self._answer(200, {})

        def _answer(self, status: int, content: dict[str, Any]) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
