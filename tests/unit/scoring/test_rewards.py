"""Rewards: those of transformers alone, whatever the row looks like, what lies beside it and who wrote it."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_runs import make_base, sentence
from helpers_scoring import make_reward_model, make_small_reward_model, plain_reward, plain_tokens

from rlhf_pipeline.artifact import Kind
from rlhf_pipeline.config import config_dir
from rlhf_pipeline.config.schema import AnswersConfig, Attention, ReadyModelConfig, TokenizerConfig
from rlhf_pipeline.data.prompts import Renderer, load_template
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.generation.decode import Completion
from rlhf_pipeline.generation.prompts import Asked
from rlhf_pipeline.generation.responses import row_of
from rlhf_pipeline.scoring.answers import Answered, read_answers
from rlhf_pipeline.scoring.rewards import RewardModel, encode, micro_batches, open_scorer, rewards, score, trees

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
MESSAGES = [{"role": "user", "content": "the red cat?"}]
LARGE = {"max_length": 256, "batch_tokens": 4096}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small_reward_model(tmp_path_factory.mktemp("rm") / "plain")


@pytest.fixture(scope="module")
def model(folder: Path) -> RewardModel:
    return opened(folder)


def opened(folder: Path, **tokenizer: Any) -> RewardModel:
    return open_scorer(ReadyModelConfig(path=str(folder)), TokenizerConfig(**tokenizer), "cpu")


def answered(folder: Path, *rows: dict[str, Any]) -> list[Answered]:
    """Each row read by itself, so that every one may have a format of its own."""
    found = []
    for index, row in enumerate(rows):
        path = folder / f"row_{index}.jsonl"
        path.write_text(json.dumps(row) + "\n")
        (one,) = read_answers(AnswersConfig(path=str(path))).rows
        found.append(dataclasses.replace(one, index=index))
    return found


def mixed(folder: Path, count: int = 30) -> list[Answered]:
    """Prompts of 1 to 30 words with 1 to 5 answers of 1 to 25."""
    rng = random.Random(3)
    rows = [
        {"prompt": sentence(rng, 1, 30), "responses": [sentence(rng, 1, 25) for _ in range(rng.randint(1, 5))]}
        for _ in range(count)
    ]
    return answered(folder, *rows)


# The right number


def test_the_reward_is_transformers_logit_of_the_rendered_conversation(
    folder: Path, model: RewardModel, tmp_path: Path
) -> None:
    rows = mixed(tmp_path, 6)
    found = rewards(model, rows, **LARGE)
    assert [len(one) for one in found] == [len(row.responses) for row in rows] and found[0].dtype == np.float64
    for row, mine in zip(rows, found, strict=True):
        prompt = [{"role": m.role, "content": m.content} for m in row.prompt]
        expected = [plain_reward(folder, plain_tokens(folder, prompt, answer)) for answer in row.responses]
        np.testing.assert_allclose(mine, expected, **CLOSE)
    assert np.concatenate(found).std() > 0.1, "a model that tells answers apart"


def test_a_text_has_one_reward_however_it_is_written(folder: Path, model: RewardModel, tmp_path: Path) -> None:
    turns = [*MESSAGES, {"role": "assistant", "content": "a mat"}, {"role": "user", "content": "and then?"}]
    dialogue = "\n\nHuman: the red cat?\n\nAssistant: a mat\n\nHuman: and then?\n\nAssistant:"
    answer = {"role": "assistant", "content": "the dog runs"}
    rows = answered(
        tmp_path,
        {"messages": [*turns, answer]},
        {"prompt": turns, "response": "the dog runs"},
        {"prompt": dialogue, "response": " the dog runs"},
        {"prompt": turns, "response": "the dog runs", "finish_reason": "stop", "sample": 3},
        {"prompt": turns, "responses": ["the dog runs", "the old dog"]},
        {"chosen": f"{dialogue} the dog runs", "rejected": f"{dialogue} the old dog"},
        {"chosen": [*turns, answer], "rejected": [*turns, {**answer, "content": "the old dog"}]},
    )
    found = rewards(model, rows, **LARGE)
    expected = [plain_reward(folder, plain_tokens(folder, turns, text)) for text in ("the dog runs", "the old dog")]
    assert abs(expected[0] - expected[1]) > 0.01
    for mine in found:
        np.testing.assert_allclose(mine, expected[: len(mine)], **CLOSE)


def test_the_policys_tokenizer_does_not_matter(model: RewardModel, tmp_path: Path) -> None:
    from rlhf_pipeline.data.tokenizer import train_tokenizer, with_template

    rng = random.Random(9)
    other = train_tokenizer([sentence(rng, 5, 9) for _ in range(50)], vocab_size=300, context=256)
    policy = Renderer(with_template(other, TokenizerConfig(template="chatml")))
    text = "the blue dog reads under the tree"
    asked = answered(tmp_path, {"prompt": MESSAGES, "response": text})[0]
    prompt, (sampled,) = policy.branches(asked.prompt, [text])
    ids = np.concatenate(policy.tokenize(sampled))
    assert len(ids) != len(trees(model, [asked], max_length=256)[0].responses[0])
    completion = Completion(id=0, sample=0, tokens=ids, logprobs=np.zeros(len(ids), np.float32), finish="stop")
    question = Asked(index=0, origin="p:1", messages=asked.prompt, columns={},
                     tokens=np.concatenate(policy.tokenize(prompt)))  # fmt: skip
    row = row_of(question, completion, policy.tokenizer.decode(ids[:-1]))
    direct, sampled_reward = rewards(model, answered(tmp_path, {"prompt": MESSAGES, "response": text}, row), **LARGE)
    assert direct == sampled_reward


def test_rewards_do_not_depend_on_batches_order_or_neighbours(model: RewardModel, tmp_path: Path) -> None:
    rows = mixed(tmp_path)
    whole = rewards(model, rows, **LARGE)
    order = np.random.default_rng(0).permutation(len(rows))
    for tokens in (1, 150, 700):
        batches = list(
            micro_batches(trees(model, rows, max_length=256), batch_tokens=tokens, attention=Attention.paths)
        )
        assert (len(batches) == len(rows)) == (tokens == 1) and len(batches) > 2
        mine = rewards(model, rows, max_length=256, batch_tokens=tokens)
        shuffled = rewards(model, [rows[i] for i in order], max_length=256, batch_tokens=tokens)
        for i, expected in enumerate(whole):
            np.testing.assert_allclose(mine[i], expected, **CLOSE)
        for place, i in enumerate(order):
            np.testing.assert_allclose(shuffled[place], whole[i], **CLOSE)
    (alone,) = rewards(model, rows[7:8], **LARGE)
    np.testing.assert_allclose(alone, whole[7], **CLOSE)
    answers = rows[7].responses[::-1]
    turned = dataclasses.replace(rows[7], responses=answers, finished=(True,) * len(answers))
    np.testing.assert_allclose(rewards(model, [turned], **LARGE)[0], whole[7][::-1], **CLOSE)
    assert len(answers) > 1


def test_the_form_of_attention_does_not_matter(folder: Path, tmp_path: Path) -> None:
    model, rows = opened(folder), mixed(tmp_path)
    assert model.scorer.attention is Attention.paths
    expected = np.concatenate(rewards(model, rows, **LARGE))
    model.scorer.use_attention(Attention.dense)
    made = trees(model, rows, max_length=256)
    ((order, packed),) = micro_batches(made, batch_tokens=4096, attention=Attention.dense)
    lengths = [len(made[i]) for i in order]
    assert packed.tokens.shape[0] > 1 and lengths != sorted(lengths)[::-1], (
        "rows, whose order the rewards have to follow"
    )
    np.testing.assert_allclose(np.concatenate(score(model, made, batch_tokens=4096)), expected, **CLOSE)


def test_a_family_with_a_window(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", architecture="mistral")
    config = json.loads((base / "config.json").read_text()) | {"sliding_window": 8}
    (base / "config.json").write_text(json.dumps(config))
    folder = make_reward_model(tmp_path / "windowed", base)
    model, rows = opened(folder), mixed(tmp_path, 4)
    assert (model.scorer.attention, model.scorer.kinds) == (Attention.dense, ["sliding_attention"])
    for row, mine in zip(rows, rewards(model, rows, **LARGE), strict=True):
        prompt = [{"role": m.role, "content": m.content} for m in row.prompt]
        expected = [plain_reward(folder, plain_tokens(folder, prompt, answer)) for answer in row.responses]
        np.testing.assert_allclose(mine, expected, **CLOSE)


# Ends


def test_an_answer_that_was_cut_off_has_no_end_token(folder: Path, model: RewardModel, tmp_path: Path) -> None:
    rows = answered(
        tmp_path,
        {"prompt": MESSAGES, "response": "the old", "finish_reason": "length"},
        {"prompt": MESSAGES, "response": "the old", "finish_reason": "stop"},
        {"prompt": MESSAGES, "responses": ["the old", "the old"], "finish_reason": ["stop", "length"]},
    )
    whole = plain_tokens(folder, MESSAGES, "the old")
    assert whole[-1] == model.renderer.end_ids[0]
    cut, ended, both = rewards(model, rows, **LARGE)
    expected = [plain_reward(folder, whole[:-1]), plain_reward(folder, whole)]
    assert abs(expected[0] - expected[1]) > 0.01
    np.testing.assert_allclose([*cut, *ended], expected, **CLOSE)
    np.testing.assert_allclose(both, expected[::-1], **CLOSE)


def test_white_space_before_the_end_token_goes_with_it(folder: Path, tmp_path: Path) -> None:
    template = "{{ bos_token }}{% for m in messages %}" \
        "{{ ('\n\nHuman: ' + m.content) if m.role == 'user' else ('\n\nAssistant:' + ' ' + m.content + ' ' + eos_token) }}" \
        "{% endfor %}{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"  # fmt: skip
    (tmp_path / "spaced.jinja").write_text(template)
    model = opened(folder, template=str(tmp_path / "spaced.jinja"))
    words, last = "the <|eos|> old", {"finish_reason": "length"}
    rows = answered(tmp_path, {"prompt": MESSAGES, "response": words, **last}, {"prompt": MESSAGES, "response": words})
    cut, ended = (tree.responses[0].tolist() for tree in trees(model, rows, max_length=256))
    decode = model.renderer.tokenizer.decode
    assert decode(cut) == " the <|eos|> old" and decode(ended) == " the <|eos|> old <|eos|>"
    end = model.renderer.end_ids[0]
    assert end not in cut and ended.count(end) == 1, "what the answer spells stays words"


def test_an_empty_answer_is_its_end_alone(folder: Path, model: RewardModel, tmp_path: Path) -> None:
    asked = [*plain_tokens(folder, MESSAGES, "x")]
    prompt = asked[: len(asked) - len(trees(model, answered(tmp_path, {"prompt": MESSAGES, "response": "x"}),
                                           max_length=256)[0].responses[0])]  # fmt: skip
    rows = answered(
        tmp_path,
        {"prompt": MESSAGES, "response": "", "finish_reason": "stop"},
        {"prompt": MESSAGES, "responses": ["the mat", " \n"]},
    )
    expected = plain_reward(folder, [*prompt, model.renderer.end_ids[0]])
    alone, second = rewards(model, rows, **LARGE)
    np.testing.assert_allclose([alone[0], second[1]], [expected, expected], **CLOSE)
    np.testing.assert_allclose(second[0], plain_reward(folder, plain_tokens(folder, MESSAGES, "the mat")), **CLOSE)
    (nothing,) = answered(tmp_path, {"prompt": MESSAGES, "response": "", "finish_reason": "length"})
    assert "without a word and without an end" in encode(model, [nothing], max_length=256)[0].why


def test_the_end_token_is_the_templates(folder: Path, tmp_path: Path) -> None:
    model = opened(folder, template="chatml")
    rows = answered(tmp_path, {"prompt": MESSAGES, "response": ""}, {"prompt": MESSAGES, "response": "the mat"})
    empty, spoken = trees(model, rows, max_length=256)
    end = model.renderer.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert empty.responses[0].tolist() == [end] and spoken.responses[0][-1] == end
    assert empty.prompt.tolist() == spoken.prompt.tolist()


# Lengths


def test_a_long_prompt_loses_its_beginning_for_all_answers_alike(
    folder: Path, model: RewardModel, tmp_path: Path
) -> None:
    rng = random.Random(1)
    prompt, answers = sentence(rng, 60, 60), [sentence(rng, 4, 4), sentence(rng, 12, 12)]
    (row,) = answered(tmp_path, {"prompt": prompt, "responses": answers})
    (whole,) = trees(model, [row], max_length=256)
    assert len(whole.prompt) > 60
    longest = max(len(response) for response in whole.responses)
    (found,) = encode(model, [row], max_length=50)
    assert found.tree is not None and found.prompt_cut and len(found.tree.prompt) == 50 - longest
    kept = [whole.prompt[0], *whole.prompt[len(whole.prompt) - (50 - longest - 1) :]]  # the start token and the end
    assert found.tree.prompt.tolist() == kept
    mine = rewards(model, [row], max_length=50, batch_tokens=4096)[0]
    expected = [plain_reward(folder, [*kept, *response]) for response in whole.responses]
    np.testing.assert_allclose(mine, expected, **CLOSE)
    short = dataclasses.replace(model, context=50)
    np.testing.assert_allclose(rewards(short, [row], **LARGE)[0], expected, **CLOSE)
    for limit, is_cut in ((len(whole.prompt) + longest, False), (len(whole.prompt) + longest - 1, True)):
        (found,) = encode(model, [row], max_length=limit)
        assert found.tree is not None and found.prompt_cut == is_cut
        assert len(found.tree.prompt) + longest == limit


def test_an_answer_that_does_not_fit_is_named(model: RewardModel, tmp_path: Path) -> None:
    rows = answered(tmp_path, {"prompt": "a", "response": "b"}, {"prompt": "a", "responses": ["b", "the " * 40]})
    (_, tree) = trees(model, rows, max_length=256)
    size = len(tree.responses[1])
    good, bad = encode(model, rows, max_length=size)
    assert good.tree is not None and bad.tree is None
    assert f"an answer is too long: number 2 has {size} tokens" in bad.why and f"room for {size - 1}" in bad.why
    with pytest.raises(UserError, match=r"row_1.jsonl:1: an answer is too long"):
        rewards(model, rows, max_length=size, batch_tokens=4096)
    just = encode(model, rows, max_length=size + 1)[1]
    assert just.tree is not None and len(just.tree.prompt) == 1


def test_what_the_template_cannot_hold_is_named(folder: Path, model: RewardModel, tmp_path: Path) -> None:
    rows = answered(tmp_path, {"prompt": "a", "response": "\U000f0000"}, {"prompt": "a", "response": "b"})
    bad, good = encode(model, rows, max_length=256)
    assert "U+F0000" in bad.why and good.tree is not None


def test_trees_know_the_order_of_their_answers(model: RewardModel, tmp_path: Path) -> None:
    rows = answered(
        tmp_path,
        {"prompt": "a", "responses": ["b", "c"], "scores": [1, 2]},
        {"prompt": "a", "response": "b"},
    )
    ranked, single = trees(model, rows, max_length=256)
    assert (ranked.index, single.index) == (0, 1)
    assert ranked.ranks.tolist() == [1, 0] and ranked.scores.tolist() == [1, 2]
    assert single.ranks.tolist() == [0] and np.isnan(single.scores).all()
    assert all(scored.all() for scored in ranked.scored)


# Opening


def test_shift_and_scale_of_an_artifact(folder: Path, model: RewardModel, tmp_path: Path) -> None:
    base = folder.with_name(folder.name + "_base")
    made = make_reward_model(tmp_path / "rm", base, kind=Kind.reward_model, shift=-1.5, scale=4.0)
    normal, rows = opened(made), mixed(tmp_path, 4)
    assert (normal.shift, normal.scale, normal.context) == (-1.5, 4.0, 256)
    raw = np.concatenate(rewards(model, rows, **LARGE))
    np.testing.assert_allclose(np.concatenate(rewards(normal, rows, **LARGE)), (raw + 1.5) / 4, **CLOSE)
    np.testing.assert_allclose(np.concatenate(rewards(normal, rows, **LARGE, normalised=False)), raw, **CLOSE)
    assert (model.shift, model.scale) == (0.0, 1.0)
    unset = opened(make_reward_model(tmp_path / "unset", base, kind=Kind.reward_model))
    assert (unset.shift, unset.scale) == (0.0, 1.0)
    manifest = json.loads((made / "artifact.json").read_text())
    assert normal.identity == manifest["content_hash"] != model.identity


def test_only_reward_models_are_opened(folder: Path, tmp_path: Path) -> None:
    base = folder.with_name(folder.name + "_base")
    with pytest.raises(UserError, match=r"holds no reward model: score\.weight is missing.*rlhf rm"):
        opened(base)
    policy = make_reward_model(tmp_path / "policy", base, kind=Kind.policy)
    with pytest.raises(UserError, match=r"is a policy .*a reward_model is needed here"):
        opened(policy)
    made = make_reward_model(tmp_path / "rm", base, kind=Kind.reward_model)
    with pytest.raises(UserError, match="trained with another tokenizer or chat template"):
        opened(made, template="chatml")
    assert opened(made, template="dialogue").renderer.template_hash == opened(made).renderer.template_hash
    (made / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="is damaged"):
        opened(made)


def test_a_reward_that_is_no_number_is_refused(folder: Path, tmp_path: Path) -> None:
    import torch

    model = opened(folder)
    with torch.no_grad():
        model.scorer.inner.score.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        rewards(model, mixed(tmp_path, 2), **LARGE)


def test_progress_counts_answers_and_tokens(model: RewardModel, tmp_path: Path) -> None:
    rows = mixed(tmp_path, 8)
    made = trees(model, rows, max_length=256)
    told: list[tuple[int, int]] = []
    score(model, made, batch_tokens=200, tick=lambda answers, tokens: told.append((answers, tokens)))
    assert len(told) > 2 and max(tokens for _, tokens in told) <= max(200, *map(len, made))
    assert sum(answers for answers, _ in told) == sum(len(row.responses) for row in rows)
    assert sum(tokens for _, tokens in told) == sum(map(len, made))


def test_the_shipped_dialogue_template_is_the_tokenizers(model: RewardModel) -> None:
    assert model.renderer.tokenizer.chat_template == load_template("dialogue", config_dir())
