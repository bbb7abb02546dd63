"""What is in a data set, by arrays over all of it: lengths and hashes; what occurs twice; what two sets share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rlhf_pipeline.data.store import TreeDataset

SHOWN = 5  # examples that are named


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """N trees with R responses in all. Hashes are equal for equal tokens (and, by chance of 2**-64, for others)."""

    prompt_length: np.ndarray  # int64 [N]
    num_responses: np.ndarray  # int64 [N]
    tree_hash: np.ndarray  # uint64 [N]; of the prompt and the responses in their order
    tree: np.ndarray  # int64 [R]; which of the N trees
    response_length: np.ndarray  # int64 [R]
    response_hash: np.ndarray  # uint64 [R]
    rank: np.ndarray  # int32 [R]


def read_contents(data: TreeDataset) -> Contents:
    """One pass over all tokens of a data set."""
    total = sum(map(len, data.blocks))
    place = np.full(total, -1)
    place[data.rows] = np.arange(len(data))
    found: dict[str, list[np.ndarray]] = {name: [] for name in Contents.__slots__}
    first = 0
    for block in data.blocks:
        num_responses = np.diff(block.tree_at)
        tree = np.repeat(np.arange(len(block)), num_responses)
        response_hash = _hashes(block.responses, block.response_at)
        tree_hash = _hashes(block.prompt, block.prompt_at)
        number = np.arange(len(tree)) - np.repeat(block.tree_at[:-1], num_responses)
        np.add.at(tree_hash, tree, mix(response_hash ^ mix(number.astype(np.uint64))))
        here = place[first : first + len(block)]
        taken, taken_response = here >= 0, here[tree] >= 0
        found["prompt_length"].append(np.diff(block.prompt_at)[taken])
        found["num_responses"].append(num_responses[taken])
        found["tree_hash"].append(tree_hash[taken])
        found["tree"].append(here[tree][taken_response])
        found["response_length"].append(np.diff(block.response_at)[taken_response])
        found["response_hash"].append(response_hash[taken_response])
        found["rank"].append(block.ranks[taken_response])
        first += len(block)
    joined = {name: np.concatenate(parts) for name, parts in found.items()}
    # The trees in the order of the data set, which need not be that of the file.
    order = place[place >= 0]
    for name in ("prompt_length", "num_responses", "tree_hash"):
        sorted_ = np.empty_like(joined[name])
        sorted_[order] = joined[name]
        joined[name] = sorted_
    return Contents(**joined)


@dataclass(frozen=True, slots=True, kw_only=True)
class Duplicates:
    """Examples that occur earlier in the same set, and the first few as (example, the earlier one)."""

    examples: int  # the same prompt and responses
    prompts: int  # the same prompt, whatever the responses
    responses: int  # within one ranking
    first: tuple[tuple[str, str], ...]


def duplicates(data: TreeDataset, contents: Contents) -> Duplicates:
    """What a data set holds more than once."""
    _, earliest, which = np.unique(contents.tree_hash, return_index=True, return_inverse=True)
    again = np.flatnonzero(earliest[which] != np.arange(len(data)))
    within = np.unique(contents.response_hash ^ mix(contents.tree.astype(np.uint64)))
    return Duplicates(
        examples=len(again),
        prompts=len(data) - len(np.unique(data.groups)),
        responses=len(contents.tree) - len(within),
        first=tuple((data.origin(i), data.origin(earliest[which[i]])) for i in again[:SHOWN].tolist()),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """Held-out examples that training has seen, and the first few as (held out, in the training set)."""

    size: int  # of the held-out set
    prompts: int  # examples whose prompt occurs in the training set
    examples: int | None  # prompt and responses; None where it was not looked for
    first: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        shown = "".join(f"\n  {held_out} = {trained}" for held_out, trained in self.first)
        more = "\n  ..." if self.prompts > len(self.first) else ""
        return f"the prompts of {self.prompts} of its {self.size} examples are in data.train as well{shown}{more}"


def overlap(train: TreeDataset, heldout: TreeDataset, contents: tuple[Contents, Contents] | None = None) -> Overlap:
    """Which held-out examples share their prompt with the training set; with the `contents` of both, also all else."""
    groups, earliest = np.unique(train.groups, return_index=True)
    shared = np.flatnonzero(np.isin(heldout.groups, groups))
    where = earliest[np.searchsorted(groups, heldout.groups[shared[:SHOWN]])]
    exact = None
    if contents is not None:
        exact = int(np.isin(contents[1].tree_hash, contents[0].tree_hash).sum())
    return Overlap(
        size=len(heldout),
        prompts=len(shared),
        examples=exact,
        first=tuple(
            (heldout.origin(i), train.origin(j)) for i, j in zip(shared[:SHOWN].tolist(), where.tolist(), strict=True)
        ),
    )


def mix(value: np.ndarray) -> np.ndarray:
    """SplitMix64 (Steele et al. 2014, figure 16): each bit of the input, uint64, changes about half of the output."""
    with np.errstate(over="ignore"):
        value = value + np.uint64(0x9E3779B97F4A7C15)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _hashes(tokens: np.ndarray, at: np.ndarray) -> np.ndarray:
    """A hash, uint64, of each run of tokens `at[i]:at[i + 1]`, none of them empty: a sum over (token, place) pairs."""
    if len(at) < 2:
        return np.zeros(0, np.uint64)
    place = np.arange(len(tokens)) - np.repeat(at[:-1], np.diff(at))
    return np.add.reduceat(mix(tokens.astype(np.uint64) | (place.astype(np.uint64) << np.uint64(32))), at[:-1])
