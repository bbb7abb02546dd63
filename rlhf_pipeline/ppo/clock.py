"""Where an iteration's seconds go."""

from __future__ import annotations

import time

import torch

from rlhf_pipeline.machine import peak_memory_bytes
from rlhf_pipeline.rollout import Rollout


class Clock:
    """Seconds of the phases of an iteration, each up to the call that names it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def passed(self, phase: str) -> None:
        """What ran since the last call was this phase."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # what was only started is not done
        now = time.perf_counter()
        self.seconds[phase], self._since = now - self._since, now

    def rates(self, rollout: Rollout) -> dict[str, float]:
        """The seconds of every phase, and what they come to."""
        whole = sum(self.seconds.values())
        return {
            **{f"time/{phase}_seconds": seconds for phase, seconds in self.seconds.items()},
            "time/iteration_seconds": whole,
            "time/episodes_per_second": len(rollout.texts) / whole,
            "time/rollout_tokens_per_second": rollout.num_tokens / self.seconds["rollout"],
            "time/peak_memory_gb": peak_memory_bytes() / 1e9,
        }
