"""Weights of few bits, corrected for the error of everything that was rounded before them. Pure: no model, no ranks.

A Linear reads inputs that earlier quantized layers, and the rounding of the inputs themselves, have moved away from the
teacher's. So its weights are first changed to the ones that give the teacher's outputs from these inputs (least
squares), and then rounded column by column; a column's error is taken over by those that are still to come (GPTQ).

What is stored is not the rounded weight but what was rounded, moved into the inner part of its step. The quantizer
makes the same integer of it; but training, whose steps are small, would not bring a weight from the middle of a step to
its edge, and would leave a student of 4 bits as it is.

Dimension key: S tokens, C input channels, O outputs, B blocks of an output's weights, K weights of a block.
"""

import torch
from torch import Tensor

from qad_dist.formats import Format
from qad_dist.quant.fake_quant import fake_quant
from qad_dist.quant.search import quantize_weight, weight_amax

DAMPING = 0.1
"""Share of the mean square of the inputs that is added to each: what a few thousand tokens cannot tell stays as it is.
Measured with 4 bits: from 0.03 to 0.3 the KL stays within its noise."""
KEPT_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)
"""Of a block's largest weight."""
COLUMNS_AT_ONCE = 128
"""Columns whose errors are passed on among themselves first; the result does not depend on it, but for rounding."""
INNER_PART = 0.45
"""Of a step, how far from its middle a stored weight may be: bfloat16, exact to 1/512 of 8 steps, keeps it there."""


@torch.no_grad()
def correct_weight(
    weight_OC: Tensor,
    exact_SC: Tensor,
    quantized_SC: Tensor,
    weights_S: Tensor,
    recipe: Format,
    *,
    group_size: int,
) -> tuple[Tensor, Tensor]:
    """Weights of which the quantizer makes those integers that turn the quantized inputs into the teacher's outputs.

    Args:
        weight_OC: The teacher's, float32, its columns multiplied by the smoothing scale.
        exact_SC: What it read, divided by that scale.
        quantized_SC: What the student reads at the same tokens.
        weights_S: What an error at each token counts.
        recipe: Of integers of few bits.
        group_size: Weights that share a scale.

    Returns:
        ``weight_OC``, off the grid of ``amax_OB1`` by at most :data:`INNER_PART` of a step; and ``amax_OB1``, the
        clipped largest magnitude of each block.

    Source:
        Frantar et al. 2022, arXiv:2210.17323, for the rounding; Zhang et al. 2025, arXiv:2505.11695 (Qronos), for the
        correction before it.
    """
    root_S1 = weights_S.sqrt()[:, None]
    quantized_SC, exact_SC = quantized_SC * root_S1, exact_SC * root_S1
    hessian_CC = quantized_SC.T @ quantized_SC
    damping = DAMPING * hessian_CC.diagonal().mean()
    hessian_CC.diagonal().add_(damping)
    cross_CC = exact_SC.T @ quantized_SC
    cross_CC.diagonal().add_(damping)
    factor_CC = torch.linalg.cholesky(hessian_CC)
    corrected_OC = torch.cholesky_solve((weight_OC @ cross_CC).T, factor_CC).T.contiguous()
    kept_OB1 = clip_blocks(corrected_OC, hessian_CC, recipe, group_size=group_size)
    amax_OB1 = weight_amax(corrected_OC, recipe, group_size=group_size) * kept_OB1
    return _round_in_turn(corrected_OC, amax_OB1, factor_CC, num_bits=recipe.weight_bits), amax_OB1


@torch.no_grad()
def clip_blocks(weight_OC: Tensor, hessian_CC: Tensor, recipe: Format, *, group_size: int) -> Tensor:
    """``kept_OB1``: the share of each block's amax that costs its outputs least, other blocks left exact."""
    num_blocks = weight_amax(weight_OC, recipe, group_size=group_size).shape[1]
    best_OB1 = weight_OC.new_full((len(weight_OC), num_blocks, 1), torch.inf)
    kept_OB1 = torch.ones_like(best_OB1)
    blocks_BKK = torch.stack([part.chunk(num_blocks, 1)[i] for i, part in enumerate(hessian_CC.chunk(num_blocks, 0))])
    for share in KEPT_SHARES:
        shares_OB1 = torch.full_like(kept_OB1, share)
        off_OC = weight_OC - quantize_weight(weight_OC, recipe, group_size=group_size, kept_OB1=shares_OB1)
        off_BOK = off_OC.unflatten(1, (num_blocks, -1)).transpose(0, 1)
        error_OB1 = ((off_BOK @ blocks_BKK) * off_BOK).sum(2).T.unsqueeze(2)
        kept_OB1 = torch.where(error_OB1 < best_OB1, share, kept_OB1)
        best_OB1 = torch.minimum(best_OB1, error_OB1)
    return kept_OB1


def _round_in_turn(weight_OC: Tensor, amax_OB1: Tensor, factor_CC: Tensor, *, num_bits: int) -> Tensor:
    """GPTQ, with the columns in their order and the scales fixed before; gives what it rounded, not what came out."""
    upper_CC = torch.linalg.cholesky(torch.cholesky_inverse(factor_CC), upper=True)
    left_OC, stored_OC = weight_OC.clone(), torch.empty_like(weight_OC)
    columns = weight_OC.shape[1]
    amax_OC = amax_OB1.expand(-1, -1, columns // amax_OB1.shape[1]).flatten(1)
    inner_OC = INNER_PART * amax_OC / (2 ** (num_bits - 1) - 1)
    for start in range(0, columns, COLUMNS_AT_ONCE):
        end = min(start + COLUMNS_AT_ONCE, columns)
        errors_OK = torch.empty_like(left_OC[:, start:end])
        for column in range(start, end):
            exact_O1 = left_OC[:, column : column + 1].clone()
            rounded_O1 = fake_quant(exact_O1, amax_OC[:, column : column + 1], num_bits=num_bits)
            error_O1 = (exact_O1 - rounded_O1) / upper_CC[column, column]
            left_OC[:, column:end] -= error_O1 * upper_CC[column, column:end]
            errors_OK[:, column - start : column - start + 1] = error_O1
            inner_O1 = inner_OC[:, column : column + 1]
            stored_OC[:, column : column + 1] = exact_O1.clamp(rounded_O1 - inner_O1, rounded_O1 + inner_O1)
        left_OC[:, end:] -= errors_OK @ upper_CC[start:end, end:]
    return stored_OC
