"""The shapes of models, as far as bytes and FLOPs need them: from a config, a config.json or a file under conf/model.

No weights are read and no torch is imported. Only families whose layers are known here have a shape: GPT-2, and those
that are built like Llama; others are refused, since a guess would look like a figure.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_pipeline.config import config_dir
from rlhf_pipeline.config.schema import Architecture, LoraConfig, ShapeConfig
from rlhf_pipeline.errors import UserError

# Two products make the feed-forward layer, the activation of one gates the other; RMS norms; rotary positions.
LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "olmo2", "smollm3", "granite")
WITH_HEAD_NORMS = ("qwen3",)
WITH_BIASES = ("qwen2",)  # of queries, keys and values
ALL_LINEAR = "all-linear"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A causal body with its embedding. `gated`: built like Llama; else like GPT-2."""

    gated: bool
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    intermediate: int
    vocabulary: int
    context: int
    tied: bool
    head_norms: bool = False
    biases: bool = False

    @property
    def queries(self) -> int:
        """Width of all heads' queries."""
        return self.heads * self.head_width

    @property
    def keys(self) -> int:
        """Width of all heads' keys, and of their values."""
        return self.kv_heads * self.head_width

    @property
    def embedding(self) -> int:
        """Elements of the table of words, and of the output embedding."""
        return self.vocabulary * self.hidden

    @property
    def linear_layers(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of a layer's matrices, by transformers' names."""
        h, i = self.hidden, self.intermediate
        if not self.gated:
            return {"attn.c_attn": (h, 3 * h), "attn.c_proj": (h, h), "mlp.c_fc": (h, i), "mlp.c_proj": (i, h)}
        return {
            "q_proj": (h, self.queries),
            "k_proj": (h, self.keys),
            "v_proj": (h, self.keys),
            "o_proj": (self.queries, h),
            "gate_proj": (h, i),
            "up_proj": (h, i),
            "down_proj": (i, h),
        }

    @property
    def matrices(self) -> int:
        """Elements of the matrices of all layers: the weights that every token passes through."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linear_layers.values())

    @property
    def body(self) -> int:
        """Parameters without the output embedding; with the input's."""
        layer = sum(inputs * outputs for inputs, outputs in self.linear_layers.values())
        if self.gated:
            layer += 2 * self.hidden + (2 * self.head_width if self.head_norms else 0)
            layer += self.queries + 2 * self.keys if self.biases else 0
            return self.embedding + self.layers * layer + self.hidden
        layer += 4 * self.hidden + sum(outputs for _, outputs in self.linear_layers.values())
        return self.embedding + self.context * self.hidden + self.layers * layer + 2 * self.hidden

    @property
    def policy(self) -> int:
        """Parameters of a causal language model."""
        return self.body + (0 if self.tied else self.embedding)

    @property
    def scorer(self) -> int:
        """Parameters of a reward or value model, which has a scalar head."""
        return self.body + self.hidden

    def adapters(self, lora: LoraConfig) -> int:
        """Parameters of low-rank adapters on the layers that `lora.targets` names."""
        asked = [lora.targets] if isinstance(lora.targets, str) else list(lora.targets)
        chosen = [
            inputs + outputs
            for name, (inputs, outputs) in self.linear_layers.items()
            if asked == [ALL_LINEAR] or any(name == one or name.endswith(f".{one}") for one in asked)
        ]
        return self.layers * lora.rank * sum(chosen)


def of_config(shape: ShapeConfig) -> Shape:
    """Of a model from scratch."""
    return Shape(
        gated=shape.architecture is not Architecture.gpt2,
        hidden=shape.hidden,
        layers=shape.layers,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_width=shape.hidden // shape.heads,
        intermediate=shape.intermediate,
        vocabulary=shape.vocab_size,
        context=shape.context,
        tied=shape.tied,
        head_norms=shape.architecture is Architecture.qwen3,
    )


def named(name: str, *, key: str) -> Shape:
    """Of the file conf/model/<name>.yaml; `key` is who asks for it.

    Raises:
        UserError: when there is no such file, or it holds no shape.
    """
    from omegaconf import OmegaConf

    folder = config_dir() / "model"
    file = folder / f"{name}.yaml"
    known = sorted(one.stem for one in folder.glob("*.yaml") if one.stem != "pretrained")
    values: Any = OmegaConf.to_container(OmegaConf.load(file)) if file.is_file() else {}
    if not values.get("shape"):
        raise UserError(f"{key}={name}: there is no such shape; one of {', '.join(known)}")
    typed = OmegaConf.merge(OmegaConf.structured(ShapeConfig), values["shape"])
    shape: Any = OmegaConf.to_object(typed)
    return of_config(shape)


def of_folder(path: str, *, key: str) -> Shape | None:
    """Of a folder with a config.json: an artifact, or a model of transformers. None where there is no such folder.

    Raises:
        UserError: for a file that cannot be read, and a family that is not known here.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        return None
    return of_values(_read(file), where=f"{key}={path}")


def dtype_of_folder(path: str) -> str | None:
    """The dtype that a folder's config.json says its weights are stored in, by torch's name."""
    file = Path(path) / "config.json"
    values = _read(file) if file.is_file() else {}
    stored = values.get("dtype") or values.get("torch_dtype")
    return str(stored) if stored else None


def of_values(values: dict[str, Any], *, where: str) -> Shape:
    """Of the values of a config.json.

    Raises:
        UserError: see `of_folder`.
    """
    values = {**values, **(values.get("text_config") or {})}
    family = str(values.get("model_type"))
    try:
        if family == "gpt2":
            return _gpt2(values)
        if family in LIKE_LLAMA:
            return _like_llama(values, family)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where}: its config.json says too little of the model's shape ({error!r})") from error
    raise UserError(
        f"{where}: the layers of {family} are not known to rlhf plan (it knows gpt2, {', '.join(LIKE_LLAMA)}); name a "
        "shape that is close: machine.shape=<a file under conf/model>"
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from error
    return values if isinstance(values, dict) else {}


def _gpt2(values: dict[str, Any]) -> Shape:
    hidden, heads = int(values["n_embd"]), int(values["n_head"])
    return Shape(
        gated=False,
        hidden=hidden,
        layers=int(values["n_layer"]),
        heads=heads,
        kv_heads=heads,
        head_width=hidden // heads,
        intermediate=int(values.get("n_inner") or 4 * hidden),
        vocabulary=int(values["vocab_size"]),
        context=int(values["n_positions"]),
        tied=bool(values.get("tie_word_embeddings", True)),
    )


def _like_llama(values: dict[str, Any], family: str) -> Shape:
    hidden, heads = int(values["hidden_size"]), int(values["num_attention_heads"])
    return Shape(
        gated=True,
        hidden=hidden,
        layers=int(values["num_hidden_layers"]),
        heads=heads,
        kv_heads=int(values.get("num_key_value_heads") or heads),
        head_width=int(values.get("head_dim") or hidden // heads),
        intermediate=int(values["intermediate_size"]),
        vocabulary=int(values["vocab_size"]),
        context=int(values.get("max_position_embeddings") or 0),
        tied=bool(values.get("tie_word_embeddings", family == "gemma")),
        head_norms=family in WITH_HEAD_NORMS,
        biases=family in WITH_BIASES,
    )
