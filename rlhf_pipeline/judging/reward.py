"""A reward model as a judge: the answer with the higher reward is better.

A policy that was trained to please the reward model looks better to it than to anybody else (Gao et al. 2022, arXiv
2210.10760): `optimised_for` finds such policies by what their artifacts say of their parents.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_pipeline import artifact
from rlhf_pipeline.config.judge import JudgeConfig, JudgeKind
from rlhf_pipeline.config.schema import TokenizerConfig
from rlhf_pipeline.evaluation.raters import naming, progress
from rlhf_pipeline.judging.pairs import Answer, Pair, Verdict
from rlhf_pipeline.judging.scores import Key, distinct, key, outcome
from rlhf_pipeline.scoring import written
from rlhf_pipeline.scoring.episodes import Episode
from rlhf_pipeline.scoring.rewards import RewardModel, open_scorer, score

KEY = "judge.model.path"
REWARDS = "rewards."  # begins the names of parents that a policy was trained to please
_COUNTED = {
    "prompts_cut": "prompts lose their beginning",
    "responses_cut": "answers lose their end",
    "respelled": "answers are read as plain characters",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardJudge:
    name: str
    model: RewardModel
    path: str
    tie: float  # rewards no further apart than this tie
    max_length: int  # tokens of a prompt and an answer
    batch_tokens: int
    tell: Callable[[str], None]
    known: dict[Key, float] = field(default_factory=dict)  # filled as pairs come: one answer is in many of them

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "kind": "reward_model",
            "path": self.path,
            "content_hash": self.model.identity,
            "max_length": self.max_length,
            "tie": self.tie,
        }

    def __call__(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """
        Raises:
            UserError: for a prompt that the reward model's template refuses, and for rewards that are not finite.
        """
        answers = {name: one for name, one in distinct(pairs).items() if name not in self.known}
        if answers:
            with naming(KEY, self.path):
                self.known.update(self._rewards(answers))
        verdicts = []
        for pair in pairs:
            a, b = self.known[key(pair, pair.a)], self.known[key(pair, pair.b)]
            verdicts.append(Verdict(outcome=outcome(a, b, self.tie), reason=f"rewards {a:.4f} and {b:.4f}"))
        return verdicts

    def _rewards(self, answers: Mapping[Key, tuple[Pair, Answer]]) -> dict[Key, float]:
        """Of each of these answers. A policy may write anything, and none of it ends the run (`written`)."""
        episodes = [
            Episode(prompt=pair.prompt, response=one.text, finished=one.finished, columns={}, origin=pair.origin)
            for pair, one in answers.values()
        ]
        limit = self.max_length if self.model.context is None else min(self.max_length, self.model.context)
        counts: Counter[str] = Counter()
        trees = written.trees(self.model.renderer, episodes, limit=limit, counts=counts)
        for name, what in _COUNTED.items():
            if counts[name]:
                self.tell(f"{self.name}: of {len(episodes)} prompts with their answers, {counts[name]} {what}")
        tick = progress(self.name, len(episodes))
        values = score(self.model, trees, batch_tokens=self.batch_tokens, tick=tick)
        return {name: float(value[0]) for name, value in zip(answers, values, strict=True)}


def open_reward_judge(
    config: JudgeConfig, *, name: str, tokenizer: TokenizerConfig, device: str, tell: Callable[[str], None]
) -> RewardJudge:
    """
    Raises:
        UserError: for a model that gives no rewards, saying what it is.
    """
    path = str(config.model.path)
    with naming(KEY, path):
        model = open_scorer(config.model, tokenizer, device)
    return RewardJudge(
        name=name,
        model=model,
        path=path,
        tie=config.tie,
        max_length=config.max_length,
        batch_tokens=config.batch_tokens,
        tell=tell,
    )


# Whom the judge may favour


def optimised_for(config: JudgeConfig, artifact_paths: Mapping[str, str]) -> list[str]:
    """The systems that were trained to please the reward model that is the judge, themselves or in a parent.

    A judge that is an artifact is known by its content, another model by its path. What is no artifact has no known past.
    """
    if config.kind is not JudgeKind.reward_model or config.model.path is None:
        return []
    judge = _manifest(config.model.path)
    wanted = None if judge is None else str(judge["content_hash"])
    found = []
    for name, path in artifact_paths.items():
        own = _manifest(path)
        if own is not None and _pleases(own, artifact.ancestors(own["parents"]), wanted, config.model.path):
            found.append(name)
    return found


def _manifest(path: str) -> dict[str, Any] | None:
    """What an artifact says of itself, without a look at its weights; None where there is none."""
    try:
        raw = json.loads((Path(path) / artifact.MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    return raw if isinstance(raw, dict) and {"content_hash", "parents"} <= raw.keys() else None


def _pleases(own: dict[str, Any], ancestors: dict[str, dict[str, Any]], wanted: str | None, path: str) -> bool:
    """Whether a model that a policy was trained to please is the one that is wanted."""
    left, seen = [own], {str(own["content_hash"])}
    while left:
        for name, parent in left.pop()["parents"].items():
            digest = parent["content_hash"]
            if name.startswith(REWARDS):
                same_place = Path(parent["path"]).resolve() == Path(path).resolve()
                if digest == wanted and (wanted is not None or same_place):
                    return True
            elif digest in ancestors and digest not in seen:
                seen.add(digest)
                left.append(ancestors[digest])
    return False
