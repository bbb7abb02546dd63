"""Scores of an HTTP server: batches of episodes as JSON, some requests at once, again where it may help.

POST {"episodes": [{"prompt": [{"role", "content"}], "response", "finished", "columns"}]} is answered by
{"scores": [number]}, one for each in their order. docs/scorers.md has a small server.
"""

from __future__ import annotations

import json
import math
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_pipeline import servers
from rlhf_pipeline.scoring.episodes import Episode

if TYPE_CHECKING:
    import httpx

IN_FLIGHT = 4  # requests at once, of each process


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    url: str
    batch: int  # episodes in a request
    timeout: float  # seconds to connect, and then without a byte of the answer
    retries: int  # after the first try


def score(server: Server, episodes: Sequence[Episode], counts: Counter[str]) -> np.ndarray:
    """What the server gives, float64 [n]. Requests that had to be repeated go to `counts["retries"]`.

    Connections that fail, timeouts, status 429 and 5xx are tried again, later each time; `Retry-After` is obeyed.

    Raises:
        UserError: when that was done `retries` times, for any other status, and for an answer that holds no scores.
    """
    import httpx

    batches = [episodes[at : at + server.batch] for at in range(0, len(episodes), server.batch)]
    with httpx.Client(timeout=server.timeout) as client:
        answers = servers.in_threads(partial(_ask, client, server), batches, at_once=IN_FLIGHT)
    counts["retries"] += sum(repeated for _, repeated in answers)
    return np.asarray([one for scores, _ in answers for one in scores], np.float64)


def _ask(
    client: httpx.Client, server: Server, episodes: Sequence[Episode], stop: threading.Event
) -> tuple[list[float], int]:
    """Scores of a batch, and how often it was asked again."""
    body = json.dumps({"episodes": [_told(episode) for episode in episodes]}, default=str).encode()
    patience = servers.Patience(timeout=server.timeout, retries=server.retries)
    answer, repeated = servers.post(client, server.url, body, patience=patience, stop=stop)
    if not answer.is_success:
        raise servers.failure(server.url, servers.told(answer))
    return _scores(server, answer, len(episodes)), repeated


def _told(episode: Episode) -> dict[str, Any]:
    return {
        "prompt": [{"role": message.role, "content": message.content} for message in episode.prompt],
        "response": episode.response,
        "finished": episode.finished,
        "columns": _plain(episode.columns),
    }


def _plain(value: Any) -> Any:
    """Without the numbers that JSON does not have: null in their place."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _scores(server: Server, answer: httpx.Response, count: int) -> list[float]:
    try:
        content = answer.json()
    except (ValueError, RecursionError) as error:
        raise servers.failure(server.url, f"its answer is not JSON: {servers.start(answer)}") from error
    scores = content.get("scores") if isinstance(content, dict) else None
    if not isinstance(scores, list):
        raise servers.failure(server.url, f'its answer is not {{"scores": [...]}}: {servers.start(answer)}')
    if len(scores) != count:
        raise servers.failure(server.url, f"{len(scores)} scores for {count} episodes")
    wrong = [value for value in scores if not isinstance(value, int | float)]
    if wrong:
        raise servers.failure(server.url, f"a score is no number: {wrong[0]!r:.80}")
    try:
        return [float(value) for value in scores]
    except OverflowError:
        raise servers.failure(server.url, "a score is too large") from None
