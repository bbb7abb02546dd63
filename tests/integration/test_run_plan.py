"""`rlhf plan` of a run on this machine, beside the run itself."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from helpers_runs import SFT_ON_FILES, TINY_RUN, Forks, dialogues, write_jsonl

RUN = [
    *("batch.examples=4", "batch.row_length=160", "train.max_steps=1", "evaluation.before=false"),
    "evaluation.examples=2",
]


@pytest.mark.slow
def test_plan_and_run_have_the_same_model_and_config(rlhf: Forks, base: Path, tmp_path: Path) -> None:
    """The plan reads the folder's config.json and no data; then the run with the same arguments finds nothing of it."""
    arguments = [f"model.path={base}", *RUN]
    machine = ("gpus=1", "gpu_memory=1GB", "machine.gpu=H100", "machine.json=true")
    # ZeRO-1 in fp32 has a bucket of 500 million elements, 2 GB, whatever the model is.
    told = json.loads(rlhf.run(tmp_path / "planned", "plan", "sft", *arguments, *machine, code=1).output)
    assert told["fits"] is False and 2e9 < told["peak"] < 2.1e9 and told["time"]["steps"] == 1
    assert not (tmp_path / "planned" / "runs").exists()

    folder = tmp_path / "run"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", dialogues(20))
    write_jsonl(folder / "heldout.jsonl", dialogues(4, seed=1))
    run = rlhf.run(folder, *SFT_ON_FILES, *TINY_RUN, *arguments)
    (found,) = re.findall(r"([\d,]+) parameters", run.output)
    assert int(found.replace(",", "")) == told["parameters"]["policy"]
