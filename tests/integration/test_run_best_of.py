"""`rlhf generate best_of=N`: of the answers that `sampling.samples=N` draws, the one that scorers like best; killed, in two
processes, split over batches, and on standard output."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers_runs import Forks, sentence, write_jsonl
from helpers_scoring import make_reward_model

from rlhf_pipeline.artifact import Kind

OPTIONS = ["generate", "runtime.threads=1", "sampling.max_new_tokens=8"]
LONGEST = ["best_of=4", "+rewards.long.program=judges:longest"]
RUN = Path("runs/default/generate")
PROGRAM = """
def longest(episodes):
    return [len(one.response) for one in episodes]

def even(episodes):  # many ties
    return [len(one.response) % 2 for one in episodes]

def broken(episodes):
    return 1 / 0
"""


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def given(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A model, and prompts with columns that have names of ours."""
    rng = random.Random(1)
    rows = [{"prompt": sentence(rng, 1, 12), "score": i, "best_of": "x", "topic": f"t{i}"} for i in range(12)]
    prompts = write_jsonl(tmp_path_factory.mktemp("prompts") / "p.jsonl", rows)
    return [*OPTIONS, f"model.path={base}", f"prompts.path={prompts}"]


@pytest.fixture(scope="module")
def reward(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "reward"
    return make_reward_model(folder, base, kind=Kind.reward_model, shift=0.5, scale=2.0)


@pytest.fixture(scope="module")
def every(rlhf: Forks, given: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All four answers to each prompt."""
    folder = tmp_path_factory.mktemp("every")
    rlhf.run(folder, *given, "sampling.samples=4")
    return folder / RUN / "responses.jsonl"


@pytest.fixture(scope="module")
def both(reward: Path) -> list[str]:
    return ["best_of=4", "+rewards.long.program=judges:longest", "+rewards.long.weight=0.01",
            f"+rewards.rm.model.path={reward}"]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(rlhf: Forks, given: list[str], both: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chosen by a reward model and a program together."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "judges.py").write_text(PROGRAM)
    rlhf.run(folder, *given, *both)
    return folder / RUN


def expected(every: Path, better: Any) -> list[dict[str, Any]]:
    """Of each prompt the first of the answers that are `better` than the others, without the sample's number."""
    rows = read(every)
    return [{**max((row for row in rows if row["index"] == i), key=better), "sample": 0} for i in range(12)]


def without_scores(row: dict[str, Any]) -> dict[str, Any]:
    """As `rlhf generate` without best_of writes it."""
    less = {name: value for name, value in row.items() if name not in ("score", "scores", "best_of")}
    return {name.removeprefix("input_"): value for name, value in less.items()}


@pytest.mark.parametrize("judge", ["longest", "even"])
def test_a_program_picks_among_the_same_draws(
    rlhf: Forks, given: list[str], every: Path, tmp_path: Path, judge: str
) -> None:
    (tmp_path / "judges.py").write_text(PROGRAM)
    job = rlhf.run(tmp_path, *given, "best_of=4", f"+rewards.mine.program=judges:{judge}", "+rewards.mine.weight=2")
    found = read(tmp_path / RUN / "responses.jsonl")

    def score(row: dict[str, Any]) -> int:
        return len(row["response"]) if judge == "longest" else len(row["response"]) % 2

    assert [without_scores(row) for row in found] == expected(every, score)
    assert [row["input_score"] for row in found] == list(range(12)) and found[0]["input_best_of"] == "x"
    assert all(row["score"] == 2 * score(row) and row["scores"] == {"mine": score(row)} for row in found)
    assert {row["best_of"] for row in found} == {4}
    said = json.loads((tmp_path / RUN / "best_of.json").read_text())
    mean = sum(score(row) for row in found) / 12
    assert said == {"best_of": 4, "answers": 12, "score": 2 * mean, "scores": {"mine": mean},
                    "kl_upper_bound": pytest.approx(math.log(4) - 0.75)}  # fmt: skip
    assert re.search(
        rf"12 answers, .* finished; each the best of 4, score {2 * mean:.4g} on average, "
        r"KL from .* at most 0.636 nats a prompt \(upper bound: log N - \(N-1\)/N\)", job.output
    )  # fmt: skip
    assert "reward mine: program judges:" in job.output


def test_a_reward_model_picks_what_rlhf_score_says(
    rlhf: Forks, every: Path, reward: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Among all answers, and of the file itself: the scores are of the text that is written."""
    command = ["score", "runtime.threads=1", f"model.path={reward}"]
    rlhf.run(tmp_path, *command, f"data.path={every}", "output=every.jsonl")
    found = read(undisturbed / "responses.jsonl")
    rows = read(tmp_path / "every.jsonl")
    for i, row in enumerate(found):
        sums = [one["reward"] + 0.01 * len(one["response"]) for one in rows if one["index"] == i]
        assert row["score"] == pytest.approx(max(sums), abs=1e-5)
        assert row["response"] == rows[4 * i + sums.index(max(sums))]["response"]
    rlhf.run(tmp_path, *command, f"data.path={undisturbed / 'responses.jsonl'}", "name=again")
    again = read(tmp_path / "runs/again/score/rewards.jsonl")
    assert [row["reward"] for row in again] == pytest.approx([row["scores"]["rm"] for row in found], abs=1e-5)


@pytest.mark.parametrize(("crash", "tokens"), [(15, 240), (14, 60), (22, 240)])
def test_a_killed_run_goes_on_to_the_same_file(
    rlhf: Forks, given: list[str], both: list[str], undisturbed: Path, tmp_path: Path, crash: int, tokens: int
) -> None:
    """With 60 tokens a prompt's answers come in several batches; the 22nd change is the first of best_of.json."""
    (tmp_path / "judges.py").write_text(PROGRAM)
    command = [*given, *both, f"sampling.batch_tokens={tokens}"]
    job = rlhf.start(tmp_path, *command, crash=crash).wait(-9)
    files = list((tmp_path / RUN).glob("responses.*"))
    done = sum(len(read(file)) for file in files)
    assert len(files) == 1 and (done == 12 if crash == 22 else 0 < done < 12), job.output
    if crash != 22:
        files[0].write_text(files[0].read_text() + '{"index": 3, "sam')
    job = rlhf.run(tmp_path, *command)
    assert f"{done} of 12 answers are there already" in job.output
    for name in ("responses.jsonl", "best_of.json"):
        assert (tmp_path / RUN / name).read_bytes() == (undisturbed / name).read_bytes()


def test_two_processes_write_the_file_of_one(
    rlhf: Forks, given: list[str], both: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    (tmp_path / "judges.py").write_text(PROGRAM)
    rlhf.run(tmp_path, *given, *both, ranks=2)
    assert (tmp_path / RUN / "responses.jsonl").read_bytes() == (undisturbed / "responses.jsonl").read_bytes()


def test_another_choice_is_another_run(
    rlhf: Forks, given: list[str], both: list[str], reward: Path, undisturbed: Path, tmp_path: Path
) -> None:
    shutil.copytree(undisturbed, tmp_path / RUN)
    (tmp_path / "judges.py").write_text(PROGRAM)
    job = rlhf.run(tmp_path, *given, *both[1:], "best_of=3", "rewards.long.weight=1", code=2)
    assert "best_of: was 4, is now 3" in job.output
    assert "rewards.long.weight: was 0.01, is now 1.0" in job.output
    other = make_reward_model(tmp_path / "other", _body_of(given), seed=1, kind=Kind.reward_model)
    marker = tmp_path / RUN / "run.json"
    marker.write_text(marker.read_text().replace(str(reward), str(other)))
    job = rlhf.run(tmp_path, *given, *both[:-1], f"+rewards.rm.model.path={other}", code=2)
    assert re.search(r"- rewards.rm: [0-9a-f]{64} -> [0-9a-f]{64}", job.output)
    job = rlhf.run(tmp_path, *given, *both[:-1], f"+rewards.rm.model.path={other}", "name=other")
    assert "12 answers" in job.output


def _body_of(given: list[str]) -> Path:
    return Path(next(one for one in given if one.startswith("model.path=")).partition("=")[2])


def test_on_standard_output(rlhf: Forks, given: list[str], every: Path, tmp_path: Path) -> None:
    (tmp_path / "judges.py").write_text(PROGRAM)
    job = rlhf.run(tmp_path, *given, *LONGEST, "output=-")
    rows = [json.loads(line) for line in job.output.splitlines() if line.startswith('{"index"')]
    found = [without_scores(row) for row in sorted(rows, key=lambda row: row["index"])]
    assert found == expected(every, lambda row: len(row["response"]))
    assert "(upper bound: log N - (N-1)/N)" in job.output


@pytest.mark.parametrize(
    ("rewards", "message", "begun"),
    [
        (["+rewards.x.program=judges:shortest"], "rewards.x: program=judges:shortest: no such function", False),
        (["+rewards.x.model.path=none/at/all"], "rewards.x: .*there is no such folder", False),
        (["+rewards.x.program=judges:broken"], "rewards.x: program=judges:broken: ZeroDivisionError", True),
    ],
)
def test_scorers_that_fail(
    rlhf: Forks, given: list[str], tmp_path: Path, rewards: list[str], message: str, begun: bool
) -> None:
    (tmp_path / "judges.py").write_text(PROGRAM)
    job = rlhf.run(tmp_path, *given, "best_of=2", *rewards, code=2)
    assert re.search(message, job.output), job.output
    assert "Traceback" not in job.output
    assert (tmp_path / RUN / "inputs.json").exists() == begun and not list(tmp_path.rglob("responses*"))
