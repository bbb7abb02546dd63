"""The preference losses against TRL's own: DPO, IPO and KTO through its trainers, the others by its loss functions.

Only where TRL is installed; it is not among the development dependencies. Trainers run on a random model of two layers, and
the log-probs that our losses get are computed here, from the batch that TRL collated. R-DPO, RRHF and unlikelihood are
left out: TRL has none of them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_pipeline.functional.losses.preference import (
    cpo_loss,
    dpo_loss,
    ipo_loss,
    kto_loss,
    orpo_loss,
    simpo_loss,
    slic_loss,
)

pytest.importorskip("trl")

Check = Callable[..., None]
WORDS = ["<pad>", "<eos>", *"abcdefghijklmnopqrst"]


def logprobs(number: int = 200) -> tuple[Tensor, Tensor]:
    chosen, rejected = -4 * torch.rand(2, number, generator=torch.Generator().manual_seed(0))
    return chosen.requires_grad_(), rejected.requires_grad_()


def same(ours: Tensor, theirs: Tensor, inputs: tuple[Tensor, ...], check: Check) -> None:
    """Values and slopes."""
    check(ours, theirs, rtol=1e-5, atol=1e-6)
    for mine, other in zip(
        torch.autograd.grad(ours.sum(), inputs), torch.autograd.grad(theirs.sum(), inputs), strict=True
    ):
        check(mine, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "ours"),
    [
        ({"loss_type": "sigmoid"}, lambda w, x: cpo_loss(w, x, beta=0.3)),
        (
            {"loss_type": "sigmoid", "label_smoothing": 0.1},
            lambda w, x: dpo_loss(w - x, torch.full_like(w, 0.9), beta=0.3),
        ),
        ({"loss_type": "hinge"}, lambda w, x: slic_loss(0.3 * w, 0.3 * x, delta=1.0)),
        ({"loss_type": "ipo"}, lambda w, x: ipo_loss(w - x, tau=0.3)),
        ({"loss_type": "simpo"}, lambda w, x: simpo_loss(w, x, beta=0.3, gamma=0.8)),
    ],
)
def test_losses_without_a_reference(
    settings: dict[str, Any], ours: Callable[[Tensor, Tensor], Tensor], assert_close: Check
) -> None:
    from trl.experimental.cpo import CPOTrainer

    has = {"alpha": 0.0, "beta": 0.3, "label_smoothing": 0.0, "simpo_gamma": 0.8}
    trainer = SimpleNamespace(**{**has, **settings}, accelerator=SimpleNamespace(device="cpu"))
    pair = logprobs()
    same(ours(*pair), CPOTrainer.cpo_loss(trainer, *pair)[0], pair, assert_close)


def test_orpo(assert_close: Check) -> None:
    from trl.experimental.orpo import ORPOTrainer

    trainer = SimpleNamespace(beta=0.1, accelerator=SimpleNamespace(device="cpu"))
    pair = logprobs()
    theirs = -ORPOTrainer.odds_ratio_loss(trainer, *pair)[0]  # its caller subtracts it
    same(orpo_loss(*pair, beta=0.1), theirs, pair, assert_close)


def tiny(seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), initializer_range=0.3, **sizes, **special))


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def arguments(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
    }


def summed(model: Any, batch: dict[str, Tensor], prefix: str = "") -> tuple[Tensor, Tensor]:
    """A response's log-prob, summed, and its number of tokens."""
    tokens, mask = batch[f"{prefix}input_ids"], batch[f"{prefix}completion_mask"][:, 1:].float()
    logits = model(input_ids=tokens, attention_mask=batch[f"{prefix}attention_mask"]).logits[:, :-1]
    each = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    return (each * mask).sum(1), mask.sum(1)


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_dpo_and_ipo_through_the_trainer(kind: str, tmp_path: Path, assert_close: Check) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = [("a b c", " d e", " f"), ("g", " h i j k", " l m"), ("n o", " p", " q r s t"), ("b", " c", " d")]
    data = Dataset.from_list([{"prompt": p, "chosen": w, "rejected": x} for p, w, x in rows])
    policy, reference = tiny(1), tiny(2)
    config = DPOConfig(**arguments(tmp_path), loss_type=kind, beta=0.3)
    trainer = DPOTrainer(
        model=policy, ref_model=reference, args=config, train_dataset=data, processing_class=tokenizer()
    )
    batch = next(iter(trainer.get_train_dataloader()))
    theirs = trainer.compute_loss(trainer.model, dict(batch))

    (sums, lengths), (before, _) = summed(policy, batch), summed(reference, batch)
    ratios = (sums - before.detach()) / (lengths if kind == "ipo" else 1)  # TRL's IPO is one of means
    chosen, rejected = ratios.chunk(2)
    margins = chosen - rejected
    ours = dpo_loss(margins, torch.ones(4), beta=0.3) if kind == "sigmoid" else ipo_loss(margins, tau=0.3)
    assert_close(ours.mean(), theirs, rtol=1e-5)


@pytest.mark.parametrize("labels", [[True, False, True, False], [True] * 4, [False] * 4])
def test_kto_through_the_trainer(labels: list[bool], tmp_path: Path, assert_close: Check) -> None:
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    rows = [("a b c", " d e"), ("g", " h i j k"), ("n o", " p"), ("b", " c f l")]
    data = Dataset.from_list(
        [{"prompt": p, "completion": r, "label": label} for (p, r), label in zip(rows, labels, strict=True)]
    )
    policy, reference = tiny(3), tiny(2)
    weights = {"desirable_weight": 1.2, "undesirable_weight": 0.8}
    trainer = KTOTrainer(
        model=policy,
        ref_model=reference,
        args=KTOConfig(**arguments(tmp_path), beta=0.3, **weights),
        train_dataset=data,
        processing_class=tokenizer(),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    theirs = trainer.compute_loss(trainer.model, dict(batch))

    (sums, _), (before, _) = summed(policy, batch), summed(reference, batch)
    (other, _), (other_before, _) = summed(policy, batch, "KL_"), summed(reference, batch, "KL_")
    baseline = (other - other_before).mean().clamp(min=0).detach()
    wanted = torch.as_tensor(batch["label"], dtype=torch.bool)
    ours = kto_loss(sums - before.detach(), wanted, baseline, beta=0.3, **weights)
    assert_close(ours.mean(), theirs, rtol=1e-5)
