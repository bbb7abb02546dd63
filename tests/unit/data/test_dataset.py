"""Rows to a data set of token trees: what comes back, by templates, in parts, and every comparison by itself."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_dataset import CONF, LENGTHS, WriteRows, contents, demonstrations, pair

from rlhf_pipeline.data import dataset as module
from rlhf_pipeline.data.dataset import Source, build, split_heldout
from rlhf_pipeline.data.encode import encode
from rlhf_pipeline.data.formats import to_records
from rlhf_pipeline.data.prompts import Renderer
from rlhf_pipeline.data.store import TreeDataset
from rlhf_pipeline.errors import UserError


@pytest.mark.parametrize("rows_at_once", [2, 1024])
def test_round_trip(
    renderer: Renderer, write_rows: WriteRows, cache: Path, monkeypatch: pytest.MonkeyPatch, rows_at_once: int
) -> None:
    """What comes back is what `encode` makes of each row, over several record batches and odd numbers of bits."""
    monkeypatch.setattr(module, "ROWS_AT_ONCE", rows_at_once)
    turns = [("user", "Hi"), ("assistant", "Well."), ("user", "How?"), ("assistant", "The sky is blue.")]
    rows = [{"messages": [{"role": r, "content": c} for r, c in turns[:n]] * k} for n in (2, 4) for k in (1, 2, 3)]
    data = build(demonstrations(write_rows(*rows)), renderer, LENGTHS, cache_dir=cache)
    expected = [encode(to_records(row, "demonstration", "messages")[0], renderer, LENGTHS).trees[0] for row in rows]
    assert len(data) == len(rows)
    for i, (tree, want) in enumerate(zip(data, expected, strict=True)):
        assert tree.index == i
        np.testing.assert_array_equal(tree.prompt, want.prompt)
        assert tree.prompt.dtype == np.int32 and tree.responses[0].dtype == np.int32
        for ours, theirs in ((tree.responses, want.responses), (tree.scored, want.scored)):
            assert len(ours) == len(theirs) == 1
            np.testing.assert_array_equal(ours[0], theirs[0])
        assert tree.scored[0].dtype == np.bool_
        assert data.lengths[i] == len(want) and data.targets[i] == want.scored[0].sum()
        assert data.origin(i).endswith(f"data.jsonl:{i + 1}")
    assert data.counts.tokens == data.lengths.sum() and data.counts.targets == data.targets.sum()
    for wrong in (len(rows), -1):
        with pytest.raises(IndexError):
            data[wrong]


def test_ranking_of_three_shares_a_prompt_and_keeps_its_order(
    renderer: Renderer, write_rows: WriteRows, cache: Path
) -> None:
    path = write_rows(
        {"prompt": "Sky?", "responses": ["Red.", "The sky is blue.", "No"], "ranks": [3, 1, 2]},
        {"prompt": "Grass?", "responses": ["Green.", "Blue."], "ranks": [1, 2]},
    )
    data = build(Source(path=path, kind="ranking"), renderer, LENGTHS, cache_dir=cache)
    decode = renderer.tokenizer.decode
    assert [[decode(response) for response in tree.responses] for tree in data] == [
        [" Red.<|eos|>", " The sky is blue.<|eos|>", " No<|eos|>"],
        [" Green.<|eos|>", " Blue.<|eos|>"],
    ]
    assert [decode(tree.prompt) for tree in data] == [
        f"<|bos|>\n\nHuman: {question}\n\nAssistant:" for question in ("Sky?", "Grass?")
    ]
    assert [tree.ranks.tolist() for tree in data] == [[2, 0, 1], [0, 1]]
    assert all(scored.all() for tree in data for scored in tree.scored)
    assert data.lengths.tolist() == [len(tree) for tree in data]


def test_documents_become_several_trees_of_one_row(renderer: Renderer, write_rows: WriteRows, cache: Path) -> None:
    text = "The sky is blue and the grass is green. " * 5
    limits = replace(LENGTHS, max_length=16, max_prompt_length=1)
    data = build(
        Source(path=write_rows({"text": text}, {"text": "Hi"}), kind="text"), renderer, limits, cache_dir=cache
    )
    whole = renderer.encode_text(text)
    num_chunks = -(-(len(whole) - 1) // 15)
    assert len(data) == num_chunks + 1 and data.counts.rows == data.counts.kept == 2
    trees = list(data)
    rebuilt = np.concatenate([trees[0].prompt, *(tree.responses[0] for tree in trees[:num_chunks])])
    np.testing.assert_array_equal(rebuilt, whole)
    assert data.counts.targets == len(whole) - 1 + len(renderer.encode_text("Hi")) - 1
    assert len(set(data.groups[:num_chunks].tolist())) == 1 and data.groups[-1] != data.groups[0]
    assert data.origin(num_chunks - 1).endswith(":1") and data.origin(num_chunks).endswith(":2")


def test_rows_by_data_templates(renderer: Renderer, write_rows: WriteRows, cache: Path, tmp_path: Path) -> None:
    """Every row by two wordings; what a template leaves out is counted; the file of templates is part of the key."""
    file = tmp_path / "wordings.yaml"
    text = (
        "choose: all\n"
        "templates:\n"
        "  - {name: plain, prompt: 'Is {{ x }} good?', response: '{{ y }}'}\n"
        "  - {name: short, prompt: '{{ x }}?', response: '{{ y }}'}\n"
    )
    file.write_text(text)
    path = write_rows({"x": "tea", "y": "Yes."}, {"x": "mud", "y": ""}, {"x": "jam", "y": "Yes."}, {"y": "no x"})
    source = demonstrations(path, templates=str(file), on_bad_row="skip")
    data = build(source, renderer, LENGTHS, cache_dir=cache)
    prompts = [renderer.tokenizer.decode(tree.prompt) for tree in data]
    assert ["Is tea good?" in prompts[0], "tea?" in prompts[1], "Is jam good?" in prompts[2], len(prompts)] == [
        *(True,) * 3,
        4,
    ]
    assert (data.counts.rows, data.counts.kept, data.counts.dropped_by_template) == (4, 2, 1)
    assert data.counts.trees == 4 and sum(data.counts.bad.values()) == 1
    file.write_text(text.replace("good", "fine"))
    other = build(source, renderer, LENGTHS, cache_dir=cache)
    assert "Is tea fine?" in renderer.tokenizer.decode(other[0].prompt) and len(list(cache.iterdir())) == 2


def test_max_examples_reads_no_further(renderer: Renderer, write_rows: WriteRows, cache: Path) -> None:
    path = write_rows(pair(0), pair(1), b"{bad", pair(3))
    data = build(demonstrations(path, max_examples=2), renderer, LENGTHS, cache_dir=cache)
    assert len(data) == data.counts.rows == 2


def test_select(renderer: Renderer, write_rows: WriteRows, cache: Path) -> None:
    data = build(demonstrations(write_rows(*(pair(i) for i in range(5)))), renderer, LENGTHS, cache_dir=cache)
    some = data.select(np.array([4, 0, 2]))
    assert contents(some) == [contents(data)[i] for i in (4, 0, 2)]
    assert [tree.index for tree in some] == [0, 1, 2]
    assert some.origin(0) == data.origin(4)
    assert some.lengths.tolist() == data.lengths[[4, 0, 2]].tolist()
    assert some.targets.tolist() == data.targets[[4, 0, 2]].tolist()
    assert contents(some.select(np.array([1]))) == contents(data)[:1]
    prints = {d.fingerprint for d in (data, some, data.select(np.array([0, 4, 2])), some.select(np.array([1])))}
    assert len(prints) == 4 and data.select(np.array([4, 0, 2])).fingerprint == some.fingerprint


def test_fingerprint_is_that_of_the_content(renderer: Renderer, write_rows: WriteRows, cache: Path) -> None:
    def of(*rows: Any, name: str = "data.jsonl") -> str:
        return build(demonstrations(write_rows(*rows, name=name)), renderer, LENGTHS, cache_dir=cache).fingerprint

    first = of(pair(0), pair(1))
    assert of(pair(0), pair(1), name="moved.jsonl") == first
    assert of({**pair(0), "note": "is not read"}, pair(1)) == first
    assert len({first, of(pair(1), pair(0)), of(pair(0)), of(pair(0), pair(1, "Red."))}) == 4


def split_prompts(data: TreeDataset, renderer: Renderer, fraction: float, seed: int) -> list[set[str]]:
    sides = split_heldout(data, fraction, seed)
    assert sum(map(len, sides)) == len(data) and all(map(len, sides))
    return [{renderer.tokenizer.decode(tree.prompt) for tree in side} for side in sides]


def test_split_by_prompt(renderer: Renderer, write_rows: WriteRows, cache: Path) -> None:
    rows = [pair(i % 400, answer) for i, answer in enumerate(["Blue.", "Red.", "Green."] * 400)]
    data = build(demonstrations(write_rows(*rows)), renderer, LENGTHS, cache_dir=cache)
    train, heldout = split_prompts(data, renderer, 0.2, seed=1)
    assert not train & heldout and len(train | heldout) == 400
    assert 50 <= len(heldout) <= 110  # 80 +- 3.75 standard deviations of a binomial
    assert split_prompts(data, renderer, 0.2, seed=1) == [train, heldout]
    assert split_prompts(data, renderer, 0.2, seed=2) != [train, heldout]
    # The same prompts lie on the same side in another data set, and in one with another template.
    other = build(demonstrations(write_rows(*(pair(i) for i in range(350, 500)))), renderer, LENGTHS, cache_dir=cache)
    other_train, other_heldout = split_prompts(other, renderer, 0.2, seed=1)
    assert not train & other_heldout and not heldout & other_train
    more = split_prompts(data, renderer, 0.3, seed=1)[1]
    assert heldout < more


def test_split_always_has_two_sides(renderer: Renderer, write_rows: WriteRows, cache: Path) -> None:
    data = build(demonstrations(write_rows(pair(0), pair(0), pair(1))), renderer, LENGTHS, cache_dir=cache)
    for fraction in (1e-9, 0.5, 1 - 1e-9):
        for seed in range(5):
            split_prompts(data, renderer, fraction, seed)
    for wrong in (0.0, 1.0, -0.1):
        with pytest.raises(UserError, match="heldout_fraction"):
            split_heldout(data, wrong, 0)
    with pytest.raises(UserError, match="two different prompts"):
        split_heldout(data.select(np.array([0, 1])), 0.5, 0)


def test_imports_are_cheap() -> None:
    """Nothing here needs torch, and pandas or datasets would cost more time than the tokenising."""
    code = (
        "import sys, rlhf_pipeline.data.dataset, rlhf_pipeline.data.encode; "
        "print(*{'torch', 'transformers', 'datasets', 'pandas', 'jinja2'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=CONF.parent)
    assert done.stdout.strip() == ""


# Every comparison an example of its own

RANKINGS = [
    {"prompt": "Sky?", "responses": ["Grey.", "Blue.", "Red."], "scores": [2, 3, 1]},
    {"prompt": "Sea?", "responses": ["Blue.", "Wet.", "Deep."], "scores": [4, 4, 4]},
    {"prompt": "Sky?", "responses": ["So.", "Blue.", "Far."], "scores": [1, 5, 1]},
]


def test_comparisons_as_examples(renderer: Renderer, write_rows: WriteRows, cache: Path) -> None:
    source = Source(path=write_rows(*RANKINGS, {"prompt": "?"}), kind="ranking", on_bad_row="skip")
    whole = build(source, renderer, LENGTHS, cache_dir=cache)
    pairs = build(replace(source, rankings="pairs"), renderer, LENGTHS, cache_dir=cache)
    answers = [
        tuple(renderer.tokenizer.decode(r, skip_special_tokens=True).strip() for r in t.responses) for t in pairs
    ]
    assert answers == [("Blue.", "Grey."), ("Grey.", "Red."), ("Blue.", "Red."), ("Blue.", "So."), ("Blue.", "Far.")]
    assert [tree.scores.tolist() for tree in pairs] == [[3, 2], [2, 1], [3, 1], [5, 1], [5, 1]]
    assert all(tree.ranks.tolist() == [0, 1] for tree in pairs)
    assert [pairs.origin(i).rpartition(":")[2] for i in range(5)] == ["1", "1", "1", "3", "3"]
    # Equal prompts stay on one side of a split, as those of whole rankings do.
    assert len(set(pairs.groups.tolist())) == 1 and pairs.groups[0] == whole.groups[0] == whole.groups[2]
    counts = (pairs.counts.rows, pairs.counts.kept, pairs.counts.dropped_all_tied, pairs.counts.trees)
    assert counts == (4, 2, 1, 5) and pairs.counts.bad == {"no field 'responses'": 1}
    # As a whole a ranking of ties is kept; it has nothing to learn from, and nothing to lose.
    assert (whole.counts.kept, whole.counts.dropped_all_tied, whole.counts.trees) == (3, 0, 3)


def test_ties_alone_are_nothing_left(renderer: Renderer, write_rows: WriteRows, cache: Path) -> None:
    source = Source(path=write_rows(RANKINGS[1]), kind="ranking", rankings="pairs")
    with pytest.raises(UserError, match=r"none of 1 rows is left \(1 dropped_all_tied\)"):
        build(source, renderer, LENGTHS, cache_dir=cache)


def test_comparisons_have_a_cache_file_of_their_own_where_there_are_rankings(
    renderer: Renderer, write_rows: WriteRows, cache: Path, made: list[str]
) -> None:
    source = Source(path=write_rows(*RANKINGS), kind="ranking")
    for one in (source, replace(source, rankings="pairs"), source, replace(source, rankings="pairs")):
        build(one, renderer, LENGTHS, cache_dir=cache)
    assert len(made) == 2
    for rankings in ("whole", "pairs"):  # other kinds know nothing of it
        build(replace(source, kind="demonstration", rankings=rankings), renderer, LENGTHS, cache_dir=cache)  # type: ignore[arg-type]
    assert len(made) == 3


def test_comparisons_with_any_number_of_processes(
    renderer: Renderer, write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 7)
    rows = [{**RANKINGS[i % 3], "prompt": f"Sky {i}?"} for i in range(60)]
    source = Source(path=write_rows(*rows), kind="ranking", rankings="pairs")
    files = []
    for workers in (1, 2):
        folder = tmp_path / f"cache{workers}"
        data = build(source, renderer, LENGTHS, cache_dir=folder, workers=workers)
        assert (data.counts.kept, data.counts.dropped_all_tied, len(data)) == (40, 20, 100)
        files += [(file.name, file.read_bytes()) for file in folder.iterdir()]
    assert len(set(files)) == 1
