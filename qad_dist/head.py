"""The frozen LM head that teacher and student share, as it is applied everywhere: to float32 logits.

Dimension key: R rows, D width, V vocabulary, S a slice of it, K tokens of each row.
"""

import torch
from torch import Tensor

SLICE = 4096
"""Of the vocabulary at once on a CPU, so that what is between two products stays in its cache."""


BEST = 32
"""Tokens of each row whose logits are computed once more, where all others are rounded."""


class FrozenHead:
    """Hidden states to float32 logits, whatever the dtype of both.

    Rounded to bf16, logits of 20 and more are off by up to 0.06: then the two best tokens are often equal, and the KL
    of two models as near as teacher and INT8 student is the rounding's.
    """

    def __init__(self, weight_VD: Tensor) -> None:
        """Take the weight, as it is where a product of its dtype can be had in float32, else as a float32 copy."""
        is_bfloat16 = weight_VD.dtype == torch.bfloat16
        self._ends_in_float32 = weight_VD.is_cuda and weight_VD.dtype != torch.float32
        self._is_in_two = is_bfloat16 and not weight_VD.is_cuda and _multiplies_bfloat16(weight_VD.device)
        is_kept = self._ends_in_float32 or self._is_in_two
        self._weight_DV = (weight_VD if is_kept else weight_VD.float()).T

    def __call__(self, states_RD: Tensor) -> Tensor:
        """Float32 logits ``[R, V]`` of states ``[R, D]``."""
        if self._ends_in_float32:
            return torch.mm(states_RD, self._weight_DV, out_dtype=torch.float32)
        if self._is_in_two:
            return _product(states_RD.to(torch.bfloat16), self._weight_DV, in_two=True)
        return states_RD.float() @ self._weight_DV

    def compare(
        self, student_RD: Tensor, teacher_RD: Tensor, *, teacher_head: "FrozenHead | None" = None
    ) -> tuple[Tensor, Tensor]:
        """The teacher's logits, and what the student's have beyond them, for which no logits need be subtracted.

        Where products end rounded, only the teacher's likeliest tokens have exact logits: an error that both models
        have moves what is between them by its own share alone, of tokens that hardly count.

        Args:
            student_RD: Hidden states.
            teacher_RD: The teacher's.
            teacher_head: The teacher's head, where it is another one.

        Returns:
            ``[R, V]`` each, float32.
        """
        is_bfloat16 = self._weight_DV.dtype == student_RD.dtype == teacher_RD.dtype
        if teacher_head is None and self._is_in_two and is_bfloat16:
            shift_RD = (student_RD.float() - teacher_RD.float()).to(torch.bfloat16)
            teacher_RV = _product(teacher_RD, self._weight_DV, in_two=False)
            _make_best_exact(teacher_RV, teacher_RD, self._weight_DV)
            return teacher_RV, _product(shift_RD, self._weight_DV, in_two=False)
        teacher_RV = (teacher_head or self)(teacher_RD)
        return teacher_RV, self(student_RD).sub_(teacher_RV)


def _multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a CPU has units for it; others take several times as long as for float32."""
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _product(states_RD: Tensor, weight_DV: Tensor, *, in_two: bool) -> Tensor:
    """A bf16 product in float32, rounded; or two, the second one of what the first one rounded away.

    These are off by 2**-17 of each logit at most. The units of a CPU add up in float32, but torch hands out only what
    is rounded.
    """
    logits_RV = states_RD.new_empty((len(states_RD), weight_DV.shape[1]), dtype=torch.float32)
    for logits_RS, weight_DS in zip(logits_RV.split(SLICE, 1), weight_DV.split(SLICE, 1), strict=True):
        rounded_RS = states_RD @ weight_DS
        logits_RS.copy_(rounded_RS)
        if in_two:
            logits_RS += torch.addmm(rounded_RS, states_RD, weight_DS, beta=-1)
    return logits_RV


def _make_best_exact(logits_RV: Tensor, states_RD: Tensor, weight_DV: Tensor) -> None:
    """Replace the highest logits of each row by float32 products, in place."""
    best_RK = logits_RV.topk(min(BEST, logits_RV.shape[1]), dim=-1, sorted=False).indices
    for logits_V, states_D, best_K in zip(logits_RV, states_RD.float(), best_RK, strict=True):
        logits_V[best_K] = weight_DV.T[best_K].float() @ states_D
