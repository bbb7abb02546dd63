"""Opens models: policies and reward models to train, from a folder, a hub id or a shape, and finished reward models.

With no dropout unless asked; under ZeRO-3 partitioned as they are built. Policies to sample from: `models.ready`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rlhf_pipeline.config.schema import (
    Attention,
    Dtype,
    LoraConfig,
    ModelConfig,
    Quantise,
    ReadyModelConfig,
)
from rlhf_pipeline.errors import UserError, cannot_open
from rlhf_pipeline.models import lora as adapters
from rlhf_pipeline.models.scalar_head import TreeCritic, TreeScorer, draw_head, head_of
from rlhf_pipeline.models.self_check import self_check
from rlhf_pipeline.models.shapes import initialise, set_dropout, shape_config
from rlhf_pipeline.models.tree_model import FULL, TreeModel, TreeModule

LANGUAGE_MODEL, CLASSIFIER = "causal language model", "sequence classifier"
HEAD_WEIGHT = f"{adapters.HEAD}.weight"
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
    inner = _trainable(model, lora, tokenizer, seed, device, deepspeed_config, what=LANGUAGE_MODEL)
    policy = TreeModel(inner)
    policy.use_attention(best_attention(model.attention, policy, device, dropout=model.dropout))
    return policy


def load_scorer(
    model: ModelConfig,
    *,
    lora: LoraConfig | None = None,
    tokenizer: Any,
    seed: int,
    device: torch.device,
    deepspeed_config: dict[str, Any] | None,
) -> TreeScorer:
    """The trainable reward model of a stage, as `load_policy`: the body of a causal language model under a new head.

    Where `model.path` is a reward model, it keeps its head.

    Raises:
        UserError: see `load_policy`; for a family that has no sequence classifier of the kind that is needed.
    """
    inner = _trainable(model, lora, tokenizer, seed, device, deepspeed_config, what=CLASSIFIER)
    scorer = TreeScorer(inner)
    scorer.use_attention(best_attention(model.attention, scorer, device, dropout=model.dropout))
    return scorer


def load_critic(
    model: ModelConfig,
    *,
    lora: LoraConfig | None = None,
    tokenizer: Any,
    seed: int,
    device: torch.device,
    deepspeed_config: dict[str, Any] | None,
) -> TreeCritic:
    """The trainable value model of a policy, as `load_scorer`; `tokenizer` is the policy's, whose tokens it reads.

    Raises:
        UserError: see `load_scorer`.
    """
    inner = _trainable(model, lora, tokenizer, seed, device, deepspeed_config, what=CLASSIFIER)
    critic = TreeCritic(inner)
    critic.use_attention(best_attention(model.attention, critic, device, dropout=model.dropout))
    return critic


def open_reward_model(config: ReadyModelConfig, tokenizer: Any, device: torch.device) -> TreeScorer:
    """A finished reward model in evaluation mode on `device`, checked.

    Raises:
        UserError: when it cannot be opened, or weights are missing: it is no reward model then.
    """
    path = str(config.path)
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if not Path(path).is_dir():
        options["revision"] = config.revision
    options["dtype"] = TORCH_DTYPES[config.dtype] if config.dtype else "auto"
    with _errors_only():
        inner, missing = _opened(path, options, what=CLASSIFIER)
    if missing:  # transformers would fill them with random numbers
        raise UserError(f"model.path={path}: holds no reward model: {_some(missing)}; rlhf rm makes one from it")
    _refuse_small(inner, tokenizer)
    scorer = TreeScorer(inner.requires_grad_(False)).to(device).eval()
    scorer.use_attention(best_attention(Attention.auto, scorer, device, dropout=0.0))
    self_check(scorer, device)
    return scorer


def _trainable(
    model: ModelConfig,
    lora: LoraConfig | None,
    tokenizer: Any,
    seed: int,
    device: torch.device,
    deepspeed_config: dict[str, Any] | None,
    *,
    what: str,
) -> Any:
    """The transformers model of a stage, with its adapters and special ids."""
    with zero3_construction(deepspeed_config), _errors_only():
        if model.shape:
            inner, missing = _from_shape(model, seed, what), [HEAD_WEIGHT]
        else:
            inner, missing = _from_pretrained(model, lora, device, what)
        if what == CLASSIFIER and HEAD_WEIGHT in missing:
            draw_head(inner, seed)
        if what == CLASSIFIER and tokenizer.pad_token_id == inner.config.get_text_config().vocab_size:
            torch.manual_seed(seed)  # the new row is drawn; nothing ever attends to it, see data.tokenizer
            inner.resize_token_embeddings(tokenizer.pad_token_id + 1, mean_resizing=False)
    set_special_ids(inner, tokenizer)
    if lora is not None:
        adapters.add_adapters(inner, lora, seed=seed, dtype=TORCH_DTYPES[model.dtype])
    if model.gradient_checkpointing:
        inner.gradient_checkpointing_enable({"use_reentrant": False})
    return inner


@contextmanager
def _errors_only() -> Iterator[None]:
    """transformers shows its progress in loading and saving, where the run has one of its own, and reports on heads that
    are missing, which is no surprise here."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def best_attention(asked: Attention, model: TreeModule, device: torch.device, *, dropout: float) -> Attention:
    """The form of attention to run in; `auto` takes the fastest that the model's layers allow."""
    family = model.inner.config.model_type
    plain = model.kinds == [FULL] and model.inner.config._attn_implementation == "sdpa"
    flexible = bool(model.inner._supports_flex_attn)
    if asked is Attention.paths and not plain:
        raise UserError(f"model.attention=paths: {family} has windows or an attention of its own; use dense")
    if asked is Attention.block and not flexible:
        raise UserError(f"model.attention=block: {family} has no flex attention in transformers; use dense")
    if asked is not Attention.auto:
        return asked
    if device.type == "cuda":
        # transformers' flex attention knows no dropout.
        return Attention.block if flexible and not dropout else Attention.dense
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


def _from_pretrained(
    model: ModelConfig, lora: LoraConfig | None, device: torch.device, what: str
) -> tuple[Any, list[str]]:
    """The model, and the names of weights that its files lack."""
    from transformers import AutoConfig

    path = str(model.path)
    adapter = _adapter_settings(model)
    if adapter is not None:
        return _from_adapter(model, lora, device, adapter, what)
    options: dict[str, Any] = {"trust_remote_code": model.trust_remote_code}
    if not Path(path).is_dir():
        options["revision"] = model.revision
    quantised = adapters.quantisation(lora, TORCH_DTYPES[model.dtype], device)
    try:
        config = AutoConfig.from_pretrained(path, **options)
    except Exception as error:
        raise cannot_open(path, what, error) from error
    if lora is not None and getattr(config, "quantization_config", None) is not None:
        raise UserError(f"model.path={path}: is quantised already; take the model it was made of, with lora=qlora")
    set_dropout(config, model.dropout)
    _refuse_other_kinds(path, config, what)
    if what == CLASSIFIER:
        config.num_labels = 1
    try:
        options |= {"config": config, "dtype": TORCH_DTYPES[model.dtype], **quantised}
        inner, missing = _opened(path, options, what=what)
    except (RuntimeError, ImportError) as error:
        if not quantised:
            raise
        raise UserError(f"lora.quantise: {path} cannot be quantised on {device.type}: {error}") from error
    if what == CLASSIFIER:
        head_of(inner)
    if lacking := [name for name in missing if what == LANGUAGE_MODEL or name != HEAD_WEIGHT]:
        raise UserError(f"model.path={path}: holds no whole {what}: {_some(lacking)}; is it one of another kind?")
    if quantised:
        adapters.settle_quantised(inner)
    return inner, missing


def _refuse_other_kinds(path: str, config: Any, what: str) -> None:
    """A classifier could pass for a language model where the output embedding is the input's, and so in no file."""
    if any("SequenceClassification" in name for name in config.architectures or ()):
        if what == LANGUAGE_MODEL:
            raise UserError(f"model.path={path}: is a classifier (a reward model is one); a {what} is needed here")
        if config.num_labels != 1:
            raise UserError(f"model.path={path}: is a classifier with {config.num_labels} labels; a reward has one")


def _opened(path: str, options: dict[str, Any], *, what: str) -> tuple[Any, list[str]]:
    """`from_pretrained` of transformers, and the names of weights that the files lack.

    Raises:
        UserError: when there is no such model, or none of this kind.
    """
    options = {**options, "output_loading_info": True}
    try:
        try:
            inner, report = _auto(what).from_pretrained(path, attn_implementation="sdpa", **options)
        except ValueError as error:
            if "attention" not in str(error):
                raise
            # Families without scaled-dot-product attention say so here; their own attention takes the same mask.
            inner, report = _auto(what).from_pretrained(path, attn_implementation="eager", **options)
    except Exception as error:
        if "quantization_config" in options and isinstance(error, RuntimeError | ImportError):
            raise  # the caller says it
        if "Unrecognized configuration class" in str(error):  # and then a list of all others
            raise UserError(
                f"model.path={path}: transformers has no {what} of this family; use a model of another one"
            ) from error
        raise cannot_open(path, what, error) from error
    return inner, sorted(report["missing_keys"])


def _some(missing: list[str]) -> str:
    return f"{missing[0]} is missing" + (f" and {len(missing) - 1} more weights" if missing[1:] else "")


def _auto(what: str) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForCausalLM if what == LANGUAGE_MODEL else AutoModelForSequenceClassification


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


def _from_adapter(
    model: ModelConfig, lora: LoraConfig | None, device: torch.device, settings: dict[str, Any], what: str
) -> tuple[Any, list[str]]:
    """The base model that an adapter names, with the adapter merged into it in fp32."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    base = settings.get("base_model_name_or_path")
    if not base:
        raise UserError(
            f"model.path={model.path}: holds an adapter that does not say of which model; merge the two first"
        )
    if settings.get("task_type") == "SEQ_CLS" and what == LANGUAGE_MODEL:
        raise UserError(f"model.path={model.path}: holds an adapter of a classifier; a {what} is needed here")
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
        inner, missing = _from_pretrained(wide, None, device, what)
    except UserError as error:
        raise UserError(f"model.path={model.path}: holds an adapter of {base}: {error}") from error
    if adapters.HEAD in (settings.get("modules_to_save") or ()):  # a reward model's, which brings its head
        missing = [name for name in missing if name != HEAD_WEIGHT]
    return adapters.with_adapter_merged(inner, str(model.path)).to(TORCH_DTYPES[model.dtype]), missing


def _from_shape(model: ModelConfig, seed: int, what: str) -> Any:
    assert model.shape is not None
    config = shape_config(model.shape)
    set_dropout(config, model.dropout)
    if what == CLASSIFIER:
        config.num_labels = 1
    inner = _auto(what).from_config(config, attn_implementation="sdpa", dtype=TORCH_DTYPES[model.dtype])
    initialise(inner, seed)
    return inner


def set_special_ids(inner: Any, tokenizer: Any) -> None:
    """Give the model the tokenizer's special ids, so that what opens the saved folder generates and stops as we do.

    Raises:
        UserError: when the tokenizer has more tokens than the model has embeddings.
    """
    _refuse_small(inner, tokenizer)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(inner.config, name, getattr(tokenizer, name))
        if inner.can_generate():
            setattr(inner.generation_config, name, getattr(tokenizer, name))


def _refuse_small(inner: Any, tokenizer: Any) -> None:
    vocabulary = inner.config.get_text_config().vocab_size
    if len(tokenizer) > vocabulary:
        raise UserError(
            f"tokenizer: it has {len(tokenizer)} tokens and the model has embeddings for {vocabulary}; "
            "use the tokenizer the model was trained with"
        )
