"""Rows of the data formats, and the records they come to."""

from __future__ import annotations

from typing import Any

from rlhf_pipeline.data.records import Demonstration, Feedback, Message, Ranking, Record

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
