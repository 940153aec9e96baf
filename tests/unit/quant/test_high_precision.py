"""``keep_high_precision: auto`` on planted costs: each Linear that quantizes adds its own to the KL."""

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from torch import nn

from qad_dist.asr.load import AsrModel
from qad_dist.formats import FORMATS
from qad_dist.quant.high_precision import LinearSwitch, keep_fewest
from qad_dist.quant.recipe import modelopt_config
from qad_dist.quant.state import keep_in_high_precision
from shards.errors import ModelError
from tests.helpers.qwen import load

RANKED = [
    ["layers.1.mlp.down_proj"],
    ["layers.0.mlp.gate_proj", "layers.0.mlp.up_proj"],
    ["layers.2.self_attn.q_proj", "layers.2.self_attn.k_proj", "layers.2.self_attn.v_proj"],
    ["layers.0.self_attn.o_proj"],
    ["layers.2.mlp.down_proj"],
]
COSTS = {name: 2.0**-place for place, names in enumerate(RANKED) for name in names}


@pytest.fixture(scope="module")
def quantized() -> AsrModel:
    """Quantizers that saw no data: nothing here runs them. All are on, before and behind each test."""
    model = load()
    mtq.quantize(model.model, modelopt_config(FORMATS["int8"], group_size=128))
    return model


@pytest.fixture
def layers(quantized: AsrModel) -> nn.ModuleList:
    return quantized.decoder.layers


def quantizes(layers: nn.ModuleList, name: str) -> bool:
    linear: Any = layers.get_submodule(name.removeprefix("layers."))
    both = {
        quantizer._if_quant and quantizer.is_enabled for quantizer in (linear.input_quantizer, linear.weight_quantizer)
    }
    assert len(both) == 1
    return both.pop()


class Costs:
    """The KL of a student whose Linears add up, and how it was asked."""

    def __init__(self, layers: nn.ModuleList, costs: Mapping[str, float], *, rest: float = 0.0) -> None:
        self._layers, self._costs, self._rest = layers, costs, rest
        self.found: list[float] = []

    def __call__(self) -> float:
        self.found.append(
            self._rest + math.fsum(cost for name, cost in self._costs.items() if quantizes(self._layers, name))
        )
        return self.found[-1]


def kl_without(num_groups: int) -> float:
    return math.fsum(COSTS[name] for names in RANKED[num_groups:] for name in names)


@pytest.mark.parametrize("num_groups", range(1, len(RANKED) + 1))
@pytest.mark.parametrize("above", [0.0, 1e-6])
def test_the_worst_groups_are_kept_and_no_more_than_needed(
    layers: nn.ModuleList, num_groups: int, above: float
) -> None:
    budget = kl_without(num_groups) + above

    kept = keep_fewest(layers, RANKED, evaluate=Costs(layers, COSTS), budget=budget, exact={})

    assert kept == [name for names in RANKED[:num_groups] for name in names]


def test_nothing_is_kept_where_the_budget_is_met(layers: nn.ModuleList) -> None:
    costs = Costs(layers, COSTS)

    assert keep_fewest(layers, RANKED, evaluate=costs, budget=kl_without(0), exact={}) == []
    assert costs.found == [kl_without(0)]


def test_a_hundred_groups_take_nine_trials(layers: nn.ModuleList) -> None:
    """Both ends, and seven halvings."""
    switch = LinearSwitch(layers, exact={})
    ranked = [[name] for name in switch.linears] + [[] for _ in range(100 - len(switch.linears))]
    costs = Costs(layers, dict.fromkeys(switch.linears, 1.0))

    assert keep_fewest(layers, ranked, evaluate=costs, budget=7.0, exact={}) == list(switch.linears)[:14]
    assert len(costs.found) <= 9


def test_what_is_returned_was_within_the_budget_though_the_kl_also_rose(layers: nn.ModuleList) -> None:
    """Keeping the second group undoes more than it brings."""
    costs = Costs(layers, COSTS | {"layers.0.mlp.up_proj": -1.2})
    budget = 1.0

    kept = keep_fewest(layers, RANKED, evaluate=costs, budget=budget, exact={})

    keeping = Costs(layers, {name: cost for name, cost in costs._costs.items() if name not in kept})
    assert keeping() <= budget
    assert keeping() in costs.found


def test_unreachable_budget_is_refused_with_what_is_reached(layers: nn.ModuleList) -> None:
    with pytest.raises(
        ModelError,
        match=r"quantize\.kl_budget must be at least .* in high precision, got 0\.001 below 0\.0123 nats per token",
    ) as error:
        keep_fewest(layers, RANKED, evaluate=Costs(layers, COSTS, rest=0.0123), budget=0.001, exact={})

    assert error.value.is_shared
    assert all(quantizes(layers, name) for name in LinearSwitch(layers, exact={}).linears)


def test_every_trial_is_told_and_all_quantizers_are_on_again(
    layers: nn.ModuleList, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    keep_fewest(layers, RANKED, evaluate=Costs(layers, COSTS), budget=0.5, exact={})

    told = [entry.getMessage() for entry in caplog.records if "event=kept" in entry.getMessage()]
    assert told == [
        "event=kept groups=0 kl=2.9375 budget=0.5",
        "event=kept groups=5 kl=0 budget=0.5",
        "event=kept groups=2 kl=0.9375 budget=0.5",
        "event=kept groups=3 kl=0.1875 budget=0.5",
    ]
    assert all(quantizes(layers, name) for name in LinearSwitch(layers, exact={}).linears)


def test_switch_leaves_off_what_is_kept_for_good(load_nano: Callable[..., AsrModel]) -> None:
    model = load_nano()
    mtq.quantize(model.model, modelopt_config(FORMATS["int8"], group_size=128))
    keep_in_high_precision(model.decoder.layers, ["layers.1.mlp.down_proj"], exact={})
    switch = LinearSwitch(model.decoder.layers, exact={})

    switch.switch_all(on=False)
    switch.switch_all(on=True)

    assert [name for name in switch.linears if not quantizes(model.decoder.layers, name)] == ["layers.1.mlp.down_proj"]


def test_switch_puts_the_exact_weight_in_and_the_rounded_one_back(layers: nn.ModuleList) -> None:
    name = "layers.1.mlp.down_proj"
    linear: Any = layers[1].mlp.down_proj
    rounded_OC = linear.weight.detach().clone()
    exact_OC = rounded_OC + 1
    switch = LinearSwitch(layers, exact={name: exact_OC})

    switch.switch(name, on=False)
    assert torch.equal(linear.weight, exact_OC)
    assert torch.equal(switch.weight(name), exact_OC)

    switch.switch(name, on=True)
    assert torch.equal(linear.weight, rounded_OC)
    assert torch.equal(switch.weight(name), exact_OC)
    assert torch.equal(switch.weight("layers.0.mlp.down_proj"), layers[0].mlp.down_proj.weight)
