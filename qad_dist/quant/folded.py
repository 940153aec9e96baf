"""Students folded for decoding: weights rounded once, inputs by a few operations on tensors.

ModelOpt's Linear asks some twenty questions of its quantizers at every token, which costs as much as the product itself
where a step has few rows, and no CUDA graph may hold them. What stands here computes the same to the last bit.

Dimension key: I input channels, O output channels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qad_dist.quant.fake_quant import grid_of, round_by, round_to_grid
from qad_dist.quant.replace import replace_linears
from qad_dist.quant.scales import ScaledModule, is_one_scale, is_per_token
from qad_dist.quant.state import fold_weights

_BITS = 8
"""Of inputs, in all formats of integers."""


class FoldedLinear(ScaledModule):
    """A Linear whose weight is on its grid, and whose inputs are rounded to signed integers of 8 bits and back.

    Not an ``nn.Linear``, so that nobody quantizes it again. Its scales stay float32 when a model is cast.
    """

    scale_names = ("scale", "factor")

    scale: Tensor | None
    """float32 scalar: what rounded inputs are divided by; None: each token has its own."""
    factor: Tensor | None
    """float32 scalar: what inputs are multiplied by, ``scale`` or, where that is of silence, 0."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, amax: Tensor | None) -> None:
        """Take the weight as it is.

        Args:
            weight_OI: Rounded already; shared, not copied.
            bias_O: Added as it is.
            amax: Of the inputs; None gives each token its own.
        """
        super().__init__()
        self.out_features, self.in_features = weight_OI.shape
        self.weight = nn.Parameter(weight_OI, requires_grad=False)
        self.bias = None if bias_O is None else nn.Parameter(bias_O, requires_grad=False)
        scale = factor = None
        if amax is not None:
            scale, factor = grid_of(amax.detach().float().view(()), num_bits=_BITS)
        self.register_buffer("scale", scale)
        self.register_buffer("factor", factor)

    @torch.no_grad()
    def forward(self, inputs: Tensor) -> Tensor:
        """Round ``[..., I]`` and multiply; returns ``[..., O]``. Asks the device for nothing."""
        if self.scale is None or self.factor is None:
            amax = inputs.abs().amax(-1, keepdim=True).float()
            rounded = round_to_grid(inputs, amax, num_bits=_BITS, narrow_range=False)
        else:
            rounded = round_by(inputs, self.scale, self.factor, num_bits=_BITS)
        return F.linear(rounded, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Its sizes, as ``nn.Linear`` shows them."""
        scale = "token" if self.scale is None else "tensor"
        return f"in_features={self.in_features}, out_features={self.out_features}, input_scale={scale}"


def fold_for_decoding(model: nn.Module) -> int:
    """Fold a student's weights, and replace its Linears by what only decodes; the same outputs, to the last bit.

    Overwrites the weights: only for a copy that is thrown away. Linears whose inputs are quantized otherwise than to
    integers of 8 bits stay ModelOpt's.

    Returns:
        How many were replaced.
    """
    quantized = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and _has_quantizers(module)
    ]
    fold_weights(model)
    names = [name for name in quantized if _is_known(model.get_submodule(name))]
    replace_linears(model, names, lambda _, linear: _folded(linear))
    return len(names)


def _folded(linear: Any) -> nn.Module:
    quantizer = linear.input_quantizer
    if quantizer.is_enabled:
        return FoldedLinear(linear.weight, linear.bias, None if quantizer._dynamic else quantizer._amax)
    plain = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
    plain.weight, plain.bias = linear.weight, linear.bias
    return plain


def _has_quantizers(linear: Any) -> bool:
    return getattr(linear, "input_quantizer", None) is not None


def _is_known(linear: Any) -> bool:
    """Whether all that is left to do is what :class:`FoldedLinear` does."""
    for part in ("weight_quantizer", "output_quantizer"):
        quantizer = getattr(linear, part, None)
        if quantizer is not None and quantizer.is_enabled:
            return False
    quantizer = linear.input_quantizer
    if quantizer.pre_quant_scale is not None:
        return False
    if not quantizer.is_enabled:
        return True
    is_int8 = quantizer.num_bits == _BITS and not (quantizer.unsigned or quantizer.narrow_range)
    is_plain = quantizer.fake_quant and quantizer.bias is None and not quantizer.rotate_is_enabled
    return is_int8 and is_plain and (is_per_token(quantizer) if quantizer._dynamic else is_one_scale(quantizer))
