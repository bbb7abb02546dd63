"""scripts/sentiment.py on real reviews: its parts are disjoint, its classifiers know what is positive.

RLHF_TEST_DATA names the folder of files.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from rlhf_pipeline.data.records import Message
from rlhf_pipeline.scoring.episodes import Episode

FILE = Path(__file__).parents[2] / "scripts/sentiment.py"
DATA = Path(os.environ.get("RLHF_TEST_DATA", "/nonexistent"))
pytestmark = pytest.mark.skipif(
    not (DATA / "imdb_train.jsonl.gz").is_file(), reason="RLHF_TEST_DATA names no folder of real data"
)
REVIEWS = 2_000  # of a half, so that training takes a second


@pytest.fixture(scope="module")
def sentiment() -> ModuleType:
    pytest.importorskip("sklearn")
    spec = importlib.util.spec_from_file_location("sentiment", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def parts(sentiment: ModuleType) -> dict[str, tuple[list[str], list[int]]]:
    return {part: sentiment.reviews(part) for part in sentiment.PARTS}


def test_the_parts_share_no_review(parts: dict[str, tuple[list[str], list[int]]]) -> None:
    texts = {part: {" ".join(text.lower().split()) for text in found} for part, (found, _) in parts.items()}
    assert not texts["reward"] & texts["judge"]
    assert not (texts["reward"] | texts["judge"]) & texts["heldout"]
    sizes = {part: len(found) for part, (found, _) in parts.items()}
    assert sum(sizes.values()) == 25_000  # and none is lost
    assert 11_000 < sizes["reward"] < 11_500 and 11_000 < sizes["judge"] < 11_500
    assert all(0.47 < np.mean(labels) < 0.53 for _, labels in parts.values())  # the file is sorted by label


@pytest.mark.parametrize("part", ["reward", "judge"])
def test_a_classifier_knows_reviews_that_it_has_not_seen(
    part: str, sentiment: ModuleType, parts: dict[str, tuple[list[str], list[int]]]
) -> None:
    texts, labels = (some[::4] for some in parts["heldout"])
    said = sentiment.classifier(part, REVIEWS).predict(texts)
    assert np.mean(said == np.array(labels)) > 0.8


def test_programs_score_prefix_and_response(sentiment: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {part: sentiment.classifier(part, REVIEWS) for part in ("reward", "judge")}
    monkeypatch.setattr(sentiment, "classifier", small.__getitem__)

    def episode(prefix: str, response: str) -> Episode:
        message = Message("user", prefix)
        return Episode(prompt=(message,), response=response, finished=False, columns={}, origin="test")

    good, bad, empty, begun_badly = scores = sentiment.reward(
        [
            episode("This film is", "wonderful and moving, one of the best, a great performance."),
            episode("This film is", "awful and boring, one of the worst, a waste of time."),
            episode("This film is", ""),
            episode("The worst, most boring film", ""),
        ]
    )
    assert bad < 0.3 < 0.7 < good and begun_badly < empty and all(0 <= score <= 1 for score in scores)
    assert sentiment.judge([episode("A", "great, wonderful film"), episode("A", "boring, awful film")]) == [True, False]


def test_equal_prefixes_are_on_one_side(sentiment: ModuleType, tmp_path: Path) -> None:
    sentiment.write_prompts(tmp_path)
    train, heldout = (
        [json.loads(line)["text"] for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "heldout")
    )
    assert len(train) + len(heldout) == 25_000 and 800 < len(heldout) < 1_200
    assert not set(train) & set(heldout)
    assert {len(text.split()) for text in heldout} == {2, 3, 4, 5, 6, 7, 8}
