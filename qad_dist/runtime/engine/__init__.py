"""The training engine: one interface, several ways to share the work and the memory of training among ranks.

``base`` says what an engine does, ``zero`` does it with DeepSpeed, ``ddp`` with everything whole on every rank,
``update`` decides on the device whether an update is made. accelerate and DeepSpeed are imported by this package only,
and only when an engine is built.
"""

from pathlib import Path

import torch
from torch import nn

from qad_dist.runtime.engine.base import Engine, OptimizerFactory
from qad_dist.runtime.world import World
from qad_dist.runtime.zero import read_deepspeed_settings

__all__ = ["Engine", "OptimizerFactory", "build_engine"]


def build_engine(
    module: nn.Module,
    make_optimizer: OptimizerFactory,
    *,
    deepspeed: str | None,
    world: World,
    dtype: torch.dtype,
    clip_norm: float,
    trackers: list[str] | None = None,
    tracker_folder: Path | None = None,
) -> Engine:
    """The engine that ``train.deepspeed`` names; all ranks together.

    Args:
        module: What is trained; only it is in the engine. Parameters that need no gradient stay as they are.
        make_optimizer: Called with the module once its parameters are final; gives an ``AdamW`` without ``amsgrad``. It
            is made a fused one, whatever it was built as.
        deepspeed: A DeepSpeed JSON, whose ZeRO stage says what is sharded; None keeps everything whole on every rank.
        world: This rank; its process group exists already when there is more than one.
        dtype: What the module computes in, ``torch.float32`` or ``torch.bfloat16``. Masters, sums of gradients and
            optimizer states are float32 either way.
        clip_norm: Largest global gradient norm.
        trackers: Names of accelerate trackers.
        tracker_folder: Where file-based trackers write.

    Raises:
        ConfigError: The JSON is refused, or a tracker's package is not installed.
        WorldError: accelerate did not build what was asked for.
    """
    if deepspeed is None:
        from qad_dist.runtime.engine.ddp import DdpEngine

        return DdpEngine(
            module,
            make_optimizer,
            world=world,
            dtype=dtype,
            clip_norm=clip_norm,
            trackers=trackers,
            tracker_folder=tracker_folder,
        )
    from qad_dist.runtime.engine.zero import ZeroEngine

    return ZeroEngine(
        module,
        make_optimizer,
        settings=read_deepspeed_settings(deepspeed),
        world=world,
        dtype=dtype,
        clip_norm=clip_norm,
        trackers=trackers,
        tracker_folder=tracker_folder,
    )
