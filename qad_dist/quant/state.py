"""The quantizers of a model: counted, checked, hashed; and ModelOpt's checkpointing switched on."""

import hashlib
import logging
from collections.abc import Iterator
from typing import Any

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import nn

from qad_dist.linears import LINEARS
from qad_dist.runtime.logs import prints_as_debug
from shards.errors import ModelError

log = logging.getLogger(__name__)


def enable_checkpointing() -> None:
    """Make ``save_pretrained`` and ``from_pretrained`` of every model class write and read ModelOpt's state.

    Global and for the rest of the process: any folder with ``modelopt_state.pth`` then loads quantized. Load the
    teacher with ``load_model(..., quantized=False)``, which refuses such a folder.
    """
    with prints_as_debug(log):
        mto.enable_huggingface_checkpointing()


def enabled_quantizers(model: nn.Module) -> Iterator[tuple[str, TensorQuantizer]]:
    """Names and quantizers that change what the model computes."""
    for name, module in model.named_modules():
        if isinstance(module, TensorQuantizer) and module.is_enabled:
            yield name, module


def check_quantizers(model: nn.Module, *, num_layers: int) -> int:
    """Check that exactly the decoder's Linears are quantized, each weight and input, and calibrated.

    Args:
        model: The whole model, or any part that contains the decoder's layers.
        num_layers: Decoder layers.

    Returns:
        Number of enabled quantizers: 2 x 7 x ``num_layers``.

    Raises:
        ModelError: A count is off, a quantizer sits elsewhere, or an amax is missing, not finite or not positive; the
            usual cause is a folder that was loaded without its ``modelopt_state.pth``.
    """
    found = dict(enabled_quantizers(model))
    expected = 2 * len(LINEARS) * num_layers
    if len(found) != expected:
        raise ModelError(
            f"the student must have {expected} enabled quantizers (2 for each decoder Linear), got {len(found)}; "
            "load a local folder that holds modelopt_state.pth, or run quantize again"
        )
    for name, quantizer in found.items():
        linear = ".".join(name.split(".")[-3:-1])
        if linear not in LINEARS or "audio_tower" in name:
            raise ModelError(f"only the decoder's Linears may be quantized, got {name}; run quantize again")
        amax = getattr(quantizer, "_amax", None)
        if amax is None or not bool(torch.isfinite(amax).all()) or not bool((amax > 0).all()):
            value = "none" if amax is None else f"{float(amax.min())} to {float(amax.max())}"
            raise ModelError(f"{name} must have a finite, positive amax, got {value}; calibrate with more utterances")
        if getattr(quantizer, "pre_quant_scale", None) is not None:
            raise ModelError(f"{name} must have its pre_quant_scale folded away, got one; run quantize again")
    return len(found)


def quantizer_hash(model: nn.Module) -> str:
    """Hex sha256 over all buffers of the enabled quantizers (names, dtypes, values): equal on all ranks."""
    digest = hashlib.sha256()
    for name, quantizer in enabled_quantizers(model):
        for buffer_name, buffer in sorted(quantizer.named_buffers()):
            digest.update(f"{name}.{buffer_name} {buffer.dtype} {tuple(buffer.shape)}".encode())
            digest.update(buffer.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def fold_weights(model: nn.Module) -> None:
    """Replace each weight by its fake-quantized value, in place, for decoding without quantizing it at every token.

    Overwrites the weights: only for a copy that is thrown away.
    """
    mtq.fold_weight(model)


def int8_bytes(model: Any) -> int:
    """Bytes of the model's weights as they are served: INT8 with one float32 scale per output channel, the rest bf16.

    Computed, not written: a ModelOpt folder keeps all values in the dtype of the model. The rest is frozen: it
    is the base model's, in bf16, whatever the run computes in.
    """
    quantized = {name.removesuffix(".weight_quantizer") for name, _ in enabled_quantizers(model)}
    total = 0
    for name, parameter in model.named_parameters():  # a tied weight comes once
        owner = name.removesuffix(".weight")
        if owner in quantized and name.endswith(".weight"):
            total += parameter.numel() + 4 * parameter.shape[0]
        else:
            total += parameter.numel() * 2
    return total
