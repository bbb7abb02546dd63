"""The reward model's objective in plain torch, one comparison at a time, over transformers' own sequence classifier."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_pipeline.config.ranking import Comparisons, RankingConfig, RankingLoss


def plain_objective(
    rewards: Sequence[Tensor],
    ranks: Sequence[Sequence[int]],
    scores: Sequence[Sequence[float]],
    config: RankingConfig,
    log_tie: Tensor | None = None,
) -> Tensor:
    """The loss of a global batch: the mean over prompts with a comparison, plus the weighted centring."""
    each, centred = [], []
    for values, places, given in zip(rewards, ranks, scores, strict=True):
        count = len(places)
        pairs = [(i, j) if places[i] <= places[j] else (j, i) for i in range(count) for j in range(i + 1, count)]
        won = [(i, j) for i, j in pairs if places[i] != places[j]]
        if config.loss is RankingLoss.plackett_luce:
            behind = {i: [j for j in range(count) if places[j] > places[i]] for i in range(count)}
            costs = [torch.logsumexp(values[[i, *js]], 0) - values[i] for i, js in behind.items() if js]
        else:
            costs = [_cost(values, given, i, j, config, log_tie) for i, j in won]
            if config.soft_labels:
                costs += [
                    _cost(values, given, i, j, config, log_tie)
                    for i, j in pairs
                    if (i, j) not in won and not math.isnan(given[i] - given[j])
                ]
            if log_tie is not None:
                costs += [-_outcomes(values[i] - values[j], log_tie)[2] for i, j in pairs if (i, j) not in won]
        if costs:
            number = len(pairs) if config.divide_by is Comparisons.literal else len(costs)
            each.append(torch.stack(costs).sum() / number)
        if won:
            centred.append(torch.stack([(values[i] + values[j]) ** 2 for i, j in won]).mean())
    loss = torch.stack(each).mean() if each else 0 * torch.cat(list(rewards)).sum()
    return loss + config.centring * torch.stack(centred).mean() if config.centring and centred else loss


def _cost(
    values: Tensor, given: Sequence[float], i: int, j: int, config: RankingConfig, log_tie: Tensor | None
) -> Tensor:
    """Of answer i having won against j; with soft labels, of two answers whose ranks may tie."""
    gap = values[i] - values[j]
    apart = given[i] - given[j]
    if config.soft_labels and not math.isnan(apart):
        chance = 1 / (1 + math.exp(-config.soft_labels * apart))
        return torch.nn.functional.binary_cross_entropy_with_logits(gap, torch.full_like(gap, chance))
    if config.margin and not math.isnan(apart):
        gap = gap - config.margin * apart
    wrong = config.label_smoothing
    if log_tie is None:
        return -(1 - wrong) * logsigmoid(gap) - wrong * logsigmoid(-gap)
    right, left, _ = _outcomes(gap, log_tie)
    return -(1 - wrong) * right - wrong * left


def _outcomes(gap: Tensor, log_tie: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the first winning, the second winning, and a tie (Davidson 1970)."""
    total = torch.logsumexp(torch.stack([gap / 2, -gap / 2, log_tie]), 0)
    return gap / 2 - total, -gap / 2 - total, log_tie - total


def ranks_of(scores: Sequence[float]) -> list[int]:
    """0 for the highest; equal for equal scores."""
    order = sorted(set(scores), reverse=True)
    return [order.index(score) for score in scores]


def davidson(rows: Sequence[dict[str, Any]]) -> float:
    """log nu for which equally good answers tie as often as the answers of these rows do."""
    ties = pairs = 0
    for row in rows:
        scores, count = row["scores"], len(row["scores"])
        pairs += count * (count - 1) // 2
        ties += sum(scores[i] == scores[j] for i in range(count) for j in range(i))
    rate = round(ties / pairs, 4)
    return math.log(2 * rate / (1 - rate))


def plain_start(base: Path, seed: int) -> Any:
    """The model that training begins from: the base's body under a head drawn from the seed."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    width = model.score.in_features
    drawn = torch.randn(1, width, generator=torch.Generator().manual_seed(seed)) / math.sqrt(width + 1)
    model.score.weight.data.copy_(drawn)
    return model


def plain_tokens(tokenizer: Any, row: dict[str, Any]) -> list[list[int]]:
    """Each answer of a row with its prompt, as transformers renders them."""
    asked = [{"role": "user", "content": row["prompt"]}]
    chats = [[*asked, {"role": "assistant", "content": answer}] for answer in row["responses"]]
    return [list(tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)) for chat in chats]


def plain_rewards(model: Any, answers: Sequence[Sequence[int]]) -> Tensor:
    """[K], one forward an answer."""
    return torch.stack([model(input_ids=torch.tensor([list(ids)])).logits[0, 0] for ids in answers])


def small_tokenizer(special: Sequence[str], **roles: str) -> Any:
    """A byte-level tokenizer with these special tokens and a template of turns that all end with its end token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=list(special), initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **roles)
    tokenizer.chat_template = (
        "{%- for m in messages -%}{{- m.role + ': ' + m.content + eos_token -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- 'assistant: ' -}}{%- endif -%}"
    )
    return tokenizer


def model_for(folder: Path, tokenizer: Any, architecture: str) -> Path:
    """A Hugging Face folder: a tiny model with an embedding for each token of `tokenizer` and no more."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    torch.manual_seed(1)
    config = AutoConfig.for_model(
        architecture,
        vocab_size=len(tokenizer),
        initializer_range=0.2,
        **sizes,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
