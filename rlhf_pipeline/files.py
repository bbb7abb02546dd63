"""Writing so that a crash or a full disk leaves the old content or the new, and nothing between."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf_pipeline.errors import UserError


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Force a file's or a folder's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value`, atomically."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
    sync(partial)
    partial.replace(path)
    sync(path.parent)


def publish(partial: Path, final: Path) -> None:
    """Give a finished folder its name; a folder that has it already is replaced."""
    for file in sorted(partial.rglob("*")):
        sync(file)
    sync(partial)
    old = final.with_name(final.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    partial.rename(final)
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def disk_errors(what: str, path: Path, *, kept: str) -> Iterator[None]:
    """Turn a full disk or a read-only one into a message that says what was being written and what still stands.

    Raises:
        UserError: for errors of the disk; anything else passes.
    """
    try:
        yield
    except Exception as error:  # the safetensors library wraps the system's error in its own
        number = getattr(error, "errno", None)
        full = number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        if not full and number not in (errno.EROFS, errno.EACCES, errno.EIO):
            raise
        reason = "the disk is full" if full else os.strerror(int(number or errno.EIO))
        raise UserError(
            f"{path}: {reason} while saving {what}. {kept} Make room and run the same command again."
        ) from error
