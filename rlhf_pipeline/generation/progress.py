"""How far sampling is, on stderr: one changing line on a terminal, a plain line every ten seconds elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO

TERMINAL_EVERY, PLAIN_EVERY = 0.2, 10.0  # seconds


class Meter:
    """Counts answers and tokens."""

    def __init__(self, total: int, *, shown: bool, stream: TextIO | None = None) -> None:
        self.total, self.shown, self.stream = total, shown, stream or sys.stderr
        self.answers = self.tokens = 0
        self.terminal = self.stream.isatty()
        self.start = self.last = time.monotonic()

    def tick(self, tokens: int) -> None:
        """Told at every step how many tokens were drawn."""
        self.tokens += tokens
        now = time.monotonic()
        if self.shown and now - self.last >= (TERMINAL_EVERY if self.terminal else PLAIN_EVERY):
            self.last = now
            self._write(f"{self.answers}/{self.total} answers, {self.tokens / (now - self.start):,.0f} tokens/s")

    def message(self, text: str) -> None:
        """A line that stays."""
        if self.shown:
            self.stream.write(("\r\x1b[K" if self.terminal else "") + f"{text}\n")
            self.stream.flush()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def _write(self, text: str) -> None:
        self.stream.write(f"\r\x1b[K{text}" if self.terminal else f"{text}\n")
        self.stream.flush()
