"""Tiny fine-tunings on the first rows of real data sets, end to end. RLHF_TEST_DATA names the folder of files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from helpers_runs import TINY_RUN, Forks, make_base, series

DATA = Path(os.environ.get("RLHF_TEST_DATA", "/nonexistent"))
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="RLHF_TEST_DATA names no folder of real data")


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("real") / "base", context=1024)


@pytest.mark.parametrize("name", ["hh_harmless.jsonl.gz", "lima.jsonl.gz", "alpaca_999.json.gz"])
def test_sft_on(name: str, roomy: Path, rlhf: Forks, tmp_path: Path) -> None:
    rlhf.run(
        tmp_path,
        "sft",
        "name=real",
        f"data.train={DATA / name}",
        "data.max_examples=64",
        "data.max_length=1024",
        "data.max_prompt_length=800",
        "data.heldout_fraction=0.1",
        f"model.path={roomy}",
        "batch.examples=8",
        "optim.lr=3e-3",
        "train.epochs=2",
        *TINY_RUN,
    )
    run = tmp_path / "runs/real/sft"
    counts = json.loads((run / "artifact/artifact.json").read_text())["data"]["demonstrations"]["counts"]
    assert counts["rows"] == 64 and counts["kept"] > 32
    assert series(run, "eval/loss")[-1] < series(run, "eval/loss")[0] - 0.5
    assert (run / "artifact/model.safetensors").is_file()
