"""`rlhf` as a process: exit codes, Hydra's own flags, sweeps, launchers, and how little is imported."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rlhf_pipeline import __version__, hydra_bridge
from rlhf_pipeline.config.schema import Dtype
from rlhf_pipeline.config.stages import SftConfig
from rlhf_pipeline.errors import UserError

HEAVY = {"torch", "transformers", "deepspeed", "datasets", "pyarrow", "wandb"}
GIVEN = ["data.train=some.jsonl", "model.path=some_model"]


def test_help_imports_nothing(rlhf: Any) -> None:
    run = rlhf("--help")
    assert run.code == 0 and "typer" in run.imported
    assert not run.imported & {*HEAVY, "hydra", "omegaconf", "numpy", "yaml"}
    assert all(f" {command} " in run.out for command in ("pretrain", "sft", "dpo", "launch", "version"))


def test_version(rlhf: Any) -> None:
    assert rlhf("version").out == f"{__version__}\n"


def test_unknown_command(rlhf: Any) -> None:
    run = rlhf("stf")
    assert run.code == 2 and "Did you mean 'sft'?" in run.err and "Traceback" not in run.err


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--help"], "engine: zero0, zero1, zero2, zero2_offload, zero3, zero3_offload"),
        (["--info"], "Defaults Tree"),
        (["--hydra-help"], "--multirun"),
        (["--cfg", "job"], "final_lr_fraction: 0.1"),
        (["-c", "job", "--package", "engine", "engine=zero3"], "zero_stage: 3"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_hydras_own_flags(rlhf: Any, tmp_path: Path, flags: list[str], expected: str) -> None:
    """They need neither data nor a model, and leave nothing behind."""
    run = rlhf("sft", *flags)
    assert run.code == 0, run.err
    assert expected in run.out
    assert not run.imported & HEAVY
    assert list(tmp_path.iterdir()) == []


def test_mistakes_end_before_torch(rlhf: Any, refused: Any, tmp_path: Path) -> None:
    found = refused(rlhf("sft", "optim.lrr=1", "seed=x", "engine=zero4", "tracking.wandb=on", "train.epochs=0", *GIVEN))
    assert sorted(problem.partition(": ")[0] for problem in found) == [
        "engine=zero4", "optim.lrr=1", "seed=x", "tracking.wandb=on", "train.epochs=0"
    ]  # fmt: skip
    assert "optim.lrr=1: there is no key 'optim.lrr' (did you mean optim.lr?)" in found
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--config-dir", "nowhere"], "--config-dir nowhere: there is no such folder"),
        (["--config-path", "."], "--config-path: would hide the configs that rlhf comes with"),
        (["--cfg", "job", "optim.lrr=1"], "did you mean optim.lr?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_flags_that_cannot_be_followed(rlhf: Any, refused: Any, flags: list[str], expected: str) -> None:
    run = rlhf("sft", *flags)
    refused(run)
    assert expected in run.err


def test_only_the_first_rank_speaks(rlhf: Any, refused: Any) -> None:
    assert refused(rlhf("sft", "optim.lrr=1", RANK="0"))
    assert refused(rlhf("sft", "optim.lrr=1", RANK="1")) == []


def test_users_own_folder(rlhf: Any, tmp_path: Path) -> None:
    folder = tmp_path / "my configs" / "experiment"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("# @package _global_\noptim:\n  lr: 0.125\n")
    run = rlhf("sft", "--config-dir", "my configs", "--cfg", "job", "-p", "optim.lr", "experiment=mine")
    assert (run.code, run.out) == (0, "0.125\n"), run.err


# From here on in this process: what Hydra makes of a command line that is in order.


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[SftConfig]]:
    """recipe("sft", ...) runs the stage with a recipe that only remembers the configs it gets."""
    monkeypatch.chdir(tmp_path)
    received: list[SftConfig] = []
    module = ModuleType("rlhf_pipeline.recipes.sft")
    module.main = received.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def run(*arguments: str) -> list[SftConfig]:
        hydra_bridge.run_stage("sft", [*GIVEN, *arguments])
        return received

    return run


def test_recipe_gets_real_dataclasses(recipe: Any, tmp_path: Path) -> None:
    before = list(sys.argv)
    [config] = recipe("model.dtype=bfloat16", "engine=zero3", "name=try", "+engine.extra.dump_state=true")
    assert type(config) is SftConfig and config.model.dtype is Dtype.bfloat16
    assert config.engine.zero_stage == 3 and config.engine.extra == {"dump_state": True}
    assert Path(config.run_dir).resolve() == tmp_path / "runs" / "try" / "sft"
    assert sys.argv == before
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []  # Hydra leaves no files of its own


def test_overrides_on_both_sides_of_a_flag(recipe: Any) -> None:
    assert [(c.name, c.seed, c.optim.lr) for c in recipe("name=a", "-m", "seed=1,2", "optim.lr=0.5")] == [
        ("a", 1, 0.5), ("a", 2, 0.5)
    ]  # fmt: skip


def test_later_ranks_run_the_same_config(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert [c.seed for c in recipe("seed=1,2", "-m")] == [1, 2]


@pytest.mark.parametrize("flag", ["--local_rank=3", "--local-rank=3", "--local_rank"])
def test_launchers_rank_is_dropped(recipe: Any, flag: str) -> None:
    [config] = recipe("seed=7", flag)
    assert config.seed == 7


def test_sweep(recipe: Any, tmp_path: Path) -> None:
    configs = recipe("-m", "seed=1,2", "optim.lr=choice(0.5,0.25)")
    assert [(c.seed, c.optim.lr) for c in configs] == [(1, 0.5), (1, 0.25), (2, 0.5), (2, 0.25)]
    folders = [Path(c.run_dir).relative_to(tmp_path) for c in configs]
    assert folders == [Path(f"runs/default/{job}/sft") for job in range(4)]


def test_sweep_is_checked_before_its_first_job(recipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Two values are wrong by themselves and one combination of right ones; each is named once."""
    with pytest.raises(SystemExit) as left:
        recipe("-m", "model.dtype=float32,bfloat16", "engine.zero_stage=1,0", "optim.lr=0.1,fast")
    assert left.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "rlhf sft: 2 problems with the config"
    assert lines[1].startswith("  - optim.lr=fast: ") or lines[2].startswith("  - optim.lr=fast: ")
    assert sum("model.dtype=bfloat16 needs fp32 master weights" in line for line in lines) == 1


def test_sweep_over_all_files_of_a_group(recipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "mine" / "experiment"
    folder.mkdir(parents=True)
    for name, lr in (("mine_a", "0.5"), ("mine_b", "fast")):
        (folder / f"{name}.yaml").write_text(f"# @package _global_\noptim:\n  lr: {lr}\n")
    with pytest.raises(SystemExit):
        recipe("-m", "--config-dir", "mine", "experiment=glob(mine_*)")
    assert "mine_b.yaml: optim.lr: Value 'fast'" in capsys.readouterr().err
    (folder / "mine_b.yaml").write_text("# @package _global_\noptim:\n  lr: 0.25\n")
    assert [c.optim.lr for c in recipe("-m", "--config-dir", "mine", "experiment=glob(mine_*)")] == [0.5, 0.25]


def test_recipes_user_error_is_a_message(
    recipe: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(config: SftConfig) -> None:
        raise UserError("the folder is full; make room")

    monkeypatch.setattr(sys.modules["rlhf_pipeline.recipes.sft"], "main", main)
    with pytest.raises(SystemExit) as left:
        recipe()
    assert left.value.code == 2 and capsys.readouterr().err == "the folder is full; make room\n"


def test_recipes_bug_is_a_message_of_its_own(
    recipe: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(config: SftConfig) -> None:
        raise ZeroDivisionError("a bug with hf_abcdefghijklmnopqrstuvwxyz")

    monkeypatch.setattr(sys.modules["rlhf_pipeline.recipes.sft"], "main", main)
    with pytest.raises(SystemExit) as left:
        recipe()
    told = capsys.readouterr().err
    assert left.value.code == 1
    begins = (
        "rlhf sft: something went wrong that should not have: ZeroDivisionError: a bug with *** (rlhf_pipeline/hydra_"
    )
    assert told.startswith(begins) and "RLHF_TRACEBACK=1" in told and "Traceback" not in told
    monkeypatch.setenv("RLHF_TRACEBACK", "1")
    with pytest.raises(SystemExit):
        recipe()
    traced = capsys.readouterr().err
    assert traced.startswith("Traceback (most recent call last)") and traced.endswith(told)
    assert "hf_abc" not in traced


def test_recipes_user_error_shows_its_traceback_where_asked(
    recipe: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(config: SftConfig) -> None:
        raise UserError("the folder is full; make room")

    monkeypatch.setattr(sys.modules["rlhf_pipeline.recipes.sft"], "main", main)
    monkeypatch.setenv("RLHF_TRACEBACK", "1")
    with pytest.raises(SystemExit) as left:
        recipe()
    told = capsys.readouterr().err
    assert left.value.code == 2
    assert told.startswith("Traceback (most recent") and told.endswith("\nthe folder is full; make room\n")
