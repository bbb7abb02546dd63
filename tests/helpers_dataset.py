"""Sources of small data sets, and what lies in them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from rlhf_pipeline.data.dataset import Source
from rlhf_pipeline.data.encode import Lengths
from rlhf_pipeline.data.store import TreeDataset

CONF = Path(__file__).parents[1] / "conf"
LENGTHS = Lengths(max_length=64, max_prompt_length=48, long_prompt="drop", long_response="cut")
WriteRows = Callable[..., str]
MakeTokenizer = Callable[..., PreTrainedTokenizerFast]


def pair(number: int, answer: str = "Blue.") -> dict[str, str]:
    return {"prompt": f"How is sky {number}?", "response": answer}


def demonstrations(path: str, **changes: Any) -> Source:
    return Source(path=path, kind="demonstration", **changes)


def contents(data: TreeDataset) -> list[tuple[Any, ...]]:
    return [
        (tree.prompt.tolist(), [r.tolist() for r in tree.responses], [s.tolist() for s in tree.scored]) for tree in data
    ]
