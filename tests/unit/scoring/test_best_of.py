"""Which of several answers is chosen, when all of them are there, and how far the choice moves a policy at most."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from helpers_runs import sentence
from helpers_scoring import make_small_reward_model

from rlhf_pipeline.config.ppo import ScorerConfig
from rlhf_pipeline.config.schema import ReadyModelConfig
from rlhf_pipeline.data.records import Message
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.generation.decode import STOP, Completion
from rlhf_pipeline.scoring.best_of import Best, by_prompt, choose, kl_upper_bound
from rlhf_pipeline.scoring.episodes import Episode
from rlhf_pipeline.scoring.sources import Source, open_sources


def completion(id: int, sample: int) -> Completion:
    return Completion(id=id, sample=sample, tokens=np.zeros(1, np.int32), logprobs=np.zeros(1, np.float32), finish=STOP)


def episode(response: str, prompt: str = "who sits?") -> Episode:
    return Episode(prompt=(Message("user", prompt),), response=response, finished=True, columns={}, origin="p.jsonl:1")


def source(name: str, score: Callable[[str], float], weight: float = 1.0) -> Source:
    return Source(
        name=name,
        weight=weight,
        what="",
        run=lambda episodes, counts: np.array([float(score(one.response)) for one in episodes]),
    )


def chosen(sources: Sequence[Source], *prompts: Sequence[str]) -> list[Best]:
    by_name = {one.name: one for one in sources}
    asked = [[episode(text) for text in texts] for texts in prompts]
    return choose(by_name, asked, {name: Counter() for name in by_name})


def test_the_highest_weighted_sum_and_the_first_of_a_tie() -> None:
    sources = [
        source("long", len),
        source("last", lambda text: ord(text[-1]), weight=0.0),  # written down, and not counted
        source("vowels", lambda text: text.count("a"), weight=-3.0),
    ]
    found = chosen(sources, ["b", "bbb", "aaaa"], ["cc", "bcbb", "bbcb"])
    assert found == [
        Best(place=1, score=3.0, scores={"long": 3.0, "last": 98.0, "vowels": 0.0}),
        Best(place=1, score=4.0, scores={"long": 4.0, "last": 98.0, "vowels": 0.0}),
    ]


def test_a_score_that_is_none_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"rewards\.bad: its score is nan for the prompt p\.jsonl:1 and the response 'b'"
    ):
        chosen([source("bad", lambda t: math.nan if t == "b" else 1.0)], ["a", "b"])


def test_a_prompt_waits_for_all_of_its_answers() -> None:
    """As where the samples of a prompt do not fit into one batch of the sampling loop."""
    batches = [
        [completion(7, 0), completion(7, 1)],
        [completion(7, 2), completion(3, 1)],
        [completion(5, 0)],
        [completion(3, 2), completion(5, 2), completion(5, 1), completion(3, 0)],
    ]
    found = [[[(one.id, one.sample) for one in some] for some in whole] for whole in by_prompt(batches, 3)]
    assert found == [[[(7, 0), (7, 1), (7, 2)]], [[(3, 0), (3, 1), (3, 2)], [(5, 0), (5, 1), (5, 2)]]]


def test_a_models_choice_is_the_same_to_the_bit_whatever_else_is_scored(tmp_path: Path) -> None:
    folder = make_small_reward_model(tmp_path / "rm")
    sources = open_sources({"rm": ScorerConfig(model=ReadyModelConfig(path=str(folder)))}, device="cpu")
    rng = random.Random(3)
    asked = []
    for _ in range(6):
        prompt = sentence(rng, 1, 12)
        asked.append([episode(sentence(rng, 0, 20), prompt) for _ in range(4)])
    counts = {"rm": Counter[str]()}
    together = choose(sources, asked, counts)
    assert together == [one for answers in asked for one in choose(sources, [answers], counts)]
    for answers, best in zip(asked, together, strict=True):
        alone = [float(sources["rm"].score([one])[0]) for one in answers]
        assert best.place == int(np.argmax(alone)) and best.score == pytest.approx(max(alone), abs=1e-5)


def test_the_bound_by_hand() -> None:
    assert kl_upper_bound(1) == 0.0
    assert kl_upper_bound(4) == pytest.approx(0.6362944, abs=1e-7)  # 1.3862944 - 0.75
    assert kl_upper_bound(64) == pytest.approx(3.1745081, abs=1e-7)  # 4.1588831 - 0.984375


@pytest.mark.parametrize("scores", [[3, 1, 2], [1, 2, 2]])
def test_the_bound_holds_for_what_is_chosen(scores: list[int]) -> None:
    """KL of the best of n, added up over everything that can be drawn; with few answers below the bound."""
    likely = {"a": 0.5, "b": 0.3, "c": 0.2}
    judge = source("judge", lambda text: scores["abc".index(text)])
    for n in (2, 4):
        draws = list(itertools.product("abc", repeat=n))
        best = dict.fromkeys(likely, 0.0)
        for draw, one in zip(draws, chosen([judge], *draws), strict=True):
            best[draw[one.place]] += math.prod(likely[text] for text in draw)
        kl = sum(p * math.log(p / likely[text]) for text, p in best.items() if p)
        assert 0 < kl < 0.9 * kl_upper_bound(n)


def test_the_bound_is_the_kl_where_all_answers_are_rare() -> None:
    size, n = 10_000, 8  # answers of one probability, each with a score of its own: P(best <= k) = (k / size)**n
    best = np.diff((np.arange(size + 1) / size) ** n)
    assert (best * np.log(best * size)).sum() == pytest.approx(kl_upper_bound(n), abs=1e-3)
