"""Every file under conf/ is found by itself, composed and checked: a new one is tested by being there."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from rlhf_pipeline import cli, config
from rlhf_pipeline.config.compose import compose_node, examine
from rlhf_pipeline.config.stages import STAGES

CONF = config.config_dir()
FILES = sorted(path for path in CONF.rglob("*.yaml") if path.parent.name != "data_templates")  # those are data
PRIMARIES = [path.stem for path in FILES if path.parent == CONF]
EXPERIMENTS = [path for path in FILES if path.parent.name == "experiment"]
OPTIONS = [path for path in FILES if path.parent != CONF and path not in EXPERIMENTS]


def users_part(stage: str, overrides: list[str]) -> list[str]:
    """What a shipped config leaves to its user: the files, and the model that training starts from."""
    node, refused = compose_node(stage, overrides)
    assert not refused
    part = []
    for key in ("train", "path"):
        if "data" in node and key in node.data and node.data[key] is None:
            part.append(f"data.{key}=some.jsonl")
    if "model" in node and node.model.path is None and node.model.get("shape") is None:
        part.append("model.path=some_model")
    if "prompts" in node and node.prompts.path is None:
        part.append("prompts.path=some.jsonl")
    if "folder" in node and node.folder is None:
        part.append("folder=runs/demo")
    if "systems" in node and not node.systems:
        part.append("systems={base: some_model}")
    if "mix" in node and node.mix.ratio > 0 and node.mix.train is None:
        part.append("mix.train=some_text")
    if "ptx" in node and node.ptx.coefficient > 0 and node.ptx.train is None:
        part.append("ptx.train=some_text")
    choosing = node.get("best_of") != 1 and "systems" not in node  # else there is nothing to choose by them
    if "rewards" in node and choosing:
        models = {name: one.get("model") for name, one in node.rewards.items()} or {"rm": {}}
        added = "" if node.rewards else "+"
        part += [
            f"{added}rewards.{name}.model.path=m"
            for name, one in models.items()
            if one is not None and not one.get("path")
        ]
    return part


def problems(stage: str, *overrides: str) -> list[str]:
    return examine(stage, [*overrides, *users_part(stage, list(overrides))])[1]


def stages_with(group: str) -> list[str]:
    """The stages whose primary file chooses from a group."""
    defaults = {stage: OmegaConf.load(CONF / f"{stage}.yaml").defaults for stage in STAGES}
    return [stage for stage, entries in defaults.items() if any(OmegaConf.is_dict(e) and group in e for e in entries)]


def test_every_stage_has_command_schema_primary_file_and_recipe() -> None:
    assert sorted(PRIMARIES) == sorted(STAGES) == sorted(cli.STAGES)
    assert all(find_spec(f"rlhf_pipeline.recipes.{stage}") for stage in STAGES)


@pytest.mark.parametrize("stage", PRIMARIES)
def test_primary_config(stage: str) -> None:
    assert problems(stage) == []


@pytest.mark.parametrize("path", OPTIONS, ids=lambda path: f"{path.parent.name}={path.stem}")
def test_group_option_is_accepted_by_a_stage(path: Path) -> None:
    group = path.relative_to(CONF).parent.as_posix()
    stages = stages_with(group)
    assert stages, f"no primary config chooses from conf/{group}"
    assert any(problems(stage, f"{group}={path.stem}") == [] for stage in stages)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiment(path: Path) -> None:
    stage = next((s for s in STAGES if path.stem.endswith(f"_{s}")), None)
    assert stage, f"{path.name}: an experiment is named <name>_<stage>.yaml"
    assert path.read_text().startswith("# @package _global_\n# "), "the package, then what the experiment is"
    assert problems(stage, f"experiment={path.stem}") == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(CONF).as_posix())
def test_composes_outside_of_hydra(path: Path) -> None:
    """hydra's and now's resolvers only work inside a run, and a time in a path differs between ranks."""
    text = "\n".join(line for line in path.read_text().splitlines() if "subdir:" not in line)
    assert not re.search(r"\$\{(hydra|now)[:.]", text)


# Ouyang et al. 2022, appendix C.1 (SFT) and C.3 (the model that PPO starts from), read from the paper and not from
# conf/: learning rate, batch, epochs, dropout, share of pretraining examples.
INSTRUCTGPT = {
    "instructgpt_1b_sft": (9.65e-6, 32, 16, 0.2, 0.0),
    "instructgpt_6b_sft": (9.65e-6, 32, 16, 0.2, 0.0),
    "instructgpt_175b_sft": (5.03e-6, 8, 16, 0.2, 0.0),
    "instructgpt_1b_ppo_init_sft": (5e-6, 32, 2, 0.0, 0.1),
    "instructgpt_6b_ppo_init_sft": (1.04e-5, 32, 2, 0.0, 0.1),
    "instructgpt_175b_ppo_init_sft": (2.45e-6, 8, 2, 0.0, 0.1),
}


@pytest.mark.parametrize("name", INSTRUCTGPT)
def test_instructgpt_has_the_papers_figures(name: str) -> None:
    overrides = [f"experiment={name}"]
    run = config.load("sft", overrides + users_part("sft", overrides))
    figures = (run.optim.lr, run.batch.examples, run.train.epochs, run.model.dropout, run.mix.ratio)
    assert figures == INSTRUCTGPT[name]
    optim = run.optim
    assert (optim.betas, optim.decay, optim.final_lr_fraction) == ([0.9, 0.95], "cosine", 0.1)
    assert (optim.warmup_steps, optim.warmup_fraction) == (0, 0.0)
    assert (run.data.max_length, run.data.max_prompt_length, run.data.long_prompt) == (2048, 1024, "drop")
    assert run.model.dtype == "bfloat16"


def test_instructgpts_reward_model_has_the_papers_figures() -> None:
    """Appendix C.2 and equation 1 of section 3.5."""
    overrides = ["experiment=instructgpt_6b_rm"]
    run = config.load("rm", overrides + users_part("rm", overrides))
    assert (run.optim.lr, run.batch.examples, run.train.epochs) == (9e-6, 64, 1)
    assert (run.optim.betas, run.optim.decay, run.optim.final_lr_fraction) == ([0.9, 0.95], "cosine", 0.1)
    assert (run.optim.warmup_steps, run.optim.warmup_fraction) == (0, 0.0)
    assert (run.objective.loss, run.objective.ties, run.objective.divide_by) == ("pairwise", "drop", "literal")
    assert run.data.rankings == "whole"
    assert (run.data.max_length, run.data.max_prompt_length, run.data.long_prompt) == (2048, 1024, "drop")


def test_lists_are_not_empty() -> None:
    assert PRIMARIES and OPTIONS and set(INSTRUCTGPT) < {path.stem for path in EXPERIMENTS}
