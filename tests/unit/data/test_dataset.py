from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from rlhf_pipeline.data import dataset as module
from rlhf_pipeline.data.dataset import Source, build, split_heldout
from rlhf_pipeline.data.encode import Counts, Lengths, encode
from rlhf_pipeline.data.formats import to_records
from rlhf_pipeline.data.prompts import Renderer, load_template
from rlhf_pipeline.data.records import Message
from rlhf_pipeline.data.store import TreeDataset
from rlhf_pipeline.errors import UserError

CONF = Path(__file__).parents[3] / "conf"
LENGTHS = Lengths(max_length=64, max_prompt_length=48, long_prompt="drop", long_response="cut")
WriteRows = Callable[..., str]
MakeTokenizer = Callable[..., PreTrainedTokenizerFast]


def pair(number: int, answer: str = "Blue.") -> dict[str, str]:
    return {"prompt": f"How is sky {number}?", "response": answer}


def demonstrations(path: str, **changes: Any) -> Source:
    return Source(path=path, kind="demonstration", **changes)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by the path of every source that is really read, that is, not found in the cache."""
    paths: list[str] = []
    original = module.read_rows

    def read_rows(path: str, *, split: str) -> Iterator[Any]:
        paths.append(path)
        return original(path, split=split)

    monkeypatch.setattr(module, "read_rows", read_rows)
    return paths


def contents(data: TreeDataset) -> list[tuple[Any, ...]]:
    return [
        (tree.prompt.tolist(), [r.tolist() for r in tree.responses], [s.tolist() for s in tree.scored]) for tree in data
    ]


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


BAD = [
    (b"{oops", "not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
    (b'{"prompt": "\xff"}', "not UTF-8: byte 0xff at position 12"),
    (b"[]", "not a JSON object: list"),
    ({"prompt": "p"}, "no field 'response': there is prompt"),
    ({"prompt": 3, "response": "r"}, "prompt is not a string: int"),
    ({"prompt": "p", "response": " \n "}, "the assistant message is empty"),
    ({"prompt": "\ud800", "response": "r"}, "the user message is not valid Unicode: a lone surrogate at character 0"),
    ({"prompt": "\U000f0000", "response": "r"}, "the text holds U+F0000 or U+F0001, which serve as marks here"),
]


def test_bad_rows_are_an_error_that_names_them(renderer: Renderer, write_rows: WriteRows, cache: Path) -> None:
    path = write_rows(pair(0), *(row for row, _ in BAD), pair(1))
    with pytest.raises(UserError) as error:
        build(demonstrations(path), renderer, LENGTHS, cache_dir=cache)
    lines = str(error.value).splitlines()
    assert lines[0] == f"8 of 10 rows of {path} cannot be used:"
    assert lines[1:9] == [f"  {path}:{number}: {reason}" for number, (_, reason) in enumerate(BAD, start=2)]
    assert "data.on_bad_row=skip" in lines[9]
    assert list(cache.iterdir()) == []  # and leave nothing behind

    path = write_rows(pair(0), *(b"{oops" for _ in range(13)))
    with pytest.raises(UserError, match=r"13 of 14 rows of /[^$]*data.jsonl:11: not JSON[^$]*and 3 more"):
        build(replace(demonstrations(path), path=[path]), renderer, LENGTHS, cache_dir=cache)


def test_skipped_bad_rows_are_counted(renderer: Renderer, write_rows: WriteRows, cache: Path) -> None:
    path = write_rows(pair(0), *(row for row, _ in BAD), b"{again", pair(1))
    for _ in ("made", "from the cache"):
        data = build(demonstrations(path, on_bad_row="skip"), renderer, LENGTHS, cache_dir=cache)
        assert data.counts.rows == 11 and data.counts.kept == data.counts.trees == len(data) == 2
        expected = {reason.split(":")[0]: 1 for _, reason in BAD}
        assert data.counts.bad == expected | {"not JSON": 2}
        assert data.bad_rows[0].startswith(f"{path}:2: not JSON") and len(data.bad_rows) == 9
        assert [data.origin(i) for i in range(2)] == [f"{path}:1", f"{path}:11"]


def test_what_is_done_with_bad_rows_does_not_change_the_file(
    renderer: Renderer, write_rows: WriteRows, cache: Path, made: list[str]
) -> None:
    """So `rlhf prep`, which counts them, makes the file of a stage that refuses them: the stage then says so at once."""
    source = demonstrations(write_rows(pair(0), b"{oops", pair(1)))
    build(replace(source, on_bad_row="skip"), renderer, LENGTHS, cache_dir=cache)
    for _ in range(2):
        with pytest.raises(UserError, match=r"1 of 3 rows of .*data\.jsonl cannot be used:\n .*:2: not JSON"):
            build(source, renderer, LENGTHS, cache_dir=cache)
    assert len(made) == 1 and len(list(cache.iterdir())) == 1


def test_every_row_is_accounted_for(renderer: Renderer, write_rows: WriteRows, cache: Path) -> None:
    def say(*turns: tuple[str, str, int]) -> dict[str, Any]:
        return {"messages": [{"role": r, "content": c, "weight": w} for r, c, w in turns]}

    long = "~" * 100  # a token each
    path = write_rows(
        say(("user", "q", 1), ("assistant", "a", 1)),
        say(("user", long, 1), ("assistant", "a", 1)),
        say(("user", "q", 1), ("assistant", long, 1)),
        say(("user", "q", 1), ("assistant", "a", 0)),
        say(("user", "q", 1)),
    )
    data = build(demonstrations(path, on_bad_row="skip"), renderer, LENGTHS, cache_dir=cache)
    prompt, answer = (len(renderer.encode_prompt([Message("user", "q")])), len(data[0].responses[0]))
    assert data.counts == Counts(
        rows=5,
        kept=2,
        bad={"the last message is not the assistant's": 1},
        dropped_long_prompt=1,
        dropped_long_response=0,
        dropped_no_target=1,
        prompt_truncated=0,
        response_truncated=1,
        trees=2,
        tokens=prompt + answer + 64,
        targets=answer + 64 - prompt,
    )
    other = replace(LENGTHS, long_prompt="keep_end", long_response="drop")
    counts = build(demonstrations(path, on_bad_row="skip"), renderer, other, cache_dir=cache).counts
    assert (counts.kept, counts.prompt_truncated, counts.dropped_long_response) == (2, 1, 1)
    with pytest.raises(UserError, match=r"data\.jsonl:2: the prompt has \d+ tokens"):
        strict = replace(LENGTHS, long_prompt="error")
        build(demonstrations(path, on_bad_row="skip"), renderer, strict, cache_dir=cache)
    assert len(list(cache.iterdir())) == 2


def test_nothing_left_is_an_error(renderer: Renderer, write_rows: WriteRows, cache: Path) -> None:
    with pytest.raises(UserError, match=r"none of 0 rows is left \(it is empty\)"):
        build(demonstrations(write_rows()), renderer, LENGTHS, cache_dir=cache)
    path = write_rows(b"{", pair(1, "~" * 100))
    strict = replace(LENGTHS, long_response="drop")
    with pytest.raises(UserError, match=r"none of 2 rows is left \(1 bad, 1 dropped_long_response\)\n .*:1: not JSON"):
        build(demonstrations(path, on_bad_row="skip"), renderer, strict, cache_dir=cache)


def test_rewriting_template_is_refused_with_the_place_of_the_row(
    make_tokenizer: MakeTokenizer, write_rows: WriteRows, cache: Path
) -> None:
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content if loop.last or m.role == 'user' else m.content[-1:] }}"
        "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    turns = [{"role": r, "content": c} for r, c in [("user", "a"), ("assistant", "bc")] * 2]
    path = write_rows({"messages": turns[:2]}, {"messages": turns})
    with pytest.raises(UserError, match=r"data\.jsonl:2: the chat template rewrites"):
        build(demonstrations(path), Renderer(make_tokenizer(template)), LENGTHS, cache_dir=cache)


def test_cache_is_used_until_anything_changes(
    make_tokenizer: MakeTokenizer, write_rows: WriteRows, cache: Path, made: list[str]
) -> None:
    path = write_rows(pair(0), pair(1), {**pair(2), "completion": "Red."})
    source, renderer = demonstrations(path), Renderer(make_tokenizer())

    def fresh(source: Source = source, renderer: Renderer = renderer, **changes: Any) -> bool:
        before = len(made)
        arguments = {"lengths": LENGTHS, "cache_dir": cache} | changes
        build(source, renderer, **arguments)
        return len(made) > before

    assert fresh() and not fresh()
    assert not fresh(renderer=Renderer(make_tokenizer()))
    for name, change in {
        "length": {"lengths": replace(LENGTHS, max_length=63)},
        "policy": {"lengths": replace(LENGTHS, long_response="drop")},
        "loss": {"loss": "all"},
        "format": {"source": replace(source, format="prompt_response")},
        "rows": {"source": replace(source, max_examples=1)},
        "tokenizer": {"renderer": Renderer(make_tokenizer(extra=("<|x|>",)))},
        "template": {"renderer": Renderer(make_tokenizer(load_template("dialogue", CONF) + "\n"))},
    }.items():
        assert fresh(**change), name
        assert not fresh(**change), name
    assert not fresh()
    write_rows(pair(0), pair(1), pair(3))
    assert fresh() and not fresh()


def test_code_is_part_of_the_key(
    renderer: Renderer, write_rows: WriteRows, cache: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = demonstrations(write_rows(pair(0)))
    for code in ("a", "b", "a"):
        monkeypatch.setattr(module, "_code_hash", lambda code=code: code)
        build(source, renderer, LENGTHS, cache_dir=cache)
    assert len(made) == 2
    assert {path.name for path in Path(module.__file__).parent.glob("*.py")} >= set(module._CODE)


@pytest.mark.parametrize("damage", ["cut", "empty", "token", "group", "tail", "zeros", "other"])
def test_damaged_cache_is_made_again(
    renderer: Renderer,
    write_rows: WriteRows,
    cache: Path,
    made: list[str],
    caplog: pytest.LogCaptureFixture,
    damage: str,
) -> None:
    source = demonstrations(write_rows(*(pair(i) for i in range(20))))
    data = build(source, renderer, LENGTHS, cache_dir=cache)
    expected, groups = contents(data), data.groups
    (file,) = cache.iterdir()
    content = bytearray(file.read_bytes())
    tokens = np.asarray(expected[7][1][0], np.int32).tobytes()
    match damage:
        case "cut":
            content = content[: len(content) // 2]
        case "empty":
            content = bytearray()
        case "token":
            content[content.index(tokens)] ^= 1
        case "group":
            content[content.index(groups[7].tobytes())] ^= 1
        case "tail":
            content[content.index(b'"fingerprint": "') + 20] ^= 1
        case "zeros":
            content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
        case "other":
            content = bytearray(b"something else altogether" * 100)
    file.write_bytes(content)
    assert contents(build(source, renderer, LENGTHS, cache_dir=cache)) == expected
    assert len(made) == 2 and "is damaged" in caplog.text
    assert contents(build(source, renderer, LENGTHS, cache_dir=cache)) == expected
    assert len(made) == 2


def test_building_at_the_same_time(
    renderer: Renderer, write_rows: WriteRows, cache: Path, monkeypatch: pytest.MonkeyPatch, made: list[str]
) -> None:
    """A second build begins and ends while the first has written its file and not yet named it."""
    source = demonstrations(write_rows(*(pair(i) for i in range(200))))
    original = module._check
    second: list[TreeDataset] = []

    def check(*arguments: Any) -> None:
        monkeypatch.setattr(module, "_check", original)
        second.append(build(source, renderer, LENGTHS, cache_dir=cache))
        original(*arguments)

    monkeypatch.setattr(module, "_check", check)
    first = build(source, renderer, LENGTHS, cache_dir=cache)
    assert len(made) == 2 and len(list(cache.iterdir())) == 1
    assert len(first) == 200 and contents(second[0]) == contents(first)  # though its file has been replaced


@pytest.mark.parametrize("rows_at_once", [7, 1024])
def test_files_are_the_same_with_any_number_of_processes(
    renderer: Renderer, write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_at_once: int
) -> None:
    """Byte for byte, bad, dropped and cut rows among them; 7 rows at once go to processes, 1,024 stay here."""
    monkeypatch.setattr(module, "ROWS_AT_ONCE", rows_at_once)
    rows: list[Any] = [pair(i, "Blue. " * (1 + i % 23)) for i in range(200)]
    rows[50], rows[51], rows[120] = b"{oops", {"prompt": 3, "response": "r"}, pair(120, "~" * 200)
    rows[121] = {"prompt": "~" * 200, "response": "dropped"}
    source = demonstrations(write_rows(*rows), on_bad_row="skip")
    told: list[tuple[str, int]] = []
    files = []
    for workers in (1, 2, 3):
        folder = tmp_path / f"cache{workers}"
        progress = (lambda name, done: told.append((name, done))) if workers == 2 else None
        build(source, renderer, LENGTHS, cache_dir=folder, workers=workers, progress=progress)
        files += [(file.name, file.read_bytes()) for file in folder.iterdir()]
    assert len(files) == 3 and len(set(files)) == 1
    assert told[-1] == (source.path, 200) and [done for _, done in told] == sorted(done for _, done in told)
    assert len(told) == -(-200 // rows_at_once)


def test_errors_are_the_same_with_any_number_of_processes(
    renderer: Renderer, write_rows: WriteRows, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 7)
    long = write_rows(*(pair(i, "~" * 200 if i == 60 else "Blue.") for i in range(100)), name="long.jsonl")
    bad = write_rows(*(b"{oops" if i % 4 == 0 else pair(i) for i in range(100)), name="bad.jsonl")
    unknown = write_rows({"a": 1}, *(pair(i) for i in range(100)), name="unknown.jsonl")
    strict = replace(LENGTHS, long_response="error")
    for path in (long, bad, unknown):
        messages = set()
        for workers in (1, 2):
            with pytest.raises(UserError) as error:
                build(demonstrations(path), renderer, strict, cache_dir=cache, workers=workers)
            messages.add(str(error.value))
        assert len(messages) == 1 and f"{path}:" in messages.pop()
    assert list(cache.iterdir()) == []


def test_ctrl_c_leaves_nothing_half_made(renderer: Renderer, write_rows: WriteRows, cache: Path) -> None:
    def progress(name: str, rows: int) -> None:
        raise KeyboardInterrupt

    source = demonstrations(write_rows(*(pair(i) for i in range(10))))
    with pytest.raises(KeyboardInterrupt):
        build(source, renderer, LENGTHS, cache_dir=cache, progress=progress)
    assert list(cache.iterdir()) == []


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
