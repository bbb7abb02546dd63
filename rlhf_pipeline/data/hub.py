"""Takes the first rows of a hub data set that does not fit on the disk, and keeps them as local files.

The rows are written as compressed JSON lines, some thousands a file, before anything else reads them: so what is trained
on lies on this disk, has lines to look at, and stays the same when a run is resumed. A download that is interrupted goes
on after its last whole file. JSON lines rather than Parquet, which has one type a column: rows of a hub data set need not.
"""

from __future__ import annotations

import errno
import gzip
import json
import os
import shutil
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.files import read_object, sync, write_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from datasets import IterableDataset

ROWS_A_FILE = 10_000
# Names that begin with an underscore are not read as data.
POSITION = "_position.json"  # after which whole file, and how the hub's reader goes on from there
COMPLETE = "_complete.json"  # written last


def first_rows(
    name: str, *, split: str, count: int, cache_dir: Path, progress: Callable[[str, int], None] | None = None
) -> list[str]:
    """Files with the first `count` rows of `name` (or all, if there are fewer), fetched unless they are there.

    Once complete they are used without asking the hub again; remove the folder to fetch anew. One process at a time.

    Raises:
        UserError: when the data set cannot be read.
    """
    folder = cache_dir / "hub" / f"{name}@{split}-{count}".replace("/", "--")
    if not (folder / COMPLETE).is_file():
        _fetch(name, split, count, folder, progress)
    return sorted(str(file) for file in folder.glob("rows-*.jsonl.gz"))


def _fetch(name: str, split: str, count: int, folder: Path, progress: Callable[[str, int], None] | None) -> None:
    rows, revision = _open(name, split)
    done: dict[str, Any] = {"revision": revision, "rows": 0, "state": None}
    if (folder / POSITION).is_file():
        before = read_object(folder / POSITION, f"remove {folder} to fetch the rows anew")
        if before.get("revision") == revision:
            done = before
        else:  # rows of two versions must not be mixed
            shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if done["state"] is not None:
            rows.load_state_dict(done["state"])
        supply = iter(rows)
        while wanted := min(ROWS_A_FILE, count - done["rows"]):
            written = _write(folder / f"rows-{done['rows'] // ROWS_A_FILE:05d}.jsonl.gz", islice(supply, wanted))
            done = {"revision": revision, "rows": done["rows"] + written, "state": rows.state_dict()}
            write_json(folder / POSITION, done)
            if progress is not None:
                progress(f"{name} (from the hub)", done["rows"])
            if written < wanted:
                break
    except Exception as error:  # of every kind: network, a file of the hub that cannot be decoded
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise _cannot_read(name, error, done["rows"]) from error
    write_json(folder / COMPLETE, {"repository": name, "split": split, "revision": revision, "rows": done["rows"]})


def _open(name: str, split: str) -> tuple[IterableDataset, str]:
    """The rows, and what identifies the version that they are from."""
    from datasets import load_dataset_builder

    try:
        builder = load_dataset_builder(name)  # what load_dataset(streaming=True) does, which hides the version
        return builder.as_streaming_dataset(split=split), str(builder.hash)
    except Exception as error:  # of every kind: network, permission, configuration name, split
        raise UserError(f"{name}: cannot be streamed from the hub: {type(error).__name__}: {error}") from error


def _write(file: Path, rows: Any) -> int:
    """Write rows, atomically; their number."""
    partial = file.with_name(f"_{file.name}.partial")
    number = 0
    with gzip.open(partial, "wt", compresslevel=1, encoding="utf-8") as sink:
        for row in rows:
            sink.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")  # str: dates and the like
            number += 1
    if number:
        sync(partial)
        os.replace(partial, file)
        sync(file.parent)
    else:
        partial.unlink()
    return number


def _cannot_read(name: str, error: Exception, rows: int) -> UserError:
    return UserError(
        f"{name}: reading from the hub broke off after {rows:,} rows were kept: {type(error).__name__}: {error}. "
        "The same command goes on from there"
    )
