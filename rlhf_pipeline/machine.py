"""What the machine can do and what a run takes from it: threads, memory, peak speed, the cost of a token.

torch is imported only by the functions that need it, and never by `keep_freed_memory`, which must run before
torch allocates anything. Left out: choosing a device or a precision, which is the config's affair.
"""

from __future__ import annotations

import ctypes
import math
import os
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Dense bf16 tensor-core peaks with fp32 accumulation, FLOP/s, from NVIDIA's data sheets of these GPUs (a sheet
# that gives only the figure with 2:4 sparsity is halved). The first name whose words are all in the device's
# name counts, so variants stand before the plain name.
_PUBLISHED_BF16_PEAKS = (
    ("B200", 2250e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("H100 NVL", 835e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("GH200", 989e12),
    ("A100", 312e12),
    ("A30", 165e12),
    ("A40", 149.7e12),
    ("A10", 125e12),
    ("L40S", 362e12),
    ("L4", 121e12),
)

_MEASURE_SECONDS = 0.12
_MEASURE_SIDES = (256, 512, 1024, 2048, 4096)
_RUNS_PER_SIDE = 4

# mallopt parameters, from glibc's malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_TOP_PAD_BYTES = 256 * 2**20


def keep_freed_memory() -> bool:
    """Tell glibc's allocator to keep what the program frees; True where it took effect.

    By default glibc hands large freed blocks back to the kernel, and a training step on a CPU frees and takes
    the same blocks again every time: page faults were 18 to 45 % of the CPU time of small models. The price
    is that memory once used stays with the process. Call it before torch allocates. Does nothing (False)
    without glibc.
    """
    if not _has_glibc():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, _TOP_PAD_BYTES))
    return all(mallopt(parameter, value) == 1 for parameter, value in settings)


def _has_glibc() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (ValueError, OSError):  # the name is glibc's own: musl and macOS do not know it
        return False


def pin_threads(num_threads: int | None = None) -> int:
    """Set torch's thread count and return it.

    None gives every process of this machine an equal share of the CPUs that it may run on, at least one.
    Results on a CPU depend on the count in the last bits, so a run records it and a resumed run pins the
    same.
    """
    import torch

    if num_threads is None:
        num_threads = max(1, _num_available_cpus() // local_world_size())
    if num_threads < 1:
        raise ValueError(f"num_threads is {num_threads}, must be at least 1")
    torch.set_num_threads(num_threads)
    return num_threads


def local_world_size() -> int:
    """The run's processes on this machine: torchrun sets LOCAL_WORLD_SIZE, DeepSpeed LOCAL_SIZE."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def _num_available_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def peak_memory_bytes() -> int:
    """The most memory this process has held: torch's on the GPU where one is in use, else resident memory."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    # On Linux getrusage's maximum survives exec: a child of a large launcher starts with the launcher's peak.
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_memory_bytes(device: torch.device) -> int | None:
    """What a process could still take on `device`, with what its own allocator holds unused; None where that is unknown.

    On a CPU the processes of this machine have equal shares of it.
    """
    import torch

    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + held
    table = Path("/proc/meminfo")
    if table.exists():
        for line in table.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024 // local_world_size()
    return None


def measure_peak_flops(dtype: torch.dtype) -> float:
    """The FLOP/s a matmul of this dtype can reach: published for a known GPU in bf16 or fp16, else measured.

    Measuring takes at most about 0.15 s: square matmuls of growing size, the fastest single one counts. A GPU
    is meant where the process has one, else the CPU with torch's present thread count. Uses no random
    numbers.
    """
    import torch

    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        published = published_peak_flops(name) if dtype in (torch.bfloat16, torch.float16) else None
        return published or _fastest_matmul(dtype, torch.device("cuda"), seconds=_MEASURE_SECONDS)
    # One thread alone is measured first: on a busy machine threads wait for each other, and a small matmul of
    # several threads then seems a hundred times slower than it is.
    cpu = torch.device("cpu")
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = _fastest_matmul(dtype, cpu, seconds=_MEASURE_SECONDS / 3)
    finally:
        torch.set_num_threads(num_threads)
    return max(alone, _fastest_matmul(dtype, cpu, seconds=2 * _MEASURE_SECONDS / 3))


def published_peak_flops(device_name: str) -> float | None:
    """The published dense bf16 peak of a GPU by its name, FLOP/s; None for one that is not in the table."""
    words = device_name.replace("-", " ").split()
    if "MIG" in words:  # a slice of a GPU has a slice of its peak
        return None
    for name, peak in _PUBLISHED_BF16_PEAKS:
        if set(name.split()) <= set(words):
            return peak
    return None


def _fastest_matmul(dtype: torch.dtype, device: torch.device, *, seconds: float) -> float:
    """FLOP/s of the fastest of a few square matmuls of growing size, all within about `seconds`."""
    import torch

    deadline = time.perf_counter() + seconds
    best = 0.0
    for side in _MEASURE_SIDES:
        left, right = torch.ones((2, side, side), dtype=dtype, device=device)
        product = torch.empty_like(left)
        fastest = math.inf
        for _ in range(_RUNS_PER_SIDE):
            start = _now(device)
            torch.mm(left, right, out=product)
            fastest = min(fastest, _now(device) - start)
            if time.perf_counter() > deadline:
                break
        best = max(best, 2.0 * side**3 / fastest)
        if time.perf_counter() + 2 * 8 * fastest > deadline:  # a side twice as long is 8 times the work
            break
    return best


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
    return time.perf_counter()


def training_flops_per_token(
    *,
    num_parameters_without_embedding: int,
    num_layers: int,
    hidden: int,
    mean_context: float,
    vocab_size: int,
    scored_share: float,
) -> float:
    """FLOPs that one token of training needs, forward and backward; recomputation is not counted.

    6 N + 12 L H C + 6 H V s: each of the N weights a token passes through costs a multiplication and an
    addition forward and twice that backward; each layer's scores and weighted values cost 2 * 2 H C forward
    and twice that backward; the vocabulary head costs 6 H V at the share s of positions where logits are
    computed. (Chowdhery et al. 2022, PaLM, appendix B: 6N + 12LHQT with HQ the width of attention. Kaplan et
    al. 2020, section 2.1, leaves out the weighted values.)

    num_parameters_without_embedding: neither the embedding nor the head counts here, tied or not.
    hidden: the model's width, taken as the width of attention too (heads times head size).
    mean_context: keys a token attends to on average; causal over T tokens that is (T + 1) / 2. PaLM counts T.
    scored_share: positions with logits over all positions, 0 for a reward model.
    """
    attention = 12.0 * num_layers * hidden * mean_context
    head = 6.0 * hidden * vocab_size * scored_share
    return 6.0 * num_parameters_without_embedding + attention + head
