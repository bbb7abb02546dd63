"""scripts/slurm: the scripts' own lines, with `srun`, `scontrol` and `sbatch` that do what Slurm's do, on this machine."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers_hosts import fake_slurm
from helpers_runs import NO_PLACE, wait_for

SCRIPTS = Path(__file__).parents[2] / "scripts/slurm"

# Instead of rlhf: writes what it was given, and ends as the test says.
RLHF = """#!/bin/bash
names="RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT"
trap 'sleep 0.$RANK; echo saved > "$HERE/saved_$RANK"; exit 143' TERM
{ for name in $names; do echo "$name=${!name}"; done; printf 'argument=%s\\n' "$@"; } > "$HERE/part_$RANK"
echo $$ > "$HERE/pid_$RANK"; mv "$HERE/part_$RANK" "$HERE/rank_$RANK"
"""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the commands, first on the PATH."""
    folder = fake_slurm(tmp_path / "bin", hosts=("node1", "node2"))
    for name in NO_PLACE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


@pytest.fixture
def job(cluster: Path, tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """job(code, *arguments) runs train.sbatch as a job of two machines with two tasks each, which end with that code."""

    def run(code: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        (tmp_path / "rlhf").write_text(RLHF + code + "\n")
        (tmp_path / "rlhf").chmod(0o755)
        slurm = {"JOB_ID": "1234567", "JOB_NODELIST": "node[1-2]", "NTASKS": "4", "NTASKS_PER_NODE": "2"}
        mine = {f"SLURM_{name}": value for name, value in slurm.items()} | environment
        return subprocess.Popen(
            ["bash", str(SCRIPTS / "train.sbatch"), *arguments],
            env={**os.environ, **mine, "RLHF": str(tmp_path / "rlhf"), "HERE": str(tmp_path)},
            stderr=subprocess.PIPE,
            text=True,
        )

    return run


def given(folder: Path) -> list[list[str]]:
    return [(folder / f"rank_{rank}").read_text().splitlines() for rank in range(4)]


def test_every_task_knows_its_place(job: Any, tmp_path: Path) -> None:
    arguments = ["sft", "name=a b", "x='$HOME;*'"]
    process = job("exit 0", *arguments)
    assert process.wait(30) == 0
    for rank, lines in enumerate(given(tmp_path)):
        place = {"RANK": rank, "LOCAL_RANK": rank % 2, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2}
        place |= {"MASTER_ADDR": "node1", "MASTER_PORT": 20000 + 4567}
        assert lines == [f"{name}={value}" for name, value in place.items()] + [f"argument={a}" for a in arguments]


def test_port_of_the_users_choice(job: Any, tmp_path: Path) -> None:
    assert job("exit 0", "sft", MASTER_PORT="29500").wait(30) == 0
    assert all("MASTER_PORT=29500" in lines for lines in given(tmp_path))


def test_time_is_up(job: Any, cluster: Path, tmp_path: Path) -> None:
    """Tasks leave one after the other; the job goes back to the queue, and its exit code is theirs."""
    process = job("while :; do sleep 0.05; done", "sft")
    wait_for(lambda: all((tmp_path / f"rank_{rank}").exists() for rank in range(4)), timeout=30)
    for rank in range(4):
        os.kill(int((tmp_path / f"pid_{rank}").read_text()), signal.SIGTERM)
    assert process.wait(30) == 143
    assert all((tmp_path / f"saved_{rank}").exists() for rank in range(4))
    assert (cluster / "requeued").read_text() == "1234567\n"
    assert (
        cluster / "srun_options"
    ).read_text() == "--kill-on-bad-exit=0 --wait=0\n"  # or the first 143 ends the others


def test_where_nothing_is_put_back_into_the_queue(job: Any, cluster: Path) -> None:
    (cluster / "refuses").touch()
    process = job("exit 143", "sft")
    assert process.wait(30) == 143
    assert "not requeued; the same sbatch command goes on" in process.stderr.read()


@pytest.mark.parametrize(("code", "expected"), [("exit $RANK", 3), ("exit 2", 2), ("kill -9 $$", 137), ("exit 0", 0)])
def test_a_run_that_failed_or_is_done_is_not_put_back(job: Any, cluster: Path, code: str, expected: int) -> None:
    assert job(code, "sft").wait(30) == expected
    assert not (cluster / "requeued").exists()


def test_without_a_stage(job: Any, cluster: Path) -> None:
    process = job("exit 0")
    assert process.wait(30) == 2
    assert process.stderr.read().startswith("usage: sbatch")
    assert not (cluster / "srun_options").exists()


# recipe.sh


def submitted(cluster: Path) -> list[tuple[str, list[str]]]:
    """(number, arguments) of every job."""
    lines = (cluster / "submitted").read_text().splitlines()
    return [(words[0], words[1:]) for words in map(shlex.split, lines)]


def summary(cluster: Path) -> list[tuple[str, str, str]]:
    """(number, name, numbers that it waits for) of every job."""
    found = []
    for number, words in submitted(cluster):
        options = dict(word.partition("=")[::2] for word in words if word.startswith("--"))
        found.append((number, options["--job-name"], options.get("--dependency", "")))
    return found


@pytest.fixture
def recipe(cluster: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """recipe(exp, experiments) runs the script in a folder with such files under conf/experiment."""
    (tmp_path / "conf/experiment").mkdir(parents=True)

    def run(exp: str, *experiments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        for name in experiments:
            (tmp_path / f"conf/experiment/{name}.yaml").touch()
        line = ["bash", str(SCRIPTS / "recipe.sh"), *([exp] if exp else [])]
        return subprocess.run(line, cwd=tmp_path, env={**os.environ, **environment}, capture_output=True, text=True)

    return run


def test_stages_wait_for_their_parents(recipe: Any, cluster: Path) -> None:
    stages = ("pretrain", "sft", "rm", "ppo", "dpo")
    done = recipe("mine", *(f"mine_{stage}" for stage in stages), "other_sft")
    assert done.returncode == 0, done.stderr
    assert summary(cluster) == [
        ("100", "mine_pretrain", ""),
        ("101", "mine_sft", "afterok:100"),
        ("102", "mine_rm", "afterok:101"),
        ("103", "mine_ppo", "afterok:101:102"),
        ("104", "mine_dpo", "afterok:101"),
        ("105", "mine_report", "afterok:100:101:102:103:104"),
    ]
    for _, words in submitted(cluster)[1:]:
        assert "--kill-on-invalid-dep=yes" in words  # or it would stand in the queue for ever
    assert done.stdout.splitlines()[3] == "103 mine_ppo after 101:102"
    assert submitted(cluster)[5][1][-1] == "--wrap=make recipe EXP=mine RUNS=runs"


def test_instructgpts_policies_share_a_reward_model_and_start_from_another(recipe: Any, cluster: Path) -> None:
    assert recipe("instructgpt_1b", *(f"instructgpt_1b_{s}" for s in ("sft", "ppo_init_sft", "ppo"))).returncode == 0
    assert summary(cluster) == [
        ("100", "instructgpt_1b_sft", ""),
        ("101", "instructgpt_1b_ppo_init_sft", ""),
        ("102", "instructgpt_6b_rm", ""),
        ("103", "instructgpt_1b_ppo", "afterok:101:102"),
        ("104", "instructgpt_1b_report", "afterok:100:101:102:103"),
    ]


def test_arguments(recipe: Any, cluster: Path) -> None:
    options = {
        "NODES": "4",
        "NODES_rm": "1",
        "GPUS": "6",
        "ARGS": "seed=2 x=1",
        "ARGS_rm": "optim.lr=1",
        "RUNS": "/big",
    }
    assert recipe("mine", "mine_sft", "mine_rm", **options).returncode == 0
    (_, sft), (_, rm), (_, report) = submitted(cluster)
    script = str(SCRIPTS / "train.sbatch")
    assert sft[sft.index(script) :] == [script, "sft", "experiment=mine_sft", "runs=/big", "seed=2", "x=1"]
    assert rm[rm.index(script) :] == [script, "rm", "experiment=mine_rm", "runs=/big", "seed=2", "x=1", "optim.lr=1"]
    assert "--nodes=4" in sft and "--nodes=1" in rm
    for words in (sft, rm):
        assert "--ntasks-per-node=6" in words and "--gpus-per-node=6" in words
    assert report[-1] == "--wrap=make recipe EXP=mine RUNS=/big"


def test_what_is_done_is_not_done_again_unless_its_parent_is(recipe: Any, cluster: Path, tmp_path: Path) -> None:
    for stage in ("sft", "rm", "dpo"):
        (tmp_path / f"runs/mine/{stage}/artifact").mkdir(parents=True)
        (tmp_path / f"runs/mine/{stage}/artifact/artifact.json").touch()
    assert recipe("mine", *(f"mine_{stage}" for stage in ("sft", "rm", "ppo", "dpo"))).returncode == 0
    assert summary(cluster) == [("100", "mine_ppo", ""), ("101", "mine_report", "afterok:100")]
    (cluster / "submitted").unlink()
    shutil.rmtree(tmp_path / "runs/mine/sft")
    assert recipe("mine").returncode == 0
    assert [name for _, name, _ in summary(cluster)] == [f"mine_{s}" for s in ("sft", "rm", "ppo", "dpo", "report")]


def test_nothing_more_is_submitted_where_sbatch_refuses(recipe: Any, cluster: Path) -> None:
    (cluster / "sbatch").write_text("#!/bin/bash\necho 'sbatch: error: invalid account' >&2\nexit 1\n")
    done = recipe("mine", "mine_sft", "mine_rm")
    assert done.returncode == 1 and done.stderr == "sbatch: error: invalid account\n"


def test_recipe_without_an_experiment(recipe: Any, cluster: Path) -> None:
    assert recipe("").returncode == 2
    unknown = recipe("mien", "mine_sft")
    assert unknown.returncode == 2 and "mien" in unknown.stderr
    assert not (cluster / "submitted").exists()
