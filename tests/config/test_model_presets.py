"""The number of parameters that a shape's comment claims is the number that the model has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rlhf_pipeline import config
from rlhf_pipeline.config.compose import compose_node, to_object

RECIPES = Path(__file__).parents[2] / "docs" / "recipes.md"
SHAPES = [path for path in sorted((config.config_dir() / "model").glob("*.yaml")) if "\nshape:" in path.read_text()]


@pytest.mark.parametrize("path", SHAPES, ids=lambda path: path.stem)
def test_parameters(path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from rlhf_pipeline.models.shapes import shape_config

    claimed = re.findall(r"^#.*?(\d{1,3}(?:,\d{3})+) parameters", path.read_text(), re.MULTILINE)
    assert len(claimed) == 1 and f"| {claimed[0]} |" in RECIPES.read_text(), "the comment and docs/recipes.md agree"
    node, _ = compose_node("pretrain", [f"model={path.stem}", "data.train=x"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape_config(to_object(node).model.shape))
    assert f"{sum(p.numel() for p in model.parameters()):,}" == claimed[0]


def test_list_is_not_empty() -> None:
    assert {"lab", "7m", "30m", "1.3b", "6b", "175b"} <= {path.stem for path in SHAPES}
