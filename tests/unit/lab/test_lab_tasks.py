"""The tasks: every wording can be read back, references are perfect, and the two sides never meet."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from rlhf_pipeline.data.lab import lexicon as lex
from rlhf_pipeline.data.lab.judge import as_messages, judge
from rlhf_pipeline.data.lab.task import Task
from rlhf_pipeline.data.lab.tasks import CATEGORIES, TYPES, make, parse
from rlhf_pipeline.data.records import Message
from rlhf_pipeline.errors import UserError


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    """A hundred and twenty of each type, from both sides."""
    rng = random.Random("tasks")
    return [kind.make(rng) for kind in TYPES.values() for _ in range(120)]


def test_a_prompt_is_read_back_as_the_task_that_made_it(tasks: list[Task]) -> None:
    assert len(tasks) > 4_000
    assert [parse(task.messages) for task in tasks] == tasks


def test_every_reference_is_worth_exactly_one(tasks: list[Task]) -> None:
    for task in tasks:
        for reference in task.references:
            verdict = judge(task.messages, reference)
            assert verdict.score == 1.0, (task, reference, verdict)
            assert (verdict.category, verdict.task) == (task.category, task.type)


def test_both_sides_of_every_type_hold_several_tasks(tasks: list[Task]) -> None:
    sides = Counter((task.category, task.type, task.held_out()) for task in set(tasks))
    assert all(sides[(*key, True)] >= 2 and sides[(*key, False)] >= 9 for key in TYPES)
    assert 0.12 < sum(task.held_out() for task in tasks) / len(tasks) < 0.22  # a sixth


def test_the_side_does_not_depend_on_the_wording(tasks: list[Task]) -> None:
    sides: dict[tuple[object, ...], set[bool]] = {}
    for task in tasks:
        content = tuple(slot for slot in task.slots if slot[0] != "form")
        sides.setdefault((task.category, task.type, content), set()).add(task.held_out())
    assert all(len(side) == 1 for side in sides.values())


def test_make_keeps_to_its_side_and_category() -> None:
    rng = random.Random("sides")
    for held_out in (False, True):
        for category in CATEGORIES:
            task = make(rng, held_out=held_out, category=category)
            assert (task.category, task.held_out()) == (category, held_out)


def test_categories_are_those_of_instructgpt_and_refusal() -> None:
    assert list(CATEGORIES) == [
        *("brainstorming", "open_qa", "closed_qa", "classification", "extraction"),
        *("rewriting", "summarising", "generation", "chat", "refusal"),
    ]
    assert all(3 <= len(types) <= 9 for types in CATEGORIES.values())
    assert all(len(kind.wordings) >= 2 for kind in TYPES.values())


def test_lengths_are_bounded(tasks: list[Task]) -> None:
    for task in tasks:
        assert sum(len(message.content.split()) for message in task.messages) <= 60
        assert all(len(reference.split()) <= 25 for reference in task.references)


def test_a_chat_refers_to_an_earlier_turn(tasks: list[Task]) -> None:
    assert all((len(task.messages) == 3) == (task.category == "chat") for task in tasks)


@pytest.mark.parametrize(
    "prompt",
    [
        "What is the capital of France?",
        "Where does Zoe live?",  # nobody of the village
        "Where does Ada live? Hurry!",
        "Mia has a red kite. Who has the drum?",  # has no answer
        "What does the word goat name: food, tool or place? One word, please.",  # the answer is not among the options
        "Name nine tools other than saw and rope.",  # there are not so many
    ],
)
def test_other_prompts_are_refused_by_name(prompt: str) -> None:
    with pytest.raises(UserError, match="not one of the demo lab's tasks") as error:
        judge(prompt, "Yes.")
    assert prompt[:20] in str(error.value) and "reward model" in str(error.value)


def test_a_conversation_that_waits_for_the_user_is_refused() -> None:
    with pytest.raises(UserError):
        judge([Message("user", "Where does Ada live?"), Message("assistant", "At the mill.")], "Yes.")


def test_prompts_may_be_strings_messages_or_rows() -> None:
    text = "Where does Ada live?"
    as_row = [{"role": "user", "content": text}]
    assert as_messages(text) == as_messages(as_row) == as_messages([Message("user", text)])
    assert judge(text, "Ada lives at the harbour.").score == judge(as_row, "Ada lives at the harbour.").score == 1.0


def test_the_lexicon_has_one_kind_a_word() -> None:
    words = [word.lower() for words in (lex.NAMES, lex.THINGS, lex.NUMBERS, *lex.KINDS.values()) for word in words]
    assert len(words) == len(set(words))
    assert not set(words) & (set(lex.RUDE) | set(lex.HARMS) | set(lex.FEELINGS) | set(lex.KINDS))


def test_facts_have_one_owner_where_one_is_asked_for() -> None:
    for fact in ("job", "pet"):
        assert len({facts[fact] for facts in lex.FACTS.values()}) == len(lex.VILLAGERS)
    assert lex.FACTS["Ada"] == {"home": "harbour", "job": "carpenter", "pet": "donkey", "food": "honey"}
    assert lex.FACTS["Leo"] == {"home": "library", "job": "sailor", "pet": "cow", "food": "bread"}
