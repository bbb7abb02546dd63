"""The processes of a run meet, and each learns when another never comes, has gone or says why it goes."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers_peers import Ended, together, wait_for_all

from rlhf_pipeline import peers
from rlhf_pipeline.config.schema import RuntimeConfig
from rlhf_pipeline.errors import PeerError, UserError
from rlhf_pipeline.launch import free_port
from rlhf_pipeline.peers_hub import PROBES

A_WHILE = 40.0  # seconds that a process would go on for


def meets(then: Callable[[], object] = lambda: None, *, seconds: float = 20.0) -> Callable[[], None]:
    def act() -> None:
        peers.meet(seconds)
        then()

    return act


def works() -> None:
    time.sleep(A_WHILE)


def kills_itself() -> None:
    wait_for_all()
    os.kill(os.getpid(), signal.SIGKILL)


def goes_on() -> None:
    wait_for_all()
    works()


def one(ended: Ended | None) -> Ended:
    assert ended is not None and "Traceback" not in ended.said, ended
    return ended


def test_all_is_told_within_a_minute() -> None:
    unanswered = PROBES["TCP_KEEPIDLE"] + PROBES["TCP_KEEPINTVL"] * PROBES["TCP_KEEPCNT"]
    assert max(unanswered, PROBES["TCP_USER_TIMEOUT"] / 1000) + 2 * peers.GRACE < 60
    assert RuntimeConfig().rendezvous_seconds < 60


def test_those_who_end_well_are_not_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each at its own time, the first one before the others and after some."""
    monkeypatch.setattr(peers, "GRACE", 0.1)
    acts = [meets(lambda seconds=seconds: time.sleep(seconds)) for seconds in (0.6, 0.1, 1.2)]  # type: ignore[misc]
    ended = together(acts, folder=tmp_path, port=free_port())
    assert [(one(e).code, one(e).said) for e in ended] == [(0, "")] * 3


@pytest.mark.parametrize("lost", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_one_is_killed(tmp_path: Path, lost: int) -> None:
    acts = [meets(kills_itself if rank == lost else goes_on) for rank in range(3)]
    ended = [one(e) for e in together(acts, folder=tmp_path, port=free_port())]
    for rank in range(3):
        assert ended[rank].code == (-signal.SIGKILL if rank == lost else 1)
        assert ended[rank].seconds < A_WHILE
    teller = 1 if lost == 0 else 0  # one of the machine
    for rank in range(3):
        if rank != teller:
            assert ended[rank].said == ""
    assert f"process {lost} on {socket.gethostname()} has gone without a word" in ended[teller].said
    assert "the same command goes on from the last saved state" in ended[teller].said


def test_one_fails_and_says_why(tmp_path: Path) -> None:
    """A file that only its machine lacks, say."""

    def fails() -> None:
        raise UserError("train.jsonl: no such file")

    acts = [meets(goes_on), meets(fails)]
    places = [{"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "RLHF_HOST": host} for host in ("node1", "node2")]
    first, second = together(acts, folder=tmp_path, port=free_port(), places=places)
    assert one(second).code == 2
    assert one(first).code == 1
    assert "process 1 on node2 has ended: train.jsonl: no such file" in one(first).said


def test_a_mistake_of_all_is_told_once(tmp_path: Path) -> None:
    def fails() -> None:
        wait_for_all()
        time.sleep(0.3 * int(os.environ["RANK"]))
        raise UserError("optim.lr: was 1, is now 2")

    ended = together([meets(fails)] * 3, folder=tmp_path, port=free_port())
    assert [one(e).code for e in ended] == [2] * 3
    assert [one(e).said for e in ended] == ["optim.lr: was 1, is now 2\n", "", ""]


def test_the_error_of_a_collective_is_told_as_the_loss_that_it_came_from(tmp_path: Path) -> None:
    def meets_the_end_in_a_collective() -> None:
        wait_for_all()
        time.sleep(0.5)
        raise RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer")

    acts = [meets(meets_the_end_in_a_collective), meets(kills_itself)]
    first, _ = together(acts, folder=tmp_path, port=free_port())
    assert one(first).code == 1 and one(first).seconds < A_WHILE
    assert one(first).said.count("process 1 on") == 1 and "gloo" not in one(first).said


# A meeting that comes to nothing


def test_one_never_comes(tmp_path: Path) -> None:
    port = free_port()
    places = [{"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}] * 4
    acts = [meets(works, seconds=4), meets(works, seconds=4), None, None]
    first, second, *_ = together(acts, folder=tmp_path, port=port, places=places)
    for ended in (one(first), one(second)):
        assert ended.code == 1 and ended.seconds < A_WHILE
        assert f"127.0.0.1:{port}: 2 of 4 processes did not come within 4 s" in ended.said
        assert "2, 3. Their output says why" in ended.said and f"MASTER_PORT={port}" in ended.said


def test_the_first_never_comes(tmp_path: Path) -> None:
    port = free_port()
    _, second = together([None, meets(works, seconds=4)], folder=tmp_path, port=port, places=[{}, {"LOCAL_RANK": "0"}])
    assert one(second).code == 1 and one(second).seconds < A_WHILE
    for words in (f"127.0.0.1:{port}", "process 0 does not answer (Connection refused)", "no firewall closes port"):
        assert words in one(second).said


def test_the_port_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        ended, _ = together([meets(works), None], folder=tmp_path, port=port)
    assert one(ended).code == 1 and one(ended).seconds < A_WHILE
    assert f"127.0.0.1:{port}: port {port} is taken by another program" in one(ended).said
    assert "--master-port" in one(ended).said


@pytest.mark.slow
def test_somebody_else_listens_there_and_says_nothing(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        _, ended = together(
            [None, meets(works, seconds=4)], folder=tmp_path, port=port, places=[{}, {"LOCAL_RANK": "0"}]
        )
    assert one(ended).code == 1 and one(ended).seconds < A_WHILE
    assert "and not another program?" in one(ended).said


@pytest.mark.parametrize(
    ("wrong", "words"),
    [({"WORLD_SIZE": "5"}, "WORLD_SIZE=5 there and 3"), ({"RANK": "1"}, "RANK=1: there is such a process already")],
)
def test_one_was_told_another_place(tmp_path: Path, wrong: dict[str, str], words: str) -> None:
    def after_the_others() -> None:
        time.sleep(0.5)
        peers.meet(3)

    acts = [meets(works, seconds=3), meets(works, seconds=3), after_the_others]
    ended = together(acts, folder=tmp_path, port=free_port(), places=[{}, {}, {"LOCAL_RANK": "0", **wrong}])
    assert [one(e).code for e in ended] == [1] * 3
    assert words in one(ended[2]).said
    assert "1 of 3 processes did not come within 3 s (runtime.rendezvous_seconds): 2." in one(ended[0]).said


def test_a_stranger_on_the_port_does_no_harm(tmp_path: Path) -> None:
    port = free_port()

    def disturbs() -> None:
        store = peers.meet(20)
        told = json.loads(store.get(peers.KEY))
        for text in (b"GET / HTTP/1.1\r\n\r\n", b'{"token": "x", "rank": 1, "size": 2}\n', b"\xff\n", b""):
            with socket.create_connection(("127.0.0.1", told["port"])) as line:
                line.sendall(text)
        wait_for_all()

    ended = together([meets(wait_for_all), meets(disturbs)], folder=tmp_path, port=port)
    assert [(one(e).code, one(e).said) for e in ended] == [(0, ""), (0, "")]


def test_a_loss_is_not_waited_for_where_none_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("gloo")
    assert peers.cause(error) is error
    monkeypatch.setattr(peers, "GRACE", 0.0)
    monkeypatch.setattr(peers, "_circle", peers._Circle(peers.place(), None))
    assert peers.cause(error) is error
    assert not isinstance(peers.cause(error), PeerError)
