"""Linears computed with integers: what fake quantization only promises.

The codes are ModelOpt's, bit for bit: ``clamp(round(x * (127 / amax)), -128, 127)`` in float32, with one amax for each
output channel of the weight, and for the input one that was calibrated or each token's own. They are multiplied and
summed in int32, which is exact (below 131,072 input channels), and one multiplication takes the sum back to float:

    y[n, o] = sum_i x_code[n, i] * w_code[o, i] * (input scale * weight scale[o])

Fake quantization computes the same up to rounding: it rounds every value to the model's dtype before it multiplies, and
sums in float. What is made here is for decoding: it has no gradients, and ModelOpt neither knows nor saves it.

Dimension key: N tokens, I input channels, O output channels.
"""

from typing import Any, Self

import torch
import torch.nn.functional as F
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import Tensor, nn

from qad_dist.quant.replace import replace_linears
from qad_dist.quant.scales import ScaledModule, is_per_token
from shards.errors import ModelError

SILENT_AMAX = 2.0**-24
"""ModelOpt's: where amax does not exceed it, all codes are 0."""
MAX_CODE = 127


class Int8Linear(ScaledModule):
    """A Linear with INT8 weights and inputs that are quantized as they come.

    Not an ``nn.Linear``: it has no ``weight``. Its scales stay float32 when a model is cast. With one scale for all
    inputs, NaN does not come through: it has no code.
    """

    scale_names = ("weight_scale_O", "input_scale", "input_factor")

    weight_codes_OI: Tensor
    """int8."""
    weight_scale_O: Tensor
    """float32: what a code is multiplied by."""
    input_scale: Tensor | None
    """float32 scalar, of all inputs; None: each token has its own."""
    input_factor: Tensor | None
    """float32 scalar, what an input is multiplied by: 1 / ``input_scale`` but for the last bit, which decides codes."""
    bias_O: Tensor | None

    def __init__(
        self,
        weight_OI: Tensor,
        weight_amax_O: Tensor,
        *,
        input_amax: Tensor | None = None,
        bias_O: Tensor | None = None,
    ) -> None:
        """Quantize a weight.

        Args:
            weight_OI: Any float dtype.
            weight_amax_O: One for each output channel.
            input_amax: A single value for all inputs; None gives each token its own.
            bias_O: Added in float32.
        """
        super().__init__()
        self.out_features, self.in_features = weight_OI.shape
        weight_amax_O = weight_amax_O.detach().float()
        codes_OI = int8_codes(weight_OI.detach(), code_factor(weight_amax_O)[:, None])
        self.register_buffer("weight_codes_OI", codes_OI)
        self.register_buffer("weight_scale_O", weight_amax_O / MAX_CODE)
        amax = None if input_amax is None else input_amax.detach().float().view(())
        self.register_buffer("input_scale", None if amax is None else amax / MAX_CODE)
        self.register_buffer("input_factor", None if amax is None else code_factor(amax))
        self.register_buffer("bias_O", None if bias_O is None else bias_O.detach().clone())

    @classmethod
    def from_quantized(cls, linear: Any, *, name: str = "the Linear") -> Self:
        """The same Linear with integers.

        Args:
            linear: An ``nn.Linear`` that ModelOpt has quantized and calibrated; left as it is.
            name: What errors call it.

        Raises:
            ModelError: It is not quantized to INT8 with a weight scale per output channel and an input scale per tensor
                or token, or something else is done to its input, weight or output.
        """
        check_int8(linear, name=name)
        quantizer = linear.input_quantizer
        input_amax = None if quantizer._dynamic else quantizer._amax
        return cls(linear.weight, linear.weight_quantizer._amax.flatten(), input_amax=input_amax, bias_O=linear.bias)

    @torch.no_grad()
    def forward(self, inputs: Tensor) -> Tensor:
        """Multiply ``[..., I]``; returns ``[..., O]`` in the input's dtype. Asks the device for nothing."""
        codes_NI, input_scale = self.quantize_input(inputs.reshape(-1, self.in_features))
        sums_NO = int8_product(codes_NI, self.weight_codes_OI, is_padded=codes_NI.is_cuda).float()
        if self.input_scale is None:
            outputs_NO = sums_NO.mul_(input_scale).mul_(self.weight_scale_O)
        else:
            outputs_NO = sums_NO.mul_(self.weight_scale_O * input_scale)
        if self.bias_O is not None:
            outputs_NO += self.bias_O
        return outputs_NO.to(inputs.dtype).reshape(*inputs.shape[:-1], self.out_features)

    def quantize_input(self, inputs_NI: Tensor) -> tuple[Tensor, Tensor]:
        """Codes ``[N, I]``, and their scale in float32: a scalar, or ``[N, 1]`` if each token has its own."""
        if self.input_scale is not None and self.input_factor is not None:
            return int8_codes(inputs_NI, self.input_factor), self.input_scale
        amax_N1 = inputs_NI.abs().amax(-1, keepdim=True).float()
        return int8_codes(inputs_NI, code_factor(amax_N1)), amax_N1 / MAX_CODE

    def extra_repr(self) -> str:
        """Its sizes, as ``nn.Linear`` shows them."""
        scale = "token" if self.input_scale is None else "tensor"
        has_bias = self.bias_O is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={has_bias}, input_scale={scale}"


def use_int8(model: nn.Module) -> int:
    """Replace every Linear below ``model`` whose weight is quantized by an :class:`Int8Linear`, in place.

    Linears whose quantizers are off stay as they are, those whose weights were folded among them. The float weights
    are given up one by one: what the model needs at most is what it needed, and one Linear.

    Returns:
        How many were replaced.

    Raises:
        ModelError: One is quantized to something else, from :meth:`Int8Linear.from_quantized`; nothing was replaced.
    """
    found = [name for name, module in model.named_modules() if name and _has_quantized_weight(module)]
    for name in found:
        check_int8(model.get_submodule(name), name=name)
    replace_linears(model, found, lambda name, linear: Int8Linear.from_quantized(linear, name=name))
    return len(found)


def check_int8(linear: Any, *, name: str) -> None:
    """Check that a Linear is one that :class:`Int8Linear` can compute.

    Raises:
        ModelError: It is not; says what is wrong.
    """
    for part in ("weight_quantizer", "input_quantizer"):
        quantizer = getattr(linear, part, None)
        where = f"{name}.{part}"
        if not isinstance(quantizer, TensorQuantizer) or not quantizer.is_enabled:
            found = "none" if quantizer is None else type(quantizer).__name__
            found = f"{found}, disabled" if isinstance(quantizer, TensorQuantizer) else found
            raise ModelError(f"{where} must be one enabled quantizer, got {found}; quantize weights and inputs to int8")
        _check_integers(quantizer, where)
        is_weight = part == "weight_quantizer"
        if is_weight or not quantizer._dynamic:
            _check_static(quantizer, where, num_channels=linear.weight.shape[0] if is_weight else None)
        elif not is_per_token(quantizer):
            axes = f"axis {quantizer.axis}, block_sizes {quantizer.block_sizes}"
            raise ModelError(f"{where} must have one dynamic scale per token, got {axes}; use axis (-3, -2)")
    output = getattr(linear, "output_quantizer", None)
    if output is not None and output.is_enabled:
        raise ModelError(f"{name}.output_quantizer must be off, got an enabled one; quantize weights and inputs alone")


def _has_quantized_weight(module: nn.Module) -> bool:
    quantizer = getattr(module, "weight_quantizer", None)
    return isinstance(module, nn.Linear) and quantizer is not None and bool(quantizer.is_enabled)


def _check_integers(quantizer: Any, where: str) -> None:
    rules = (
        ("num_bits 8", quantizer.num_bits == 8, quantizer.num_bits),
        ("signed codes", not quantizer.unsigned, "unsigned ones"),
        ("codes from -128", not quantizer.narrow_range, "narrow_range"),
        ("its pre_quant_scale folded away", quantizer.pre_quant_scale is None, "one"),
        ("no rotation", not quantizer.rotate_is_enabled, "one"),
        ("no offset", quantizer.bias is None, "one"),
        ("fake quantization", quantizer.fake_quant, "packed weights"),
    )
    for rule, is_kept, found in rules:
        if not is_kept:
            raise ModelError(f"{where} must have {rule}, got {found}; only such int8 is computed with integers")


def _check_static(quantizer: Any, where: str, *, num_channels: int | None) -> None:
    """Check a calibrated quantizer: one scale for each of so many channels, or (None) a single one."""
    axes = (0, (0,)) if num_channels else (None,)
    if quantizer._dynamic or quantizer.block_sizes is not None or quantizer.axis not in axes:
        rule = "one static scale per output channel (axis 0)" if num_channels else "one static scale, or one per token"
        kind = "dynamic" if quantizer._dynamic else "static"
        found = f"{kind}, axis {quantizer.axis}, block_sizes {quantizer.block_sizes}"
        raise ModelError(f"{where} must have {rule}, got {found}; quantize with another recipe")
    amax, expected = getattr(quantizer, "_amax", None), num_channels or 1
    if amax is None or amax.numel() != expected or not bool(torch.isfinite(amax).all()) or bool((amax < 0).any()):
        found = "none" if amax is None else f"{amax.numel()} from {float(amax.min())} to {float(amax.max())}"
        raise ModelError(f"{where} must have {expected} finite amax, got {found}; calibrate with more utterances")


def code_factor(amax: Tensor) -> Tensor:
    """What values are multiplied by to get their codes: 127 / amax in float32, or 0 where that is silence."""
    # A tensor: torch divides a Python number by multiplying with the reciprocal, which differs in the last bit.
    factor = torch.div(torch.tensor(float(MAX_CODE)), amax)
    return torch.where(amax <= SILENT_AMAX, 0.0, factor)


def int8_codes(values: Tensor, factor: Tensor) -> Tensor:
    """Codes of values of any float dtype, as int8; ``factor`` (float32, from :func:`code_factor`) is broadcast."""
    return (values.float() * factor).round_().clamp_(-MAX_CODE - 1, MAX_CODE).to(torch.int8)


def int8_product(codes_NI: Tensor, weight_codes_OI: Tensor, *, is_padded: bool) -> Tensor:
    """``[N, O]`` in int32, exact: one matrix times the other's transpose.

    A CPU without VNNI takes torch's plain loop, which is exact too, and slower than float32.

    Args:
        codes_NI: int8.
        weight_codes_OI: int8. Read as it lies, transposed: faster than a transposed copy, measured on a CPU with AMX.
        is_padded: Whether zeros fill both up to what CUDA takes: more than 16 rows, and multiples of 8.
    """
    if not is_padded:
        return torch._int_mm(codes_NI, weight_codes_OI.T)
    # The limits of torch._int_mm on CUDA (cuBLASLt). Tests try the padding on the CPU; CUDA itself is tried by none.
    (rows, channels), outputs = codes_NI.shape, len(weight_codes_OI)
    more_rows, more_channels, more_outputs = max(0, 32 - rows), -channels % 8, -outputs % 8
    if more_rows or more_channels:
        codes_NI = F.pad(codes_NI, (0, more_channels, 0, more_rows))
    if more_channels or more_outputs:
        weight_codes_OI = F.pad(weight_codes_OI, (0, more_channels, 0, more_outputs))
    return torch._int_mm(codes_NI, weight_codes_OI.T)[:rows, :outputs]
