"""Checks of single values, by whatever section they are in. Every complaint names the key and says what to do."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from rlhf_pipeline.config.schema import Algorithm, OptimConfig

SEEDS = 2**32  # so many; a step's seed is made of it by multiplying
LARGEST = 2**53  # whole number that every part of the program takes, JSON and floats too
NAME_BYTES = 200  # of a folder's name; file systems take 255, and files of ours have more in theirs

SOURCE_KEYS = ("path", "weight", "format", "split", "columns")


def finite(section: Any, prefix: str = "") -> Iterator[str]:
    """nan and inf pass for numbers, and nan for any comparison; Python has larger whole numbers than what they go to."""
    for f in dataclasses.fields(section):
        value = getattr(section, f.name)
        if dataclasses.is_dataclass(value):
            yield from finite(value, f"{prefix}{f.name}.")
        elif isinstance(value, dict):
            for name, member in value.items():
                if dataclasses.is_dataclass(member):
                    yield from finite(member, f"{prefix}{f.name}.{name}.")
        elif isinstance(value, float) and not math.isfinite(value):
            yield f"{prefix}{f.name}={value}: must be a finite number"
        elif isinstance(value, int) and not isinstance(value, bool):
            if f.name == "seed" and not 0 <= value < SEEDS:
                yield f"{prefix}seed={value}: must be at least 0 and less than {SEEDS}"
            elif abs(value) > LARGEST:
                yield f"{prefix}{f.name}={value}: is too large; at most {LARGEST}"


def columns(key: str, columns: Any) -> Iterator[str]:
    if columns is not None and not names(columns):
        yield f"{key}={columns}: must map fields of ours to columns of yours, as in {{prompt: question}}"


def names(value: Any) -> bool:
    """Whether it is a mapping from names to names that is not empty."""
    return isinstance(value, dict) and bool(value) and all(isinstance(v, str) and v for kv in value.items() for v in kv)


def source(key: str, value: Any) -> Iterator[str]:
    if value is None:
        yield f"{key}: has no value; add {key}=..."
        return
    entries = value if isinstance(value, list) else [value]
    if not entries:
        yield f"{key}=[]: names nothing; add a path, a glob, a folder or a hub id"
    for entry in entries:
        yield from _entry(key, entry)


def _entry(key: str, entry: Any) -> Iterator[str]:
    """One source: its path, or a mapping that weighs it or says more about it."""
    if isinstance(entry, str) and entry:
        return
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str) or not entry["path"]:
        yield f"{key}={entry!r}: must be a path, a glob, a folder, a hub id, {{path: ..., weight: ...}}, or a list of them"
        return
    for name in entry.keys() - SOURCE_KEYS:
        yield f"{key}: {name!r} says nothing about {entry['path']}; known are {', '.join(SOURCE_KEYS)}"
    weight = entry.get("weight", 1)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        yield f"{key}: weight={weight!r} of {entry['path']}: must be a number above 0 (2: twice an epoch, 0.5: half of it)"


def optimiser(key: str, optim: OptimConfig) -> Iterator[str]:
    yield from positive(f"{key}.lr", optim.lr)
    yield from positive(f"{key}.eps", optim.eps)
    if len(optim.betas) != 2:
        yield f"{key}.betas={optim.betas}: Adam has two"
    for i, beta in enumerate(optim.betas):
        if not 0 <= beta < 1:
            yield f"{key}.betas[{i}]={beta}: must be at least 0 and less than 1"
    if optim.algorithm is Algorithm.rmsprop and optim.weight_decay > 0:
        decay = f"{key}.weight_decay={optim.weight_decay}"
        yield f"{decay}: RMSprop has no decoupled weight decay; use 0, or {key}.algorithm=adamw"
    yield from between(f"{key}.final_lr_fraction", optim.final_lr_fraction, 0, 1)
    yield from between(f"{key}.warmup_fraction", optim.warmup_fraction, 0, 1)
    yield from between(f"{key}.warmup_start_fraction", optim.warmup_start_fraction, 0, 1)
    for name in ("weight_decay", "max_grad_norm", "warmup_steps"):
        if getattr(optim, name) < 0:
            yield f"{key}.{name}={getattr(optim, name)}: must not be negative"


def folder_name(key: str, what: str, name: str) -> Iterator[str]:
    """For names of runs and systems, which become folders and are shown."""
    if not name.strip() or "/" in name or name.startswith("."):
        yield f"{key}: {what} is a folder name, without a slash and not starting with a dot"
    elif not name.isprintable():
        yield f"{key}: {what} is shown, and has control characters in it; take them out"
    elif len(name.encode(errors="backslashreplace")) > NAME_BYTES:
        yield f"{key[:60]}...: {what} is a folder name, of at most {NAME_BYTES} bytes"


def positive(key: str, value: float) -> Iterator[str]:
    if not value > 0:
        yield f"{key}={value}: must be more than 0"


def between(key: str, value: float, low: float, high: float) -> Iterator[str]:
    if not low <= value <= high:
        yield f"{key}={value}: must be between {low} and {high}"
