"""The curves of every stage: which metrics belong on one picture, and what they should look like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from rlhf_pipeline.report import charts
from rlhf_pipeline.report.charts import Series
from rlhf_pipeline.report.collect import Stage
from rlhf_pipeline.report.parts import Figure, Key

MOST_RUNS = 2 * charts.COLOURS  # on one picture
NAMED_EACH_TIME = 4  # runs whose names stand over every picture
_STYLES = ("line", "dashed", "dotted")
_NEUTRAL = charts.COLOURS - 1  # the grey one


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """`lines` are metrics of every step, `points` those of evaluations, each with the name that the legend gives it."""

    title: str
    y: str
    lines: dict[str, str]
    caption: str
    points: dict[str, str] | None = None
    level: float | None = None
    lowest: float | None = None  # what lies below is cut off
    is_exact: bool = False  # a setting and no measurement


_LOSS = Panel(
    title="Loss",
    y="nats a token",
    lines={"train/loss": "training"},
    points={"eval/loss": "held out"},
    caption="Cross-entropy of the training batches and of held-out text. Both should fall; held-out loss that turns "
    "upwards while training falls is overfitting.",
)
_RATE = Panel(
    title="Learning rate",
    y="learning rate",
    lines={"train/lr": "learning rate"},
    is_exact=True,
    caption="The schedule as it was run: warm-up, then decay.",
)
_GRADIENT = Panel(
    title="Gradient norm",
    y="norm before clipping",
    lines={"train/grad_norm": "gradient norm"},
    caption="It should settle. Spikes that come with jumps of the loss ask for a smaller learning rate.",
)
_ACCURACY = Panel(
    title="Accuracy on comparisons",
    y="share that was right",
    lines={"train/accuracy": "training"},
    points={"eval/accuracy": "held out, 95 % interval"},
    level=0.5,
    caption="How often the preferred answer has the higher reward. A half (dashed) is chance; people agree with each other "
    "on about 73 % of such pairs (Ouyang et al. 2022), so much more than that on human data is suspicious.",
)
_WIN_RATE = Panel(
    title="Win rate against the start",
    y="share won",
    lines={},
    points={"eval/win_rate": "by score, 95 % interval", "eval/judge_win_rate": "by the judge, 95 % interval"},
    level=0.5,
    caption="How often the policy's answer to a held-out prompt is better than the reference's: by the scorers that it is "
    "trained on, and by a judge where there is one. Above the dashed half it is better.",
)
_KL = Panel(
    title="KL from the reference",
    y="nats an answer",
    lines={"rollout/kl": "rollouts"},
    points={"eval/kl": "held-out prompts"},
    caption="How far the policy has moved. It should grow slowly and level off; growth without end, or a jump, comes before "
    "answers that please the reward model alone.",
)
_LENGTH = Panel(
    title="Length of answers",
    y="tokens",
    lines={"rollout/length": "rollouts"},
    points={"eval/length": "held-out prompts"},
    caption="Tokens an answer. A steady climb together with the score may mean that length is what is rewarded.",
)
_ENDED = Panel(
    title="Answers that end by themselves",
    y="share",
    lines={"rollout/ended": "rollouts"},
    points={"eval/ended": "held-out prompts"},
    caption="The share that says its end token before it runs out of room. It should stay near 1.",
)
PANELS: dict[str, tuple[Panel, ...]] = {
    "pretrain": (_LOSS, _RATE, _GRADIENT),
    "sft": (_LOSS, _RATE, _GRADIENT),
    "rm": (
        Panel(
            title="Ranking loss",
            y="loss",
            lines={"train/loss": "training"},
            points={"eval/loss": "held out"},
            level=float(np.log(2)),
            caption="The loss over comparisons. ln 2 (dashed) is what a model that knows nothing has; held-out loss that "
            "turns upwards after the first epoch is the overfitting that the paper trains one epoch to avoid.",
        ),
        _ACCURACY,
        _RATE,
        _GRADIENT,
    ),
    "ppo": (
        Panel(
            title="Score",
            y="score",
            lines={"rollout/score": "rollouts"},
            points={"eval/score": "held-out prompts"},
            caption="Mean score of sampled answers, before the KL penalty. It should rise and level off. What it is "
            "worth is for another judge to say: see the frontier and the win rates.",
        ),
        _KL,
        _WIN_RATE,
        Panel(
            title="Entropy",
            y="nats a token",
            lines={"rollout/entropy": "rollouts"},
            caption="Of the policy's next-token distribution. It falls as the policy makes up its mind; near 0 it has "
            "stopped exploring.",
        ),
        _LENGTH,
        _ENDED,
        Panel(
            title="Clip fraction",
            y="share of tokens",
            lines={"policy/clip_fraction": "clip fraction"},
            caption="The share of tokens whose ratio was clipped. A few per cent are healthy; tens of per cent are steps "
            "that are too large.",
        ),
        Panel(
            title="Explained variance",
            y="share of the returns' variance",
            lines={"rollout/explained_variance": "value model"},
            level=0.0,
            lowest=-1.05,
            caption="How much of the returns the value model foresees. It should rise towards 1; below 0 (dashed) the "
            "values are worse than a constant. What lies below -1 is cut off.",
        ),
        Panel(
            title="Gradient norms",
            y="norm before clipping",
            lines={"policy/grad_norm": "policy", "value/grad_norm": "value model"},
            caption="Both should settle; spikes ask for smaller steps.",
        ),
        Panel(
            title="KL penalty",
            y="beta",
            lines={"kl/beta": "beta"},
            is_exact=True,
            caption="The coefficient of the KL penalty. Constant, unless a controller holds the KL at a target.",
        ),
        Panel(
            title="Alignment tax: loss on pretraining text",
            y="nats a token",
            lines={"policy/ptx": "pretraining mix"},
            caption="Loss on the text that is mixed in (PPO-ptx). It should stay where it began; a rise is what "
            "alignment costs on ordinary text.",
        ),
        Panel(
            title="Learning rate",
            y="learning rate",
            lines={"policy/lr": "policy"},
            is_exact=True,
            caption="The schedule as it was run.",
        ),
    ),
    "dpo": (
        Panel(
            title="Loss",
            y="loss",
            lines={"train/loss": "training"},
            points={"eval/loss": "held out"},
            caption="The objective's own loss, which another objective's is not comparable with. For DPO it begins at "
            "ln 2 = 0.693.",
        ),
        _ACCURACY,
        Panel(
            title="Margin of implicit rewards",
            y="reward",
            lines={"train/margin": "training"},
            points={"eval/margin": "held out"},
            level=0.0,
            caption="Implicit reward of the preferred answer less that of the other. It should grow on held-out pairs "
            "too; a gap between the two curves is overfitting.",
        ),
        Panel(
            title="Implicit rewards",
            y="reward",
            lines={"train/reward_chosen": "preferred", "train/reward_rejected": "other"},
            level=0.0,
            caption="Where the margin comes from. That both fall is common; a preferred reward that falls far means the "
            "model moves away from the good answers as well.",
        ),
        _KL,
        _WIN_RATE,
        _LENGTH,
        _ENDED,
        _RATE,
        _GRADIENT,
    ),
}


def learning(stages: Sequence[Stage]) -> list[Figure]:
    """The panels of runs of one stage that have anything on them; several runs share each of them.

    Of many runs only the first picture says which is which.
    """
    shown = stages[:MOST_RUNS]
    panels = PANELS[stages[0].stage]
    found = (_figure(panel, shown, slug=f"{stages[0].stage}-{i}") for i, panel in enumerate(panels))
    figures = [one for one in found if one is not None]
    if len(shown) > NAMED_EACH_TIME:
        runs = {stage.label for stage in shown}
        later = (replace(one, legend=tuple(key for key in one.legend if key.label not in runs)) for one in figures[1:])
        return [*figures[:1], *later]
    return figures


def _figure(panel: Panel, stages: Sequence[Stage], *, slug: str) -> Figure | None:
    """Of one run every metric has a colour; of several the run has it, and the metric a style."""
    lines, points = list(panel.lines.items()), list((panel.points or {}).items())
    series: list[Series] = []
    runs: dict[str, Key] = {}
    metrics: dict[str, Key] = {}
    for i, stage in enumerate(stages):
        for j, (name, label) in enumerate([*lines, *points]):
            style = "dots" if j >= len(lines) else "line"
            if len(stages) > 1 and style == "line":
                style = _STYLES[j if len(lines) > 1 else i // charts.COLOURS]
            colour = j if len(stages) == 1 else i
            one = _series(stage, name, colour=colour, style=style, is_exact=panel.is_exact)
            if one is not None:
                series.append(one)
                runs.setdefault(stage.label, Key(label=stage.label, colour=i % charts.COLOURS, style=style))
                shade = colour if len(stages) == 1 else _NEUTRAL
                metrics.setdefault(label, Key(label=label, colour=shade, style=style))
    if not series:
        return None
    if len(stages) == 1:
        says_nothing = len(metrics) == 1 and series[0].style == "line"
        legend = () if says_nothing else tuple(metrics.values())
    else:
        legend = (*runs.values(), *(metrics.values() if len(lines) > 1 else ()))
    x = "iteration" if stages[0].stage == "ppo" else "step"
    end = max(float(stage.metrics[-1]["step"]) for stage in stages if stage.metrics)
    picture = charts.curves(series, slug, x=x, y=panel.y, end=end, level=panel.level, lowest=panel.lowest)
    return Figure(title=panel.title, caption=panel.caption, picture=picture, legend=legend)


def _series(stage: Stage, name: str, *, colour: int, style: str, is_exact: bool) -> Series | None:
    rows = [row for row in stage.metrics if np.isfinite(row.get(name, np.nan))]
    if len(rows) < (1 if style == "dots" else 2):
        return None
    x, y = (np.array([row[key] for row in rows], dtype=float) for key in ("step", name))
    bounds = [np.array([row.get(f"{name}_{end}", row[name]) for row in rows], dtype=float) for end in ("low", "high")]
    has_bounds = style == "dots" and any(f"{name}_low" in row for row in rows)
    low, high = bounds if has_bounds else (None, None)
    return Series(x=x, y=y, low=low, high=high, colour=colour, style=style, is_exact=is_exact)
