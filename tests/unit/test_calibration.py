"""Batches of the calibration set."""

from dataclasses import replace

import pytest
import torch

from qad_dist.asr.load import AsrModel
from qad_dist.calibration import _checked
from shards.errors import ModelError
from tests.helpers.quantized import pack_with_own_responses
from tests.helpers.qwen import Samples


def test_batch_without_audio_positions_is_refused(nano: AsrModel, clips: list[Samples]) -> None:
    """What the calibration of text alone would be: the decoder would never see what it is for."""
    batch = pack_with_own_responses(nano, clips[:2])
    assert _checked(batch) is batch

    with pytest.raises(ModelError, match="calibration batches must hold audio positions, got none"):
        _checked(replace(batch, audio_positions_P=torch.zeros(0, dtype=torch.int64)))
