"""The run's own record: `metrics.jsonl`, `samples.jsonl` and `summary.json` in the run directory.

One JSON object a line, with its `step`; metric names are flat (`train/loss`, `eval/loss`,
`time/tokens_per_second`). Everything but `time/*` is a function of the config, so two runs are compared with
`read_metrics(a, timings=False) == read_metrics(b, timings=False)`. JSON has no NaN and no infinity, so these
are written as the strings "nan", "inf" and "-inf" and come back from `read_metrics` as floats. Plots and
comparisons are left to the readers.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.tracking.sinks import TIME_PREFIX, Metrics, Rows, Sink

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
SUMMARY_FILE = "summary.json"

# One object for every NaN that is read: containers compare by identity before equality, so two logs that both
# hold a NaN in the same place are equal under ==.
_NAN = math.nan
_NON_FINITE = {"nan": _NAN, "inf": math.inf, "-inf": -math.inf}


class Records(Sink):
    """Appends to the run's files: empty ones, or an earlier session's cut back to `restored_step`."""

    name = "run files"
    is_essential = True

    def __init__(self, run_dir: Path, *, restored_step: int | None) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._summary_path = run_dir / SUMMARY_FILE
        self._summary_path.unlink(missing_ok=True)
        paths = [run_dir / METRICS_FILE, run_dir / SAMPLES_FILE]
        for path in paths:
            cut_back(path, restored_step=-1 if restored_step is None else restored_step)
        # backslashreplace: a lone surrogate in a sampled text becomes its own JSON escape, not an exception
        self._metrics, self._samples = (
            path.open("a", encoding="utf-8", errors="backslashreplace", newline="\n") for path in paths
        )

    def log(self, step: int, metrics: Metrics) -> None:
        self._metrics.write(_encode({"step": step, **metrics}) + "\n")
        self._metrics.flush()

    def samples(self, step: int, rows: Rows) -> None:
        self._samples.writelines(_encode({"step": step, **row}) + "\n" for row in rows)
        self._samples.flush()

    def summary(self, values: Mapping[str, Any]) -> None:
        write_atomically(self._summary_path, _encode(values, indent=2) + "\n")

    def sync(self) -> None:
        for file in (self._metrics, self._samples):
            file.flush()
            os.fsync(file.fileno())

    def close(self, *, failed: bool) -> None:
        self._metrics.close()
        self._samples.close()


def read_metrics(path: Path, *, timings: bool = True) -> list[dict[str, float]]:
    """The lines of a `metrics.jsonl` in order, each with its `step`; `timings=False` leaves `time/*` out.

    A last line that a killed process left torn is skipped. Raises UserError for a missing file and for any
    other damaged line.
    """
    return [
        {
            name: _NON_FINITE[value] if isinstance(value, str) else value
            for name, value in record.items()
            if timings or not name.startswith(TIME_PREFIX)
        }
        for record in _read_lines(path)
    ]


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The lines of a `samples.jsonl` in order: `step` and the texts. Errors as in `read_metrics`."""
    return list(_read_lines(path))


def cut_back(path: Path, *, restored_step: int) -> int:
    """Remove every line after `restored_step`, and damaged ones, from a JSONL file; return how many went.

    The kept lines are not touched, byte for byte. The file is replaced in one step (temporary file, fsync,
    rename), so a crash at any moment leaves the old file or the new one. A missing file counts as empty.
    """
    if not path.exists():
        return 0
    removed = 0
    temporary = path.with_name(path.name + ".tmp")
    with path.open("rb") as source, temporary.open("wb") as target:
        for line in source:
            record = _decode(line)
            if record is not None and record["step"] <= restored_step:
                target.write(line)
            else:
                removed += 1
        target.flush()
        os.fsync(target.fileno())
    if removed:
        _replace(temporary, path)
    else:
        temporary.unlink()
    return removed


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that a crash leaves the old content or the new, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    _replace(temporary, path)


def _replace(temporary: Path, path: Path) -> None:
    os.replace(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the rename itself is data of the directory
    finally:
        os.close(directory)


def _encode(record: Mapping[str, Any], *, indent: int | None = None) -> str:
    return json.dumps(_finite(record), ensure_ascii=False, allow_nan=False, indent=indent, default=str)


def _finite(value: Any) -> Any:
    """`value` with every NaN and infinity in it spelled out as a string."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _decode(line: bytes) -> dict[str, Any] | None:
    """The record on a line, or None for a torn or damaged line."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        return None
    return record


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"No {path.name} in {path.parent}: is this the directory of a run that has logged a step?")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            record = _decode(line)
            if record is not None:
                yield record
            elif line.endswith(b"\n"):
                raise UserError(f"{path}, line {number} is damaged: {line[:60]!r}. Remove the line and try again.")
