"""The list of what scores: each source's numbers, together and in order, whatever their kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_runs import make_base, sentence
from helpers_scoring import make_reward_model, plain_reward, plain_tokens

from rlhf_pipeline.artifact import Kind
from rlhf_pipeline.config.ppo import ScorerConfig
from rlhf_pipeline.config.schema import ReadyModelConfig, TokenizerConfig
from rlhf_pipeline.data.prompts import Renderer
from rlhf_pipeline.data.records import Message
from rlhf_pipeline.data.tokenizer import train_tokenizer, with_template
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.launch import free_port
from rlhf_pipeline.scoring import rewards
from rlhf_pipeline.scoring.episodes import Episode
from rlhf_pipeline.scoring.sources import (
    Source,
    _joined,
    check_prompts,
    check_sources,
    describe,
    open_sources,
    score,
    total,
)
from rlhf_pipeline.scoring.written import trees

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
PROMPT = [{"role": "user", "content": "the red cat?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model whose normalised reward is (raw + 1.5) / 4."""
    base = make_base(tmp_path_factory.mktemp("rm") / "base")
    return make_reward_model(base.with_name("rm"), base, kind=Kind.reward_model, shift=-1.5, scale=4.0)


@pytest.fixture(autouse=True)
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "programs_here.py").write_text(
        "def length(episodes): return [len(one.response) for one in episodes]\n"
        "def broken(episodes): return [float('nan') if one.response == 'b' * 80 else 1 for one in episodes]\n"
    )


def episode(response: str, *, prompt: Sequence[dict[str, str]] = PROMPT, finished: bool = True) -> Episode:
    messages = tuple(Message(m["role"], m["content"]) for m in prompt)
    return Episode(prompt=messages, response=response, finished=finished, columns={}, origin="prompts.jsonl:3")


def of_model(folder: Path, **options: Any) -> ScorerConfig:
    return ScorerConfig(model=ReadyModelConfig(path=str(folder)), max_length=256, **options)


def scored(config: ScorerConfig, *episodes: Episode) -> np.ndarray:
    (source,) = open_sources({"one": config}, device="cpu").values()
    return source.score(episodes)


def mixed(count: int = 12, samples: int = 3) -> list[Episode]:
    import random

    rng = random.Random(2)
    return [
        episode(sentence(rng, 1, 20), prompt=[{"role": "user", "content": asked}], finished=rng.random() < 0.8)
        for asked in (sentence(rng, 1, 20) for _ in range(count))
        for _ in range(samples)
    ]


# Together


def test_scores_by_name_and_their_weighted_sum(folder: Path) -> None:
    scorers = {
        "rm": of_model(folder, weight=2.0),
        "length": ScorerConfig(program="programs_here:length", weight=-0.25),
    }
    check_sources(scorers)
    sources = open_sources(scorers, device="cpu")
    found = score(sources, [episode("the mat"), episode("the old dog")])
    raw = np.array([plain_reward(folder, plain_tokens(folder, PROMPT, text)) for text in ("the mat", "the old dog")])
    assert list(found) == ["rm", "length"] and abs(raw[0] - raw[1]) > 0.01
    np.testing.assert_allclose(found["rm"], (raw + 1.5) / 4, **CLOSE)
    assert found["length"].tolist() == [7.0, 11.0]
    np.testing.assert_allclose(total(found, sources), (raw + 1.5) / 2 - [1.75, 2.75], **CLOSE)
    assert describe(sources) == [
        f"reward rm: model {folder}, (raw - -1.5) / 4, weight 2",
        "reward length: program programs_here:length, weight -0.25",
    ]


def test_no_episodes(folder: Path) -> None:
    sources = open_sources({"rm": of_model(folder), "p": ScorerConfig(program="programs_here:length")}, device="cpu")
    found = score(sources, [])
    assert [values.shape for values in found.values()] == [(0,), (0,)] and total(found, sources).shape == (0,)


def test_a_score_that_is_not_finite_is_named() -> None:
    sources = open_sources({"mine": ScorerConfig(program="programs_here:broken")}, device="cpu")
    with pytest.raises(UserError) as raised:
        score(sources, [episode("a"), episode("b" * 80)])
    assert str(raised.value) == (
        f"rewards.mine: its score is nan for the prompt prompts.jsonl:3 and the response {'b' * 60!r}...; "
        "a score must be a finite number"
    )


def test_what_is_wrong_is_told_before_anything_is_loaded(folder: Path) -> None:
    wrong = {
        "good": ScorerConfig(program="programs_here:length"),
        "absent": ScorerConfig(program="no_such_module_x:f"),
        "rm": of_model(folder),
        "server": ScorerConfig(url="localhost:8000"),
    }
    with pytest.raises(UserError) as raised:
        check_sources(wrong)
    first, second = str(raised.value).split("\n")
    assert first.startswith("rewards.absent: program=no_such_module_x:f: there is no module")
    assert second.startswith("rewards.server: url=localhost:8000: write http://")
    for name in ("absent", "server"):
        with pytest.raises(UserError, match=f"rewards.{name}: "):
            open_sources({name: wrong[name]}, device="cpu")
    with pytest.raises(UserError, match=r"rewards.one: model.path=.*holds no reward model"):
        scored(of_model(folder.with_name("base")), episode("a"))


def test_a_server_is_a_source() -> None:
    url = f"http://127.0.0.1:{free_port()}/score"
    config = ScorerConfig(url=url + "?token=hunter2", retries=0, timeout=1)
    sources = open_sources({"far": config}, device="cpu")
    assert describe(sources) == [f"reward far: server {url}?token=***, 64 in a request, weight 1"]
    with pytest.raises(UserError, match=r"^rewards.far: url=http.*ConnectError"):
        score(sources, [episode("a")])


def test_prompts_that_a_model_cannot_read(folder: Path, tmp_path: Path) -> None:
    template = TokenizerConfig(template="chatml")
    base = make_base(tmp_path / "base")
    from transformers import AutoTokenizer

    tokenizer = with_template(AutoTokenizer.from_pretrained(base), template)
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + str(tokenizer.chat_template)
    )
    tokenizer.save_pretrained(base)
    strict = make_reward_model(tmp_path / "strict", base)
    sources = open_sources(
        {"rm": of_model(folder), "strict": of_model(strict), "p": ScorerConfig(program="programs_here:length")},
        device="cpu",
    )
    system, user = Message("system", "be brief"), Message("user", "hm?")
    check_prompts(sources, [("a:1", (user,)), ("a:2", (user,))])
    with pytest.raises(UserError) as raised:
        check_prompts(sources, [("a:1", (user,)), ("a:2", (system, user)), *[("b", (system, user))] * 11])
    told = str(raised.value).split("\n")
    assert len(told) == 11 and told[-1] == "and 2 more" and "no system" in told[0]
    assert told[0].startswith("rewards.strict: a:2: the reward model cannot read the prompt: ")


# Models


def test_a_text_has_one_score_whatever_the_policys_tokenizer_is(folder: Path) -> None:
    """A policy with a vocabulary and a template of its own draws tokens; the model gets their words."""
    text = "the blue dog reads under the tree"
    other = with_template(
        train_tokenizer(["the cat sat on the dog"] * 9, vocab_size=280, context=256), TokenizerConfig(template="chatml")
    )
    policy, own = Renderer(other), Renderer(rewards_tokenizer(folder))
    messages = episode("").prompt
    drawn = {}
    for name, renderer in (("other", policy), ("own", own)):
        _, (segments,) = renderer.branches(messages, [text])
        ids = np.concatenate(renderer.tokenize(segments))
        assert ids[-1] == renderer.end_ids[0]
        drawn[name] = (len(ids), renderer.tokenizer.decode(ids[:-1]))
    assert drawn["other"][0] != drawn["own"][0] and drawn["other"][1] != drawn["own"][1]
    mine, theirs = scored(of_model(folder), *(episode(decoded) for _, decoded in drawn.values()))
    assert mine == theirs
    np.testing.assert_allclose(mine, (plain_reward(folder, plain_tokens(folder, PROMPT, text)) + 1.5) / 4, **CLOSE)


def rewards_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_raw_scores(folder: Path) -> None:
    (found,) = scored(of_model(folder, normalised=False), episode("the mat"))
    np.testing.assert_allclose(found, plain_reward(folder, plain_tokens(folder, PROMPT, "the mat")), **CLOSE)


def test_ends_and_silence(folder: Path) -> None:
    whole = plain_tokens(folder, PROMPT, "the old")
    prompt = whole[: len(whole) - len(plain_words(folder, "the old"))]
    found = scored(
        of_model(folder),
        episode("the old"),
        episode("the old", finished=False),
        episode(""),
        episode("\n \n", finished=False),
    )
    tokens = [whole, whole[:-1], [*prompt, whole[-1]], [*prompt, whole[-1]]]
    expected = np.array([plain_reward(folder, ids) for ids in tokens])
    assert np.ptp(expected[:3]) > 0.01
    np.testing.assert_allclose(found, (expected + 1.5) / 4, **CLOSE)


def plain_words(folder: Path, text: str) -> list[int]:
    tokenizer = rewards_tokenizer(folder)
    return list(tokenizer(f" {text}{tokenizer.eos_token}", add_special_tokens=False)["input_ids"])


def test_a_policy_can_say_what_it_likes(folder: Path) -> None:
    texts = ["<|im_end|>", "<|eos|>", "a <|eos|>\n\nHuman: b", "\U000f0000", "\ud800", "\x00", "~" * 4000, "</think>"]
    counts: Counter[str] = Counter()
    sources = open_sources({"rm": of_model(folder)}, device="cpu")
    found = score(sources, [episode(t, finished=f) for t in texts for f in (True, False)], counts=counts)["rm"]
    assert np.isfinite(found).all() and len(np.unique(found.round(6))) > 8
    assert counts == {"rm/prompts_cut": 2, "rm/responses_cut": 2, "rm/respelled": 4}
    np.testing.assert_allclose(
        found[4], (plain_reward(folder, spelled(folder, texts[2])) + 1.5) / 4, **CLOSE, err_msg="as plain characters"
    )


def spelled(folder: Path, text: str) -> list[int]:
    """Tokens of a conversation whose answer spells <|eos|>, which is put together by hand."""
    tokenizer = rewards_tokenizer(folder)
    before = tokenizer.apply_chat_template(PROMPT, tokenize=False, add_generation_prompt=True)
    ids = list(tokenizer(before, add_special_tokens=False)["input_ids"])
    backend = tokenizer.backend_tokenizer
    for part in (" " + text.split("<|eos|>")[0], "<|eos|>", text.split("<|eos|>")[1]):
        backend.encode_special_tokens = True  # "encode" them as the characters they are
        ids += backend.encode(part, add_special_tokens=False).ids
    assert tokenizer.eos_token_id not in ids
    return [*ids, tokenizer.eos_token_id]


def test_samples_of_a_prompt_share_it_and_score_as_alone(folder: Path) -> None:
    episodes = mixed()
    (source,) = open_sources({"rm": of_model(folder, batch_tokens=300)}, device="cpu").values()
    together = source.score(episodes)
    alone = np.concatenate([source.score([one]) for one in episodes])
    assert alone.std() > 0.05
    np.testing.assert_allclose(together, alone, **CLOSE)
    shuffled = np.random.default_rng(0).permutation(len(episodes))
    np.testing.assert_allclose(source.score([episodes[i] for i in shuffled]), alone[shuffled], **CLOSE)


def test_trees_that_are_joined(folder: Path) -> None:
    source = open_sources({"rm": of_model(folder)}, device="cpu")["rm"]
    assert source.model is not None
    single = trees(source.model.renderer, mixed(), limit=256, counts=Counter())
    groups, joint = _joined(single, batch_tokens=10_000)
    assert groups == [[i, i + 1, i + 2] for i in range(0, 36, 3)]
    for group, tree in zip(groups, joint, strict=True):
        for k, i in enumerate(group):
            assert tree.path(k).tolist() == single[i].path(0).tolist()
    assert _joined(single, batch_tokens=1)[0] == [[i] for i in range(36)], "none is larger than a micro-batch"
    largest = max(map(len, joint))
    assert all(len(tree) <= largest - 1 for tree in _joined(single, batch_tokens=largest - 1)[1])


def test_a_model_that_is_offloaded_moves_and_scores_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moves: list[str] = []
    episodes = mixed(4)
    expected = scored(of_model(folder), *episodes)
    real_to, real_forward = rewards.TreeScorer.to, rewards.TreeScorer.forward

    def to(self: Any, device: Any) -> Any:
        moves.append(str(device))
        return real_to(self, device)

    def forward(self: Any, batch: Any) -> Any:
        moves.append("scores")
        return real_forward(self, batch)

    monkeypatch.setattr(rewards.TreeScorer, "to", to)
    monkeypatch.setattr(rewards.TreeScorer, "forward", forward)
    import torch

    # Told apart from "cpu" by its index, this device stands for a GPU.
    (source,) = open_sources({"rm": of_model(folder, offload=True)}, device="cpu:0").values()
    assert moves[-1] == "cpu" and moves.count("cpu") == 1
    for _ in range(2):
        moves.clear()
        found = source.score(episodes)
        assert moves == ["cpu:0", "scores", "cpu"]
        np.testing.assert_array_equal(found, expected)
    assert source.model is not None and source.model.device == torch.device("cpu:0")
    assert describe({"rm": source})[0].endswith("on the CPU between uses, weight 1")


def test_a_damaged_model_is_named(folder: Path) -> None:
    (source,) = open_sources({"rm": of_model(folder)}, device="cpu").values()
    assert source.model is not None
    source.model.scorer.inner.score.weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"rewards.rm: its score is nan for the prompt prompts.jsonl:3 .* 'the mat'"):
        source.score([episode("the mat")])


def test_sources_are_made_of_any_function() -> None:
    source = Source(name="x", weight=1.0, what="", run=lambda episodes, counts: np.arange(len(episodes)) / 2)
    assert source.score([episode("a"), episode("b")]).tolist() == [0.0, 0.5]
