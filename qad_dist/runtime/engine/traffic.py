"""Bytes that a rank sends in one step, by formula. Pure."""

from typing import NamedTuple

import torch

_FLOAT32_BYTES = 4
_DECISION_BYTES = 16
"""Squared norm and number of bad ranks, float64: reduced once a step to decide on the update."""


class Traffic(NamedTuple):
    """Bytes that each rank sends in one step."""

    gradients: int
    """Float32, to be added up."""
    weights: int
    """In the weights' dtype, to be whole again."""
    decision: int
    """Whether the update is made."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


def expected_traffic(
    *,
    num_trained: int,
    num_persistent: int = 0,
    sharding: str,
    world_size: int,
    dtype: torch.dtype,
    micro_batches: int,
    gathers: int = 1,
) -> Traffic:
    """What a rank sends, up to padding, when every collective goes round a ring.

    With T trained weights of w bytes on n ranks, share s = (n - 1) / n and m micro-batches of this rank:

    ======= ========= ===========================
    .       gradients weights
    ======= ========= ===========================
    DDP     2 s 4 T   0
    ZeRO-1  2 s 4 T   s w T
    ZeRO-2  2 s 4 T m s w T
    ZeRO-3  s 4 T m   s w (g m (T - P) + P)
    ======= ========= ===========================

    A reduction whose result every rank gets costs s for each half of it. ZeRO-1 and 2 need their own part only, and s
    would do; but DeepSpeed 0.19.8 reduces for all, and with ``use_multi_rank_bucket_allreduce`` off, where it does not,
    it waits for the device before each collective if ``overlap_comm`` is on.

    Args:
        num_trained: T; all weights in the engine are counted as trained.
        num_persistent: P, those below ``stage3_param_persistence_threshold``: gathered once a step.
        sharding: An engine's ``name``.
        world_size: Ranks.
        dtype: Of the weights.
        micro_batches: m.
        gathers: g, how often a micro-batch gathers a weight: 1 where ``stage3_max_reuse_distance`` and
            ``stage3_max_live_parameters`` let it stay between forward and backward, else 2.
    """

    def share(num_bytes: int) -> int:
        return num_bytes * (world_size - 1) // world_size

    reductions = {"DDP": 2, "ZeRO-1": 2, "ZeRO-2": 2 * micro_batches, "ZeRO-3": micro_batches}[sharding]
    num_gathered = {
        "DDP": 0,
        "ZeRO-1": num_trained,
        "ZeRO-2": num_trained,
        "ZeRO-3": gathers * micro_batches * (num_trained - num_persistent) + num_persistent,
    }[sharding]
    return Traffic(
        gradients=share(reductions * num_trained * _FLOAT32_BYTES),
        weights=share(num_gathered * dtype.itemsize),
        decision=share(2 * _DECISION_BYTES),
    )
