"""The quantizers of a model: counted, checked, hashed; and ModelOpt's checkpointing switched on."""

import fnmatch
import hashlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import Tensor, nn

from qad_dist.formats import FORMATS, FormatName
from qad_dist.linears import LINEARS
from qad_dist.quant.recipe import E4M3
from qad_dist.runtime.logs import prints_as_debug
from shards.errors import ConfigError, ModelError
from shards.storage import read_json

log = logging.getLogger(__name__)

QUANTIZATION = "quantization.json"
"""Beside the weights of a student: what was quantized, and how."""
FUSED = (LINEARS[:3], LINEARS[4:6])
"""Linears that servers run as one matrix, which is quantized or not as a whole."""


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


def switch_quantizers(model: nn.Module, *, on: bool) -> None:
    """Let the enabled quantizers quantize, or pass on what comes; which ones are enabled stays."""
    for _, quantizer in enabled_quantizers(model):
        if on:
            quantizer.enable_quant()
        else:
            quantizer.disable_quant()


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """What was done to a student: :data:`QUANTIZATION` beside its weights."""

    format: FormatName
    num_layers: int
    kept: tuple[str, ...] = ()
    """Linears that are as they were, by their names below the decoder: ``layers.3.mlp.down_proj``."""

    @property
    def num_quantizers(self) -> int:
        """One for the weight of each quantized Linear, and one for its input if the format quantizes inputs."""
        each = 1 if FORMATS[self.format].input_scales == "none" else 2
        return each * (len(LINEARS) * self.num_layers - len(self.kept))

    def as_json(self) -> dict[str, Any]:
        """As it is stored."""
        return {**asdict(self), "kept": list(self.kept)}


def read_quantization(folder: Path) -> Quantization:
    """What :data:`QUANTIZATION` in a student's folder says.

    Raises:
        ModelError: It is missing or says something else.
    """
    path = folder / QUANTIZATION
    if not path.is_file():
        raise ModelError(f"{path} must say how the student was quantized, got no such file; run quantize again")
    try:
        stored = read_json(path)
        if stored["format"] not in FORMATS:
            raise ValueError(f"format {stored['format']!r}")
        return Quantization(
            format=stored["format"], num_layers=int(stored["num_layers"]), kept=tuple(map(str, stored["kept"]))
        )
    except (KeyError, TypeError, ValueError) as cause:
        raise ModelError(f"{path} must name format, layers and what is kept, got {cause}; quantize again") from cause


def linears_matching(patterns: Sequence[str], *, num_layers: int) -> list[str]:
    """The decoder's Linears that ``quantize.keep_high_precision`` names, in their order.

    Args:
        patterns: ``layers.3``, ``layers.3.mlp.down_proj``, or with ``*`` in place of a part.
        num_layers: Of the decoder.

    Raises:
        ConfigError: A pattern names no Linear, or some but not all of those that servers run as one.
    """
    known = [f"layers.{number}.{linear}" for number in range(num_layers) for linear in LINEARS]
    chosen = set()
    for pattern in patterns:
        found = [name for name in known if any(fnmatch.fnmatchcase(name, form) for form in (pattern, f"{pattern}.*"))]
        if not found:
            raise ConfigError(
                f"quantize.keep_high_precision must name layers of the decoder, got {pattern!r}; "
                f"there are layers.0 to layers.{num_layers - 1}, each with {', '.join(LINEARS)}"
            )
        chosen |= set(found)
    for number in range(num_layers):
        for fused in FUSED:
            together = [f"layers.{number}.{linear}" for linear in fused]
            if 0 < len(chosen & set(together)) < len(together):
                raise ConfigError(
                    f"quantize.keep_high_precision must keep {', '.join(together)} all or none, since servers run them "
                    f"as one, got {', '.join(sorted(chosen & set(together)))}; name the others too"
                )
    return [name for name in known if name in chosen]


def keep_in_high_precision(layers: nn.ModuleList, names: Sequence[str], *, exact: Mapping[str, Tensor]) -> None:
    """Switch off the quantizers of some Linears for good.

    Args:
        layers: Of the decoder.
        names: ``layers.3.mlp.down_proj``.
        exact: Weights as they were before they were rounded, where calibration rounds.
    """
    for name in names:
        _, number, linear = name.split(".", 2)
        module = layers[int(number)].get_submodule(linear)
        module.input_quantizer.disable()
        module.weight_quantizer.disable()
        if name in exact:
            module.weight.data.copy_(exact[name])


def check_quantizers(model: nn.Module, quantization: Quantization) -> int:
    """Check that exactly the decoder's Linears are quantized, as they should be, and calibrated.

    Args:
        model: The whole model, or any part that contains the decoder's layers.
        quantization: What to expect.

    Returns:
        Number of enabled quantizers.

    Raises:
        ModelError: A count is off, a quantizer sits elsewhere or is of another format, or an amax is missing, not
            finite or not positive; the usual cause is a folder that was loaded without its ``modelopt_state.pth``.
    """
    found = dict(enabled_quantizers(model))
    expected = quantization.num_quantizers
    if len(found) != expected:
        raise ModelError(
            f"the student must have {expected} enabled quantizers ({quantization.format}, {quantization.num_layers} "
            f"layers, {len(quantization.kept)} Linears kept), got {len(found)}; "
            "load a local folder that holds modelopt_state.pth, or run quantize again"
        )
    for name, quantizer in found.items():
        linear = ".".join(name.split(".")[-3:-1])
        if linear not in LINEARS or "audio_tower" in name:
            raise ModelError(f"only the decoder's Linears may be quantized, got {name}; run quantize again")
        if any(f".{kept}." in f".{name}" for kept in quantization.kept):
            raise ModelError(f"{name} must be kept in high precision, got a quantizer; run quantize again")
        _check_number_format(name, quantizer, quantization)
        if getattr(quantizer, "pre_quant_scale", None) is not None:
            raise ModelError(f"{name} must have its pre_quant_scale folded away, got one; run quantize again")
        _check_amax(name, quantizer)
    return len(found)


def _check_number_format(name: str, quantizer: TensorQuantizer, quantization: Quantization) -> None:
    recipe = FORMATS[quantization.format]
    if name.endswith(".weight_quantizer"):
        expected, is_dynamic = recipe.weight_bits, False
    elif name.endswith(".input_quantizer") and recipe.input_scales != "none":
        expected, is_dynamic = 8, recipe.input_scales == "token"
    else:
        raise ModelError(f"{name} must be off in {quantization.format}, got a quantizer; run quantize again")
    num_bits = quantizer.num_bits
    is_right = num_bits == expected if not recipe.is_float else num_bits == E4M3
    if not is_right or bool(quantizer._dynamic) != is_dynamic:
        raise ModelError(
            f"{name} must be as {quantization.format} says, got num_bits {num_bits}, "
            f"{'dynamic' if quantizer._dynamic else 'static'}; copy {QUANTIZATION} with its own student"
        )


def _check_amax(name: str, quantizer: TensorQuantizer) -> None:
    amax = getattr(quantizer, "_amax", None)
    if quantizer._dynamic:
        if amax is not None:  # ModelOpt would take it for a static scale, without a word
            raise ModelError(f"{name} must take its scale from each token, got a stored amax; run quantize again")
        return
    if amax is None or not bool(torch.isfinite(amax).all()) or not bool((amax > 0).all()):
        value = "none" if amax is None else f"{float(amax.min())} to {float(amax.max())}"
        raise ModelError(f"{name} must have a finite, positive amax, got {value}; calibrate with more utterances")


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


@torch.no_grad()
def fold_from(folded: nn.ModuleList, trained: nn.ModuleList, weights: Mapping[str, Tensor]) -> None:
    """Put weights into a copy that decodes, to the last bit as :func:`fold_weights` of a student that has them.

    Args:
        folded: Layers of a second copy of the student, behind :func:`fold_weights` or
            :func:`~qad_dist.quant.folded.fold_for_decoding`: it has no weight quantizers left.
        trained: Layers of the student, on the same device. Only its quantizers are read: of its weights a rank may hold
            a part.
        weights: Whole weights by their names below the layers, ``0.self_attn.q_proj.weight``; on any device, of any
            float dtype. They may come layer by layer: what is not among them stays as it is.

    Raises:
        ModelError: The copy has no weight of a name, or one of another shape.
    """
    targets = dict(folded.named_parameters())
    for name, weight in weights.items():
        target = targets.get(name)
        if target is None or target.shape != weight.shape:
            has = "none of that name" if target is None else tuple(target.shape)
            raise ModelError(
                f"{name} must fit the copy that decodes, got shape {tuple(weight.shape)} where it has {has}; "
                "copy the student that is trained"
            )
        # Rounded as the student's own weight would be before it is quantized.
        values = weight.to(target.device, target.dtype)
        owner, _, kind = name.rpartition(".")
        quantizer = getattr(trained.get_submodule(owner), f"{kind}_quantizer", None)
        if quantizer is not None:
            # Not called as a module: an engine's hooks would take it for a step of training.
            values = quantizer.forward(values.float().contiguous())
        target.copy_(values)


def served_bytes(model: Any) -> int:
    """Bytes of the model's weights as they are served: codes with one float32 scale for each amax, the rest bf16.

    Computed, not written: a ModelOpt folder keeps all values in the dtype of the model. The rest is frozen: it
    is the base model's, in bf16, whatever the run computes in.
    """
    quantized = {
        name.removesuffix(".weight_quantizer"): quantizer
        for name, quantizer in enabled_quantizers(model)
        if name.endswith(".weight_quantizer")
    }
    total = 0
    for name, parameter in model.named_parameters():  # a tied weight comes once
        quantizer = quantized.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if quantizer is not None:
            bits = quantizer.num_bits if isinstance(quantizer.num_bits, int) else 1 + sum(quantizer.num_bits)
            total += math.ceil(parameter.numel() * bits / 8) + 4 * quantizer._amax.numel()
        else:
            total += parameter.numel() * 2
    return total
