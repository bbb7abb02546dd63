"""Which command is hurt how: a plan drawn from a seed, with every pair of stage and fault about equally often."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import cycle, islice

OFFLINE = ("pretrain", "sft", "rm", "dpo")
TRAINING = (*OFFLINE, "ppo")
WRITING = (*TRAINING, "generate", "score", "evaluate")
SEVERAL = (*TRAINING, "generate", "score")  # commands that work in several processes
# fault -> stage -> in how many processes it may be tried
_ONE, _TWO, _BOTH = (1,), (2,), (1, 2)
APPLIES: dict[str, dict[str, tuple[int, ...]]] = {
    "kill -9": {stage: _BOTH if stage in SEVERAL else _ONE for stage in WRITING},
    "kill -9 in a save": {stage: _BOTH if stage in SEVERAL else _ONE for stage in WRITING},
    "kill -9 between ranks' saves": dict.fromkeys(TRAINING, _TWO),
    "kill -9 in a rollout": {"ppo": _BOTH, "generate": _BOTH},
    "SIGTERM": {stage: _BOTH if stage in SEVERAL else _ONE for stage in WRITING},
    "one rank killed": dict.fromkeys(SEVERAL, _TWO),
    "one rank frozen": dict.fromkeys(SEVERAL, _TWO),
    "full disk": {stage: _BOTH if stage in SEVERAL else _ONE for stage in WRITING},
    "small file system": dict.fromkeys(WRITING, _ONE),
    "file size limit": {stage: _BOTH if stage in TRAINING else _ONE for stage in WRITING},
    "damaged state": dict.fromkeys(TRAINING, _BOTH),
    "damaged artifact": dict.fromkeys(TRAINING, _ONE),
    "damaged parent": dict.fromkeys(("sft", "rm", "dpo", "ppo", "generate", "score"), _ONE),
    "shard removed": dict.fromkeys(("sft", "rm", "dpo"), _ONE),
    "torn output": {"generate": _ONE},
    "clock": dict.fromkeys(TRAINING, _BOTH),
    "no wandb": dict.fromkeys(("sft", "ppo"), _ONE),
    "NaN loss": dict.fromkeys(TRAINING, _BOTH),
    "NaN gradient": dict.fromkeys(TRAINING, _BOTH),
    "dead server": {"ppo, served": _BOTH, "evaluate": _ONE},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    number: int
    stage: str
    ranks: int
    fault: str


def plan(number: int, seed: int, *, stage: str | None = None, fault: str | None = None) -> list[Planned]:
    """So many trials, in a random order; each pair of stage and fault once before any comes twice."""
    rng = random.Random(seed)
    pairs = [
        (one, where)
        for one, stages in APPLIES.items()
        for where in stages
        if fault in (None, one) and stage in (None, where)
    ]
    rng.shuffle(pairs)
    drawn = [(one, where, rng.choice(APPLIES[one][where])) for one, where in islice(cycle(pairs), number)]
    rng.shuffle(drawn)
    return [Planned(number=i, stage=where, ranks=ranks, fault=one) for i, (one, where, ranks) in enumerate(drawn)]
