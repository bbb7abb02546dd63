"""The files that data sets are kept in: when one is used again, made again, and the same whoever makes it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_dataset import CONF, LENGTHS, MakeTokenizer, WriteRows, contents, demonstrations, pair

from rlhf_pipeline.data import dataset as module
from rlhf_pipeline.data.dataset import Source, build
from rlhf_pipeline.data.prompts import Renderer, load_template
from rlhf_pipeline.data.store import TreeDataset
from rlhf_pipeline.errors import UserError


def test_cache_is_used_until_anything_changes(
    make_tokenizer: MakeTokenizer, write_rows: WriteRows, cache: Path, made: list[str]
) -> None:
    path = write_rows(pair(0), pair(1), {**pair(2), "completion": "Red."})
    source, renderer = demonstrations(path), Renderer(make_tokenizer())

    def fresh(source: Source = source, renderer: Renderer = renderer, **changes: Any) -> bool:
        before = len(made)
        arguments = {"lengths": LENGTHS, "cache_dir": cache} | changes
        build(source, renderer, **arguments)
        return len(made) > before

    assert fresh() and not fresh()
    assert not fresh(renderer=Renderer(make_tokenizer()))
    for name, change in {
        "length": {"lengths": replace(LENGTHS, max_length=63)},
        "policy": {"lengths": replace(LENGTHS, long_response="drop")},
        "loss": {"loss": "all"},
        "format": {"source": replace(source, format="prompt_response")},
        "rows": {"source": replace(source, max_examples=1)},
        "tokenizer": {"renderer": Renderer(make_tokenizer(extra=("<|x|>",)))},
        "template": {"renderer": Renderer(make_tokenizer(load_template("dialogue", CONF) + "\n"))},
    }.items():
        assert fresh(**change), name
        assert not fresh(**change), name
    assert not fresh()
    write_rows(pair(0), pair(1), pair(3))
    assert fresh() and not fresh()


def test_code_is_part_of_the_key(
    renderer: Renderer, write_rows: WriteRows, cache: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = demonstrations(write_rows(pair(0)))
    for code in ("a", "b", "a"):
        monkeypatch.setattr(module, "_code_hash", lambda code=code: code)
        build(source, renderer, LENGTHS, cache_dir=cache)
    assert len(made) == 2
    assert {path.name for path in Path(module.__file__).parent.glob("*.py")} >= set(module._CODE)


@pytest.mark.parametrize("damage", ["cut", "empty", "token", "group", "tail", "zeros", "other"])
def test_damaged_cache_is_made_again(
    renderer: Renderer,
    write_rows: WriteRows,
    cache: Path,
    made: list[str],
    caplog: pytest.LogCaptureFixture,
    damage: str,
) -> None:
    source = demonstrations(write_rows(*(pair(i) for i in range(20))))
    data = build(source, renderer, LENGTHS, cache_dir=cache)
    expected, groups = contents(data), data.groups
    (file,) = cache.iterdir()
    content = bytearray(file.read_bytes())
    tokens = np.asarray(expected[7][1][0], np.int32).tobytes()
    match damage:
        case "cut":
            content = content[: len(content) // 2]
        case "empty":
            content = bytearray()
        case "token":
            content[content.index(tokens)] ^= 1
        case "group":
            content[content.index(groups[7].tobytes())] ^= 1
        case "tail":
            content[content.index(b'"fingerprint": "') + 20] ^= 1
        case "zeros":
            content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
        case "other":
            content = bytearray(b"something else altogether" * 100)
    file.write_bytes(content)
    assert contents(build(source, renderer, LENGTHS, cache_dir=cache)) == expected
    assert len(made) == 2 and "is damaged" in caplog.text
    assert contents(build(source, renderer, LENGTHS, cache_dir=cache)) == expected
    assert len(made) == 2


def test_building_at_the_same_time(
    renderer: Renderer, write_rows: WriteRows, cache: Path, monkeypatch: pytest.MonkeyPatch, made: list[str]
) -> None:
    """A second build begins and ends while the first has written its file and not yet named it."""
    source = demonstrations(write_rows(*(pair(i) for i in range(200))))
    original = module._check
    second: list[TreeDataset] = []

    def check(*arguments: Any) -> None:
        monkeypatch.setattr(module, "_check", original)
        second.append(build(source, renderer, LENGTHS, cache_dir=cache))
        original(*arguments)

    monkeypatch.setattr(module, "_check", check)
    first = build(source, renderer, LENGTHS, cache_dir=cache)
    assert len(made) == 2 and len(list(cache.iterdir())) == 1
    assert len(first) == 200 and contents(second[0]) == contents(first)  # though its file has been replaced


@pytest.mark.parametrize("rows_at_once", [7, 1024])
def test_files_are_the_same_with_any_number_of_processes(
    renderer: Renderer, write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_at_once: int
) -> None:
    """Byte for byte, bad, dropped and cut rows among them; 7 rows at once go to processes, 1,024 stay here."""
    monkeypatch.setattr(module, "ROWS_AT_ONCE", rows_at_once)
    rows: list[Any] = [pair(i, "Blue. " * (1 + i % 23)) for i in range(200)]
    rows[50], rows[51], rows[120] = b"{oops", {"prompt": 3, "response": "r"}, pair(120, "~" * 200)
    rows[121] = {"prompt": "~" * 200, "response": "dropped"}
    source = demonstrations(write_rows(*rows), on_bad_row="skip")
    told: list[tuple[str, int]] = []
    files = []
    for workers in (1, 2, 3):
        folder = tmp_path / f"cache{workers}"
        progress = (lambda name, done: told.append((name, done))) if workers == 2 else None
        build(source, renderer, LENGTHS, cache_dir=folder, workers=workers, progress=progress)
        files += [(file.name, file.read_bytes()) for file in folder.iterdir()]
    assert len(files) == 3 and len(set(files)) == 1
    assert told[-1] == (source.path, 200) and [done for _, done in told] == sorted(done for _, done in told)
    assert len(told) == -(-200 // rows_at_once)


def test_errors_are_the_same_with_any_number_of_processes(
    renderer: Renderer, write_rows: WriteRows, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 7)
    long = write_rows(*(pair(i, "~" * 200 if i == 60 else "Blue.") for i in range(100)), name="long.jsonl")
    bad = write_rows(*(b"{oops" if i % 4 == 0 else pair(i) for i in range(100)), name="bad.jsonl")
    unknown = write_rows({"a": 1}, *(pair(i) for i in range(100)), name="unknown.jsonl")
    strict = replace(LENGTHS, long_response="error")
    for path in (long, bad, unknown):
        messages = set()
        for workers in (1, 2):
            with pytest.raises(UserError) as error:
                build(demonstrations(path), renderer, strict, cache_dir=cache, workers=workers)
            messages.add(str(error.value))
        assert len(messages) == 1 and f"{path}:" in messages.pop()
    assert list(cache.iterdir()) == []


def test_ctrl_c_leaves_nothing_half_made(renderer: Renderer, write_rows: WriteRows, cache: Path) -> None:
    def progress(name: str, rows: int) -> None:
        raise KeyboardInterrupt

    source = demonstrations(write_rows(*(pair(i) for i in range(10))))
    with pytest.raises(KeyboardInterrupt):
        build(source, renderer, LENGTHS, cache_dir=cache, progress=progress)
    assert list(cache.iterdir()) == []
