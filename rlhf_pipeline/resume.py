"""Crash-safe training state, apart from artifacts: what a killed run needs to go on as if nothing had happened.

    <run>/state/step_00000120/rank_00000.safetensors   slices of masters and moments, named by parameter and range
    <run>/state/step_00000120/state.json               step, counters, identity, versions, checksums; written last

Slices are named by what they are and not by who held them, so that any number of processes and any ZeRO stage can go
on from them. Randomness is not saved: it is derived from seed, step and example. Never a pickle.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_pipeline import runtime
from rlhf_pipeline.engine import Engine, Slice
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.files import disk_errors, publish, sha256, sync, write_json

FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """A verified state on disk."""

    path: Path
    step: int  # optimiser steps made
    meta: dict[str, Any]


def save(run_dir: Path, engine: Engine, *, step: int, meta: dict[str, Any], keep: int) -> None:
    """Write the state after `step` optimiser steps, then prune all but the last `keep`. Called by every rank.

    Raises:
        UserError: on every rank, when any rank's disk is full; the previous states stay.
    """
    final = _folder(run_dir, step)
    partial = final.with_name(final.name + ".partial")
    previous = max((s for s in _steps(run_dir)), default=None)
    kept = f"The state of step {previous} is intact." if previous is not None else "There is no earlier state."
    with runtime.main_first():
        if runtime.is_main():
            with disk_errors(f"the state of step {step}", partial, kept=kept):
                for left_over in final.parent.glob("*.partial"):
                    shutil.rmtree(left_over)
                partial.mkdir(parents=True)
    name = f"rank_{runtime.rank():05d}.safetensors"
    failure, digest = "", ""
    try:
        with disk_errors(f"the state of step {step}", partial, kept=kept):
            _write_slices(partial / name, [] if engine.zero_stage == 0 and runtime.rank() > 0 else engine.slices())
            digest = sha256(partial / name)
    except UserError as error:
        failure = str(error)
    reports = _gather({"file": name, "sha256": digest, "failure": failure})
    if runtime.is_main() and not any(r["failure"] for r in reports):
        try:
            with disk_errors(f"the state of step {step}", partial, kept=kept):
                files = {r["file"]: r["sha256"] for r in reports}
                layout = {"num_processes": runtime.world_size(), "zero_stage": engine.zero_stage}
                write_json(partial / "state.json", {**meta, **layout, "format": FORMAT, "step": step, "files": files})
                publish(partial, final)
                for old in _steps(run_dir)[:-keep]:
                    shutil.rmtree(_folder(run_dir, old))
        except UserError as error:
            reports.append({"failure": str(error)})
    failures = [r["failure"] for r in _gather({"failure": next((r["failure"] for r in reports if r["failure"]), "")})]
    if any(failures):
        if runtime.is_main():
            shutil.rmtree(partial, ignore_errors=True)
        raise UserError(next(f for f in failures if f))


def find(run_dir: Path) -> tuple[State | None, list[str]]:
    """The newest state that is whole, and a warning for every newer one that is damaged."""
    warnings: list[str] = []
    for step in reversed(_steps(run_dir)):
        folder = _folder(run_dir, step)
        try:
            meta = json.loads((folder / "state.json").read_text())
            bad = [n for n, digest in meta["files"].items() if sha256(folder / n) != digest]
            if meta["format"] != FORMAT:
                bad.append("format")
        except (OSError, ValueError, KeyError) as error:
            bad = [str(error)]
            meta = {}
        if not bad:
            return State(path=folder, step=step, meta=meta), warnings
        warnings.append(f"{folder}: damaged ({', '.join(bad)}); going back to the state before it")
    return None, warnings


def load(state: State, engine: Engine) -> None:
    """Put the saved slices into the engine, whatever processes and ZeRO stage wrote them. Called by every rank.

    Raises:
        UserError: when a parameter of the model is not in the state.
    """
    from safetensors import safe_open

    files = [safe_open(state.path / name, framework="pt") for name in sorted(state.meta["files"])]
    saved: dict[tuple[str, str], list[tuple[int, Any, str]]] = defaultdict(list)
    for file in files:
        for key in file.keys():  # noqa: SIM118  (a safetensors handle is no dict)
            name, start, what = key.rsplit("|", 2)
            saved[name, what].append((int(start), file, key))
    engine.set_updates(state.step)
    with torch.no_grad():
        for own in engine.slices():
            for what, tensor in own.tensors.items():
                _fill(tensor, own, saved[own.name, what], state)
    engine.synchronise()


def _fill(tensor: Tensor, own: Slice, pieces: list[tuple[int, Any, str]], state: State) -> None:
    filled = 0
    for start, file, key in pieces:
        piece = file.get_slice(key)
        low, high = max(own.start, start), min(own.start + own.numel, start + piece.get_shape()[0])
        if low < high:
            tensor[low - own.start : high - own.start].copy_(piece[low - start : high - start])
            filled += high - low
    if filled != own.numel:
        raise UserError(f"{state.path}: holds {filled} of {own.numel} elements of {own.name}; it is of another model")


def _write_slices(path: Path, slices: list[Slice]) -> None:
    from safetensors.torch import save_file

    tensors = {f"{s.name}|{s.start}|{what}": t.detach().cpu() for s in slices for what, t in s.tensors.items()}
    save_file(tensors, path)
    sync(path)


def _gather(report: dict[str, str]) -> list[dict[str, str]]:
    if runtime.world_size() == 1:
        return [report]
    reports: list[dict[str, str]] = [{} for _ in range(runtime.world_size())]
    torch.distributed.all_gather_object(reports, report)
    return reports


def _folder(run_dir: Path, step: int) -> Path:
    return run_dir / "state" / f"step_{step:08d}"


def _steps(run_dir: Path) -> list[int]:
    names = (p.name for p in (run_dir / "state").glob("step_*"))
    return sorted(int(name.removeprefix("step_")) for name in names if name.removeprefix("step_").isdigit())
