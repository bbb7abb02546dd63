"""The answers that were judged, side by side: one entry a prompt, of everything that judged the same answers to it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_pipeline.report.collect import Evaluation
from rlhf_pipeline.report.values import entries, mapping, number

GOLD = "gold"  # the judge whose winner has the highest score
MOST_BYTES = 1_500_000  # of the samples in the page


def samples(evaluations: Sequence[Evaluation], *, limit: int) -> dict[str, Any]:
    """Fit for JSON; {} without any.

    A sample has the prompt's messages, its category, each system's answer, rulings, and by judge who won: the system that
    no other reaches (by the gold judge in score, by others in the mean of its rulings), or "" where several share the
    first place. At most `limit` are kept, and as many as fit the page, of every category in turn.
    """
    found: dict[tuple[str, str, int], dict[str, Any]] = {}
    for evaluation in evaluations:
        seen: dict[str, int] = {}
        for row in evaluation.rows:
            prompt = json.dumps(row.get("prompt"), sort_keys=True)
            nth = seen[prompt] = seen.get(prompt, -1) + 1  # the same prompt may stand in a set twice
            _add(found, (evaluation.place, prompt, nth), row, evaluation)
    whole = [_finished(one) for one in found.values()]
    kept = _spread(whole, limit)
    while kept and len(json.dumps(kept, ensure_ascii=False).encode("utf-8", "surrogatepass")) > MOST_BYTES:
        kept = _spread(whole, len(kept) * 9 // 10)
    if not kept:
        return {}
    return {
        "samples": kept,
        "total": len(whole),
        "systems": list(dict.fromkeys(answer["system"] for one in kept for answer in one["answers"])),
        "judges": list(dict.fromkeys(judge for one in kept for judge in one["winners"])),
        "categories": sorted({one["category"] for one in kept if one["category"]}),
    }


def _add(found: dict[Any, dict[str, Any]], key: tuple[str, str, int], row: Mapping[str, Any], of: Evaluation) -> None:
    """Join a row of verdicts to what is known of its prompt; where a system said something else, it is another sample."""
    answers = {str(name): mapping(one) for name, one in mapping(row.get("answers")).items()}
    known = found.get(key)
    if known is not None and any(
        name in known["answers"] and known["answers"][name]["text"] != str(one.get("response", ""))
        for name, one in answers.items()
    ):
        key = (f"{key[0]}/{of.label}", *key[1:])
    sample = found.setdefault(
        key, {"prompt": _messages(row.get("prompt")), "category": "", "answers": {}, "rulings": []}
    )
    sample["category"] = sample["category"] or str(row.get("category") or "")
    for name, one in answers.items():
        mine = sample["answers"].setdefault(name, {"system": name, "text": str(one.get("response", ""))})
        mine |= _about(one)
    for ruling in entries(row.get("rulings")):
        sample["rulings"].append(_ruling(ruling, of.title))


def _messages(prompt: Any) -> list[list[str]]:
    if isinstance(prompt, str):
        return [["", prompt]]
    return [[str(one.get("role", "")), str(one.get("content", ""))] for one in entries(prompt)]


def _about(one: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of an answer, without what is not."""
    criteria = [
        [str(c.get("name")), number(c.get("points")), number(c.get("out_of")), str(c.get("why", ""))]
        for c in entries(one.get("criteria"))
    ]
    scores = {str(name): value for name, value in mapping(one.get("scores")).items() if number(value) is not None}
    about = {
        "cut": one.get("finish_reason") == "length" or None,
        "tokens": number(one.get("response_tokens")),
        "gold": number(one.get("score")),
        "criteria": criteria or None,
        "scores": scores or None,
    }
    return {name: value for name, value in about.items() if value is not None}


def _ruling(ruling: Mapping[str, Any], judge: str) -> dict[str, Any]:
    verdicts = [[str(one.get("outcome", "")), str(one.get("reason", ""))] for one in entries(ruling.get("verdicts"))]
    return {
        "judge": judge,
        "system": str(ruling.get("system")),
        "baseline": str(ruling.get("baseline")),
        "value": number(ruling.get("value")),
        "agreed": bool(ruling.get("agreed")),
        "verdicts": verdicts,
    }


def _finished(sample: Mapping[str, Any]) -> dict[str, Any]:
    answers = list(sample["answers"].values())
    scores: dict[str, dict[str, list[float]]] = {}
    for answer in answers:
        if "gold" in answer:
            scores.setdefault(GOLD, {})[answer["system"]] = [answer["gold"]]
    for ruling in sample["rulings"]:
        if ruling["value"] is not None:
            of = scores.setdefault(ruling["judge"], {})
            of.setdefault(ruling["system"], []).append(ruling["value"])
            of.setdefault(ruling["baseline"], []).append(1 - ruling["value"])
    winners = {
        judge: _first({name: sum(given) / len(given) for name, given in of.items()}) for judge, of in scores.items()
    }
    return {**sample, "answers": answers, "winners": winners}


def _first(means: Mapping[str, float]) -> str:
    best = [name for name, mean in means.items() if mean > max(means.values()) - 1e-9]
    return best[0] if len(best) == 1 else ""


def _spread(whole: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The first of each category, then the second, and so on, `count` in all, in their own order."""
    nth: dict[str, int] = {}
    order = []
    for i, one in enumerate(whole):
        nth[one["category"]] = nth.get(one["category"], 0) + 1
        order.append((nth[one["category"]], i))
    return [whole[i] for i in sorted(i for _, i in sorted(order)[:count])]
