"""The corpus of bad input: cases are rows of tables, and every one is held to the same rules.

One message that says what is wrong and where (and in words, not as a traceback), exit code 2 for what the user can put
right and 1 for a failure, and nothing half-made left behind.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers_runs import Forks, forks, make_base

from rlhf_pipeline.errors import UserError

LONGEST = 3000  # characters of a message
UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
HALF_MADE = re.compile(r"\.(partial|tmp|old)(-\d+)?$")  # what we write under before it has its name


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Fail instead of waiting: for pipes that nobody writes to."""

    def give_up(*_: Any) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def check_message(message: str, words: Sequence[str]) -> None:
    """A message for people, which has these words in this order."""
    assert 0 < len(message) < LONGEST, message
    assert "Traceback" not in message and not UNSEEN.search(message), message
    message.encode(errors="backslashreplace")
    at = 0
    for word in words:
        found = message.find(word, at)
        assert found >= 0, f"{word!r} is not in (or not behind the words before it in)\n{message}"
        at = found + len(word)


@pytest.fixture
def refused() -> Callable[..., str]:
    """refused(call, *words): it raises a UserError in short time, which has the words in this order; its message."""

    def check(call: Callable[[], object], *words: str) -> str:
        with at_most(20), pytest.raises(UserError) as caught:
            call()
        check_message(str(caught.value), words)
        return str(caught.value)

    return check


@pytest.fixture(scope="session")
def rlhf() -> Forks:
    """The command line, without the wait for imports."""
    return forks()


@pytest.fixture
def command(rlhf: Forks, tmp_path: Path) -> Callable[..., str]:
    """command(code, words, "sft", ...): it ends with the code and one message, and leaves nothing half-made."""

    def run(code: int, words: Sequence[str], *arguments: str, ranks: int = 1, **environment: str) -> str:
        before = contents(tmp_path)
        output = rlhf.run(tmp_path, *arguments, ranks=ranks, code=code, **environment).output
        told = "\n".join(line for line in output.splitlines() if not is_noise(line))
        check_message(told, words)
        after = contents(tmp_path)
        assert not [name for name in after if HALF_MADE.search(name)], after.keys()
        made = {name for name in after if before.get(name) != after[name]}
        # Locks, the files of a run that has been opened, and caches stay.
        left = {n for n in made if not re.search(r"(^logs/|\.lock$|/run\.json$|/config\.yaml$|cache/)", n)}
        assert not left, left
        return told

    return run


def is_noise(line: str) -> bool:
    """What libraries say on standard error whatever happens."""
    return bool(re.search(r"accelerator|^\[W|^\[rank\d+\]:\[W|socket\.cpp|warnings\.warn|UserWarning|^\s*$", line))


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder with a hash of its content; what is no plain file counts by its kind."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            found[name] = "special"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder that is no artifact: a tiny Llama and a tokenizer with the dialogue template."""
    return make_base(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """An artifact, which is a policy."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rlhf_pipeline import artifact
    from rlhf_pipeline.artifact import Kind

    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    folder = tmp_path_factory.mktemp("policy") / "artifact"
    said: dict[str, Any] = {
        "kind": Kind.policy,
        "stage": "sft",
        "step": 3,
        "template_hash": "t",
        "tokenizer_hash": "k",
        "special_ids": {"eos": 2},
        "vocab_size": 400,
        "config": {},
        "data": {},
        "metrics": {},
    }
    artifact.save(folder, model=model, weights=model.state_dict(), tokenizer=tokenizer, manifest=said)
    return folder


@pytest.fixture
def damaged(tmp_path: Path) -> Callable[[Path, Callable[[Path], object]], Path]:
    """damaged(folder, change): a copy of it that `change` was called with."""

    def make(folder: Path, change: Callable[[Path], object]) -> Path:
        copied = tmp_path / "damaged"
        shutil.copytree(folder, copied)
        change(copied)
        return copied

    return make
