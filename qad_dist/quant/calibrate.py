"""Quantize a model: calibrate, smooth and fold in float32, then measure the final scales in the dtype of use."""

import logging
from collections.abc import Callable
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from torch import nn

from qad_dist.quant.fold import fold_smoothing
from qad_dist.quant.recipe import modelopt_config
from qad_dist.quant.state import check_quantizers, enabled_quantizers
from qad_dist.runtime.logs import prints_as_debug
from shards.errors import ModelError

log = logging.getLogger(__name__)

ForwardLoop = Callable[[], None]
"""Runs this rank's share of the calibration set through the model's decoder."""


def quantize_decoder(
    model: Any, layers: nn.ModuleList, forward_loop: ForwardLoop, *, alpha: float, dtype: torch.dtype
) -> None:
    """Insert, calibrate and fold ModelOpt's quantizers, in place.

    Where a process group exists, every rank runs its own share of the data and the ranks' amax are max-reduced, which
    does not depend on their order.

    Args:
        model: The whole float32 model.
        layers: Its decoder layers.
        forward_loop: Called three times: to smooth, after folding, and after the cast.
        alpha: SmoothQuant's migration strength.
        dtype: What the student computes in; the model is cast to it.

    Raises:
        ModelError: A quantizer is missing, misplaced or saw no data.
    """
    with prints_as_debug(log):
        mtq.quantize(model, modelopt_config(alpha=alpha), forward_loop=lambda _: forward_loop())
    _check_all_saw_data(model)
    fold_smoothing(layers, alpha=alpha)
    measure_amax(model, forward_loop)
    if dtype != torch.float32:
        _cast_parameters(model, dtype)
        measure_amax(model, forward_loop)
    num_quantizers = check_quantizers(model, num_layers=len(layers))
    log.info("event=quantized quantizers=%d alpha=%g dtype=%s", num_quantizers, alpha, dtype)


def measure_amax(model: nn.Module, forward_loop: ForwardLoop) -> None:
    """Forget every amax and take the maximum over the calibration data again, weights and activations."""
    for _, quantizer in enabled_quantizers(model):
        quantizer.reset_amax()
    mtq.calibrate(model, algorithm="max", forward_loop=lambda _: forward_loop())


def _cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """As a checkpoint of that dtype loads. ``model.to`` would round the rotary frequencies too, which stay float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _check_all_saw_data(model: nn.Module) -> None:
    """ModelOpt only warns, and leaves such a Linear without a smoothing scale."""
    for name, quantizer in enabled_quantizers(model):
        if getattr(quantizer, "_amax", None) is None:
            raise ModelError(f"{name} must see calibration data, got none; calibrate through the whole decoder")
