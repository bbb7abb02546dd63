"""Stands in for the renderer where there is no tokenizer yet: characters in place of tokens, no template.

`rlhf prep` checks rows with it and counts how long they are; nothing is trained on what it makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np

from rlhf_pipeline.data.prompts import Segment
from rlhf_pipeline.data.records import Message

START, END = 2, 3  # around a document, as a tokenizer's start and end token are


class PlainText:
    """What `encode` asks of `prompts.Renderer`, with the characters of the messages as tokens (their code points)."""

    tokenizer_hash = "characters"
    template_hash = "none"
    tokenizer = SimpleNamespace(bos_token_id=None)
    document_start_id = START
    eos_id = END

    def segments(self, messages: Sequence[Message]) -> list[Segment]:
        return [
            Segment(text=message.content, scored=message.role == "assistant" and message.scored, first=number == 0)
            for number, message in enumerate(messages)
        ]

    def branches(
        self, prompt: Sequence[Message], responses: Sequence[str]
    ) -> tuple[list[Segment], list[list[Segment]]]:
        context = [
            Segment(text=message.content, scored=False, first=number == 0) for number, message in enumerate(prompt)
        ]
        return context, [[Segment(text=response, scored=True, first=False)] for response in responses]

    def document(self, text: str) -> Segment:
        return Segment(text=text, scored=True, first=True)

    def tokenize(self, segments: Sequence[Segment]) -> list[np.ndarray]:
        """Code points, int32, of each segment."""
        return [np.frombuffer(segment.text.encode("utf-32-le"), np.int32) for segment in segments]
