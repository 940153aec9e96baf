"""Bytes that an engine holds on a rank: by formula, and counted."""

from typing import NamedTuple

import torch
from torch import Tensor

from qad_dist.runtime.engine.base import HELD, Engine
from qad_dist.runtime.zero import ranks_that_share

_FLOAT32_BYTES = 4


class Memory(NamedTuple):
    """Bytes on one rank, between two micro-batches of a step."""

    weights: int
    """What the module computes with."""
    gradients: int
    """Sums over micro-batches."""
    masters: int
    """Float32 copies of the trained weights; 0 where the weights are their own."""
    moments: int
    """The two running means of AdamW."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


def memory_formula(*, num_trained: int, num_frozen: int, sharding: str, world_size: int, dtype: torch.dtype) -> Memory:
    """What a rank holds, up to padding.

    With T trained and F frozen weights of w bytes each on n ranks:

    ======= ============= ========= ====================== =======
    .       weights       gradients masters                moments
    ======= ============= ========= ====================== =======
    DDP     w (T + F)     4 T       4 T, 0 for float32     8 T
    ZeRO-1  w (T + F)     4 T       4 T / n                8 T / n
    ZeRO-2  w (T + F)     4 T / n   4 T / n                8 T / n
    ZeRO-3  w (T + F) / n 4 T / n   4 T / n                8 T / n
    ======= ============= ========= ====================== =======

    Not in it: activations; the gradients of one backward (2 T for bfloat16 under ZeRO-1, which adds them up after it);
    buckets of ``reduce_bucket_size`` in which ZeRO-2, ZeRO-3 and ZeRO-1 of float32 weights reduce (two while backward
    runs, under ZeRO-3 one for good); weights that ZeRO-3 has gathered, which are all of them between forward and
    backward if ``stage3_max_reuse_distance`` is above twice their number, and for good where they are smaller than
    ``stage3_param_persistence_threshold``.

    Args:
        num_trained: Weights in the engine that need a gradient.
        num_frozen: Other weights in the engine.
        sharding: An engine's ``name``.
        world_size: Ranks.
        dtype: Of the weights.

    Source:
        Rajbhandari et al. 2020, arXiv:1910.02054, section 3.1, with sums of gradients in float32.
    """
    num_weights = num_trained + num_frozen
    stage = 0 if sharding == "DDP" else int(sharding.removeprefix("ZeRO-"))
    ranks = {kind: ranks_that_share(kind, zero_stage=stage, world_size=world_size) for kind in HELD}
    is_own_master = dtype == torch.float32 and sharding == "DDP"
    return Memory(
        weights=num_weights * dtype.itemsize // ranks["weights"],
        gradients=num_trained * _FLOAT32_BYTES // ranks["gradients"],
        masters=0 if is_own_master else num_trained * _FLOAT32_BYTES // ranks["masters"],
        moments=2 * num_trained * _FLOAT32_BYTES // ranks["moments"],
    )


def measured_memory(engine: Engine) -> Memory:
    """The bytes behind the tensors that this rank's engine holds now; memory that two of them share counts once.

    Gradients are there between two micro-batches only.
    """
    held, seen = engine.held_tensors(), set()
    order = ("weights", "masters", "gradients", "moments")  # a weight that is its own master is a weight
    return Memory(**{kind: sum(_bytes_of(tensor, seen) for tensor in held[kind]) for kind in order})


def _bytes_of(tensor: Tensor, seen: set[int]) -> int:
    """Of a tensor's whole memory, unless it was seen."""
    storage = tensor.untyped_storage()
    if storage.nbytes() == 0 or storage.data_ptr() in seen:
        return 0
    seen.add(storage.data_ptr())
    return storage.nbytes()
