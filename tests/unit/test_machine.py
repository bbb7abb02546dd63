"""The machine: the allocator's setting, threads, peak memory, peak arithmetic, and the cost of a token."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import rlhf_pipeline
from rlhf_pipeline import machine

REPOSITORY = Path(rlhf_pipeline.__file__).parents[1]
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")


def run_script(script: str, *arguments: str) -> list[int]:
    """The integers that a Python script prints, run in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    return [int(word) for word in result.stdout.split()]


@pytest.fixture
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# --- the allocator

COUNT_FAULTS = """
import resource, sys
from rlhf_pipeline import machine
kept = machine.keep_freed_memory() if sys.argv[1] == "keep" else False
touch = lambda: len(b"x" * (64 << 20))
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    touch()
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(int(kept), faults, int("torch" in sys.modules))
"""


@pytest.mark.skipif(not machine._has_glibc(), reason="glibc only")
def test_freed_memory_is_kept() -> None:
    kept, faults, has_torch = run_script(COUNT_FAULTS, "keep")
    _, faults_by_default, _ = run_script(COUNT_FAULTS, "default")
    assert (kept, has_torch) == (1, 0)
    # by default each 64 MiB block comes fresh from the kernel: at least one fault for each of its 32 huge pages
    assert faults_by_default >= 320
    assert faults < 32


@pytest.mark.parametrize("error", [ValueError("unrecognized configuration name"), OSError("not supported")])
def test_nothing_is_done_without_glibc(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def confstr(name: str) -> str:
        raise error

    def refuse(name: str | None) -> None:
        raise AssertionError("mallopt must not be looked up")

    monkeypatch.setattr(machine.os, "confstr", confstr)
    monkeypatch.setattr(machine.ctypes, "CDLL", refuse)
    assert machine.keep_freed_memory() is False


# --- threads


@pytest.mark.parametrize(
    ("num_cpus", "environment", "expected"),
    [
        (6, {}, 6),
        (6, {"LOCAL_WORLD_SIZE": "2"}, 3),
        (7, {"LOCAL_WORLD_SIZE": "2"}, 3),
        (6, {"LOCAL_SIZE": "3"}, 2),
        (2, {"LOCAL_WORLD_SIZE": "8"}, 1),
    ],
)
@pytest.mark.usefixtures("restored_threads")
def test_processes_share_the_cpus(
    monkeypatch: pytest.MonkeyPatch, num_cpus: int, environment: dict[str, str], expected: int
) -> None:
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: set(range(num_cpus)), raising=False)
    assert machine.pin_threads() == expected
    assert torch.get_num_threads() == expected


@pytest.mark.usefixtures("restored_threads")
def test_a_given_thread_count_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert machine.pin_threads(3) == 3
    assert torch.get_num_threads() == 3
    with pytest.raises(ValueError, match="num_threads is 0"):
        machine.pin_threads(0)


# --- memory

PEAK = """
import sys
from rlhf_pipeline import machine
block = b"x" * (int(sys.argv[1]) << 20)
del block
print(machine.peak_memory_bytes() >> 20)
"""


@on_linux
def test_peak_memory_is_the_largest_held_so_far() -> None:
    (base,) = run_script(PEAK, "0")
    (peak,) = run_script(PEAK, "200")
    assert base < 100
    assert peak - base == pytest.approx(200, abs=10)


@on_linux
def test_peak_memory_is_not_inherited_from_the_launcher() -> None:
    launcher = f"""
import subprocess, sys
block = b"x" * (300 << 20)
print(subprocess.run([sys.executable, "-c", {PEAK!r}, "0"], capture_output=True, text=True, check=True).stdout)
"""
    (peak,) = run_script(launcher)
    assert peak < 100


def test_peak_memory_on_a_gpu_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = SimpleNamespace(is_available=lambda: True, is_initialized=lambda: True, max_memory_allocated=lambda: 12345)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert machine.peak_memory_bytes() == 12345
    cuda.is_initialized = lambda: False
    assert machine.peak_memory_bytes() != 12345


# --- arithmetic


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures the CPU")
def test_measuring_leaves_no_trace() -> None:
    state, num_threads = torch.get_rng_state(), torch.get_num_threads()
    peak = machine.measure_peak_flops(torch.float32)
    assert 1e8 < peak < 1e15
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == num_threads


@pytest.mark.parametrize(
    ("flops_per_thread", "wait", "expected"),
    [
        (2e11, 0.0, 4e11),  # two threads, twice the speed of one
        (1e9, 0.0, 2e9),  # a slow machine must not take longer
        (2e11, 1e-2, 2e11),  # a busy one, where threads wait for each other: one alone is the better measure
    ],
)
def test_measured_peak_on_a_simulated_machine(
    monkeypatch: pytest.MonkeyPatch, flops_per_thread: float, wait: float, expected: float
) -> None:
    now, num_threads = [0.0], [2]

    def matmul(left: torch.Tensor, right: torch.Tensor, *, out: torch.Tensor) -> None:
        speed = flops_per_thread * num_threads[0]
        now[0] += 2 * len(left) * left.shape[1] * right.shape[1] / speed + (wait if num_threads[0] > 1 else 0.0)

    monkeypatch.setattr(machine.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch, "mm", matmul)
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda n: num_threads.__setitem__(0, n))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.measure_peak_flops(torch.float32) == pytest.approx(expected, rel=0.01)
    assert now[0] <= 0.15
    assert num_threads == [2]


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", None),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_published_peaks_by_device_name(name: str, peak: float | None) -> None:
    assert machine.published_peak_flops(name) == peak


def test_a_known_gpu_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(machine, "_fastest_matmul", lambda dtype, device, seconds: (dtype, device.type))
    assert machine.measure_peak_flops(torch.bfloat16) == 989e12
    measured: object = machine.measure_peak_flops(torch.float32)
    assert measured == (torch.float32, "cuda")


def test_flops_per_token_equal_those_counted_by_torch() -> None:
    num_layers, hidden, num_tokens, vocab_size, num_scored = 3, 16, 10, 40, 4
    weights = [
        [torch.randn(hidden, 4 * hidden, requires_grad=True), torch.randn(4 * hidden, hidden, requires_grad=True)]
        + [torch.randn(hidden, hidden, requires_grad=True) for _ in range(4)]
        for _ in range(num_layers)
    ]
    head = torch.randn(hidden, vocab_size, requires_grad=True)
    states = torch.randn(num_tokens, hidden, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        for up, down, query, key, value, out in weights:
            attention = ((states @ query) @ (states @ key).T).softmax(-1)  # every token attends to all ten
            states = states + (attention @ (states @ value)) @ out
            states = states + (states @ up).relu() @ down
        (states[:num_scored] @ head).sum().backward()
    per_token = machine.training_flops_per_token(
        num_parameters_without_embedding=sum(weight.numel() for layer in weights for weight in layer),
        num_layers=num_layers,
        hidden=hidden,
        mean_context=num_tokens,
        vocab_size=vocab_size,
        scored_share=num_scored / num_tokens,
    )
    assert per_token * num_tokens == pytest.approx(counter.get_total_flops(), rel=1e-12)


def test_flops_per_token_of_gpt3() -> None:
    # Brown et al. 2020, table D.1: 3.14e23 FLOPs for 300 billion tokens of the 174.6e9-parameter model, from 6 N alone
    flops = machine.training_flops_per_token(
        num_parameters_without_embedding=174_600_000_000,
        num_layers=96,
        hidden=12288,
        mean_context=0,
        vocab_size=50257,
        scored_share=0,
    )
    assert flops * 300e9 == pytest.approx(3.14e23, rel=2e-3)
