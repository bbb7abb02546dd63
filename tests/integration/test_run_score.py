"""`rlhf score`: the file that it writes, from rows of several kinds, killed, in two processes, and what it refuses."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_runs import ENVIRONMENT, Forks, make_base, program, sentence, wait_for, write_jsonl
from helpers_scoring import make_reward_model

from rlhf_pipeline.artifact import Kind
from rlhf_pipeline.config.schema import AnswersConfig, ReadyModelConfig, TokenizerConfig
from rlhf_pipeline.scoring.answers import read_answers
from rlhf_pipeline.scoring.rewards import open_scorer, rewards

OPTIONS = ["score", "runtime.threads=1"]
PLACE = Path("runs/default/score/rewards.jsonl")
REAL = os.environ.get("RLHF_TEST_DATA", "")


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def reward_model(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "reward"
    return make_reward_model(folder, base, kind=Kind.reward_model, shift=0.5, scale=2.0)


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(1)
    rows = [
        {
            "topic": f"t{i}",
            "prompt": sentence(rng, 1, 12),
            "reward": i,
            "responses": [sentence(rng, 1, 9) for _ in range(rng.randint(1, 4))],
            "note": "é",
        }
        for i in range(20)
    ]
    for row in rows:
        row["ranks"] = list(range(len(row["responses"])))
    return write_jsonl(tmp_path_factory.mktemp("answers") / "ranked.jsonl", rows)


@pytest.fixture(scope="module")
def undisturbed(rlhf: Forks, reward_model: Path, ranked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    job = rlhf.run(folder, *OPTIONS, f"model.path={reward_model}", f"data.path={ranked}")
    assert re.search(
        r"rewards.jsonl: 20 rows, \d+ answers, [\d,]+ answers/s in [\d.]+ s, rewards -?[\d.]+ on average, "
        r"standard deviation [\d.]+, right in [\d.]+% of \d+ comparisons\n",
        job.output,
    )
    return folder / PLACE


def test_rows_stay_as_they_are_and_gain_a_reward(undisturbed: Path, reward_model: Path, ranked: Path) -> None:
    found, given = read(undisturbed), read(ranked)
    model = open_scorer(ReadyModelConfig(path=str(reward_model)), TokenizerConfig(), "cpu")
    rows = read_answers(AnswersConfig(path=str(ranked))).rows
    expected = rewards(model, rows, max_length=256, batch_tokens=100)
    for row, source, mine in zip(found, given, expected, strict=True):
        assert list(row) == ["topic", "prompt", "input_reward", "responses", "note", "ranks", "reward"]
        assert {("reward" if k == "input_reward" else k): v for k, v in row.items() if k != "reward"} == source
        np.testing.assert_allclose(row["reward"], mine, rtol=1e-5, atol=1e-5)
    assert '"é"' in undisturbed.read_text()
    assert {path.name for path in undisturbed.parent.iterdir()} == {
        "rewards.jsonl", "inputs.json", "run.json", "config.yaml", ".lock"}  # fmt: skip


def test_raw_rewards_of_the_same_rows(
    rlhf: Forks, reward_model: Path, ranked: Path, undisturbed: Path, tmp_path: Path
) -> None:
    rlhf.run(tmp_path, *OPTIONS, f"model.path={reward_model}", f"data.path={ranked}", "normalised=false")
    for raw, row in zip(read(tmp_path / PLACE), read(undisturbed), strict=True):
        np.testing.assert_allclose((np.array(raw["reward"]) - 0.5) / 2, row["reward"], rtol=1e-5, atol=1e-5)


def test_two_processes_write_the_file_of_one(
    rlhf: Forks, reward_model: Path, ranked: Path, undisturbed: Path, tmp_path: Path
) -> None:
    job = rlhf.run(tmp_path, *OPTIONS, f"model.path={reward_model}", f"data.path={ranked}", ranks=2)
    mine, theirs = read(tmp_path / PLACE), read(undisturbed)
    for one, other in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(one.pop("reward"), other.pop("reward"), rtol=1e-5, atol=1e-5)
    assert mine == theirs
    assert job.output.count("20 rows,") == 1


def test_bad_rows_have_no_reward_and_keep_their_line(rlhf: Forks, reward_model: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "response": "b", "input_reward": 7, "reward": 6},
        {"prompt": "a", "response": 3},
        {"prompt": "a", "response": "the " * 300},
        {"prompt": "a " * 400, "response": "b"},
        {"prompt": "a", "response": "", "finish_reason": "stop"},
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    path.write_text(path.read_text() + "no object\n" + '{"prompt": "a", "response": "b", "note": "\\ud800 é"}\n')
    command = [*OPTIONS, f"model.path={reward_model}", f"data.path={path}"]
    job = rlhf.run(tmp_path, *command, code=2)
    assert re.search(r"2 rows of data.path=\S+ cannot be scored:\n  \S+:2: .*\n  \S+:6: not JSON", job.output)
    assert not (tmp_path / PLACE).exists()
    job = rlhf.run(tmp_path, *command, "data.on_bad_row=skip")
    found = read(tmp_path / PLACE)
    assert found[5] == {"reward": None} and found[6]["note"] == "\ud800 é"
    assert [row["reward"] is None for row in found] == [False, True, True, False, False, True, False]
    assert isinstance(found[0]["reward"], float)
    assert found[0] == {**rows[0], "input_input_reward": 6, "reward": found[0]["reward"]}
    assert "rows.jsonl:3: an answer is too long: number 1 has 301 tokens" in job.output
    assert "1 of 5 prompts lose their" in job.output
    assert "4 rows, 4 answers" in job.output and "comparisons" not in job.output


def test_what_generate_writes_is_scored(rlhf: Forks, base: Path, reward_model: Path, tmp_path: Path) -> None:
    prompts = write_jsonl(
        tmp_path / "p.jsonl", [{"prompt": f"the cat {i}?", "chosen": "a", "rejected": "b"} for i in range(4)]
    )
    sampling = ["sampling.max_new_tokens=6", "sampling.samples=2", "runtime.threads=1"]
    rlhf.run(tmp_path, "generate", *sampling, f"model.path={base}", f"prompts.path={prompts}")
    sampled = tmp_path / "runs/default/generate/responses.jsonl"
    # An answer cut off before its first word has nothing to score; none should be, and if one is, it is named.
    rlhf.run(tmp_path, *OPTIONS, f"model.path={reward_model}", f"data.path={sampled}")
    found = read(tmp_path / PLACE)
    assert [{k: v for k, v in row.items() if k != "reward"} for row in found] == read(sampled)
    assert all(isinstance(row["reward"], float) for row in found) and len({row["reward"] for row in found}) > 4
    again = rlhf.run(tmp_path, *OPTIONS, f"model.path={reward_model}", f"data.path={tmp_path / PLACE}", "name=again")
    assert "8 rows, 8 answers" in again.output
    for row in read(tmp_path / "runs/again/score/rewards.jsonl"):
        assert abs(row["reward"] - row["input_reward"]) < 1e-5


def test_standard_input_to_standard_output(reward_model: Path, tmp_path: Path) -> None:
    rows = '{"prompt": "the red cat?", "response": "a mat"}\n\n{"prompt": "who?", "chosen": "a", "rejected": "b"}\n'
    arguments = [*OPTIONS, f"model.path={reward_model}", "data.path=-", "output=-", "data.on_bad_row=skip"]
    done = subprocess.run(
        [sys.executable, "-m", "rlhf_pipeline", *arguments],
        cwd=tmp_path,
        input=rows,
        capture_output=True,
        text=True,
        env={"PATH": "", **ENVIRONMENT},
    )
    assert done.returncode == 0, done.stderr
    first, second = (json.loads(line) for line in done.stdout.splitlines())
    assert isinstance(first["reward"], float) and second["reward"] is None
    assert "stdin:3: no field 'response'" in done.stderr and "1 rows, 1 answers" in done.stderr
    assert not list(tmp_path.rglob("*.json*")), "not even a run"


# What is there already


def test_the_same_command_again_replaces_its_own_output_only(
    rlhf: Forks, reward_model: Path, ranked: Path, undisturbed: Path, tmp_path: Path
) -> None:
    command = [*OPTIONS, f"model.path={reward_model}", f"data.path={ranked}", f"output={tmp_path}/mine.jsonl"]
    (tmp_path / "mine.jsonl").write_text("a friend's\n")
    job = rlhf.run(tmp_path, *command, code=2)
    assert "this run has not written it" in job.output
    assert (tmp_path / "mine.jsonl").read_text() == "a friend's\n"
    (tmp_path / "mine.jsonl").unlink()
    rlhf.run(tmp_path, *command)
    (tmp_path / "mine.jsonl").write_text("torn")
    rlhf.run(tmp_path, *command)
    assert (tmp_path / "mine.jsonl").read_bytes() == undisturbed.read_bytes()
    job = rlhf.run(tmp_path, *command, "normalised=false", code=2)
    assert "normalised: was True, is now False" in job.output


@pytest.mark.parametrize("crash", [11, 13, 14, 15])  # opening the file; naming inputs.json, the file; tidying up
def test_a_killed_run_leaves_no_half_of_a_file(
    rlhf: Forks, reward_model: Path, ranked: Path, undisturbed: Path, tmp_path: Path, crash: int
) -> None:
    command = [*OPTIONS, f"model.path={reward_model}", f"data.path={ranked}"]
    job = rlhf.start(tmp_path, *command, crash=crash).wait(-9)
    assert (tmp_path / PLACE).exists() == (crash == 15), job.output
    if crash == 15:
        assert (tmp_path / PLACE).read_bytes() == undisturbed.read_bytes()
    rlhf.run(tmp_path, *command)
    assert (tmp_path / PLACE).read_bytes() == undisturbed.read_bytes()
    assert not list(tmp_path.rglob("*.partial"))


def test_a_full_disk_says_so(rlhf: Forks, reward_model: Path, ranked: Path, undisturbed: Path, tmp_path: Path) -> None:
    command = [*OPTIONS, f"model.path={reward_model}", f"data.path={ranked}"]
    shutil.copytree(undisturbed.parent, tmp_path / PLACE.parent)
    job = rlhf.start(tmp_path, *command, full=10).wait(2)
    assert "the disk is full" in job.output and "Traceback" not in job.output
    assert (tmp_path / PLACE).read_bytes() == undisturbed.read_bytes()
    assert not list(tmp_path.rglob("*.partial"))


def test_ctrl_c_leaves_nothing(reward_model: Path, tmp_path: Path) -> None:
    many = [{"prompt": f"{i} who sits?", "response": "the old cat " * 20} for i in range(20_000)]
    path = write_jsonl(tmp_path / "many.jsonl", many)
    job = program(tmp_path, *OPTIONS, f"model.path={reward_model}", f"data.path={path}")
    wait_for((tmp_path / "runs/default/score/config.yaml").exists, job)
    job.signal(signal.SIGINT)
    job.wait(130)
    assert "stopped; nothing has been written" in job.output and "Traceback" not in job.output
    assert not (tmp_path / PLACE).exists() and not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.path=null"], "model.path: has no value"),
        (["model.path=none/at/all"], "there is no such folder"),
        (["model.path={tmp}"], "no model in this folder"),
        (["model.path={base}"], "holds no reward model: score.weight is missing"),
        (["model.path={policy}"], "is a policy .made by rlhf rm., and a reward_model is needed here"),
        (["tokenizer.template=chatml"], "trained with another tokenizer or chat template"),
        (["data.path={tmp}/none.jsonl"], "no such file"),
        (["data.path={tmp}/empty.jsonl"], "no answer in it to score"),
        (["data.path={tmp}/prompts.jsonl"], "prompts.jsonl:1: no answer is found in the row"),
        (["data.max_length=2"], r"20 rows of data.path=\S+ cannot be scored:\n.*an answer is too long"),
        (["data.max_length=2", "data.on_bad_row=skip"], "no answer in it can be scored"),
        (["data.max_length=1"], "data.max_length=1: a prompt token and an answer's token need 2"),
        (["batch_tokens=0"], "batch_tokens=0: must be more than 0"),
        (["output={tmp}"], "is a folder"),
        (["output={tmp}/empty.jsonl"], "this run has not written it"),
        (["output={tmp}/empty.jsonl/x"], "cannot be written"),
    ],
)
def test_mistakes(
    rlhf: Forks, base: Path, reward_model: Path, ranked: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "the cat?"}])
    if "{policy}" in overrides[0]:
        make_reward_model(tmp_path / "policy", base, kind=Kind.policy)
    places = {"tmp": str(tmp_path), "base": str(base), "policy": str(tmp_path / "policy")}
    given = [f"model.path={reward_model}", f"data.path={ranked}", *(one.format(**places) for one in overrides)]
    job = rlhf.run(tmp_path, *OPTIONS, *given, code=2)
    assert re.search(message, job.output), job.output
    assert "Traceback" not in job.output
    assert not list(tmp_path.rglob("rewards*"))


def test_several_processes_share_no_stream(rlhf: Forks, reward_model: Path, ranked: Path, tmp_path: Path) -> None:
    given = [f"model.path={reward_model}", f"data.path={ranked}"]
    job = rlhf.run(tmp_path, *OPTIONS, *given, "output=-", ranks=2, code=2)
    assert "several processes cannot share standard output" in job.output
    job = rlhf.run(tmp_path, *OPTIONS, *given, "data.path=-", ranks=2, code=2)
    assert "several processes cannot share standard input" in job.output


@pytest.mark.skipif(not REAL, reason="RLHF_TEST_DATA names no folder with real data")
@pytest.mark.parametrize("file", ["hh_harmless", "alpaca_kwise", "lima"])
def test_real_files(rlhf: Forks, tmp_path: Path, file: str) -> None:
    wide = make_reward_model(tmp_path / "wide", make_base(tmp_path / "base", context=4096))
    given = [f"model.path={wide}", f"data.path={REAL}/{file}.jsonl.gz", "data.max_length=4096"]
    rlhf.run(tmp_path, *OPTIONS, *given, "data.max_examples=15", "data.on_bad_row=skip")
    found = read(tmp_path / PLACE)
    assert len(found) == 15 and sum(row["reward"] is not None for row in found) > 8
    for row in found:
        if row["reward"] is not None:
            assert isinstance(row["reward"], float if file == "lima" else list)
            assert file == "lima" or len(row["reward"]) == len(row.get("responses", "ab"))
