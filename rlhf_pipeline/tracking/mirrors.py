"""Copies of the run's record in wandb and TensorBoard. Both are mirrors: `metrics.jsonl` is the record, and a
mirror that fails is dropped with one warning while training goes on (`tracker` sees to that).

Both libraries are imported when a mirror is opened and not before. Neither sees the process's command line,
its console output, its code or its git remote, since any of these can hold a credential.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rlhf_pipeline.tracking.records import (
    METRICS_FILE,
    SAMPLES_FILE,
    read_metrics,
    read_samples,
    write_atomically,
)
from rlhf_pipeline.tracking.sinks import Images, Metrics, Rows, Sink

WANDB_ID_FILE = "wandb.json"
TENSORBOARD_DIR = "tensorboard"

_WANDB_SETTINGS: dict[str, Any] = {
    "silent": True,
    "console": "off",
    "disable_code": True,
    "disable_git": True,
    "save_code": False,
    "x_disable_meta": True,  # it holds the command line
    "x_save_requirements": False,  # slow, and the artifact records the versions that matter
}
_WANDB_TIMEOUTS = {
    "WANDB_INIT_TIMEOUT": "30",  # seconds without an answer until the run goes on without wandb
    "WANDB_FINISH_TIMEOUT": "60",  # seconds for the last upload; what is not sent by then stays on disk
}


class WandbMirror(Sink):
    """A wandb run that holds what `metrics.jsonl` and `samples.jsonl` hold, whatever happened on the way.

    The run's id is drawn when a run begins and kept in `wandb.json`; a resumed run reads it there and
    continues the same wandb run. On opening, every recorded step that the wandb run lacks is sent again,
    which makes three cases one:

    - online, nothing or only unsent rows lost: the server names its last step, the rows after it are sent,
      and the steps that a resumed run computes a second time are not;
    - online for the first time, earlier sessions having been without wandb: everything is sent;
    - offline: wandb (0.31) cannot continue an offline run and starts a file for every session, of which
      `wandb sync` lets the last one win. So the last one is complete, and those before it are moved to
      `wandb/superseded`.

    Steps are passed explicitly, so parts of one step share one row. Pictures are no part of the run's record: those
    of steps before the restored one are not sent again.
    """

    name = "wandb"

    def __init__(
        self,
        run_dir: Path,
        *,
        mode: Literal["online", "offline"],
        project: str,
        entity: str | None,
        name: str,
        stage: str,
        config: Mapping[str, Any],
        restored_step: int | None,
    ) -> None:
        folder = run_dir / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        _set_aside_offline_sessions(folder)
        with contextlib.ExitStack() as stack:
            # wandb stages tables and keeps logs in the home directory unless told otherwise
            places = {"WANDB_DATA_DIR": folder / "data", "WANDB_CACHE_DIR": folder / "cache"}
            defaults = _WANDB_TIMEOUTS | {name: str(place.absolute()) for name, place in places.items()}
            for variable in defaults.keys() - os.environ.keys():
                os.environ[variable] = defaults[variable]
                stack.callback(os.environ.pop, variable, None)
            import wandb

            # A silent session never asks for an API key on the terminal: without one, init raises.
            wandb.setup(settings=wandb.Settings(silent=True))
            self._table = wandb.Table
            self._image = wandb.Image
            self._run = wandb.init(
                dir=str(run_dir),
                mode=mode,
                project=project,
                entity=entity,
                name=f"{name}/{stage}",
                group=name,
                job_type=stage,
                id=_run_id(run_dir / WANDB_ID_FILE, stage=stage, is_new=restored_step is None),
                resume="allow" if mode == "online" else None,
                config=json.loads(json.dumps(config, default=str)),
                allow_val_change=True,  # a resumed run may be longer or log more often than before
                reinit="create_new",
                settings=wandb.Settings(**_WANDB_SETTINGS),
            )
            self._environment = stack.pop_all()
        self.url: str | None = self._run.url if mode == "online" else None
        self._first_step = self._run.starting_step
        if restored_step is not None:
            try:
                self._send_recorded(run_dir)
            except BaseException:
                self.close(failed=True)
                raise

    def log(self, step: int, metrics: Metrics) -> None:
        if step >= self._first_step:
            self._run.log(dict(metrics), step=step)

    def samples(self, step: int, rows: Rows) -> None:
        if step < self._first_step or not rows:
            return
        columns: list[str | int] = list(rows[0])
        table = self._table(columns=columns, data=[[row.get(str(column)) for column in columns] for row in rows])
        self._run.log({"samples": table}, step=step)

    def images(self, step: int, images: Images) -> None:
        if step >= self._first_step and images:
            self._run.log({name: self._image(str(path)) for name, path in images.items()}, step=step)

    def summary(self, values: Mapping[str, Any]) -> None:
        self._run.summary.update(json.loads(json.dumps(values, default=str)))

    def close(self, *, failed: bool) -> None:
        with self._environment:
            self._run.finish(exit_code=1 if failed else 0)

    def _send_recorded(self, run_dir: Path) -> None:
        for step, recorded in _recorded(run_dir):
            if isinstance(recorded, list):
                self.samples(step, recorded)
            else:
                self.log(step, recorded)


class TensorboardMirror(Sink):
    """TensorBoard event files in `tensorboard/`; a new session purges the steps after the restored one."""

    name = "tensorboard"

    def __init__(self, run_dir: Path, *, restored_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(
            log_dir=str(run_dir / TENSORBOARD_DIR),
            purge_step=0 if restored_step is None else restored_step + 1,
        )

    def log(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, global_step=step)

    def images(self, step: int, images: Images) -> None:
        from PIL import Image  # matplotlib's, which drew them

        for name, path in images.items():
            with Image.open(path) as picture:
                pixels = np.asarray(picture.convert("RGB"))  # uint8 [height, width, 3]
            self._writer.add_image(name, pixels, global_step=step, dataformats="HWC")

    def sync(self) -> None:
        self._writer.flush()

    def close(self, *, failed: bool) -> None:
        self._writer.close()


def _run_id(path: Path, *, stage: str, is_new: bool) -> str:
    """The wandb id of the run in this directory.

    Drawn rather than derived from the path: a directory that is deleted and used again, or the same path on
    another machine, is another run, and must not be appended to the first one's curves.
    """
    if not is_new and path.is_file():
        return str(json.loads(path.read_text(encoding="utf-8"))["wandb_id"])
    wandb_id = f"{stage}-{secrets.token_hex(6)}"
    write_atomically(path, json.dumps({"wandb_id": wandb_id}) + "\n")
    return wandb_id


def _set_aside_offline_sessions(folder: Path) -> None:
    """Move earlier sessions to where `wandb sync` does not look: they would overwrite the complete one."""
    superseded = folder / "superseded"
    for session in sorted(folder.glob("offline-run-*")):
        superseded.mkdir(exist_ok=True)
        session.rename(superseded / session.name)


def _recorded(run_dir: Path) -> Iterator[tuple[int, dict[str, float] | list[dict[str, str]]]]:
    """What the run's files hold, by step: the metrics of a line, and all samples of a step as one list."""
    metrics = ((int(row.pop("step")), row) for row in read_metrics(run_dir / METRICS_FILE))
    samples = (
        (step, [{key: text for key, text in row.items() if key != "step"} for row in rows])
        for step, rows in groupby(read_samples(run_dir / SAMPLES_FILE), key=lambda row: int(row["step"]))
    )
    return heapq.merge(metrics, samples, key=lambda entry: entry[0])
