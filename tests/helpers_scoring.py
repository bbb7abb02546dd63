"""Small artifacts for tests, reward models above all, and what transformers alone makes of a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers_runs import make_base

from rlhf_pipeline import artifact
from rlhf_pipeline.artifact import Kind


def save_artifact(folder: Path, model: Any, tokenizer: Any, kind: Kind, *, stage: str, **facts: Any) -> None:
    """As a stage hands a model over, apart from what it says of config and data."""
    from rlhf_pipeline.data.prompts import Renderer

    renderer = Renderer(tokenizer)
    manifest: dict[str, Any] = {
        "kind": kind,
        "stage": stage,
        "step": 1,
        "template_hash": renderer.template_hash,
        "tokenizer_hash": renderer.tokenizer_hash,
        "special_ids": {},
        "vocab_size": 400,
        "config": {},
        "data": {},
        "metrics": {},
        **facts,
    }
    artifact.save(folder, model=model, weights=model.state_dict(), tokenizer=tokenizer, manifest=manifest)


def make_reward_model(
    folder: Path,
    base: Path,
    *,
    seed: int = 0,
    kind: Kind | None = None,
    shift: float | None = None,
    scale: float | None = None,
) -> Path:
    """A sequence classifier with a random head on the body of `base`: a Hugging Face folder, or with `kind` an artifact."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    torch.manual_seed(seed)
    torch.nn.init.normal_(model.score.weight)
    if kind is None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder
    save_artifact(folder, model, tokenizer, kind, stage="rm", reward_shift=shift, reward_scale=scale)
    return folder


def make_small_reward_model(folder: Path, **options: Any) -> Path:
    """`make_reward_model` on a body of its own."""
    return make_reward_model(folder, make_base(folder.with_name(folder.name + "_base")), **options)


def plain_reward(folder: Path, tokens: Any) -> float:
    """The logit that transformers' sequence classifier gives these tokens as they are."""
    import torch
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return float(model(input_ids=torch.tensor([list(map(int, tokens))])).logits[0, 0])


def plain_tokens(folder: Path, prompt: list[dict[str, str]], response: str) -> list[int]:
    """Tokens of a conversation as transformers renders it, up to and with the end token of its last turn."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": response}], tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
