"""The process and its place among others: device, threads, rank, collectives, signals."""

from __future__ import annotations

import atexit
import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING

from rlhf_pipeline.config.schema import Device, RuntimeConfig
from rlhf_pipeline.errors import UserError

if TYPE_CHECKING:
    import numpy as np


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process is the one that writes."""
    return rank() == 0


@dataclass(slots=True)
class StopRequest:
    """Set by SIGTERM and SIGINT; the loop finishes its step, saves and leaves with `exit_code`."""

    exit_code: int = 0
    asked_at: float = 0.0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        # Asked twice, the user will not wait for the save; within a second it is one request that came by two ways.
        if self.exit_code and time.monotonic() - self.asked_at > 1:
            raise SystemExit(self.exit_code)
        if not self.exit_code:
            self.exit_code, self.asked_at = 128 + number, time.monotonic()


@dataclass(slots=True, kw_only=True)
class Runtime:
    """What a recipe knows of its process."""

    device: str  # "cpu" or "cuda:<local rank>"
    threads: int
    stop: StopRequest = field(default_factory=StopRequest)


def start(config: RuntimeConfig) -> Runtime:
    """Settle allocator, threads and device. Call it before torch allocates anything; no process group yet."""
    from rlhf_pipeline.machine import keep_freed_memory, pin_threads

    if config.device is not Device.cuda and config.keep_freed_memory:
        keep_freed_memory()
    import torch

    cuda = config.device is Device.cuda or (config.device is Device.auto and torch.cuda.is_available())
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if cuda:
        torch.cuda.set_device(local_rank)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # oneDNN keeps a compiled kernel for each shape it has seen, 1,024 of them. Packed trees have ever new shapes:
        # 128 kernels are as fast and took 0.3 GB less (docs/benchmarks.md).
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
        # Denormals slow CPU arithmetic by orders of magnitude and carry nothing that a model needs.
        torch.set_flush_denormal(True)
    threads = pin_threads(config.threads)
    return Runtime(device=f"cuda:{local_rank}" if cuda else "cpu", threads=threads)


def join_process_group(runtime: Runtime, *, timeout_minutes: int) -> None:
    """Start collectives (gloo on CPUs, NCCL on GPUs). Everything that tokenises comes before this."""
    import torch
    import torch.distributed as dist

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
    dist.init_process_group(
        backend,
        timeout=timedelta(minutes=timeout_minutes),
        device_id=torch.device(runtime.device) if backend == "nccl" else None,
    )
    atexit.register(dist.destroy_process_group)


@contextmanager
def stopping_on_signals(stop: StopRequest) -> Iterator[None]:
    """SIGTERM and SIGINT set `stop` instead of ending the process."""
    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
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


@contextmanager
def main_first() -> Iterator[None]:
    """The first rank does what is inside while the others wait; when it fails with a UserError, all of them do.

    Raises:
        UserError: on every rank, the first rank's.
    """
    failure = ""
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
