"""A tokenizer trained on the spot, files to read, and a cache for what is made of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rlhf_pipeline.data import dataset as module
from rlhf_pipeline.data.prompts import Renderer, load_template

CONF = Path(__file__).parents[3] / "conf"
CORPUS = ["Human: how are you today? Assistant: I am well, thank you. The sky is blue and the grass is green."] * 4
MakeTokenizer = Callable[..., PreTrainedTokenizerFast]


def _train(kind: str) -> Tokenizer:
    """`bytes` as GPT-2 has it; `metaspace` as Llama 2 has it, with a space put before whatever is tokenised.

    `breaks` is like `metaspace` and has a token for two line breaks.
    """
    corpus = [*CORPUS, *["a\n\nb"] * 8] if kind == "breaks" else CORPUS
    tokenizer = Tokenizer(models.BPE(byte_fallback=kind != "bytes", unk_token="<|unk|>"))
    alphabet: list[str] = []
    if kind != "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
        tokenizer.decoder = decoders.Sequence([decoders.Metaspace(prepend_scheme="always"), decoders.ByteFallback()])
        alphabet = [chr(i) for i in range(32, 127)] + ["\n"]
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|pad|>", "<|bos|>", "<|eos|>", "<|unk|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def _backends() -> dict[str, str]:
    return {kind: _train(kind).to_str() for kind in ("bytes", "metaspace", "breaks")}


@pytest.fixture
def make_tokenizer(_backends: dict[str, str]) -> MakeTokenizer:
    """make_tokenizer(template name or text, kind=..., extra=special tokens to add, **wrapper's arguments)."""

    def make(
        template: str | None = "dialogue", *, kind: str = "bytes", extra: tuple[str, ...] = (), **arguments: Any
    ) -> PreTrainedTokenizerFast:
        special = {"pad_token": "<|pad|>", "bos_token": "<|bos|>", "eos_token": "<|eos|>"} | arguments
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(_backends[kind]), clean_up_tokenization_spaces=False, **special
        )
        extra = ("<|im_start|>", "<|im_end|>", *extra) if template == "chatml" else extra
        tokenizer.add_tokens(list(extra), special_tokens=True)
        if template is not None:
            tokenizer.chat_template = load_template(template, CONF) if template.isalpha() else template
        return tokenizer

    return make


@pytest.fixture
def renderer(make_tokenizer: MakeTokenizer) -> Renderer:
    return Renderer(make_tokenizer())


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., str]:
    """Writes rows (dicts, or raw lines as str or bytes) as a .jsonl file and returns its path."""

    def write(*rows: Any, name: str = "data.jsonl") -> str:
        lines = [
            row if isinstance(row, bytes) else row.encode() if isinstance(row, str) else _json(row) for row in rows
        ]
        file = tmp_path / name
        file.write_bytes(b"".join(line + b"\n" for line in lines))
        return str(file)

    return write


def _json(row: Any) -> bytes:
    return json.dumps(row).encode()


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
