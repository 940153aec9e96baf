"""Single quantizers of ModelOpt, and values for them."""

from typing import Any

import torch
from modelopt.torch.quantization.config import QuantizerAttributeConfig
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import Tensor


def random_values(shape: tuple[int, ...], dtype: torch.dtype, *, seed: int = 0) -> Tensor:
    """Many scales, and among them both zeros and values far beyond the rest."""
    random = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=random) * torch.randn(shape, generator=random).exp()
    values.view(-1)[:4] = torch.tensor([0.0, -0.0, 300.0, -300.0])
    return values.to(dtype)


def new_quantizer(config: dict[str, Any]) -> TensorQuantizer:
    return TensorQuantizer(QuantizerAttributeConfig(**config))


def calibrated(config: dict[str, Any], values: Tensor) -> TensorQuantizer:
    """As ModelOpt's ``max`` calibration leaves it, on values of which some will lie outside the range."""
    quantizer = new_quantizer(config)
    if config.get("type") != "dynamic":
        quantizer.disable_quant()
        quantizer.enable_calib()
        quantizer(values.clamp(-1.5, 1.5))
        quantizer.load_calib_amax()
        quantizer.disable_calib()
        quantizer.enable_quant()
    return quantizer
