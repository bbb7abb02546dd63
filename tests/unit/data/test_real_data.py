"""Real files, where the folder with them is named: nothing is lost without a word."""

from __future__ import annotations

import gzip
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_pipeline.data import templates
from rlhf_pipeline.data.dataset import Source, build, split_heldout
from rlhf_pipeline.data.encode import Lengths
from rlhf_pipeline.data.formats import detect, to_records
from rlhf_pipeline.data.prompts import Renderer
from rlhf_pipeline.data.records import BadRow
from rlhf_pipeline.data.sources import read_rows
from rlhf_pipeline.data.store import TreeDataset

FOLDER = os.environ.get("RLHF_TEST_DATA", "")
pytestmark = pytest.mark.skipif(not FOLDER, reason="RLHF_TEST_DATA names no folder with real data")

APART = "chosen and rejected part before their last turn"
EMPTY_ANSWER = "the assistant message is empty"
EMPTY_RESPONSE = "a response is empty"
# file, kind, format, rows, records, bad rows by reason
FILES: list[tuple[str, Any, str, int, int, dict[str, int]]] = [
    ("TruthfulQA.csv.gz", "demonstration", "truthful_qa", 817, 817, {}),
    ("TruthfulQA.csv.gz", "prompt", "truthful_qa", 817, 817, {}),
    ("alpaca_999.json.gz", "demonstration", "alpaca", 999, 999, {}),
    ("alpaca_999.json.gz", "prompt", "alpaca", 999, 999, {}),
    ("alpaca_kwise.jsonl.gz", "ranking", "kwise", 300, 299, {EMPTY_RESPONSE: 1}),
    ("alpaca_kwise.jsonl.gz", "demonstration", "kwise", 300, 300, {}),
    ("crows_pairs.csv.gz", "text", "text", 1508, 1508, {}),
    ("dpo_demo.json.gz", "ranking", "sharegpt_pair", 300, 300, {}),
    ("dpo_demo.json.gz", "demonstration", "sharegpt_pair", 300, 300, {}),
    ("dpo_demo.json.gz", "feedback", "sharegpt_pair", 300, 600, {}),
    ("hh_harmless.jsonl.gz", "ranking", "hh", 2312, 2303, {EMPTY_RESPONSE: 4, APART: 5}),
    ("hh_harmless.jsonl.gz", "demonstration", "hh", 2312, 2303, {EMPTY_ANSWER: 4, APART: 5}),
    ("hh_harmless.jsonl.gz", "prompt", "hh", 2312, 2307, {APART: 5}),
    ("imdb_train.jsonl.gz", "text", "text", 25000, 25000, {}),
    ("imdb_unsup_25k.jsonl.gz", "text", "text", 25000, 25000, {}),
    ("kto_demo.json.gz", "feedback", "messages_feedback", 300, 300, {}),
    ("kto_demo.json.gz", "demonstration", "messages_feedback", 300, 150, {"the answer was not wanted": 150}),
    ("kto_demo.json.gz", "prompt", "messages_feedback", 300, 300, {}),
    ("lima.jsonl.gz", "demonstration", "messages", 1030, 1029, {"the last message is not the assistant's": 1}),
    ("lima.jsonl.gz", "prompt", "messages", 1030, 1030, {}),
    ("llmbar.jsonl.gz", "ranking", "pair", 419, 419, {}),
    ("llmbar.jsonl.gz", "feedback", "pair", 419, 838, {}),
    ("real_toxicity_5k.jsonl.gz", "prompt", "real_toxicity", 5000, 5000, {}),
    ("tldr_oai1b.csv.gz", "demonstration", "tldr", 1945, 1945, {}),
    ("tldr_oai1b.csv.gz", "prompt", "tldr", 1945, 1945, {}),
    ("ultrafeedback_eval.jsonl.gz", "ranking", "pair", 200, 200, {}),
    ("ultrafeedback_train.jsonl.gz", "ranking", "pair", 1000, 998, {EMPTY_RESPONSE: 2}),
    ("ultrafeedback_train.jsonl.gz", "demonstration", "pair", 1000, 999, {EMPTY_ANSWER: 1}),
    ("winogender.tsv.gz", "text", "text", 720, 720, {}),
]
COLUMNS = {"crows_pairs.csv.gz": {"text": "sent_more"}, "winogender.tsv.gz": {"text": "sentence"}}

NO_LIMIT = Lengths(max_length=1_000_000, max_prompt_length=999_999, long_prompt="error", long_response="error")


def test_every_file_is_tried() -> None:
    found = {file.name for file in Path(FOLDER).iterdir() if file.suffix == ".gz"}
    assert found <= {name for name, *_ in FILES}


@pytest.mark.parametrize(("name", "kind", "format", "num_rows", "num_records", "bad"), FILES)
def test_records_of_a_file(
    name: str, kind: Any, format: str, num_rows: int, num_records: int, bad: dict[str, int]
) -> None:
    columns = COLUMNS.get(name)
    rows = [row.value for row in read_rows(str(Path(FOLDER, name)))]
    assert len(rows) == num_rows and not isinstance(rows[0], BadRow)
    assert detect(rows[0], kind, columns=columns) == format
    made, faults = 0, Counter[str]()
    for row in rows:
        assert not isinstance(row, BadRow)
        try:
            made += len(to_records(row, kind, format, columns=columns))
        except BadRow as fault:
            faults[fault.reason] += 1
    assert (made, dict(faults)) == (num_records, bad)


@pytest.fixture
def load(renderer: Renderer, tmp_path: Path) -> Any:
    def load(name: str, kind: Any, **source: Any) -> TreeDataset:
        made = Source(path=str(Path(FOLDER, name)), kind=kind, on_bad_row="skip", **source)
        data = build(made, renderer, NO_LIMIT, cache_dir=tmp_path)
        counts = data.counts
        assert counts.rows == counts.kept + sum(counts.bad.values()) and counts.kept == counts.trees == len(data)
        assert ((data.targets > 0) == (kind != "prompt")).all()
        return data

    return load


def test_hh_harmless(load: Any, renderer: Renderer) -> None:
    # Four chosen answers are empty; in five rows an answer goes on with another "Assistant:" turn.
    rankings, demonstrations = load("hh_harmless.jsonl.gz", "ranking"), load("hh_harmless.jsonl.gz", "demonstration")
    assert rankings.counts.rows == demonstrations.counts.rows == 2312
    assert rankings.counts.bad == {EMPTY_RESPONSE: 4, APART: 5}
    assert demonstrations.counts.bad == {EMPTY_ANSWER: 4, APART: 5}
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


def _raw(name: str) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines, read without the package."""
    with gzip.open(Path(FOLDER, name), "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_scores_and_ties_of_ultrafeedback_reach_the_trees(load: Any) -> None:
    data = load("ultrafeedback_train.jsonl.gz", "ranking")
    raw = [row["metadata"] for row in _raw("ultrafeedback_train.jsonl.gz") if row["chosen"] and row["rejected"]]
    scores = np.array([[row["score_chosen"], row["score_rejected"]] for row in raw], np.float32)
    assert np.array_equal(np.stack([tree.scores for tree in data]), scores)
    ranks = np.stack([tree.ranks for tree in data])
    assert np.array_equal(ranks[:, 1] > ranks[:, 0], scores[:, 0] > scores[:, 1])
    assert (ranks[:, 0] == 0).all() and (ranks[:, 1] == 0).sum() == 111


def test_rankings_of_four_to_nine_keep_their_order(load: Any) -> None:
    data = load("alpaca_kwise.jsonl.gz", "ranking")
    raw = [row for row in _raw("alpaca_kwise.jsonl.gz") if all(response.strip() for response in row["responses"])]
    assert Counter(len(tree.responses) for tree in data) == Counter(len(row["responses"]) for row in raw)
    for tree, row in zip(data, raw, strict=True):
        assert np.array_equal(tree.scores, np.array(row["scores"], np.float32))
        better = np.subtract.outer(row["scores"], row["scores"])
        assert np.array_equal(np.sign(better), -np.sign(np.subtract.outer(tree.ranks, tree.ranks)))


def test_feedback_and_prompts(load: Any) -> None:
    feedback, prompts = load("kto_demo.json.gz", "feedback"), load("kto_demo.json.gz", "prompt")
    assert Counter(tree.ranks.item() for tree in feedback) == {0: 150, 1: 150}
    for one, prompt in zip(feedback, prompts, strict=True):
        assert one.prompt.tolist() == prompt.prompt.tolist() and prompt.responses == ()
    assert feedback.groups.tolist() == prompts.groups.tolist()


@pytest.mark.parametrize("name", ["sentiment", "sentiment_few_shot"])
def test_imdb_through_templates(name: str) -> None:
    wordings = templates.load(name)
    rows = _raw("imdb_train.jsonl.gz")[::250]  # the file is sorted by label
    made = [wordings.records(row, f"f:{i}", rows, 0) for i, row in enumerate(rows)]
    is_short = [len(row["text"]) <= 600 for row in rows]
    assert [len(records) for records in made] == ([1] * 100 if name == "sentiment" else [int(yes) for yes in is_short])
    assert any(is_short)
    for row, records in zip(rows, made, strict=True):
        for record in records:
            answer = record.messages[-1].content
            words = ("Positive", "Yes", "positive", "liked the film") if row["label"] else ("egative", "No", "not like")
            assert any(word in answer for word in words) or "favourable film review" in record.messages[0].content
