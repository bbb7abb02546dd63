"""A server on this machine that speaks chat completions as a test wants it to, and remembers what it was asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from helpers_servers import Asked, Handler, serving

from rlhf_pipeline.config.judge import ChatJudgeConfig
from rlhf_pipeline.data.records import Message
from rlhf_pipeline.judging.pairs import Answer, Pair

Reply = tuple[int, Any] | tuple[int, Any, dict[str, str]]  # status, content, headers
Behaviour = Callable[[dict[str, Any], int], Reply]  # of the request's body and its number, from 1


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

    class Chat(Handler):
        def do_GET(self) -> None:
            asked.others.append(self.path)
            if models is None or self.path != "/v1/models":
                self.reply(404, "no such page")
            else:
                self.reply(200, {"object": "list", "data": [{"id": one} for one in models]})

        def do_POST(self) -> None:
            body = self.body()
            if self.path != "/v1/chat/completions":
                asked.others.append(self.path)
                self.reply(404, "no such page")
                return
            status, content, *headers = behave(body, asked.begins(body, dict(self.headers)))
            asked.ends()
            self.reply(status, content, headers[0] if headers else {})
            with asked.lock:
                asked.answered.append(body)

    with serving(Chat) as url:
        yield f"{url}/v1", asked


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
