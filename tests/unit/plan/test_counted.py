"""What `rlhf plan` says of parameters, activations, logits and the cache, against real models and counted blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers_counted import Counted

from rlhf_pipeline.config import config_dir
from rlhf_pipeline.config.schema import Architecture, Attention, LoraConfig, SamplingConfig, ShapeConfig
from rlhf_pipeline.data.packing import pack
from rlhf_pipeline.data.tree import Tree
from rlhf_pipeline.functional import logprobs
from rlhf_pipeline.generation import decode
from rlhf_pipeline.models import path_attention
from rlhf_pipeline.models.shapes import set_dropout, shape_config
from rlhf_pipeline.models.tree_model import TreeBatch, TreeModel
from rlhf_pipeline.plan import activations, shape

WITHIN = 0.15
ROW, ROWS = 128, 2


def near(expected: float) -> Any:
    return pytest.approx(expected, rel=WITHIN)


def shape_of(architecture: str, *, vocabulary: int = 512, kv_heads: int = 4, **sizes: Any) -> ShapeConfig:
    given: dict[str, Any] = {"hidden": 64, "layers": 3, "heads": 4, "intermediate": 256, "context": 256, **sizes}
    return ShapeConfig(architecture=Architecture(architecture), vocab_size=vocabulary, kv_heads=kv_heads, **given)


def model_of(config: ShapeConfig, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    settings = shape_config(config)
    set_dropout(settings, 0.0)
    return AutoModelForCausalLM.from_config(settings, attn_implementation="sdpa", dtype=dtype)


def batch_of(vocabulary: int = 512) -> TreeBatch:
    """Every position is a token, and all but a row's first are scored."""
    response = (np.arange(ROW - 1) % vocabulary).astype(np.int32)
    tree = Tree(prompt=np.zeros(1, np.int32), responses=(response,), scored=(np.ones(ROW - 1, bool),), index=0)
    return TreeBatch.of(pack([[tree]] * ROWS), torch.device("cpu"))


def rows_of(dtype: torch.dtype, attention: str, checkpointing: bool) -> activations.Rows:
    return activations.Rows(
        row_length=ROW,
        rows=ROWS,
        width=dtype.itemsize,
        attention=Attention(attention),
        checkpointing=checkpointing,
    )


@pytest.mark.parametrize("name", sorted(one.stem for one in (config_dir() / "model").glob("*.yaml")))
def test_parameters_of_the_shipped_shapes(name: str) -> None:
    if name == "pretrained":
        return
    from omegaconf import OmegaConf

    config = OmegaConf.to_object(
        OmegaConf.merge(
            OmegaConf.structured(ShapeConfig), OmegaConf.load(config_dir() / "model" / f"{name}.yaml").shape
        )
    )
    with torch.device("meta"):
        model = model_of(config)  # type: ignore[arg-type]
    found = shape.named(name, key="machine.shape")
    assert found.policy == sum(p.numel() for p in model.parameters())
    assert found == shape.of_values(model.config.to_dict(), where="here")


@pytest.mark.parametrize(
    ("architecture", "sizes"),
    [("gpt2", {"tied": False}), ("llama", {"kv_heads": 2, "tied": False}), ("qwen3", {"kv_heads": 1})],
)
def test_parameters_of_other_shapes(architecture: str, sizes: dict[str, Any]) -> None:
    from transformers import AutoModelForSequenceClassification

    config = shape_of(architecture, **sizes)
    found, settings = shape.of_config(config), shape_config(config)
    assert found.policy == model_of(config).num_parameters()
    settings.num_labels = 1
    scorer = AutoModelForSequenceClassification.from_config(settings)
    assert found.scorer == scorer.num_parameters()


def test_parameters_of_adapters() -> None:
    pytest.importorskip("peft", reason="needs the lora extra")
    from rlhf_pipeline.models.lora import add_adapters

    for architecture, targets in (("llama", "all-linear"), ("llama", ["q_proj", "v_proj"]), ("gpt2", "c_proj")):
        lora = LoraConfig(rank=4, targets=targets)
        config = shape_of(architecture, kv_heads=4 if architecture == "gpt2" else 2)
        model = model_of(config)
        add_adapters(model, lora, seed=0, dtype=torch.float32)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert shape.of_config(config).adapters(lora) == trained, (architecture, targets)


def test_constants_are_those_of_the_code() -> None:
    """They are written out again, since that code imports torch."""
    assert activations.CHUNK_ELEMENTS == logprobs.CHUNK_ELEMENTS
    assert activations.KEEP_ELEMENTS == logprobs.KEEP_ELEMENTS
    assert activations.PREFILL_TOKENS == decode.PREFILL_TOKENS
    assert activations.LONGEST_MATRIX == path_attention.LONGEST_MATRIX


CASES = [
    ("gpt2", torch.float32, "dense", 4, False),
    ("gpt2", torch.bfloat16, "paths", 4, True),
    ("gpt2", torch.bfloat16, "dense", 4, False),
    ("llama", torch.float32, "paths", 2, False),
    ("llama", torch.bfloat16, "dense", 4, True),
    ("llama", torch.bfloat16, "paths", 2, False),
    ("qwen3", torch.bfloat16, "dense", 2, False),
    ("qwen3", torch.float32, "dense", 2, True),
]


@pytest.mark.parametrize(("architecture", "dtype", "attention", "kv_heads", "checkpointing"), CASES)
def test_activations(architecture: str, dtype: torch.dtype, attention: str, kv_heads: int, checkpointing: bool) -> None:
    """What a forward pass keeps, and the most that there is in an update: at the head, or in a layer's backward pass."""
    config = shape_of(architecture, kv_heads=kv_heads)
    model, rows, found = model_of(config, dtype), rows_of(dtype, attention, checkpointing), shape.of_config(config)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    policy = TreeModel(model)
    policy.use_attention(Attention(attention))
    policy.train()
    batch = batch_of()
    own = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy(batch).sum().backward()
    # Of the head: the states that it reads, and all logits, for there are few.
    head = rows.tokens * rows.width * (found.hidden + found.vocabulary)
    saved = activations.saved(found, rows)
    # A layer that is computed again hides what it keeps from the hooks; the peak below has it.
    assert near(sum(one.nbytes() for one in kept.values())) == saved + head
    kept.clear()

    policy(batch).sum().backward()  # the gradients are there from now on
    with Counted() as counted:
        policy(batch).sum().backward()
    logits = activations.logits_trained(found, rows.tokens, rows.width, head_is_trained=True, entropy=False)
    tables = rows.width * found.embedding
    assert near(counted.peak) == saved + max(logits, activations.working(found, rows) + tables)


@pytest.mark.parametrize(("architecture", "vocabulary"), [("gpt2", 4096), ("llama", 512), ("llama", 40_000)])
def test_forward_passes_without_gradients(architecture: str, vocabulary: int) -> None:
    config = shape_of(architecture, vocabulary=vocabulary)
    policy, found = TreeModel(model_of(config)).eval(), shape.of_config(config)
    policy.use_attention(Attention.paths)
    batch = batch_of(vocabulary)
    with torch.no_grad(), Counted() as counted:
        policy(batch)
    passing = activations.passing(found, ROW * ROWS, 4)
    logits = activations.logits_passing(found, ROW * ROWS, 4)
    assert near(counted.peak) == max(passing, logits)


@pytest.mark.parametrize("kv_heads", [4, 1])
def test_cache_and_drawing(kv_heads: int) -> None:
    """Keys and values are most of what decoding takes; answers of one length fill the batch."""
    config = shape_of("llama", kv_heads=kv_heads, vocabulary=64, layers=8)
    model, found = model_of(config), shape.of_config(config)
    rows, prompt, new = 16, 8, 40
    options = SamplingConfig(max_new_tokens=new, batch_tokens=rows * (prompt + new))
    prompts = [np.arange(prompt) for _ in range(rows)]
    with Counted() as counted:
        decode.generate(model, prompts, options, end_ids=[-1], pad_id=0, seed=0, ids=list(range(rows)))
    cache = activations.cache(found, rows * (prompt + new), 4)
    assert cache <= counted.peak * (1 + WITHIN)
    passing = activations.passing(found, rows * prompt, 4)
    assert near(counted.peak) == cache + passing
