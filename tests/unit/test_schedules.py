"""Learning-rate schedules against numbers worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_pipeline.functional.schedules import learning_rate

PLAIN: dict[str, Any] = {
    "num_steps": 5,
    "peak": 1.0,
    "decay": "cosine",
    "final_fraction": 0.1,
    "warmup_steps": 0,
    "warmup_start_fraction": 0.0,
}


def rates(**changes: Any) -> list[float]:
    settings = {**PLAIN, **changes}
    return [learning_rate(step, **settings) for step in range(settings["num_steps"])]


# cos(0), cos(45), cos(90), cos(135), cos(180 degrees) = 1, 0.7071068, 0, -0.7071068, -1; (1 + cos) / 2 falls from 1 to
# 0; the rate is 0.1 + 0.9 times that.
COSINE = [1.0, 0.8681981, 0.55, 0.2318019, 0.1]

CASES: dict[str, tuple[dict[str, Any], list[float]]] = {
    # Ouyang et al. 2022, appendix C: cosine down to 10 % of the peak, no warm-up.
    "instructgpt": ({"peak": 9.65e-6}, [9.65e-6 * x for x in COSINE]),
    "cosine to zero": ({"final_fraction": 0.0}, [1.0, 0.8535534, 0.5, 0.1464466, 0.0]),
    "linear": ({"decay": "linear", "peak": 2.0, "final_fraction": 0.0}, [2.0, 1.5, 1.0, 0.5, 0.0]),
    "linear to a fifth": ({"decay": "linear", "final_fraction": 0.2}, [1.0, 0.8, 0.6, 0.4, 0.2]),
    "constant": ({"decay": "constant", "peak": 3e-4}, [3e-4] * 5),
    # The same appendix, PPO: up from a tenth of the peak, then constant.
    "warm-up from a tenth": (
        {"decay": "constant", "num_steps": 7, "warmup_steps": 4, "warmup_start_fraction": 0.1},
        [0.1, 0.325, 0.55, 0.775, 1.0, 1.0, 1.0],
    ),
    "warm-up from nothing, then linear": (
        {"decay": "linear", "num_steps": 7, "warmup_steps": 2, "final_fraction": 0.0, "peak": 8.0},
        [0.0, 4.0, 8.0, 6.0, 4.0, 2.0, 0.0],
    ),
    "cosine after a warm-up": ({"num_steps": 7, "warmup_steps": 2}, [0.0, 0.5, *COSINE]),
    "one step": ({"num_steps": 1}, [1.0]),
    "two steps": ({"num_steps": 2}, [1.0, 0.1]),
    "all warm-up": ({"num_steps": 3, "warmup_steps": 4, "warmup_start_fraction": 0.2}, [0.2, 0.4, 0.6]),
}


@pytest.mark.parametrize("name", CASES)
def test_rates(name: str) -> None:
    changes, expected = CASES[name]
    assert rates(**changes) == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_a_step_past_the_end_stays_at_the_floor() -> None:
    assert learning_rate(9, **PLAIN) == pytest.approx(0.1)


@pytest.mark.parametrize("step", [0, 3])
def test_an_unknown_decay_is_refused_at_any_step(step: int) -> None:
    with pytest.raises(ValueError, match="decay must be constant, linear or cosine, not 'exponential'"):
        learning_rate(step, **{**PLAIN, "decay": "exponential", "warmup_steps": 2})
