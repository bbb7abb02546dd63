"""What is complained about in a judge's section, and that opening a judge imports no more than it needs."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest

from rlhf_pipeline.config.check_judge import check_judge
from rlhf_pipeline.config.judge import ChatJudgeConfig, JudgeConfig, JudgeKind
from rlhf_pipeline.config.schema import ReadyModelConfig, TokenizerConfig
from rlhf_pipeline.judging.open import open_judge

CHAT = ChatJudgeConfig(url="https://host:8000/v1", model="m", cache_dir="cache")
GOOD = {
    JudgeKind.gold: JudgeConfig(kind=JudgeKind.gold),
    JudgeKind.reward_model: JudgeConfig(kind=JudgeKind.reward_model, model=ReadyModelConfig(path="m")),
    JudgeKind.chat: JudgeConfig(kind=JudgeKind.chat, chat=CHAT),
    JudgeKind.recorded: JudgeConfig(kind=JudgeKind.recorded, path="verdicts.csv"),
}


def problems(kind: JudgeKind, chat: dict[str, Any] | None = None, **changes: Any) -> list[str]:
    config = dataclasses.replace(GOOD[kind], **changes)
    config = dataclasses.replace(config, chat=dataclasses.replace(config.chat, **(chat or {})))
    return list(check_judge("judge", config))


@pytest.mark.parametrize("kind", JudgeKind)
def test_what_is_given_is_enough(kind: JudgeKind) -> None:
    assert problems(kind) == []


@pytest.mark.parametrize(
    ("kind", "changes", "told"),
    [
        (JudgeKind.gold, {"tie": -0.1}, "judge.tie=-0.1: must not be negative"),
        (JudgeKind.gold, {"name": "a/b"}, "judge.name='a/b': must be a folder's name, without a slash and not st"),
        (JudgeKind.gold, {"name": ".."}, "judge.name='..': must be a folder's name"),
        (JudgeKind.gold, {"name": ""}, "judge.name='': must be a folder's name"),
        (JudgeKind.reward_model, {"tie": -1.0}, "judge.tie=-1.0: must not be negative"),
        (JudgeKind.reward_model, {"model": ReadyModelConfig()}, "judge.model.path: has no value; name a reward model"),
        (JudgeKind.reward_model, {"max_length": 1}, "judge.max_length=1: a prompt token and a response token need 2"),
        (JudgeKind.reward_model, {"batch_tokens": 0}, "judge.batch_tokens=0: must be more than 0"),
        (JudgeKind.recorded, {"path": None}, "judge.path: has no value; name a file of verdicts (.jsonl or .csv)"),
        (JudgeKind.recorded, {"path": ""}, "judge.path: has no value; name a file of verdicts (.jsonl or .csv)"),
    ],
)
def test_one_problem(kind: JudgeKind, changes: dict[str, Any], told: str) -> None:
    (found,) = problems(kind, **changes)
    assert found.startswith(told)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"url": None}, "url: has no value; name a server, as in judge.chat.url=http://127.0.0.1:8000/v1"),
        ({"url": "host:8000/v1"}, "url=host:8000/v1: must be http://host:port/v1, or https"),
        ({"url": "http:///v1"}, "url=http:///v1: must be http"),
        ({"url": "http://[::1/v1"}, "url=http://[::1/v1: is no address: Invalid IPv6 URL"),
        ({"url": "ftp://me:hunter2@host/v1"}, "url=ftp://***@host/v1: must be http"),
        ({"url": "http://host/v1?key=x"}, "url=http://host/v1?key=***: must end where the paths of the API begin"),
        ({"url": "http://host/v1/chat/completions"}, "url=http://host/v1/chat/completions: must end where"),
        ({"model": None}, "model: has no value; name the model as the server calls it"),
        ({"template": ""}, "template: has no value; judge.chat.template=pairwise is the one that is shipped"),
        ({"max_tokens": 0}, "max_tokens=0: must be more than 0"),
        ({"timeout": 0.0}, "timeout=0.0: must be more than 0"),
        ({"concurrency": 0}, "concurrency=0: must be more than 0"),
        ({"requests_per_minute": 0.0}, "requests_per_minute=0.0: must be more than 0"),
        ({"temperature": -0.1}, "temperature=-0.1: must not be negative"),
        ({"retries": -1}, "retries=-1: must not be negative"),
        ({"cache_dir": ""}, "cache_dir: must name a folder"),
    ],
)
def test_one_problem_of_a_server(change: dict[str, Any], told: str) -> None:
    (found,) = problems(JudgeKind.chat, change)
    assert found.startswith(f"judge.chat.{told}")
    assert problems(JudgeKind.gold, change) == [], "what another kind needs is not looked at"


def test_the_name_of_a_judge() -> None:
    opened = [
        open_judge(JudgeConfig(kind=JudgeKind.gold, name=name), tokenizer=TokenizerConfig(), device="cpu", tell=print)
        for name in (None, "truth")
    ]
    assert [judge.name for judge in opened] == ["gold", "truth"]


def test_a_judge_imports_what_it_needs() -> None:
    program = """
import sys
from rlhf_pipeline.config.judge import ChatJudgeConfig, JudgeConfig, JudgeKind
from rlhf_pipeline.config.schema import TokenizerConfig
from rlhf_pipeline.judging.open import open_judge
for config in (JudgeConfig(), JudgeConfig(kind=JudgeKind.chat, chat=ChatJudgeConfig(url="http://h/v1", model="m"))):
    open_judge(config, tokenizer=TokenizerConfig(), device="cpu", tell=print)
    print(sorted({"torch", "transformers", "datasets", "httpx", "jinja2"} & sys.modules.keys()))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["[]", "['httpx', 'jinja2']"]
