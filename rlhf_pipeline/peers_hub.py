"""The first process's end of the connections that every other process of a run keeps to it; see `peers`.

One thread takes them, sees to it that each process is there once, and tells all the others when one has gone.
"""

from __future__ import annotations

import errno
import json
import secrets
import selectors
import socket
import threading
from collections.abc import Callable
from contextlib import suppress

# Linux's names; 10 s + 4 x 5 s. The time-out is for what was sent and not confirmed.
PROBES = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 30_000}
ANSWER = 10.0  # seconds for an answer that takes none
MET, BYE = "met", "bye"
GO_ON = "The others cannot go on without it; the same command goes on from the last saved state."
_OFF = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENETUNREACH, errno.ENETDOWN)


class Hub:
    """The first process's end of all connections. `run` is its thread."""

    def __init__(self, *, size: int, host: str, lose: Callable[[int, str], None]) -> None:
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        self.size, self.host, self.lose = size, host, lose
        self.token = secrets.token_hex(16)
        self.listener = socket.create_server(("", 0), family=family, backlog=size, dualstack_ipv6=dual)
        self.members: dict[int, socket.socket] = {}
        self.hosts: dict[int, str] = {}
        self.complete = threading.Event()
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.listener, selectors.EVENT_READ)
        self.unread: dict[socket.socket, bytes] = {}

    def tell(self, text: str) -> None:
        for line in list(self.members.values()):
            with suppress(OSError):
                line.sendall(f"{text}\n".encode())

    def run(self) -> None:
        while True:
            for key, _ in self.selector.select():
                if key.fileobj is self.listener:
                    self._take()
                elif isinstance(key.fileobj, socket.socket):
                    self._read(key.fileobj)

    def _take(self) -> None:
        with suppress(OSError):
            line, _ = self.listener.accept()
            line.settimeout(ANSWER)
            watch_over(line)
            self.unread[line] = b""
            self.selector.register(line, selectors.EVENT_READ)

    def _read(self, line: socket.socket) -> None:
        ended: OSError | None = None
        try:
            received = line.recv(65536)
        except OSError as error:
            received, ended = b"", error
        *texts, self.unread[line] = (self.unread[line] + received).split(b"\n")
        rank = next((rank for rank, one in self.members.items() if one is line), None)
        for text in texts:
            if rank is None:
                rank = self._admit(line, text)
                if rank is None:
                    return
            elif text == BYE.encode():
                self._drop(line, rank)
                return
            else:
                found = json.loads(text)
                self._lose(found["lost"], found["text"])
        if not received:
            self._drop(line, rank)
            if rank is not None:
                self._lose(rank, lost(rank, self.hosts[rank], ended))

    def _admit(self, line: socket.socket, text: bytes) -> int | None:
        try:
            told = json.loads(text)
            rank, size, known = int(told["rank"]), int(told["size"]), told["token"] == self.token
        except (ValueError, TypeError, KeyError):
            known = False
        if not known:  # somebody else's
            self._drop(line, None)
            return None
        refusal = ""
        if size != self.size:
            refusal = f"WORLD_SIZE={size} there and {self.size} at process 0 on {self.host}: must be the same"
        elif rank in self.members:
            refusal = (
                f"RANK={rank}: there is such a process already, on {self.hosts[rank]}; each has a number of its own"
            )
        if refusal:
            with suppress(OSError):
                line.sendall(json.dumps({"text": f"{told['host']}: {refusal}"}).encode() + b"\n")
            self._drop(line, None)
            return None
        self.members[rank], self.hosts[rank] = line, str(told["host"])
        if len(self.members) == self.size - 1:
            self.tell(MET)
            self.complete.set()
        return rank

    def _drop(self, line: socket.socket, rank: int | None) -> None:
        self.selector.unregister(line)
        self.unread.pop(line)
        line.close()
        if rank is not None:
            self.members.pop(rank)

    def _lose(self, rank: int, text: str) -> None:
        if not self.complete.is_set():  # not all have come, and now never will
            text = f"{text} (while the processes were meeting)"
        self.tell(json.dumps({"lost": rank, "text": text}))
        self.lose(rank, text)


def watch_over(line: socket.socket) -> None:
    """Let the kernel notice within half a minute that the other machine has gone, and not wait for company to send."""
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for name, value in PROBES.items():
        if number := getattr(socket, name, None):  # macOS has other names
            line.setsockopt(socket.IPPROTO_TCP, number, value)


def lost(rank: int, host: str, error: OSError | None) -> str:
    """What to say of a process whose connection has ended, by an error or without."""
    if error is not None and error.errno in _OFF:
        seconds = PROBES["TCP_USER_TIMEOUT"] // 1000
        how = f"has not answered for {seconds} s: the machine is off, frozen or cut off"
    else:
        how = "has gone without a word: killed (by the kernel where memory ran out: see its log), or crashed"
    return f"process {rank} on {host} {how}. {GO_ON}"
