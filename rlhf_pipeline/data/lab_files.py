"""The lab's sets as files: `lab:<set>` stands for a file in the cache folder that is written once."""

from __future__ import annotations

import json
import secrets
from pathlib import Path

from rlhf_pipeline.config.schema import LabConfig
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.files import sync

PREFIX = "lab:"


def local_path(source: str, config: LabConfig, cache_dir: Path) -> Path:
    """The file that `lab:<set>` stands for, written now if it is not there. Its name tells all that it depends on.

    Raises:
        UserError: for a set that does not exist.
    """
    from rlhf_pipeline.data.lab import VERSION

    name = source.removeprefix(PREFIX)
    count = _size(name, config)
    path = cache_dir / "lab" / f"{name}-v{VERSION}-seed{config.seed}-{count}.jsonl"
    if not path.is_file():
        write(name, path, config)
    return path


def write(name: str, path: Path, config: LabConfig) -> None:
    """Write a set as JSON lines, atomically."""
    from rlhf_pipeline.data.lab.sets import rows

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"_{path.name}.{secrets.token_hex(4)}.partial")
    with partial.open("w", encoding="utf-8") as sink:
        for row in rows(name, count=_size(name, config), seed=config.seed):
            sink.write(json.dumps(row, ensure_ascii=False) + "\n")
    sync(partial)
    partial.replace(path)


def _size(name: str, config: LabConfig) -> int:
    from rlhf_pipeline.data.lab.sets import SETS

    if name not in SETS:
        raise UserError(f"{PREFIX}{name}: no such set; there are {', '.join(PREFIX + known for known in SETS)}")
    return int(getattr(config, name))
