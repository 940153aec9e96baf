"""Weights corrected and rounded in turn: against least squares and a plain GPTQ in float64, and ModelOpt's quantizer.

Dimension key: S tokens, C input channels, O outputs, B blocks of an output's weights, K weights of a block.
"""

import math
from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from qad_dist.formats import FORMATS, FormatName
from qad_dist.quant import correct
from qad_dist.quant.correct import DAMPING, INNER_PART, KEPT_SHARES, clip_blocks, correct_weight
from qad_dist.quant.recipe import modelopt_config
from qad_dist.quant.search import quantize_weight, relative_error

TOKENS, CHANNELS, OUTPUTS, GROUP_SIZE = 300, 64, 12, 16
W4 = FORMATS["int4_weight_only"]
EVEN = torch.ones(TOKENS)

Matrix = npt.NDArray[Any]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def weight_OC() -> Tensor:
    return random(OUTPUTS, CHANNELS, seed=0)


@pytest.fixture(scope="module")
def exact_SC() -> Tensor:
    """Strongly correlated inputs of unequal size."""
    return random(TOKENS, CHANNELS // 4, seed=1) @ random(CHANNELS // 4, CHANNELS, seed=2) + random(
        TOKENS, CHANNELS, seed=3
    )


@pytest.fixture(scope="module")
def moved_SC(exact_SC: Tensor) -> Tensor:
    """What a student reads instead: a little of everything is off, and some of it always the same way."""
    return exact_SC * 0.9 + 0.3 * random(TOKENS, CHANNELS, seed=4) + 0.1


def corrected_by_hand(weight_OC: Tensor, exact_SC: Tensor, moved_SC: Tensor, weights_S: Tensor) -> Matrix:
    """Least squares with an anchor on the teacher's weights, as one system for ``lstsq``: no Hessian."""
    root_S1 = np.sqrt(weights_S.double().numpy())[:, None]
    exact, moved = exact_SC.double().numpy() * root_S1, moved_SC.double().numpy() * root_S1
    anchor = math.sqrt(DAMPING * (moved**2).sum(0).mean()) * np.eye(CHANNELS)
    weight = weight_OC.double().numpy()
    right = np.concatenate([exact @ weight.T, anchor @ weight.T])
    return np.linalg.lstsq(np.concatenate([moved, anchor]), right, rcond=None)[0].T


def gptq_by_hand(weight: Matrix, hessian: Matrix, amax_OB1: Tensor, *, highest: int) -> Matrix:
    """Column by column, the inverse Hessian of what is left computed anew each time (Frantar et al., equation 2)."""
    left, rounded = weight.copy(), np.empty_like(weight)
    steps_OC = np.repeat(amax_OB1.squeeze(2).double().numpy(), GROUP_SIZE, axis=1) / highest
    for column in range(weight.shape[1]):
        rounded[:, column] = np.clip(np.round(left[:, column] / steps_OC[:, column]), -highest - 1, highest)
        rounded[:, column] *= steps_OC[:, column]
        inverse = np.linalg.inv(hessian[column:, column:])
        error = (left[:, column] - rounded[:, column]) / inverse[0, 0]
        left[:, column:] -= error[:, None] * inverse[0]
    return rounded


def hessian_of(moved_SC: Tensor, weights_S: Tensor) -> Matrix:
    rooted = moved_SC.double().numpy() * np.sqrt(weights_S.double().numpy())[:, None]
    hessian = rooted.T @ rooted
    return hessian + DAMPING * np.diag(hessian).mean() * np.eye(CHANNELS)


def quantizer_with(weight_OC: Tensor, amax_OB1: Tensor, name: FormatName) -> Any:
    """ModelOpt's own, of a Linear with these weights."""
    holder = nn.Module()
    holder.q_proj = nn.Linear(weight_OC.shape[1], weight_OC.shape[0], bias=False)
    holder.q_proj.weight.data = weight_OC.clone()
    mtq.quantize(holder, modelopt_config(FORMATS[name], group_size=GROUP_SIZE))
    holder.q_proj.weight_quantizer.amax = amax_OB1.flatten()[:, None]
    return holder.q_proj.weight_quantizer


def amax_of(weight_OC: Tensor) -> Tensor:
    return weight_OC.view(OUTPUTS, -1, GROUP_SIZE).abs().amax(2, keepdim=True)


@pytest.mark.parametrize("name", ["int4_weight_only", "w3a8"])
def test_weights_whose_errors_do_not_mix_are_rounded_to_nearest(weight_OC: Tensor, name: FormatName) -> None:
    """Exact inputs of one channel each: nothing to correct, and no other column to take over an error."""
    recipe, inputs_SC = FORMATS[name], torch.eye(CHANNELS).repeat(5, 1)

    found_OC, amax_OB1 = correct_weight(
        weight_OC, inputs_SC, inputs_SC, torch.ones(5 * CHANNELS), recipe, group_size=GROUP_SIZE
    )

    whole_OB1 = weight_OC.view(OUTPUTS, -1, GROUP_SIZE).abs().amax(2, keepdim=True)
    expected_OC = quantize_weight(weight_OC, recipe, group_size=GROUP_SIZE, kept_OB1=amax_OB1 / whole_OB1)
    rounded_OC = quantize_weight(found_OC, recipe, group_size=GROUP_SIZE, kept_OB1=amax_OB1 / amax_of(found_OC))
    torch.testing.assert_close(rounded_OC, expected_OC, rtol=1e-5, atol=1e-5)


def test_correction_is_the_least_squares_solution_and_the_rounding_gptqs(
    weight_OC: Tensor, exact_SC: Tensor, moved_SC: Tensor
) -> None:
    """All but a few of 768 integers are equal: a value all but halfway between two goes either way in float32."""
    weights_S = torch.where(torch.arange(TOKENS) % 4 == 0, 11.0, 1.0)

    stored_OC, amax_OB1 = correct_weight(weight_OC, exact_SC, moved_SC, weights_S, W4, group_size=GROUP_SIZE)

    found_OC = quantizer_with(stored_OC, amax_OB1, "w4a8")(stored_OC).detach()
    corrected = corrected_by_hand(weight_OC, exact_SC, moved_SC, weights_S)
    expected = gptq_by_hand(corrected, hessian_of(moved_SC, weights_S), amax_OB1, highest=7)
    steps_OC = amax_OB1.expand(-1, -1, GROUP_SIZE).flatten(1) / 7
    differences_OC = ((found_OC - torch.from_numpy(expected)) / steps_OC).round()
    assert int((differences_OC != 0).sum()) <= 3
    plain_OC = quantize_weight(torch.from_numpy(corrected).float(), W4, group_size=GROUP_SIZE)
    assert int(((found_OC - plain_OC) / steps_OC).round().ne(0).sum()) > 100  # rounding to nearest is something else


def test_amax_is_the_clipped_largest_of_the_corrected_weights(
    weight_OC: Tensor, exact_SC: Tensor, moved_SC: Tensor
) -> None:
    _, amax_OB1 = correct_weight(weight_OC, exact_SC, moved_SC, EVEN, W4, group_size=GROUP_SIZE)

    corrected = torch.from_numpy(corrected_by_hand(weight_OC, exact_SC, moved_SC, EVEN)).float()
    shares_OB1 = amax_OB1 / corrected.view(OUTPUTS, -1, GROUP_SIZE).abs().amax(2, keepdim=True)
    nearest_OB1 = (shares_OB1 - torch.tensor(KEPT_SHARES)).abs().amin(2)
    assert float(nearest_OB1.max()) < 1e-4
    assert len(shares_OB1.mul(100).round().unique()) > 3


def test_share_of_a_block_is_the_best_of_a_brute_force(weight_OC: Tensor, exact_SC: Tensor) -> None:
    """Error by inputs, not by Hessian: only this block is rounded, and run over the tokens in float64."""
    hessian_CC = exact_SC.T @ exact_SC

    kept_OB1 = clip_blocks(weight_OC, hessian_CC, W4, group_size=GROUP_SIZE)

    inputs, weight = exact_SC.double().numpy(), weight_OC.double().numpy()
    for output in range(OUTPUTS):
        for block in range(CHANNELS // GROUP_SIZE):
            where = slice(block * GROUP_SIZE, (block + 1) * GROUP_SIZE)
            errors = []
            for share in KEPT_SHARES:
                step = np.abs(weight[output, where]).max() * share / 7
                rounded = np.clip(np.round(weight[output, where] / step), -8, 7) * step
                errors.append((((rounded - weight[output, where]) @ inputs[:, where].T) ** 2).sum())
            assert float(kept_OB1[output, block]) == pytest.approx(KEPT_SHARES[int(np.argmin(errors))])


@pytest.mark.parametrize("name", ["int4_weight_only", "w3a8"])
def test_outputs_are_nearer_than_those_of_rounding_to_nearest(
    weight_OC: Tensor, exact_SC: Tensor, moved_SC: Tensor, name: FormatName
) -> None:
    """Also on tokens that the correction has not seen."""
    recipe, seen = FORMATS[name], TOKENS // 2
    exact_SO = exact_SC @ weight_OC.T

    stored_OC, amax_OB1 = correct_weight(
        weight_OC, exact_SC[:seen], moved_SC[:seen], EVEN[:seen], recipe, group_size=GROUP_SIZE
    )
    found_OC = quantizer_with(stored_OC, amax_OB1, name)(stored_OC).detach()

    plain_OC = quantize_weight(weight_OC, recipe, group_size=GROUP_SIZE)
    for part in (slice(0, seen), slice(seen, TOKENS)):
        found, plain = (
            relative_error(moved_SC[part] @ w_OC.T, exact_SO[part], EVEN[part]) for w_OC in (found_OC, plain_OC)
        )
        assert found < 0.8 * plain


@pytest.mark.parametrize("columns", [1, 7, 16, 64])
def test_result_does_not_depend_on_how_many_columns_pass_their_errors_at_once(
    weight_OC: Tensor, exact_SC: Tensor, moved_SC: Tensor, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    expected_OC, expected_OB1 = correct_weight(weight_OC, exact_SC, moved_SC, EVEN, W4, group_size=GROUP_SIZE)
    monkeypatch.setattr(correct, "COLUMNS_AT_ONCE", columns)

    found_OC, found_OB1 = correct_weight(weight_OC, exact_SC, moved_SC, EVEN, W4, group_size=GROUP_SIZE)

    assert torch.equal(found_OB1, expected_OB1)
    steps_OC = expected_OB1.expand(-1, -1, GROUP_SIZE).flatten(1) / 7
    assert int(((found_OC - expected_OC) / steps_OC).round().ne(0).sum()) <= 3  # at ties, by the order of sums


@pytest.mark.parametrize("name", ["int4_weight_only", "w3a8"])
def test_weights_are_off_the_grid_of_modelopts_quantizer_and_of_the_same_integers_in_bfloat16(
    weight_OC: Tensor, exact_SC: Tensor, moved_SC: Tensor, name: FormatName
) -> None:
    """Training has to bring a weight to the edge of its step: from the middle of all of them it would get nowhere."""
    found_OC, amax_OB1 = correct_weight(weight_OC, exact_SC, moved_SC, EVEN, FORMATS[name], group_size=GROUP_SIZE)
    highest = 2 ** (FORMATS[name].weight_bits - 1) - 1

    again_OC = quantizer_with(found_OC, amax_OB1, name)(found_OC).detach()
    rounded_OC, rounded_OB1 = found_OC.bfloat16(), amax_OB1.bfloat16()
    rounded_again_OC = quantizer_with(rounded_OC, rounded_OB1, name)(rounded_OC).detach()

    codes = [
        (values_OC.float().view(OUTPUTS, -1, GROUP_SIZE) / amax.float() * highest).round()
        for values_OC, amax in ((again_OC, amax_OB1), (rounded_again_OC, rounded_OB1))
    ]
    assert torch.equal(codes[0], codes[1])
    assert (codes[0].min(), codes[0].max()) == (-highest - 1, highest)
    off_steps = ((found_OC - again_OC).view(OUTPUTS, -1, GROUP_SIZE) / amax_OB1 * highest).abs()
    assert float(off_steps.max()) <= INNER_PART + 1e-4
    assert 0.15 < float(off_steps.median()) < 0.35  # spread evenly over the inner part, whose middle is 0.225
