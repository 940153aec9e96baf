"""The smoothing scale and the clipping of one fold group, found by the error of its outputs. Pure: no model, no ranks.

A scale for each channel c comes from what the inputs and the weights reach there::

    s_c = a_c^alpha / w_c^(1 - alpha)      SmoothQuant, where inputs are quantized and weights have 8 bits
    s_c = a_c^alpha / mean                 AWQ, where the rounding of weights is what costs

and alpha, with the share of a static input amax that is kept, is the one whose quantized outputs are nearest to the
teacher's on tokens that are held out.

Dimension key: S tokens, C input channels, O outputs, B blocks of an output's weights, K weights of a block.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qad_dist.formats import Format
from qad_dist.quant.fake_quant import fake_quant
from qad_dist.quant.walk import Tokens

MIN_SCALE, MAX_SCALE = 1e-4, 1e4
"""ModelOpt's own limits for the factor that undoes a scale."""
SILENT_AMAX = 2.0**-31
"""A channel that never exceeds this is left alone."""
COARSE = tuple(step / 10 for step in range(11))
"""Alphas that are tried first; then those 0.05 beside the best."""
KEPT_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6)
"""Of a static input amax, with ``quantize.clip: mse``."""
E4M3_MAX = 448.0
UNSCALED_AMAX = 2.0**-24
"""An amax of E4M3 that is not above this counts as 1: ModelOpt's own limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What a group's inputs are divided by, and how much of their amax is kept."""

    alpha: float | None
    """None where nothing is smoothed."""
    scale_C: Tensor
    """float32, positive; ones where nothing is smoothed."""
    kept_share: float = 1.0
    """Of the static input amax."""
    errors: dict[str, float] = field(default_factory=dict)
    """Relative squared error of the outputs for each candidate, by its name; empty where nothing was searched."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """What the search sees of a fold group."""

    weights_OC: Mapping[str, Tensor]
    """float32, by the names of the Linears."""
    amax_C: Tensor
    """float32: largest magnitudes of the input channels; those that must share a scale are equal."""
    weight_amax_C: Tensor
    """float32: largest magnitudes of the weights that read them, likewise."""
    tokens: Tokens
    """Of the search part."""


def scale_at(alpha: float, group: Group, recipe: Format) -> Tensor:
    """``s_C`` of the module's formulas, within ModelOpt's limits and 1 for silent channels.

    Source:
        Xiao et al. 2022, arXiv:2211.10438, equation 4; Lin et al. 2023, arXiv:2306.00978, equation 5, with the largest
        instead of the mean magnitude: it does not depend on which tokens were sampled.
    """
    is_silent_C = group.amax_C <= SILENT_AMAX
    loud_C = group.amax_C.clamp_min(SILENT_AMAX)
    if recipe.weight_bits >= 8 and recipe.input_scales != "none":
        scale_C = loud_C.pow(alpha) / group.weight_amax_C.clamp_min(SILENT_AMAX).pow(1 - alpha)
    else:
        scale_C = loud_C.pow(alpha)
        scale_C = scale_C / scale_C[~is_silent_C].log().mean().exp()
    return torch.where(is_silent_C, 1.0, scale_C).clamp(MIN_SCALE, MAX_SCALE)


def search(
    group: Group,
    recipe: Format,
    *,
    alphas: Sequence[float] | None,
    kept_shares: Iterable[float],
    group_size: int,
) -> Choice:
    """Try alphas and kept shares; the candidate of the smallest error wins, of equals the first.

    Args:
        group: What it is about.
        recipe: The format.
        alphas: To choose from; None stands for 0 to 1 in steps of 0.05, looked at coarsely first.
        kept_shares: Of a static input amax; ``[1.0]`` where inputs are not static.
        group_size: Weights that share a scale, in formats that have groups.
    """
    shares, exact = list(kept_shares), exact_outputs(group)
    candidates: dict[tuple[float, float], float] = {}

    def measure(some: Iterable[float]) -> float:
        for alpha in some:
            scale_C = scale_at(alpha, group, recipe)
            for share in shares:
                if (alpha, share) not in candidates:
                    candidates[alpha, share] = output_error(
                        group, exact, recipe, scale_C=scale_C, kept_share=share, group_size=group_size
                    )
        return min(candidates, key=lambda key: candidates[key])[0]

    best = measure(COARSE if alphas is None else alphas)
    if alphas is None:
        measure(alpha for alpha in (round(best - 0.05, 2), round(best + 0.05, 2)) if 0 <= alpha <= 1)
    alpha, share = min(candidates, key=lambda key: candidates[key])
    errors = {f"alpha={a:g} kept={s:g}": error for (a, s), error in sorted(candidates.items())}
    return Choice(alpha=alpha, scale_C=scale_at(alpha, group, recipe), kept_share=share, errors=errors)


def search_kept_share(
    group: Group, recipe: Format, *, scale_C: Tensor, kept_shares: Sequence[float] = KEPT_SHARES, group_size: int
) -> float:
    """The share of a static input amax at which a given scale costs least; of equals the first wins."""
    exact = exact_outputs(group)
    errors = [
        output_error(group, exact, recipe, scale_C=scale_C, kept_share=share, group_size=group_size)
        for share in kept_shares
    ]
    return kept_shares[errors.index(min(errors))]


@torch.no_grad()
def exact_outputs(group: Group) -> dict[str, Tensor]:
    """``[S, O]`` of each Linear, as the teacher computes them."""
    return {name: group.tokens.inputs_SC @ weight_OC.T for name, weight_OC in group.weights_OC.items()}


@torch.no_grad()
def output_error(
    group: Group,
    exact: Mapping[str, Tensor],
    recipe: Format,
    *,
    scale_C: Tensor,
    kept_share: float,
    group_size: int,
) -> float:
    """Squared error of the group's outputs as a share of their square, tokens weighted, added up over its Linears."""
    smoothed_SC = group.tokens.inputs_SC / scale_C
    quantized_SC = quantize_inputs(smoothed_SC, recipe, amax=(group.amax_C / scale_C).amax() * kept_share)
    total = 0.0
    for name, weight_OC in group.weights_OC.items():
        rounded_OC = quantize_weight(weight_OC * scale_C, recipe, group_size=group_size)
        total += relative_error(quantized_SC @ rounded_OC.T, exact[name], group.tokens.weights_S)
    return total


def relative_error(found_SO: Tensor, exact_SO: Tensor, weights_S: Tensor) -> float:
    """``sum_s w_s |found - exact|^2 / sum_s w_s |exact|^2``, added up in float64."""
    weights_S = weights_S.double()
    off = ((found_SO - exact_SO).square().sum(1).double() * weights_S).sum()
    return float(off / (exact_SO.square().sum(1).double() * weights_S).sum())


def quantize_inputs(inputs_SC: Tensor, recipe: Format, *, amax: Tensor) -> Tensor:
    """As the format's input quantizer does; ``amax`` is that of a static one."""
    if recipe.input_scales == "none":
        return inputs_SC
    if recipe.input_scales == "token":
        amax = inputs_SC.abs().amax(1, keepdim=True)
    return _round(inputs_SC, amax, num_bits=8, is_float=recipe.is_float)


def quantize_weight(weight_OC: Tensor, recipe: Format, *, group_size: int, kept_OB1: Tensor | None = None) -> Tensor:
    """As the format's weight quantizer does; ``kept_OB1`` is the share of each block's amax that is kept."""
    amax_OB1 = weight_amax(weight_OC, recipe, group_size=group_size)
    if kept_OB1 is not None:
        amax_OB1 = amax_OB1 * kept_OB1
    blocks_OBK = weight_OC.unflatten(1, (amax_OB1.shape[1], -1))
    return _round(blocks_OBK, amax_OB1, num_bits=recipe.weight_bits, is_float=recipe.is_float).flatten(1)


def weight_amax(weight_OC: Tensor, recipe: Format, *, group_size: int) -> Tensor:
    """``amax_OB1`` of each block of weights that share a scale; one block an output, unless the format has groups."""
    num_blocks = weight_OC.shape[1] // group_size if recipe.weight_scales == "group" else 1
    amax_OB1 = weight_OC.abs().unflatten(1, (num_blocks, -1)).amax(2, keepdim=True)
    return amax_OB1.amax().expand_as(amax_OB1) if recipe.weight_scales == "tensor" else amax_OB1


def _round(values: Tensor, amax: Tensor, *, num_bits: int, is_float: bool) -> Tensor:
    if not is_float:
        return fake_quant(values, amax, num_bits=num_bits)
    scale = E4M3_MAX / torch.where(amax <= UNSCALED_AMAX, 1.0, amax)
    codes = (values * scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return codes.to(values.dtype) * (1 / scale)  # a quotient would differ from ModelOpt's in the last bit
