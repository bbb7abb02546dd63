"""Rows that cannot be used: named, skipped and counted, so that every row is accounted for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers_dataset import LENGTHS, MakeTokenizer, WriteRows, demonstrations, pair

from rlhf_pipeline.data.dataset import build
from rlhf_pipeline.data.encode import Counts
from rlhf_pipeline.data.prompts import Renderer
from rlhf_pipeline.data.records import Message
from rlhf_pipeline.errors import UserError

BAD = [
    (b"{oops", "not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
    (b'{"prompt": "\xff"}', "not UTF-8: byte 0xff at position 12"),
    (b"[]", "not a JSON object: list"),
    ({"prompt": "p"}, "no field 'response': there is prompt"),
    ({"prompt": 3, "response": "r"}, "prompt is not a string: int"),
    ({"prompt": "p", "response": " \n "}, "the assistant message is empty"),
    ({"prompt": "\ud800", "response": "r"}, "the user message is not valid Unicode: a lone surrogate at character 0"),
    ({"prompt": "\U000f0000", "response": "r"}, "the text holds U+F0000 or U+F0001, which serve as marks here"),
]


def test_bad_rows_are_an_error_that_names_them(renderer: Renderer, write_rows: WriteRows, cache: Path) -> None:
    path = write_rows(pair(0), *(row for row, _ in BAD), pair(1))
    with pytest.raises(UserError) as error:
        build(demonstrations(path), renderer, LENGTHS, cache_dir=cache)
    lines = str(error.value).splitlines()
    assert lines[0] == f"8 of 10 rows of {path} cannot be used:"
    assert lines[1:9] == [f"  {path}:{number}: {reason}" for number, (_, reason) in enumerate(BAD, start=2)]
    assert "data.on_bad_row=skip" in lines[9]
    assert list(cache.iterdir()) == []  # and leave nothing behind

    path = write_rows(pair(0), *(b"{oops" for _ in range(13)))
    with pytest.raises(UserError, match=r"13 of 14 rows of /[^$]*data.jsonl:11: not JSON[^$]*and 3 more"):
        build(replace(demonstrations(path), path=[path]), renderer, LENGTHS, cache_dir=cache)


def test_skipped_bad_rows_are_counted(renderer: Renderer, write_rows: WriteRows, cache: Path) -> None:
    path = write_rows(pair(0), *(row for row, _ in BAD), b"{again", pair(1))
    for _ in ("made", "from the cache"):
        data = build(demonstrations(path, on_bad_row="skip"), renderer, LENGTHS, cache_dir=cache)
        assert data.counts.rows == 11 and data.counts.kept == data.counts.trees == len(data) == 2
        expected = {reason.split(":")[0]: 1 for _, reason in BAD}
        assert data.counts.bad == expected | {"not JSON": 2}
        assert data.bad_rows[0].startswith(f"{path}:2: not JSON") and len(data.bad_rows) == 9
        assert [data.origin(i) for i in range(2)] == [f"{path}:1", f"{path}:11"]


def test_what_is_done_with_bad_rows_does_not_change_the_file(
    renderer: Renderer, write_rows: WriteRows, cache: Path, made: list[str]
) -> None:
    """So `rlhf prep`, which counts them, makes the file of a stage that refuses them: the stage then says so at once."""
    source = demonstrations(write_rows(pair(0), b"{oops", pair(1)))
    build(replace(source, on_bad_row="skip"), renderer, LENGTHS, cache_dir=cache)
    for _ in range(2):
        with pytest.raises(UserError, match=r"1 of 3 rows of .*data\.jsonl cannot be used:\n .*:2: not JSON"):
            build(source, renderer, LENGTHS, cache_dir=cache)
    assert len(made) == 1 and len(list(cache.iterdir())) == 1


def test_every_row_is_accounted_for(renderer: Renderer, write_rows: WriteRows, cache: Path) -> None:
    def say(*turns: tuple[str, str, int]) -> dict[str, Any]:
        return {"messages": [{"role": r, "content": c, "weight": w} for r, c, w in turns]}

    long = "~" * 100  # a token each
    path = write_rows(
        say(("user", "q", 1), ("assistant", "a", 1)),
        say(("user", long, 1), ("assistant", "a", 1)),
        say(("user", "q", 1), ("assistant", long, 1)),
        say(("user", "q", 1), ("assistant", "a", 0)),
        say(("user", "q", 1)),
    )
    data = build(demonstrations(path, on_bad_row="skip"), renderer, LENGTHS, cache_dir=cache)
    prompt, answer = (len(renderer.encode_prompt([Message("user", "q")])), len(data[0].responses[0]))
    assert data.counts == Counts(
        rows=5,
        kept=2,
        bad={"the last message is not the assistant's": 1},
        dropped_long_prompt=1,
        dropped_long_response=0,
        dropped_no_target=1,
        prompt_truncated=0,
        response_truncated=1,
        trees=2,
        tokens=prompt + answer + 64,
        targets=answer + 64 - prompt,
    )
    other = replace(LENGTHS, long_prompt="keep_end", long_response="drop")
    counts = build(demonstrations(path, on_bad_row="skip"), renderer, other, cache_dir=cache).counts
    assert (counts.kept, counts.prompt_truncated, counts.dropped_long_response) == (2, 1, 1)
    with pytest.raises(UserError, match=r"data\.jsonl:2: the prompt has \d+ tokens"):
        strict = replace(LENGTHS, long_prompt="error")
        build(demonstrations(path, on_bad_row="skip"), renderer, strict, cache_dir=cache)
    assert len(list(cache.iterdir())) == 2


def test_nothing_left_is_an_error(renderer: Renderer, write_rows: WriteRows, cache: Path) -> None:
    with pytest.raises(UserError, match=r"none of 0 rows is left \(it is empty\)"):
        build(demonstrations(write_rows()), renderer, LENGTHS, cache_dir=cache)
    path = write_rows(b"{", pair(1, "~" * 100))
    strict = replace(LENGTHS, long_response="drop")
    with pytest.raises(UserError, match=r"none of 2 rows is left \(1 bad, 1 dropped_long_response\)\n .*:1: not JSON"):
        build(demonstrations(path, on_bad_row="skip"), renderer, strict, cache_dir=cache)


def test_rewriting_template_is_refused_with_the_place_of_the_row(
    make_tokenizer: MakeTokenizer, write_rows: WriteRows, cache: Path
) -> None:
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content if loop.last or m.role == 'user' else m.content[-1:] }}"
        "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    turns = [{"role": r, "content": c} for r, c in [("user", "a"), ("assistant", "bc")] * 2]
    path = write_rows({"messages": turns[:2]}, {"messages": turns})
    with pytest.raises(UserError, match=r"data\.jsonl:2: the chat template rewrites"):
        build(demonstrations(path), Renderer(make_tokenizer(template)), LENGTHS, cache_dir=cache)
