"""A user's mistakes: each is named as typed with the nearest valid spelling, all in one message, before torch."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_pipeline import config
from rlhf_pipeline.config.compose import examine
from rlhf_pipeline.config.explain import nearest
from rlhf_pipeline.config.identity import identity
from rlhf_pipeline.errors import UserError

GIVEN = ["data.train=some.jsonl", "model.path=some_model"]


def problems(*overrides: str, stage: str = "sft", **where: str) -> list[str]:
    return examine(stage, [*GIVEN, *overrides], **where)[1]


ONE_OVERRIDE = {
    # misspelt keys: the key as typed, the nearest valid one
    "optim.lrr=1": "optim.lrr=1: there is no key 'optim.lrr' (did you mean optim.lr?)",
    "optm.lr=1": "optm.lr=1: there is no key 'optm' (did you mean optim?)",
    "lr=1": "lr=1: there is no key 'lr' (did you mean optim.lr?)",
    "modle=lab": "modle=lab: there is no key 'modle' (did you mean model?)",
    "+optim.lrr=1": "+optim.lrr=1: there is no key 'optim.lrr' (did you mean optim.lr?)",
    "++optim.lrr=1": "++optim.lrr=1: there is no key 'optim.lrr' (did you mean optim.lr?)",
    "++a.b.c=1": "++a.b.c=1: there is no key 'a'",
    "~optim.lrr": "~optim.lrr: there is no key 'optim.lrr' (did you mean optim.lr?)",
    "batch={examples:3,exmples:4}": (
        "batch={examples:3,exmples:4}: there is no key 'batch.exmples' (did you mean batch.examples?)"
    ),
    "engine.extra.aio=1": "engine.extra.aio=1: engine.extra.aio is not set yet; write +engine.extra.aio=... to add it",
    "hydra.jobb=1": "hydra.jobb=1: there is no key 'hydra.jobb'",
    # wrong types
    "optim.lr=fast": "optim.lr=fast: Value 'fast' of type 'str' could not be converted to Float",
    "seed=1.5": "seed=1.5: Value '1.5' of type 'float' could not be converted to Integer",
    "optim.betas=[a,b]": "optim.betas=[a,b]: Value 'a' of type 'str' could not be converted to Float",
    "optim.lr=null": "optim.lr=null: field 'optim.lr' is not Optional",
    # unknown choices
    "engine=zero4": (
        "engine=zero4: there is no such choice (did you mean zero3?); "
        "engine is one of zero0, zero1, zero2, zero2_offload, zero3, zero3_offload"
    ),
    "tracking=3": "tracking=3: tracking is one of default, offline, wandb",
    "hydra/launcher=slurm": "hydra/launcher=slurm: there is no such choice; hydra/launcher is one of basic",
    "+engine=zero3": "+engine=zero3: engine is there already; leave out the +",
    # enumerations
    "tracking.wandb=Online": (
        "tracking.wandb=Online: Invalid value 'Online', expected one of [online, offline, disabled]"
    ),
    # not overrides at all
    "optim.lr": (
        "optim.lr: is not key=value; a value with special characters needs quotes (Error parsing override 'optim.lr')"
    ),
    "seed=1,2": "seed=1,2: several values; add -m to run each, or write [...] for a list, or quote them as one",
    # references to nothing
    "name=${nmae}": "name: Interpolation key 'nmae' not found",
    # what only makes sense elsewhere
    "experiment=demo_pretrain": "experiment=demo_pretrain: is an experiment of rlhf pretrain, by its name",
}


@pytest.mark.parametrize("override", ONE_OVERRIDE)
def test_one_override(override: str) -> None:
    assert problems(override) == [ONE_OVERRIDE[override]]


def test_key_below_a_section_that_is_null() -> None:
    [problem] = problems("model.shape.hidden=64")
    assert problem.startswith("model.shape.hidden=64: model.shape is null; choose a whole one first: model is one of ")


def test_missing_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_FOLDER", raising=False)
    [problem] = problems("runs=${oc.env:NO_SUCH_FOLDER}")
    assert problem.startswith("runs: ") and "Environment variable 'NO_SUCH_FOLDER' not found" in problem


COMBINATIONS: list[tuple[list[str], str]] = [
    (["model=lab", "data.max_length=512", "data.max_prompt_length=9"], "model: set exactly one of model.path"),
    (["model.path=null"], "model: set exactly one of model.path"),
    (["data.train=null"], "data.train: has no value; add data.train=..."),
    (["data.train=[a,2]"], "data.train=2: must be a path, a glob, a folder, a hub id, {path: ..., weight: ...}, or"),
    (["data.train=[]"], "data.train=[]: names nothing"),
    (["data.train={pth:a}"], "data.train={'pth': 'a'}: must be a path"),
    (["data.train={path:a,wieght:2}"], "data.train: 'wieght' says nothing about a; known are path, weight, format"),
    (["data.train=[{path:a,weight:0}]"], "data.train: weight=0 of a: must be a number above 0"),
    (["data.columns={prompt:3}"], "data.columns={'prompt': 3}: must map fields of ours to columns of yours"),
    (["data.streaming=true"], "data.streaming: how many rows to take? Set data.max_examples"),
    (["data.templates=t", "data.format=hh"], "data.templates: names the fields itself; leave out data.format"),
    (["data.workers=0"], "data.workers=0: must be more than 0"),
    (["data.lab.prompts=0"], "data.lab.prompts=0: must be more than 0"),
    (["lora=default", "lora.rank=0"], "lora.rank=0: must be more than 0"),
    (["lora=default", "lora.targets=[]"], "lora.targets=[]: must be all-linear, a name of layers, or a list of names"),
    (["lora=qlora", "engine=zero3"], "lora.quantise: the engine cannot partition quantised weights"),
    (["data.max_prompt_length=2048"], "data.max_prompt_length=2048: must be at least 1 and less than data.max_length"),
    (["batch.tokens=512"], "batch: set exactly one of batch.examples and batch.tokens"),
    (["engine.zero_stage=4"], "engine.zero_stage=4: must be 0, 1, 2 or 3"),
    (["engine=zero0", "model.dtype=bfloat16"], "engine.zero_stage=0: model.dtype=bfloat16 needs fp32 master weights"),
    (["engine=zero1", "engine.offload_optimizer=cpu"], "engine.offload_optimizer: needs engine.zero_stage 2 or 3"),
    (["engine=zero2", "engine.offload_parameters=cpu"], "engine.offload_parameters: needs engine.zero_stage=3, not 2"),
    (["+engine.extra.train_batch_size=3"], "engine.extra.train_batch_size: not one of activation_checkpointing, "),
    (["model.attention=block", "model.dropout=0.1"], "model.attention=block: has no dropout, and model.dropout=0.1"),
    (["model.dropout=2"], "model.dropout=2.0: must be between 0 and 1"),
    (["mix.ratio=0.1"], "mix.train: has no value; add mix.train=..."),
    (["mix.train=text"], "mix.ratio=0.0: leaves mix.train out"),
    (["mix.ratio=1", "mix.train=text"], "mix.ratio=1.0: must be at least 0 and less than 1"),
    (["optim.betas=[0.9]"], "optim.betas=[0.9]: Adam has two"),
    (["optim.betas=[0.9,1.0]"], "optim.betas[1]=1.0: must be at least 0 and less than 1"),
    (
        ["optim.algorithm=rmsprop", "optim.weight_decay=0.1"],
        "optim.weight_decay=0.1: RMSprop has no decoupled weight decay; use 0, or optim.algorithm=adamw",
    ),
    (["optim.warmup_steps=-1"], "optim.warmup_steps=-1: must not be negative"),
    (["train.epochs=0"], "train.epochs=0: must be more than 0"),
    (["name=a/b"], "name='a/b': a run's name is a folder name"),
    (["run_dir=''"], "run_dir: must name a folder"),
]


@pytest.mark.parametrize(("overrides", "beginning"), COMBINATIONS, ids=lambda value: str(value)[:40])
def test_impossible_combination(overrides: list[str], beginning: str) -> None:
    [problem] = problems(*overrides)
    assert problem.startswith(beginning)


WITHOUT_TRAINING = [
    ("generate", ["prompts.path=null"], "prompts.path: has no value; add prompts.path=..."),
    ("generate", ["model.path=null"], "model.path: has no value; add model.path=<an artifact, a folder or a hub id>"),
    ("generate", ["sampling.top_p=0"], "sampling.top_p=0.0: must be more than 0"),
    ("generate", ["sampling.min_p=2"], "sampling.min_p=2.0: must be between 0 and 1"),
    ("generate", ["sampling.temperature=-1"], "sampling.temperature=-1.0: must not be negative"),
    ("generate", ["sampling.temperature=0", "sampling.samples=2"], "sampling.samples=2: at temperature 0 all answers"),
    ("generate", ["sampling.min_new_tokens=999"], "sampling.min_new_tokens=999: more than sampling.max_new_tokens=256"),
    ("generate", ["prompts.columns=x"], "prompts.columns=x: must map fields of ours to columns of yours"),
    ("generate", ["best_of=0"], "best_of=0: must be more than 0"),
    (
        "generate",
        ["best_of=4"],
        "best_of=4: the best by what? Add +rewards.<name>.model.path=<an artifact of rlhf rm>, or .program, or .url",
    ),
    (
        "generate",
        ["+rewards.rm.model.path=m"],
        "rewards: choose among answers, and best_of=1 draws one; set best_of to 2 or more, or leave rewards out",
    ),
    (
        "generate",
        ["best_of=4", "+rewards.a.program=a:b", "sampling.samples=2"],
        "best_of=4: writes one answer to a prompt, and sampling.samples=2 asks for more; leave one of them out",
    ),
    (
        "generate",
        ["best_of=4", "+rewards.a.program=a:b", "sampling.temperature=0"],
        "best_of=4: at temperature 0 all answers to a prompt are the same",
    ),
    (
        "generate",
        ["best_of=4", "+rewards.a.program=a:b", "+rewards.a.weight=0"],
        "rewards: every weight is 0, which is for scorers that are only written down; one must count",
    ),
    ("generate", ["best_of=2", "+rewards.std.program=a:b"], "rewards.std: rollout/score_std is another metric; choose"),
    ("generate", ["best_of=2", "+rewards.a-b.program=a:b"], "rewards.a-b: a scorer's name stands in the names of metr"),
    ("generate", ["best_of=2", "+rewards.rm.modle.path=m"], "rewards.rm.modle: Key 'modle' not in 'ScorerConfig'"),
    (
        "generate",
        ["best_of=2", "+rewards.rm.weight=2"],
        "rewards.rm: set exactly one of model, program and url; it has",
    ),
    ("generate", ["best_of=2", "rewards=3"], "rewards=3: must map names of yours to scorers"),
    ("chat", ["model.path=null", "prompts.path=null"], "prompts.path=null: there is no key 'prompts'"),
    ("chat", ["name=.x"], "name='.x': a run's name is a folder name"),
    ("evaluate", ["systems=null"], "systems=None: name what to compare, as in 'systems={base:<model>,sft:<model>}'"),
    ("evaluate", ["systems={a:1}"], "systems={'a': 1}: name what to compare"),
    ("evaluate", ["kind=rm"], "data.path: has no value; add data.path=..."),
    ("evaluate", ["kind=select"], "reward.path: has no value; add reward.path=<a reward model>"),
    ("evaluate", ["batch_tokens=0"], "batch_tokens=0: must be more than 0"),
    ("evaluate", ["kind=winrate"], "systems={'a': 'some_model'}: kind=winrate compares systems; name two or more"),
    ("evaluate", ["kind=rank", "+systems.b=m", "baseline=a"], "baseline=a: is for kind=winrate; kind=rank has none"),
    ("evaluate", ["kind=winrate", "+systems.b=m", "baseline=c"], "baseline=c: is none of the systems, which are a, b"),
    ("evaluate", ["kind=winrate", "+systems.b=m", "judge=chat"], "judge.chat.url: has no value"),
    ("evaluate", ["kind=winrate", "+systems.b=m", "judge=reward_model"], "judge.model.path: has no value"),
    (
        "evaluate",
        ["kind=winrate", "+systems.b=m", "temperatures=[1]"],
        "temperatures: is for kind=winrate with a basel",
    ),
    (
        "evaluate",
        ["kind=winrate", "+systems.b=b.jsonl", "baseline=a", "temperatures=[1]"],
        "systems.b=b.jsonl: answers in a file cannot be drawn again",
    ),
    ("evaluate", ["+rewards.rm.program=a:b"], "rewards: kind=gold takes none"),
    ("score", ["data.path=null"], "data.path: has no value; add data.path=..."),
    ("score", ["data.max_length=1"], "data.max_length=1: a prompt token and an answer's token need 2"),
    ("score", ["model.path=null"], "model.path: has no value; add model.path=<an artifact, a folder or a hub id>"),
    ("evaluate", ["kind=best"], "kind=best: Invalid value 'best', expected one of ["),
    ("report", ["folder=null"], "folder: has no value; say which runs to tell of, as in rlhf report runs/demo"),
    ("report", ["samples=-1"], "samples=-1: must not be negative"),
    ("report", ["output=''"], "output: must name a file; leave it out for report.html in the folder"),
    ("prep", ["kind=pairs"], "kind=pairs: Invalid value 'pairs', expected one of [text, demonstration, ranking, "),
    ("prep", ["data.train=null"], "data.train: has no value; add data.train=..."),
]
GIVEN_WITHOUT_TRAINING = {
    "generate": ["model.path=some_model", "prompts.path=some.jsonl"],
    "chat": ["model.path=some_model"],
    "score": ["model.path=some_model", "data.path=some.jsonl"],
    "evaluate": ["systems={a:some_model}"],
    "prep": ["data.train=some.jsonl"],
    "report": ["folder=runs/demo"],
}


@pytest.mark.parametrize(("stage", "overrides", "beginning"), WITHOUT_TRAINING, ids=lambda value: str(value)[:40])
def test_commands_that_train_nothing(stage: str, overrides: list[str], beginning: str) -> None:
    given = GIVEN_WITHOUT_TRAINING[stage]
    assert examine(stage, given)[1] == []
    problem, *_ = examine(stage, [*given, *overrides])[1]
    assert problem.startswith(beginning)


def test_the_best_of_several_answers() -> None:
    given = [*GIVEN_WITHOUT_TRAINING["generate"], "best_of=4", "+rewards.rm.model.path=m", "+rewards.mine.program=a:b"]
    assert examine("generate", [*given, "+rewards.mine.weight=0"])[1] == []
    found = identity(examine("generate", given)[0])
    assert (found["best_of"], found["rewards.rm.model.path"], found["rewards.mine.weight"]) == (4, "m", 1.0)


RANKINGS = {
    "objective.margin=-1": "objective.margin=-1.0: must not be negative",
    "objective.soft_labels=-1": "objective.soft_labels=-1.0: must not be negative",
    "objective.centring=-0.1": "objective.centring=-0.1: must not be negative",
    "objective.label_smoothing=0.5": "objective.label_smoothing=0.5: must be at least 0 and less than a half",
    "normalise.examples=0": "normalise.examples=0: must be more than 0",
    "normalise.train=[]": "normalise.train=[]: names nothing",
    "evaluation.samples=2": "evaluation.samples=2: a reward model writes no answers; set it to 0",
}
LISTWISE = {
    "objective.ties=model": "objective.ties=model: is about pairs, and objective.loss=plackett_luce has none",
    "objective.margin=0.5": "objective.margin=0.5: is about pairs, and objective.loss=plackett_luce has none",
    "objective.label_smoothing=0.1": "objective.label_smoothing=0.1: is about pairs",
    "objective.soft_labels=0.35": "objective.soft_labels=0.35: is about pairs, and objective.loss=plackett_luce has none",
}
BESIDE_SOFT_LABELS = {
    "objective.ties=model": "objective.ties=model: objective.soft_labels=0.35 makes a tie a label of 1/2; leave one",
    "objective.margin=0.5": "objective.margin=0.5: objective.soft_labels=0.35 uses the scores already; leave one",
    "objective.label_smoothing=0.1": "objective.label_smoothing=0.1: objective.soft_labels=0.35 takes no label for",
}


@pytest.mark.parametrize("override", RANKINGS)
def test_reward_model(override: str) -> None:
    (problem,) = problems(override, stage="rm")
    assert problem.startswith(RANKINGS[override])


@pytest.mark.parametrize("override", LISTWISE)
def test_what_is_about_pairs_has_no_meaning_for_a_whole_order(override: str) -> None:
    assert problems(override, stage="rm") == []
    (problem,) = problems(override, "objective.loss=plackett_luce", stage="rm")
    assert problem.startswith(LISTWISE[override])


@pytest.mark.parametrize("override", BESIDE_SOFT_LABELS)
def test_what_soft_labels_say_already(override: str) -> None:
    (problem,) = problems(override, "objective.soft_labels=0.35", stage="rm")
    assert problem.startswith(BESIDE_SOFT_LABELS[override])


def test_soft_labels_beside_what_says_nothing_of_labels() -> None:
    beside = ["objective.divide_by=literal", "objective.centring=0.1", "data.rankings=pairs"]
    assert problems("objective.soft_labels=0.35", *beside, stage="rm") == []


@pytest.mark.parametrize("key", ["optim.lr", "optim.weight_decay", "optim.max_grad_norm", "evaluation.temperature"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_are_finite(key: str, value: float) -> None:
    assert f"{key}={value}: must be a finite number" in problems(f"{key}={value}")


def test_a_model_from_scratch_must_fit_the_data() -> None:
    found = problems("model=lab", "model.shape.heads=3", "data.max_length=600", stage="pretrain")
    assert "model.shape.heads=3: must divide model.shape.hidden=128" in found
    assert "data.max_length=600: more than model.shape.context=512" in found


def test_all_problems_in_one_message() -> None:
    with pytest.raises(UserError) as raised:
        config.load("sft", ["optim.lrr=1", "engine=zero4", "seed=x", "data.long_prompt=dropp", "train.epochs=0"])
    head, *lines, hint = str(raised.value).splitlines()
    assert head == "rlhf sft: 7 problems with the config"
    assert sorted(line.partition(":")[0] for line in lines) == [
        "  - data.long_prompt=dropp", "  - data.train", "  - engine=zero4", "  - model", "  - optim.lrr=1",
        "  - seed=x", "  - train.epochs=0",
    ]  # fmt: skip
    assert hint == "rlhf sft --help lists the options."


def test_no_complaint_about_what_a_refused_choice_would_have_set() -> None:
    """model=nope leaves the model empty and a refused experiment all that it sets; the user did not ask for that."""
    assert len(examine("sft", ["data.train=x", "model=nope"])[1]) == 1
    assert len(examine("sft", ["experiment=nope_sft"])[1]) == 1


def test_unknown_stage() -> None:
    with pytest.raises(UserError, match=r"rlhf stf: there is no such stage \(did you mean sft\?\); one of "):
        config.load("stf")


def test_config_name_of_another_stage() -> None:
    with pytest.raises(UserError, match="--config-name pretrain: is no config of rlhf sft"):
        examine("sft", GIVEN, config_name="pretrain")
    with pytest.raises(UserError, match="the config nope cannot be composed: Cannot find primary config 'nope'"):
        examine("sft", GIVEN, config_name="nope")


@pytest.fixture
def experiment(tmp_path: Path) -> Callable[[str], list[str]]:
    """experiment(text) -> the problems of a user's own experiment, after "experiment=mine_sft: "."""

    def check(text: str) -> list[str]:
        path = tmp_path / "experiment" / "mine_sft.yaml"
        path.parent.mkdir()
        path.write_text("# @package _global_\n" + textwrap.dedent(text))
        found = problems("experiment=mine_sft", extra_dir=str(tmp_path))
        assert all(problem.startswith("experiment=mine_sft: ") for problem in found)
        return [p.removeprefix("experiment=mine_sft: ").replace(str(path), "FILE") for p in found]

    return check


def test_every_mistake_in_a_file_is_named(experiment: Any) -> None:
    text = """
        seed: one
        optim:
          lrr: 1.0e-3
          eps: 1.0e-6
        data:
          long_prompt: dropp
    """
    assert experiment(text) == [
        "FILE: seed: Value 'one' of type 'str' could not be converted to Integer",
        "FILE: there is no key 'optim.lrr' (did you mean optim.lr?)",
        "FILE: data.long_prompt: Invalid value 'dropp', expected one of [drop, keep_end, keep_start, error]",
    ]


def test_file_that_is_no_yaml(experiment: Any) -> None:
    assert experiment("\noptim: [1,\n")[0].startswith("FILE, line ")


def test_file_that_asks_for_a_choice_which_does_not_exist(experiment: Any) -> None:
    [problem] = experiment("\ndefaults:\n  - override /engine: zero4\n")
    assert problem.startswith("its defaults ask for engine=zero4, and there is no such choice (did you mean zero3?)")


@pytest.mark.parametrize(
    "override",
    ["=3", "[", "a b=c d", "optim.betas.7=1", "optim=[x", "model.shape={hidden:3}", "++optim.betas.0=${nope}",
     "optim.lr.x=3", "data@x=text", "name=???", "optim={lr:[1]}", "seed=glob(*)", "engine.extra=[1]"],
)  # fmt: skip
def test_odd_input_is_a_users_mistake_and_no_crash(override: str) -> None:
    assert problems(override)


@pytest.mark.parametrize(
    ("typed", "expected"),
    [("optim.lrr", " (did you mean optim.lr?)"), ("lr", " (did you mean optim.lr?)"), ("zzz", "")],
)
def test_nearest(typed: str, expected: str) -> None:
    assert nearest(typed, ["optim.lr", "optim.eps", "data.train"]) == expected
