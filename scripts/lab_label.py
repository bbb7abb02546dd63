"""Has the lab's labelers rank a model's own answers: what InstructGPT's labelers did with samples of its models.

    rlhf generate experiment=lab_samples_generate
    python scripts/lab_label.py runs/lab/generate/responses.jsonl runs/lab/own_rankings.jsonl [--seed 0]

The first file is one of `rlhf generate` with several samples a prompt of the lab; the second has a ranking a line, as the
lab's own rankings: prompt, responses, scores from 1 to 7 by one of the six labelers, ranks. The same answer counts once,
answers that were cut off are left out, and so are prompts of which less than two answers are left.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

from rlhf_pipeline.data.lab.judge import as_messages
from rlhf_pipeline.data.lab.labelers import LABELERS, ranks_of

KEY = "own answers"  # of the labelers' noise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("answers", type=Path)
    parser.add_argument("rankings", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="who rates which prompt")
    given = parser.parse_args()

    by_prompt: dict[int, list[dict[str, Any]]] = defaultdict(list)
    with given.answers.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            by_prompt[row["index"]].append(row)
    found = [one for rows in by_prompt.values() if (one := ranking(rows, given.seed))]

    partial = given.rankings.with_name(given.rankings.name + ".partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text("".join(json.dumps(one) + "\n" for one in found), encoding="utf-8")
    partial.replace(given.rankings)
    answers = sum(len(one["responses"]) for one in found)
    print(f"{given.rankings}: {len(found)} rankings of {len(by_prompt)} prompts, {answers} answers")


def ranking(rows: list[dict[str, Any]], seed: int) -> dict[str, Any] | None:
    """One labeler's ranking of the answers to a prompt; None where there is nothing to rank."""
    responses = list(
        dict.fromkeys(row["response"] for row in rows if row["response"] and row["finish_reason"] == "stop")
    )
    if len(responses) < 2:
        return None
    prompt = rows[0]["prompt"]
    turns = "|".join(message.content for message in as_messages(prompt))
    labeler = random.Random(f"{seed}|{turns}").choice(LABELERS)
    scores = labeler.scores(prompt, responses, f"{KEY}|{seed}")
    return {
        "prompt": prompt,
        "responses": responses,
        "scores": scores,
        "ranks": ranks_of(scores),
        "labeler": labeler.name,
    }


if __name__ == "__main__":
    main()
