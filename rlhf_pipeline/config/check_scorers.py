"""What the scorers of `rewards` must satisfy beyond their types."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlsplit

from rlhf_pipeline.config.ppo import ScorerConfig
from rlhf_pipeline.config.values import positive

TAKEN = ("std", "final", "length_correlation")  # of metrics, after rollout/score_


def scorers(rewards: dict[str, ScorerConfig]) -> Iterator[str]:
    """Of every scorer by itself: its name, that it is of one kind, its numbers."""
    for name, one in rewards.items():
        key = f"rewards.{name}"
        if name in TAKEN:
            yield f"{key}: rollout/score_{name} is another metric; choose another name"
        if not str(name).isidentifier():
            yield f"{key}: a scorer's name stands in the names of metrics; use letters, digits and _"
        given = [what for what in ("model", "program", "url") if getattr(one, what) is not None]
        if len(given) != 1:
            found = "has none" if not given else f"has {' and '.join(given)}"
            yield f"{key}: set exactly one of model, program and url; it {found}"
        if one.model is not None and one.model.path is None:
            yield f"{key}.model.path: has no value; name a reward model"
        if one.program is not None and (one.program.count(":") != 1 or not all(one.program.split(":"))):
            yield f"{key}.program={one.program}: must be module:function"
        if one.url is not None and urlsplit(one.url).scheme not in ("http", "https"):
            yield f"{key}.url: must begin with http:// or https://"
        if one.max_length < 2:
            yield f"{key}.max_length={one.max_length}: a prompt token and a response token need 2"
        for field in ("batch_tokens", "batch", "timeout"):
            yield from positive(f"{key}.{field}", getattr(one, field))
        if one.retries < 0:
            yield f"{key}.retries={one.retries}: must not be negative"
