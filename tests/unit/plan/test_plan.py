"""Memory by phase, advice and time of `rlhf plan`, against figures worked out by hand. No torch."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_pipeline.config.compose import compose_node, to_object
from rlhf_pipeline.config.machine import size_of
from rlhf_pipeline.config.schema import Algorithm, Attention, Dtype, EngineConfig, Offload
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.plan import advice, memory, shape, show, time
from rlhf_pipeline.plan.states import Parameters, states

GB = 1e9


@functools.cache
def composed(stage: str, overrides: tuple[str, ...]) -> Any:
    node, refused = compose_node(stage, list(overrides))
    assert not refused, refused
    return to_object(node)


def config_of(stage: str, *overrides: str) -> Any:
    return copy.deepcopy(composed(stage, overrides))


# States


@pytest.mark.parametrize(
    ("stage", "dtype", "weights", "optimiser", "gradients"),
    [
        (0, Dtype.float32, 4, 8, 4),
        (1, Dtype.float32, 4, 12 / 4, 4),
        (2, Dtype.float32, 4, 12 / 4, 8 / 4),
        (3, Dtype.float32, 4 / 4, 12 / 4, 4 / 4),
        (1, Dtype.bfloat16, 2, 12 / 4, 6),
        (2, Dtype.bfloat16, 2, 12 / 4, 4 / 4),
        (3, Dtype.bfloat16, 2 / 4, 12 / 4, 4 / 4),
    ],
)
def test_bytes_of_a_parameter(stage: int, dtype: Dtype, weights: float, optimiser: float, gradients: float) -> None:
    """On one of four processes. The sum of bf16 is 18 at stages 2 and 3, the textbook's 16 with fp32 gradients."""
    parameters = Parameters(trained=10**6, frozen_bytes=0, elements=10**6, largest=10**4)
    engine = EngineConfig(zero_stage=stage, extra={"zero_optimization": {"reduce_bucket_size": 10**7}})
    found = states(parameters, engine, dtype=dtype, algorithm=Algorithm.adamw, processes=4)
    assert (found.weights, found.optimiser, found.gradients) == (weights * 1e6, optimiser * 1e6, gradients * 1e6)
    rmsprop = states(parameters, engine, dtype=dtype, algorithm=Algorithm.rmsprop, processes=4)
    assert found.optimiser - rmsprop.optimiser == 4e6 / (1 if stage == 0 else 4)


def test_offloading_moves_states_to_the_host() -> None:
    parameters = Parameters(trained=10**6, frozen_bytes=0, elements=10**6, largest=10**4)
    both = EngineConfig(zero_stage=3, offload_optimizer=Offload.cpu, offload_parameters=Offload.cpu)
    found = states(parameters, both, dtype=Dtype.bfloat16, algorithm=Algorithm.adamw, processes=2)
    assert (found.weights, found.optimiser, found.gradients) == (0, 0, 0)
    assert found.host == (2 + 12 + 4 + 4) * 1e6 / 2  # weights, masters and moments, a flat gradient and its fp32 copy


# Shapes


def test_a_folders_shape(tmp_path: Path) -> None:
    values = {
        "model_type": "llama", "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 16, "vocab_size": 10, "max_position_embeddings": 32, "dtype": "float16",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(values))
    found = shape.of_folder(str(tmp_path), key="model.path")
    assert found is not None
    # Embedding and head 80 each; a layer: 4 * 64 in attention, 3 * 128, two norms of 8; a last norm of 8.
    assert found.policy == 2 * 80 + 2 * (4 * 64 + 3 * 128 + 16) + 8
    assert found.scorer == found.policy - 80 + 8
    assert shape.dtype_of_folder(str(tmp_path)) == "float16"
    assert shape.of_folder(str(tmp_path / "none"), key="model.path") is None


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"model_type": "mixtral"}, "the layers of mixtral are not known to rlhf plan"),
        (
            {"model_type": "llama", "hidden_size": 8},
            "says too little of the model's shape (KeyError('num_attention_heads'))",
        ),
    ],
)
def test_shapes_that_are_not_known(tmp_path: Path, values: dict[str, Any], told: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError) as error:
        shape.of_folder(str(tmp_path), key="model.path")
    assert told in str(error.value)


def test_a_model_that_is_not_there() -> None:
    config = config_of("sft", "model.path=nowhere/artifact")
    with pytest.raises(UserError, match=r"plan downloads nothing; say what shape it has: machine.shape="):
        memory.memory_of(config)
    config = config_of("ppo", "model.path=nowhere", "+rewards.rm.model.path=there", "machine.shape=6b")
    with pytest.raises(UserError, match=r"rewards.rm.model.path=there: .*machine.reward_shape="):
        memory.memory_of(config)
    with pytest.raises(UserError, match=r"machine.shape=7b: there is no such shape; one of 1.3b, 124m"):
        memory.memory_of(config_of("sft", "model.path=nowhere", "machine.shape=7b"))


# Memory


def ppo(*overrides: str) -> Any:
    return config_of("ppo", "experiment=instructgpt_1b_ppo", *overrides)


def test_instructgpts_models() -> None:
    found = memory.memory_of(ppo()).models
    assert [one.parameters.elements for one in found.trained] == [1_315_723_264, 6_658_404_352 + 4096]
    assert found.reference is not None
    assert (found.reference.elements, found.rewards[0].elements) == (1_315_723_264, 6_658_404_352 + 4096)


def test_phases_of_ppo() -> None:
    found = memory.memory_of(ppo("engine=zero3"))
    phases = {phase.name: phase.lines for phase in found.phases}
    assert list(phases) == ["rollout", "score", "evaluate", "policy update", "value update"]
    # 24 layers, keys and values of 2048 in bf16, 32,768 slots.
    assert phases["rollout"]["KV cache"] == 2 * 24 * 2048 * 2 * 32_768
    assert phases["rollout"]["whole policy"] == 2 * 1_315_723_264
    assert phases["score"]["reward model rm"] == 2 * (6_658_404_352 + 4096)
    assert phases["score"]["reference"] == phases["rollout"]["reference"] == 0  # both are offloaded
    assert phases["policy update"]["moving average"] == 4 * 1_315_723_264 / 8
    assert found.host == {
        "reward model rm": 2 * (6_658_404_352 + 4096),
        "reference": 2 * 1_315_723_264,
    }


def test_evaluation_has_the_reference_on_the_gpu() -> None:
    (evaluation,) = (phase for phase in memory.memory_of(ppo()).phases if phase.name == "evaluate")
    assert evaluation.lines["reference"] == 2 * 1_315_723_264


def test_what_leaves_memory() -> None:
    """Each of them makes less, or leaves a model out."""
    whole = memory.memory_of(ppo())
    for override in ("advantage.estimator=reinforce", "ema.decay=0", "lora=default", "engine=zero2_offload"):
        assert memory.memory_of(ppo(override)).peak.total < whole.peak.total, override
    assert memory.memory_of(ppo("advantage.estimator=reinforce")).models.value is None
    assert memory.memory_of(ppo("lora=default")).models.reference is None
    dpo = ("model.path=m", "machine.shape=1.3b")
    assert memory.memory_of(config_of("dpo", *dpo, "objective=simpo")).models.reference is None
    cached = [phase.name for phase in memory.memory_of(config_of("dpo", *dpo)).phases]
    assert cached == ["reference", "policy update", "answers"]
    live = memory.memory_of(config_of("dpo", *dpo, "reference.cache=false", "sampled.prompts=0"))
    assert [phase.name for phase in live.phases] == ["policy update"]
    assert live.peak.lines["reference"] == 4 * 1_315_723_264


def test_quantised_weights() -> None:
    """4 bits and their constants for the matrices, and the rest as it is."""
    given = ("model.path=m", "machine.shape=6b", "model.dtype=bfloat16")
    plain = memory.memory_of(config_of("sft", *given, "lora=default")).models.policy.parameters
    small = memory.memory_of(config_of("sft", *given, "lora=qlora")).models.policy.parameters
    matrices = 32 * 12 * 4096**2
    assert plain.frozen_bytes == 2 * 6_658_404_352
    assert small.frozen_bytes == pytest.approx(plain.frozen_bytes - matrices * (2 - 0.51587), rel=1e-4)


def test_attention_on_a_gpu() -> None:
    assert memory.rows_of(ppo()).attention is Attention.block
    dropout = config_of("sft", "model.path=m", "model.dropout=0.1")
    assert memory.rows_of(dropout).attention is Attention.dense


# Advice


@pytest.mark.parametrize(
    ("stage", "overrides", "expected"),
    [
        # 27 GB of activations: half of a row is enough. The masters stay where they are.
        ("sft", ["batch.row_length=8192", "machine.gpu_memory=32GB"], ["batch.row_length=4096"]),
        ("sft", ["batch.row_length=8192", "batch.micro_rows=4", "machine.gpu_memory=50GB"], ["batch.micro_rows=1"]),
        ("sft", ["machine.gpu_memory=14GB"], ["model.gradient_checkpointing=true"]),
        ("sft", ["machine.gpu_memory=80GB", "machine.shape=6b", "engine=zero1"], ["engine.zero_stage=2"]),
        ("sft", ["machine.gpu_memory=24GB", "machine.shape=6b", "machine.gpus=4", "machine.host_memory=2TB",
                 "model.gradient_checkpointing=true", "engine=zero3"], ["engine.offload_optimizer=cpu"]),
        ("sft", ["machine.gpu_memory=24GB", "machine.shape=6b", "machine.gpus=4", "machine.host_memory=8GB",
                 "model.gradient_checkpointing=true", "engine=zero3"], ["lora=default"]),
        ("sft", ["machine.gpu_memory=24GB", "machine.shape=6b", "machine.gpus=4", "machine.host_memory=8GB",
                 "model.gradient_checkpointing=true", "engine=zero3", "model=6b"], ["machine.gpus=8"]),
    ],
)  # fmt: skip
def test_the_cheapest_change(stage: str, overrides: list[str], expected: list[str]) -> None:
    config = config_of(
        stage, "model.path=m", "machine.shape=1.3b", "model.dtype=bfloat16", "machine.gpus=8", "engine=zero2",
        *[one for one in overrides if not one.startswith("model=")],
    )  # fmt: skip
    if "model=6b" in overrides:  # from scratch: adapters are of no use
        config.model.path, config.model.shape = None, config_of("sft", "model=6b").model.shape
    assert not advice.fits(config, memory.memory_of(config))
    found = advice.advise(config)
    assert found.overrides == expected
    assert found.config is not None and found.memory is not None and advice.fits(found.config, found.memory)
    again = config_of(
        stage, "model.path=m", "machine.shape=1.3b", "model.dtype=bfloat16", "machine.gpus=8", "engine=zero2",
        *[one for one in overrides if not one.startswith("model=")], *expected,
    )  # fmt: skip
    if "model=6b" not in overrides:
        assert memory.memory_of(again).peak.total == found.memory.peak.total, "spelled as it was tried"


def test_offloading_takes_a_host_that_has_room() -> None:
    config = ppo("machine.host_memory=100GB")
    found = memory.memory_of(config)
    assert found.peak.total < advice.room(config) and not advice.fits(config, found)  # 16 GB for each of 8 processes
    assert advice.advise(config).overrides == ["rewards.rm.offload=false"]


def test_nothing_helps_where_every_gpu_has_a_whole_policy() -> None:
    config = config_of("ppo", "experiment=instructgpt_175b_ppo", "machine.gpus=1024")
    found = advice.advise(config)
    assert found.changes == () and "349 GB of whole policy" in found.why
    (last,) = show.lines(show.Plan(config=config, memory=memory.memory_of(config), time=time.time_of(
        config, memory.memory_of(config).models), advice=found))[-1:]  # fmt: skip
    assert last.startswith("does not fit: 5") and last.endswith("on each of 1,024 GPUs, in the phase: rollout")


def test_the_config_is_not_changed() -> None:
    config = ppo("machine.gpu_memory=30GB")
    before = repr(config)
    advice.advise(config)
    assert repr(config) == before


# Time


def test_flops_of_a_token() -> None:
    """2 a weight, 4 LHC in attention with C keys on average, 2 HV in the head; three times that in training."""
    found = shape.named("30m", key="k")
    weights, attention, head = 8 * (4 * 512**2 + 3 * 512 * 1376), 4 * 8 * 512 * (101 / 2), 512 * 8192
    forward = 2 * weights + attention + 2 * head
    assert time.forward_flops(found, 100, words=1.0) == pytest.approx(forward)
    config = config_of("pretrain", "model=30m", "batch.row_length=512", "batch.micro_rows=1")
    model = memory.memory_of(config).models.policy
    assert time.training_flops(config, model, 100, scored=1.0) == pytest.approx(3 * forward)  # all logits are kept
    config.batch.row_length, config.model.gradient_checkpointing = 4096, True
    again = forward - 2 * head + 2 * head
    assert time.training_flops(config, model, 100, scored=1.0) == pytest.approx(3 * forward + again)


@pytest.mark.parametrize(
    ("stage", "dtype", "times"),
    [(0, "float32", 2 * 4), (1, "bfloat16", 3 * 2), (2, "bfloat16", 5 * 2), (3, "bfloat16", (2 + 2 + 1 + 1) * 2)],
)
def test_communication_volume(stage: int, dtype: str, times: int) -> None:
    """In bytes a parameter, for two micro-batches and many processes; a model above stage 3's limit is gathered twice."""
    config = config_of(
        "sft", "model.path=m", "machine.shape=175b", f"model.dtype={dtype}", f"engine.zero_stage={stage}",
        "machine.gpus=1000000", "+engine.extra.zero_optimization.stage3_max_live_parameters=0",
    )  # fmt: skip
    model = memory.memory_of(config).models.policy
    assert time.sent_by_update(config, model, 2) == pytest.approx(times * 174_604_259_328, rel=1e-5)


def test_instructgpts_training_compute() -> None:
    """Ouyang et al. 2022, section 5.1: 4.9 petaflop/s-days for 175B SFT, 60 for PPO-ptx. Half or twice of it is near:
    lengths are guessed, and checkpointing computes the forward pass again."""
    day = 86_400 * 1e15
    for stage, name, printed in (("sft", "instructgpt_175b_sft", 4.9), ("ppo", "instructgpt_175b_ppo", 60.0)):
        config = config_of(stage, f"experiment={name}", "machine.gpus=8", "machine.examples=12725")
        found = time.time_of(config, memory.memory_of(config).models)
        assert found.steps is not None
        flops = 8 * found.steps * sum(part.flops for part in found.parts)
        assert printed / 2 < flops / day < printed * 2


def test_decoding_is_bound_by_memory() -> None:
    config = ppo("machine.prompt_tokens=512", "machine.response_tokens=512", "rollout.batch_tokens=98304")
    found = time.time_of(config, memory.memory_of(config).models)
    rollout = found.parts[0]
    weights = 2 * (24 * 12 * 2048**2 + 50257 * 2048)
    cached = 64 * (2 * 24 * 2048 * 2) * (512 + 256)  # 512 episodes on 8 GPUs, 64 in one batch
    assert rollout.read == pytest.approx(1024 * (weights + cached))
    assert rollout.seconds == pytest.approx(rollout.read / (3.35e12 * 0.6))
    assert found.steps == 500 and found.gpu_hours == pytest.approx(found.seconds * 500 * 8 / 3600)


def test_speeds() -> None:
    config = config_of("sft", "model.path=m", "machine.shape=124m", "machine.gpu=A100", "model.dtype=bfloat16")
    assert time.speeds_of(config.machine, Dtype.bfloat16).flops == pytest.approx(0.4 * 312e12)
    config.machine.gpu = "abacus"
    with pytest.raises(UserError, match=r"machine.gpu=abacus: its peak in bfloat16 is not known; add machine.flops="):
        time.speeds_of(config.machine, Dtype.bfloat16)
    config.machine.flops = 1e12
    with pytest.raises(UserError, match=r"add machine.memory_bandwidth="):
        time.speeds_of(config.machine, Dtype.bfloat16)


# The section


@pytest.mark.parametrize(
    ("text", "size"), [("80GB", 80e9), ("40 GiB", 40 * 2**30), ("1.5tb", 1.5e12), ("512M", 512e6), ("2e3kB", 2e6)]
)
def test_sizes(text: str, size: float) -> None:
    assert size_of(text) == size


@pytest.mark.parametrize("text", ["80", "GB", "80 Gbit", "-1GB", "80PB", ""])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError):
        size_of(text)


def test_json_has_what_the_tables_have() -> None:
    config = ppo("machine.gpu_memory=40GB")
    found = memory.memory_of(config)
    plan = show.Plan(config=config, memory=found, time=time.time_of(config, found.models), advice=advice.advise(config))
    told = json.loads(json.dumps(show.to_json(plan)))
    assert told["fits"] is False and told["peak"] == found.peak.total and told["peak_phase"] == "score"
    assert told["room"] == 36e9 and told["advice"]["overrides"] == plan.advice.overrides  # type: ignore[union-attr]
    assert set(told["phases"]) == {"rollout", "score", "evaluate", "policy update", "value update"}
    assert told["time"]["seconds"] == pytest.approx(sum(part["seconds"] for part in told["time"]["parts"]))
