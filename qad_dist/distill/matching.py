"""How far a student's hidden states are from its teacher's, behind every decoder layer and at every token.

``D = sum_n  w[n] * mean_l ||student[l, n] - teacher[l, n]||^2 / ||teacher[l, n]||^2``

The KL judges response tokens only, a few for each second of speech, and reaches the first layers through all others.
This asks each layer, at prompt, audio and response alike, for what the teacher has there; the distance is a share of
the teacher's own, token by token, since a few tokens have states hundreds of times as large as all others.

Dimension key: N packed tokens, D width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SMALLEST = 1e-12
"""Of a squared norm, so that a state of zeros divides nothing by zero."""


def hidden_distance(student: Sequence[Tensor], teacher: Sequence[Tensor], weight_N: Tensor) -> Tensor:
    """Sum over tokens of the mean relative squared distance over layers.

    Args:
        student: ``[N, D]`` behind each layer; these get gradients.
        teacher: The teacher's behind the same layers.
        weight_N: float32; 0 leaves a token out.

    Returns:
        float32 scalar.

    Source:
        Romero et al. 2015, arXiv:1412.6550 (learning from hidden states); Jiao et al. 2020, arXiv:1909.10351 (layer by
        layer).
    """
    assert student and len(student) == len(teacher), (len(student), len(teacher))
    pairs = zip(student, teacher, strict=True)
    return torch.stack([_RelativeDistance.apply(ours, theirs, weight_N) for ours, theirs in pairs]).mean()


class _RelativeDistance(torch.autograd.Function):
    """Of one layer. Its gradient is computed on the way forward: kept is one tensor of the states' dtype."""

    @staticmethod
    def forward(ctx: Any, student_ND: Tensor, teacher_ND: Tensor, weight_N: Tensor) -> Tensor:
        teacher = teacher_ND.float()
        scale_N = weight_N / teacher.square().sum(-1).clamp_min_(SMALLEST)
        difference_ND = student_ND.float().sub(teacher)
        distance = difference_ND.square().sum(-1).mul_(scale_N).sum()
        ctx.save_for_backward(difference_ND.mul_(2 * scale_N[:, None]).to(student_ND.dtype))
        return distance

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient_ND,) = ctx.saved_tensors
        return gradient_ND * gradients[0], None, None
