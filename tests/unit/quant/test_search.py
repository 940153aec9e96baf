"""Scales and clipping of one group of Linears: against loops in float64, brute force, and ModelOpt's quantizers.

Dimension key: S tokens, C input channels, O outputs.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import pytest
import torch
from modelopt.torch.quantization.tensor_quant import scaled_e4m3
from torch import Tensor, nn

from qad_dist.asr.load import AsrModel
from qad_dist.batch import Batch
from qad_dist.formats import FORMATS, Format, FormatName
from qad_dist.quant.recipe import modelopt_config
from qad_dist.quant.search import (
    COARSE,
    KEPT_SHARES,
    Group,
    exact_outputs,
    output_error,
    quantize_inputs,
    quantize_weight,
    relative_error,
    scale_at,
    search,
    search_kept_share,
    weight_amax,
)
from qad_dist.quant.walk import Tokens
from tests.helpers.quantized import Calibrated, calibrate, copied

TOKENS, CHANNELS, OUTPUTS = 40, 64, 24
GROUP_SIZE = 16
STEPS = [step / 20 for step in range(21)]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def group() -> Group:
    """Two Linears that read outlier channels, of tokens whose weights differ."""
    loudness_C = random(CHANNELS, seed=0).mul(1.5).exp()
    inputs_SC = random(TOKENS, CHANNELS, seed=1) * loudness_C
    weights_OC = {"gate": random(OUTPUTS, CHANNELS, seed=2), "up": random(OUTPUTS, CHANNELS, seed=3) * 3}
    return Group(
        weights_OC=weights_OC,
        amax_C=inputs_SC.abs().amax(0) * 1.2,  # of a set larger than the sample
        weight_amax_C=torch.stack([weight.abs().amax(0) for weight in weights_OC.values()]).amax(0),
        tokens=Tokens(inputs_SC, torch.where(torch.arange(TOKENS) % 3 == 0, 11.0, 1.0)),
    )


def error_by_hand(group: Group, recipe: Format, scale_C: Tensor, kept_share: float) -> float:
    """In float64, one output of one token at a time."""
    inputs_SC, scale = group.tokens.inputs_SC.double().numpy(), scale_C.double().numpy()
    static_amax = (group.amax_C.double().numpy() / scale).max() * kept_share
    total = 0.0
    for weight_OC in group.weights_OC.values():
        weight, off, size = weight_OC.double().numpy(), 0.0, 0.0
        for token_C, counts in zip(inputs_SC, group.tokens.weights_S.tolist(), strict=True):
            smooth_C = token_C / scale
            amax = {"none": None, "token": np.abs(smooth_C).max(), "tensor": static_amax}[recipe.input_scales]
            read_C = smooth_C if amax is None else np.clip(np.round(smooth_C / amax * 127), -128, 127) * amax / 127
            for row_C in weight:
                highest = 2 ** (recipe.weight_bits - 1) - 1
                blocks = (row_C * scale).reshape(-1, GROUP_SIZE if recipe.weight_scales == "group" else CHANNELS)
                step = np.abs(blocks).max(1, keepdims=True) / highest
                exact = float(row_C @ token_C)
                found = float((np.clip(np.round(blocks / step), -highest - 1, highest) * step).flatten() @ read_C)
                off += counts * (found - exact) ** 2
                size += counts * exact**2
        total += off / size
    return total


@pytest.mark.parametrize("name", ["int8", "int8_dynamic", "int8_weight_only", "int4_weight_only", "w4a8"])
@pytest.mark.parametrize("kept_share", [1.0, 0.7])
def test_output_error_is_that_of_a_plain_loop_in_float64(group: Group, name: FormatName, kept_share: float) -> None:
    recipe = FORMATS[name]
    scale_C = random(CHANNELS, seed=4).exp()

    found = output_error(
        group, exact_outputs(group), recipe, scale_C=scale_C, kept_share=kept_share, group_size=GROUP_SIZE
    )

    # A value in a million lies so near a tie that float32 rounds it to the other side.
    assert found == pytest.approx(error_by_hand(group, recipe, scale_C, kept_share), rel=1e-3)


def test_error_at_a_response_token_counts_eleven_times() -> None:
    exact_SO = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]])
    found_SO = exact_SO + torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.0, 0.0]])

    found = relative_error(found_SO, exact_SO, torch.tensor([11.0, 1.0, 1.0]))

    assert found == pytest.approx((11 * 1 + 4) / (11 * 25 + 1 + 4))


def test_scale_where_both_are_rounded_is_smoothquants() -> None:
    """arXiv 2211.10438, equation 4, by hand: the input's 16 and 2, the weight's 4 and 0.5."""
    seen = Group(
        weights_OC={},
        amax_C=torch.tensor([16.0, 2.0]),
        weight_amax_C=torch.tensor([4.0, 0.5]),
        tokens=Tokens(torch.zeros(0, 2), torch.zeros(0)),
    )

    assert scale_at(0.5, seen, FORMATS["int8"]).tolist() == [2.0, 2.0]
    assert scale_at(1.0, seen, FORMATS["int8_dynamic"]).tolist() == [16.0, 2.0]
    assert scale_at(0.0, seen, FORMATS["int8"]).tolist() == [0.25, 2.0]


@pytest.mark.parametrize("name", ["int8_weight_only", "int4_weight_only", "w4a8"])
def test_scale_where_weights_cost_is_a_power_of_the_input_of_geometric_mean_1(name: FormatName) -> None:
    """The mean is of the channels that are ever loud: 4 * 16 = 8 * 8, and at one half 2 * 4."""
    seen = Group(
        weights_OC={},
        amax_C=torch.tensor([4.0, 0.0, 16.0]),
        weight_amax_C=torch.tensor([7.0, 8.0, 9.0]),
        tokens=Tokens(torch.zeros(0, 3), torch.zeros(0)),
    )

    torch.testing.assert_close(scale_at(1.0, seen, FORMATS[name]), torch.tensor([0.5, 1.0, 2.0]))
    torch.testing.assert_close(scale_at(0.5, seen, FORMATS[name]), torch.tensor([0.5**0.5, 1.0, 2**0.5]))
    assert scale_at(0.0, seen, FORMATS[name]).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(("amax", "expected"), [(2.0**-31, 1.0), (2.0**-30, 1e-4), (1e6, 1e4)])
def test_scale_stays_within_modelopts_limits_and_leaves_silence_alone(amax: float, expected: float) -> None:
    seen = Group(
        weights_OC={},
        amax_C=torch.tensor([amax, 1.0]),
        weight_amax_C=torch.ones(2),
        tokens=Tokens(torch.zeros(0, 2), torch.zeros(0)),
    )

    assert float(scale_at(1.0, seen, FORMATS["int8"])[0]) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["int8", "int8_dynamic", "fp8", "w4a8"])
def test_search_finds_what_a_brute_force_over_the_coarse_grid_and_its_neighbours_finds(
    group: Group, name: FormatName
) -> None:
    recipe = FORMATS[name]
    shares = KEPT_SHARES if recipe.input_scales == "tensor" else (1.0,)
    grid = {
        (alpha, share): output_error(
            group,
            exact_outputs(group),
            recipe,
            scale_C=scale_at(alpha, group, recipe),
            kept_share=share,
            group_size=GROUP_SIZE,
        )
        for alpha in STEPS
        for share in shares
    }
    coarse = min((key for key in grid if key[0] in COARSE), key=lambda key: grid[key])
    looked_at = [key for key in grid if key[0] in COARSE or abs(key[0] - coarse[0]) < 0.06]

    found = search(group, recipe, alphas=None, kept_shares=shares, group_size=GROUP_SIZE)

    assert (found.alpha, found.kept_share) == min(looked_at, key=lambda key: grid[key])
    assert torch.equal(found.scale_C, scale_at(found.alpha, group, recipe))
    assert len(found.errors) == len(looked_at)
    assert min(found.errors.values()) == min(grid[key] for key in looked_at)
    assert found.errors[f"alpha={found.alpha:g} kept={found.kept_share:g}"] == min(found.errors.values())


def test_search_among_given_alphas_looks_at_no_others(group: Group) -> None:
    recipe = FORMATS["w4a8"]
    errors = {
        alpha: output_error(
            group,
            exact_outputs(group),
            recipe,
            scale_C=scale_at(alpha, group, recipe),
            kept_share=1.0,
            group_size=GROUP_SIZE,
        )
        for alpha in (0.3, 0.9, 0.2)
    }

    found = search(group, recipe, alphas=[0.3, 0.9, 0.2], kept_shares=[1.0], group_size=GROUP_SIZE)

    assert found.alpha == min(errors, key=lambda alpha: errors[alpha])
    assert found.errors == {f"alpha={alpha:g} kept=1": errors[alpha] for alpha in sorted(errors)}


def test_of_equal_candidates_the_first_is_taken(group: Group) -> None:
    """Where all inputs reach 1, no power of them changes anything."""
    equal = replace(group, amax_C=torch.ones(CHANNELS))

    found = search(equal, FORMATS["int8_weight_only"], alphas=None, kept_shares=[1.0], group_size=GROUP_SIZE)

    assert len(set(found.errors.values())) == 1
    assert found.alpha == 0.0
    assert found.kept_share == 1.0


def test_kept_share_of_a_given_scale_is_that_of_the_smallest_error(group: Group) -> None:
    recipe = FORMATS["int8"]
    loud = replace(group, amax_C=group.amax_C * 1.5)  # of which the sample knows nothing: less is better
    errors = {
        share: output_error(
            loud, exact_outputs(loud), recipe, scale_C=torch.ones(CHANNELS), kept_share=share, group_size=GROUP_SIZE
        )
        for share in KEPT_SHARES
    }

    found = search_kept_share(loud, recipe, scale_C=torch.ones(CHANNELS), group_size=GROUP_SIZE)

    assert found == min(errors, key=lambda share: errors[share]) < 1


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("seed", [0, 1])
def test_weights_are_quantized_as_modelopts_quantizer_does_to_the_last_bit(name: FormatName, seed: int) -> None:
    """Per output channel, per group of inputs and per tensor; E4M3 too."""
    recipe = FORMATS[name]
    holder = nn.Module()
    holder.q_proj = nn.Linear(CHANNELS, OUTPUTS, bias=False)
    holder.q_proj.weight.data = random(OUTPUTS, CHANNELS, seed=seed) * random(OUTPUTS, 1, seed=seed + 7).exp()
    weight_OC = holder.q_proj.weight.detach().clone()
    mtq.quantize(holder, modelopt_config(recipe, group_size=GROUP_SIZE))
    mtq.calibrate(holder, algorithm="max", forward_loop=lambda _: None)
    quantizer: Any = holder.q_proj.weight_quantizer

    found_OC = quantize_weight(weight_OC, recipe, group_size=GROUP_SIZE)

    assert torch.equal(found_OC, quantizer(weight_OC).detach())
    amax_OB1 = weight_amax(weight_OC, recipe, group_size=GROUP_SIZE)
    assert amax_OB1.unique().tolist() == quantizer._amax.unique().tolist()
    assert not torch.equal(found_OC, weight_OC)


def test_kept_share_of_a_block_bounds_its_weights() -> None:
    weight_OC = torch.tensor([[7.0, 1.2, -8.0, 0.4]])

    found_OC = quantize_weight(
        weight_OC, FORMATS["int4_weight_only"], group_size=2, kept_OB1=torch.tensor([[[0.5], [1.0]]])
    )

    # Steps of 3.5 / 7 and 8 / 7: the first weight becomes 7 steps, the third -7.
    torch.testing.assert_close(found_OC, torch.tensor([[3.5, 1.0, -8.0, 0.0]]))


@pytest.mark.parametrize("amax", [0.01, 1.0, 3.7, 0.0])
def test_inputs_are_rounded_to_e4m3_as_by_modelopt(amax: float) -> None:
    inputs_SC, bound = random(TOKENS, CHANNELS, seed=5), torch.tensor(amax)

    found_SC = quantize_inputs(inputs_SC, FORMATS["fp8"], amax=bound)

    assert torch.equal(found_SC, scaled_e4m3(inputs_SC, bound, None, 4, 3))


def test_inputs_take_their_scale_from_the_format(group: Group) -> None:
    inputs_SC, bound = group.tokens.inputs_SC, torch.tensor(2.0)

    exact = quantize_inputs(inputs_SC, FORMATS["int4_weight_only"], amax=bound)
    static = quantize_inputs(inputs_SC, FORMATS["int8"], amax=bound)
    by_token = quantize_inputs(inputs_SC, FORMATS["int8_dynamic"], amax=bound)

    assert torch.equal(exact, inputs_SC)
    assert float(static.max()) == 2.0
    steps_S1 = inputs_SC.abs().amax(1, keepdim=True) / 127
    torch.testing.assert_close(by_token, (inputs_SC / steps_S1).round() * steps_S1)


def test_each_group_has_the_alpha_that_the_section_gives_it(
    nano: AsrModel, batches: list[Batch], calibrated: Callable[..., Calibrated]
) -> None:
    made = calibrate(copied(nano), *batches, alpha={"qkv": 0.25, "down": 0.75})

    assert {(name, one.choice.alpha) for (_, name), one in made.smoothed.items()} == {
        ("qkv", 0.25), ("o", 1.0), ("gate_up", 1.0), ("down", 0.75)
    }  # fmt: skip
    usual = calibrated(alpha=1.0).smoothed
    assert torch.equal(made.smoothed[1, "o"].choice.scale_C, usual[1, "o"].choice.scale_C)
    assert not torch.equal(made.smoothed[1, "down"].choice.scale_C, usual[1, "down"].choice.scale_C)


def test_searched_alphas_of_a_student_are_the_best_on_the_held_out_batch(
    nano: AsrModel, batches: list[Batch], calibrated: Callable[..., Calibrated], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What reaches the search: the last batch's tokens, maxima of the others, and weights before they are folded."""
    made, searched = calibrated(), []

    def remember(group: Group, *args: Any, **kwargs: Any) -> Any:
        weights = {name: weight.clone() for name, weight in group.weights_OC.items()}  # they are folded in place
        searched.append(replace(group, weights_OC=weights))
        return search(group, *args, **kwargs)

    monkeypatch.setattr("qad_dist.quant.choose.search", remember)
    calibrate(copied(nano), *batches)

    assert len(searched) == 12
    for group, ((number, name), one) in zip(searched, made.smoothed.items(), strict=True):
        assert len(group.tokens.inputs_SC) == len(batches[-1].input_ids_N)
        assert int((group.tokens.weights_S == 11).sum()) == batches[-1].num_rows
        layer = nano.decoder.layers[number]
        assert all(torch.equal(weight, layer.get_submodule(n).weight) for n, weight in group.weights_OC.items())
        found = search(group, FORMATS["int8"], alphas=None, kept_shares=[1.0], group_size=GROUP_SIZE)
        assert one.choice.alpha == found.alpha
        if name != "o":  # whose heads share
            whole_C = torch.maximum(group.amax_C, group.tokens.inputs_SC.abs().amax(0))
            assert torch.equal(one.amax_C, whole_C)
            assert not torch.equal(group.amax_C, whole_C)
            assert found.alpha is not None
            expected_C = scale_at(found.alpha, replace(group, amax_C=whole_C), FORMATS["int8"])
            torch.testing.assert_close(one.choice.scale_C, expected_C)
