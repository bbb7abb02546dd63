"""Anything at all, given to the readers of answers and prompts, the renderer, the tree builder, the artifact loader.

Whatever it is, it is taken or refused in words: a UserError, or a BadRow that the caller counts. Nothing else is raised.
The readers of files have properties of their own in tests/unit/data/test_properties_readers.py, the renderer in
test_properties_renderer.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import check_message
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_pipeline import artifact
from rlhf_pipeline.artifact import MANIFEST, Kind
from rlhf_pipeline.config.schema import AnswersConfig, OnBadRow, ReadyModelConfig, TokenizerConfig
from rlhf_pipeline.data.dataset import Source, build
from rlhf_pipeline.data.encode import Lengths
from rlhf_pipeline.data.format_table import FORMATS
from rlhf_pipeline.data.format_table import Kind as Wanted
from rlhf_pipeline.data.formats import detect, to_records
from rlhf_pipeline.data.prompts import Renderer
from rlhf_pipeline.data.records import BadRow, Message
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.generation.load import open_renderer
from rlhf_pipeline.hydra_bridge import names_folder, quoted
from rlhf_pipeline.scoring.answers import read_answers

# The same examples in every run: a red test means that the code has changed, never that it had bad luck. No deadline,
# because machines are busy at times.
fixed = settings(max_examples=30, deadline=None, derandomize=True, database=None)
many = settings(fixed, max_examples=100)

KINDS: tuple[Wanted, ...] = ("text", "demonstration", "ranking", "feedback", "prompt")
_FIELDS = sorted(
    {name for format in FORMATS.values() for name in format.fields} | {"metadata", "margin", "finish_reason"}
)
_texts = st.text(max_size=8) | st.sampled_from(
    ["\n\nHuman: x\n\nAssistant:", "\n\nHuman: x\n\nAssistant: y", "<|eos|>", "<|im_start|>user\n", " ", "\0", "\x1b[2J",
     "\u202e", "\ud800", "assistant", "user", "system", "1", "NaN", "true", "good", "\U000f0000"]
)  # fmt: skip
_names = st.sampled_from(
    ["role", "content", "from", "value", "text", "replies", "rank", "answer", "overall_score", *_FIELDS]
)
_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**30) | st.floats() | _texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_names | _texts, inner, max_size=4),
    max_leaves=8,
)
_message = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": _texts})
rows = st.dictionaries(st.sampled_from(_FIELDS), _values | _texts | st.lists(_message, max_size=4), max_size=4)


@many
@given(row=rows, kind=st.sampled_from(KINDS), format=st.sampled_from(["auto", *FORMATS]))
def test_any_row_is_records_or_a_reason(row: dict[str, Any], kind: Wanted, format: str) -> None:
    try:
        found = to_records(row, kind, detect(row, kind) if format == "auto" else format)
    except (BadRow, UserError) as refused:
        assert str(refused)
    else:
        assert found


@fixed
@given(given_rows=st.lists(rows, max_size=4), format=st.sampled_from(["auto", *FORMATS, "responses"]))
def test_any_answers_are_read_or_a_reason_is_given(
    given_rows: list[dict[str, Any]], format: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzzed.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in given_rows))
    try:
        found = read_answers(AnswersConfig(path=str(file), format=format, on_bad_row=OnBadRow.skip))
    except UserError as refused:
        assert str(refused)
    else:
        assert found.rows and all(len(row.responses) == len(row.finished) for row in found.rows)


@pytest.fixture(scope="module")
def renderer(base: Path) -> Renderer:
    return open_renderer(ReadyModelConfig(path=str(base)), TokenizerConfig())


def test_any_conversation_is_rendered_or_refused(renderer: Renderer) -> None:
    @many
    @given(turns=st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), _texts), min_size=1, max_size=5))
    def holds(turns: list[tuple[str, str]]) -> None:
        try:
            messages = [Message(role, text) for role, text in turns]
            if messages[-1].role == "assistant":
                tokens, scored = renderer.encode(messages)
                assert tokens.shape == scored.shape and scored.any()
            else:
                assert len(renderer.encode_prompt(messages))
        except BadRow as refused:
            assert str(refused)

    holds()


def test_any_rows_become_whole_trees_or_are_refused(renderer: Renderer, tmp_path: Path) -> None:
    """Trees never hold more than was asked for, nor an id that the tokenizer does not have."""
    lengths = Lengths(max_length=32, max_prompt_length=16, long_prompt="keep_end", long_response="cut")
    count = 0

    @fixed
    @given(given_rows=st.lists(rows, min_size=1, max_size=4), kind=st.sampled_from(KINDS))
    def holds(given_rows: list[dict[str, Any]], kind: Wanted) -> None:
        nonlocal count
        count += 1
        file = tmp_path / f"{count}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in given_rows))
        try:
            trees = build(
                Source(path=str(file), kind=kind, on_bad_row="skip"), renderer, lengths, cache_dir=tmp_path / "cache"
            )
        except UserError as refused:
            check_message(str(refused).replace("\0", ""), ())
            return
        for tree in (trees[i] for i in range(len(trees))):
            assert kind == "prompt" or tree.responses
            for tokens in (tree.prompt, *tree.responses):
                assert tokens.dtype == np.int32 and (tokens >= 0).all() and (tokens < len(renderer.tokenizer)).all()
            assert all(len(tree.prompt) + len(response) <= 32 for response in tree.responses)

    holds()


@cache
def _content(file: Path) -> bytes:
    return file.read_bytes()


_TYPES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.integers(), max_size=2)
)
_junk = _TYPES | st.dictionaries(st.text(max_size=5), _TYPES, max_size=2)


def _loads_or_refuses(folder: Path) -> None:
    try:
        manifest = artifact.load(folder, kind=Kind.policy)
    except UserError as refused:
        assert str(refused).startswith(str(folder))
    else:
        assert manifest.kind is Kind.policy and manifest.files


@pytest.fixture
def loaded(policy: Path, tmp_path: Path) -> Callable[[bytes], None]:
    """loaded(content of artifact.json): the artifact is taken or refused in words."""
    folder = tmp_path / "fuzzed"
    shutil.copytree(policy, folder)

    def load(content: bytes) -> None:
        (folder / MANIFEST).write_bytes(content)
        _loads_or_refuses(folder)

    return load


def test_a_manifest_with_any_value_is_taken_or_refused(loaded: Callable[[bytes], None], policy: Path) -> None:
    whole = json.loads(_content(policy / MANIFEST))

    @many
    @given(name=st.sampled_from(sorted(whole)), value=_junk)
    def holds(name: str, value: Any) -> None:
        loaded(json.dumps({**whole, name: value}).encode())

    holds()


def test_a_manifest_with_any_damage_is_taken_or_refused(loaded: Callable[[bytes], None], policy: Path) -> None:
    whole = _content(policy / MANIFEST)

    @many
    @given(at=st.integers(0, len(whole)), gone=st.integers(0, 40), new=st.binary(max_size=10))
    def holds(at: int, gone: int, new: bytes) -> None:
        loaded(whole[:at] + new + whole[at + gone :])

    holds()


@many
@given(text=st.text(max_size=30) | st.text("${}\\'\"=,[]: ", max_size=12))
def test_any_folder_named_on_the_command_line_stays_as_it_is(text: str) -> None:
    """`rlhf report <folder>` hands Hydra a value, which must not be read as anything else."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    text = text.replace("\0", "")
    value = OverridesParser.create().parse_override(f"folder={quoted(text)}").value()
    assert OmegaConf.create({"folder": value}).folder == text
    names_folder(text)
