"""A chat model as a judge in earnest: a server of transformers with a model of its own, and a run that is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers_chat import Reply, chat_config, chat_server, pair, prefers
from helpers_runs import make_base

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.judging.chat import ChatJudge, open_chat_judge
from rlhf_pipeline.judging.pairs import Outcome, rule
from rlhf_pipeline.launch import free_port

PAIRS = [pair(f"red {i}", f"blue {i}", f"What is red, number {i}?", origin=f"p:{i}") for i in range(4)]


def judge_of(url: str, cache: Path, told: list[str] | None = None, **options: Any) -> ChatJudge:
    config = chat_config(url, cache, **{"timeout": 60.0} | options)
    return open_chat_judge(config, name="chat", tell=(told if told is not None else []).append)


# transformers serve


class Server:
    """`transformers serve` in a process of its own, and what it has logged."""

    def __init__(self, model: Path, log: Path) -> None:
        port = free_port()
        self.url, self.log = f"http://127.0.0.1:{port}/v1", log
        command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", str(model)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(log.parent)}
        with log.open("wb") as sink:
            self.process = subprocess.Popen(
                [*command, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"],
                stdout=sink,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        deadline = time.monotonic() + 180
        while b"Uvicorn running on" not in log.read_bytes():
            assert self.process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)

    @property
    def completions(self) -> int:
        return self.log.read_text().count("POST /v1/chat/completions")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, str]]:
    """A server of transformers and its name for the model, which is random."""
    for name in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(name, reason="transformers serve needs it")
    folder = tmp_path_factory.mktemp("served")
    model = make_base(folder / "llama", context=2048)
    server = Server(model, folder / "server.log")
    try:
        yield server, str(model)
    finally:
        server.process.terminate()
        server.process.wait(30)


@pytest.mark.slow
def test_a_real_server(served: tuple[Server, str], tmp_path: Path) -> None:
    server, model = served
    told: list[str] = []
    judge = judge_of(server.url, tmp_path, told, model=model, max_tokens=12, concurrency=2)
    rulings = rule(judge, PAIRS)
    assert server.completions == 8
    # It is random: it says something, and never the line that is asked for.
    assert [ruling.value for ruling in rulings] == [None] * 4
    for ruling in rulings:
        for verdict in ruling.verdicts:
            assert verdict.outcome is Outcome.malformed
            assert verdict.reason.startswith(("cut off at max_tokens=12: ", "no verdict in its last line: "))
    lines = [json.loads(line) for line in judge.file.read_text().splitlines()]
    assert len(lines) == 8 and any(line["text"] for line in lines)

    again = judge_of(server.url, tmp_path, told, model=model, max_tokens=12, concurrency=2)
    assert rule(again, PAIRS) == rulings
    assert server.completions == 8, "all of it was known"
    assert told[-1] == f"chat: 0 requests to {server.url}, 8 answers are in {judge.file}"


@pytest.mark.slow
def test_a_model_that_the_real_server_does_not_have(served: tuple[Server, str], tmp_path: Path) -> None:
    server, _ = served
    with pytest.raises(UserError, match=rf"^judge.chat.url={server.url}/chat/completions: it answered \d"):
        rule(judge_of(server.url, tmp_path, model="none/such", max_tokens=12, retries=0), PAIRS)


# Killed


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    """Answers that came before the kill are not asked for again; only requests on their way may be."""
    all_wait, hold = threading.Event(), threading.Event()

    def stalls(body: dict[str, Any], number: int) -> Reply:
        if number == 24:  # its four threads have asked, each after it has kept what it was told before
            all_wait.set()
        if number > 20:
            hold.wait(60)
        return prefers("red")(body, number)

    pairs = [pair(f"red {i}", f"blue {i}") for i in range(24)]
    program = f"""
from helpers_chat import chat_config, pair
from rlhf_pipeline.judging.chat import open_chat_judge
from rlhf_pipeline.judging.pairs import rule
import sys
judge = open_chat_judge(chat_config(sys.argv[1], {str(tmp_path)!r}, concurrency=4, timeout=60.0), name="chat", tell=print)
rule(judge, [pair(f"red {{i}}", f"blue {{i}}") for i in range(24)])
"""
    with chat_server(stalls) as (url, asked):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        first = subprocess.Popen([sys.executable, "-c", program, url], env=environment)
        assert all_wait.wait(60)
        first.send_signal(signal.SIGKILL)
        first.wait(30)
        assert len(asked.bodies) == 24 and len(asked.answered) == 20
        hold.set()

        rulings = rule(judge_of(url, tmp_path), pairs)
    assert [ruling.value for ruling in rulings] == [1.0] * 24
    assert len({json.dumps(body) for body in asked.bodies}) == 48
    assert len(asked.bodies) == 48 + 4
