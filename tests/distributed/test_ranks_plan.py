"""What `rlhf plan` says of an engine's states, against blocks counted in two processes, with real updates of a tiny model.

Two processes work through all layouts and leave what they counted in a file.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_ranks import in_ranks

from rlhf_pipeline.config.schema import (
    Architecture,
    Attention,
    Dtype,
    EngineConfig,
    Offload,
    OptimConfig,
    ShapeConfig,
)
from rlhf_pipeline.config.stages import SftConfig
from rlhf_pipeline.plan.memory import memory_of
from rlhf_pipeline.plan.time import sent_by_update

RANKS, WITHIN = 2, 0.15
ROW, ROWS, BUCKET = 128, 2, 100_000
SHAPE = ShapeConfig(
    architecture=Architecture.llama, hidden=128, layers=3, heads=4, kv_heads=2, intermediate=512, vocab_size=512,
    context=256,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Case:
    stage: int
    dtype: Dtype = Dtype.float32
    offload: bool = False

    @property
    def name(self) -> str:
        return f"zero{self.stage}" + "_bf16" * (self.dtype is Dtype.bfloat16) + "_offload" * self.offload

    @property
    def config(self) -> SftConfig:
        config = SftConfig()
        config.model.shape, config.model.dtype, config.model.attention = SHAPE, self.dtype, Attention.dense
        config.optim = OptimConfig(lr=1e-3)
        config.data.max_length, config.batch.row_length, config.batch.micro_rows = ROW, ROW, ROWS
        parked = Offload.cpu if self.offload else Offload.none
        config.engine = EngineConfig(
            zero_stage=self.stage,
            offload_optimizer=parked,
            offload_parameters=parked if self.stage == 3 else Offload.none,
            extra={"zero_optimization": {"reduce_bucket_size": BUCKET}},
        )
        config.machine.gpus = RANKS
        return config


QUICK = [Case(stage=0), *(Case(stage=stage, dtype=Dtype.bfloat16) for stage in (1, 2, 3))]
SLOW = [
    *(Case(stage=stage) for stage in (1, 2, 3)),
    *(Case(stage=stage, dtype=Dtype.bfloat16, offload=True) for stage in (2, 3)),
]
CASES = [pytest.param(case, marks=pytest.mark.slow) for case in (*QUICK, *SLOW)]


def count_all(file: Path, cases: list[Case]) -> None:
    """In each process; the first one writes."""
    import torch.distributed as dist

    found = {case.name: _count(case) for case in cases}
    if dist.get_rank() == 0:
        file.write_text(json.dumps(found))


def _count(case: Case) -> dict[str, float]:
    import gc

    import torch
    from helpers_counted import Counted
    from transformers import AutoModelForCausalLM

    from rlhf_pipeline.data.packing import pack
    from rlhf_pipeline.data.tree import Tree
    from rlhf_pipeline.engine import MASTER, Engine
    from rlhf_pipeline.models.load import TORCH_DTYPES
    from rlhf_pipeline.models.shapes import shape_config
    from rlhf_pipeline.models.tree_model import TreeBatch, TreeModel

    config, response = case.config, np.arange(ROW - 1, dtype=np.int32)
    tree = Tree(prompt=np.zeros(1, np.int32), responses=(response,), scored=(np.ones(ROW - 1, bool),), index=0)
    batch = TreeBatch.of(pack([[tree]] * ROWS), torch.device("cpu"))

    def update(engine: Any) -> None:
        for last in (False, True):
            engine.backward(engine(batch).mean(), last=last)

    gc.freeze()  # what is there already is neither looked at nor counted
    inner = AutoModelForCausalLM.from_config(
        shape_config(SHAPE), attn_implementation="sdpa", dtype=TORCH_DTYPES[case.dtype]
    )
    engine = Engine(
        TreeModel(inner), engine=config.engine, optim=config.optim, dtype=case.dtype, device=torch.device("cpu")
    )
    engine.train()
    update(engine)
    engine.step(1e-3)
    engine.synchronise()  # at stage 3 nothing stays gathered
    found = {"kept": float(_held())}
    states = engine.slices()
    pointers = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for s in states for t in s.tensors.values()
    }
    if case.stage == 0:  # the masters are the weights
        for one in states:
            pointers.pop(one.tensors[MASTER].untyped_storage().data_ptr(), None)
    found["optimiser"] = sum(pointers.values())
    weights = [getattr(p, "ds_tensor", p) for p in inner.parameters()]
    found["weights"] = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in weights}.values())
    with Counted() as counted:
        engine.backward(engine(batch).mean(), last=False)
        gc.collect()
    found["gradients"] = counted.live
    engine.backward(engine(batch).mean(), last=True)
    engine.step(1e-3)
    engine.synchronise()
    with Counted() as counted, Sent() as sent:
        update(engine)
        engine.step(1e-3)
    found["peak"], found["sent"] = found["kept"] + counted.peak, sent.bytes
    return found


def _held() -> int:
    """Bytes of the tensors that have been made since the last freeze."""
    import gc

    import torch

    gc.collect()
    tensors = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor) and not one.is_meta]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


class Sent:
    """Bytes that a ring of processes would send for the collectives within."""

    def __enter__(self) -> Sent:
        import deepspeed
        import torch.distributed as dist

        backend = deepspeed.comm.comm.cdb
        self.bytes = 0.0
        self._own = [
            (dist, "all_reduce", dist.all_reduce, 2.0),
            (backend, "all_gather_function", backend.all_gather_function, 1.0),
            (backend, "reduce_scatter_function", backend.reduce_scatter_function, 1.0),
        ]
        for owner, name, function, times in self._own:
            setattr(owner, name, self._counting(function, times))
        return self

    def _counting(self, function: Any, times: float) -> Any:
        def counting(*args: Any, **kwargs: Any) -> Any:
            whole = max(one.nbytes for one in (*args, *kwargs.values()) if hasattr(one, "nbytes"))
            self.bytes += times * whole * (RANKS - 1) / RANKS
            return function(*args, **kwargs)

        return counting

    def __exit__(self, *_: object) -> None:
        for owner, name, function, _times in self._own:
            setattr(owner, name, function)


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], dict[str, float]]:
    """What was counted of a case; the quick ones are counted together, and the slow ones where they are asked for."""

    @functools.cache
    def count(slow: bool) -> dict[str, dict[str, float]]:
        folder = tmp_path_factory.mktemp("counted")
        in_ranks(count_all, folder / "found.json", SLOW if slow else QUICK, ranks=RANKS, folder=folder)
        found: dict[str, dict[str, float]] = json.loads((folder / "found.json").read_text())
        return found

    return lambda case: count(case in SLOW)[case.name]


def near(expected: float) -> Any:
    return pytest.approx(expected, rel=WITHIN)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_lines(counted: Callable[[Case], dict[str, float]], case: Case) -> None:
    found, memory = counted(case), memory_of(case.config)
    states, (phase,) = memory.models.policy.states, memory.phases
    # On a CPU host and device are one.
    assert near(found["kept"]) == states.kept + states.host
    weights = states.weights + (memory.models.policy.parameters.trained if case.offload and case.stage == 3 else 0)
    assert near(found["weights"]) == weights
    if not case.offload:
        assert near(found["optimiser"]) == states.optimiser
    if case.name in ("zero0", "zero1_bf16", "zero2_bf16"):
        assert near(found["gradients"]) == states.gradients - states.kept_gradients
    peak = max(
        phase.total + states.host, states.kept - states.kept_gradients + states.step + states.host + states.host_step
    )
    assert near(found["peak"]) == peak


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_communication(counted: Callable[[Case], dict[str, float]], case: Case) -> None:
    model = memory_of(case.config).models.policy
    assert near(counted(case)["sent"]) == sent_by_update(case.config, model, 2)
