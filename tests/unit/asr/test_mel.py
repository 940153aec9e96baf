"""Log-mels of whole batches against qwen-asr's processor, utterance by utterance."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor

from qad_dist.asr.load import AsrModel
from qad_dist.asr.mel import extractor_mismatches, log_mel, log_mels, num_frames, packed_log_mels
from shards.errors import AudioError
from tests.helpers.qwen import Samples, noise, reference_inputs

# The shortest of all, around whole hops, around half a second and one, beyond a chunk of frames, and half a minute.
LENGTHS = (
    *(800, 959, 960, 961, 1_000, 1_039, 1_040, 1_119, 1_120, 1_599, 7_999, 8_000, 8_001, 15_999, 16_160),
    *(52_345, 81_920, 160_000, 480_000),
)
TOLERANCE = 1e-5
"""Of the order of float32 sums: 1.2e-7 was seen. The ends of an utterance reflected wrongly make more than 1e-2."""


def tone(num_samples: int) -> Samples:
    """Nearly all of its bins hold nothing but rounding errors."""
    return (0.5 * np.sin(2 * np.pi * 440 * np.arange(num_samples) / 16_000)).astype(np.float32)


def silence_behind_a_click(num_samples: int) -> Samples:
    audio_A = np.zeros(num_samples, np.float32)
    audio_A[300] = 0.9
    return audio_A


def by_processor(model: AsrModel, audio_A: Samples) -> torch.Tensor:
    inputs = reference_inputs(model, audio_A)
    return inputs["input_features"][0, :, : int(inputs["feature_attention_mask"].sum())]


def largest_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max())


@pytest.mark.parametrize("sound", [lambda n: noise(n, seed=n), tone, silence_behind_a_click])
def test_each_utterance_of_a_mixed_batch_is_that_of_the_processor(nano: AsrModel, sound: Any) -> None:
    audios = [sound(num_samples) for num_samples in LENGTHS]

    mels = log_mels(audios, nano.extractor)

    for audio_A, mel_MF in zip(audios, mels, strict=True):
        assert mel_MF.dtype == torch.float32
        assert largest_difference(mel_MF, by_processor(nano, audio_A)) <= TOLERANCE


@pytest.mark.parametrize("num_samples", LENGTHS)
def test_one_utterance_is_that_of_the_processor_without_padding(nano: AsrModel, num_samples: int) -> None:
    audio_A = noise(num_samples, seed=num_samples)

    assert largest_difference(log_mel(audio_A, nano.extractor), by_processor(nano, audio_A)) <= TOLERANCE


def test_packed_log_mels_stand_side_by_side_without_padding(nano: AsrModel) -> None:
    audios = [noise(num_samples, seed=num_samples) for num_samples in LENGTHS]

    packed_MF = packed_log_mels(audios, nano.extractor)

    assert packed_MF.is_contiguous()
    assert packed_MF.shape == (128, sum(num_samples // 160 for num_samples in LENGTHS))
    assert torch.equal(packed_MF, torch.cat(log_mels(audios, nano.extractor), dim=1))


def test_neighbours_do_not_change_an_utterance(nano: AsrModel) -> None:
    """Not even one that is far louder, far longer, or of another place in a chunk."""
    audio_A = 1e-3 * noise(20_000, seed=0)
    alone = log_mel(audio_A, nano.extractor)

    for before in ([], [noise(800, seed=1)], [0.9 * tone(480_000)], [noise(7_777, seed=i) for i in range(9)]):
        found = log_mels([*before, audio_A, tone(99_999)], nano.extractor)[len(before)]

        assert largest_difference(found, alone) <= 1e-6


def test_equal_batches_give_equal_bits(nano: AsrModel) -> None:
    audios = [noise(num_samples, seed=num_samples) for num_samples in LENGTHS]

    first, second = (packed_log_mels(audios, nano.extractor) for _ in range(2))

    assert first.numpy().tobytes() == second.numpy().tobytes()


def test_codes_of_16_bits_are_the_same_audio(nano: AsrModel) -> None:
    codes = [np.round(noise(n, seed=n) * 32_767).astype(np.int16) for n in (800, 1_039, 52_345)]
    audios = [(code_A / 32_768).astype(np.float32) for code_A in codes]

    assert torch.equal(packed_log_mels(codes, nano.extractor), packed_log_mels(audios, nano.extractor))


def test_what_is_handed_in_stays_as_it_is(nano: AsrModel) -> None:
    audio_A = noise(16_000, seed=0)
    before = audio_A.tobytes()
    audio_A.flags.writeable = False

    log_mel(audio_A, nano.extractor)

    assert audio_A.tobytes() == before


def test_another_window_and_other_filters_are_honoured() -> None:
    extractor = WhisperFeatureExtractor(feature_size=40, n_fft=512)
    audios = [noise(num_samples, seed=num_samples) for num_samples in (800, 1_119, 33_333)]

    mels = log_mels(audios, extractor)

    for audio_A, mel_MF in zip(audios, mels, strict=True):
        inputs = extractor(audio_A, sampling_rate=16_000, padding=False, truncation=False, return_tensors="pt")
        assert largest_difference(mel_MF, inputs["input_features"][0]) <= TOLERANCE


@pytest.mark.parametrize(
    ("num_samples", "frames"),
    [(800, 5), (1_600, 10), (8_000, 50), (8_159, 50), (8_160, 51), (16_000, 100), (16_159, 100), (480_000, 3_000)],
)
def test_frames_are_whole_hops_of_ten_milliseconds(nano: AsrModel, num_samples: int, frames: int) -> None:
    assert num_frames(num_samples) == frames
    assert log_mel(np.zeros(num_samples, np.float32), nano.extractor).shape[1] == frames


def test_utterance_that_is_too_short_to_be_reflected_is_refused(nano: AsrModel) -> None:
    with pytest.raises(
        AudioError, match=r"^an utterance must have more than 200 audio samples .*, got 200; raise pack"
    ):
        log_mel(noise(200, seed=0), nano.extractor)


class OtherFeatureExtractor(WhisperFeatureExtractor):
    """Of another kind, by its name."""


@pytest.mark.parametrize(
    ("extractor", "told"),
    [
        (WhisperFeatureExtractor(feature_size=80), "feature_size must be 128, got 80"),
        (WhisperFeatureExtractor(feature_size=128, hop_length=200), "hop_length must be 160, got 200"),
        (WhisperFeatureExtractor(feature_size=128, sampling_rate=8_000), "sampling_rate must be 16000, got 8000"),
        (WhisperFeatureExtractor(feature_size=128, dither=1e-4), "dither must be 0.0, got 0.0001"),
        (
            OtherFeatureExtractor(feature_size=128),
            "feature_extractor_type must be WhisperFeatureExtractor, got OtherFeatureExtractor",
        ),
    ],
)
def test_extractor_that_is_not_honoured_is_named(extractor: Any, told: str) -> None:
    assert extractor_mismatches(extractor, 128) == [told]


def test_extractor_of_the_model_suits(nano: AsrModel) -> None:
    assert extractor_mismatches(nano.extractor, 128) == []
