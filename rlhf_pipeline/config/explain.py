"""Says in one line why Hydra refuses an override: what is wrong, and the nearest valid spelling."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

# What composing raises for a user's mistake; the others than the first three escape from Hydra's own code.
REFUSALS = (
    HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, AttributeError, AssertionError, OSError,
    RecursionError, TypeError
)  # fmt: skip
SHOWN = 300  # characters of what was typed, or of a path, in a message
IN_A_FILE = re.compile(r"In '(?P<config>[^']+)': \w+ raised while composing config:")


def explain(override: str, error: Exception, node: DictConfig, folders: list[Path]) -> list[str]:
    """What is wrong with an override: one line, or for a faulty file one for each of its values."""
    key = key_of(override)
    cause = error.__cause__ or error
    text = first_line(cause)
    if isinstance(error, OverrideParseException) or not key:
        return [f"is not key=value; a value with special characters needs quotes ({text})"]
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return [_missing_choice(key, error)]
    if (file := _chosen(override, folders)) and (fault := _fault(file)):
        return [f"{file}: {fault}"]
    if isinstance(error, RecursionError):
        return ["its defaults lead back to itself, or it is nested too deeply"]
    if isinstance(error, OSError):
        return [f"{'' if error.filename is None else f'{str(error.filename)[:SHOWN]}: '}{error.strerror}"]
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return [f"{error.problem_mark.name}, line {error.problem_mark.line + 1}: not valid YAML: {error.problem}"]
    if faulty := IN_A_FILE.match(str(error)):
        return _of_file(faulty["config"], node, folders) or [" ".join(str(error).split("\n")[1:3])]
    if isinstance(cause, ConfigKeyError | ConfigAttributeError) or text.startswith("Could not delete"):
        return [no_such_key(str(getattr(cause, "full_key", None) or key), node)]
    if isinstance(error, ValueError) and (choices := group_files(key, folders)):
        return [f"{key} is one of {', '.join(choices)}"]
    if isinstance(error, AssertionError | AttributeError):
        return [_below_null(key, node, folders)]
    if text.startswith(("Could not append", "Multiple values")):
        return [f"{key} is there already; leave out the +"]
    if text.startswith("Ambiguous value"):
        return ["several values; add -m to run each, or write [...] for a list, or quote them as one"]
    return [text]


def _chosen(override: str, folders: list[Path]) -> Path | None:
    """The file that an override of a group chooses."""
    group, choice = key_of(override), override.partition("=")[2]
    if not re.fullmatch(r"[\w.-]{1,200}", choice) or not re.fullmatch(r"[\w/-]{1,200}", group):
        return None
    return next((f for folder in reversed(folders) if (f := folder / group / f"{choice}.yaml").is_file()), None)


def _fault(file: Path) -> str:
    """What makes a config file none, whatever its values; empty where nothing does."""
    try:
        text = file.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
    except UnicodeDecodeError as error:
        return f"not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8"
    except (yaml.YAMLError, ValueError, RecursionError, OSError):
        return ""  # told with its line elsewhere
    if not isinstance(content, dict):
        return "is empty" if content is None else f"holds a {type(content).__name__}, not a mapping of keys to values"
    if not isinstance(content.get("defaults", []), list):
        return "its `defaults` must be a list"
    if file.parent.name == "experiment" and "@package" not in text:
        return "its first line must be: # @package _global_"
    return ""


def _missing_choice(key: str, error: MissingConfigException) -> str:
    group, _, choice = str(error.missing_cfg_file).rpartition("/")
    options = list(error.options or [])
    listed = f"there is no such choice{nearest(choice, options)}; {group} is one of {', '.join(options)}"
    return listed if group == key else f"its defaults ask for {group}={choice}, and {listed}"


def no_such_key(key: str, node: DictConfig) -> str:
    """Says that `key` is none of the config's, and which one is nearest."""
    parent = OmegaConf.select(node, key.rpartition(".")[0], default=None)
    if isinstance(parent, DictConfig) and OmegaConf.get_type(parent) is dict:
        return f"{key} is not set yet; write +{key}=... to add it"
    return f"there is no key {key!r}{nearest(key, known_keys(node))}"


def _below_null(key: str, node: DictConfig, folders: list[Path]) -> str:
    """OmegaConf stumbles over model.shape.hidden while model.shape is null."""
    parts = key.split(".")
    above = [".".join(parts[:i]) for i in range(1, len(parts))]
    empty = next((k for k in above if OmegaConf.select(node, k) is None), key)
    return (
        f"{empty} is null; choose a whole one first: {parts[0]} is one of {', '.join(group_files(parts[0], folders))}"
    )


def _of_file(config: str, node: DictConfig, folders: list[Path]) -> list[str]:
    """Every value of a config file that the schema refuses, each tried by itself on the composed node."""
    path = next(p for folder in reversed(folders) if (p := folder / f"{config}.yaml").is_file())
    package = re.search(r"^#\s*@package\s+(\S+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    prefix = package[1] if package else config.rpartition("/")[0].replace("/", ".")
    content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    assert isinstance(content, dict)
    content.pop("defaults", None)
    problems = []
    for key, value in _leaves(content, "" if prefix in ("_global_", "") else f"{prefix}."):
        try:
            OmegaConf.update(node.copy(), key, value)
        except (ConfigKeyError, ConfigAttributeError) as error:
            problems.append(f"{path}: {no_such_key(str(error.full_key or key), node)}")
        except REFUSALS as error:
            problems.append(f"{path}: {key}: {first_line(error)}")
    return problems


def _leaves(values: dict[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


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


def key_of(override: str) -> str:
    """The key or group that an override names."""
    return override.partition("=")[0].lstrip("+~").partition("@")[0]


def group_files(group: str, folders: list[Path]) -> list[str]:
    """The files of a config group; none where there is no such group."""
    if not 0 < len(group) < SHOWN:  # longer than a file system allows
        return []
    return sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def nearest(typed: str, options: list[str]) -> str:
    """' (did you mean x?)' for the closest option: by the whole key, else by its last part."""
    close = difflib.get_close_matches(typed, options, n=1, cutoff=0.75)
    if not close:
        last = {option: option.rpartition(".")[2] for option in options}
        name = difflib.get_close_matches(typed.rpartition(".")[2], list(last.values()), n=1, cutoff=0.6)
        close = [option for option, part in last.items() if name and part == name[0]][:1]
    return f" (did you mean {close[0]}?)" if close else ""
