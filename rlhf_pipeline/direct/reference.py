"""The reference's log-probabilities of a data set: computed once, kept on disk, read back as a memory map; KTO's partners.

A file is named by the examples, the reference, its dtype and its temperature, and holds float32 for every response
token of data[0], data[1] and so on. How its examples were packed and split over processes when it was made is not in
its name: that moves the last bits only. Live ones are made by `models.reference`.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from rlhf_pipeline import runtime
from rlhf_pipeline.config.schema import Quantise
from rlhf_pipeline.config.stages import DpoConfig
from rlhf_pipeline.data.loader import Layout, Trees, micro_batches
from rlhf_pipeline.data.packing import PackedTrees
from rlhf_pipeline.data.store import NO_NUMBERS, Numbers, TreeDataset
from rlhf_pipeline.data.tree import Tree
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.files import disk_errors, sha256, sync
from rlhf_pipeline.generation.load import content_hash
from rlhf_pipeline.models.reference import Reference, reference_model
from rlhf_pipeline.models.tree_model import TreeBatch

NAME = "reference"  # of the numbers
VERSION = 1  # of how they are computed and stored: a file of another one is made again
MICRO_BATCHES_AT_ONCE = 32  # of each rank, between two gatherings: little padding, and little memory
_PARTNERS = 1  # keeps the order of partners apart from others that are drawn from the same seed

Progress = Callable[[int, int], None]  # told how many examples are done, and of how many


class Numbered(Trees, Protocol):
    """Trees that can be given numbers."""

    fingerprint: str  # of their content and order

    @property
    def response_tokens(self) -> np.ndarray: ...  # int64 [size], tokens of all responses of each tree

    def with_numbers(self, name: str, flat: np.ndarray) -> Any: ...


Data = TypeVar("Data", bound=Numbered)


def identity_of(config: DpoConfig) -> dict[str, Any]:
    """What the reference's log-probabilities depend on beside the data.

    Raises:
        UserError: for a damaged artifact, or one that is no policy.
    """
    adapters = config.lora if config.reference.path is None else None  # with these it is what they lie on
    return {
        "model": content_hash(reference_model(config)),
        "dtype": config.model.dtype.value,
        "quantise": (adapters.quantise if adapters is not None else Quantise.none).value,
        "temperature": 1.0,
    }


def referenced(
    data: Data,
    reference: Callable[[], Reference],
    *,
    layout: Layout,
    identity: dict[str, Any],
    cache_dir: Path,
    say: Callable[[str], Any],
    progress: Progress | None = None,
) -> Data:
    """The same trees with `numbers["reference"]`, from `cache_dir` if they are there, else computed now and put there.

    Called by every rank; the first one writes, and all of them map the same file, so `cache_dir` is on a disk that all
    of them see. A response token that is not scored has 0. The first rank alone says something, and tells of progress.

    Args:
        reference: opens it. Called only when something is to be computed, and then by every rank.
        identity: see `identity_of`.

    Raises:
        UserError: on every rank: for a log-probability that is not finite, naming the example, and for a full disk.
    """
    told = {"data": data.fingerprint, "reference": identity}
    key = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:24]
    file = cache_dir / "reference" / f"{key}.npy"
    facts = {**told, "version": VERSION, "examples": len(data), "numbers": int(data.response_tokens.sum())}
    problem = runtime.broadcast(_problem(file, facts) if runtime.is_main() else "")
    if problem:
        if runtime.is_main():
            why = "" if problem == _MISSING else f" again, for {problem}"
            say(f"computing the reference's log-probabilities of {len(data):,} examples{why}: {file}")
        _compute(file, facts, data, reference(), layout, progress if runtime.is_main() else None)
    elif runtime.is_main():
        say(f"the reference's log-probabilities of {len(data):,} examples: {file}")
    found: Data = data.with_numbers(NAME, np.load(file, mmap_mode="r"))
    return found


def _compute(
    file: Path,
    facts: dict[str, Any],
    data: Numbered,
    reference: Reference,
    layout: Layout,
    progress: Progress | None,
) -> None:
    tokens = MICRO_BATCHES_AT_ONCE * layout.num_ranks * layout.micro_rows * layout.row_length
    with _written(file, facts) as append, reference.ready() as forward:
        for examples in _chunks(data.lengths, tokens):
            append(_of_examples(data, examples, forward, layout, reference.device))
            if progress is not None:
                progress(examples.stop, len(data))


def _chunks(lengths: np.ndarray, tokens: int) -> Iterator[range]:
    """Examples that follow each other, of at most so many tokens together; a longer one is alone."""
    ends = np.cumsum(lengths)
    first = 0
    while first < len(lengths):
        before = ends[first] - lengths[first]
        end = max(first + 1, int(np.searchsorted(ends, before + tokens, side="right")))
        yield range(first, end)
        first = end


def _of_examples(
    data: Numbered, examples: range, forward: Callable[[TreeBatch], Any], layout: Layout, device: Any
) -> np.ndarray:
    """Of every response token of some examples, one after the other: float32, the same on every rank."""
    sizes = data.response_tokens[examples.start : examples.stop]
    ends = np.cumsum(sizes)
    starts = ends - sizes
    found = np.zeros(int(ends[-1]))
    # Every rank has equally many micro-batches: a partitioned model is put together by all of them.
    for packed in micro_batches([data], [(0, i) for i in examples], layout):
        places = [np.zeros(0, np.int64)]
        for i in _packed_examples(packed):  # their scored tokens lie in the order of the packed ones
            places.append(starts[i - examples.start] + np.flatnonzero(np.concatenate(data[i].scored)))
        found[np.concatenate(places)] = forward(TreeBatch.of(packed, device)).double().cpu().numpy()
    found = runtime.sum_array_over_ranks(found)
    bad = np.flatnonzero(~np.isfinite(found))
    if len(bad):
        i = examples.start + int(np.searchsorted(ends, bad[0], side="right"))
        raise UserError(
            f"{data.origin(i)}: the reference gives it a log-probability that is not finite ({found[bad[0]]}); is the "
            "model that it starts from damaged, or another dtype needed (model.dtype=float32)?"
        )
    return found.astype(np.float32)


def _packed_examples(packed: PackedTrees) -> list[int]:
    first_responses = np.flatnonzero(np.diff(packed.prompt, prepend=-1))
    indices: list[int] = packed.index[first_responses].tolist()
    return indices


# On disk: the numbers as .npy, and beside it, written last, a .json of what they are and their checksum

_MISSING = "missing"


def _problem(file: Path, facts: dict[str, Any]) -> str:
    """Why the numbers must be computed; empty where they need not be."""
    sidecar = file.with_suffix(".json")
    if not sidecar.exists() and not file.exists():
        return _MISSING
    try:
        told = json.loads(sidecar.read_text(encoding="utf-8"))
        checksum = told.pop("sha256")
        if told.get("version") != VERSION:
            return f"the file is of version {told.get('version')}, and this is version {VERSION}"
        if told != facts:
            other = [name for name in facts if told.get(name) != facts[name]] or sorted(told.keys() - facts.keys())
            return f"{sidecar.name} beside it does not fit ({', '.join(other)})"
        if sha256(file) != checksum:
            return "the file is damaged (its checksum differs)"
        shape = np.load(file, mmap_mode="r").shape
        return "" if shape == (facts["numbers"],) else f"the file holds an array of shape {shape}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        return f"the file cannot be read ({error})"


@contextmanager
def _written(file: Path, facts: dict[str, Any]) -> Iterator[Callable[[np.ndarray], None]]:
    """Within it, what appends numbers; at its end they have their name. What is killed before leaves nothing that is read.

    Called by every rank, and so is what appends; the first one writes.

    Raises:
        UserError: on every rank, for a disk that is full or cannot be written to.
    """
    # Under names of its own: runs that make the same file do not meet, and the last to finish wins.
    unfinished = file.with_name(f"{file.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    described = unfinished.with_suffix(".json.tmp")

    def begin() -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as sink:
            header = {"descr": "<f4", "fortran_order": False, "shape": (facts["numbers"],)}
            np.lib.format.write_array_header_1_0(sink, header)

    def append(values: np.ndarray) -> None:
        with unfinished.open("ab") as sink:
            sink.write(values.astype("<f4").tobytes())

    def publish() -> None:
        sync(unfinished)
        described.write_text(json.dumps({**facts, "sha256": sha256(unfinished)}, indent=2, sort_keys=True) + "\n")
        sync(described)
        unfinished.replace(file)
        described.replace(file.with_suffix(".json"))
        sync(file.parent)

    try:
        _by_main(file, begin)
        yield lambda values: _by_main(file, lambda: append(values))
        _by_main(file, publish)
    finally:
        unfinished.unlink(missing_ok=True)
        described.unlink(missing_ok=True)


def _by_main(file: Path, write: Callable[[], None]) -> None:
    with runtime.main_first():
        if runtime.is_main():
            with disk_errors("the reference's log-probabilities", file, kept="Nothing else was touched."):
                write()


# Responses to other prompts, for KTO


class Partners:
    """Each prompt of a data set with the first response of another example, its `partner`, as data; see `loader.Trees`.

    All tokens of a response are scored. It is cut where prompt and response would be longer than `max_length`.
    """

    def __init__(
        self,
        data: TreeDataset,
        partner: np.ndarray,
        *,
        max_length: int | None,
        numbers: Mapping[str, Numbers] = NO_NUMBERS,
    ) -> None:
        self.data, self.partner, self.max_length, self.numbers = data, partner, max_length, numbers
        prompts = data.lengths - data.response_tokens
        firsts = [np.diff(block.response_at)[block.tree_at[:-1]] for block in data.blocks]
        self.response_tokens = np.concatenate(firsts).astype(np.int64)[data.rows][partner]
        if max_length is not None:
            assert int(prompts.max()) < max_length, "a prompt leaves no room for a response"
            self.response_tokens = np.minimum(self.response_tokens, max_length - prompts)
        self.lengths = prompts + self.response_tokens
        digest = hashlib.sha256(f"partners {data.fingerprint} {max_length}".encode() + partner.tobytes())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.partner)

    def __getitem__(self, index: int) -> Tree:
        response = self.data[int(self.partner[index])].responses[0][: self.response_tokens[index]]
        return Tree(
            prompt=self.data[index].prompt,
            responses=(response,),
            scored=(np.ones(len(response), bool),),
            index=int(index),
            numbers={name: one.split(index, (len(response),)) for name, one in self.numbers.items()},
        )

    def origin(self, index: int) -> str:
        """Where the prompt comes from, as "file:line"."""
        return self.data.origin(index)

    def with_numbers(self, name: str, flat: np.ndarray) -> Partners:
        """The same examples, whose trees have `numbers[name]`: see `TreeDataset.with_numbers`."""
        numbers = {**self.numbers, name: Numbers.of(flat, self.response_tokens)}
        return Partners(self.data, self.partner, max_length=self.max_length, numbers=numbers)


def partners(data: TreeDataset, *, seed: int, max_length: int | None) -> Partners:
    """The prompt of each example with the response of another one: a permutation of the seed, without fixed points.

    It estimates KTO's reference point, E KL(policy || reference), as its paper does (Ethayarajh et al. 2024, section
    3.3). The two prompts differ wherever there are enough different ones.

    Raises:
        UserError: for a single example.
    """
    if len(data) < 2:
        raise UserError(
            f"{data.origin(0)}: objective=kto also rates the response to another prompt, and there is no other example; "
            "give it more"
        )
    order = np.random.default_rng([seed, _PARTNERS]).permutation(len(data))
    # Equal prompts together, and a shift by the most frequent one: no other leaves fewer pairs of equal prompts.
    _, first, which, counts = np.unique(data.groups[order], return_index=True, return_inverse=True, return_counts=True)
    order = order[np.argsort(first[which], kind="stable")]
    shift = int(counts.max()) % len(data) or 1
    partner = np.empty(len(data), np.int64)
    partner[order] = np.roll(order, -shift)
    return Partners(data, partner, max_length=max_length)
