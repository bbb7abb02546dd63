"""`rlhf prep`: reads, checks and tokenises data before any training, and says what is in it. No torch, no GPU.

`rlhf prep sft <arguments of rlhf sft>` leaves every cache file that `rlhf sft` with these arguments will read;
`rlhf prep data.train=...` looks at any data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast

from rlhf_pipeline import runtime
from rlhf_pipeline.config.schema import DataConfig, LongPrompt, LongResponse, OnBadRow
from rlhf_pipeline.config.stages import PrepConfig, RmConfig, StageConfig
from rlhf_pipeline.data import lab_files, prepare, report_view, stage
from rlhf_pipeline.data.contents import Contents, overlap, read_contents
from rlhf_pipeline.data.dataset import Progress
from rlhf_pipeline.data.formats import Kind
from rlhf_pipeline.data.plain import PlainText
from rlhf_pipeline.data.progress import terminal_progress
from rlhf_pipeline.data.prompts import Renderer
from rlhf_pipeline.data.report import Report, run_report, set_report, to_json
from rlhf_pipeline.data.store import TreeDataset
from rlhf_pipeline.data.tokenizer import open_renderer
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.files import write_json
from rlhf_pipeline.run import refuse_another

HELD_OUT = "held out"
NORMALISE = "to normalise"
UNLIMITED = 2**30  # characters; limits are in tokens
SAMPLE_WIDTH = 2000  # characters of a sample row


def main(config: PrepConfig | StageConfig) -> None:
    """Check the data of a stage, or any data.

    Raises:
        SystemExit: 2 when rows are bad, or too long, and the config does not allow it.
        UserError: for what cannot be read at all.
    """
    if not runtime.is_main():  # one process does it all
        return
    if isinstance(config, StageConfig):
        _stage(config)
    else:
        _any_data(config)


def _stage(config: StageConfig) -> None:
    refuse_another(config)  # a tokenizer trained for the run that lies there must not be touched for another one
    with terminal_progress() as progress:
        renderer = stage.open_renderer(_lenient(config), progress=progress)
        try:
            sets, too_long = _sets(_lenient(config), renderer, progress), None
        except UserError as error:
            too_long = _only_too_long(config.data, error)
            sets = _sets(_lenient(config, drop=True), renderer, progress)
    batches = stage.batch_order(config, sets[next(iter(sets))])
    parts = [NORMALISE] if isinstance(config, RmConfig) and config.normalise.train is None else []
    _present(
        sets,
        config.data,
        folder=Path(config.run_dir) / "prep",
        kinds=_kinds(list(sets)),
        parts=parts,
        unit="tokens",
        steps=(batches, config),
        too_long=too_long,
    )


def _sets(config: StageConfig, renderer: Renderer, progress: Progress | None) -> dict[str, TreeDataset]:
    """All that the stage will read; what its steps are counted by comes first."""
    sets, heldout = stage.data_sets(config, renderer, progress=progress)
    sets = {**sets, HELD_OUT: heldout}
    if isinstance(config, RmConfig):
        sets[NORMALISE] = stage.demonstrations_to_normalise(config, renderer, progress=progress)
    return sets


def _any_data(config: PrepConfig) -> None:
    folder = Path(config.run_dir)
    if _names_lab(config.data):
        _write_lab(config.data, folder / "lab")
    data = dataclasses.replace(config.data, on_bad_row=OnBadRow.skip)
    unit = "tokens"
    if config.tokenizer.path is not None:
        renderer = open_renderer(config.tokenizer.path, config.tokenizer)
    else:
        unit = "characters"
        renderer = cast(Renderer, PlainText())  # it has what `encode` asks for
        limits: dict[str, Any] = {"max_length": UNLIMITED, "max_prompt_length": UNLIMITED - 1}
        data = dataclasses.replace(data, **limits)
    with terminal_progress() as progress:
        try:
            sets, too_long = _named(config, data, renderer, progress), None
        except UserError as error:
            too_long = _only_too_long(data, error)
            sets = _named(config, prepare.dropping(data), renderer, progress)
    kinds: dict[str, Kind] = dict.fromkeys(sets, config.kind.value)
    _present(sets, config.data, folder=folder, kinds=kinds, unit=unit, too_long=too_long)


def _named(config: PrepConfig, data: DataConfig, renderer: Renderer, progress: Any) -> dict[str, TreeDataset]:
    options: dict[str, Any] = {"kind": config.kind.value, "seed": config.seed, "progress": progress}
    sets = {"train": prepare.data_set(data.train, data, renderer, **options)}
    if data.heldout is not None:
        sets[HELD_OUT] = prepare.held_out(data, renderer, **options)
    return sets


def _present(
    sets: dict[str, TreeDataset],
    data: DataConfig,
    *,
    folder: Path,
    kinds: dict[str, Kind],
    parts: Sequence[str] = (),
    unit: str,
    steps: tuple[stage.order.BatchOrder, StageConfig] | None = None,
    too_long: str | None = None,
) -> None:
    """Print and save what is in the data sets, and end with exit code 2 where a stage would refuse them.

    `parts` are made of the rows of another set, which tells of them.
    """
    from rich.console import Console

    contents = {name: read_contents(one) for name, one in sets.items()}
    train = next(iter(sets))
    # Of prompts the responses are yet to be drawn: how they fill rows cannot be told.
    row_length = steps[1].batch.row_length if steps is not None and kinds[train] != "prompt" else None
    report = Report(
        unit=unit,
        sets={
            name: set_report(
                one,
                contents[name],
                kind=kinds[name],
                row_length=row_length,
                max_length=data.max_length if unit == "tokens" else None,
                is_part=name in parts or (name == HELD_OUT and data.heldout is None),
            )
            for name, one in sets.items()
        },
        overlap=_overlap(sets, contents, train) if data.heldout is not None else None,
        run=None,
    )
    if steps is not None:
        batches, config = steps
        batch = config.batch
        made = run_report(
            sets[train],
            batches,
            max_steps=config.train.max_steps,
            row_length=row_length,
            micro_rows=batch.micro_rows,
        )
        report = dataclasses.replace(report, run=made)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "report.json", to_json(report))
    picture = folder / "lengths.png"
    limit = data.max_prompt_length if unit == "tokens" else None
    report_view.histograms(contents, picture, unit=unit, prompt_limit=limit, row_length=row_length)

    console = Console(highlight=False)
    for table in report_view.tables(report):
        console.print(table)
    for line in report_view.lines(report):
        console.print(line, markup=False, soft_wrap=True)
    if unit == "characters":
        console.print("Lengths are in characters: name tokenizer.path=... to see tokens, and what is too long.")
    console.print(f"{folder / 'report.json'}, {picture}", markup=False, soft_wrap=True)
    refused = [too_long] if too_long else []
    if report.num_bad and data.on_bad_row is OnBadRow.error:
        rows = "row" if report.num_bad == 1 else "rows"
        refused.append(
            f"{report.num_bad:,} {rows} cannot be used: correct them, or set data.on_bad_row=skip to go on without them"
        )
    if refused:
        console.print("A stage would stop here: " + "\n".join(refused), markup=False, soft_wrap=True)
        raise SystemExit(2)


def _overlap(sets: dict[str, TreeDataset], contents: dict[str, Contents], train: str) -> Any:
    return overlap(sets[train], sets[HELD_OUT], (contents[train], contents[HELD_OUT])) if HELD_OUT in sets else None


def _kinds(names: list[str]) -> dict[str, Kind]:
    own: dict[str, Kind] = {HELD_OUT: stage.KINDS[names[0]], NORMALISE: "demonstration"}
    return {name: own[name] if name in own else stage.KINDS[name] for name in names}


def _lenient(config: StageConfig, *, drop: bool = False) -> Any:
    """The config under which bad rows are counted instead of ending it all; the cache files are the same."""
    data = dataclasses.replace(config.data, on_bad_row=OnBadRow.skip)
    return dataclasses.replace(config, data=prepare.dropping(data) if drop else data)


def _only_too_long(data: DataConfig, error: UserError) -> str:
    """The message, if dropping long rows can help; else the error is raised again."""
    if data.long_prompt is not LongPrompt.error and data.long_response is not LongResponse.error:
        raise error
    return str(error)


def _names_lab(data: DataConfig) -> bool:
    named = [*_paths(data.train), *_paths(data.heldout)]
    return any(path.startswith(lab_files.PREFIX) for path in named)


def _paths(value: Any) -> list[str]:
    every = value if isinstance(value, list) else [] if value is None else [value]
    return [one if isinstance(one, str) else one["path"] for one in every]


def _write_lab(data: DataConfig, folder: Path) -> None:
    """Every set of the lab as a plain file, one row of each shown."""
    from rich.console import Console

    from rlhf_pipeline.data.lab.sets import SETS

    console = Console(highlight=False)
    for name in SETS:
        path = folder / f"{name}.jsonl"
        lab_files.write(name, path, data.lab)
        with path.open(encoding="utf-8") as file:
            (row,) = islice(file, 1)
        console.print(f"{path}: {getattr(data.lab, name):,} rows such as", markup=False, soft_wrap=True)
        shown = row.strip()
        cut = shown if len(shown) <= SAMPLE_WIDTH else f"{shown[:SAMPLE_WIDTH]} ..."
        console.print(cut, markup=False, soft_wrap=True)
        console.print()
