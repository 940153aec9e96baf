"""The optimizer's settings as pure functions: learning rate of a step, and which weights decay."""

import math
from collections.abc import Iterable
from typing import Any

from torch import nn


def learning_rate_at(step: int, *, peak: float, warmup_steps: int, steps: int, final_share: float) -> float:
    """Linear warmup from 0 to ``peak``, then a cosine to ``final_share * peak`` at the last step. Pure.

    Args:
        step: From 0; the first update (step 0) already moves, by ``peak / warmup_steps``.
        peak: Highest rate.
        warmup_steps: 0 starts at the peak.
        steps: Length of the whole schedule.
        final_share: Rate of the last step, as a share of the peak.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - 1 - warmup_steps)
    return peak * (final_share + (1 - final_share) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def choose_trainable(module: nn.Module, *, train_norms: bool) -> None:
    """Let gradients flow to the Linear weights (all parameters with more than one axis), and to norms if asked."""
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.ndim > 1 or train_norms)


def parameter_groups(parameters: Iterable[nn.Parameter], *, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for AdamW: norms and biases (one axis) never decay."""
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
