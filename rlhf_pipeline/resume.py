"""Crash-safe training state, apart from artifacts: what a killed run needs to go on as if nothing had happened.

    <run>/state/step_00000120/rank_00000.safetensors   slices of masters and moments: "<engine>|<name>|<start>|<what>"
    <run>/state/step_00000120/state.json               step, counters, identity, versions, checksums; written last

A run has one engine or several, each with its own count of updates. What else there is one of for each of an engine's
elements (an average of the weights, say) is saved beside its own. Slices are named by what they are and not by who held
them, so that any number of processes and any ZeRO stage can go on from them. Randomness is not saved: it is derived from
seed, step and example. Never a pickle.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_pipeline import runtime
from rlhf_pipeline.engine import Engine, Slice
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.files import disk_errors, is_intact, publish, read_small, sealed, sha256, sync, write_json

FORMAT = 2
NOTHING: Mapping[str, Sequence[Slice]] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """A verified state on disk."""

    path: Path
    step: int  # of the run: updates, and for PPO iterations
    meta: dict[str, Any]


def save(
    run_dir: Path,
    engines: Mapping[str, Engine],
    *,
    step: int,
    meta: dict[str, Any],
    keep: int,
    extra: Mapping[str, Sequence[Slice]] = NOTHING,
) -> None:
    """Write the state after `step`, then prune all but the last `keep`. Called by every rank.

    Args:
        engines: by name, all at one ZeRO stage.
        extra: more slices of an engine, by its name (of an `Ema` of it, say); every rank gives those it owns.

    Raises:
        UserError: on every rank, when any rank's disk is full; the previous states stay.
    """
    final = _folder(run_dir, step)
    partial = final.with_name(final.name + ".partial")
    previous = max((s for s in _steps(run_dir) if s < step), default=None)
    kept = f"The state of step {previous} is intact." if previous is not None else "There is no earlier state."
    with runtime.main_first():
        if runtime.is_main():
            with disk_errors(f"the state of step {step}", partial, kept=kept):
                for left_over in final.parent.glob("*.partial"):
                    shutil.rmtree(left_over)
                partial.mkdir(parents=True)
    name = f"rank_{runtime.rank():05d}.safetensors"
    failure, digest = "", ""
    with runtime.at_own_pace():
        try:
            with disk_errors(f"the state of step {step}", partial, kept=kept):
                _write_slices(partial / name, _owned(engines, extra))
                digest = sha256(partial / name)
        except UserError as error:
            failure = str(error)
    reports = _gather({"file": name, "sha256": digest, "failure": failure})
    with runtime.at_own_pace():
        if runtime.is_main() and not any(r["failure"] for r in reports):
            try:
                with disk_errors(f"the state of step {step}", partial, kept=kept):
                    files = {r["file"]: r["sha256"] for r in reports}
                    counts = {"step": step, "updates": {name: engine.updates for name, engine in engines.items()}}
                    content = {**meta, **layout(engines), **counts, "format": FORMAT, "files": files}
                    write_json(partial / "state.json", sealed(content))
                    publish(partial, final)
                    _prune(run_dir, step, keep)
            except UserError as error:
                reports.append({"failure": str(error)})
    failures = [r["failure"] for r in _gather({"failure": next((r["failure"] for r in reports if r["failure"]), "")})]
    if any(failures):
        if runtime.is_main():
            shutil.rmtree(partial, ignore_errors=True)
        raise UserError(next(f for f in failures if f))


def layout(engines: Mapping[str, Engine]) -> dict[str, int]:
    """What a state says of how it is cut up; going on in another layout may change the last bits."""
    (zero_stage,) = {engine.zero_stage for engine in engines.values()}
    return {"num_processes": runtime.world_size(), "zero_stage": zero_stage}


def find(run_dir: Path) -> tuple[State | None, list[str]]:
    """The newest state that is whole, and a warning for every newer one that is damaged or of another version."""
    warnings: list[str] = []
    for step in reversed(_steps(run_dir)):
        folder = _folder(run_dir, step)
        try:
            meta = json.loads(read_small(folder / "state.json"))
            if meta["format"] != FORMAT:
                warnings.append(
                    f"{folder}: was written by another version (its format is {meta['format']}, this version's {FORMAT}); "
                    "going back to the state before it"
                )
                continue
            if not is_intact(meta):
                raise ValueError("state.json")
            # Of this folder and no other one, whatever it says.
            strange = [n for n in meta["files"] if not re.fullmatch(r"rank_\d+\.safetensors", n)]
            bad = strange or [n for n, digest in meta["files"].items() if sha256(folder / n) != digest]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            bad = [str(error)]
            meta = {}
        if not bad:
            return State(path=folder, step=step, meta=meta), warnings
        warnings.append(f"{folder}: damaged ({', '.join(bad)}); going back to the state before it")
    return None, warnings


def load(state: State, engines: Mapping[str, Engine], extra: Mapping[str, Sequence[Slice]] = NOTHING) -> None:
    """Put the saved slices into engines and `extra`, whatever processes and ZeRO stage wrote them. By every rank.

    Raises:
        UserError: when a parameter of an engine is not in the state, or its optimiser was another.
    """
    from safetensors import safe_open

    files = [safe_open(state.path / name, framework="pt") for name in sorted(state.meta["files"])]
    saved: dict[tuple[str, str, str], list[tuple[int, Any, str]]] = defaultdict(list)
    for file in files:
        for key in file.keys():  # noqa: SIM118  (a safetensors handle is no dict)
            of, rest = key.split("|", 1)
            name, start, what = rest.rsplit("|", 2)
            saved[of, name, what].append((int(start), file, key))
    for of, engine in engines.items():
        held = {what for name, _, what in saved if name == of}
        if missing := [what for what in engine.moments if what not in held]:
            raise UserError(
                f"{state.path}: holds {', '.join(sorted(held))} of {of}, but not {' and '.join(missing)}; "
                "it is of another optimiser: set optim.algorithm to that one, or start a run of another name"
            )
        engine.set_updates(state.meta["updates"][of])
        with torch.no_grad():
            for own in (*engine.slices(), *extra.get(of, ())):
                for what, tensor in own.tensors.items():
                    _fill(tensor, own, saved[of, own.name, what], state)
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


def _owned(engines: Mapping[str, Engine], extra: Mapping[str, Sequence[Slice]]) -> dict[str, Tensor]:
    """What this rank writes, by key. At ZeRO stage 0 every rank holds all of it, and the first one writes."""
    assert extra.keys() <= engines.keys(), f"{extra.keys()}, {engines.keys()}"
    return {
        f"{of}|{own.name}|{own.start}|{what}": tensor
        for of, engine in engines.items()
        if engine.zero_stage > 0 or runtime.is_main()
        for own in (*engine.slices(), *extra.get(of, ()))
        for what, tensor in own.tensors.items()
    }


def _write_slices(path: Path, slices: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    save_file({key: tensor.detach().cpu() for key, tensor in slices.items()}, path)
    sync(path)


def _prune(run_dir: Path, step: int, keep: int) -> None:
    """Keep the last `keep` states up to `step`. Later ones are those that the run could not go on from."""
    steps = _steps(run_dir)
    kept = [s for s in steps if s <= step][-keep:]
    for old in steps:
        if old not in kept:
            shutil.rmtree(_folder(run_dir, old))


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
