"""The page: whole in itself, the same bytes for the same folder, nothing where nothing was found, and text as text."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from helpers_report import EVIL, prompt, verdict_row, write, write_lines, write_recipe, write_stage, write_winrate

from rlhf_pipeline.report.collect import collect
from rlhf_pipeline.report.models import overview
from rlhf_pipeline.report.page import as_json, render, sections

VOID = {"meta", "img", "input", "br", "link"}


class Outline(HTMLParser):
    """The page's elements; every one that is opened must be closed, in order."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture(scope="module")
def page(recipe: Path) -> str:
    return render(collect(recipe), title=None, most_samples=300)


def embedded(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    return dict(json.loads(found[1]))


def test_the_page_is_well_formed_and_its_links_lead_somewhere(page: str) -> None:
    outline = Outline(page)
    assert len(outline.ids) == len(set(outline.ids))
    assert outline.links
    assert all(link.startswith("#") and link[1:] in outline.ids for link in outline.links)
    assert outline.tags.count("script") == 2


def test_the_policy_allows_the_script_and_nothing_else(page: str) -> None:
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy.startswith(
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:"
    )
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", script)
    assert not re.search(r"https?://|@import|url\((?!#)", page)
    assert not re.search(r"<[^>]* on\w+=", re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL))


def test_what_models_said_is_data_and_text(page: str) -> None:
    assert EVIL not in page
    assert embedded(page)["samples"][0]["answers"][1]["text"] == EVIL
    assert "alert(1)</script>" not in page


def test_names_are_text(tmp_path: Path) -> None:
    folder = tmp_path / "<b>x&y"
    write_stage(folder / "<i>run", "sft", digest="s" * 64, config={"name": EVIL})
    made = render(collect(folder), title=None, most_samples=1)
    outline = Outline(made.replace("<title>", "<h6>").replace("</title>", "</h6>"))  # which the parser takes for markup
    assert "<b>x&y" in outline.text
    assert "<i>run" in outline.text
    assert EVIL in outline.text.replace("\\", "")
    assert not {"b", "i"} & set(outline.tags)


def test_the_same_folder_makes_the_same_bytes_wherever_it_lies(recipe: Path, page: str, tmp_path: Path) -> None:
    copy = shutil.copytree(recipe, tmp_path / "demo")
    assert render(collect(copy), title=None, most_samples=300) == page
    assert str(recipe) not in page


def test_secrets_stay_out(page: str) -> None:
    assert "hf_abcdefghijklmnopqrstuvwxyz" not in page
    assert "&#34;access_token&#34;: &#34;***&#34;" in page


def test_sections_of_a_recipe(recipe: Path) -> None:
    assert [one.title for one in sections(collect(recipe))] == [
        "Models",
        "Lineage",
        "Pretraining",
        "Supervised fine-tuning",
        "Reward model",
        "PPO",
        "Gold scores",
        "Win rates, judge gold",
        "Frontier",
        "Length and diversity",
        "Time and throughput",
    ]


def test_what_is_not_there_leaves_no_hole(tmp_path: Path) -> None:
    write_stage(tmp_path / "sft", "sft")
    found = collect(tmp_path)
    assert [one.title for one in sections(found)] == ["Models", "Supervised fine-tuning", "Time and throughput"]
    (figure,) = next(one for one in sections(found) if one.anchor == "sft").blocks
    assert figure.title == "Loss"
    outline = Outline(render(found, title="Mine", most_samples=300))
    assert "Answers side by side" not in outline.text
    assert "Configs and data" not in outline.text
    assert "Lineage" not in outline.text
    assert not re.search(r"None|nan|undefined", outline.text.split('"use strict"')[0])


@pytest.mark.parametrize("kind", ["gold", "winrate", "rank", "frontier", "rm", "select"])
def test_results_that_lack_everything(tmp_path: Path, kind: str) -> None:
    write_stage(tmp_path / "sft", "sft")
    write(tmp_path / "evaluate" / kind / "x" / "results.json", {"kind": kind})
    broken = {
        "systems": {"a": None, "b": {"score": "high"}},
        "comparisons": [{}, None],
        "points": [{}, 3],
        "ranking": 7,
    }
    write(tmp_path / "evaluate" / kind / "y" / "results.json", {"kind": kind, **broken})
    Outline(render(collect(tmp_path), title=None, most_samples=300))


def test_metrics_that_are_no_numbers(tmp_path: Path) -> None:
    rows = [{"step": i, "train/loss": "nan" if i == 2 else 1.0 * i, "train/grad_norm": "inf"} for i in (1, 2, 3)]
    write_stage(tmp_path / "sft", "sft", metrics=rows)
    (curves,) = (one for one in sections(collect(tmp_path)) if one.anchor == "sft")
    assert [block.title for block in curves.blocks] == ["Loss"]


def test_the_table_of_models(recipe: Path) -> None:
    found = overview(collect(recipe))
    assert found is not None
    heads = list(found.head)
    rows = {row[0].text: dict(zip(heads, row, strict=True)) for row in found.rows if row[0]}
    assert list(rows) == ["pretrain", "sft", "rm", "ppo"]

    def cell(row: str, head: str) -> tuple[str, str] | None:
        one = rows[row][head]
        return one and (one.text, one.note)

    assert cell("ppo", "parameters") == ("1.2 k", "")
    assert cell("sft", "gold score") == ("0.500", "[0.450, 0.550]")
    assert cell("ppo", "gold score") == ("0.600", "[0.550, 0.650]")
    assert cell("ppo", "beats sft, says gold") == ("60.0 %", "[55.0, 65.0]")
    assert cell("sft", "beats sft, says gold") is None
    assert cell("ppo", "KL") == ("0.600", "")
    assert cell("pretrain", "minutes") == ("6.0", "")


def test_the_supervised_model_is_the_baseline_whichever_way_it_was_judged(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    file = tmp_path / "evaluate" / "winrate" / "gold" / "results.json"
    results = json.loads(file.read_text())
    results["comparisons"][0] |= {"system": "sft", "baseline": "ppo"}
    write(file, results)
    found = overview(collect(tmp_path))
    assert found is not None
    column = found.head.index("beats sft, says gold")
    assert [row[column] and (row[column].text, row[column].note) for row in found.rows] == [
        None,
        None,
        None,
        ("40.0 %", "[35.0, 45.0]"),
    ]


def test_systems_that_are_no_models_here_have_rows(tmp_path: Path) -> None:
    write_winrate(tmp_path, [verdict_row(0, "Why?", "chat", {"ppo": "a", "sft": "b"}, 1.0)])
    found = overview(collect(tmp_path))
    assert found is not None
    assert [row[0].text for row in found.rows if row[0]] == ["ppo", "sft"]
    assert "stage" not in found.head


@pytest.mark.parametrize(
    "text", ["</script>", "<!--", "&amp;", "\u2028\u2029", '"\\', "\ud83d half", "Zoë 三 \U0001f600"]
)
def test_json_in_a_page(text: str) -> None:
    made = as_json({"text": text})
    assert json.loads(made) == {"text": text}
    assert not set("<>&\u2028\u2029") & set(made)
    made.encode("utf-8")


def test_damaged_characters_can_be_written(tmp_path: Path) -> None:
    folder = tmp_path / "evaluate" / "gold"
    row = {
        "prompt": prompt("half \ud83d"),
        "category": "\ud83d",
        "answers": {"a\ud83d": {"response": "\udc00", "score": 1.0}},
    }
    write_lines(folder / "verdicts.jsonl", [row])
    write(folder / "results.json", {"kind": "gold", "systems": {"a\ud83d": {"score": {"mean": 0.5}}}})
    made = render(collect(tmp_path), title=None, most_samples=3)
    assert made.encode("utf-8")
    assert html.unescape(made)
