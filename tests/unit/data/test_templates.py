from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_pipeline.data.records import BadRow, Demonstration, Message
from rlhf_pipeline.data.templates import Template, Templates, load
from rlhf_pipeline.errors import UserError

CONF = Path(__file__).parents[3] / "conf"
ROW = {"text": "Good.", "label": 1, "Best Answer": "yes"}


def template(prompt: str = "Q: {{ text }}", response: str = "{{ label }}", name: str = "a", **more: Any) -> Template:
    return Template(name=name, prompt=prompt, response=response, **more)


def texts(record: Demonstration) -> list[str]:
    return [message.content for message in record.messages]


def numbered(count: int) -> list[dict[str, Any]]:
    return [{"text": f"text {i}", "label": i} for i in range(count)]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def write(content: str) -> Path:
        file = tmp_path / "t.yaml"
        file.write_text(content, encoding="utf-8")
        return file

    return write


def test_a_row_is_worded() -> None:
    made = Templates(
        templates=(
            template(
                "\n  Is it good?\n{% if label %}{{ text }}{% endif %}  ",
                ' {{ row["Best Answer"] }}\n',
                system="Be {{ 'kind' }}.",
            ),
        )
    )
    (record,) = made.records(ROW, "f:1", [], 0)
    expected = Message("system", "Be kind."), Message("user", "Is it good?\nGood."), Message("assistant", "yes")
    assert record == Demonstration(expected)


@pytest.mark.parametrize("empty", [{"prompt": "{% if label == 0 %}x{% endif %}"}, {"response": " "}])
def test_empty_leaves_the_row_out(empty: dict[str, str]) -> None:
    assert Templates(templates=(template(**empty),)).records(ROW, "f:1", [], 0) == []


def test_one_template_is_chosen_by_seed_and_origin() -> None:
    made = Templates(templates=tuple(template(name, name=name, weight=w) for name, w in (("a", 1.0), ("b", 3.0))))

    def choice(origin: int, seed: int) -> str:
        (record,) = made.records(ROW, f"f:{origin}", [], seed)
        return texts(record)[0]

    first = [choice(i, 0) for i in range(400)]
    assert first == [choice(i, 0) for i in range(400)] != [choice(i, 1) for i in range(400)]
    # 300 expected of the heavier one, standard deviation 8.7.
    assert 260 < Counter(first)["b"] < 340


def test_all_templates_are_used() -> None:
    made = Templates(
        choose="all", templates=(template("A"), template("", name="b"), template("C {{ text }}", name="c"))
    )
    records = made.records(ROW, "f:1", [], 0)
    assert [texts(record) for record in records] == [["A", "1"], ["C Good.", "1"]]


def test_exemplars_come_before_the_question() -> None:
    made = Templates(templates=(template(),), exemplars=2, separator="\n--\n", answer_separator=" A: ")
    pool = [{"text": "x", "label": 5}, {"text": "y", "label": 6}]
    (record,) = made.records(ROW, "f:1", pool, 0)
    solved = {"Q: x A: 5\n--\n", "Q: y A: 6\n--\n"}
    assert texts(record)[0] in {a + b + "Q: Good." for a in solved for b in solved - {a}}
    assert texts(record)[1] == "1"


def test_exemplars_follow_from_seed_and_origin_and_are_never_the_question() -> None:
    made, pool = Templates(templates=(template(),), exemplars=3, separator="|"), numbered(20)

    def drawn(i: int, seed: int = 0) -> list[str]:
        (record,) = made.records(pool[i], f"f:{i}", pool, seed)
        *solved, question = texts(record)[0].split("|")
        assert question == f"Q: text {i}"
        return solved

    every = [drawn(i) for i in range(20)]
    assert every == [drawn(i) for i in range(20)]
    assert every != [drawn(i, seed=1) for i in range(20)]
    for i, solved in enumerate(every):
        assert len({*solved}) == 3 and f"Q: text {i}\n{i}" not in solved
    # 60 draws of 20: all but a few are seen, none very often.
    seen = Counter(example for solved in every for example in solved)
    assert len(seen) > 15 and max(seen.values()) < 10


def test_a_repeated_row_is_one_exemplar() -> None:
    made = Templates(templates=(template(),), exemplars=2, separator="|")
    pool = [{"text": "x", "label": 5}] * 5 + [{"text": "y", "label": 6}]
    for i in range(10):
        (record,) = made.records(ROW, f"f:{i}", pool, 0)
        assert {*texts(record)[0].split("|")[:2]} == {"Q: x\n5", "Q: y\n6"}


def test_exemplars_come_from_rows_that_the_template_takes() -> None:
    made = Templates(templates=(template("{% if label < 5 %}{{ text }}{% endif %}"),), exemplars=2)
    pool = [*numbered(7), {"text": "no label"}, {"text": "text 3", "label": 9}]
    for i in (0, 1, 2):
        (record,) = made.records(pool[i], f"f:{i}", pool, 0)
        assert set(texts(record)[0].split("\n")[::3][:-1]) <= {f"text {k}" for k in range(5)} - {f"text {i}"}
    with pytest.raises(
        UserError, match=r"'a' wants 2 solved examples before each question; the first 2 rows have 1 bes"
    ):
        made.records(pool[0], "f:1", pool[:2], 0)


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        (
            "{{ txt }}",
            "the prompt of data template 'a' uses a field that is not there: 'txt' is undefined; there is text",
        ),
        (
            '{{ row["x"] }}',
            "the prompt of data template 'a' uses a field that is not there: 'dict object' has no attri",
        ),
        ("{{ ['no'][label] }}", "the prompt of data template 'a' uses a field that is not there: "),
        ("{{ text + 1 }}", "the prompt of data template 'a' cannot be made: TypeError"),
        ("{{ text.__class__.__mro__ }}", "the prompt of data template 'a' cannot be made: SecurityError"),
        ("{{ row.update({'text': 1}) }}", "the prompt of data template 'a' cannot be made: SecurityError"),
    ],
)
def test_a_row_that_does_not_fill_a_template_is_bad(prompt: str, reason: str) -> None:
    with pytest.raises(BadRow) as error:
        Templates(templates=(template(prompt),)).records(ROW, "f:1", [], 0)
    assert str(error.value).startswith(reason)


def test_check_finds_a_field_that_the_first_row_lacks() -> None:
    made = Templates(templates=(template(), template(response="{{ lable }}", name="b")))
    with pytest.raises(
        UserError, match=r"the response of data template 'b' uses 'lable'; the rows have text, label, Be"
    ):
        made.check(ROW)
    # Loops, their own variables, functions, the row itself, and what is asked about before it is used.
    loop = "{% set n = 2 %}{% for i in range(n) %}{{ i }}{% endfor %}{{ row }}"
    Templates(templates=(template(loop, "{% if title is defined %}{{ title }}{% endif %}"),)).check(ROW)


def test_load(write: Callable[[str], Path]) -> None:
    file = write(
        "choose: all\nexemplars: 2\nseparator: ' | '\nanswer_separator: ' '\n"
        "templates:\n- {name: a, prompt: 'x', response: 'y', weight: 1}\n"
        "- {name: b, prompt: 'x', response: 'y', system: 's'}\n"
    )
    one, two = (
        Template(name="a", prompt="x", response="y", weight=1),
        Template(name="b", prompt="x", response="y", system="s"),
    )
    assert load(file) == Templates(
        choose="all", exemplars=2, separator=" | ", answer_separator=" ", templates=(one, two)
    )


ONE = "templates:\n- {name: a, prompt: x, response: y}\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a", "not a mapping of names to values"),
        ("a: [", "not a YAML file"),
        ("", "not a mapping"),
        ("choose: one", "no 'templates'"),
        ("templates: []", "no templates in it"),
        ("templates: x", "templates is 'x'; it must be a list"),
        ("templates: [x]", "template 1: not a mapping"),
        ("templates: [{name: a, prompt: x}]", "template 1: no 'response'"),
        (
            "templates: [{name: a, prompt: x, response: y, wieght: 1}]",
            "template 1: unknown key 'wieght'; known are name",
        ),
        ("templates: [{name: a, prompt: 3, response: y}]", "template 1: prompt is 3; it must be a text"),
        (ONE + "- {name: a, prompt: x, response: y}", "two templates are called 'a'"),
        (ONE + "choose: two", "choose is 'two'; it is one or all"),
        (ONE + "exemplars: -1", "exemplars is -1; it is 0 or more"),
        (ONE + "exemplars: true", "exemplars is True; it must be a whole number"),
        (
            "templates: [{name: a, prompt: x, response: y, weight: 0}]",
            "template 'a': weight is 0; it must be more than 0",
        ),
        (
            "templates: [{name: a, prompt: x, response: y, weight: 2}]\nchoose: all",
            "template 'a': weight is for choose: one",
        ),
        (
            "templates: [{name: a, prompt: x, response: '{{ y '}]",
            "template 'a': its response is not Jinja: unexpected end of template",
        ),
    ],
)
def test_what_is_wrong_with_a_file(write: Callable[[str], Path], content: str, message: str) -> None:
    file = write(content)
    with pytest.raises(UserError) as error:
        load(file)
    assert str(error.value).startswith(f"{file}: ") and message in str(error.value)


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(
        UserError, match=r"data.templates=sentimental: no such file, and the shipped ones are sentiment, se"
    ):
        load("sentimental")


@pytest.mark.parametrize("name", [path.stem for path in sorted((CONF / "data_templates").glob("*.yaml"))])
def test_shipped_templates(name: str) -> None:
    made = load(name)
    rows = [{"text": f"Film {i}.<br />It was so.", "label": i % 2, "id": "x"} for i in range(40)]
    made.check(rows[0])
    used = set()
    for i, row in enumerate(rows):
        (record,) = made.records(row, f"f:{i}", rows, 0)
        asked, answer = texts(record)
        assert "<br" not in asked + answer and asked.count("\n\n###\n\n") == made.exemplars
        used.add(asked.replace(f"Film {i}.", ""))
    assert len(used) >= len(made.templates)
    assert made.records({"text": "Film.", "label": -1}, "f:0", rows, 0) == []
