"""Gradients are added up in float32, and reduced over ranks once a step, while backward still runs."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from qad_dist.runtime.engine.buckets import GradientBuckets
from tests.helpers.operators import record_shapes
from tests.helpers.ranks import run_on_ranks

WIDTH = 16
BUCKET_NUMEL = 2 * WIDTH * WIDTH


def layers(num_layers: int, dtype: torch.dtype = torch.float32) -> nn.ModuleList:
    random = torch.Generator().manual_seed(0)
    made = nn.ModuleList([nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(num_layers)])
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3, generator=random)
    return made.to(dtype)


def states_of(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)


def loss_of(used: list[nn.Module], states: Tensor) -> Tensor:
    for layer in used:
        states = torch.tanh(layer(states))
    return states.float().pow(2).sum()


def backward(buckets: GradientBuckets, loss: Tensor, *, is_last: bool) -> None:
    buckets.begin(is_last=is_last)
    loss.backward()
    buckets.finish()


def gradients_of(module: nn.Module, loss: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True, materialize_grads=True)
    return [gradient.float() for gradient in found]


def reduce_in_the_last_backward_before_its_end(rank: int, world_size: int) -> None:
    assert dist.get_world_size() == world_size == 2
    module = layers(6)
    expected = [
        sum(parts)
        for parts in zip(
            *(gradients_of(module, loss_of(list(module), states_of(seed))) for seed in range(4)), strict=True
        )
    ]
    buckets = GradientBuckets(list(module.parameters()), num_ranks=2, bucket_numel=BUCKET_NUMEL)
    assert [len(bucket.parameters) for bucket in buckets.buckets] == [2, 2, 2]

    with record_shapes() as first:
        backward(buckets, loss_of(list(module), states_of(rank)), is_last=False)
    with record_shapes() as last:
        backward(buckets, loss_of(list(module), states_of(2 + rank)), is_last=True)

    assert not [name for name, _ in first if name.startswith("c10d")]
    names = [name for name, _ in last]
    reductions = [place for place, name in enumerate(names) if name == "c10d.allreduce_.default"]
    products = [place for place, name in enumerate(names) if name == "aten.mm.default"]
    assert len(reductions) == 3
    # Backward has 2 products for each of 6 layers but the first; those of the other 4 come behind the first reduction.
    assert sum(place > reductions[0] for place in products) == 2 * 4 - 1
    for parameter, gradient in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(buckets.of[parameter], gradient, rtol=1e-5, atol=1e-6)


def wait_for_no_gradient_that_a_rank_does_not_have(rank: int, world_size: int) -> None:
    assert dist.get_world_size() == world_size == 2
    module = layers(3)
    used = [list(module), [module[0], module[2]]]
    expected = [
        first + second
        for first, second in zip(*(gradients_of(module, loss_of(used[r], states_of(r))) for r in range(2)), strict=True)
    ]
    buckets = GradientBuckets(list(module.parameters()), num_ranks=2, bucket_numel=1)
    assert len(buckets.buckets) == 3  # larger than a bucket: one each

    backward(buckets, loss_of(used[rank], states_of(rank)), is_last=True)

    for parameter, gradient in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(buckets.of[parameter], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "function", [reduce_in_the_last_backward_before_its_end, wait_for_no_gradient_that_a_rank_does_not_have]
)
def test_buckets_on_two_ranks(function, tmp_path: Path):
    run_on_ranks(function, world_size=2, tmp_path=tmp_path)


def test_sums_of_bfloat16_gradients_are_float32():
    module = layers(2, torch.bfloat16)
    losses = [lambda seed=seed: loss_of(list(module), states_of(seed, torch.bfloat16)) for seed in range(8)]
    expected = gradients_of(module, losses[0]())
    for loss in losses[1:]:
        expected = [total + gradient for total, gradient in zip(expected, gradients_of(module, loss()), strict=True)]
    buckets = GradientBuckets(list(module.parameters()), num_ranks=1, bucket_numel=BUCKET_NUMEL)

    for loss in losses:
        backward(buckets, loss(), is_last=loss is losses[-1])

    for parameter, total in zip(module.parameters(), expected, strict=True):
        assert torch.equal(buckets.of[parameter], total)
        assert not torch.equal(total, total.bfloat16().float())
        assert parameter.grad is None


def test_cleared_sums_are_zero():
    module = layers(1)
    buckets = GradientBuckets(list(module.parameters()), num_ranks=1, bucket_numel=BUCKET_NUMEL)
    backward(buckets, loss_of(list(module), states_of(0)), is_last=True)
    assert float(buckets.of[module[0].weight].abs().sum()) > 0

    buckets.clear()

    assert float(buckets.of[module[0].weight].abs().sum()) == 0
