"""Which fields make a run that run: a resumed run may change the others only."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import pytest

from rlhf_pipeline import config
from rlhf_pipeline.config.identity import differences, identity, plain

GIVEN = ["data.train=some.jsonl", "model.path=some_model"]

# Written out by hand, so that a field which joins or leaves is looked at.
OPERATIONAL_SECTIONS = {"train", "engine", "checkpoint", "evaluation", "tracking", "runtime", "machine"}
OPERATIONAL_FIELDS = {
    "name", "runs", "run_dir", "model.attention", "model.gradient_checkpointing", "data.cache_dir", "data.workers",
    "batch.row_length", "batch.micro_rows",
}  # fmt: skip


@functools.cache
def sft(*overrides: str) -> Any:
    return config.load("sft", [*GIVEN, *overrides])


def leaves(section: Any, prefix: str = "") -> set[str]:
    found: set[str] = set()
    for f in dataclasses.fields(section):
        value = getattr(section, f.name)
        found |= leaves(value, f"{prefix}{f.name}.") if dataclasses.is_dataclass(value) else {f"{prefix}{f.name}"}
    return found


def test_every_field_is_one_or_the_other() -> None:
    run = sft()
    operational = OPERATIONAL_FIELDS | {k for k in leaves(run) if k.partition(".")[0] in OPERATIONAL_SECTIONS}
    assert set(identity(run)) == leaves(run) - operational


@pytest.mark.parametrize(
    "override",
    ["engine=zero3", "tracking=offline", "checkpoint.every=7", "train.epochs=9", "train.max_steps=3",
     "evaluation.every=5", "runtime.device=cpu", "name=other", "runs=elsewhere", "batch.row_length=1000",
     "batch.micro_rows=9", "model.gradient_checkpointing=true", "model.attention=dense", "data.cache_dir=/tmp/c",
     "data.workers=3"],
)  # fmt: skip
def test_operational(override: str) -> None:
    assert sft(override) != sft()
    assert identity(sft(override)) == identity(sft())


@pytest.mark.parametrize(
    ("override", "key", "before", "now"),
    [
        ("data.train=other.jsonl", "data.train", "some.jsonl", "other.jsonl"),
        ("model.path=other", "model.path", "some_model", "other"),
        ("model.dtype=bfloat16", "model.dtype", "float32", "bfloat16"),
        ("optim.lr=0.5", "optim.lr", 9.65e-6, 0.5),
        ("optim.betas=[0.9,0.999]", "optim.betas", [0.9, 0.95], [0.9, 0.999]),
        ("seed=1", "seed", 0, 1),
        ("batch.examples=64", "batch.examples", 32, 64),
        ("tokenizer.template=chatml", "tokenizer.template", None, "chatml"),
        ("data.loss=all", "data.loss", "responses", "all"),
        ("data.lab.seed=5", "data.lab.seed", 0, 5),
        ("data.columns={prompt:question}", "data.columns", None, {"prompt": "question"}),
    ],
)
def test_identity(override: str, key: str, before: Any, now: Any) -> None:
    assert differences(identity(sft()), identity(sft(override))) == [f"{key}: was {before!r}, is now {now!r}"]


def test_a_field_that_an_earlier_version_did_not_have_had_its_default() -> None:
    now, defaults = identity(sft()), identity(type(sft())())
    before = {key: value for key, value in now.items() if key != "tokenizer.template"}
    assert differences(before, now, defaults=defaults) == []
    other = identity(sft("tokenizer.template=chatml"))
    assert differences(before, other, defaults=defaults) == ["tokenizer.template: was None, is now 'chatml'"]
    assert differences(before | {"data.old": 1}, now, defaults=defaults) == ["data.old: was 1, is now None"]


def test_a_shape_is_told_apart_from_a_path() -> None:
    overrides = ["model.path=null", "tokenizer.path=t", "data.max_length=512", "data.max_prompt_length=256"]
    changed = differences(identity(sft()), identity(sft(*overrides, "model=lab")))
    assert "model.shape.hidden: was None, is now 128" in changed
    assert "model.path: was 'some_model', is now None" in changed


def test_survives_json() -> None:
    before = identity(sft("mix.train=[a,b]", "mix.ratio=0.5"))
    assert differences(json.loads(json.dumps(plain(before))), before) == []
