"""Artifacts that a run keeps on its way, and `rlhf evaluate kind=frontier` over them, as a user runs it."""

from __future__ import annotations

import csv
import json
import math
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_ppo import CASES, make_folder
from helpers_runs import SFT_ON_FILES, TINY_RUN, Forks, dialogues, files_below, write_jsonl
from PIL import Image

from rlhf_pipeline import artifact
from rlhf_pipeline.artifact import Kind

# Four iterations with averages; the learning rate does not depend on how many there are.
PPO = [
    *(*CASES["rloo"], "ema.hand_over=true", "optim.decay=constant", "train.max_steps=4"),
    *("checkpoint.artifact_every=2", "checkpoint.artifact_every_epoch=false", "evaluation.every=2"),
]
SFT = [
    *(*SFT_ON_FILES, *TINY_RUN, "data.heldout=spoken.jsonl", "batch.examples=4", "train.epochs=2"),
    *(
        "evaluation.every=2",
        "evaluation.samples=0",
        "optim.lr=2e-3",
        "checkpoint.artifact_every=2",
        "checkpoint.every=2",
    ),
]
FRONTIER = [
    *("evaluate", "kind=frontier", "runtime.threads=1", "prompts.path=heldout.jsonl", "sampling.max_new_tokens=10"),
    *("reference=policy", "+rewards.gold.program=points:words", "+rewards.rm.model.path=reward", "frontier.proxy=rm"),
]
KILLED = int(signal.SIGKILL)
PROMPTS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts, programs, a policy and a reward model, and dialogues for fine-tuning."""
    folder = make_folder(tmp_path_factory.mktemp("frontier"))
    write_jsonl(folder / "train.jsonl", dialogues(12))
    write_jsonl(folder / "spoken.jsonl", dialogues(4, seed=1))
    return folder


@pytest.fixture(scope="module")
def ppo(folder: Path, rlhf: Forks) -> Path:
    """Killed in its fourth iteration, after what it kept of the second, and gone on with from the state of the third."""
    command = [*PPO, "name=kept"]
    rlhf.start(folder, *command, DIE_AT=f"rlhf_pipeline.resume:save:4:{KILLED}").wait(-KILLED)
    job = rlhf.run(folder, *command)
    assert "resumed after step 3" in job.output
    return folder / "runs/kept/ppo"


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "artifact.json").read_text())
    return found


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


# What a run keeps


@pytest.mark.slow
def test_ppo_keeps_its_average_on_the_way(folder: Path, ppo: Path, rlhf: Forks) -> None:
    """What is kept of the second iteration is what a run of two hands over, to the byte: the average."""
    from safetensors.torch import load_file

    assert sorted(one.name for one in (ppo / "artifacts").iterdir()) == ["epoch_1", "step_2", "step_4"]
    rlhf.run(folder, *PPO, "name=two", "train.max_steps=2", "checkpoint.artifact_every=null")
    two = folder / "runs/two/ppo"
    assert sorted(one.name for one in (two / "artifacts").iterdir()) == ["epoch_1"]
    early, late = ppo / "artifacts/step_2", ppo / "artifacts/step_4"
    assert (early / "model.safetensors").read_bytes() == (two / "artifact/model.safetensors").read_bytes()
    state = load_file(two / "state/step_00000002/rank_00000.safetensors")
    (average,) = (one for name, one in state.items() if re.fullmatch(r"policy\|.*lm_head\.weight\|0\|ema", name))
    assert average.tolist() == load_file(early / "model.safetensors")["lm_head.weight"].flatten().tolist()
    plain = {name: one for name, one in manifest(two / "artifact").items() if name != "config"}
    assert {name: one for name, one in manifest(early).items() if name != "config"} == plain
    assert plain["metrics"] and artifact.load(early, kind=Kind.policy).step == 2
    # The last iteration is kept under three names, and written once.
    same = [late, ppo / "artifacts/epoch_1", ppo / "artifact"]
    assert len({(one / "model.safetensors").stat().st_ino for one in same}) == 1
    assert len({artifact.load(one, kind=Kind.policy).content_hash for one in [early, *same]}) == 2


@pytest.mark.slow
def test_fine_tuning_killed_between_an_artifact_and_its_state(folder: Path, rlhf: Forks) -> None:
    """Six steps in two epochs. Killed when step_4 is there and the state of step 4 is not: it is made again, the same."""
    listed = rlhf.start(folder, *SFT, "name=whole", "model.path=policy", crash=0).wait()
    whole = folder / "runs/whole/sft"
    assert sorted(one.name for one in (whole / "artifacts").iterdir()) == [
        *("epoch_1", "epoch_2", "step_2", "step_4", "step_6")
    ]
    steps = {one.name: manifest(one)["step"] for one in (whole / "artifacts").iterdir()}
    assert steps == {"epoch_1": 3, "epoch_2": 6, "step_2": 2, "step_4": 4, "step_6": 6}
    changes = re.findall(r"^change \d+: (.*)$", listed.output, re.MULTILINE)
    published = max(i for i, one in enumerate(changes, start=1) if "step_4.partial" in one and "rename" in one)
    killed = folder / "runs/killed/sft"
    command = [*SFT, "name=killed", "model.path=policy"]
    rlhf.start(folder, *command, crash=published + 1).wait(-KILLED)
    assert artifact.is_artifact(killed / "artifacts/step_4")
    job = rlhf.run(folder, *command)
    assert "resumed after step 2" in job.output
    assert files_below(killed / "artifacts") == files_below(whole / "artifacts")
    for name in steps:
        found, expected = manifest(killed / "artifacts" / name), manifest(whole / "artifacts" / name)
        for one in (found, expected):
            for key in ("name", "run_dir"):
                del one["config"][key]
        assert found == expected
        assert found["metrics"] or name == "step_2"


# The frontier


def plain_kl(policy: Path, reference: Path, rows: list[dict[str, Any]]) -> list[float]:
    """Of each answer, by transformers alone, in float64."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(policy)
    models = [AutoModelForCausalLM.from_pretrained(one, dtype=torch.float64) for one in (policy, reference)]
    found = []
    for row in rows:
        text = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(prompt) == row["prompt_tokens"]
        path = torch.tensor([[*prompt, *row["response_ids"]]])
        with torch.no_grad():
            p, q = (one(input_ids=path).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for one in models)
        found.append(float((p.exp() * (p - q)).sum()))
    return found


def test_a_run_a_model_and_the_best_of_n(folder: Path, ppo: Path, rlhf: Forks) -> None:
    systems = "systems={ppo:runs/kept/ppo,other:other}"
    line = [*FRONTIER, "name=all", systems, "sampling.samples=2", "frontier.best_of=[4,1]"]
    job = rlhf.run(folder, *line)
    place = folder / "runs/all/evaluate"
    found = json.loads((place / "frontier/results.json").read_text())
    assert found["kind"] == "frontier" and found["method"]["gold"] == "gold" and found["method"]["proxy"] == "rm"
    assert found["method"]["references"] == {"ppo": "policy", "other": "policy"}
    assert (found["method"]["prompts"], found["method"]["chosen_by"]) == (PROMPTS, "rm")
    points = found["points"]
    assert [(one["system"], one["label"], one["method"], one["step"]) for one in points] == [
        ("ppo", "step_2", "ppo", 2),
        ("ppo", "epoch_1", "ppo", 4),
        ("other", "", "model", None),
        ("best_of_n", "1", "best_of_n", None),
        ("best_of_n", "4", "best_of_n", None),
    ]
    scored = lines(place / "frontier/scores.jsonl")
    assert len(scored) == PROMPTS
    paths = {"ppo-step_2": ppo / "artifacts/step_2", "ppo-epoch_1": ppo / "artifact", "other": folder / "other"}
    for point, (name, path) in zip(points, paths.items(), strict=False):
        rows = lines(place / f"answers/{name}/responses.jsonl")
        expected = plain_kl(path, folder / "policy", rows)
        assert [kl for row in scored for kl in row["answers"][name]["kl"]] == pytest.approx(expected, rel=1e-4)
        assert point["kl"] == pytest.approx(np.mean(expected), rel=1e-4) and not point["kl_is_bound"]
        assert point["kl_low"] < point["kl"] < point["kl_high"]
        gold = np.mean([row["input_score"] if "input_score" in row else score(row) for row in rows])
        assert point["gold"] == point["scores"]["gold"]["mean"] == pytest.approx(gold)
        assert point["proxy"] == point["scores"]["rm"]["mean"]
        assert 0 < point["entropy"] < math.log(400) and point["identical"] is not None
        assert point["tokens"] == np.mean([row["response_tokens"] for row in rows])
        assert point["finished"] == np.mean([row["finish_reason"] == "stop" for row in rows])
    best = [row["answers"]["best_of_n"] for row in scored]
    assert all(len(one["responses"]) == 4 for one in best)
    for point, n in zip(points[3:], (1, 4), strict=True):
        assert point["kl_is_bound"] and point["kl"] == point["kl_high"] == pytest.approx(math.log(n) - (n - 1) / n)
        chosen = [int(np.argmax(one["scores"]["rm"][:n])) for one in best]
        pairs = list(zip(best, chosen, strict=True))
        assert point["gold"] == pytest.approx(np.mean([one["scores"]["gold"][k] for one, k in pairs]))
        assert point["proxy"] == pytest.approx(np.mean([one["scores"]["rm"][k] for one, k in pairs]))
        assert point["entropy"] is None and point["identical"] is None
    assert points[4]["proxy"] > points[3]["proxy"]
    with (place / "frontier/frontier.csv").open() as file:
        sheet = list(csv.DictReader(file))
    assert [float(row["kl"]) for row in sheet] == [one["kl"] for one in points]
    for name in ("frontier.png", "proxy_gold.png"):
        with Image.open(place / "frontier" / name) as picture:
            assert picture.format == "PNG"
    assert "ppo step_2" in job.output and "at most 0.636" in job.output
    again = rlhf.run(folder, *line)
    assert again.output.count("answers are there already") == 4
    assert json.loads((place / "frontier/results.json").read_text()) == found


def score(row: dict[str, Any]) -> float:
    from helpers_ppo import points

    return points(row["response"], row["bonus"])


def test_the_parent_is_the_reference_and_gold_is_enough(folder: Path, ppo: Path, rlhf: Forks) -> None:
    """The policy's own parent, one scorer and two processes; and the parent, whose KL is 0, in one."""
    line = [one for one in FRONTIER if "reference=" not in one and "rm" not in one]
    rlhf.run(
        folder, *line, "name=parent", "systems={ppo:runs/kept/ppo/artifacts/step_2}", "prompts.max_examples=3", ranks=2
    )
    (point,) = json.loads((folder / "runs/parent/evaluate/frontier/results.json").read_text())["points"]
    assert point["kl"] > 0 and point["proxy"] is None and point["label"] == ""
    assert not (folder / "runs/parent/evaluate/frontier/proxy_gold.png").exists()
    itself = [*line, "name=itself", "systems={sft:policy}", "reference=policy", "prompts.max_examples=3"]
    rlhf.run(folder, *itself)
    (point,) = json.loads((folder / "runs/itself/evaluate/frontier/results.json").read_text())["points"]
    assert point["kl"] == point["kl_high"] == 0
    answers = folder / "runs/itself/evaluate/answers/sft/responses.jsonl"
    write_jsonl(answers, [{k: v for k, v in row.items() if k != "response_ids"} for row in lines(answers)])
    job = rlhf.run(folder, *itself, code=2)
    assert "the answers of sft were drawn by an earlier version" in job.output


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["systems={a:answers.jsonl}"], "systems.a=answers.jsonl: answers have no KL divergence"),
        (["systems={a:reward}"], "systems.a=reward: reward: is a reward_model"),
        (["systems={a:other}", "reference=./none"], "systems.a=other: reference=./none: there is no such folder"),
        (["systems={best_of_n:other}"], "systems: best_of_n is there twice"),
        (["systems={a:other}", "rewards.rm.model.path=other"], "rewards.rm=other: is no reward model"),
    ],
)
def test_mistakes(folder: Path, rlhf: Forks, given: list[str], message: str) -> None:
    job = rlhf.run(folder, *FRONTIER, "name=mistake", *given, code=2)
    assert message in job.output, job.output
    assert "Traceback" not in job.output and not (folder / "runs/mistake/evaluate/answers").exists()
