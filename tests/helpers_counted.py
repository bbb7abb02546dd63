"""Counts what torch's CPU allocator gives out, by its own reports to the profiler: every block, kernels' own too."""

from __future__ import annotations

from types import TracebackType
from typing import Any


class Counted:
    """`with Counted() as counted: ...`; then bytes of blocks taken within: `live` at the end, `peak` at their most.

    Blocks that were there before do not count, also where they are freed within.
    """

    live: int
    peak: int

    def __enter__(self) -> Counted:
        from torch.profiler import ProfilerActivity, profile

        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._profile.__exit__(kind, error, trace)
        self.live = self.peak = 0
        sizes: dict[int, int] = {}
        results: Any = self._profile.profiler
        for _, pointer, size in sorted(_allocations(results.kineto_results.experimental_event_tree())):
            if size > 0:
                sizes[pointer] = size
                self.live += size
                self.peak = max(self.peak, self.live)
            else:
                self.live -= sizes.pop(pointer, 0)


def _allocations(events: Any) -> list[tuple[int, int, int]]:
    """(time, address, bytes: negative where freed) of every block."""
    from torch._C._profiler import _EventType

    found, waiting = [], list(events)
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag == _EventType.Allocation:
            found.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    return found
