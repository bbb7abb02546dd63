"""What conf/objective/ and the published runs of `rlhf dpo` hold, against figures written down here from their sources."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
from omegaconf import OmegaConf

from rlhf_pipeline import config
from rlhf_pipeline.config.direct import TRAITS, DirectConfig, Objective
from rlhf_pipeline.config.schema import Algorithm, Decay
from rlhf_pipeline.errors import UserError

GIVEN = ["data.train=some.jsonl", "model.path=some_model"]

# Every field that is not the default of DirectConfig. The sources are in docs/dpo.md.
PUBLISHED: dict[str, dict[str, Any]] = {
    "dpo": {"beta": 0.1},
    "cdpo": {"beta": 0.1, "label_smoothing": 0.1},
    "ipo": {"tau": 0.1},
    "rdpo": {"beta": 0.1, "alpha": 0.05},
    "plackett_luce": {"beta": 0.1},
    "kto": {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
    "slic": {"delta": 1.0, "likelihood": 0.1, "likelihood_reduction": "sum"},
    "rrhf": {"reduction": "mean", "likelihood": 1.0},
    "cpo": {"beta": 0.1, "likelihood": 1.0},
    "orpo": {"reduction": "mean", "beta": 0.1, "likelihood": 1.0},
    "simpo": {"reduction": "mean", "beta": 2.0, "gamma": 1.0},
    "unlikelihood": {"alpha": 0.1, "form": "token", "likelihood": 1.0},
    "preferred_ft": {"reduction": "mean"},
}


def not_default(objective: DirectConfig) -> dict[str, Any]:
    plain = DirectConfig()
    return {
        f.name: getattr(objective, f.name)
        for f in fields(objective)
        if f.name != "name" and getattr(objective, f.name) != getattr(plain, f.name)
    }


def test_every_objective_has_a_file_and_traits() -> None:
    files = {path.stem for path in (config.config_dir() / "objective").glob("*.yaml")}
    assert files == set(PUBLISHED) == {one.value for one in Objective} == {one.value for one in TRAITS}


@pytest.mark.parametrize("name", PUBLISHED)
def test_objective_has_the_published_values(name: str) -> None:
    objective = config.load("dpo", [*GIVEN, f"objective={name}"]).objective
    assert objective.name is Objective(name)
    assert not_default(objective) == PUBLISHED[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_file_has_no_parameter_that_its_objective_does_not_take(name: str) -> None:
    """In the file itself, so that null is not written either; and its comment names a source."""
    path = config.config_dir() / "objective" / f"{name}.yaml"
    parameters = {f.name for f in fields(DirectConfig) if f.default is None}
    assert set(OmegaConf.load(path)) & parameters == set(TRAITS[Objective(name)].takes)
    assert path.read_text().startswith("# ")


def test_a_choice_leaves_nothing_of_another() -> None:
    """Neither of the default, nor in an experiment, whatever stands first on the line."""
    for line in (["experiment=lab_dpo", "objective=ipo"], ["objective=ipo", "experiment=lab_dpo"]):
        assert not_default(config.load("dpo", line).objective) == PUBLISHED["ipo"]


def test_an_experiment_chooses_the_objective_and_the_command_line_another() -> None:
    assert config.load("dpo", [*GIVEN, "experiment=simpo_gemma2_dpo"]).objective.name is Objective.simpo
    # The experiment's own values stand behind every choice, so that one which does not take them is refused.
    with pytest.raises(UserError, match=r"objective\.gamma=5\.0: objective=dpo has no such parameter"):
        config.load("dpo", [*GIVEN, "experiment=simpo_gemma2_dpo", "objective=dpo"])


# Objective, reduction, beta, gamma, learning rate, batch, longest example, longest prompt. Read in the authors' files, but
# for Rafailov et al., which is appendix B of the paper.
RUNS: dict[str, tuple[str, str, float, float | None, float, int, int, int]] = {
    "rafailov_hh_dpo": ("dpo", "sum", 0.1, None, 1e-6, 64, 512, 256),
    "rafailov_tldr_dpo": ("dpo", "sum", 0.5, None, 1e-6, 64, 565, 512),
    "zephyr_7b_dpo": ("dpo", "sum", 0.01, None, 5e-7, 128, 1024, 512),
    "tulu3_8b_dpo": ("dpo", "mean", 5.0, None, 5e-7, 128, 2048, 1800),
    "tulu3_70b_dpo": ("dpo", "mean", 5.0, None, 2e-7, 128, 2048, 1800),
    "simpo_mistral_base_dpo": ("simpo", "mean", 2.0, 1.6, 3e-7, 128, 1024, 512),
    "simpo_mistral_instruct_dpo": ("simpo", "mean", 2.5, 0.3, 5e-7, 128, 2048, 1800),
    "simpo_llama3_base_dpo": ("simpo", "mean", 2.0, 2.0 * 0.5, 6e-7, 128, 2048, 1800),
    "simpo_llama3_instruct_dpo": ("simpo", "mean", 2.5, 2.5 * 0.55, 1e-6, 128, 2048, 1800),
    "simpo_llama3_instruct_v2_dpo": ("simpo", "mean", 10.0, 10.0 * 0.3, 1e-6, 128, 2048, 1800),
    "simpo_gemma2_dpo": ("simpo", "mean", 10.0, 10.0 * 0.5, 8e-7, 128, 2048, 1800),
}


@pytest.mark.parametrize("name", RUNS)
def test_published_run(name: str) -> None:
    run = config.load("dpo", [*GIVEN, f"experiment={name}"])
    objective, figures = run.objective, RUNS[name]
    found = (objective.name, objective.reduction, objective.beta, objective.gamma, run.optim.lr, run.batch.examples)
    assert (*found, run.data.max_length, run.data.max_prompt_length) == figures
    assert (run.train.epochs, run.optim.weight_decay, objective.likelihood) == (1, 0.0, 0.0)
    optim = run.optim
    schedule = (optim.algorithm, optim.decay, optim.final_lr_fraction, optim.warmup_steps, optim.warmup_fraction)
    if name.startswith("rafailov"):
        assert schedule == (Algorithm.rmsprop, Decay.constant, 0.0, 150, 0.0)
        assert (optim.betas[1], optim.max_grad_norm) == (0.99, 10.0)
    else:
        decay = Decay.linear if name.startswith("tulu3") else Decay.cosine
        assert schedule == (Algorithm.adamw, decay, 0.0, 0, 0.1)
        assert optim.betas == [0.9, 0.999]
    assert optim.warmup_start_fraction == 0.0


def test_small_runs_start_from_a_model_that_is_fine_tuned_on_the_same_data() -> None:
    """And leave the objective to the user: any of them runs with the same data."""
    for name in ("hh", "ultrafeedback"):
        tuned = config.load("sft", ["data.train=some.jsonl", f"experiment={name}_sft"])
        run = config.load("dpo", ["data.train=some.jsonl", f"experiment={name}_dpo", "objective=simpo"])
        assert run.model.path == f"{tuned.run_dir}/artifact"
        assert (run.data.max_length, run.data.max_prompt_length) == (
            tuned.data.max_length,
            tuned.data.max_prompt_length,
        )
        assert (run.data.heldout_fraction, run.seed) == (tuned.data.heldout_fraction, tuned.seed)
