"""The plain way that packed trees are held against: one forward a path, alone and unpadded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from rlhf_pipeline.data.packing import pack
from rlhf_pipeline.data.tree import Tree
from rlhf_pipeline.models.tree_model import TreeBatch

CPU = torch.device("cpu")
Gradients = dict[str, Tensor]
MIXED = ["sliding_attention", "full_attention"]
WINDOWS: list[tuple[str, dict[str, Any]]] = [
    ("mistral", {"sliding_window": 4}),
    ("mistral", {"sliding_window": 20}),  # longer than any path, shorter than a row
    ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "layer_types": MIXED}),
    ("gemma3_text", {"sliding_window": 3, "layer_types": MIXED}),
]


def plain_logprobs(inner: Any, rows: Sequence[Sequence[Tree]]) -> Tensor:
    """Log-probabilities of the scored tokens, by row, tree, response and place in it."""
    found = []
    for tree in (tree for row in rows for tree in row):
        for response, scored in zip(tree.responses, tree.scored, strict=True):
            path = torch.tensor([*tree.prompt.tolist(), *response.tolist()])
            logits = inner(input_ids=path[None], use_cache=False).logits[0]
            logprobs = torch.log_softmax(logits.float() if logits.dtype == torch.bfloat16 else logits, dim=-1)
            for j in range(len(response)):
                if scored[j]:
                    at = len(tree.prompt) + j
                    found.append(logprobs[at - 1, path[at]])
    return torch.stack(found)


def gradients(inner: Any, logprobs: Tensor) -> Gradients:
    """Of a fixed random weighting of the log-probabilities."""
    weights = torch.randn(len(logprobs), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inner.zero_grad()
    (logprobs.double() * weights).sum().backward()
    return {name: p.grad.clone() for name, p in inner.named_parameters() if p.grad is not None}


def packed_batch(rows: Sequence[Sequence[Tree]], width_multiple: int = 8) -> TreeBatch:
    return TreeBatch.of(pack(rows, width_multiple=width_multiple), CPU)


class KeepFloat64(TorchFunctionMode):
    """transformers' norms and soft-maxes compute in float32 even in a float64 model; within this they do not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            args = [torch.float64 if value is torch.float32 else value for value in args]
            kwargs = {name: torch.float64 if value is torch.float32 else value for name, value in kwargs.items()}
        return func(*args, **kwargs)


def compute_in_float64(inner: Any) -> None:
    """Only in modules of transformers, so that what this project does is seen as it is."""

    def wrapped(forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with KeepFloat64():
                return forward(*args, **kwargs)

        return call

    for module in inner.base_model.modules():
        if type(module).__name__.endswith(("Norm", "Attention", "Router", "MoE")):
            module.forward = wrapped(module.forward)
