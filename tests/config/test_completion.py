"""Tab completion: the shells' protocols as Typer speaks them, and the candidates themselves."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf_pipeline.hydra_bridge import complete

ENGINES = ["zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["rlhf", ""],
            [
                "pretrain",
                "sft",
                "rm",
                "ppo",
                "dpo",
                "prep",
                "generate",
                "chat",
                "score",
                "evaluate",
                "report",
                "plan",
                "launch",
                "version",
            ],
        ),
        (["rlhf", "prep", "sft", "eng"], ["engine.", "engine="]),
        (["rlhf", "sf"], ["sft"]),
        (["rlhf", "report", "runs/demo", "sam"], ["samples="]),
        (["rlhf", "sft", "eng"], ["engine.", "engine="]),
        (["rlhf", "sft", "engine=zero2"], ["engine=zero2", "engine=zero2_offload"]),
        (["rlhf", "sft", "engine", "=", ""], ENGINES),  # bash itself breaks words at "="
        (["rlhf", "sft", "engine", "=", "zero3"], ["zero3", "zero3_offload"]),
        (["rlhf", "sft", "data.train", "=", "lab", ":", "demonstrations", "optim.l"], ["optim.lr="]),
    ],
    ids=lambda value: " ".join(value),
)
def test_bash(rlhf: Any, words: list[str], expected: list[str]) -> None:
    run = rlhf(_RLHF_COMPLETE="complete_bash", COMP_WORDS="\n".join(words), COMP_CWORD=str(len(words) - 1))
    assert run.code == 0, run.err
    assert run.out.split() == expected
    assert not run.imported & {"torch", "transformers", "deepspeed"}


@pytest.mark.parametrize("shell", ["complete_zsh", "complete_fish"])
def test_zsh_and_fish(rlhf: Any, shell: str) -> None:
    """They hand over the line as it is and do not break words at "="."""
    run = rlhf(
        _RLHF_COMPLETE=shell, _TYPER_COMPLETE_ARGS="rlhf sft engine=zero3", _TYPER_COMPLETE_FISH_ACTION="get-args"
    )
    assert run.code == 0 and "engine=zero3_offload" in run.out and "engine=zero1" not in run.out


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_real_bash(tmp_path: Path) -> None:
    """The function that `rlhf --install-completion` installs, in a bash of its own."""
    command = tmp_path / "rlhf"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m rlhf_pipeline "$@"\n')
    command.chmod(0o755)
    script = """
        eval "$(_RLHF_COMPLETE=source_bash rlhf)"
        COMP_WORDS=(rlhf sft tracking.wandb = o) COMP_CWORD=4
        _rlhf_completion rlhf
        echo "${COMPREPLY[@]}"
    """
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": root}
    line = ["bash", "--norc", "-c", script]
    run = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)
    assert (run.returncode, run.stdout) == (0, "online offline\n"), run.stderr


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("rlhf sft optim.warmup_s", ["optim.warmup_start_fraction=", "optim.warmup_steps="]),
        ("rlhf sft experiment=demo_sf", ["experiment=demo_sft"]),
        ("rlhf sft engine=zero3 optim.lr", ["optim.lr="]),
        ("rlhf sft model=lab model.shape.he", ["model.shape.heads="]),  # only there after model=lab
        ("rlhf sft model.shape.he", []),
        ("rlhf sft data.long_prompt=keep", ["data.long_prompt=keep_end", "data.long_prompt=keep_start"]),
        ("rlhf sft model.dtype = ", ["float32", "bfloat16"]),
        ("rlhf sft tracking.tensorboard=", ["tracking.tensorboard=true", "tracking.tensorboard=false"]),
        ("rlhf sft model.shape.architecture=g", ["model.shape.architecture=gpt2"]),
        ("rlhf sft seed=", ["seed=0"]),
        ("rlhf sft nonsense.", []),
        ("rlhf sft optim.lrr=1 seed", []),
        ("/usr/bin/rlhf sft mix.", ["mix.format=", "mix.ratio=", "mix.split=", "mix.train="]),
    ],
)  # fmt: skip
def test_candidates(line: str, expected: list[str]) -> None:
    assert complete("sft", line) == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("rlhf dpo objective=c", ["objective=cdpo", "objective=cpo"]),
        ("rlhf dpo obj", ["objective.", "objective="]),
        ("rlhf dpo objective=simpo objective.g", ["objective.gamma="]),
        ("rlhf dpo objective.reduction=", ["objective.reduction=sum", "objective.reduction=mean"]),
        ("rlhf dpo objective.ties=h", ["objective.ties=half"]),
        ("rlhf dpo objective.form=t", ["objective.form=token"]),
        ("rlhf dpo experiment=simpo_m", ["experiment=simpo_mistral_base_dpo", "experiment=simpo_mistral_instruct_dpo"]),
        ("rlhf dpo sampled.t", ["sampled.temperature="]),
    ],
)  # fmt: skip
def test_objectives(line: str, expected: list[str]) -> None:
    assert complete("dpo", line) == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("rlhf prep p", ["pretrain", "ppo"]),  # of the stages; no key of its own begins so
        ("rlhf prep kin", ["kind="]),
        ("rlhf prep kind=ra", ["kind=ranking"]),
        ("rlhf prep sft experiment=demo_sf", ["experiment=demo_sft"]),
        ("rlhf prep sft mix.r", ["mix.ratio="]),
        ("rlhf prep mix.r", []),
    ],
)  # fmt: skip
def test_prep_completes_the_arguments_of_a_stage(line: str, expected: list[str]) -> None:
    assert complete("prep", line) == expected


def test_users_own_folder(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine_sft.yaml").write_text("# @package _global_\nseed: 1\n")
    assert complete("sft", f"rlhf sft --config-dir {tmp_path} experiment=mi") == ["experiment=mine_sft"]
    assert complete("sft", f"rlhf sft --config-dir={tmp_path} experiment=mi") == ["experiment=mine_sft"]
