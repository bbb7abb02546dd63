"""The gold judge as a program that scores (docs/scorers.md): `program: rlhf_pipeline.data.lab.scorer:gold`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlhf_pipeline.data.lab.judge import judge

if TYPE_CHECKING:
    from rlhf_pipeline.scoring.episodes import Episode


def gold(episodes: Sequence[Episode]) -> list[float]:
    """The judge's score of each response, from 0 to 1.

    Raises:
        UserError: when a prompt is not one of the lab's.
    """
    return [judge(one.prompt, one.response, finished=one.finished).score for one in episodes]
