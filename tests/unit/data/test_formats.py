"""Rows to records: every format, and everything that it makes."""

from __future__ import annotations

from typing import Any

import pytest
from helpers_formats import (
    ASKED,
    BINARIZED,
    HH,
    HH_PROMPT,
    HH_Q,
    LABELLED,
    LONGER,
    LONGER_PROMPT,
    NECTAR,
    OASST,
    OASST_P,
    OPENAI,
    PAIR,
    SAFE,
    SHAREGPT_PAIR,
    SHP,
    SUMMARIES,
    SUMMARIES_Q,
    SYSTEM,
    TLDR,
    ULTRA,
    WEBGPT,
    Q,
    answer,
    order,
    said,
    turns,
    user,
    wanted,
)

from rlhf_pipeline.data.formats import FORMATS, Kind, detect, to_records
from rlhf_pipeline.data.records import Demonstration, Feedback, Message, Opening, Prompt, Ranking, Record, Text

# kind, format, row, records
GOOD: list[tuple[Kind, str, dict[str, Any], list[Record]]] = [
    ("text", "text", {"text": "A document.", "label": 1}, [Text("A document.")]),
    # hh
    ("ranking", "hh", HH, [Ranking(HH_PROMPT, ("I am a punny one.", "I am not.\n\nSorry."), (0, 1))]),
    ("demonstration", "hh", HH, answer(HH_PROMPT, "I am a punny one.")),
    ("prompt", "hh", HH, [Prompt(HH_PROMPT)]),
    (
        "feedback",
        "hh",
        HH,
        [Feedback(HH_PROMPT, "I am a punny one.", True), Feedback(HH_PROMPT, "I am not.\n\nSorry.", False)],
    ),
    ("ranking", "hh", {"prompt": "q", "chosen": ASKED + " a", "rejected": ASKED + " b"}, order(HH_Q)),
    ("ranking", "hh_prompt", {"prompt": ASKED, "chosen": " a", "rejected": " b", "response": " a"}, order(HH_Q)),
    ("ranking", "hh_prompt", {"prompt": ASKED, "chosen": ASKED + " a", "rejected": ASKED + " b"}, order(HH_Q)),
    ("demonstration", "hh_response", {"prompt": ASKED + " ", "response": " a"}, answer(HH_Q)),
    ("demonstration", "hh_completion", {"prompt": ASKED, "completion": " a"}, answer(HH_Q)),
    ("prompt", "hh_prompt_only", {"prompt": ASKED}, [Prompt(HH_Q)]),
    # Pairs: plain, TRL explicit and implicit, standard and conversational, with scores
    ("ranking", "pair", PAIR | {"subset": "x"}, order()),
    ("demonstration", "pair", PAIR, answer()),
    ("prompt", "pair", PAIR, [Prompt(Q)]),
    ("feedback", "pair", PAIR, wanted()),
    ("ranking", "pair", PAIR | {"system": "s"}, order(SYSTEM)),
    ("ranking", "pair", {"prompt": [user()], "chosen": [said()], "rejected": [said("b")]}, order()),
    ("ranking", "pair", {"prompt": LONGER, "chosen": "a", "rejected": "b"}, order(LONGER_PROMPT)),
    (
        "ranking",
        "pair",
        {"prompt": LONGER, "chosen": [*LONGER, said()], "rejected": [*LONGER, said("b")]},
        order(LONGER_PROMPT),
    ),
    ("ranking", "pair", {"prompt": "q", "chosen": [said()], "rejected": [said("b")]}, order()),
    ("ranking", "pair", BINARIZED, order(scores=(8.0, 6.5))),
    ("demonstration", "pair", BINARIZED, answer()),
    ("ranking", "pair", BINARIZED | {"score_rejected": 8}, order(ranks=(0, 0), scores=(8.0, 8.0))),
    ("demonstration", "pair", BINARIZED | {"score_rejected": 8}, answer()),
    (
        "ranking",
        "pair",
        PAIR | {"metadata": {"score_chosen": 9, "score_rejected": 9}},
        order(ranks=(0, 0), scores=(9, 9)),
    ),
    ("ranking", "pair", PAIR | {"chosen_score": "2.5", "rejected_score": "-1"}, order(scores=(2.5, -1.0))),
    ("ranking", "pair", PAIR | {"chosen-rating": 5, "rejected-rating": 3, "metadata": None}, order(scores=(5.0, 3.0))),
    # A margin stands in for scores, or for their difference; it neither makes nor breaks a tie
    ("ranking", "pair", PAIR | {"margin": 2.5}, order(scores=(2.5, 0.0))),
    ("ranking", "pair", PAIR | {"margin": "3"}, order(scores=(3.0, 0.0))),
    ("ranking", "pair", PAIR | {"margin": 0}, order(scores=(0.0, 0.0))),
    ("ranking", "pair", PAIR | {"margin": None}, order()),
    ("ranking", "pair", PAIR | {"margin": ""}, order()),
    ("ranking", "pair", BINARIZED | {"margin": 1}, order(scores=(1.0, 0.0))),
    (
        "ranking",
        "pair",
        BINARIZED | {"score_rejected": 8, "margin": 1},
        order(ranks=(0, 0), scores=(8.0, 8.0)),
    ),
    ("demonstration", "pair", PAIR | {"margin": 1}, answer()),
    ("feedback", "pair", PAIR | {"margin": 1}, wanted()),
    (
        "ranking",
        "hh_prompt",
        {"prompt": ASKED, "chosen": "a", "rejected": "b", "margin": 1},
        order(HH_Q, scores=(1, 0)),
    ),
    ("ranking", "openai_pair", OPENAI | {"margin": 1}, order(scores=(1.0, 0.0))),
    ("ranking", "sharegpt_pair", SHAREGPT_PAIR | {"margin": 1}, order(LONGER_PROMPT, scores=(1.0, 0.0))),
    ("ranking", "shp", SHP | {"labels": 0, "margin": 4}, order(ranks=(1, 0), scores=(0.0, 4.0))),
    ("ranking", "webgpt", WEBGPT | {"margin": 4}, order(scores=(4.0, 0.0))),
    ("ranking", "safe_rlhf", SAFE | {"margin": 4}, order(scores=(4.0, 0.0))),
    ("ranking", "summaries", SUMMARIES | {"margin": 4}, order(SUMMARIES_Q, scores=(4.0, 0.0))),
    (
        "ranking",
        "pair",
        {"prompt": "p", "chosen": [*LONGER, said()], "rejected": [*LONGER, said("b")]},
        order(LONGER_PROMPT),
    ),
    (
        "ranking",
        "conversation_pair",
        {"chosen": [*LONGER, said()], "rejected": [*LONGER, said("b")]},
        order(LONGER_PROMPT),
    ),
    ("ranking", "text_pair", {"chosen": "q a", "rejected": "q b"}, order()),
    (
        "ranking",
        "text_pair",
        {"chosen": "The sky is blue.", "rejected": "The sky is black."},
        [Ranking((Message("user", "The sky is"),), ("blue.", "black."), (0, 1))],
    ),
    ("ranking", "openai_pair", OPENAI, order()),
    ("ranking", "sharegpt_pair", SHAREGPT_PAIR, order(LONGER_PROMPT)),
    ("demonstration", "sharegpt_pair", SHAREGPT_PAIR, answer(LONGER_PROMPT)),
    ("ranking", "messages_pair", {"messages": LONGER, "chosen": said(), "rejected": said("b")}, order(LONGER_PROMPT)),
    (
        "ranking",
        "alpaca_pair",
        {"instruction": "i", "input": "x", "chosen": "a", "rejected": "b"},
        order((Message("user", "i\n\nx"),)),
    ),
    ("ranking", "question_pair", {"system": "s", "question": "q", "chosen": "a", "rejected": "b"}, order(SYSTEM)),
    # K answers
    (
        "ranking",
        "kwise",
        {"prompt": "q", "responses": ["a", "b", "c", "d"], "scores": [1, 3.5, 1, -2], "models": ["w", "x", "y", "z"]},
        order(ranks=(1, 0, 1, 2), scores=(1.0, 3.5, 1.0, -2.0)),
    ),
    ("demonstration", "kwise", {"prompt": "q", "responses": ["a", "b"], "scores": [1, 2]}, answer(Q, "b")),
    ("demonstration", "kwise", {"prompt": "q", "responses": ["a", "b"], "scores": [2, 2]}, answer()),
    ("prompt", "kwise", {"prompt": LONGER, "responses": ["a", "b"], "scores": [1, 2]}, [Prompt(LONGER_PROMPT)]),
    (
        "ranking",
        "kwise",
        {"prompt": LONGER, "responses": ["a", "b", "c"], "scores": [4, 7, 4], "ranks": [2, 1, 2]},
        order(LONGER_PROMPT, (1, 0, 1), (4.0, 7.0, 4.0)),
    ),
    (
        "ranking",
        "kwise_ranks",
        {"prompt": "q", "responses": ["a", "b", "c"], "ranks": [4, 1, 4]},
        order(ranks=(1, 0, 1)),
    ),
    (
        "ranking",
        "kwise_ranks",
        {"prompt": "q", "responses": ["a", "b"], "ranks": [1, 0], "scores": None},
        order(ranks=(1, 0)),
    ),
    ("ranking", "ultrafeedback", ULTRA, order(ranks=(1, 0, 1), scores=(5.0, 7.5, 5.0))),
    ("demonstration", "ultrafeedback", ULTRA, answer(Q, "b")),
    # Data sets with fields of their own
    ("ranking", "webgpt", WEBGPT, order(scores=(1.0, -1.0))),
    ("ranking", "webgpt", WEBGPT | {"score_0": 0, "score_1": 0}, order(ranks=(0, 0), scores=(0.0, 0.0))),
    ("feedback", "webgpt", WEBGPT | {"score_0": -1, "score_1": 1}, [Feedback(Q, "a", False), Feedback(Q, "b", True)]),
    ("ranking", "shp", SHP, order()),
    ("ranking", "shp", SHP | {"labels": 0}, order(ranks=(1, 0))),
    ("ranking", "safe_rlhf", SAFE, order()),
    ("ranking", "safe_rlhf", SAFE | {"better_response_id": 1}, order(ranks=(1, 0))),
    ("ranking", "summaries", SUMMARIES, order(SUMMARIES_Q)),
    ("demonstration", "summaries", SUMMARIES | {"choice": 1}, answer(SUMMARIES_Q, "b")),
    ("ranking", "nectar", NECTAR, order(HH_Q, (1, 0, 2))),
    (
        "ranking",
        "oasst_tree",
        OASST,
        [
            Ranking(OASST_P, ("a", "o"), (1, 0)),
            Ranking(LONGER_PROMPT, ("b", "a"), (1, 0)),
        ],
    ),
    ("demonstration", "oasst_tree", OASST, [*answer(OASST_P, "o"), *answer(LONGER_PROMPT, "a")]),
    ("prompt", "oasst_tree", OASST, [Prompt(OASST_P), Prompt(LONGER_PROMPT)]),
    # Verdicts
    ("feedback", "messages_feedback", LABELLED, [Feedback(LONGER_PROMPT, "a", False)]),
    ("demonstration", "messages_feedback", LABELLED | {"label": True}, answer(LONGER_PROMPT)),
    ("prompt", "messages_feedback", LABELLED, [Prompt(LONGER_PROMPT)]),
    ("feedback", "sharegpt_feedback", {"conversations": turns("q", "a"), "label": True}, [Feedback(Q, "a", True)]),
    (
        "feedback",
        "alpaca_feedback",
        {"instruction": "q", "input": "", "output": "a", "kto_tag": False},
        [Feedback(Q, "a", False)],
    ),
    ("feedback", "completion_feedback", {"prompt": "q", "completion": "a", "label": True}, [Feedback(Q, "a", True)]),
    (
        "feedback",
        "completion_feedback",
        {"prompt": "q", "completion": "a", "label": "False"},
        [Feedback(Q, "a", False)],
    ),
    (
        "feedback",
        "completion_feedback",
        {"prompt": [user()], "completion": [said()], "label": False},
        [Feedback(Q, "a", False)],
    ),
    ("feedback", "response_feedback", {"prompt": "q", "response": "a", "label": True}, [Feedback(Q, "a", True)]),
    # Conversations
    (
        "demonstration",
        "messages",
        {
            "messages": [
                {"role": "developer", "content": "s"},
                user([{"type": "text", "text": "u"}, {"type": "text", "text": "v"}]),
                said(weight=0),
                user("w") | {"name": "ignored"},
                said("b", weight=1, tool_calls=[], refusal=None),
            ]
        },
        [
            Demonstration(
                (
                    Message("system", "s"),
                    Message("user", "uv"),
                    Message("assistant", "a", scored=False),
                    Message("user", "w"),
                    Message("assistant", "b"),
                )
            )
        ],
    ),
    ("prompt", "messages", {"messages": [*LONGER, said()]}, [Prompt(LONGER_PROMPT)]),
    ("prompt", "messages", {"messages": LONGER}, [Prompt(LONGER_PROMPT)]),
    ("demonstration", "sharegpt", {"conversations": turns("q", "a"), "system": "s"}, answer(SYSTEM)),
    (
        "demonstration",
        "sharegpt",
        {"conversations": [{"from": "system", "value": "s"}, *turns("q", "a")], "system_prompt": "t"},
        answer(SYSTEM),
    ),
    ("demonstration", "sharegpt", {"conversations": turns("q", "a"), "system": None}, answer()),
    ("prompt", "sharegpt", {"conversations": turns("p", "o", "q", "a")}, [Prompt(LONGER_PROMPT)]),
    (
        "demonstration",
        "alpaca",
        {"instruction": "Add.", "input": "1 and 2", "output": "a"},
        answer((Message("user", "Add.\n\n1 and 2"),)),
    ),
    ("demonstration", "alpaca", {"instruction": "q", "input": "", "output": "a"}, answer()),
    ("demonstration", "alpaca", {"instruction": "q", "output": "a", "input": None, "history": None}, answer()),
    (
        "demonstration",
        "alpaca",
        {"instruction": "q", "output": "a", "system": "s", "history": [["p", "o"]]},
        answer((Message("system", "s"), Message("user", "p"), Message("assistant", "o"), *Q)),
    ),
    ("prompt", "alpaca", {"instruction": "q", "output": "a"}, [Prompt(Q)]),
    (
        "demonstration",
        "dolly",
        {"instruction": "i", "context": "x", "response": "a", "category": "qa"},
        answer((Message("user", "i\n\nx"),)),
    ),
    ("demonstration", "prompt_response", {"prompt": "q", "response": "a"}, answer()),
    ("demonstration", "prompt_completion", {"prompt": "q", "completion": " a"}, answer(Q, " a")),
    ("demonstration", "prompt_completion", {"prompt": LONGER, "completion": [said()]}, answer(LONGER_PROMPT)),
    ("prompt", "prompt_completion", {"prompt": "q", "completion": "a"}, [Prompt(Q)]),
    ("demonstration", "question_response", {"system_prompt": "s", "question": "q", "response": "a"}, answer(SYSTEM)),
    ("demonstration", "question_answer", {"question": "q", "answer": "a"}, answer()),
    ("demonstration", "tldr", TLDR, answer((Message("user", "q\n\nTL;DR:"),))),
    ("prompt", "tldr", TLDR, [Prompt((Message("user", "q\n\nTL;DR:"),))]),
    ("demonstration", "truthful_qa", {"Type": "t", "Question": "q", "Best Answer": "a"}, answer()),
    ("prompt", "truthful_qa", {"Question": "q", "Best Answer": "a"}, [Prompt(Q)]),
    ("prompt", "real_toxicity", {"prompt": {"text": "q", "toxicity": 0.1}, "continuation": {"text": "x"}}, [Prompt(Q)]),
    ("prompt", "prompt", {"prompt": "q", "ground_truth": "x"}, [Prompt(Q)]),
    ("prompt", "prompt", {"prompt": LONGER}, [Prompt(LONGER_PROMPT)]),
    ("prompt", "opening", {"text": "Once upon", "prompt": "q"}, [Opening("Once upon")]),
]


@pytest.mark.parametrize(("kind", "format", "row", "expected"), GOOD)
def test_records_of_a_row(kind: Kind, format: str, row: dict[str, Any], expected: list[Record]) -> None:
    assert to_records(row, kind, format) == expected
    if not FORMATS[format].named_only:
        assert detect(row, kind) == format


def test_every_format_and_everything_that_it_makes_is_tried() -> None:
    tried = {(kind, format) for kind, format, _, _ in GOOD}
    assert {format for _, format in tried} == set(FORMATS) - {"hh_rejected"}
    for name, format in FORMATS.items():
        assert format.text or format.demonstration or format.ranking or format.feedback or format.prompt, name


def test_the_rejected_answer_as_a_demonstration_must_be_asked_for() -> None:
    assert to_records(HH, "demonstration", "hh_rejected") == answer(HH_PROMPT, "I am not.\n\nSorry.")
    assert detect(HH, "demonstration") == "hh"


def test_every_ranking_can_be_read_as_demonstrations_without_being_taken_for_something_else() -> None:
    """The reward model's zero is found on the preferred answers of its own data, whose format is told by the row."""
    for kind, format, row, _ in GOOD:
        if kind == "ranking" and not FORMATS[format].named_only:
            assert detect(row, "demonstration") == format
            found = [one for one in to_records(row, "demonstration", format) if isinstance(one, Demonstration)]
            rankings = [one for one in to_records(row, "ranking", format) if isinstance(one, Ranking)]
            best = [one.responses[one.ranks.index(0)] for one in rankings]
            assert [one.messages[-1].content for one in found] == best
