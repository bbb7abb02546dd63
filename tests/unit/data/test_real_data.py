"""Real files, where the folder with them is named: nothing is lost without a word."""

from __future__ import annotations

import gzip
import json
import math
import os
from collections import Counter
from dataclasses import replace
from itertools import combinations, islice
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
from rlhf_pipeline.errors import UserError

FOLDER = os.environ.get("RLHF_TEST_DATA", "")
pytestmark = pytest.mark.skipif(not FOLDER, reason="RLHF_TEST_DATA names no folder with real data")

APART = "chosen and rejected part before their last turn"
EMPTY_ANSWER = "the assistant message is empty"
EMPTY_RESPONSE = "a response is empty"
SAME = "two responses are the same"
# file, kind, format, rows, records, bad rows by reason
FILES: list[tuple[str, Any, str, int, int, dict[str, int]]] = [
    ("TruthfulQA.csv.gz", "demonstration", "truthful_qa", 817, 817, {}),
    ("TruthfulQA.csv.gz", "prompt", "truthful_qa", 817, 817, {}),
    ("alpaca_999.json.gz", "demonstration", "alpaca", 999, 999, {}),
    ("alpaca_999.json.gz", "prompt", "alpaca", 999, 999, {}),
    ("alpaca_kwise.jsonl.gz", "ranking", "kwise", 300, 290, {EMPTY_RESPONSE: 1, SAME: 9}),
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
    ("ultrafeedback_eval.jsonl.gz", "ranking", "pair", 200, 199, {SAME: 1}),
    ("ultrafeedback_train.jsonl.gz", "ranking", "pair", 1000, 994, {EMPTY_RESPONSE: 2, SAME: 4}),
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


def _different(responses: list[str]) -> bool:
    texts = {response.strip() for response in responses}
    return "" not in texts and len(texts) == len(responses)


def test_scores_and_ties_of_ultrafeedback_reach_the_trees(load: Any) -> None:
    data = load("ultrafeedback_train.jsonl.gz", "ranking")
    rows = [row for row in _raw("ultrafeedback_train.jsonl.gz") if row["chosen"] and row["rejected"]]
    raw = [row["metadata"] for row in rows if row["chosen"].strip() != row["rejected"].strip()]
    scores = np.array([[row["score_chosen"], row["score_rejected"]] for row in raw], np.float32)
    assert np.array_equal(np.stack([tree.scores for tree in data]), scores)
    ranks = np.stack([tree.ranks for tree in data])
    assert np.array_equal(ranks[:, 1] > ranks[:, 0], scores[:, 0] > scores[:, 1])
    assert (ranks[:, 0] == 0).all() and (ranks[:, 1] == 0).sum() == 110


def test_rankings_of_four_to_nine_keep_their_order(load: Any) -> None:
    data = load("alpaca_kwise.jsonl.gz", "ranking")
    raw = [row for row in _raw("alpaca_kwise.jsonl.gz") if _different(row["responses"])]
    assert Counter(len(tree.responses) for tree in data) == Counter(len(row["responses"]) for row in raw)
    for tree, row in zip(data, raw, strict=True):
        assert np.array_equal(tree.scores, np.array(row["scores"], np.float32))
        better = np.subtract.outer(row["scores"], row["scores"])
        assert np.array_equal(np.sign(better), -np.sign(np.subtract.outer(tree.ranks, tree.ranks)))


@pytest.mark.slow
def test_every_comparison_that_somebody_won_is_an_example(load: Any, renderer: Renderer, tmp_path: Path) -> None:
    source = Source(path=str(Path(FOLDER, "alpaca_kwise.jsonl.gz")), kind="ranking", on_bad_row="skip")
    whole = load("alpaca_kwise.jsonl.gz", "ranking")
    pairs = build(replace(source, rankings="pairs"), renderer, NO_LIMIT, cache_dir=tmp_path)
    raw = [row for row in _raw("alpaca_kwise.jsonl.gz") if _different(row["responses"])]
    expected = [(a, b) for row in raw for a, b in combinations(row["scores"], 2) if a != b]
    scores = np.array([(max(pair), min(pair)) for pair in expected], np.float32)
    assert np.array_equal(np.stack([tree.scores for tree in pairs]), scores)
    assert {tuple(tree.ranks.tolist()) for tree in pairs} == {(0, 1)}
    assert pairs.counts.kept == whole.counts.kept == 290 and pairs.counts.dropped_all_tied == 0
    assert pairs.counts.trees == len(pairs) == len(expected) > 5_000
    assert list(dict.fromkeys(pairs.groups.tolist())) == list(dict.fromkeys(whole.groups.tolist()))


SPOILT = [
    ("alpaca_kwise.jsonl.gz", lambda row: {"responses": row["responses"][:1], "scores": [1]}, "fewer than two responses"),
    ("alpaca_kwise.jsonl.gz", lambda row: {"responses": [], "scores": []}, "fewer than two responses"),
    ("alpaca_kwise.jsonl.gz", lambda row: {"responses": ["a", " "], "scores": [1, 2]}, EMPTY_RESPONSE),
    ("alpaca_kwise.jsonl.gz", lambda row: {"responses": ["a", "a\n"], "scores": [2, 2]}, SAME),
    *(
        ("alpaca_kwise.jsonl.gz", lambda row, bad=bad: {"scores": [bad, *row["scores"][1:]]}, f"a value of scores is {why}")
        for bad, why in (
            (math.nan, "not a finite number"),
            (math.inf, "not a finite number"),
            (-math.inf, "not a finite number"),
            (10**400, "not a number"),
            (True, "not a number"),
            ("good", "not a number"),
            (None, "not a number"),
            ([1], "not a number"),
        )
    ),
    ("ultrafeedback_train.jsonl.gz", lambda row: {"chosen": row["rejected"]}, SAME),
    ("ultrafeedback_train.jsonl.gz", lambda row: {"metadata": {"score_chosen": math.nan, "score_rejected": 1}},
     "score_chosen is not a finite number"),
    ("ultrafeedback_train.jsonl.gz", lambda row: {"metadata": {"score_chosen": 1}}, "only one of two answers has a score"),
    ("ultrafeedback_train.jsonl.gz", lambda row: {"margin": -1}, "the margin is negative"),
    ("ultrafeedback_train.jsonl.gz", lambda row: {"margin": "much"}, "margin is not a number"),
    ("hh_harmless.jsonl.gz", lambda row: {"chosen": row["rejected"]}, SAME),
    ("hh_harmless.jsonl.gz", lambda row: {"margin": math.inf}, "margin is not a finite number"),
    ("dpo_demo.json.gz", lambda row: {"rejected": row["chosen"]}, SAME),
]  # fmt: skip


def test_what_is_wrong_with_comparisons_is_named_row_by_row(renderer: Renderer, tmp_path: Path) -> None:
    """Among good rows of the same file; the others are kept."""
    for name in dict.fromkeys(name for name, _, _ in SPOILT):
        good = [dict(row.value) for row in islice(read_rows(str(Path(FOLDER, name))), 2)]
        changed = [(change(good[0]), reason) for other, change, reason in SPOILT if other == name]
        file = tmp_path / f"{name.partition('.')[0]}.jsonl"
        rows = [good[0], *({**good[0], **change} for change, _ in changed), good[1]]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = Source(path=str(file), kind="ranking", on_bad_row="skip")
        data = build(source, renderer, NO_LIMIT, cache_dir=tmp_path)
        assert data.counts.bad == Counter(reason for _, reason in changed) and data.counts.kept == 2
        told = [f"{file}:{number}: {reason}" for number, (_, reason) in enumerate(changed, start=2)]
        assert all(line.startswith(start) for line, start in zip(data.bad_rows, told, strict=False))
        with pytest.raises(UserError, match=f"{len(changed)} of {len(rows)} rows"):
            build(replace(source, on_bad_row="error"), renderer, NO_LIMIT, cache_dir=tmp_path)


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
