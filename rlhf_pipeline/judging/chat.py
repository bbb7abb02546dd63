"""A chat model as a judge, behind any server that speaks OpenAI's chat completions.

One request a pair and order; the verdict is the last line of the answer, and whatever else stands there is malformed.
Answers are kept on disk (`cache`), so that nothing is asked twice. How long a server is tried is `servers`' business.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_pipeline import servers
from rlhf_pipeline.config.judge import ChatJudgeConfig
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.generation.progress import Meter
from rlhf_pipeline.judging import template
from rlhf_pipeline.judging.cache import Cache, Said
from rlhf_pipeline.judging.pairs import Outcome, Pair, Verdict
from rlhf_pipeline.judging.template import JudgeTemplate
from rlhf_pipeline.tracking.redaction import MASK, redact_text

if TYPE_CHECKING:
    import httpx

SHOWN = 200  # characters of an answer without a verdict
NAMED = 20  # models of a server that are named
MODEL_UNKNOWN = (400, 404, 422)  # what servers answer for a model that they do not have
KEY_REFUSED = (401, 403)
NOT_FOUND = 404
CUT = "length"  # finish_reason of an answer that did not come to its end
# A model may set the line, or its letter, in bold; that is the same verdict.
_VERDICT = re.compile(r"[*_]*verdict[*_]*\s*:\s*[*_]*\s*(a|b|tie)[*_]*\.?[*_]*", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatJudge:
    name: str
    config: ChatJudgeConfig
    template: JudgeTemplate
    secret: str  # the key; empty where there is none
    tell: Callable[[str], None]

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "kind": "chat",
            "model": self.config.model,
            "template": self.template.name,
            "template_hash": self.template.digest,
            "temperature": self.config.temperature,
            "max_tokens": self.config.max_tokens,
            "seed": self.config.seed,
        }

    def __call__(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """
        Raises:
            UserError: when the server cannot be had or refuses a request; answers that came before stay on the disk.
        """
        bodies = [self._body(pair) for pair in pairs]
        keys = [hashlib.sha256(body).hexdigest() for body in bodies]
        cache = Cache(self.file)
        missing = {key: (body, pair) for key, body, pair in zip(keys, bodies, pairs, strict=True) if key not in cache}
        known = len({*keys}) - len(missing)
        self.tell(f"{self.name}: {len(missing)} requests to {self.shown_url}, {known} answers are in {self.file}")
        if missing:
            self._ask_all(missing, cache)
        return [verdict(cache[key], self.config.max_tokens) for key in keys]

    @property
    def file(self) -> Path:
        """Where the answers are kept: the same for the same model, template and settings, wherever the server is."""
        told = json.dumps(self.identity, sort_keys=True)
        plain = re.sub(r"[^A-Za-z0-9.]+", "-", str(self.config.model)).strip("-.")[-60:]
        return Path(self.config.cache_dir) / f"{plain}-{hashlib.sha256(told.encode()).hexdigest()[:12]}.jsonl"

    @property
    def shown_url(self) -> str:
        return redact_text(str(self.config.url))

    def _body(self, pair: Pair) -> bytes:
        """The request, which is also what its answer is kept under: the server's address is no part of it."""
        body: dict[str, Any] = {
            "model": self.config.model,
            "messages": self.template.messages(pair),
            "temperature": self.config.temperature,
            "max_tokens": self.config.max_tokens,
        }
        if self.config.seed is not None:
            body["seed"] = self.config.seed
        return json.dumps(body, sort_keys=True).encode()

    def _ask_all(self, missing: Mapping[str, tuple[bytes, Pair]], cache: Cache) -> None:
        """Get every answer that is missing, and keep it."""
        import httpx

        config = self.config
        headers = {"Authorization": f"Bearer {self.secret}"} if self.secret else {}
        pace = servers.Pace(seconds=60 / config.requests_per_minute) if config.requests_per_minute else None
        meter, lock = Meter(len(missing), shown=True), threading.Lock()

        def ask(client: httpx.Client, one: tuple[str, tuple[bytes, Pair]], stop: threading.Event) -> int:
            key, (body, pair) = one
            said, tokens, repeated = self._ask(client, body, pair, pace, stop)
            cache.add(key, said)
            with lock:
                meter.answers += 1
                meter.tick(tokens)
            return repeated

        try:
            with httpx.Client(timeout=config.timeout, headers=headers) as client:
                repeated = servers.in_threads(partial(ask, client), list(missing.items()), at_once=config.concurrency)
        except UserError as error:
            raise UserError(self._hidden(str(error))) from None  # its cause may show the key
        if sum(repeated):
            self.tell(f"{self.name}: {sum(repeated)} requests had to be repeated")

    def _ask(
        self, client: httpx.Client, body: bytes, pair: Pair, pace: servers.Pace | None, stop: threading.Event
    ) -> tuple[Said, int, int]:
        """What the model says of a pair, its tokens, and how often it was asked again."""
        url = f"{str(self.config.url).rstrip('/')}/chat/completions"
        patience = servers.Patience(timeout=self.config.timeout, retries=self.config.retries)
        try:
            answer, repeated = servers.post(client, url, body, patience=patience, stop=stop, pace=pace)
            if not answer.is_success:
                raise servers.failure(url, f"{servers.told(answer)}; {self._advice(client, answer, pair)}")
            said, tokens = _said(url, answer)
        except UserError as error:
            raise UserError(f"judge.chat.{error}") from error
        return Said(text=self._hidden(said.text), finish_reason=said.finish_reason), tokens, repeated

    def _advice(self, client: httpx.Client, answer: httpx.Response, pair: Pair) -> str:
        """What to do about an answer that is no success."""
        variable = self.config.api_key_env
        if answer.status_code in KEY_REFUSED and self.secret:
            return f"it does not take the key in the environment variable {variable} (judge.chat.api_key_env)"
        if answer.status_code in KEY_REFUSED:
            return f"it wants a key: put it into the environment variable {variable} (judge.chat.api_key_env)"
        models = _models(client, str(self.config.url)) if answer.status_code in MODEL_UNKNOWN else None
        if models and self.config.model not in models:
            more = f" and {len(models) - NAMED} more" if models[NAMED:] else ""
            return f"it has no model {self.config.model!r}; judge.chat.model may be {', '.join(models[:NAMED])}{more}"
        if answer.status_code == NOT_FOUND and not models:
            return (
                f"does it call its model {self.config.model!r} (judge.chat.model), and does judge.chat.url end where the "
                "paths of the API begin, as in /v1?"
            )
        asked = f" about {pair.origin}" if pair.origin else ""
        return f"that was the request{asked}; see judge.chat and the server's log"

    def _hidden(self, text: str) -> str:
        """Without the key, which a server may have repeated."""
        return text.replace(self.secret, MASK) if self.secret else text


def open_chat_judge(config: ChatJudgeConfig, *, name: str, tell: Callable[[str], None]) -> ChatJudge:
    """
    Raises:
        UserError: for an address that is none, a template that does not work, and a key that cannot be sent.
    """
    if why := servers.complaint(str(config.url)):
        raise UserError(f"judge.chat.{why}")
    secret = os.environ.get(config.api_key_env, "").strip()
    if not secret.isascii() or any(not one.isprintable() or one == " " for one in secret):
        raise UserError(
            f"the environment variable {config.api_key_env} holds no key: there are spaces or odd letters in it"
        )
    return ChatJudge(name=name, config=config, template=template.load(config.template), secret=secret, tell=tell)


def verdict(said: Said, max_tokens: int) -> Verdict:
    """What the last line says, as in `Verdict: A`; nothing is guessed where it says something else."""
    *before, last = said.text.strip().split("\n")
    found = _VERDICT.fullmatch(last.strip())
    if said.finish_reason == CUT:
        return Verdict(outcome=Outcome.malformed, reason=f"cut off at max_tokens={max_tokens}: {_shown(said.text)}")
    if found is None:
        return Verdict(outcome=Outcome.malformed, reason=f"no verdict in its last line: {_shown(said.text)}")
    return Verdict(outcome=Outcome(found[1].lower()), reason="\n".join(before).strip())


def _shown(text: str) -> str:
    return repr(text[:SHOWN]) + ("..." if text[SHOWN:] else "")


def _said(url: str, answer: httpx.Response) -> tuple[Said, int]:
    """The text of a completion and its tokens.

    Raises:
        UserError: for what is no completion.
    """
    try:
        content = answer.json()
    except (ValueError, RecursionError):
        raise servers.failure(
            url, f"its answer is not JSON: {servers.start(answer)}; is it an OpenAI-compatible server?"
        ) from None
    try:
        (choice, *_) = content["choices"]
        text, reason = choice["message"].get("content"), choice.get("finish_reason")
    except (TypeError, KeyError, ValueError, AttributeError):
        text = reason = -1  # neither a text nor nothing
    if not isinstance(text, str | None) or not isinstance(reason, str | None):
        raise servers.failure(url, f"its answer is no chat completion: {servers.start(answer)}")
    usage = content.get("usage")
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return Said(text=text or "", finish_reason=reason), tokens if isinstance(tokens, int) else 0


def _models(client: httpx.Client, url: str) -> list[str] | None:
    """What the server says that it has; None where it does not say."""
    import httpx

    try:
        answer = client.get(f"{url.rstrip('/')}/models")
        return [str(one["id"]) for one in answer.json()["data"]] if answer.is_success else None
    except (httpx.HTTPError, ValueError, TypeError, KeyError):
        return None
