from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rlhf_pipeline.data.encode import Draft, Encoded, Lengths, draft, encode, fit
from rlhf_pipeline.data.prompts import Renderer, Segment
from rlhf_pipeline.data.records import Demonstration, Feedback, Message, Prompt, Ranking, Text
from rlhf_pipeline.data.tree import Tree
from rlhf_pipeline.errors import UserError

QUESTION = Message("user", "How are you?")
ROOMY = Lengths(max_length=1000, max_prompt_length=500, long_prompt="error", long_response="error")


def lengths(**changes: Any) -> Lengths:
    values = {"max_length": 1000, "max_prompt_length": 500, "long_prompt": "error", "long_response": "error"}
    return Lengths(**(values | changes))


def ids(renderer: Renderer, *texts: str) -> list[int]:
    """Independent of the renderer: each text by the tokenizer alone."""
    return [token for text in texts for token in renderer.tokenizer.encode(text, add_special_tokens=False)]


def fit_numbers(
    prompt: list[int], *responses: list[int], limits: Lengths, bos_id: int | None = None, unscored: int = 0
) -> Encoded:
    """`fit` of made-up tokens. The first `unscored` tokens of every response are no targets."""

    def segments(tokens: list[int], *, scored: bool) -> tuple[list[Segment], list[np.ndarray]]:
        parts = [(tokens[:unscored], False), (tokens[unscored:], True)] if scored else [(tokens, False)]
        parts = [part for part in parts if part[0]]
        made = [Segment(text="", scored=is_scored, first=False) for _, is_scored in parts]
        return made, [np.asarray(part, np.int32) for part, _ in parts]

    prompts, tokens = segments(prompt, scored=False)
    branches = []
    for response in responses:
        branch, more = segments(response, scored=True)
        branches.append(branch)
        tokens += more
    return fit(Draft(prompt=prompts, responses=branches, group=0), tokens, limits, bos_id=bos_id)


def test_demonstration(renderer: Renderer) -> None:
    encoded = encode(Demonstration((QUESTION, Message("assistant", "Well."))), renderer, ROOMY)
    (tree,) = encoded.trees
    assert tree.prompt.tolist() == ids(renderer, "<|bos|>\n\nHuman: How are you?\n\nAssistant:")
    assert [r.tolist() for r in tree.responses] == [ids(renderer, " Well.<|eos|>")]
    assert [s.tolist() for s in tree.scored] == [[True] * len(tree.responses[0])]
    assert encoded.outcome == "kept" and not encoded.prompt_truncated and not encoded.num_responses_truncated


def test_demonstration_of_several_turns_has_one_response_that_holds_the_later_questions(renderer: Renderer) -> None:
    turns = (QUESTION, Message("assistant", "Well."), Message("user", "Sky?"), Message("assistant", "Blue."))
    (tree,) = encode(Demonstration(turns), renderer, ROOMY).trees
    parts = [" Well.<|eos|>", "\n\nHuman: Sky?\n\nAssistant:", " Blue.<|eos|>"]
    assert tree.responses[0].tolist() == ids(renderer, *parts)
    assert tree.scored[0].tolist() == [
        scored for part, scored in zip(parts, (True, False, True), strict=True) for _ in ids(renderer, part)
    ]
    unscored = (turns[0], Message("assistant", "Well.", scored=False), *turns[2:])
    (tree,) = encode(Demonstration(unscored), renderer, ROOMY).trees
    first = "<|bos|>\n\nHuman: How are you?\n\nAssistant:"
    assert tree.prompt.tolist() == ids(renderer, first, *parts[:2])
    assert tree.responses[0].tolist() == ids(renderer, parts[2]) and tree.scored[0].all()


def test_loss_on_all_makes_every_token_but_the_first_a_target(renderer: Renderer) -> None:
    record = Demonstration((QUESTION, Message("assistant", "Well.")))
    (tree,) = encode(record, renderer, ROOMY, loss="all").trees
    whole = ids(renderer, "<|bos|>\n\nHuman: How are you?\n\nAssistant:", " Well.<|eos|>")
    assert tree.prompt.tolist() == whole[:1] and tree.responses[0].tolist() == whole[1:]
    assert tree.scored[0].tolist() == [True] * (len(whole) - 1)
    short = encode(record, renderer, lengths(max_length=5, max_prompt_length=1, long_response="cut"), loss="all")
    assert short.trees[0].responses[0].tolist() == whole[1:5] and short.num_responses_truncated == 1


def test_nothing_to_learn_is_dropped_and_said(renderer: Renderer) -> None:
    record = Demonstration((QUESTION, Message("assistant", "Well.", scored=False)))
    assert encode(record, renderer, ROOMY) == Encoded(outcome="dropped_no_target")
    # Cut before the first target: 2 tokens of prompt and 2 of the response fit, 3 of the response are no targets.
    limits = lengths(max_length=4, max_prompt_length=3, long_response="cut")
    assert fit_numbers([1, 2], [3, 4, 5, 6], limits=limits, unscored=3) == Encoded(outcome="dropped_no_target")
    assert fit_numbers([1, 2], [3, 4, 5, 6], limits=limits, unscored=1).outcome == "kept"
    # One answer without a target makes a comparison empty.
    assert fit_numbers([1, 2], [3, 4], [3], limits=limits, unscored=1) == Encoded(outcome="dropped_no_target")


def test_ranking_of_three_shares_one_prompt(renderer: Renderer) -> None:
    prompt = (QUESTION, Message("assistant", "Well."), Message("user", "Sky?"))  # the earlier answer is context
    (tree,) = encode(Ranking(prompt, ("Blue.", "Red <|eos|>.", "No."), (0, 2, 1)), renderer, ROOMY).trees
    assert tree.prompt.tolist() == renderer.encode_prompt(prompt).tolist()
    for response, answer in zip(tree.responses, ("Blue.", "Red <|eos|>.", "No."), strict=True):
        alone = encode(Demonstration((*prompt[:1], Message("assistant", answer))), renderer, ROOMY).trees[0]
        assert response.tolist() == alone.responses[0].tolist()
    assert [scored.all() for scored in tree.scored] == [True] * 3
    assert len(tree) == len(tree.prompt) + sum(map(len, tree.responses))


def test_order_and_scores_of_a_ranking_are_kept(renderer: Renderer) -> None:
    (tree,) = encode(Ranking((QUESTION,), ("a", "b", "c"), (2, 0, 0), (-1.5, 3.0, 3.0)), renderer, ROOMY).trees
    assert tree.ranks.tolist() == [2, 0, 0] and tree.ranks.dtype == np.int32
    assert tree.scores.tolist() == [-1.5, 3.0, 3.0] and tree.scores.dtype == np.float32
    (tree,) = encode(Ranking((QUESTION,), ("a", "b"), (1, 0)), renderer, ROOMY).trees
    assert tree.ranks.tolist() == [1, 0] and np.isnan(tree.scores).all() and tree.scores.shape == (2,)
    # A cut answer keeps its place; where one cannot be used, nothing of the ranking is.
    record = Ranking((QUESTION,), ("The sky is blue and blue and blue.", "No."), (1, 0))
    room = len(encode(record, renderer, ROOMY).trees[0].path(1))
    limits = lengths(max_length=room, max_prompt_length=room - 1, long_response="cut")
    assert encode(record, renderer, limits).trees[0].ranks.tolist() == [1, 0]
    limits = lengths(max_length=room, max_prompt_length=room - 1, long_response="drop")
    assert encode(record, renderer, limits) == Encoded(outcome="dropped_long_response")


def test_ranks_and_scores_where_nothing_was_compared(renderer: Renderer) -> None:
    demonstration = encode(Demonstration((QUESTION, Message("assistant", "Well."))), renderer, ROOMY)
    document = encode(Text("The sky is blue."), renderer, lengths(max_length=4, max_prompt_length=1))
    by_hand = Tree(prompt=np.ones(1, np.int32), responses=(np.ones(2, np.int32),), scored=(np.ones(2, bool),), index=0)
    assert len(document.trees) > 1
    for tree in (*demonstration.trees, *document.trees, by_hand):
        assert tree.ranks.tolist() == [0] and tree.ranks.dtype == np.int32
        assert np.isnan(tree.scores).tolist() == [True] and tree.scores.dtype == np.float32


@pytest.mark.parametrize("desirable", [True, False])
def test_feedback_is_one_response_whose_rank_says_whether_it_was_wanted(renderer: Renderer, desirable: bool) -> None:
    prompt = (QUESTION, Message("assistant", "Well."), Message("user", "Sky?"))
    (tree,) = encode(Feedback(prompt, "Blue.", desirable), renderer, ROOMY).trees
    (ranking,) = encode(Ranking(prompt, ("Blue.", "Red."), (0, 1)), renderer, ROOMY).trees
    assert tree.prompt.tolist() == ranking.prompt.tolist()
    assert [response.tolist() for response in tree.responses] == [ranking.responses[0].tolist()]
    assert tree.scored[0].all() and tree.ranks.tolist() == [0 if desirable else 1]


def test_prompt_becomes_a_tree_without_responses(renderer: Renderer) -> None:
    prompt = (QUESTION, Message("assistant", "Well."), Message("user", "Sky?"))
    encoded = encode(Prompt(prompt), renderer, ROOMY)
    (tree,) = encoded.trees
    assert encoded.outcome == "kept" and not encoded.prompt_truncated
    assert tree.prompt.tolist() == renderer.encode_prompt(prompt).tolist() and len(tree) == len(tree.prompt)
    assert tree.responses == () == tree.scored and tree.ranks.shape == (0,) == tree.scores.shape
    assert draft(Prompt(prompt), renderer, loss="responses").group == _ranking_group(prompt, renderer)
    size = len(tree.prompt)
    limits = lengths(max_prompt_length=size - 1, long_prompt="keep_end")
    assert encode(Prompt(prompt), renderer, limits).trees[0].prompt.tolist()[1:] == tree.prompt.tolist()[2:]
    limits = lengths(max_prompt_length=size - 1, long_prompt="drop")
    assert encode(Prompt(prompt), renderer, limits) == Encoded(outcome="dropped_long_prompt")


def _ranking_group(prompt: tuple[Message, ...], renderer: Renderer) -> int:
    return draft(Ranking(prompt, ("a", "b"), (0, 1)), renderer, loss="responses").group


@pytest.mark.parametrize(
    ("policy", "limit", "bos_id", "expected"),
    [
        ("keep_end", 4, 1, [1, 4, 5, 6]),  # the start token stays
        ("keep_end", 4, None, [3, 4, 5, 6]),
        ("keep_end", 4, 9, [3, 4, 5, 6]),
        ("keep_end", 1, 1, [6]),
        ("keep_start", 4, 1, [1, 2, 3, 4]),
        ("keep_end", 6, 1, [1, 2, 3, 4, 5, 6]),
        ("drop", 6, 1, [1, 2, 3, 4, 5, 6]),
        ("error", 6, 1, [1, 2, 3, 4, 5, 6]),
    ],
)
def test_long_prompt_is_shortened(policy: str, limit: int, bos_id: int | None, expected: list[int]) -> None:
    limits = lengths(max_length=8, max_prompt_length=limit, long_prompt=policy)
    encoded = fit_numbers([1, 2, 3, 4, 5, 6], [7, 8], limits=limits, bos_id=bos_id)
    assert encoded.trees[0].prompt.tolist() == expected
    assert encoded.trees[0].responses[0].tolist() == [7, 8]
    assert encoded.prompt_truncated == (limit < 6)


def test_long_prompt_is_dropped_or_an_error() -> None:
    limits = lengths(max_prompt_length=2, long_prompt="drop")
    assert fit_numbers([1, 2, 3], [4], limits=limits) == Encoded(outcome="dropped_long_prompt")
    with pytest.raises(UserError, match=r"the prompt has 3 tokens, more than data.max_prompt_length=2"):
        fit_numbers([1, 2, 3], [4], limits=lengths(max_prompt_length=2))


def test_long_response_is_cut_dropped_or_an_error() -> None:
    long = ([3, 4], [5, 6, 7, 8], [9, 10, 11])
    cut = fit_numbers([1, 2], *long, limits=lengths(max_length=4, max_prompt_length=3, long_response="cut"))
    assert [response.tolist() for response in cut.trees[0].responses] == [[3, 4], [5, 6], [9, 10]]
    assert [scored.tolist() for scored in cut.trees[0].scored] == [[True, True]] * 3
    assert cut.num_responses_truncated == 2 and cut.outcome == "kept"
    drop = lengths(max_length=5, max_prompt_length=3, long_response="drop")
    assert fit_numbers([1, 2], *long, limits=drop) == Encoded(outcome="dropped_long_response")
    assert fit_numbers([1, 2], *long[::2], limits=drop).outcome == "kept"
    with pytest.raises(UserError, match=r"a response has 4 tokens, its prompt 2; .* data.max_length=5"):
        fit_numbers([1, 2], *long, limits=lengths(max_length=5, max_prompt_length=3))
    # The room is what the shortened prompt leaves.
    limits = lengths(max_length=4, max_prompt_length=1, long_prompt="keep_end", long_response="cut")
    assert fit_numbers([1, 2], [3, 4, 5, 6], limits=limits).trees[0].responses[0].tolist() == [3, 4, 5]


def test_a_response_that_is_not_cut_ends_with_its_end_token_as_a_target(renderer: Renderer) -> None:
    record = Demonstration((QUESTION, Message("assistant", "The sky is blue.")))
    whole = encode(record, renderer, ROOMY).trees[0]
    assert whole.responses[0][-1] == renderer.eos_id and whole.scored[0][-1]
    limit = len(whole) - 1
    cut = encode(record, renderer, lengths(max_length=limit, max_prompt_length=limit - 1, long_response="cut"))
    assert renderer.eos_id not in cut.trees[0].responses[0]


@pytest.mark.parametrize(
    ("num_tokens", "expected"),
    [
        (6, [[1, 10, 11, 12], [12, 13, 14, 15], [15, 2]]),
        (5, [[1, 10, 11, 12], [12, 13, 14, 2]]),
        (2, [[1, 10, 11, 2]]),
        (1, [[1, 10, 2]]),
    ],
)
def test_document_chunks_overlap_by_one(num_tokens: int, expected: list[list[int]]) -> None:
    drafted = Draft(prompt=[], responses=[[Segment(text="", scored=True, first=True)]], group=0, document=(1, 2))
    tokens = [np.arange(10, 10 + num_tokens, dtype=np.int32)]
    encoded = fit(drafted, tokens, lengths(max_length=4, max_prompt_length=1), bos_id=1, first_index=7)
    assert [[*tree.prompt.tolist(), *tree.responses[0].tolist()] for tree in encoded.trees] == expected
    assert all(len(tree.prompt) == 1 and tree.scored[0].all() for tree in encoded.trees)
    assert [tree.index for tree in encoded.trees] == list(range(7, 7 + len(expected)))
    targets = [token for tree in encoded.trees for token in tree.responses[0].tolist()]
    assert targets == [*range(10, 10 + num_tokens), 2]  # every token but the first, once


def test_document_tokens(renderer: Renderer) -> None:
    (tree,) = encode(Text("The sky."), renderer, ROOMY).trees
    assert tree.prompt.dtype == tree.responses[0].dtype == np.int32
    assert [*tree.prompt.tolist(), *tree.responses[0].tolist()] == renderer.encode_text("The sky.").tolist()


def test_group_is_that_of_the_prompt() -> None:
    class Blank:
        """Renders nothing: the group must not depend on how a prompt looks."""

        def segments(self, _: object) -> list[Segment]:
            return []

        def branches(self, *_: object) -> tuple[list[Segment], list[list[Segment]]]:
            return [], []

    def group(record: Any) -> int:
        return draft(record, Blank(), loss="responses").group  # type: ignore[arg-type]

    answer, other = Message("assistant", "a"), Message("assistant", "b")
    assert group(Demonstration((QUESTION, answer))) == group(Demonstration((QUESTION, other)))
    assert group(Demonstration((QUESTION, answer))) == group(Ranking((QUESTION,), ("x", "y"), (0, 1)))
    assert group(Demonstration((QUESTION, answer))) != group(Demonstration((Message("user", "Sky?"), answer)))
    system = Message("system", "How are you?")
    assert group(Demonstration((system, QUESTION, answer))) != group(Demonstration((QUESTION, answer)))
    # The same conversation up to a later answer, the earlier one being context in both.
    context = Message("assistant", "a", scored=False)
    prompt = (QUESTION, context, QUESTION)
    assert group(Demonstration((*prompt, other))) == group(Ranking(prompt, ("x", "y"), (0, 1)))
    # The same for ever: printf '[["user", "How are you?"]]' | b2sum -l 64
    expected = int.from_bytes(bytes.fromhex("497cfce80245bfd2"), "little", signed=True)
    assert group(Demonstration((QUESTION, answer))) == expected


@pytest.mark.parametrize("limit", [0, 8, 9])
def test_lengths_must_leave_room_for_a_response(limit: int) -> None:
    with pytest.raises(UserError, match=f"max_prompt_length={limit}: must be at least 1 and less than max_length=8"):
        lengths(max_length=8, max_prompt_length=limit)
