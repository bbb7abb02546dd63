"""What the pictures of an evaluation share: figures without pyplot's global state, and files that are whole or not there."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which the colour-blind can tell apart, without yellow, which nobody sees on white.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#767676"
COLOURS = (BLUE, ORANGE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vP"  # beside the colours, for those who see none; one less, so that both together last longer


def figure(width: float, height: float) -> Figure:
    """A figure with a canvas of its own, sizes in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made


def write(made: Figure, panels: Iterable[Axes], path: Path) -> None:
    """Save the figure as PNG; whoever reads `path` meanwhile finds the old picture or the new one."""
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    unfinished = path.with_name(path.name + ".tmp")
    try:
        made.savefig(unfinished, dpi=120, format="png")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
