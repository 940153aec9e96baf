"""Audio files to blocks of float32 samples, by libsndfile or PyAV (FFmpeg), whichever reads the file at all.

Memory is bounded by a block, whatever the length. A FLAC that libsndfile gives up in the middle, or whose samples do
not have the MD5 that its header tells, is read on by FFmpeg from there: both give the same samples. Of other codecs
another decoder's samples are not the same, so there the file is damaged.
"""

import hashlib
import importlib
import io
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import soundfile

from shards.containers import Container, inspect
from shards.errors import AudioError

Block = npt.NDArray[np.float32]
"""Some frames of a sound, ``(frames, channels)``; the number of channels may change from block to block."""

_BLOCK_FRAMES = 1 << 16
# Lengths that libsndfile reports for streams whose header does not tell one.
_UNKNOWN_FRAMES = 1 << 52
# Those of libsndfile's formats of which :mod:`shards.containers` can tell that they are whole.
_SOUND_FORMATS = ("WAV", "WAVEX", "RF64", "W64", "AIFF", "CAF", "AU", "NIST", "FLAC", "OGG", "MP3")
_AV_SLACK_SECONDS = 0.25
# FFmpeg also opens playlists and lists of other files (and addresses): only plain containers are let through.
_AV_CONTAINERS = "mov,mp4,m4a,matroska,webm,aac,flac,wav,w64,mp3,ogg,asf,amr,aiff,caf,au"
# Containers without an index, whose length FFmpeg only estimates.
_AV_ESTIMATED = {"aac", "mp3", "amr"}


class _UnreadableError(AudioError):
    """libsndfile cannot read this file; another decoder might."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sound:
    """An open audio file; lives as long as the context that gave it."""

    rate_hz: int
    channels: int
    """Of its beginning."""
    frames: int | None
    """As the header tells it or as counted; None if nothing does."""
    slack_frames: int
    """How many fewer may come out of a file that is whole."""
    read: Callable[[int, int | None], Iterator[Block]]
    """Gives the frames from a first one up to, not including, a last one; None: to the end. To be called once."""


@contextmanager
def open_sound(file: BinaryIO) -> Generator[Sound]:
    """Open an audio file with the decoder that reads it.

    Raises:
        AudioError: No decoder can read it, or it is not whole. ``Sound.read`` raises it for what is damaged inside.
    """
    container = inspect(file)
    with ExitStack() as stack:
        yield _enter_sound(file, container, stack)


def _enter_sound(file: BinaryIO, container: Container, stack: ExitStack) -> Sound:
    has_av = _has_av()
    # libmpg123 estimates the length of an MP3 from its first frame, and libsndfile reads only the first of several
    # streams: FFmpeg does better. Without it, what libsndfile leaves out is at least noticed.
    if has_av and (container.kind == "mpeg" or container.is_chained):
        try:
            return stack.enter_context(_open_with_av(file, container))
        except AudioError:
            file.seek(0)
    try:
        sound = stack.enter_context(open_sound_file(file))
    except _UnreadableError as cause:
        if not has_av:
            raise AudioError(f"{cause}; `pip install qad-dist[pyav]` adds formats") from None
        return stack.enter_context(_open_with_av(file, container, cause))
    if container.is_chained:
        raise AudioError("format: must be one stream, got several")
    return _sound_of(sound, file, container)


def _has_av() -> bool:
    try:
        importlib.import_module("av")
    except ImportError:
        return False
    return True


def header_frames(file: BinaryIO) -> tuple[int, int] | None:
    """Length in frames and sample rate as libsndfile reads them from the header, decoding nothing; else None."""
    try:
        with open_sound_file(file) as sound:
            return (sound.frames, sound.samplerate) if 0 < sound.frames < _UNKNOWN_FRAMES else None
    except AudioError:
        return None


def open_sound_file(file: BinaryIO) -> soundfile.SoundFile:
    """Open with libsndfile alone, looking no further.

    Raises:
        AudioError: libsndfile cannot read it, or cannot tell whether it is whole.
    """
    # By descriptor or by bytes: given a name, soundfile believes its suffix (`.raw`, `.mp3`) more than the contents.
    source: Any = file if isinstance(file, io.BytesIO) else file.fileno()
    try:
        sound = soundfile.SoundFile(source, closefd=False)
    except (soundfile.SoundFileError, RuntimeError, ValueError, TypeError) as cause:
        raise _UnreadableError(f"unreadable: {reason_of(cause)}") from cause
    if sound.format not in _SOUND_FORMATS:
        name = sound.format
        sound.close()
        raise _UnreadableError(f"format: must be one of {', '.join(_SOUND_FORMATS)}, got {name}")
    return sound


def _sound_of(sound: soundfile.SoundFile, file: BinaryIO, container: Container) -> Sound:
    told = sound.frames if sound.frames < _UNKNOWN_FRAMES else None
    slack = 0
    if container.seconds is not None:
        told, slack = _counted_frames(container, sound.samplerate)
    read = _read_flac if sound.format == "FLAC" else _read_sound
    return Sound(
        rate_hz=sound.samplerate,
        channels=sound.channels,
        frames=told,
        slack_frames=slack,
        read=lambda first, last: read(sound, file, container, first, last),
    )


def _counted_frames(container: Container, rate_hz: int) -> tuple[int, int]:
    assert container.seconds is not None
    return round(container.seconds * rate_hz), round(container.slack_seconds * rate_hz)


def _read_sound(
    sound: soundfile.SoundFile, file: BinaryIO, container: Container, first: int, last: int | None
) -> Iterator[Block]:
    given = 0
    try:
        for block in _read_blocks(sound, first, last, dtype="float32"):
            given += len(block)
            yield block
    except _UnreadableError as cause:
        if given:
            raise AudioError(str(cause)) from cause
        yield from _read_on_with_av(sound, file, container, first, last, cause)


def _read_flac(
    sound: soundfile.SoundFile, file: BinaryIO, container: Container, first: int, last: int | None
) -> Iterator[Block]:
    digest, bits = hashlib.md5(usedforsecurity=False), container.bits_per_sample
    dtype = "int16" if bits == 16 else "int32"
    scale = np.float32(2.0**-15 if bits == 16 else 2.0**-31)
    given, cause = first, AudioError("damaged: the samples do not have the MD5 that the header tells")
    try:
        for codes in _read_blocks(sound, first, last, dtype=dtype):
            if container.md5:
                digest.update(codes if bits == 16 else _md5_bytes(codes, bits))
            given += len(codes)
            yield codes.astype(np.float32) * scale
        if first > 0 or last is not None or not container.md5 or digest.digest() == container.md5:
            return
    except _UnreadableError as error:
        cause = error
    yield from _read_on_with_av(sound, file, container, given, last, cause)


def _md5_bytes(codes: npt.NDArray[np.int32], bits: int) -> bytes:
    """Samples as FLAC's MD5 is taken over them: little-endian, in whole bytes. ``codes`` fill the upper bits."""
    num_bytes = -(-bits // 8)
    return (codes >> (32 - bits)).astype("<i4").reshape(-1, 1).view(np.uint8)[:, :num_bytes].tobytes()


def _read_on_with_av(
    sound: soundfile.SoundFile,
    file: BinaryIO,
    container: Container,
    first: int,
    last: int | None,
    cause: AudioError,
) -> Iterator[Block]:
    if not _has_av():
        raise AudioError(str(cause)) from cause
    with _open_with_av(file, container, cause) as other:
        if other.rate_hz != sound.samplerate:
            raise AudioError("format: sample rate changes within the file") from cause
        yield from other.read(first, last)


def _read_blocks(sound: soundfile.SoundFile, first: int, last: int | None, *, dtype: str) -> Iterator[Any]:
    """Frames ``first`` to ``last`` in the given number format."""
    try:
        position = 0
        if first and sound.seekable():
            position = sound.seek(first)
        while last is None or position < last:
            count = _BLOCK_FRAMES if last is None else min(_BLOCK_FRAMES, last - position)
            block = sound.read(count, dtype=dtype, always_2d=True)
            if not len(block):
                return
            position += len(block)
            if position > first:
                yield block[max(0, len(block) - (position - first)) :]
    except (soundfile.SoundFileError, RuntimeError, ValueError) as cause:
        raise _UnreadableError(f"damaged: {reason_of(cause)}") from cause


@contextmanager
def _open_with_av(file: BinaryIO, container: Container, cause: AudioError | None = None) -> Generator[Sound]:
    """Raises ``cause``, why libsndfile does not read the file, if FFmpeg does not either."""
    import av

    file.seek(0)
    cause = cause or AudioError("unreadable: Format not recognised")
    try:
        source = av.open(file, mode="r", options={"format_whitelist": _AV_CONTAINERS})
    except (av.error.FFmpegError, ValueError, OSError) as av_cause:
        raise cause from av_cause
    with source:
        streams = [stream for stream in source.streams.audio if stream.codec_context is not None]
        if not streams or not streams[0].codec_context.channels:
            raise cause
        yield _av_sound_of(source, streams[0], container)


def _av_sound_of(source: Any, stream: Any, container: Container) -> Sound:
    import av

    rate_hz = stream.codec_context.sample_rate
    told, slack = None, round(_AV_SLACK_SECONDS * rate_hz)
    seconds = float(stream.duration * stream.time_base) if stream.duration else (source.duration or 0) / av.time_base
    if container.seconds is not None:
        told, slack = _counted_frames(container, rate_hz)
    elif seconds > 0 and source.format.name not in _AV_ESTIMATED and not container.is_chained:
        told = round(seconds * rate_hz)
        slack = 0 if container.kind == "flac" else slack
    return Sound(
        rate_hz=rate_hz,
        channels=stream.codec_context.channels,
        frames=told,
        slack_frames=slack,
        read=lambda first, last: _read_with_av(source, stream, container, first, last),
    )


def _read_with_av(source: Any, stream: Any, container: Container, first: int, last: int | None) -> Iterator[Block]:
    import av

    is_flac = container.kind == "flac" and container.bits_per_sample > 0
    if is_flac:
        stream.codec_context.options = {"err_detect": "crccheck+explode"}
    digest, position = hashlib.md5(usedforsecurity=False), 0
    try:
        for block in _join(_av_blocks(source, stream, is_flac=is_flac)):
            if is_flac:
                digest.update(_md5_bytes(block, container.bits_per_sample))
                block = block.astype(np.float32) * np.float32(2.0**-31)
            begin, end = max(0, first - position), len(block) if last is None else last - position
            position += len(block)
            if begin < min(end, len(block)):
                yield block[begin:end]
            if last is not None and position >= last:
                return
    except (av.error.FFmpegError, ValueError, OSError) as cause:
        if isinstance(cause, AudioError):
            raise
        raise AudioError(f"damaged: {getattr(cause, 'strerror', None) or cause}") from cause
    if container.md5 and digest.digest() != container.md5:
        raise AudioError("damaged: the samples do not have the MD5 that the header tells")


def _join(parts: Iterator[Any]) -> Iterator[Any]:
    """Blocks of about the usual length from FFmpeg's, which are a fiftieth of that."""
    gathered: list[Any] = []
    frames = 0
    for part in parts:
        if gathered and (frames >= _BLOCK_FRAMES or part.shape[1] != gathered[0].shape[1]):
            yield np.concatenate(gathered)
            gathered, frames = [], 0
        gathered.append(part)
        frames += len(part)
    if gathered:
        yield np.concatenate(gathered)


def _av_blocks(source: Any, stream: Any, *, is_flac: bool) -> Iterator[Any]:
    """``(frames, channels)`` as float32, or of FLAC as int32 that fill the upper bits."""
    import av

    rate_hz, channels, resampler = stream.codec_context.sample_rate, 0, None
    for frame in source.decode(stream):
        if frame.sample_rate != rate_hz:
            raise AudioError("format: sample rate changes within the file")
        if frame.format.name == "fltp" and frame.layout.nb_channels <= 2:
            yield frame.to_ndarray().T
            continue
        if resampler is None or frame.layout.nb_channels != channels:
            channels = frame.layout.nb_channels
            # Changes the number format only. Interleaved: PyAV 18 crashes on 8 or more separate planes.
            resampler = av.AudioResampler(format="s32" if is_flac else "flt")
        for converted in resampler.resample(frame):
            yield converted.to_ndarray().reshape(-1, channels)


def reason_of(error: Exception) -> str:
    """What a decoder said. The text of libsndfile's errors can itself fail to be made from undecodable bytes."""
    text = error.error_string if isinstance(error, soundfile.LibsndfileError) else str(error)
    return " ".join(text.split()).removeprefix("Error : ").rstrip(".")
