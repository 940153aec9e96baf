"""Audio whose number can be heard: utterance i is a tone of 200 + 10 i Hz, so a swapped pair is visible."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile

from shards.schema import Recording


def make_tone(number: int, *, seconds: float = 0.4, rate_hz: int = 16_000) -> npt.NDArray[np.float32]:
    """Half-scale sine of 200 + 10 ``number`` Hz."""
    times = np.arange(round(seconds * rate_hz)) / rate_hz
    return (0.5 * np.sin(2 * np.pi * (200 + 10 * number) * times)).astype(np.float32)


def number_of(samples: npt.NDArray[np.float32]) -> int:
    """The number of a tone at 16 kHz, from the peak of its spectrum (zero-padded to a resolution of 1 Hz)."""
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples)), n=16_000))
    return round((int(spectrum.argmax()) - 200) / 10)


def write_tone(path: Path, number: int, *, seconds: float = 0.4, rate_hz: int = 16_000) -> Path:
    """Write a tone in the format that the suffix of ``path`` names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    subtype = "OPUS" if path.suffix == ".opus" else None
    container = "OGG" if path.suffix == ".opus" else None
    soundfile.write(path, make_tone(number, seconds=seconds, rate_hz=rate_hz), rate_hz, subtype, format=container)
    return path


def make_recordings(folder: Path, count: int, *, speakers: int = 6, languages: int = 2) -> list[Recording]:
    """``count`` tones of 0.30 to 0.44 s, with speakers, languages and references."""
    names = ("English", "Vietnamese", "German", "French")[:languages]
    return [
        Recording(
            path=str(write_tone(folder / f"{number}.wav", number, seconds=0.3 + 0.02 * (number % 8))),
            key=f"tone-{number}",
            source="tones",
            language=names[number % languages],
            speaker=f"speaker{number % speakers}",
            reference=f"tone số {number}",
        )
        for number in range(count)
    ]
