"""The losses of twenty steps of each stage, as they were when somebody last looked: <stage>.txt, "step loss" a line.

A change that is not meant to change numbers leaves them equal; one that is meant to runs `make golden` and says why in
the commit. Compared at 1e-5 relative: other processors and versions round differently, and twenty steps amplify little.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers_runs import TINY_RUN, Forks, metrics

RELATIVE = 1e-5
HERE = Path(__file__).parent
COMMON = ["name=golden", "train.max_steps=20", "evaluation.every=0", "evaluation.before=false", *TINY_RUN]
RUNS = {
    "pretrain": [
        "data.train=lab:documents",
        "data.lab.documents=500",
        "data.max_length=96",
        "tokenizer.train_documents=500",
        "train.epochs=2",
        "batch.tokens=1000",
        "batch.row_length=256",
        "model.shape.architecture=llama",
        "model.shape.hidden=48",
        "model.shape.layers=3",
        "model.shape.heads=4",
        "model.shape.kv_heads=2",
        "model.shape.intermediate=96",
        "model.shape.vocab_size=512",
        "model.shape.context=256",
    ],
    "sft": [
        "data.train=lab:demonstrations",
        "data.lab.demonstrations=300",
        "data.lab.documents=300",
        "data.max_length=96",
        "data.max_prompt_length=64",
        "model.path=runs/golden/pretrain/artifact",
        "mix.train=lab:documents",
        "mix.ratio=0.2",
        "batch.examples=16",
        "batch.row_length=256",
        "train.epochs=2",
        "optim.lr=1.0e-3",
    ],
    "rm": [
        "data=lab_rankings",
        "data.lab.rankings=160",
        "data.lab.heldout_gold_rankings=10",
        "data.lab.demonstrations=100",
        "normalise.train=lab:demonstrations",
        "model.path=runs/golden/sft/artifact",
        "batch.examples=8",
        "evaluation.samples=0",
        "optim.lr=3.0e-4",
    ],
    "dpo": [
        "data=lab_rankings",
        "data.lab.rankings=160",
        "data.lab.heldout_gold_rankings=10",
        "model.path=runs/golden/sft/artifact",
        "batch.examples=8",
        "sampled.prompts=0",
        "optim.lr=1.0e-3",
    ],
}


@pytest.fixture(scope="module")
def curves(rlhf: Forks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, float]]:
    """stage -> step -> loss of the present code. One process, one thread, each stage on the one before."""
    folder = tmp_path_factory.mktemp("golden")
    found = {}
    for stage, overrides in RUNS.items():
        rlhf.run(folder, stage, *COMMON, *overrides)
        lines = metrics(folder / "runs/golden" / stage)
        found[stage] = {int(line["step"]): line["train/loss"] for line in lines if "train/loss" in line}
    return found


def read(path: Path) -> dict[int, float]:
    rows = [line.split() for line in path.read_text().splitlines() if not line.startswith("#")]
    return {int(step): float(loss) for step, loss in rows}


def write(path: Path, curve: dict[int, float]) -> None:
    import torch
    import transformers

    header = f"# torch {torch.__version__}, transformers {transformers.__version__}\n"
    path.write_text(header + "".join(f"{step} {loss:.9g}\n" for step, loss in curve.items()))


@pytest.mark.parametrize("stage", RUNS)
def test_curve(stage: str, curves: dict[str, dict[int, float]], writes: bool) -> None:
    path = HERE / f"{stage}.txt"
    if writes:
        write(path, curves[stage])
    expected = read(path)
    assert list(expected) == list(range(1, 21))
    assert sum(expected[step] for step in range(16, 21)) < sum(expected[step] for step in range(1, 6)), "it learns"
    worst = max(abs(curves[stage][step] / loss - 1) for step, loss in expected.items())
    print(f"{stage}: largest relative difference {worst:.1e}")
    assert curves[stage] == pytest.approx(expected, rel=RELATIVE)
