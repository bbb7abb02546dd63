"""Points of the frontier: which checkpoints there are, figures by hand, and what the files hold."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from rlhf_pipeline import artifact
from rlhf_pipeline.artifact import FORMAT
from rlhf_pipeline.config.frontier import FrontierConfig
from rlhf_pipeline.config.stages import EvaluateConfig
from rlhf_pipeline.data.lab.summary import Mean
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.evaluation import frontier
from rlhf_pipeline.evaluation.divergence import Divergence
from rlhf_pipeline.evaluation.diversity import Diversity
from rlhf_pipeline.evaluation.frontier import Checkpoint, axes, checkpoints, chosen, of_best, of_checkpoint
from rlhf_pipeline.files import sha256, write_json

SPREAD = Diversity(
    answers=4, tokens=3.0, characters=9.0, finished=0.75, distinct_1=0.5, distinct_2=0.25, distinct_3=None,
    identical=0.125, similarity=0.5,
)  # fmt: skip
ONE = Checkpoint(system="run", label="step_2", path="p", method="ppo", step=2, reference="sft")
SPREADS = ("distinct_1", "distinct_2", "distinct_3", "identical", "tokens", "finished")
COLUMNS = [
    *("system", "label", "method", "step", "kl", "kl_low", "kl_high", "kl_is_bound"),
    *("gold", "gold_low", "gold_high", "proxy", "proxy_low", "proxy_high", "entropy", *SPREADS),
    *("score_gold", "score_gold_low", "score_gold_high", "score_rm", "score_rm_low", "score_rm_high"),
]


def make_artifact(
    folder: Path, content: str, *, step: int = 0, stage: str = "ppo", kind: str = "policy", **more: Any
) -> Path:
    """One of a single file with this content, whose parent is the folder `sft`."""
    folder.mkdir(parents=True)
    (folder / "content.txt").write_text(content)
    files = {"content.txt": sha256(folder / "content.txt")}
    unknown = ("git_revision", "reward_shift", "reward_scale", "reward_log_tie")
    empty = ("special_ids", "data", "metrics", "versions")
    hashes = dict.fromkeys(("template_hash", "tokenizer_hash"), "h")
    manifest = {
        **dict.fromkeys(unknown),
        **{name: {} for name in empty},
        **hashes,
        "kind": kind,
        "stage": stage,
        "step": step,
        "vocab_size": 9,
        "config": {},
        "parents": {"model": {"path": "sft", "content_hash": None, **hashes}},
        "files": files,
        "content_hash": artifact._content_hash(files),
        "format": FORMAT,
        **more,
    }
    write_json(folder / "artifact.json", manifest)
    return folder


# Which there are


def test_checkpoints_of_runs_and_models(tmp_path: Path) -> None:
    """Each content once, by step; names that are none of a run's are left alone."""
    run = tmp_path / "ppo"
    kept = {"epoch_2": ("c", 10), "epoch_10": ("e", 50), "step_9": ("b", 9), "step_10": ("c", 10), "step_3": ("a", 3)}
    for name, (content, step) in kept.items():
        make_artifact(run / "artifacts" / name, content, step=step)
    make_artifact(run / "artifacts/step_11.partial", "x", step=11)
    (run / "artifacts/step_12").mkdir()  # being written
    make_artifact(run / "artifact", "f", step=55)
    config = {"objective": {"name": "ipo", "beta": 0.1}}
    alone = make_artifact(tmp_path / "ipo", "g", step=7, stage="dpo", config=config)
    found = checkpoints({"ppo": str(run), "direct": str(alone), "plain": str(tmp_path)}, "given")
    assert [(one.name, one.label, one.method, one.step) for one in found] == [
        ("ppo-step_3", "step_3", "ppo", 3),
        ("ppo-step_9", "step_9", "ppo", 9),
        ("ppo-epoch_2", "epoch_2", "ppo", 10),
        ("ppo-epoch_10", "epoch_10", "ppo", 50),
        ("ppo-artifact", "artifact", "ppo", 55),
        ("direct", "", "ipo", 7),
        ("plain", "", "model", None),
    ]
    assert {one.reference for one in found} == {"given"}
    assert found[2].path == str(run / "artifacts/epoch_2")


def test_a_run_whose_artifact_is_one_of_its_epochs(tmp_path: Path) -> None:
    for place in ("artifacts/epoch_1", "artifact"):
        make_artifact(tmp_path / "dpo" / place, "a", step=3, stage="sft")
    (one,) = checkpoints({"sft": str(tmp_path / "dpo")}, None)
    assert (one.name, one.method, one.reference) == ("sft-epoch_1", "sft", "sft")  # its parent


@pytest.mark.parametrize(
    ("systems", "message"),
    [
        ({"a": "x.jsonl"}, "systems.a=x.jsonl: answers have no KL"),
        ({"a": "RM"}, "systems.a=.*is a reward_model"),
        ({"best_of_n": "ONE"}, "best_of_n is there twice"),
        ({"a": "RUN", "a-step_4": "ONE"}, "a-step_4 is there twice"),
        ({"a": "here"}, "systems.a=here: a policy's reward is relative to .* only an artifact tells"),
    ],
)
def test_systems_that_are_refused(tmp_path: Path, systems: dict[str, str], message: str) -> None:
    places = {
        "RM": make_artifact(tmp_path / "rm", "r", kind="reward_model"),
        "ONE": make_artifact(tmp_path / "one", "o"),
        "RUN": make_artifact(tmp_path / "run/artifacts/step_4", "s", step=4).parents[1],
    }
    with pytest.raises(UserError, match=message):
        checkpoints({name: str(places.get(path, path)) for name, path in systems.items()}, None)


def test_axes() -> None:
    assert axes(FrontierConfig(proxy="rm"), ["rm", "other"]) == {"gold": None, "proxy": "rm"}
    assert axes(FrontierConfig(), ["rm", "gold"]) == {"gold": "gold", "proxy": None}


def test_the_best_of_n_is_of_one_reference() -> None:
    from rlhf_pipeline.recipes.frontier import _base

    other = replace(ONE, system="other", reference="base")
    config = EvaluateConfig(frontier=FrontierConfig(best_of=[2]))
    assert _base(config, [ONE, replace(ONE, label="step_4")]) == "sft"
    assert _base(EvaluateConfig(), [ONE, other]) is None
    with pytest.raises(UserError, match=r"have several \(base, sft\); name one for all with reference="):
        _base(config, [ONE, other])


# Figures


def divergence(kl: list[float], entropy: list[float], tokens: list[int]) -> Divergence:
    return Divergence(kl=np.array(kl), entropy=np.array(entropy), tokens=np.array(tokens))


def test_a_checkpoint_by_hand() -> None:
    """Two prompts with two answers each: intervals are over the two prompts, entropy over the ten tokens."""
    divergences = [divergence([1.0, 2.0], [3.0, 1.0], [4, 1]), divergence([5.0, 6.0], [0.5, 0.5], [2, 3])]
    scores = {"gold": np.array([[0.0, 1.0], [1.0, 1.0]]), "rm": np.array([[-1.0, 3.0], [4.0, 8.0]])}
    point = of_checkpoint(ONE, divergences, scores, SPREAD)
    assert point.kl == Mean(mean=3.5, low=1.5, high=5.5, count=2)  # both ends: one prompt drawn twice
    assert point.entropy == pytest.approx(5.0 / 10) and not point.kl_is_bound
    assert point.scores == {
        "gold": Mean(mean=0.75, low=0.5, high=1.0, count=2),
        "rm": Mean(mean=3.5, low=1.0, high=6.0, count=2),
    }
    assert (point.system, point.label, point.method, point.step) == ("run", "step_2", "ppo", 2)


def test_the_best_of_the_first_n_by_hand() -> None:
    scores = np.array([[1.0, 3.0, 3.0, 9.0], [2.0, 0.0, -1.0, 5.0], [0.0, 0.0, 4.0, 4.0]])
    assert chosen(scores, 1).tolist() == [0, 0, 0]
    assert chosen(scores, 2).tolist() == [1, 0, 0]
    assert chosen(scores, 3).tolist() == [1, 0, 2]  # of equal ones the first
    assert chosen(scores, 4).tolist() == [3, 3, 2]


def test_the_best_of_n_is_at_its_bound() -> None:
    point = of_best(4, {"rm": np.array([[1.0], [2.0]])}, SPREAD)
    assert point.kl_is_bound and point.entropy is None and point.step is None
    assert [point.kl.mean, point.kl.low, point.kl.high] == [pytest.approx(math.log(4) - 0.75)] * 3
    assert (point.system, point.label, point.method) == ("best_of_n", "4", "best_of_n")
    assert point.scores["rm"].mean == 1.5
    assert of_best(1, {"rm": np.array([[1.0]])}, SPREAD).kl.mean == 0


# Files


def points() -> list[frontier.Point]:
    scores = {"gold": np.array([[0.5], [1.0]]), "rm": np.array([[1.0], [2.0]])}
    return [
        of_checkpoint(ONE, [divergence([1.0], [2.0], [4]), divergence([3.0], [2.0], [4])], scores, SPREAD),
        of_best(2, scores, SPREAD),
    ]


WHICH: dict[str, str | None] = {"gold": "gold", "proxy": None}


def test_results() -> None:
    found = frontier.results(points(), WHICH, {"temperature": 1.0})
    assert found["kind"] == "frontier" and found["method"]["temperature"] == 1.0 and found["method"]["gold"] == "gold"
    assert "whole vocabulary" in found["method"]["kl"] and "upper bound" in found["method"]["kl_best_of_n"]
    first, second = found["points"]
    assert {*first} == {*COLUMNS[: -len(("gold", "rm")) * 3], "scores"}
    assert first["scores"] == {
        "gold": {"mean": 0.75, "low": 0.5, "high": 1.0}, "rm": {"mean": 1.5, "low": 1.0, "high": 2.0},
    }  # fmt: skip
    assert [first[name] for name in ("kl", "kl_low", "kl_high", "kl_is_bound")] == [2.0, 1.0, 3.0, False]
    assert [first[name] for name in ("gold", "gold_low", "gold_high", "proxy", "proxy_low")] == [
        0.75,
        0.5,
        1,
        None,
        None,
    ]
    assert [first[name] for name in ("entropy", *SPREADS)] == [0.5, 0.5, 0.25, None, 0.125, 3.0, 0.75]
    assert (second["kl_is_bound"], second["entropy"]) == (True, None)


def test_a_row_of_the_sheet_is_a_point(tmp_path: Path) -> None:
    frontier.write_csv(tmp_path / "frontier.csv", points(), WHICH)
    with (tmp_path / "frontier.csv").open() as file:
        sheet = csv.DictReader(file)
        rows = list(sheet)
    assert sheet.fieldnames == COLUMNS
    assert [row["system"] for row in rows] == ["run", "best_of_n"]
    assert (rows[0]["score_rm_high"], rows[0]["gold"], rows[0]["proxy"], rows[1]["step"]) == ("2.0", "0.75", "", "")


def test_every_answer_with_its_scores() -> None:
    def line(index: int, sample: int, response: str, finish: str = "stop") -> dict[str, Any]:
        prompt = [{"role": "user", "content": str(index)}]
        return {"index": index, "sample": sample, "prompt": prompt, "response": response, "finish_reason": finish}

    answers = {
        "a": [line(0, 0, "p"), line(0, 1, "q", "length"), line(3, 0, "r"), line(3, 1, "s")],
        "best_of_n": [line(0, 0, "t"), line(3, 0, "u")],
    }
    scores = {"a": {"rm": np.array([[1.0, 2.0], [3.0, 4.0]])}, "best_of_n": {"rm": np.array([[5.0], [6.0]])}}
    divergences = {"a": [divergence([0.5, 1.5], [1, 1], [1, 1]), divergence([2.5, 3.5], [1, 1], [1, 1])]}
    assert frontier.lines(answers, scores, divergences) == [
        {
            "index": 0,
            "prompt": [{"role": "user", "content": "0"}],
            "answers": {
                "a": {"responses": ["p", "q"], "finished": [True, False], "scores": {"rm": [1, 2]}, "kl": [0.5, 1.5]},
                "best_of_n": {"responses": ["t"], "finished": [True], "scores": {"rm": [5]}},
            },
        },
        {
            "index": 3,
            "prompt": [{"role": "user", "content": "3"}],
            "answers": {
                "a": {"responses": ["r", "s"], "finished": [True, True], "scores": {"rm": [3, 4]}, "kl": [2.5, 3.5]},
                "best_of_n": {"responses": ["u"], "finished": [True], "scores": {"rm": [6]}},
            },
        },
    ]


def test_a_line_a_point_for_people() -> None:
    console = Console(file=io.StringIO(), width=160)
    frontier.show(console, points(), {"gold": "gold", "proxy": "rm"}, 2)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    rows = [line for line in shown.splitlines() if line.startswith("│")]
    assert len(rows) == 2
    for part in ("run step_2", "2.000 [1.000, 3.000]", "0.750 [0.500, 1.000]", "1.500 [1.000, 2.000]", "75%"):
        assert part in rows[0]
    assert "best_of_n 2" in rows[1] and "at most 0.193" in rows[1]
