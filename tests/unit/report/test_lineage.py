"""The graph of artifacts: edges by content hash, columns by descent, and no line through a box."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from helpers_report import write_recipe, write_stage

from rlhf_pipeline.report.collect import collect
from rlhf_pipeline.report.lineage import BOX, HIGH, lineage


def graph(folder: Path) -> Any:
    figure = lineage(collect(folder).stages)
    assert figure is not None
    return ElementTree.fromstring(figure.picture)


def boxes(svg: Any) -> dict[str, tuple[float, float, bool]]:
    """By title: left, top, and whether it is in the folder."""
    found = {}
    for group in [*svg.iter("a"), *svg.iter("g")]:
        rect, title = group.find("rect"), group.find("text")
        found[title.text] = (float(rect.get("x")), float(rect.get("y")), "outside" not in rect.get("class"))
    return found


def edges(svg: Any) -> list[tuple[list[float], str]]:
    return [
        ([float(one) for one in re.findall(r"-?[\d.]+", path.get("d"))], path.find("title").text)
        for path in svg.iter("path")
        if path.get("class") == "edge"
    ]


def test_a_recipe(tmp_path: Path) -> None:
    svg = graph(write_recipe(tmp_path))
    found = boxes(svg)
    lefts = [found[name][0] for name in ("pretrain", "sft", "rm", "ppo")]
    assert lefts == sorted(set(lefts))
    assert all(inside for *_, inside in found.values())
    assert sorted(role for _, role in edges(svg)) == ["model", "model", "model, reference", "rewards.rm"]


def test_a_line_that_passes_a_column_runs_between_its_boxes(tmp_path: Path) -> None:
    svg = graph(write_recipe(tmp_path))
    left, top, _ = boxes(svg)["rm"]
    (passing,) = (numbers for numbers, role in edges(svg) if role == "model, reference")
    levels = {y for x, y in zip(passing[::2], passing[1::2], strict=False) if left <= x <= left + BOX}
    assert levels
    assert all(y < top or y > top + HIGH for y in levels)


def test_parents_from_elsewhere_and_made_anew(tmp_path: Path) -> None:
    write_stage(tmp_path / "sft", "sft", digest="new" * 10, parents={"model": ("hub/base", None)})
    write_stage(tmp_path / "dpo", "dpo", digest="d" * 30, parents={"model": ("runs/x/sft/artifact", "old" * 10)})
    found = boxes(graph(tmp_path))
    assert {name: inside for name, (*_, inside) in found.items()} == {
        "sft": True,
        "dpo": True,
        "hub/base": False,
        "runs/x/sft/artifact": False,
    }


def test_children_of_one_parent_stand_in_order_and_apart(tmp_path: Path) -> None:
    write_stage(tmp_path / "sft", "sft", digest="s" * 64)
    for i in range(6):
        write_stage(tmp_path / f"dpo_{i}", "dpo", digest=f"{i}" * 64, parents={"model": ("sft/artifact", "s" * 64)})
    found = boxes(graph(tmp_path))
    tops = [found[f"dpo_{i}"][1] for i in range(6)]
    assert all(b - a >= HIGH for a, b in pairwise(tops))


def test_manifests_that_go_round_in_a_circle_end(tmp_path: Path) -> None:
    write_stage(tmp_path / "a", "sft", digest="a" * 64, parents={"model": ("b", "b" * 64)})
    write_stage(tmp_path / "b", "sft", digest="b" * 64, parents={"model": ("a", "a" * 64)})
    assert len(boxes(graph(tmp_path))) == 2


def test_one_artifact_without_parents_is_no_graph(tmp_path: Path) -> None:
    write_stage(tmp_path / "sft", "sft", digest="s" * 64)
    assert lineage(collect(tmp_path).stages) is None


def test_names_are_text(tmp_path: Path) -> None:
    evil = "<b onload='x'>&\"y"
    write_stage(tmp_path / "sft", "sft", digest="s" * 64, parents={"model": (evil, None)})
    assert evil in boxes(graph(tmp_path))
