"""A run's folder: is it new, resumed or somebody else's? Decided before anything is loaded.

runs/<name>/<stage>/run.json      the identity of the run
                    config.yaml   the resolved config, secrets masked
                    metrics.jsonl, samples.jsonl
                    state/        resume states, see resume.py
                    artifact/     what the next stage reads, see artifact.py
                    artifacts/epoch_<n>/, artifacts/step_<n>/
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_pipeline import runtime
from rlhf_pipeline.config.identity import differences, identity, plain
from rlhf_pipeline.config.stages import CommandConfig
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.files import check_folder, read_object, write_json, write_text
from rlhf_pipeline.tracking import redact

if TYPE_CHECKING:
    from rlhf_pipeline import resume

MARKER = "run.json"
# What a command has worked for. A folder without any of it holds an attempt that came to nothing (a mistake in the name of
# a file, say), and the next attempt may have another config.
WORK = ("state", "metrics.jsonl", "artifact", "inputs.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """An opened run folder. `state` is where training goes on, None at a new run."""

    folder: Path
    stage: str
    config: dict[str, Any]  # resolved, secrets masked
    state: resume.State | None
    warnings: list[str] = field(default_factory=list)
    lock: Any = None  # held as long as the process lives

    @property
    def step(self) -> int:
        """Optimiser steps already made."""
        return self.state.step if self.state else 0

    @property
    def artifact(self) -> Path:
        return self.folder / "artifact"

    def epoch_artifact(self, epoch: int) -> Path:
        return self.folder / "artifacts" / f"epoch_{epoch}"

    def step_artifact(self, step: int) -> Path:
        return self.folder / "artifacts" / f"step_{step}"


def open_run(config: CommandConfig, stage: str) -> Run:
    """Open or create the folder `config.run_dir`. Every rank calls it; the first one writes.

    Raises:
        UserError: when the folder belongs to a run with another identity, a process is at work in it, or it cannot be made.
    """
    from rlhf_pipeline import resume

    folder = Path(config.run_dir)
    resolved = redact(plain(config))
    lock = None
    if runtime.is_main():
        check_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(folder)
    refuse_another(config)
    state, warnings = resume.find(folder)
    if runtime.is_main():
        from omegaconf import OmegaConf

        write_json(folder / MARKER, {"stage": stage, "identity": redact(plain(identity(config)))})
        write_text(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(resolved)))
    return Run(folder=folder, stage=stage, config=resolved, state=state, warnings=warnings, lock=lock)


def refuse_another(config: CommandConfig) -> None:
    """Refuse the folder of a run that has begun with another identity. Cheap: `rlhf prep` asks it too.

    Raises:
        UserError: with every difference.
    """
    folder = Path(config.run_dir)
    if not (folder / MARKER).is_file() or not any((folder / name).exists() for name in WORK):
        return
    begin_again = f"choose another name=..., or remove {folder} to begin again"
    before = read_object(folder / MARKER, begin_again).get("identity")
    if not isinstance(before, dict):
        raise UserError(f"{folder / MARKER}: damaged, it does not say what the run is; {begin_again}")
    changed = differences(before, redact(plain(identity(config))), defaults=plain(identity(type(config)())))
    if changed:
        lines = "\n".join(f"  - {line}" for line in changed)
        raise UserError(f"{folder}: holds a run with another config\n{lines}\nC{begin_again[1:]}.")


def _lock(folder: Path) -> Any:
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"{folder}: another process is at work on this run; wait for it, or choose another name=..."
        ) from None
    return lock
