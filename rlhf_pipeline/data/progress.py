"""A line on the terminal while a source is read and tokenised: rows so far, rows a second."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rlhf_pipeline import runtime
from rlhf_pipeline.data.dataset import Progress


@contextmanager
def terminal_progress() -> Iterator[Progress | None]:
    """What `prepare` tells its progress to: a line on stderr; None where nobody looks, or on further ranks."""
    if not runtime.is_main() or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress as Bar
    from rich.progress import TaskID, TextColumn, TimeElapsedColumn

    bar = Bar(
        TextColumn("{task.description}"),
        TextColumn("{task.completed:,.0f} rows"),
        TextColumn("{task.fields[speed]}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    tasks: dict[str, TaskID] = {}

    def show(source: str, rows: int) -> None:
        if source not in tasks:
            bar.start()  # not before there is something to show
            tasks[source] = bar.add_task(f"reading {source}", total=None, speed="")
        elapsed = next(task.elapsed for task in bar.tasks if task.id == tasks[source])
        bar.update(tasks[source], completed=rows, speed=f"{rows / elapsed:,.0f} rows/s" if elapsed else "")

    try:
        yield show
    finally:
        bar.stop()
