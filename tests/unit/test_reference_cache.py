"""The reference's log-probabilities on disk: what is kept, when it is read again, and that it is what a live one gives."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_trees import random_trees
from torch import Tensor

from rlhf_pipeline.config.direct import DirectReferenceConfig
from rlhf_pipeline.config.schema import Dtype, LoraConfig, ModelConfig, Quantise
from rlhf_pipeline.config.stages import DpoConfig
from rlhf_pipeline.data.loader import Layout, micro_batches
from rlhf_pipeline.data.packing import pack
from rlhf_pipeline.data.store import TreeDataset, concatenate
from rlhf_pipeline.data.tree import Tree
from rlhf_pipeline.direct import reference as direct
from rlhf_pipeline.direct.reference import Partners, identity_of, partners, referenced
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.functional.losses.preference import dpo_loss
from rlhf_pipeline.models.reference import Reference
from rlhf_pipeline.models.tree_model import TreeBatch, TreeModel

CPU = torch.device("cpu")
ALONE = Layout(row_length=24, micro_rows=2, width_multiple=1, rank=0, num_ranks=1)
IDENTITY = {"model": "m", "dtype": "float32"}
Model = Callable[..., Any]


class Said(list[str]):
    """What a run says, and how often it opens its reference."""

    opened = 0


def opener(model: Any, said: Said) -> Callable[[], Reference]:
    def open_it() -> Reference:
        said.opened += 1
        policy: Any = None
        return Reference(model, policy, device=CPU, offload=False)

    return open_it


def run(
    data: Any, model: Any, folder: Path, *, identity: dict[str, Any] = IDENTITY, **options: Any
) -> tuple[Any, Said]:
    said = Said()
    made = referenced(
        data, opener(model, said), layout=ALONE, identity=identity, cache_dir=folder, say=said.append, **options
    )
    return made, said


def numbers(data: Any) -> list[list[list[float]]]:
    return [[part.tolist() for part in data[i].numbers["reference"]] for i in range(len(data))]


def naive(model: Any, tree: Tree) -> list[np.ndarray]:
    """Of every response token, by the transformers model on each path alone; 0 where it is not scored."""
    found = []
    for k, scored in enumerate(tree.scored):
        path = torch.from_numpy(tree.path(k)).long()
        with torch.no_grad():
            logprobs = model(path[None]).logits[0].double().log_softmax(-1)
        start = len(tree.prompt)
        every = logprobs[torch.arange(start - 1, len(path) - 1), path[start:]].numpy()
        found.append(np.where(scored, every, 0.0))
    return found


@pytest.fixture
def data(tmp_path: Path) -> TreeDataset:
    return random_trees(tmp_path / "data.arrow")


@pytest.fixture
def model(tiny_model: Model) -> TreeModel:
    return TreeModel(tiny_model("llama")).eval()


# Numbers of a data set


def counted(data: TreeDataset) -> TreeDataset:
    """Response token t of the whole data set has the number t."""
    return data.with_numbers("t", np.arange(int(data.response_tokens.sum()), dtype=np.float32))


def test_numbers_go_to_their_tokens(data: TreeDataset) -> None:
    assert data.response_tokens.tolist() == [7, 12, 4, 12, 5, 9, 6]
    found = counted(data)
    assert [part.tolist() for part in found[1].numbers["t"]] == [[7, 8, 9], [*range(10, 19)]]
    assert [part.tolist() for part in found[5].numbers["t"]] == [[*range(40, 48)], [48]]
    assert found.fingerprint == data.fingerprint and not data[1].numbers
    assert [len(one.numbers["t"]) for one in found] == [len(one.responses) for one in found]


def test_numbers_follow_a_selection(data: TreeDataset) -> None:
    order = np.array([5, 0, 5, 2])
    after, before = counted(data).select(order), counted(data.select(order))
    assert [part.tolist() for part in after[0].numbers["t"]] == [[*range(40, 48)], [48]]
    assert [part.tolist() for part in after[3].numbers["t"]] == [[19, 20], [21, 22]]
    assert [part.tolist() for part in before[0].numbers["t"]] == [[*range(8)], [8]]
    assert [part.tolist() for part in before[3].numbers["t"]] == [[25, 26], [27, 28]]
    assert [part.tolist() for part in after.select(np.array([3]))[0].numbers["t"]] == [[19, 20], [21, 22]]


def test_numbers_of_several_sources(data: TreeDataset, tmp_path: Path) -> None:
    other = random_trees(tmp_path / "other.arrow", [(2, (3,)), (1, (1, 2))], seed=1)
    both = counted(concatenate([data.select(np.array([6, 4])), other], []))
    found = [[part.tolist() for part in one.numbers["t"]] for one in both]
    assert found == [[[0, 1, 2], [3, 4, 5]], [[6, 7, 8, 9, 10]], [[11, 12, 13]], [[14], [15, 16]]]
    with pytest.raises(AssertionError):
        concatenate([both, other], [])


@pytest.mark.parametrize("flat", [np.zeros(54, np.float32), np.zeros(55, np.float64), np.zeros((55, 1), np.float32)])
def test_other_numbers_are_refused(data: TreeDataset, flat: np.ndarray) -> None:
    assert data.with_numbers("t", np.zeros(55, np.float32))
    with pytest.raises(AssertionError):
        data.with_numbers("t", flat)


def test_a_tree_has_them_of_both_names(data: TreeDataset) -> None:
    twice = counted(data).with_numbers("u", np.full(55, 2, np.float32))
    packed = pack([[twice[1], twice[4]]])
    scored = np.concatenate([*twice[1].scored, *twice[4].scored])
    assert packed.numbers["t"].tolist() == np.array([*range(7, 19), *range(35, 40)])[scored].tolist()
    assert packed.numbers["u"].tolist() == [2.0] * scored.sum()


# What is computed


@pytest.mark.parametrize("at_once", [1, 32])
def test_every_scored_token_has_the_models_own(
    data: TreeDataset, model: TreeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(direct, "MICRO_BATCHES_AT_ONCE", at_once)
    done: list[tuple[int, int]] = []
    order = np.array([3, 6, 0, 5, 1, 4, 2, 3])
    made, said = run(data.select(order), model, tmp_path, progress=lambda *told: done.append(told))
    assert said.opened == 1 and done[-1] == (8, 8) and (len(done) > 1) == (at_once == 1)
    for place, i in enumerate(order):
        for found, expected in zip(made[place].numbers["reference"], naive(model.inner, data[int(i)]), strict=True):
            assert found.dtype == np.float32 and (np.abs(found - expected) < 2e-5).all()
            assert ((found == 0) == (expected == 0)).all()


def test_a_temperature_is_the_models(data: TreeDataset, model: TreeModel, tmp_path: Path) -> None:
    plain, _ = run(data, model, tmp_path)
    model.temperature = 0.5
    other, _ = run(data, model, tmp_path, identity={**IDENTITY, "temperature": 0.5})
    assert numbers(plain) != numbers(other)


def losses(batch: TreeBatch, reference: Tensor, policy: TreeModel) -> Tensor:
    """DPO of the first two responses of each tree."""
    with torch.no_grad():
        ratios = torch.zeros(len(batch.last)).index_add(0, batch.sequence, policy(batch) - reference)
    prompts = batch.prompt.tolist()
    firsts = [prompts.index(prompt) for prompt in sorted(set(prompts)) if prompts.count(prompt) > 1]
    pairs = torch.stack([ratios[r] - ratios[r + 1] for r in firsts]) if firsts else ratios[:0]
    return dpo_loss(pairs, torch.ones_like(pairs), beta=0.1)


def test_cached_is_live(data: TreeDataset, model: TreeModel, tiny_model: Model, tmp_path: Path) -> None:
    policy = TreeModel(tiny_model("llama", seed=1)).eval()
    made, _ = run(data, model, tmp_path)
    shuffled = made.select(np.array([5, 3, 0, 1, 6, 2]))
    policy_of: Any = None
    for cached in (made, shuffled):
        count = 0
        for packed in micro_batches([cached], [(0, i) for i in range(len(cached))][::-1], ALONE):
            batch = TreeBatch.of(packed, CPU)
            with Reference(model, policy_of, device=CPU, offload=True).ready() as live:
                expected = live(batch)
            found = losses(batch, batch.number("reference"), policy)
            if len(found):
                assert (found - losses(batch, expected, policy)).abs().max() <= 1e-6
                assert (found - losses(batch, torch.zeros_like(expected), policy)).abs().max() > 1e-3
            count += len(found)
        assert count == 6


def test_what_is_not_finite_names_its_example(data: TreeDataset, model: TreeModel, tmp_path: Path) -> None:
    """The first token of the fifth prompt is the only one of its kind, and its embedding is broken."""
    word = next(int(word) for word in data[4].prompt if not any(word in data[i].path(0) for i in range(7) if i != 4))
    assert not any(word in response for i in range(7) for response in data[i].responses)
    with torch.no_grad():
        model.inner.get_input_embeddings().weight[word] = torch.nan
    with pytest.raises(UserError, match=r"^f:4: .*not finite \(nan\)"):
        run(data, model, tmp_path)
    assert not list((tmp_path / "reference").iterdir())


# On disk


def test_a_second_run_reads(data: TreeDataset, model: TreeModel, tmp_path: Path) -> None:
    first, said = run(data, model, tmp_path)
    file, sidecar = sorted((tmp_path / "reference").iterdir(), key=lambda file: file.suffix, reverse=True)
    assert (file.suffix, sidecar.suffix, file.stem) == (".npy", ".json", sidecar.stem)
    assert len(said) == 1 and said[0].startswith("computing") and str(file) in said[0]
    told = json.loads(sidecar.read_text())
    assert told["numbers"] == 55 and told["examples"] == 7 and told["reference"] == IDENTITY
    assert told["data"] == data.fingerprint and len(told["sha256"]) == 64
    assert np.load(file).tolist() == [number for tree in numbers(first) for part in tree for number in part]
    again, said = run(data, None, tmp_path)
    assert said.opened == 0 and len(said) == 1 and str(file) in said[0]
    assert numbers(again) == numbers(first)
    assert not again[0].numbers["reference"][0].flags.writeable, "it is a memory map"


def test_other_data_and_another_reference_have_files_of_their_own(
    data: TreeDataset, model: TreeModel, tmp_path: Path
) -> None:
    run(data, model, tmp_path)
    made, said = run(data.select(np.array([1, 0])), model, tmp_path)
    assert said.opened == 1 and len(numbers(made)) == 2
    _, said = run(data, model, tmp_path, identity={**IDENTITY, "dtype": "bfloat16"})
    assert said.opened == 1
    assert len(list((tmp_path / "reference").glob("*.npy"))) == 3
    assert all(run(one, None, tmp_path)[1].opened == 0 for one in (data, data.select(np.array([1, 0]))))


def flip(file: Path, sidecar: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def cut(file: Path, sidecar: Path) -> None:
    file.write_bytes(file.read_bytes()[:-8])


def of_another(file: Path, sidecar: Path) -> None:
    """Whole, and with the right checksum, but one number short."""
    np.save(file, np.load(file)[1:])
    change(sidecar, sha256=direct.sha256(file))


def change(sidecar: Path, **changes: Any) -> None:
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), **changes}))


DAMAGES: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "flipped": (flip, "checksum"),
    "cut": (cut, "checksum"),
    "empty": (lambda file, sidecar: file.write_bytes(b""), "checksum"),
    "short": (of_another, "shape"),
    "no_numbers": (lambda file, sidecar: file.unlink(), r"npy is missing"),
    "no_sidecar": (lambda file, sidecar: sidecar.unlink(), r"json is missing"),
    "no_json": (lambda file, sidecar: sidecar.write_text("{"), "cannot be read"),
    "no_object": (lambda file, sidecar: sidecar.write_text("[]"), "cannot be read"),
    "no_checksum": (lambda file, sidecar: sidecar.write_text("{}"), "cannot be read"),
    "version": (lambda file, sidecar: change(sidecar, version=0), "version 0"),
    "data": (lambda file, sidecar: change(sidecar, data="x"), r"does not fit \(data\)"),
    "model": (lambda file, sidecar: change(sidecar, reference={"model": "n"}), r"does not fit \(reference\)"),
    "more": (lambda file, sidecar: change(sidecar, more=1), r"does not fit \(more\)"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_damaged_is_computed_again(name: str, data: TreeDataset, model: TreeModel, tmp_path: Path) -> None:
    damage, reason = DAMAGES[name]
    first, _ = run(data, model, tmp_path)
    expected = numbers(first)
    file = next((tmp_path / "reference").glob("*.npy"))
    before = file.read_bytes()
    del first
    damage(file, file.with_suffix(".json"))
    made, said = run(data, model, tmp_path)
    assert said.opened == 1 and numbers(made) == expected and file.read_bytes() == before
    assert len(said) == 1 and re.search(f"again, for .*{reason}.*{file}", said[0]), said
    assert run(data, None, tmp_path)[1].opened == 0
    assert len(list((tmp_path / "reference").iterdir())) == 2


@contextmanager
def dying(monkeypatch: pytest.MonkeyPatch, name: str, call: int, error: BaseException) -> Iterator[None]:
    """The n-th call of a function of direct.reference raises."""
    original, calls = getattr(direct, name), []

    def counting(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise error
        return original(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(direct, name, counting)
        yield
    assert len(calls) >= call


@pytest.mark.parametrize(("name", "call"), [("_of_examples", 2), ("sync", 1), ("sync", 2), ("sync", 3)])
def test_what_is_killed_half_way_is_not_read(
    name: str, call: int, data: TreeDataset, model: TreeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "MICRO_BATCHES_AT_ONCE", 1)
    with dying(monkeypatch, name, call, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        run(data, model, tmp_path)
    assert not list((tmp_path / "reference").glob("*.tmp")) and torch.is_grad_enabled()
    made, said = run(data, model, tmp_path)
    assert said.opened == (0 if call == 3 else 1)  # all was done but the folder's own entry
    expected, _ = run(data, model, tmp_path / "elsewhere")
    assert numbers(made) == numbers(expected)


def test_remains_of_a_killed_run_are_not_read(data: TreeDataset, model: TreeModel, tmp_path: Path) -> None:
    """As `kill -9` leaves them: the numbers have their name already, what describes them has not."""
    first, _ = run(data, model, tmp_path)
    expected = numbers(first)
    sidecar = next((tmp_path / "reference").glob("*.json"))
    sidecar.rename(sidecar.with_name("x.npy.1-ab.json.tmp"))
    made, said = run(data, model, tmp_path)
    assert said.opened == 1 and numbers(made) == expected


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_disk_error_is_a_users_error(
    call: int, number: int, data: TreeDataset, model: TreeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with dying(monkeypatch, "sync", call, OSError(number, "full")), pytest.raises(UserError, match="while saving"):
        run(data, model, tmp_path)
    assert not list((tmp_path / "reference").glob("*.tmp")) and torch.is_grad_enabled()


# What the reference is


def test_the_identity_is_that_of_the_numbers(tiny_model: Model, tmp_path: Path) -> None:
    folders = [str(tmp_path / name) for name in ("a", "b", "same_as_a")]
    for folder, seed in zip(folders, (0, 1, 0), strict=True):
        tiny_model("llama", seed=seed).save_pretrained(folder)
    a, b, same = folders

    def of(path: str, reference: str | None = None, **options: Any) -> dict[str, Any]:
        model = ModelConfig(path=path, dtype=options.pop("dtype", Dtype.float32))
        return identity_of(DpoConfig(model=model, reference=DirectReferenceConfig(path=reference), **options))

    assert of(a) == of(same) == of(b, a) == of(a, lora=LoraConfig())
    others = [of(b), of(a, dtype=Dtype.bfloat16), of(a, lora=LoraConfig(quantise=Quantise.nf4)), of(a, b)]
    assert all(other != of(a) for other in others) and others[0] == others[3]
    assert of(b, a, lora=LoraConfig(quantise=Quantise.nf4)) == of(a), "only the policy is quantised"
    assert of("org/name") != of("org/other") and json.dumps(of("org/name"))


# Partners


def test_partners_are_other_examples(tmp_path: Path) -> None:
    data = random_trees(tmp_path / "d.arrow", [(2, (3,))] * 40)
    found = partners(data, seed=0, max_length=None)
    assert sorted(found.partner) == list(range(40)) and (found.partner != np.arange(40)).all()
    assert (partners(data, seed=0, max_length=None).partner == found.partner).all()
    assert (partners(data, seed=1, max_length=None).partner != found.partner).any()


@pytest.mark.parametrize(
    ("groups", "equal"),
    [
        ([0, 0, 1, 1], 0),
        ([0, 1, 0, 2, 0, 1], 0),  # half of them are 0
        ([0, 0, 0, 1, 1], 1),  # three of 0 and only two others
        ([7, 7, 7, 7, 1], 3),
        ([3, 3, 3], 3),
        ([0, 0], 2),
        ([0, 1, 1, 2, 2, 3, 3, 4, 4, 4], 0),
    ],
)
def test_partners_answer_another_prompt_where_they_can(groups: list[int], equal: int, tmp_path: Path) -> None:
    data = random_trees(tmp_path / "d.arrow", [(2, (3,))] * len(groups), groups=groups)
    for seed in range(20):
        found = partners(data, seed=seed, max_length=None).partner
        assert sorted(found) == list(range(len(groups))) and (found != np.arange(len(groups))).all()
        assert sum(groups[i] == groups[j] for i, j in enumerate(found)) == equal


def test_a_partners_tree_is_a_prompt_and_another_ones_first_response(data: TreeDataset) -> None:
    found = partners(data, seed=0, max_length=9)
    lengths, cuts = [], 0
    for i in range(len(data)):
        tree, other = found[i], data[int(found.partner[i])]
        room = 9 - len(data[i].prompt)
        assert tree.prompt.tolist() == data[i].prompt.tolist() and tree.index == i
        assert [part.tolist() for part in tree.responses] == [other.responses[0][:room].tolist()]
        assert all(part.all() and part.shape == tree.responses[0].shape for part in tree.scored)
        assert found.origin(i) == f"f:{i}" and not tree.numbers
        lengths.append(len(tree))
        cuts += len(other.responses[0]) > room
    assert cuts and max(lengths) == 9
    assert found.lengths.tolist() == lengths and found.lengths.dtype == np.int64
    assert found.response_tokens.tolist() == [n - len(data[i].prompt) for i, n in enumerate(lengths)]
    whole = partners(data, seed=0, max_length=None)
    assert whole.lengths.sum() > found.lengths.sum()


def test_partners_have_a_fingerprint_of_their_own(data: TreeDataset) -> None:
    def of(data: TreeDataset = data, seed: int = 0, max_length: int | None = 9) -> str:
        return partners(data, seed=seed, max_length=max_length).fingerprint

    prints = [data.fingerprint, of(), of(seed=1), of(max_length=8), of(max_length=None), of(data.select(np.arange(6)))]
    assert of() == of() and len(set(prints)) == len(prints)


def test_partners_of_a_selection(data: TreeDataset, model: TreeModel, tmp_path: Path) -> None:
    """Rows of the file and places in the data set are not the same there. Their numbers are kept as those of others."""
    chosen = data.select(np.array([6, 1, 4]))
    made, said = run(partners(chosen, seed=0, max_length=9), model, tmp_path)
    assert isinstance(made, Partners) and said.opened == 1
    for i, j in enumerate(made.partner):
        assert made[i].responses[0].tolist() == chosen[int(j)].responses[0][: 9 - len(chosen[i].prompt)].tolist()
        (found,), (expected,) = made[i].numbers["reference"], naive(model.inner, made[i])
        assert found.shape == expected.shape and (np.abs(found - expected) < 2e-5).all()
    assert run(partners(chosen, seed=0, max_length=9), None, tmp_path)[1].opened == 0


def test_one_example_has_no_partner(data: TreeDataset) -> None:
    with pytest.raises(UserError, match=r"^f:3: .*no other example"):
        partners(data.select(np.array([3])), seed=0, max_length=None)
