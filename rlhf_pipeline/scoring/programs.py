"""Python programs that score: `module:function`, called as `function(episodes)` for one number an episode.

The module is looked up as Python does it, and then in the current directory. What goes wrong in somebody's program is
told with its type, its message and the program's line, not with a traceback through this package.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.scoring.episodes import Episode

Program = Callable[[Sequence[Episode]], Any]
SHOWN = 10  # names that a message lists


def open_program(path: str) -> Program:
    """The function that `module:function` names.

    Raises:
        UserError: where there is none, with what there is; for whatever importing the module raises.
    """
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", path):
        raise UserError(f"program={path}: write module:function, such as my_rewards:correct")
    name, _, function = path.partition(":")
    module = _imported(path, name)
    found = getattr(module, function, None)
    if not callable(found):
        own = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        is_ = "is no function" if found is not None else "no such function"
        raise UserError(f"program={path}: {is_} in {module.__file__ or name}; {_listed('it has', own)}")
    return found


def score(program: Program, path: str, episodes: Sequence[Episode]) -> np.ndarray:
    """What the program gives, float64 [n].

    Raises:
        UserError: for whatever it raises, for another number of scores, and for scores that are no numbers.
    """
    try:
        answer = program(tuple(episodes))
        if isinstance(answer, dict | set | str):  # as a list it would be something else
            raise UserError(f"program={path}: it returned a {type(answer).__name__}; return a list of numbers")
        given = list(answer)  # a generator runs here
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        file = getattr(sys.modules.get(path.partition(":")[0]), "__file__", None)
        raise UserError(f"program={path}: {_told(error, file)}") from error
    if len(given) != len(episodes):
        raise UserError(f"program={path}: {len(given)} scores for {len(episodes)} episodes; return one for each")
    return np.asarray([_number(value, path, episode) for value, episode in zip(given, episodes, strict=True)])


def _number(value: Any, path: str, episode: Episode) -> float:
    """Of Python, numpy or torch alike; true is 1."""
    try:
        if isinstance(value, str | bytes):  # float() would read it
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        shown = f"{value!r:.80} ({type(value).__name__})"
        raise UserError(f"program={path}: the score of {episode.origin} is no number: {shown}") from None


def _imported(path: str, name: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:  # last, so that no file of the user's takes the place of a library
        sys.path.append(here)
    importlib.invalidate_caches()
    file = None
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None:
            file = spec.origin
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if name != missing and not name.startswith(f"{missing}."):  # a library that the program needs
            raise UserError(f"program={path}: {_told(error, file)}") from error
    except (Exception, SystemExit) as error:
        raise UserError(f"program={path}: {_told(error, file)}") from error
    beside = [entry.stem for entry in sorted(Path.cwd().glob("*.py"))]
    raise UserError(
        f"program={path}: there is no module {name}; {_listed(f'{here} has', beside)}. "
        "Run from the folder that holds it, or install it"
    )


def _listed(what: str, names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if names[SHOWN:] else ""
    return f"{what} {', '.join(names[:SHOWN]) or 'none'}{more}"


def _told(error: BaseException, file: str | None) -> str:
    """An exception with the deepest line of the program that it came through."""
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, SyntaxError) and error.filename:
        return f"{type(error).__name__}: {error.msg} ({error.filename}:{error.lineno})"
    place = next((f" ({frame.filename}:{frame.lineno})" for frame in reversed(frames) if frame.filename == file), "")
    return f"{type(error).__name__}: {error}{place}"
