"""Answers that try to get points without doing the task: constants, copies of the prompt, lists, references spoilt."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from rlhf_pipeline.data.lab import lexicon as lex
from rlhf_pipeline.data.lab.judge import judge
from rlhf_pipeline.data.lab.reading import named, sentences
from rlhf_pipeline.data.lab.task import Task
from rlhf_pipeline.data.lab.tasks import CATEGORIES, make
from rlhf_pipeline.data.records import Message

A_QUARTER = 0.25
LEXICON = [*lex.NAMES, *lex.KIND_OF, *lex.THINGS, *lex.NUMBERS, *lex.KINDS, *lex.FEELINGS]
GENERIC = [
    *("Yes.", "No.", "Ok.", ".", "...", " ", "I do not know.", "Please.", "Of course.", "Thank you very much."),
    *("You are welcome.", "You are welcome. Goodbye.", "I am glad to help you.", "With pleasure. You are welcome."),
    *("I am sorry, but I cannot help you.", "I am sorry, but I will not help you.", "I am sorry."),
    *("Please give me the.", "The answer is in the text.", "The word is different.", "Dear Ada, yours, Ben."),
    *("It is red.", "Of course. It is red.", "She has a red kite.", "Animal.", "The", "the the the the"),
    " ".join(LEXICON),
    ", ".join(LEXICON) + ".",
    *(", ".join(words) + "." for words in (lex.NAMES, lex.THINGS, lex.NUMBERS, *lex.KINDS.values())),
    *(", ".join(words) + "." for words in (tuple(lex.KINDS), tuple(lex.FEELINGS))),
    *(f"{word.capitalize()}." for word in LEXICON),
    *(f"{word} {word} {word} {word}." for word in ("Ada", "goat", "sorry", "please", "red")),
    *(f"I am sorry, but I will not help you to {harm} the {lex.HARMS[harm][0]}." for harm in lex.HARMS),
]


@pytest.fixture(scope="module")
def held_out() -> dict[str, list[Task]]:
    """Twenty held-out tasks of each category."""
    return {
        category: [make(random.Random(f"gaming {category} {i}"), held_out=True, category=category) for i in range(20)]
        for category in CATEGORIES
    }


def _by_category(held_out: dict[str, list[Task]], answer: Callable[[Task], str]) -> dict[str, float]:
    return {
        category: sum(judge(task.messages, answer(task)).score for task in tasks) / len(tasks)
        for category, tasks in held_out.items()
    }


def test_no_constant_answer_gets_a_quarter_in_any_category(held_out: dict[str, list[Task]]) -> None:
    """Good answers to other prompts, of each category, and everything generic."""
    rng = random.Random("constants")
    others = [rng.choice(make(rng, category=category).references) for category in CATEGORIES for _ in range(15)]
    constants = sorted({*others, *GENERIC})
    assert len(constants) > 300
    for constant in constants:
        means = _by_category(held_out, lambda task, constant=constant: constant)  # type: ignore[misc]
        assert max(means.values()) <= A_QUARTER, (constant, means)
        assert sum(means.values()) / len(means) <= 0.1, (constant, means)


def _last_message(task: Task) -> str:
    return task.messages[-1].content


def _whole_prompt(task: Task) -> str:
    return " ".join(message.content for message in task.messages)


def _prompt_and_reference(task: Task) -> str:
    return f"{task.messages[-1].content} {task.references[0]}"


@pytest.mark.parametrize("copy", [_last_message, _whole_prompt, _prompt_and_reference])
def test_copies_of_the_prompt_get_next_to_nothing(held_out: dict[str, list[Task]], copy: Callable[[Task], str]) -> None:
    assert max(_by_category(held_out, copy).values()) <= 0.05


def test_all_the_words_of_the_prompt_that_mean_something_get_little(held_out: dict[str, list[Task]]) -> None:
    """Keywords: at most a third of the points in any category, where a reference has all."""
    means = _by_category(held_out, lambda task: ", ".join(dict.fromkeys(named(_whole_prompt(task)))).capitalize() + ".")
    assert max(means.values()) <= 0.34, means
    assert sum(means.values()) / len(means) <= A_QUARTER, means


def test_a_sentence_of_the_prompt_gets_little(held_out: dict[str, list[Task]]) -> None:
    means = _by_category(held_out, lambda task: sentences(task.messages[0].content)[0])
    assert sum(means.values()) / len(means) <= A_QUARTER, means


def _shotgun(task: Task) -> str:
    """The right words, and beside each another of its kind."""
    out = []
    for word in task.references[0].rstrip(".!?").split():
        bare = word.strip(",")
        out.append(word)
        if bare.lower() in lex.ITEMS | set(lex.KINDS) | set(lex.FEELINGS):
            kin = [other for other in lex.kind_words(bare) if other != bare] if bare != bare.capitalize() else []
            out += ["or", kin[0]] if kin else []
    text = " ".join(out) + "."
    return text if text != task.references[0] else f"{task.references[0][:-1]} or {', '.join(LEXICON)}."


SPOILT: dict[str, Callable[[Task], str]] = {
    "babble": lambda task: f"{task.references[0]} And then they went and went. The sky is the sky.",
    "a true sentence more": lambda task: f"{task.references[0]} Leo is a sailor.",
    "the next turn": lambda task: f"{task.references[0]}\n\nHuman: Where does Ada live?",
    "the next question": lambda task: f"{task.references[0]} Q: Where does Ada live?",
    "twice": lambda task: f"{task.references[0]} {task.references[0]}",
    "rude": lambda task: f"{task.references[0][:-1]}, you fool.",
    "no mark": lambda task: task.references[0][:-1],
    "small letters": lambda task: task.references[0].lower(),
    "a word four times": lambda task: task.references[0][:-1] + " well well well well.",
    "everything beside": lambda task: f"{task.references[0][:-1]}, {', '.join(LEXICON)}.",
    "one wrong beside each": _shotgun,
    "a denial": lambda task: f"{task.references[0][:-1]}, not.",
    "half": lambda task: " ".join(task.references[0].split()[: len(task.references[0].split()) // 2]),
}


@pytest.mark.parametrize("name", list(SPOILT))
def test_a_spoilt_reference_is_worse_than_the_reference(held_out: dict[str, list[Task]], name: str) -> None:
    for tasks in held_out.values():
        for task in tasks:
            verdict = judge(task.messages, SPOILT[name](task))
            assert verdict.score <= 0.99, (name, task, verdict)


@pytest.mark.parametrize("name", ["everything beside", "one wrong beside each"])
def test_naming_all_candidates_is_not_right(held_out: dict[str, list[Task]], name: str) -> None:
    for category, tasks in held_out.items():
        for task in tasks:
            verdict = judge(task.messages, SPOILT[name](task))
            assert verdict.criteria[0].points < 0.6, (category, verdict)


def test_any_text_can_be_judged(held_out: dict[str, list[Task]]) -> None:
    """A sampled answer may be anything: bytes of no word, marks alone, half a letter, no text."""
    rng = random.Random("anything")
    pieces = [
        *LEXICON[::7],
        *"..,,!?  \n\n''-:;",
        "Dear",
        "Yours,",
        "\u00e9",
        "\U0001f600",
        "\ufffd",
        "Q:",
        "THE",
        "a",
        "not",
    ]
    for tasks in held_out.values():
        for task in tasks:
            for answer in ("", "\n", *("".join(rng.choices(pieces, k=rng.randint(1, 12))) for _ in range(20))):
                verdict = judge(task.messages, answer)
                assert 0 <= verdict.score <= 1 and all(0 <= c.points <= c.out_of for c in verdict.criteria)
                assert all(c.why for c in verdict.criteria)


def test_an_unfinished_answer_loses_its_ending() -> None:
    whole = judge("Where does Ada live?", "Ada lives at the harbour.")
    cut = judge("Where does Ada live?", "Ada lives at the harbour.", finished=False)
    assert whole.score - cut.score == pytest.approx(0.1)
    assert [c.name for c in cut.criteria if c.points == 0] == ["ends"]


def test_the_judge_is_a_pure_function(held_out: dict[str, list[Task]]) -> None:
    task = held_out["chat"][0]
    again = [Message(message.role, message.content) for message in task.messages]
    assert judge(task.messages, task.references[0]) == judge(again, task.references[0])
