"""Runs that several tests look at."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers_runs import Forks, dialogues, forks, make_base, write_jsonl


@pytest.fixture(scope="session")
def rlhf() -> Forks:
    """The command line, without the wait for imports."""
    return forks()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder that is no artifact: a tiny Llama and a tokenizer with the dialogue template."""
    return make_base(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a module's runs are: 36 short dialogues, and 4 held out."""
    folder = tmp_path_factory.mktemp("runs")
    write_jsonl(folder / "train.jsonl", dialogues(36, seed=2))
    write_jsonl(folder / "heldout.jsonl", dialogues(4, seed=3))
    return folder
