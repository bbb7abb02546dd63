"""Which models a config has: their shapes, what of them is trained, and the bytes of those that only answer or score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlhf_pipeline.config.direct import TRAITS
from rlhf_pipeline.config.ppo import Estimator, ValueInit
from rlhf_pipeline.config.schema import Attention, LoraConfig, Offload, OptimConfig, Quantise
from rlhf_pipeline.config.stages import DpoConfig, PpoConfig, RmConfig, StageConfig
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.plan import shape as shapes
from rlhf_pipeline.plan.shape import Shape
from rlhf_pipeline.plan.states import WIDTH, Parameters, States, states

# QLoRA: 4 bits, a byte of scale for each 64 elements, and for each 256 of those another 4 bytes (Dettmers et al. 2023).
QUANTISED = 0.5 + 1 / 64 + 4 / (64 * 256)
BYTES = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A model under an engine."""

    name: str  # "policy", "value" or "model"
    shape: Shape
    parameters: Parameters
    states: States
    has_words: bool  # an output embedding; a scalar head otherwise


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A model that is used as it is, whole on every process."""

    name: str
    shape: Shape
    elements: int
    width: int  # bytes of an element
    offload: bool  # in the host's memory between uses
    tokens: int  # in one forward pass

    @property
    def bytes(self) -> float:
        """Of its weights."""
        return float(self.elements * self.width)


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """Of a run."""

    policy: Trained  # the model of `config.model`, whatever it is
    value: Trained | None
    reference: Ready | None
    rewards: tuple[Ready, ...]

    @property
    def trained(self) -> list[Trained]:
        """Policy first."""
        return [self.policy, *([self.value] if self.value else [])]


def models_of(config: StageConfig) -> Models:
    """The models of a config.

    Raises:
        UserError: when a shape is not known.
    """
    shape = policy_shape(config)
    policy = _trained(config, "model" if isinstance(config, RmConfig) else "policy", shape, config.optim)
    rewards = tuple(_rewards(config)) if isinstance(config, PpoConfig) else ()
    value = None
    if isinstance(config, PpoConfig) and config.advantage.estimator is Estimator.gae:
        begun = config.value.init is ValueInit.reward_model
        value = _trained(config, "value", rewards[0].shape if begun else shape, config.value.optim)
    return Models(policy=policy, value=value, reference=_reference(config, shape), rewards=rewards)


def policy_shape(config: StageConfig) -> Shape:
    """Of the model that is trained: of the config, of its folder, or the one named.

    Raises:
        UserError: when none of them is there.
    """
    model, machine = config.model, config.machine
    if model.shape is not None:
        return shapes.of_config(model.shape)
    found = shapes.of_folder(model.path, key="model.path") if model.path else None
    if found is None and machine.shape is not None:
        found = shapes.named(machine.shape, key="machine.shape")
    if found is None:
        raise UserError(_unknown("model.path", model.path, "machine.shape"))
    return found


def attention_of(config: StageConfig) -> Attention:
    """What `auto` is on a GPU, see `models.load.best_attention`."""
    if config.model.attention is not Attention.auto:
        return config.model.attention
    return Attention.dense if config.model.dropout else Attention.block


def _unknown(key: str, path: str | None, named: str) -> str:
    where = (
        f"{key}={path}: there is no folder with a config.json, and plan downloads nothing" if path else f"{key}: none"
    )
    return f"{where}; say what shape it has: {named}=<a file under conf/model, such as 6b>"


def _trained(config: StageConfig, name: str, shape: Shape, optim: OptimConfig) -> Trained:
    words = not isinstance(config, RmConfig) and name != "value"
    parameters = _parameters(shape, config, words=words)
    return Trained(
        name=name,
        shape=shape,
        parameters=parameters,
        states=states(
            parameters,
            config.engine,
            dtype=config.model.dtype,
            algorithm=optim.algorithm,
            processes=config.machine.gpus,
        ),
        has_words=words,
    )


def _parameters(shape: Shape, config: StageConfig, *, words: bool) -> Parameters:
    elements = shape.policy if words else shape.scorer
    lora, width = config.lora, WIDTH[config.model.dtype]
    if lora is None:
        return Parameters(
            trained=elements, frozen_bytes=0, elements=elements, largest=max(shape.embedding, _largest(shape))
        )
    adapters = shape.adapters(lora)
    head = 0 if words else shape.hidden
    return Parameters(
        trained=adapters + head,
        frozen_bytes=int(_frozen(shape, elements - head, lora, width)),
        elements=elements + adapters,
        largest=lora.rank * max(max(pair) for pair in shape.linear_layers.values()),
    )


def _largest(shape: Shape) -> int:
    return max(inputs * outputs for inputs, outputs in shape.linear_layers.values())


def _frozen(shape: Shape, elements: int, lora: LoraConfig, width: int) -> float:
    if lora.quantise is Quantise.none:
        return float(width * elements)
    return QUANTISED * shape.matrices + width * (elements - shape.matrices)


def _rewards(config: PpoConfig) -> list[Ready]:
    """Programs and servers take no memory here."""
    found = []
    for name, one in config.rewards.items():
        if one.model is None:
            continue
        path = str(one.model.path)
        shape = shapes.of_folder(path, key=f"rewards.{name}.model.path")
        if shape is None and config.machine.reward_shape is not None:
            shape = shapes.named(config.machine.reward_shape, key="machine.reward_shape")
        if shape is None:
            raise UserError(_unknown(f"rewards.{name}.model.path", path, "machine.reward_shape"))
        stored = str(one.model.dtype or shapes.dtype_of_folder(path) or config.model.dtype)
        found.append(
            Ready(
                name=f"reward model {name}",
                shape=shape,
                elements=shape.scorer,
                width=BYTES.get(stored, 2),
                offload=one.offload,
                tokens=one.batch_tokens,
            )
        )
    return found


def _reference(config: Any, shape: Shape) -> Ready | None:
    """Under adapters it is the policy without them; some objectives of `rlhf dpo` have none."""
    if not isinstance(config, PpoConfig | DpoConfig):
        return None
    path = config.reference.path
    if path is None and config.lora is not None:
        return None
    if isinstance(config, DpoConfig) and not TRAITS[config.objective.name].reference:
        return None
    if path is not None:
        shape = shapes.of_folder(path, key="reference.path") or shape
    return Ready(
        name="reference",
        shape=shape,
        elements=shape.policy,
        width=WIDTH[config.model.dtype],
        offload=config.reference.offload,
        tokens=config.batch.row_length * config.batch.micro_rows,
    )


def ema_bytes(config: StageConfig, policy: Trained) -> tuple[float, float]:
    """(on the GPU, in the host's memory) of the moving average of the policy's masters."""
    if not isinstance(config, PpoConfig) or not config.ema.decay:
        return 0.0, 0.0
    share = config.machine.gpus if config.engine.zero_stage else 1
    size = 4.0 * policy.parameters.trained / share
    return (0.0, size) if config.engine.offload_optimizer is Offload.cpu else (size, 0.0)
