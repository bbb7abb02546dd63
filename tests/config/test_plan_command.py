"""`rlhf plan` as a command: what it reads, what it refuses, and what it leaves behind. It needs no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_pipeline.config.compose import examine
from rlhf_pipeline.hydra_bridge import complete

HEAVY = {"torch", "transformers", "deepspeed", "datasets", "pyarrow", "wandb"}


def test_it_fits(rlhf: Any, tmp_path: Path) -> None:
    """Neither data nor weights are there; exit code 0."""
    run = rlhf("plan", "sft", "experiment=instructgpt_6b_sft", "gpus=16", "gpu_memory=80GB")
    assert run.code == 0, run.err
    lines = run.out.splitlines()
    assert lines[-1].startswith("fits: ") and lines[-1].endswith("on each of 16 GPUs, in the phase: policy update")
    assert "policy 6,658,404,352 parameters; ZeRO stage 3, bfloat16" in lines
    assert "optimiser" in run.out and not run.imported & HEAVY
    assert list(tmp_path.iterdir()) == []


def test_it_does_not_fit(rlhf: Any, tmp_path: Path) -> None:
    """Exit code 1, and a change under which it would."""
    run = rlhf("plan", "ppo", "experiment=instructgpt_6b_ppo", "gpu_memory=60GB", "machine.json=true")
    assert run.code == 1, run.err
    told = json.loads(run.out)
    assert told["fits"] is False and told["gpus"] == 8 and told["gpu_memory"] == 60e9
    assert told["peak"] > told["room"] == 54e9
    assert told["advice"]["overrides"] == ["rollout.batch_tokens=8192"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "rlhf plan: name what to plan first, one of pretrain, sft, rm, ppo, dpo"),
        (["sft", "gpu_memory=80"], "machine.gpu_memory=80: is no size; write it as 80GB (1000^3) or 80GiB (1024^3)"),
        (["sft", "model.path=nowhere"], "model.path=nowhere: there is no folder with a config.json"),
    ],
)
def test_mistakes(rlhf: Any, arguments: list[str], told: str) -> None:
    run = rlhf("plan", *arguments)
    assert run.code == 2 and told in run.err and "Traceback" not in run.err and run.out == ""


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("machine.gpus=0", "machine.gpus=0: must be more than 0"),
        ("machine.host_memory=much", "machine.host_memory=much: is no size; write it as 80GB"),
        ("machine.gpu_memory=0GB", "machine.gpu_memory=0GB: must be more than 0"),
        ("machine.reserve=1", "machine.reserve=1.0: must be at least 0 and less than 1"),
        ("machine.share_of_peak=1.5", "machine.share_of_peak=1.5: must be between 0 and 1"),
        ("machine.share_of_bandwidth=0", "machine.share_of_bandwidth=0.0: must be more than 0"),
        ("machine.flops=-1", "machine.flops=-1.0: must be more than 0"),
        ("machine.examples=0", "machine.examples=0: must be more than 0"),
    ],
)
def test_the_section_is_checked(override: str, told: str) -> None:
    _, problems = examine("sft", ["data.train=some.jsonl", "model.path=some_model", override])
    assert len(problems) == 1 and problems[0].startswith(told)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("rlhf plan p", ["pretrain", "ppo"]),
        ("rlhf plan ", ["pretrain", "sft", "rm", "ppo", "dpo"]),
        ("rlhf plan sft machine.gpus", ["machine.gpus=", "machine.gpus_per_host="]),
        ("rlhf plan ppo experiment=instructgpt_6", ["experiment=instructgpt_6b_ppo"]),
        ("rlhf plan nonsense gpus", []),
    ],
)
def test_completion(line: str, expected: list[str]) -> None:
    found = complete("plan", line)
    assert [one for one in found if "_sft" not in one and "_rm" not in one] == expected
