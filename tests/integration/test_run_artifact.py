"""What a stage hands over: complete, checked, at home in transformers, and the root of the next stage."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers_runs import (
    ENVIRONMENT,
    SFT_ON_FILES,
    TINY_RUN,
    TINY_SHAPE,
    Forks,
    dialogues,
    files_below,
    relative_difference,
    series,
    texts,
    weights,
    write_jsonl,
)
from helpers_scoring import make_small_reward_model, plain_reward, plain_tokens

from rlhf_pipeline import artifact
from rlhf_pipeline.artifact import Kind, Parent
from rlhf_pipeline.errors import UserError

FILES = {
    "README.md",
    "artifact.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
CHECKED = FILES - {"README.md", "artifact.json"}
PRETRAIN = [
    "pretrain",
    "data.train=text.jsonl",
    "data.max_length=64",
    "data.heldout_fraction=0.1",
    "batch.tokens=200",
    "train.epochs=3",
    *TINY_SHAPE,
    *TINY_RUN,
]
SFT = [
    *SFT_ON_FILES,
    "batch.examples=8",
    "optim.lr=2e-3",
    "model.path=runs/a/pretrain/artifact",
    *TINY_RUN,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact")
    write_jsonl(folder / "text.jsonl", texts(56))
    write_jsonl(folder / "train.jsonl", dialogues(32))
    write_jsonl(folder / "heldout.jsonl", dialogues(4, seed=1))
    return folder


@pytest.fixture(scope="module")
def pretrained(folder: Path, rlhf: Forks) -> Path:
    rlhf.run(folder, *PRETRAIN, "name=a")
    return folder / "runs/a/pretrain"


@pytest.fixture(scope="module")
def tuned(folder: Path, pretrained: Path, rlhf: Forks) -> Path:
    rlhf.run(folder, *SFT, "name=a")
    return folder / "runs/a/sft"


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "artifact.json").read_text())


def test_files_and_checksums(pretrained: Path, tuned: Path) -> None:
    for run in (pretrained, tuned):
        assert files_below(run / "artifact") == FILES
        written = manifest(run / "artifact")["files"]
        assert written.keys() == CHECKED
        for name, digest in written.items():
            assert hashlib.sha256((run / "artifact" / name).read_bytes()).hexdigest() == digest


def test_an_artifact_for_every_epoch_that_stands_alone(pretrained: Path, tmp_path: Path) -> None:
    assert sorted(path.name for path in (pretrained / "artifacts").iterdir()) == ["epoch_1", "epoch_2", "epoch_3"]
    steps = [manifest(pretrained / f"artifacts/epoch_{n}")["step"] for n in (1, 2, 3)]
    assert steps[0] > 0 and steps == [steps[0], 2 * steps[0], 3 * steps[0]]
    for n in (1, 2, 3):
        epoch = pretrained / f"artifacts/epoch_{n}"
        assert files_below(epoch) == FILES
        assert not any(path.is_symlink() for path in epoch.iterdir())
    contents = {(pretrained / f"artifacts/epoch_{n}/model.safetensors").read_bytes() for n in (1, 2, 3)}
    assert len(contents) == 3
    # The newest is `artifact`, by name and without a second copy; either may go and the other stays whole.
    copy = tmp_path / "run"
    shutil.copytree(pretrained, copy)
    shutil.rmtree(copy / "artifacts")
    artifact.load(copy / "artifact", kind=Kind.policy)
    newest, current = (p / "model.safetensors" for p in (pretrained / "artifacts/epoch_3", pretrained / "artifact"))
    assert newest.read_bytes() == current.read_bytes()
    assert newest.stat().st_ino == current.stat().st_ino


def test_only_the_last_artifact_where_the_others_are_not_wanted(folder: Path, pretrained: Path, rlhf: Forks) -> None:
    rlhf.run(folder, *PRETRAIN, "name=last_only", "checkpoint.artifact_every_epoch=false")
    run = folder / "runs/last_only/pretrain"
    assert [path.name for path in (run / "artifacts").iterdir()] == ["epoch_3"]
    assert (run / "artifact/model.safetensors").read_bytes() == (pretrained / "artifact/model.safetensors").read_bytes()


def test_what_it_says_of_itself(pretrained: Path, tuned: Path) -> None:
    base, child = (
        artifact.load(pretrained / "artifact", kind=Kind.policy),
        artifact.load(tuned / "artifact", kind=Kind.policy),
    )
    assert (base.stage, child.stage) == ("pretrain", "sft")
    assert base.parents == {}
    assert child.parents == {
        "model": Parent(
            path="runs/a/pretrain/artifact",
            content_hash=base.content_hash,
            template_hash=base.template_hash,
            tokenizer_hash=base.tokenizer_hash,
        )
    }
    # The template and the tokenizer travel.
    assert (child.template_hash, child.tokenizer_hash) == (base.template_hash, base.tokenizer_hash)
    for name in ("chat_template.jinja", "tokenizer.json"):
        assert (pretrained / "artifact" / name).read_bytes() == (tuned / "artifact" / name).read_bytes()
    assert base.content_hash != child.content_hash
    assert child.vocab_size == 400 and child.special_ids == {"bos": 1, "eos": 2, "pad": 0}
    assert child.step == 4
    assert child.config["optim"]["lr"] == 2e-3 and child.config["model"]["path"] == "runs/a/pretrain/artifact"
    assert child.data["demonstrations"]["counts"]["rows"] == 32
    assert child.data["demonstrations"]["counts"]["kept"] == 32
    assert set(child.versions) >= {"torch", "transformers", "deepspeed"}
    assert 0 < child.metrics["eval/loss"] < 6.1
    assert child.reward_shift is None and child.reward_scale is None


OUTSIDE = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, text = sys.argv[1], json.loads(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder).eval()
assert model.dtype == torch.float32
prompt = tokenizer.apply_chat_template(text[:-1], add_generation_prompt=True, tokenize=True, return_dict=False)
whole = tokenizer.apply_chat_template(text, tokenize=True, return_dict=False)
assert whole[: len(prompt)] == prompt
ids = torch.tensor([whole])
with torch.no_grad():
    logprobs = model(ids).logits[0].log_softmax(-1)
answer = whole[len(prompt):]
values = [float(logprobs[len(prompt) - 1 + i, token]) for i, token in enumerate(answer)]
generated = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt):].tolist()
assert not any(name.partition(".")[0] in ("rlhf_pipeline", "deepspeed") for name in sys.modules)
print(json.dumps({"ids": whole, "prompt": len(prompt), "logprobs": values, "generated": generated}))
"""
TEXT = [
    {"role": "user", "content": "3 0 old cat reads?"},
    {"role": "assistant", "content": "the blue dog sits by the tree"},
]


def test_transformers_alone_computes_the_same(tuned: Path, tmp_path: Path) -> None:
    """In a process that never sees our package: the tokens, the log-probabilities, and a greedy answer."""
    import numpy as np
    import torch

    from rlhf_pipeline.config.schema import Attention, ModelConfig, TokenizerConfig
    from rlhf_pipeline.data.packing import pack
    from rlhf_pipeline.data.prompts import Renderer
    from rlhf_pipeline.data.records import Message
    from rlhf_pipeline.data.tokenizer import open_tokenizer
    from rlhf_pipeline.data.tree import Tree
    from rlhf_pipeline.models.load import load_policy
    from rlhf_pipeline.models.tree_model import TreeBatch

    script = tmp_path / "outside.py"
    script.write_text(OUTSIDE)
    folder = tmp_path / "moved"  # somewhere else, where nothing of the run is near
    shutil.copytree(tuned / "artifact", folder)
    environment = {k: v for k, v in ENVIRONMENT.items() if k != "PYTHONPATH"}
    found = subprocess.run(
        [sys.executable, "-P", str(script), str(folder), json.dumps(TEXT)],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    outside = json.loads(found.stdout)

    tokenizer = open_tokenizer(str(folder), TokenizerConfig())
    tokens, scored = Renderer(tokenizer).encode(
        [Message(m["role"], m["content"], scored=m["role"] != "user") for m in TEXT]
    )
    assert tokens.tolist() == outside["ids"]
    assert scored.sum() == len(outside["logprobs"]) and scored[outside["prompt"]]
    assert tokens[-1] == tokenizer.eos_token_id
    tree = Tree(
        prompt=tokens[: outside["prompt"]],
        responses=(tokens[outside["prompt"] :],),
        scored=(np.ones(len(outside["logprobs"]), bool),),
        index=0,
    )
    other = Tree(prompt=tokens[:9], responses=(tokens[9:30],), scored=(np.ones(len(tokens[9:30]), bool),), index=1)
    model = load_policy(
        ModelConfig(path=str(folder), attention=Attention.auto),
        tokenizer=tokenizer,
        seed=0,
        device=torch.device("cpu"),
        deepspeed_config=None,
    )
    batch = TreeBatch.of(pack([[other, tree]]), torch.device("cpu"))
    with torch.no_grad():
        ours = model(batch)[batch.sequence == 1]
    torch.testing.assert_close(ours, torch.tensor(outside["logprobs"]), rtol=0, atol=1e-5)
    answer = model.inner.generate(
        torch.tensor([tokens[: outside["prompt"]].tolist()]), max_new_tokens=12, do_sample=False
    )
    assert answer[0, outside["prompt"] :].tolist() == outside["generated"]


# The model card


def said(card: Path) -> dict[str, str]:
    """Rows of the card's tables with two columns."""
    cells = [line.strip("| ").split(" | ") for line in card.read_text().splitlines() if line.startswith("| ")]
    return {row[0].strip("`"): row[1].strip("`") for row in cells if len(row) == 2}


def what_it_prints(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """Run the card's only Python, as somebody who stands in the folder."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(folder)
    capsys.readouterr()
    exec(compile(code, "README.md", "exec"), {})
    return capsys.readouterr().out


def test_card(pretrained: Path, tuned: Path) -> None:
    card = tuned / "artifact/README.md"
    parameters = sum(tensor.numel() for tensor in weights(tuned / "artifact").values())
    assert said(card)["parameters"] == f"{parameters:,}"
    assert said(card)["weights"] == "float32" and said(card)["made by"] == "rlhf sft`, after step 4"
    assert said(card)["content hash"] == manifest(tuned / "artifact")["content_hash"]
    assert said(card)["optim.lr"] == "0.002" and said(card)["batch.examples"] == "8"
    base = manifest(pretrained / "artifact")["content_hash"]
    assert f"- `model`: `runs/a/pretrain/artifact`, policy of `rlhf pretrain`, `{base}`\n" in card.read_text()
    assert "base_model" not in card.read_text()
    assert "It began from scratch." in (pretrained / "artifact/README.md").read_text()


def test_card_may_be_edited_or_missing(broken: Path) -> None:
    """As in artifacts of before there were cards."""
    (broken / "README.md").write_text("ours\n")
    assert artifact.load(broken, kind=Kind.policy).stage == "sft"
    (broken / "README.md").unlink()
    assert artifact.load(broken, kind=Kind.policy).stage == "sft"


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_a_policys_card_opens_it(
    stage: str, folder: Path, tuned: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert what_it_prints(folder / f"runs/a/{stage}/artifact", monkeypatch, capsys).strip()


def test_a_reward_models_card_opens_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_small_reward_model(tmp_path / "rm", kind=Kind.reward_model, shift=0.75, scale=0.5)
    prompt = [{"role": "user", "content": "What is a prime number?"}]
    raw = plain_reward(made, plain_tokens(made, prompt, "A number that only 1 and itself divide."))
    assert float(what_it_prints(made, monkeypatch, capsys)) == pytest.approx((raw - 0.75) / 0.5, abs=1e-5)


def test_zero_3_writes_whole_tensors(folder: Path, pretrained: Path, tuned: Path, rlhf: Forks) -> None:
    """The same tensors as at stage 1, of full size, on one process; tests/distributed has two."""
    rlhf.run(folder, *SFT, "name=three", "engine=zero3")
    three = folder / "runs/three/sft"
    assert files_below(three / "artifact") == FILES
    one, other = weights(tuned / "artifact"), weights(three / "artifact")
    assert {k: v.shape for k, v in one.items()} == {k: v.shape for k, v in other.items()}
    assert all(tensor.numel() > 0 for tensor in other.values())
    assert relative_difference(other, one) < 1e-6
    for name in CHECKED - {"model.safetensors"}:
        assert (three / "artifact" / name).read_bytes() == (tuned / "artifact" / name).read_bytes(), name


def test_a_parent_that_was_made_anew(folder: Path, pretrained: Path, tuned: Path, rlhf: Forks) -> None:
    """A run that goes on, or is called finished, on another base than it began with would tell an untruth."""
    before = (tuned / "artifact/artifact.json").read_bytes()
    kept = pretrained.with_name("kept")
    shutil.copytree(pretrained / "artifact", kept)
    try:
        artifact.link(pretrained / "artifacts/epoch_1", pretrained / "artifact")
        job = rlhf.run(folder, *SFT, "name=a", code=2)
        assert "model.path=runs/a/pretrain/artifact have changed" in job.output and "Traceback" not in job.output
        assert (tuned / "artifact/artifact.json").read_bytes() == before
    finally:
        artifact.link(kept, pretrained / "artifact")
    rlhf.run(folder, *SFT, "name=a")


def test_pretraining_goes_on_from_an_artifact(folder: Path, pretrained: Path, rlhf: Forks) -> None:
    """On other text, with the tokenizer and the template of the artifact."""
    write_jsonl(folder / "more.jsonl", texts(40, seed=8))
    more = ["model.path=runs/a/pretrain/artifact", "model.shape=null", "data.train=more.jsonl", "name=more"]
    overrides = [one for one in PRETRAIN if not one.startswith(("model.shape.", "data.train="))]
    rlhf.run(folder, *overrides, *more)
    child = folder / "runs/more/pretrain/artifact"
    assert manifest(child)["parents"]["model"]["content_hash"] == manifest(pretrained / "artifact")["content_hash"]
    assert manifest(child)["tokenizer_hash"] == manifest(pretrained / "artifact")["tokenizer_hash"]
    first = series(folder / "runs/more/pretrain", "train/loss")[0]
    assert first < series(pretrained, "train/loss")[0] - 0.5, "it does not begin from scratch"


# Refusals


@pytest.fixture
def broken(tuned: Path, tmp_path: Path) -> Path:
    """A copy to be broken."""
    shutil.copytree(tuned / "artifact", tmp_path / "artifact")
    return tmp_path / "artifact"


def refusal(folder: Path, kind: Kind = Kind.policy) -> str:
    with pytest.raises(UserError) as raised:
        artifact.load(folder, kind=kind)
    assert str(folder) in str(raised.value)
    return str(raised.value)


def test_whole_one_is_taken(broken: Path) -> None:
    assert artifact.load(broken, kind=Kind.policy).stage == "sft"


@pytest.mark.parametrize("name", sorted(CHECKED))
def test_missing_file(broken: Path, name: str) -> None:
    (broken / name).unlink()
    assert f"{name} is missing" in refusal(broken)


@pytest.mark.parametrize("name", sorted(CHECKED))
def test_damaged_file(broken: Path, name: str) -> None:
    content = bytearray((broken / name).read_bytes())
    content[len(content) // 2] ^= 1
    (broken / name).write_bytes(content)
    assert f"{name} is damaged" in refusal(broken)


def test_unfinished(broken: Path, tmp_path: Path) -> None:
    (broken / "artifact.json").unlink()
    assert "no artifact.json" in refusal(broken)
    assert "no artifact.json" in refusal(tmp_path / "nowhere")


@pytest.mark.parametrize("content", ["", "{", '["a list"]', '{"format": 1}'])
def test_manifest_that_is_none(broken: Path, content: str) -> None:
    (broken / "artifact.json").write_text(content)
    assert "artifact.json" in refusal(broken)


def test_another_kind(broken: Path) -> None:
    message = refusal(broken, Kind.reward_model)
    assert "is a policy" in message and "rlhf sft" in message and "reward_model is needed" in message


def test_another_format(broken: Path) -> None:
    (broken / "artifact.json").write_text(json.dumps({**manifest(broken), "format": 2}))
    assert "format 2" in refusal(broken)


def test_the_command_line_refuses_it_too(folder: Path, broken: Path, rlhf: Forks) -> None:
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:-1])
    job = rlhf.run(folder, *SFT, "name=broken", f"model.path={broken}", code=2)
    assert "model.safetensors is damaged" in job.output and "Traceback" not in job.output
