"""The judge of the demo lab: a program that knows what is right, for the lab's prompts and no others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf_pipeline.data.lab import VERSION
from rlhf_pipeline.data.lab import judge as lab
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.judging.pairs import Answer, Pair, Verdict
from rlhf_pipeline.judging.scores import Key, distinct, key, outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldJudge:
    name: str
    tie: float  # scores no further apart than this tie
    known: dict[Key, lab.Verdict] = field(default_factory=dict)  # filled as pairs come: one answer is in many of them

    @property
    def identity(self) -> dict[str, Any]:
        return {"kind": "gold", "lab": VERSION, "tie": self.tie}

    def __call__(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """
        Raises:
            UserError: naming the prompt, when it is none of the lab's.
        """
        for name, one in distinct(pairs).items():
            if name not in self.known:
                self.known[name] = _judged(*one)
        verdicts = []
        for pair in pairs:
            a, b = self.known[key(pair, pair.a)], self.known[key(pair, pair.b)]
            verdicts.append(Verdict(outcome=outcome(a.score, b.score, self.tie), reason=_reason(a, b)))
        return verdicts


def _judged(pair: Pair, answer: Answer) -> lab.Verdict:
    try:
        return lab.judge(pair.prompt, answer.text, finished=answer.finished)
    except UserError as error:
        raise UserError(f"{pair.origin}: {error}" if pair.origin else str(error)) from error


def _reason(a: lab.Verdict, b: lab.Verdict) -> str:
    """Both scores, and the criterion that they differ in most."""
    scores = f"scores {a.score:.3f} and {b.score:.3f}"
    one, other = max(zip(a.criteria, b.criteria, strict=True), key=lambda both: abs(both[0].points - both[1].points))
    if one.points == other.points:
        return f"{scores}, alike in every criterion"
    return f"{scores}; most in {one.name}: {one.points:.3f} ({one.why}) and {other.points:.3f} ({other.why})"
