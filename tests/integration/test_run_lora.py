"""Adapters through the command line: small states, bit-identical resumption, and one merged model at the end."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers_runs import (
    ENVIRONMENT,
    SFT_ON_FILES,
    TINY_RUN,
    Forks,
    assert_same_end,
    copy_run,
    dialogues,
    files_below,
    logged_steps,
    make_base,
    relative_difference,
    series,
    states,
    wait_for,
    weights,
    write_jsonl,
)

from rlhf_pipeline import artifact
from rlhf_pipeline.artifact import Kind

pytest.importorskip("peft", reason="needs the lora extra")

SFT = [
    *SFT_ON_FILES,
    "batch.examples=8",
    "batch.row_length=200",
    "train.epochs=3",
    "optim.lr=1e-2",
    "optim.weight_decay=0.1",
    "checkpoint.every=3",
    "evaluation.every=4",
    *TINY_RUN,
]
LORA = ["lora=default", "lora.rank=4", "lora.dropout=0.1"]
SLOW = pytest.mark.slow
QLORA = ["lora=qlora", "lora.rank=4"]
STEPS, PAUSE = 12, 5
# 2 layers of (in, out): q, k, v, o, gate, up, down of the tiny Llama, width 32, key and value 16, feed-forward 48.
ADAPTERS = 2 * 4 * sum(a + b for a, b in [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    write_jsonl(folder / "train.jsonl", dialogues(32))
    write_jsonl(folder / "heldout.jsonl", dialogues(6, seed=1))
    return folder


def run_of(folder: Path, name: str) -> Path:
    return folder / "runs" / name / "sft"


def trained(rlhf: Forks, folder: Path, base: Path, name: str, *overrides: str) -> Path:
    run = run_of(folder, name)
    if not run.exists():
        rlhf.run(folder, *SFT, f"model.path={base}", f"name={name}", *overrides)
    return run


def stage(rlhf: Forks, folder: Path, base: Path, zero: int) -> Path:
    run = trained(rlhf, folder, base, f"zero{zero}", *LORA, "lora.merge=false", f"engine=zero{zero}")
    assert logged_steps(run) == STEPS
    return run


def log(folder: Path) -> str:
    return max((folder / "logs").iterdir(), key=lambda path: int(path.stem)).read_text()


# Training


def test_it_learns_and_says_what_is_trained(folder: Path, base: Path, rlhf: Forks) -> None:
    run = stage(rlhf, folder, base, 1)
    plain = sum(t.numel() for t in weights(base).values())
    rlhf.run(folder, *SFT, f"model.path={base}", "name=zero1", *LORA, "lora.merge=false", "engine=zero1")
    assert f"{plain + ADAPTERS:,} parameters ({ADAPTERS:,} trained)" in log(folder)
    losses = series(run, "eval/loss")
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize("zero", [0, 2, 3])
@pytest.mark.slow
def test_every_zero_stage_trains_the_same(folder: Path, base: Path, rlhf: Forks, zero: int) -> None:
    run, one = stage(rlhf, folder, base, zero), stage(rlhf, folder, base, 1)
    assert series(run, "train/loss")[0] == series(one, "train/loss")[0]
    assert series(run, "train/loss") == pytest.approx(series(one, "train/loss"), rel=1e-6)
    assert series(run, "train/grad_norm") == pytest.approx(series(one, "train/grad_norm"), rel=1e-5)
    assert relative_difference(weights(run / "artifact"), weights(one / "artifact")) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 3])
@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing(folder: Path, base: Path, rlhf: Forks, zero: int) -> None:
    plain = trained(rlhf, folder, base, f"plain{zero}", "lora=default", "lora.rank=4", f"engine=zero{zero}")
    less = ["lora=default", "lora.rank=4", f"engine=zero{zero}", "model.gradient_checkpointing=true"]
    checkpointed = trained(rlhf, folder, base, f"checkpointed{zero}", *less)
    assert series(checkpointed, "train/grad_norm") == pytest.approx(series(plain, "train/grad_norm"), rel=1e-6)
    assert relative_difference(weights(checkpointed / "artifact"), weights(plain / "artifact")) < 1e-6


# States


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.slow
def test_a_state_holds_the_adapters_alone(folder: Path, base: Path, rlhf: Forks, zero: int) -> None:
    from safetensors.torch import load_file

    run = stage(rlhf, folder, base, zero)
    saved = load_file(run / f"state/step_{STEPS:08d}/rank_00000.safetensors")
    assert sum(t.numel() for t in saved.values()) == 3 * ADAPTERS  # masters and two moments
    assert all(".lora_A." in name or ".lora_B." in name for name in saved)
    assert all(t.abs().max() > 0 for t in saved.values())


@pytest.mark.parametrize("zero", [1, *(pytest.param(zero, marks=SLOW) for zero in (0, 2, 3))])
@pytest.mark.slow
def test_kill_9_is_not_seen_in_the_end(folder: Path, base: Path, rlhf: Forks, zero: int) -> None:
    undisturbed = stage(rlhf, folder, base, zero)
    command = [*SFT, f"model.path={base}", f"name=killed{zero}", *LORA, "lora.merge=false", f"engine=zero{zero}"]
    run, after = run_of(folder, f"killed{zero}"), random.SystemRandom().randint(1, STEPS - 3)
    for _ in range(10):  # on a busy machine it may be done before we look
        shutil.rmtree(run, ignore_errors=True)
        job = rlhf.start(folder, *command)
        wait_for(lambda: logged_steps(run) >= after, job)
        job.signal(signal.SIGKILL)
        if job.wait(-signal.SIGKILL, 0).codes != [0]:
            break
    print(f"killed after step {logged_steps(run)}, states {states(run)}")
    rlhf.run(folder, *command)
    assert_same_end(run, undisturbed)
    name = "artifact/adapter/adapter_model.safetensors"
    assert (run / name).read_bytes() == (undisturbed / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.slow
def test_a_quantised_run_goes_on_as_well(folder: Path, wide: Path, rlhf: Forks, dtype: str) -> None:
    overrides = [*QLORA, f"model.dtype={dtype}"]
    undisturbed = trained(rlhf, folder, wide, f"nf4_{dtype}", *overrides)
    run = trained(rlhf, folder, wide, f"nf4_paused_{dtype}", *overrides, f"train.stop_after={PAUSE}")
    assert logged_steps(run) == PAUSE
    rlhf.run(folder, *SFT, f"model.path={wide}", f"name=nf4_paused_{dtype}", *overrides)
    assert_same_end(run, undisturbed)
    losses = series(run, "eval/loss")
    assert losses[-1] < losses[0] - 0.3


@pytest.fixture(scope="module")
def paused(folder: Path, base: Path, rlhf: Forks) -> Path:
    return trained(rlhf, folder, base, "paused", *LORA, "lora.merge=false", f"train.stop_after={PAUSE}")


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("lora.rank=3", "lora.rank: was 4, is now 3"),
        ("lora.alpha=8", "lora.alpha: was 32.0, is now 8.0"),
        ("lora.targets=[q_proj]", "lora.targets: was 'all-linear', is now ['q_proj']"),
        ("lora.quantise=nf4", "lora.quantise: was 'none', is now 'nf4'"),
    ],
)
@pytest.mark.slow
def test_other_adapters_are_another_run(
    folder: Path, base: Path, paused: Path, rlhf: Forks, override: str, difference: str
) -> None:
    command = [*SFT, f"model.path={base}", "name=paused", *LORA, "lora.merge=false", override]
    job = rlhf.run(folder, *command, code=2)
    assert difference in job.output and "Traceback" not in job.output and job.output.count(": was ") == 1


@pytest.mark.slow
def test_another_base_model_under_the_same_name(folder: Path, base: Path, paused: Path, rlhf: Forks) -> None:
    """The state does not hold the frozen weights, so they must be those that the adapters were trained on."""
    changed = folder / "changed"
    shutil.copytree(base, changed)
    make = ["lora=default", "lora.rank=2", "train.max_steps=4"]
    run = trained(rlhf, folder, changed, "rebased", *make, "train.stop_after=2")
    make_base(changed, seed=9)
    for zero in (1, 3):
        copy = copy_run(run, run_of(folder, f"rebased_{zero}"))
        command = [*SFT, f"model.path={changed}", f"name={copy.parent.name}", *make, f"engine=zero{zero}"]
        job = rlhf.run(folder, *command, code=2)
        assert f"contents of model.path={changed} have changed" in job.output and "Traceback" not in job.output
    shutil.rmtree(changed)
    shutil.copytree(base, changed)
    job = rlhf.run(folder, *SFT, f"model.path={changed}", "name=rebased_3", *make, "engine=zero3")
    assert "resumed after step 2" in job.output


# What is handed over


def next_loss(rlhf: Forks, folder: Path, run: Path, *overrides: str) -> float:
    """The held-out loss before the first step of a stage that starts from a run's artifact."""
    name = f"after_{run.parent.name}"
    command = [f"model.path={run / 'artifact'}", "train.max_steps=1", *overrides]
    return series(trained(rlhf, folder, run, name, *command), "eval/loss")[0]


@pytest.mark.parametrize("zero", [1, 3])
@pytest.mark.slow
def test_the_next_stage_begins_where_this_one_ended(folder: Path, base: Path, rlhf: Forks, zero: int) -> None:
    run = stage(rlhf, folder, base, zero)
    assert next_loss(rlhf, folder, run) == pytest.approx(series(run, "eval/loss")[-1], abs=1e-5)


@pytest.mark.slow
def test_in_bf16_it_does_so_nearly(folder: Path, base: Path, rlhf: Forks) -> None:
    """The merged weight is rounded to three digits; measured on this model: 2e-4 at most."""
    run = trained(rlhf, folder, base, "bf16", *LORA, "model.dtype=bfloat16")
    end, before = series(run, "eval/loss")[-1], series(run, "eval/loss")[0]
    assert before - end > 0.3
    assert next_loss(rlhf, folder, run, "model.dtype=bfloat16") == pytest.approx(end, abs=2e-3)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-3)])
@pytest.mark.slow
def test_a_quantised_model_is_handed_over_as_it_was_trained(
    folder: Path, wide: Path, rlhf: Forks, dtype: str, tolerance: float
) -> None:
    run = trained(rlhf, folder, wide, f"nf4_{dtype}", *QLORA, f"model.dtype={dtype}")
    loss = next_loss(rlhf, folder, run, f"model.dtype={dtype}")
    assert loss == pytest.approx(series(run, "eval/loss")[-1], abs=tolerance)
    plain, merged = weights(wide), weights(run / "artifact")
    assert {k: t.shape for k, t in merged.items()} == {k: t.shape for k, t in plain.items()}
    assert "quantization_config" not in json.loads((run / "artifact/config.json").read_text())
    first = next_loss(rlhf, folder, run, f"model.dtype={dtype}")
    assert abs(series(run, "eval/loss")[0] - first) > 0.1, "it has been trained"


OUTSIDE = """
import json, sys
import torch
from transformers import AutoModelForCausalLM

merged, base, ids = sys.argv[1], sys.argv[2], torch.arange(30)[None]
def logits(model):
    with torch.no_grad():
        return model.eval()(ids).logits
plain = logits(AutoModelForCausalLM.from_pretrained(merged))
assert not any(name.partition(".")[0] in ("rlhf_pipeline", "deepspeed", "peft") for name in sys.modules)
from peft import PeftModel
adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), merged + "/adapter")
start = logits(AutoModelForCausalLM.from_pretrained(base))
print(json.dumps([float((plain - logits(adapted)).abs().max()), float((plain - start).abs().max())]))
"""


def test_transformers_opens_it_alone_and_peft_the_adapters(
    folder: Path, base: Path, rlhf: Forks, tmp_path: Path
) -> None:
    run = stage(rlhf, folder, base, 1)
    moved = tmp_path / "moved"
    shutil.copytree(run / "artifact", moved)
    (tmp_path / "outside.py").write_text(OUTSIDE)
    found = subprocess.run(
        [sys.executable, "-P", "outside.py", str(moved), str(base)],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", **{k: v for k, v in ENVIRONMENT.items() if k != "PYTHONPATH"}},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    difference, trained_by = json.loads(found.stdout)
    assert difference < 1e-4 < 0.1 < trained_by


@pytest.mark.slow
def test_what_lies_in_the_folder(folder: Path, base: Path, rlhf: Forks) -> None:
    kept, merged = stage(rlhf, folder, base, 1), trained(rlhf, folder, base, "bf16", *LORA, "model.dtype=bfloat16")
    adapter = {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
    assert files_below(kept / "artifact") - files_below(merged / "artifact") == adapter
    assert files_below(merged / "artifact") < files_below(kept / "artifact")
    assert [p.name for p in sorted((kept / "artifacts").iterdir())] == ["epoch_1", "epoch_2", "epoch_3"]
    for place in (kept / "artifact", *(kept / "artifacts").iterdir()):
        manifest = artifact.load(place, kind=Kind.policy)
        assert adapter < manifest.files.keys()
        assert {k: t.shape for k, t in weights(place).items()} == {k: t.shape for k, t in weights(base).items()}
    settings: dict[str, Any] = json.loads((kept / "artifact/adapter/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base)
    assert settings["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


@pytest.mark.slow
def test_damaged_adapters_are_found(folder: Path, base: Path, rlhf: Forks) -> None:
    from rlhf_pipeline.errors import UserError

    copy = folder / "damaged"
    shutil.copytree(stage(rlhf, folder, base, 1) / "artifact", copy)
    (copy / "adapter/adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"adapter/adapter_model.safetensors is damaged"):
        artifact.load(copy, kind=Kind.policy)


@pytest.mark.slow
def test_our_adapter_folder_as_a_start(folder: Path, base: Path, rlhf: Forks) -> None:
    """base_model_name_or_path leads to the base; merged, it is the artifact that it lies in."""
    run = stage(rlhf, folder, base, 1)
    overrides = [f"tokenizer.path={base}", "train.max_steps=1"]
    again = trained(rlhf, folder, run / "artifact/adapter", "from_adapter", *overrides)
    assert series(again, "eval/loss")[0] == pytest.approx(series(run, "eval/loss")[-1], abs=1e-5)
    assert all(a.any() for a in _changes(again, run))


def _changes(run: Path, start: Path) -> list[Any]:
    """Where weights were trained: all of them, since this run has no adapters of its own."""
    before, after = weights(start / "artifact"), weights(run / "artifact")
    return [(after[name] != before[name]) for name in before]


@pytest.mark.slow
def test_a_mistake_is_told_without_a_traceback(folder: Path, base: Path, rlhf: Forks) -> None:
    for override, message in (
        ("lora.targets=[query]", "'query' is no linear layer of this model"),
        ("lora.rank=99", "lora.rank=99: model.layers.0.self_attn.q_proj is 32 wide"),
    ):
        job = rlhf.run(folder, *SFT, f"model.path={base}", "name=mistake", "lora=default", override, code=2)
        assert message in job.output and "Traceback" not in job.output
        shutil.rmtree(run_of(folder, "mistake"))
