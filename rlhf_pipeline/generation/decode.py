"""The sampling loop: prompts in batches of similar length, one forward pass a token, finished answers leave the batch.

The answers are the same whatever the batches are, up to the rounding of logits. Every rank that calls with the same
arguments makes the same forward passes, so it runs under ZeRO-3 too. The global random state is not touched.

Shapes: B rows (answers), P prompt tokens, N new tokens, V words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rlhf_pipeline.config.schema import SamplingConfig
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.generation.cache import HIDDEN, Family
from rlhf_pipeline.generation.draw import draw, uniforms
from rlhf_pipeline.models import path_attention

LEAVE = (
    0.1  # share of a batch that must have finished before its rows are taken out: others are copied into their places
)
Finish = Literal["stop", "length"]
PREFILL_TOKENS = 4096  # in one forward pass over prompts: enough to be fast, and few to be padding
STOP: Finish = "stop"
LENGTH: Finish = "length"


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A prompt, int [P] with P >= 1, and the numbers of the samples wanted. `id` is what its randomness comes from."""

    prompt: np.ndarray
    id: int
    samples: tuple[int, ...] = (0,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """An answer as it was drawn. With finish "stop" its last token is an end token, with "length" there is none."""

    id: int
    sample: int
    tokens: np.ndarray  # int32 [N]
    logprobs: np.ndarray  # fp32 [N], under the distribution each was drawn from
    finish: Finish

    @property
    def text_tokens(self) -> np.ndarray:
        """Without the end token."""
        return self.tokens[:-1] if self.finish == STOP else self.tokens


def generate(
    model: Any,
    prompts: Sequence[np.ndarray],
    options: SamplingConfig,
    *,
    end_ids: Sequence[int],
    pad_id: int,
    seed: int,
    ids: Sequence[int],
) -> list[Completion]:
    """`options.samples` answers to each prompt: those of prompt i are at i * samples and on.

    Args:
        model: a causal language model of transformers.
        prompts: token ids, int [P_i] each.
        end_ids: tokens that end an answer.
        pad_id: any token; it fills up rows and is never seen.
        ids: of the examples, each another one; the same seed and id get the same answer in any batch.

    Raises:
        UserError: when the model cannot be sampled from, or what it computes is not finite.
    """
    samples = tuple(range(options.samples))
    questions = [Question(prompt=p, id=i, samples=samples) for p, i in zip(prompts, ids, strict=True)]
    found = {}
    for batch in completions(model, questions, options, end_ids=end_ids, pad_id=pad_id, seed=seed):
        found.update({(one.id, one.sample): one for one in batch})
    return [found[q.id, sample] for q in questions for sample in q.samples]


def completions(
    model: Any,
    questions: Sequence[Question],
    options: SamplingConfig,
    *,
    end_ids: Sequence[int],
    pad_id: int,
    seed: int,
    tick: Callable[[int], None] | None = None,
) -> Iterator[list[Completion]]:
    """The answers, batch by batch as they are finished. `tick` is told how many tokens were drawn at every step."""
    family = Family(model)
    for batch in batches(questions, options, equal=not family.slots):
        with sampling_mode(model):
            yield _Batch(model, family, batch, options, tuple(end_ids), pad_id, seed).run(tick)


def batches(questions: Sequence[Question], options: SamplingConfig, *, equal: bool = False) -> list[list[Question]]:
    """Questions in batches of at most `options.batch_tokens` (rows times longest prompt with its answer), longest first.

    At least one row is in a batch. Samples of a question are split up where they do not fit together; with `equal` all
    prompts of a batch have one length.
    """
    found: list[list[Question]] = []
    rows = length = 0  # of the last batch
    for question in sorted(questions, key=lambda q: -len(q.prompt)):
        width = len(question.prompt) + options.max_new_tokens
        most = max(1, options.batch_tokens // width)
        for start in range(0, len(question.samples), most):
            part = question.samples[start : start + most]
            fits = found and (rows + len(part)) * length <= options.batch_tokens
            if not fits or (equal and length != width):
                found.append([])
                rows, length = 0, width
            found[-1].append(Question(prompt=question.prompt, id=question.id, samples=part))
            rows += len(part)
    return found


def closed_up(alive: np.ndarray) -> np.ndarray:
    """The rows that go on, int [n]: in their places, but the last of them in those of the rows that leave.

    So that few have to be copied.
    """
    rows = np.flatnonzero(alive)
    places = np.arange(len(rows))
    places[~alive[: len(rows)]] = rows[rows >= len(rows)]
    return places


@contextmanager
def sampling_mode(model: Any) -> Iterator[None]:
    """Dropout off, and an attention that does one token at a time; both are put back."""
    was_training, attention = model.training, model.config._attn_implementation
    # Flex attention is compiled for packed rows; on a CPU ours is faster for a single query.
    on_cpu = next(model.parameters()).device.type == "cpu"
    wanted = path_attention.NAME if on_cpu else "sdpa"
    switched = attention not in (wanted, "eager")
    model.eval()
    if switched:
        path_attention.register()
        model.set_attn_implementation(wanted)
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
        if switched:
            model.set_attn_implementation(attention)


class _Batch:
    """One batch at work. A row is a sample of a question; rows that leave are gone from every tensor but the results."""

    def __init__(
        self,
        model: Any,
        family: Family,
        questions: list[Question],
        options: SamplingConfig,
        end_ids: tuple[int, ...],
        pad_id: int,
        seed: int,
    ) -> None:
        self.model, self.family, self.questions, self.options = model, family, questions, options
        self.end_ids, self.pad_id = end_ids, pad_id
        self.device, self.dtype = next(model.parameters()).device, model.dtype
        pairs = [(number, sample) for number, q in enumerate(questions) for sample in q.samples]
        self.ids = [questions[number].id for number, _ in pairs]
        self.samples = [sample for _, sample in pairs]
        self.source = torch.tensor([number for number, _ in pairs])  # question of each row
        lengths = np.array([len(questions[number].prompt) for number, _ in pairs])
        room = family.context - lengths if family.context else np.full(len(lengths), options.max_new_tokens)
        self.limit = np.clip(room, 0, options.max_new_tokens)
        self.steps = int(self.limit.max())
        self.before = int(lengths.max()) - 1  # slots of the prompts, all but their last tokens
        self.lengths = torch.from_numpy(lengths)
        self.tokens = np.full((len(pairs), self.steps), -1, np.int32)
        self.logprobs = np.zeros((len(pairs), self.steps), np.float32)
        self.count = np.zeros(len(pairs), np.int64)
        self.stopped = np.zeros(len(pairs), bool)
        self.u = None
        if options.temperature > 0:
            self.u = torch.from_numpy(uniforms(seed, self.ids, self.samples, self.steps)).to(self.device)

    def run(self, tick: Callable[[int], None] | None) -> list[Completion]:
        if self.steps:
            self._decode(self._prefill(), tick)
        if not np.isfinite(self.logprobs).all():
            raise UserError("model: what it computes is not finite; its weights are damaged, or its dtype is too small")
        return [
            Completion(
                id=self.ids[row],
                sample=self.samples[row],
                tokens=self.tokens[row, :count].copy(),
                logprobs=self.logprobs[row, :count].copy(),
                finish=STOP if self.stopped[row] else LENGTH,
            )
            for row, count in enumerate(self.count)
        ]

    def _prefill(self) -> Any:
        """A cache of all prompts but their last tokens, which the loop begins with. Samples of a prompt share this."""
        cache = self.family.cache(len(self.questions), self.before + self.steps)
        if not self.before:
            # The first token finds the cache empty; samples of a prompt are rows of their own from the start.
            return self.family.cache(len(self.source), self.steps)
        for rows in self._chunks():
            if self.family.slots:
                cache.fill(rows)
            some = self.questions[rows]
            tokens = torch.full((len(some), max(len(q.prompt) for q in some) - 1), self.pad_id, dtype=torch.long)
            for row, question in enumerate(some):
                tokens[row, : len(question.prompt) - 1] = torch.from_numpy(question.prompt[:-1].astype(np.int64))
            positions = torch.arange(tokens.shape[1], device=self.device).expand(len(tokens), -1)
            self.model(**self.family.inputs(tokens.to(self.device), positions, cache))
        if self.family.slots:
            cache.filled(self.before)
        if len(self.source) > len(self.questions):
            self.family.select(cache, self.source.to(self.device))
        return cache

    def _chunks(self) -> list[slice]:
        """Rows that go through the model together: similar lengths, so that little is padding; longest first.

        Prompts of one token have nothing to go through it.
        """
        lengths = [len(question.prompt) - 1 for question in self.questions]
        last = sum(length > 0 for length in lengths)
        if not self.family.slots:
            return [slice(0, last)]
        found, start = [], 0
        for row in range(1, last + 1):
            if row == last or (row + 1 - start) * lengths[start] > PREFILL_TOKENS:
                found.append(slice(start, row))
                start = row
        return found

    def _decode(self, cache: Any, tick: Callable[[int], None] | None) -> None:
        rows = np.arange(len(self.source))  # which rows are still here
        alive = self.limit > 0
        last = torch.tensor([int(q.prompt[-1]) for q in self.questions])[self.source]
        token = last.to(self.device)[:, None]
        position = (self.lengths - 1).to(self.device)[:, None]
        keys = self._key_positions()
        ends = torch.tensor(self.end_ids, device=self.device)
        seen = self._seen()
        mask: Any = None
        for step in range(self.steps):
            filled = self.before + step + 1
            if keys is not None and (mask is None or not self.family.same_mask):
                # With full attention alone one mask does for all steps, for a slot not yet filled is not yet a key.
                until = keys.shape[1] if self.family.same_mask else filled
                mask = self.family.mask(keys[:, :until], position + self.steps * self.family.same_mask, self.dtype)
            seeing = mask[..., :filled] if isinstance(mask, Tensor) else mask
            logits = self.model(**self.family.inputs(token, position, cache, seeing)).logits[:, -1]
            forbidden = self.end_ids if step < self.options.min_new_tokens else ()
            u = self.u[:, step] if self.u is not None else None
            drawn, logprobs = draw(logits, u, self.options, seen=seen, forbidden=forbidden)
            if seen is not None:
                seen.scatter_(1, drawn[:, None], True)
            ended = torch.isin(drawn, ends).cpu().numpy()
            alive = self._record(step, rows, alive, drawn.cpu().numpy(), logprobs.cpu().numpy(), ended, tick)
            if not alive.any():
                return
            token, position = drawn[:, None], position + 1
            if (~alive).sum() >= LEAVE * len(alive):
                kept = closed_up(alive)
                rows, alive = rows[kept], alive[kept]
                stay = torch.from_numpy(kept).to(self.device)
                self.family.select(cache, stay)
                token, position = token[stay], position[stay]
                keys, seen, self.u = (None if one is None else one[stay] for one in (keys, seen, self.u))
                mask = None

    def _record(
        self,
        step: int,
        rows: np.ndarray,
        alive: np.ndarray,
        drawn: np.ndarray,
        logprobs: np.ndarray,
        ended: np.ndarray,
        tick: Callable[[int], None] | None,
    ) -> np.ndarray:
        """Write down what was drawn for rows not yet finished; which rows then still go on."""
        here = rows[alive]
        self.tokens[here, step], self.logprobs[here, step] = drawn[alive], logprobs[alive]
        self.count[here] += 1
        self.stopped[here] = ended[alive]
        if tick is not None:
            tick(len(here))
        return alive & ~ended & (step + 1 < self.limit[rows])

    def _key_positions(self) -> Tensor | None:
        """Position of what each slot holds, [B, slots]; None where all prompts are equally long."""
        if bool((self.lengths == self.lengths[0]).all()):
            return None
        slot = torch.arange(self.before + self.steps)[None, :]
        own = self.lengths[:, None] - 1  # of the prompt, in the slots; then comes padding, then what is drawn
        drawn = own + slot - self.before
        positions = torch.where(slot < own, slot, torch.where(slot < self.before, HIDDEN, drawn))
        return positions.to(self.device)

    def _seen(self) -> Tensor | None:
        if self.options.repetition_penalty == 1:
            return None
        seen = torch.zeros(len(self.source), self.model.config.get_text_config().vocab_size, dtype=torch.bool)
        for row, number in enumerate(self.source.tolist()):
            seen[row, torch.from_numpy(self.questions[number].prompt.astype(np.int64))] = True
        return seen.to(self.device)
