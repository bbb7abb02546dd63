"""`rlhf dpo` against a plain training loop: the same numbers on any layout, number of processes and ZeRO stage.

With the reference on disk, beside every batch and partitioned policy, and without one; KTO's point is over the global batch.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_direct import Curve, plain_training
from helpers_runs import (
    DPO_ON_FILES,
    Forks,
    assert_same_end,
    copy_run,
    is_alive,
    logged_steps,
    metrics,
    rankings,
    relative_difference,
    series,
    verdicts,
    wait_for,
    weights,
    write_jsonl,
)

from rlhf_pipeline.config.direct import DirectConfig, Objective, PairRule, PairTies, Reduction

# 17 examples in batches of 8: the last one of an epoch holds one, fewer than there are processes, and it ties throughout
# in the first epoch.
EXAMPLES, BATCH, EPOCHS, SEED, PAUSE = 17, 8, 2, 3, 3
# An eps this large keeps Adam from making rounding errors into steps.
LR, BETAS, EPS, DECAY, CLIP = 2e-3, (0.9, 0.999), 1e-6, 0.1, 1.0
DPO = [
    *DPO_ON_FILES,
    f"seed={SEED}",
    f"batch.examples={BATCH}",
    f"train.epochs={EPOCHS}",
    f"optim.lr={LR}",
    f"optim.eps={EPS}",
    "optim.decay=constant",
    "optim.warmup_fraction=0",
    f"optim.weight_decay={DECAY}",
    f"optim.max_grad_norm={CLIP}",
]
LAYOUTS = {
    "one_row": ["batch.row_length=4000", "batch.micro_rows=1"],
    "one_each": ["batch.row_length=2", "batch.micro_rows=1"],
    "packed": ["batch.row_length=260", "batch.micro_rows=2"],
}
CASES = {
    "dpo": DirectConfig(name=Objective.dpo, beta=0.1),
    "live": DirectConfig(
        name=Objective.cdpo,
        beta=0.2,
        label_smoothing=0.1,
        likelihood=0.3,
        likelihood_reduction=Reduction.sum,
        pairs=PairRule.adjacent,
        ties=PairTies.half,
    ),
    "kto": DirectConfig(name=Objective.kto, beta=0.1, desirable_weight=1.0, undesirable_weight=1.5),
    "simpo": DirectConfig(name=Objective.simpo, beta=2.0, gamma=1.0, reduction=Reduction.mean),
}
OVERRIDES = {
    "dpo": [],
    "live": [
        "objective=cdpo",
        "objective.beta=0.2",
        "objective.likelihood=0.3",
        "objective.likelihood_reduction=sum",
        "objective.pairs=adjacent",
        "objective.ties=half",
        "reference.cache=false",
    ],
    "kto": [
        "objective=kto",
        "objective.undesirable_weight=1.5",
        "data.train=verdicts.jsonl",
        "data.heldout=unseen.jsonl",
    ],
    "simpo": ["objective=simpo"],
}
FILES = {name: "verdicts.jsonl" if name == "kto" else "train.jsonl" for name in CASES}
KILLED = int(signal.SIGKILL)
SLOW = pytest.mark.slow
Layout = tuple[int, int]  # processes, ZeRO stage


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dpo_ranks")
    rows = rankings(EXAMPLES, seed=4)
    alone = int(order(0)[-1])
    rows[alone]["scores"] = [2.0] * len(rows[alone]["scores"])
    write_jsonl(folder / "train.jsonl", rows)
    write_jsonl(folder / "verdicts.jsonl", verdicts(EXAMPLES, seed=6))
    write_jsonl(folder / "unseen.jsonl", verdicts(7, seed=8))
    write_jsonl(folder / "heldout.jsonl", rankings(7, seed=9))
    return folder


def order(epoch: int) -> np.ndarray:
    return np.random.default_rng([SEED, 0, epoch]).permutation(EXAMPLES)


@pytest.fixture(scope="module")
def plain(folder: Path, base: Path) -> dict[str, Curve]:
    import torch

    def adamw(model: Any) -> torch.optim.Optimizer:
        groups = [
            {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": DECAY},
            {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS)

    options: dict[str, Any] = {"seed": SEED, "batch": BATCH, "epochs": EPOCHS, "optimizer": adamw}
    return {
        name: plain_training(base, folder / FILES[name], config, max_grad_norm=CLIP, **options)
        for name, config in CASES.items()
    }


def made(rlhf: Forks, folder: Path, base: Path, name: str, *overrides: str, ranks: int = 1) -> Path:
    run = folder / f"runs/{name}/dpo"
    if not run.exists():
        rlhf.run(folder, *DPO, f"name={name}", f"model.path={base}", *overrides, ranks=ranks)
    return run


def undisturbed(rlhf: Forks, folder: Path, base: Path, case: str, layout: str, place: Layout) -> Path:
    name, overrides = f"{case}_{layout}_{place[0]}_{place[1]}", [*LAYOUTS[layout], *OVERRIDES[case]]
    # Computed by these processes themselves, in their own packing.
    cache = [] if case == "live" else [f"data.cache_dir=runs/cache_{layout}_{place[0]}_{place[1]}"]
    return made(rlhf, folder, base, name, *overrides, *cache, f"engine=zero{place[1]}", ranks=place[0])


def compare(run: Path, plain: Curve) -> None:
    losses, likelihoods = series(run, "train/loss"), series(run, "train/likelihood")
    worst = max(abs(a - b) for a, b in zip(losses, plain.losses, strict=True))
    norm = max(abs(a - b) for a, b in zip(series(run, "train/grad_norm"), plain.norms, strict=True))
    distance = relative_difference(weights(run / "artifact"), plain.weights)
    print(f"{run.parent.name}: losses {worst:.1e}, gradient norms {norm:.1e}, weights {distance:.1e}")
    assert worst < 1e-6
    assert norm < 1e-4
    assert distance < 1e-5
    if likelihoods:
        expected = [one for one in plain.likelihoods if one]
        assert likelihoods == pytest.approx(expected, rel=1e-5)


def test_what_the_plain_loop_tells_apart(plain: dict[str, Curve]) -> None:
    """Or a rule that does nothing would not be missed: a batch of ties, KTO's point, clipping."""
    assert plain["dpo"].losses[2] == 0.0 == plain["dpo"].norms[2]
    assert plain["live"].losses[2] > 0.1
    assert plain["kto"].drifts[0] == 0.0 and max(plain["kto"].drifts) > 0.5
    norms = [norm for curve in plain.values() for norm in curve.norms]
    assert min(norms) < CLIP < max(norms)


FAST = {
    ("dpo", "one_each", (1, 0)),
    ("dpo", "packed", (2, 1)),
    ("live", "packed", (2, 3)),
    ("kto", "packed", (2, 2)),
    ("simpo", "one_row", (2, 0)),
}
EVERY = [
    (case, layout, (ranks, stage))
    for case in CASES
    for layout in LAYOUTS
    for ranks in (1, 2)
    for stage in range(4)
] + [(case, "packed", (3, stage)) for case in CASES for stage in range(4)]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "layout", "place"), [one if one in FAST else pytest.param(*one, marks=SLOW) for one in EVERY]
)
def test_the_numbers_of_the_plain_loop(
    folder: Path, base: Path, rlhf: Forks, plain: dict[str, Curve], case: str, layout: str, place: Layout
) -> None:
    compare(undisturbed(rlhf, folder, base, case, layout, place), plain[case])


@pytest.mark.parametrize(
    ("case", "place"),
    [
        ("kto", (2, 2)),
        *(pytest.param(case, place, marks=SLOW) for case in CASES for place in [(2, 0), (2, 1), (2, 3), (3, 3)]),
    ],
)
def test_evaluations_are_those_of_one_process(folder: Path, base: Path, rlhf: Forks, case: str, place: Layout) -> None:
    """Among them the held-out loss, of KTO with the point that training has; the artifact has whole tensors."""
    one = undisturbed(rlhf, folder, base, case, "one_each", (1, 0))
    run = undisturbed(rlhf, folder, base, case, "packed", place)
    for ours, theirs in zip(metrics(run), metrics(one), strict=True):
        assert ours.keys() == theirs.keys()
        # Where the policy is its reference still, which response is ahead is a matter of rounding.
        exact = theirs.keys() if theirs["step"] > 1 else theirs.keys() & {"train/loss", "train/grad_norm", "eval/loss"}
        assert {name: ours[name] for name in exact} == pytest.approx(
            {name: theirs[name] for name in exact}, rel=1e-4, abs=1e-5
        )
    assert {k: t.shape for k, t in weights(run / "artifact").items()} == {
        k: t.shape for k, t in weights(one / "artifact").items()
    }
    assert json.loads((run / "evaluation.json").read_text()).keys() >= {"step", "loss", "comparisons"}


@pytest.mark.slow
@pytest.mark.parametrize(("case", "stage"), [("dpo", 1), ("kto", 3), ("live", 2)])
def test_kill_9_is_not_seen_in_the_end(folder: Path, base: Path, rlhf: Forks, case: str, stage: int) -> None:
    """Of both processes, at any time; the reference's file is made by both, and read again."""
    options = [*OVERRIDES[case], *LAYOUTS["packed"], f"engine=zero{stage}", "checkpoint.every=2"]
    whole = made(rlhf, folder, base, f"whole_{case}", *options, ranks=2)
    run, command = folder / "runs/killed/dpo", [*DPO, "name=killed", f"model.path={base}", *options]
    job = rlhf.start(folder, *command, ranks=2, crash=40)
    wait_for(lambda: not is_alive(job.pids[0]), job)
    if is_alive(job.pids[1]):
        job.signal(signal.SIGKILL, rank=1)
    job.wait(-KILLED, 1, 2)
    assert logged_steps(run) < 6
    rlhf.run(folder, *command, ranks=2)
    assert_same_end(run, whole)
    shutil.rmtree(run.parent)


MOVES = [((2, 3), (1, 1)), ((1, 1), (2, 3)), ((2, 2), (1, 0)), ((1, 3), (2, 1)), ((3, 1), (2, 0))]


@pytest.mark.parametrize(
    ("case", "before", "after"),
    [pytest.param(case, *move, marks=SLOW) for case in CASES for move in MOVES],
)
def test_another_layout_goes_on(
    folder: Path, base: Path, rlhf: Forks, plain: dict[str, Curve], case: str, before: Layout, after: Layout
) -> None:
    """With the file that other processes have made."""
    options = [*OVERRIDES[case], *LAYOUTS["packed"], f"data.cache_dir=runs/moved_{before[0]}_{before[1]}"]
    name = f"paused_{case}_{before[0]}_{before[1]}"
    stop = [f"engine=zero{before[1]}", f"train.stop_after={PAUSE}"]
    paused = made(rlhf, folder, base, name, *options, *stop, ranks=before[0])
    moved = copy_run(paused, folder / f"runs/{name}_{after[0]}_{after[1]}/dpo")
    command = [*DPO, f"name={moved.parent.name}", f"model.path={base}", *options, f"engine=zero{after[1]}"]
    job = rlhf.run(folder, *command, ranks=after[0])
    assert f"resumed after step {PAUSE}" in job.output and "computing the reference's" not in job.output
    compare(moved, plain[case])


@pytest.mark.parametrize(
    ("case", "place"), [pytest.param(c, p, marks=SLOW) for c in CASES for p in [(2, 1), (2, 3), (1, 2)]]
)
def test_bf16_stays_near(
    folder: Path, base: Path, rlhf: Forks, plain: dict[str, Curve], case: str, place: Layout
) -> None:
    """bf16 rounds to three digits; a response's log-prob is a sum of some twenty tokens'."""
    options = ["model.dtype=bfloat16", f"engine=zero{place[1]}", *LAYOUTS["packed"], *OVERRIDES[case]]
    run = made(rlhf, folder, base, f"bf16_{case}_{place[0]}_{place[1]}", *options, ranks=place[0])
    losses = series(run, "train/loss")
    assert all(math.isfinite(loss) for loss in losses)
    assert losses == pytest.approx(plain[case].losses, rel=0.05, abs=0.03)
    near = {name: tensor.float() for name, tensor in weights(run / "artifact").items()}
    assert relative_difference(near, plain[case].weights) < 0.03
