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

from rlhf_pipeline.config.direct import DirectConfig, Objective, SampledConfig
from rlhf_pipeline.config.ppo import PtxConfig, RolloutConfig
from rlhf_pipeline.config.schema import (
    DataConfig,
    LabConfig,
    LongPrompt,
    LongResponse,
    OnBadRow,
    PromptsConfig,
    Rankings,
)
from rlhf_pipeline.config.stages import DpoConfig, PpoConfig
from rlhf_pipeline.data import prepare, stage
from rlhf_pipeline.data.formats import Kind
from rlhf_pipeline.data.lab.scorer import gold
from rlhf_pipeline.data.order import Part
from rlhf_pipeline.data.prompts import Renderer
from rlhf_pipeline.data.store import TreeDataset
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.generation.prompt_sets import PromptSet, heldout_prompts, prompt_sets
from rlhf_pipeline.generation.prompts import Asked, read_prompts
from rlhf_pipeline.scoring.episodes import Episode

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


# Of held-out preferences


def direct(setup: PpoConfig, *, prompts: int = 100, max_new_tokens: int = 8, verdicts: bool = False) -> DpoConfig:
    return DpoConfig(
        data=setup.data,
        seed=setup.seed,
        objective=DirectConfig(name=Objective.kto if verdicts else Objective.dpo),
        sampled=SampledConfig(prompts=prompts, max_new_tokens=max_new_tokens),
    )


def preferences(setup: DpoConfig, renderer: Renderer) -> tuple[TreeDataset, TreeDataset]:
    kind: Kind = "feedback" if setup.objective.name is Objective.kto else "ranking"
    return prepare.train_and_heldout(setup.data, renderer, kind=kind, seed=setup.seed)


def check_of(found: list[Asked], heldout: TreeDataset, renderer: Renderer) -> None:
    """Each is the prompt of a held-out tree, rendered here once more, and none comes twice."""
    trees = {heldout.origin(i): heldout[i].prompt.tolist() for i in range(len(heldout))}
    for i, one in enumerate(found):
        assert one.index == i and one.tokens.tolist() == trees[one.origin]
        np.testing.assert_array_equal(one.tokens, renderer.encode_prompt(one.messages))
    assert len({one.tokens.tobytes() for one in found}) == len(found)


def rankings(count: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"Is {i} odd?", "responses": ["Yes.", "No.", "Perhaps."], "scores": [1, 1, 1], "key": i}
        if i % 5 == 0
        else {"prompt": f"Is {i} odd?", "responses": ["Yes.", "No.", "Perhaps."], "scores": [i % 2, -1, 0], "key": i}
        for i in range(count)
    ]


@pytest.mark.parametrize("form", Rankings)
def test_prompts_of_the_held_out_side_alone(
    form: Rankings, renderer: Renderer, write_rows: WriteRows, tmp_path: Path
) -> None:
    """Also of rankings that are nothing but ties, which make no comparison in training."""
    path = write_rows(*rankings(40), *rankings(40))
    setup = direct(config(tmp_path, path, heldout_fraction=0.3, rankings=form))
    train, heldout = preferences(setup, renderer)
    found = heldout_prompts(setup, heldout, context=None)
    check_of(found, heldout, renderer)
    learnt = {train[i].prompt.tobytes() for i in range(len(train))}
    assert not learnt & {one.tokens.tobytes() for one in found}
    assert 0 < len(found) == len(np.unique(heldout.groups)) == len(heldout) / 2
    assert any(one.columns["key"] % 5 == 0 for one in found), "the seed holds out no ranking of ties"
    for one in found:
        assert one.messages[-1].content == f"Is {one.columns['key']} odd?"
        assert one.columns.keys() == {"responses", "scores", "key"}
    _, by_prompt = prompt_sets(config(tmp_path, path, heldout_fraction=0.3), renderer, context=None)
    assert {one.tokens.tobytes() for one in by_prompt.asked} == {one.tokens.tobytes() for one in found}


def test_few_of_many_are_spread_over_all_sources(renderer: Renderer, write_rows: WriteRows, tmp_path: Path) -> None:
    dialogues = [f"\n\nHuman: {i}?\n\nAssistant: " for i in range(9)]
    pairs = [{"chosen": f"{one}a", "rejected": f"{one}b"} for one in dialogues]
    first, second = write_rows(*pairs, name="pairs.jsonl"), write_rows(*rankings(10), name="kwise.jsonl")
    untouched = write_rows(b"{oops", name="train.jsonl")
    setup = direct(config(tmp_path, untouched, heldout=[first, second]), prompts=3)
    heldout = prepare.held_out(setup.data, renderer, kind="ranking", seed=0)
    found = heldout_prompts(setup, heldout, context=None)
    check_of(found, heldout, renderer)
    assert [one.origin for one in found] == [f"{first}:1", f"{second}:1", f"{second}:10"]
    assert [one.messages[-1].content for one in found] == ["0?", "Is 0 odd?", "Is 9 odd?"]
    setup.sampled.prompts = 1
    assert [one.origin for one in heldout_prompts(setup, heldout, context=None)] == [f"{first}:1"]


def test_prompts_of_verdicts(renderer: Renderer, write_rows: WriteRows, tmp_path: Path) -> None:
    rows = [{"prompt": f"Is {i // 2} odd?", "completion": f"So {i}.", "label": i % 2 == 0} for i in range(12)]
    pair = {"prompt": "One?", "chosen": "a", "rejected": "b"}  # makes two verdicts
    paths = [write_rows(*rows, name="verdicts.jsonl"), write_rows(pair, name="pairs.jsonl")]
    setup = direct(config(tmp_path, paths, heldout_fraction=0.5), verdicts=True)
    train, heldout = preferences(setup, renderer)
    found = heldout_prompts(setup, heldout, context=None)
    check_of(found, heldout, renderer)
    assert 0 < len(found) == len(np.unique(heldout.groups)) and not {*train.groups} & {*heldout.groups}
    for one in found:
        columns = {"chosen", "rejected"} if one.origin.startswith(paths[1]) else {"completion", "label"}
        assert one.columns.keys() == columns


def test_rows_that_left_no_preference_leave_no_prompt(
    renderer: Renderer, write_rows: WriteRows, tmp_path: Path
) -> None:
    def ranking(prompt: Any, answer: str = "a") -> dict[str, Any]:
        return {"prompt": prompt, "chosen": answer, "rejected": "b"}

    going_on = [{"role": "user", "content": "Count!"}, {"role": "assistant", "content": "One,"}]
    heldout = write_rows(
        ranking("One?"), b"{oops", ranking("Two?", "b"), ranking("long " * 100), ranking("Three?", "very " * 300),
        ranking(going_on), ranking("Four?"),
    )  # fmt: skip
    train = write_rows(ranking("Five?"), name="t.jsonl")
    options: dict[str, Any] = {"on_bad_row": OnBadRow.skip, "long_prompt": LongPrompt.drop}
    setup = direct(config(tmp_path, train, heldout=heldout, long_response=LongResponse.drop, **options))
    data = prepare.held_out(setup.data, renderer, kind="ranking", seed=0)
    assert [data.origin(i) for i in range(len(data))] == [f"{heldout}:{line}" for line in (1, 6, 7)]
    found = heldout_prompts(setup, data, context=None)
    assert [one.messages[0].content for one in found] == ["One?", "Four?"]  # the assistant's turn is no question
    check_of(found, data, renderer)
    only = setup.data.heldout = write_rows(ranking(going_on), name="only.jsonl")
    data = prepare.held_out(setup.data, renderer, kind="ranking", seed=0)
    with pytest.raises(UserError, match=r"none of the held-out prompts waits.* sampled\.prompts=0 does without"):
        heldout_prompts(setup, data, context=None)
    Path(only).write_text('{"prompt": "Six?", "chosen": "a", "rejected": "b"}\n')
    with pytest.raises(UserError, match=r"only\.jsonl: has changed while it was read"):
        heldout_prompts(setup, data, context=None)


def test_a_prompt_that_is_cut_keeps_its_tokens(renderer: Renderer, write_rows: WriteRows, tmp_path: Path) -> None:
    row = {"prompt": "long " * 100 + "Why?", "chosen": "a", "rejected": "b"}
    path = write_rows(row)
    setup = direct(config(tmp_path, path, heldout=path, long_prompt=LongPrompt.keep_end))
    data = prepare.held_out(setup.data, renderer, kind="ranking", seed=0)
    (one,) = heldout_prompts(setup, data, context=None)
    assert len(one.tokens) == 128 and one.tokens.tolist() == data[0].prompt.tolist()
    assert one.messages[0].content == row["prompt"]


def test_answers_to_held_out_prompts_need_room(renderer: Renderer, write_rows: WriteRows, tmp_path: Path) -> None:
    path = write_rows(*rankings(4))
    setup = direct(config(tmp_path, path, heldout=path), max_new_tokens=20)
    data = prepare.held_out(setup.data, renderer, kind="ranking", seed=0)
    longest = max(len(one.tokens) for one in heldout_prompts(setup, data, context=None))
    heldout_prompts(setup, data, context=longest + 20)
    with pytest.raises(UserError, match=rf"^sampled\.max_new_tokens=20: the longest prompt has {longest} tokens"):
        heldout_prompts(setup, data, context=longest + 19)


def test_prompts_of_the_labs_rankings(renderer: Renderer, tmp_path: Path) -> None:
    lab = LabConfig(rankings=20, heldout_gold_rankings=6)
    setup = direct(config(tmp_path, "lab:rankings", heldout="lab:heldout_gold_rankings", lab=lab))
    _, heldout = preferences(setup, renderer)
    found = heldout_prompts(setup, heldout, context=None)
    check_of(found, heldout, renderer)
    assert len(found) == len(np.unique(heldout.groups)) > 1
    worked = [
        Episode(prompt=one.messages, response="?", finished=True, columns=one.columns, origin="") for one in found
    ]
    assert len(gold(worked)) == len(found)  # the judge finds its tasks in them


@pytest.mark.skipif(REAL is None, reason="RLHF_TEST_DATA is not set")
def test_prompts_of_real_comparisons(renderer: Renderer, tmp_path: Path) -> None:
    setup = direct(
        config(
            tmp_path, f"{REAL}/hh_harmless.jsonl.gz", on_bad_row=OnBadRow.skip, max_examples=300, max_prompt_length=400,
            max_length=800, long_prompt=LongPrompt.drop, long_response=LongResponse.drop, heldout_fraction=0.2,
        ),
        prompts=10,
    )  # fmt: skip
    train, heldout = preferences(setup, renderer)
    found = heldout_prompts(setup, heldout, context=None)
    check_of(found, heldout, renderer)
    assert len(found) == 10 and not {*train.groups} & {*heldout.groups}
