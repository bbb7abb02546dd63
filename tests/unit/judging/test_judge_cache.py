"""Answers on disk, whatever has happened to the file."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.judging.cache import Cache, Said

ONE, TWO = Said(text="Verdict: A", finish_reason="stop"), Said(text="é\ud83d\n x", finish_reason=None)


def test_what_was_added_is_there_for_the_next(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "er" / "answers.jsonl"
    cache = Cache(file)
    assert "one" not in cache and not file.exists()
    cache.add("one", ONE)
    cache.add("two", TWO)
    assert cache["one"] == ONE
    again = Cache(file)
    assert again["one"] == ONE and again["two"] == TWO and "three" not in again
    assert len(file.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    "torn",
    [
        b'{"key": "two", "text": "Ver',
        b"\x00\x00",
        b'{"key": "two"}',
        b'{"key": 2, "text": "x", "finish_reason": null}',
        b"[1]",
    ],
)
def test_a_torn_line_costs_itself_alone(tmp_path: Path, torn: bytes) -> None:
    file = tmp_path / "answers.jsonl"
    Cache(file).add("one", ONE)
    with file.open("ab") as sink:
        sink.write(torn)
    cache = Cache(file)
    assert cache["one"] == ONE and "two" not in cache
    cache.add("two", TWO)
    cache.add("three", ONE)
    again = Cache(file)
    assert [again[key] for key in ("one", "two", "three")] == [ONE, TWO, ONE]


def test_threads(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "answers.jsonl")
    texts = {f"{i}": Said(text=str(i) * 20_000, finish_reason="stop") for i in range(40)}  # more than one write
    threads = [threading.Thread(target=cache.add, args=item) for item in texts.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    again = Cache(tmp_path / "answers.jsonl")
    assert all(again[key] == said for key, said in texts.items())


def test_a_full_disk_is_told() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    cache = Cache(Path("/dev/full"))
    with pytest.raises(
        UserError, match=r"/dev/full: the disk is full while saving an answer of the judge\. The answers"
    ):
        cache.add("one", ONE)
