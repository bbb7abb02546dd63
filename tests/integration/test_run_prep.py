"""`rlhf prep`: a stage finds everything done that prep has made, and any data can be looked at."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers_runs import TINY_RUN, TINY_SHAPE, Forks, dialogues, metrics, texts, write_jsonl

SFT = [
    "sft",
    "data.max_length=200",
    "data.max_prompt_length=120",
    "batch.examples=8",
    "batch.row_length=96",
    "optim.lr=3e-3",
    "train.max_steps=2",
    *TINY_RUN,
]
RM = [
    "data.max_length=120",
    "data.max_prompt_length=80",
    "batch.examples=8",
    "batch.row_length=96",
    "runtime.threads=1",
    "tracking.progress=false",
]
PRETRAIN = [
    "pretrain",
    *TINY_SHAPE,
    "tokenizer.template=dialogue",
    "data.max_length=64",
    "batch.tokens=400",
    "batch.row_length=96",
    "optim.lr=3e-3",
    "train.max_steps=2",
    *TINY_RUN,
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = dialogues(60)
    write_jsonl(tmp_path / "train.jsonl", rows[:50])
    write_jsonl(tmp_path / "other.jsonl", dialogues(20, seed=9))
    write_jsonl(tmp_path / "heldout.jsonl", rows[48:])  # two of them are trained on
    write_jsonl(tmp_path / "text.jsonl", texts(40))
    return tmp_path


def files(folder: Path) -> dict[str, int]:
    """Everything in the cache and when it was written."""
    return {
        str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"
    }


def report(folder: Path) -> Any:
    return json.loads((folder / "report.json").read_text())


def test_sft_tokenises_nothing_after_prep(folder: Path, base: Path, rlhf: Forks) -> None:
    """Training, held-out and mixed-in sets; a weighed mixture, of which training then takes what prep has said."""
    arguments = [
        *SFT,
        f"model.path={base}",
        "data.train=[train.jsonl,{path:other.jsonl,weight:2.5}]",
        "data.heldout=heldout.jsonl",
        "mix.train=text.jsonl",
        "mix.ratio=0.25",
        "train.max_steps=null",
        "train.epochs=2",
    ]
    job = rlhf.run(folder, "prep", *arguments)
    made = files(folder / "runs/cache")
    assert len([path for path in made if path.endswith(".arrow")]) == 4
    found = report(folder / "runs/default/sft/prep")
    rlhf.run(folder, *arguments)
    assert files(folder / "runs/cache") == made
    assert set(found["sets"]) == {"demonstrations", "pretraining", "held out"}
    sources = found["sets"]["demonstrations"]["sources"]
    assert [(one["name"], one["examples"], one["an_epoch"]) for one in sources] == [
        ("train.jsonl", 50, 50),
        ("other.jsonl", 20, 50),
    ]
    assert found["overlap"]["prompts"] == found["overlap"]["examples"] == 2
    assert "heldout.jsonl:1 = train.jsonl:49" in job.output
    # 100 examples an epoch in batches of 8
    assert found["run"]["steps"] == 2 * 13 == metrics(folder / "runs/default/sft")[-1]["step"]
    assert (folder / "runs/default/sft/prep/lengths.png").stat().st_size > 10_000


def test_the_mixture_does_not_depend_on_the_number_of_processes(folder: Path, base: Path, rlhf: Forks) -> None:
    arguments = [*SFT, f"model.path={base}", "data.train=[{path:train.jsonl,weight:0.5},{path:other.jsonl,weight:2}]"]
    losses = []
    for name, ranks in (("one", 1), ("two", 2)):
        rlhf.run(folder, *arguments, f"name={name}", "data.heldout=heldout.jsonl", ranks=ranks)
        losses.append([line["train/loss"] for line in metrics(folder / f"runs/{name}/sft") if "train/loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == 2


def test_pretraining_finds_its_tokenizer_and_its_text(folder: Path, rlhf: Forks) -> None:
    arguments = [*PRETRAIN, "data.train=text.jsonl", "data.heldout_fraction=0.2"]
    rlhf.run(folder, "prep", *arguments)
    run = folder / "runs/default/pretrain"
    made = files(folder / "runs/cache") | files(run / "tokenizer")
    found = report(run / "prep")
    assert found["overlap"] is None and set(found["sets"]) == {"text", "held out"}
    rlhf.run(folder, *arguments)
    assert files(folder / "runs/cache") | files(run / "tokenizer") == made
    # Without prep it would have been the same.
    rlhf.run(folder, *arguments, "name=alone")
    ours, theirs = (folder / f"runs/{name}/pretrain/artifact/model.safetensors" for name in ("default", "alone"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_prep_may_be_repeated_with_other_settings_until_a_run_has_begun(folder: Path, rlhf: Forks) -> None:
    arguments = [*PRETRAIN, "data.train=text.jsonl", "data.heldout_fraction=0.2"]
    rlhf.run(folder, "prep", *arguments)
    rlhf.run(folder, "prep", *arguments, "model.shape.vocab_size=350")
    rlhf.run(folder, *arguments)  # with 400 again
    job = rlhf.run(folder, "prep", *arguments, "model.shape.vocab_size=350", code=2)
    assert "holds a run with another config" in job.output and "model.shape.vocab_size" in job.output


def test_bad_and_long_rows_are_listed_and_end_in_an_error(folder: Path, base: Path, rlhf: Forks) -> None:
    """All of them, not the first; and the stage, which would have stopped, stops without tokenising again."""
    rows = [json.dumps(row) for row in dialogues(40)]
    rows[3], rows[17] = "{oops", '{"messages": []}'
    (folder / "bad.jsonl").write_text("\n".join(rows) + "\n")
    arguments = [*SFT, f"model.path={base}", "data.train=bad.jsonl"]
    job = rlhf.run(folder, "prep", *arguments, code=2)
    assert "bad.jsonl:4: not JSON" in job.output and "bad.jsonl:18: the last message is not" in job.output
    assert "A stage would stop here: 2 rows cannot be used" in job.output
    made = files(folder / "runs/cache")
    stopped = rlhf.run(folder, *arguments, code=2)
    assert "2 of 40 rows of bad.jsonl cannot be used" in stopped.output and files(folder / "runs/cache") == made
    rlhf.run(folder, "prep", *arguments, "data.on_bad_row=skip")
    assert report(folder / "runs/default/sft/prep")["sets"]["demonstrations"]["counts"]["kept"] == 38
    assert files(folder / "runs/cache") == made
    # Too long where the policy says error
    strict = ["data.on_bad_row=skip", "data.max_length=60", "data.max_prompt_length=40", "data.long_response=error"]
    job = rlhf.run(folder, "prep", *arguments, *strict, "name=strict", code=2)
    assert re.search(r"A stage would stop here: bad\.jsonl:\d+: a response has \d+ tokens", job.output)
    assert report(folder / "runs/strict/sft/prep")["sets"]["demonstrations"]["counts"]["dropped_long_response"] > 1


def test_rankings_and_what_normalises_their_rewards(folder: Path, base: Path, rlhf: Forks) -> None:
    """Everything that `rlhf rm` reads: training and held-out rankings, and the preferred answers once more."""
    rows = [
        {"prompt": f"Is {i} odd?", "responses": ["Yes.", "No.", "Perhaps."], "scores": [2, 2 if i < 3 else 1, 2]}
        for i in range(40)
    ]
    rows[20]["responses"] = ["Yes.", "No.", "No."]
    write_jsonl(folder / "rankings.jsonl", rows)
    write_jsonl(folder / "gold.jsonl", [{**rows[0], "prompt": f"And {i}?"} for i in range(5)])
    arguments = ["rm", *RM, f"model.path={base}", "data.train=rankings.jsonl", "normalise.examples=30"]
    job = rlhf.run(folder, "prep", *arguments, "data.heldout=gold.jsonl", code=2)
    assert "rankings.jsonl:21: two responses are the same: numbers 2 and 3" in job.output
    assert "A stage would stop here: 1 row cannot be used" in job.output  # though both of its readings meet it
    job = rlhf.run(folder, "prep", *arguments, "data.heldout=gold.jsonl", "data.on_bad_row=skip")
    found = report(folder / "runs/default/rm/prep")
    assert set(found["sets"]) == {"rankings", "held out", "to normalise"}
    one = found["sets"]["rankings"]
    # 3 rankings of three ties, 36 of one.
    assert (one["prompts"], one["comparisons"], one["all_tied"], one["answers"]) == (39, 117, 3, {"3": 39})
    assert one["tied"] == pytest.approx((3 * 3 + 36) / 117, abs=1e-4)
    assert found["run"]["steps"] == 5 and found["run"]["examples_a_step"] == pytest.approx(39 / 5, abs=0.1)
    normalise = found["sets"]["to normalise"]
    assert (normalise["kind"], normalise["examples"], normalise["counts"]) == ("demonstration", 30, None)
    assert "rankings of ties alone" in job.output and "longest (a packed row: 96)" in job.output
    # The same files, whether somebody minds bad rows or not; and one more for every comparison by itself.
    made = files(folder / "runs/cache")
    assert len([path for path in made if path.endswith(".arrow")]) == 3
    apart = [*arguments, "data.on_bad_row=skip", "data.rankings=pairs", "data.heldout_fraction=0.25", "name=pairs"]
    rlhf.run(folder, "prep", *apart)
    found = report(folder / "runs/pairs/rm/prep")
    one, held_out = found["sets"]["rankings"], found["sets"]["held out"]
    assert one["counts"]["dropped_all_tied"] == 3 and set(one["answers"]) == {"2"} and one["tied"] == 0
    assert one["examples"] == one["comparisons"] == 2 * one["prompts"] and set(held_out["answers"]) == {"3"}
    after = files(folder / "runs/cache")
    assert {path: after[path] for path in made} == made
    assert len([path for path in after if path.endswith(".arrow")]) == 4


def test_any_data_without_a_tokenizer(folder: Path, base: Path, rlhf: Forks) -> None:
    rankings = [{"prompt": "Hi?", "responses": ["Yes.", "No, no."], "ranks": [1, 1 + i % 2]} for i in range(10)]
    write_jsonl(folder / "rankings.jsonl", rankings)
    job = rlhf.run(folder, "prep", "kind=ranking", "data.train=rankings.jsonl")
    found = report(folder / "runs/default/prep")
    one = found["sets"]["train"]
    assert found["unit"] == "characters" and "Lengths are in characters" in job.output
    assert one["prompt"]["max"] == 3 and one["response"]["max"] == 7 and one["tree"]["max"] == 3 + 4 + 7
    assert one["tied"] == 0.5 and one["duplicates"]["examples"] == 9
    rlhf.run(folder, "prep", "kind=ranking", "data.train=rankings.jsonl", f"tokenizer.path={base}", "name=tokens")
    found = report(folder / "runs/tokens/prep")
    assert found["unit"] == "tokens" and found["sets"]["train"]["targets"] > 0
    job = rlhf.run(folder, "prep", "data.train=rankings.jsonl", "name=wrong", "data.format=alpaca", code=2)
    assert "no field 'instruction'" in job.output


def test_the_lab_is_written_as_plain_files(folder: Path, rlhf: Forks) -> None:
    sizes = [f"data.lab.{name}={n}" for name, n in (("documents", 30), ("demonstrations", 20), ("rankings", 5))]
    job = rlhf.run(folder, "prep", "data=lab", *sizes)
    lab = folder / "runs/default/prep/lab"
    rows = {path.stem: [json.loads(line) for line in path.open()] for path in lab.iterdir()}
    assert {"documents", "demonstrations", "rankings", "prompts", "heldout_prompts"} <= rows.keys()
    assert (len(rows["documents"]), len(rows["demonstrations"]), len(rows["rankings"])) == (30, 20, 5)
    for name in rows:
        assert json.dumps(rows[name][0], ensure_ascii=False)[:100] in job.output
    assert report(folder / "runs/default/prep")["sets"]["train"]["examples"] == 20
