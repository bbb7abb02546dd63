"""Maps a function over a stream in several processes, results in the order of the stream; it knows nothing of data.

The processes are forks of this one: they start in milliseconds with everything loaded (a fresh interpreter imports
transformers for seconds), and nothing has to be pickled but what they are given and what they return. They use no torch
and no device, which a fork could not.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

from rlhf_pipeline.errors import UserError

if TYPE_CHECKING:
    from multiprocessing.context import ForkProcess

Item = TypeVar("Item")
Result = TypeVar("Result")


def default_workers() -> int:
    """The cores that this process may use; 1 where processes cannot be forked safely."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1


def map_in_order(
    function: Callable[[Item], Result], items: Iterable[Item], *, workers: int, alone: int = 4
) -> Generator[Result, None, None]:
    """`map(function, items)`, computed by `workers` processes; in this one if there are fewer than `alone` items.

    At most two items a process are under way, so memory does not grow with their number. An exception of `function` is
    raised here when its turn comes, as it would be by `map`; leaving the iterator ends the processes.

    Raises:
        UserError: when a process is killed from outside.
    """
    items = iter(items)
    head = list(islice(items, alone))
    if workers < 2 or len(head) < alone:
        yield from map(function, chain(head, items))
        return
    with _processes(function, workers) as call:
        under_way: deque[Future[Any]] = deque()
        for item in chain(head, items):
            under_way.append(call(item))
            if len(under_way) >= 2 * workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()


@contextmanager
def _processes(function: Callable[[Any], Any], number: int) -> Iterator[Callable[[Any], Future[Any]]]:
    """A function that hands an item to the next free process. A thread waits for each of them."""
    fork = multiprocessing.get_context("fork")
    free: SimpleQueue[tuple[ForkProcess, Connection]] = SimpleQueue()
    processes: list[ForkProcess] = []
    ours: list[Connection] = []
    sys.stdout.flush()
    sys.stderr.flush()
    for _ in range(number):
        here, there = fork.Pipe()
        ours.append(here)
        # A process that kept another one's end of a pipe open would keep that one alive after a crash of this one.
        process = fork.Process(target=_serve, args=(function, there, list(ours)), daemon=True)
        process.start()
        there.close()
        processes.append(process)
        free.put((process, here))

    def ask(item: Any) -> Any:
        process, connection = free.get()
        try:
            connection.send(item)
            answer = connection.recv()
        except (EOFError, OSError):
            process.join(5)
            raise UserError(
                f"a tokenising process was ended from outside (exit code {process.exitcode}; -9 is often a lack of "
                "memory). Set data.workers=1, or fewer than now"
            ) from None
        finally:
            free.put((process, connection))
        if isinstance(answer, _Failure):
            raise answer.error from _Elsewhere(answer.trace)
        return answer

    threads = ThreadPoolExecutor(number)
    try:
        yield lambda item: threads.submit(ask, item)
    finally:
        for process in processes:
            process.terminate()  # a thread that waits for its answer then finds the pipe closed
        threads.shutdown(cancel_futures=True)
        for process, connection in zip(processes, ours, strict=True):
            process.join()
            connection.close()


def _serve(function: Callable[[Any], Any], connection: Connection, not_ours: list[Connection]) -> None:
    """Answer items until the other side closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to every process of the terminal; the first one ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.freeze()  # looking for garbage in what is shared would make a copy of it
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    for other in not_ours:
        other.close()
    while True:
        try:
            item = connection.recv()
        except (EOFError, OSError):
            return
        try:
            answer = function(item)
        except Exception as error:
            answer = _Failure(error, traceback.format_exc())
        connection.send(answer)


@dataclass(frozen=True, slots=True)
class _Failure:
    error: Exception
    trace: str


class _Elsewhere(Exception):
    """Shows the traceback of the process where an error was raised."""

    def __str__(self) -> str:
        return f"in a tokenising process:\n{self.args[0]}"
