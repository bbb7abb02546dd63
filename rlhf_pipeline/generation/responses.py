"""The file of `rlhf generate`: rows are appended as batches finish, and put into the input's order at the end.

While the run is at work they are in `responses.partial-<rank>.jsonl` of its folder, so that nothing is lost when it is
killed; the same command reads them and draws what is missing.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.files import disk_errors, read_object, sync, write_json
from rlhf_pipeline.generation.decode import Completion
from rlhf_pipeline.generation.prompts import Asked

KEPT = "The answers before it are kept."
Pair = tuple[int, int]  # index of a prompt, number of a sample


def row_of(asked: Asked, answer: Completion, text: str, more: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """One line of the output, with `more` fields. An input's column whose name is one of ours is kept as input_<name>."""
    ours = {
        "index": asked.index,
        "sample": answer.sample,
        "prompt": [{"role": m.role, "content": m.content} for m in asked.messages],
        "response": text,
        "finish_reason": answer.finish,
        "prompt_tokens": len(asked.tokens),
        "response_tokens": len(answer.tokens),
        "origin": asked.origin,
        **(more or {}),
    }
    return ours | {f"input_{name}" if name in ours else name: value for name, value in asked.columns.items()}


def line_of(row: dict[str, Any]) -> str:
    line = json.dumps(row, ensure_ascii=False, default=str)
    if any("\ud800" <= char <= "\udfff" for char in line if not char.isascii()):  # half a character, which is no UTF-8
        line = json.dumps(row, default=str)
    return line + "\n"


def check_inputs(folder: Path, inputs: dict[str, str]) -> None:
    """Remember what a run answers with and what it answers; on a resumed run it must be the same.

    Raises:
        UserError: naming what has changed.
    """
    marker = folder / "inputs.json"
    if not marker.exists():
        write_json(marker, inputs)
        return
    before = read_object(marker, f"remove {folder} to begin again")
    changed = [f"  - {name}: {before.get(name)} -> {now}" for name, now in inputs.items() if before.get(name) != now]
    if changed:
        lines = "\n".join(changed)
        raise UserError(
            f"{folder}: was begun with other contents\n{lines}\nChoose another name=..., or remove {folder} to begin again."
        )


def partial_file(folder: Path, rank: int) -> Path:
    return folder / f"responses.partial-{rank}.jsonl"


def partial_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("responses.partial-*.jsonl"))


def drop_torn_lines(folder: Path) -> None:
    """Cut off what a killed process has left of its last line. Called by one process."""
    for file in partial_files(folder):
        content = file.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(file, whole)


def finished(files: Iterable[Path]) -> set[Pair]:
    """Which answers are in these files."""
    return {(row["index"], row["sample"]) for file in files for row in read_lines(file)}


def read_lines(file: Path) -> Iterator[dict[str, Any]]:
    if not file.is_file():
        return
    with file.open(encoding="utf-8") as source:
        for number, line in enumerate(source, start=1):
            try:
                row = json.loads(line)
                yield {**row, "index": row["index"], "sample": row["sample"]}
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(
                    f"{file}:{number}: not an answer of rlhf generate ({error}); remove the file, or name another one"
                ) from None


def append(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Add the rows of a batch.

    Raises:
        UserError: when the disk is full; what the batch left behind is cut off.
    """
    size = file.stat().st_size if file.exists() else 0
    try:
        with disk_errors("answers", file, kept=KEPT):
            with file.open("a", encoding="utf-8") as sink:
                sink.write("".join(map(line_of, rows)))
            sync(file)
    except UserError:
        if file.exists():
            os.truncate(file, size)
        raise


def merge(folder: Path, output: Path) -> list[dict[str, Any]]:
    """Replace `output` by all answers in the input's order, atomically, and remove the partial files.

    Raises:
        UserError: when it cannot be written; the partial files stay.
    """
    parts = partial_files(folder)
    found = {(row["index"], row["sample"]): row for file in (output, *parts) for row in read_lines(file)}
    rows = [found[pair] for pair in sorted(found)]
    if not parts:
        return rows
    partial = output.with_name(output.name + ".partial")
    with disk_errors("the answers", output, kept=f"They are in {folder} in no order."):
        with partial.open("w", encoding="utf-8") as sink:
            sink.writelines(map(line_of, rows))
        sync(partial)
        partial.replace(output)
        sync(output.parent)
    for file in parts:
        file.unlink()
    return rows


def check_writable(output: Path, *, new: bool) -> None:
    """Refuse, before anything is loaded, an output that could not be written at the end.

    Raises:
        UserError: for a folder, a place that cannot be written, or (`new`: at the run's start) a file of someone else.
    """
    if output.is_dir():
        raise UserError(f"output={output}: is a folder; name a file")
    if new and output.exists():
        raise UserError(f"output={output}: exists, and this run has not written it; remove it or name another file")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output.parent):  # without a name: whoever stops us here finds nothing left
            pass
    except OSError as error:
        raise UserError(f"output={output}: cannot be written: {error.strerror}") from error
