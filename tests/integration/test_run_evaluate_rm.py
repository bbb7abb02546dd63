"""`rlhf evaluate kind=rm` as a user runs it: reward models, policies and the lab's labelers on known rankings."""

from __future__ import annotations

import functools
import gzip
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers_runs import SFT_ON_FILES, TINY_RUN, Forks, dialogues, make_base, write_jsonl
from helpers_scoring import make_reward_model, plain_reward, plain_tokens

from rlhf_pipeline.data.lab.judge import judge
from rlhf_pipeline.data.lab.labelers import LABELERS
from rlhf_pipeline.data.lab.sets import rows as lab_rows
from rlhf_pipeline.files import sealed

RM = ["evaluate", "kind=rm", "runtime.threads=1"]
REAL = os.environ.get("RLHF_TEST_DATA")
ROWS: list[dict[str, Any]] = [
    {"prompt": "The old cat?", "chosen": "The cat sits.", "rejected": "A dog runs slowly.", "subset": "chat"},
    {
        "prompt": "The red mat?",
        "chosen": "On the mat.",
        "rejected": "Under the tree, today and then.",
        "subset": "chat",
    },
    {"prompt": "A book?", "chosen": "The man reads.", "rejected": "A man.", "subset": "reasoning"},
    {
        "prompt": "A house?",
        "responses": ["By the tree.", "A blue house by the tree.", "And then?"],
        "ranks": [1, 0, 2],
        "subset": "reasoning",
    },
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, base: Path, rlhf: Forks) -> Path:
    """Rankings; a reward model; a policy fine-tuned from the plain base; one fine-tuned from that one."""
    folder = tmp_path_factory.mktemp("evaluate_rm")
    write_jsonl(folder / "pairs.jsonl", ROWS[:3])
    write_jsonl(folder / "ranking.jsonl", ROWS[3:])
    write_jsonl(folder / "train.jsonl", dialogues(12))
    write_jsonl(folder / "heldout.jsonl", dialogues(4, seed=1))
    make_reward_model(folder / "reward", base)
    line = [*SFT_ON_FILES, *TINY_RUN, "batch.examples=4", "optim.lr=1e-2", "evaluation.samples=0"]
    rlhf.run(folder, *line, "name=one", f"model.path={base}")
    rlhf.run(folder, *line, "name=two", "model.path=runs/one/sft/artifact")
    return folder


def evaluated(folder: Path, name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    run = folder / f"runs/{name}/evaluate/rm"
    lines = (run / "rewards.jsonl").read_text().splitlines()
    return json.loads((run / "results.json").read_text()), [json.loads(line) for line in lines]


@functools.cache
def plain_policy(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def logprob(model: Path, tokenizer: Path, row: dict[str, Any], response: str) -> float:
    """Sum over the answer's tokens with its end token, by transformers alone."""
    import torch
    from transformers import AutoTokenizer

    prompt = [{"role": "user", "content": row["prompt"]}]
    words = AutoTokenizer.from_pretrained(tokenizer)
    text = words.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    start = len(words(text, add_special_tokens=False)["input_ids"])
    tokens = torch.tensor([plain_tokens(tokenizer, prompt, response)])
    with torch.no_grad():
        logits = plain_policy(model)(tokens).logits[0]
    each = logits[:-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
    return float(each[start - 1 :].sum())


def answers(row: dict[str, Any]) -> list[str]:
    return row.get("responses") or [row["chosen"], row["rejected"]]


def test_rewards_are_those_of_transformers_and_so_is_the_accuracy(rlhf: Forks, folder: Path, base: Path) -> None:
    systems = "systems={reward:reward,one:runs/one/sft/artifact,two:runs/two/sft/artifact}"
    job = rlhf.run(folder, *RM, "name=all", "data.path=[pairs.jsonl,ranking.jsonl]", systems)
    results, lines = evaluated(folder, "all")
    one, two = (folder / f"runs/{name}/sft/artifact" for name in ("one", "two"))
    right: dict[str, list[float]] = {"reward": [], "one": [], "two": []}
    for row, line in zip(ROWS, lines, strict=True):
        prompt = [{"role": "user", "content": row["prompt"]}]
        expected = {
            "reward": [plain_reward(folder / "reward", plain_tokens(base, prompt, answer)) for answer in answers(row)],
            "one": [logprob(one, one, row, answer) - logprob(base, one, row, answer) for answer in answers(row)],
            "two": [logprob(two, two, row, answer) - logprob(one, two, row, answer) for answer in answers(row)],
        }
        ranks = row.get("ranks", [0, 1])
        assert (line["prompt"], line["responses"], line["ranks"]) == (prompt, answers(row), ranks)
        for name, values in expected.items():
            assert line["rewards"][name] == pytest.approx(values, abs=1e-4), name
            pairs = [(i, j) for i in range(len(ranks)) for j in range(len(ranks)) if ranks[i] < ranks[j]]
            right[name] += [float(values[i] > values[j]) for i, j in pairs]
        assert max(map(abs, line["rewards"]["one"])) > 0.1, "training has moved the policy"
    assert results["comparisons"] == 6
    for name, mine in right.items():
        assert results["systems"][name]["overall"]["mean"] == pytest.approx(sum(mine) / 6)
        assert results["systems"][name]["by_subset"]["chat"]["mean"] == pytest.approx(sum(mine[:2]) / 2)
        assert results["systems"][name]["by_subset"]["reasoning"]["mean"] == pytest.approx(sum(mine[2:]) / 4)
        assert results["systems"][name]["subsets_mean"] == pytest.approx(sum(mine[:2]) / 4 + sum(mine[2:]) / 8)
    assert set(results["differences"]) == {"one - reward", "two - reward", "two - one"}
    assert "reasoning (4)" in job.output and "to reward" in job.output


def test_a_policy_is_indifferent_relative_to_itself(rlhf: Forks, folder: Path) -> None:
    policy = "runs/one/sft/artifact"
    rlhf.run(folder, *RM, "name=self", "data.path=pairs.jsonl", f"systems={{one:{policy}}}", f"reference={policy}")
    results, lines = evaluated(folder, "self")
    assert [line["rewards"]["one"] for line in lines] == [[0.0, 0.0]] * 3
    assert results["systems"]["one"]["overall"]["mean"] == 0.5


def test_neither_the_batch_nor_other_processes_matter(rlhf: Forks, folder: Path) -> None:
    line = [*RM, "data.path=[pairs.jsonl,ranking.jsonl]", "systems={reward:reward,one:runs/one/sft/artifact}"]
    rlhf.run(folder, *line, "name=together")
    rlhf.run(folder, *line, "name=alone", "batch_tokens=1", ranks=2)
    for one, other in zip(evaluated(folder, "together")[1], evaluated(folder, "alone")[1], strict=True):
        for name in ("reward", "one"):
            assert one["rewards"][name] == pytest.approx(other["rewards"][name], abs=1e-4)


def test_the_labs_people_and_its_judge(rlhf: Forks, folder: Path) -> None:
    sizes = ["data.path=lab:heldout_gold_rankings", "data.lab.heldout_gold_rankings=12"]
    job = rlhf.run(folder, *RM, "name=lab", *sizes, "systems={gold:'lab:gold',even:'lab:even',anyone:'lab:anyone'}")
    results, lines = evaluated(folder, "lab")
    drawn = set()
    even = next(labeler for labeler in LABELERS if labeler.name == "even")
    for row, line in zip(lab_rows("heldout_gold_rankings", count=12), lines, strict=True):
        assert line["rewards"]["gold"] == [judge(row["prompt"], answer).score for answer in row["responses"]]
        assert line["rewards"]["even"] == even.scores(row["prompt"], row["responses"], "evaluate")
        by = [
            who.name
            for who in LABELERS
            if line["rewards"]["anyone"] == who.scores(row["prompt"], row["responses"], "evaluate")
        ]
        assert by, "one labeler rates all answers of a row"
        drawn |= set(by)
    assert len(drawn) > 2, "another one for another row"
    assert results["systems"]["gold"]["overall"]["mean"] == 1.0, "the judge made these ranks"
    assert 0.5 < results["systems"]["even"]["overall"]["mean"] < 1.0
    assert set(results["systems"]["even"]["by_subset"]) == {line["subset"] for line in lines}
    assert re.search(r"even .* -0\.\d{3} \[-0", job.output), "its difference to the first system"


def test_rows_that_cannot_be_used(rlhf: Forks, folder: Path) -> None:
    """A broken line, and a row with an answer that is too long for the models."""
    long = {"prompt": "A?", "chosen": "red " * 400, "rejected": "a"}
    first, last = json.dumps(ROWS[0]), json.dumps(ROWS[1])
    (folder / "bad.jsonl").write_text("\n".join([first, "{", json.dumps(long), last]) + "\n")
    line = [*RM, "name=bad", "data.path=bad.jsonl", "systems={one:runs/one/sft/artifact,reward:reward}"]
    assert "bad.jsonl:2" in rlhf.run(folder, *line, code=2).output
    job = rlhf.run(folder, *line, "data.on_bad_row=skip")
    assert "bad.jsonl:2: not JSON" in job.output
    assert "one: 1 rows cannot be scored" in job.output and "bad.jsonl:3: an answer is too long" in job.output
    assert "reward: 1 rows" not in job.output, "it is not asked about a row that counts for nothing"
    results, kept = evaluated(folder, "bad")
    assert results["rows"] == 2 and [row["index"] for row in kept] == [0, 3]


def test_rows_without_an_order(rlhf: Forks, folder: Path) -> None:
    rows = [{"prompt": "A?", "responses": ["a", "b"], "ranks": None}, {**ROWS[3]}]
    write_jsonl(folder / "some.jsonl", rows[::-1])
    job = rlhf.run(folder, *RM, "name=some", "data.path=some.jsonl", "systems={reward:reward}")
    assert "1 of 2 rows have no ranks and are left out" in job.output
    assert evaluated(folder, "some")[0]["comparisons"] == 3
    write_jsonl(folder / "none.jsonl", rows[:1])
    job = rlhf.run(folder, *RM, "name=none", "data.path=none.jsonl", "systems={reward:reward}", code=2)
    assert "no row says which of its answers is better" in job.output and "Traceback" not in job.output


@pytest.mark.parametrize(
    ("systems", "others", "message"),
    [
        (
            "{mine:'lab:nobody'}",
            [],
            "systems.mine=lab:nobody: the lab has no such labeler; there are lab:gold, lab:anyone, lab:even,",
        ),
        ("{mine:'lab:even'}", [], "systems.mine=lab:even: the lab's judge cannot judge the prompt 'The old cat?'"),
        ("{mine:./nowhere}", [], "systems.mine=./nowhere: there is no such folder"),
        ("{mine:runs/one/sft}", [], "did you mean runs/one/sft/artifact?"),
        ("{mine:BASE}", [], "which only an artifact tells by itself; name that model with reference=..."),
        ("{mine:BASE}", ["reference=./nowhere"], "reference=./nowhere: there is no such folder"),
        ("{mine:BASE}", ["reference=runs/one/sft"], "did you mean runs/one/sft/artifact?"),
        ("{mine:BASE}", ["reference=other"], "reference=other: its tokenizer is another one ("),
        ("{mine:BASE}", ["reference=value"], "value: is a value_model (made by rlhf rm), and a policy is needed here"),
        ("{mine:value}", [], "is a value_model (made by rlhf rm), and a reward_model or a policy is needed here"),
        (
            "{mine:runs/moved/sft/artifact}",
            [],
            "runs/gone/sft/artifact, which is not there (any more); name that model",
        ),
        ("{mine:runs/replaced/sft/artifact}", [], "runs/two/sft/artifact, where another model is now; name that model"),
    ],
)
def test_mistakes(
    rlhf: Forks, folder: Path, base: Path, tmp_path: Path, systems: str, others: list[str], message: str
) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "runs").unlink()
    shutil.copytree(folder / "runs", tmp_path / "runs")
    for name, parent in (("moved", "gone"), ("replaced", "two")):
        artifact = tmp_path / f"runs/{name}/sft/artifact"
        shutil.copytree(folder / "runs/two/sft/artifact", artifact)
        manifest = json.loads((artifact / "artifact.json").read_text())
        manifest["parents"]["model"]["path"] = f"runs/{parent}/sft/artifact"
        (artifact / "artifact.json").write_text(json.dumps(sealed(manifest)))
    if "other" in " ".join(others):
        make_base(tmp_path / "other")
        tokens = json.loads((tmp_path / "other/tokenizer.json").read_text())
        words = tokens["model"]["vocab"]
        words["a"], words["b"] = words["b"], words["a"]
        (tmp_path / "other/tokenizer.json").write_text(json.dumps(tokens))
    if "value" in systems + " ".join(others):
        from rlhf_pipeline.artifact import Kind

        make_reward_model(tmp_path / "value", base, kind=Kind.value_model)
    line = [*RM, "data.path=pairs.jsonl", f"systems={systems.replace('BASE', str(base))}", *others]
    job = rlhf.run(tmp_path, *line, code=2)
    assert message in job.output, job.output
    assert "Traceback" not in job.output and not list((tmp_path / "runs/default").rglob("results.json"))


@pytest.mark.skipif(REAL is None, reason="RLHF_TEST_DATA is not set")
def test_a_real_benchmark(rlhf: Forks, folder: Path) -> None:
    """LLMBar, 419 rows with subsets; a tiny model guesses, whatever the accuracy says of its lengths."""
    assert REAL is not None
    file = Path(REAL) / "llmbar.jsonl.gz"
    line = [f"data.path={file}", "data.on_bad_row=skip", "systems={reward:reward}", "name=real"]
    rlhf.run(folder, *RM, *line)
    results, lines = evaluated(folder, "real")
    with gzip.open(file, "rt") as source:
        subsets = [json.loads(text)["subset"] for text in source]
    assert len(subsets) == 419 and 0 < results["comparisons"] <= 419
    assert {line["subset"] for line in lines} <= set(subsets)
    assert all(line["subset"] == subsets[line["index"]] for line in lines)
    assert sum(one["count"] for one in results["systems"]["reward"]["by_subset"].values()) == results["comparisons"]
