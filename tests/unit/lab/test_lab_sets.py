"""The files: formats, determinism, sides that do not meet, labelers who agree as people do, figures."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from collections import Counter
from itertools import combinations, islice

import numpy as np
import pytest

from rlhf_pipeline.data.formats import to_records
from rlhf_pipeline.data.lab import VERSION
from rlhf_pipeline.data.lab.candidates import WAYS, candidates
from rlhf_pipeline.data.lab.corpus import SPEAKERS
from rlhf_pipeline.data.lab.judge import WEIGHTS, Criterion, Verdict, judge, task_of
from rlhf_pipeline.data.lab.labelers import LABELERS, Labeler, agreement, ranks_of
from rlhf_pipeline.data.lab.sets import SETS, rows
from rlhf_pipeline.data.lab.summary import difference, mean, summary
from rlhf_pipeline.data.lab.tasks import CATEGORIES, make
from rlhf_pipeline.data.records import Demonstration, Message, Prompt, Ranking, Text
from rlhf_pipeline.errors import UserError


def _prompts(name: str, count: int) -> set[tuple[str, ...]]:
    """The prompts of a set, as texts of their turns."""
    out = set()
    for row in rows(name, count=count):
        turns = row["messages"][:-1] if "messages" in row else row["prompt"]
        out.add(tuple(turn["content"] for turn in turns))
    return out


def test_rows_become_the_records_that_the_readers_know() -> None:
    for row in rows("documents", count=200):
        assert isinstance(to_records(row, "text", "text")[0], Text)
        assert row["quality"] in ("good", "exercise", "mixed", "noisy")
    for name in ("demonstrations", "heldout_demonstrations"):
        for row in rows(name, count=100):
            assert isinstance(to_records(row, "demonstration", "messages")[0], Demonstration)
            assert judge(row["messages"][:-1], row["messages"][-1]["content"]).score == 1.0
    for name in ("rankings", "heldout_rankings", "heldout_gold_rankings"):
        for row in rows(name, count=100):
            prompt = tuple(Message(turn["role"], turn["content"]) for turn in row["prompt"])
            Ranking(prompt, tuple(row["responses"]), tuple(row["ranks"]), tuple(map(float, row["scores"])))
    for name in ("prompts", "heldout_prompts"):
        for row in rows(name, count=100):
            Prompt(tuple(Message(turn["role"], turn["content"]) for turn in row["prompt"]))
            assert (row["category"], row["task"]) == (task_of(row["prompt"]).category, task_of(row["prompt"]).type)


def test_row_i_is_the_same_whatever_the_size_and_differs_by_seed() -> None:
    for name in SETS:
        few, many = list(rows(name, count=5)), list(islice(rows(name, count=50), 5))
        assert few == many
        assert few == list(rows(name, count=5, seed=0)) != list(rows(name, count=5, seed=1))
        assert json.loads(json.dumps(few)) == few


def test_rows_do_not_depend_on_the_process() -> None:
    """String hashes differ between processes; nothing may depend on them."""
    code = (
        "import hashlib, json; from rlhf_pipeline.data.lab.sets import SETS, rows;"
        "print(hashlib.sha256(json.dumps([list(rows(n, count=30)) for n in SETS]).encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


def test_an_unknown_set_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"no set 'documnts'.*heldout_prompts"):
        next(rows("documnts", count=1))


@pytest.fixture(scope="module")
def held_out() -> set[tuple[str, ...]]:
    """The prompts of all held-out sets."""
    sizes = {"heldout_prompts": 500, "heldout_demonstrations": 500, "heldout_rankings": 100}
    return set().union(*(_prompts(name, count) for name, count in sizes.items()))


def test_no_heldout_prompt_is_in_a_training_set(held_out: set[tuple[str, ...]]) -> None:
    sizes = {"demonstrations": 5_000, "prompts": 4_000, "rankings": 200}
    training = set().union(*(_prompts(name, count) for name, count in sizes.items()))
    assert len(held_out) > 600 and len(training) > 5_000
    assert not held_out & training


def test_no_document_holds_a_heldout_prompt(held_out: set[tuple[str, ...]]) -> None:
    corpus = "\n".join(row["text"] for row in rows("documents", count=4_000))
    written = [_as_dialogue(turns, names, gap) for turns in held_out for names, gap in SPEAKERS]
    assert not [prompt for prompt in written if prompt in corpus]
    assert not [turns for turns in held_out if len(turns) == 1 and turns[0] in corpus]


def _as_dialogue(turns: tuple[str, ...], names: tuple[str, str], gap: str) -> str:
    return gap.join(f"{names[i % 2]}: {turn}" for i, turn in enumerate(turns))


def test_documents_hold_training_prompts_so_the_check_can_fail() -> None:
    corpus = "\n".join(row["text"] for row in rows("documents", count=3_000))
    for names, gap in SPEAKERS:
        written = [_as_dialogue(turns, names, gap) for turns in _prompts("prompts", 500)]
        assert sum(prompt in corpus for prompt in written) > 3


def test_all_categories_come_equally_often_and_all_qualities_of_documents() -> None:
    counts = Counter(row["category"] for row in rows("prompts", count=3_000))
    assert set(counts) == set(CATEGORIES) and all(240 < count < 360 for count in counts.values())
    qualities = Counter(row["quality"] for row in rows("documents", count=2_000))
    assert all(qualities[quality] > 40 for quality in ("good", "exercise", "mixed", "noisy"))


def test_rankings_have_four_to_nine_different_answers_and_dense_ranks() -> None:
    ks = Counter()
    for row in rows("rankings", count=400):
        ks[len(row["responses"])] += 1
        assert len(set(row["responses"])) == len(row["responses"])
        assert row["ranks"] == ranks_of(row["scores"]) and min(row["ranks"]) == 0
        assert all(1 <= score <= 7 for score in row["scores"])
        labeler = next(labeler for labeler in LABELERS if labeler.name == row["labeler"])
        assert labeler.scores(row["prompt"], row["responses"]) == row["scores"]
    assert set(ks) == set(range(4, 10)) and all(40 < count < 95 for count in ks.values())


def test_gold_rankings_are_the_same_answers_rated_by_the_judge() -> None:
    for gold, rated in zip(
        rows("heldout_gold_rankings", count=60, seed=3), rows("heldout_rankings", count=60, seed=3), strict=True
    ):
        same = ("prompt", "responses", "category")
        assert [gold[name] for name in same] == [rated[name] for name in same]
        assert gold.keys() == rated.keys() and gold["labeler"] == "gold"
        scores = [judge(gold["prompt"], response, finished=True).score for response in gold["responses"]]
        assert gold["scores"] == scores
        for (score, rank), (other, below) in combinations(zip(scores, gold["ranks"], strict=True), 2):
            assert (score > other) == (rank < below) and (score == other) == (rank == below)


# Of the first rows of each set, by the code before sets could share their seeds.
FROZEN = {
    "documents": "eeff52d4cc2d8892",
    "demonstrations": "47b01803f18c93c3",
    "rankings": "7bb858b5a2e04b15",
    "prompts": "b077a6c6f6ef22cb",
    "heldout_prompts": "ce5b3835af954cdc",
    "heldout_demonstrations": "bd33794c0ee56cbd",
    "heldout_rankings": "54297078e7f780b0",
}


def test_existing_sets_are_frozen() -> None:
    for name, digest in FROZEN.items():
        text = json.dumps(list(rows(name, count=20)))
        assert hashlib.sha256(text.encode()).hexdigest()[:16] == digest, name


def test_ranks_by_hand() -> None:
    assert ranks_of([3, 7, 3, 1, 7]) == [1, 0, 1, 2, 0]


def test_candidates_are_of_a_spread_of_qualities() -> None:
    rng = random.Random("spread")
    scores = []
    for _ in range(150):
        task = make(rng)
        answers = candidates(task, rng, 7)
        assert len(set(answers)) == 7
        scores += [judge(task.messages, answer).score for answer in answers]
    below, between, above = (np.histogram(scores, bins=[0, 0.3, 0.9, 1.01])[0] / len(scores)).tolist()
    assert below > 0.2 and between > 0.3 and above > 0.1


@pytest.mark.parametrize(
    ("way", "low", "high"),
    [
        ("_reference", 1, 1),
        ("_off_topic", 0, 0.1),
        ("_echo", 0, 0.05),
        ("_wrong_side", 0, 0.1),
        ("_extra", 0.1, 0.45),
        ("_swap", 0.2, 0.5),
    ],
)
def test_each_way_of_answering_has_the_quality_it_stands_for(way: str, low: float, high: float) -> None:
    rng = random.Random(way)
    answer = next(function for function, _ in WAYS if function.__name__ == way)
    tasks = [make(rng) for _ in range(200)]
    assert low <= sum(judge(t.messages, answer(t, rng)).score for t in tasks) / len(tasks) <= high


# --- labelers ---


def test_labelers_agree_as_often_as_people() -> None:
    """InstructGPT: 72.6 +/- 1.5 % between labelers."""
    found = agreement(rows("rankings", count=100))
    assert 0.70 <= found["agreement"] <= 0.76, found
    assert 0.15 < found["ties"] < 0.45 and found["pairs"] > 10_000


def test_agreement_by_hand() -> None:
    """Without noise and with the same taste two agree on all; with opposite taste on none."""
    row = {"prompt": "Where does Ada live?", "responses": ["Ada lives at the harbour.", "Nonsense", "Harbour."]}
    calm = Labeler(name="calm", noise=0.0)
    assert agreement([row], [calm, Labeler(name="other", noise=0.0)]) == {"agreement": 1.0, "pairs": 3.0, "ties": 0.0}
    # 7 for all points, 1 for none, 0.85 of 1 -> 1 + 6 * 0.85 = 6.1.
    assert calm.scores(row["prompt"], row["responses"]) == [7, 1, 6]


def test_a_labeler_is_stable_and_the_key_changes_only_the_noise() -> None:
    answers = ["Ada lives at the harbour.", "Ada lives at the mill.", "Harbour."]
    labeler = LABELERS[0]
    ratings = [labeler.scores("Where does Ada live?", answers, key) for key in range(60)]
    assert ratings[0] == labeler.scores("Where does Ada live?", answers, 0)
    assert len({tuple(rating) for rating in ratings}) > 10
    averages = np.mean(ratings, axis=0)
    assert averages[0] > averages[1] + 2 and averages[2] > averages[1] + 1


def test_tastes_differ() -> None:
    """Without noise: the strict one minds rudeness more than the even one, the wordy one likes length."""
    by_name = {labeler.name: labeler for labeler in LABELERS}
    prompt, rude = "Where does Ada live?", "Ada lives at the harbour, fool."
    calm = {name: Labeler(name=name, taste=one.taste, length=one.length, noise=0.0) for name, one in by_name.items()}
    assert calm["strict"].scores(prompt, [rude])[0] < calm["even"].scores(prompt, [rude])[0]
    long, short = "Ada keeps a donkey and lives at the mill.", "Mill."
    assert np.subtract(*calm["wordy"].scores(prompt, [long, short])) > np.subtract(
        *calm["terse"].scores(prompt, [long, short])
    )


# --- the judge is frozen ---

PINNED = {1: "ad3eec6ce5628757"}


def test_the_judge_is_pinned() -> None:
    """A change of the judge or the tasks changes every number: raise lab.VERSION, and pin the new digest here."""
    rng = random.Random("pinned")
    lines = []
    for i in range(400):
        task = make(rng, held_out=i % 2 == 0)
        for answer in candidates(task, rng, 5):
            verdict = judge(task.messages, answer, finished=i % 7 > 0)
            points = " ".join(f"{criterion.points:.6f}" for criterion in verdict.criteria)
            lines.append(f"{task.messages[-1].content}|{answer}|{points}")
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == PINNED[VERSION]


# --- figures ---


def _verdict(score: float, category: str) -> Verdict:
    criteria = tuple(
        Criterion(name=name, points=score * weight, out_of=weight, why="") for name, weight in WEIGHTS.items()
    )
    return Verdict(score=score, category=category, task="", criteria=criteria)


def test_summary_by_hand() -> None:
    verdicts = [_verdict(1.0, "chat"), _verdict(0.5, "chat"), _verdict(0.0, "refusal")]
    found = summary(verdicts)
    assert found.score.mean == pytest.approx(0.5) and found.score.count == 3
    assert {c: (m.mean, m.count) for c, m in found.by_category.items()} == {"chat": (0.75, 2), "refusal": (0.0, 1)}
    assert all(m.mean == pytest.approx(0.5) for m in found.by_criterion.values())
    assert list(found.by_criterion) == list(WEIGHTS)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """Means of 80 draws of a skewed score whose mean is 0.25; 95 % intervals should hold it about 95 times of 100."""
    rng = np.random.default_rng(0)
    hits = 0
    for i in range(200):
        found = mean(rng.beta(1, 3, size=80), seed=i)
        hits += found.low <= 0.25 <= found.high
    assert 180 <= hits <= 198


def test_paired_difference_by_hand() -> None:
    left = [_verdict(score, "chat") for score in (1.0, 0.8, 0.6)]
    right = [_verdict(score, "chat") for score in (0.9, 0.7, 0.5)]
    found = difference(left, right)
    assert (found.mean, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))
