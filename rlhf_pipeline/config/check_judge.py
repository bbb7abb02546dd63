"""What a judge must satisfy beyond its types. What another kind of judge needs is not looked at."""

from __future__ import annotations

import os
from collections.abc import Iterator
from urllib.parse import urlsplit

from rlhf_pipeline.config.judge import ChatJudgeConfig, JudgeConfig, JudgeKind
from rlhf_pipeline.config.values import positive
from rlhf_pipeline.tracking.redaction import redact_text


def check_judge(key: str, config: JudgeConfig) -> Iterator[str]:
    """Every problem of the section at `key`, as "judge" or "judges.gpt"."""
    name = config.name
    if name is not None and (not name or "/" in name or os.sep in name or name.startswith(".")):
        yield f"{key}.name={name!r}: must be a folder's name, without a slash and not starting with a dot"
    match config.kind:
        case JudgeKind.gold:
            yield from _tie(key, config)
        case JudgeKind.reward_model:
            yield from _tie(key, config)
            if config.model.path is None:
                yield f"{key}.model.path: has no value; name a reward model"
            if config.max_length < 2:
                yield f"{key}.max_length={config.max_length}: a prompt token and a response token need 2"
            yield from positive(f"{key}.batch_tokens", config.batch_tokens)
        case JudgeKind.chat:
            yield from _chat(f"{key}.chat", config.chat)
        case JudgeKind.recorded:
            if not config.path:
                yield f"{key}.path: has no value; name a file of verdicts (.jsonl or .csv)"


def _tie(key: str, config: JudgeConfig) -> Iterator[str]:
    if config.tie < 0:
        yield f"{key}.tie={config.tie}: must not be negative"


def _chat(key: str, chat: ChatJudgeConfig) -> Iterator[str]:
    if not chat.url:
        yield f"{key}.url: has no value; name a server, as in {key}.url=http://127.0.0.1:8000/v1"
    elif wrong := _address(chat.url):
        yield f"{key}.url={redact_text(chat.url)}: {wrong}"
    if not chat.model:
        yield f"{key}.model: has no value; name the model as the server calls it"
    if not chat.template:
        yield f"{key}.template: has no value; {key}.template=pairwise is the one that is shipped"
    for name in ("max_tokens", "timeout", "concurrency"):
        yield from positive(f"{key}.{name}", getattr(chat, name))
    if chat.requests_per_minute is not None:
        yield from positive(f"{key}.requests_per_minute", chat.requests_per_minute)
    for name in ("temperature", "retries"):
        if getattr(chat, name) < 0:
            yield f"{key}.{name}={getattr(chat, name)}: must not be negative"
    if not chat.cache_dir:
        yield f"{key}.cache_dir: must name a folder"


def _address(url: str) -> str:
    """What is wrong with a server's address; empty where nothing is."""
    try:
        parts = urlsplit(url)
    except ValueError as error:
        return f"is no address: {error}"
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return "must be http://host:port/v1, or https"
    if parts.query or parts.fragment or parts.path.rstrip("/").endswith("/chat/completions"):
        return "must end where the paths of the API begin, as in http://host:port/v1"
    return ""
