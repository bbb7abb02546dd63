"""What all who ask HTTP servers share: addresses, patience with a server that fails, and how a failure is told.

What is asked and what an answer means is the business of `scoring.served` and `judging.chat`. httpx is imported by those
who ask.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, TypeVar, cast

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.tracking.redaction import redact_text

if TYPE_CHECKING:
    import httpx

FIRST_WAIT = 0.5  # seconds before the second try; twice as long before each later one
LONGEST_WAIT = 300.0  # whatever the server asks for
TOO_MANY_REQUESTS = 429
SHOWN = 300  # characters of an answer in a message

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    timeout: float  # seconds to connect, and then without a byte of the answer
    retries: int  # after the first try


@dataclass(slots=True, kw_only=True)
class Pace:
    """Requests of all threads together, one every `seconds` and no faster."""

    seconds: float
    next: float = 0.0  # by time.monotonic
    lock: threading.Lock = field(default_factory=threading.Lock)

    def wait(self, stop: threading.Event) -> bool:
        """Wait for one's turn; whether `stop` was set before it came."""
        with self.lock:
            turn = max(time.monotonic(), self.next)
            self.next = turn + self.seconds
        return stop.wait(max(0.0, turn - time.monotonic()))


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


def in_threads(ask: Callable[[T, threading.Event], R], items: Sequence[T], *, at_once: int) -> list[R]:
    """`ask` of every item, in their order, by `at_once` threads. The first that fails ends them all.

    Each is given an event that is set when the others are to stop: those that wait for their next try need not. None
    begins once one has failed.
    """
    logging.getLogger("httpx").setLevel(logging.WARNING)  # below, it writes every url with its secrets
    stop, failed = threading.Event(), threading.Event()

    def begin(item: T) -> R | None:
        if failed.is_set():
            return None  # which nobody gets: the failure is raised
        try:
            return ask(item, stop)
        except BaseException:
            failed.set()
            raise

    pool = ThreadPoolExecutor(at_once, thread_name_prefix="asking")
    try:
        requests = [pool.submit(begin, item) for item in items]
        done, _ = wait(requests, return_when=FIRST_EXCEPTION)
        for request in done:  # what has failed, before any that waits for its next try
            request.result()
        return [cast(R, request.result()) for request in requests]
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def post(
    client: httpx.Client,
    url: str,
    body: bytes,
    *,
    patience: Patience,
    stop: threading.Event,
    pace: Pace | None = None,
) -> tuple[httpx.Response, int]:
    """The first answer that asking again would not change, good or bad, and how often it was asked again.

    Connections that fail, timeouts, status 429 and 5xx are tried again, later each time; `Retry-After` is obeyed.

    Raises:
        UserError: when that was done `retries` times, or when `stop` is set meanwhile.
    """
    import httpx

    trouble, attempt = "", 0
    for attempt in range(patience.retries + 1):
        pause = FIRST_WAIT * 2**attempt
        if pace is not None and pace.wait(stop):
            break
        try:
            answer = client.post(url, content=body, headers={"Content-Type": "application/json"})
        except httpx.TransportError as error:
            trouble = f"{type(error).__name__}: {error}"
        except httpx.RequestError as error:  # an answer that cannot be unpacked
            raise failure(url, f"{type(error).__name__}: {error}") from error
        else:
            if answer.status_code != TOO_MANY_REQUESTS and answer.status_code < 500:
                return answer, attempt
            trouble = told(answer)
            pause = max(pause, _asked_pause(answer))
        if attempt < patience.retries and stop.wait(min(pause, LONGEST_WAIT)):
            break
    raise failure(
        url, f"{trouble} (asked {attempt + 1} times, {patience.timeout:g} s each; see `timeout` and `retries`)"
    )


def told(answer: httpx.Response) -> str:
    """An answer that is no success, for a message."""
    return f"it answered {answer.status_code} {answer.reason_phrase}: {start(answer)}"


def start(answer: httpx.Response) -> str:
    """The beginning of an answer's body, for a message."""
    text = answer.text
    return repr(text[:SHOWN]) + ("..." if text[SHOWN:] else "")


def failure(url: str, what: str) -> UserError:
    """The error to raise, without secrets."""
    return UserError(f"url={redact_text(url)}: {redact_text(what)}")


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
