"""The frozen LM head that teacher and student share, as it is applied everywhere: to float32 logits."""

import torch
from torch import Tensor


class FrozenHead:
    """Hidden states to float32 logits, whatever the dtype of both.

    Rounded to bf16, logits of 20 and more are off by up to 0.06: then the two best tokens are often equal, and the KL
    of two models as near as teacher and INT8 student is the rounding's.
    """

    def __init__(self, weight_VD: Tensor) -> None:
        """Take the weight, as it is where a product of its dtype can end in float32 (CUDA), else as a float32 copy."""
        self._ends_in_float32 = weight_VD.is_cuda and weight_VD.dtype != torch.float32
        self._weight_DV = (weight_VD if self._ends_in_float32 else weight_VD.float()).T

    def __call__(self, states_RD: Tensor) -> Tensor:
        """Float32 logits ``[R, V]`` of states ``[R, D]``."""
        if self._ends_in_float32:
            return torch.mm(states_RD, self._weight_DV, out_dtype=torch.float32)
        return states_RD.float() @ self._weight_DV
