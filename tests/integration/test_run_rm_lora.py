"""Reward models by adapters: the head is trained whole, the adapters are merged, and what is handed over is one model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_rankings import plain_rewards, plain_start, plain_tokens
from helpers_runs import (
    RM_ON_FILES,
    Forks,
    assert_same_end,
    copy_run,
    dialogues,
    rankings,
    relative_difference,
    series,
    states,
    weights,
    write_jsonl,
)

from rlhf_pipeline import artifact
from rlhf_pipeline.artifact import Kind
from rlhf_pipeline.config.schema import ModelConfig
from rlhf_pipeline.models.load import load_policy, load_scorer
from rlhf_pipeline.models.scalar_head import TreeScorer

pytest.importorskip("peft", reason="needs the lora extra")

SEED, LAST = 2, 10  # 10 steps in 2 epochs
RM = [
    *RM_ON_FILES,
    f"seed={SEED}",
    "batch.examples=8",
    "batch.row_length=400",
    "train.epochs=2",
    "optim.lr=2e-2",
    "checkpoint.every=4",
    "checkpoint.keep=9",
    "evaluation.before=false",
    "normalise.train=demonstrations.jsonl",
]
LORA = ["lora=default", "lora.rank=4", "lora.dropout=0.1", "lora.merge=false"]
QLORA = ["lora=qlora", "lora.rank=4", "lora.merge=false"]
# 2 layers of (in, out): q, k, v, o, gate, up, down of the tiny Llama, width 32, key and value 16, feed-forward 48.
ADAPTERS = 2 * 4 * sum(a + b for a, b in [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)])
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rm_lora")
    write_jsonl(folder / "train.jsonl", rankings(40))
    write_jsonl(folder / "heldout.jsonl", rankings(12, seed=1))
    write_jsonl(folder / "demonstrations.jsonl", dialogues(12, seed=2, turns=1))
    return folder


def made(rlhf: Forks, folder: Path, base: Path, name: str, *overrides: str) -> Path:
    run = folder / f"runs/{name}/rm"
    if not run.exists():
        rlhf.run(folder, *RM, f"model.path={base}", f"name={name}", *overrides)
    return run


def adapted(rlhf: Forks, folder: Path, base: Path, zero: int = 1) -> Path:
    return made(rlhf, folder, base, f"zero{zero}", *LORA, f"engine=zero{zero}")


def rewards_by(model: Any, folder: Path, base: Path) -> np.ndarray:
    """Of the held-out answers, by transformers' classifier alone."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [json.loads(line) for line in (folder / "heldout.jsonl").read_text().splitlines()]
    with torch.no_grad():
        found = [plain_rewards(model.eval(), plain_tokens(tokenizer, row)) for row in rows]
    return torch.cat(found).double().numpy()


def evaluation(run: Path) -> dict[str, Any]:
    return json.loads((run / "evaluation.json").read_text())


def opened(path: Path) -> Any:
    from transformers import AutoModelForSequenceClassification

    model, report = AutoModelForSequenceClassification.from_pretrained(path, output_loading_info=True)
    assert not any(report.values()), report
    assert model.config.num_labels == 1 and model.score.bias is None
    return model


def assert_handed_over(run: Path, folder: Path, base: Path, *, tolerance: float = 1e-4) -> None:
    """The merged model gives the rewards that were evaluated before it was saved, and so do the adapters on the base."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    merged = rewards_by(opened(run / "artifact"), folder, base)
    assert merged.mean() == pytest.approx(evaluation(run)["reward_mean"], abs=tolerance)
    assert merged.std() == pytest.approx(evaluation(run)["reward_std"], abs=tolerance)
    under = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    loaded = rewards_by(PeftModel.from_pretrained(under, run / "artifact/adapter"), folder, base)
    assert loaded == pytest.approx(merged, abs=tolerance)
    untrained = rewards_by(plain_start(base, SEED), folder, base)
    assert np.abs(merged - untrained).max() > 0.5, "it has been trained"


@pytest.mark.parametrize("zero", [1, pytest.param(0, marks=SLOW), pytest.param(2, marks=SLOW), 3])
def test_head_and_adapters_are_trained_and_handed_over(rlhf: Forks, folder: Path, base: Path, zero: int) -> None:
    from safetensors.torch import load_file

    run = adapted(rlhf, folder, base, zero)
    losses = series(run, "train/loss")
    assert sum(losses[-3:]) < sum(losses[:3]) - 0.3
    saved = load_file(run / f"state/step_{LAST:08d}/rank_00000.safetensors")
    assert sum(t.numel() for t in saved.values()) == 3 * (ADAPTERS + 32), "masters and two moments, of the head as well"
    assert all(".lora_A." in name or ".lora_B." in name or "inner.score.weight" in name for name in saved)
    start = plain_start(base, SEED).score.weight
    assert (weights(run / "artifact")["score.weight"] - start).abs().max() > 0.01
    assert_handed_over(run, folder, base)
    one = adapted(rlhf, folder, base)
    assert losses == pytest.approx(series(one, "train/loss"), rel=1e-5)
    assert relative_difference(weights(run / "artifact"), weights(one / "artifact")) < 1e-5


def test_what_lies_in_the_folder(rlhf: Forks, folder: Path, base: Path) -> None:
    run = adapted(rlhf, folder, base)
    found = artifact.load(run / "artifact", kind=Kind.reward_model)
    assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"} < found.files.keys()
    settings = json.loads((run / "artifact/adapter/adapter_config.json").read_text())
    assert (settings["task_type"], settings["modules_to_save"]) == ("SEQ_CLS", ["score"])
    assert settings["base_model_name_or_path"] == str(base) and "score" not in settings["target_modules"]
    body = {name for name in weights(run / "artifact") if name != "score.weight"}
    assert body == weights(base).keys() - {"lm_head.weight"}


def test_a_pause_is_not_seen_in_the_end(rlhf: Forks, folder: Path, base: Path) -> None:
    undisturbed = adapted(rlhf, folder, base)
    run = copy_run(undisturbed, folder / "runs/paused/rm")
    for name in ("artifact", "artifacts/epoch_2", f"state/step_{LAST:08d}", "state/step_00000008"):
        shutil.rmtree(run / name)
    assert states(run) == [4]
    job = rlhf.run(folder, *RM, f"model.path={base}", "name=paused", *LORA, "engine=zero1")
    assert "resumed after step 4" in job.output
    assert_same_end(run, undisturbed)
    name = "artifact/adapter/adapter_model.safetensors"
    assert (run / name).read_bytes() == (undisturbed / name).read_bytes()


def test_adapters_as_a_start(rlhf: Forks, folder: Path, base: Path, tmp_path: Path) -> None:
    """Of a reward model they bring its head, which is not drawn again; of a language model they go under a new one."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    ours = adapted(rlhf, folder, base) / "artifact"
    kept = scorer_of(ours / "adapter", base).inner.state_dict()
    expected = weights(ours)
    assert torch.equal(kept["score.weight"], expected["score.weight"])
    assert relative_difference({name: kept[name] for name in expected}, expected) < 1e-6

    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules="all-linear")
    language_model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, parameter in language_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    language_model.save_pretrained(str(tmp_path / "adapter"))
    found = scorer_of(tmp_path / "adapter", base).inner.state_dict()
    merged = language_model.merge_and_unload().state_dict()
    assert torch.equal(found["score.weight"], plain_start(base, SEED).score.weight)
    body = found.keys() - {"score.weight"}
    assert body == merged.keys() - {"lm_head.weight"}
    assert relative_difference({name: found[name] for name in body}, {name: merged[name] for name in body}) < 1e-6


def test_adapters_of_a_reward_model_are_none_of_a_language_model(rlhf: Forks, folder: Path, base: Path) -> None:
    import torch

    from rlhf_pipeline.errors import UserError

    model = ModelConfig(path=str(adapted(rlhf, folder, base) / "artifact/adapter"))
    with pytest.raises(UserError, match="holds an adapter of a classifier; a causal language model is needed here"):
        load_policy(model, tokenizer=None, seed=0, device=torch.device("cpu"), deepspeed_config=None)


def scorer_of(path: Path, base: Path) -> TreeScorer:
    import torch
    from transformers import AutoTokenizer

    tokenizer, device = AutoTokenizer.from_pretrained(base), torch.device("cpu")
    return load_scorer(
        ModelConfig(path=str(path)), tokenizer=tokenizer, seed=SEED, device=device, deepspeed_config=None
    )


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=SLOW)])
def test_the_head_is_not_quantised(rlhf: Forks, folder: Path, wide: Path, dtype: str) -> None:
    """Its weight is trained as it is; what is handed over has the shapes and the rewards of a plain model."""
    import torch

    run = made(rlhf, folder, wide, f"nf4_{dtype}", *QLORA, f"model.dtype={dtype}")
    losses = series(run, "train/loss")
    assert sum(losses[-3:]) < sum(losses[:3]) - 0.3
    found = weights(run / "artifact")
    assert found["score.weight"].shape == (1, 64) and found["score.weight"].dtype == getattr(torch, dtype)
    assert {k: t.shape for k, t in found.items() if k != "score.weight"} == {
        k: t.shape for k, t in weights(wide).items() if k != "lm_head.weight"
    }
    assert "quantization_config" not in json.loads((run / "artifact/config.json").read_text())
    tolerance = 1e-3 if dtype == "float32" else 0.1
    merged = rewards_by(opened(run / "artifact").float(), folder, wide)
    assert merged.mean() == pytest.approx(evaluation(run)["reward_mean"], abs=tolerance)
    assert merged.std() == pytest.approx(evaluation(run)["reward_std"], abs=tolerance)
