"""A loss, a gradient or weights that are not finite end a run, with the step, the examples and the state intact."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
from helpers_runs import TINY_RUN, Forks, copy_run, dialogues, files_below, metrics, states, weights, write_jsonl

TRAIN = [
    "sft",
    "data.train=train.jsonl",
    "data.heldout=heldout.jsonl",
    "data.max_length=128",
    "data.max_prompt_length=64",
    "batch.examples=6",
    "checkpoint.every=1",
    "checkpoint.keep=100",
    *TINY_RUN,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("not_finite")
    write_jsonl(folder / "train.jsonl", dialogues(24))
    write_jsonl(folder / "heldout.jsonl", dialogues(4, seed=1))
    return folder


def state_bytes(run: Path) -> dict[str, bytes]:
    return {name: (run / "state" / name).read_bytes() for name in files_below(run / "state")}


def test_a_rate_that_explodes(folder: Path, base: Path, rlhf: Forks) -> None:
    command = [*TRAIN, f"model.path={base}", "optim.lr=1e30", "name=explodes", "evaluation.every=0"]
    job = rlhf.run(folder, *command, code=2)
    run = folder / "runs/explodes/sft"
    failed = len(states(run)) + 1
    assert f"step {failed}: the " in job.output and "is not finite" in job.output
    assert "Traceback" not in job.output
    assert job.output.count("train.jsonl:") == 6, "the origins of the batch"
    assert states(run) == list(range(1, failed))
    assert not (run / "artifact").exists()
    before = state_bytes(run)
    again = rlhf.run(folder, *command, code=2)
    assert f"resumed after step {failed - 1}" in again.output and f"step {failed}: the " in again.output
    assert state_bytes(run) == before


def test_poisoned_weights(folder: Path, base: Path, rlhf: Forks, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    poisoned = tmp_path / "poisoned"
    shutil.copytree(base, poisoned)
    tensors = weights(base)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = math.nan
    save_file(tensors, poisoned / "model.safetensors", metadata={"format": "pt"})
    job = rlhf.run(folder, *TRAIN, f"model.path={poisoned}", "name=poisoned", code=2)
    assert "not finite" in job.output
    assert "Traceback" not in job.output
    assert states(folder / "runs/poisoned/sft") == []


def test_an_earlier_state_stays(folder: Path, base: Path, rlhf: Forks) -> None:
    """Weights that break down in the middle of a run: here the moments of a saved state are replaced."""
    import json

    from safetensors import safe_open
    from safetensors.torch import save_file

    from rlhf_pipeline.files import sealed, sha256

    command = [*TRAIN, f"model.path={base}", "optim.lr=1e-3"]
    rlhf.run(folder, *command, "name=healthy", "train.stop_after=2")
    run = copy_run(folder / "runs/healthy/sft", folder / "runs/breaks/sft")
    newest = run / "state/step_00000002"
    with safe_open(newest / "rank_00000.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    key = next(k for k in tensors if "up_proj" in k and k.endswith("|master"))
    tensors[key][7] = math.inf
    save_file(tensors, newest / "rank_00000.safetensors")
    state = json.loads((newest / "state.json").read_text())
    state["files"]["rank_00000.safetensors"] = sha256(newest / "rank_00000.safetensors")
    (newest / "state.json").write_text(json.dumps(sealed(state)))
    before = state_bytes(run)
    job = rlhf.run(folder, *command, "name=breaks", code=2)
    assert "step 3: the loss is not finite (nan)" in job.output and job.output.count("train.jsonl:") == 6
    assert state_bytes(run) == before
    # The way out that the message leaves: without the bad state the run goes on from the one before.
    shutil.rmtree(newest)
    rlhf.run(folder, *command, "name=breaks")
    rlhf.run(folder, *command, "name=healthy")
    assert weights(run / "artifact").keys() and metrics(run) == metrics(folder / "runs/healthy/sft")


def test_weights_that_the_last_step_broke_are_not_handed_over(folder: Path, base: Path, rlhf: Forks) -> None:
    """No later step would notice; the held-out loss does."""
    job = rlhf.run(folder, *TRAIN, f"model.path={base}", "optim.lr=1e30", "name=last", "train.max_steps=1", code=2)
    assert "not finite" in job.output and "Traceback" not in job.output
    assert not (folder / "runs/last/sft/artifact").exists()
