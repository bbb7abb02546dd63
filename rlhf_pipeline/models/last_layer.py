"""Of the last layer, only what is read from it is computed.

A loss reads the hidden states before scored tokens, a reward model those of each response's last token. Nobody attends
to what the last layer puts out, so that its queries, its output projection and its feed-forward part, all of which go
token by token, are wasted on the other positions: on most of them where prompts are long or rankings are scored.

The positions travel as a keyword argument of the model's forward, which transformers hands on to every layer; where a
model does not hand it on, or its layers have other parts, everything is computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

PARTS = ("self_attn.q_proj", "self_attn.o_proj", "mlp")  # what goes token by token, but keys and values
MARK = "narrows_to_states_read"  # on a layer that has its hooks
WORTH = 0.8  # of all positions: above, picking them out costs more than it saves


class LastLayer:
    """Hooks on the last layer of `body`. They do nothing unless its forward is given `read_states`, int64 [n], sorted
    flat positions (row * T + column) without repetition."""

    def __init__(self, body: Any) -> None:
        self.read: Tensor | None = None
        layers = getattr(body, "layers", None)
        last = layers[-1] if isinstance(layers, nn.ModuleList) and len(layers) else None
        parts = [] if last is None else [part for name in PARTS if (part := _submodule(last, name)) is not None]
        if last is None or not parts or getattr(last, MARK, False):  # a model may be wrapped again
            return
        setattr(last, MARK, True)
        # Also when a checkpointed layer is computed again in the backward pass, with the same arguments.
        last.register_forward_pre_hook(self._remember, with_kwargs=True)
        for part in parts:
            part.register_forward_pre_hook(self._narrow)
            part.register_forward_hook(self._widen)

    def _remember(self, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        read = kwargs.get("read_states")
        states = args[0] if args else kwargs["hidden_states"]
        few = read is not None and len(read) < WORTH * states.shape[0] * states.shape[1]
        self.read = read if few else None
        self.shape = states.shape[:2]

    def _narrow(self, part: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.read is None:
            return None
        return (args[0].flatten(0, 1).index_select(0, self.read)[None], *args[1:])

    def _widen(self, part: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if self.read is None:
            return None
        rows, width = self.shape
        whole = torch.zeros(rows * width, output.shape[-1], dtype=output.dtype, device=output.device)
        return whole.index_copy(0, self.read, output[0]).view(rows, width, -1)


def _submodule(layer: nn.Module, name: str) -> nn.Module | None:
    try:
        return layer.get_submodule(name)
    except AttributeError:
        return None
