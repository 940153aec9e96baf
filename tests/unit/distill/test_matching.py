"""Distance of hidden states: by its definition in float64, and what its gradient keeps."""

import pytest
import torch
from torch import Tensor

from qad_dist.distill.matching import hidden_distance

LAYERS, TOKENS, WIDTH = 3, 7, 5


def states_of(seed: int, *, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Some tokens are hundreds of times as large as others, as in real models."""
    random = torch.Generator().manual_seed(seed)
    large_N1 = torch.tensor([1.0, 400.0, 1.0, 1.0, 0.01, 1.0, 1.0])[:, None]
    return [(large_N1 * torch.randn(TOKENS, WIDTH, generator=random)).to(dtype) for _ in range(LAYERS)]


def by_definition(student: list[Tensor], teacher: list[Tensor], weight_N: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for n in range(TOKENS):
        for ours, theirs in zip(student, teacher, strict=True):
            total = total + weight_N[n] * (ours[n] - theirs[n]).square().sum() / theirs[n].square().sum() / LAYERS
    return total


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
def test_distance_and_gradient_are_those_of_the_definition(dtype: torch.dtype, tolerance: float) -> None:
    teacher, weight_N = states_of(1, dtype=dtype), torch.tensor([1.0, 1.0, 0.0, 0.5, 1.0, 1.0, 2.0])
    student = [states.requires_grad_() for states in states_of(2, dtype=dtype)]
    exact = [states.detach().double().requires_grad_() for states in student]

    found = hidden_distance(student, teacher, weight_N)
    (3.0 * found).backward()

    expected = by_definition(exact, [states.double() for states in teacher], weight_N.double())
    (3.0 * expected).backward()
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    for ours, theirs in zip(student, exact, strict=True):
        assert ours.grad.dtype == dtype
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=tolerance, atol=0)


def test_token_without_weight_counts_nothing_and_gets_no_gradient() -> None:
    teacher, student = states_of(1), [states.requires_grad_() for states in states_of(2)]
    weight_N = torch.ones(TOKENS)
    weight_N[4] = 0

    found = hidden_distance(student, teacher, weight_N)
    found.backward()

    rest = [0, 1, 2, 3, 5, 6]
    alone = hidden_distance([s[rest] for s in student], [t[rest] for t in teacher], torch.ones(len(rest)))
    assert float(found) == pytest.approx(float(alone), rel=1e-6)
    assert all(float(states.grad[4].abs().max()) == 0 for states in student)


def test_equal_states_and_states_of_zeros_are_at_no_distance() -> None:
    teacher = [torch.zeros(TOKENS, WIDTH), *states_of(1)[1:]]
    student = [states.clone().requires_grad_() for states in teacher]

    found = hidden_distance(student, teacher, torch.ones(TOKENS))
    found.backward()

    assert float(found) == 0
    assert all(torch.equal(states.grad, torch.zeros_like(states)) for states in student)


def test_one_tensor_a_layer_is_kept_for_backward() -> None:
    teacher, student = (
        states_of(1, dtype=torch.bfloat16),
        [s.requires_grad_() for s in states_of(2, dtype=torch.bfloat16)],
    )
    kept: list[tuple[torch.dtype, torch.Size]] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append((tensor.dtype, tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden_distance(student, teacher, torch.ones(TOKENS))

    assert [one for one in kept if one[1].numel() > 1] == [(torch.bfloat16, torch.Size([TOKENS, WIDTH]))] * LAYERS
