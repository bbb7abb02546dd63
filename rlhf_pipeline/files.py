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

SEAL = "checksum"
TOO_LARGE = "no file may become so large here (ulimit -f, or the file system)"


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_small(path: Path) -> str:
    """The text of a file that is read at once. What is no file (a pipe, say) is not waited for.

    Raises:
        OSError: when it cannot be read. ValueError: when it is not UTF-8.
    """
    if not path.is_file() and path.exists():
        raise OSError(errno.EINVAL, "not a file", str(path))
    return path.read_text(encoding="utf-8")


def read_object(path: Path, advice: str) -> dict[str, Any]:
    """The object of a small JSON file that a command of ours wrote.

    Raises:
        UserError: when it is none, with what to do.
    """
    try:
        value = json.loads(read_small(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged, not JSON ({error}); {advice}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: damaged, a {type(value).__name__} where an object should be; {advice}")
    return value


def sync(path: Path) -> None:
    """Force a file's or a folder's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """`value` with a checksum of itself under SEAL, for a file that says what others must be."""
    rest = {name: one for name, one in value.items() if name != SEAL}
    text = json.dumps(json.loads(json.dumps(rest)), sort_keys=True)  # as it will be read
    return {**rest, SEAL: hashlib.sha256(text.encode()).hexdigest()}


def is_intact(value: dict[str, Any]) -> bool:
    """Whether what was read is what was sealed; also where there is no seal, as before there were any."""
    return SEAL not in value or sealed(value) == value


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value`, atomically."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text`, atomically."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8", newline="\n")
    sync(partial)
    partial.replace(path)
    sync(path.parent)


def check_folder(path: str | Path) -> None:
    """Refuse a folder that could not be made or written to; nothing is made yet.

    Raises:
        UserError: saying which part of the path is in the way.
    """
    folder = Path(path).absolute()
    try:
        while not (folder.exists() or folder.is_symlink()):
            folder = folder.parent
        if not folder.is_dir():
            what = "a link that leads nowhere" if folder.is_symlink() and not folder.exists() else "not a folder"
            raise UserError(f"{path}: cannot be made: {folder} is {what}; move it away, or choose another place")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(
                f"{path}: cannot be written: no permission in {folder}; change that, or choose another place"
            )
    except OSError as error:  # a name too long, links in circles
        raise UserError(f"{str(path)[:200]}: cannot be a folder: {error.strerror}; choose another place") from error


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
        limit = number == errno.EFBIG or "File too large" in str(error)
        if not full and not limit and number not in (errno.EROFS, errno.EACCES, errno.EIO):
            raise
        reason = "the disk is full" if full else TOO_LARGE if limit else os.strerror(int(number or errno.EIO))
        cure = "Raise that limit" if limit else "Make room"
        raise UserError(
            f"{path}: {reason} while saving {what}. {kept} {cure} and run the same command again."
        ) from error
