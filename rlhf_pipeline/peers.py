"""Who of a run's processes is there: they meet at the start, and each learns within half a minute when one has gone.

Every process keeps a connection to the first one. It is the kernel that keeps it alive and not this program, so a process
may be busy in one call for minutes and is not taken for dead, while a machine that is off or cut off is. Whoever ends
without a farewell was lost; the first process tells the others which one. Without this, they would wait in a
collective until its time limit, or fail in it with words about sockets.

Left out: the collectives, and processes that are there and make no progress; the time limit of collectives is for those.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from rlhf_pipeline.errors import PeerError
from rlhf_pipeline.peers_hub import ANSWER, BYE, GO_ON, MET, Hub, lost, watch_over

GRACE = 5.0  # seconds from a loss until a process ends that does not come to it by itself
KEY = "peers"  # in the store: where the first process listens


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """This process among the others, as its launcher said."""

    rank: int
    local_rank: int
    local_size: int
    size: int
    address: str
    port: int

    @property
    def host(self) -> str:
        return os.environ.get("RLHF_HOST") or socket.gethostname()

    def tells(self, lost: int) -> bool:
        """Whether it is the first of its machine that is left when `lost` has gone: one message a machine."""
        first = self.rank - self.local_rank
        return self.rank == next(rank for rank in range(first, first + self.local_size + 1) if rank != lost)


def place() -> Place:
    """From the environment, which `runtime.check_place` has looked at."""
    known = os.environ.get
    return Place(
        rank=int(known("RANK", "0")),
        local_rank=int(known("LOCAL_RANK") or known("RANK", "0")),  # as if on one machine, where nobody has said
        local_size=int(known("LOCAL_WORLD_SIZE") or known("LOCAL_SIZE") or 1),
        size=int(known("WORLD_SIZE", "1")),
        address=known("MASTER_ADDR", ""),
        port=int(known("MASTER_PORT", "0")),
    )


@dataclass(slots=True)
class _Circle:
    """What this process knows of the others."""

    place: Place
    store: Any  # torch's, that brought them together
    send: Callable[[str], None] = print  # a line to the first process, or from it to all
    lost: int = -1
    loss: str = ""
    known: threading.Event = field(default_factory=threading.Event)  # that one is lost
    leaving: bool = False  # by itself, for a reason that it tells
    parted: bool = False  # at its end; what becomes of the others is nothing to it

    def lose(self, rank: int, text: str) -> None:
        """In a thread: note it, and end the process if it does not end by itself."""
        if self.known.is_set() or self.parted:
            return
        self.lost, self.loss = rank, text
        self.known.set()
        time.sleep(GRACE)
        if not self.leaving and self.place.tells(rank):
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()
        time.sleep(GRACE if self.leaving else 0)
        os._exit(1)


_circle: _Circle | None = None


def meet(seconds: float) -> Any:
    """Wait for every process of the run, once in a process's life; torch's store that all of them reach.

    Raises:
        PeerError: when one does not come within `seconds`.
    """
    global _circle
    if _circle is None:
        here = place()
        until = time.monotonic() + seconds
        store = _store(here, until, seconds)
        circle = _Circle(here, store)
        if here.rank == 0:
            _gather(circle, until, seconds)
        else:
            _come(circle, until, seconds)
        _circle = circle
        atexit.register(_part, circle)
    return _circle.store


def cause(error: BaseException) -> BaseException:
    """The loss of another process, where that is what an error among processes came from; else the error."""
    if _circle is None or not _circle.known.wait(GRACE):
        return error
    return PeerError(_circle.loss)


def is_first() -> bool:
    """Whether this process tells what ends all of them: the first does, and before they have met the first of a machine."""
    here = place()
    return here.rank == 0 or (here.local_rank == 0 and _circle is None)


def tells_loss() -> bool:
    """Whether this process is the one of its machine to tell that another one never came, or has gone."""
    return place().local_rank == 0 if _circle is None else _circle.place.tells(_circle.lost)


def leave(message: str) -> None:
    """Let the others know why this process is about to end, where it is not for their sake."""
    if _circle is not None and not _circle.leaving:
        _circle.leaving = True
        if not _circle.known.is_set():
            with suppress(OSError):
                _circle.send(json.dumps({"lost": _circle.place.rank, "text": _last_words(_circle.place, message)}))


def _part(circle: _Circle) -> None:
    """At the end of a process that did not fail."""
    if not circle.leaving:
        circle.parted = True
        with suppress(OSError):
            circle.send(BYE)


def _store(here: Place, until: float, seconds: float) -> Any:
    """torch's store at MASTER_ADDR:MASTER_PORT, which the first process keeps, or torchrun for it."""
    from torch.distributed import DistError, TCPStore

    keeps = here.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not keeps:
        _await_port(here, until, seconds)

    def make() -> Any:
        limit = timedelta(seconds=max(1.0, until - time.monotonic()))
        return TCPStore(here.address, here.port, here.size, keeps, timeout=limit, wait_for_workers=False)

    made: list[Any] = []

    def try_to() -> None:
        try:
            made.append(make())
        except (DistError, RuntimeError, ValueError) as error:
            made.append(error)

    # In a thread: torch's client waits without a limit for a server that takes its connection and says nothing.
    thread = threading.Thread(target=try_to, daemon=True)
    thread.start()
    thread.join(max(1.0, until - time.monotonic()) + 1)
    if made and not isinstance(made[0], Exception):
        return made[0]
    reason = str(made[0]).partition("\n")[0] if made else "it takes the connection and says nothing"
    where = f"{here.address}:{here.port}"
    if keeps and "EADDRINUSE" in reason:
        raise PeerError(
            f"{where}: port {here.port} is taken by another program on this machine ({here.host}), perhaps by another run; "
            "choose another one with --master-port (MASTER_PORT), or leave it out and a free one is found"
        )
    who = (
        f"is {here.address} an address of this machine ({here.host}), where process 0 runs?"
        if keeps
        else (f"is it process 0 of this run that listens on port {here.port} there, and not another program?")
    )
    raise PeerError(f"{where}: the {here.size} processes did not find each other there: {reason}; {who}")


def _await_port(here: Place, until: float, seconds: float) -> None:
    """Wait until MASTER_ADDR:MASTER_PORT takes connections. Names too may come to be known only when a machine is up."""
    while True:
        left = until - time.monotonic()
        try:
            socket.create_connection((here.address, here.port), timeout=max(1.0, min(left, ANSWER))).close()
            return
        except OSError as error:
            if left <= 1:
                raise PeerError(
                    f"{here.address}:{here.port} (MASTER_ADDR:MASTER_PORT): process 0 does not answer ({_reason(error)}); "
                    f"process {here.rank} on {here.host} has tried for {seconds:.0f} s (runtime.rendezvous_seconds). Check "
                    f"that process 0 was started and what it says, that {here.address} is its machine's address as seen "
                    f"from {here.host}, and that no firewall closes port {here.port}"
                ) from None
        time.sleep(0.1)


def _reason(error: OSError) -> str:
    return "no answer at all" if isinstance(error, TimeoutError) else (error.strerror or str(error))


def _come(circle: _Circle, until: float, seconds: float) -> None:
    """A process that is not the first: connect to it, and hear when all are there."""
    here, store = circle.place, circle.store
    while not store.check([KEY]):  # under torchrun the store is there before the first process is
        if time.monotonic() > until:
            raise PeerError(
                f"process 0 of {here.size} did not come to {here.address}:{here.port} within {seconds:.0f} s "
                "(runtime.rendezvous_seconds); its output says why, on its machine"
            )
        time.sleep(0.05)
    told = json.loads(store.get(KEY))
    try:
        line = socket.create_connection((here.address, told["port"]), timeout=ANSWER)
        watch_over(line)
        circle.send = lambda text: line.sendall(f"{text}\n".encode())
        me = {"token": told["token"], "rank": here.rank, "size": here.size, "host": here.host}
        circle.send(json.dumps(me))
        line.settimeout(seconds + ANSWER)  # the first process may have come later, and then waits longer
        lines = line.makefile(encoding="utf-8")
        answer = lines.readline().strip()
    except OSError as error:
        raise PeerError(
            f"{here.address}:{told['port']}: process 0 cannot be reached there from process {here.rank} on {here.host} "
            f"({_reason(error)}), but at port {here.port}. Processes talk on ports that the system chooses too: no firewall "
            "may stand between the machines"
        ) from None
    if answer != MET:
        text = json.loads(answer)["text"] if answer else f"process 0 on {told['host']} has ended before all were there"
        raise PeerError(text)
    line.settimeout(None)

    def listen() -> None:
        ended: OSError | None = None
        try:
            for text in lines:
                if text.strip() == BYE:
                    return
                found = json.loads(text)
                circle.lose(found["lost"], found["text"])
        except OSError as error:
            ended = error
        circle.lose(0, lost(0, told["host"], ended))

    threading.Thread(target=listen, daemon=True, name="peers").start()


def _gather(circle: _Circle, until: float, seconds: float) -> None:
    """The first process: wait for the others' connections, and tell all of them when all are there."""
    here = circle.place
    hub = Hub(size=here.size, host=here.host, lose=circle.lose)
    told = {"port": hub.listener.getsockname()[1], "token": hub.token, "host": here.host}
    circle.send = hub.tell
    threading.Thread(target=hub.run, daemon=True, name="peers").start()
    circle.store.set(KEY, json.dumps(told))
    if hub.complete.wait(max(0.0, until - time.monotonic())):
        return
    missing = [str(rank) for rank in range(1, here.size) if rank not in hub.members]
    shown = ", ".join(missing[:16]) + (f" and {len(missing) - 16} more" if len(missing) > 16 else "")
    text = (
        f"{here.address}:{here.port}: {len(missing)} of {here.size} processes did not come within {seconds:.0f} s "
        f"(runtime.rendezvous_seconds): {shown}. Their output says why, on their machines. Check that they were "
        f"started with WORLD_SIZE={here.size}, MASTER_ADDR={here.address} and MASTER_PORT={here.port}, and that no firewall "
        f"closes the way to this machine ({here.host})"
    )
    hub.tell(json.dumps({"lost": -1, "text": text}))
    raise PeerError(text)


def _last_words(here: Place, message: str) -> str:
    return f"process {here.rank} on {here.host} has ended: {message}\n{GO_ON}"
