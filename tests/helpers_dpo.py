"""Files and commands for the tests of `rlhf dpo`, its runs, and a plain loop of the same."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

from helpers_direct import Curve, plain_training
from helpers_runs import DPO_ON_FILES, Forks, make_base, rankings, verdicts, write_jsonl

from rlhf_pipeline.config.direct import DirectConfig, Objective

BATCH, SEED, EPOCHS, LAST, LR, DECAY, CLIP = 8, 2, 3, 9, 3e-3, 0.1, 1.0
DPO = [
    *DPO_ON_FILES,
    f"seed={SEED}",
    f"batch.examples={BATCH}",
    "batch.row_length=400",
    f"train.epochs={EPOCHS}",
    f"optim.lr={LR}",
    f"optim.weight_decay={DECAY}",
    f"optim.max_grad_norm={CLIP}",
    "optim.betas=[0.9,0.95]",
    "optim.decay=constant",
    "optim.warmup_fraction=0",
    "checkpoint.every=4",
    "checkpoint.keep=9",
    "evaluation.every=4",
]
LIVE = ["reference.cache=false"]
KTO = ["objective=kto", "data.train=verdicts.jsonl", "objective.desirable_weight=0.1", "objective.undesirable_weight=2"]
CASES = {"cached": [], "live": LIVE, "kto": KTO, "simpo": ["objective=simpo"]}
QUICK = ["train.max_steps=2", "evaluation.before=false", "evaluation.every=0", "checkpoint.every=100"]
FILES = "the reference's log-probabilities of"  # what a run says when it reads them, or computes them
PROGRAM = """
def words(episodes):
    return [len(one.response) / 8 for one in episodes]
"""


def make_folder(folder: Path) -> Path:
    """Rankings of 2 to 9 answers with ties, one of them of ties alone; pairs; verdicts; a scorer; another model."""
    rows = rankings(24)
    rows[3]["scores"] = [1.0] * len(rows[3]["scores"])
    write_jsonl(folder / "train.jsonl", rows)
    write_jsonl(folder / "heldout.jsonl", rankings(12, seed=1))
    write_jsonl(folder / "verdicts.jsonl", verdicts(24, seed=3))
    apart = [row for row in rankings(30, most=2) if row["scores"][0] != row["scores"][1]]
    pairs = [(row["prompt"], *(row["responses"][:: -1 if row["scores"][0] < row["scores"][1] else 1])) for row in apart]
    write_jsonl(
        folder / "pairs.jsonl", [dict(zip(("prompt", "chosen", "rejected"), one, strict=True)) for one in pairs]
    )
    (folder / "points.py").write_text(PROGRAM)
    make_base(folder / "other", seed=4)
    return folder


def made(rlhf: Forks, folder: Path, base: Path, name: str, *overrides: str) -> Path:
    """The run of this name; made if it is not there. Its log lists the changes of its files."""
    run = folder / f"runs/{name}/dpo"
    if not run.exists():
        job = rlhf.start(folder, *DPO, f"model.path={base}", f"name={name}", *overrides, crash=0).wait()
        (folder / f"{name}.log").write_text(job.output)
    return run


def said(run: Path) -> str:
    return run.parents[2].joinpath(f"{run.parent.name}.log").read_text()


def manifest(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "artifact/artifact.json").read_text())
    return found


def objective_of(run: Path) -> DirectConfig:
    """As the run had it."""
    values, hints = manifest(run)["config"]["objective"], get_type_hints(DirectConfig)
    enums = ("name", "reduction", "likelihood_reduction", "pairs", "ties")
    made = {f.name: hints[f.name](values[f.name]) if f.name in enums else values[f.name] for f in fields(DirectConfig)}
    if made["form"] is not None:
        from rlhf_pipeline.config.direct import UnlikelihoodForm

        made["form"] = UnlikelihoodForm(made["form"])
    return DirectConfig(**made)


def plain(folder: Path, base: Path, run: Path, **options: Any) -> Curve:
    import torch

    def adamw(model: Any) -> torch.optim.Optimizer:
        groups = [
            {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": DECAY},
            {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8)

    config = objective_of(run)
    file = folder / ("verdicts.jsonl" if config.name is Objective.kto else "train.jsonl")
    return plain_training(
        base, file, config, seed=SEED, batch=BATCH, epochs=EPOCHS, optimizer=adamw, max_grad_norm=CLIP, **options
    )
