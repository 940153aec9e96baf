"""Altered copies of utterances: another speed, noise, another gain. Pure: no I/O, no randomness but that of a hash.

In distillation teacher and student hear the same audio, so an altered copy is further unlabelled speech: it shows the
teacher's distributions over the tokens with which it answered the utterance itself. How a copy is altered follows from
its key, its number and the seed; so does its length, and batches are planned without reading audio. Equal arguments
give equal bits in every process, and equal lengths on every machine.

Dimension key: A audio samples, K frequencies of a noise, C copies (the utterance itself is the first), U utterances.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import overload

import numpy as np
import numpy.typing as npt

from qad_dist.config.augment import AugmentConfig
from shards.audio import Samples, change_speed
from shards.schema import SAMPLE_RATE_HZ

RULES_VERSION = 1
"""Of what is below: another one gives other copies for equal settings."""

# Below it noise is flat: pink noise would have most of its power where nothing is heard.
_FLAT_BELOW_HZ = np.float32(50)


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """How a copy differs from its utterance."""

    speed: float
    """1.1 is a tenth faster and higher; in steps of 1/16,000."""
    gain_db: float
    """At most: less is given where an audio sample would lie outside [-1, 1]."""
    snr_db: float | None
    """Power of the utterance, pauses included, to that of the noise; None without noise."""
    seed: int
    """Of the noise and its colour, from 0."""


IDENTITY = Variant(speed=1.0, gain_db=0.0, snr_db=None, seed=0)
"""The utterance itself."""


def choose_speeds(keys: Iterable[str | None], settings: AugmentConfig, *, seed: int) -> npt.NDArray[np.float64]:
    """The speeds of all copies of some utterances: about a second for a million utterances, however many copies.

    The copies of an utterance take the speeds in turns, from one that its key decides.

    Args:
        keys: Of the utterances.
        settings: ``train.augment``.
        seed: Of the run.

    Returns:
        ``speeds_CU``: 1 in its first row, that of the utterances themselves.
    """
    if not settings.copies:
        return np.ones((1, sum(1 for _ in keys)))
    start_U = np.frombuffer(b"".join(_digest(seed, key, num_bytes=8) for key in keys), "<u8")
    turn_CU = (start_U % len(settings.speeds)).astype(np.int64) + np.arange(settings.copies + 1)[:, None]
    speeds_CU = np.array(settings.speeds)[turn_CU % len(settings.speeds)]
    speeds_CU[0] = 1.0
    return speeds_CU


def choose_variant(key: str, copy: int, settings: AugmentConfig, seed: int) -> Variant:
    """How copy ``copy`` of an utterance differs from it; copy 0 is the utterance itself.

    Args:
        key: Of the utterance.
        copy: From 0 to ``settings.copies``.
        settings: ``train.augment``.
        seed: Of the run.

    Returns:
        A function of the arguments alone; its speed is that of :func:`choose_speeds`.
    """
    if copy == 0:
        return IDENTITY
    numbers = np.frombuffer(_digest(seed, key, copy, num_bytes=32), "<u8")
    shares = (numbers >> np.uint64(11)) * 2.0**-53  # in [0, 1), exact
    has_noise = bool(shares[1] < settings.noise_share)
    return Variant(
        speed=float(choose_speeds([key], settings, seed=seed)[copy, 0]),
        gain_db=_between(settings.gain_db, float(shares[0])),
        snr_db=_between(settings.noise_snr_db, float(shares[2])) if has_noise else None,
        seed=int(numbers[3]),
    )


@overload
def augmented_samples(num_samples: int, speed: float) -> int: ...
@overload
def augmented_samples(num_samples: npt.NDArray[np.int64], speed: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]: ...
def augmented_samples(
    num_samples: int | npt.NDArray[np.int64], speed: float | npt.NDArray[np.float64]
) -> int | npt.NDArray[np.int64]:
    """Audio samples of an utterance at another speed, or of many: their number by the speed, halves rounded up."""
    rate_hz = np.rint(np.multiply(speed, SAMPLE_RATE_HZ)).astype(np.int64)
    found = (2 * SAMPLE_RATE_HZ * num_samples + rate_hz) // (2 * rate_hz)
    return found if isinstance(num_samples, np.ndarray) else int(found)


def augment(audio_A: Samples, variant: Variant) -> Samples:
    """An utterance as its variant says: resampled, then with noise, then louder or softer.

    Args:
        audio_A: float32 in [-1, 1] at 16 kHz; at least one audio sample.
        variant: From :func:`choose_variant`. Of :data:`IDENTITY` the very array that was given comes back.

    Returns:
        float32 in [-1, 1], of :func:`augmented_samples` audio samples. Silence stays silence: noise is relative to it.

    Source:
        Speed by resampling, 0.9, 1.0 and 1.1: Ko et al. 2015, Audio augmentation for speech recognition, section 2.
    """
    if variant == IDENTITY:
        return audio_A
    num_samples = augmented_samples(len(audio_A), variant.speed)
    audio_A = change_speed(audio_A, variant.speed)
    assert len(audio_A) == num_samples, f"soxr must give {num_samples} audio samples, got {len(audio_A)}"
    if variant.snr_db is not None:
        audio_A = audio_A + _noise(len(audio_A), _rms(audio_A) * 10 ** (-variant.snr_db / 20), variant.seed)
    audio_A = audio_A * np.float32(10 ** (variant.gain_db / 20))
    peak = np.abs(audio_A).max()
    return audio_A / peak if peak > 1 else audio_A


def _noise(num_samples: int, rms: float, seed: int) -> Samples:
    """Noise of that root mean square: some part white, the other one pink, whose power falls as 1 / frequency.

    It is drawn as a spectrum: that of white noise is random numbers, too, and one transform is saved.
    """
    random = np.random.default_rng(seed)
    pink_share = np.float32(random.random())
    # A transform of 4 to 8 times a power of 2 is fast, and that of a prime number is not.
    unit = 1 << max(1, num_samples.bit_length() - 3)
    size = -(-num_samples // unit) * unit
    spectrum_K = random.standard_normal(size + 2, np.float32).view(np.complex64)
    hertz_K = np.arange(size // 2 + 1, dtype=np.float32) * np.float32(SAMPLE_RATE_HZ / size)
    pink_K = 1 / np.maximum(hertz_K, _FLAT_BELOW_HZ)
    power_K = 1 - pink_share + pink_share / pink_K.mean() * pink_K
    noise_A = np.fft.irfft(spectrum_K * np.sqrt(power_K), size)[:num_samples]
    return (noise_A * np.float32(rms / _rms(noise_A))).astype(np.float32, copy=False)


def _rms(audio_A: npt.NDArray[np.floating]) -> float:
    # Not np.dot: BLAS adds up in an order that depends on the processor and its threads.
    return float(np.sqrt(np.mean(np.square(audio_A, dtype=np.float64))))


def _between(bounds: tuple[float, float], share: float) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * share


def _digest(*parts: object, num_bytes: int) -> bytes:
    return hashlib.blake2b("\n".join(map(str, parts)).encode(), digest_size=num_bytes).digest()
