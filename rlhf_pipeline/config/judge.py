"""The sections of judges: who says which of two answers is better. docs/judging.md has them all."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import StrEnum

from rlhf_pipeline.config.schema import ReadyModelConfig, operational


class JudgeKind(StrEnum):
    gold = "gold"  # the lab's program
    reward_model = "reward_model"
    chat = "chat"  # a model behind an OpenAI-compatible server
    recorded = "recorded"  # verdicts in a file, of people or of anyone else


@dataclass(kw_only=True, slots=True)
class ChatJudgeConfig:
    """A server that speaks OpenAI's chat completions, and how it is asked."""

    url: str | None = None  # up to /v1, as in http://127.0.0.1:8000/v1
    model: str | None = None  # as the server calls it
    template: str = "pairwise"  # name under conf/judge_templates or a Jinja file
    temperature: float = 0.0
    max_tokens: int = 512  # of a verdict with its reason
    seed: int | None = 0  # null: none is sent
    api_key_env: str = operational(
        "OPENAI_API_KEY"
    )  # the environment variable that holds the key; none is sent without it
    timeout: float = operational(60.0)  # seconds to connect, and then without a byte of the answer
    retries: int = operational(5)  # after the first try
    concurrency: int = operational(8)  # requests at once
    requests_per_minute: float | None = operational(None)  # null: as fast as the server lets
    cache_dir: str = operational("${runs}/cache/judge")  # of answers: a re-run asks nothing twice


@dataclass(kw_only=True, slots=True)
class JudgeConfig:
    """Who judges pairs of answers. Every pair is judged in both orders."""

    kind: JudgeKind = JudgeKind.gold
    name: str | None = None  # of the folder of its results; null: the kind
    tie: float = 0.0  # gold, reward_model: scores no further apart than this tie
    model: ReadyModelConfig = dataclasses.field(default_factory=ReadyModelConfig)  # reward_model
    max_length: int = 2048  # reward_model: tokens of a prompt and an answer
    batch_tokens: int = operational(4096)  # reward_model: in one forward pass
    chat: ChatJudgeConfig = dataclasses.field(default_factory=ChatJudgeConfig)
    path: str | None = None  # recorded: a file of verdicts, docs/judging.md
