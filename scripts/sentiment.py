"""The controlled sentiment task of Rafailov et al. 2023, section 6: continue film reviews so that they are positive.

    export RLHF_TEST_DATA=<folder with imdb_train.jsonl.gz and imdb_unsup_25k.jsonl.gz>
    python scripts/sentiment.py prompts                     # prefixes of reviews, to runs/imdb/prompts
    PYTHONPATH=scripts rlhf ppo experiment=imdb_ppo         # programs sentiment:reward and sentiment:judge
    python scripts/sentiment.py judge base=<responses.jsonl> ppo=<responses.jsonl>     # of rlhf generate
    python scripts/sentiment.py kl runs/imdb/ppo/artifact runs/imdb/pretrain/artifact

The reward is one classifier and the judge another: TF-IDF and logistic regression, each trained on its own half of the
labelled reviews, both measured on a tenth that neither has seen. They are of one kind, so what fools every bag of words
fools both. They train at their first use in a process, in some seconds. Needs `pip install rlhf_pipeline[sentiment]`.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.evaluation.intervals import ClusterMean, cluster_means
from rlhf_pipeline.scoring.episodes import Episode

LABELLED, UNLABELLED = "imdb_train.jsonl.gz", "imdb_unsup_25k.jsonl.gz"
PARTS = {"reward": 0.45, "judge": 0.45, "heldout": 0.1}  # of the labelled reviews
PREFIX = (2, 8)  # words; the run cuts at 8 tokens
HELD_OUT_PREFIXES = 0.04
OPENING = 28  # words of a real review that are as long as a prefix with its response (means: 27 to 29)
BATCH = 32  # responses in a forward pass of `kl`


def reward(episodes: Sequence[Episode]) -> list[float]:
    """The probability that prefix and response are positive, 0 to 1, by the classifier of the first half."""
    return [float(p) for p in positive("reward", [whole(one) for one in episodes])]


def judge(episodes: Sequence[Episode]) -> list[bool]:
    """Whether prefix and response are positive, by the classifier of the other half. The mean is the positive rate."""
    return [bool(p > 0.5) for p in positive("judge", [whole(one) for one in episodes])]


def whole(one: Episode) -> str:
    """As the classifiers read it; a word that the prefix was cut in stays in two."""
    return f"{one.prompt[0].content} {one.response}"


def positive(part: str, texts: Sequence[str]) -> np.ndarray:
    """Probabilities by the classifier of a part, float64 [n]."""
    found: np.ndarray = classifier(part).predict_proba(list(texts))[:, 1]
    return found


@cache
def classifier(part: str, limit: int | None = None) -> Any:
    """Trained on the reviews of a part, or on as many of them; the same in every process."""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
    except ImportError:
        raise UserError("scikit-learn is missing: pip install 'rlhf_pipeline[sentiment]'") from None
    texts, labels = reviews(part, limit)
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=3, sublinear_tf=True, dtype=np.float32)
    return make_pipeline(words, LogisticRegression(C=10.0, max_iter=300)).fit(texts, labels)


def reviews(part: str, limit: int | None = None) -> tuple[list[str], list[int]]:
    """Texts and labels (1: positive) of a part; of `limit`, evenly spread over the file, which is sorted by label."""
    found = labelled()[part]
    texts, labels = zip(*found[:: 1 if limit is None else max(1, len(found) // limit)], strict=True)
    return list(texts), list(labels)


@cache
def labelled() -> dict[str, list[tuple[str, int]]]:
    """(text, label) of all labelled reviews, by part."""
    parts: dict[str, list[tuple[str, int]]] = {part: [] for part in PARTS}
    for row in rows(LABELLED):
        parts[part_of(row["text"])].append((plain(row["text"]), int(row["label"])))
    return parts


def part_of(text: str) -> str:
    """By the words alone, so that a review that is in the file twice is in one part."""
    place, end = uniform(text), 0.0
    for name, share in PARTS.items():
        end += share
        if place < end:
            return name
    return name  # rounding


def uniform(text: str, salt: str = "") -> float:
    """In [0, 1), by the words of the text: copies of a review differ in line breaks."""
    words = " ".join(plain(text).lower().split())
    return int.from_bytes(hashlib.sha256(f"{salt}{words}".encode()).digest()[:6]) / 2**48


def plain(text: str) -> str:
    return text.replace("<br />", " ")


def rows(name: str) -> Iterator[dict[str, Any]]:
    folder = os.environ.get("RLHF_TEST_DATA", "")
    file = Path(folder) / name
    if not folder or not file.is_file():
        raise UserError(f"RLHF_TEST_DATA={folder}: must name a folder that holds {name}")
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def write_prompts(folder: Path) -> None:
    """Prefixes of unlabelled reviews, which neither the base model nor a classifier has read.

    Which are held out is told by the prefix: one that many reviews begin with is on one side.
    """
    folder.mkdir(parents=True, exist_ok=True)
    low, high = PREFIX
    prefixes: dict[str, list[str]] = {"train": [], "heldout": []}
    for row in rows(UNLABELLED):
        text = plain(row["text"])
        words = text.split()[: low + int(uniform(text, "length") * (high - low + 1))]
        prefix = " ".join(words)
        if prefix:
            prefixes["heldout" if uniform(prefix, "side") < HELD_OUT_PREFIXES else "train"].append(prefix)
    for name, found in prefixes.items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps({"text": prefix}) + "\n" for prefix in found))
        print(f"{file}: {len(found):,} prefixes, {len(set(found)):,} of them different")


def print_judged(systems: dict[str, Path]) -> None:
    """Positive rates of answers to the same prompts, and of the classifiers themselves."""
    texts, labels = reviews("heldout")
    short = [" ".join(text.split()[:OPENING]) for text in texts]
    truth = np.array(labels) == 1
    print(
        f"| on {len(texts):,} labelled reviews that neither has seen | whole | first {OPENING} words |\n|---|---|---|"
    )
    sides = {name: [positive(name, some) > 0.5 for some in (texts, short)] for name in ("reward", "judge")}
    for name, (long, cut) in sides.items():
        print(f"| accuracy of the {name} | {(long == truth).mean():.3f} | {(cut == truth).mean():.3f} |")
    agree = [(a == b).mean() for a, b in zip(sides["reward"], sides["judge"], strict=True)]
    print(f"| they agree on | {agree[0]:.3f} | {agree[1]:.3f} |")
    found = [side.mean() for side in sides["judge"]]
    print(f"| positive by the judge | {found[0]:.3f} | {found[1]:.3f} |")
    print("\n| answers | positive by the judge | by the reward | mean tokens | different words a response |")
    print("|---|---|---|---|---|")
    first: dict[tuple[int, int], float] = {}
    for name, file in systems.items():
        with file.open(encoding="utf-8") as lines:  # splitlines() would break them at more than line feeds
            answers = [json.loads(line) for line in lines]
        said = [f"{one['prompt'][0]['content']} {one['response']}" for one in answers]
        prefixes = [one["prompt"][0]["content"] for one in answers]
        by_judge, by_reward = (positive(part, said) > 0.5 for part in ("judge", "reward"))
        tokens = np.mean([one["response_tokens"] for one in answers])
        words = np.mean([len(set(one["response"].lower().split())) for one in answers])
        rates = [shown(by_prompt(wins, prefixes)) for wins in (by_judge, by_reward)]
        print(f"| {name} ({len(answers):,}) | {rates[0]} | {rates[1]} | {tokens:.1f} | {words:.1f} |")
        mine = {(one["index"], one["sample"]): float(won) for one, won in zip(answers, by_judge, strict=True)}
        if not first:
            first, against = mine, name
        elif mine.keys() == first.keys():
            differences = np.array([mine[key] - first[key] for key in mine])
            print(f"| {name} less {against}, prompt by prompt | {shown(by_prompt(differences, prefixes))} | | | |")


def by_prompt(values: np.ndarray, prefixes: Sequence[str]) -> ClusterMean:
    _, clusters = np.unique(prefixes, return_inverse=True)
    return cluster_means(np.asarray(values, float), clusters)[0]


def shown(one: ClusterMean) -> str:
    return f"{one.mean:.3f} [{one.low:.3f}, {one.high:.3f}]"


def print_kl(policy: str, reference: str, prompts: Path, max_new_tokens: int) -> None:
    """KL(policy || reference) of a response in nats: exact at every token, summed over what the policy drew."""
    import torch

    from rlhf_pipeline.config.ppo import RolloutConfig
    from rlhf_pipeline.config.schema import Dtype, LongPrompt, PromptsConfig, ReadyModelConfig, TokenizerConfig
    from rlhf_pipeline.generation.load import open_renderer
    from rlhf_pipeline.generation.prompts import read_prompts
    from rlhf_pipeline.models.ready import open_model
    from rlhf_pipeline.rollout import roll_out

    configs = [ReadyModelConfig(path=path, dtype=Dtype.float32) for path in (policy, reference)]
    renderer = open_renderer(configs[0], TokenizerConfig())
    models = [open_model(config, renderer.tokenizer, "cpu") for config in configs]
    how = PromptsConfig(
        path=str(prompts), format="opening", max_prompt_length=PREFIX[1] + 1, long_prompt=LongPrompt.keep_start
    )
    asked = read_prompts(how, renderer, context=None).asked
    options = RolloutConfig(samples=1, max_new_tokens=max_new_tokens)
    rollout = roll_out(models[0], asked, options, renderer=renderer, seed=0, first=0)
    found = []
    for start in range(0, len(asked), BATCH):
        trees = rollout.trees[start : start + BATCH]
        texts = [torch.tensor(np.concatenate([tree.prompt, tree.responses[0]]).astype(np.int64)) for tree in trees]
        padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)  # to the right, where nothing looks
        with torch.inference_mode():
            mine, theirs = (model(padded).logits.float().log_softmax(-1) for model in models)
        nats = (mine.exp() * (mine - theirs)).sum(-1)
        for row, tree in enumerate(trees):
            before = len(tree.prompt) - 1  # the position that the first token of the response was drawn at
            found.append(float(nats[row, before : before + len(tree.responses[0])].sum()))
    kl = by_prompt(np.array(found), [one.messages[0].content for one in asked])
    print(
        f"KL {kl.mean:.2f} [{kl.low:.2f}, {kl.high:.2f}] nats a response, {rollout.num_tokens / len(asked):.1f} tokens"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("prompts", help="write prefixes of reviews")
    one.add_argument("folder", type=Path, nargs="?", default=Path("runs/imdb/prompts"))
    one = commands.add_parser("judge", help="positive rates of what rlhf generate wrote")
    one.add_argument("systems", nargs="+", metavar="name=responses.jsonl")
    one = commands.add_parser("kl", help="of a policy to its reference, on held-out prefixes")
    one.add_argument("policy")
    one.add_argument("reference")
    one.add_argument("--prompts", type=Path, default=Path("runs/imdb/prompts/heldout.jsonl"))
    one.add_argument("--max-new-tokens", type=int, default=32)
    given = parser.parse_args()
    try:
        if given.command == "prompts":
            write_prompts(given.folder)
        elif given.command == "judge":
            print_judged({name: Path(file) for name, _, file in (one.partition("=") for one in given.systems)})
        else:
            print_kl(given.policy, given.reference, given.prompts, given.max_new_tokens)
    except UserError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
