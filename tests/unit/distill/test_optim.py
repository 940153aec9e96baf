"""The schedule by hand, and which weights are trained and decay."""

import itertools

import pytest
import torch
from torch import nn

from qad_dist.distill.optim import choose_trainable, learning_rate_at, parameter_groups


def rates(steps: int, *, warmup_steps: int, final_share: float, peak: float = 1.0) -> list[float]:
    return [
        learning_rate_at(step, peak=peak, warmup_steps=warmup_steps, steps=steps, final_share=final_share)
        for step in range(steps)
    ]


def test_schedule_by_hand() -> None:
    """4 steps up, then half a cosine from 1 to 0.2 over 4 intervals: cos of 0, 45, 90, 135 and 180 degrees."""
    expected = [0.25, 0.5, 0.75, 1.0, 1.0, 0.8 * 0.853553 + 0.2, 0.6, 0.8 * 0.146447 + 0.2, 0.2]

    assert rates(9, warmup_steps=4, final_share=0.2) == pytest.approx(expected, abs=1e-6)


def test_first_update_moves_and_the_last_one_has_the_final_rate() -> None:
    schedule = rates(600, warmup_steps=50, final_share=0.1, peak=1e-5)

    assert schedule[0] == pytest.approx(1e-5 / 50)
    assert schedule[49] == schedule[50] == 1e-5
    assert max(schedule) == 1e-5
    assert schedule[-1] == pytest.approx(1e-6)
    assert all(a > b for a, b in itertools.pairwise(schedule[50:]))


def test_without_warmup_the_first_rate_is_the_peak() -> None:
    assert rates(3, warmup_steps=0, final_share=0.0) == pytest.approx([1.0, 0.5, 0.0])


@pytest.mark.parametrize(("steps", "warmup_steps"), [(1, 0), (2, 1), (3, 2)])
def test_shortest_schedules_have_a_rate_above_zero_at_every_step(steps: int, warmup_steps: int) -> None:
    assert all(rate > 0 for rate in rates(steps, warmup_steps=warmup_steps, final_share=0.1))


def test_rate_beyond_the_end_stays_at_the_final_one() -> None:
    beyond = learning_rate_at(1000, peak=1.0, warmup_steps=2, steps=10, final_share=0.1)

    assert beyond == pytest.approx(0.1)


class Layer(nn.Module):
    """As a decoder layer: a Linear with a bias, a norm, a head-wise norm."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4, 4, bias=True)
        self.norm = nn.RMSNorm(4)
        self.mlp = nn.Linear(4, 8, bias=False)


@pytest.mark.parametrize(
    ("train_norms", "trained"),
    [(False, {"q_proj.weight", "mlp.weight"}), (True, {"q_proj.weight", "mlp.weight", "q_proj.bias", "norm.weight"})],
)
def test_linear_weights_are_trained_and_norms_only_on_request(train_norms: bool, trained: set[str]) -> None:
    layer = Layer()
    layer.mlp.requires_grad_(False)  # whatever was set before

    choose_trainable(layer, train_norms=train_norms)

    assert {name for name, parameter in layer.named_parameters() if parameter.requires_grad} == trained


def test_only_matrices_decay() -> None:
    layer = Layer()
    choose_trainable(layer, train_norms=True)

    groups = parameter_groups(layer.parameters(), weight_decay=0.1)

    names = {id(parameter): name for name, parameter in layer.named_parameters()}
    found = [({names[id(p)] for p in group["params"]}, group["weight_decay"]) for group in groups]
    assert found == [({"q_proj.weight", "mlp.weight"}, 0.1), ({"q_proj.bias", "norm.weight"}, 0.0)]


def test_frozen_weights_and_empty_groups_are_left_out() -> None:
    layer = Layer()
    choose_trainable(layer, train_norms=False)

    (group,) = parameter_groups(layer.parameters(), weight_decay=0.1)

    assert {id(parameter) for parameter in group["params"]} == {id(layer.q_proj.weight), id(layer.mlp.weight)}


def test_norms_do_not_decay_in_adamw() -> None:
    layer = Layer()
    choose_trainable(layer, train_norms=True)
    before = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    optimizer = torch.optim.AdamW(parameter_groups(layer.parameters(), weight_decay=0.5), lr=0.1)
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)

    optimizer.step()

    assert torch.equal(layer.norm.weight, before["norm.weight"])
    torch.testing.assert_close(layer.mlp.weight.detach(), before["mlp.weight"] * 0.95)
