"""Composes and checks a stage's config before anything heavy is imported, and tells every problem at once.

Hydra stops at the first override that it refuses. Here each override is tried by itself when the whole fails,
so that a user with three typing mistakes reads three lines, each with the key as typed and the nearest valid one.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlhf_pipeline.config import config_dir, register
from rlhf_pipeline.config.check import check
from rlhf_pipeline.errors import UserError


def compose(stage: str, overrides: list[str], *, extra_dir: str | None = None, config_name: str | None = None) -> Any:
    """The checked config object of `stage`.

    Raises:
        UserError: listing every problem found.
    """
    node, problems = compose_node(stage, overrides, extra_dir=extra_dir, config_name=config_name)
    problems += [f"{key}: has no value; add {key}=..." for key in sorted(OmegaConf.missing_keys(node))]
    if not any("has no value" in p for p in problems):
        problems += check(to_object(node))
    refuse(stage, problems)
    return to_object(node)


def compose_node(
    stage: str, overrides: list[str], *, extra_dir: str | None = None, config_name: str | None = None
) -> tuple[DictConfig, list[str]]:
    """The composed node, without the overrides that could not be applied, and a line for each of those."""
    register()
    name = config_name or stage
    searchpath = [f"hydra.searchpath=[file://{Path(extra_dir).resolve()}]"] if extra_dir else []
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        try:
            return hydra_compose(name, [*searchpath, *overrides]), []
        except (HydraException, OmegaConfBaseException):
            pass
        accepted: list[str] = []
        problems: list[str] = []
        node = hydra_compose(name, searchpath)
        for override in sorted(overrides, key=lambda o: not _is_group_choice(o)):
            try:
                node = hydra_compose(name, [*searchpath, *accepted, override])
                accepted.append(override)
            except (HydraException, OmegaConfBaseException) as error:
                problems.append(_explain(override, error, node))
        return node, problems


def refuse(stage: str, problems: list[str]) -> None:
    """Raise UserError if there is any problem."""
    if problems:
        count = "a problem" if len(problems) == 1 else f"{len(problems)} problems"
        lines = "\n".join(f"  - {problem}" for problem in problems)
        raise UserError(f"rlhf {stage}: {count} with the config\n{lines}\nrlhf {stage} --help lists the options.")


def to_object(node: DictConfig) -> Any:
    """Real dataclasses from a composed node."""
    try:
        return OmegaConf.to_object(node)
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key or 'config'}: {_first_line(error)}") from None


def _is_group_choice(override: str) -> bool:
    key = override.lstrip("+~").partition("=")[0].partition("@")[0]
    return (config_dir() / key).is_dir()


def _explain(override: str, error: Exception, node: DictConfig) -> str:
    """One line: the override as typed, what is wrong, the nearest valid spelling."""
    key, _, value = override.lstrip("+~").partition("=")
    if _is_group_choice(override):
        options = sorted(path.stem for path in (config_dir() / key).glob("*.yaml"))
        return f"{override}: there is no such choice{_nearest(value, options)}; {key} is one of {', '.join(options)}"
    cause = error.__cause__ or error
    text = _first_line(cause)
    if OmegaConf.select(node, key, default=_ABSENT) is not _ABSENT and "not in" not in text:
        return f"{override}: {text}"
    if isinstance(error, OmegaConfBaseException) or re.search(r"not in|No match|Could not override|append", str(error)):
        return f"{override}: there is no key {key!r}{_nearest(key, known_keys(node))}"
    return f"{override}: {text}"


_ABSENT = object()


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]


def known_keys(node: DictConfig) -> list[str]:
    """Every dotted key that an override can name."""
    keys: list[str] = []

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for name, item in value.items():
                keys.append(f"{prefix}{name}")
                walk(f"{prefix}{name}.", item)

    walk("", OmegaConf.to_container(node, resolve=False, throw_on_missing=False))
    return keys


def _nearest(typed: str, options: list[str]) -> str:
    """' (did you mean x?)' for the closest option: by the whole key, else by its last part."""
    close = difflib.get_close_matches(typed, options, n=1, cutoff=0.75)
    if not close:
        last = {option: option.rpartition(".")[2] for option in options}
        name = difflib.get_close_matches(typed.rpartition(".")[2], list(last.values()), n=1, cutoff=0.6)
        close = [option for option, part in last.items() if name and part == name[0]][:1]
    return f" (did you mean {close[0]}?)" if close else ""
