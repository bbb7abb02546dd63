"""Has the lab's labelers rank a model's own answers: what InstructGPT's labelers did with samples of its models.

    rlhf generate experiment=lab_samples_generate
    python scripts/lab_label.py runs/lab/generate/responses.jsonl runs/lab/own_rankings.jsonl [--by gold] [--seed 0]

The first file is one of `rlhf generate` with several samples a prompt of the lab; the second has a ranking a line, as the
lab's own rankings: prompt, responses, scores, ranks. `--by anyone`: one of the six labelers rates a prompt's answers, from 1
to 7, as for the lab's own rankings; `--by panel`: the mean of all six; `--by gold`: the judge. The same answer counts once,
answers that were cut off are left out, and so are prompts of which all answers that are left score the same.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

from rlhf_pipeline.data.lab.judge import as_messages, judge
from rlhf_pipeline.data.lab.labelers import LABELERS, ranks_of

KEY = "own answers"  # of the labelers' noise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("answers", type=Path)
    parser.add_argument("rankings", type=Path)
    parser.add_argument("--by", choices=["anyone", "panel", "gold"], default="anyone")
    parser.add_argument("--seed", type=int, default=0, help="who rates which prompt")
    given = parser.parse_args()

    by_prompt: dict[int, list[dict[str, Any]]] = defaultdict(list)
    with given.answers.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            by_prompt[row["index"]].append(row)
    found = [one for rows in by_prompt.values() if (one := ranking(rows, given.by, given.seed))]

    partial = given.rankings.with_name(given.rankings.name + ".partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text("".join(json.dumps(one) + "\n" for one in found), encoding="utf-8")
    partial.replace(given.rankings)
    answers = sum(len(one["responses"]) for one in found)
    print(f"{given.rankings}: {len(found)} rankings of {len(by_prompt)} prompts, {answers} answers")


def ranking(rows: list[dict[str, Any]], by: str, seed: int) -> dict[str, Any] | None:
    """The answers to a prompt, ranked; None where there is nothing to rank."""
    whole = (row["response"] for row in rows if row["response"] and row["finish_reason"] == "stop")
    responses = list(dict.fromkeys(whole))
    prompt = rows[0]["prompt"]
    rated = rate(prompt, responses, by, seed)
    if len(set(rated)) < 2:
        return None
    return {"prompt": prompt, "responses": responses, "scores": rated, "ranks": ranks_of(rated), "by": by}


def rate(prompt: Any, responses: list[str], by: str, seed: int) -> list[float]:
    """A score for each."""
    if by == "gold":
        return [judge(prompt, response).score for response in responses]
    asked = "|".join(message.content for message in as_messages(prompt))
    raters = LABELERS if by == "panel" else [random.Random(f"{seed}|{asked}").choice(LABELERS)]
    ratings = [labeler.scores(prompt, responses, f"{KEY}|{seed}") for labeler in raters]
    return [fmean(of_one) for of_one in zip(*ratings, strict=True)]


if __name__ == "__main__":
    main()
