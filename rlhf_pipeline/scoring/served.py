"""Scores of an HTTP server: batches of episodes as JSON, some requests at once, again where it may help.

POST {"episodes": [{"prompt": [{"role", "content"}], "response", "finished", "columns"}]} is answered by
{"scores": [number]}, one for each in their order. docs/scorers.md has a small server.
"""

from __future__ import annotations

import json
import logging
import math
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.scoring.episodes import Episode
from rlhf_pipeline.tracking.redaction import redact_text

if TYPE_CHECKING:
    import httpx

IN_FLIGHT = 4  # requests at once, of each process
FIRST_WAIT = 0.5  # seconds before the second try; twice as long before each later one
LONGEST_WAIT = 300.0  # whatever the server asks for
TOO_MANY_REQUESTS = 429
SHOWN = 300  # characters of an answer in a message


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    url: str
    batch: int  # episodes in a request
    timeout: float  # seconds to connect, and then without a byte of the answer
    retries: int  # after the first try


def complaint(url: str) -> str:
    """Why this cannot be the address of a server; empty where it can."""
    import httpx

    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        return f"url={redact_text(url)}: {redact_text(str(error))}"
    if parsed.scheme not in ("http", "https") or not parsed.host:
        return f"url={redact_text(url)}: write http://host:port/path, or https"
    return ""


def score(server: Server, episodes: Sequence[Episode], counts: Counter[str]) -> np.ndarray:
    """What the server gives, float64 [n]. Requests that had to be repeated go to `counts["retries"]`.

    Connections that fail, timeouts, status 429 and 5xx are tried again, later each time; `Retry-After` is obeyed.

    Raises:
        UserError: when that was done `retries` times, for any other status, and for an answer that holds no scores.
    """
    import httpx

    logging.getLogger("httpx").setLevel(logging.WARNING)  # below, it writes every url with its secrets
    batches = [episodes[at : at + server.batch] for at in range(0, len(episodes), server.batch)]
    failed = threading.Event()
    pool = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="scorer")
    with httpx.Client(timeout=server.timeout) as client:
        try:
            requests = [pool.submit(_ask, client, server, batch, failed) for batch in batches]
            done, _ = wait(requests, return_when=FIRST_EXCEPTION)
            for request in done:  # what has failed, before any that waits for its next try
                request.result()
            answers = [request.result() for request in requests]
        finally:
            failed.set()
            pool.shutdown(cancel_futures=True)
    counts["retries"] += sum(repeated for _, repeated in answers)
    return np.asarray([one for scores, _ in answers for one in scores], np.float64)


def _ask(
    client: httpx.Client, server: Server, episodes: Sequence[Episode], failed: threading.Event
) -> tuple[list[float], int]:
    """Scores of a batch, and how often it was asked again. Ends early once another batch has `failed`."""
    import httpx

    body = json.dumps({"episodes": [_told(episode) for episode in episodes]}, default=str).encode()
    trouble, attempt = "", 0
    for attempt in range(server.retries + 1):
        pause = FIRST_WAIT * 2**attempt
        try:
            answer = client.post(server.url, content=body, headers={"Content-Type": "application/json"})
        except httpx.TransportError as error:
            trouble = f"{type(error).__name__}: {error}"
        except httpx.RequestError as error:  # an answer that cannot be unpacked
            raise _failure(server, f"{type(error).__name__}: {error}") from error
        else:
            if answer.is_success:
                return _scores(server, answer, len(episodes)), attempt
            trouble = f"it answered {answer.status_code} {answer.reason_phrase}: {_start(answer)}"
            if answer.status_code != TOO_MANY_REQUESTS and answer.status_code < 500:
                raise _failure(server, trouble)
            pause = max(pause, _asked_pause(answer))
        if attempt < server.retries and failed.wait(min(pause, LONGEST_WAIT)):
            break
    raise _failure(
        server, f"{trouble} (asked {attempt + 1} times, {server.timeout:g} s each; see `timeout` and `retries`)"
    )


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


def _asked_pause(answer: httpx.Response) -> float:
    """Seconds that the server asks to be left alone for: a number or a date; 0 where it says neither."""
    value = answer.headers.get("Retry-After", "").strip()
    if value.isdecimal():
        return float(value)
    try:
        until = parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    return max(0.0, (until.replace(tzinfo=until.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


def _scores(server: Server, answer: httpx.Response, count: int) -> list[float]:
    try:
        content = answer.json()
    except (ValueError, RecursionError) as error:
        raise _failure(server, f"its answer is not JSON: {_start(answer)}") from error
    scores = content.get("scores") if isinstance(content, dict) else None
    if not isinstance(scores, list):
        raise _failure(server, f'its answer is not {{"scores": [...]}}: {_start(answer)}')
    if len(scores) != count:
        raise _failure(server, f"{len(scores)} scores for {count} episodes")
    wrong = [value for value in scores if not isinstance(value, int | float)]
    if wrong:
        raise _failure(server, f"a score is no number: {wrong[0]!r:.80}")
    try:
        return [float(value) for value in scores]
    except OverflowError:
        raise _failure(server, "a score is too large") from None


def _start(answer: httpx.Response) -> str:
    text = answer.text
    return repr(text[:SHOWN]) + ("..." if text[SHOWN:] else "")


def _failure(server: Server, what: str) -> UserError:
    return UserError(f"url={redact_text(server.url)}: {redact_text(what)}")
