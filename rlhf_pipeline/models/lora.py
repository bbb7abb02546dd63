"""Low-rank adapters (Hu et al. 2021) on a frozen model, which may be quantised to 4 bits (QLoRA, Dettmers et al. 2023).

peft's layers take the place of linear ones inside the transformers model, which stays what it is to everybody else. A
stage hands over one model with the adapters merged. This file leaves training, saving and resuming to the engine: to it
adapters are parameters like others, and frozen ones are not there.

Adapters are in the model's dtype, with fp32 masters where that is bfloat16. Only the `lora` extra brings peft and
bitsandbytes, so both are imported where they are needed.
"""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_pipeline.config.schema import LoraConfig, Quantise
from rlhf_pipeline.errors import UserError

ALL_LINEAR = "all-linear"
ADAPTER = "default"  # peft's name for the one adapter that there is
HEAD = "score"  # of a reward model: drawn at random, so it is trained whole
INSTALL = "pip install 'rlhf_pipeline[lora]'"


def add_adapters(inner: Any, lora: LoraConfig, *, seed: int, dtype: torch.dtype) -> None:
    """Freeze `inner` and put trainable adapters onto its linear layers, in place; what it computes stays the same.

    A reward model's head is not adapted but trained itself.

    The adapters are drawn from `seed` on the CPU, layer by layer, and so are the same on any number of processes and
    any ZeRO stage. `inner` may be in ZeRO-3 partitions.

    Raises:
        UserError: when peft is missing, when a target is no linear layer, or the rank is larger than a layer's width.
    """
    peft = _peft()
    layers = linear_layers(inner)
    targets = _targets(layers, lora.targets)
    for name in targets:
        width = min(_features(layers[name]))
        if lora.rank > width:
            raise UserError(f"lora.rank={lora.rank}: {name} is {width} wide, and a larger rank adds nothing")
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=_short(inner, targets),
        fan_in_fan_out=all(_is_conv1d(layers[name]) and not _is_quantised(layers[name]) for name in targets),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")  # where a model has layers of both kinds
        peft.inject_adapter_in_model(config, inner, ADAPTER)
    generator = torch.Generator().manual_seed(seed)
    for _, layer in _adapted(inner):
        down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        drawn = torch.empty(down.shape)
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)  # as peft and the paper's code have it
        down.data = drawn.to(down.device, dtype)
        up.data = torch.zeros(up.shape, device=up.device, dtype=dtype)
    if hasattr(inner, HEAD):
        inner.score.requires_grad_(True)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within it `model` is the one that the adapters were put on: a reference policy that takes no memory.

    For forward passes without gradients; under ZeRO-3 by all ranks together. A model without adapters stays as it is.
    """
    layers = [layer for _, layer in _adapted(model)]
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True  # peft's own switch would also change what the optimiser trains
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer._disable_adapters = value


@torch.no_grad()
def merge(weights: dict[str, Tensor], inner: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split a state dict of an adapted model into that of the plain model with the adapters merged, and what was trained.

    The sums are made in fp32, a layer at a time, and cast back to the dtype of the weights. Quantised weights become
    what the forward pass takes them for: the adapters were trained on top of those, and not of the original weights
    (docs/operations.md has the difference). `weights` is on the CPU and its tensors are changed in place.
    """
    layers = dict(_adapted(inner))
    adapters = {
        f"{name}.{part}.weight": weights[f"{name}.{part}.{ADAPTER}.weight"]
        for name in layers
        for part in ("lora_A", "lora_B")
    }
    own = {f"{name}.{part}.{ADAPTER}.weight" for name in layers for part in ("lora_A", "lora_B")}
    plain = {f"{name}.base_layer.{part}": f"{name}.{part}" for name in layers for part in ("weight", "bias")}
    merged = {plain.get(key, key): tensor for key, tensor in weights.items() if key not in own}
    for name, module in inner.named_modules():
        if _is_quantised(module):
            key = f"{name}.weight"
            merged[plain.get(key, key)] = _dequantised(module)
    for name, layer in layers.items():
        up, down = adapters[f"{name}.lora_B.weight"].float(), adapters[f"{name}.lora_A.weight"].float()
        update = (up @ down) * layer.scaling[ADAPTER]
        weight = merged[f"{name}.weight"]
        weight.copy_(weight.float() + (update.T if _is_conv1d(layer.get_base_layer()) else update))
    head = f"{HEAD}.weight"
    return merged, adapters | ({head: merged[head]} if head in merged else {})


def adapt_alike(inner: Any, adapted: Any) -> None:
    """Put layers for adapters onto `inner` where `adapted`, a model of the same shape, has them; their numbers are not
    copied."""
    if any(_adapted(adapted)):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out")
            _peft().inject_adapter_in_model(adapted.peft_config[ADAPTER], inner, ADAPTER)


def save_adapters(folder: Path, inner: Any, adapters: dict[str, Tensor], *, base: str, revision: str | None) -> None:
    """Write adapters (of `merge`) as `peft.PeftModel.from_pretrained(base, folder)` reads them."""
    from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
    from safetensors.torch import save_file

    folder.mkdir()
    settings = inner.peft_config[ADAPTER].to_dict()
    settings |= {"base_model_name_or_path": base, "revision": revision, "inference_mode": True}
    if f"{HEAD}.weight" in adapters:
        settings |= {"task_type": "SEQ_CLS", "modules_to_save": [HEAD]}
    settings = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
    (folder / CONFIG_NAME).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    tensors = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in adapters.items()}
    save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})


def with_adapter_merged(inner: Any, folder: str) -> Any:
    """`inner` with somebody's finished adapter of any kind that peft can merge.

    Raises:
        UserError: when peft is missing, or the adapter does not fit the model.
    """
    peft = _peft()
    try:
        config = peft.PeftConfig.from_pretrained(folder)
        config.task_type = None  # of a language model, it would ask a classifier for what that has not
        adapted = peft.PeftModel.from_pretrained(inner, folder, config=config)
        return adapted.merge_and_unload().requires_grad_(True)  # was frozen
    except (RuntimeError, ValueError, OSError, KeyError, AttributeError) as error:
        raise UserError(f"model.path={folder}: its adapter cannot be merged into its base model: {error}") from error


def quantisation(lora: LoraConfig | None, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` takes to load the frozen weights quantised; nothing where they are not.

    Raises:
        UserError: when bitsandbytes is missing.
    """
    if lora is None or lora.quantise is Quantise.none:
        return {}
    from transformers import BitsAndBytesConfig

    _quiet_bitsandbytes()
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"lora.quantise={lora.quantise.value}: bitsandbytes cannot be used ({error}); {INSTALL}"
        ) from error
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=lora.quantise.value,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head", HEAD],
    )
    return {"quantization_config": config, "device_map": {"": device}}


def settle_quantised(inner: Any) -> None:
    """Make a freshly quantised model one that can be trained on any device and saved without quantisation.

    Raises:
        UserError: on a CPU, for layers whose width is no multiple of a block: bitsandbytes (0.50) reads others wrongly.
    """
    for name, module in inner.named_modules():
        if _is_quantised(module):
            block = module.weight.quant_state.blocksize
            if module.weight.device.type == "cpu" and module.in_features % block:
                raise UserError(
                    f"lora.quantise: {name} is {module.in_features} wide, which is no multiple of {block}: bitsandbytes "
                    "computes such layers wrongly on a CPU; use a GPU, or lora=default"
                )
            # Otherwise the first evaluation on a CPU with AVX-512 repacks the weights for kernels without a backward
            # pass, and what trains afterwards has no gradient through its frozen layers.
            module.support_avx512bf16_for_cpu = False
    inner.hf_quantizer = None  # save_pretrained would write the quantised weights in place of those it is given
    del inner.config.quantization_config


def linear_layers(inner: Any) -> dict[str, nn.Module]:
    """Every linear layer by name, but the head (the output embedding or a reward model's): that is read as a matrix and
    never called as a layer."""
    output = inner.get_output_embeddings()
    return {
        name: module
        for name, module in inner.named_modules()
        if (isinstance(module, nn.Linear) or _is_conv1d(module)) and module is not output and name != HEAD
    }


def _targets(layers: dict[str, nn.Module], asked: str | list[str]) -> list[str]:
    """Full names of the layers that `asked` names by their ends."""
    if asked == ALL_LINEAR:
        return list(layers)
    names = [asked] if isinstance(asked, str) else asked
    for one in names:
        if not any(_matches(name, one) for name in layers):
            raise UserError(
                f"lora.targets: {one!r} is no linear layer of this model (its head is never adapted); there "
                f"are {', '.join(sorted({name.rpartition('.')[2] for name in layers}))}, or {ALL_LINEAR} for all of them"
            )
    return [name for name in layers if any(_matches(name, one) for one in names)]


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _short(inner: Any, targets: list[str]) -> list[str]:
    """The last parts of the names where they mean the same layers: what people read in adapter_config.json."""
    ends = {name.rpartition(".")[2] for name in targets}
    same = {name for name, _ in inner.named_modules() if name.rpartition(".")[2] in ends}
    return sorted(ends) if same == set(targets) else targets


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers with adapters, by name; none without peft."""
    if any(hasattr(module, "lora_A") for module in model.modules()):
        from peft.tuners.lora import LoraLayer

        yield from ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def _features(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.nx, layer.nf  # type: ignore[return-value]  # of transformers' Conv1D


def _is_conv1d(layer: nn.Module) -> bool:
    """Whether the weight is stored [in, out] (GPT-2); a quantised layer remembers what it was made of."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(layer, Conv1D) or issubclass(getattr(layer, "source_cls", nn.Linear), Conv1D)


def _is_quantised(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and getattr(module.weight, "quant_state", None) is not None


def _dequantised(module: Any) -> Tensor:
    """The weight as the forward pass takes it, in the shape that the plain model stores it in, on the CPU."""
    from bitsandbytes.functional import dequantize_4bit

    weight = dequantize_4bit(module.weight.data, module.weight.quant_state).cpu()
    return weight.T.contiguous() if _is_conv1d(module) else weight


def _peft() -> Any:
    _quiet_bitsandbytes()  # peft imports it where it is there
    try:
        import peft
    except ImportError as error:
        raise UserError(f"lora: peft is not installed ({error}); {INSTALL}, or lora=null") from error
    return peft


def _quiet_bitsandbytes() -> None:
    """At import it would say which kernels it goes without."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
