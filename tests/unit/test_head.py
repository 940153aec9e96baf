"""Logits through the frozen head: float32, of the given weight."""

import pytest
import torch

from qad_dist import head
from qad_dist.head import FrozenHead


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_those_of_the_unrounded_product(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    head_VD = torch.randn(50, 128, generator=generator).to(dtype)
    states_RD = torch.randn(3, 128, generator=generator).to(dtype)

    logits_RV = FrozenHead(head_VD)(states_RD)

    assert logits_RV.dtype == torch.float32
    expected = states_RD.double() @ head_VD.double().T
    torch.testing.assert_close(logits_RV.double(), expected, rtol=0, atol=3e-4)  # of up to 40: bf16 would be off by 0.1
    assert float((logits_RV.double() - expected).square().mean().sqrt()) < 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("vocabulary", [1, 4096, 4097, 9000])
def test_slices_of_the_vocabulary_make_up_all_of_it(vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "_multiplies_bfloat16", lambda device: True)
    generator = torch.Generator().manual_seed(1)
    head_VD = torch.randn(vocabulary, 16, generator=generator).bfloat16()
    states_RD = torch.randn(2, 16, generator=generator).bfloat16()

    logits_RV = FrozenHead(head_VD)(states_RD)

    expected = states_RD.double() @ head_VD.double().T
    torch.testing.assert_close(logits_RV.double(), expected, rtol=0, atol=1e-3)


def test_float32_weight_is_not_copied() -> None:
    head_VD = torch.zeros(5, 4)
    shared = FrozenHead(head_VD)

    head_VD[2, 1] = 3.0

    assert shared(torch.eye(4))[1].tolist() == [0.0, 0.0, 3.0, 0.0, 0.0]
