"""The page: sections in the recipe's order, set into the template. What is read is read before, and nothing is written.

The page asks nothing of a network. Its policy allows its own script alone, by its hash; whatever models said is text, by
the template's escaping and by a script that only ever sets text.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_pipeline import __version__
from rlhf_pipeline.report import models, reward_models, verdicts
from rlhf_pipeline.report.collect import Collected, Evaluation, Stage
from rlhf_pipeline.report.costs import costs
from rlhf_pipeline.report.learning import MOST_RUNS, learning
from rlhf_pipeline.report.lineage import lineage
from rlhf_pipeline.report.parts import Block, Section, section
from rlhf_pipeline.report.samples import samples
from rlhf_pipeline.report.values import mapping

STAGES = {
    "pretrain": ("Pretraining", "A language model from text."),
    "sft": ("Supervised fine-tuning", "The base model learns to answer from demonstrations."),
    "rm": ("Reward model", "A model of which answers people prefer, from rankings."),
    "ppo": ("PPO", "The policy is trained against the reward, with a penalty for moving away from where it began."),
    "dpo": ("Direct objectives", "The policy is trained on preferences themselves, without a reward model."),
}
GOLD = "The lab's judge knows what is right, and scores any answer by program."
FRONTIER = "What was gained in reward for what was given up in KL."


def render(collected: Collected, *, title: str | None, most_samples: int) -> str:
    """The whole page, the same for the same arguments."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (folder / "report.js").read_text(encoding="utf-8")
    judged = samples(collected.judged("gold", "winrate", "rank"), limit=most_samples)
    page = environment.get_template("report.html.j2").render(
        title=title or collected.name,
        facts=facts(collected),
        notes=collected.notes,
        sections=sections(collected),
        samples=judged,
        details=[models.details(stage) for stage in collected.stages if stage.manifest],
        data=Markup(as_json(judged)),
        style=Markup((folder / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),  # not a letter more: its hash is in the page's policy
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        raw=Markup,
        version=__version__,
    )
    # Half a pair of surrogates, which a damaged text may hold, is no character that could be written.
    return page.encode("utf-8", "xmlcharrefreplace").decode()


def as_json(value: Any) -> str:
    """JSON that may stand in a page's script element: nothing in it can end the element, or be anything but data."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return re.sub("[\ud800-\udfff]", lambda half: f"\\u{ord(half[0]):04x}", text)


def facts(collected: Collected) -> list[tuple[str, str]]:
    """What the head of the page says beside the title."""
    stages = collected.stages
    written = max((stage.written for stage in stages if stage.written), default=None)
    said = {
        "newest model": f"{written:%Y-%m-%d %H:%M} UTC" if written else "",
        "runs": _counted(len(stages), "training run"),
        "evaluations": _counted(len(collected.evaluations), "evaluation"),
        "code": _shared(stages, "git_revision", length=12),
        "versions": ", ".join(_versions(stages)),
    }
    return [(name, value) for name, value in said.items() if value]


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}" if count else ""


def _shared(stages: Sequence[Stage], key: str, *, length: int) -> str:
    """One value for all runs that have one, or each with the runs it belongs to."""
    runs: dict[str, list[str]] = {}
    for stage in stages:
        if value := stage.manifest.get(key):
            runs.setdefault(str(value)[:length], []).append(stage.label)
    if len(runs) < 2:
        return "".join(runs)
    return ", ".join(f"{value} ({', '.join(of[:4])}{', ...' * (len(of) > 4)})" for value, of in runs.items())


def _versions(stages: Sequence[Stage]) -> list[str]:
    found = {f"{name} {one}" for stage in stages for name, one in mapping(stage.manifest.get("versions")).items()}
    return sorted(found)


def sections(collected: Collected) -> list[Section]:
    """Those that anything was found for."""
    stages = collected.stages
    found = [
        section("models", "Models", "", [models.overview(collected)]),
        section("lineage", "Lineage", "", [lineage(stages)]),
        *(_stage(collected, stage) for stage in STAGES),
        *_evaluations(collected),
        section("cost", "Time and throughput", "", costs(stages)),
    ]
    return [one for one in found if one is not None]


def _stage(collected: Collected, stage: str) -> Section | None:
    runs = collected.of(stage)
    if not runs:
        return None
    title, intro = STAGES[stage]
    if len(runs) > MOST_RUNS:
        intro += f" Of {len(runs)} runs the curves show the first {MOST_RUNS}."
    return section(stage, title, intro, [*learning(runs), *reward_models.beliefs(runs)])


def _evaluations(collected: Collected) -> list[Section | None]:
    several = {kind: len(collected.judged(kind)) > 1 for kind in ("gold", "winrate", "rank", "frontier")}

    def made(one: Evaluation, title: str, intro: str, blocks: Sequence[Block | None]) -> Section | None:
        whose = f": {one.label}" if several[one.kind] else ""
        anchor = "of-" + "".join(c if c.isascii() and c.isalnum() else f"_{ord(c):x}_" for c in one.label)
        return section(anchor, title + whose, intro, blocks)

    judged = [
        *(made(one, "Gold scores", GOLD, verdicts.gold(one)) for one in collected.judged("gold")),
        *(
            made(one, f"Win rates, judge {one.judge}", _pairs(one), [*verdicts.win_rates(one), *verdicts.ranking(one)])
            for one in collected.judged("winrate")
        ),
        *(
            made(one, f"Ranking, judge {one.judge}", _pairs(one), [*verdicts.ranking(one), *verdicts.win_rates(one)])
            for one in collected.judged("rank")
        ),
        *(made(one, "Frontier", FRONTIER, verdicts.frontier(one)) for one in collected.judged("frontier")),
    ]
    known = [
        *reward_models.known_rankings(collected.judged("rm")),
        *(verdicts.selection(one) for one in collected.judged("select")),
    ]
    return [
        *judged,
        section("rewards", "Rewards on held-out answers", "", known),
        section("lengths", "Length and diversity", "", [verdicts.lengths(collected.judged("winrate", "rank"))]),
    ]


def _pairs(one: Evaluation) -> str:
    """How many prompts were compared, and of whom some are missing."""
    prompts = one.results.get("prompts")
    left = ", ".join(f"{name} {count}" for name, count in mapping(one.results.get("unmatched")).items() if count)
    said = f"Pairs of answers to the same {prompts} prompts, each judged in both orders." if prompts else ""
    return f"{said} Prompts that not all systems answered are left out: {left}." if left else said
