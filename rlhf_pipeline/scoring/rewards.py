"""Rewards of answers by a reward model: text to trees by its own renderer, trees to micro-batches, one number an answer.

The text is rendered by nobody but the reward model, so that the answers of policies with other tokenizers get the
rewards of their words. Reading rows is `answers`' business.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rlhf_pipeline import artifact
from rlhf_pipeline.artifact import Kind
from rlhf_pipeline.config.schema import Attention, ReadyModelConfig, TokenizerConfig
from rlhf_pipeline.data.encode import shortened
from rlhf_pipeline.data.packing import PackedTrees, first_fit, pack
from rlhf_pipeline.data.prompts import Renderer, Segment
from rlhf_pipeline.data.records import BadRow
from rlhf_pipeline.data.tree import Tree
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.generation.load import content_hash, open_renderer
from rlhf_pipeline.models.load import open_reward_model
from rlhf_pipeline.models.scalar_head import TreeScorer
from rlhf_pipeline.models.tree_model import BLOCK_MULTIPLE, TreeBatch
from rlhf_pipeline.scoring.answers import Answered

TOKENISED = 512  # rows that are tokenised together
DENSE_ROW = 512  # tokens of a row under a dense mask, whose cost is the square of it
Tick = Callable[[int, int], None]  # told after each micro-batch: answers and tokens in it


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardModel:
    """An opened reward model. Its normalised reward is (raw - shift) / scale."""

    scorer: TreeScorer
    renderer: Renderer
    shift: float
    scale: float
    context: int | None  # tokens that it was built for; None where that is not bounded
    device: torch.device
    identity: str  # of its weights, by content


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """A row as a tree, or why it is none."""

    tree: Tree | None = None
    why: str = ""
    prompt_cut: bool = False  # the prompt has lost its beginning


def open_scorer(model: ReadyModelConfig, tokenizer: TokenizerConfig, device: str) -> RewardModel:
    """Open an artifact of `rlhf rm`, or a sequence classifier of transformers with one label (shift 0, scale 1).

    Raises:
        UserError: for anything else, saying what it is; for another tokenizer or template than an artifact's own.
    """
    assert model.path is not None, "the config check lets no such config pass"
    # Checked before its tokenizer is opened, which says of a file that is missing or damaged whatever it comes across.
    manifest = artifact.load(model.path, kind=Kind.reward_model) if artifact.is_artifact(model.path) else None
    renderer = open_renderer(model, tokenizer)
    shift, scale = 0.0, 1.0
    if manifest is not None:
        trained_with = (manifest.tokenizer_hash, manifest.template_hash)
        if (tokenizer.path or tokenizer.template) and trained_with != (renderer.tokenizer_hash, renderer.template_hash):
            raise UserError(
                f"tokenizer: model.path={model.path} was trained with another tokenizer or chat template, and its rewards "
                "mean nothing with this one; leave out tokenizer.path and tokenizer.template"
            )
        shift = 0.0 if manifest.reward_shift is None else manifest.reward_shift
        scale = 1.0 if manifest.reward_scale is None else manifest.reward_scale
        identity = manifest.content_hash
    else:
        identity = content_hash(model)
    place = torch.device(device)
    scorer = open_reward_model(model, renderer.tokenizer, place)
    return RewardModel(
        scorer=scorer,
        renderer=renderer,
        shift=shift,
        scale=scale,
        context=getattr(scorer.inner.config.get_text_config(), "max_position_embeddings", None),
        device=place,
        identity=identity,
    )


def rewards(
    model: RewardModel,
    rows: Sequence[Answered],
    *,
    max_length: int,
    batch_tokens: int,
    normalised: bool = True,
    tick: Tick | None = None,
) -> list[np.ndarray]:
    """The reward of every answer, float64 [K] a row, in the rows' order.

    Raises:
        UserError: naming the answers that cannot be scored.
    """
    made = trees(model, rows, max_length=max_length)
    return score(model, made, batch_tokens=batch_tokens, normalised=normalised, tick=tick)


def trees(model: RewardModel, rows: Sequence[Answered], *, max_length: int) -> list[Tree]:
    """A tree a row, by the reward model's own tokenizer and template; `index` is the row's.

    Raises:
        UserError: naming the first row that has none, see `encode`.
    """
    made = []
    for row, one in zip(rows, encode(model, rows, max_length=max_length), strict=True):
        if one.tree is None:
            raise UserError(f"{row.origin}: {one.why}")
        made.append(one.tree)
    return made


def encode(model: RewardModel, rows: Sequence[Answered], *, max_length: int) -> list[Encoded]:
    """`trees`, with the reason where there is none.

    A prompt and any one answer have at most `max_length` tokens, and not more than the model's context. A longer prompt
    loses its beginning, for all of its answers alike. An empty answer is its end token alone; one that was cut off has none.
    """
    limit = max_length if model.context is None else min(max_length, model.context)
    return encode_rows(model.renderer, rows, limit=limit)


def encode_rows(renderer: Renderer, rows: Sequence[Answered], *, limit: int) -> list[Encoded]:
    """`encode` for any model that reads tokens of `renderer`, at most `limit` of them."""
    return [
        one
        for start in range(0, len(rows), TOKENISED)
        for one in _encoded(renderer, rows[start : start + TOKENISED], limit)
    ]


def score(
    model: RewardModel,
    made: Sequence[Tree],
    *,
    batch_tokens: int,
    normalised: bool = True,
    must_be_finite: bool = True,
    tick: Tick | None = None,
) -> list[np.ndarray]:
    """The reward of every response, float64 [K] a tree, in the trees' order. What a micro-batch holds beside a tree does
    not matter, but for rounding.

    Raises:
        UserError: when the model gives one that is not finite, and it must be.
    """
    shift, scale = (model.shift, model.scale) if normalised else (0.0, 1.0)
    found: list[np.ndarray] = [np.zeros(0)] * len(made)
    for order, packed in micro_batches(made, batch_tokens=batch_tokens, attention=model.scorer.attention):
        with torch.no_grad():
            raw = model.scorer(TreeBatch.of(packed, model.device)).double().cpu().numpy()
        if must_be_finite and not np.isfinite(raw).all():
            raise UserError("the reward model gives rewards that are not finite; its weights are damaged or overflow")
        ends = np.cumsum([len(made[i].responses) for i in order])
        for i, mine in zip(order, np.split((raw - shift) / scale, ends[:-1]), strict=True):
            found[i] = mine
        if tick is not None:
            tick(len(raw), packed.num_tokens)
    return found


def micro_batches(
    made: Sequence[Tree], *, batch_tokens: int, attention: Attention
) -> Iterator[tuple[list[int], PackedTrees]]:
    """The trees by length, the longest first, in micro-batches of at most `batch_tokens`; a longer tree has its own.

    Each with the trees' numbers in the order of its responses.
    """
    batch: list[int] = []
    tokens = 0
    for i in sorted(range(len(made)), key=lambda i: (-len(made[i]), i)):
        if batch and tokens + len(made[i]) > batch_tokens:
            yield _packed(made, batch, attention)
            batch, tokens = [], 0
        batch.append(i)
        tokens += len(made[i])
    if batch:
        yield _packed(made, batch, attention)


def _packed(made: Sequence[Tree], batch: Sequence[int], attention: Attention) -> tuple[list[int], PackedTrees]:
    """One row, or several under a dense mask."""
    lengths = [len(made[i]) for i in batch]
    width = max(DENSE_ROW, lengths[0]) if attention is Attention.dense else sum(lengths)
    rows = [[batch[place] for place in row] for row in first_fit(lengths, width)]
    multiple = BLOCK_MULTIPLE if attention is Attention.block else 1
    return [i for row in rows for i in row], pack([[made[i] for i in row] for row in rows], width_multiple=multiple)


# Text to trees


def _encoded(renderer: Renderer, rows: Sequence[Answered], limit: int) -> list[Encoded]:
    texts: list[tuple[list[Segment], list[list[Segment]]] | str] = []
    for row in rows:
        try:
            texts.append(rendered(renderer, row))
        except BadRow as error:
            texts.append(str(error))
        except UserError as error:
            raise UserError(f"{row.origin}: {error}") from error
    parts = [part for one in texts if not isinstance(one, str) for part in (one[0], *one[1])]
    tokens = iter(renderer.tokenize([segment for part in parts for segment in part]))
    found = []
    for row, one in zip(rows, texts, strict=True):
        if isinstance(one, str):
            found.append(Encoded(why=one))
            continue
        prompt, _ = _joined(one[0], tokens)
        answers = [_joined(segments, tokens) for segments in one[1]]
        try:
            found.append(_fitted(renderer, row, prompt, answers, limit))
        except BadRow as error:
            found.append(Encoded(why=str(error)))
    return found


def rendered(renderer: Renderer, row: Answered) -> tuple[list[Segment], list[list[Segment]]]:
    """Segments of the prompt and of each answer; none of an empty answer.

    Raises:
        BadRow: for what cannot be rendered, an empty answer that was cut off among it.
        UserError: for an unfit template.
    """
    spoken = [response for response in row.responses if response.strip()]
    prompt, branches = renderer.branches(row.prompt, spoken)
    supply = iter(branches)
    end = str(renderer.tokenizer.convert_ids_to_tokens(renderer.end_ids[0]))
    answers = []
    for number, (response, finished) in enumerate(zip(row.responses, row.finished, strict=True), start=1):
        segments = next(supply) if response.strip() else []
        if not finished:
            segments = _cut_off(segments, end)
            if not segments:
                raise BadRow("an answer without a word and without an end", f"number {number}")
        answers.append(segments)
    return prompt, answers


def _cut_off(segments: list[Segment], end: str) -> list[Segment]:
    """An answer without what the template adds after its words: the end token and white space before it."""
    if not segments:
        return []
    *before, last = segments
    return [*before, dataclasses.replace(last, text=last.text.removesuffix(end).rstrip())]


def _joined(segments: Sequence[Segment], tokens: Iterator[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int32 [L] of these segments, which come next in `tokens`, and which are targets, bool [L]."""
    parts = [next(tokens) for _ in segments]
    scored = [np.full(len(ids), segment.scored) for ids, segment in zip(parts, segments, strict=True)]
    return np.concatenate([np.zeros(0, np.int32), *parts]), np.concatenate([np.zeros(0, bool), *scored])


def _fitted(
    renderer: Renderer, row: Answered, prompt: np.ndarray, answers: list[tuple[np.ndarray, np.ndarray]], limit: int
) -> Encoded:
    """The row's tree. BadRow for an answer that leaves no room for its prompt."""
    silence = (np.asarray(renderer.end_ids[:1], np.int32), np.ones(1, bool))
    answers = [answer if len(answer[0]) else silence for answer in answers]
    longest = max(range(len(answers)), key=lambda k: len(answers[k][0]))
    room = limit - len(answers[longest][0])
    if room < 1:
        raise BadRow(
            "an answer is too long",
            f"number {longest + 1} has {len(answers[longest][0])} tokens, and with at least one of the prompt there is "
            f"room for {limit - 1} (data.max_length, and the model's context)",
        )
    is_long = len(prompt) > room
    tree = Tree(
        prompt=shortened(prompt, room, "keep_end", renderer.tokenizer.bos_token_id) if is_long else prompt,
        responses=tuple(ids for ids, _ in answers),
        scored=tuple(scored for _, scored in answers),
        index=row.index,
        ranks=None if row.ranks is None else np.asarray(row.ranks, np.int32),  # type: ignore[arg-type]
        scores=None if row.scores is None else np.asarray(row.scores, np.float32),  # type: ignore[arg-type]
    )
    return Encoded(tree=tree, prompt_cut=is_long)
