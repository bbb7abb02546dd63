"""The command line as users meet it: in a process of its own, from a folder that is not the repository."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import rlhf_pipeline

HEAVY = {"torch", "transformers", "deepspeed", "datasets", "pyarrow", "wandb"}


class Finished:
    """What a command left behind. `imported` holds the top-level packages that it imported."""

    def __init__(self, process: subprocess.CompletedProcess[str]) -> None:
        self.code = process.returncode
        self.out = process.stdout
        lines = process.stderr.splitlines(keepends=True)
        self.err = "".join(line for line in lines if not line.startswith("import time:"))
        found = (re.match(r"import time:.*\|\s*([\w.]+)$", line) for line in lines)
        self.imported = {match[1].partition(".")[0] for match in found if match}


@pytest.fixture
def rlhf(tmp_path: Path) -> Callable[..., Finished]:
    """rlhf("sft", "--cfg", "job", RANK="1") runs the command in an empty folder, variables by keyword."""
    root = str(Path(rlhf_pipeline.__file__).parents[1])

    def run(*arguments: str, **variables: Any) -> Finished:
        environment = {**os.environ, "PYTHONPATH": root, "COLUMNS": "200", **variables}
        line = [sys.executable, "-X", "importtime", "-m", "rlhf_pipeline", *arguments]
        return Finished(
            subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        )

    return run


@pytest.fixture
def refused() -> Callable[[Finished], list[str]]:
    """refused(run) checks that a command ended as a user's mistake should, and gives the problems that it names."""

    def check(run: Finished) -> list[str]:
        assert run.code == 2, run.err
        assert "Traceback" not in run.err
        assert run.out == ""
        assert "hydra" in run.imported, "the list of imports is empty: this test could not fail"
        assert not run.imported & HEAVY
        return [line.removeprefix("  - ") for line in run.err.splitlines() if line.startswith("  - ")]

    return check
