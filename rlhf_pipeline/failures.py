"""How a command ends that cannot go on: one message on stderr, and an exit code.

2 for what the user can put right (`UserError`: usage, config, input), 1 for a failure of the machine or of this program.
`RLHF_TRACEBACK=1` shows where it happened, for either. Nothing heavy is imported here.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import sys
import traceback
from pathlib import Path

from rlhf_pipeline import peers
from rlhf_pipeline.errors import PeerError, UserError
from rlhf_pipeline.files import TOO_LARGE

PACKAGE = Path(__file__).parent
SHOWN = 1500  # characters of somebody else's message
_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
SHOW_TRACEBACK = "RLHF_TRACEBACK"


def leave(error: BaseException, stage: str, *, first: bool = True) -> int:
    """Say what ended `rlhf <stage>` in this process, the `first` of several or not; the exit code to end with.

    A user's mistake is the same in every process and is told by the first; that another process is not there is told by one
    of each machine; any other failure is told by each process that has it.
    """
    wants_traceback = os.environ.get(SHOW_TRACEBACK, "") not in ("", "0")
    if _lost_the_others(error):
        error = peers.cause(error)
    code, message = _told(error, stage)
    peers.leave(_visible(_without_credentials(message)))
    if peers.tells_loss() if isinstance(error, PeerError) else first or code != 2:
        shown = _without_secrets("".join(traceback.format_exception(error))) if wants_traceback else ""
        with contextlib.suppress(OSError):  # nobody reads
            sys.stderr.write(f"{_visible(shown + _without_credentials(message))}\n")
    try:
        sys.stdout.flush()
    except OSError:  # the reader has gone, or the disk is full; the interpreter would say it once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return code


def _visible(text: str) -> str:
    """Without what moves a terminal's cursor, colours it or turns its text around: a message may quote anything."""
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def settle_streams() -> None:
    """Let text be written that the terminal's encoding does not have, and nothing be written where a stream is closed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # its number would go to the next file that is opened
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _told(error: BaseException, stage: str) -> tuple[int, str]:
    """The exit code and the message."""
    if isinstance(error, UserError):
        return 2, str(error)
    here = f"rlhf {stage}"
    if isinstance(error, PeerError):
        return 1, f"{here}: {error}"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's: not to be imported here
        what = _cut(error) or "no more memory can be had"
        return 1, (
            f"{here}: out of memory: {what}\nLet less go through the model at a time (batch.micro_rows and batch.row_length "
            "in training, batch_tokens elsewhere), or use a higher engine.zero_stage or a smaller model."
        )
    if _lost_the_others(error):
        return 1, (
            f"{here}: process {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')} has lost the others: "
            f"{_cut(error).partition(chr(10))[0]}\nOne of them has ended, or has not answered for "
            "runtime.rank_timeout_minutes; what ended it stands above, where it could still say so. What was saved is "
            "intact: run the same command again."
        )
    if isinstance(error, BrokenPipeError) and error.filename is None:
        return 1, f"{here}: whatever read the output has gone away"
    if isinstance(error, OSError) and error.errno == errno.EFBIG:  # a write does not say to which file
        place = _path(error.filename or "a file")
        return (
            2,
            f"{here}: {place}: {TOO_LARGE}. What was saved is intact; raise that limit and run the same command again.",
        )
    if isinstance(error, OSError) and error.filename is not None:
        reason = os.strerror(error.errno) if error.errno else str(error)
        return 1, (
            f"{here}: {_path(error.filename)}: {reason}. Check the path, and whether it may be read and written; "
            f"{SHOW_TRACEBACK}=1 shows where it was needed."
        )
    what = f"{type(error).__name__}: {_cut(error)}" if str(error) else type(error).__name__
    return 1, (
        f"{here}: something went wrong that should not have: {what} ({_place(error)})\n"
        f"{SHOW_TRACEBACK}=1 shows the whole way there. If the message above says nothing to you, it is our bug: please "
        "report it."
    )


def _lost_the_others(error: BaseException) -> bool:
    """Whether a process that computes with others can no longer reach them. Gloo says it in plain RuntimeErrors."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return False
    names = {one.__name__ for one in type(error).__mro__}
    gloo = isinstance(error, RuntimeError) and any(words in str(error) for words in _GLOO)
    return gloo or bool(names & {"ConnectionError", "DistError"})


_GLOO = ("gloo", "Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Broken pipe")


def disk_is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def _path(name: object) -> str:
    return os.fsdecode(name) if isinstance(name, str | bytes) else str(name)


def _without_secrets(text: str) -> str:
    from rlhf_pipeline.tracking.redaction import redact_text

    return redact_text(text)


def _without_credentials(text: str) -> str:
    """Our messages speak of key=value themselves."""
    from rlhf_pipeline.tracking.redaction import redact_credentials

    return redact_credentials(text)


def _cut(error: BaseException) -> str:
    text = _without_secrets(str(error)).strip()
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} ..."


def _place(error: BaseException) -> str:
    """The innermost line of this package that the error came through, or else the innermost of all."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if PACKAGE in Path(frame.filename).parents]
    if not frames:
        return "no place known"
    last = (own or frames)[-1]
    file = Path(last.filename)
    return f"{file.relative_to(PACKAGE.parent) if own else file}:{last.lineno}"
