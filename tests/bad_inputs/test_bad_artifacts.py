"""Artifacts, models, tokenizers and chat templates that are missing, damaged, of another shape, version or kind.

`artifact.load` is asked first by every stage; plain Hugging Face folders are opened by transformers, whose errors are of
every kind. The checks of a whole artifact's files are in tests/integration/test_run_artifact.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_pipeline import artifact, resume
from rlhf_pipeline.artifact import MANIFEST, Kind
from rlhf_pipeline.config.schema import ModelConfig, ReadyModelConfig, TokenizerConfig
from rlhf_pipeline.data.chat_templates import load_template
from rlhf_pipeline.errors import UserError, cannot_open
from rlhf_pipeline.files import sealed
from rlhf_pipeline.generation.load import content_hash, open_renderer
from rlhf_pipeline.models.load import load_policy, open_reward_model
from rlhf_pipeline.models.ready import open_model

Change = Callable[[Path], object]
Refused = Callable[..., str]
Damaged = Callable[[Path, Change], Path]
CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
SETTINGS, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"


def write(name: str, content: str | bytes) -> Change:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / name).write_bytes(data)


def edit(name: str, **changes: Any) -> Change:
    """Other values in an object of JSON; `...` takes one out."""

    def change(folder: Path) -> None:
        values = {**json.loads((folder / name).read_text()), **changes}
        (folder / name).write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))

    return change


def replace(name: str, make: Callable[[Path], object]) -> Change:
    """Something else in a file's place."""

    def change(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return change


def cut(name: str, size: int) -> Change:
    return lambda folder: os.truncate(folder / name, size)


remove = [
    lambda path: None,
    lambda path: path.mkdir(),
    lambda path: path.symlink_to("nowhere"),
    lambda path: path.symlink_to(path.name),
    os.mkfifo,
]
NOTHING, FOLDER, DANGLING, CIRCLE, PIPE = remove
AGAIN = "run the stage that makes it again"

MANIFESTS: dict[str, tuple[Change, tuple[str, ...]]] = {
    "none": (replace(MANIFEST, NOTHING), ("no artifact.json in it, so no finished artifact",)),
    "a folder": (replace(MANIFEST, FOLDER), ("artifact.json: cannot be read: ",)),
    "a link to nowhere": (replace(MANIFEST, DANGLING), ("no artifact.json in it",)),
    "a link in a circle": (replace(MANIFEST, CIRCLE), ("artifact.json: cannot be read: ",)),
    "a pipe": (replace(MANIFEST, PIPE), ("artifact.json: cannot be read: not a file",)),
    "empty": (write(MANIFEST, ""), ("artifact.json: not valid JSON", AGAIN)),
    "cut": (cut(MANIFEST, 100), ("artifact.json: not valid JSON", AGAIN)),
    "zeros": (write(MANIFEST, b"\0" * 4096), ("not valid JSON", AGAIN)),
    "no UTF-8": (write(MANIFEST, b'{"a": "\xff"}'), ("not valid JSON", AGAIN)),
    "deep": (write(MANIFEST, "[" * 100_000), ("not valid JSON", AGAIN)),
    "a list": (write(MANIFEST, "[]"), ("not a whole manifest: it is a list", AGAIN)),
    "null": (write(MANIFEST, "null"), ("not a whole manifest", AGAIN)),
    "an empty object": (write(MANIFEST, "{}"), ("artifact format None, this version reads 1",)),
    "newer": (
        edit(MANIFEST, format=2),
        ("artifact format 2, this version reads 1; install the version that wrote it",),
    ),
    "format of text": (edit(MANIFEST, format="1"), ("artifact format 1, this version reads 1",)),
    "no stage": (edit(MANIFEST, stage=...), ("not a whole manifest: 'stage' is missing", AGAIN)),
    "files a list": (edit(MANIFEST, files=[]), ("'files' is []", AGAIN)),
    "files null": (edit(MANIFEST, files=None), ("'files' is None", AGAIN)),
    "a checksum of another type": (edit(MANIFEST, files={CONFIG: 3}), ("'config.json' is no name of a file in it",)),
    "a file outside": (edit(MANIFEST, files={"../x": "0"}), ("'../x' is no name of a file in it",)),
    "a file elsewhere": (edit(MANIFEST, files={"/etc/passwd": "0"}), ("'/etc/passwd' is no name of a file in it",)),
    "a file on a way round": (edit(MANIFEST, files={"a/../../x": "0"}), ("is no name of a file in it",)),
    "no files": (edit(MANIFEST, files={}), ("its content_hash is not that of its files", AGAIN)),
    "another hash": (edit(MANIFEST, content_hash="0" * 64), ("its content_hash is not that of its files", AGAIN)),
    "parents a list": (edit(MANIFEST, parents=[1]), ("'parents' is [1]",)),
    "a parent of text": (edit(MANIFEST, parents={"model": "x"}), ("the parent 'model' is 'x'",)),
    "a parent with more": (edit(MANIFEST, parents={"m": {"path": "x", "evil": 1}}), ("the parent 'm' is {",)),
    "scale of text": (edit(MANIFEST, reward_scale="1"), ("'reward_scale' is '1'",)),
    "vocabulary of text": (edit(MANIFEST, vocab_size="400"), ("'vocab_size' is '400'",)),
    "of another kind": (
        edit(MANIFEST, kind="reward_model"),
        ("is a reward_model (made by rlhf sft), and a policy is",),
    ),
    "of no kind": (edit(MANIFEST, kind="x\ny"), ("is a x",)),
    "kind a list": (edit(MANIFEST, kind=["policy"]), ("'kind' is ['policy']",)),
    "a file missing": (replace(WEIGHTS, NOTHING), ("model.safetensors is missing; copy the whole folder",)),
    "a file a folder": (replace(WEIGHTS, FOLDER), ("model.safetensors is missing",)),
    "a file a pipe": (replace(WEIGHTS, PIPE), ("model.safetensors is missing",)),
    "a file cut": (cut(WEIGHTS, 100), ("model.safetensors is damaged (its checksum differs)",)),
    "a file changed": (edit(CONFIG, bos_token_id=5), ("config.json is damaged (its checksum differs)",)),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_manifest(case: str, refused: Refused, damaged: Damaged, policy: Path) -> None:
    change, words = MANIFESTS[case]
    folder = damaged(policy, change)
    refused(lambda: artifact.load(folder, kind=Kind.policy), str(folder), *words)


def test_manifest_with_what_came_later_is_read(damaged: Damaged, policy: Path) -> None:
    """Fields that this version does not know change nothing while the format is the same."""

    def grow(folder: Path) -> None:
        file = folder / MANIFEST
        file.write_text(json.dumps(sealed({**json.loads(file.read_text()), "colour": "red"})))

    assert artifact.load(damaged(policy, grow), kind=Kind.policy).stage == "sft"


@pytest.mark.parametrize("path", ["", "nowhere", "file", "file/below", "x" * 300])
def test_artifact_that_is_no_folder(path: str, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    refused(lambda: artifact.load(tmp_path / path, kind=Kind.policy))


# Models of transformers: each opened to be sampled from and to be trained

OPENED = "cannot be opened as a causal language model: "
SHAPES = "its weights have other shapes than its config.json says"
MODELS: dict[str, tuple[Change, tuple[str, ...]]] = {
    "config empty": (write(CONFIG, ""), (OPENED, "not a valid JSON file")),
    "config a list": (write(CONFIG, "[]"), (OPENED,)),
    "config null": (write(CONFIG, "null"), (OPENED, "are its files damaged?")),
    "config deep": (write(CONFIG, "[" * 100_000), (OPENED, "RecursionError")),
    "config no UTF-8": (write(CONFIG, b"\xff\xfe\0"), (OPENED, "not a valid JSON file")),
    "config without a type": (write(CONFIG, "{}"), (OPENED, "Should have a `model_type` key")),
    "unknown family": (edit(CONFIG, model_type="gpt9"), (OPENED, "`gpt9`")),
    "family a number": (edit(CONFIG, model_type=3), (OPENED,)),
    "width of text": (edit(CONFIG, hidden_size="big"), (OPENED, "hidden_size")),
    "width negative": (edit(CONFIG, hidden_size=-1), (OPENED, "-1")),
    "another width": (edit(CONFIG, hidden_size=64), (OPENED, SHAPES)),
    "another vocabulary": (edit(CONFIG, vocab_size=10), (OPENED, SHAPES)),
    "more layers": (edit(CONFIG, num_hidden_layers=3), ("holds no whole causal language model", "model.layers.2")),
    "no such dtype": (edit(CONFIG, dtype="float7"), (OPENED, "float7")),
    "no such activation": (edit(CONFIG, hidden_act="nope"), (OPENED, "nope")),
    "heads that do not divide": (edit(CONFIG, num_attention_heads=5), (OPENED, "multiple of the number of")),
    "code of its own": (
        edit(CONFIG, model_type="evil", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}),
        (OPENED, "custom code"),
    ),
    "generation a list": (write("generation_config.json", "[]"), (OPENED, "are its files damaged?")),
    "no weights": (replace(WEIGHTS, NOTHING), (OPENED, "no file named model.safetensors")),
    "weights empty": (write(WEIGHTS, b""), (OPENED, "header too small", "damaged?")),
    "weights cut": (cut(WEIGHTS, 5000), (OPENED, "file not fully covered", "damaged?")),
    "weights of text": (write(WEIGHTS, b"x" * 5000), (OPENED, "header too large", "damaged?")),
    "weights a folder": (replace(WEIGHTS, FOLDER), (OPENED, "no file named model.safetensors")),
    "weights a link to nowhere": (replace(WEIGHTS, DANGLING), (OPENED, "no file named model.safetensors")),
    "weights a pipe": (replace(WEIGHTS, PIPE), (OPENED, "no file named model.safetensors")),
    "weights elsewhere": (
        replace(
            WEIGHTS,
            lambda path: path.with_name("model.safetensors.index.json").write_text(
                '{"metadata": {}, "weight_map": {"a": "../../gone.safetensors"}}'
            ),
        ),
        (OPENED, "gone.safetensors"),
    ),
}


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> Any:
    return open_renderer(ReadyModelConfig(path=str(base)), TokenizerConfig()).tokenizer


@pytest.mark.parametrize("case", MODELS)
def test_model(case: str, refused: Refused, damaged: Damaged, base: Path, tokenizer: Any) -> None:
    change, words = MODELS[case]
    ready = ReadyModelConfig(path=str(damaged(base, change)))
    asked = ModelConfig(path=ready.path)
    cpu = torch.device("cpu")

    def sampled() -> None:
        content_hash(ready)
        open_model(ready, tokenizer, "cpu")

    refused(sampled, f"model.path={ready.path}: ", *words)
    refused(
        lambda: load_policy(asked, tokenizer=tokenizer, seed=0, device=cpu, deepspeed_config=None),
        f"model.path={ready.path}: ",
        *words,
    )


@pytest.mark.parametrize("make", [NOTHING, FOLDER, DANGLING, CIRCLE, PIPE])
def test_config_that_is_no_file(make: Callable[[Path], object], refused: Refused, damaged: Damaged, base: Path) -> None:
    ready = ReadyModelConfig(path=str(damaged(base, replace(CONFIG, make))))
    refused(lambda: open_renderer(ready, TokenizerConfig()), "no model in this folder (config.json is not there)")


def test_vocabulary_smaller_than_the_ids(refused: Refused, damaged: Damaged, base: Path) -> None:
    def more(folder: Path) -> None:
        from transformers import AutoTokenizer

        larger = AutoTokenizer.from_pretrained(folder)
        larger.add_tokens([f"<x{i}>" for i in range(400)])
        larger.save_pretrained(folder)

    ready = ReadyModelConfig(path=str(damaged(base, more)))
    large = open_renderer(ready, TokenizerConfig()).tokenizer
    words = ("tokenizer: it has ", "embeddings for 400", "the tokenizer the model was trained with")
    refused(lambda: open_model(ready, large, "cpu"), *words)
    asked, cpu = ModelConfig(path=ready.path), torch.device("cpu")
    refused(lambda: load_policy(asked, tokenizer=large, seed=0, device=cpu, deepspeed_config=None), "400")


def test_language_model_where_a_reward_model_is_needed(refused: Refused, base: Path, tokenizer: Any) -> None:
    ready = ReadyModelConfig(path=str(base))
    words = (f"model.path={base}: holds no reward model: score.weight is missing", "rlhf rm makes one")
    refused(lambda: open_reward_model(ready, tokenizer, torch.device("cpu")), *words)


def test_no_memory_is_no_users_mistake() -> None:
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory")):
        with pytest.raises(type(error)):
            cannot_open("m", "model", error)


# Tokenizers and their chat templates

NO_TOKENIZER = "no tokenizer can be opened there; name one with tokenizer.path=..."
NO_ANSWER = "the chat template renders no question and answer"
TOKENIZERS: dict[str, tuple[Change, tuple[str, ...]]] = {
    "none": (replace(TOKENIZER, NOTHING), (NO_TOKENIZER,)),
    "empty": (write(TOKENIZER, ""), (NO_TOKENIZER, "are its files damaged?")),
    "an empty object": (write(TOKENIZER, "{}"), (NO_TOKENIZER, "are its files damaged?")),
    "a list": (write(TOKENIZER, "[]"), (NO_TOKENIZER, "are its files damaged?")),
    "no UTF-8": (write(TOKENIZER, b"\xff\0"), (NO_TOKENIZER, "are its files damaged?")),
    "cut": (cut(TOKENIZER, 2000), (NO_TOKENIZER, "are its files damaged?")),
    "a pipe": (replace(TOKENIZER, PIPE), (NO_TOKENIZER,)),
    "settings empty": (write(SETTINGS, ""), (NO_TOKENIZER, "are its files damaged?")),
    "settings a list": (write(SETTINGS, "[]"), (NO_TOKENIZER, "are its files damaged?")),
    "end token a number": (edit(SETTINGS, eos_token=3), (NO_TOKENIZER, "eos_token")),
    "no end token": (edit(SETTINGS, eos_token=None), ("the tokenizer has no end token; set its eos_token",)),
    "no template": (replace(TEMPLATE, NOTHING), ("the tokenizer has no chat template. Set tokenizer.template to",)),
    "template empty": (write(TEMPLATE, ""), ("the tokenizer has no chat template",)),
    "template no UTF-8": (write(TEMPLATE, b"\xff\xfe"), (NO_TOKENIZER, "are its files damaged?")),
    "template no Jinja": (write(TEMPLATE, "{% for x %}"), (NO_ANSWER, "expected token 'in'", "Set tokenizer.template")),
    "template divides by zero": (write(TEMPLATE, "{{ 1 / 0 }}"), (NO_ANSWER, "division by zero")),
    "template enormous": (write(TEMPLATE, "{{ range(10**9) | list }}"), (NO_ANSWER, "Range too big")),
    "template of undefined": (write(TEMPLATE, "{{ a.b.c }}"), (NO_ANSWER, "'a' is undefined")),
    "template reaches out": (write(TEMPLATE, "{{ ''.__class__.__mro__ }}"), (NO_ANSWER, "__class__", "unsafe")),
    "template says the same": (write(TEMPLATE, "hello"), ("ends the assistant's turn with none of",)),
    "template without end": (
        write(
            TEMPLATE,
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}",
        ),
        ("ends the assistant's turn with none of the tokenizer's special tokens",),
    ),
    "template without generation prompt": (
        write(TEMPLATE, "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"),
        ("the chat template has no generation prompt", "'assistant: ' would be learned", "Set tokenizer.template"),
    ),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_tokenizer(case: str, refused: Refused, damaged: Damaged, base: Path) -> None:
    change, words = TOKENIZERS[case]
    folder = damaged(base, change)
    refused(lambda: open_renderer(ReadyModelConfig(path=str(folder)), TokenizerConfig()), str(folder), *words)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("gone.jinja", None, "no chat template "),
        ("x" * 5000, None, "cannot be read: File name too long"),
        ("utf16.jinja", "x".encode("utf-16"), "not UTF-8"),
        (".", None, "no chat template "),
    ],
    ids=["gone", "long", "UTF-16", "folder"],
)
def test_template_file(name: str, content: bytes | None, words: str, refused: Refused, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    refused(lambda: load_template(str(tmp_path / name), tmp_path), words)


# Resume states: a damaged one is passed over for the one before, and a state names files of its own folder only

STATES: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "damaged"),
    "a list": ("[]", "damaged"),
    "no UTF-8": (b"\xff", "damaged"),
    "deep": ("[" * 100_000, "damaged"),
    "nothing in it": ("{}", "damaged"),
    "newer": ('{"format": 99, "files": {}}', "was written by another version (its format is 99"),
    "files a list": ('{"format": 2, "files": ["x"]}', "damaged"),
    "a file missing": ('{"format": 2, "files": {"rank_00000.safetensors": "0"}}', "damaged"),
    "a file elsewhere": ('{"format": 2, "files": {"../../secret": "0"}}', "damaged (../../secret)"),
    "an absolute file": ('{"format": 2, "files": {"/etc/passwd": "0"}}', "damaged (/etc/passwd)"),
    "a pickle": ('{"format": 2, "files": {"rank_00000.pt": "0"}}', "damaged (rank_00000.pt)"),
}


@pytest.mark.parametrize("case", STATES)
def test_state(case: str, tmp_path: Path) -> None:
    content, words = STATES[case]
    whole, broken = (tmp_path / "state" / f"step_{step:08d}" for step in (1, 2))
    whole.mkdir(parents=True)
    broken.mkdir()
    (whole / "state.json").write_text('{"format": 2, "files": {}}')
    (broken / "state.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    found, (warning,) = resume.find(tmp_path)
    assert found is not None and found.step == 1
    assert warning.startswith(f"{broken}: ") and words in warning and "going back to the state before it" in warning


@pytest.mark.parametrize("make", [FOLDER, DANGLING, CIRCLE, PIPE])
def test_state_that_is_no_file(make: Callable[[Path], object], tmp_path: Path) -> None:
    folder = tmp_path / "state" / "step_00000001"
    folder.mkdir(parents=True)
    make(folder / "state.json")
    found, (warning,) = resume.find(tmp_path)
    assert found is None and "damaged" in warning


# A handful of whole commands

TRAIN = ["data.train=train.jsonl", "tracking.progress=false"]
COMMANDS: dict[str, tuple[Change, list[str], tuple[str, ...]]] = {
    "newer": (edit(MANIFEST, format=2), ["sft", "model.path=damaged", *TRAIN], ("damaged: artifact format 2",)),
    "cut": (cut(WEIGHTS, 100), ["generate", "model.path=damaged", "prompts.path=train.jsonl"], ("is damaged",)),
    "of another kind": (
        edit(MANIFEST, kind="reward_model"),
        ["sft", "model.path=damaged", *TRAIN],
        ("is a reward_model",),
    ),
    "no end token": (
        edit(SETTINGS, eos_token=None),
        ["prep", "sft", "model.path=damaged", *TRAIN],
        ("damaged: the tokenizer has no end token",),
    ),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_command(case: str, command: Callable[..., str], damaged: Damaged, policy: Path, tmp_path: Path) -> None:
    from helpers_runs import dialogues, write_jsonl

    change, arguments, words = COMMANDS[case]
    damaged(policy, change)
    write_jsonl(tmp_path / "train.jsonl", dialogues(8))
    command(2, words, *arguments)


def test_errors_are_the_users() -> None:
    """Who calls `cannot_open` gets what reaches the terminal as a message."""
    assert isinstance(cannot_open("m", "model", KeyError("x")), UserError)
