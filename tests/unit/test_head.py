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


def states(rows: int, vocabulary: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A student's, which differs from the teacher by a hundredth; the teacher's; and a head."""
    generator = torch.Generator().manual_seed(2)
    teacher_RD = 3 * torch.randn(rows, 64, generator=generator)
    student_RD = teacher_RD + 0.03 * torch.randn(rows, 64, generator=generator)
    head_VD = torch.randn(vocabulary, 64, generator=generator)
    return student_RD.to(dtype), teacher_RD.to(dtype), head_VD.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_comparison_is_the_teachers_logits_and_what_the_students_have_beyond_them(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "_multiplies_bfloat16", lambda device: False)
    student_RD, teacher_RD, head_VD = states(5, 90, dtype)

    teacher_RV, shift_RV = FrozenHead(head_VD).compare(student_RD, teacher_RD)

    torch.testing.assert_close(teacher_RV.double(), teacher_RD.double() @ head_VD.double().T, rtol=1e-5, atol=1e-4)
    expected = (student_RD.double() - teacher_RD.double()) @ head_VD.double().T
    torch.testing.assert_close(shift_RV.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("vocabulary", [20, 9000])
def test_rounded_comparison_is_exact_where_the_teacher_is_likely_and_near_elsewhere(
    vocabulary: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "_multiplies_bfloat16", lambda device: True)
    student_RD, teacher_RD, head_VD = states(6, vocabulary, torch.bfloat16)

    teacher_RV, shift_RV = FrozenHead(head_VD).compare(student_RD, teacher_RD)

    exact = teacher_RD.double() @ head_VD.double().T
    assert float(exact.abs().max()) > 64  # where bf16 is off by 0.25
    best = exact.topk(16).indices
    torch.testing.assert_close(teacher_RV.double().gather(1, best), exact.gather(1, best), rtol=1e-6, atol=1e-5)
    assert (teacher_RV.argmax(-1) == exact.argmax(-1)).all()
    torch.testing.assert_close(teacher_RV.double(), exact, rtol=2**-8, atol=1e-2)
    difference = (student_RD.double() - teacher_RD.double()) @ head_VD.double().T
    assert float((shift_RV.double() - difference).norm() / difference.norm()) < 4e-3
