"""Seconds of an update, or of a PPO iteration, from FLOPs and bytes; bytes that go over the network.

An estimate from above and below at once: matrix products run at an assumed share of the GPU's peak, decoding at an
assumed share of its memory bandwidth, communication at the link's speed and (as the engine is configured) not at the same
time as anything else. Left out: loading, evaluation, saving, the host's optimiser, waiting for the slowest process.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from rlhf_pipeline.config.machine import MachineConfig
from rlhf_pipeline.config.schema import Dtype, Offload
from rlhf_pipeline.config.stages import DpoConfig, PpoConfig, PretrainConfig, RmConfig, SftConfig, StageConfig
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.machine import published_peak_flops, training_flops_per_token
from rlhf_pipeline.plan import activations
from rlhf_pipeline.plan.models import Models, Trained
from rlhf_pipeline.plan.shape import Shape
from rlhf_pipeline.plan.states import LIVE_PARAMETERS, WIDTH, setting

# Bytes/s of memory, and FLOP/s in fp32 without tensor cores, from NVIDIA's data sheets (SXM modules; A100 with 80 GB).
BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12, "A100": 2.039e12, "B200": 8e12}
FP32_FLOPS = {"H100": 67e12, "H200": 67e12, "A100": 19.5e12, "B200": 75e12}


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One kind of work of an update or an iteration, on the GPU that has the most of it."""

    name: str
    flops: float = 0.0
    read: float = 0.0  # bytes that decoding reads of the GPU's memory
    sent: float = 0.0  # bytes that the GPU sends to others
    moved: float = 0.0  # bytes between the GPU and its host
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Time:
    """Of one step: an update, or an iteration of PPO."""

    unit: str
    parts: tuple[Part, ...]
    steps: int | None  # of the whole run; None where the number of examples is not known
    gpus: int
    assumed: dict[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """A step's."""
        return sum(part.seconds for part in self.parts)

    @property
    def gpu_hours(self) -> float | None:
        """Of the whole run."""
        return None if self.steps is None else self.seconds * self.steps * self.gpus / 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """Of one GPU: FLOP/s and bytes/s that are reached."""

    flops: float
    memory: float
    network: float
    host: float


def speeds_of(machine: MachineConfig, dtype: Dtype) -> Speeds:
    """What is assumed of the machine.

    Raises:
        UserError: for a GPU whose figures are not known.
    """
    published = published_peak_flops(machine.gpu) if dtype is Dtype.bfloat16 else FP32_FLOPS.get(machine.gpu)
    flops, memory = machine.flops or published, machine.memory_bandwidth or BANDWIDTH.get(machine.gpu)
    if flops is None:
        raise UserError(
            f"machine.gpu={machine.gpu}: its peak in {dtype.value} is not known; add machine.flops=<FLOP/s>"
        )
    if memory is None:
        raise UserError(
            f"machine.gpu={machine.gpu}: its memory's speed is not known; add machine.memory_bandwidth=<bytes/s>"
        )
    return Speeds(
        flops=flops * machine.share_of_peak,
        memory=memory * machine.share_of_bandwidth,
        network=machine.gpu_link if machine.gpus <= machine.gpus_per_host else machine.network,
        host=machine.host_link,
    )


def time_of(config: StageConfig, models: Models) -> Time:
    """Time of a step, and of the run where it is known how long that is.

    Raises:
        UserError: see `speeds_of`.
    """
    speeds = speeds_of(config.machine, config.model.dtype)
    parts, unit, assumed = _iteration(config, models) if isinstance(config, PpoConfig) else _offline(config, models)
    return Time(
        unit=unit,
        parts=tuple(_timed(part, speeds) for part in parts),
        steps=_steps(config),
        gpus=config.machine.gpus,
        assumed=assumed,
    )


def _timed(part: Part, speeds: Speeds) -> Part:
    computing = max(part.flops / speeds.flops, part.read / speeds.memory)
    seconds = computing + part.sent / speeds.network + part.moved / speeds.host
    return Part(name=part.name, flops=part.flops, read=part.read, sent=part.sent, moved=part.moved, seconds=seconds)


def forward_flops(shape: Shape, length: float, *, words: float) -> float:
    """Of one token of a sequence of `length`; `words`: share of the tokens whose logits are computed."""
    flops = training_flops_per_token(
        num_parameters_without_embedding=shape.matrices,
        num_layers=shape.layers,
        hidden=shape.queries,
        mean_context=(length + 1) / 2,
        vocab_size=0,
        scored_share=0.0,
    )
    return flops / 3 + 2.0 * shape.embedding * words


def training_flops(config: StageConfig, model: Trained, length: float, *, scored: float) -> float:
    """Of one token, forward and backward, with what checkpointing computes again; frozen weights have no gradient."""
    words = scored if model.has_words else 0.0
    forward = forward_flops(model.shape, length, words=words)
    passes = 3.0 if config.lora is None else 2.0
    again = forward_flops(model.shape, length, words=0.0) if config.model.gradient_checkpointing else 0.0
    # Logits that were not kept are computed again in the backward pass.
    rows = config.batch.row_length * config.batch.micro_rows
    kept = rows * model.shape.vocabulary <= activations.KEEP_ELEMENTS
    return passes * forward + again + (0.0 if kept else 2.0 * model.shape.embedding * words)


def sent_by_update(config: StageConfig, model: Trained, micro_batches: int) -> float:
    """Bytes that one process sends in an update (Rajbhandari et al. 2020, section 7, with this engine's dtypes).

    A ring's all-reduce of a tensor sends twice its size, a reduce-scatter or an all-gather once, less a share of 1/N.
    """
    n, stage, w = config.machine.gpus, config.engine.zero_stage, WIDTH[config.model.dtype]
    ring = (n - 1) / n
    trained, every = model.parameters.trained * w, model.parameters.elements * w
    match stage:
        case 0:
            return 2.0 * ring * trained  # gradients
        case 1:
            return ring * (2.0 * trained + trained)  # gradients by all-reduce, then the new weights
        case 2:
            return ring * (2.0 * trained * micro_batches + trained)  # the same, for every micro-batch
        case _:
            # Weights for the forward pass, and for the backward one those that were not kept until then.
            live = w * setting(config.engine, "stage3_max_live_parameters", LIVE_PARAMETERS)
            return ring * micro_batches * (every + max(every - live, 0.0) + trained)


def moved_by_update(config: StageConfig, model: Trained, micro_batches: int) -> float:
    """Bytes between one GPU and its host: gradients down and weights up, and parked weights up for every pass."""
    engine, w = config.engine, WIDTH[config.model.dtype]
    share = model.parameters.trained / config.machine.gpus
    moved = (4.0 + w) * share if engine.offload_optimizer is Offload.cpu else 0.0
    if engine.offload_parameters is Offload.cpu:
        moved += 2.0 * micro_batches * w * model.parameters.elements / config.machine.gpus
    return moved


def _micro_batches(config: StageConfig, tokens: float) -> int:
    """Of one process in an update with so many tokens on all of them."""
    row = config.batch.row_length * config.batch.micro_rows
    return max(1, math.ceil(tokens / config.machine.gpus / row))


def _share(examples: float, config: StageConfig) -> float:
    """Of the process that has the most: the others wait for it."""
    return float(math.ceil(examples / config.machine.gpus))


def _offline(config: StageConfig, models: Models) -> tuple[list[Part], str, dict[str, float]]:
    """An update of pretraining, fine-tuning, a reward model or a direct objective."""
    length = config.machine.tokens or config.data.max_length / 2
    batch = float(config.batch.tokens or (config.batch.examples or 1) * length)
    scored = 1.0 if isinstance(config, PretrainConfig) else 0.5
    policy, micro = models.policy, _micro_batches(config, batch)
    own = _share(batch / length, config) * length
    flops = own * training_flops(config, policy, length, scored=scored)
    parts = [
        Part(
            name="update",
            flops=flops,
            sent=sent_by_update(config, policy, micro),
            moved=moved_by_update(config, policy, micro),
        )
    ]
    if isinstance(config, DpoConfig) and models.reference is not None and not config.reference.cache:
        passed = own * forward_flops(models.reference.shape, length, words=scored)
        moved = models.reference.bytes * micro if models.reference.offload else 0.0
        parts.append(Part(name="reference", flops=passed, moved=moved))
    assumed = {"tokens of an example": length}
    return parts, "update", assumed if isinstance(config, RmConfig) else {**assumed, "of them scored": scored}


def _iteration(config: PpoConfig, models: Models) -> tuple[list[Part], str, dict[str, float]]:
    """An iteration of PPO."""
    n, w = config.machine.gpus, WIDTH[config.model.dtype]
    rollout, machine, policy = config.rollout, config.machine, models.policy
    prompt = float(machine.prompt_tokens or config.data.max_prompt_length / 2)
    response = float(machine.response_tokens or rollout.max_new_tokens / 2)
    length, own = prompt + response, _share(rollout.episodes, config)
    scored = response / length
    evaluated = own * length
    updates = config.policy.epochs * math.ceil(rollout.episodes / (config.batch.examples or rollout.episodes))
    text = rollout.episodes * config.ptx.examples_per_episode if config.ptx.coefficient else 0.0
    text_length = (config.ptx.max_length or config.data.max_length) if text else 0.0
    parts = [_decoding(config, models, prompt, response)]
    for one in models.rewards:
        flops = evaluated * forward_flops(one.shape, length, words=0.0)
        parts.append(Part(name=one.name, flops=flops, moved=one.bytes if one.offload else 0.0))
    micro = _micro_batches(config, rollout.episodes * length)
    for model in models.trained:
        flops = evaluated * forward_flops(model.shape, length, words=scored if model.has_words else 0.0)
        fetched = (n - 1) / n * w * model.parameters.elements * micro if config.engine.zero_stage == 3 else 0.0
        parts.append(Part(name=f"evaluate by the {model.name}", flops=flops, sent=fetched))
    if models.reference is not None:
        flops = evaluated * forward_flops(models.reference.shape, length, words=scored)
        moved = models.reference.bytes if models.reference.offload else 0.0
        parts.append(Part(name="evaluate by the reference", flops=flops, moved=moved))
    for model in models.trained:
        mixed = text if model is policy else 0.0
        a_time = config.policy.epochs / updates  # of the episodes and the texts, in one update
        micro = _micro_batches(config, a_time * (rollout.episodes * length + mixed * text_length))
        flops = (
            _share(a_time * rollout.episodes, config) * length * training_flops(config, model, length, scored=scored)
        )
        if mixed:
            texts = _share(a_time * mixed, config)
            flops += texts * text_length * training_flops(config, model, text_length, scored=1.0)
        parts.append(
            Part(
                name=f"updates of the {model.name}",
                flops=updates * flops,
                sent=updates * sent_by_update(config, model, micro),
                moved=updates * moved_by_update(config, model, micro),
            )
        )
    assumed = {"tokens of a prompt": prompt, "tokens of a response": response, "updates": float(updates)}
    return parts, "iteration", assumed | ({"tokens of a text": float(text_length)} if text else {})


def _decoding(config: PpoConfig, models: Models, prompt: float, response: float) -> Part:
    """A token a step: all weights and the batch's keys and values are read. Some answer is as long as it may be.

    At ZeRO stage 3 the weights are put together first, once.
    """
    shape, w, n = models.policy.shape, WIDTH[config.model.dtype], config.machine.gpus
    rollout = config.rollout
    own = _share(rollout.episodes, config)
    rows = min(own, max(1.0, rollout.batch_tokens // (prompt + rollout.max_new_tokens)))
    batches = math.ceil(own / rows)
    cached = rows * activations.cache(shape, 1, w) * (prompt + response / 2)
    read = batches * rollout.max_new_tokens * (w * (shape.matrices + shape.embedding) + cached)
    flops = own * (prompt + response) * forward_flops(shape, prompt + response, words=response / (prompt + response))
    whole = (n - 1) / n * w * models.policy.parameters.elements if config.engine.zero_stage == 3 else 0.0
    return Part(name="rollout", flops=flops, read=float(read), sent=whole)


def _steps(config: StageConfig) -> int | None:
    """Of the whole run, where that is known without reading the data."""
    examples = config.machine.examples or config.data.max_examples
    found = config.train.max_steps
    if isinstance(config, PpoConfig):
        size: float = config.rollout.episodes // config.rollout.samples
    elif config.batch.tokens:
        size = config.batch.tokens / (config.machine.tokens or config.data.max_length / 2)
    else:
        size = config.batch.examples or 1
        if isinstance(config, SftConfig) and config.mix.ratio:
            size *= 1 - config.mix.ratio
    if examples is not None:
        steps = config.train.epochs * max(1, math.ceil(examples / size))
        found = steps if found is None else min(found, steps)
    return found
