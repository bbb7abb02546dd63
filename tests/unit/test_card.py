"""The model card: what it says, that the hub can read it, and that nobody's text breaks it."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from rlhf_pipeline import artifact
from rlhf_pipeline.artifact import Kind, Manifest, Parent, _card
from rlhf_pipeline.card import Size, model_card, root

SIZE = Size(parameters=1_234_567, dtypes=("bfloat16",), context=2048)
HASHES = {name: str(i) * 64 for i, name in enumerate(("rm", "sft", "pretrain", "ppo"))}


def manifest(**changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "kind": Kind.policy,
        "stage": "ppo",
        "step": 60,
        "template_hash": "t" * 64,
        "tokenizer_hash": "k" * 64,
        "special_ids": {"eos": 2},
        "vocab_size": 32000,
        "config": {"name": "mine", "seed": 7, "optim": {"lr": 1e-5, "betas": [0.9, 0.95]}, "lora": None},
        "data": {"prompts": {"fingerprint": "f" * 64, "counts": {"kept": 24060, "bad": {"empty": 3}, "targets": 0}}},
        "metrics": {"eval/win_rate": 0.879, "eval/win_rate_low": 0.836, "eval/win_rate_high": 0.918, "eval/kl": 9.14},
        "content_hash": HASHES["ppo"],
        "versions": {"torch": "2.13.0"},
    }
    return asdict(Manifest(**{**fields, **changes}))


def card(said: dict[str, Any], **more: Any) -> str:
    return model_card(said, **{"size": SIZE, "ancestors": {}, "base_model": None, **more})


def front_matter(text: str) -> dict[str, Any]:
    head, _, rest = text.removeprefix("---\n").partition("\n---\n")
    assert text.startswith("---\n") and rest
    found: dict[str, Any] = yaml.safe_load(head)
    return found


def section(text: str, heading: str) -> str:
    return text.partition(f"\n## {heading}\n\n")[2].partition("\n\n## ")[0].strip()


def rows(text: str) -> list[list[str]]:
    """Cells of a table's rows, split where GitHub's tables are: at pipes without a backslash before them."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


# What it says


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"stage": "sft"}, {"pipeline_tag": "text-generation", "tags": ["rlhf", "sft"]}),
        (
            {"stage": "rm", "kind": Kind.reward_model, "config": {"objective": {"loss": "plackett_luce"}}},
            {"pipeline_tag": "text-classification", "tags": ["rlhf", "reward-model", "plackett-luce"]},
        ),
        (
            {"config": {"advantage": {"estimator": "gae"}}},
            {"pipeline_tag": "text-generation", "tags": ["rlhf", "ppo", "gae"]},
        ),
        (
            {"stage": "dpo", "config": {"objective": {"name": "dpo"}}},
            {"pipeline_tag": "text-generation", "tags": ["rlhf", "dpo"]},
        ),
    ],
)
def test_front_matter(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    assert front_matter(card(manifest(**changes))) == {"library_name": "transformers", **expected}


def test_base_model_where_the_hub_takes_it() -> None:
    assert front_matter(card(manifest(), base_model="org/Base-1.5"))["base_model"] == "org/Base-1.5"
    assert front_matter(card(manifest(), base_model="gpt2"))["base_model"] == "gpt2"
    for path in ("/models/base", "../base", "a/b/c", "org/base\ntags: [x]", "org/hf_" + "a1" * 15, ""):
        assert "base_model" not in front_matter(card(manifest(), base_model=path))


def test_facts_data_metrics_and_training() -> None:
    text = card(manifest(git_revision="a" * 40))
    facts = dict(rows(section(text, "What it is"))[2:])
    assert facts["parameters"] == "1,234,567" and facts["context"] == "2,048 tokens" and facts["weights"] == "bfloat16"
    assert facts["made by"] == "`rlhf ppo`, after step 60" and facts["content hash"] == f"`{HASHES['ppo']}`"
    assert facts["revision of the code"] == f"`{'a' * 40}`"
    assert rows(section(text, "Data"))[2:] == [["`prompts`", f"`{'f' * 64}`", "`bad.empty` 3, `kept` 24,060"]]
    assert rows(section(text, "Training"))[2:] == [
        ["`optim.betas`", "`[0.9, 0.95]`"],
        ["`optim.lr`", "`1e-05`"],
        ["`seed`", "`7`"],
    ]
    assert text.startswith("---\n") and "\n# `mine`: policy of `rlhf ppo`\n" in text


def test_intervals_where_there_are_both_ends() -> None:
    metrics = {"a": 0.5, "a_low": 0.25, "a_high": 0.75, "b": 1.0, "b_low": 0.5, "pairs": 1234}
    assert rows(section(card(manifest(metrics=metrics)), "Last evaluation")) == [
        ["metric", "value", "95 % interval"],
        ["---", "---", "---"],
        ["`a`", "0.5", "0.25 to 0.75"],
        ["`b`", "1", ""],
        ["`b_low`", "0.5", ""],
        ["`pairs`", "1,234", ""],
    ]
    assert section(card(manifest(metrics={})), "Last evaluation") == "None is recorded."


def test_the_same_bytes_whether_made_or_read_again() -> None:
    gpt2 = Parent(path="gpt2", content_hash=None)
    said = manifest(parents={"reference": gpt2, "model": gpt2}, versions={"torch": "2", "deepspeed": "1"})
    again = json.loads(json.dumps(said, sort_keys=True))
    assert list(again) != list(said)
    assert card(said) == card(again)


# Lineage


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A policy of an SFT model and a reward model that began as the same SFT model, which came from the hub."""
    monkeypatch.chdir(tmp_path)
    sft = Parent(path="runs/sft", content_hash=HASHES["sft"])
    made = {
        "sft": manifest(stage="sft", parents={"model": Parent(path="org/base", content_hash=None)}),
        "rm": manifest(stage="rm", kind=Kind.reward_model, parents={"model": sft}),
    }
    for name, one in made.items():
        Path("runs", name).mkdir(parents=True)
        Path("runs", name, "artifact.json").write_text(json.dumps({**one, "content_hash": HASHES[name]}))
    return manifest(parents={"model": sft, "rewards.rm": Parent(path="runs/rm", content_hash=HASHES["rm"])})


def test_lineage_of_two_parents(family: dict[str, Any]) -> None:
    ancestors = artifact.ancestors(family["parents"])
    assert section(card(family, ancestors=ancestors), "Lineage").splitlines() == [
        f"- `model`: `runs/sft`, policy of `rlhf sft`, `{HASHES['sft']}`",
        "  - `model`: `org/base`, a model that is no artifact",
        f"- `rewards.rm`: `runs/rm`, reward model of `rlhf rm`, `{HASHES['rm']}`",
        f"  - `model`: `runs/sft`, `{HASHES['sft']}`, as above",
    ]
    assert root(family, ancestors) == "org/base"


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"content_hash": "other", "parents": {}}', '{"content_hash": "HASH", "parents": {"model": "x"}}'],
)
def test_lineage_ends_where_a_parent_is_not_what_it_was(family: dict[str, Any], content: str) -> None:
    Path("runs/sft/artifact.json").write_text(content.replace("HASH", HASHES["sft"]))
    ancestors = artifact.ancestors(family["parents"])
    lines = section(card(family, ancestors=ancestors), "Lineage").splitlines()
    assert lines[0] == f"- `model`: `runs/sft`, `{HASHES['sft']}`, which was not there to be read"
    assert len(lines) == 3 and root(family, ancestors) is None


def test_lineage_that_turns_back_on_itself(family: dict[str, Any]) -> None:
    said = json.loads(Path("runs/sft/artifact.json").read_text())
    said["parents"] = {"model": {"path": "runs/sft", "content_hash": HASHES["sft"]}}
    Path("runs/sft/artifact.json").write_text(json.dumps(said))
    ancestors = artifact.ancestors(family["parents"])
    assert "as above" in section(card(family, ancestors=ancestors), "Lineage").splitlines()[1]
    assert root(family, ancestors) is None


def test_base_model_is_no_folder_and_tied_weights_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from safetensors.torch import save_file

    monkeypatch.chdir(tmp_path)
    table = torch.zeros(5, 3)
    save_file({"table": table, "bias": torch.zeros(())}, tmp_path / "model.safetensors")
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=64))
    said = manifest(parents={"model": Parent(path="models/base", content_hash=None)})

    def made() -> str:
        model = SimpleNamespace(config=config)
        return _card(said, model=model, weights={"table": table, "head": table}, folder=tmp_path)

    assert front_matter(made())["base_model"] == "models/base"
    facts = dict(rows(section(made(), "What it is"))[2:])
    assert (facts["parameters"], facts["weights"], facts["context"]) == ("16", "float32", "64 tokens")
    Path("models/base").mkdir(parents=True)
    assert "base_model" not in front_matter(made())


def test_from_scratch() -> None:
    assert section(card(manifest()), "Lineage") == "It began from scratch."


# Somebody's text


HOSTILE = [
    "a | b",
    "a \\| b",
    "a\n---\nlicense: mit\n---\n# x",
    "`</code><script>alert(1)</script>",
    "\u202ea\u2028| b\x1b[0m",
    "a\ud800b",
    "\u202ea\x1b[0m\x00",
    "[x](javascript:y)|`",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_breaks_out(text: str) -> None:
    plain, hostile = (
        card(
            manifest(
                stage="sft",
                config={"name": one, "data": {"train": one}},
                data={one: {"fingerprint": one, "counts": {one: 1}}},
                metrics={one: 1.0},
                versions={one: one},
                parents={one: Parent(path=one, content_hash=None), "model": Parent(path=one, content_hash=None)},
            ),
            base_model=one,
        )
        for one in ("/plain", text)
    )
    assert hostile.encode() and all(c.isprintable() or c == "\n" for c in hostile)
    assert front_matter(hostile) == front_matter(plain)
    assert len(hostile.splitlines()) == len(plain.splitlines())
    assert [len(row) for row in rows(hostile)] == [len(row) for row in rows(plain)]
    without_code = re.sub(r"`[^`\n]*`|<code>[^<`|\\\n]*</code>", "", hostile.replace("```", ""))
    assert not set("`\\") & set(without_code) and "<" not in without_code and "](" not in without_code


def test_no_secret() -> None:
    token = "hf_" + "aB3" * 10
    text = card(
        manifest(
            config={
                "name": token,
                "optim": {"api_key": "plain-words"},
                "rewards": {"a": {"url": "https://me:hunter2@host/x?token=hunter2", "weight": 1.0}},
                "data": {"train": f"s3://x?key={token}"},
            },
            data={token: {"fingerprint": "f", "counts": {}}},
            parents={"model": Parent(path=f"https://me:hunter2@host/{token}", content_hash=None)},
        ),
        base_model=f"org/{token}",
    )
    assert token not in text and "hunter2" not in text and "plain-words" not in text
    assert "`https://***@host/x?token=***`" in text
