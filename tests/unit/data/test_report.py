"""The figures of `rlhf prep`, against counts made one by one or by hand."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_pipeline.data import report_view
from rlhf_pipeline.data.contents import overlap, read_contents
from rlhf_pipeline.data.dataset import Source, build
from rlhf_pipeline.data.encode import Lengths
from rlhf_pipeline.data.order import by_examples
from rlhf_pipeline.data.packing import plan
from rlhf_pipeline.data.prompts import Renderer
from rlhf_pipeline.data.report import Report, Spread, run_report, set_report, to_json
from rlhf_pipeline.data.store import Share, TreeDataset, concatenate

LENGTHS = Lengths(max_length=96, max_prompt_length=48, long_prompt="drop", long_response="cut")
WriteRows = Callable[..., str]


@pytest.fixture
def rankings(renderer: Renderer, write_rows: WriteRows, tmp_path: Path) -> TreeDataset:
    rows = [
        {"prompt": "Sky?", "responses": ["Blue.", "Grey.", "Blue!"], "ranks": [1, 2, 1]},
        {"prompt": "Grass?", "responses": ["Green.", "Red and green."], "ranks": [1, 2]},
        {"prompt": "Sky?", "responses": ["Blue.", "Grey."], "ranks": [1, 2]},
        {"prompt": "Grass?", "responses": ["Green.", "Red and green."], "ranks": [2, 1]},
        {"prompt": "Sea?", "responses": ["Blue.", "Green.", "Grey.", "So?"], "ranks": [1, 1, 2, 1]},
    ]
    return build(Source(path=write_rows(*rows), kind="ranking"), renderer, LENGTHS, cache_dir=tmp_path / "cache")


def test_contents_are_those_of_the_trees(rankings: TreeDataset) -> None:
    for data in (rankings, rankings.select(np.array([4, 0, 2]))):
        trees = list(data)
        found = read_contents(data)
        assert found.prompt_length.tolist() == [len(tree.prompt) for tree in trees]
        assert found.num_responses.tolist() == [len(tree.responses) for tree in trees]
        told = sorted(zip(found.tree.tolist(), found.response_length.tolist(), found.rank.tolist(), strict=True))
        assert told == sorted(
            (i, len(r), int(rank)) for i, t in enumerate(trees) for r, rank in zip(t.responses, t.ranks, strict=True)
        )
        # Equal hashes where and only where the tokens are equal.
        whole = [(t.prompt.tobytes(), *(r.tobytes() for r in t.responses)) for t in trees]
        for i, j in combinations(range(len(data)), 2):
            assert (found.tree_hash[i] == found.tree_hash[j]) == (whole[i] == whole[j])


def test_hashes_tell_order_place_and_prompt_apart(renderer: Renderer, write_rows: WriteRows, tmp_path: Path) -> None:
    def row(prompt: str, *responses: str) -> dict[str, Any]:
        return {"prompt": prompt, "responses": list(responses), "ranks": list(range(1, len(responses) + 1))}

    rows = [
        row("a b", "c", "d"),
        row("a b", "d", "c"),
        row("b a", "c", "d"),
        row("a b", "c", "dc"),
        row("a b", "cd", "c"),
    ]
    data = build(Source(path=write_rows(*rows), kind="ranking"), renderer, LENGTHS, cache_dir=tmp_path / "cache")
    assert len(set(read_contents(data).tree_hash.tolist())) == 5


def test_duplicates(rankings: TreeDataset) -> None:
    found = set_report(rankings, read_contents(rankings), kind="ranking").duplicates
    # Row 4 has the prompt and the responses of row 2 (other ranks); rows 3 and 4 repeat prompts.
    assert (found.examples, found.prompts, found.responses) == (1, 2, 0)
    (pair,) = found.first
    assert [place.rpartition(":")[2] for place in pair] == ["4", "2"]


def test_responses_that_are_the_same_once_they_are_cut(
    renderer: Renderer, write_rows: WriteRows, tmp_path: Path
) -> None:
    row = {"prompt": "Sky?", "responses": ["~" * 99 + "a", "Blue.", "~" * 99 + "b"], "ranks": [1, 2, 3]}
    data = build(Source(path=write_rows(row), kind="ranking"), renderer, LENGTHS, cache_dir=tmp_path / "cache")
    assert set_report(data, read_contents(data), kind="ranking").duplicates.responses == 1


def test_rankings_and_ties(rankings: TreeDataset) -> None:
    report = set_report(rankings, read_contents(rankings), kind="ranking", row_length=20, max_length=96)
    assert report.answers == {2: 3, 3: 1, 4: 1}
    pairs = [(a, b) for tree in rankings for a, b in combinations(tree.ranks.tolist(), 2)]
    assert len(pairs) == 3 * 1 + 3 + 6 and sum(a == b for a, b in pairs) == 1 + 3
    assert report.tied == pytest.approx(4 / 12, abs=1e-4)
    assert (report.comparisons, report.prompts, report.all_tied) == (12, 3, 0)
    long = [i for i, tree in enumerate(rankings) if len(tree) > 20]
    assert report.over_row_length is not None and report.over_row_length.trees == len(long) > 0
    assert report.over_row_length.first[0].startswith(rankings.origin(long[0]))
    assert report.over_max_length is not None and report.over_max_length.trees == 0


def test_rankings_without_a_winner(renderer: Renderer, write_rows: WriteRows, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}?", "responses": ["Blue.", "Grey.", "Red."], "scores": [1, 1, i % 3 + 1]} for i in range(6)]
    data = build(Source(path=write_rows(*rows), kind="ranking"), renderer, LENGTHS, cache_dir=tmp_path / "cache")
    report = set_report(data, read_contents(data), kind="ranking")
    # Two rankings of three tied pairs, four of one.
    assert (report.comparisons, report.prompts, report.all_tied) == (18, 6, 2)
    assert report.tied == pytest.approx((2 * 3 + 4) / 18, abs=1e-4)
    few = data.select(np.array([0, 1]))
    report = set_report(few, read_contents(few), kind="ranking")
    assert (report.comparisons, report.all_tied) == (6, 1) and report.tied == pytest.approx(4 / 6, abs=1e-4)


def test_percentiles_are_lengths_that_occur() -> None:
    lengths = np.arange(1, 201)
    assert Spread.of(lengths) == Spread(mean=100.5, p50=100, p90=180, p95=190, p99=198, max=200)
    assert Spread.of(np.array([5])) == Spread(mean=5.0, p50=5, p90=5, p95=5, p99=5, max=5)
    assert Spread.of(np.array([], np.int64)) is None


def demonstrations(
    write_rows: WriteRows, renderer: Renderer, tmp_path: Path, name: str, *rows: tuple[str, str]
) -> TreeDataset:
    path = write_rows(*({"prompt": p, "response": r} for p, r in rows), name=name)
    return build(Source(path=path, kind="demonstration"), renderer, LENGTHS, cache_dir=tmp_path / "cache")


def test_overlap_of_two_sets(renderer: Renderer, write_rows: WriteRows, tmp_path: Path) -> None:
    train = demonstrations(
        write_rows, renderer, tmp_path, "t.jsonl", ("A?", "1"), ("B?", "2"), ("C?", "3"), ("A?", "9")
    )
    held = demonstrations(write_rows, renderer, tmp_path, "h.jsonl", ("D?", "4"), ("C?", "3"), ("A?", "7"), ("A?", "9"))
    found = overlap(train, held, (read_contents(train), read_contents(held)))
    assert (found.size, found.prompts, found.examples) == (4, 3, 2)
    assert [tuple(Path(place).name for place in pair) for pair in found.first] == [
        ("h.jsonl:2", "t.jsonl:3"),
        ("h.jsonl:3", "t.jsonl:1"),
        ("h.jsonl:4", "t.jsonl:1"),
    ]
    assert overlap(train, held).examples is None
    apart = held.select(np.array([0]))
    assert overlap(train, apart).prompts == 0 and overlap(train, apart).first == ()


def test_a_run_over_weighed_sources(renderer: Renderer, write_rows: WriteRows, tmp_path: Path) -> None:
    many = [(f"{i}?", "word " * (i % 9 + 1)) for i in range(40)]
    parts = [
        demonstrations(write_rows, renderer, tmp_path, f"{i}.jsonl", *rows) for i, rows in enumerate((many, many[:6]))
    ]
    shares = [
        Share(name=f"{i}", weight=w, counts=p.counts) for i, (p, w) in enumerate(zip(parts, (0.5, 2), strict=True))
    ]
    data = concatenate(parts, shares)
    batches = by_examples(len(data), batch=8, epochs=3, seed=0, parts=data.parts)
    report = run_report(data, batches, max_steps=None, row_length=64, micro_rows=2)
    assert (report.steps, report.epochs) == (12, 3) and report.examples_a_step == 8  # 20 + 12 examples an epoch
    tokens = positions = 0
    for step in range(12):  # fewer than are tried: all of them
        lengths = [len(data[i]) for i in batches.indices(step).tolist()]
        tokens += sum(lengths)
        (micro_batches,) = plan(lengths, num_ranks=1, row_length=64, micro_rows=2)
        for rows in micro_batches:
            positions += len(rows) * max(sum(lengths[i] for i in row) for row in rows)
    assert report.fill == pytest.approx(tokens / positions, abs=1e-4) and 0.5 < report.fill <= 1
    assert report.tokens_a_step == pytest.approx(tokens / 12, abs=0.1)
    assert run_report(data, batches, max_steps=5, row_length=64, micro_rows=2).steps == 5
    sources = set_report(data, read_contents(data), kind="demonstration").sources
    assert [(one.examples, one.an_epoch) for one in sources] == [(40, 20), (6, 12)]
    assert [one.tokens for one in sources] == [int(part.lengths.sum()) for part in parts]


def test_report_is_shown_and_saved(rankings: TreeDataset, tmp_path: Path) -> None:
    from rich.console import Console

    contents = read_contents(rankings)
    one = set_report(rankings, contents, kind="ranking", row_length=20)
    report = Report(
        unit="tokens",
        sets={"train": one, "held out": one},
        overlap=overlap(rankings, rankings, (contents,) * 2),
        run=None,
    )
    saved = json.loads(json.dumps(to_json(report)))
    assert saved["sets"]["train"]["answers"] == {"2": 3, "3": 1, "4": 1}
    assert saved["overlap"]["examples"] == 5
    console = Console(record=True, width=160, file=(tmp_path / "shown").open("w"))
    for table in report_view.tables(report):
        console.print(table)
    shown = console.export_text() + "\n".join(report_view.lines(report))
    for expected in (
        "2: 3, 3: 1, 4: 1",
        "33.3%",
        "comparisons",
        "rankings of ties alone",
        "longest (a packed row: 20)",
        "train: prompt",
        "batch.row_length=20",
        "5 prompts and 5 whole examples",
    ):
        assert expected in shown
    report_view.histograms({"train": contents}, tmp_path / "x.png", unit="tokens", prompt_limit=8, row_length=20)
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"


def test_documents_have_no_prompts(renderer: Renderer, write_rows: WriteRows, tmp_path: Path) -> None:
    path = write_rows({"text": "The sky is blue. " * 20}, {"text": "Hi"}, {"text": "Hi"})
    data = build(Source(path=path, kind="text"), renderer, LENGTHS, cache_dir=tmp_path / "cache")
    report = set_report(data, read_contents(data), kind="text")
    assert report.prompt is None and report.response is None and report.answers == {} and report.tied is None
    assert (report.prompts, report.comparisons, report.all_tied) == (None, None, None)
    assert report.tree is not None and report.tree.max == 96 and report.duplicates.examples == 1


def test_feedback_and_prompts(renderer: Renderer, write_rows: WriteRows, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}?", "completion": "So.", "label": i % 4 == 0} for i in range(8)]
    data = build(Source(path=write_rows(*rows), kind="feedback"), renderer, LENGTHS, cache_dir=tmp_path / "cache")
    assert set_report(data, read_contents(data), kind="feedback").wanted == 0.25
    data = build(Source(path=write_rows(*rows), kind="prompt"), renderer, LENGTHS, cache_dir=tmp_path / "cache")
    report = set_report(data, read_contents(data), kind="prompt")
    assert report.response is None and report.examples == 8 and report.targets == 0
    assert report.prompt is not None and report.prompt.max == max(len(tree.prompt) for tree in data)
    assert not math.isnan(report.prompt.mean) and Counter(report.answers) == Counter()
