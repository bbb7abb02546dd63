"""What a process under test does to itself at an exact place. Runs in the forked child, before the command.

INJECT is a JSON list of [rank, what, ...]:
    [rank, "at", "module:function:call", signal]   a signal to itself just before that call of the function
    [rank, "nan", "loss" | "gradient", update]     what that update of a model computes is not a number
    [rank, "clock", update, seconds]               from that update on the clock is off by so much
    [rank, "file_size", bytes]                     no file can grow beyond that, as on a file system with small files
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

UPDATES = ("rlhf_pipeline.fit", "rlhf_pipeline.ppo.updates")  # who calls `update`


def begin(told: str) -> None:
    """Prepare the faults of this rank."""
    for rank, what, *arguments in json.loads(told):
        if rank == int(os.environ.get("RANK", "0")):
            {"at": at, "nan": nan, "clock": clock, "file_size": file_size}[what](*arguments)


def at(place: str, number: int) -> None:
    module, name, call = place.split(":")
    _before(module, name, int(call), lambda: os.kill(os.getpid(), number))


def clock(update: int, seconds: float) -> None:
    def jump() -> None:
        now, now_ns = time.time, time.time_ns
        time.time = lambda: now() + seconds
        time.time_ns = lambda: now_ns() + int(seconds * 1e9)

    for module in UPDATES:
        _before(module, "update", update, jump)


def file_size(most: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def nan(what: str, number: int) -> None:
    for module in UPDATES:
        _spoil(importlib.import_module(module), what, number)


def _spoil(module: Any, what: str, number: int) -> None:
    original, calls = module.update, []

    def update(engine: Any, micro_batches: Any, loss: Any, counts: Any, **named: Any) -> Any:
        calls.append(1)

        def spoilt(*inputs: Any) -> Any:
            terms = loss(*inputs)
            if what == "loss":
                return {name: replace(term, sum=term.sum * float("nan")) for name, term in terms.items()}
            for term in terms.values():
                if term.sum.requires_grad:
                    term.sum.register_hook(lambda gradient: gradient * float("nan"))
            return terms

        return original(engine, micro_batches, spoilt if len(calls) == number else loss, counts, **named)

    module.update = update


def _before(module_name: str, name: str, number: int, act: Callable[[], None]) -> None:
    module = importlib.import_module(module_name)
    original, calls = getattr(module, name), []

    def counted(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            act()
        return original(*arguments, **named)

    setattr(module, name, counted)
