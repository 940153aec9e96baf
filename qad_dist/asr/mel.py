"""Log-mel spectrograms, by the model's own WhisperFeatureExtractor."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from shards.schema import SAMPLE_RATE_HZ

HOP_SAMPLES = 160


def num_frames(num_audio_samples: int) -> int:
    """Mel frames of an utterance of that many samples at 16 kHz: whole hops of 10 ms."""
    return num_audio_samples // HOP_SAMPLES


def extractor_mismatches(extractor: Any, num_mel_bins: int) -> list[str]:
    """What of a feature extractor does not suit this project and the audio tower; nothing for one that does.

    Args:
        extractor: The processor's ``feature_extractor``. Made from a file that says nothing, it has Whisper's 80 bins.
        num_mel_bins: What the audio tower reads.
    """
    wanted = {"feature_size": num_mel_bins, "hop_length": HOP_SAMPLES, "sampling_rate": SAMPLE_RATE_HZ}
    found = {name: getattr(extractor, name, None) for name in wanted}
    return [f"{name} must be {wanted[name]}, got {found[name]}" for name in wanted if found[name] != wanted[name]]


def log_mel(audio_A: np.ndarray, extractor: Any) -> Tensor:
    """Log-mel of one utterance, without any padding behind it.

    qwen-asr 0.0.6 has a minimum of half a second, but applies it to pieces of recordings above 20 minutes only; a short
    utterance reaches the model as it is, there and here.

    Args:
        audio_A: float32 mono at 16 kHz, at least 0.05 s (the extractor's window is 25 ms).
        extractor: The processor's ``feature_extractor``.

    Returns:
        float32 ``[M, F]`` with :func:`num_frames` frames.
    """
    features = extractor(audio_A, sampling_rate=SAMPLE_RATE_HZ, padding=False, truncation=False, return_tensors="np")[
        "input_features"
    ][0]
    return torch.from_numpy(np.asarray(features, dtype=np.float32))
