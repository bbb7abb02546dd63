"""`rlhf score`: rewards of answers, as JSON lines.

One pass over the input, whose rows and order it keeps: with every row goes what the reward model gives its answers.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_pipeline import runtime
from rlhf_pipeline.config.stages import ScoreConfig
from rlhf_pipeline.data import packing
from rlhf_pipeline.data.tree import Tree
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.files import disk_errors, sync, write_json
from rlhf_pipeline.generation.progress import Meter
from rlhf_pipeline.generation.responses import check_writable, line_of
from rlhf_pipeline.run import Run, open_run
from rlhf_pipeline.scoring.answers import STDIN, Answered, Answers, Unusable, read_answers, settle
from rlhf_pipeline.scoring.rewards import RewardModel, encode, open_scorer, score

STDOUT = "-"
OURS = "reward"


def main(config: ScoreConfig) -> None:
    """Score the answers.

    Raises:
        UserError: for what the user can put right.
        SystemExit: 130 after Ctrl-C; nothing is written then.
    """
    process = runtime.start(config.runtime)
    _check_places(config)
    try:
        # 1 Where the rewards go
        run = None if config.output == STDOUT else _open_place(config, process)

        # 2 The answers, and what scores them
        answers = read_answers(config.data)
        model = open_scorer(config.model, config.tokenizer, process.device)
        meter = Meter(sum(len(row.responses) for row in answers.rows), shown=runtime.is_main())

        # 3 Text to trees
        trees, notes = _trees(config, model, answers)
        for note in (*answers.notes, *notes):
            meter.message(note)

        # 4 A reward for every answer, each process its share
        rewards = _rewards(config, model, trees, meter)

        # 5 The rows with their rewards
        with runtime.main_first():
            if runtime.is_main():
                lines = _lines(answers, rewards)
                where = _write(config, run, lines, inputs_of(model, answers))
                meter.message(f"{where}{summary(answers.rows, rewards, meter.seconds)}")
    except KeyboardInterrupt:
        if runtime.is_main():
            sys.stderr.write("\nstopped; nothing has been written\n")
        raise SystemExit(130) from None


def _check_places(config: ScoreConfig) -> None:
    """What can be refused before anything is loaded."""
    several = runtime.world_size() > 1
    if several and config.output == STDOUT:
        raise UserError("output=-: several processes cannot share standard output; name a file")
    entries = config.data.path if isinstance(config.data.path, list) else [config.data.path]
    if several and STDIN in [entry["path"] if isinstance(entry, dict) else entry for entry in entries]:
        raise UserError("data.path=-: several processes cannot share standard input; name a file")


def _open_place(config: ScoreConfig, process: runtime.Runtime) -> Run:
    """The run's folder, once it is sure that the output can be written."""
    run = open_run(config, "score")
    if runtime.world_size() > 1:
        runtime.join_process_group(process, timeout_minutes=config.runtime.rank_timeout_minutes)
    with runtime.main_first():
        if runtime.is_main():
            check_writable(_output(config, run), new=not (run.folder / "inputs.json").is_file())
    return run


def _output(config: ScoreConfig, run: Run) -> Path:
    return Path(config.output) if config.output else run.folder / "rewards.jsonl"


def _trees(config: ScoreConfig, model: RewardModel, answers: Answers) -> tuple[dict[int, Tree], list[str]]:
    """The trees by index of their rows, and notes for people on what was left out or cut."""
    encoded = encode(model, answers.rows, max_length=config.data.max_length)
    bad = [
        Unusable(index=row.index, origin=row.origin, why=one.why, row=row.row)
        for row, one in zip(answers.rows, encoded, strict=True)
        if one.tree is None
    ]
    notes = settle(bad, config.data)
    trees = {one.tree.index: one.tree for one in encoded if one.tree is not None}
    if not trees:
        raise UserError("\n".join([f"data.path={config.data.path}: no answer in it can be scored", *notes]))
    cut = sum(one.prompt_cut for one in encoded)
    if cut:
        notes.append(
            f"{cut} of {len(encoded)} prompts lose their beginning, to fit data.max_length={config.data.max_length} and "
            "the model's context together with their longest answer"
        )
    return trees, notes


def _rewards(config: ScoreConfig, model: RewardModel, trees: dict[int, Tree], meter: Meter) -> dict[int, np.ndarray]:
    """Rewards float64 [K] by index of the row; every process has all of them."""
    indices = list(trees)
    shares = packing.split([len(trees[i]) for i in indices], runtime.world_size())
    mine = [trees[indices[place]] for place in shares[runtime.rank()]]
    meter.total = sum(len(tree.responses) for tree in mine)

    def tick(answers: int, tokens: int) -> None:
        meter.answers += answers
        meter.tick(tokens)

    own: Any
    with runtime.at_own_pace():
        try:
            found = score(model, mine, batch_tokens=config.batch_tokens, normalised=config.normalised, tick=tick)
            own = {tree.index: rewards for tree, rewards in zip(mine, found, strict=True)}
        except UserError as error:  # all processes must come to the gathering, and all of them end
            own = error
    parts: list[Any] = [own]
    if runtime.world_size() > 1:
        import torch.distributed as dist

        parts = [None] * runtime.world_size()
        dist.all_gather_object(parts, own)
    for part in parts:
        if isinstance(part, UserError):
            raise part
    return {index: rewards for part in parts for index, rewards in part.items()}


def _lines(answers: Answers, rewards: dict[int, np.ndarray]) -> list[str]:
    """The output, a line for every row of the input; null where there is no reward."""
    lines = {row.index: _line(scored_row(row.row, None)) for row in answers.bad}
    for row in answers.rows:
        found = rewards.get(row.index)
        reward = None if found is None else found.tolist() if row.many else float(found[0])
        lines[row.index] = _line(scored_row(row.row, reward))
    return [lines[index] for index in range(answers.size)]


def _line(row: dict[str, Any]) -> str:
    """JSON with letters as they are, but for a row that holds a lone surrogate, which no UTF-8 can."""
    line = line_of(row)
    try:
        line.encode()
    except UnicodeEncodeError:
        return json.dumps(row, default=str) + "\n"
    return line


def scored_row(row: dict[str, Any], reward: float | list[float] | None) -> dict[str, Any]:
    """The row with its reward behind all other columns. One that has this name is kept as input_reward."""
    free = f"input_{OURS}"
    while free in row:  # scored before, and before that
        free = f"input_{free}"
    return {**{free if name == OURS else name: value for name, value in row.items()}, OURS: reward}


def _write(config: ScoreConfig, run: Run | None, lines: Sequence[str], inputs: dict[str, str]) -> str:
    """Write everything at once; what was there before stays until then. Returns the file's name for the last message."""
    if run is None:
        sys.stdout.writelines(lines)
        sys.stdout.flush()
        return ""
    output = _output(config, run)
    partial = output.with_name(output.name + ".partial")
    try:
        with disk_errors("the rewards", output, kept="Nothing was replaced."):
            with partial.open("w", encoding="utf-8") as sink:
                sink.writelines(lines)
            sync(partial)
            write_json(run.folder / "inputs.json", inputs)  # from here on the folder and the output are this run's
            partial.replace(output)
            sync(output.parent)
    finally:
        partial.unlink(missing_ok=True)
    return f"{output}: "


def inputs_of(model: RewardModel, answers: Answers) -> dict[str, str]:
    """What the rewards depend on beside the config."""
    return {
        "model": model.identity,
        "tokenizer": model.renderer.tokenizer_hash,
        "template": model.renderer.template_hash,
        "answers": answers.fingerprint,
    }


def summary(rows: Sequence[Answered], rewards: dict[int, np.ndarray], seconds: float) -> str:
    """One line: how much, how fast, the rewards' mean and spread, and how often they agree with the rows' ranks."""
    every = np.concatenate(list(rewards.values()))
    line = (
        f"{len(rewards)} rows, {len(every)} answers, {len(every) / seconds:,.0f} answers/s in {seconds:.1f} s, "
        f"rewards {every.mean():.3f} on average, standard deviation {every.std():.3f}"
    )
    right: list[np.ndarray] = [np.zeros(0)]  # of every comparison: 1, or a half where the rewards are equal
    for row in rows:
        if row.ranks is not None and row.index in rewards:
            ranks, mine = np.asarray(row.ranks), rewards[row.index]
            better, worse = np.nonzero(ranks[:, None] < ranks[None, :])
            right.append((np.sign(mine[better] - mine[worse]) + 1) / 2)
    agreed = np.concatenate(right)
    return f"{line}, right in {agreed.mean():.1%} of {len(agreed)} comparisons" if len(agreed) else line
