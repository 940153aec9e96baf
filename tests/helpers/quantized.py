"""Quantized students for tests: the decoder on a packed batch, and calibration on such batches."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qad_dist.asr.collate import Example, collate
from qad_dist.asr.decoder import DecoderStack, embed, response_states
from qad_dist.asr.load import AsrModel
from qad_dist.asr.transcribe import transcribe
from qad_dist.batch import Batch
from qad_dist.config.quantize import QuantizeConfig
from qad_dist.heldout import kl_between
from qad_dist.pairing import walk_batch
from qad_dist.quant.calibrate import Calibration, GroupKey, SmoothedGroup, Source
from qad_dist.quant.state import Quantization
from qad_dist.runtime.world import World, current_world
from tests.helpers.qwen import Samples, mels_of

# Of the embedded teacher: 7 Linears in each of 3 layers, each with a weight and an input quantizer.
NUM_LAYERS, NUM_QUANTIZERS = 3, 42
INT8 = Quantization(format="int8", num_layers=NUM_LAYERS)


def pack_with_own_responses(model: AsrModel, clips: Sequence[Samples]) -> Batch:
    """A batch of clips with what the model itself answers."""
    mels = mels_of(model, clips)
    hypotheses = transcribe(model, mels, max_response_tokens=48)
    examples = [
        Example(key=f"clip-{i}", mel_MF=mel_MF, response_ids=hypothesis.token_ids)
        for i, (mel_MF, hypothesis) in enumerate(zip(mels, hypotheses, strict=True))
    ]
    return collate(examples, prompt=model.prompt)


@torch.no_grad()
def logits_of(model: AsrModel, batch: Batch) -> Tensor:
    """``[R, V]`` at the response rows, in float32."""
    states_RD = response_states(DecoderStack(model.decoder.layers), embed(model, batch), model.decoder.norm)
    return (states_RD @ model.head_weight_VD.T).float()


def source_of(model: AsrModel, batches: Sequence[Batch], world: World | None = None) -> Source:
    """These batches as calibration data, the last one as the part to search on."""
    last = len(batches) - 1
    return Source(
        batches=[walk_batch(model, b, number=i, is_search=i == last) for i, b in enumerate(batches)],
        kl=lambda batch, student_ND, teacher_ND: kl_between(model, batch, student_ND, teacher_ND),
        run_all=lambda: [logits_of(model, batch) for batch in batches] and None,
        world=world or current_world(),
    )


def copied(model: AsrModel) -> AsrModel:
    """The same, to change."""
    return replace(model, model=copy.deepcopy(model.model))


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A student and how it came to be."""

    student: AsrModel
    calibration: Calibration
    smoothed: dict[GroupKey, SmoothedGroup]


def calibrate(
    model: AsrModel, *batches: Batch, dtype: torch.dtype = torch.float32, world: World | None = None, **settings: Any
) -> Calibrated:
    """Quantize in place, calibrated on these batches, as the stage does; without clipping unless told."""
    section = QuantizeConfig.model_validate({"group_size": 32, "clip": "none", **settings})
    calibration = Calibration(model.model, model.decoder.layers, section, source_of(model, batches, world))
    return Calibrated(model, calibration, calibration.run(dtype))


def quantize(model: AsrModel, *batches: Batch, dtype: torch.dtype = torch.float32, **settings: Any) -> AsrModel:
    """The same; returns the model."""
    return calibrate(model, *batches, dtype=dtype, **settings).student


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference, as a share of the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())
