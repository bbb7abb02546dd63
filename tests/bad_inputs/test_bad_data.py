"""Prompts, answers and data templates as people may give them: other shapes, other encodings, ragged, enormous, empty.

The rows of training data have a corpus of their own, tests/unit/data/test_bad_files.py; the readers below are the same,
and what is tried here is what the other commands do with the rows.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers_runs import dialogues, write_jsonl

from rlhf_pipeline.config.schema import AnswersConfig, PromptsConfig, ReadyModelConfig, TokenizerConfig
from rlhf_pipeline.data import templates
from rlhf_pipeline.data.prompts import Renderer
from rlhf_pipeline.data.records import BadRow
from rlhf_pipeline.generation.load import open_renderer
from rlhf_pipeline.generation.prompts import read_prompts
from rlhf_pipeline.generation.responses import line_of, merge, read_lines
from rlhf_pipeline.scoring.answers import read_answers

Refused = Callable[..., str]


def lines(*rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def asking(content: Any, role: str = "user") -> bytes:
    return lines({"prompt": [{"role": role, "content": content}]})


@pytest.fixture(scope="module")
def renderer(base: Path) -> Renderer:
    return open_renderer(ReadyModelConfig(path=str(base)), TokenizerConfig())


# (name of the file, content, words of the message in their order)
PROMPTS: list[tuple[str, bytes, tuple[str, ...]]] = [
    ("empty.jsonl", b"", ("empty.jsonl: no prompt in it to answer",)),
    ("blank.jsonl", b"\n \n\t\n", ("no prompt in it to answer",)),
    ("empty.txt", b"", ("no prompt in it to answer",)),
    ("empty.csv", b"prompt\n", ("no prompt in it to answer",)),
    ("bytes.txt", b"\xff\xfe\n", ("1 rows of prompts.path=", "bytes.txt:1: not UTF-8", "on_bad_row=skip")),
    (
        "number.jsonl",
        lines({"prompt": 3}),
        ("number.jsonl:1: no format makes a prompt of rows with the fields prompt",),
    ),
    ("null.jsonl", lines({"prompt": None}), ("prompt (empty)",)),
    ("object.jsonl", lines({"prompt": {}}), ("prompt (an object)",)),
    ("list.jsonl", lines({"prompt": []}), ("prompt (a list)",)),
    ("spaces.jsonl", lines({"prompt": "  "}), ("spaces.jsonl:1: the user message is empty",)),
    ("role.jsonl", asking("x", role="robot"), ("unknown role: 'robot'; known are system, user, assistant",)),
    ("content.jsonl", asking(3), ("content is not a string: int",)),
    ("answered.jsonl", asking("x", role="assistant"), ("the prompt has no user message",)),
    ("half.jsonl", b'{"prompt": "\\ud800"}\n', ("not valid Unicode: a lone surrogate",)),
    ("marks.jsonl", lines({"prompt": "\U000f0000"}), ("U+F0000 or U+F0001, which serve as marks",)),
    ("enormous.jsonl", lines({"prompt": "a " * 200_000}), ("no prompt in it to answer", "more than 255 tokens")),
    ("deep.jsonl", b'{"prompt": ' + b"[" * 100_000 + b"\n", ("deep.jsonl:1: not JSON",)),
    ("ragged.csv", b"prompt,a\nx\ny,1,2\n", ("2 rows", "ragged.csv:2: wrong number of fields: 1, the header has 2")),
    ("headless.csv", b"hello,world\n1,2\n", ("headless.csv:2: no format makes a prompt", "hello (a string)")),
    ("quote.csv", b'prompt\n"abc\n', ("quote.csv:2: not CSV: unexpected end of data",)),
    ("twice.csv", b"prompt,prompt\nx,y\n", ("a column named 'prompt' is there more than once",)),
    ("short.tsv", b"prompt\ta\nx\n", ("short.tsv:2: wrong number of fields",)),
    ("number.json", b"3", ("number.json:1: not a JSON object: int",)),
    ("numbers.json", b"[1,2]", ("2 rows", "numbers.json:row 1: not a JSON object: int")),
    ("cut.json", b'[{"prompt":"x"},', ("cut.json: not a JSON array: after row 1: the file ends within it",)),
    ("nan.jsonl", b'{"prompt": NaN}\n', ("prompt (a number)",)),
    ("digits.jsonl", b'{"prompt": ' + b"9" * 10_000 + b"}\n", ("digits.jsonl:1: not JSON: Exceeds the limit",)),
    ("utf16.jsonl", '{"prompt":"x"}\n'.encode("utf-16"), ("utf16.jsonl:1: not UTF-8: byte 0xff at position 0",)),
    ("zip.jsonl.gz", b"PK\x03\x04", ("zip.jsonl.gz: the gzip file is damaged", "copy it again")),
    ("none.parquet", b"PAR1", ("none.parquet",)),
    ("sheet.xlsx", b"PK\x03\x04", ("sheet.xlsx: not a kind of file that is read",)),
]


@pytest.mark.parametrize(
    ("name", "content", "words"), PROMPTS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_prompts(
    name: str, content: bytes, words: tuple[str, ...], refused: Refused, renderer: Renderer, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    refused(lambda: read_prompts(PromptsConfig(path=str(tmp_path / name)), renderer, context=256), *words)


RESPONSES: dict[str, Any] = {"prompt": "x", "responses": ["a", "b"]}
ANSWERS: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "empty": (b"", ("no answer in it to score",)),
    "number": (lines({"prompt": "x", "response": 3}), ("answers.jsonl:1: no answer is found in the row", "a number")),
    "null": (lines({"prompt": "x", "response": None}), ("no answer is found in the row",)),
    "a string of answers": (lines({"prompt": "x", "responses": "ab"}), ("no answer is found in the row",)),
    "no answers": (lines({"prompt": "x", "responses": []}), ("answers.jsonl:1: the list of responses is empty",)),
    "other things": (lines({"prompt": "x", "responses": ["a", 3]}), ("a response is not a string: int",)),
    "scores missing": (lines({**RESPONSES, "scores": [1]}), ("ranks do not fit the responses",)),
    "scores NaN": (b'{"prompt":"x","responses":["a","b"],"scores":[NaN,1]}\n', ("scores is not a finite number",)),
    "scores inf": (b'{"prompt":"x","responses":["a","b"],"scores":[1e999,1]}\n', ("is not a finite number",)),
    "scores enormous": (lines({**RESPONSES, "scores": [10**400, 1]}), ("is not a number: 1000",)),
    "ranks disagree": (lines({**RESPONSES, "scores": [1, 2], "ranks": [0, 1]}), ("ranks and scores disagree",)),
    "reasons missing": (lines({**RESPONSES, "finish_reason": ["stop"]}), ("finish_reason does not fit",)),
    "half a character": (b'{"prompt":"x","response":"\\ud800"}\n', ("not valid Unicode: a lone surrogate",)),
    "a list": (b"[1]\n", ("answers.jsonl:1: not a JSON object: list",)),
    "a tree of another kind": (
        lines({"prompt": {"text": "x", "replies": 3}}),
        ("no answer is found", "prompt (an object)"),
    ),
    "pairs without a prompt": (lines({"chosen": "a", "rejected": "b"}), ("no answer is found", "chosen (a string)")),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_answers(case: str, refused: Refused, tmp_path: Path) -> None:
    content, words = ANSWERS[case]
    (tmp_path / "answers.jsonl").write_bytes(content)
    refused(lambda: read_answers(AnswersConfig(path=str(tmp_path / "answers.jsonl"))), *words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("caf\u00e9\n".encode("latin-1"), "stdin:1: not UTF-8"),
        (b'{"prompt":"x"}\n3\n', "stdin:2: not a JSON object: int"),
        (b"", "prompts.path=-: no prompt in it to answer"),
    ],
)
def test_standard_input(
    content: bytes, words: str, refused: Refused, renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    refused(lambda: read_prompts(PromptsConfig(path="-"), renderer, context=256), words)


# What an interrupted `rlhf generate` finds of itself


@pytest.mark.parametrize("line", ["3", "{}", '{"index": 1}', "\0\0\0", '{"index": 0, "sample"', "[" * 3])
def test_answers_file_of_somebody_else(line: str, refused: Refused, tmp_path: Path) -> None:
    file = tmp_path / "responses.jsonl"
    file.write_text('{"index": 0, "sample": 0}\n' + line + "\n")
    refused(lambda: list(read_lines(file)), "responses.jsonl:2: not an answer of rlhf generate", "remove the file")


def test_half_characters_of_other_columns_survive(tmp_path: Path) -> None:
    """A column nobody reads may hold what UTF-8 cannot: it is written as JSON has it, and is no error at the end."""
    row = {"index": 0, "sample": 0, "note": "half \ud83d, whole \U0001f642, caf\u00e9"}
    (tmp_path / "responses.partial-0.jsonl").write_text(line_of(row), encoding="utf-8")
    merge(tmp_path, tmp_path / "out.jsonl")
    assert json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8")) == row
    assert "\u00e9" in line_of({"a": "caf\u00e9"})  # others stay readable


# Data templates: YAML and Jinja from other people

ONE = "templates: [{name: a, prompt: x, response: y}]"
TEMPLATES: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "empty": (b"", ("t.yaml: not a mapping",)),
    "a list": (b"- a", ("not a mapping",)),
    "not closed": (b"a: [", ("t.yaml: not a YAML file",)),
    "bytes": (b"\xff\0", ("t.yaml: not a YAML file",)),
    "no date": (b"templates: 2020-99-99", ("not a YAML file: month must be in 1..12",)),
    "deep": (b"[" * 5000, ("not a YAML file",)),
    "an object": (b"!!python/object/apply:os.getcwd []", ("not a YAML file: could not determine a constructor",)),
    "unknown key": (b"x: 1", ("unknown key 'x'; known are templates",)),
    "key of a number": (b"1: 2", ("unknown key 1",)),
    "no list": (b"templates: x", ("templates is 'x'; it must be a list",)),
    "none": (b"templates: []", ("no templates in it",)),
    "of another shape": (b"templates: [3]", ("template 1: not a mapping",)),
    "no prompt": (b"templates: [{name: a}]", ("template 1: no 'prompt'",)),
    "no Jinja": (b"templates: [{name: a, prompt: '{% if', response: x}]", ("its prompt is not Jinja",)),
    "weight": (
        b"templates: [{name: a, prompt: x, response: y, weight: -1}]",
        ("weight is -1; it must be more than 0",),
    ),
    "weight NaN": (b"templates: [{name: a, prompt: x, response: y, weight: .nan}]", ("weight is nan",)),
    "choose": (f"choose: most\n{ONE}".encode(), ("choose is 'most'; it is one or all",)),
    "exemplars": (f"exemplars: 1.5\n{ONE}".encode(), ("exemplars is 1.5; it must be a whole number",)),
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_data_templates(case: str, refused: Refused, tmp_path: Path) -> None:
    content, words = TEMPLATES[case]
    (tmp_path / "t.yaml").write_bytes(content)
    refused(lambda: templates.load(str(tmp_path / "t.yaml")), *words)


@pytest.mark.parametrize("name", ["gone", "", "x" * 5000, "pipe.yaml", "."])
def test_data_templates_that_are_no_file(name: str, refused: Refused, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    refused(lambda: templates.load(str(tmp_path / name)), "data.templates=")


@pytest.mark.parametrize(
    "prompt",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ range(10**9) | list }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ row.update({'x': 1}) }}",
        "{{ 1 / 0 }}",
    ],
)
def test_data_template_that_would_do_more(prompt: str, tmp_path: Path) -> None:
    """The sandbox lets it see the row and nothing else."""
    (tmp_path / "t.yaml").write_text(json.dumps({"templates": [{"name": "a", "prompt": prompt, "response": "y"}]}))
    with pytest.raises(BadRow, match="the prompt of data template 'a' cannot be made"):
        templates.load(str(tmp_path / "t.yaml")).records({"a": 1}, "x:1", [], 0)


# A handful of whole commands: the same messages reach the terminal, and nothing is left behind

COMMANDS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "generate": (["generate", "model.path=base", "prompts.path=cut.json"], ("cut.json: not a JSON array",)),
    "score": (["score", "model.path=base", "data.path=gone.jsonl"], ("gone.jsonl: no such file",)),
    "sft": (
        ["sft", "model.path=base", "data.train=cut.json", "tracking.progress=false"],
        ("cut.json: not a JSON array",),
    ),
    "prep": (["prep", "data.train=cut.json"], ("cut.json: not a JSON array",)),
    "ragged": (["sft", "model.path=base", "data.train=ragged.csv", "tracking.progress=false"], ("ragged.csv:3",)),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_command(case: str, command: Callable[..., str], tmp_path: Path, base: Path) -> None:
    arguments, words = COMMANDS[case]
    (tmp_path / "base").symlink_to(base)
    (tmp_path / "cut.json").write_text('[{"prompt": "x", "response": "y"},')
    (tmp_path / "ragged.csv").write_text("prompt,response\na,b\nc\n")
    write_jsonl(tmp_path / "good.jsonl", dialogues(4))
    command(2, words, *arguments)
