"""The commands that are hurt: tiny ones of every stage, what each needs on disk, and how its end is compared.

A command takes one to two seconds in a fork. All that several runs share lies in one folder, the *world*.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers_ppo import CASES, make_folder
from helpers_runs import (
    DPO_ON_FILES,
    RM_ON_FILES,
    TINY_RUN,
    TINY_SHAPE,
    assert_same_end,
    dialogues,
    make_base,
    metrics,
    rankings,
    sentence,
    texts,
    write_jsonl,
)
from helpers_scoring import make_reward_model, save_artifact

from rlhf_pipeline.artifact import Kind

TRAINED = ["checkpoint.every=2", "evaluation.every=3", "runtime.rank_timeout_minutes=1"]
SERVED = "+rewards.words.url"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One command, and what the plan has to know of it."""

    name: str
    command: list[str]  # without the run's name, and without model.path
    folder: str  # the run's, in runs/<name>
    same_end: Callable[[Path, Path], None]  # of two runs; raises where they differ
    steps: int = 0  # of training, 0 where there are none
    parent: str = ""  # what model.path names in the world; "" where there is no such thing
    server: str = ""  # the setting that names the server which it asks, if it asks one

    def run_of(self, folder: Path, name: str) -> Path:
        return folder / "runs" / name / self.folder


def make_world(folder: Path) -> Path:
    """Data, models and answers for all stages."""
    folder.mkdir(parents=True, exist_ok=True)
    make_folder(folder, prompts=18)
    write_jsonl(folder / "corpus.jsonl", texts(40))
    write_jsonl(folder / "chats.jsonl", dialogues(24, seed=2))
    write_jsonl(folder / "chats_heldout.jsonl", dialogues(4, seed=3))
    write_jsonl(folder / "ranked.jsonl", rankings(16, seed=4, most=4))
    write_jsonl(folder / "ranked_heldout.jsonl", rankings(5, seed=5, most=4))
    rng = random.Random(6)
    answers = [{"prompt": f"{i} {sentence(rng, 1, 8)}?", "response": sentence(rng, 2, 9)} for i in range(40)]
    write_jsonl(folder / "answers.jsonl", answers)
    for name, seed in (("one", 7), ("two", 8)):
        write_jsonl(folder / f"{name}.jsonl", [_answer(i, random.Random(seed * 100 + i)) for i in range(20)])
    make_base(folder / "plain")
    for name in ("plain", "policy"):
        _as_artifact(folder / name, folder / f"{name}_artifact")
    _in_shards(folder / "plain", folder / "sharded")
    make_reward_model(folder / "judge", folder / "plain", seed=2, kind=Kind.reward_model, shift=0.1, scale=1.5)
    return folder


def _answer(index: int, rng: random.Random) -> dict[str, Any]:
    return {
        "index": index,
        "sample": 0,
        "prompt": [{"role": "user", "content": f"What is red, number {index}?"}],
        "response": sentence(rng, 3, 9),
        "finish_reason": "stop",
        "prompt_tokens": 9,
        "response_tokens": 6,
        "origin": f"prompts.jsonl:{index + 1}",
    }


def _as_artifact(source: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    save_artifact(target, model, tokenizer, Kind.policy, stage="sft")


def _in_shards(source: Path, target: Path) -> None:
    """The same Hugging Face folder with its weights in several files."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(source).save_pretrained(target, max_shard_size="50KB")
    AutoTokenizer.from_pretrained(source).save_pretrained(target)
    assert len(list(target.glob("*.safetensors"))) > 1


def _same_file(name: str) -> Callable[[Path, Path], None]:
    def same(run: Path, undisturbed: Path) -> None:
        assert (run / name).read_bytes() == (undisturbed / name).read_bytes(), name
        left = [path.name for path in run.iterdir() if ".partial" in path.name]
        assert not left, left

    return same


def _same_trained(run: Path, undisturbed: Path) -> None:
    if (run / "samples.jsonl").exists() or undisturbed.name in ("rm", "dpo"):
        assert_same_end(run, undisturbed)
    else:  # no evaluation that wrote any
        assert metrics(run) == metrics(undisturbed)
        name = "artifact/model.safetensors"
        assert (run / name).read_bytes() == (undisturbed / name).read_bytes()


def _same_verdicts(run: Path, undisturbed: Path) -> None:
    for name in ("verdicts.jsonl", "results.json"):
        found, expected = ((one / "winrate/chat" / name).read_text() for one in (run, undisturbed))
        assert found.replace(str(run), str(undisturbed)) == expected, name


def _files(command: list[str], train: str, heldout: str) -> list[str]:
    """A command of `helpers_runs` over files of the world."""
    others = [one for one in command if not one.startswith(("data.train=", "data.heldout="))]
    return [*others, f"data.train={train}", f"data.heldout={heldout}"]


def stages() -> dict[str, Stage]:
    """By name."""
    language = ["optim.lr=1e-3", *TINY_RUN, *TRAINED]
    ppo = [one for one in CASES["gae"] if not one.startswith(("model.path", "checkpoint", "evaluation.every"))]
    served = [
        one for one in CASES["rloo"] if not one.startswith(("model.path", "checkpoint", "evaluation.every", "+rew"))
    ]
    every = [
        Stage(
            name="pretrain",
            command=["pretrain", "data.train=corpus.jsonl", "data.max_length=64", "data.heldout_fraction=0.1",
                     "batch.tokens=130", "batch.row_length=48", "train.epochs=2", *TINY_SHAPE, *language],
            folder="pretrain",
            same_end=_same_trained,
            steps=8,
        ),
        Stage(
            name="sft",
            command=["sft", "data.train=chats.jsonl", "data.heldout=chats_heldout.jsonl", "data.max_length=160",
                     "data.max_prompt_length=100", "batch.examples=6", "train.epochs=2", *language],
            folder="sft",
            same_end=_same_trained,
            steps=8,
            parent="plain_artifact",
        ),
        Stage(
            name="rm",
            command=[*_files(RM_ON_FILES, "ranked.jsonl", "ranked_heldout.jsonl"), "batch.examples=4", "train.epochs=2",
                     "optim.lr=1e-3", *TRAINED],
            folder="rm",
            same_end=_same_trained,
            steps=8,
            parent="plain_artifact",
        ),
        Stage(
            name="dpo",
            command=[*_files(DPO_ON_FILES, "ranked.jsonl", "ranked_heldout.jsonl"), "batch.examples=4", "train.epochs=2",
                     "optim.lr=1e-3", *TRAINED],
            folder="dpo",
            same_end=_same_trained,
            steps=8,
            parent="plain_artifact",
        ),
        Stage(
            name="ppo",
            command=[*ppo, "train.max_steps=4", "checkpoint.every=1", "evaluation.every=2",
                     "runtime.rank_timeout_minutes=1"],
            folder="ppo",
            same_end=_same_trained,
            steps=4,
            parent="policy_artifact",
        ),
        Stage(
            name="ppo, served",
            command=[*served, "train.max_steps=3", "checkpoint.every=1", "evaluation.every=0", "evaluation.before=false",
                     "runtime.rank_timeout_minutes=1", "+rewards.words.retries=1", "+rewards.words.batch=4"],
            folder="ppo",
            same_end=_same_trained,
            steps=3,
            parent="policy_artifact",
            server=SERVED,
        ),
        Stage(
            name="generate",
            command=["generate", "prompts.path=prompts.jsonl", "sampling.max_new_tokens=12", "sampling.samples=3",
                     "sampling.batch_tokens=300", "runtime.threads=1", "runtime.rank_timeout_minutes=1"],
            folder="generate",
            same_end=_same_file("responses.jsonl"),
            parent="policy_artifact",
        ),
        Stage(
            name="score",
            command=["score", "data.path=answers.jsonl", "batch_tokens=200", "runtime.threads=1",
                     "runtime.rank_timeout_minutes=1"],
            folder="score",
            same_end=_same_file("rewards.jsonl"),
            parent="judge",
        ),
        Stage(
            name="evaluate",
            command=["evaluate", "kind=winrate", "baseline=one", "systems={one:one.jsonl,two:two.jsonl}", "judge=chat",
                     "judge.chat.model=m", "judge.chat.retries=0", "judge.chat.concurrency=2"],
            folder="evaluate",
            same_end=_same_verdicts,
            server="judge.chat.url",
        ),
    ]  # fmt: skip
    return {stage.name: stage for stage in every}
