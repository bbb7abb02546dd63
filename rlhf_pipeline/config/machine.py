"""The section of every training command that only `rlhf plan` reads: the machine, and what cannot be known ahead.

Nothing in it changes a run. The speeds are an H100's (SXM) where nothing else is said; docs/scaling.md has the sources.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from rlhf_pipeline.config.schema import operational
from rlhf_pipeline.config.values import between, positive

UNITS = {"k": 1, "m": 2, "g": 3, "t": 4}  # powers of 1000, or of 1024 with an i


@dataclass(kw_only=True, slots=True)
class MachineConfig:
    """What `rlhf plan` plans for. Sizes are texts: 80GB is 80 * 1000^3 bytes, 80GiB is 80 * 1024^3."""

    gpus: int = operational(8)
    gpus_per_host: int = operational(8)
    gpu_memory: str = operational("80GB")
    host_memory: str = operational("1TB")  # of a host; what is offloaded goes there
    reserve: float = operational(0.1)  # share of a GPU's memory for what is not modelled
    gpu: str = operational("H100")  # whose published speeds count; see `plan.speeds`
    flops: float | None = operational(None)  # peak FLOP/s of a GPU in model.dtype; null: the published one
    memory_bandwidth: float | None = operational(None)  # bytes/s; null: the published one
    share_of_peak: float = operational(0.4)  # of flops that matrix products reach in training
    share_of_bandwidth: float = operational(0.6)  # of memory_bandwidth that decoding reaches
    gpu_link: float = operational(450e9)  # bytes/s that a GPU sends to others of its host (NVLink 4, one way)
    network: float = operational(50e9)  # bytes/s that a GPU sends to other hosts (400 Gbit/s each)
    host_link: float = operational(
        50e9
    )  # bytes/s between a GPU and its host's memory (PCIe 5, less than the sheet's 64)
    # Names of files under conf/model: the shapes of models that are not there yet.
    shape: str | None = operational(None)  # of model.path
    reward_shape: str | None = operational(None)  # of reward models, and so of a value model begun as one
    # What the data would say; null: half of what the config allows, and no total where examples are not known.
    examples: int | None = operational(None)  # of the training data
    tokens: int | None = operational(None)  # of an example with all its responses, on average
    prompt_tokens: int | None = operational(None)  # rlhf ppo: of a prompt, on average
    response_tokens: int | None = operational(None)  # rlhf ppo: of a response, on average
    json: bool = operational(False)  # print JSON and nothing else


def size_of(text: str) -> float:
    """Bytes of a size such as 80GB, 40 GiB or 512MB.

    Raises:
        ValueError: for a text that is no size.
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([kmgt])(i?)b?\s*", text.lower())
    if found is None:
        raise ValueError(text)
    return float(found[1]) * (1024 if found[3] else 1000) ** UNITS[found[2]]


def check_machine(machine: MachineConfig) -> Iterator[str]:
    """Every problem of the section, one line each."""
    for name in ("gpu_memory", "host_memory"):
        text = getattr(machine, name)
        try:
            yield from () if size_of(text) > 0 else (f"machine.{name}={text}: must be more than 0",)
        except ValueError:
            yield f"machine.{name}={text}: is no size; write it as 80GB (1000^3) or 80GiB (1024^3)"
    for name in ("gpus", "gpus_per_host", "gpu_link", "network", "host_link"):
        yield from positive(f"machine.{name}", getattr(machine, name))
    for name in ("flops", "memory_bandwidth", "examples", "tokens", "prompt_tokens", "response_tokens"):
        if getattr(machine, name) is not None:
            yield from positive(f"machine.{name}", getattr(machine, name))
    for name in ("share_of_peak", "share_of_bandwidth"):
        yield from positive(f"machine.{name}", getattr(machine, name))
        yield from between(f"machine.{name}", getattr(machine, name), 0, 1)
    if not 0 <= machine.reserve < 1:
        yield f"machine.reserve={machine.reserve}: must be at least 0 and less than 1"
