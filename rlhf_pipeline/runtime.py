"""The process and its place among others: device, threads, rank, collectives, signals."""

from __future__ import annotations

import atexit
import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from rlhf_pipeline import peers
from rlhf_pipeline.config.schema import Device, RuntimeConfig
from rlhf_pipeline.errors import PeerError, UserError

if TYPE_CHECKING:
    import numpy as np
    import torch


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process is the one that writes."""
    return rank() == 0


def check_place() -> None:
    """Refuse an environment that says of this process's place what cannot be, before anybody waits for the others.

    Raises:
        UserError: naming the variable; where the working folder has been removed.
    """
    try:
        Path.cwd()
    except OSError as error:
        raise UserError("the folder that this command was started in is gone; go to one that exists") from error
    place = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        value = os.environ.get(name)
        if value is not None and not (value.isascii() and value.isdigit()):
            raise UserError(f"{name}={value}: not a number; launchers set it. {_LAUNCHERS}")
        if value is not None:
            place[name] = int(value)
    size = place.get("WORLD_SIZE", 1)
    if size < 1:
        raise UserError(f"WORLD_SIZE={size}: there is at least one process. {_LAUNCHERS}")
    for name in ("RANK", "LOCAL_RANK"):
        if size > 1 and place.get(name, 0) >= size:
            raise UserError(f"{name}={place[name]}: must be less than WORLD_SIZE={size}. {_LAUNCHERS}")
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if size > 1 and not os.environ.get(name)]
    if missing:
        raise UserError(f"WORLD_SIZE={size}: several processes need {' and '.join(missing)} too. {_LAUNCHERS}")
    port = os.environ.get("MASTER_PORT", "")
    if size > 1 and not (port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
        raise UserError(f"MASTER_PORT={port}: not a port, a number from 1 to 65535. {_LAUNCHERS}")


_LAUNCHERS = "Start several processes with rlhf launch or torchrun; for one, unset these variables."


@dataclass(slots=True)
class StopRequest:
    """Set by SIGTERM, SIGUSR1 and SIGINT; the loop finishes its step, saves and leaves with `exit_code`."""

    exit_code: int = 0
    asked_at: float = 0.0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        # Asked twice, the user will not wait for the save; within a second it is one request that came by two ways.
        if self.exit_code and time.monotonic() - self.asked_at > 1:
            raise SystemExit(self.exit_code)
        if not self.exit_code:
            number = signal.SIGTERM if number == signal.SIGUSR1 else number  # some batch systems announce the end so
            self.exit_code, self.asked_at = 128 + number, time.monotonic()


@dataclass(slots=True, kw_only=True)
class Runtime:
    """What a recipe knows of its process."""

    device: str  # "cpu" or "cuda:<local rank>"
    threads: int
    stop: StopRequest = field(default_factory=StopRequest)


def start(config: RuntimeConfig) -> Runtime:
    """Settle allocator, threads and device, and meet the run's other processes; no process group yet. Call it before torch
    allocates anything.

    Raises:
        UserError: for a GPU that is not there.
        PeerError: when another process does not come.
    """
    from rlhf_pipeline.machine import keep_freed_memory, pin_threads

    if config.device is not Device.cuda and config.keep_freed_memory:
        keep_freed_memory()
    import torch

    cuda = config.device is Device.cuda or (config.device is Device.auto and torch.cuda.is_available())
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if cuda:
        _check_gpu(local_rank)
        torch.cuda.set_device(local_rank)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # oneDNN keeps a compiled kernel for each shape it has seen, 1,024 of them. Packed trees have ever new shapes:
        # 128 kernels are as fast and took 0.3 GB less (docs/benchmarks.md).
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
        # Denormals slow CPU arithmetic by orders of magnitude and carry nothing that a model needs.
        torch.set_flush_denormal(True)
    threads = pin_threads(config.threads)
    if world_size() > 1:
        _give_signs_of_life(peers.meet(config.rendezvous_seconds))
    return Runtime(device=f"cuda:{local_rank}" if cuda else "cpu", threads=threads)


def _check_gpu(local_rank: int) -> None:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        what = "is built without CUDA" if torch.version.cuda is None else "finds no GPU"
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        hint = "" if hidden is None else f" (CUDA_VISIBLE_DEVICES={hidden})"
        raise UserError(
            f"runtime.device=cuda: torch {torch.__version__} {what} here{hint}; use runtime.device=cpu, or look at "
            "nvidia-smi and install a torch built for its driver"
        )
    processes = max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), local_rank + 1)
    if processes > count:
        raise UserError(
            f"{processes} processes on this machine and {count} GPUs that torch sees: each process takes one; start "
            f"at most {count}, or use runtime.device=cpu"
        )


def join_process_group(runtime: Runtime, *, timeout_minutes: int) -> None:
    """Wait for the run's other processes, then start collectives (gloo on CPUs, NCCL on GPUs).

    Everything that tokenises comes before this; how long that takes on one machine and another does not matter.

    Raises:
        PeerError: when the processes cannot talk to each other.
    """
    import torch
    import torch.distributed as dist

    global _patience
    _patience = 60.0 * timeout_minutes
    if dist.is_initialized():  # by the job before this one in a sweep; DeepSpeed could not do with another group
        return
    from rlhf_pipeline.engine import quiet_deepspeed
    from rlhf_pipeline.launch import free_port

    if "MASTER_ADDR" not in os.environ:  # a single process that no launcher started
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}.items():
        os.environ.setdefault(name, str(value))
    quiet_deepspeed()
    backend = "nccl" if runtime.device.startswith("cuda") else "gloo"
    limit = timedelta(minutes=timeout_minutes)
    device = torch.device(runtime.device) if backend == "nccl" else None
    if world_size() == 1:
        dist.init_process_group(backend, timeout=limit, device_id=device)
    else:
        _join_others(backend, limit, device)
    atexit.register(dist.destroy_process_group)
    from deepspeed.utils import groups

    # DeepSpeed computes in a group of its own. Made by itself, it would have torch's time limit and not ours.
    groups._WORLD_GROUP = dist.new_group(range(world_size()), timeout=limit)


def _join_others(backend: str, limit: timedelta, device: torch.device | None) -> None:
    import torch.distributed as dist

    store = peers.meet(RuntimeConfig().rendezvous_seconds)  # `start` has done so with the run's own patience
    _give_signs_of_life(store)
    store.set(f"joining/{rank()}", "1")
    _await_others("joining")  # who is still tokenising gives signs of life
    store.set_timeout(limit)
    try:
        dist.init_process_group(
            backend, store=store, rank=rank(), world_size=world_size(), timeout=limit, device_id=device
        )
    except (dist.DistError, RuntimeError) as error:
        raise PeerError(
            f"the {world_size()} processes have met at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} and cannot "
            f"talk to each other by {backend}: {str(error).partition(chr(10))[0]}. Machines with several networks: name the "
            f"one to use with {backend.upper()}_SOCKET_IFNAME=<interface>; no firewall may stand between them"
        ) from error


@contextmanager
def stopping_on_signals(stop: StopRequest) -> Iterator[None]:
    """SIGTERM, SIGUSR1 and SIGINT set `stop` instead of ending the process."""
    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def sum_over_ranks(values: Mapping[str, float]) -> dict[str, float]:
    """Add the values of every rank by name, in fp64. Every rank must name the same things."""
    return _reduce(values, "SUM")


def sum_array_over_ranks(values: np.ndarray) -> np.ndarray:
    """Add an array of float64 of every rank, element by element."""
    if world_size() == 1:
        return values
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu"
    total = torch.from_numpy(values).to(device)
    dist.all_reduce(total)
    return total.cpu().numpy()


def max_over_ranks(values: Mapping[str, float]) -> dict[str, float]:
    """The largest value of any rank by name."""
    return _reduce(values, "MAX")


def _reduce(values: Mapping[str, float], how: str) -> dict[str, float]:
    if world_size() == 1:
        return dict(values)
    import torch
    import torch.distributed as dist

    names = sorted(values)
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu"
    packed = torch.tensor([values[name] for name in names], dtype=torch.float64, device=device)
    dist.all_reduce(packed, getattr(dist.ReduceOp, how))
    return dict(zip(names, packed.tolist(), strict=True))


_patience = 600.0  # seconds without a sign of life until a process is given up; set with the collectives' time limit
_paces = itertools.count()  # of this process; every rank goes through the same ones
_store: Any = None  # torch's, in which they leave word and signs of life
BEAT = 1.0  # seconds between two of them
LONGEST_LOOK = 0.25  # seconds between two looks at what the others have done


@contextmanager
def at_own_pace() -> Iterator[None]:
    """Each rank does what is inside in its own time, and none goes on before all are through. Called by every rank.

    For what may take long on one rank: writing a large file, asking a slow server. No collective waits meanwhile, whose
    time limit is for ranks that compute in step: the ranks leave word in the store that brought them together. Only one
    that gives no more signs of life there, which a thread does while the rank is at work, is given up.

    Raises:
        ConnectionError: when a rank has given none for as long as a collective may take.
    """
    if world_size() == 1:
        yield
        return
    pace = f"done/{next(_paces)}"
    try:
        yield
    finally:  # also when it fails: the others need not wait for it, and meet its end in the next collective
        _store.set(f"{pace}/{rank()}", "1")
    _await_others(pace)


def _give_signs_of_life(store: Any) -> None:
    """From here to this process's end, whatever it is busy with; a frozen process gives none."""
    global _store
    if _store is not None:
        return
    _store, ended = store, threading.Event()
    atexit.register(ended.set)

    def give() -> None:
        for number in itertools.count():
            try:
                store.set(f"alive/{rank()}", str(number))
            except Exception:  # whoever kept the store has gone; this rank will see it where it needs the others
                return
            if ended.wait(BEAT):
                return

    threading.Thread(target=give, daemon=True, name="signs of life").start()


def _await_others(pace: str) -> None:
    """Wait until every rank has left word, or one of those that have not has given no sign of life for too long."""
    left = [other for other in range(world_size()) if other != rank()]
    since = time.monotonic()
    heard = dict.fromkeys(left, ("", since))
    look = 0.001
    while left := [other for other in left if not _has(f"{pace}/{other}")]:
        now = time.monotonic()
        for other in left if now - since > BEAT else ():
            said = _store.get(f"alive/{other}").decode() if _has(f"alive/{other}") else ""
            if said != heard[other][0]:
                heard[other] = (said, now)
            elif now - heard[other][1] > _patience:
                raise ConnectionError(f"process {other} has given no sign of life for {_patience:.0f} s")
        time.sleep(look)
        look = min(2 * look, LONGEST_LOOK)


def _has(key: str) -> bool:
    """Whether the store has it. In a thread: torch's client waits without a limit for a keeper that is frozen."""
    found: list[bool | Exception] = []

    def ask() -> None:
        try:
            found.append(_store.check([key]))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_patience)
    if not found:
        raise ConnectionError(f"the process that keeps the ranks' store has given no answer for {_patience:.0f} s")
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


@contextmanager
def main_first() -> Iterator[None]:
    """The first rank does what is inside, however long it takes, while the others wait; when it fails with a UserError, all
    of them do.

    Raises:
        UserError: on every rank, the first rank's.
    """
    failure = ""
    with at_own_pace():
        try:
            yield
        except UserError as error:
            failure = str(error)
    failure = broadcast(failure)
    if failure:
        raise UserError(failure)


def broadcast(text: str) -> str:
    """The first rank's text, on every rank."""
    if world_size() == 1:
        return text
    import torch.distributed as dist

    box = [text]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def barrier() -> None:
    if world_size() > 1:
        import torch.distributed as dist

        dist.barrier()
