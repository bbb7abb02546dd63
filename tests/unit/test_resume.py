"""States of several engines on disk; with real engines and several processes: tests/distributed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_pipeline import resume
from rlhf_pipeline.engine import Slice
from rlhf_pipeline.errors import UserError


class Held:
    """Stands for an engine that holds named vectors, in pieces of at most `piece` elements."""

    zero_stage = 1

    def __init__(
        self, *, updates: int, piece: int = 100, moments: tuple[str, ...] = (), **vectors: Sequence[float]
    ) -> None:
        self.updates = updates
        self.moments = moments
        self.piece = piece
        self.vectors = {name: torch.tensor(v) for name, v in vectors.items()}
        self.synchronised = 0

    def slices(self, what: str = "master") -> list[Slice]:
        return [
            Slice(name, start, {what: part, **{moment: torch.zeros_like(part) for moment in self.moments}})
            for name, vector in self.vectors.items()
            for start, part in zip(range(0, len(vector), self.piece), vector.split(self.piece), strict=True)
        ]

    def set_updates(self, count: int) -> None:
        self.updates = count

    def synchronise(self) -> None:
        self.synchronised += 1

    def values(self) -> dict[str, list[float]]:
        return {name: vector.tolist() for name, vector in self.vectors.items()}


def save(folder: Path, step: int, engines: Any, *, extra: Any = resume.NOTHING, keep: int = 2) -> None:
    resume.save(folder, engines, step=step, meta={"beta": 0.1 * step}, keep=keep, extra=extra)


def found(folder: Path) -> resume.State:
    state, warnings = resume.find(folder)
    assert state is not None and not warnings
    return state


def test_two_engines_and_an_average_come_back_in_other_pieces(tmp_path: Path) -> None:
    """Both have a parameter "w", and the average is of the same name as well."""
    policy = Held(updates=12, piece=2, w=[1.0, 2.0, 3.0, 4.0, 5.0], u=[6.0])
    average = Held(updates=0, piece=2, w=[1.5, 2.5, 3.5, 4.5, 5.5], u=[6.5])
    value = Held(updates=3, piece=4, w=[-1.0, -2.0, -3.0, -4.0, -5.0])
    save(tmp_path, 3, {"policy": policy, "value": value}, extra={"policy": average.slices("ema")})

    state = found(tmp_path)
    assert state.step == 3 and state.meta["updates"] == {"policy": 12, "value": 3} and state.meta["beta"] == 0.1 * 3
    other_policy = Held(updates=0, piece=3, w=[0.0] * 5, u=[0.0])
    other_average = Held(updates=0, piece=3, w=[0.0] * 5, u=[0.0])
    other_value = Held(updates=0, piece=1, w=[0.0] * 5)
    engines: Any = {"policy": other_policy, "value": other_value}
    resume.load(state, engines, {"policy": other_average.slices("ema")})
    assert other_policy.values() == policy.values()
    assert other_average.values() == average.values()
    assert other_value.values() == value.values()
    assert (other_policy.updates, other_value.updates) == (12, 3)
    assert (other_policy.synchronised, other_value.synchronised) == (1, 1)


def test_keys_say_engine_name_start_and_what(tmp_path: Path) -> None:
    from safetensors import safe_open

    policy = Held(updates=1, piece=2, **{"a.b": [1.0, 2.0, 3.0]})
    save(tmp_path, 1, {"policy": policy}, extra={"policy": [Slice("a.b", 1, {"ema": torch.ones(1)})]})
    with safe_open(found(tmp_path).path / "rank_00000.safetensors", framework="pt") as file:
        assert sorted(file.keys()) == ["policy|a.b|0|master", "policy|a.b|1|ema", "policy|a.b|2|master"]


@pytest.mark.parametrize("lacks", ["parameter", "elements", "average"])
def test_a_state_that_lacks_something_is_of_another_model(tmp_path: Path, lacks: str) -> None:
    save(tmp_path, 1, {"model": Held(updates=1, w=[1.0, 2.0])})
    wider = Held(
        updates=0, w=[0.0] * (3 if lacks == "elements" else 2), **({"v": [0.0]} if lacks == "parameter" else {})
    )
    engines: Any = {"model": wider}
    with pytest.raises(UserError, match="is of another model"):
        resume.load(found(tmp_path), engines, {"model": wider.slices("ema")} if lacks == "average" else {})


def test_a_state_of_another_optimiser_is_named_as_such(tmp_path: Path) -> None:
    adam, rms = ("exp_avg", "exp_avg_sq"), ("square_avg",)
    for before, now, lacks in ((adam, rms, "square_avg"), (rms, adam, "exp_avg and exp_avg_sq")):
        save(tmp_path, 1, {"policy": Held(updates=1, moments=before, w=[1.0, 2.0])})
        engine = Held(updates=0, moments=now, w=[0.0, 0.0])
        engines: Any = {"policy": engine}
        with pytest.raises(UserError, match=f"of policy, but not {lacks}; it is of another optimiser: set optim.algo"):
            resume.load(found(tmp_path), engines)
        assert engine.values() == {"w": [0.0, 0.0]} and engine.updates == 0, "nothing was loaded"


def test_a_state_of_another_version_is_named_as_such(tmp_path: Path) -> None:
    engines: Any = {"model": Held(updates=1, w=[1.0])}
    save(tmp_path, 1, engines)
    save(tmp_path, 2, engines)
    path = tmp_path / "state/step_00000002/state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 1}))
    state, (warning,) = resume.find(tmp_path)
    assert state is not None and state.step == 1
    assert "step_00000002: was written by another version" in warning and "damaged" not in warning


def test_states_that_the_run_could_not_go_on_from_do_not_crowd_out_new_ones(tmp_path: Path) -> None:
    """Damaged ones, or those of another version, of later steps than the run has come to again."""
    engines: Any = {"model": Held(updates=1, w=[1.0])}
    for step in (10, 20):
        save(tmp_path, step, engines)
        (tmp_path / f"state/step_{step:08d}/state.json").unlink()
    assert resume.find(tmp_path)[0] is None
    for step in (4, 8, 12):
        save(tmp_path, step, engines)
        assert found(tmp_path).step == step
    assert sorted(p.name for p in (tmp_path / "state").iterdir()) == ["step_00000008", "step_00000012"]


def test_an_average_of_an_engine_that_is_not_saved_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        save(tmp_path, 1, {"policy": Held(updates=1, w=[1.0])}, extra={"value": []})
