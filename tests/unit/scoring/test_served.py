"""Scores of a server on this machine that is slow, fails, or answers nonsense."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from typing import Any

import pytest
from helpers_servers import Asked, Handler, serving

from rlhf_pipeline import servers
from rlhf_pipeline.data.records import Message
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.launch import free_port
from rlhf_pipeline.scoring import served
from rlhf_pipeline.scoring.episodes import Episode
from rlhf_pipeline.scoring.served import Server, score
from rlhf_pipeline.servers import complaint

Answer = tuple[int, Any] | tuple[int, Any, dict[str, str]]  # status, content, headers
Behaviour = Callable[[list[dict[str, Any]], int], Answer]  # of the episodes and the number of the request


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "FIRST_WAIT", 0.01)


@contextmanager
def scorer(behave: Behaviour) -> Iterator[tuple[str, Asked]]:
    asked = Asked()

    class Scores(Handler):
        def do_POST(self) -> None:
            body = self.body()
            status, content, *headers = behave(body["episodes"], asked.begins(body, dict(self.headers)))
            asked.ends()
            self.reply(status, content, headers[0] if headers else {})

    with serving(Scores) as url:
        yield f"{url}/score", asked


def lengths(episodes: list[dict[str, Any]], number: int) -> Answer:
    return 200, {"scores": [len(one["response"]) for one in episodes]}


def episodes(count: int, **columns: Any) -> list[Episode]:
    return [
        Episode(
            prompt=(Message("system", "be brief"), Message("user", "hm?")),
            response="x" * i,
            finished=i % 2 == 0,
            columns=columns,
            origin=f"p:{i}",
        )
        for i in range(count)
    ]


def ask(url: str, count: int = 1, **options: Any) -> tuple[list[float], Counter[str]]:
    counts: Counter[str] = Counter()
    settings = {"batch": 4, "timeout": 5.0, "retries": 2} | options
    return score(Server(url=url, **settings), episodes(count), counts).tolist(), counts


def failure(behave: Behaviour, **options: Any) -> tuple[str, Asked]:
    with scorer(behave) as (url, asked), pytest.raises(UserError) as raised:
        ask(url, **options)
    message = str(raised.value)
    assert message.startswith(f"url={url}: ")
    return message.removeprefix(f"url={url}: "), asked


def test_the_request_and_the_order_of_its_scores() -> None:
    def slow_at_first(given: list[dict[str, Any]], number: int) -> Answer:
        time.sleep(0.3 / number)
        return lengths(given, number)

    with scorer(slow_at_first) as (url, asked):
        found, counts = ask(url, 30)
    assert found == list(range(30)) and not +counts
    assert sorted(len(body["episodes"]) for body in asked.bodies) == [2, 4, 4, 4, 4, 4, 4, 4]
    assert 1 < asked.most_at_once <= served.IN_FLIGHT
    first = next(body["episodes"][0] for body in asked.bodies if body["episodes"][0]["response"] == "")
    assert first == {
        "prompt": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hm?"}],
        "response": "",
        "finished": True,
        "columns": {},
    }


def test_columns_that_json_does_not_have() -> None:
    import datetime

    given = episodes(1, answer=float("nan"), many=[1.5, float("inf"), {"x": "é\ud83d"}], day=datetime.date(2026, 1, 2))
    with scorer(lengths) as (url, asked):
        score(Server(url=url, batch=1, timeout=5, retries=0), given, Counter())
    assert asked.bodies[0]["episodes"][0]["columns"] == {
        "answer": None,
        "many": [1.5, None, {"x": "é\ud83d"}],
        "day": "2026-01-02",
    }


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_fails_and_then_works(status: int) -> None:
    def at_the_third(given: list[dict[str, Any]], number: int) -> Answer:
        return lengths(given, number) if number == 3 else (status, "busy")

    with scorer(at_the_third) as (url, asked):
        found, counts = ask(url, 3)
    assert found == [0, 1, 2] and counts == {"retries": 2} and len(asked.bodies) == 3
    first, second = (later - sooner for sooner, later in zip(asked.times, asked.times[1:], strict=False))
    assert first >= 0.01 and second >= 0.02, "twice as long before each try"


def test_a_server_that_does_not_get_better() -> None:
    message, asked = failure(lambda given, number: (503, "out of memory"), retries=2)
    assert "it answered 503 Service Unavailable: '\"out of memory\"'" in message and "(asked 3 times" in message
    assert len(asked.bodies) == 3


@pytest.mark.parametrize("status", [400, 401, 404, 302])
def test_other_answers_are_errors_at_once(status: int) -> None:
    message, asked = failure(lambda given, number: (status, b"no such model " + b"x" * 500))
    assert f"it answered {status} " in message and "no such model" in message and len(message) < 400
    assert len(asked.bodies) == 1


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_obeyed(form: str) -> None:
    def later(given: list[dict[str, Any]], number: int) -> Answer:
        value = "1" if form == "seconds" else formatdate(time.time() + 2, usegmt=True)  # whole seconds, rounded down
        return lengths(given, number) if number == 2 else (429, "later", {"Retry-After": value})

    with scorer(later) as (url, asked):
        assert ask(url)[0] == [0]
    assert 0.95 <= asked.times[1] - asked.times[0] < 3


@pytest.mark.parametrize("value", ["soon", "-3", "", "Mon, 99 Foo 2020"])
def test_a_retry_after_that_says_nothing(value: str) -> None:
    def later(given: list[dict[str, Any]], number: int) -> Answer:
        return lengths(given, number) if number == 2 else (503, "later", {"Retry-After": value})

    with scorer(later) as (url, asked):
        assert ask(url)[0] == [0]
    assert asked.times[1] - asked.times[0] < 0.5


def test_a_slow_server() -> None:
    def slow_once(given: list[dict[str, Any]], number: int) -> Answer:
        time.sleep(0.5 if number == 1 else 0)
        return lengths(given, number)

    with scorer(slow_once) as (url, _):
        found, counts = ask(url, timeout=0.2)
    assert found == [0] and counts == {"retries": 1}

    def slow(given: list[dict[str, Any]], number: int) -> Answer:
        time.sleep(0.4)
        return lengths(given, number)

    message, asked = failure(slow, timeout=0.1, retries=1)
    assert "ReadTimeout: timed out (asked 2 times, 0.1 s each" in message and len(asked.bodies) == 2


def test_nobody_listens() -> None:
    url = f"http://127.0.0.1:{free_port()}/score"
    with pytest.raises(UserError, match=r"ConnectError: .*refused \(asked 2 times"):
        ask(url, retries=1)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"<html>", "its answer is not JSON: '<html>'"),
        (b"\xff\xfe", "its answer is not JSON"),
        ([1, 2], "its answer is not {\"scores\": [...]}: '[1, 2]'"),
        ({"score": [1, 2]}, 'its answer is not {"scores": [...]}'),
        ({"scores": 1}, 'its answer is not {"scores": [...]}'),
        ({"scores": [1]}, "1 scores for 2 episodes"),
        ({"scores": [1, 2, 3]}, "3 scores for 2 episodes"),
        ({"scores": [1, None]}, "a score is no number: None"),
        ({"scores": ["1", 2]}, "a score is no number: '1'"),
        ({"scores": [10**400, 2]}, "a score is too large"),
    ],
)
def test_an_answer_without_scores(content: Any, told: str) -> None:
    message, asked = failure(lambda given, number: (200, content), count=2)
    assert told in message and len(asked.bodies) == 1


def test_what_is_not_finite_is_given_on() -> None:
    with scorer(lambda given, number: (200, b'{"scores": [NaN, -Infinity]}')) as (url, _):
        found, _ = ask(url, 2)
    assert str(found) == "[nan, -inf]"


def test_a_failure_does_not_wait_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "FIRST_WAIT", 60.0)

    def one_is_refused(given: list[dict[str, Any]], number: int) -> Answer:
        return (400, "no") if given[0]["response"] == "x" * 8 else (503, "busy")

    begun = time.monotonic()
    message, asked = failure(one_is_refused, count=40)
    assert "it answered 400" in message and len(asked.bodies) <= served.IN_FLIGHT + 1
    assert time.monotonic() - begun < 10


def test_secrets_of_the_url_are_hidden(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with scorer(lambda given, number: (401, "token=hunter2 is wrong")) as (url, asked):
        secret = url.replace("http://", "http://me:hunter2@") + "?api_key=hunter2"
        with pytest.raises(UserError) as raised:
            ask(secret)
    assert "hunter2" not in str(raised.value) and "it answered 401" in str(raised.value) and len(asked.bodies) == 1
    assert "hunter2" not in caplog.text, "httpx writes whole urls"
    assert "hunter2" not in complaint("ftp://me:hunter2@host/x")


def test_addresses() -> None:
    for url in ("http://localhost:8000/score", "https://host", "http://[::1]:8000/x"):
        assert complaint(url) == ""
    for url in ("localhost:8000", "ftp://host/x", "http://", "http://host:port/", "/score", "http://[::1/x"):
        assert complaint(url).startswith(f"url={url}: "), url
