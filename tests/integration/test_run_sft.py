"""`rlhf sft` over the shapes that demonstrations come in, from models of several origins."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from helpers_runs import (
    TINY_RUN,
    Forks,
    assert_same_end,
    dialogues,
    make_base,
    metrics,
    relative_difference,
    series,
    texts,
    weights,
    write_jsonl,
)

SFT = [
    "sft",
    "data.max_length=200",
    "data.max_prompt_length=120",
    "data.heldout_fraction=0.2",
    "batch.examples=8",
    "batch.row_length=96",
    "optim.lr=3e-3",
    "train.epochs=3",
    *TINY_RUN,
]


def hh(messages: list[dict[str, str]], *, last: str | None = None) -> str:
    names = {"user": "Human", "assistant": "Assistant"}
    turns = [(names[m["role"]], m["content"]) for m in messages]
    if last is not None:
        turns[-1] = (turns[-1][0], last)
    return "".join(f"\n\n{who}: {content}" for who, content in turns)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sft")
    rows = [row["messages"] for row in dialogues(40)]
    write_jsonl(folder / "messages.jsonl", [{"messages": m} for m in rows])
    write_jsonl(folder / "hh.jsonl", [{"chosen": hh(m), "rejected": hh(m, last="book")} for m in rows])
    alpaca = [{"instruction": m[0]["content"], "input": "", "output": m[1]["content"]} for m in rows]
    (folder / "alpaca.json").write_text(json.dumps(alpaca))
    write_jsonl(folder / "text.jsonl", texts(30))
    return folder


def sft(rlhf: Forks, folder: Path, base: Path, name: str, train: str, *overrides: str) -> Path:
    rlhf.run(folder, *SFT, f"name={name}", f"data.train={train}", f"model.path={base}", *overrides)
    return folder / f"runs/{name}/sft"


def manifest(run: Path) -> dict[str, Any]:
    return json.loads((run / "artifact/artifact.json").read_text())


def scored(run: Path) -> int:
    """Targets of the whole source, held-out part included."""
    return manifest(run)["data"]["demonstrations"]["counts"]["targets"]


@pytest.fixture(scope="module")
def messages(folder: Path, base: Path, rlhf: Forks) -> Path:
    return sft(rlhf, folder, base, "messages", "messages.jsonl")


def test_multi_turn_messages(messages: Path, base: Path) -> None:
    """From a plain Hugging Face folder, which is recorded as a parent without a hash."""
    losses = series(messages, "train/loss")
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-3:]) / 3 < sum(losses[:3]) / 3 - 0.5
    held_out = series(messages, "eval/loss")
    assert len(held_out) == 2 and held_out[-1] < held_out[0] - 0.3
    assert manifest(messages)["parents"]["model"] == {
        "path": str(base),
        "content_hash": None,
        "template_hash": None,
        "tokenizer_hash": None,
    }
    assert relative_difference(weights(messages / "artifact"), weights(base)) > 1e-3
    answers = [json.loads(line) for line in (messages / "samples.jsonl").read_text().splitlines()]
    assert {a["step"] for a in answers} == {0, metrics(messages)[-1]["step"]}
    assert all(a["prompt"].rstrip().endswith("Assistant:") for a in answers)


def test_hh_strings_are_the_last_answers_only(folder: Path, base: Path, messages: Path, rlhf: Forks) -> None:
    run = sft(rlhf, folder, base, "hh", "hh.jsonl")
    assert series(run, "train/loss")[-1] < series(run, "train/loss")[0]
    rows = [row["messages"] for row in dialogues(40)]
    assert any(len(m) > 2 for m in rows)
    assert scored(run) < scored(messages)
    # In the file of messages the other answers have weight 0: then it is the same training, bit for bit.
    for m in rows:
        for turn in m[1:-1:2]:
            turn["weight"] = 0
    write_jsonl(folder / "weighted.jsonl", [{"messages": m} for m in rows])
    same = sft(rlhf, folder, base, "weighted", "weighted.jsonl")
    assert (same / "artifact/model.safetensors").read_bytes() == (run / "artifact/model.safetensors").read_bytes()
    assert metrics(same) == metrics(run)


@pytest.fixture(scope="module")
def gpt2(folder: Path) -> Path:
    return make_base(folder / "gpt2", architecture="gpt2")


def test_alpaca_from_gpt2(folder: Path, gpt2: Path, rlhf: Forks) -> None:
    """Another format and another family, whose attention and head are different."""
    run = sft(rlhf, folder, gpt2, "alpaca", "alpaca.json")
    losses = series(run, "train/loss")
    assert sum(losses[-3:]) / 3 < sum(losses[:3]) / 3 - 0.3
    assert manifest(run)["data"]["demonstrations"]["counts"]["kept"] == 40


def test_loss_on_all(folder: Path, base: Path, messages: Path, rlhf: Forks) -> None:
    """Every token but the first is a target."""
    run = sft(rlhf, folder, base, "all", "messages.jsonl", "data.loss=all", "train.max_steps=2")
    counts = manifest(run)["data"]["demonstrations"]["counts"]
    assert counts["tokens"] - counts["targets"] == counts["trees"] == 40
    assert scored(run) > scored(messages)


def test_mixed_in_text(folder: Path, base: Path, rlhf: Forks) -> None:
    """A quarter of all examples is text; both losses are logged, and the loss is their mean by tokens."""
    run = sft(rlhf, folder, base, "mix", "messages.jsonl", "mix.train=text.jsonl", "mix.ratio=0.25")
    lines = [line for line in metrics(run) if "train/loss" in line]
    steps = len(lines)
    for line in lines:
        low, high = sorted((line["train/loss_demonstrations"], line["train/loss_pretraining"]))
        assert low <= line["train/loss"] <= high
    assert lines[-1]["train/loss_pretraining"] < lines[0]["train/loss_pretraining"] - 0.3
    assert lines[-1]["train/loss_demonstrations"] < lines[0]["train/loss_demonstrations"] - 0.3
    data = manifest(run)["data"]
    assert data["pretraining"]["counts"]["trees"] == 30 and data["demonstrations"]["counts"]["trees"] == 40
    alone = sft(rlhf, folder, base, "no_mix", "messages.jsonl")
    assert len(series(alone, "train/loss")) == steps, "the steps are counted in demonstrations"
    assert series(alone, "train/loss")[0] != lines[0]["train/loss"]
    assert lines[0]["train/loss_demonstrations"] == pytest.approx(series(alone, "train/loss")[0], rel=1e-6)


def test_bf16(folder: Path, base: Path, messages: Path, rlhf: Forks) -> None:
    run = sft(rlhf, folder, base, "bf16", "messages.jsonl", "model.dtype=bfloat16")
    import torch

    tensors = weights(run / "artifact")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert json.loads((run / "artifact/config.json").read_text())["dtype"] == "bfloat16"
    for loss, exact in zip(series(run, "train/loss"), series(messages, "train/loss"), strict=True):
        assert loss == pytest.approx(exact, rel=0.03)


def test_dropout_is_the_same_after_a_pause(folder: Path, gpt2: Path, rlhf: Forks) -> None:
    """It is drawn from the step. Training has it, evaluation has not."""
    dropout = ["model.dropout=0.1", "checkpoint.every=3"]
    whole = sft(rlhf, folder, gpt2, "dropout", "messages.jsonl", *dropout)
    sft(rlhf, folder, gpt2, "dropout_paused", "messages.jsonl", *dropout, "train.stop_after=5")
    paused = sft(rlhf, folder, gpt2, "dropout_paused", "messages.jsonl", *dropout)
    assert_same_end(paused, whole)
    without = sft(rlhf, folder, gpt2, "no_dropout", "messages.jsonl", "train.max_steps=1")
    assert series(whole, "eval/loss")[0] == series(without, "eval/loss")[0]
    assert series(whole, "train/loss")[0] != series(without, "train/loss")[0]
    config = json.loads((whole / "artifact/config.json").read_text())
    assert (config["attn_pdrop"], config["embd_pdrop"], config["resid_pdrop"]) == (0.1, 0.1, 0.1)


def test_after_a_mistake_in_the_data_the_corrected_command_runs(rlhf: Forks, folder: Path, base: Path) -> None:
    """Nothing has been worked for yet, so another config is no other run. Once there is, it is."""
    common = [*SFT, "name=corrected", f"model.path={base}", "train.max_steps=1"]
    job = rlhf.run(folder, *common, "data.train=mesages.jsonl", code=2)
    assert "mesages.jsonl: no such file" in job.output
    rlhf.run(folder, *common, "data.train=messages.jsonl")
    job = rlhf.run(folder, *common, "data.train=hh.jsonl", code=2)
    assert "data.train: was 'messages.jsonl', is now 'hh.jsonl'" in job.output
