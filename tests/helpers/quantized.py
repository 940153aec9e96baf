"""Quantized students for tests: the decoder on a packed batch, and calibration on such batches."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qad_dist.asr.collate import Example, collate
from qad_dist.asr.decoder import DecoderStack, embed, response_states
from qad_dist.asr.load import AsrModel
from qad_dist.asr.transcribe import transcribe
from qad_dist.batch import Batch
from qad_dist.quant.calibrate import quantize_decoder
from tests.helpers.qwen import Samples, mels_of

# Of the embedded teacher: 7 Linears in each of 3 layers, each with a weight and an input quantizer.
NUM_LAYERS, NUM_QUANTIZERS = 3, 42


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


def quantize(model: AsrModel, *batches: Batch, alpha: float = 1.0, dtype: torch.dtype = torch.float32) -> AsrModel:
    """Quantize in place, calibrated on these batches, as the stage does; returns the same model."""

    def forward_loop() -> None:
        for batch in batches:
            logits_of(model, batch)

    quantize_decoder(model.model, model.decoder.layers, forward_loop, alpha=alpha, dtype=dtype)
    return model


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference, as a share of the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())
