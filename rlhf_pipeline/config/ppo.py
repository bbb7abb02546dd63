"""The sections of `rlhf ppo`: rollouts, scores, the KL penalty, advantages, the pretraining mix, health.

A *score* belongs to a whole response; a *reward* to one of its tokens. Values live in conf/, and docs/ppo.md says where
each comes from.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from rlhf_pipeline.config.schema import OptimConfig, ReadyModelConfig, operational


class Estimator(StrEnum):
    """What an action's advantage is; see docs/ppo.md."""

    gae = "gae"  # generalised advantage estimation with a value model (Schulman et al. 2016)
    reinforce = "reinforce"  # the return less a running mean of returns (Williams 1992)
    rloo = "rloo"  # less the mean return of the prompt's other samples (Kool et al. 2019; Ahmadian et al. 2024)
    grpo = "grpo"  # standardised among the prompt's samples (Shao et al. 2024)


class KlPlace(StrEnum):
    reward = "reward"  # a penalty of every token's reward (InstructGPT)
    loss = "loss"  # a term of the loss, estimated by k3 (GRPO as published)


class KlControl(StrEnum):
    fixed = "fixed"
    adaptive = "adaptive"  # Ziegler et al. 2019, section 2.2


class ValueInit(StrEnum):
    reward_model = "reward_model"  # of the first reward that is a model
    policy = "policy"  # the policy's body under a new head


class MissingEnd(StrEnum):
    """What the score of a response that was cut off at max_new_tokens becomes."""

    keep = "keep"
    subtract = "subtract"  # less `missing_end_score`
    substitute = "substitute"  # `missing_end_score`, whatever was scored


class Mean(StrEnum):
    """What a term is a mean over."""

    tokens = "tokens"  # every token counts the same
    sequences = "sequences"  # every sequence counts the same, its tokens as their mean


@dataclass(kw_only=True, slots=True)
class RolloutConfig:
    """How episodes are drawn: plain softmax sampling, so that the log-probs are those of the policy that is trained."""

    episodes: int = 512  # responses in an iteration
    samples: int = 1  # a prompt
    max_new_tokens: int = 256
    temperature: float = 1.0  # the policy is softmax(logits / temperature), here and in the loss
    # Refused unless left as they are: what is filtered at sampling is not the distribution that the loss is about.
    top_k: int = 0
    top_p: float = 1.0
    min_new_tokens: int = 0
    batch_tokens: int = operational(32_768)  # rows times their longest possible length, in one batch of sampling


@dataclass(kw_only=True, slots=True)
class ScorerConfig:
    """One of `model`, `program`, `url`; its scores times `weight` are added to those of the others."""

    model: ReadyModelConfig | None = None  # a reward model
    program: str | None = None  # module:function, see docs/scorers.md
    url: str | None = None  # of an HTTP server, see docs/scorers.md
    weight: float = 1.0  # 0: only logged
    normalised: bool = True  # of a model: by the shift and scale of its artifact
    max_length: int = 2048  # of a model: tokens of a prompt and a response
    batch_tokens: int = operational(8192)  # of a model: in one forward pass
    batch: int = operational(64)  # of a url: responses in one request
    timeout: float = operational(60.0)  # of a url: seconds for a request
    retries: int = operational(5)  # of a url, after the first
    offload: bool = operational(False)  # of a model: on the CPU between uses


@dataclass(kw_only=True, slots=True)
class ReferenceConfig:
    """The frozen policy that the KL is measured against; `path: null` is the model that the run starts from."""

    path: str | None = None
    offload: bool = operational(False)  # on the CPU between uses


@dataclass(kw_only=True, slots=True)
class KlConfig:
    """beta of equation 2 of InstructGPT, and what becomes of it."""

    beta: float = 0.02
    place: KlPlace = KlPlace.reward
    controller: KlControl = KlControl.fixed
    target: float = 6.0  # nats a response, of the adaptive controller
    horizon: int = 10_000  # episodes, of the adaptive controller


@dataclass(kw_only=True, slots=True)
class AdvantageConfig:
    """From scores to advantages."""

    estimator: Estimator = Estimator.gae
    gamma: float = 1.0
    lam: float = 0.95  # lambda of GAE
    whiten: bool = True  # advantages of an iteration to mean 0 and variance 1; rloo and grpo leave it out
    score_clip: float | None = None  # scores are clipped to +- this
    missing_end: MissingEnd = MissingEnd.keep
    missing_end_score: float = 1.0  # see MissingEnd
    baseline_decay: float = 0.9  # of the running mean of reinforce
    skip_no_spread: bool = False  # rloo, grpo: no updates on prompts whose samples all score the same


@dataclass(kw_only=True, slots=True)
class PolicyLossConfig:
    """The clipped surrogate objective (Schulman et al. 2017, equation 7)."""

    epochs: int = 1  # over an iteration's episodes
    clip: float = 0.2
    entropy: float = 0.0  # weight of the bonus
    mean: Mean = Mean.tokens


@dataclass(kw_only=True, slots=True)
class ValueConfig:
    """The value model: its start, its loss, its own optimiser. Only `advantage.estimator=gae` has one."""

    init: ValueInit = ValueInit.reward_model
    clip: float | None = 0.2  # of the change of a value; null does not clip
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)


@dataclass(kw_only=True, slots=True)
class PtxConfig:
    """The pretraining mix (InstructGPT, equation 2): gamma times the log-likelihood of text, in the same update."""

    train: Any = None  # as data.train of rlhf pretrain
    format: str = "auto"
    split: str = "train"
    coefficient: float = 0.0  # gamma; 0 leaves the mix out
    examples_per_episode: float = 8.0
    max_length: int | None = None  # of a text; null: data.max_length
    mean: Mean = Mean.tokens


@dataclass(kw_only=True, slots=True)
class EmaConfig:
    """An exponential moving average of the policy's fp32 masters."""

    decay: float = 0.0  # per update; 0: none
    hand_over: bool = True  # the average, and not the last weights, becomes the artifact


@dataclass(kw_only=True, slots=True)
class HealthConfig:
    """Thresholds that end a run, with its state saved; null: none."""

    max_kl: float | None = None  # nats a response, against the reference
    min_entropy: float | None = None  # nats a token
    max_ratio: float | None = None
    min_ended: float | None = None  # share of responses that end by themselves
