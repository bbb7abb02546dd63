"""Typed configs: where conf/ is, how Hydra learns our types, and how a test or a notebook composes one."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any


def config_dir() -> Path:
    """The folder of YAML files: inside an installed wheel, else at the top of the repository."""
    packaged = Path(__file__).resolve().parent.parent / "conf"
    return packaged if packaged.is_dir() else Path(__file__).resolve().parents[2] / "conf"


@cache
def register() -> None:
    """Tell Hydra the root schema of every stage."""
    from hydra.core.config_store import ConfigStore

    from rlhf_pipeline.config.stages import STAGES

    for stage, schema in STAGES.items():
        ConfigStore.instance().store(name=f"{stage}_schema", node=schema)


def load(stage: str, overrides: list[str] | None = None) -> Any:
    """The config object that `rlhf <stage> <overrides>` would run with, checked.

    Raises:
        UserError: with every problem of the overrides and of the composed config.
    """
    from rlhf_pipeline.config.compose import compose

    return compose(stage, overrides or [])
