"""Shared fixtures: tiny models and trees. Torch and transformers are imported only by the tests that ask for them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from rlhf_pipeline.data.tree import Tree

# Before torch is imported. Tiny models gain nothing from threads, and the suite runs in several processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# A shell's background job or nohup starts us with these ignored, and the commands under test would inherit that.
for _number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL)

VOCABULARY = 97

_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
}
# Weights large enough for attention to matter: at transformers' 0.02 every token predicts nearly the same.
_COMMON: dict[str, Any] = {"vocab_size": VOCABULARY, "initializer_range": 0.2}
_SPECIAL: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_OWN_SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 512, "attn_pdrop": 0, "embd_pdrop": 0,
             "resid_pdrop": 0},
    "gpt_neo": {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "max_position_embeddings": 512,
                "attention_types": [[["global", "local"], 1]]},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 512},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "alibi": False},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
}  # fmt: skip


@pytest.fixture
def tiny_model() -> Callable[..., Any]:
    """tiny_model(family, attention=, dtype=, seed=, **config) -> a random causal language model of 2 layers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    def build(
        family: str, *, attention: str = "sdpa", dtype: torch.dtype = torch.float32, seed: int = 0, **config: Any
    ) -> Any:
        settings = {**_COMMON, **_SPECIAL, **_OWN_SIZES.get(family, _SIZES), **config}
        torch.manual_seed(seed)
        made = AutoConfig.for_model(family, **settings)
        return AutoModelForCausalLM.from_config(made, attn_implementation=attention, dtype=dtype)

    return build


@pytest.fixture
def make_tree() -> Callable[..., Tree]:
    """make_tree(prompt length, response lengths, rng=, index=, scored=1.0) -> a random tree.

    `scored` is the share of response tokens that are training targets.
    """

    def build(
        prompt: int, responses: Sequence[int], *, rng: np.random.Generator, index: int = 0, scored: float = 1.0
    ) -> Tree:
        return Tree(
            prompt=rng.integers(0, VOCABULARY, prompt).astype(np.int32),
            responses=tuple(rng.integers(0, VOCABULARY, n).astype(np.int32) for n in responses),
            scored=tuple(rng.random(n) < scored for n in responses),
            index=index,
        )

    return build


@pytest.fixture
def assert_close() -> Callable[..., None]:
    """assert_close(actual, expected, rtol=, atol=0): |actual - expected| <= atol + rtol * |expected|, same shape and
    dtype."""
    import torch

    def check(actual: Any, expected: Any, *, rtol: float, atol: float = 0.0, what: str = "") -> None:
        torch.testing.assert_close(
            actual, expected, rtol=rtol, atol=atol, msg=(lambda text: f"{what}: {text}") if what else None
        )

    return check
