"""Rollouts in two processes, at ZeRO 0 and 3, with adapters and without: what one process without an engine draws."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers_ranks import in_ranks

from rlhf_pipeline.config.ppo import RolloutConfig
from rlhf_pipeline.config.schema import EngineConfig, LoraConfig, ModelConfig, OptimConfig, TokenizerConfig
from rlhf_pipeline.data.loader import Layout
from rlhf_pipeline.generation.prompts import Asked

LENGTHS = (3, 17, 1, 9, 9, 30, 2)
OPTIONS = RolloutConfig(samples=3, max_new_tokens=14, temperature=0.8, batch_tokens=200)
ADAPTERS = LoraConfig(rank=4, alpha=64.0)
SEED, FIRST = 5, 1000


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    stage: int
    prompts: int = len(LENGTHS)
    lora: bool = False


CASES = [
    Case(name="zero0", stage=0),
    Case(name="zero3", stage=3),
    Case(name="zero3_lora", stage=3, lora=True),
    Case(name="one_prompt", stage=0, prompts=1),
    Case(name="zero3_one_prompt", stage=3, prompts=1),
]


def asked(count: int) -> list[Asked]:
    rng = np.random.default_rng(2)
    prompts = [rng.integers(5, 390, n).astype(np.int32) for n in LENGTHS]
    return [
        Asked(index=i, origin=f"p:{i}", messages=(), columns={}, tokens=tokens)
        for i, tokens in enumerate(prompts[:count])
    ]


def opened(base: Path, lora: bool, deepspeed_config: dict[str, Any] | None) -> tuple[Any, Any]:
    """The policy, and what stands for its renderer: one word in twelve ends an answer, so that lengths differ."""
    import torch

    from rlhf_pipeline.data.tokenizer import open_tokenizer
    from rlhf_pipeline.models.load import load_policy

    tokenizer = open_tokenizer(str(base), TokenizerConfig())
    policy = load_policy(
        ModelConfig(path=str(base)),
        lora=ADAPTERS if lora else None,
        tokenizer=tokenizer,
        seed=1,
        device=torch.device("cpu"),
        deepspeed_config=deepspeed_config,
    )
    policy.temperature, policy.gives_entropy = OPTIONS.temperature, True
    return policy, SimpleNamespace(tokenizer=tokenizer, end_ids=tuple(range(3, 400, 12)), eos_id=tokenizer.eos_token_id)


def rolled(
    model: Any, forward: Callable[..., Any], renderer: Any, prompts: int, rank: int, ranks: int
) -> dict[str, Any]:
    import torch

    from rlhf_pipeline.rollout import per_token, roll_out

    made = roll_out(model, asked(prompts), OPTIONS, renderer=renderer, seed=SEED, first=FIRST)
    layout = Layout(row_length=64, micro_rows=1, width_multiple=1, rank=rank, num_ranks=ranks)
    logprobs, entropy = per_token(forward, made.trees, layout, torch.device("cpu"))
    return {
        "tokens": [[r.tolist() for r in tree.responses] for tree in made.trees],
        "index": [tree.index for tree in made.trees],
        "texts": made.texts,
        "finished": made.finished,
        "sampled": made.sampled,
        "mask": made.mask,
        "logprobs": logprobs,
        "entropy": entropy,
    }


def draw_adapters(policy: Any, whole: Callable[..., Any]) -> None:
    """Adapters start as nothing; give them numbers."""
    import torch

    for name, parameter in policy.inner.named_parameters():
        if "lora_B" in name:
            with whole([parameter]), torch.no_grad():
                parameter.copy_(torch.linspace(-0.3, 0.3, parameter.numel()).view(parameter.shape))


def of_a_rank(base: Path, folder: Path) -> None:
    import deepspeed
    import torch

    from rlhf_pipeline import runtime
    from rlhf_pipeline.config.schema import Dtype
    from rlhf_pipeline.engine import Engine, deepspeed_json
    from rlhf_pipeline.rollout import sampling_model

    def whole(parameters: list[Any]) -> Any:
        return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)

    for case in CASES:
        config = EngineConfig(zero_stage=case.stage)
        json = deepspeed_json(config, dtype=Dtype.float32, max_grad_norm=1.0)
        policy, renderer = opened(base, case.lora, json)
        if case.lora:
            draw_adapters(policy, whole)
        engine = Engine(
            policy, engine=config, optim=OptimConfig(lr=1e-3), dtype=Dtype.float32, device=torch.device("cpu")
        )
        engine.train(False)
        torch.manual_seed(0)
        before = torch.random.get_rng_state()
        with sampling_model(engine, policy, OPTIONS) as model:
            assert (model is policy.inner) == (case.stage < 3)
            found = rolled(model, engine, renderer, case.prompts, runtime.rank(), runtime.world_size())
        assert torch.equal(torch.random.get_rng_state(), before)
        torch.save(found, folder / f"{case.name}_{runtime.rank()}.pt")


@pytest.fixture(scope="module")
def ranks(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each of two processes came to, in a file for each case."""
    folder = tmp_path_factory.mktemp("rollouts")
    in_ranks(of_a_rank, base, folder, ranks=2, folder=folder)
    return folder


def alone(base: Path, case: Case) -> dict[str, Any]:
    import torch

    policy, renderer = opened(base, case.lora, None)
    if case.lora:
        from contextlib import nullcontext

        draw_adapters(policy, lambda _: nullcontext())
    with torch.no_grad():
        return rolled(policy.inner, copy.copy(policy.eval()), renderer, case.prompts, 0, 1)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_two_processes_draw_what_one_does(
    case: Case, base: Path, ranks: Path, assert_close: Callable[..., None]
) -> None:
    import torch

    expected = alone(base, case)
    ends = expected["mask"].sum(1)
    assert case.prompts == 1 or (len(set(ends.tolist())) > 4 and 0 < expected["finished"].sum() < len(ends))
    for rank in range(2):
        found = torch.load(ranks / f"{case.name}_{rank}.pt")
        for name in ("tokens", "index", "texts"):
            assert found[name] == expected[name], name
        for name in ("finished", "mask"):
            assert torch.equal(found[name], expected[name]), name
        for name in ("sampled", "logprobs", "entropy"):
            assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5, what=name)
        assert_close(found["logprobs"], found["sampled"], rtol=1e-4, atol=1e-4)


def test_adapters_are_sampled_with(base: Path) -> None:
    """Or the case with adapters would hold without copying them."""
    assert alone(base, CASES[2])["tokens"] != alone(base, CASES[1])["tokens"]


def test_every_rank_knows_the_same(ranks: Path) -> None:
    import torch

    for case in CASES:
        one, other = (torch.load(ranks / f"{case.name}_{rank}.pt") for rank in range(2))
        assert all(torch.equal(one[name], other[name]) for name in ("sampled", "logprobs", "mask"))
