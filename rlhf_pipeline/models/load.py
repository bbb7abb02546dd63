"""Causal language models: from a folder, a hub id or a shape, with no dropout unless asked, ZeRO-3 partitioned as built."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rlhf_pipeline.config.schema import Architecture, Attention, Dtype, LoraConfig, ModelConfig, Quantise, ShapeConfig
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.models import lora as adapters
from rlhf_pipeline.models.tree_model import FULL, TreeModel

TORCH_DTYPES = {Dtype.float32: torch.float32, Dtype.bfloat16: torch.bfloat16}


def load_policy(
    model: ModelConfig,
    *,
    lora: LoraConfig | None = None,
    tokenizer: Any,
    seed: int,
    device: torch.device,
    deepspeed_config: dict[str, Any] | None,
) -> TreeModel:
    """The trainable model of a stage, on the CPU (or partitioned, when `deepspeed_config` is a ZeRO-3 one).

    With `lora` it is frozen and has adapters; a quantised one is on `device`.

    Raises:
        UserError: when the model cannot be found or opened, is too small for the tokenizer, or cannot run packed trees;
            when it cannot be adapted as `lora` says.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of loading and saving; the run has one of its own
    with zero3_construction(deepspeed_config):
        inner = _from_shape(model, seed) if model.shape else _from_pretrained(model, lora, device)
    set_special_ids(inner, tokenizer)
    if lora is not None:
        adapters.add_adapters(inner, lora, seed=seed, dtype=TORCH_DTYPES[model.dtype])
    if model.gradient_checkpointing:
        inner.gradient_checkpointing_enable({"use_reentrant": False})
    policy = TreeModel(inner)
    policy.use_attention(_attention(model, policy, device))
    return policy


def _attention(model: ModelConfig, policy: TreeModel, device: torch.device) -> Attention:
    """The form of attention to run in; `auto` takes the fastest that the model's layers allow."""
    asked = model.attention
    family = policy.inner.config.model_type
    plain = policy.kinds == [FULL] and policy.inner.config._attn_implementation == "sdpa"
    flexible = bool(policy.inner._supports_flex_attn)
    if asked is Attention.paths and not plain:
        raise UserError(f"model.attention=paths: {family} has windows or an attention of its own; use dense")
    if asked is Attention.block and not flexible:
        raise UserError(f"model.attention=block: {family} has no flex attention in transformers; use dense")
    if asked is not Attention.auto:
        return asked
    if device.type == "cuda":
        # transformers' flex attention knows no dropout.
        return Attention.block if flexible and not model.dropout else Attention.dense
    return Attention.paths if plain else Attention.dense


@contextmanager
def zero3_construction(deepspeed_config: dict[str, Any] | None) -> Iterator[None]:
    """Within it transformers builds and loads models in partitions, so that no process ever holds a whole one."""
    if deepspeed_config is None or deepspeed_config["zero_optimization"]["stage"] != 3:
        yield
        return
    from transformers.integrations import deepspeed as integration

    kept_alive = integration.HfDeepSpeedConfig(deepspeed_config)  # transformers holds a weak reference to it
    try:
        yield
    finally:
        integration.unset_hf_deepspeed_config()
        del kept_alive


def _from_pretrained(model: ModelConfig, lora: LoraConfig | None, device: torch.device) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    path = str(model.path)
    adapter = _adapter_settings(model)
    if adapter is not None:
        return _from_adapter(model, lora, device, adapter)
    options: dict[str, Any] = {"trust_remote_code": model.trust_remote_code}
    if not Path(path).is_dir():
        options["revision"] = model.revision
    quantised = adapters.quantisation(lora, TORCH_DTYPES[model.dtype], device)
    try:
        config = AutoConfig.from_pretrained(path, **options)
        if lora is not None and getattr(config, "quantization_config", None) is not None:
            raise UserError(f"model.path={path}: is quantised already; take the model it was made of, with lora=qlora")
        set_dropout(config, model.dropout)
        options |= {"config": config, "dtype": TORCH_DTYPES[model.dtype], **quantised}
        try:
            inner = AutoModelForCausalLM.from_pretrained(path, attn_implementation="sdpa", **options)
        except ValueError as error:
            if "attention" not in str(error):
                raise
            # Families without scaled-dot-product attention say so here; their own attention takes the same mask.
            inner = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", **options)
    except (OSError, ValueError) as error:
        raise UserError(f"model.path={path}: cannot be opened as a causal language model: {error}") from error
    except (RuntimeError, ImportError) as error:
        if not quantised:
            raise
        raise UserError(f"lora.quantise: {path} cannot be quantised on {device.type}: {error}") from error
    if quantised:
        adapters.settle_quantised(inner)
    return inner


def _adapter_settings(model: ModelConfig) -> dict[str, Any] | None:
    """The adapter_config.json of a `model.path` that holds a peft adapter and no model."""
    path = Path(str(model.path))
    if not path.is_dir() or (path / "config.json").exists() or not (path / "adapter_config.json").is_file():
        return None
    try:
        settings = json.loads((path / "adapter_config.json").read_text())
    except ValueError as error:
        raise UserError(f"{path / 'adapter_config.json'}: not valid JSON ({error})") from error
    return settings if isinstance(settings, dict) else {}


def _from_adapter(model: ModelConfig, lora: LoraConfig | None, device: torch.device, settings: dict[str, Any]) -> Any:
    """The base model that an adapter names, with the adapter merged into it in fp32."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    base = settings.get("base_model_name_or_path")
    if not base:
        raise UserError(
            f"model.path={model.path}: holds an adapter that does not say of which model; merge the two first"
        )
    for problem, found in (
        ("engine.zero_stage=3", is_deepspeed_zero3_enabled()),
        ("lora.quantise", lora is not None and lora.quantise is not Quantise.none),
    ):
        if found:
            raise UserError(
                f"{problem}: model.path={model.path} holds an adapter of {base}, which has to be merged first: "
                f"PeftModel.from_pretrained(<{base}>, {str(model.path)!r}).merge_and_unload().save_pretrained(<folder>)"
            )
    wide = dataclasses.replace(model, path=str(base), revision=settings.get("revision"), dtype=Dtype.float32)
    try:
        inner = _from_pretrained(wide, None, device)
    except UserError as error:
        raise UserError(f"model.path={model.path}: holds an adapter of {base}: {error}") from error
    return adapters.with_adapter_merged(inner, str(model.path)).to(TORCH_DTYPES[model.dtype])


def _from_shape(model: ModelConfig, seed: int) -> Any:
    from transformers import AutoModelForCausalLM

    assert model.shape is not None
    config = shape_config(model.shape)
    set_dropout(config, model.dropout)
    inner = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=TORCH_DTYPES[model.dtype])
    _initialise(inner, seed)
    return inner


def shape_config(shape: ShapeConfig) -> Any:
    """The transformers config of a shape."""
    from transformers import AutoConfig

    if shape.architecture is Architecture.gpt2:
        return AutoConfig.for_model(
            "gpt2",
            n_embd=shape.hidden,
            n_layer=shape.layers,
            n_head=shape.heads,
            n_inner=shape.intermediate,
            vocab_size=shape.vocab_size,
            n_positions=shape.context,
            tie_word_embeddings=shape.tied,
            initializer_range=shape.init_std,
            bos_token_id=None,  # GPT-2's own ids lie outside a smaller vocabulary
            eos_token_id=None,
        )
    return AutoConfig.for_model(
        shape.architecture.value,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.hidden // shape.heads,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocab_size,
        max_position_embeddings=shape.context,
        tie_word_embeddings=shape.tied,
        initializer_range=shape.init_std,
    )


@torch.no_grad()
def _initialise(inner: Any, seed: int) -> None:
    """Draw the weights from `seed` module by module, so that they are the same whatever partitions the model is in."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    torch.manual_seed(seed)
    for module in inner.modules():
        own = list(module.parameters(recurse=False))
        if is_deepspeed_zero3_enabled() and own:
            import deepspeed

            with deepspeed.zero.GatheredParameters(own, modifier_rank=0):
                inner._init_weights(module)
        else:
            inner._init_weights(module)
    inner.tie_weights()


def set_dropout(config: Any, value: float) -> None:
    """Set every dropout probability that a model's config knows."""
    for name, current in config.to_dict().items():
        if ("dropout" in name or name.endswith("pdrop")) and isinstance(current, int | float):
            setattr(config, name, value)


def set_special_ids(inner: Any, tokenizer: Any) -> None:
    """Give the model the tokenizer's special ids, so that what opens the saved folder generates and stops as we do.

    Raises:
        UserError: when the tokenizer has more tokens than the model has embeddings.
    """
    vocabulary = inner.config.get_text_config().vocab_size
    if len(tokenizer) > vocabulary:
        raise UserError(
            f"tokenizer: it has {len(tokenizer)} tokens and the model has embeddings for {vocabulary}; "
            "use the tokenizer the model was trained with"
        )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(inner.config, name, getattr(tokenizer, name))
        setattr(inner.generation_config, name, getattr(tokenizer, name))
