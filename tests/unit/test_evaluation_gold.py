"""What `rlhf evaluate kind=gold` prints of many systems can be read."""

from __future__ import annotations

import io
import re
from typing import Any

from rich.console import Console

from rlhf_pipeline.data.lab.sets import rows
from rlhf_pipeline.evaluation.gold import judged, show

SYSTEMS = [f"system{i}" for i in range(9)]


def test_every_figure_is_whole_however_many_systems_there_are() -> None:
    prompts = [row["prompt"] for row in rows("heldout_prompts", count=12)]
    asked: list[list[dict[str, Any]]] = [
        prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}] for prompt in prompts
    ]
    answers = {
        name: [{"prompt": prompt, "response": "No.", "finish_reason": "stop"} for prompt in asked] for name in SYSTEMS
    }
    sink = io.StringIO()
    show(Console(file=sink, width=80), answers, judged(answers), samples=0)
    tables = sink.getvalue().split("by criterion", 1)[0]
    assert "…" not in sink.getvalue()
    assert tables.count("gold score") == 2, "five systems at a time"
    assert all(name in tables for name in SYSTEMS)
    assert re.search(r"│ +\d\.\d{3} +│", tables) and re.search(r"\[\d\.\d{3},", tables)
