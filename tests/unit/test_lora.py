"""Adapters on small models: which layers, which numbers, what merging gives, and what people are told."""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_pipeline.config.schema import LoraConfig, ModelConfig, Quantise
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.models import lora as module
from rlhf_pipeline.models.load import load_policy
from rlhf_pipeline.models.lora import adapters_off, add_adapters, linear_layers, merge, save_adapters

pytest.importorskip("peft", reason="needs the lora extra")

CPU = torch.device("cpu")
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = torch.tensor([[3, 14, 15, 92, 65, 35]])
MakeModel = Callable[..., Any]


class Tokenizer:
    """What load_policy reads of one."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, 0

    def __len__(self) -> int:
        return 97


def adapted(tiny_model: MakeModel, family: str = "llama", *, seed: int = 0, noise: float = 0.0, **options: Any) -> Any:
    """A model with adapters; `noise` gives the second matrices, which start at zero, values."""
    dtype = options.pop("dtype", torch.float32)
    inner = tiny_model(family, dtype=dtype).eval()
    add_adapters(inner, LoraConfig(**{"rank": 4, "alpha": 8.0, **options}), seed=seed, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in inner.named_parameters():
        if "lora_B" in name:
            parameter.data += noise * torch.randn(parameter.shape, generator=generator)
    return inner


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=TOKENS, use_cache=False).logits


def trained(inner: Any) -> dict[str, Tensor]:
    return {name: p for name, p in inner.named_parameters() if p.requires_grad}


def state(inner: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in inner.named_parameters()}


# Which layers


def test_every_linear_layer_but_the_output(tiny_model: MakeModel) -> None:
    inner = adapted(tiny_model)
    expected = {
        f"model.layers.{i}.{'self_attn' if n in LLAMA[:4] else 'mlp'}.{n}.lora_{ab}.default.weight"
        for i in (0, 1)
        for n in LLAMA
        for ab in "AB"
    }
    assert set(trained(inner)) == expected
    # Widths 32, key and value 16, feed-forward 48; a layer [in, out] costs rank * (in + out).
    widths = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]
    assert sum(p.numel() for p in trained(inner).values()) == 2 * 4 * sum(a + b for a, b in widths)
    assert torch.is_tensor(inner.get_output_embeddings().weight)


def test_gpt2_whose_weights_are_stored_the_other_way(tiny_model: MakeModel) -> None:
    inner = adapted(tiny_model, "gpt2")
    assert {name.split(".lora_")[0].rpartition("h.0.")[2] for name in trained(inner) if ".h.0." in name} == {
        "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj",
    }  # fmt: skip
    shapes = [tuple(trained(inner)[f"transformer.h.0.attn.c_attn.lora_{x}.default.weight"].shape) for x in "AB"]
    assert shapes == [(4, 32), (96, 4)]


@pytest.mark.parametrize(
    ("targets", "count"),
    [("q_proj", 2), (["q_proj", "v_proj"], 4), (["self_attn.o_proj"], 2), (["model.layers.1.mlp.up_proj"], 1)],
)
def test_layers_by_name(tiny_model: MakeModel, targets: Any, count: int) -> None:
    inner = adapted(tiny_model, targets=targets)
    names = {name.split(".lora_")[0] for name in trained(inner)}
    assert len(names) == count
    asked = [targets] if isinstance(targets, str) else targets
    assert all(any(name.endswith(one) for one in asked) for name in names)


@pytest.mark.parametrize("target", ["query", "lm_head", "proj", "embed_tokens", "norm"])
def test_a_name_of_no_linear_layer(tiny_model: MakeModel, target: str) -> None:
    with pytest.raises(UserError) as error:
        adapted(tiny_model, targets=["q_proj", target])
    assert f"lora.targets: {target!r}" in str(error.value)
    assert ", ".join(sorted(LLAMA)) in str(error.value)


def test_a_rank_larger_than_a_layer(tiny_model: MakeModel) -> None:
    assert adapted(tiny_model, rank=16)  # key and value are 16 wide
    with pytest.raises(UserError, match=r"lora\.rank=17: model\.layers\.0\.self_attn\.k_proj is 16 wide"):
        adapted(tiny_model, rank=17)


# Which numbers


def test_it_starts_as_the_model_it_was(tiny_model: MakeModel) -> None:
    assert torch.equal(logits(adapted(tiny_model)), logits(tiny_model("llama").eval()))


def test_drawn_from_the_seed_alone(tiny_model: MakeModel) -> None:
    torch.manual_seed(5)
    one = state(adapted(tiny_model, seed=3))
    torch.manual_seed(6)
    again, other = state(adapted(tiny_model, seed=3)), state(adapted(tiny_model, seed=4))
    assert all(torch.equal(one[name], again[name]) for name in one)
    downs = [name for name in one if "lora_A" in name]
    assert downs and not any(torch.equal(one[name], other[name]) for name in downs)
    for name in downs:  # uniform within 1 / sqrt(in), as torch's linear layers and peft draw them
        bound = 1 / math.sqrt(one[name].shape[1])
        assert 0.7 * bound < one[name].abs().max() <= bound
    firsts = [one[f"model.layers.{i}.self_attn.q_proj.lora_A.default.weight"] for i in (0, 1)]
    assert not torch.equal(*firsts)


def test_in_the_models_dtype(tiny_model: MakeModel) -> None:
    inner = adapted(tiny_model, dtype=torch.bfloat16)
    assert {p.dtype for p in inner.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_update_by_hand(tiny_model: MakeModel, assert_close: Callable[..., None], family: str) -> None:
    """The plain model with W + alpha / rank * B A written into its weights."""
    inner = adapted(tiny_model, family, noise=0.1, rank=4, alpha=6.0)
    plain = tiny_model(family).eval()
    for name, layer in linear_layers(plain).items():
        found = dict(inner.named_parameters())
        update = 1.5 * found[f"{name}.lora_B.default.weight"] @ found[f"{name}.lora_A.default.weight"]
        layer.weight.data += update.detach().T if family == "gpt2" else update.detach()
    assert (logits(inner) - logits(tiny_model(family).eval())).abs().max() > 0.1
    assert_close(logits(inner), logits(plain), rtol=0, atol=2e-5)


# Merging


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])  # phi has biases
def test_merged_is_the_plain_model_again(tiny_model: MakeModel, assert_close: Callable[..., None], family: str) -> None:
    inner, plain = adapted(tiny_model, family, noise=0.1), tiny_model(family).eval()
    weights, adapters = merge(state(inner), inner)
    assert list(weights) == [name for name, _ in plain.named_parameters()]
    assert len(adapters) == len(trained(inner)) and not any("default" in name for name in adapters)
    plain.load_state_dict(weights, strict=False)
    assert_close(logits(plain), logits(inner), rtol=0, atol=2e-5)


def test_merging_adds_in_fp32(tiny_model: MakeModel) -> None:
    """(1 + 2^-6)^2 is 1 + 2^-5 in bf16; taken from 1 before it is rounded, it leaves 2^-12 more, which bf16 can hold."""
    inner = adapted(tiny_model, dtype=torch.bfloat16, rank=1, alpha=1.0, targets="q_proj")
    weights = state(inner)
    name = "model.layers.0.self_attn.q_proj"
    weights[f"{name}.base_layer.weight"].fill_(-1.0)
    for part in ("lora_A", "lora_B"):
        weights[f"{name}.{part}.default.weight"].fill_(1 + 2**-6)
    merged, _ = merge(weights, inner)
    assert torch.equal(merged[f"{name}.weight"], torch.full((32, 32), 2**-5 + 2**-12, dtype=torch.bfloat16))


def test_saved_adapters_are_pefts(tiny_model: MakeModel, tmp_path: Path, assert_close: Callable[..., None]) -> None:
    import peft

    for family in ("llama", "gpt2"):
        inner = adapted(tiny_model, family, noise=0.1, alpha=6.0)
        _, adapters = merge(state(inner), inner)
        folder = tmp_path / family
        save_adapters(folder, inner, adapters, base="somewhere/base", revision="main")
        settings = json.loads((folder / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == "somewhere/base" and settings["revision"] == "main"
        assert settings["r"] == 4 and settings["lora_alpha"] == 6.0 and settings["inference_mode"] is True
        if family == "llama":
            assert settings["target_modules"] == sorted(LLAMA)
        opened = peft.PeftModel.from_pretrained(tiny_model(family), folder).eval()
        assert_close(logits(opened), logits(inner), rtol=0, atol=1e-6)
        assert_close(logits(opened.merge_and_unload()), logits(inner), rtol=0, atol=2e-5)


# Off


def test_adapters_off_is_the_model_before(tiny_model: MakeModel) -> None:
    inner, plain = adapted(tiny_model, noise=0.1), tiny_model("llama").eval()
    before, names = logits(inner), set(trained(inner))
    with adapters_off(inner):
        assert torch.equal(logits(inner), logits(plain))
        with adapters_off(inner):
            assert torch.equal(logits(inner), logits(plain))
        assert torch.equal(logits(inner), logits(plain))
        assert set(trained(inner)) == names
    assert torch.equal(logits(inner), before) and not torch.equal(before, logits(plain))
    assert set(trained(inner)) == names
    with pytest.raises(KeyError), adapters_off(inner):
        raise KeyError
    assert torch.equal(logits(inner), before)


def test_adapters_off_a_model_without_any(tiny_model: MakeModel) -> None:
    plain = tiny_model("llama").eval()
    with adapters_off(plain):
        assert logits(plain).shape == (1, 6, 97)


# Gradient checkpointing


def gradients(inner: Any) -> dict[str, Tensor]:
    inner.train()
    inner(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    return {name: p.grad for name, p in trained(inner).items()}


def test_gradients_flow_with_checkpointing(tiny_model: MakeModel, tmp_path: Path) -> None:
    """Nothing before the first layer is trained, which the reentrant kind of checkpointing answers with no gradients."""
    tiny_model("llama").save_pretrained(tmp_path)
    found = []
    for checkpointing in (False, True):
        policy = load_policy(
            ModelConfig(path=str(tmp_path), gradient_checkpointing=checkpointing),
            lora=LoraConfig(rank=4),
            tokenizer=Tokenizer(),
            seed=0,
            device=CPU,
            deepspeed_config=None,
        )
        generator = torch.Generator().manual_seed(2)
        for name, parameter in policy.inner.named_parameters():
            if "lora_B" in name:
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        found.append(gradients(policy.inner))
    plain, checkpointed = found
    assert len(plain) == 28 and all(g is not None and g.abs().max() > 0 for g in plain.values())
    assert all(torch.equal(checkpointed[name], plain[name]) for name in plain)


# What people are told


def test_without_peft(tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"peft is not installed .*pip install 'rlhf_pipeline\[lora\]', or lora=null"):
        adapted(tiny_model)


def test_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"bitsandbytes cannot be used .*pip install 'rlhf_pipeline\[lora\]'"):
        module.quantisation(LoraConfig(quantise=Quantise.nf4), torch.float32, CPU)
    assert module.quantisation(LoraConfig(), torch.float32, CPU) == {}
    assert module.quantisation(None, torch.float32, CPU) == {}


def opened(folder: Path, **options: Any) -> Any:
    return load_policy(
        ModelConfig(path=str(folder)),
        lora=options.get("lora"),
        tokenizer=Tokenizer(),
        seed=0,
        device=CPU,
        deepspeed_config=options.get("deepspeed_config"),
    )


@pytest.fixture
def adapter(tiny_model: MakeModel, tmp_path: Path) -> tuple[Path, Any]:
    """A folder with an adapter alone, as people have them, and the model that it makes of its base."""
    import peft

    tiny_model("llama").save_pretrained(tmp_path / "base")
    made = peft.get_peft_model(
        tiny_model("llama"), peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    )
    made.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    made.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", made.eval()


def test_a_folder_with_an_adapter_alone(
    adapter: tuple[Path, Any], tiny_model: MakeModel, assert_close: Callable[..., None]
) -> None:
    folder, made = adapter
    inner = opened(folder).inner.eval()
    assert_close(logits(inner), logits(made), rtol=0, atol=2e-5)
    assert (logits(inner) - logits(tiny_model("llama").eval())).abs().max() > 0.1
    assert all(p.requires_grad for p in inner.parameters())
    names = [name for name, _ in tiny_model("llama").named_parameters()]
    assert [name for name, _ in inner.named_parameters()] == names
    again = opened(folder, lora=LoraConfig(rank=3)).inner.eval()
    assert_close(logits(again), logits(made), rtol=0, atol=2e-5)
    assert len(trained(again)) == 28


def test_an_adapter_that_cannot_be_opened(adapter: tuple[Path, Any]) -> None:
    folder, _ = adapter
    zero3 = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": False}}
    with pytest.raises(UserError, match=r"engine.zero_stage=3: model.path=.* holds an adapter of .*merge_and_unload"):
        opened(folder, deepspeed_config=zero3)
    with pytest.raises(UserError, match=r"lora.quantise: model.path=.* holds an adapter of"):
        opened(folder, lora=LoraConfig(quantise=Quantise.nf4))
    settings = json.loads((folder / "adapter_config.json").read_text())

    def write(**changes: Any) -> None:
        (folder / "adapter_config.json").write_text(json.dumps({**settings, **changes}))

    write(base_model_name_or_path=None)
    with pytest.raises(UserError, match="does not say of which model"):
        opened(folder)
    write(base_model_name_or_path=str(folder.parent / "gone"))
    with pytest.raises(UserError, match=r"holds an adapter of .*gone: model.path=.*gone: cannot be opened"):
        opened(folder)
    write(r=3)
    with pytest.raises(UserError, match="its adapter cannot be merged into its base model"):
        opened(folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match=r"adapter_config.json: not valid JSON"):
        opened(folder)


# QLoRA

# Widths that blocks of 64 divide, as those of real models; for llama and for gpt2.
WIDE = {"hidden_size": 64, "head_dim": 32, "intermediate_size": 128, "n_embd": 64, "initializer_range": 0.1}


@pytest.fixture
def quantised(tiny_model: MakeModel, tmp_path: Path) -> Callable[..., Any]:
    pytest.importorskip("bitsandbytes", reason="needs the lora extra")

    def build(family: str = "llama") -> Any:
        tiny_model(family, **WIDE).save_pretrained(tmp_path / family)
        return opened(tmp_path / family, lora=LoraConfig(rank=4, quantise=Quantise.nf4))

    return build


NF4 = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
       0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]  # fmt: skip


def test_weights_are_nf4_twice_quantised(quantised: Callable[..., Any], tiny_model: MakeModel) -> None:
    """By hand: in blocks of 64 the nearest of sixteen levels times the largest value, itself held in 8 bits."""
    inner = quantised().inner
    layer = inner.model.layers[0].mlp.down_proj.base_layer
    assert layer.weight.dtype == torch.uint8 and layer.weight.numel() == 64 * 128 // 2
    assert layer.weight.quant_state.nested
    plain = tiny_model("llama", **WIDE).model.layers[0].mlp.down_proj.weight.detach()
    blocks = plain.reshape(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    levels = torch.tensor(NF4)
    nearest = levels[(blocks / largest)[..., None].sub(levels).abs().argmin(-1)]
    merged, _ = merge(state(inner), inner)
    found = merged["model.layers.0.mlp.down_proj.weight"].reshape(-1, 64)
    assert ((found - nearest * largest).abs() / largest).max() < 0.01
    assert inner.get_output_embeddings().weight.dtype == torch.float32


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_quantised_and_merged_computes_the_same(
    quantised: Callable[..., Any], tiny_model: MakeModel, assert_close: Callable[..., None], family: str
) -> None:
    policy = quantised(family)
    inner = policy.inner.eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in inner.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    plain = tiny_model(family, **WIDE).eval()
    weights, _ = merge(state(inner), inner)
    assert {name: t.shape for name, t in weights.items()} == {n: p.shape for n, p in plain.named_parameters()}
    assert (logits(plain) - logits(inner)).abs().max() > 0.05
    plain.load_state_dict(weights, strict=False)
    assert_close(logits(plain), logits(inner), rtol=0, atol=2e-5)
    with adapters_off(inner):
        assert (logits(plain) - logits(inner)).abs().max() > 0.05
    plain_count = sum(p.numel() for p in plain.parameters())
    assert policy.num_parameters - policy.num_trained == plain_count


def test_quantised_layers_train_after_an_evaluation(quantised: Callable[..., Any]) -> None:
    """bitsandbytes repacks weights for evaluation on some CPUs, and has no gradient through them from then on."""
    policy = quantised()
    for parameter in trained(policy.inner).values():
        parameter.data += 0.05
    before = gradients(policy.inner)
    policy.inner.zero_grad()
    policy.inner.eval()
    logits(policy.inner)
    after = gradients(policy.inner)
    assert len(after) == 28 and all(g.abs().max() > 0 for g in after.values())
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_width_that_bitsandbytes_gets_wrong_on_a_cpu(tiny_model: MakeModel, tmp_path: Path) -> None:
    """Rows of 96 are a block and a half; the CPU kernel takes each row to begin a block."""
    functional = pytest.importorskip("bitsandbytes", reason="needs the lora extra").functional
    weight = torch.randn(8, 96, generator=torch.Generator().manual_seed(0))
    packed, settings = functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    error = (functional.dequantize_4bit(packed, settings) - weight).norm() / weight.norm()
    assert error > 0.15, "0.09 is what four bits cost: it has been put right, and the refusal can go"
    tiny_model("llama", hidden_size=64, head_dim=32, intermediate_size=96).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"lora.quantise: model.layers.0.mlp.down_proj is 96 wide.*multiple of 64"):
        opened(tmp_path, lora=LoraConfig(rank=4, quantise=Quantise.nf4))


def test_a_quantised_model_is_saved_plain(quantised: Callable[..., Any], tiny_model: MakeModel, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    inner = quantised().inner
    weights, _ = merge(state(inner), inner)
    kept = copy.deepcopy(weights)
    inner.save_pretrained(tmp_path / "saved", state_dict=weights)
    tiny_model("llama").save_pretrained(tmp_path / "plain")
    written = load_file(tmp_path / "saved/model.safetensors")
    assert all(torch.equal(written[name], kept[name]) for name in written) and len(written) == len(kept)
    settings = json.loads((tmp_path / "saved/config.json").read_text())
    assert "quantization_config" not in settings and settings["dtype"] == "float32"


def test_a_model_that_is_quantised_already(quantised: Callable[..., Any], tmp_path: Path) -> None:
    quantised()
    folder = tmp_path / "llama"
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="is quantised already"):
        opened(folder, lora=LoraConfig())
