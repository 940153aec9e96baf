"""Logits through the frozen head: float32, of the given weight."""

import pytest
import torch

from qad_dist.head import FrozenHead


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_those_of_the_unrounded_product(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    head_VD = torch.randn(50, 128, generator=generator).to(dtype)
    states_RD = torch.randn(3, 128, generator=generator).to(dtype)

    logits_RV = FrozenHead(head_VD)(states_RD)

    assert logits_RV.dtype == torch.float32
    expected = states_RD.double() @ head_VD.double().T
    torch.testing.assert_close(logits_RV.double(), expected, rtol=0, atol=1e-4)  # of up to 40: bf16 would be off by 0.1


def test_float32_weight_is_not_copied() -> None:
    head_VD = torch.zeros(5, 4)
    head = FrozenHead(head_VD)

    head_VD[2, 1] = 3.0

    assert head(torch.eye(4))[1].tolist() == [0.0, 0.0, 3.0, 0.0, 0.0]
