"""Servers on this machine that do as a test wants them to, and remember what they were asked."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Asked:
    """What a server was asked, when, and which of it was answered."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.answered: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.others: list[str] = []  # paths of requests for anything else
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()

    def begins(self, body: dict[str, Any], headers: dict[str, str]) -> int:
        """The number of the request, from 1."""
        with self.lock:
            self.bodies.append(body)
            self.headers.append(headers)
            self.times.append(time.monotonic())
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            return len(self.bodies)

    def ends(self) -> None:
        with self.lock:
            self.at_once -= 1


class Handler(BaseHTTPRequestHandler):
    """What a test's own handler needs: requests and replies in JSON, nothing on stderr."""

    def body(self) -> dict[str, Any]:
        return json.loads(self.rfile.read(int(self.headers["Content-Length"])))  # type: ignore[no-any-return]

    def reply(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        """Bytes as they are, anything else as JSON."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        try:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except (BrokenPipeError, ConnectionResetError):  # who asked has given up
            pass

    def log_message(self, *arguments: Any) -> None: ...


class _Server(ThreadingHTTPServer):
    request_queue_size = 64


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Its url, without a path."""
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
