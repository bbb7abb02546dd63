"""`rlhf generate`: the file that it writes, from prompts of several kinds, undisturbed, killed, and in two processes."""

from __future__ import annotations

import io
import json
import random
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers_runs import ENVIRONMENT, Forks, make_base, sentence, write_jsonl

from rlhf_pipeline.config.schema import PromptsConfig, ReadyModelConfig, TokenizerConfig
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.generation.load import open_renderer
from rlhf_pipeline.generation.prompts import read_prompts
from rlhf_pipeline.models.ready import open_model

OPTIONS = ["generate", "runtime.threads=1", "sampling.max_new_tokens=8", "sampling.samples=2"]


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(1)
    rows = [{"prompt": sentence(rng, 1, 12), "topic": f"t{i}", "sample": i} for i in range(12)]
    return write_jsonl(tmp_path_factory.mktemp("prompts") / "p.jsonl", rows)


@pytest.fixture(scope="module")
def undisturbed(rlhf: Forks, base: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    job = rlhf.run(folder, *OPTIONS, f"model.path={base}", f"prompts.path={prompts}")
    assert re.search(
        r"responses.jsonl: 24 answers, [\d,]+ tokens/s in [\d.]+ s, [\d.]+ tokens on average, \d+% fin", job.output
    )
    return folder / "runs/default/generate"


def test_the_file_says_what_was_asked_and_answered(undisturbed: Path, prompts: Path) -> None:
    found, asked = read(undisturbed / "responses.jsonl"), read(prompts)
    assert [(row["index"], row["sample"]) for row in found] == [(i, k) for i in range(12) for k in range(2)]
    for row in found:
        source = asked[row["index"]]
        assert row["prompt"] == [{"role": "user", "content": source["prompt"]}]
        assert (row["topic"], row["input_sample"]) == (source["topic"], source["sample"])
        assert row["origin"] == f"{prompts}:{row['index'] + 1}"
        assert row["finish_reason"] in ("stop", "length") and 1 <= row["response_tokens"] <= 8
        assert (row["response_tokens"] == 8) or row["finish_reason"] == "stop"
        assert row["response"] == row["response"].strip() and row["prompt_tokens"] > 5
    assert len({row["response"] for row in found}) > 20
    assert not list(undisturbed.glob("*.partial*"))


def test_the_same_command_again_has_nothing_to_do(rlhf: Forks, base: Path, prompts: Path, undisturbed: Path) -> None:
    before = (undisturbed / "responses.jsonl").read_bytes()
    folder = undisturbed.parents[2]
    job = rlhf.run(folder, *OPTIONS, f"model.path={base}", f"prompts.path={prompts}")
    assert "24 of 24 answers are there already" in job.output
    assert (undisturbed / "responses.jsonl").read_bytes() == before


@pytest.mark.parametrize("crash", [8, 15, 21])
def test_a_killed_run_goes_on_to_the_same_file(
    rlhf: Forks, base: Path, prompts: Path, undisturbed: Path, tmp_path: Path, crash: int
) -> None:
    command = [*OPTIONS, f"model.path={base}", f"prompts.path={prompts}", "sampling.batch_tokens=120"]
    job = rlhf.start(tmp_path, *command, crash=crash).wait(-9)
    run = tmp_path / "runs/default/generate"
    assert (run / "responses.jsonl").exists() == (crash == 21), job.output  # 21: all but the tidying up
    parts = list(run.glob("responses.partial-*"))
    done = sum(len(read(part)) for part in parts)
    if parts:  # what a kill leaves of a line
        parts[0].write_text(parts[0].read_text() + '{"index": 3, "sam')
    job = rlhf.run(tmp_path, *command)
    assert (f"{done} of 24 answers are there already" in job.output) == (done > 0)
    assert (run / "responses.jsonl").read_bytes() == (undisturbed / "responses.jsonl").read_bytes()
    assert not list(run.glob("*.partial*"))


def test_two_processes_write_the_file_of_one(
    rlhf: Forks, base: Path, prompts: Path, undisturbed: Path, tmp_path: Path
) -> None:
    rlhf.run(tmp_path, *OPTIONS, f"model.path={base}", f"prompts.path={prompts}", ranks=2)
    file = tmp_path / "runs/default/generate/responses.jsonl"
    assert file.read_bytes() == (undisturbed / "responses.jsonl").read_bytes()


def test_another_identity_is_refused_and_shown(
    rlhf: Forks, base: Path, prompts: Path, undisturbed: Path, tmp_path: Path
) -> None:
    shutil.copytree(undisturbed, tmp_path / "runs/default/generate")
    model, given = f"model.path={base}", f"prompts.path={prompts}"
    job = rlhf.run(tmp_path, *OPTIONS, model, given, "sampling.temperature=0.5", code=2)
    assert "sampling.temperature: was 1.0, is now 0.5" in job.output
    changed = tmp_path / "copy"
    shutil.copytree(base, changed)
    marker = tmp_path / "runs/default/generate/run.json"
    marker.write_text(marker.read_text().replace(str(base), str(changed)))
    make_base(changed, seed=1)
    job = rlhf.run(tmp_path, *OPTIONS, f"model.path={changed}", given, code=2)
    assert re.search(r"- model: [0-9a-f]{64} -> [0-9a-f]{64}", job.output) and "name=" in job.output
    assert (tmp_path / "runs/default/generate/responses.jsonl").read_bytes() == (
        undisturbed / "responses.jsonl"
    ).read_bytes()


def test_standard_input_to_standard_output(base: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rlhf_pipeline", *OPTIONS, f"model.path={base}", "prompts.path=-", "output=-"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        input="the red cat?\n\n  who sits?\n",
        capture_output=True,
        text=True,
        env={"PATH": "", **ENVIRONMENT},
    )
    assert done.returncode == 0, done.stderr
    rows = sorted(
        (json.loads(line) for line in done.stdout.splitlines()), key=lambda row: (row["index"], row["sample"])
    )
    assert [(row["index"], row["sample"], row["origin"]) for row in rows] == [
        (0, 0, "stdin:1"), (0, 1, "stdin:1"), (1, 0, "stdin:3"), (1, 1, "stdin:3")]  # fmt: skip
    assert rows[2]["prompt"] == [{"role": "user", "content": "who sits?"}]
    assert "4 answers" in done.stderr
    assert not (tmp_path / "runs/default/generate/responses.jsonl").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.path=none/at/all"], "there is no such folder"),
        (["model.path={tmp}"], "no model in this folder"),
        (["model.path={reward}"], "is a reward_model"),
        (["model.path={headless}"], "no whole causal language model: score.weight|is missing"),
        (["model.path={plain}"], "no chat template"),
        (["prompts.path={tmp}/empty.jsonl"], "no prompt in it to answer"),
        (["prompts.path={tmp}/none.jsonl"], "no such file"),
        (["output={tmp}/empty.jsonl"], "this run has not written it"),
        (["output={tmp}/empty.jsonl/x"], "cannot be written"),
        (["output={tmp}"], "is a folder"),
        (["prompts.max_prompt_length=9", "prompts.long_prompt=error"], "more than 9"),
        (["prompts.max_prompt_length=2"], "no prompt in it to answer"),
    ],
)
def test_mistakes(rlhf: Forks, base: Path, prompts: Path, tmp_path: Path, overrides: list[str], message: str) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    words = " ".join(overrides)
    if "{reward}" in words:
        shutil.copytree(base, tmp_path / "reward")
        from rlhf_pipeline.artifact import Kind, Manifest, asdict  # type: ignore[attr-defined]

        manifest = Manifest(kind=Kind.reward_model, stage="rm", step=1, template_hash="", tokenizer_hash="", vocab_size=1,
                            special_ids={}, config={}, data={}, metrics={})  # fmt: skip
        (tmp_path / "reward/artifact.json").write_text(json.dumps(asdict(manifest)))
    if "{headless}" in words:
        from transformers import AutoModelForSequenceClassification

        shutil.copytree(base, tmp_path / "headless")
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
        model.config.tie_word_embeddings = False
        model.save_pretrained(tmp_path / "headless")
    if "{plain}" in words:
        shutil.copytree(base, tmp_path / "plain")
        (tmp_path / "plain/chat_template.jinja").unlink()
    places = {name: str(tmp_path / name) for name in ("reward", "headless", "plain")} | {"tmp": str(tmp_path)}
    given = [f"model.path={base}", f"prompts.path={prompts}", *(one.format(**places) for one in overrides)]
    job = rlhf.run(tmp_path, *OPTIONS, *given, code=2)
    assert re.search(message, job.output), job.output
    assert "Traceback" not in job.output
    assert not list(tmp_path.rglob("responses*"))


@pytest.mark.parametrize("full", [12, 18])  # the first batch; the file in order
def test_a_full_disk_keeps_what_is_there(
    rlhf: Forks, base: Path, prompts: Path, undisturbed: Path, tmp_path: Path, full: int
) -> None:
    command = [*OPTIONS, f"model.path={base}", f"prompts.path={prompts}", "sampling.batch_tokens=120"]
    job = rlhf.start(tmp_path, *command, full=full).wait(2)
    assert "the disk is full" in job.output and "Traceback" not in job.output
    run = tmp_path / "runs/default/generate"
    assert not (run / "responses.jsonl").exists()
    rlhf.run(tmp_path, *command)
    assert (run / "responses.jsonl").read_bytes() == (undisturbed / "responses.jsonl").read_bytes()


# Reading prompts


@pytest.fixture(scope="module")
def renderer(base: Path) -> Any:
    return open_renderer(ReadyModelConfig(path=str(base)), TokenizerConfig())


def stdin(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


def test_objects_on_standard_input(renderer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    system = {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "b"}]}
    stdin(monkeypatch, '{"prompt": "a", "n": 1}\n\n{"prompt": "b", "n": 2}\n')
    found = read_prompts(PromptsConfig(path="-"), renderer, context=None)
    assert [(one.origin, one.messages[0].content, one.columns) for one in found.asked] == [
        ("stdin:1", "a", {"n": 1}), ("stdin:3", "b", {"n": 2})]  # fmt: skip
    stdin(monkeypatch, json.dumps(system) + "\n")
    (one,) = read_prompts(PromptsConfig(path="-"), renderer, context=None).asked
    assert [m.role for m in one.messages] == ["system", "user"] and one.columns == system
    stdin(monkeypatch, '{"prompt": "a"}\nno object\n')
    with pytest.raises(UserError, match="stdin:2: not JSON"):
        read_prompts(PromptsConfig(path="-"), renderer, context=None)
    stdin(monkeypatch, "{braces} and words\n")
    (one,) = read_prompts(PromptsConfig(path="-"), renderer, context=None).asked
    assert one.messages[0].content == "{braces} and words"


def test_bad_and_long_prompts_are_counted_and_indices_stay(renderer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "a"}, {"prompt": ""}, {"prompt": "red " * 50}, {"prompt": "b"}]
    path = str(write_jsonl(tmp_path / "p.jsonl", rows))
    with pytest.raises(UserError, match=r"1 rows of prompts.path=.*\n.*:2: "):
        read_prompts(PromptsConfig(path=path), renderer, context=None)
    skip: dict[str, Any] = {"path": path, "on_bad_row": "skip", "max_prompt_length": 40}
    from rlhf_pipeline.config.schema import LongPrompt, OnBadRow

    skip["on_bad_row"] = OnBadRow.skip
    found = read_prompts(PromptsConfig(**skip), renderer, context=None)
    assert [(one.index, one.origin[-2:]) for one in found.asked] == [(0, ":1"), (2, ":4")]
    assert any("1 of 3 prompts have more than 40 tokens and are left out" in note for note in found.notes)
    whole = read_prompts(PromptsConfig(path=path, on_bad_row=OnBadRow.skip), renderer, context=None).asked[1].tokens
    for policy, expected in (
        (LongPrompt.keep_start, whole[:29]),
        (LongPrompt.keep_end, [whole[0], *whole[len(whole) - 28 :]]),
    ):
        found = read_prompts(PromptsConfig(**skip, long_prompt=policy), renderer, context=30)
        assert found.asked[1].tokens.tolist() == list(expected), "the model's context leaves 29"
        assert any("more than 29 tokens" in note for note in found.notes)


def test_the_lab_and_columns_and_several_files(renderer: Any, tmp_path: Path) -> None:
    lab = PromptsConfig(path="lab:heldout_prompts", cache_dir=str(tmp_path), max_examples=3)
    found = read_prompts(lab, renderer, context=None).asked
    assert len(found) == 3 and all("category" in one.columns for one in found)
    one = write_jsonl(tmp_path / "one.jsonl", [{"q": "a", "x": 1}])
    two = write_jsonl(tmp_path / "two.jsonl", [{"prompt": "b"}])
    config = PromptsConfig(path=[{"path": str(one), "columns": {"prompt": "q"}}, str(two)])
    found = read_prompts(config, renderer, context=None).asked
    assert [(p.index, p.messages[0].content, p.columns) for p in found] == [(0, "a", {"q": "a", "x": 1}), (1, "b", {})]
    before = read_prompts(config, renderer, context=None).fingerprint
    write_jsonl(two, [{"prompt": "c"}])
    assert read_prompts(config, renderer, context=None).fingerprint != before


def test_the_stored_dtype_is_kept_unless_another_is_asked_for(base: Path, renderer: Any, tmp_path: Path) -> None:
    import torch

    from rlhf_pipeline.config.schema import Dtype

    model = open_model(ReadyModelConfig(path=str(base), dtype=Dtype.bfloat16), renderer.tokenizer, "cpu")
    assert model.dtype == torch.bfloat16 and not model.training
    model.save_pretrained(tmp_path)
    assert open_model(ReadyModelConfig(path=str(tmp_path)), renderer.tokenizer, "cpu").dtype == torch.bfloat16
    assert stat.S_ISDIR(tmp_path.stat().st_mode)


def test_a_text_file_has_a_prompt_a_line(renderer: Any, tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_text("the red cat?\n\n who sits? \r\n")
    found = read_prompts(PromptsConfig(path=str(tmp_path / "q.txt")), renderer, context=None)
    assert [(one.origin, one.messages[0].content) for one in found.asked] == [
        (f"{tmp_path}/q.txt:1", "the red cat?"),
        (f"{tmp_path}/q.txt:3", "who sits?"),
    ]
