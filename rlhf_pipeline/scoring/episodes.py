"""What is scored: a prompt and what a policy said to it. Free of torch, for programs of one's own to import."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_pipeline.data.records import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """A response to be scored. Its text is whatever the policy drew, without its end token: it may be empty."""

    prompt: tuple[Message, ...]  # each with .role and .content
    response: str
    finished: bool  # it came to its end, and was not cut off
    columns: Mapping[str, Any]  # of the prompt's row, but the prompt: a reference answer, say
    origin: str  # of the prompt, for messages
