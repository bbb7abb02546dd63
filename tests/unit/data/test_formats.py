from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rlhf_pipeline.data.formats import FORMATS, Kind, detect, renamed, to_records
from rlhf_pipeline.data.records import BadRow, Demonstration, Feedback, Message, Opening, Prompt, Ranking, Record, Text
from rlhf_pipeline.errors import UserError

HH = {
    "chosen": "\n\nHuman: hello there\n\nAssistant: Hi! \n\nHuman: a pun?\n\nAssistant: I am a punny one.",
    "rejected": "\n\nHuman: hello there\n\nAssistant: Hi! \n\nHuman: a pun?\n\nAssistant: I am not.\n\nSorry.",
}
HH_PROMPT = (
    Message("user", "hello there", scored=False),
    Message("assistant", "Hi!", scored=False),
    Message("user", "a pun?", scored=False),
)
ASKED = "\n\nHuman: q\n\nAssistant:"
Q = (Message("user", "q"),)
HH_Q = (Message("user", "q", scored=False),)
SYSTEM = (Message("system", "s"), *Q)


def user(content: Any = "q") -> dict[str, Any]:
    return {"role": "user", "content": content}


def said(content: Any = "a", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def turns(*values: str, first: str = "human") -> list[dict[str, str]]:
    """ShareGPT's turns, by turns human and gpt."""
    names = ["human", "gpt"] if first == "human" else ["gpt", "human"]
    return [{"from": names[i % 2], "value": value} for i, value in enumerate(values)]


def answer(prompt: tuple[Message, ...] = Q, response: str = "a") -> list[Record]:
    return [Demonstration((*prompt, Message("assistant", response)))]


def order(
    prompt: tuple[Message, ...] = Q, ranks: tuple[int, ...] = (0, 1), scores: tuple[float, ...] | None = None
) -> list[Record]:
    return [Ranking(prompt, ("a", "b", "c", "d")[: len(ranks)], ranks, scores)]


def wanted(prompt: tuple[Message, ...] = Q) -> list[Record]:
    return [Feedback(prompt, "a", True), Feedback(prompt, "b", False)]


PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}
BINARIZED = {"prompt": "q", "prompt_id": "x", "chosen": [user(), said()], "rejected": [user(), said("b")]}
BINARIZED |= {"messages": [user(), said()], "score_chosen": 8.0, "score_rejected": 6.5}
LONGER = [user("p"), said("o"), user()]
LONGER_PROMPT = (Message("user", "p"), Message("assistant", "o", scored=False), *Q)
LABELLED = {"messages": [*LONGER, said()], "label": False}
OPENAI = {
    "input": {"messages": [user()], "tools": [], "parallel_tool_calls": True},
    "preferred_output": [said()],
    "non_preferred_output": [said("b")],
}
SHAREGPT_PAIR = {
    "conversations": turns("p", "o", "q"),
    "chosen": {"from": "gpt", "value": "a"},
    "rejected": {"from": "gpt", "value": "b"},
}
ULTRA = {
    "source": "x",
    "instruction": "q",
    "completions": [
        {"model": "m", "response": "a", "overall_score": 5.0},
        {"model": "n", "response": "b", "overall_score": 7.5},
        {"model": "o", "response": "c", "overall_score": 5.0},
    ],
}
TLDR = {"": "0", "query": "q\n\nTL;DR:", "postprocessed_response": "  other", "reference_responses": "  a"}

WEBGPT = {"question": {"full_text": "q", "id": "x"}, "answer_0": "a", "answer_1": "b", "score_0": 1.0, "score_1": -1.0}
SHP = {"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 1, "score_A": 9, "score_B": 3}
SAFE = {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 0, "safer_response_id": 1}
NECTAR = {
    "prompt": ASKED + " ",
    "answers": [{"answer": "a", "rank": 2.0}, {"answer": "b", "rank": 1.0}, {"answer": "c", "rank": 3.0}],
}
SUMMARIES = {
    "info": {"id": "x", "post": "It rained.", "title": "Rain", "subreddit": "r/weather", "article": None},
    "summaries": [{"text": " a", "policy": "ref"}, {"text": " b", "policy": "ppo"}],
    "choice": 0,
}
SUMMARIES_Q = (Message("user", "SUBREDDIT: r/weather\n\nTITLE: Rain\n\nPOST: It rained.\n\nTL;DR:"),)


def oasst(role: str, text: str, *replies: dict[str, Any], rank: int | None = None) -> dict[str, Any]:
    return {"role": role, "text": text, "rank": rank, "replies": list(replies)}


OASST = {
    "message_tree_id": "x",
    "prompt": oasst(
        "prompter",
        "p",
        oasst("assistant", "a", rank=1),
        oasst(
            "assistant",
            "o",
            oasst("prompter", "q", oasst("assistant", "b", rank=1), oasst("assistant", "a", rank=0)),
            oasst("prompter", "nobody ranked these", oasst("assistant", "a"), oasst("assistant", "b")),
            rank=0,
        ),
        oasst("assistant", "not ranked"),
    ),
}
OASST_P = (Message("user", "p"),)

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


CUT = {"chosen": [user("p"), said()], "rejected": [user(), said("b")]}


@pytest.mark.parametrize(
    ("kind", "format", "row", "reason"),
    [
        ("text", "text", {"txt": "a"}, "no field 'text': there is txt"),
        ("text", "text", {"text": None}, "text is not a string: NoneType"),
        ("demonstration", "messages", {"messages": "hi"}, "messages is not a list: str"),
        ("demonstration", "messages", {"messages": ["hi"]}, "a message is not an object: str"),
        ("demonstration", "messages", {"messages": [{"role": "user"}]}, "no field 'content': there is role"),
        ("demonstration", "messages", {"messages": [user(7)]}, "content is not a string: int"),
        ("demonstration", "messages", {"messages": [user([{"type": "text"}])]}, "no field 'text': there is type"),
        (
            "demonstration",
            "messages",
            {"messages": [user([{"type": "image_url", "image_url": "x"}])]},
            "a part of a message is not text: image_url",
        ),
        ("demonstration", "messages", {"messages": [user(["x"])]}, "a part of a message is not text: str"),
        (
            "demonstration",
            "messages",
            {"messages": [user(), {"role": "tool", "content": "21"}, said()]},
            "a tool's message, or a call of a tool: tool",
        ),
        (
            "demonstration",
            "messages",
            {"messages": [user(), said(None, tool_calls=[{"type": "function"}])]},
            "a tool's message, or a call of a tool: assistant",
        ),
        (
            "demonstration",
            "sharegpt",
            {"conversations": [*turns("q"), {"from": "function_call", "value": "{}"}]},
            "a tool's message, or a call of a tool: function_call",
        ),
        ("demonstration", "sharegpt", {"conversations": [{"from": "bard", "value": "a"}]}, "unknown role: 'bard'"),
        (
            "demonstration",
            "sharegpt",
            {"conversations": turns("q", "a", "r")},
            "the last message is not the assistant's",
        ),
        ("demonstration", "sharegpt", {"conversations": turns("a", first="gpt")}, "the prompt has no user message"),
        ("demonstration", "sharegpt", {"conversations": turns("q", "a"), "system": 7}, "system is not a string: int"),
        (
            "demonstration",
            "messages",
            {"messages": [user(), said(weight=0.5)]},
            "a message's weight is neither 0 nor 1: 0.5",
        ),
        ("demonstration", "messages", {"messages": []}, "the last message is not the assistant's"),
        ("prompt", "messages", {"messages": []}, "the prompt has no user message"),
        ("demonstration", "alpaca", {"instruction": "i"}, "no field 'output': there is instruction"),
        ("demonstration", "alpaca", {"instruction": "i", "output": " "}, "the assistant message is empty"),
        (
            "demonstration",
            "alpaca",
            {"instruction": "i", "output": "o", "history": ["p"]},
            "history is not a list of pairs",
        ),
        ("demonstration", "prompt_response", {"prompt": "", "response": "r"}, "the user message is empty"),
        ("demonstration", "prompt_response", {"prompt": "q", "response": 3}, "response is not a string: int"),
        ("demonstration", "hh", {"chosen": ASKED + " b"}, "no field 'rejected'"),
        (
            "ranking",
            "hh",
            {"chosen": "a", "rejected": "b"},
            "chosen and rejected share no beginning up to an Assistant",
        ),
        (
            "ranking",
            "hh",
            {"chosen": f"{ASKED} b\n\nHuman: c\n\nAssistant: d", "rejected": f"{ASKED} e"},
            "chosen and rejected part before their last turn",
        ),
        (
            "ranking",
            "hh",
            {"chosen": f"Preface{ASKED} b", "rejected": f"Preface{ASKED} c"},
            "the dialogue does not begin with a turn: 'Preface'",
        ),
        ("demonstration", "hh", {"chosen": f"{ASKED} ", "rejected": f"{ASKED} c"}, "the assistant message is empty"),
        ("ranking", "hh_prompt", PAIR, "the prompt does not end with Assistant:"),
        ("ranking", "pair", PAIR | {"chosen": " "}, "a response is empty"),
        ("ranking", "pair", PAIR | {"chosen": {"text": "a"}}, "no field 'role'"),
        ("ranking", "pair", PAIR | {"prompt": {"text": "q"}}, "prompt is not a string: dict"),
        (
            "ranking",
            "pair",
            {"prompt": [user()], "chosen": [said(), user()], "rejected": "b"},
            "chosen is not one answer",
        ),
        ("ranking", "pair", CUT | {"prompt": "p"}, "chosen and rejected part before their last turn"),
        ("ranking", "pair", BINARIZED | {"prompt": "another"}, "the prompt is not in the conversation of chosen"),
        ("ranking", "pair", PAIR | {"score_chosen": 1}, "only one of two answers has a score: score_chosen"),
        (
            "ranking",
            "pair",
            PAIR | {"score_chosen": "good", "score_rejected": 1},
            "score_chosen is not a number: 'good'",
        ),
        (
            "ranking",
            "pair",
            PAIR | {"score_chosen": 1, "score_rejected": 2},
            "the scores contradict the preference: chosen 1, rejected 2",
        ),
        ("feedback", "pair", BINARIZED | {"score_rejected": 8}, "a tie says of no answer that it was wanted"),
        ("ranking", "conversation_pair", CUT, "chosen and rejected part before their last turn"),
        ("ranking", "text_pair", {"chosen": "blue", "rejected": "black"}, "chosen and rejected share no beginning"),
        ("ranking", "openai_pair", OPENAI | {"input": "q"}, "input is not an object: str"),
        ("ranking", "kwise", {"prompt": "q", "responses": ["a", "b"]}, "no field 'scores' or 'ranks'"),
        ("ranking", "kwise", {"prompt": "q", "responses": "ab", "scores": [1, 2]}, "responses is not a list: str"),
        ("ranking", "kwise", {"prompt": "q", "responses": ["a"], "scores": [1]}, "fewer than two responses"),
        ("ranking", "kwise", {"prompt": "q", "responses": ["a", 7], "scores": [1, 2]}, "a response is not a string"),
        ("ranking", "kwise", {"prompt": "q", "responses": ["a", "b"], "scores": [1]}, "ranks do not fit the responses"),
        (
            "ranking",
            "kwise",
            {"prompt": "q", "responses": ["a", "b"], "scores": [1, 2], "ranks": [0]},
            "ranks do not fit the responses",
        ),
        (
            "ranking",
            "kwise",
            {"prompt": "q", "responses": ["a", "b"], "scores": [1, 2], "ranks": [0, 1]},
            "ranks and scores disagree: by scores (1, 0), by ranks (0, 1)",
        ),
        (
            "ranking",
            "kwise",
            {"prompt": "q", "responses": ["a", "b"], "scores": [1, 2], "ranks": [0, 0]},
            "ranks and scores disagree",
        ),
        (
            "ranking",
            "kwise",
            {"prompt": "q", "responses": ["a", "b"], "scores": [1, None]},
            "a value of scores is not a number: None",
        ),
        (
            "ranking",
            "kwise",
            {"prompt": "q", "responses": ["a", "b"], "scores": [1, float("nan")]},
            "a value of scores is not a finite number",
        ),
        ("demonstration", "kwise", {"prompt": "q", "responses": [], "scores": []}, "fewer than two responses"),
        ("ranking", "ultrafeedback", {"instruction": "q", "completions": [{}, {}]}, "no field 'overall_score'"),
        (
            "ranking",
            "ultrafeedback",
            {"instruction": "q", "completions": ["a"]},
            "completions is not a list of objects",
        ),
        (
            "ranking",
            "oasst_tree",
            OASST | {"prompt": OASST["prompt"] | {"replies": []}},
            "no question of the tree has two",
        ),
        ("ranking", "webgpt", WEBGPT | {"score_1": None}, "score_1 is not a number: None"),
        ("ranking", "webgpt", WEBGPT | {"score_1": float("nan")}, "score_1 is not a finite number"),
        ("ranking", "shp", SHP | {"labels": 2}, "labels is not true or false: 2"),
        ("ranking", "shp", SHP | {"labels": None}, "labels is not true or false: None"),
        ("ranking", "shp", SHP | {"human_ref_B": "a "}, "two responses are the same: numbers 1 and 2, 'a'"),
        ("ranking", "safe_rlhf", SAFE | {"better_response_id": 5}, "better_response_id is not true or false: 5"),
        ("ranking", "safe_rlhf", SAFE | {"better_response_id": -1}, "better_response_id is not true or false: -1"),
        ("ranking", "summaries", SUMMARIES | {"choice": 7}, "choice is not true or false: 7"),
        ("ranking", "summaries", SUMMARIES | {"choice": "left"}, "choice is not true or false: 'left'"),
        ("demonstration", "summaries", SUMMARIES | {"choice": 1, "summaries": [{"text": "a"}]}, "not two summaries: 1"),
        ("feedback", "summaries", SUMMARIES | {"summaries": [{"text": x} for x in "abc"]}, "not two summaries: 3"),
        ("ranking", "nectar", NECTAR | {"answers": [{"answer": "a", "rank": True}]}, "rank is not a number: True"),
        ("ranking", "nectar", NECTAR | {"answers": [{"answer": "a", "rank": 1}]}, "fewer than two responses"),
        ("ranking", "pair", PAIR | {"chosen": "b"}, "two responses are the same: numbers 1 and 2, 'b'"),
        ("ranking", "pair", PAIR | {"margin": -0.5}, "the margin is negative: -0.5"),
        ("ranking", "pair", PAIR | {"margin": "much"}, "margin is not a number: 'much'"),
        ("ranking", "pair", PAIR | {"margin": True}, "margin is not a number: True"),
        ("ranking", "pair", PAIR | {"margin": float("nan")}, "margin is not a finite number"),
        ("ranking", "pair", PAIR | {"margin": 10**400}, "margin is not a number: 1000"),
        ("demonstration", "messages_feedback", LABELLED, "the answer was not wanted"),
        ("feedback", "messages_feedback", LABELLED | {"label": "perhaps"}, "label is not true or false: 'perhaps'"),
        ("feedback", "messages_feedback", LABELLED | {"label": 2}, "label is not true or false: 2"),
        (
            "feedback",
            "messages_feedback",
            {"messages": LONGER, "label": True},
            "the last message is not the assistant's",
        ),
        ("feedback", "completion_feedback", {"prompt": "q", "completion": "a"}, "no field 'label'"),
        ("prompt", "prompt", {"prompt": [said()]}, "the prompt has no user message"),
        ("prompt", "prompt", {"prompt": [user(), said()]}, "the prompt ends with the assistant's message"),
        ("prompt", "real_toxicity", {"prompt": "q"}, "prompt is not an object: str"),
    ],
)
def test_bad_row(kind: Kind, format: str, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow) as error:
        to_records(row, kind, format)
    assert str(error.value).startswith(reason)


# Recognising


@pytest.mark.parametrize(
    ("kind", "row", "format"),
    [
        ("ranking", PAIR, "pair"),
        ("ranking", HH, "hh"),
        ("ranking", HH | {"prompt": "a pun?"}, "hh"),
        ("ranking", PAIR | {"chosen": "Human: no\n\nAssistant: a", "rejected": "b"}, "pair"),  # one dialogue is none
        ("ranking", PAIR | {"chosen": "Assistant: a", "rejected": "The Human: b\n\nAssistant:"}, "pair"),
        ("demonstration", {"prompt": f"{ASKED} and then?", "response": "a"}, "prompt_response"),  # quotes a dialogue
        ("ranking", PAIR | {"conversations": "an id"}, "pair"),
        ("ranking", BINARIZED, "pair"),
        ("ranking", {"chosen": BINARIZED["chosen"], "rejected": BINARIZED["rejected"]}, "conversation_pair"),
        ("demonstration", PAIR | {"response": "x"}, "pair"),
        ("demonstration", {"prompt": "q", "messages": [user(), said()]}, "messages"),
        ("demonstration", {"messages": [user(), said()], "label": 3}, "messages"),  # a class, not a verdict
        ("demonstration", {"messages": [user(), said()], "label": True}, "messages_feedback"),
        ("demonstration", {"messages": "[...]", "prompt": "q", "completion": "a"}, "prompt_completion"),
        ("demonstration", {"text": "x", "instruction": "i", "input": "", "output": "o"}, "alpaca"),
        ("text", {"text": "x", "instruction": "i", "input": "", "output": "o"}, "text"),
        ("prompt", {"prompt": "q", "completion": None}, "prompt"),  # as Parquet fills columns up
        ("prompt", {"prompt": "Human: is a word", "response": "a"}, "prompt_response"),
        ("feedback", {"prompt": "q", "completion": "a", "label": True, "chosen": "a", "rejected": "b"}, "pair"),
    ],
)
def test_shapes_decide_where_names_overlap(kind: Kind, row: dict[str, Any], format: str) -> None:
    assert detect(row, kind) == format


def test_two_plain_texts_are_not_taken_for_a_pair_with_a_hidden_prompt() -> None:
    with pytest.raises(
        UserError, match=r"no format makes a ranking of rows with the fields query \(a string\)"
    ) as error:
        detect({"query": "q", "chosen": "q a", "rejected": "q b"}, "ranking")
    lines = str(error.value).splitlines()
    assert "  pair lacks prompt (a string or messages)" in lines
    assert lines[-1].startswith("Say which of your columns are meant with data.columns={our field: your column}, or ")


def test_nothing_fits() -> None:
    row = {"prompt": {"text": "q"}, "responses": ["a", "b"], "n": 3, "x": None}
    with pytest.raises(UserError) as error:
        detect(row, "ranking")
    assert str(error.value).startswith(
        "no format makes a ranking of rows with the fields prompt (an object), responses (strings), n (a number), "
        "x (empty). Nearest:\n  kwise lacks scores (numbers), prompt as a string or messages\n"
    )


def test_unknown_format_and_a_kind_it_cannot_make() -> None:
    with pytest.raises(UserError, match=r"unknown format 'hhh'; known are text, hh_prompt, hh, "):
        to_records({}, "text", "hhh")
    with pytest.raises(UserError, match=r"the format 'alpaca' makes no ranking; hh_prompt, hh, pair, "):
        to_records({}, "ranking", "alpaca")


# Columns of one's own


@pytest.mark.parametrize(
    ("kind", "columns", "row", "format", "expected"),
    [
        ("text", {"text": "review"}, {"review": "x", "id": 1}, "text", [Text("x")]),
        (
            "demonstration",
            {"prompt": "Question", "response": "Best Answer"},
            {"Question": "q", "Best Answer": "a", "chosen": "x", "rejected": "y"},  # another format must not get in
            "prompt_response",
            answer(),
        ),
        (
            "ranking",
            {"prompt": "q", "chosen": "x", "rejected": "y", "chosen_score": "s.0", "rejected_score": "s.1"},
            {"q": "q", "x": "a", "y": "b", "s": {"0": 2, "1": 1}, "prompt": "no"},
            "pair",
            order(scores=(2.0, 1.0)),
        ),
        ("prompt", {"prompt": "prompt.text"}, {"prompt": {"text": "q"}}, "prompt", [Prompt(Q)]),
        ("ranking", {"better_response_id": "safer_response_id"}, SAFE, "safe_rlhf", order(ranks=(1, 0))),
        ("prompt", {"prompt": "a.b"}, {"a.b": "q", "a": {"b": "x"}}, "prompt", [Prompt(Q)]),  # its very name goes first
        (
            "demonstration",
            {"prompt": "response", "response": "prompt"},
            {"prompt": "a", "response": "q"},
            None,
            answer(),
        ),
    ],
)
def test_columns(
    kind: Kind, columns: dict[str, str], row: dict[str, Any], format: str | None, expected: list[Record]
) -> None:
    found = detect(row, kind, columns=columns)
    assert found == (format or "prompt_response")
    assert to_records(row, kind, found, columns=columns) == expected


def test_renamed_takes_the_old_name_away_and_leaves_the_row_as_it_is() -> None:
    row = {"a": 1, "b": 2}
    assert renamed(row, {"prompt": "a"}) == {"b": 2, "prompt": 1} and row == {"a": 1, "b": 2}
    assert renamed(row, None) == row


def test_a_column_that_is_not_there() -> None:
    row = {"Question": "q", "meta": {"id": "x"}, "n": 7}
    with pytest.raises(BadRow, match=r"no column 'question': there is Question, meta, n"):
        to_records(row, "prompt", "prompt", columns={"prompt": "question"})
    with pytest.raises(UserError, match=r"data.columns: no column 'question': there is Question, meta, n"):
        detect(row, "prompt", columns={"prompt": "question"})
    with pytest.raises(BadRow, match=r"no column 'meta.name': there is id"):
        renamed(row, {"prompt": "meta.name"})
    with pytest.raises(BadRow, match=r"no column 'n.x': it is a number"):
        renamed(row, {"prompt": "n.x"})


def test_a_field_that_no_format_has() -> None:
    with pytest.raises(UserError, match=r"data.columns: no format has a field 'promt'; known are .*, prompt, "):
        renamed({"a": "q"}, {"promt": "a"})
    with pytest.raises(
        UserError, match=r"data.columns: no format makes a ranking of the fields prompt, output together"
    ):
        detect({"a": "q", "b": "x"}, "ranking", columns={"prompt": "a", "output": "b"})


# The documentation


def test_the_documented_rows_are_recognised_and_every_format_is_there() -> None:
    page = (Path(__file__).parents[3] / "docs" / "data-formats.md").read_text(encoding="utf-8")
    section = page.split("## What rows mean")[1].split("\n## ")[0]
    table = [line.split("|") for line in section.splitlines() if line.startswith("| `")]
    kinds = {name: line[3] for line in table for name in re.findall(r"`(\w+)`", line[1])}
    assert list(kinds) == list(FORMATS)
    letters: dict[Kind, str] = {"demonstration": "D", "ranking": "R", "feedback": "F", "prompt": "P", "text": "text"}
    for name, format in FORMATS.items():
        made = {kind for kind in letters if format.adapter(kind)}
        assert {kind for kind, letter in letters.items() if re.search(rf"\b{letter}\b", kinds[name])} == made, name
    rows = [json.loads(line) for line in section.split("```json\n")[1].split("\n```")[0].splitlines()]
    found = {detect(row, kind) for row in rows for kind in letters if _is_made(row, kind)}
    assert found == {name for name, format in FORMATS.items() if not format.named_only}
    for row in rows:
        assert any(_is_made(row, kind) for kind in letters) or to_records(row, "ranking", "text_pair")


def _is_made(row: dict[str, Any], kind: Kind) -> bool:
    try:
        return bool(to_records(row, kind, detect(row, kind)))
    except (UserError, BadRow):  # a row of unwanted feedback is no demonstration
        return False


@pytest.mark.parametrize("row", [PAIR | {"by": 2}, OPENAI | {"by": 2}, SHP | {"by": 2}])
def test_a_margin_may_have_another_name(row: dict[str, Any]) -> None:
    columns = {"margin": "by"}
    (found,) = to_records(row, "ranking", detect(row, "ranking", columns=columns), columns=columns)
    assert isinstance(found, Ranking) and found.scores == (2.0, 0.0)


def test_every_ranking_can_be_read_as_demonstrations_without_being_taken_for_something_else() -> None:
    """The reward model's zero is found on the preferred answers of its own data, whose format is told by the row."""
    for kind, format, row, _ in GOOD:
        if kind == "ranking" and not FORMATS[format].named_only:
            assert detect(row, "demonstration") == format
            found = [one for one in to_records(row, "demonstration", format) if isinstance(one, Demonstration)]
            rankings = [one for one in to_records(row, "ranking", format) if isinstance(one, Ranking)]
            best = [one.responses[one.ranks.index(0)] for one in rankings]
            assert [one.messages[-1].content for one in found] == best
