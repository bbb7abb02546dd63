"""A server on this machine that speaks chat completions as a test wants it to, and remembers what it was asked."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from rlhf_pipeline.config.judge import ChatJudgeConfig
from rlhf_pipeline.data.records import Message
from rlhf_pipeline.judging.pairs import Answer, Pair

Reply = tuple[int, Any] | tuple[int, Any, dict[str, str]]  # status, content, headers
Behaviour = Callable[[dict[str, Any], int], Reply]  # of the request's body and its number, from 1


class Asked:
    """What a server was asked, when, and which of it was answered."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.answered: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.others: list[str] = []  # paths of requests for anything but completions
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()


def completion(text: str | None, finish_reason: str = "stop") -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    return {
        "id": "x",
        "object": "chat.completion",
        "choices": [{"index": 0, "message": message, "finish_reason": finish_reason}],
        "usage": {"prompt_tokens": 9, "completion_tokens": 3},
    }


@contextmanager
def chat_server(behave: Behaviour, *, models: list[str] | None = None) -> Iterator[tuple[str, Asked]]:
    """Its url up to /v1. `models` are what it says that it has; None: it does not say."""
    asked = Asked()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.others.append(self.path)
            if models is None or self.path != "/v1/models":
                self.reply(404, "no such page")
            else:
                self.reply(200, {"object": "list", "data": [{"id": one} for one in models]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != "/v1/chat/completions":
                asked.others.append(self.path)
                self.reply(404, "no such page")
                return
            with asked.lock:
                asked.bodies.append(body)
                asked.headers.append(dict(self.headers))
                asked.times.append(time.monotonic())
                asked.at_once += 1
                asked.most_at_once = max(asked.most_at_once, asked.at_once)
                number = len(asked.bodies)
            status, content, *headers = behave(body, number)
            with asked.lock:
                asked.at_once -= 1
            self.reply(status, content, headers[0] if headers else {})
            with asked.lock:
                asked.answered.append(body)

        def reply(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
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

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.request_queue_size = 64
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def prefers(word: str) -> Behaviour:
    """A model that likes answers with a word in them, and ties otherwise."""

    def behave(body: dict[str, Any], number: int) -> Reply:
        asked = body["messages"][-1]["content"]
        a, b = (asked.partition(f"<response_{one}>")[2].partition(f"</response_{one}>")[0] for one in "ab")
        letter = "tie" if (word in a) == (word in b) else "A" if word in a else "B"
        return 200, completion(f"I like {word}.\n\nVerdict: {letter}")

    return behave


def chat_config(url: str, cache: Any, **options: Any) -> ChatJudgeConfig:
    settings = {"model": "m", "timeout": 5.0, "retries": 2, "cache_dir": str(cache)} | options
    return ChatJudgeConfig(url=url, **settings)


def pair(a: str, b: str, question: str = "What is red?", **options: Any) -> Pair:
    return Pair(prompt=(Message("user", question),), a=Answer(text=a), b=Answer(text=b), **options)
