"""`rlhf dpo` as a user runs it: the numbers of a plain loop, every objective, what is measured and handed over."""

from __future__ import annotations

import gzip
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers_direct import WITH_REFERENCE, frozen_logprobs, plain_objective, read_rows
from helpers_dpo import (
    BATCH,
    CASES,
    DPO,
    FILES,
    KTO,
    LAST,
    QUICK,
    SEED,
    made,
    make_folder,
    manifest,
    objective_of,
    plain,
    said,
)
from helpers_runs import (
    REPOSITORY,
    TINY_RUN,
    Forks,
    files_below,
    logged_steps,
    make_base,
    metrics,
    relative_difference,
    series,
    verdicts,
    weights,
    write_jsonl,
)

from rlhf_pipeline import artifact
from rlhf_pipeline.artifact import Kind
from rlhf_pipeline.config.direct import Objective

QUICK_CASES = ("cached", "kto")
OBJECTIVES = sorted(path.stem for path in (REPOSITORY / "conf/objective").glob("*.yaml"))
WITHOUT = [name for name in OBJECTIVES if name not in WITH_REFERENCE]
REAL = os.environ.get("RLHF_TEST_DATA")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("dpo"))


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
