"""The reward model against a plain training loop: the same numbers on any layout, number of processes and ZeRO stage.

With ties modelled, a scalar with a learning rate of its own is partitioned along with the weights.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_rankings import davidson, plain_objective, plain_rewards, plain_start, plain_tokens, ranks_of
from helpers_runs import (
    RM_ON_FILES,
    Forks,
    copy_run,
    metrics,
    rankings,
    relative_difference,
    series,
    weights,
    write_jsonl,
)

from rlhf_pipeline.config.ranking import RankingConfig, Ties
from rlhf_pipeline.recipes.rm import TIE_STEP

# 17 prompts in batches of 8: the last one of an epoch holds one, fewer than there are processes, and it ties throughout
# in the first epoch.
EXAMPLES, BATCH, EPOCHS, SEED, PAUSE = 17, 8, 2, 3, 3
LR, BETAS, EPS, DECAY, CLIP = 2e-3, (0.9, 0.95), 1e-8, 0.1, 2.0
RM = [
    *RM_ON_FILES,
    f"seed={SEED}",
    f"batch.examples={BATCH}",
    f"train.epochs={EPOCHS}",
    f"optim.lr={LR}",
    "optim.decay=constant",
    f"optim.weight_decay={DECAY}",
    f"optim.max_grad_norm={CLIP}",
]
LAYOUTS = {
    "one_row": ["batch.row_length=4000", "batch.micro_rows=1"],
    "one_each": ["batch.row_length=2", "batch.micro_rows=1"],
    "packed": ["batch.row_length=260", "batch.micro_rows=2"],
}
OBJECTIVES = {
    "drop": RankingConfig(),
    "model": RankingConfig(ties=Ties.model, margin=0.2, label_smoothing=0.05, centring=0.01),
}
OVERRIDES = {
    "drop": [],
    "model": [
        "objective.ties=model",
        "objective.margin=0.2",
        "objective.label_smoothing=0.05",
        "objective.centring=0.01",
    ],
}
SLOW = pytest.mark.slow
Layout = tuple[int, int]  # processes, ZeRO stage


@dataclass(frozen=True)
class Curve:
    """What a run came to."""

    losses: list[float]  # with the centring
    norms: list[float]
    weights: dict[str, Any]
    log_tie: float | None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rm_ranks")
    rows = rankings(EXAMPLES, seed=4)
    alone = int(order(0)[-1])
    rows[alone]["scores"] = [2.0] * len(rows[alone]["scores"])
    write_jsonl(folder / "train.jsonl", rows)
    write_jsonl(folder / "heldout.jsonl", rankings(7, seed=9))
    return folder


def order(epoch: int) -> np.ndarray:
    return np.random.default_rng([SEED, 0, epoch]).permutation(EXAMPLES)


@pytest.fixture(scope="module")
def plain(folder: Path, base: Path) -> dict[str, Curve]:
    return {name: plain_training(folder, base, config) for name, config in OBJECTIVES.items()}


def plain_training(folder: Path, base: Path, config: RankingConfig) -> Curve:
    """One answer at a time by transformers' classifier, one comparison at a time, and torch's AdamW."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    answers = [plain_tokens(tokenizer, row) for row in rows]
    scores = [row["scores"] for row in rows]
    model = plain_start(base, SEED).train()
    tie = torch.nn.Parameter(torch.tensor(davidson(rows))) if config.ties is Ties.model else None
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": DECAY},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
        *([{"params": [tie], "weight_decay": 0.0, "lr": TIE_STEP}] if tie is not None else []),
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS)
    losses, norms = [], []
    for epoch in range(EPOCHS):
        for start in range(0, EXAMPLES, BATCH):
            batch = order(epoch)[start : start + BATCH].tolist()
            rewards = [plain_rewards(model, answers[i]) for i in batch]
            loss = plain_objective(
                rewards, [ranks_of(scores[i]) for i in batch], [scores[i] for i in batch], config, tie
            )
            loss.backward()
            losses.append(float(loss.detach()))
            every = [p for group in optimizer.param_groups for p in group["params"]]
            norms.append(float(torch.nn.utils.clip_grad_norm_(every, CLIP)))
            optimizer.step()
            optimizer.zero_grad()
    assert min(norms) < CLIP < max(norms), "both sides of the clipping are tried"
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    return Curve(losses, norms, state, None if tie is None else float(tie.detach()))


def made(rlhf: Forks, folder: Path, base: Path, name: str, *overrides: str, ranks: int = 1) -> Path:
    run = folder / f"runs/{name}/rm"
    if not run.exists():
        rlhf.run(folder, *RM, f"name={name}", f"model.path={base}", *overrides, ranks=ranks)
    return run


def compare(run: Path, plain: Curve) -> None:
    losses = total_losses(run)
    worst = max(abs(a - b) for a, b in zip(losses, plain.losses, strict=True))
    norm = max(abs(a - b) for a, b in zip(series(run, "train/grad_norm"), plain.norms, strict=True))
    distance = relative_difference(weights(run / "artifact"), plain.weights)
    print(f"{run.parent.name}: losses {worst:.1e}, gradient norms {norm:.1e}, weights {distance:.1e}")
    assert worst < 1e-6
    assert norm < 1e-5
    assert distance < 1e-5
    log_tie = log_tie_of(run)
    assert (log_tie is None) == (plain.log_tie is None)
    assert log_tie is None or log_tie == pytest.approx(plain.log_tie, abs=1e-6)


def total_losses(run: Path) -> list[float]:
    """A batch of nothing but ties has no centring, and says nothing of it."""
    steps = [line for line in metrics(run) if "train/loss" in line]
    return [line["train/loss"] + 0.01 * line.get("train/centring", 0.0) for line in steps]


def log_tie_of(run: Path) -> float | None:
    found: float | None = json.loads((run / "artifact/artifact.json").read_text())["reward_log_tie"]
    return found


def test_the_plain_loop_has_a_batch_of_ties(plain: dict[str, Curve]) -> None:
    assert plain["drop"].losses[2] == 0.0 == plain["drop"].norms[2]
    assert plain["model"].losses[2] > 0.1
    assert plain["model"].losses[-2] < plain["model"].losses[0]


FAST = {
    ("drop", "one_row", (1, 0)),
    ("model", "one_each", (1, 1)),
    ("model", "packed", (2, 2)),
    ("model", "packed", (2, 3)),
}
EVERY = [
    (ties, layout, (ranks, stage))
    for ties in OBJECTIVES
    for layout in LAYOUTS
    for ranks in (1, 2)
    for stage in range(4)
] + [("model", "packed", (3, stage)) for stage in range(4)]  # fmt: skip


@pytest.mark.parametrize(
    ("ties", "layout", "place"), [one if one in FAST else pytest.param(*one, marks=SLOW) for one in EVERY]
)
def test_the_numbers_of_the_plain_loop(
    folder: Path, base: Path, rlhf: Forks, plain: dict[str, Curve], ties: str, layout: str, place: Layout
) -> None:
    run = undisturbed(rlhf, folder, base, ties, layout, place)
    compare(run, plain[ties])


def undisturbed(rlhf: Forks, folder: Path, base: Path, ties: str, layout: str, place: Layout) -> Path:
    name, overrides = f"{ties}_{layout}_{place[0]}_{place[1]}", [*LAYOUTS[layout], *OVERRIDES[ties]]
    return made(rlhf, folder, base, name, *overrides, f"engine=zero{place[1]}", ranks=place[0])


@pytest.mark.parametrize("place", [(2, 3), *(pytest.param((2, stage), marks=SLOW) for stage in range(3))])
def test_what_is_measured_and_handed_over_is_that_of_one_process(
    folder: Path, base: Path, rlhf: Forks, place: Layout
) -> None:
    """Before training the rewards are the same but for rounding; whole tensors, one head of full size."""
    one = undisturbed(rlhf, folder, base, "model", "one_each", (1, 1))
    run = undisturbed(rlhf, folder, base, "model", "packed", place)
    for ours, theirs in zip(metrics(run), metrics(one), strict=True):
        assert ours.keys() == theirs.keys()
        if "eval/loss" in ours:
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    assert {k: t.shape for k, t in weights(run / "artifact").items()} == {
        k: t.shape for k, t in weights(one / "artifact").items()
    }
    ours, theirs = (json.loads((path / "artifact/artifact.json").read_text()) for path in (run, one))
    for name in ("reward_shift", "reward_scale", "reward_log_tie"):
        assert ours[name] == pytest.approx(theirs[name], abs=1e-5), name
    for name in ("reliability.png", "rewards.png", "evaluation.json"):
        assert (run / name).is_file()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, 3), (1, 1)),
        *(
            pytest.param(a, b, marks=SLOW)
            for a, b in [((1, 1), (2, 3)), ((2, 2), (1, 3)), ((1, 3), (2, 1)), ((1, 0), (2, 2)), ((3, 1), (2, 0))]
        ),
    ],
)
def test_another_layout_goes_on(
    folder: Path, base: Path, rlhf: Forks, plain: dict[str, Curve], before: Layout, after: Layout
) -> None:
    """The tie strength lies with one rank, or with nobody but the first, and moves along."""
    name = f"moved_{before[0]}_{before[1]}_{after[0]}_{after[1]}"
    paused = made(
        rlhf,
        folder,
        base,
        f"paused_{before[0]}_{before[1]}",
        *LAYOUTS["packed"],
        *OVERRIDES["model"],
        f"engine=zero{before[1]}",
        f"train.stop_after={PAUSE}",
        ranks=before[0],
    )
    copy_run(paused, folder / f"runs/{name}/rm")
    command = [*RM, f"name={name}", f"model.path={base}", *LAYOUTS["packed"], *OVERRIDES["model"]]
    job = rlhf.run(folder, *command, f"engine=zero{after[1]}", ranks=after[0])
    assert f"resumed after step {PAUSE}" in job.output
    compare(folder / f"runs/{name}/rm", plain["model"])


@pytest.mark.parametrize("place", [(2, 3), *(pytest.param(p, marks=SLOW) for p in [(2, 1), (2, 2), (1, 1), (1, 3)])])
def test_bf16_stays_near(folder: Path, base: Path, rlhf: Forks, plain: dict[str, Curve], place: Layout) -> None:
    """bf16 rounds to three digits. The tie strength moves by a hundredth a step and must not be rounded away."""
    overrides = ["model.dtype=bfloat16", f"engine=zero{place[1]}", *LAYOUTS["packed"], *OVERRIDES["model"]]
    run = made(rlhf, folder, base, f"bf16_{place[0]}_{place[1]}", *overrides, ranks=place[0])
    losses = total_losses(run)
    assert all(math.isfinite(loss) for loss in losses)
    assert losses == pytest.approx(plain["model"].losses, rel=0.05, abs=0.02)
    found, expected = log_tie_of(run), plain["model"].log_tie
    assert found is not None and expected is not None
    assert found == pytest.approx(expected, abs=2e-3)
    near = {name: tensor.float() for name, tensor in weights(run / "artifact").items()}
    assert relative_difference(near, plain["model"].weights) < 0.03
