"""Bytes that DeepSpeed holds for a model in training, by ZeRO stage, dtype and offload, on a GPU and in its host.

The figures are those of this package's engine (`engine.deepspeed_json`) under DeepSpeed 0.19, read in its source and
counted in tests/unit/plan: they differ from the textbook's (Rajbhandari et al. 2020, section 3) where DeepSpeed does.
Activations are elsewhere.

P trained elements, F bytes of frozen weights, N processes, w bytes of an element in model.dtype, B elements of a bucket.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_pipeline.config.schema import Algorithm, Dtype, EngineConfig, Offload

WIDTH = {Dtype.float32: 4, Dtype.bfloat16: 2}
MOMENTS = {Algorithm.adamw: 2, Algorithm.rmsprop: 1}
# DeepSpeed's defaults, in elements. `engine.extra.zero_optimization` may set them otherwise.
REDUCE_BUCKET = 500_000_000
PREFETCH_BUCKET = 50_000_000
LIVE_PARAMETERS = 1_000_000_000
SUB_GROUP = 1_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """What there is of a model in training."""

    trained: int  # P
    frozen_bytes: int  # F, whole: weights under adapters, quantised or not
    elements: int  # of all weights
    largest: int  # elements of the largest matrix that is trained


@dataclass(frozen=True, slots=True, kw_only=True)
class States:
    """Bytes of one process."""

    weights: float  # on the GPU, always
    optimiser: float  # masters and moments, on the GPU, always
    kept_gradients: float  # on the GPU, always: buffers that outlive an update
    gradients: float  # on the GPU in an update, with those kept
    kept_buffers: float  # buckets, always
    buffers: float  # buckets and gathered weights in an update, with those kept
    reducing: float  # copies of gradients on their way to other processes
    reduces_at_end: bool  # when no activation is left, and not layer by layer
    fetching: float  # copies of weights on their way from other processes, before the backward pass
    gathered: float  # weights put together for a forward pass without gradients
    step: float  # gradients and their copies in the optimiser's step, in place of `gradients`
    host: float  # in the host's memory, always
    host_step: float  # there, made on the way of the optimiser's step: AdamW is not the fused one there

    @property
    def kept(self) -> float:
        """On the GPU between updates."""
        return self.weights + self.optimiser + self.kept_gradients + self.kept_buffers


def states(
    parameters: Parameters, engine: EngineConfig, *, dtype: Dtype, algorithm: Algorithm, processes: int
) -> States:
    """What one process holds."""
    match engine.zero_stage:
        case 0:
            return _stage_0(parameters, algorithm)
        case 1:
            return _stage_1(parameters, engine, dtype, algorithm, processes)
        case 2:
            return _stage_2(parameters, engine, dtype, algorithm, processes)
        case _:
            return _stage_3(parameters, engine, dtype, algorithm, processes)


def setting(engine: EngineConfig, name: str, default: int) -> int:
    """Of DeepSpeed's `zero_optimization`."""
    return int(engine.extra.get("zero_optimization", {}).get(name, default))


def _stage_0(p: Parameters, algorithm: Algorithm) -> States:
    """fp32. Gradients are reduced through a flat copy, also on one process."""
    gradients = 4.0 * p.trained
    return States(
        weights=4.0 * p.trained + p.frozen_bytes,
        optimiser=4.0 * MOMENTS[algorithm] * p.trained,
        kept_gradients=0.0,
        gradients=gradients,
        kept_buffers=0.0,
        buffers=0.0,
        reducing=4.0 * min(p.trained, REDUCE_BUCKET + p.largest),
        reduces_at_end=True,
        fetching=0.0,
        gathered=0.0,
        step=gradients + _temporaries(algorithm, p.trained),
        host=0.0,
        host_step=0.0,
    )


def _stage_1(p: Parameters, engine: EngineConfig, dtype: Dtype, algorithm: Algorithm, n: int) -> States:
    """In fp32 with masters of their own; in bf16 by DeepSpeed's BF16_Optimizer, which keeps a whole fp32 gradient beside
    the bf16 one, and reduces it through a bf16 copy."""
    w, share = WIDTH[dtype], p.trained / n
    bucket = setting(engine, "reduce_bucket_size", REDUCE_BUCKET)
    if dtype is Dtype.bfloat16:
        kept, gradients, buffers, reducing = 4.0 * p.trained, 6.0 * p.trained, 0.0, 2.0 * p.trained
        step = gradients + (2.0 * p.trained if n > 1 else 0.0)
    else:
        kept, gradients, buffers, step = 0.0, 4.0 * p.trained, 4.0 * bucket, 8.0 * share
        reducing = 4.0 * share if p.trained > bucket else 0.0
    return States(
        weights=w * p.trained + p.frozen_bytes,
        optimiser=_optimiser(algorithm) * share,
        kept_gradients=kept,
        gradients=gradients,
        kept_buffers=0.0,
        buffers=buffers,
        reducing=reducing,
        reduces_at_end=True,
        fetching=0.0,
        gathered=0.0,
        step=step + _temporaries(algorithm, share),
        host=0.0,
        host_step=0.0,
    )


def _stage_2(p: Parameters, engine: EngineConfig, dtype: Dtype, algorithm: Algorithm, n: int) -> States:
    """Gradients go through a bucket and a flat copy of what is in it. In fp32 those of two micro-batches are there at once.

    Offloaded, bf16 gradients are still added up on the GPU, in fp32.
    """
    w, share, wide = WIDTH[dtype], p.trained / n, dtype is Dtype.float32
    offloaded = engine.offload_optimizer is Offload.cpu
    bucket = setting(engine, "reduce_bucket_size", REDUCE_BUCKET)
    copy = 0 if wide and n == 1 else w * min(p.trained, bucket)
    gradients = 0.0 if wide and offloaded else (8.0 if wide else 4.0) * share
    masters = _optimiser(algorithm) * share
    return States(
        weights=w * p.trained + p.frozen_bytes,
        optimiser=0.0 if offloaded else masters,
        kept_gradients=0.0,
        gradients=gradients,
        kept_buffers=float(w * p.largest) if offloaded else 0.0,
        buffers=w * (bucket + p.largest) + (w * p.largest if offloaded else 0.0),
        reducing=float(copy),
        reduces_at_end=False,
        fetching=0.0,
        gathered=0.0,
        step=gradients
        if offloaded
        else max(gradients, 8.0 * share if wide else 4.0 * share) + _temporaries(algorithm, share),
        # With their gradients, and a copy of the new weights.
        host=masters + (4.0 + w + (4.0 if wide else 0.0)) * share + w * p.largest if offloaded else 0.0,
        host_step=8.0 * share if offloaded else 0.0,
    )


def _stage_3(p: Parameters, engine: EngineConfig, dtype: Dtype, algorithm: Algorithm, n: int) -> States:
    """A flat gradient and a bucket that are never given back; weights are gathered up to a limit, and freed behind it."""
    w, share = WIDTH[dtype], p.trained / n
    offloaded, parked = engine.offload_optimizer is Offload.cpu, engine.offload_parameters is Offload.cpu
    bucket = setting(engine, "reduce_bucket_size", REDUCE_BUCKET)
    live = setting(engine, "stage3_max_live_parameters", LIVE_PARAMETERS) + p.largest
    prefetched = setting(engine, "stage3_prefetch_bucket_size", PREFETCH_BUCKET)
    gathered = float(w * (min(p.elements, live) + min(p.elements, prefetched)))
    weights = w * share + p.frozen_bytes / n
    masters = _optimiser(algorithm) * share
    gradients = 0.0 if offloaded else 4.0 * share
    group = min(share, setting(engine, "sub_group_size", SUB_GROUP))
    return States(
        weights=0.0 if parked else weights,
        optimiser=0.0 if offloaded else masters,
        kept_gradients=gradients,
        gradients=gradients,
        kept_buffers=float(w * bucket),
        buffers=float(w * (bucket + min(p.elements, live) + p.largest)),
        reducing=w * min(p.trained, bucket) * (1 + 1 / n),
        reduces_at_end=False,
        fetching=float(w * min(p.elements, prefetched)),
        gathered=gathered,
        step=gradients if offloaded else gradients + 4.0 * group + _temporaries(algorithm, group),
        host=(masters + 8.0 * share if offloaded else 0.0) + (weights if parked else 0.0),
        host_step=8.0 * group if offloaded else 0.0,
    )


def _optimiser(algorithm: Algorithm) -> float:
    """fp32 master and moments of an element."""
    return 4.0 * (1 + MOMENTS[algorithm])


def _temporaries(algorithm: Algorithm, elements: float) -> float:
    """Of the optimiser's step: the fused AdamW has none, RMSprop a square root of its moment."""
    return 0.0 if algorithm is Algorithm.adamw else 4.0 * elements
