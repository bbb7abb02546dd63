"""A chat model as a judge: what it is asked, what is read in its answers, and servers that fail in many ways."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest
from helpers_chat import Behaviour, Reply, chat_config, chat_server, completion, pair, prefers
from helpers_servers import Asked

from rlhf_pipeline import servers
from rlhf_pipeline.config.judge import ChatJudgeConfig
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.judging.cache import Said
from rlhf_pipeline.judging.chat import ChatJudge, open_chat_judge, verdict
from rlhf_pipeline.judging.pairs import Outcome, Pair, Verdict, rule
from rlhf_pipeline.launch import free_port

KEY = "plain-0123456789-abcdef"  # of no form that redaction knows


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "FIRST_WAIT", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def judge_of(config: ChatJudgeConfig, told: list[str] | None = None) -> ChatJudge:
    return open_chat_judge(config, name="chat", tell=(told if told is not None else []).append)


def many(count: int) -> list[Pair]:
    return [pair(f"red {i}", f"blue {i}", origin=f"p:{i}") for i in range(count)]


def failure(behave: Behaviour, cache: Path, *, models: list[str] | None = None, **options: Any) -> tuple[str, Asked]:
    """The message, without what all begin with, of a judge that is asked about one pair."""
    with chat_server(behave, models=models) as (url, asked), pytest.raises(UserError) as raised:
        judge_of(chat_config(url, cache, **options))(many(1))
    start = f"judge.chat.url={url}/chat/completions: "
    assert str(raised.value).startswith(start)
    return str(raised.value).removeprefix(start), asked


# What it is asked, and what it says


def test_the_request(tmp_path: Path) -> None:
    with chat_server(prefers("red")) as (url, asked):
        rulings = rule(judge_of(chat_config(url + "/", tmp_path, max_tokens=77)), [pair("a red one", "it is blue")])
    assert [(ruling.value, ruling.agreed) for ruling in rulings] == [(1.0, True)]
    assert [one.reason for one in rulings[0].verdicts] == ["I like red."] * 2
    assert len(asked.bodies) == 2 and not asked.others
    body = min(asked.bodies, key=lambda one: one["messages"][0]["content"].index("a red one"))
    assert {name: value for name, value in body.items() if name != "messages"} == {
        "model": "m",
        "temperature": 0.0,
        "max_tokens": 77,
        "seed": 0,
    }
    assert [one["role"] for one in body["messages"]] == ["user"]
    assert "<response_a>\na red one\n</response_a>" in body["messages"][0]["content"]
    assert all(one["Content-Type"] == "application/json" and "Authorization" not in one for one in asked.headers)


def test_no_seed(tmp_path: Path) -> None:
    with chat_server(prefers("red")) as (url, asked):
        judge_of(chat_config(url, tmp_path, seed=None, temperature=0.7))(many(1))
    assert "seed" not in asked.bodies[0] and asked.bodies[0]["temperature"] == 0.7


def test_a_judge_that_likes_what_stands_first(tmp_path: Path) -> None:
    with chat_server(lambda body, number: (200, completion("Verdict: A"))) as (url, _):
        (ruling,) = rule(judge_of(chat_config(url, tmp_path)), [pair("x", "y")])
    assert ruling.value == 0.5 and not ruling.agreed


@pytest.mark.parametrize(
    ("text", "outcome", "reason"),
    [
        ("Verdict: A", Outcome.a, ""),
        ("B is longer.\nBoth are right.\n\nVerdict: B\n \n", Outcome.b, "B is longer.\nBoth are right."),
        ("So:\r\nverdict: TIE", Outcome.tie, "So:"),
        ("x\n**Verdict: B**", Outcome.b, "x"),
        ("x\n**Verdict:** A.", Outcome.a, "x"),
        ("Verdict: A\nNo, I take that back.\nVerdict: B", Outcome.b, "Verdict: A\nNo, I take that back."),
    ],
)
def test_what_is_a_verdict(text: str, outcome: Outcome, reason: str) -> None:
    said = Said(text=text, finish_reason="stop")
    assert verdict(said, 512) == Verdict(outcome=outcome, reason=reason)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "A",
            "I prefer A.",
            "Verdict:",
            "Verdict: C",
            "Verdict: A or B",
            "Verdict: a tie",
            "Verdict: AB",
            "Verdict A",
        ),
        *("My verdict: A", "Verdict: A\nbecause it is right", "Verdict: A, clearly", "Verdict: not B", "Verdict: [A]"),
    ],
)
def test_what_is_none(text: str) -> None:
    found = verdict(Said(text=text, finish_reason="stop"), 512)
    assert found.outcome is Outcome.malformed and found.reason == f"no verdict in its last line: {text!r}"


def test_an_answer_that_was_cut_off_is_none() -> None:
    found = verdict(Said(text="Verdict: A", finish_reason="length"), 9)
    assert found == Verdict(outcome=Outcome.malformed, reason="cut off at max_tokens=9: 'Verdict: A'")
    long = verdict(Said(text="x" * 900, finish_reason=None), 9)
    assert long.outcome is Outcome.malformed and long.reason.endswith("xxx'...") and len(long.reason) < 250


def test_an_answer_without_text_is_malformed(tmp_path: Path) -> None:
    with chat_server(lambda body, number: (200, completion(None))) as (url, _):
        (found,) = judge_of(chat_config(url, tmp_path))(many(1))
    assert found.outcome is Outcome.malformed


# Nothing twice


def test_a_second_run_asks_nothing(tmp_path: Path) -> None:
    def some_are_malformed(body: dict[str, Any], number: int) -> Reply:
        return (200, completion("hm")) if "red 3" in body["messages"][0]["content"] else prefers("red")(body, number)

    told: list[str] = []
    with chat_server(some_are_malformed) as (url, asked):
        first = rule(judge_of(chat_config(url, tmp_path), told), many(6))
        assert len(asked.bodies) == 12
        second = rule(judge_of(chat_config(url, tmp_path), told), many(6))
        assert len(asked.bodies) == 12 and first == second
    assert [ruling.value for ruling in first] == [1.0, 1.0, 1.0, None, 1.0, 1.0]
    (file,) = tmp_path.iterdir()
    assert told == [
        f"chat: 12 requests to {url}, 0 answers are in {file}",
        f"chat: 0 requests to {url}, 12 answers are in {file}",
    ]


def test_a_server_that_is_gone_or_elsewhere_is_not_missed(tmp_path: Path) -> None:
    with chat_server(prefers("red")) as (url, _):
        first = rule(judge_of(chat_config(url, tmp_path)), many(3))
    elsewhere = judge_of(chat_config(f"http://127.0.0.1:{free_port()}/v1", tmp_path, timeout=1.0, retries=0))
    assert rule(elsewhere, many(3)) == first
    with pytest.raises(UserError, match="ConnectError"):
        elsewhere(many(4))


@pytest.mark.parametrize(
    "change", [{"model": "other"}, {"temperature": 0.5}, {"max_tokens": 9}, {"seed": 1}, {"seed": None}]
)
def test_another_judge_is_asked_anew(tmp_path: Path, change: dict[str, Any]) -> None:
    with chat_server(prefers("red")) as (url, asked):
        first, second = judge_of(chat_config(url, tmp_path)), judge_of(chat_config(url, tmp_path, **change))
        first(many(2))
        second(many(2))
    assert len(asked.bodies) == 4 and first.file != second.file and first.identity != second.identity


def test_another_template_is_asked_anew(tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text("{{ prompt[-1].content }} {{ a.text }} {{ b.text }}")
    with chat_server(prefers("red")) as (url, asked):
        first = judge_of(chat_config(url, tmp_path / "cache", template=str(template)))
        first(many(2))
        template.write_text("{{ prompt[-1].content }} {{ a.text }} {{ b.text }}!")
        second = judge_of(chat_config(url, tmp_path / "cache", template=str(template)))
        second(many(2))
    assert len(asked.bodies) == 4 and first.identity != second.identity


def test_equal_requests_are_made_once(tmp_path: Path) -> None:
    with chat_server(prefers("red")) as (url, asked):
        rulings = rule(judge_of(chat_config(url, tmp_path)), [pair("x", "x"), pair("x", "x"), pair("x", "red")])
    assert len(asked.bodies) == 3
    assert [ruling.value for ruling in rulings] == [0.5, 0.5, 0.0]


def test_a_run_that_failed_goes_on_where_it_was(tmp_path: Path) -> None:
    def fails_at_five(body: dict[str, Any], number: int) -> Reply:
        return (400, "too long") if number == 5 else prefers("red")(body, number)

    with chat_server(fails_at_five) as (url, asked):
        judge = judge_of(chat_config(url, tmp_path, concurrency=1))
        with pytest.raises(UserError, match=r"about p:4"):
            judge(many(10))
        assert len(asked.bodies) == 5
        judge(many(10))
    bodies = [json.dumps(one) for one in asked.bodies]
    assert len(bodies) == 11 and len({*bodies}) == 10 and bodies.count(bodies[4]) == 2


# Servers that fail


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_fails_and_then_works(tmp_path: Path, status: int) -> None:
    told: list[str] = []

    def at_the_third(body: dict[str, Any], number: int) -> Reply:
        return prefers("red")(body, number) if number == 3 else (status, "busy")

    with chat_server(at_the_third) as (url, asked):
        (found,) = judge_of(chat_config(url, tmp_path), told)(many(1))
    assert found.outcome is Outcome.a and len(asked.bodies) == 3
    assert asked.times[2] - asked.times[1] >= 0.02, "twice as long before each try"
    assert told[1:] == ["chat: 2 requests had to be repeated"]


def test_retry_after_is_obeyed(tmp_path: Path) -> None:
    def later(body: dict[str, Any], number: int) -> Reply:
        return prefers("red")(body, number) if number == 2 else (429, "later", {"Retry-After": "1"})

    with chat_server(later) as (url, asked):
        judge_of(chat_config(url, tmp_path))(many(1))
    assert 0.95 <= asked.times[1] - asked.times[0] < 3


def test_a_server_that_does_not_get_better(tmp_path: Path) -> None:
    message, asked = failure(lambda body, number: (503, "out of memory"), tmp_path)
    assert message.startswith("it answered 503 Service Unavailable: '\"out of memory\"' (asked 3 times, 5 s each")
    assert len(asked.bodies) == 3


def test_a_slow_server(tmp_path: Path) -> None:
    def slow(body: dict[str, Any], number: int) -> Reply:
        time.sleep(0.4)
        return prefers("red")(body, number)

    message, asked = failure(slow, tmp_path, timeout=0.1, retries=1)
    assert message.startswith("ReadTimeout: timed out (asked 2 times, 0.1 s each") and len(asked.bodies) == 2


def test_nobody_listens(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    with pytest.raises(UserError, match=r"^judge.chat.url=http.*/chat/completions: ConnectError: .*refused \(asked 3"):
        judge_of(chat_config(url, tmp_path))(many(1))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (
            b"<!doctype html><html>",
            "its answer is not JSON: '<!doctype html><html>'; is it an OpenAI-compatible server?",
        ),
        (b'{"choices": [{"mess', "its answer is not JSON"),
        (b"\xff\xfe", "its answer is not JSON"),
        ([1], "its answer is no chat completion: '[1]'"),
        (
            {"error": {"message": "no credit"}},
            'its answer is no chat completion: \'{"error": {"message": "no credit"}}\'',
        ),
        ({"choices": []}, "its answer is no chat completion"),
        ({"choices": [{"text": "Verdict: A"}]}, "its answer is no chat completion"),
        ({"choices": [{"message": {"content": ["Verdict: A"]}}]}, "its answer is no chat completion"),
        ({"choices": [{"message": "Verdict: A"}]}, "its answer is no chat completion"),
        ({"choices": 3}, "its answer is no chat completion"),
    ],
)
def test_an_answer_that_is_no_completion(tmp_path: Path, content: Any, told: str) -> None:
    message, asked = failure(lambda body, number: (200, content), tmp_path)
    assert message.startswith(told) and len(asked.bodies) == 1


@pytest.mark.parametrize("status", [400, 404, 422])
def test_a_model_that_the_server_does_not_have(tmp_path: Path, status: int) -> None:
    reply = (status, {"error": "model `m` does not exist"})
    message, asked = failure(lambda body, number: reply, tmp_path, models=[f"model-{i}" for i in range(22)])
    assert "does not exist" in message and asked.others == ["/v1/models"] and len(asked.bodies) == 1
    names = ", ".join(f"model-{i}" for i in range(20))
    assert message.endswith(f"; it has no model 'm'; judge.chat.model may be {names} and 2 more")


def test_an_address_without_the_api(tmp_path: Path) -> None:
    message, _ = failure(lambda body, number: (404, "what?"), tmp_path, models=None)
    assert message.startswith(
        "it answered 404 Not Found: '\"what?\"'; does it call its model 'm' (judge.chat.model), and"
    )
    assert message.endswith("where the paths of the API begin, as in /v1?")


def test_a_request_that_is_refused_for_itself(tmp_path: Path) -> None:
    message, _ = failure(lambda body, number: (400, "context length exceeded"), tmp_path, models=["m"])
    assert "context length" in message and message.endswith("about p:0; see judge.chat and the server's log")


def test_one_that_is_refused_ends_the_waiting_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "FIRST_WAIT", 60.0)

    def one_is_refused(body: dict[str, Any], number: int) -> Reply:
        return (403, "no") if "red 7" in body["messages"][0]["content"] else (503, "busy")

    begun = time.monotonic()
    with chat_server(one_is_refused) as (url, _), pytest.raises(UserError, match="it answered 403"):
        judge_of(chat_config(url, tmp_path))(many(8))
    assert time.monotonic() - begun < 10


# The key


def keeper(body: dict[str, Any], number: int) -> Reply:
    return 200, completion(f"Your key is {KEY}.\nVerdict: A")


def test_the_key_is_sent_and_never_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level("DEBUG")
    monkeypatch.setenv("MY_KEY", f" {KEY}\n")
    told: list[str] = []
    with chat_server(keeper) as (url, asked):
        judge = judge_of(chat_config(url, tmp_path, api_key_env="MY_KEY"), told)
        (found,) = judge(many(1))
    assert asked.headers[0]["Authorization"] == f"Bearer {KEY}"
    (file,) = tmp_path.iterdir()
    written = [file.read_text(), file.name, found.reason, *told, json.dumps(judge.identity), caplog.text]
    captured = capfd.readouterr()
    assert not any(KEY in text for text in [*written, captured.out, captured.err])
    assert found == Verdict(outcome=Outcome.a, reason="Your key is ***.")


@pytest.mark.parametrize("key", ["", KEY])
def test_a_key_that_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("MY_KEY", key)
    message, _ = failure(lambda body, number: (401, f"wrong key {key}"), tmp_path, api_key_env="MY_KEY")
    told = "does not take the key in" if key else "wants a key: put it into"
    assert message.startswith("it answered 401 Unauthorized: '\"wrong key ") and KEY not in message
    assert message.endswith(f"; it {told} the environment variable MY_KEY (judge.chat.api_key_env)")


@pytest.mark.parametrize("key", ["sk-one two", "sk-é", "sk-\x7fx", "sk-a\nb"])
def test_a_key_that_cannot_be_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UserError, match="OPENAI_API_KEY") as raised:
        judge_of(chat_config("http://host/v1", tmp_path))
    assert "sk-" not in str(raised.value)


def test_secrets_of_the_url(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    told: list[str] = []
    with chat_server(lambda body, number: (403, "no")) as (url, asked):
        judge = judge_of(chat_config(url.replace("http://", "http://me:hunter2@"), tmp_path), told)
        with pytest.raises(UserError) as raised:
            judge(many(1))
    assert asked.headers[0]["Authorization"].startswith("Basic ")
    assert not any("hunter2" in text for text in [str(raised.value), *told, str(judge.identity), caplog.text])


# As fast as it may be


def test_requests_at_once(tmp_path: Path) -> None:
    def slow(body: dict[str, Any], number: int) -> Reply:
        time.sleep(0.05)
        return prefers("red")(body, number)

    with chat_server(slow) as (url, asked):
        judge_of(chat_config(url, tmp_path, concurrency=3))(many(12))
    assert asked.most_at_once == 3


def test_requests_a_minute(tmp_path: Path) -> None:
    def busy_at_first(body: dict[str, Any], number: int) -> Reply:
        return (503, "busy") if number <= 2 else prefers("red")(body, number)

    with chat_server(busy_at_first) as (url, asked):
        begun = time.monotonic()
        judge_of(chat_config(url, tmp_path, requests_per_minute=600))(many(6))  # one in 0.1 s
    assert len(asked.times) == 8, "those that are made again count"
    assert all(at - begun >= 0.1 * i for i, at in enumerate(asked.times))


def test_the_order_of_verdicts_is_that_of_the_pairs(tmp_path: Path) -> None:
    def slow_at_first(body: dict[str, Any], number: int) -> Reply:
        time.sleep(0.2 / number)
        return prefers("7")(body, number)

    with chat_server(slow_at_first) as (url, _):
        pairs = [pair(f"{i}", f"{10 - i}", f"question {i}?") for i in range(10)]
        found = judge_of(chat_config(url, tmp_path))(pairs)
    expected = [Outcome.tie] * 10
    expected[7], expected[3] = Outcome.a, Outcome.b
    assert [one.outcome for one in found] == expected


# What cannot work is told before anything is asked


def test_what_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    config = chat_config("http://[::1/v1", tmp_path)
    with pytest.raises(UserError, match=r"^judge.chat.url=http://\[::1/v1: "):
        judge_of(config)
    with pytest.raises(UserError, match=r"^judge.chat.template=none: no such file"):
        judge_of(dataclasses.replace(config, url="http://host/v1", template="none"))


def test_the_files_name_is_fit_for_any_system(tmp_path: Path) -> None:
    judge = judge_of(chat_config("http://host/v1", tmp_path, model='/models/../me: "X"?' + "x" * 300))
    assert judge.file.parent == tmp_path and len(judge.file.name) < 100
    assert set(judge.file.stem) <= {*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-"}
