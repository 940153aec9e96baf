"""Audio files in, 16 kHz mono float32 out; and the lossless FLAC that shards hold.

:mod:`shards.decoders` decodes, and is not trusted: the header is checked before anything is decoded, what was decoded
is checked against the header, and samples must be numbers. An :class:`AudioError` here begins with a short kind before
its first colon (``truncated: ...``), by which reports count.
"""

import hashlib
import io
import math
import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from shards.containers import parse_stream_info
from shards.decoders import Block, Sound, header_frames, open_sound, open_sound_file, reason_of
from shards.errors import AudioError, SourceError
from shards.schema import SAMPLE_RATE_HZ, Recording
from shards.storage import open_regular

Samples = npt.NDArray[np.float32]
Codes = npt.NDArray[np.int16]
"""Samples as shards hold them: 16-bit integers, 32768 times the sample."""

MAX_SECONDS = 1200.0
"""qwen-asr takes no longer audio in one piece."""
MIN_RATE_HZ, MAX_RATE_HZ = 4_000, 384_000
MAX_CHANNELS = 32
MAX_PEAK = 4.0
"""Decoders overshoot 1.0 a little; beyond this a float file holds something else than samples in [-1, 1]."""
MAX_BYTES = 2 << 30
"""Of an audio file that is read into memory: one within another file, or at a remote address."""

# Tables of stretches are rounded, and tell where a recording ends before its encoder padded or trimmed it.
_OUTSIDE_SECONDS = 0.1
# A mean with a thousandth of its channels' power is what cancelling leaves, not speech.
_CANCELLED_SHARE = 1e-3
# Of compressed speech, where nothing better is known: 128 kbit/s.
_GUESSED_BYTES_PER_SECOND = 16_000
_CODES_PER_UNIT = np.float32(32768)


def stream(
    file: BinaryIO,
    *,
    start_seconds: float | None = None,
    num_seconds: float | None = None,
    min_seconds: float = 0.0,
    max_seconds: float = MAX_SECONDS,
) -> Iterator[Samples]:
    """Decode an audio file, or a stretch of it, block by block; memory does not grow with its length.

    Args:
        file: As :func:`open_recording` gives it.
        start_seconds: Where the stretch begins, to the nearest frame; None: at the beginning.
        num_seconds: How long it lasts; None: to the end.
        min_seconds: A shorter recording or stretch is refused.
        max_seconds: A longer one is refused before it is decoded, if its header tells the length.

    Yields:
        Samples in [-1, 1] at 16 kHz, the mean of all channels. Joined they are the whole, however long the blocks are.

    Raises:
        AudioError: The file is no audio, is damaged, breaks a limit, or ends before the stretch does. This may be
            known only at the end: what was given before is then not to be used.
    """
    with open_sound(file) as sound:
        limits = {"min_seconds": min_seconds, "max_seconds": max_seconds}
        first, last = _frames_of_stretch(sound, start_seconds or 0.0, num_seconds)
        _check_told(sound, first, last, limits)
        yield from _resample(_checked(sound, first, last, limits), sound.rate_hz)


def decode(path: str | Path, *, min_seconds: float = 0.0, max_seconds: float = MAX_SECONDS) -> Samples:
    """Decode an audio file; :func:`stream` in one piece.

    Args:
        path: A regular file; pipes and devices are refused, since opening them could wait for ever.
        min_seconds: A shorter recording is refused.
        max_seconds: A longer one is refused before it is decoded, if its header tells the length.

    Returns:
        Samples in [-1, 1] at 16 kHz, the mean of all channels.

    Raises:
        AudioError: The file is no audio, is damaged, or breaks a limit.
    """
    with _open_regular(path) as file:
        return np.concatenate(list(stream(file, min_seconds=min_seconds, max_seconds=max_seconds)))


def decode_bytes(data: bytes, *, min_seconds: float = 0.0, max_seconds: float = MAX_SECONDS) -> Samples:
    """Decode the bytes of an audio file; as :func:`decode`."""
    return np.concatenate(list(stream(io.BytesIO(data), min_seconds=min_seconds, max_seconds=max_seconds)))


@contextmanager
def open_recording(recording: Recording) -> Generator[BinaryIO]:
    """Open the audio file of a recording: a file, a part of one, or what lies at a remote address.

    Raises:
        AudioError: It is not there or not a regular file, its part of the file is cut, or it is too large to be read
            into memory.
        SourceError: A package that the address needs is missing.
    """
    if recording.path.startswith(("http://", "https://", "s3://")):
        yield io.BytesIO(_read_remote(recording))
        return
    with _open_regular(recording.path) as file:
        if recording.offset_bytes is None:
            yield file
        else:
            yield io.BytesIO(_read_part(file, recording.offset_bytes, recording.num_bytes))


def read_recording(recording: Recording, *, min_seconds: float, max_seconds: float) -> Iterator[Samples]:
    """Decode a recording, or the stretch of its file that it is, block by block: :func:`stream` of what it names.

    Raises:
        AudioError: As :func:`open_recording` and :func:`stream`.
        SourceError: As :func:`open_recording`.
    """
    is_stretch = recording.start_seconds is not None
    with open_recording(recording) as file:
        yield from stream(
            file,
            start_seconds=recording.start_seconds,
            num_seconds=recording.told_seconds if is_stretch else None,
            min_seconds=min_seconds,
            max_seconds=max_seconds,
        )


def estimate_seconds(recording: Recording) -> float:
    """About how long a recording lasts, from what it costs nothing to know; never raises."""
    if recording.told_seconds is not None:
        return recording.told_seconds
    if recording.num_bytes is not None:
        return recording.num_bytes / _GUESSED_BYTES_PER_SECOND
    seconds = _seconds_by_first_bytes(recording.path) or header_seconds(recording.path)
    if seconds is None:
        try:
            seconds = Path(recording.path).stat().st_size / _GUESSED_BYTES_PER_SECOND
        except (OSError, ValueError):
            seconds = 0.0
    return max(0.0, seconds - (recording.start_seconds or 0.0))


def _seconds_by_first_bytes(path: str) -> float | None:
    """What FLAC and plain WAV say in their first bytes, at a tenth of the cost of opening them with libsndfile."""
    try:
        with _open_regular(path) as file:
            head, size = file.read(44), os.fstat(file.fileno()).st_size
    except (AudioError, OSError):
        return None
    if head[:4] == b"fLaC" and len(head) > 41:
        info = parse_stream_info(head[8:42])
        return info.num_frames / info.rate_hz if info.rate_hz and info.num_frames else None
    if head[:4] == b"RIFF" and head[8:16] == b"WAVEfmt " and len(head) > 31:
        bytes_per_second = int.from_bytes(head[28:32], "little")
        return (size - len(head)) / bytes_per_second if bytes_per_second else None
    return None


def header_seconds(path: str | Path) -> float | None:
    """A recording's duration as its header tells it, decoding nothing; None if libsndfile finds no length."""
    try:
        with _open_regular(path) as file:
            found = header_frames(file)
    except AudioError:
        return None
    return found and found[0] / found[1]


def codes_of(samples: Samples) -> Codes:
    """Samples as 16-bit integers, rounded to the nearest and clipped; those that came from 16 bits are unchanged."""
    scaled = samples * _CODES_PER_UNIT
    np.rint(scaled, out=scaled)
    np.clip(scaled, -32768, 32767, out=scaled)
    return scaled.astype(np.int16)


def digest(codes: Codes) -> bytes:
    """16 bytes that are equal for equal audio, however it was stored before: MD5, which FLAC's header has as well."""
    return hashlib.md5(codes.astype("<i2", copy=False).tobytes(), usedforsecurity=False).digest()


def digest_of_flac(data: bytes) -> bytes:
    """:func:`digest` of what :func:`encode_flac` encoded, by what libFLAC wrote into the header."""
    return parse_stream_info(data[8:42]).md5


def change_speed(audio_A: Samples, speed: float) -> Samples:
    """Samples at another speed, in steps of 1/16,000, and so at another pitch: 1.1 is a tenth faster and higher.

    At speed 1 the very array that was given comes back; at others, samples may lie a little outside [-1, 1].
    """
    rate_hz = round(speed * SAMPLE_RATE_HZ)
    return audio_A if rate_hz == SAMPLE_RATE_HZ else soxr.resample(audio_A, rate_hz, SAMPLE_RATE_HZ, quality="HQ")


def codec_versions() -> list[str]:
    """Of the libraries that decode, resample and encode: others may give other bytes."""
    return [soundfile.__version__, soundfile.__libsndfile_version__, soxr.__version__]


def encode_flac(audio: Samples | Codes) -> bytes:
    """16-bit mono 16 kHz FLAC of samples or their codes; equal codes give equal bytes."""
    codes: Any = audio if audio.dtype == np.int16 else codes_of(audio)
    file = io.BytesIO()
    soundfile.write(file, codes, SAMPLE_RATE_HZ, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def decode_flac_codes(data: bytes) -> Codes:
    """The reverse of :func:`encode_flac`: nothing but such FLAC is accepted.

    Raises:
        AudioError: It is something else, or damaged.
    """
    with open_sound_file(io.BytesIO(data)) as sound:
        told = sound.frames
        if (sound.format, sound.subtype, sound.samplerate, sound.channels) != ("FLAC", "PCM_16", SAMPLE_RATE_HZ, 1):
            raise AudioError(
                f"format: must be mono 16 kHz FLAC, got {sound.format} at {sound.samplerate} Hz with "
                f"{sound.channels} channels of {sound.subtype}"
            )
        check_header(rate_hz=SAMPLE_RATE_HZ, channels=1, frames=told, min_seconds=0.0, max_seconds=MAX_SECONDS)
        try:
            codes: Any = sound.read(dtype="int16")
        except (soundfile.SoundFileError, RuntimeError) as cause:
            raise AudioError(f"damaged: {reason_of(cause)}") from cause
    if len(codes) < told:
        raise AudioError(f"truncated: the header promises {told} frames, got {len(codes)}")
    return codes


def decode_flac(data: bytes) -> Samples:
    """Those codes as samples in [-1, 1]; as :func:`decode_flac_codes`."""
    return decode_flac_codes(data) * np.float32(1 / 32768)


def check_header(*, rate_hz: int, channels: int, frames: int | None, min_seconds: float, max_seconds: float) -> None:
    """Refuse what is not worth decoding.

    Args:
        rate_hz: Sample rate.
        channels: Number of channels.
        frames: Length in frames, None if the header does not tell it.
        min_seconds: Shortest duration accepted.
        max_seconds: Longest duration accepted.

    Raises:
        AudioError: The sample rate or the number of channels is absurd, or the duration is outside the limits.
    """
    if not MIN_RATE_HZ <= rate_hz <= MAX_RATE_HZ:
        raise AudioError(f"sample rate: must be {MIN_RATE_HZ} to {MAX_RATE_HZ} Hz, got {rate_hz}")
    if not 1 <= channels <= MAX_CHANNELS:
        raise AudioError(f"channels: must be 1 to {MAX_CHANNELS}, got {channels}")
    if frames is None:
        return
    if frames <= 0:
        raise AudioError("empty: there are no samples")
    seconds = frames / rate_hz
    if seconds > max_seconds:
        raise AudioError(f"too long: must be at most {max_seconds:g} s, got {seconds:.2f} s")
    if seconds < min_seconds:
        raise AudioError(f"too short: must be at least {min_seconds:g} s, got {seconds:.3f} s")


def _frames_of_stretch(sound: Sound, start_seconds: float, num_seconds: float | None) -> tuple[int, int | None]:
    """The first frame and the one behind the last; None: to the end."""
    first = round(start_seconds * sound.rate_hz)
    return first, None if num_seconds is None else round((start_seconds + num_seconds) * sound.rate_hz)


def _check_told(sound: Sound, first: int, last: int | None, limits: dict[str, float]) -> None:
    """Refuse by the header, before anything is decoded."""
    shape, told = {"rate_hz": sound.rate_hz, "channels": sound.channels}, sound.frames
    most = least = None if last is None else last - first
    if told is not None:
        check_header(**shape, frames=told, min_seconds=0.0, max_seconds=math.inf)
        _refuse_outside(sound.rate_hz, first, last, told)
        end = told if last is None else min(last, told)
        most, least = end - first, max(1, min(end, told - sound.slack_frames) - first)
    # Padding that the decoder may leave out makes a recording neither too long nor too short.
    check_header(**shape, frames=most, min_seconds=limits["min_seconds"], max_seconds=math.inf)
    check_header(**shape, frames=least, min_seconds=0.0, max_seconds=limits["max_seconds"])


def _refuse_outside(rate_hz: int, first: int, last: int | None, frames: int) -> None:
    """A stretch may end a little later than the recording, but not begin there."""
    end = first + 1 if last is None else last
    if not 0 <= first < min(end, frames) or end - frames > _OUTSIDE_SECONDS * rate_hz:
        raise AudioError(
            f"outside: a stretch must lie within its recording of {frames / rate_hz:.2f} s, got "
            f"{first / rate_hz:.2f} s to {end / rate_hz:.2f} s"
        )


def _checked(sound: Sound, first: int, last: int | None, limits: dict[str, float]) -> Iterator[Samples]:
    """Frames ``first`` to ``last`` as one channel at the file's own rate, none of them missing or senseless."""
    mix, got, rate_hz = _Mix(), 0, sound.rate_hz
    for block in sound.read(first, last):
        samples = mix(block)
        peak = max(float(samples.max()), -float(samples.min()))  # of samples among which one is NaN: NaN
        if not peak < math.inf:
            raise AudioError("not finite: samples must be numbers, got NaN or infinity")
        if peak > MAX_PEAK:
            raise AudioError(f"out of range: samples must be within [-1, 1], got a peak of {peak:.3g}")
        got += len(samples)
        if got > limits["max_seconds"] * rate_hz:
            break
        yield samples
    else:
        told = sound.frames
        if told is not None and got < min(told - sound.slack_frames, last or told) - first:
            raise AudioError(f"truncated: the header promises {told} frames, got {first + got}")
        if first or last is not None:
            _refuse_outside(rate_hz, first, last, first + got)
    check_header(rate_hz=rate_hz, channels=1, frames=got, **limits)


class _Mix:
    """The mean of the channels, until they cancel each other; from there on the loudest of them.

    A microphone wired the wrong way round gives two channels of opposite sign, whose mean is silence although both
    hold the same speech. One channel is then the recording, and changing back could only add steps.
    """

    def __init__(self) -> None:
        self._channel: int | None = None

    def __call__(self, block: Block) -> Samples:
        if block.shape[1] == 1:
            return block[:, 0]
        if self._channel is None:
            mean = block.mean(axis=1, dtype=np.float32)
            powers = np.einsum("fc,fc->c", block, block)
            if np.dot(mean, mean) >= _CANCELLED_SHARE * powers.mean():
                return mean
            self._channel = int(powers.argmax())
        return block[:, min(self._channel, block.shape[1] - 1)]


def _resample(blocks: Iterator[Samples], rate_hz: int) -> Iterator[Samples]:
    is_empty = True
    for samples in blocks if rate_hz == SAMPLE_RATE_HZ else _resampled(blocks, rate_hz):
        if len(samples):
            is_empty = False
            yield np.clip(samples, -1.0, 1.0, out=samples if samples.flags.writeable else None)
    if is_empty:
        raise AudioError("empty: too short for one sample at 16 kHz")


def _resampled(blocks: Iterator[Samples], rate_hz: int) -> Iterator[Samples]:
    # Gives the same samples as resampling all at once, bit for bit.
    resampler = soxr.ResampleStream(rate_hz, SAMPLE_RATE_HZ, 1, dtype="float32", quality="HQ")
    for block in blocks:
        yield resampler.resample_chunk(np.ascontiguousarray(block))
    yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)


def _read_remote(recording: Recording) -> bytes:
    # Imported with the first address only.
    from shards.places import Place

    try:
        with Place.of(recording.path).open(is_read_once=recording.offset_bytes is None) as file:
            return _read_part(file, recording.offset_bytes, recording.num_bytes)
    except OSError as cause:
        raise AudioError(f"unreadable: {cause.strerror or cause}") from cause
    except SourceError as error:
        # What is not there is one recording less; a package that is missing concerns them all.
        if error.__cause__ is None or isinstance(error.__cause__, ImportError):
            raise
        raise AudioError(f"unreadable: {error}") from error


def _read_part(file: BinaryIO, offset_bytes: int | None, num_bytes: int | None) -> bytes:
    if offset_bytes is not None:
        file.seek(offset_bytes)
    wanted = MAX_BYTES + 1 if num_bytes is None else num_bytes
    data = io.BytesIO()
    # A raw file may give less than it is asked for.
    while data.tell() < min(wanted, MAX_BYTES + 1) and (block := file.read(min(1 << 20, wanted - data.tell()))):
        data.write(block)
    if data.tell() > MAX_BYTES:
        raise AudioError(f"too large: must be at most {MAX_BYTES} bytes, got more")
    if num_bytes is not None and data.tell() < num_bytes:
        raise AudioError(f"truncated: must be {num_bytes} bytes from byte {offset_bytes}, got {data.tell()}")
    return data.getvalue()


def _open_regular(path: str | Path) -> BinaryIO:
    try:
        return open_regular(path, buffering=0)  # libsndfile reads on at the descriptor
    except (OSError, ValueError) as cause:
        raise AudioError(f"unreadable: {getattr(cause, 'strerror', None) or cause}") from cause
