"""The only file that imports DeepSpeed: one wrapped module, its optimiser, ZeRO stages 0 to 3.

It owns batch arithmetic and loss scaling: a step is any number of micro-batches whose terms are divided by global
counts, DeepSpeed's own accumulation stays at 1 and the boundary is set by hand. It does not seed, log, build data,
schedule or rotate checkpoints. Nothing is left to a DeepSpeed default: it would clip at 1.0 unless told otherwise.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_pipeline.config.schema import Algorithm, Dtype, EngineConfig, Offload, OptimConfig
from rlhf_pipeline.runtime import world_size

# torch's names of an optimiser's state, beside its step count.
MOMENTS = {Algorithm.adamw: ("exp_avg", "exp_avg_sq"), Algorithm.rmsprop: ("square_avg",)}
MASTER = "master"
LR_SCALE = "lr_scale"  # an attribute of parameters whose learning rate is a multiple of the others'


def deepspeed_json(engine: EngineConfig, *, dtype: Dtype, max_grad_norm: float) -> dict[str, Any]:
    """DeepSpeed's config, with every value that it would otherwise choose."""
    zero: dict[str, Any] = {
        "stage": engine.zero_stage,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "round_robin_gradients": False,  # resume names parameters by ranges; this would permute them
        "stage3_param_persistence_threshold": 0,  # every parameter is partitioned, whatever its size
        "stage3_gather_16bit_weights_on_model_save": False,
        **({"offload_optimizer": {"device": "cpu"}} if engine.offload_optimizer is Offload.cpu else {}),
        **({"offload_param": {"device": "cpu"}} if engine.offload_parameters is Offload.cpu else {}),
    }
    bf16 = dtype is Dtype.bfloat16
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # At stage 0 without DeepSpeed's wrapper the norm is not reported; step() clips there itself.
        "gradient_clipping": 0.0 if engine.zero_stage == 0 else max_grad_norm,
        "bf16": {"enabled": bf16, "check_grad_overflow": True},
        "fp16": {"enabled": False},
        # bf16 gradients of several micro-batches are added in fp32.
        **({"data_types": {"grad_accum_dtype": "fp32"}} if bf16 else {}),
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        "zero_allow_untested_optimizer": False,
        "zero_force_ds_cpu_optimizer": False,  # its own CPU Adam needs a compiler
        **engine.extra,
    }
    config["zero_optimization"] = zero | engine.extra.get("zero_optimization", {})
    return config


def quiet_deepspeed() -> None:
    """Import DeepSpeed without its chatter, and without what it would compile, load or measure at start.

    The shared-memory op serves only inference_all_reduce; building it needs a C++ compiler and half a minute. Its Muon
    optimiser, unused here, starts torch's compiler on import, which takes as long as importing torch.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's calls into it
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.runtime.compiler.compile = lambda: deepspeed.runtime.compiler.dummy_decorator
    import deepspeed.runtime.bf16_optimizer as bf16

    bf16.see_memory_usage = lambda *_, **__: None  # prints, and collects garbage for a second to do so


@dataclass(frozen=True, slots=True)
class Slice:
    """A part of one parameter's training state that this rank owns: views of elements [start, start + numel)."""

    name: str
    start: int
    tensors: dict[str, Tensor]  # MASTER and the moments, flat fp32 views; or whatever else there is one of an element

    @property
    def numel(self) -> int:
        return next(iter(self.tensors.values())).numel()


class Engine:
    """A trainable module under DeepSpeed."""

    def __init__(
        self, module: nn.Module, *, engine: EngineConfig, optim: OptimConfig, dtype: Dtype, device: torch.device
    ) -> None:
        import deepspeed

        self.device = device
        self.zero_stage = engine.zero_stage
        self.max_grad_norm = optim.max_grad_norm
        self.updates = 0  # made by the optimiser, before a resume and since
        self.moments = MOMENTS[optim.algorithm]
        self.module = module if engine.zero_stage == 3 else module.to(device)
        config = deepspeed_json(engine, dtype=dtype, max_grad_norm=optim.max_grad_norm)
        # To DeepSpeed an optimiser that is not on its list of a few is untested; here it is tested at every stage.
        config["zero_allow_untested_optimizer"] = optim.algorithm is Algorithm.rmsprop
        optimizer = _optimizer(module, optim, fused=engine.offload_optimizer is Offload.none)
        self._engine = deepspeed.initialize(model=module, optimizer=optimizer, config=config)[0]
        self._engine.set_gradient_accumulation_boundary(False)
        self.names = {parameter: name for name, parameter in module.named_parameters()}

    def __call__(self, *inputs: Any) -> Any:
        return self._engine(*inputs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of one micro-batch; `last` reduces them over ranks. `loss` holds this rank's share of a
        sum over ranks, which DeepSpeed would average: hence the factor."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * world_size())

    def step(self, learning_rate: float) -> float:
        """Clip, update, clear. Returns the global gradient norm before clipping."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate * group[LR_SCALE]
        norm = None
        if self.zero_stage == 0:
            parameters = [p for p in self.names if p.requires_grad]
            limit = self.max_grad_norm or float("inf")
            norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
        self._engine.step()
        self.updates += 1
        return norm if norm is not None else float(self._engine.get_global_grad_norm())

    def train(self, mode: bool = True) -> None:
        self._engine.train(mode)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Dropout off within it, and no gradient."""
        self.train(False)
        try:
            with torch.no_grad():
                yield
        finally:
            self.train()

    @contextmanager
    def whole(self, parameters: list[nn.Parameter]) -> Iterator[None]:
        """Within it `parameters` hold all their elements on every rank; changes are dropped."""
        if self.zero_stage == 3:
            import deepspeed

            with deepspeed.zero.GatheredParameters(parameters):
                yield
        else:
            yield

    def weights(self, inner: nn.Module) -> dict[str, Tensor]:
        """The full state dict of `inner`, a part of the module, on the CPU of the first rank; empty on the others.

        Called by every rank: under ZeRO-3 one parameter at a time is put together.
        """
        keep = torch.distributed.get_rank() == 0
        found: dict[str, Tensor] = {}
        for name, parameter in inner.named_parameters():
            with self.whole([parameter]):
                if keep:
                    found[name] = parameter.detach().to("cpu", copy=True)
        if keep:
            buffers = dict(inner.named_buffers())
            found |= {name: t.detach().cpu() for name, t in inner.state_dict().items() if name in buffers}
        return found

    def fingerprint_frozen(self) -> str:
        """Of the weights that are not trained and so are in no state: sums of their bits, alike on any layout.

        Empty where all are trained. Under ZeRO-3 every rank calls it.
        """
        frozen = sorted((name, p) for p, name in self.names.items() if not p.requires_grad)
        if not frozen:
            return ""
        sums = torch.stack([_sum_of_bits(self._own_part(p)) for _, p in frozen])
        if self.zero_stage == 3:
            torch.distributed.all_reduce(sums)
        text = " ".join(f"{name}:{total}" for (name, _), total in zip(frozen, sums.tolist(), strict=True))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _own_part(self, parameter: Any) -> Tensor:
        """What this process holds of a parameter, without padding."""
        if self.zero_stage < 3:
            return parameter.data
        start = torch.distributed.get_rank() * parameter.partition_numel()
        numel = max(0, min(parameter.partition_numel(), parameter.ds_numel - start))
        return parameter.ds_tensor.data.view(-1)[:numel].to(self.device)

    def slices(self) -> list[Slice]:
        """The training state that this rank owns; the tensors are views, to be read or written in place.

        At stage 0 every rank holds all of it, and the first one owns it. Writing goes on in `synchronise()`.
        """
        self._allocate_moments()
        if self.zero_stage == 0:
            return [self._whole_slice(p, name) for p, name in self.names.items() if p.requires_grad]
        if self.zero_stage == 3:
            return [s for p, name in self.names.items() if p.requires_grad for s in self._partition_slice(p, name)]
        return [s for p, name in self.names.items() if p.requires_grad for s in self._fragment_slice(p, name)]

    def set_updates(self, count: int) -> None:
        """Tell the optimiser how many updates it has made: the bias correction of Adam's moments depends on it."""
        self.updates = count
        self._allocate_moments()
        for state in self._inner_optimizer().state.values():
            if isinstance(state.get("step"), Tensor):
                state["step"].fill_(count)
            else:
                state["step"] = torch.tensor(float(count))

    def synchronise(self) -> None:
        """After slices were written: bring the weights that the forward pass uses in line with the masters."""
        optimizer = self._engine.optimizer
        if self.zero_stage in (1, 2):
            optimizer.update_lp_params()
        elif self.zero_stage == 3:
            # A forward pass without a backward one leaves parameters whole, to be used again: those would stay the old.
            optimizer.empty_partition_cache()
            for group, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
                optimizer.fp16_partitioned_groups_flat[group].data.copy_(flat.data)
                optimizer._reassign_or_swap_out_partitioned_parameters(group)

    def _inner_optimizer(self) -> torch.optim.Optimizer:
        optimizer = self._engine.optimizer
        return optimizer if self.zero_stage == 0 else optimizer.optimizer

    def _flat_masters(self) -> list[Tensor]:
        """The tensors that the torch optimiser updates."""
        if self.zero_stage == 3:
            return list(self._engine.optimizer.fp32_partitioned_groups_flat)
        return [p for group in self._inner_optimizer().param_groups for p in group["params"]]

    def _allocate_moments(self) -> None:
        """Give the optimiser its zero moments ahead of its first step, so that there is something to load into."""
        state = self._inner_optimizer().state
        for flat in self._flat_masters():
            if not state[flat]:
                state[flat]["step"] = torch.tensor(0.0, device=flat.device if flat.is_cuda else None)
                for key in self.moments:
                    state[flat][key] = torch.zeros_like(flat)

    def _whole_slice(self, parameter: nn.Parameter, name: str) -> Slice:
        state = self._inner_optimizer().state[parameter]
        tensors = {MASTER: parameter.data.view(-1), **{key: state[key].view(-1) for key in self.moments}}
        return Slice(name, 0, tensors)

    def _fragment_slice(self, parameter: Any, name: str) -> list[Slice]:
        mapping = parameter._hp_mapping
        if mapping is None:  # this rank's partition holds nothing of it
            return []
        # Not through the mapping's own link to the moments: with two groups it is made before the second has any.
        flat = self._flat_masters()[mapping.param_group_index]
        state, place = self._inner_optimizer().state[flat], mapping.hp_fragment_address
        tensors = {MASTER: flat.data.narrow(0, place.start, place.numel)}
        tensors |= {key: state[key].narrow(0, place.start, place.numel) for key in self.moments}
        return [Slice(name, mapping.lp_fragment_address.start, tensors)]

    def _partition_slice(self, parameter: Any, name: str) -> list[Slice]:
        optimizer = self._engine.optimizer
        group, offset, numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = torch.distributed.get_rank() * parameter.partition_numel()
        numel = min(numel, parameter.ds_numel - start)  # the last partition is padded
        if numel <= 0:
            return []
        flat = optimizer.fp32_partitioned_groups_flat[group]
        state = optimizer.optimizer.state[flat]
        tensors = {MASTER: flat.data.narrow(0, offset, numel)}
        tensors |= {key: state[key].narrow(0, offset, numel) for key in self.moments}
        return [Slice(name, start, tensors)]


def _sum_of_bits(tensor: Tensor) -> Tensor:
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(integers[tensor.element_size()]).sum(dtype=torch.int64)


def _optimizer(module: nn.Module, optim: OptimConfig, *, fused: bool) -> torch.optim.Optimizer:
    """torch's. RMSprop is neither centred nor has it momentum, as in the DPO paper's code; torch has no fused one."""
    groups = _parameter_groups(module, optim.weight_decay)
    momentum, decay = optim.betas
    if optim.algorithm is Algorithm.rmsprop:
        return torch.optim.RMSprop(groups, lr=optim.lr, alpha=decay, eps=optim.eps)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=(momentum, decay), eps=optim.eps, fused=fused)


def _parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices only, and learning rates of their own; no group without members, since each costs a
    partition."""
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for parameter in module.parameters():
        if parameter.requires_grad:
            # A parameter in ZeRO-3 partitions is flat; its own shape is kept beside it.
            is_matrix = len(getattr(parameter, "ds_shape", parameter.shape)) >= 2
            key = (is_matrix and weight_decay > 0, getattr(parameter, LR_SCALE, 1.0))
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": members, "weight_decay": weight_decay if decays else 0.0, LR_SCALE: scale}
        for (decays, scale), members in sorted(groups.items(), key=lambda item: (not item[0][0], item[0][1]))
    ]
