"""The sections of `rlhf dpo`: the objective and its reference, and the held-out prompts that are answered on the way.

`TRAITS` says of every objective which parameters it takes and what it learns from. Its loss is in
`functional.losses.preference`, its published values in conf/objective/, and docs/dpo.md says where each comes from.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from rlhf_pipeline.config.schema import operational


class Objective(StrEnum):
    dpo = "dpo"  # Rafailov et al. 2023
    cdpo = "cdpo"  # DPO for labels of which a share is wrong (Mitchell 2023)
    ipo = "ipo"  # Azar et al. 2023
    rdpo = "rdpo"  # DPO with a term of length (Park et al. 2024)
    plackett_luce = "plackett_luce"  # DPO on whole rankings (Rafailov et al. 2023, appendix A.3)
    kto = "kto"  # single verdicts (Ethayarajh et al. 2024)
    slic = "slic"  # Zhao et al. 2023
    rrhf = "rrhf"  # whole rankings (Yuan et al. 2023)
    cpo = "cpo"  # Xu et al. 2024
    orpo = "orpo"  # Hong et al. 2024
    simpo = "simpo"  # Meng et al. 2024
    unlikelihood = "unlikelihood"  # Welleck et al. 2019; a baseline of the DPO paper
    preferred_ft = "preferred_ft"  # fine-tuning on the best response; a baseline of the DPO paper


class Reduction(StrEnum):
    """What a response's log-probability is."""

    sum = "sum"  # over its tokens
    mean = "mean"  # of its tokens


class PairRule(StrEnum):
    """Which two responses of a ranking are compared."""

    all = "all"  # every two
    best_worst = "best_worst"  # the first of the best and the last of the worst
    adjacent = "adjacent"  # those whose ranks follow each other


class PairTies(StrEnum):
    drop = "drop"
    half = "half"  # a pair with the label 1/2, as cDPO would have one that is wrong half of the time


class UnlikelihoodForm(StrEnum):
    token = "token"  # alpha * -log(1 - p) of every token of the rejected response
    sequence = "sequence"  # alpha * log p of the rejected response, as in the DPO paper: without a bound


class Unit(StrEnum):
    """What an objective compares."""

    pairs = "pairs"
    rankings = "rankings"
    verdicts = "verdicts"


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What the recipe must know of an objective before anything is computed."""

    takes: tuple[str, ...] = ()  # fields of DirectConfig that are null unless the objective has them
    reference: bool = False
    unit: Unit = Unit.pairs
    labels: bool = False  # takes labels other than 1, and so can learn from ties


TRAITS: dict[Objective, Traits] = {
    Objective.dpo: Traits(takes=("beta",), reference=True, labels=True),
    Objective.cdpo: Traits(takes=("beta", "label_smoothing"), reference=True, labels=True),
    Objective.ipo: Traits(takes=("tau",), reference=True),
    Objective.rdpo: Traits(takes=("beta", "alpha"), reference=True),
    Objective.plackett_luce: Traits(takes=("beta",), reference=True, unit=Unit.rankings),
    Objective.kto: Traits(takes=("beta", "desirable_weight", "undesirable_weight"), reference=True, unit=Unit.verdicts),
    Objective.slic: Traits(takes=("delta",)),
    Objective.rrhf: Traits(unit=Unit.rankings),
    Objective.cpo: Traits(takes=("beta",)),
    Objective.orpo: Traits(takes=("beta",)),
    Objective.simpo: Traits(takes=("beta", "gamma")),
    Objective.unlikelihood: Traits(takes=("alpha", "form")),
    Objective.preferred_ft: Traits(unit=Unit.rankings),
}


@dataclass(kw_only=True, slots=True)
class DirectConfig:
    """An objective and its parameters; null are those that it does not have."""

    name: Objective = Objective.dpo
    reduction: Reduction = Reduction.sum
    beta: float | None = None
    label_smoothing: float | None = None
    tau: float | None = None
    alpha: float | None = None
    gamma: float | None = None
    delta: float | None = None
    desirable_weight: float | None = None
    undesirable_weight: float | None = None
    form: UnlikelihoodForm | None = None
    likelihood: float = 0.0  # weight of -log p of a prompt's best response, beside any objective
    likelihood_reduction: Reduction = Reduction.mean
    pairs: PairRule = PairRule.all
    ties: PairTies = PairTies.drop


@dataclass(kw_only=True, slots=True)
class DirectReferenceConfig:
    """The frozen policy; `path: null` is the model that the run starts from."""

    path: str | None = None
    cache: bool = operational(True)  # its log-probs are computed once and kept on disk; false: with every batch
    offload: bool = operational(False)  # on the CPU between uses


@dataclass(kw_only=True, slots=True)
class SampledConfig:
    """Held-out prompts that are answered at each evaluation: for KL, scores, win rate, and samples to read."""

    prompts: int = operational(128)  # 0: none
    max_new_tokens: int = operational(256)
    temperature: float = operational(1.0)
    batch_tokens: int = operational(32_768)
