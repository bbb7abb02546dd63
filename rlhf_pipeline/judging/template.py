"""How a chat model is asked about a pair: a Jinja template that yields the whole message, and perhaps a system message.

A template is given `prompt` (messages with `role` and `content`), `a` and `b` (each with `text` and `finished`), and sees
nothing else. What it sets at its top level as `system` is sent as the system message.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_pipeline.config import config_dir
from rlhf_pipeline.data.records import Message
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.judging.pairs import Answer, Pair

if TYPE_CHECKING:
    from jinja2 import Template

FOLDER = "judge_templates"
_TRIAL = Pair(
    prompt=(Message("user", "the question of the trial"),),
    a=Answer(text="the first answer of the trial"),
    b=Answer(text="the second answer of the trial"),
)


@dataclass(frozen=True, kw_only=True)
class JudgeTemplate:
    name: str  # as in the config
    source: str

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.source.encode()).hexdigest()

    def messages(self, pair: Pair) -> list[dict[str, str]]:
        """What the model is sent about a pair.

        Raises:
            UserError: for a template that cannot be filled.
        """
        values: dict[str, Any] = {
            "prompt": [{"role": message.role, "content": message.content} for message in pair.prompt],
            "a": {"text": pair.a.text, "finished": pair.a.finished},
            "b": {"text": pair.b.text, "finished": pair.b.finished},
        }
        compiled = self._compiled
        try:
            module = compiled.make_module(values)
            asked, system = str(module).strip(), str(getattr(module, "system", "")).strip()
        except Exception as error:  # whatever an expression of the template does with an unexpected value
            where = f" for {pair.origin}" if pair.origin else ""
            raise _wrong(self.name, f"cannot be filled{where}: {type(error).__name__}: {error}") from None
        first = [{"role": "system", "content": system}] if system else []
        return [*first, {"role": "user", "content": asked}]

    @cached_property
    def _compiled(self) -> Template:
        from jinja2 import StrictUndefined, TemplateSyntaxError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        try:
            return environment.from_string(self.source)
        except TemplateSyntaxError as error:
            raise _wrong(self.name, f"is not Jinja: {error.message} (line {error.lineno})") from None


def load(name_or_path: str) -> JudgeTemplate:
    """A Jinja file, or a name under conf/judge_templates.

    Raises:
        UserError: for one that is not there, cannot be filled, or does not show the question and both answers.
    """
    shipped = config_dir() / FOLDER
    places = (Path(name_or_path).expanduser(), shipped / f"{name_or_path}.jinja")
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        known = ", ".join(sorted(path.stem for path in shipped.glob("*.jinja")))
        raise _wrong(name_or_path, f"no such file, and the shipped ones are {known}")
    try:
        template = JudgeTemplate(name=name_or_path, source=file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise _wrong(name_or_path, f"cannot be read: {error}") from None
    shown = template.messages(_TRIAL)[-1]["content"]
    for what, text in (
        ("prompt", _TRIAL.prompt[0].content),
        ("a.text", _TRIAL.a.text),
        ("b.text", _TRIAL.b.text),
    ):
        if text not in shown:
            raise _wrong(name_or_path, f"does not show {what}; it has prompt (messages), a.text and b.text")
    return template


def _wrong(name: str, what: str) -> UserError:
    return UserError(f"judge.chat.template={name}: {what}")
