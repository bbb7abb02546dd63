"""Real files, where the folder with them is named: nothing is lost without a word."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from rlhf_pipeline.data.dataset import Source, build, split_heldout
from rlhf_pipeline.data.encode import Lengths
from rlhf_pipeline.data.prompts import Renderer
from rlhf_pipeline.data.store import TreeDataset

FOLDER = os.environ.get("RLHF_TEST_DATA", "")
pytestmark = pytest.mark.skipif(not FOLDER, reason="RLHF_TEST_DATA names no folder with real data")

NO_LIMIT = Lengths(max_length=1_000_000, max_prompt_length=999_999, long_prompt="error", long_response="error")


@pytest.fixture
def load(renderer: Renderer, tmp_path: Path) -> Any:
    def load(name: str, kind: Any, **source: Any) -> TreeDataset:
        made = Source(path=str(Path(FOLDER, name)), kind=kind, on_bad_row="skip", **source)
        data = build(made, renderer, NO_LIMIT, cache_dir=tmp_path)
        counts = data.counts
        assert counts.rows == counts.kept + sum(counts.bad.values()) and counts.kept == counts.trees == len(data)
        assert (data.targets > 0).all()
        return data

    return load


def test_hh_harmless(load: Any, renderer: Renderer) -> None:
    # Four chosen answers are empty; in five rows an answer goes on with another "Assistant:" turn.
    rankings, demonstrations = load("hh_harmless.jsonl.gz", "ranking"), load("hh_harmless.jsonl.gz", "demonstration")
    apart = "chosen and rejected part before their last turn"
    assert rankings.counts.rows == demonstrations.counts.rows == 2312
    assert rankings.counts.bad == {"a response is empty": 4, apart: 5}
    assert demonstrations.counts.bad == {"the assistant message is empty": 4, apart: 5}
    assert len(rankings) == 2303
    for i in range(0, 2303, 100):
        ranking, demonstration = rankings[i], demonstrations[i]
        assert ranking.prompt.tolist() == demonstration.prompt.tolist()
        assert ranking.responses[0].tolist() == demonstration.responses[0].tolist()
        assert rankings.groups[i] == demonstrations.groups[i]
        assert [response[-1] for response in ranking.responses] == [renderer.eos_id] * 2
        assert all(scored.all() for scored in ranking.scored)
    train, heldout = split_heldout(rankings, 0.1, 0)
    assert not set(train.groups.tolist()) & set(heldout.groups.tolist())


def test_lima(load: Any, renderer: Renderer) -> None:
    data = load("lima.jsonl.gz", "demonstration")
    assert data.counts.rows == 1030
    assert data.counts.bad == {"the last message is not the assistant's": 1}
    for i in range(len(data)):
        tree = data[i]
        assert tree.responses[0][-1] == renderer.eos_id and tree.scored[0][-1]


def test_alpaca(load: Any) -> None:
    data = load("alpaca_999.json.gz", "demonstration")
    assert data.counts.rows == len(data) == 999 and data.counts.bad == {}


def test_imdb(load: Any) -> None:
    data = load("imdb_train.jsonl.gz", "text", max_examples=200)
    assert data.counts.rows == len(data) == 200 and data.counts.bad == {}
    assert data.counts.targets == data.counts.tokens - 200  # every token but each document's first
