"""What a chat model has said, on disk: each answer is a line of a file from the moment it is there.

A file belongs to one judge and may be read by people. Any process may be killed at any time: a line that was torn is
skipped, and its request asked again.
"""

from __future__ import annotations

import json
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

from rlhf_pipeline.files import disk_errors


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """An answer to a request."""

    text: str
    finish_reason: str | None  # as the server says; "length": it was cut off


class Cache:
    """Answers by the hash of their request. Several threads may use it, and several processes its file."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._lock = threading.Lock()
        self._known: dict[str, Said] = {}
        content = file.read_bytes() if file.is_file() else b""
        for line in content.split(b"\n"):
            try:
                key, said = _read(line)
            except (ValueError, KeyError, TypeError):
                continue  # blank, or torn by a process that was killed
            self._known[key] = said
        self._is_torn = bool(content) and not content.endswith(b"\n")

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __getitem__(self, key: str) -> Said:
        return self._known[key]

    def add(self, key: str, said: Said) -> None:
        """Keep an answer.

        Raises:
            UserError: when the disk is full.
        """
        line = json.dumps({"key": key, **asdict(said)}).encode() + b"\n"
        with self._lock, disk_errors("an answer of the judge", self.file, kept="The answers before it are kept."):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("ab") as sink:
                sink.write(b"\n" + line if self._is_torn else line)
            self._is_torn = False
            self._known[key] = said


def _read(line: bytes) -> tuple[str, Said]:
    value = json.loads(line)
    key, text, finish_reason = value["key"], value["text"], value["finish_reason"]
    if not isinstance(key, str) or not isinstance(text, str) or not isinstance(finish_reason, str | None):
        raise TypeError("not a line of ours")
    return key, Said(text=text, finish_reason=finish_reason)
