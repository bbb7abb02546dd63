"""`rlhf evaluate kind=select` as a user runs it: candidates answer, a reward model chooses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers_runs import SFT_ON_FILES, TINY_RUN, Forks, dialogues, make_base, write_jsonl
from helpers_scoring import make_reward_model, plain_reward, plain_tokens

from rlhf_pipeline.artifact import Kind

SELECT = ["evaluate", "kind=select", "runtime.threads=1", "prompts.path=prompts.jsonl", "sampling.max_new_tokens=12"]
SHIFT, SCALE = 0.5, 2.0
COUNT = 8  # prompts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, base: Path, rlhf: Forks) -> Path:
    """Prompts, a reward model that is normalised, and a run of two epochs."""
    folder = tmp_path_factory.mktemp("evaluate_select")
    long = {"prompt": "The old cat and then the red dog slowly on the mat under the blue tree today?"}
    write_jsonl(folder / "prompts.jsonl", [{"prompt": f"The old {i} cat?"} for i in range(COUNT - 1)] + [long])
    write_jsonl(folder / "train.jsonl", dialogues(12))
    write_jsonl(folder / "heldout.jsonl", dialogues(4, seed=1))
    make_reward_model(folder / "reward", base, kind=Kind.reward_model, shift=SHIFT, scale=SCALE)
    line = [*SFT_ON_FILES, *TINY_RUN, "batch.examples=4", "optim.lr=2e-2", "train.epochs=2", "evaluation.samples=0"]
    rlhf.run(folder, *line, "name=tuned", f"model.path={base}")
    return folder


def results(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"runs/{name}/evaluate/select/results.json").read_text())
    return found


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_epoch_with_the_highest_reward_wins(rlhf: Forks, folder: Path, base: Path) -> None:
    line = [*SELECT, "name=epochs", "reward.path=reward", f"systems={{sft:runs/tuned/sft,base:{base}}}"]
    job = rlhf.run(folder, *line, "sampling.samples=2")
    names = {f"sft-epoch_{n}": f"runs/tuned/sft/artifacts/epoch_{n}" for n in (1, 2)} | {"base": str(base)}
    found = results(folder, "epochs")
    assert {name: one["path"] for name, one in found["candidates"].items()} == names
    mean = {}
    for name, one in found["candidates"].items():
        answered = lines(folder / f"runs/epochs/evaluate/answers/{name}/responses.jsonl")
        scored = lines(folder / "runs/epochs/evaluate/select/rewards.jsonl")
        assert len(answered) == 2 * COUNT and len(scored) == COUNT
        rewards = [reward for row in scored for reward in row["answers"][name]["rewards"]]
        for answer, reward in zip(answered, rewards, strict=True):
            if answer["finish_reason"] == "stop" and answer["response"]:
                tokens = plain_tokens(base, answer["prompt"], answer["response"])
                expected = (plain_reward(folder / "reward", tokens) - SHIFT) / SCALE
                assert reward == pytest.approx(expected, abs=1e-4)
        mean[name] = sum(rewards) / len(rewards)
        assert one["reward"]["mean"] == pytest.approx(mean[name]) and one["reward"]["count"] == COUNT
        stopped = [answer["finish_reason"] == "stop" for answer in answered]
        assert one["finished"] == sum(stopped) / len(stopped)
        assert one["tokens"] == sum(answer["response_tokens"] for answer in answered) / len(answered)
    assert any(one["finished"] > 0 for one in found["candidates"].values()), "the comparison with transformers is empty"
    order = sorted(mean, key=lambda name: -mean[name])
    assert (found["winner_name"], found["winner"], found["runner_up"]) == (order[0], names[order[0]], order[1])
    gap = mean[order[0]] - mean[order[1]]
    assert found["candidates"][order[1]]["behind"]["mean"] == pytest.approx(gap)
    assert f"best: {names[order[0]]}" in job.output and f"{order[0]} - {order[1]}: " in job.output
    again = rlhf.run(folder, *line, "sampling.samples=2")
    assert again.output.count(f"{2 * COUNT} of {2 * COUNT} answers are there already") == 3
    assert results(folder, "epochs") == found


def test_a_single_candidate_wins_alone(rlhf: Forks, folder: Path, base: Path) -> None:
    job = rlhf.run(folder, *SELECT, "name=alone", "reward.path=reward", f"systems={{base:{base}}}")
    assert "base is the only candidate" in job.output
    found = results(folder, "alone")
    assert (found["winner"], found["runner_up"], found["is_clear"]) == (str(base), None, None)


def test_several_processes_answer_and_the_first_chooses(rlhf: Forks, folder: Path, base: Path) -> None:
    line = [*SELECT, "reward.path=reward", "systems={sft:runs/tuned/sft}"]
    rlhf.run(folder, *line, "name=together", ranks=2)
    rlhf.run(folder, *line, "name=by_itself")
    together, alone = (results(folder, name) for name in ("together", "by_itself"))
    assert together["winner"] == alone["winner"]
    for name, one in alone["candidates"].items():
        assert together["candidates"][name]["reward"]["mean"] == pytest.approx(one["reward"]["mean"], abs=1e-4)


@pytest.mark.parametrize(
    ("systems", "reward", "message"),
    [
        ("{a:answers.jsonl}", "reward", "systems.a=answers.jsonl: answers are no model to choose"),
        ("{a:runs/tuned}", "reward", "systems.a=runs/tuned: no model in this folder"),
        (
            "{a:reward}",
            "reward",
            "systems.a=reward: reward: is a reward_model (made by rlhf rm), and a policy is needed",
        ),
        ("{a:BASE}", "BASE", "is no reward model; rlhf rm trains one"),
        ("{a:BASE}", "./nowhere", "reward.path=./nowhere: there is no such folder"),
        ("{a:BASE}", "runs/tuned/sft/artifact", "is no reward model; rlhf rm trains one"),
        ("{a:runs/tuned/sft,a-epoch_2:BASE}", "reward", "systems: a-epoch_2 is there twice"),
        ("{a:BASE,b:short}", "reward", "a and b answered other prompts (8 and 7)"),
    ],
)
def test_mistakes(
    rlhf: Forks, folder: Path, base: Path, tmp_path: Path, systems: str, reward: str, message: str
) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    if "short" in systems:
        make_base(tmp_path / "short", context=19)
    given = [f"systems={systems.replace('BASE', str(base))}", f"reward.path={reward.replace('BASE', str(base))}"]
    job = rlhf.run(tmp_path, *SELECT, "name=mistake", f"runs={tmp_path / 'mine'}", *given, code=2)
    assert message in job.output, job.output
    assert "Traceback" not in job.output and not list((tmp_path / "mine").rglob("results.json"))
