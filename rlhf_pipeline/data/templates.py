"""Words rows as tasks: one data set through several Jinja templates, as T0 and FLAN did it.

A file of templates (conf/data_templates, docs/data-formats.md) says how a row's fields become a prompt and a response,
with or without solved examples before the question. All choices follow from the seed and the row's origin, so that
they do not depend on the order of reading or the number of processes.

Sanh et al. 2021 (T0, arXiv 2110.08207) and Wei et al. 2021 (FLAN, arXiv 2109.01652).
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlhf_pipeline.config import config_dir
from rlhf_pipeline.data.records import BadRow, Demonstration, Message
from rlhf_pipeline.errors import UserError

if TYPE_CHECKING:
    from jinja2 import Environment
    from jinja2 import Template as Compiled

POOL_SIZE = 256  # rows from the start of a source that solved examples are drawn from
FOLDER = "data_templates"

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """One wording. `prompt`, `response` and `system` are Jinja texts over the fields of a row.

    A field whose name is no Jinja name is `row["Best Answer"]`. Space around what comes out is stripped.
    """

    name: str
    prompt: str
    response: str
    system: str = ""
    weight: float = 1.0  # its share where one template is chosen for a row


@dataclass(frozen=True, slots=True, kw_only=True)
class Templates:
    """The wordings of a data set. `records` makes the demonstrations of a row."""

    templates: tuple[Template, ...]
    choose: Literal["one", "all"] = "one"  # one template for a row, or each row by all of them
    exemplars: int = 0  # solved examples before the question
    separator: str = "\n\n"  # after each of them
    answer_separator: str = "\n"  # between its question and its answer

    def records(self, row: Row, origin: str, pool: Sequence[Row], seed: int) -> list[Demonstration]:
        """The demonstrations of a row: none where the chosen template leaves it out, by an empty prompt or response.

        `pool` holds rows of the same source for the solved examples, the row itself among them or not.
        BadRow for a row that a template cannot be filled from; UserError if the pool is too small.
        """
        made = []
        for template in self._chosen(origin, seed):
            filled = _fill(template, row)
            if filled is None:
                continue
            draws = _random(seed, origin, template.name)
            solved = "".join(
                f"{asked}{self.answer_separator}{answer}{self.separator}"
                for asked, answer in self._exemplars(template, filled[0], pool, draws)
            )
            asked, answer = filled
            messages = (Message("user", solved + asked), Message("assistant", answer))
            system = _render(template, "system", row) if template.system else ""
            made.append(Demonstration((Message("system", system), *messages) if system else messages))
        return made

    def check(self, row: Row) -> None:
        """UserError if a template names a field that this row, the first of a source, does not have."""
        for template in self.templates:
            for field in ("system", "prompt", "response"):
                missing = sorted(_names(getattr(template, field)) - {*row, "row"})
                if missing:
                    raise UserError(
                        f"the {field} of data template {template.name!r} uses {missing[0]!r}; "
                        f"the rows have {', '.join(row)}"
                    )

    def _chosen(self, origin: str, seed: int) -> Sequence[Template]:
        if self.choose == "all":
            return self.templates
        weights = [template.weight for template in self.templates]
        place = _random(seed, origin).random() * math.fsum(weights)
        for template, weight in zip(self.templates, weights, strict=True):
            place -= weight
            if place < 0:
                return (template,)
        return self.templates[-1:]

    def _exemplars(
        self, template: Template, asked: str, pool: Sequence[Row], draws: random.Random
    ) -> list[tuple[str, str]]:
        """Questions with their answers, by the same template; never the question that is asked."""
        found: list[tuple[str, str]] = []
        for row in _shuffled(pool, draws):
            if len(found) == self.exemplars:
                break
            try:
                filled = _fill(template, row)
            except BadRow:
                continue  # reported when its own turn comes
            if filled is not None and filled[0] not in (asked, *(question for question, _ in found)):
                found.append(filled)
        if len(found) < self.exemplars:
            raise UserError(
                f"data template {template.name!r} wants {self.exemplars} solved examples before each question; "
                f"the first {len(pool)} rows have {len(found)} besides the row itself"
            )
        return found


def load(name_or_path: str | Path) -> Templates:
    """The templates of a YAML file, or of a name under conf/data_templates. UserError for whatever is wrong with it."""
    import yaml

    shipped = config_dir() / FOLDER
    places = (Path(name_or_path).expanduser(), shipped / f"{name_or_path}.yaml")
    try:
        file = next((place for place in places if place.is_file()), None)
    except OSError as error:  # a name too long
        raise UserError(f"data.templates={str(name_or_path)[:200]}: cannot be read: {error.strerror}") from None
    if file is None:
        known = ", ".join(sorted(path.stem for path in shipped.glob("*.yaml")))
        raise UserError(f"data.templates={name_or_path}: no such file, and the shipped ones are {known}")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that is none, and no UTF-8
        raise UserError(f"{file}: not a YAML file: {error}") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    made = _object(Templates, content, str(file))
    if made.choose not in ("one", "all"):
        raise UserError(f"{file}: choose is {made.choose!r}; it is one or all")
    if made.exemplars < 0:
        raise UserError(f"{file}: exemplars is {made.exemplars}; it is 0 or more")
    if not made.templates:
        raise UserError(f"{file}: no templates in it")
    templates = tuple(
        _object(Template, item, f"{file}: template {number}") for number, item in enumerate(made.templates, start=1)
    )
    for template in templates:
        _check(template, made.choose, str(file))
    names = [template.name for template in templates]
    if len({*names}) < len(names):
        raise UserError(f"{file}: two templates are called {max(names, key=names.count)!r}")
    return dataclasses.replace(made, templates=templates)


def _object(kind: type[Any], content: Any, where: str) -> Any:
    """A dataclass of a YAML mapping, with its names and the types of its values checked."""
    if not isinstance(content, dict):
        raise UserError(f"{where}: not a mapping of names to values")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name, value in content.items():
        if name not in fields:
            raise UserError(f"{where}: unknown key {name!r}; known are {', '.join(fields)}")
        default = fields[name].default
        expected = (list if name == "templates" else str) if default is dataclasses.MISSING else type(default)
        fits = isinstance(value, (int, float) if expected is float else expected) and not isinstance(value, bool)
        if not fits:
            raise UserError(f"{where}: {name} is {value!r}; it must be {_WORDS[expected]}")
    for name, field in fields.items():
        if field.default is dataclasses.MISSING and name not in content:
            raise UserError(f"{where}: no {name!r}")
    return kind(**content)


_WORDS: dict[type, str] = {list: "a list", str: "a text", int: "a whole number", float: "a number"}


def _check(template: Template, choose: str, where: str) -> None:
    from jinja2 import TemplateSyntaxError

    where = f"{where}: template {template.name!r}"
    if not (math.isfinite(template.weight) and template.weight > 0):
        raise UserError(f"{where}: weight is {template.weight}; it must be more than 0")
    if choose == "all" and template.weight != 1:
        raise UserError(f"{where}: weight is for choose: one; with choose: all every template is used")
    for field in ("system", "prompt", "response"):
        try:
            _compiled(getattr(template, field))
        except TemplateSyntaxError as error:
            raise UserError(f"{where}: its {field} is not Jinja: {error.message} (line {error.lineno})") from None


# Rendering


@cache
def _environment() -> Environment:
    """Templates come with other people's data sets: they see the row and nothing else, and cannot change it."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    return ImmutableSandboxedEnvironment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


@cache
def _compiled(text: str) -> Compiled:
    return _environment().from_string(text)


@cache
def _names(text: str) -> frozenset[str]:
    """The variables that a template needs: all of them but those it asks about with `is defined`."""
    from jinja2 import meta, nodes

    tree = _environment().parse(text)
    asked = {
        test.node.name
        for test in tree.find_all(nodes.Test)
        if test.name in ("defined", "undefined") and isinstance(test.node, nodes.Name)
    }
    return frozenset(meta.find_undeclared_variables(tree) - asked - {*_environment().globals})


def _fill(template: Template, row: Row) -> tuple[str, str] | None:
    """The question and its answer; None where one of them comes out empty."""
    asked, answer = _render(template, "prompt", row), _render(template, "response", row)
    return (asked, answer) if asked and answer else None


def _render(template: Template, field: str, row: Row) -> str:
    from jinja2 import UndefinedError

    try:
        return _compiled(getattr(template, field)).render({"row": row, **row}).strip()
    except UndefinedError as error:
        reason = f"the {field} of data template {template.name!r} uses a field that is not there"
        raise BadRow(reason, f"{error.message}; there is {', '.join(row)}") from None
    except Exception as error:  # whatever an expression of the template does with an unexpected value
        reason = f"the {field} of data template {template.name!r} cannot be made"
        raise BadRow(reason, f"{type(error).__name__}: {error}") from None


# Choices


def _random(*identity: Any) -> random.Random:
    """A stream of its own for everything that is chosen; only `random()` of it is used, which Python keeps stable."""
    digest = hashlib.blake2b("\0".join(map(str, identity)).encode(), digest_size=8).digest()
    return random.Random(int.from_bytes(digest, "little"))


def _shuffled(pool: Sequence[Row], draws: random.Random) -> Iterator[Row]:
    """The pool in an order of chance (Fisher and Yates), only as far as it is asked for."""
    order = list(range(len(pool)))
    for at in range(len(order)):
        pick = at + int(draws.random() * (len(order) - at))
        order[at], order[pick] = order[pick], order[at]
        yield pool[order[at]]
