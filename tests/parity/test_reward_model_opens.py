"""How a reward model opens: its head, its padding token, and what transformers alone makes of it.

Artifacts through the command line are in tests/integration; here are tokenizers and models of all kinds.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_rankings import model_for, small_tokenizer
from helpers_runs import make_base
from torch import Tensor

from rlhf_pipeline.config.schema import Attention, ModelConfig
from rlhf_pipeline.data.packing import pack
from rlhf_pipeline.data.prompts import Renderer
from rlhf_pipeline.data.tokenizer import with_own_pad
from rlhf_pipeline.data.tree import Tree
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.models.load import load_policy, load_scorer
from rlhf_pipeline.models.tree_model import TreeBatch

CPU = torch.device("cpu")


# The padding token


END, BOS, PAD, UNK, TURN = "<|end|>", "<|bos|>", "<|pad|>", "<|unk|>", "<|turn|>"
# what there is, the roles, and which token pads in the end
TOKENIZERS: dict[str, tuple[list[str], dict[str, str], str]] = {
    "a pad of its own": ([END, BOS, PAD], {"eos_token": END, "bos_token": BOS, "pad_token": PAD}, PAD),
    "pad is the end": ([END, BOS, TURN], {"eos_token": END, "bos_token": BOS, "pad_token": END}, BOS),
    "no pad": ([END, BOS], {"eos_token": END, "bos_token": BOS}, BOS),
    "the end is the start": ([END, TURN], {"eos_token": END, "bos_token": END, "pad_token": END}, TURN),
    "one token for everything": ([END], {"eos_token": END, "bos_token": END, "unk_token": END, "pad_token": END}, PAD),
    "one token and no pad": ([END], {"eos_token": END}, PAD),
    "pad is unknown words": ([UNK, END, BOS], {"eos_token": END, "bos_token": BOS, "unk_token": UNK, "pad_token": UNK}, BOS),
    "nothing but unknown words": ([UNK, END], {"eos_token": END, "unk_token": UNK, "pad_token": UNK}, PAD),
}  # fmt: skip


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_padding_token_that_no_answer_ends_with(name: str) -> None:
    special, roles, expected = TOKENIZERS[name]
    tokenizer = small_tokenizer(special, **roles)
    renderer = Renderer(tokenizer)
    before = (tokenizer.pad_token, len(tokenizer), renderer.tokenizer_hash)
    own = with_own_pad(tokenizer, renderer.end_ids)
    assert own.pad_token == expected
    assert own.pad_token_id not in renderer.end_ids and own.pad_token_id != own.unk_token_id
    assert len(own) == len(tokenizer) + (expected == PAD and PAD not in special)
    assert own.convert_ids_to_tokens(own.pad_token_id) == expected
    assert (own.eos_token, own.bos_token, own.chat_template) == (
        tokenizer.eos_token,
        tokenizer.bos_token,
        tokenizer.chat_template,
    )
    assert (tokenizer.pad_token, len(tokenizer), Renderer(tokenizer).tokenizer_hash) == before, "it is a copy"
    text = "user: a<|end|>assistant: naïve"
    assert own(text)["input_ids"] == tokenizer(text)["input_ids"]


# The artifact in transformers, whatever the tokenizer


def scorer_of(path: Path, tokenizer: Any, seed: int = 0) -> Any:
    model = ModelConfig(path=str(path), attention=Attention.auto)
    return load_scorer(model, tokenizer=tokenizer, seed=seed, device=CPU, deepspeed_config=None)


ANSWERS = ["yes", "no, it is not so and never was", "<|end|> is a token", "a" * 30, "maybe"]


def padded(folder: Path, side: str, *, pad: str | None = None) -> Tensor:
    """Rewards of plain text by transformers alone: the artifact's tokenizer pads, the classifier looks for the end."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=side)
    model, report = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert model.config.num_labels == 1 and model.score.bias is None and model.score.out_features == 1
    assert model.config.pad_token_id == tokenizer.pad_token_id
    if pad is not None:
        tokenizer.pad_token = pad
        model.config.pad_token_id = tokenizer.pad_token_id
    texts = []
    for i, answer in enumerate(ANSWERS):
        chat = [{"role": "user", "content": "is it " + "so " * i + "?"}, {"role": "assistant", "content": answer}]
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        texts.append(text if i % 2 == 0 else text[: -len("x" + tokenizer.eos_token)])  # cut in its words
    encoded = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
    assert encoded["attention_mask"].sum(1).unique().numel() > 1
    with torch.no_grad():
        return model.eval()(**encoded).logits[:, 0]


def packed_rewards(scorer: Any, tokenizer: Any) -> Tensor:
    trees = []
    for i, answer in enumerate(ANSWERS):
        prompt = f"user: is it {'so ' * i}?{tokenizer.eos_token}assistant: "
        text = f"{answer}{tokenizer.eos_token}" if i % 2 == 0 else answer[:-1]
        ids = [np.asarray(tokenizer(part, add_special_tokens=False)["input_ids"], np.int32) for part in (prompt, text)]
        trees.append(Tree(prompt=ids[0], responses=(ids[1],), scored=(np.ones(len(ids[1]), bool),), index=i))
    with torch.no_grad():
        return scorer(TreeBatch.of(pack([trees]), CPU))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_transformers_finds_the_same_rewards(name: str, tmp_path: Path) -> None:
    special, roles, expected = TOKENIZERS[name]
    tokenizer = small_tokenizer(special, **roles)
    base = model_for(tmp_path / "base", tokenizer, "llama")
    own = with_own_pad(tokenizer, Renderer(tokenizer).end_ids)
    scorer = scorer_of(base, own)
    ours = packed_rewards(scorer, tokenizer)
    scorer.inner.save_pretrained(tmp_path / "rm")
    own.save_pretrained(tmp_path / "rm")
    assert ours.std() > 0.1
    for side in ("right", "left"):
        torch.testing.assert_close(padded(tmp_path / "rm", side), ours, rtol=0, atol=1e-5)
    if expected != PAD or PAD in special:  # the trap that all of this is about
        wrong = padded(tmp_path / "rm", "right", pad=END)
        assert ((wrong - ours)[::2].abs() > 1e-3).any()
    else:  # a row more than the base has, drawn from the seed alone
        torch.rand(3)
        again = scorer_of(base, own)
        rows = [one.inner.get_input_embeddings().weight for one in (scorer, again)]
        assert rows[0].shape[0] == len(tokenizer) + 1 and torch.equal(*rows)
        wrong = padded(tmp_path / "rm", "right", pad=END)
        assert ((wrong - ours)[::2].abs() > 1e-3).any()


# What it opens


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models of several kinds, by name."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification

    folder = tmp_path_factory.mktemp("bases")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    for name in ("llama", "gpt2"):
        make_base(folder / name, architecture=name)
        classifier = AutoModelForSequenceClassification.from_pretrained(folder / name, num_labels=1)
        classifier.save_pretrained(folder / f"{name}_rm")
        copy_tokenizer(folder, f"{name}_rm")
    AutoModelForSequenceClassification.from_pretrained(folder / "llama", num_labels=2).save_pretrained(folder / "two")
    for name, auto in (("cohere", AutoModelForCausalLM), ("bert", AutoModelForMaskedLM)):
        config = AutoConfig.for_model(name, vocab_size=400, **sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0)
        auto.from_config(config).save_pretrained(folder / name)
    shutil.copytree(folder / "llama", folder / "holes")
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "holes/model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "holes/model.safetensors", metadata={"format": "pt"})
    for name in ("two", "cohere", "bert"):
        copy_tokenizer(folder, name)
    return folder


def copy_tokenizer(folder: Path, name: str) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(folder / "llama" / file, folder / name)


@pytest.fixture(scope="module")
def tokenizer(bases: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(bases / "llama")


def test_a_new_head_is_drawn_from_the_seed_and_one_that_is_there_is_kept(bases: Path, tokenizer: Any) -> None:
    drawn = [scorer_of(bases / "llama", tokenizer, seed).head.weight for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(drawn[0], torch.randn(1, 32, generator=generator) / math.sqrt(33))
    from safetensors.torch import load_file

    kept = scorer_of(bases / "llama_rm", tokenizer).head.weight
    assert torch.equal(kept, load_file(bases / "llama_rm/model.safetensors")["score.weight"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("two", "is a classifier with 2 labels; a reward has one"),
        ("holes", "model.layers.1.mlp.up_proj.weight is missing"),
        ("cohere", "transformers has no sequence classifier of this family; use a model of another one"),
        ("bert", "the classifier of bert has no bias-free linear head `score` with one output"),
        ("nowhere", "cannot be opened as a sequence classifier"),
    ],
)
def test_what_cannot_be_a_reward_model(name: str, message: str, bases: Path, tokenizer: Any) -> None:
    with pytest.raises(UserError) as raised:
        scorer_of(bases / name, tokenizer)
    assert message in str(raised.value) and len(str(raised.value)) < 400


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_reward_model_is_no_language_model(family: str, bases: Path, tokenizer: Any) -> None:
    """Also where the output embedding is the input's, so that no weight is missing."""
    model = ModelConfig(path=str(bases / f"{family}_rm"))
    with pytest.raises(UserError, match=r"is a classifier .a reward model is one.; a causal language model is needed"):
        load_policy(model, tokenizer=tokenizer, seed=0, device=CPU, deepspeed_config=None)


@pytest.mark.parametrize("added", [["<|one|>"], ["<|one|>", "<|pad|>"]])
def test_a_tokenizer_with_more_than_a_padding_token_to_spare(
    added: list[str], bases: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """Only a row that nothing attends to may be made up."""
    small = small_tokenizer([END], eos_token=END)
    base = model_for(tmp_path / "base", small, "llama")
    small.add_special_tokens({"additional_special_tokens": added})
    if len(added) > 1:
        small.pad_token = added[-1]
    with pytest.raises(UserError, match="tokens and the model has embeddings for"):
        scorer_of(base, small)


def test_the_shape_of_an_artifact_that_transformers_reads(bases: Path, tokenizer: Any, tmp_path: Path) -> None:
    scorer_of(bases / "gpt2", tokenizer).inner.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["GPT2ForSequenceClassification"] and list(config["id2label"]) == ["0"]
    assert config["pad_token_id"] == 0
