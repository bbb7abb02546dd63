"""Composes and checks a stage's config before anything heavy is imported, and tells every problem at once.

Hydra stops at the first override that it refuses. Here each override is tried by itself when the whole fails,
so that a user with three typing mistakes reads three lines, each with the key as typed and the nearest valid one.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, cast

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlhf_pipeline.config import config_dir, register
from rlhf_pipeline.config.check import check
from rlhf_pipeline.config.explain import (
    REFUSALS,
    SHOWN,
    explain,
    first_line,
    group_files,
    key_of,
    known_keys,
    nearest,
    no_such_key,
)
from rlhf_pipeline.config.ppo import ScorerConfig
from rlhf_pipeline.config.stages import STAGES, DpoConfig, EvaluateConfig, GenerateConfig, PpoConfig
from rlhf_pipeline.errors import UserError

LONGEST = 2000  # characters of a reason: some list all that could be chosen


def compose(stage: str, overrides: list[str], *, extra_dir: str | None = None, config_name: str | None = None) -> Any:
    """The checked config object of `stage`.

    Raises:
        UserError: listing every problem found.
    """
    config, problems = examine(stage, overrides, extra_dir=extra_dir, config_name=config_name)
    refuse(stage, problems)
    return config


def examine(
    stage: str, overrides: list[str], *, extra_dir: str | None = None, config_name: str | None = None
) -> tuple[Any, list[str]]:
    """The config object of `stage`, without the overrides that were refused, and a line for each problem.

    The object is None where a key has no value or a wrong reference. Complaints about a part of the config that a
    refused override was to choose are left out: they would be about values that the user did not ask for.
    """
    node, refused = compose_node(stage, overrides, extra_dir=extra_dir, config_name=config_name)
    problems = [line for lines in refused.values() for line in lines]
    if "" in refused:
        return None, problems
    if missing := sorted(OmegaConf.missing_keys(node)):
        return None, [*problems, *(f"{key}: has no value; add {key}=..." for key in missing)]
    try:
        config = to_object(node)
    except UserError as error:
        return None, [*problems, *str(error).split("\n")]
    parts = {key_of(override) for override in refused}
    if "experiment" not in parts:
        problems += [line for line in check(config) if re.split(r"[.=:\[]", line)[0] not in parts]
    return config, problems


def compose_node(
    stage: str, overrides: list[str], *, extra_dir: str | None = None, config_name: str | None = None
) -> tuple[DictConfig, dict[str, list[str]]]:
    """The composed node without the refused overrides, and the problems by override ("": of the whole).

    Raises:
        UserError: when there is no such stage, or its primary file cannot be composed.
    """
    if stage not in STAGES:
        raise UserError(
            f"rlhf {stage}: there is no such stage{nearest(stage, list(STAGES))}; one of {', '.join(STAGES)}"
        )
    register()
    name = config_name or stage
    searchpath = [f"hydra.searchpath=['file://{Path(extra_dir).resolve()}']"] if extra_dir else []
    folders = [config_dir(), *([Path(extra_dir)] if extra_dir else [])]
    GlobalHydra.instance().clear()
    refused: dict[str, list[str]] = {}
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        try:
            node = hydra_compose(name, [*searchpath, *overrides])
        except REFUSALS:
            node, refused = _one_by_one(name, searchpath, overrides, folders)
        if added := _undeclared(node, overrides):
            node = hydra_compose(name, [*searchpath, *(o for o in overrides if o not in refused.keys() | added.keys())])
            refused |= {o: [f"{o}: {no_such_key(key, node)}" for key in keys] for o, keys in added.items()}
    if OmegaConf.get_type(node) is not STAGES[stage]:
        raise UserError(
            f"--config-name {name}: is no config of rlhf {stage}; its defaults must begin with {stage}_schema"
        )
    refused |= _of_another_stage(stage, overrides)
    if unresolvable := _unresolvable(node):
        refused[""] = unresolvable
    return node, refused


def refuse(stage: str, problems: list[str]) -> None:
    """Raise UserError if there is any problem."""
    if problems:
        count = "a problem" if len(problems) == 1 else f"{len(problems)} problems"
        lines = "\n".join(f"  - {problem}" for problem in problems)
        raise UserError(f"rlhf {stage}: {count} with the config\n{lines}\nrlhf {stage} --help lists the options.")


def to_object(node: DictConfig) -> Any:
    """Real dataclasses from a composed node.

    Raises:
        UserError: with a line for each value that is none of its type.
    """
    try:
        config: Any = OmegaConf.to_object(node)
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key or 'config'}: {first_line(error)}") from None
    if isinstance(config, PpoConfig | DpoConfig | GenerateConfig | EvaluateConfig):
        config.rewards = _scorers(config.rewards)
    return config


def _scorers(given: Any) -> dict[str, ScorerConfig]:
    """The scorers of `rewards` with their types and defaults."""
    if not isinstance(given, dict):
        raise UserError(
            f"rewards={given}: must map names of yours to scorers, as in {{helpful: {{model: {{path: ...}}}}}}"
        )
    found: dict[str, ScorerConfig] = {}
    problems = []
    for name, values in given.items():
        if not isinstance(values, dict):
            problems.append(
                f"rewards.{name}={values}: must be a mapping: model, program or url, and what else it takes"
            )
            continue
        try:
            typed = OmegaConf.merge(OmegaConf.structured(ScorerConfig), values)
            found[str(name)] = cast(ScorerConfig, OmegaConf.to_object(typed))
        except OmegaConfBaseException as error:
            problems.append(f"rewards.{name}.{error.full_key}: {first_line(error)}")
    if problems:
        raise UserError("\n".join(problems))
    return found


def _one_by_one(
    name: str, searchpath: list[str], overrides: list[str], folders: list[Path]
) -> tuple[DictConfig, dict[str, list[str]]]:
    """What the overrides that Hydra accepts compose to, and why it refuses each of the others."""
    try:
        node = hydra_compose(name, searchpath)
    except REFUSALS as error:
        said = " ".join(str(error).split("\n")[:2])
        raise UserError(f"the config {name} cannot be composed: {said}") from None
    accepted: list[str] = []
    refused: dict[str, list[str]] = {}
    for override in sorted(overrides, key=lambda o: not group_files(key_of(o), folders)):  # groups first
        try:
            node = hydra_compose(name, [*searchpath, *accepted, override])
            accepted.append(override)
        except REFUSALS as error:
            refused[override] = [
                f"{_shown(override)}: {why[:LONGEST]}" for why in explain(override, error, node, folders)
            ]
    return node, refused


def _shown(override: str) -> str:
    return override if len(override) <= SHOWN else f"{override[:SHOWN]}..."


def _undeclared(node: DictConfig, overrides: list[str]) -> dict[str, list[str]]:
    """The keys that each override of the form +key=value has put where the schema knows none."""
    found: dict[str, list[str]] = {}

    def walk(prefix: str, values: DictConfig) -> None:
        schema = OmegaConf.get_type(values)
        declared = {f.name for f in dataclasses.fields(schema)} if dataclasses.is_dataclass(schema) else None
        for name in map(str, values):
            key = f"{prefix}{name}"
            if declared is not None and name not in declared:
                override = next(o for o in overrides if o.startswith("+") and _one_holds_the_other(key_of(o), key))
                found.setdefault(override, []).append(key)
            elif OmegaConf.is_missing(values, name) or OmegaConf.is_interpolation(values, name):
                continue
            elif isinstance(values[name], DictConfig):
                walk(f"{key}.", values[name])

    walk("", node)
    return found


def _one_holds_the_other(one: str, other: str) -> bool:
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _unresolvable(node: DictConfig) -> list[str]:
    """Values that refer to something which does not exist; of those with the same reason, the first."""
    found: dict[str, str] = {}
    for key in known_keys(node):
        try:
            value = OmegaConf.select(node, key)
            if isinstance(value, ListConfig):
                OmegaConf.to_container(value, resolve=True)
        except OmegaConfBaseException as error:
            found.setdefault(first_line(error), key)
    return [f"{key}: {reason}" for reason, key in found.items()]


def _of_another_stage(stage: str, overrides: list[str]) -> dict[str, list[str]]:
    """Experiments are named <name>_<stage>; one of another stage would compose and train something else."""
    return {
        override: [f"{override}: is an experiment of rlhf {other}, by its name"]
        for override in overrides
        if key_of(override) == "experiment"
        for other in STAGES
        if other != stage and override.rstrip("]").endswith(f"_{other}")
    }
