"""What a fake-quantized Linear promises its integers will compute."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

PER_TOKEN = {"num_bits": 8, "type": "dynamic", "axis": (-3, -2)}
"""Read right by ModelOpt for inputs of 2 and 3 dimensions; of block sizes, axes fit only those of the first input."""
HALF_ULP = 2.0**-24
"""Relative rounding error of one float32 operation."""


def promised(linear: Any, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The fake-quantized Linear with its products summed in float64, and the sum of their magnitudes."""
    values_NI, values_OI = linear.input_quantizer(inputs).double(), linear.weight_quantizer(linear.weight).double()
    magnitudes = values_NI.abs() @ values_OI.abs().T
    return F.linear(values_NI, values_OI, None if linear.bias is None else linear.bias.double()), magnitudes


def assert_as_promised(found: Tensor, linear: Any, inputs: Tensor) -> None:
    """Within float32's rounding.

    ModelOpt's values have 2 roundings each (127 / amax, and the code divided by it), the scales here 1 each; their
    product, the sum's way to float32 and its product with the scale are 3 more, and the bias is 1. One is to spare for
    terms of higher order.
    """
    expected, magnitudes = promised(linear, inputs)
    bound = 10 * HALF_ULP * magnitudes + HALF_ULP * expected.abs()
    assert bool(((found.double() - expected).abs() <= bound).all())
