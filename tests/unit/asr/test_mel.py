"""Log-mel of single utterances against qwen-asr's processor."""

import numpy as np
import pytest
import torch

from qad_dist.asr.load import AsrModel
from qad_dist.asr.mel import log_mel, num_frames
from tests.helpers.qwen import noise, reference_inputs


@pytest.mark.parametrize("num_samples", [800, 1_599, 7_999, 8_000, 8_001, 15_999, 16_160, 52_345, 160_000, 500_000])
def test_log_mel_is_that_of_the_processor_without_padding(nano: AsrModel, num_samples: int) -> None:
    audio_A = noise(num_samples, seed=num_samples)

    mel_MF = log_mel(audio_A, nano.extractor)

    inputs = reference_inputs(nano, audio_A)
    valid = int(inputs["feature_attention_mask"].sum())
    assert mel_MF.shape == (128, valid)
    assert torch.equal(mel_MF, inputs["input_features"][0, :, :valid])


@pytest.mark.parametrize(
    ("num_samples", "frames"),
    [(800, 5), (1_600, 10), (8_000, 50), (8_159, 50), (8_160, 51), (16_000, 100), (16_159, 100), (480_000, 3_000)],
)
def test_frames_are_whole_hops_of_ten_milliseconds(nano: AsrModel, num_samples: int, frames: int) -> None:
    assert num_frames(num_samples) == frames
    assert log_mel(np.zeros(num_samples, np.float32), nano.extractor).shape[1] == frames
