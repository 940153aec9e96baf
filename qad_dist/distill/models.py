"""What distillation needs to know of two models: callables on batches, and the head they share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qad_dist.batch import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherAndStudent:
    """Two models with the same frozen surroundings."""

    embed: Callable[[Batch], Any]
    """Runs the shared frozen part once; its result goes to both models."""
    teacher_states: Callable[[Any], Tensor]
    """``[R, D]`` at the response rows, behind the final norm."""
    student_states: Callable[[Any], Tensor]
    """The same of the student; gradients flow when they are on."""
    head_VD: Tensor
    """The frozen LM head that both share."""
    device: torch.device
