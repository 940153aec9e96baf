"""Fake quantization without a host sync, behind ModelOpt's own hook for it; modules and state stay ModelOpt's.

ModelOpt fake-quantizes integers by a CUDA extension that it builds when first used and, on a CPU or where it cannot be
built, without a word by a function that asks the device for a value three times: in one decoder layer 42 waits and
over 30 graph breaks. The same formula without these questions gives the same bits, and a layer compiles to one graph:

    layer.compile(fullgraph=True)  # of each; layers of equal shape share one graph

On CUDA, Inductor divides approximately unless ``torch._inductor.config.eager_numerics.division_rounding`` is True. By
default, then, the bits are no longer ModelOpt's, and a value halfway between two integers may go to the other one.

ModelOpt writes the name of a quantizer's backend into ``modelopt_state.pth``, and elsewhere nobody has registered it: a
model is saved inside :func:`without_backend`.
"""

import logging
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from modelopt.torch.quantization.extensions import get_cuda_ext, get_cuda_ext_fp8
from modelopt.torch.quantization.nn import TensorQuantizer
from modelopt.torch.quantization.nn.modules.tensor_quantizer import (
    StaticBlockScaleQuantizer,
    is_registered_quant_backend,
    register_quant_backend,
)
from torch import Tensor, nn

from qad_dist.quant.state import enabled_quantizers
from qad_dist.runtime.logs import prints_as_debug

log = logging.getLogger(__name__)

BACKEND = "qad_dist"
"""Name under which ModelOpt finds :func:`entrypoint`."""
SILENT_AMAX = 2.0**-24
"""Where amax is not above this, all values become 0: ModelOpt's own limit."""


@dataclass(frozen=True, slots=True)
class FakeQuantPaths:
    """Which code the enabled quantizers of a model run."""

    num_qad: int
    """Quantizers that run :func:`entrypoint`."""
    num_modelopt: int
    """Quantizers that run ModelOpt's own code."""


def fake_quant(
    values: Tensor, amax: Tensor, *, num_bits: int, narrow_range: bool = False, pass_through: bool = True
) -> Tensor:
    """Values rounded to signed integers of ``num_bits`` and back, equal to ModelOpt's to the last bit.

    Never waits for the device: unlike ModelOpt's, it cannot refuse a negative amax (``check_quantizers`` does).

    Args:
        values: Any float dtype and shape; computed in float32.
        amax: What the largest integer stands for, of a shape that broadcasts to that of ``values``: a scalar, one value
            for each row, block or token. Gets no gradient. Where it is not above 2**-24, values become 0.
        num_bits: Width of the integers, sign included, at least 2.
        narrow_range: Leave out the lowest integer, so that the range is symmetric.
        pass_through: The gradient of the result is that of ``values``, and nothing is saved for it. Otherwise it is 0
            where ``|values| > amax``, which keeps ``values`` until backward.

    Returns:
        Shape and dtype of ``values``.
    """
    return _FakeQuant.apply(values, amax, num_bits, narrow_range, pass_through)


class _FakeQuant(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, amax: Tensor, num_bits: int, narrow_range: bool, pass_through: bool
    ) -> Tensor:
        if not pass_through:
            ctx.save_for_backward(values, amax)
        return round_to_grid(values, amax.float(), num_bits=num_bits, narrow_range=narrow_range)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = gradients
        if ctx.saved_tensors:
            values, amax = ctx.saved_tensors
            gradient = torch.where(values.abs() <= amax, gradient, 0.0)
        return gradient, None, None, None, None


def round_to_grid(values: Tensor, amax: Tensor, *, num_bits: int, narrow_range: bool) -> Tensor:
    """As :func:`fake_quant`, without a gradient; ``amax`` in float32."""
    scale, factor = grid_of(amax, num_bits=num_bits)
    return round_by(values, scale, factor, num_bits=num_bits, narrow_range=narrow_range)


def grid_of(amax: Tensor, *, num_bits: int) -> tuple[Tensor, Tensor]:
    """Steps of the grid for each unit, and what values are multiplied by: the same, or 0 where that is of silence."""
    # A tensor above the line: torch computes `number / tensor` as number * (1 / tensor), which rounds twice. Filled on
    # its device, since a tensor made of a number would be copied there.
    scale = torch.full_like(amax, _highest(num_bits)) / amax
    return scale, torch.where(amax <= SILENT_AMAX, 0.0, scale)


def round_by(values: Tensor, scale: Tensor, factor: Tensor, *, num_bits: int, narrow_range: bool = False) -> Tensor:
    """Values rounded to the grid of :func:`grid_of`."""
    highest = _highest(num_bits)
    lowest = -highest if narrow_range else -highest - 1
    steps = values.float() * factor
    return steps.round_().clamp_(lowest, highest).div_(scale).to(values.dtype)  # a silent row: 0 / inf or 0 / large


def _highest(num_bits: int) -> float:
    return 2.0 ** (num_bits - 1) - 1


def entrypoint(inputs: Tensor, quantizer: TensorQuantizer) -> Tensor:
    """ModelOpt's hook: what a quantizer does to its inputs, behind smoothing and reshaping to blocks.

    The amax is the calibrated one or, of a dynamic quantizer, that of these inputs over the axes that it does not keep:
    ``{"num_bits": 8, "type": "dynamic", "axis": (-3, -2)}`` quantizes ``[B, T, C]`` per token.

    Args:
        inputs: Any float dtype.
        quantizer: Of integers, signed; see :func:`use_fast_fake_quant`.
    """
    return fake_quant(
        inputs,
        quantizer._get_amax(inputs),
        num_bits=quantizer.num_bits,
        narrow_range=quantizer.narrow_range,
        pass_through=quantizer._pass_through_bwd,
    )


def use_fast_fake_quant(model: nn.Module) -> FakeQuantPaths:
    """Let every enabled quantizer of signed integers run :func:`entrypoint`; say in the log which path is live.

    What else is enabled (floating-point formats, unsigned integers, packed weights, biases, learned scales) stays with
    ModelOpt's code, and a warning says how many of each, and whether ModelOpt's CUDA extension is there for them.
    """
    if not is_registered_quant_backend(BACKEND):
        register_quant_backend(BACKEND, entrypoint)
    left: dict[str, TensorQuantizer] = {}
    reasons: Counter[str] = Counter()
    num_qad = 0
    for name, quantizer in enabled_quantizers(model):
        reason = _reason_for_modelopt(quantizer)
        if reason is None:
            quantizer.backend = BACKEND
            num_qad += 1
        else:
            left[name] = quantizer
            reasons[reason] += 1
    path = "qad" if not left else "qad+modelopt" if num_qad else "modelopt"
    log.info("event=fake_quant path=%s quantizers=%d modelopt=%d", path, num_qad + len(left), len(left))
    if left:
        log.warning(
            'event=fake_quant_by_modelopt quantizers=%d first=%s why="%s" cuda_extension=%s',
            len(left),
            next(iter(left)),
            ", ".join(f"{reason}: {number}" for reason, number in sorted(reasons.items())),
            "yes" if _has_cuda_extension(left.values()) else "no",
        )
    return FakeQuantPaths(num_qad=num_qad, num_modelopt=len(left))


def use_modelopt_fake_quant(model: nn.Module) -> int:
    """Take :func:`use_fast_fake_quant` back; returns the number of quantizers that it had changed."""
    changed = _with_our_backend(model)
    for quantizer in changed:
        quantizer.backend = None
    return len(changed)


@contextmanager
def without_backend(model: nn.Module) -> Generator[None]:
    """Inside, the quantizers are plain ModelOpt ones: for saving, since the state file keeps the name of a backend.

    Whoever loads a state with the name of a backend that is not registered gets a ``KeyError`` from the first forward.
    """
    changed = _with_our_backend(model)
    for quantizer in changed:
        quantizer.backend = None
    try:
        yield
    finally:
        for quantizer in changed:
            quantizer.backend = BACKEND


def _with_our_backend(model: nn.Module) -> list[TensorQuantizer]:
    """Disabled ones too: they may have been enabled before."""
    quantizers = (module for module in model.modules() if isinstance(module, TensorQuantizer))
    return [quantizer for quantizer in quantizers if quantizer.backend == BACKEND]


def _reason_for_modelopt(quantizer: TensorQuantizer) -> str | None:
    """Why :func:`entrypoint` is not for this quantizer, None if it is."""
    # ModelOpt makes the latter of a quantizer of blocks once it is calibrated. Other subclasses compute otherwise.
    if type(quantizer) not in (TensorQuantizer, StaticBlockScaleQuantizer):
        return type(quantizer).__name__
    if getattr(quantizer, "_lsq", False):
        return "learned scales"
    if quantizer.backend not in (None, BACKEND):
        return f"backend {quantizer.backend}"
    if not isinstance(quantizer.num_bits, int):
        return f"num_bits {quantizer.num_bits}"
    if quantizer.unsigned:
        return "unsigned"
    if not quantizer.fake_quant:
        return "packed weights"
    if quantizer.bias is not None:
        return "bias"
    if (quantizer.block_sizes or {}).get("type") == "dynamic":
        return "dynamic blocks"
    return None


def _has_cuda_extension(quantizers: Any) -> bool:
    """Builds it where that is possible, as the first forward would."""
    if not torch.cuda.is_available():
        return False
    loaders = {get_cuda_ext_fp8 if quantizer.is_fp8 else get_cuda_ext for quantizer in quantizers}
    with prints_as_debug(log):
        return all(loader() is not None for loader in loaders)
