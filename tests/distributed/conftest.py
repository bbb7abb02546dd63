"""Runs that several tests look at."""

from __future__ import annotations

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
