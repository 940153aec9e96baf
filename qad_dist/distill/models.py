"""What distillation needs to know of two models: callables on batches, and their heads."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qad_dist.batch import Batch


@dataclass(frozen=True, slots=True)
class States:
    """What a decoder makes of a batch."""

    rows_RD: Tensor
    """At the response rows, behind the final norm."""
    layers: tuple[Tensor, ...] = ()
    """``[N, D]`` behind each layer, where the two models' are to be compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherAndStudent:
    """Two models, as a rule with the same frozen surroundings."""

    embed: Callable[[Batch], Any]
    """Runs the frozen part in front of the student's decoder; where both share it, its result goes to both."""
    teacher_states: Callable[[Batch, Any], States]
    """The teacher's, from a batch and what ``embed`` made of it."""
    student_states: Callable[[Any], States]
    """The student's; gradients flow when they are on."""
    head_VD: Tensor
    """The frozen LM head of the student."""
    device: torch.device
    teacher_head_VE: Tensor | None = None
    """The teacher's, where it is another one."""
