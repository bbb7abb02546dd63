"""Rollouts: answers to an iteration's prompts, and the numbers of each of their tokens.

Every process samples, or re-evaluates, a share, and gets everybody's: whatever is computed of an iteration afterwards is
a plain function of the same tensors on every rank. An answer depends on (seed, visit of the prompt, sample, position)
alone. Scores, shaping and updates are elsewhere.

Shapes: P prompts, K samples of each, R = P * K responses (response k of prompt p is row p * K + k), L tokens of the
longest response, N scored tokens of a micro-batch.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_pipeline import runtime
from rlhf_pipeline.config.ppo import RolloutConfig
from rlhf_pipeline.config.schema import SamplingConfig
from rlhf_pipeline.data.loader import Layout, micro_batches
from rlhf_pipeline.data.packing import PackedTrees
from rlhf_pipeline.data.prompts import Renderer
from rlhf_pipeline.data.tree import Tree
from rlhf_pipeline.engine import Engine
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.generation.decode import STOP, Completion, Question, completions
from rlhf_pipeline.generation.prompts import Asked
from rlhf_pipeline.machine import free_memory_bytes
from rlhf_pipeline.models import path_attention
from rlhf_pipeline.models.lora import adapt_alike
from rlhf_pipeline.models.tree_model import TreeBatch, TreeModel
from rlhf_pipeline.scoring.episodes import Episode

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """An iteration's answers; every rank has the same ones. Tensors are on the CPU and padded on the right."""

    asked: list[Asked]  # [P]
    trees: list[Tree]  # [P]; all response tokens scored, `index` is the number of the prompt's visit
    texts: list[str]  # [R], without the end token
    finished: Tensor  # bool [R]; came to an end token, which is then its last
    sampled: Tensor  # fp32 [R, L], log-probabilities as they were drawn
    mask: Tensor  # bool [R, L]

    @property
    def samples(self) -> int:
        """K."""
        return len(self.texts) // len(self.asked)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each response with its end token, int64 [R]."""
        return self.mask.sum(1)

    @property
    def num_tokens(self) -> int:
        """Tokens of all responses."""
        return int(self.mask.sum())


class TreeList:
    """Trees in memory as a data set, see `data.loader.Trees`. `origins`: where each comes from, file:line."""

    def __init__(self, trees: Sequence[Tree], origins: Sequence[str] = ()) -> None:
        self.trees, self.origins = trees, origins
        self.lengths = np.array([len(tree) for tree in trees], np.int64)

    def __len__(self) -> int:
        return len(self.trees)

    def __getitem__(self, index: int) -> Tree:
        return self.trees[index]

    def origin(self, index: int) -> str:
        return self.origins[index] if self.origins else f"tree {self.trees[index].index}"


def roll_out(
    model: Any, asked: Sequence[Asked], options: RolloutConfig, *, renderer: Renderer, seed: int, first: int
) -> Rollout:
    """Draw `options.samples` answers to each prompt. Called by every rank, and the same on any number of them.

    Args:
        model: of `sampling_model`.
        first: how many prompts the run has asked before, so that the answers to one that comes again are others.

    Raises:
        UserError: on every rank, when what the model computes is not finite.
    """
    visits = range(first, first + len(asked))
    found = {(one.id - first, one.sample): one for one in _drawn(model, asked, options, renderer, seed, visits)}
    drawn = [[found[place, sample] for sample in range(options.samples)] for place in range(len(asked))]
    every = [one for row in drawn for one in row]
    mask = torch.zeros(len(every), max(len(one.tokens) for one in every), dtype=torch.bool)
    sampled = torch.zeros(mask.shape)
    for row, one in enumerate(every):
        mask[row, : len(one.tokens)] = True
        sampled[row, : len(one.tokens)] = torch.from_numpy(one.logprobs)
    texts = [str(renderer.tokenizer.decode(one.text_tokens, skip_special_tokens=True)).strip() for one in every]
    return Rollout(
        asked=list(asked),
        trees=[
            Tree(
                prompt=prompt.tokens,
                responses=tuple(one.tokens for one in row),
                scored=tuple(np.ones(len(one.tokens), bool) for one in row),
                index=visit,
            )
            for visit, prompt, row in zip(visits, asked, drawn, strict=True)
        ],
        texts=texts,
        finished=torch.tensor([one.finish == STOP for one in every]),
        sampled=sampled,
        mask=mask,
    )


def episodes(rollout: Rollout) -> list[Episode]:
    """The responses as scorers take them, [R]."""
    return [
        Episode(
            prompt=asked.messages,
            response=rollout.texts[row],
            finished=bool(rollout.finished[row]),
            columns=asked.columns,
            origin=asked.origin,
        )
        for row in range(len(rollout.texts))
        for asked in (rollout.asked[row // rollout.samples],)
    ]


def _drawn(
    model: Any, asked: Sequence[Asked], options: RolloutConfig, renderer: Renderer, seed: int, visits: range
) -> list[Completion]:
    """Everybody's answers, in no order."""
    share = shares([len(one.tokens) for one in asked], runtime.world_size())[runtime.rank()]
    samples = tuple(range(options.samples))
    questions = [Question(prompt=asked[place].tokens, id=visits[place], samples=samples) for place in share]
    plain = SamplingConfig(
        temperature=options.temperature,
        max_new_tokens=options.max_new_tokens,
        samples=options.samples,
        batch_tokens=options.batch_tokens,
    )
    own: Any
    with runtime.at_own_pace():
        try:
            batches = completions(model, questions, plain, end_ids=renderer.end_ids, pad_id=renderer.eos_id, seed=seed)
            own = [one for batch in batches for one in batch]
        except UserError as error:  # all processes must come to the gathering, and all of them end
            own = error
    parts = _gathered(own)
    for part in parts:
        if isinstance(part, UserError):
            raise part
    return [one for part in parts for one in part]


def _gathered(own: Any) -> list[Any]:
    if runtime.world_size() == 1:
        return [own]
    import torch.distributed as dist

    parts: list[Any] = [None] * runtime.world_size()
    dist.all_gather_object(parts, own)
    return parts


def shares(lengths: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Prompts of like length together on each rank, and about as much work: dealt to and fro, the longest first."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    dealt: list[list[int]] = [[] for _ in range(num_ranks)]
    for place, i in enumerate(order):
        turn, rank = divmod(place, num_ranks)
        dealt[rank if turn % 2 == 0 else num_ranks - 1 - rank].append(i)
    return dealt


@contextmanager
def sampling_model(engine: Engine, policy: TreeModel, options: RolloutConfig) -> Iterator[Any]:
    """The transformers model to draw answers from. Called by every rank.

    At ZeRO 0 to 2 it is the policy's own. At stage 3 it is a copy with all weights, put together once; it is gone
    afterwards. To put every layer together anew for each token would be slow, and would hang where ranks need unequally
    many tokens.

    Raises:
        UserError: on every rank, when there is no room for the copy on one.
    """
    if engine.zero_stage < 3:
        yield policy.inner
        return
    _check_room(policy, options, engine.device)
    yield _whole_copy(engine, policy.inner)


def _check_room(policy: TreeModel, options: RolloutConfig, device: torch.device) -> None:
    weights = policy.num_parameters * policy.inner.dtype.itemsize
    cache = _cache_bytes(policy.inner, options.batch_tokens)
    free = free_memory_bytes(device)
    least = -runtime.max_over_ranks({"free": -float("inf") if free is None else -float(free)})["free"]
    if least < weights + cache:
        raise UserError(
            f"engine.zero_stage=3: rollouts need the whole policy on every process, {weights / GIB:.2f} GiB, and "
            f"{cache / GIB:.2f} GiB for keys and values of rollout.batch_tokens={options.batch_tokens}; there are "
            f"{least / GIB:.2f} GiB free. Lower rollout.batch_tokens, use engine.zero_stage=2 or less processes on a "
            "machine, offload the optimiser, or take more memory"
        )


def _cache_bytes(inner: Any, tokens: int) -> int:
    """Keys and values of `tokens`."""
    config = inner.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * width * tokens * inner.dtype.itemsize)


@torch.no_grad()
def _whole_copy(engine: Engine, inner: Any) -> Any:
    """`inner`, adapters too, with whole weights on this rank's device; put together parameter by parameter."""
    attention = inner.config._attn_implementation
    packed_only = attention in (path_attention.NAME, "flex_attention")
    gpus = [engine.device] if engine.device.type == "cuda" else []
    # Made with random weights, which nobody sees; the random state stays as it was.
    with torch.random.fork_rng(devices=gpus), engine.device:
        whole = type(inner)._from_config(
            copy.deepcopy(inner.config),
            dtype=inner.dtype,
            attn_implementation="sdpa" if packed_only else attention,
        )
        adapt_alike(whole, inner)
    parameters, buffers = dict(whole.named_parameters()), dict(whole.named_buffers())
    for name, parameter in inner.named_parameters():
        with engine.whole([parameter]):
            parameters.pop(name).copy_(parameter)
    for name, buffer in inner.named_buffers():
        buffers[name].copy_(buffer)
    assert not parameters, sorted(parameters)
    return whole.to(engine.device)


def per_token(forward: Callable[[TreeBatch], Any], trees: Sequence[Tree], layout: Layout, device: torch.device) -> Any:
    """What `forward` gives for every response token, fp32 [R, L] on the CPU, 0 where none is scored. Called by every rank.

    Each rank makes equally many forward passes, over its share of the micro-batches. `forward` gives a tensor [N], or a
    tuple of several; then so does this.
    """
    first = np.cumsum([0, *(len(tree.responses) for tree in trees)])
    width = max(len(response) for tree in trees for response in tree.responses)
    place_of = {tree.index: place for place, tree in enumerate(trees)}
    assert len(place_of) == len(trees), "an index comes twice"
    found: list[tuple[Tensor, ...]] = []
    places: list[np.ndarray] = []
    several = False
    with torch.no_grad():
        for packed in micro_batches([TreeList(trees)], [(0, i) for i in range(len(trees))], layout):
            output = forward(TreeBatch.of(packed, device))
            several = isinstance(output, tuple)
            found.append(output if several else (output,))
            places.append(_places(packed, trees, place_of, first, width))
    where = np.concatenate(places)
    padded = np.zeros((len(found[0]), int(first[-1]) * width))
    for values, parts in zip(padded, zip(*found, strict=True), strict=True):
        values[where] = torch.cat(parts).double().cpu().numpy()
    whole = torch.from_numpy(runtime.sum_array_over_ranks(padded)).float().view(len(padded), -1, width)
    return tuple(whole) if several else whole[0]


def _places(
    packed: PackedTrees, trees: Sequence[Tree], place_of: Mapping[int, int], first: np.ndarray, width: int
) -> np.ndarray:
    """Where each scored token of a micro-batch is in the flat [R, L], int64 [N]."""
    found = [np.zeros(0, np.int64)]
    before, branch = -1, 0
    for index, number in zip(packed.index.tolist(), packed.prompt.tolist(), strict=True):
        branch = branch + 1 if number == before else 0
        before = number
        place = place_of[index]
        found.append((first[place] + branch) * width + np.flatnonzero(trees[place].scored[branch]))
    return np.concatenate(found)


def with_numbers(trees: Sequence[Tree], mask: Tensor, numbers: Mapping[str, Tensor]) -> list[Tree]:
    """The trees with numbers [R, L] for their response tokens; those under `mask`, bool [R, L], are scored."""
    arrays = {name: values.float().numpy() for name, values in numbers.items()}
    scored = mask.numpy()
    found, row = [], 0
    for tree in trees:
        spans = [(row + k, len(response)) for k, response in enumerate(tree.responses)]
        found.append(
            dataclasses.replace(
                tree,
                scored=tuple(scored[r, :length] for r, length in spans),
                numbers={name: tuple(values[r, :length] for r, length in spans) for name, values in arrays.items()},
            )
        )
        row += len(spans)
    return found
