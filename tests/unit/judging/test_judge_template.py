"""What a chat model is sent about a pair."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from rlhf_pipeline.config import config_dir
from rlhf_pipeline.data.records import Message
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.judging.pairs import Answer, Pair
from rlhf_pipeline.judging.template import load

PAIR = Pair(
    prompt=(
        Message("system", "Be brief."),
        Message("user", "Hm?"),
        Message("assistant", "Yes?"),
        Message("user", "1+1?"),
    ),
    a=Answer(text="{{ b.text }} is 2"),
    b=Answer(text="three", finished=False),
    origin="some.jsonl:3",
)


def test_the_shipped_one() -> None:
    (message,) = load("pairwise").messages(PAIR)
    assert message["role"] == "user"
    text = message["content"]
    conversation = (
        "<conversation>\n<system>\nBe brief.\n</system>\n<user>\nHm?\n</user>\n<assistant>\nYes?\n</assistant>\n"
    )
    assert f"{conversation}<user>\n1+1?\n</user>\n</conversation>\n" in text
    assert (
        "<response_a>\n{{ b.text }} is 2\n</response_a>\n\n<response_b>\nthree\n</response_b>\nResponse B was cut"
        in text
    )
    assert "Response A was cut" not in text and "{#" not in text
    assert text.endswith("\nVerdict: A\nVerdict: B\nVerdict: tie")


@pytest.mark.parametrize("path", sorted((config_dir() / "judge_templates").glob("*.jinja")), ids=lambda path: path.stem)
def test_every_shipped_one_asks_for_a_verdict(path: Path) -> None:
    assert "Verdict: " in load(path.stem).messages(PAIR)[-1]["content"]


def written(folder: Path, text: str) -> str:
    file = folder / "mine.jinja"
    file.write_text(text)
    return str(file)


SHOWS_ALL = "{{ prompt[-1].content }} | {{ a.text }} | {{ b.text }}"


def test_a_file_with_a_system_message(tmp_path: Path) -> None:
    text = "{% set system %}\nYou judge.\n{% endset %}\n" + SHOWS_ALL
    template = load(written(tmp_path, text))
    assert template.messages(PAIR) == [
        {"role": "system", "content": "You judge."},
        {"role": "user", "content": "1+1? | {{ b.text }} is 2 | three"},
    ]
    assert template.digest == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{{ a.text }} {{ b.text }}", "does not show prompt; it has prompt (messages), a.text and b.text"),
        ("{{ prompt[0].content }} {{ b.text }}", "does not show a.text"),
        ("{{ prompt[0].content }} {{ a.text }}", "does not show b.text"),
        (SHOWS_ALL + "{% if %}", "is not Jinja: Expected an expression, got 'end of statement block' (line 1)"),
        (SHOWS_ALL + "{{ question }}", "cannot be filled: UndefinedError: 'question' is undefined"),
        (SHOWS_ALL + "{{ a.text.__class__.__mro__ }}", "cannot be filled: SecurityError"),
        (SHOWS_ALL + "{% include 'x' %}", "cannot be filled: TypeError: no loader"),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path: Path, text: str, told: str) -> None:
    name = written(tmp_path, text)
    with pytest.raises(UserError) as raised:
        load(name)
    assert str(raised.value).startswith(f"judge.chat.template={name}: {told}")


def test_a_name_that_is_none() -> None:
    with pytest.raises(UserError, match="template=parwise: no such file, and the shipped ones are pairwise"):
        load("parwise")


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "x.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot be read"):
        load(str(tmp_path / "x.jinja"))


def test_a_pair_that_cannot_be_shown_is_named(tmp_path: Path) -> None:
    template = load(written(tmp_path, SHOWS_ALL + "{{ 1 // (prompt | length - 4) if prompt | length > 1 }}"))
    with pytest.raises(UserError, match=r"cannot be filled for some.jsonl:3: ZeroDivisionError"):
        template.messages(PAIR)
