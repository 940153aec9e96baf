"""Log-mel spectrograms of whole batches, utterance by utterance equal to WhisperFeatureExtractor's, without padding.

Dimension key: A audio samples, W samples of a window, F frames (side by side for a batch), C frames of a chunk,
K frequencies, M mel bins.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shards.errors import AudioError
from shards.schema import SAMPLE_RATE_HZ

HOP_SAMPLES = 160

_EXTRACTOR = "WhisperFeatureExtractor"

# Frames transformed at a time. On the CPU what a chunk needs stays in the cache of a core; elsewhere it is below 64 MB.
_CPU_CHUNK, _CHUNK = 512, 8192

# Whisper's: the smallest power, and how many decades below its loudest bin an utterance ends.
_SMALLEST_POWER, _DECADES = 1e-10, 8.0


def num_frames(num_audio_samples: int) -> int:
    """Mel frames of an utterance of that many samples at 16 kHz: whole hops of 10 ms."""
    return num_audio_samples // HOP_SAMPLES


def extractor_mismatches(extractor: Any, num_mel_bins: int) -> list[str]:
    """What of a feature extractor does not suit this project and the audio tower; nothing for one that does.

    The size of the window and the mel filters are the extractor's own, whatever they are.

    Args:
        extractor: The processor's ``feature_extractor``. Made from a file that says nothing, it has Whisper's 80 bins.
        num_mel_bins: What the audio tower reads.
    """
    wanted = {
        "feature_size": num_mel_bins,
        "hop_length": HOP_SAMPLES,
        "sampling_rate": SAMPLE_RATE_HZ,
        "dither": 0.0,  # noise: no two passes would be equal
    }
    found = {name: getattr(extractor, name, None) for name in wanted}
    wrong = [f"{name} must be {wanted[name]}, got {found[name]}" for name in wanted if found[name] != wanted[name]]
    if (kind := type(extractor).__name__) != _EXTRACTOR:
        wrong.append(f"feature_extractor_type must be {_EXTRACTOR}, got {kind}")
    return wrong


def log_mel(audio_A: np.ndarray, extractor: Any) -> Tensor:
    """Log-mel of one utterance: :func:`log_mels` of it alone."""
    return packed_log_mels([audio_A], extractor)


def log_mels(audios: Sequence[np.ndarray], extractor: Any, *, device: torch.device | None = None) -> list[Tensor]:
    """Log-mels of several utterances, ``[M, F]`` each: views of what :func:`packed_log_mels` makes."""
    lengths = [num_frames(len(audio_A)) for audio_A in audios]
    return list(packed_log_mels(audios, extractor, device=device).split(lengths, dim=1))


def packed_log_mels(audios: Sequence[np.ndarray], extractor: Any, *, device: torch.device | None = None) -> Tensor:
    """Log-mels of several utterances side by side, without any padding between or behind them.

    Each is that of the extractor for this utterance alone (``padding=False``), up to 1e-5: its own reflection at both
    ends, its own loudest bin. Neighbours do not change it by more than 1e-6; equal batches give equal bits.

    qwen-asr 0.0.6 has a minimum of half a second, but applies it to pieces of recordings above 20 minutes only; a short
    utterance reaches the model as it is, there and here.

    Args:
        audios: At least one; float32 in [-1, 1] or int16, mono at 16 kHz, longer than half a window (12.5 ms).
        extractor: The processor's ``feature_extractor``, in which :func:`extractor_mismatches` finds nothing.
        device: Where to compute; the CPU if not told.

    Returns:
        float32 ``[M, F]`` on that device with :func:`num_frames` frames for each utterance, in their order.
    """
    device = device or torch.device("cpu")
    filters_MK = torch.from_numpy(extractor.mel_filters).to(device, torch.float32).T.contiguous()
    window_W = torch.hann_window(extractor.n_fft, device=device)
    lengths = [num_frames(len(audio_A)) for audio_A in audios]
    log_MF = torch.empty(len(filters_MK), sum(lengths), device=device)
    frames = (
        torch.from_numpy(_padded(audio_A, extractor.n_fft)).to(device).unfold(0, extractor.n_fft, HOP_SAMPLES)
        for audio_A in audios
    )
    begin = 0
    for frames_CW in _chunks(frames, _CPU_CHUNK if device.type == "cpu" else _CHUNK):
        spectrum_CK = torch.fft.rfft(frames_CW.mul_(window_W))
        power_CK = spectrum_CK.real.square().add_(spectrum_CK.imag.square())
        log_MC = log_MF[:, begin : begin + len(frames_CW)]
        torch.mm(filters_MK, power_CK.T, out=log_MC).clamp_(min=_SMALLEST_POWER).log10_()
        begin += len(frames_CW)
    for own_MF in log_MF.split(lengths, dim=1):
        torch.maximum(own_MF, own_MF.max() - _DECADES, out=own_MF).add_(4.0).div_(4.0)
    return log_MF


def _padded(audio_A: np.ndarray, window_samples: int) -> np.ndarray:
    """An utterance with its reflection at both ends, as float32, cut where its last frame ends.

    Frames are centred on the hops, the first of which is the beginning. The last one, at the end of the utterance or
    less than a hop before it, is left out by Whisper.
    """
    frames, half = num_frames(len(audio_A)), window_samples // 2
    if len(audio_A) <= half:
        raise AudioError(
            f"an utterance must have more than {half} audio samples for a log-mel, got {len(audio_A)}; "
            "raise pack.min_audio_seconds"
        )
    padded_A = np.empty(HOP_SAMPLES * (frames - 1) + window_samples, np.float32)
    padded_A[:half] = audio_A[half:0:-1]
    inner_A = audio_A[: len(padded_A) - half]
    padded_A[half : half + len(inner_A)] = inner_A
    reflected = len(padded_A) - half - len(inner_A)
    padded_A[len(padded_A) - reflected :] = audio_A[-2 : -2 - reflected : -1]
    if audio_A.dtype == np.int16:
        padded_A /= 1 << 15
    return padded_A


def _chunks(frames: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """Copies of the frames of all utterances, ``size`` at a time: short ones share a chunk, long ones fill several."""
    pieces: list[Tensor] = []
    missing = size
    for rest in frames:
        while len(rest) >= missing:
            yield torch.cat([*pieces, rest[:missing]])
            rest, pieces, missing = rest[missing:], [], size
        if len(rest):
            pieces.append(rest)
            missing -= len(rest)
    if pieces:
        yield torch.cat(pieces)
