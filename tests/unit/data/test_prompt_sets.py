"""Prompts to learn on: read from rows of any kind, split by prompt, joined again with their messages and columns."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_pipeline.config.ppo import PtxConfig, RolloutConfig
from rlhf_pipeline.config.schema import DataConfig, LabConfig, LongPrompt, OnBadRow, PromptsConfig
from rlhf_pipeline.config.stages import PpoConfig
from rlhf_pipeline.data import prepare, stage
from rlhf_pipeline.data.order import Part
from rlhf_pipeline.data.prompts import Renderer
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.generation.prompt_sets import PromptSet, prompt_sets
from rlhf_pipeline.generation.prompts import read_prompts

WriteRows = Callable[..., str]
REAL = os.environ.get("RLHF_TEST_DATA")


def config(tmp_path: Path, train: Any, *, max_new_tokens: int = 8, **changes: Any) -> PpoConfig:
    settings = {"max_length": 256, "max_prompt_length": 128, "cache_dir": str(tmp_path / "cache"), "workers": 1}
    data = DataConfig(train=train, **{**settings, **changes})
    return PpoConfig(data=data, rollout=RolloutConfig(episodes=8, samples=2, max_new_tokens=max_new_tokens))


def questions(first: int, count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"Is {i} odd?", "answer": i % 2} for i in range(first, first + count)]


def said(found: PromptSet) -> list[str]:
    return [one.messages[-1].content for one in found.asked]


def check_joined(found: PromptSet, renderer: Renderer) -> None:
    """Each prompt's tokens are those of its own messages, rendered here once more."""
    assert len(found.asked) == len(found.data) > 0
    for i, one in enumerate(found.asked):
        assert one.index == i and one.origin == found.data.origin(i)
        np.testing.assert_array_equal(one.tokens, found.data[i].prompt)
        np.testing.assert_array_equal(one.tokens, renderer.encode_prompt(one.messages))


def test_two_sources_keep_their_columns(renderer: Renderer, write_rows: WriteRows, tmp_path: Path) -> None:
    train = write_rows(*questions(0, 5), name="train.jsonl")
    heldout = write_rows(*questions(100, 2), name="heldout.jsonl")
    trained, out = prompt_sets(config(tmp_path, train, heldout=heldout), renderer, context=None)
    assert said(trained) == [f"Is {i} odd?" for i in range(5)] and said(out) == ["Is 100 odd?", "Is 101 odd?"]
    assert [one.columns for one in trained.asked] == [{"answer": i % 2} for i in range(5)]
    assert [one.origin for one in out.asked] == [f"{heldout}:1", f"{heldout}:2"]
    check_joined(trained, renderer)
    check_joined(out, renderer)


def test_a_split_is_by_prompt_and_the_same_as_in_earlier_stages(
    renderer: Renderer, write_rows: WriteRows, tmp_path: Path
) -> None:
    rows = [{"prompt": f"Is {i % 20} odd?", "response": f"So {i}."} for i in range(40)]
    path = write_rows(*rows)
    setup = config(tmp_path, path, heldout_fraction=0.3)
    trained, out = prompt_sets(setup, renderer, context=None)
    check_joined(trained, renderer)
    check_joined(out, renderer)
    assert set(said(trained)) & set(said(out)) == set() and len(trained.asked) + len(out.asked) == 40
    assert 0 < len(out.asked) < 40 and all(said(out).count(one) == 2 for one in said(out))
    _, taught = prepare.train_and_heldout(setup.data, renderer, kind="demonstration", seed=0)
    assert {f"{path}:{rows.index(r) + 1}" for r in rows if r["prompt"] in said(out)} == {
        taught.origin(i) for i in range(len(taught))
    }
    other, _ = prompt_sets(dataclasses.replace(setup, seed=1), renderer, context=None)
    assert said(other) != said(trained)


def test_rows_that_are_bad_too_long_or_make_several_prompts_leave_the_others_in_place(
    renderer: Renderer, write_rows: WriteRows, tmp_path: Path
) -> None:
    def tree(text: str, replies: list[Any]) -> dict[str, Any]:
        return {"text": text, "role": "prompter", "replies": replies}

    def reply(text: str, rank: int, replies: Any = ()) -> dict[str, Any]:
        return {"text": text, "role": "assistant", "rank": rank, "replies": list(replies)}

    again = tree("And then " + "so " * 90 + "?", [reply("x", 0), reply("y", 1)])  # too long
    third = tree("And now?", [reply("p", 0), reply("q", 1)])
    several = tree("First?", [reply("a", 0, [again]), reply("b", 1, [third])])
    trees = write_rows({"prompt": several}, name="trees.jsonl")
    plain = write_rows(
        {"prompt": "One?"}, b"{oops", {"prompt": "long " * 100}, {"prompt": " "}, {"prompt": "Two?"}, name="plain.jsonl"
    )
    setup = config(
        tmp_path, [plain, trees, plain], heldout=write_rows({"prompt": "?!"}), on_bad_row=OnBadRow.skip,
        max_prompt_length=80,
    )  # fmt: skip
    trained, _ = prompt_sets(setup, renderer, context=None)
    assert said(trained) == ["One?", "Two?", "First?", "And now?", "One?", "Two?"]
    assert trained.asked[1].origin == f"{plain}:5"
    check_joined(trained, renderer)


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, "q"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "q"),
        ({"prompt": "q", "responses": ["a", "b", "c"], "scores": [1, 2, 3]}, "q"),
        ({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}, "q"),
        ({"instruction": "q", "output": "a"}, "q"),
    ],
)
def test_answers_in_the_rows_are_left_out(
    row: dict[str, Any], asked: str, renderer: Renderer, write_rows: WriteRows, tmp_path: Path
) -> None:
    setup = config(tmp_path, write_rows(row), heldout=write_rows({"prompt": "?!"}, name="h.jsonl"))
    trained, _ = prompt_sets(setup, renderer, context=None)
    assert said(trained) == [asked] and trained.data[0].responses == ()
    check_joined(trained, renderer)
    assert str(renderer.tokenizer.decode(trained.asked[0].tokens)).endswith("Assistant:")


def test_openings_of_documents(renderer: Renderer, write_rows: WriteRows, tmp_path: Path) -> None:
    texts = ["the sky is blue and the grass is green.", "how are you today? I am well.", "The sky"]
    rows = [{"text": text, "label": 1, "prompt": "?"} for text in texts]
    options: dict[str, Any] = {"format": "opening", "max_prompt_length": 5, "long_prompt": LongPrompt.keep_start}
    setup = config(tmp_path, write_rows(*rows), heldout_fraction=0.4, **options)
    sets = prompt_sets(setup, renderer, context=None)
    found = sorted((one for each in sets for one in each.asked), key=lambda one: one.origin)
    for one, text in zip(found, texts, strict=True):
        plain = renderer.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert one.tokens.tolist() == [renderer.tokenizer.bos_token_id, *plain][:5]
        assert one.messages[0].content == renderer.tokenizer.decode(plain[:4]) and text.startswith(
            one.messages[0].content
        )
        assert one.columns == {"text": text, "label": 1}
    # The same by `rlhf generate`.
    generated = read_prompts(PromptsConfig(path=setup.data.train, **options), renderer, context=None).asked
    assert [(one.messages, one.tokens.tolist()) for one in generated] == [
        (one.messages, one.tokens.tolist()) for one in found
    ]


def test_openings_that_begin_alike_are_on_one_side(renderer: Renderer, write_rows: WriteRows, tmp_path: Path) -> None:
    rows = [{"text": f"{i % 9} is the number, and {i} more"} for i in range(45)]
    options: dict[str, Any] = {"format": "opening", "max_prompt_length": 3, "long_prompt": LongPrompt.keep_start}
    trained, out = prompt_sets(
        config(tmp_path, write_rows(*rows), heldout_fraction=0.4, **options), renderer, context=11
    )
    assert set(said(trained)) & set(said(out)) == set() and len(trained.asked) + len(out.asked) == 45


def test_a_prompt_that_leaves_no_room_is_told_of(renderer: Renderer, write_rows: WriteRows, tmp_path: Path) -> None:
    path = write_rows(*questions(0, 4))
    setup = config(tmp_path, path, max_new_tokens=20, heldout=path)
    trained, _ = prompt_sets(setup, renderer, context=None)
    longest = max(len(one.tokens) for one in trained.asked)
    prompt_sets(setup, renderer, context=longest + 20)
    with pytest.raises(
        UserError, match=rf"longest prompt has {longest} tokens, .* lower data.max_prompt_length to {longest - 1}"
    ):
        prompt_sets(setup, renderer, context=longest + 19)
    with pytest.raises(UserError, match=r"rollout.max_new_tokens=20: .* context of 12; lower it$"):
        prompt_sets(setup, renderer, context=12)


def test_held_out_prompts_that_are_trained_on_are_warned_of(
    renderer: Renderer, write_rows: WriteRows, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train = write_rows(*questions(0, 6), name="train.jsonl")
    heldout = write_rows(*questions(4, 4), name="heldout.jsonl")
    prompt_sets(config(tmp_path, train, heldout=heldout), renderer, context=None)
    assert "the prompts of 2 of its 4 examples are in data.train as well" in caplog.text


def test_the_fingerprint_is_of_everything_that_scorers_see(
    renderer: Renderer, write_rows: WriteRows, tmp_path: Path
) -> None:
    heldout = write_rows({"prompt": "?!"}, name="h.jsonl")

    def trained(*rows: Any) -> PromptSet:
        return prompt_sets(config(tmp_path, write_rows(*rows), heldout=heldout), renderer, context=None)[0]

    first = trained({"prompt": "q", "answer": 1})
    assert trained({"answer": 1, "prompt": "q"}).fingerprint == first.fingerprint
    assert trained({"prompt": "q", "answer": 2}).fingerprint != first.fingerprint
    assert trained({"prompt": "r", "answer": 1}).fingerprint != first.fingerprint


def test_weights_and_iterations(renderer: Renderer, write_rows: WriteRows, tmp_path: Path) -> None:
    """8 episodes of 2 samples are 4 prompts; 6 prompts twice an epoch make 3 iterations of 4."""
    train = {"path": write_rows(*questions(0, 6)), "weight": 2}
    setup = config(tmp_path, train, heldout=write_rows({"prompt": "?!"}, name="h.jsonl"))
    trained, _ = prompt_sets(setup, renderer, context=None)
    assert trained.data.parts == (Part(6, 2),) and len(trained.asked) == 6
    batches = stage.batch_order(setup, trained.data)
    assert [len(batches.indices(step)) for step in range(batches.num_steps)] == [4, 4, 4]


def test_text_of_the_pretraining_mix(renderer: Renderer, write_rows: WriteRows, tmp_path: Path) -> None:
    text = write_rows(*({"text": "the grass is green. " * 20} for _ in range(3)), name="text.jsonl")
    setup = config(
        tmp_path, write_rows(*questions(0, 8)), format="prompt", max_examples=4, heldout_fraction=0.4
    )  # neither is about the text
    setup.ptx = PtxConfig(train=text, coefficient=1.0, max_length=32)
    sets, _ = stage.data_sets(setup, renderer)
    assert list(sets) == ["prompts", "pretraining"]
    mixed = sets["pretraining"]
    assert mixed.lengths.max() == 32 and mixed.counts.rows == 3 and mixed.targets.sum() > 3 * 60
    setup.ptx.max_length = None
    assert prepare.pretraining_of(setup.ptx, setup.data, renderer).lengths.max() > 32
    setup.ptx.coefficient = 0.0
    assert list(stage.data_sets(setup, renderer)[0]) == ["prompts"]
    with pytest.raises(UserError, match=r"ptx\.train: the weight of "):
        prepare.pretraining_of(PtxConfig(train={"path": text, "weight": 2}), setup.data, renderer)


def test_the_lab(renderer: Renderer, tmp_path: Path) -> None:
    lab = LabConfig(prompts=30, heldout_prompts=5, demonstrations=20)
    setup = config(tmp_path, ["lab:prompts", "lab:demonstrations"], heldout="lab:heldout_prompts", lab=lab)
    trained, out = prompt_sets(setup, renderer, context=None)
    assert len(trained.asked) == 50 and len(out.asked) == 5
    assert all(one.messages[-1].role == "user" for one in trained.asked)
    check_joined(trained, renderer)


def test_prep_tells_of_prompts_and_leaves_what_the_stage_reads(
    renderer: Renderer, write_rows: WriteRows, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from rlhf_pipeline.recipes import prep

    renderer.tokenizer.save_pretrained(tmp_path / "model")
    text = write_rows(*({"text": "the grass is green. " * 20} for _ in range(3)), name="text.jsonl")
    heldout = write_rows(*questions(4, 3), name="heldout.jsonl")
    setup = config(tmp_path, write_rows(*questions(0, 6), {"prompt": "long " * 200}), heldout=heldout)
    setup.run_dir, setup.model.path = str(tmp_path / "run"), str(tmp_path / "model")
    setup.ptx = PtxConfig(train=text, coefficient=1.0, max_length=32)
    prep.main(setup)
    report = json.loads((tmp_path / "run" / "prep" / "report.json").read_text())
    assert {name: one["kind"] for name, one in report["sets"].items()} == {
        "prompts": "prompt",
        "pretraining": "text",
        "held out": "prompt",
    }
    prompts = report["sets"]["prompts"]
    assert prompts["examples"] == 6 and prompts["counts"]["dropped_long_prompt"] == 1 and prompts["response"] is None
    assert report["overlap"]["prompts"] == 2
    assert report["run"]["steps"] == 2 and report["run"]["examples_a_step"] == 3 and report["run"]["fill"] is None
    assert "2 steps in 1 epoch, 3.0 examples and" in capsys.readouterr().out
    made = {path: path.stat().st_mtime_ns for path in Path(setup.data.cache_dir).glob("*.arrow")}
    prompt_sets(setup, stage.open_renderer(setup), context=None)
    prepare.pretraining_of(setup.ptx, setup.data, renderer)
    assert {path: path.stat().st_mtime_ns for path in Path(setup.data.cache_dir).glob("*.arrow")} == made


@pytest.mark.skipif(REAL is None, reason="RLHF_TEST_DATA is not set")
def test_real_comparisons_and_reviews(renderer: Renderer, tmp_path: Path) -> None:
    assert REAL is not None
    setup = config(
        tmp_path, f"{REAL}/hh_harmless.jsonl.gz", on_bad_row=OnBadRow.skip, max_examples=300, max_prompt_length=400,
        max_length=500, long_prompt=LongPrompt.drop,
    )  # fmt: skip
    trained, out = prompt_sets(setup, renderer, context=None)
    check_joined(trained, renderer)
    assert 0 < len(out.asked) < len(trained.asked) and {"chosen", "rejected"} <= trained.asked[0].columns.keys()
    for one in trained.asked[:20]:
        assert one.columns["chosen"].startswith(f"\n\nHuman: {one.messages[0].content[:20]}".rstrip())
    setup = config(
        tmp_path, f"{REAL}/imdb_train.jsonl.gz", format="opening", max_examples=200, max_prompt_length=9,
        long_prompt=LongPrompt.keep_start, max_new_tokens=64,
    )  # fmt: skip
    trained, _ = prompt_sets(setup, renderer, context=128)
    for one in trained.asked:
        assert len(one.tokens) == 9 and one.columns["text"].startswith(one.messages[0].content.rstrip("�"))
        json.dumps(one.columns)
