"""A problem so small that its answers can be counted: what the direct objectives should come to is known exactly.

The policy and its prompts are those of `helpers_optimum`. Preferences are among answers of one or two words that END;
that is what is said when a conversation is rendered. Such data say nothing about any other response (those that are cut
off, END alone): a direct objective compares log-ratios to the reference within the data, and the mass of all else is
free. So a policy is looked at among these N answers: its probabilities divided by their sum, [P, N]; so is the optimum.

Preferences are drawn with as little noise as whole rows allow. What is trained is read from its files by transformers
alone, and what it should be is computed from the start and the rewards: neither shares code with the package.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, permutations, product
from pathlib import Path

import numpy as np
from helpers_optimum import PROMPTS, make_problem

WORDS = ["a", "b", "c"]
ANSWERS = [" ".join(words) for length in (1, 2) for words in product(WORDS, repeat=length)]  # [N]
LENGTHS = np.array([len(one.split()) + 1 for one in ANSWERS])
RANKED, LONG = ANSWERS[:7], 4  # a ranking is of four of these
PAIR_COPIES, RANKING_COPIES = 6, 8
# A third of the pairs in each update; the rate falls to 0, and so does the noise.
RUN = [
    "dpo",
    "model.path=start",
    "data.train=pairs.jsonl",
    "data.heldout=heldout.jsonl",
    "data.max_length=16",
    "data.max_prompt_length=8",
    "batch.examples=396",
    "batch.row_length=256",
    "batch.micro_rows=64",
    "train.epochs=100",
    "train.max_steps=80",
    "optim.lr=2e-3",
    "optim.betas=[0.9,0.95]",
    "optim.decay=cosine",
    "optim.final_lr_fraction=0",
    "optim.warmup_fraction=0.05",
    "sampled.prompts=0",
    "engine=zero0",
    "evaluation.before=false",
    "evaluation.every=0",
    "evaluation.samples=0",
    "checkpoint.every=1000",
    "checkpoint.artifact_every_epoch=false",
    "runtime.threads=1",
    "tracking.progress=false",
]


@dataclass(frozen=True)
class Problem:
    """A folder with `start` (a Hugging Face folder), pairs.jsonl, rankings.jsonl and heldout.jsonl."""

    folder: Path

    @cached_property
    def rewards(self) -> np.ndarray:
        """Random, [P, N]."""
        return np.random.default_rng(0).normal(0, 1, (len(PROMPTS), len(ANSWERS)))

    def logprobs(self, folder: Path) -> np.ndarray:
        """log p of every answer with its END, [P, N]: of an artifact or a Hugging Face folder, opened by transformers."""
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        found = np.zeros((len(PROMPTS), len(ANSWERS)))
        for p, prompt in enumerate(PROMPTS):
            chat = [{"role": "user", "content": prompt}]
            before = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
            for n, answer in enumerate(ANSWERS):
                said = [*tokenizer.convert_tokens_to_ids(answer.split()), tokenizer.eos_token_id]
                with torch.no_grad():
                    logits = model(input_ids=torch.tensor([[*before, *said]])).logits[0, len(before) - 1 : -1]
                found[p, n] = logits.double().log_softmax(-1)[range(len(said)), said].sum()
        return found

    def start(self) -> np.ndarray:
        return self.logprobs(self.folder / "start")


def make_direct_problem(folder: Path) -> Problem:
    """Write one."""
    make_problem(folder)
    problem = Problem(folder)
    for name, rows in (("pairs", pairs(problem)), ("rankings", rankings(problem)), ("heldout", rankings(problem, 1))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return problem


def preferred(rewards: np.ndarray) -> np.ndarray:
    """Bradley-Terry: the probability that the first is preferred to the second, [P, N] -> [P, N, N]."""
    return 1 / (1 + np.exp(rewards[:, None, :] - rewards[:, :, None]))


def pairs(problem: Problem) -> Iterator[dict[str, str]]:
    """Every two answers of a prompt, PAIR_COPIES times, and preferred as often as Bradley and Terry say.

    Whole rows cannot say it exactly; they are chosen so that the wins of an answer over all the others are right to half
    a row. The optima of DPO and of IPO depend on nothing else: with h the log-ratios, the loss of DPO has the gradient
    beta * (the wins that h expects - wins) in an answer's h, and that of IPO is linear in the wins.
    """
    for p, prompt in enumerate(PROMPTS):
        share = PAIR_COPIES * preferred(problem.rewards)[p] * (1 - np.eye(len(ANSWERS)))
        wins = np.triu(share.round(), 1)
        wins += np.tril(PAIR_COPIES - wins.T, -1)
        while np.ptp(due := (share - wins).sum(1)) > 1:
            most, least = due.argmax(), due.argmin()
            wins[most, least] += 1
            wins[least, most] -= 1
        assert wins.min() >= 0
        for i, j in permutations(range(len(ANSWERS)), 2):
            yield from [{"prompt": prompt, "chosen": ANSWERS[i], "rejected": ANSWERS[j]}] * int(wins[i, j])


def rankings(problem: Problem, copies: int = RANKING_COPIES) -> Iterator[dict[str, object]]:
    """Every LONG of the answers RANKED, `copies` times, in orders drawn from Plackett and Luce at even distances."""
    random = np.random.default_rng(0)
    for p, prompt in enumerate(PROMPTS):
        for some in combinations(range(len(RANKED)), LONG):
            orders = [*permutations(some)]
            ends = np.cumsum([plackett_luce(problem.rewards[p, list(order)]) for order in orders])
            for place in (np.arange(copies) + random.random()) / copies:
                texts = [RANKED[i] for i in orders[int(np.searchsorted(ends[:-1], place))]]
                yield {"prompt": prompt, "responses": texts, "scores": [*range(LONG, 0, -1)]}


def plackett_luce(rewards: Sequence[float] | np.ndarray) -> float:
    """The probability of this order, the best first."""
    rest = np.cumsum(np.exp(rewards)[::-1])[::-1]
    return float(np.prod(np.exp(rewards) / rest))


def among(logits: np.ndarray) -> np.ndarray:
    """Probabilities among the answers that are looked at: [P, N] -> [P, N]."""
    likely = np.exp(logits - logits.max(1, keepdims=True))
    return likely / likely.sum(1, keepdims=True)


def dpo_optimum(reference: np.ndarray, rewards: np.ndarray, beta: float) -> np.ndarray:
    """reference exp(reward / beta) / Z, [P, N]: of DPO on Bradley-Terry and on Plackett-Luce preferences alike."""
    return among(reference + rewards / beta)


def ipo_optimum(reference: np.ndarray, rewards: np.ndarray, tau: float) -> np.ndarray:
    """reference exp(p(y is preferred to mu) / tau) / Z, [P, N], where mu draws any answer as likely as any other."""
    return among(reference + preferred(rewards).mean(2) / tau)


def rdpo_optimum(reference: np.ndarray, rewards: np.ndarray, *, beta: float, alpha: float) -> np.ndarray:
    """reference exp((reward - alpha length) / beta) / Z, [P, N]; lengths in tokens with END."""
    return dpo_optimum(reference, rewards - alpha * LENGTHS, beta)


def cpo_optimum(reference: np.ndarray, rewards: np.ndarray, beta: float) -> np.ndarray:
    """exp(reward / beta) / Z, [P, N]: what DPO comes to when every answer is as likely under its reference."""
    return dpo_optimum(np.zeros_like(reference), rewards, beta)
