"""A reward model as a judge, against what transformers alone makes of the texts, and whom it may favour."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers_chat import pair
from helpers_runs import make_base
from helpers_scoring import make_reward_model, plain_reward, plain_tokens

from rlhf_pipeline.artifact import MANIFEST, Kind
from rlhf_pipeline.config.judge import JudgeConfig, JudgeKind
from rlhf_pipeline.config.schema import ReadyModelConfig, TokenizerConfig
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.judging import reward
from rlhf_pipeline.judging.open import open_judge
from rlhf_pipeline.judging.pairs import Answer, Judge, Outcome, Pair, rule
from rlhf_pipeline.judging.reward import optimised_for

ASKED = "the red cat?"
ANSWERS = ("the red cat sat", "a blue dog", "no")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a reward model as a plain folder, as an artifact, and the base they are made from."""
    folder = tmp_path_factory.mktemp("models")
    base = make_base(folder / "base")
    make_reward_model(folder / "plain", base)
    make_reward_model(folder / "artifact", base, kind=Kind.reward_model, shift=0.5, scale=2.0)
    return folder


def config_of(path: Path, **options: Any) -> JudgeConfig:
    return JudgeConfig(kind=JudgeKind.reward_model, model=ReadyModelConfig(path=str(path)), **options)


def opened(path: Path, told: list[str] | None = None, **options: Any) -> Judge:
    tell = (told if told is not None else []).append
    return open_judge(config_of(path, **options), tokenizer=TokenizerConfig(), device="cpu", tell=tell)


def by_transformers(folder: Path) -> dict[str, float]:
    prompt = [{"role": "user", "content": ASKED}]
    return {answer: plain_reward(folder, plain_tokens(folder, prompt, answer)) for answer in ANSWERS}


def test_the_higher_reward_wins(models: Path) -> None:
    truth = by_transformers(models / "plain")
    pairs = [pair(a, b, ASKED) for a in ANSWERS for b in ANSWERS]
    rulings = rule(opened(models / "plain"), pairs)
    assert all(ruling.agreed for ruling in rulings)
    expected = [0.5 + (truth[p.a.text] > truth[p.b.text]) / 2 - (truth[p.a.text] < truth[p.b.text]) / 2 for p in pairs]
    assert [ruling.value for ruling in rulings] == expected and {*expected} == {0.0, 0.5, 1.0}
    shown = [float(word) for word in rulings[1].verdicts[0].reason.removeprefix("rewards ").split(" and ")]
    assert shown == pytest.approx([truth[ANSWERS[0]], truth[ANSWERS[1]]], abs=2e-4)


def test_rewards_of_an_artifact_are_normalised(models: Path) -> None:
    truth = {name: (value - 0.5) / 2.0 for name, value in by_transformers(models / "artifact").items()}
    one, other = sorted(ANSWERS, key=truth.__getitem__, reverse=True)[:2]
    apart = truth[one] - truth[other]
    for tie, expected in ((apart - 1e-3, Outcome.a), (apart + 1e-3, Outcome.tie)):
        (verdict,) = opened(models / "artifact", tie=tie)([pair(one, other, ASKED)])
        assert verdict.outcome is expected, tie


def test_every_answer_is_scored_once(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scored: list[int] = []
    real = reward.score

    def counting(model: Any, trees: Any, **options: Any) -> Any:
        scored.append(len(trees))
        return real(model, trees, **options)

    monkeypatch.setattr(reward, "score", counting)
    answers = [*ANSWERS, ANSWERS[0]]
    judge = opened(models / "plain")
    pairs = [pair(a, b, ASKED) for a in answers for b in answers]
    first = rule(judge, [*pairs, pair("no", "no", "why?")])
    assert rule(judge, pairs) == first[:-1] and scored == [4]
    rule(judge, [pair("no", "yes", ASKED)])
    assert scored == [4, 1]


def test_whatever_a_policy_says_is_judged(models: Path) -> None:
    told: list[str] = []
    silent, endless = Answer(text="", finished=False), Answer(text="the cat " * 100, finished=False)
    prompt = pair("x", "y", ASKED).prompt
    pairs = [Pair(prompt=prompt, a=silent, b=endless), Pair(prompt=prompt, a=Answer(text="</s><|im_end|>"), b=silent)]
    rulings = rule(opened(models / "plain", told, max_length=32), pairs)
    assert all(ruling.value is not None for ruling in rulings)
    assert any("answers lose their end" in line for line in told)


def test_an_answer_that_was_cut_off_is_another_one(models: Path) -> None:
    prompt = pair("x", "y", ASKED).prompt
    (verdict,) = opened(models / "plain")(
        [Pair(prompt=prompt, a=Answer(text="a blue dog"), b=Answer(text="a blue dog", finished=False))]
    )
    assert verdict.outcome is not Outcome.tie


def test_what_is_no_reward_model(models: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^judge.model.path=.*base: "):
        opened(models / "base")
    with pytest.raises(UserError, match=r"^judge.model.path=/no/where: there is no such folder"):
        opened(Path("/no/where"))


def test_identity_is_of_the_content(models: Path) -> None:
    found = opened(models / "artifact", tie=0.25, max_length=99).identity
    digest = json.loads((models / "artifact" / MANIFEST).read_text())["content_hash"]
    assert found == {
        "kind": "reward_model",
        "path": str(models / "artifact"),
        "content_hash": digest,
        "max_length": 99,
        "tie": 0.25,
    }


# Whom it may favour


@pytest.fixture
def family(tmp_path: Path) -> Callable[..., str]:
    """family(name, content hash, **parents by name: (path, content hash)) -> the folder of an artifact without weights."""

    def make(name: str, digest: str, **parents: tuple[str, str | None]) -> str:
        folder = tmp_path / name
        folder.mkdir()
        named = {
            role.replace("__", "."): {
                "path": path,
                "content_hash": parent,
                "template_hash": None,
                "tokenizer_hash": None,
            }
            for role, (path, parent) in parents.items()
        }
        (folder / MANIFEST).write_text(json.dumps({"content_hash": digest, "parents": named}))
        return str(folder)

    return make


def test_systems_that_were_trained_to_please_the_judge(family: Callable[..., str], tmp_path: Path) -> None:
    rm = family("rm", "RM")
    sft = family("sft", "SFT", model=("gone", None))
    ppo = family("ppo", "PPO", model=(sft, "SFT"), rewards__rm=("moved/elsewhere", "RM"))
    other = family(
        "other", "OTHER", model=(sft, "SFT"), rewards__rm=(rm, "RM2")
    )  # an earlier content of the same folder
    again = family("again", "AGAIN", model=(ppo, "PPO"))
    renewed = family("renewed", "RENEWED", model=(ppo, "PPO-before"))  # of another policy that was in that folder
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / MANIFEST).write_text("{")
    paths = {"sft": sft, "ppo": ppo, "other": other, "again": again, "renewed": renewed, "rm": rm}
    paths |= {"hub": "org/name", "file": "answers.jsonl", "broken": str(tmp_path / "broken")}
    assert optimised_for(config_of(Path(rm)), paths) == ["ppo", "again"]
    gold = JudgeConfig(kind=JudgeKind.gold, model=ReadyModelConfig(path=rm))
    assert optimised_for(gold, paths) == []


def test_the_judges_own_past_counts_for_nobody(family: Callable[..., str]) -> None:
    first = family("first", "FIRST")
    second = family("second", "SECOND", model=("x", None), rewards__rm=(first, "FIRST"))
    ppo = family("ppo", "PPO", model=("x", None), rewards__rm=(second, "SECOND"))
    assert optimised_for(config_of(Path(first)), {"ppo": ppo}) == []


def test_a_judge_that_is_no_artifact_is_known_by_its_path(family: Callable[..., str], tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    ppo = family("ppo", "PPO", model=("x", None), rewards__rm=(f"{tmp_path}/x/../plain", None))
    dpo = family("dpo", "DPO", model=("x", None), reference=("x", None))
    assert optimised_for(config_of(plain), {"ppo": ppo, "dpo": dpo}) == ["ppo"]
    assert optimised_for(config_of(tmp_path / "another"), {"ppo": ppo, "dpo": dpo}) == []
