"""The reference's numbers made by two processes: those that one makes, seen by both; and when it fails, both are told."""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_ranks import in_ranks
from helpers_trees import random_trees

from rlhf_pipeline.config.schema import EngineConfig, LoraConfig, ModelConfig, OptimConfig, TokenizerConfig
from rlhf_pipeline.data.loader import Layout
from rlhf_pipeline.data.store import TreeDataset
from rlhf_pipeline.direct import reference as direct
from rlhf_pipeline.direct.reference import partners, referenced
from rlhf_pipeline.errors import UserError

SELECTIONS = {"all": range(7), "two": [4, 1], "one": [3]}  # of one, a rank has nothing to do


def data_sets(folder: Path) -> dict[str, Any]:
    data = random_trees(folder / "data.arrow")
    selected: dict[str, Any] = {name: data.select(np.array(chosen)) for name, chosen in SELECTIONS.items()}
    return {**selected, "partners": partners(data, seed=0, max_length=9)}


def policy_of(base: Path, lora: bool, deepspeed_config: dict[str, Any] | None) -> Any:
    import torch

    from rlhf_pipeline.data.tokenizer import open_tokenizer
    from rlhf_pipeline.models.load import load_policy

    return load_policy(
        ModelConfig(path=str(base)),
        lora=LoraConfig(rank=4, alpha=64.0) if lora else None,
        tokenizer=open_tokenizer(str(base), TokenizerConfig()),
        seed=1,
        device=torch.device("cpu"),
        deepspeed_config=deepspeed_config,
    )


def layout(rank: int, ranks: int) -> Layout:
    return Layout(row_length=16, micro_rows=1, width_multiple=1, rank=rank, num_ranks=ranks)


def of_a_rank(base: Path, folder: Path) -> None:
    import deepspeed
    import torch

    from rlhf_pipeline import runtime
    from rlhf_pipeline.config.schema import Dtype
    from rlhf_pipeline.engine import Engine, deepspeed_json
    from rlhf_pipeline.models.reference import Reference

    direct.MICRO_BATCHES_AT_ONCE = 2
    config = EngineConfig(zero_stage=3)
    policy = policy_of(base, True, deepspeed_json(config, dtype=Dtype.float32, max_grad_norm=1.0))
    trained = [parameter for name, parameter in policy.inner.named_parameters() if "lora_B" in name]
    with deepspeed.zero.GatheredParameters(trained, modifier_rank=0), torch.no_grad():
        for parameter in trained:
            parameter.copy_(torch.linspace(-0.3, 0.3, parameter.numel()).view(parameter.shape))
    engine = Engine(policy, engine=config, optim=OptimConfig(lr=1e-3), dtype=Dtype.float32, device=torch.device("cpu"))
    main, data, opened = runtime.is_main(), data_sets(folder), []

    def reference() -> Reference:
        opened.append(1)
        return Reference(None, engine, device=engine.device, offload=False)

    def made(one: Any, identity: str = "m") -> tuple[Any, list[str]]:
        said: list[str] = []
        ranks = layout(runtime.rank(), runtime.world_size())
        names = {"identity": {"model": identity}, "cache_dir": folder, "say": said.append}
        return referenced(one, reference, layout=ranks, **names), said  # type: ignore[arg-type]

    found = {}
    for name, one in data.items():
        numbers, said = made(one)
        found[name] = [torch.tensor(np.concatenate(numbers[i].numbers["reference"])) for i in range(len(one))]
        assert len(said) == (1 if main else 0)
    assert len(opened) == len(data)
    made(data["all"])
    assert len(opened) == len(data), "it was on the disk"

    runtime.barrier()
    if main:
        for file in (folder / "reference").glob("*.npy"):
            file.write_bytes(file.read_bytes()[:-1])
    _, said = made(data["all"])
    assert len(opened) == len(data) + 1 and ["checksum" in line for line in said] == [True] * main

    for number, call in ((errno.ENOSPC, 1), (errno.EROFS, 2)):
        calls: list[int] = []
        original = direct.sync
        if main:  # only the one that writes meets it
            direct.sync = partial(_failing, calls, number, call, original)  # type: ignore[assignment]
        with pytest.raises(UserError, match="while saving"):
            made(data["all"], "other")
        direct.sync = original  # type: ignore[assignment]
        assert len(calls) == (call if main else 0)
        runtime.barrier()
        assert not list((folder / "reference").glob("*.tmp"))

    head = policy.inner.get_output_embeddings().weight
    with deepspeed.zero.GatheredParameters([head], modifier_rank=0), torch.no_grad():
        head.fill_(torch.nan)
    with pytest.raises(UserError, match=r"f:\d: .*not finite"):
        made(data["all"], "broken")
    assert runtime.sum_over_ranks({"here": 1.0}) == {"here": 2.0}
    torch.save(found, folder / f"{runtime.rank()}.pt")


def _failing(calls: list[int], number: int, call: int, original: Callable[[Path], None], path: Path) -> None:
    calls.append(1)
    if len(calls) == call:
        raise OSError(number, "no")
    original(path)


@pytest.mark.slow
def test_two_processes_make_what_one_does(base: Path, tmp_path: Path, assert_close: Callable[..., None]) -> None:
    import torch

    from rlhf_pipeline.models.reference import Reference

    data = data_sets(tmp_path)
    in_ranks(of_a_rank, base, tmp_path, ranks=2, folder=tmp_path)
    of_ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    plain: Any = policy_of(base, False, None)
    alone = tmp_path / "alone"
    for name, one in data.items():
        expected: TreeDataset = referenced(
            one,
            lambda: Reference(plain.eval(), None, device=torch.device("cpu"), offload=False),  # type: ignore[arg-type]
            layout=layout(0, 1),
            identity={},
            cache_dir=alone,
            say=lambda _: None,
        )
        for i in range(len(one)):
            number = torch.tensor(np.concatenate(expected[i].numbers["reference"]))
            assert number.any()
            assert_close(of_ranks[0][name][i], number, rtol=1e-5, atol=1e-5, what=name)
            assert torch.equal(of_ranks[0][name][i], of_ranks[1][name][i])
