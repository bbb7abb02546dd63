"""`rlhf dpo` as a user runs it: a plain loop's numbers, every objective, the reference, what is handed over, and resume."""

from __future__ import annotations

import gzip
import json
import math
import os
import random
import re
import shutil
import signal
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
from helpers_direct import (
    WITH_REFERENCE,
    Curve,
    frozen_logprobs,
    plain_objective,
    plain_training,
    read_rows,
)
from helpers_runs import (
    DPO_ON_FILES,
    REPOSITORY,
    TINY_RUN,
    Forks,
    assert_same_end,
    copy_run,
    files_below,
    logged_steps,
    make_base,
    metrics,
    rankings,
    relative_difference,
    series,
    states,
    verdicts,
    weights,
    write_jsonl,
)

from rlhf_pipeline import artifact
from rlhf_pipeline.artifact import Kind
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
QUICK_CASES = ("cached", "kto")
CASES = {"cached": [], "live": LIVE, "kto": KTO, "simpo": ["objective=simpo"]}
QUICK = ["train.max_steps=2", "evaluation.before=false", "evaluation.every=0", "checkpoint.every=100"]
OBJECTIVES = sorted(path.stem for path in (REPOSITORY / "conf/objective").glob("*.yaml"))
WITHOUT = [name for name in OBJECTIVES if name not in WITH_REFERENCE]
FILES = "the reference's log-probabilities of"  # what a run says when it reads them, or computes them
KILLED = int(signal.SIGKILL)
REAL = os.environ.get("RLHF_TEST_DATA")
PROGRAM = """
def words(episodes):
    return [len(one.response) / 8 for one in episodes]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """Rankings of 2 to 9 answers with ties, one of them of ties alone; pairs; verdicts; a scorer; another model."""
    folder = tmp_path_factory.mktemp("dpo")
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


# The numbers


@pytest.mark.parametrize(
    "case", [name if name in QUICK_CASES else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_the_numbers_of_a_plain_loop(rlhf: Forks, folder: Path, base: Path, case: str) -> None:
    """Every step's loss and gradient norm, and the weights after the last; the reference is the start throughout."""
    run = made(rlhf, folder, base, case, *CASES[case])
    expected = plain(folder, base, run)
    losses, norms = series(run, "train/loss"), series(run, "train/grad_norm")
    distance = relative_difference(weights(run / "artifact"), expected.weights)
    worst = max(abs(a - b) for a, b in zip(losses, expected.losses, strict=True))
    print(f"{case}: losses {worst:.1e}, weights {distance:.1e}")
    assert len(losses) == LAST
    assert losses == pytest.approx(expected.losses, abs=1e-6)
    assert norms == pytest.approx(expected.norms, rel=1e-5)
    assert distance < 1e-5
    assert relative_difference(weights(run / "artifact"), weights(base)) > 0.02, "it has moved"
    if case == "kto":
        assert expected.drifts[0] == 0.0 and min(expected.drifts) < -0.5, "where z0 is 0 instead"
        assert max(expected.drifts) > 0.1


def test_it_learns(rlhf: Forks, folder: Path, base: Path) -> None:
    run = made(rlhf, folder, base, "cached")
    accuracy, loss = series(run, "eval/accuracy"), series(run, "eval/loss")
    assert (accuracy[0], loss[0]) == (0.5, pytest.approx(math.log(2), abs=1e-6))
    assert accuracy[-1] > 0.75 and loss[-1] < loss[0] - 0.1
    lines = [line for line in metrics(run) if "eval/loss" in line]
    assert [line["step"] for line in lines] == [0, 4, 8, LAST]
    assert all(math.isfinite(value) for line in metrics(run) for value in line.values())
    expected = {"accuracy", "accuracy_low", "accuracy_high", "margin", "reward_chosen", "reward_rejected", "loss"}
    expected |= {f"{what}_{side}" for what in ("logprob", "drift") for side in ("chosen", "rejected")}
    assert all({f"eval/{name}" for name in expected} <= line.keys() for line in lines)
    assert lines[0]["eval/drift_chosen"] == lines[0]["eval/margin"] == 0.0
    assert "preferred responses have become less likely" not in said(run)
    written = json.loads((run / "evaluation.json").read_text())
    assert (written["step"], written["accuracy"]) == (LAST, accuracy[-1])


def test_cached_and_live_are_the_same(rlhf: Forks, folder: Path, base: Path) -> None:
    cached, live = (made(rlhf, folder, base, case, *CASES[case]) for case in ("cached", "live"))
    assert series(cached, "train/loss") == pytest.approx(series(live, "train/loss"), abs=1e-6)
    assert series(cached, "eval/loss") == pytest.approx(series(live, "eval/loss"), abs=1e-6)
    assert FILES in said(cached) and "reference's" not in said(live)


# Every objective


@pytest.fixture(scope="module")
def every(rlhf: Forks, folder: Path, base: Path) -> dict[str, Path]:
    """Two updates of each: those that have a reference in one sweep, the others in another."""
    found = {}
    for name, some, cache in (("with", WITH_REFERENCE, "runs/shared"), ("without", WITHOUT, "runs/bare")):
        sweep = [f"objective={','.join(some)}", f"data.cache_dir={cache}", "data.on_bad_row=skip", *QUICK, "-m"]
        job = rlhf.run(folder, *DPO, f"model.path={base}", f"name={name}", *sweep)
        (folder / f"{name}.log").write_text(job.output)
        found |= {one: folder / f"runs/{name}/{i}/dpo" for i, one in enumerate(some)}
    return found


def test_every_objective_begins_where_a_plain_computation_does(
    folder: Path, base: Path, every: dict[str, Path]
) -> None:
    """With the values of its config file: loss and likelihood of the first batch."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert sorted(every) == OBJECTIVES == sorted(one.value for one in Objective)
    rows = read_rows(folder / "train.jsonl", AutoTokenizer.from_pretrained(base))
    batch = [rows[i] for i in np.random.default_rng([SEED, 0, 0]).permutation(len(rows))[:BATCH]]
    logprobs = frozen_logprobs(AutoModelForCausalLM.from_pretrained(base), batch)
    first = {}
    for name, run in every.items():
        losses = series(run, "train/loss")
        assert logged_steps(run) == 2 and np.isfinite(losses).all() and losses[0] != losses[1], name
        config = objective_of(run)
        assert config.name.value == name
        loss, likelihood = plain_objective(logprobs, logprobs, [one.ranks for one in batch], config)
        expected = 0.5 if name == "kto" else float(loss)  # its examples are verdicts, and half of lambda at first
        assert losses[0] == pytest.approx(expected, rel=1e-5), name
        likelihoods = series(run, "train/likelihood")
        assert bool(likelihoods) == (config.likelihood > 0), name
        if likelihoods:
            assert likelihoods[0] == pytest.approx(float(likelihood), rel=1e-5), name
        first[name] = round(losses[0], 5)
    assert (first["dpo"], first["cdpo"], first["ipo"]) == (0.69315, 0.69315, 25.0)


def test_what_has_no_reference_opens_none(folder: Path, every: dict[str, Path]) -> None:
    assert not (folder / "runs/bare/reference").exists()
    assert "reference's" not in (folder / "without.log").read_text()
    for name in WITHOUT:
        assert not any("drift" in key or "eval/kl" in key for line in metrics(every[name]) for key in line), name


def test_a_sweep_computes_its_reference_once(folder: Path, every: dict[str, Path]) -> None:
    """Of rankings and held-out rankings; of KTO of its verdicts, the held-out ones and their partners."""
    log = (folder / "with.log").read_text()
    assert log.count(f"computing {FILES}") == 2 + 3
    assert log.count(FILES) == 5 * 2 + 3
    assert len([*(folder / "runs/shared/reference").glob("*.npy")]) == 5
    assert not [name for name in files_below(folder / "runs/shared") if ".tmp" in name]


def test_kto_on_pairs(rlhf: Forks, folder: Path, base: Path, every: dict[str, Path]) -> None:
    """A pair is two verdicts; of a ranking the best are wanted and the worst are not."""
    run = made(rlhf, folder, base, "kto_pairs", *KTO, "data.train=pairs.jsonl", *QUICK)
    pairs = len((folder / "pairs.jsonl").read_text().splitlines())
    assert manifest(run)["data"]["verdicts"]["counts"]["trees"] == 2 * pairs
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    extremes = [sum(s in (max(one["scores"]), min(one["scores"])) for s in one["scores"]) for one in rows]
    untied = [n for n, one in zip(extremes, rows, strict=True) if len(set(one["scores"])) > 1]
    assert manifest(every["kto"])["data"]["verdicts"]["counts"]["trees"] == sum(untied)
    assert all(line.keys() >= {"train/reward_chosen", "train/reward_rejected"} for line in metrics(run)[:2])


# The reference


def test_a_file_is_read_again_and_made_again_where_it_is_damaged(rlhf: Forks, folder: Path, base: Path) -> None:
    cached = made(rlhf, folder, base, "cached")
    keep = [*QUICK, "data.cache_dir=runs/damaged"]
    first = made(rlhf, folder, base, "fresh", *keep)
    files = sorted((folder / "runs/damaged/reference").glob("*.npy"))
    before = [file.stat().st_mtime_ns for file in files]
    again = made(rlhf, folder, base, "read", *keep)
    assert said(first).count(f"computing {FILES}") == 2 == len(files)
    assert said(again).count(FILES) == 2 and "computing" not in said(again)
    assert [file.stat().st_mtime_ns for file in files] == before
    content = files[0].read_bytes()
    files[0].write_bytes(content[:-3] + b"\x00\x01\x02")
    mended = made(rlhf, folder, base, "mended", *keep)
    assert "examples again, for the file is damaged (its checksum differs)" in said(mended)
    assert said(mended).count("computing") == 1 and files[0].read_bytes() == content
    assert series(first, "train/loss") == series(again, "train/loss") == series(mended, "train/loss")
    assert series(first, "train/loss") == series(cached, "train/loss")[:2]


def test_numbers_of_other_weights_are_noticed(rlhf: Forks, folder: Path, base: Path) -> None:
    """A file whose checksum fits, of a reference that is a little off; nothing is learnt."""
    import hashlib

    made(rlhf, folder, base, "cached")
    shutil.copytree(folder / "runs/cache", folder / "runs/tampered")
    for file in (folder / "runs/tampered/reference").glob("*.npy"):
        np.save(file, np.load(file) - np.float32(0.01))
        told = json.loads(file.with_suffix(".json").read_text())
        told["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
        file.with_suffix(".json").write_text(json.dumps(told))
    command = [*DPO, f"model.path={base}", "name=tampered", "data.cache_dir=runs/tampered"]
    job = rlhf.run(folder, *command, code=2)
    assert "the policy is its reference before the first update, and yet" in job.output
    assert "are 0.01 nats a token apart" in job.output
    assert "Remove the folder reference in runs/tampered, or set reference.cache=false" in job.output
    assert "Traceback" not in job.output
    assert not (folder / "runs/tampered_run").exists() and logged_steps(folder / "runs/tampered/dpo") == 0
    shutil.rmtree(folder / "runs/tampered/reference")
    rlhf.run(folder, *command, *QUICK)


def test_another_reference(rlhf: Forks, folder: Path, base: Path) -> None:
    """The first loss is not ln 2 then, and nobody asks for it; both parents are named."""
    run = made(rlhf, folder, base, "held_to_other", "reference.path=other", *QUICK)
    expected = plain(folder, base, run, reference=folder / "other", max_steps=2)
    assert series(run, "train/loss") == pytest.approx(expected.losses, abs=1e-5)
    assert abs(expected.losses[0] - math.log(2)) > 0.01
    assert {name: one["path"] for name, one in manifest(run)["parents"].items()} == {
        "model": str(base),
        "reference": "other",
    }


def test_adapters(rlhf: Forks, folder: Path, base: Path) -> None:
    """The reference is what lies under them, the same as without: its numbers are read. Cached and live are equal."""
    pytest.importorskip("peft", reason="needs the lora extra")
    made(rlhf, folder, base, "cached")
    lora = ["lora=default", "lora.rank=4", "optim.lr=3e-2", "train.max_steps=3"]
    cached = made(rlhf, folder, base, "lora", *lora)
    live = made(rlhf, folder, base, "lora_live", *lora, *LIVE)
    assert FILES in said(cached) and "computing" not in said(cached)
    assert series(cached, "eval/drift_chosen")[0] == pytest.approx(0, abs=1e-4) == series(live, "eval/drift_chosen")[0]
    assert abs(series(live, "eval/drift_chosen")[-1]) > 0.1
    for name in ("train/loss", "eval/loss", "eval/drift_chosen", "eval/drift_rejected"):
        assert series(cached, name) == pytest.approx(series(live, name), abs=2e-4), name
    assert relative_difference(weights(cached / "artifact"), weights(live / "artifact")) < 1e-4
    start = weights(base)
    changed = {name for name, one in weights(cached / "artifact").items() if not np.array_equal(one, start[name])}
    assert changed == {name for name in start if name.endswith("_proj.weight")}


def test_bf16_begins_where_its_reference_is(rlhf: Forks, folder: Path, base: Path) -> None:
    run = made(rlhf, folder, base, "bf16", "model.dtype=bfloat16", *QUICK)
    assert series(run, "train/loss")[0] == pytest.approx(math.log(2), abs=0.02)


# What is measured


def test_answers_are_scored_and_compared(rlhf: Forks, folder: Path, base: Path) -> None:
    """With a scorer, of policy and reference; before anything is learnt the two are one, and draw the same."""
    asked = ["sampled.prompts=5", "sampled.max_new_tokens=6", "+rewards.words.program=points:words"]
    more = [*asked, "evaluation.samples=2", "train.max_steps=2", "optim.lr=2e-2"]
    run = made(rlhf, folder, base, "scored", *more)
    lines = [line for line in metrics(run) if "eval/score" in line]
    assert [line["step"] for line in lines] == [0, 2]
    names = ("score", "score_words", "win_rate", "win_rate_low", "win_rate_high", "kl", "length", "ended", "accuracy")
    assert all(f"eval/{name}" in line for name in names for line in lines)
    assert (lines[0]["eval/kl"], lines[0]["eval/win_rate"]) == (pytest.approx(0, abs=1e-4), 0.5)
    assert abs(lines[1]["eval/kl"]) > 1e-2
    shown = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert len(shown) == 2 * 2
    assert all(row.keys() >= {"prompt", "response", "score", "reference", "reference_score"} for row in shown)
    assert [row["response"] for row in shown[:2]] == [row["reference"] for row in shown[:2]]
    simpo = made(rlhf, folder, base, "scored_simpo", *more, "objective=simpo")
    found = [line for line in metrics(simpo) if "eval/score" in line]
    assert [line["step"] for line in found] == [0, 2] and found[0]["eval/score"] == lines[0]["eval/score"]
    assert not any(name in line for name in ("eval/kl", "eval/win_rate", "eval/drift_chosen") for line in found)


def test_a_fall_of_preferred_responses_is_told(rlhf: Forks, folder: Path, base: Path) -> None:
    """Here by unlikelihood without a bound and without the likelihood that goes with it."""
    worst = ["objective=unlikelihood", "objective.form=sequence", "objective.alpha=1", "objective.likelihood=0"]
    run = made(rlhf, folder, base, "fallen", *worst, "optim.lr=2e-2", "train.max_steps=4", "evaluation.every=2")
    before, *later = series(run, "eval/logprob_chosen")
    assert min(later) < 1.2 * before - 10
    assert "preferred responses have become less likely: eval/logprob_chosen has fallen from" in said(run)


# What is handed over


def test_what_is_handed_over(rlhf: Forks, folder: Path, base: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = made(rlhf, folder, base, "cached")
    found = artifact.load(run / "artifact", kind=Kind.policy)
    assert (found.stage, found.step) == ("dpo", LAST)
    assert {name: one.path for name, one in found.parents.items()} == {"model": str(base)}
    assert found.data["rankings"]["counts"]["rows"] == 24
    assert found.metrics["eval/accuracy"] == series(run, "eval/accuracy")[-1]
    assert [path.name for path in sorted((run / "artifacts").iterdir())] == ["epoch_1", "epoch_2", "epoch_3"]
    model, report = AutoModelForCausalLM.from_pretrained(run / "artifact", output_loading_info=True)
    assert not any(report.values())
    tokenizer = AutoTokenizer.from_pretrained(run / "artifact")
    assert model.config.eos_token_id == tokenizer.eos_token_id
    rows = read_rows(folder / "heldout.jsonl", tokenizer)
    untied = [row for row in rows if len(set(row.ranks)) > 1]
    logprobs = frozen_logprobs(model, untied)
    best = [float(one.sum()) for row, many in zip(untied, logprobs, strict=True)
            for rank, one in zip(row.ranks, many, strict=True) if rank == 0]  # fmt: skip
    assert len(best) > len(untied), "some are best together"
    assert series(run, "eval/logprob_chosen")[-1] == pytest.approx(np.mean(best), abs=1e-3)


def test_other_commands_take_it(rlhf: Forks, folder: Path, base: Path) -> None:
    """As a reward model by its implicit rewards it is as often right as training said; and it answers."""
    run = made(rlhf, folder, base, "cached")
    judged = f"systems={{dpo:{run}/artifact}}"
    rlhf.run(folder, "evaluate", "kind=rm", "runtime.threads=1", "name=judged", judged, "data.path=heldout.jsonl")
    results = json.loads((folder / "runs/judged/evaluate/rm/results.json").read_text())
    expected = json.loads((run / "evaluation.json").read_text())["comparisons"]["accuracy"]["mean"]
    assert results["systems"]["dpo"]["overall"]["mean"] == pytest.approx(expected)
    options = ["sampling.max_new_tokens=6", "runtime.threads=1", "output=said.jsonl"]
    rlhf.run(folder, "generate", f"model.path={run}/artifact", "prompts.path=heldout.jsonl", *options)
    assert len((folder / "said.jsonl").read_text().splitlines()) == 12
    again = made(rlhf, folder, run / "artifact", "again", *QUICK)
    assert series(again, "train/loss")[0] == pytest.approx(math.log(2), abs=1e-6), "its reference is where it starts"
    assert manifest(again)["parents"]["model"]["content_hash"] == manifest(run)["content_hash"]


@pytest.mark.skipif(not REAL, reason="RLHF_TEST_DATA names no folder of real data")
def test_real_dialogues(rlhf: Forks, tmp_path: Path) -> None:
    """Pairs of whole dialogues that share a beginning (HH)."""
    assert REAL is not None
    with gzip.open(Path(REAL) / "hh_harmless.jsonl.gz", "rt") as lines:
        rows = [json.loads(line) for line in lines]
    write_jsonl(tmp_path / "hh.jsonl", [row for row in rows if len(row["chosen"]) + len(row["rejected"]) < 700][:40])
    start = make_base(tmp_path / "base", context=1024)
    rlhf.run(
        tmp_path,
        "dpo",
        "name=real",
        f"model.path={start}",
        "data.train=hh.jsonl",
        "data.heldout_fraction=0.2",
        "data.on_bad_row=skip",
        "data.max_length=1024",
        "data.max_prompt_length=800",
        "batch.examples=8",
        "optim.lr=1e-3",
        "sampled.prompts=0",
        "train.epochs=3",
        *TINY_RUN,
    )
    run = tmp_path / "runs/real/dpo"
    counts = manifest(run)["data"]["rankings"]["counts"]
    assert counts["rows"] == 40 and counts["trees"] > 30
    losses = series(run, "train/loss")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.02, losses
    assert np.isfinite(series(run, "eval/accuracy")).all()


# What ends a run


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective=kto", "data.train=one.jsonl"], "objective=kto also rates the response to another prompt"),
        (["data.train=verdicts.jsonl"], "verdicts.jsonl"),
        (["objective=simpo", "reference.path=other"], "reference.path: objective=simpo has no reference"),
        (["reference.path=nowhere/at/all"], "nowhere/at/all"),
    ],
)
def test_mistakes(rlhf: Forks, folder: Path, base: Path, overrides: list[str], message: str) -> None:
    write_jsonl(folder / "one.jsonl", verdicts(1))
    job = rlhf.run(folder, *DPO, f"model.path={base}", "name=mistake", *overrides, code=2)
    assert message in job.output and "Traceback" not in job.output
    shutil.rmtree(folder / "runs/mistake", ignore_errors=True)


# Stopped and started again


@pytest.mark.parametrize("case", [*CASES][:3])
@pytest.mark.parametrize("attempt", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 6))])
def test_kill_9_at_a_random_change_of_its_files(rlhf: Forks, folder: Path, base: Path, case: str, attempt: int) -> None:
    """Bit for bit the undisturbed end: with the reference on disk, beside every batch, and with KTO's point."""
    whole = made(rlhf, folder, base, case, *CASES[case])
    changes = re.findall(r"^change \d+: (.*)$", said(whole), re.MULTILINE)
    assert len(changes) > 40
    seed = int(os.environ.get("RLHF_TEST_SEED") or random.SystemRandom().randrange(10**6))
    number = random.Random(f"{case} {attempt} {seed}").randrange(len(changes)) + 1
    print(f"killed before change {number}: {changes[number - 1]} (RLHF_TEST_SEED={seed})")
    name = f"killed_{case}_{attempt}"
    command, run = [*DPO, f"model.path={base}", f"name={name}", *CASES[case]], folder / f"runs/{name}/dpo"
    rlhf.start(folder, *command, crash=number).wait(-KILLED)
    rlhf.run(folder, *command)
    assert_same_end(run, whole)
    assert not [one for one in files_below(run) if ".partial" in one or ".old" in one or ".tmp" in one]


def test_a_pause_is_not_seen_in_the_end(rlhf: Forks, folder: Path, base: Path) -> None:
    """Of KTO between two states, in the middle of an epoch; what is asked on the way may change meanwhile."""
    whole = made(rlhf, folder, base, "kto", *KTO)
    paused = made(rlhf, folder, base, "kto_paused", *KTO, "train.stop_after=5")
    assert states(paused) == [4, 5]
    job = rlhf.run(folder, *DPO, f"model.path={base}", "name=kto_paused", *KTO)
    assert "resumed after step 5" in job.output and "warning" not in job.output
    assert_same_end(paused, whole)


def test_it_goes_on_with_a_live_reference(rlhf: Forks, folder: Path, base: Path) -> None:
    """The cache is no part of what a run is; to rounding the end is the same."""
    whole = made(rlhf, folder, base, "cached")
    run = copy_run(whole, folder / "runs/goes_on/dpo")
    for name in ("artifact", "artifacts/epoch_2", "artifacts/epoch_3", "state/step_00000008", "state/step_00000009"):
        shutil.rmtree(run / name)
    assert states(run) == [4]
    job = rlhf.run(folder, *DPO, f"model.path={base}", "name=goes_on", *LIVE, "engine=zero2")
    assert "resumed after step 4" in job.output and FILES not in job.output
    assert series(run, "train/loss") == pytest.approx(series(whole, "train/loss"), abs=1e-5)
    assert relative_difference(weights(run / "artifact"), weights(whole / "artifact")) < 1e-4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.beta=0.2", "objective.beta: was 0.1, is now 0.2"),
        ("reference.path=other", "reference.path: was None, is now 'other'"),
    ],
)
def test_another_objective_is_another_run(rlhf: Forks, folder: Path, base: Path, override: str, message: str) -> None:
    run = made(rlhf, folder, base, "cached")
    before = metrics(run)
    job = rlhf.run(folder, *DPO, f"model.path={base}", "name=cached", override, code=2)
    assert message in job.output and "Traceback" not in job.output
    assert metrics(run) == before
