"""Runs that several tests look at."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers_runs import Forks, forks, make_base


@pytest.fixture(scope="session")
def rlhf() -> Forks:
    """The command line, without the wait for imports."""
    return forks()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder that is no artifact: a tiny Llama and a tokenizer with the dialogue template."""
    return make_base(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """A base model whose widths are multiples of 64, which quantisation on a CPU asks for."""
    pytest.importorskip("bitsandbytes", reason="needs the lora extra")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("wide") / "gpt2"
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*config.json", "*.safetensors"))
    shutil.copy(base / "tokenizer_config.json", folder)
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 256, "vocab_size": 400, "initializer_range": 0.1}
    torch.manual_seed(0)
    config = AutoConfig.for_model("gpt2", **sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder
