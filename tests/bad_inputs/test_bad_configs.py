"""Configs that cannot be: control characters, numbers too large, contradictions, and config files that are none.

Each is refused before torch is imported, by `examine`, which every command asks first. The mistakes of typing are in
tests/config/test_mistakes.py and its neighbours.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import check_message

from rlhf_pipeline.config.compose import examine
from rlhf_pipeline.errors import UserError

GIVEN = {
    "sft": ["data.train=some.jsonl", "model.path=m"],
    "ppo": ["data.train=some.jsonl", "model.path=m", "+rewards.a.model.path=r"],
    "dpo": ["data.train=some.jsonl", "model.path=m"],
    "generate": ["model.path=m", "prompts.path=-"],
    "score": ["model.path=m", "data.path=-"],
    "prep": ["data.train=some.jsonl"],
    "evaluate": ["prompts.path=p.jsonl"],
    "chat": ["model.path=m"],
    "report": ["folder=runs"],
}
LONG = "x" * 5000

# What is composed, and then refused by its values.
VALUES: list[tuple[str, str, str]] = [
    # names become folders, and are shown
    ("sft", "name=", "name='': a run's name is a folder name"),
    ("sft", "name=' '", "name=' ': a run's name is a folder name"),
    ("sft", "name=..", "name='..': a run's name is a folder name"),
    ("sft", "name=a/../../b", "name='a/../../b': a run's name is a folder name"),
    ("sft", "name='a\tb'", "control characters in it; take them out"),
    ("sft", "name='a\nb'", "control characters in it; take them out"),
    ("sft", "name='\x1b[31mred'", "control characters in it; take them out"),
    ("sft", "name='a\u202eb'", "control characters in it; take them out"),
    ("sft", f"name={LONG}", "a run's name is a folder name, of at most 200 bytes"),
    ("sft", "name='" + "\U0001f642" * 51 + "'", "of at most 200 bytes"),
    ("sft", "runs=''", "runs: must name a folder"),
    ("evaluate", "systems={a/b:m}", "systems.a/b: a system's name is a folder name"),
    ("evaluate", "systems={.a:m}", "systems..a: a system's name is a folder name"),
    ("evaluate", "systems={}", "systems={}: name what to compare"),
    ("evaluate", "systems={a:1}", "name what to compare"),
    # numbers
    ("sft", "seed=-1", "seed=-1: must be at least 0 and less than 4294967296"),
    ("sft", f"seed={2**32}", "must be at least 0 and less than 4294967296"),
    ("sft", "data.lab.seed=-1", "data.lab.seed=-1: must be at least 0"),
    ("sft", "data.max_length=99999999999999999999", "data.max_length=99999999999999999999: is too large; at most"),
    ("sft", "optim.lr=1e999", "optim.lr=inf: must be a finite number"),
    ("sft", "optim.lr=nan", "optim.lr=nan: must be a finite number"),
    ("sft", "batch.examples=-3", "batch.examples=-3: must be more than 0"),
    ("sft", "runtime.threads=0", "runtime.threads=0: must be more than 0"),
    ("sft", "optim.betas=[0.9,0.95,0.99]", "Adam has two"),
    ("generate", "sampling.temperature=inf", "sampling.temperature=inf: must be a finite number"),
    ("score", "batch_tokens=0", "batch_tokens=0: must be more than 0"),
    ("report", "samples=-1", "samples=-1: must not be negative"),
    # nothing where something is needed
    ("sft", "model.path=''", "model.path='': must be an artifact, a folder or a hub id"),
    ("generate", "model.path=''", "model.path: has no value"),
    ("sft", "data.train=''", "data.train='': must be a path"),
    ("sft", "data.train={}", "data.train={}: must be a path"),
    ("report", "folder=''", "folder: has no value"),
    ("sft", "data.train=${data.train}", "data.train: Recursive interpolation detected"),
    ("sft", "data.train=${python:1}", "data.train: Unsupported interpolation type python"),
    # what contradicts itself
    ("sft", "+engine.extra.zero_optimization=3", "engine.extra.zero_optimization=3: must be a mapping"),
    ("sft", "+engine.extra.fp16={enabled:true}", "engine.extra.fp16: not one of"),
    ("sft", "data.streaming=true", "data.streaming: how many rows to take?"),
    ("ppo", "+rewards.a.program=x:y", "rewards.a: set exactly one of model, program and url"),
    ("ppo", "+rewards.b=3", "rewards.b=3: must be a mapping"),
    ("ppo", "+rewards.a.weight=nan", "rewards.a.weight=nan: must be a finite number"),
    ("ppo", "+rewards.b.url=ftp://x", "rewards.b.url: must begin with http:// or https://"),
    ("ppo", "+rewards.b.program='no colon'", "rewards.b.program=no colon: must be module:function"),
    ("dpo", "objective.beta=0", "objective.beta=0.0: must be more than 0"),
    ("generate", "best_of=4", "best_of=4: the best by what?"),
    ("chat", "sampling.top_p=0", "sampling.top_p=0.0: must be more than 0"),
]


@pytest.mark.parametrize(("stage", "override", "words"), VALUES, ids=lambda value: repr(value)[:40])
def test_value(stage: str, override: str, words: str) -> None:
    _, problems = examine(stage, [*GIVEN[stage], override])
    assert any(words in problem for problem in problems), problems
    check_message("\n".join(problems), ())


# What Hydra refuses. All are tried at once, for each is told by itself, and a try takes long.
REFUSED: dict[str, str] = {
    "name=[a]": "Cannot convert 'list' to string",
    "runs=null": "field 'runs' is not Optional",
    "seed=true": "Value 'True' of type 'bool' could not be converted to Integer",
    "seed=0x10": "Value '0x10'",
    f"seed={'9' * 5000}": "Exceeds the limit",
    "batch.examples=1.0": "Value '1.0' of type 'float'",
    "optim.betas=0.9": "float is not a ListConfig",
    "batch=null": "field 'batch' is not Optional",
    "optim=null": "optim is one of",
    "": "is not key=value",
    "=": "is not key=value",
    "'": "is not key=value",
    "name='a": "is not key=value",
    "data.train=x=y.jsonl": "is not key=value; a value with special characters needs quotes",
    "data.train=${a": "is not key=value",
    "n\u00e4me=1": "is not key=value",
    "n\u0430me=1": "is not key=value",  # a Cyrillic letter
    f"{LONG}=1": "",
    "runtime.device=tpu": "Invalid value 'tpu'",
    "model.dtype=float16": "Invalid value 'float16'",
    "engine=zero9": "there is no such choice (did you mean zero3?)",
}
HEAD = "# @package _global_\n"
FILES: dict[str, tuple[str | bytes, str]] = {  # by --config-dir, each as experiment=<its name>
    "empty": ("", "empty.yaml: is empty"),
    "list": ("- a\n", "list.yaml: holds a list, not a mapping"),
    "text": ("just text\n", "text.yaml: holds a str, not a mapping"),
    "bytes": (b"\x00\x01\xff", "bytes.yaml: not UTF-8"),
    "utf_16": ((HEAD + "seed: 1\n").encode("utf-16"), "utf_16.yaml: not UTF-8"),
    "latin_1": ((HEAD + "name: caf\u00e9\n").encode("latin-1"), "latin_1.yaml: not UTF-8"),
    "not_closed": (HEAD + "optim: {lr: 1\n", "not_closed.yaml, line 3: not valid YAML"),
    "tab": (HEAD + "optim:\n\tlr: 1\n", "tab.yaml, line 3: not valid YAML"),
    "twice": (HEAD + "seed: 1\nseed: 2\n", "line 3: not valid YAML: found duplicate key seed"),
    "two_documents": (HEAD + "seed: 1\n---\nseed: 2\n", "line 3: not valid YAML"),
    "alias": (HEAD + "name: *x\n", "not valid YAML: found undefined alias"),
    "an_object": (
        HEAD + "name: !!python/object/apply:os.getcwd []\n",
        "not valid YAML: could not determine a constructor",
    ),
    "no_package": ("optim:\n  lr: 1\n", "no_package.yaml: its first line must be: # @package _global_"),
    "defaults": (HEAD + "defaults: 3\n", "defaults.yaml: its `defaults` must be a list"),
    "circle": (HEAD + "defaults:\n  - circle\n", "its defaults lead back to itself"),
    "nothing": (HEAD + "defaults:\n  - /engine: zero9\n", "its defaults ask for engine=zero9"),
    "nested": (HEAD + "name: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
    "misspelt": (HEAD + "optim:\n  lrr: 1\n", "misspelt.yaml: there is no key 'optim.lrr' (did you mean optim.lr?)"),
    "a_type": (HEAD + "seed: x\n", "a_type.yaml: seed: Value 'x'"),
    "number": (HEAD + "1: 2\n", "number.yaml: there is no key '1'"),
    "no_key": (HEAD + "? null\n: 1\n", "Incompatible key type 'NoneType'"),
    "choice": (HEAD + "model:\n  dtype: half\n", "choice.yaml: model.dtype: Invalid value 'half'"),
}


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("mine")
    (folder / "experiment").mkdir()
    for name, (content, _) in FILES.items():
        content = content if isinstance(content, bytes) else content.encode()
        (folder / "experiment" / f"{name}.yaml").write_bytes(content)
    chosen = [f"experiment={name}" for name in FILES]
    return examine("sft", [*GIVEN["sft"], *REFUSED, *chosen], extra_dir=str(folder))[1]


@pytest.mark.parametrize("override", REFUSED, ids=lambda value: value[:40])
def test_override(override: str, problems: list[str]) -> None:
    shown = override if len(override) < 300 else f"{override[:300]}..."
    (told,) = (problem for problem in problems if problem.startswith(f"{shown}: "))
    check_message(told, (REFUSED[override],))


@pytest.mark.parametrize("name", FILES)
def test_config_file(name: str, problems: list[str]) -> None:
    told = "\n".join(problem for problem in problems if problem.startswith(f"experiment={name}: "))
    check_message(told, (FILES[name][1],))


@pytest.mark.parametrize("kind", ["folder", "circle", "pipe"])
def test_config_file_that_is_none(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "experiment" / "mine.yaml"
    file.parent.mkdir()
    {"folder": file.mkdir, "circle": lambda: file.symlink_to("mine.yaml"), "pipe": lambda: os.mkfifo(file)}[kind]()
    (problem,) = examine("sft", [*GIVEN["sft"], "experiment=mine"], extra_dir=str(tmp_path))[1]
    assert problem.startswith("experiment=mine: there is no such choice")


@pytest.mark.parametrize("name", ["gone", "../x", "rm", "experiment/demo_sft"])
def test_config_name_of_no_stage(name: str, refused: Callable[..., str], tmp_path: Path) -> None:
    refused(lambda: examine("sft", GIVEN["sft"], extra_dir=str(tmp_path), config_name=name), name)


@pytest.mark.parametrize("stage", ["", "stf", "../sft", "sft\n"])
def test_stage_that_is_none(stage: str) -> None:
    with pytest.raises(UserError, match="there is no such stage"):
        examine(stage, [])
