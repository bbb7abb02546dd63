"""The only module that knows sys.argv, launcher flags and Hydra's internals."""

from __future__ import annotations

import gc
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from itertools import product
from typing import TYPE_CHECKING, Any

from rlhf_pipeline import config, failures, peers, runtime
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.files import check_folder

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from omegaconf import DictConfig

QUIET_RANK = ["hydra/hydra_logging=disabled"]
# `rlhf plan` opens no data and no tokenizer, has ways of its own to know a model's shape, and leaves no folder behind.
NOT_READ_BY_PLAN = ("data.train", "mix.train", "ptx.train", "normalise.train", "model", "model.shape", "tokenizer.path")
PLAN, NO_FOLDER = "plan", "hydra.run.dir=."


def run_stage(stage: str, args: list[str], *, recipe: str | None = None) -> None:
    """Check the config, then hand `args` to Hydra and the composed config object to the stage's recipe, or another one.

    A user's mistake ends the process with its message and exit code 2, a failure with its message and exit code 1.
    """
    failures.settle_streams()
    name = stage if recipe is None else f"{recipe} {stage}"  # as it was typed
    try:
        runtime.check_place()
    except UserError as error:  # told by every process, for it is about that one
        raise SystemExit(failures.leave(error, name)) from None
    with _leaving(name):
        _run_stage(stage, args, name, recipe or stage)
        sys.stdout.flush()  # or the interpreter would, and say what it could not in its own way


@contextmanager
def _leaving(name: str) -> Iterator[None]:
    """Whatever is raised within ends the process, by a message and its exit code."""
    try:
        yield
    except Exception as error:
        raise SystemExit(failures.leave(error, name, first=peers.is_first())) from None


def _run_stage(stage: str, args: list[str], name: str, recipe: str) -> None:
    args = [a for a in args if not a.startswith(("--local_rank", "--local-rank"))]  # launchers add it
    if _rank() > 0:
        args += QUIET_RANK  # one writer per run directory
    if recipe == PLAN:
        args = [NO_FOLDER, *args]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come through as they are
    preflight(stage, args, unread=NOT_READ_BY_PLAN if recipe == PLAN else ())

    import hydra
    from hydra.core.hydra_config import HydraConfig

    from rlhf_pipeline.config.compose import to_object

    recipe_module = f"rlhf_pipeline.recipes.{recipe}"

    def task(node: DictConfig) -> None:
        cfg = to_object(node)
        cfg.run_dir = HydraConfig.get().runtime.output_dir  # in a sweep it holds the job's number
        # What is imported and tokenised from here on stays: looking for garbage in it costs a quarter of the start-up.
        # The training loop switches the collector on again.
        gc.disable()
        with _leaving(name):  # within the task: what gets out of it, Hydra announces with all overrides
            try:
                import_module(recipe_module).main(cfg)
            except OSError as error:  # of the small files; saving a state or an artifact says more
                if not failures.disk_is_full(error):
                    raise
                place = error.filename or cfg.run_dir
                raise UserError(
                    f"{place}: the disk is full; what was saved is intact. Make room and run the same command again."
                ) from error

    task.__module__ = recipe_module  # Hydra names the job after it
    config.register()
    entry = hydra.main(version_base="1.3", config_path=str(config.config_dir()), config_name=stage)(task)
    saved, sys.argv = sys.argv, [f"rlhf {stage}", *_overrides_first(stage, args)]
    try:
        entry()
    finally:
        sys.argv = saved


def preflight(stage: str, args: list[str], *, unread: Sequence[str] = ()) -> None:
    """Refuse a config that cannot run, before torch is imported. Problems of keys that are `unread` are none.

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
    configs, problems = zip(*(examine(stage, job, **where) for job in jobs), strict=True)
    told = dict.fromkeys(line for lines in problems for line in lines)  # many jobs may share one
    refuse(stage, [line for line in told if re.split(r"[=:]", line)[0] not in unread])
    for one in configs if not unread else ():
        check_folder(one.run_dir)


def names_folder(word: str) -> bool:
    """Whether an argument is a path and neither `key=value` nor a flag. `./a=b` is a path for its slash."""
    return not re.match(r"-|[+~]*[\w.@]*=|~", word)


def quoted(text: str) -> str:
    """`text` as a value that Hydra and OmegaConf leave as it is, whatever stands in it."""
    from hydra.core.override_parser.types import Quote, QuotedString

    plain = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)  # no interpolation
    return QuotedString(text=plain, quote=Quote.single).with_quotes()


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
    if stage in ("prep", "plan") and first in TRAINING and blank:  # they take the arguments of a stage
        stage, line = first, f" {rest}"
    elif stage == "report" and first and blank and names_folder(first):
        line = f" {rest}"
    elif stage in ("prep", "plan") and not blank:
        stages = [name for name in TRAINING if name.startswith(first)]
    if stage not in STAGES:  # `plan`, before it is said of what
        return stages
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
