"""The check at load: which models pass, which are refused, and what it switches off.

`sharp` stands for weights on which attention and head matter as in a trained model; `flat` is transformers'
initialisation, from which pretraining starts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf_pipeline.config.schema import Architecture, Attention, ModelConfig, ShapeConfig
from rlhf_pipeline.data.packing import pack
from rlhf_pipeline.data.tree import Tree
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.models import tree_model as tree_model_module
from rlhf_pipeline.models.load import load_policy
from rlhf_pipeline.models.self_check import self_check
from rlhf_pipeline.models.tree_model import TreeBatch, TreeModel

CPU = torch.device("cpu")
SCALES = {"flat": 0.02, "sharp": 0.2}
MIXED = ["sliding_attention", "full_attention"]

# family -> its attention, and what it takes beside the sizes. Windows are as long as real ones: only a check that
# shortens them sees whether they are obeyed on a few dozen tokens.
SUPPORTED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("sdpa", {}),
    "qwen3": ("sdpa", {}),
    "gpt2": ("sdpa", {}),
    "mistral": ("sdpa", {"sliding_window": 4096}),
    "qwen2": ("sdpa", {"use_sliding_window": True, "sliding_window": 4096, "layer_types": MIXED}),
    "gemma2": ("eager", {"sliding_window": 4096, "layer_types": MIXED}),
    "gemma3_text": ("sdpa", {"sliding_window": 1024, "layer_types": MIXED}),
    "cohere": ("sdpa", {"logit_scale": 0.0625}),
    "granite": ("sdpa", {"logits_scaling": 8.0}),
    "phi": ("sdpa", {}),
    "falcon": ("sdpa", {}),
    "llama4_text": ("sdpa", {"attention_chunk_size": 8192, "intermediate_size_mlp": 48, "num_local_experts": 2}),
}
# Soft-capped, scaled and biased logits are not hidden states times embeddings; Llama 4 gives out no hidden states.
OWN_HEAD = {"gemma2", "cohere", "granite", "phi", "llama4_text"}
# Paths reach the attention function of these; windows need the mask, and Falcon's layers do not hand arguments on.
PATHS = {"llama", "qwen3", "gpt2", "cohere", "granite", "phi"}

MakeModel = Callable[..., TreeModel]


@pytest.fixture
def tree_model(tiny_model: Callable[..., Any]) -> MakeModel:
    def build(family: str, *, scale: str = "sharp", **options: Any) -> TreeModel:
        attention, config = SUPPORTED.get(family, ("eager", {}))
        options = {"attention": attention, "initializer_range": SCALES[scale], **config, **options}
        return TreeModel(tiny_model(family, **options))

    return build


def path_logprobs(inner: Any, trees: list[Tree]) -> Tensor:
    """One forward a path, alone."""
    found = []
    for tree in trees:
        for k, response in enumerate(tree.responses):
            path = torch.tensor(tree.path(k).tolist())
            logits = inner(input_ids=path[None], use_cache=False).logits[0]
            found.append(torch.log_softmax(logits, -1)[-len(response) - 1 : -1].gather(1, path[-len(response) :, None]))
    return torch.cat(found)[:, 0]


# What passes


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("family", SUPPORTED)
def test_supported_models_pass(family: str, scale: str, tree_model: MakeModel) -> None:
    assert self_check(tree_model(family, scale=scale), CPU) < 1e-4


@pytest.mark.parametrize("attention", [Attention.dense, Attention.paths])
@pytest.mark.parametrize("family", SUPPORTED)
def test_supported_models_pass_in_bf16(family: str, attention: Attention, tree_model: MakeModel) -> None:
    model = tree_model(family, dtype=torch.bfloat16)
    if family != "gemma2":  # has no scaled-dot-product attention, and so nothing that paths could stand in for
        model.use_attention(attention)
    assert self_check(model, CPU) < 0.05


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("family", SUPPORTED)
def test_the_fast_head_stays_only_where_it_is_the_models_own(
    family: str, scale: str, tree_model: MakeModel, make_tree: Callable[..., Tree], assert_close: Callable[..., None]
) -> None:
    """At small weights too: there the cap of gemma2 moves log-probabilities by little, and by much once trained."""
    model = tree_model(family, scale=scale)
    self_check(model, CPU)
    assert model.fast_head == (family not in OWN_HEAD)

    rng = np.random.default_rng(1)
    trees = [make_tree(6, (4, 3), rng=rng), make_tree(3, (5,), rng=rng)]
    with torch.no_grad():
        packed = model(TreeBatch.of(pack([trees]), CPU))
        assert_close(packed, path_logprobs(model.inner, trees), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", sorted(SUPPORTED.keys() - {"gemma2"}))
def test_paths_stay_only_where_the_layers_take_them(family: str, tree_model: MakeModel) -> None:
    """Everywhere else the dense mask takes over; that is slower and not an error."""
    model = tree_model(family)
    model.use_attention(Attention.paths)
    assert self_check(model, CPU) < 1e-4
    assert model.attention is (Attention.paths if family in PATHS else Attention.dense)
    assert model.inner.config._attn_implementation == ("rlhf_paths" if family in PATHS else "sdpa")


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_rounding_in_bf16_is_not_taken_for_paths_that_are_ignored(
    family: str, scale: str, tree_model: MakeModel
) -> None:
    """The fall-back is silent, and costs two thirds of the speed."""
    for seed in range(4):
        model = tree_model(family, scale=scale, dtype=torch.bfloat16, seed=seed)
        model.use_attention(Attention.paths)
        self_check(model, CPU)
        assert model.attention is Attention.paths, f"seed {seed}"


# What is refused

REFUSED: dict[str, dict[str, Any]] = {
    "mpt": {},  # a bias by the place in the row
    "gpt_neo": {"window_size": 4},  # a window by the place in the row
}


@pytest.mark.parametrize("family", REFUSED)
def test_families_that_go_by_the_place_in_the_row_are_refused_by_name(family: str, tree_model: MakeModel) -> None:
    with pytest.raises(UserError, match=f"{family} takes a token's place in the row"):
        tree_model(family, **REFUSED[family])


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("family", REFUSED)
def test_silently_wrong_models_do_not_pass_the_check(
    family: str, scale: str, tree_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were they not refused by name."""
    monkeypatch.setattr(tree_model_module, "BY_PLACE", ())
    model = tree_model(family, scale=scale, **REFUSED[family])
    with pytest.raises(UserError, match=rf"model: {family} does not keep packed examples apart"):
        self_check(model, CPU)


def test_gpt_neo_is_wrong_beyond_its_window(
    tree_model: MakeModel, make_tree: Callable[..., Tree], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why it is refused by name: every path is shorter than the window of its checkpoints, the row is not."""
    monkeypatch.setattr(tree_model_module, "BY_PLACE", ())
    model = tree_model("gpt_neo", window_size=256)
    trees = [make_tree(100, (100, 100, 100), rng=np.random.default_rng(0))]
    with torch.no_grad():
        packed = model(TreeBatch.of(pack([trees]), CPU))
        error = (packed - path_logprobs(model.inner, trees)).abs().view(3, 100).amax(1)
    assert error[0] < 1e-4
    assert error[2] > 1e-2


def test_a_model_that_fails_on_a_mask_of_four_dimensions_is_refused(tree_model: MakeModel) -> None:
    """BLOOM's own ValueError would reach the user as a traceback."""
    with pytest.raises(UserError, match="bloom"):
        self_check(tree_model("bloom"), CPU)


RECURRENT: dict[str, dict[str, Any]] = {
    "mamba": {},
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "expert_layer_period": 2,
        "expert_layer_offset": 1, "mamba_d_state": 4,
    },
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"], "num_experts": 2, "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}  # fmt: skip


@pytest.mark.parametrize("family", RECURRENT)
def test_recurrent_models_are_refused_by_their_layers(family: str, tree_model: MakeModel) -> None:
    with pytest.raises(UserError, match=rf"model: {family} has layers of kind (linear_attention|conv),"):
        tree_model(family, **RECURRENT[family])


# What the check must notice in code of our own


def test_a_window_that_is_not_in_the_mask_is_noticed(tree_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window of 4,096 on a row of 46 tokens."""
    model = tree_model("mistral")
    monkeypatch.setattr(model, "spans", lambda: {"full_attention": None}, raising=True)
    with pytest.raises(UserError, match="mistral"):
        self_check(model, CPU)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda model, mask: None,  # one causal row
        lambda model, mask: mask == 0,  # a bool mask, which eager attention adds as 0 and 1
    ],
    ids=["causal", "bool"],
)
def test_a_wrong_mask_is_noticed(
    wrong: Callable[..., Any], tree_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tree_model("llama", attention="eager")
    right = model.mask
    monkeypatch.setattr(model, "mask", lambda batch: wrong(model, right(batch)), raising=True)
    with pytest.raises(UserError, match="llama"):
        self_check(model, CPU)


# What it leaves as it was


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("passes", [True, False])
def test_the_model_is_left_as_it_was(
    training: bool, passes: bool, tree_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tree_model("mistral")
    model.train(training)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    graphs = []  # no forward of the check is to hold one
    model.inner.register_forward_hook(lambda *_: graphs.append(torch.is_grad_enabled()))
    if passes:
        self_check(model, CPU)
    else:
        monkeypatch.setattr(model, "spans", lambda: {"full_attention": None}, raising=True)
        with pytest.raises(UserError):
            self_check(model, CPU)
    assert set(graphs) == {False}
    assert model.training is model.inner.training is training
    assert model.inner.config.sliding_window == 4096
    assert all(torch.equal(p, weights[name]) and p.grad is None for name, p in model.named_parameters())


def test_dropout_does_not_disturb_the_check(tree_model: MakeModel) -> None:
    model = tree_model("gpt2", embd_pdrop=0.5, resid_pdrop=0.5, attn_pdrop=0.5)
    model.train()
    assert self_check(model, CPU) < 1e-4


# Every shape that this project builds, in the form of attention that a machine chooses


class Tokenizer:
    """As much of one as a model asks for."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, 0

    def __len__(self) -> int:
        return 97


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("architecture", list(Architecture))
def test_every_shape_loads_in_the_attention_chosen_for_it(architecture: Architecture, device: str) -> None:
    """The model itself is built on the CPU; of the device only the kind is asked. GPT-2 has no flex attention."""
    shape = ShapeConfig(
        architecture=architecture, hidden=32, layers=2, heads=2, kv_heads=2, intermediate=48, vocab_size=97, context=64
    )
    policy = load_policy(
        ModelConfig(shape=shape), tokenizer=Tokenizer(), seed=0, device=torch.device(device), deepspeed_config=None
    )
    assert policy.attention is not Attention.auto
