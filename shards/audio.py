"""Audio files in, 16 kHz mono float32 out; and the lossless FLAC that shards hold.

libsndfile decodes; what it cannot read goes to PyAV (FFmpeg) where that is installed. Neither is trusted: the header is
checked before anything is decoded, what was decoded is checked against the header, and samples must be numbers. An
:class:`AudioError` here begins with a short kind before its first colon (``truncated: ...``), by which reports count.
"""

import io
import math
import os
import re
import stat
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from shards.errors import AudioError
from shards.schema import SAMPLE_RATE_HZ

Samples = npt.NDArray[np.float32]

MAX_SECONDS = 1200.0
"""qwen-asr takes no longer audio in one piece."""
MIN_RATE_HZ, MAX_RATE_HZ = 4_000, 384_000
MAX_CHANNELS = 32
MAX_PEAK = 4.0
"""Decoders overshoot 1.0 a little; beyond this a float file holds something else than samples in [-1, 1]."""

_BLOCK_FRAMES = 1 << 16
# Lengths that libsndfile reports for streams whose header does not tell one.
_UNKNOWN_FRAMES = 1 << 52
# Sizes that programs write into a WAV header when they stream and cannot go back to mend it.
_STREAMED_BYTES = 0x7FFF_0000
# An MP3's length is counted in MPEG frames of 1,152; the last ones may be padding that the decoder leaves out.
_MP3_SLACK_FRAMES = 2 * 1152
_AV_SLACK_SECONDS = 0.25
# FFmpeg also opens playlists and lists of other files (and addresses): only plain containers are let through.
_AV_CONTAINERS = "mov,mp4,m4a,matroska,webm,aac,flac,wav,w64,mp3,ogg,asf,amr,aiff,caf,au"
# Containers without an index, whose length FFmpeg only estimates.
_AV_ESTIMATED = {"aac", "mp3", "amr"}


class _UnreadableError(AudioError):
    """libsndfile cannot read this file; another decoder might."""


def decode(path: str | Path, *, min_seconds: float = 0.0, max_seconds: float = MAX_SECONDS) -> Samples:
    """Decode an audio file.

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
        return _decode(file, min_seconds, max_seconds)


def decode_bytes(data: bytes, *, min_seconds: float = 0.0, max_seconds: float = MAX_SECONDS) -> Samples:
    """Decode the bytes of an audio file; as :func:`decode`."""
    return _decode(io.BytesIO(data), min_seconds, max_seconds)


def header_seconds(path: str | Path) -> float | None:
    """A recording's duration as its header tells it, decoding nothing; None if libsndfile finds no length."""
    try:
        with _open_regular(path) as file, _open_sound(file) as sound:
            return sound.frames / sound.samplerate if sound.frames < _UNKNOWN_FRAMES else None
    except AudioError:
        return None


def encode_flac(samples: Samples) -> bytes:
    """16-bit mono 16 kHz FLAC; equal samples give equal bytes. Values that came from 16 bits come back unchanged."""
    codes = np.clip(np.rint(samples * np.float32(32768)), -32768, 32767).astype(np.int16)
    file = io.BytesIO()
    soundfile.write(file, codes, SAMPLE_RATE_HZ, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def decode_flac(data: bytes) -> Samples:
    """The reverse of :func:`encode_flac`: nothing but such FLAC is accepted.

    Raises:
        AudioError: It is something else, or damaged.
    """
    file = io.BytesIO(data)
    with _open_sound(file) as sound:
        if (sound.format, sound.samplerate, sound.channels) != ("FLAC", SAMPLE_RATE_HZ, 1):
            raise AudioError(
                f"format: must be mono 16 kHz FLAC, got {sound.format} at {sound.samplerate} Hz with "
                f"{sound.channels} channels"
            )
        return _read_blocks(sound, max_frames=round(MAX_SECONDS * SAMPLE_RATE_HZ))


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


def _decode(file: BinaryIO, min_seconds: float, max_seconds: float) -> Samples:
    limits = {"min_seconds": min_seconds, "max_seconds": max_seconds}
    try:
        samples, rate_hz = _read_with_libsndfile(file, limits)
    except _UnreadableError as cause:
        samples, rate_hz = _read_with_av(file, limits, cause)
    check_header(rate_hz=rate_hz, channels=1, frames=len(samples), **limits)
    if not np.isfinite(samples).all():
        raise AudioError("not finite: samples must be numbers, got NaN or infinity")
    if (peak := float(np.abs(samples).max())) > MAX_PEAK:
        raise AudioError(f"out of range: samples must be within [-1, 1], got a peak of {peak:.3g}")
    if rate_hz != SAMPLE_RATE_HZ:
        samples = soxr.resample(samples, rate_hz, SAMPLE_RATE_HZ, quality="HQ")
    if not len(samples):
        raise AudioError("empty: too short for one sample at 16 kHz")
    return np.clip(samples, -1.0, 1.0).astype(np.float32, copy=False)


def _open_regular(path: str | Path) -> BinaryIO:
    try:
        # Without O_NONBLOCK, opening a pipe that nobody writes to waits for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except (OSError, ValueError) as cause:
        raise AudioError(f"unreadable: {getattr(cause, 'strerror', None) or cause}") from cause
    file = os.fdopen(descriptor, "rb", buffering=0, closefd=True) if _is_regular(descriptor) else None
    if file is None:
        os.close(descriptor)
        raise AudioError("unreadable: must be a regular file")
    return file


def _is_regular(descriptor: int) -> bool:
    return stat.S_ISREG(os.fstat(descriptor).st_mode)


def _open_sound(file: BinaryIO) -> soundfile.SoundFile:
    # By descriptor or by bytes: given a name, soundfile believes its suffix (`.raw`, `.mp3`) more than the contents.
    source: Any = file if isinstance(file, io.BytesIO) else file.fileno()
    try:
        return soundfile.SoundFile(source, closefd=False)
    except (soundfile.SoundFileError, RuntimeError, ValueError, TypeError) as cause:
        raise _UnreadableError(f"unreadable: {_reason(cause)}") from cause


def _read_with_libsndfile(file: BinaryIO, limits: dict[str, float]) -> tuple[Samples, int]:
    with _open_sound(file) as sound:
        rate_hz, told = sound.samplerate, sound.frames if sound.frames < _UNKNOWN_FRAMES else None
        _refuse_truncated(sound, file)
        check_header(rate_hz=rate_hz, channels=sound.channels, frames=told, **limits)
        samples = _read_blocks(sound, max_frames=math.floor(limits["max_seconds"] * rate_hz))
        slack = _MP3_SLACK_FRAMES if sound.format == "MP3" else 0
    if told is not None and len(samples) < told - slack:
        raise AudioError(f"truncated: the header promises {told} frames, got {len(samples)}")
    return samples, rate_hz


def _read_blocks(sound: soundfile.SoundFile, *, max_frames: int) -> Samples:
    """All frames as one channel, or a few more than ``max_frames`` of them."""
    blocks: list[Samples] = [np.zeros(0, np.float32)]
    frames = 0
    try:
        while frames <= max_frames and len(block := sound.read(_BLOCK_FRAMES, dtype="float32", always_2d=True)):
            blocks.append(block.mean(axis=1, dtype=np.float32))
            frames += len(block)
    except (soundfile.SoundFileError, RuntimeError, ValueError) as cause:
        raise _UnreadableError(f"damaged: {_reason(cause)}") from cause
    return np.concatenate(blocks)


def _refuse_truncated(sound: soundfile.SoundFile, file: BinaryIO) -> None:
    """Notice files that were cut: libsndfile reads them as shorter ones and says so only in its log."""
    if sound.format == "OGG":
        position = file.tell()  # libsndfile reads on from here
        file.seek(max(0, file.seek(0, os.SEEK_END) - (1 << 17)))
        tail = file.read()
        file.seek(position)
        page = tail[max(0, tail.rfind(b"OggS")) :]
        # Byte 5 of a page holds its flags (4: the last one of a stream), byte 26 the number of lengths that follow.
        is_whole = len(page) > 26 and page[5] & 4 and len(page) >= 27 + page[26] + sum(page[27 : 27 + page[26]])
        if not is_whole:
            raise AudioError("truncated: the last Ogg page is missing or cut")
        return
    # RIFF's own size covers trailing chunks too and is often wrong in sound files that play well.
    names = "data|SSND|Data Size" if sound.format in ("WAV", "WAVEX") else "data|SSND|Data Size|riff|Riff size"
    for match in re.finditer(rf"(?m)^\s*(?:{names})\s*:\s*(\d+) \(should be (\d+)\)", sound.extra_info):
        told, found = int(match[1]), int(match[2])
        if found < told < _STREAMED_BYTES:
            raise AudioError(f"truncated: the header promises {told} bytes, got {found}")


def _read_with_av(file: BinaryIO, limits: dict[str, float], cause: AudioError) -> tuple[Samples, int]:
    try:
        import av
    except ImportError:
        raise cause from None
    file.seek(0)
    try:
        with av.open(file, mode="r", options={"format_whitelist": _AV_CONTAINERS}) as container:
            streams = [stream for stream in container.streams.audio if stream.codec_context is not None]
            if not streams or not streams[0].codec_context.channels:
                raise cause
            return _read_av_stream(container, streams[0], limits)
    except (av.error.FFmpegError, ValueError, OSError) as av_cause:
        if isinstance(av_cause, AudioError):
            raise
        raise cause from av_cause


def _read_av_stream(container: Any, stream: Any, limits: dict[str, float]) -> tuple[Samples, int]:
    import av

    rate_hz, channels = stream.codec_context.sample_rate, stream.codec_context.channels
    duration = (
        float(stream.duration * stream.time_base) if stream.duration else (container.duration or 0) / av.time_base
    )
    told = round(duration * rate_hz) if duration > 0 and container.format.name not in _AV_ESTIMATED else None
    check_header(rate_hz=rate_hz, channels=channels, frames=told, **limits)
    # Changes the number format only. Interleaved: PyAV 18 crashes on 8 or more separate planes.
    resampler = av.AudioResampler(format="flt")
    blocks, frames, max_frames = [np.zeros(0, np.float32)], 0, limits["max_seconds"] * rate_hz
    for frame in container.decode(stream):
        if (frame.sample_rate, frame.layout.nb_channels) != (rate_hz, channels):
            raise AudioError("format: sample rate or channels change within the file")
        for converted in resampler.resample(frame):
            blocks.append(converted.to_ndarray().reshape(-1, channels).mean(axis=1, dtype=np.float32))
            frames += converted.samples
        if frames > max_frames:
            break
    if told is not None and frames < told - _AV_SLACK_SECONDS * rate_hz:
        raise AudioError(f"truncated: the header promises {told} frames, got {frames}")
    return np.concatenate(blocks), rate_hz


def _reason(error: Exception) -> str:
    """What a decoder said. The text of libsndfile's errors can itself fail to be made from undecodable bytes."""
    text = error.error_string if isinstance(error, soundfile.LibsndfileError) else str(error)
    return " ".join(text.split()).removeprefix("Error : ").rstrip(".")
