"""The only module that knows sys.argv, launcher flags and Hydra's internals."""

from __future__ import annotations

import os
import re
import sys
from importlib import import_module
from itertools import chain
from typing import TYPE_CHECKING

from rlhf_pipeline import config
from rlhf_pipeline.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

QUIET_RANK = ["hydra/hydra_logging=disabled"]


def run_stage(stage: str, args: list[str]) -> None:
    """Check the config, then hand `args` to Hydra and the composed config object to the stage's recipe.

    A user's mistake ends the process with its message and exit code 2.
    """
    args = [a for a in args if not a.startswith(("--local_rank", "--local-rank"))]  # launchers add it
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # a bug deserves its traceback; a mistake never gets here
    try:
        preflight(stage, args)
    except UserError as error:
        leave(error)

    import hydra
    from hydra.core.hydra_config import HydraConfig

    from rlhf_pipeline.config.compose import to_object

    recipe_module = f"rlhf_pipeline.recipes.{stage}"

    def task(node: DictConfig) -> None:
        cfg = to_object(node)
        cfg.run_dir = HydraConfig.get().runtime.output_dir  # in a sweep it holds the job's number
        try:
            import_module(recipe_module).main(cfg)
        except UserError as error:
            leave(error)

    task.__module__ = recipe_module  # Hydra names the job after it
    config.register()
    entry = hydra.main(version_base="1.3", config_path=str(config.config_dir()), config_name=stage)(task)
    if _rank() > 0:
        args = [*args, *QUIET_RANK]  # one writer per run directory
    saved, sys.argv = sys.argv, [f"rlhf {stage}", *args]
    try:
        entry()
    finally:
        sys.argv = saved


def preflight(stage: str, args: list[str]) -> None:
    """Refuse a config that cannot run, before torch is imported.

    Raises:
        UserError: naming every problem.
    """
    from hydra._internal.utils import get_args_parser

    from rlhf_pipeline.config.compose import compose, compose_node, refuse

    saved, sys.argv = sys.argv, [f"rlhf {stage}", *args]  # argparse prints it as the program's name
    try:
        parsed = get_args_parser().parse_args(args)
    finally:
        sys.argv = saved
    if parsed.help or parsed.hydra_help or parsed.shell_completion or parsed.info or parsed.experimental_rerun:
        return
    if parsed.config_dir and not os.path.isdir(parsed.config_dir):
        raise UserError(f"--config-dir {parsed.config_dir}: there is no such folder")
    where = {"extra_dir": parsed.config_dir, "config_name": parsed.config_name}
    if parsed.cfg:
        refuse(stage, compose_node(stage, parsed.overrides, **where)[1])
        return
    jobs = _sweep(parsed.overrides) if parsed.multirun else [parsed.overrides]
    for overrides in jobs:
        compose(stage, [o for o in overrides if not o.lstrip("+~").startswith(("hydra.", "hydra/"))], **where)


def leave(error: UserError) -> None:
    """Print a user's mistake (on the first rank only) and end with exit code 2."""
    if _rank() == 0:
        sys.stderr.write(f"{error}\n")
    raise SystemExit(2)


def complete(stage: str, typed: str) -> list[str]:
    """Candidates for the override under the cursor; an unfinished line completes to nothing."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.core_plugins.bash_completion import BashCompletion
    from hydra._internal.utils import create_config_search_path
    from hydra.errors import HydraException

    line = re.sub(r"\s+", " ", typed)
    split_at_equals = " =" in line  # bash breaks words at "="; zsh and fish do not
    line = line.replace(" = ", "=").replace(" =", "=").partition(f" {stage}")[2]
    config.register()
    loader = ConfigLoaderImpl(create_config_search_path(str(config.config_dir())))
    try:
        found = BashCompletion(loader)._query(config_name=stage, line=line)
    except HydraException:
        return []
    typing_a_value = "=" in line.rpartition(" ")[2]
    return [c.partition("=")[2] for c in found] if split_at_equals and typing_a_value else found


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _sweep(overrides: list[str]) -> list[list[str]]:
    """One list of overrides for each value that a sweep tries, the other sweeps at their first value.

    Sweeps whose values Hydra finds itself (`glob`) are left to Hydra.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    fixed: list[str] = []
    sweeps: list[list[str]] = []
    for override in OverridesParser.create().parse_overrides(overrides):
        if not override.is_sweep_override():
            fixed.append(str(override.input_line))
        elif not override.is_glob_sweep() if hasattr(override, "is_glob_sweep") else override.is_discrete_sweep():
            key = override.get_key_element()
            sweeps.append([f"{key}={value}" for value in override.sweep_string_iterator()])
    first = [values[0] for values in sweeps]
    varied = chain.from_iterable(
        [[*fixed, *first[:i], value, *first[i + 1 :]] for value in values] for i, values in enumerate(sweeps)
    )
    return list(varied) or [fixed]
