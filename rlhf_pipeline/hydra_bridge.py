"""The only module that knows sys.argv, launcher flags and Hydra's internals."""

from __future__ import annotations

import errno
import gc
import os
import re
import sys
from importlib import import_module
from itertools import product
from typing import TYPE_CHECKING, Any

from rlhf_pipeline import config
from rlhf_pipeline.errors import UserError

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from omegaconf import DictConfig

QUIET_RANK = ["hydra/hydra_logging=disabled"]


def run_stage(stage: str, args: list[str], *, recipe: str | None = None) -> None:
    """Check the config, then hand `args` to Hydra and the composed config object to the stage's recipe, or another one.

    A user's mistake ends the process with its message and exit code 2.
    """
    args = [a for a in args if not a.startswith(("--local_rank", "--local-rank"))]  # launchers add it
    if _rank() > 0:
        args += QUIET_RANK  # one writer per run directory
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # a bug deserves its traceback; a mistake never gets here
    try:
        preflight(stage, args)
    except UserError as error:
        leave(error)

    import hydra
    from hydra.core.hydra_config import HydraConfig

    from rlhf_pipeline.config.compose import to_object

    recipe_module = f"rlhf_pipeline.recipes.{recipe or stage}"

    def task(node: DictConfig) -> None:
        cfg = to_object(node)
        cfg.run_dir = HydraConfig.get().runtime.output_dir  # in a sweep it holds the job's number
        # What is imported and tokenised from here on stays: looking for garbage in it costs a quarter of the start-up.
        # The training loop switches the collector on again.
        gc.disable()
        try:
            import_module(recipe_module).main(cfg)
        except UserError as error:
            leave(error)
        except OSError as error:  # of the small files; saving a state or an artifact says more
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            place = error.filename or cfg.run_dir
            leave(
                UserError(
                    f"{place}: the disk is full; what was saved is intact. Make room and run the same command again."
                )
            )

    task.__module__ = recipe_module  # Hydra names the job after it
    config.register()
    entry = hydra.main(version_base="1.3", config_path=str(config.config_dir()), config_name=stage)(task)
    saved, sys.argv = sys.argv, [f"rlhf {stage}", *_overrides_first(stage, args)]
    try:
        entry()
    finally:
        sys.argv = saved


def preflight(stage: str, args: list[str]) -> None:
    """Refuse a config that cannot run, before torch is imported.

    Raises:
        UserError: naming every problem.
    """
    from rlhf_pipeline.config.compose import compose_node, examine, refuse

    parsed = _parser(stage).parse_args(_overrides_first(stage, args))
    if parsed.hydra_help or parsed.shell_completion or parsed.experimental_rerun:
        return
    if parsed.config_path:
        raise UserError(
            "--config-path: would hide the configs that rlhf comes with; --config-dir adds a folder to them"
        )
    if parsed.config_dir and not os.path.isdir(parsed.config_dir):
        raise UserError(f"--config-dir {parsed.config_dir}: there is no such folder")
    where = {"extra_dir": parsed.config_dir, "config_name": parsed.config_name}
    if parsed.help or parsed.info or parsed.cfg:  # these show a config that may still lack values
        _, refused = compose_node(stage, parsed.overrides, **where)
        refuse(stage, [line for lines in refused.values() for line in lines])
        return
    jobs = _jobs(parsed.overrides, parsed.config_dir) if parsed.multirun else [parsed.overrides]
    problems = [line for job in jobs for line in examine(stage, job, **where)[1]]
    refuse(stage, list(dict.fromkeys(problems)))  # many jobs may share one


def leave(error: UserError) -> None:
    """Print a user's mistake (on the first rank only) and end with exit code 2."""
    if _rank() == 0:
        sys.stderr.write(f"{error}\n")
    raise SystemExit(2)


def complete(stage: str, typed: str) -> list[str]:
    """Candidates for the override under the cursor; an unfinished line completes to nothing.

    `typed` is the command line up to the cursor, its words divided by blanks or new lines.
    """
    from hydra._internal.core_plugins.bash_completion import BashCompletion
    from hydra.errors import HydraException

    from rlhf_pipeline.config.schema import choices
    from rlhf_pipeline.config.stages import STAGES, TRAINING

    line = re.sub(r"\s+", " ", typed)
    split_at_equals = " =" in line  # bash breaks words at "=" and ":"; zsh and fish do not
    line = re.sub(r" ([=:]) ?", r"\1", line).partition(f" {stage}")[2]
    first, blank, rest = line.removeprefix(" ").partition(" ")
    stages = []
    if stage == "prep" and first in TRAINING and blank:  # prep takes the arguments of a stage
        stage, line = first, f" {rest}"
    elif stage == "prep" and not blank:
        stages = [name for name in TRAINING if name.startswith(first)]
    word = line.rpartition(" ")[2]
    key, is_value, value = word.partition("=")
    extra_dir = re.search(r" (?:--config-dir|-cd)[ =](\S+)", line)
    config.register()
    try:
        found = BashCompletion(_loader(extra_dir and extra_dir[1]))._query(config_name=stage, line=line)
    except HydraException:
        return stages
    found = [*stages, *found]
    if is_value and (known := choices(STAGES[stage], key)):  # Hydra offers only the present value
        found = [f"{key}={one}" for one in known if one.startswith(value)]
    return [c.partition("=")[2] for c in found] if split_at_equals and is_value else found


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _loader(extra_dir: str | None) -> Any:
    """Hydra's own loader over conf/ and the folder of --config-dir."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.utils import create_config_search_path

    path = create_config_search_path(str(config.config_dir()))
    if extra_dir:
        path.append("command-line", f"file://{os.path.abspath(extra_dir)}")
    return ConfigLoaderImpl(path)


def _parser(stage: str) -> ArgumentParser:
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()
    parser.prog = f"rlhf {stage}"
    return parser


def _overrides_first(stage: str, args: list[str]) -> list[str]:
    """Hydra's parser takes the overrides that stand before a flag and refuses those behind it."""
    parsed, behind = _parser(stage).parse_known_args(args)
    if not behind or any(a.startswith("-") for a in behind):
        return args
    overrides = [*parsed.overrides, *behind]
    return [*overrides, *(a for a in args if a not in overrides)]


def _jobs(overrides: list[str], extra_dir: str | None) -> list[list[str]]:
    """The overrides of every job of a sweep. Intervals, which only some sweepers know, are left to those."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create(config_loader=_loader(extra_dir)).parse_overrides(overrides)
    except HydraException:  # no override at all: composing says which one
        return [overrides]
    values: list[list[str]] = []
    for override in parsed:
        if override.is_discrete_sweep():
            values.append([f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()])
        elif not override.is_sweep_override():
            values.append([str(override.input_line)])
    return [list(job) for job in product(*values)]
