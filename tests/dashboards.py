"""A stand-in for a cluster's dashboard, for what it answers before a job is sent, and for its job server."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from typing import Any

from raylux.engine.jobs import FAILED, RUNNING, STOPPED, InUseError, Job

GIB = 1 << 30
NODE = {"CPU": 2.0, "memory": 8.0 * GIB, "object_store_memory": 1.0 * GIB}


@dataclass
class Answers:
    """What the dashboard says.

    Attributes:
        token: that it asks for; "": none.
        ray: its version.
        nodes: resources of each living node.
        raw: path -> (status, body), instead of what it would say.
        asked: paths, and the authorization that came with them.
    """

    token: str = ""
    ray: str = version("ray")
    nodes: list[Mapping[str, float]] = field(default_factory=lambda: [NODE])
    raw: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)

    def to(self, path: str, authorization: str) -> tuple[int, bytes]:
        self.asked.append((path, authorization))
        if path in self.raw:
            return self.raw[path]
        if self.token and not authorization:
            return 401, b"Unauthorized: Missing authentication token"
        if self.token and authorization != f"Bearer {self.token}":
            return 403, b"Forbidden: Invalid authentication token"
        if path == "/api/version":
            return 200, json.dumps({"version": "4", "ray_version": self.ray}).encode()
        if path == "/api/v0/nodes":
            nodes: list[Any] = [{"state": "ALIVE", "resources_total": node} for node in self.nodes]
            nodes.append({"state": "DEAD", "resources_total": {"CPU": 1000.0}})
            return 200, json.dumps({"result": True, "data": {"result": {"result": nodes}}}).encode()
        return 404, b"404: Not Found"


@contextmanager
def dashboard(answers: Answers) -> Iterator[str]:
    """Serve on a free port of 127.0.0.1; yields the URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answers.to(self.path.partition("?")[0], self.headers.get("Authorization", ""))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()


class StubServer:
    """The job server: remembers what was sent, and ends each job as ``endings`` says when it is followed."""

    url = "http://stub:8265"

    def __init__(self, *endings: tuple[str, int | None]) -> None:
        self.endings = list(endings)
        self.sent: list[dict[str, Any]] = []
        self.known: dict[str, Job] = {}

    def jobs(self) -> list[Job]:
        return list(self.known.values())

    def job(self, name: str) -> Job:
        return self.known[name]

    def submit(
        self, name: str, entrypoint: str, working_dir: str, excludes: Any, env: Any, metadata: Mapping[str, str]
    ) -> None:
        if name in self.known:
            raise InUseError(f"{self.url}: the submission id {name} is in use")
        self.sent.append({"name": name, "entrypoint": entrypoint, "working_dir": working_dir, "env": env})
        self.known[name] = Job(name, RUNNING, entrypoint, "", metadata, float(len(self.known) + 1), None, None)

    def end(self, name: str, status: str, code: int | None, message: str = "") -> Job:
        self.known[name] = replace(self.known[name], status=status, exit_code=code, message=message, ended=99.0)
        return self.known[name]

    def follow(self, name: str, write: Callable[[str], None]) -> Job:
        write(f"a line of {name} \x1b[31m\n")
        status, code = self.endings.pop(0)
        return self.end(name, status, code, "" if status != FAILED or code is not None else "no node took it")

    def stop(self, name: str) -> bool:
        self.end(name, STOPPED, None)
        return True

    def wait(self, name: str, seconds: float = 0.0) -> Job:
        return self.known[name]
